//! Chains with a part missing: the near names in the error, `parent=`, `degraded=orphan` and `degraded=short`.

use std::fs::{self, File};
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use fuse_tests::harness::{Scratch, digest, digest_range, need_fuse};
use fuse_tests::make::write::{self, Hosted};
use fuse_tests::make::{Content as _, Layer};

/// Sectors of the disks here.
const SECTORS: u64 = 8192;
/// Sectors of a grain.
const GRAIN: u64 = 128;

/// Returns an embedded descriptor with a CID, and with the CID and the name of a parent.
fn descriptor(cid: &str, parent: Option<(&str, &str)>) -> Vec<u8> {
    let (parent_cid, hint) = parent.unwrap_or(("ffffffff", ""));
    let hint = if hint.is_empty() {
        String::new()
    } else {
        format!("parentFileNameHint=\"{hint}\"\n")
    };
    format!(
        "# Disk DescriptorFile\nversion=1\nCID={cid}\nparentCID={parent_cid}\n{hint}createType=\"monolithicSparse\"\n\
         RW {SECTORS} SPARSE \"x.vmdk\"\n"
    )
    .into_bytes()
}

/// Writes a base with the CID 11111111, and its child, which holds grains 1 and 20. Returns their disks.
fn snapshot(base: &Path, child: &Path, hint: &str) -> (Arc<Layer>, Layer) {
    let below = Arc::new(Layer::new(7, "base", SECTORS, GRAIN).fill([0, 1, 2, 10, 63]));
    write::hosted(base, &below, Some(&descriptor("11111111", None)), &Hosted::default()).unwrap();
    let own = Layer::new(8, "child", SECTORS, GRAIN)
        .over(Arc::clone(&below) as _)
        .fill([1, 20]);
    let text = descriptor("22222222", Some(("11111111", hint)));
    write::hosted(child, &own, Some(&text), &Hosted::default()).unwrap();
    (below, own)
}

/// Writes a disk of one flat extent. Returns the image, the file of the extent and the content.
fn flat(scratch: &Scratch, file: &str) -> (PathBuf, PathBuf, Layer) {
    let layer = Layer::new(9, "flat", SECTORS, GRAIN).fill(0..64);
    let path = scratch.path(file);
    write::flat(&path, &layer, 0).unwrap();
    let image = scratch.path("disk.vmdk");
    let text = format!(
        "# Disk DescriptorFile\nversion=1\nCID=33333333\nparentCID=ffffffff\ncreateType=\"monolithicFlat\"\n\
         RW {SECTORS} FLAT \"disk-flat.vmdk\" 0\n"
    );
    fs::write(&image, text).unwrap();
    (image, path, layer)
}

/// Returns the result of a read of 512 bytes.
fn read(file: &File, sector: u64) -> Result<[u8; 512], Option<i32>> {
    let mut buf = [0; 512];
    file.read_exact_at(&mut buf, sector * 512)
        .map_err(|e| e.raw_os_error())?;
    Ok(buf)
}

#[test]
fn a_missing_file_is_reported_with_the_near_names_in_its_folder() {
    if !need_fuse() {
        return;
    }
    let scratch = Scratch::new();
    let (image, _, _) = flat(&scratch, "DISK-flat.vmdk");
    fs::write(scratch.path("disk-flat.vmdk.part"), "").unwrap();
    let refused = scratch.mount().file(&image).refused(1);
    refused.one_error(1, &["disk.vmdk: line 6: extent", "found DISK-flat.vmdk", "rename it"]);
    // A name in the other normal form of Unicode, as a copy from macOS has it.
    let (base, child) = (scratch.path("cafe\u{301}.vmdk"), scratch.path("child.vmdk"));
    snapshot(&base, &child, "caf\u{e9}.vmdk");
    let refused = scratch.mount().file(&child).refused(1);
    refused.one_error(
        1,
        &[
            "child.vmdk: its parent",
            "found cafe\u{301}.vmdk",
            "parent=FILE",
            "degraded=orphan",
        ],
    );
}

/// "the parent of the oldest link found"
#[test]
fn a_parent_that_the_user_names_is_checked_and_read() {
    if !need_fuse() {
        return;
    }
    let scratch = Scratch::new();
    scratch.mkdir("elsewhere");
    let (base, child) = (scratch.path("elsewhere/moved.vmdk"), scratch.path("child.vmdk"));
    let (_, disk) = snapshot(&base, &child, "base.vmdk");
    let parent = format!("parent={}", base.display());
    let mount = scratch.mount().file(&child).arg(&parent).arg("name=disk").start();
    let path = mount.file("disk");
    assert_eq!(digest_range(&path, 0, SECTORS * 512), digest(&disk.read(0, SECTORS)));
    mount.unmount();
    // Another disk is no parent, and a chain that is complete needs none.
    let other = scratch.path("other.vmdk");
    write::hosted(
        &other,
        &Layer::new(1, "o", SECTORS, GRAIN),
        Some(&descriptor("99999999", None)),
        &Hosted::default(),
    )
    .unwrap();
    let wrong = format!("parent={}", other.display());
    let refused = scratch.mount().file(&child).arg(&wrong).refused(1);
    refused.one_error(1, &["parentCID is 11111111", "other.vmdk is 99999999", "degraded=cid"]);
    let needless = scratch.mount().file(&other).arg(&parent).refused_with_any(&[1, 2]);
    assert!(needless.stderr.contains("has no parent"), "{needless}");
}

/// "a child without its parent: EIO there"
#[test]
fn a_snapshot_without_its_parent_shows_its_own_grains_and_no_zeroes_for_the_rest() {
    if !need_fuse() {
        return;
    }
    let scratch = Scratch::new();
    let (base, child) = (scratch.path("base.vmdk"), scratch.path("child.vmdk"));
    let (_, disk) = snapshot(&base, &child, "base.vmdk");
    fs::remove_file(&base).unwrap();
    let mount = scratch
        .mount()
        .file(&child)
        .arg("degraded=orphan")
        .arg("name=disk")
        .start();
    let file = File::open(mount.file("disk")).unwrap();
    for sector in [GRAIN, GRAIN + 127, 20 * GRAIN] {
        assert_eq!(
            read(&file, sector).unwrap().as_slice(),
            disk.read(sector, 1),
            "sector {sector}"
        );
    }
    for sector in [0, GRAIN - 1, 2 * GRAIN, SECTORS - 1] {
        assert_eq!(read(&file, sector), Err(Some(libc::EIO)), "sector {sector}");
    }
    assert!(
        File::options().write(true).open(mount.file("disk")).is_err(),
        "the disk is read-only"
    );
    drop(file);
    mount.unmount();
    let info = scratch
        .vmdkfuse()
        .arg("--info")
        .key("file", &child)
        .arg("degraded=orphan")
        .run()
        .ok();
    assert!(
        info.stdout.contains("base.vmdk") && info.stdout.contains("degraded=orphan"),
        "{info}"
    );
    // An overlay takes whole grains; what it would have to fill from the parent fails.
    let (cow, key) = (scratch.path("o.cow"), "degraded=orphan");
    let mount = scratch
        .mount()
        .file(&child)
        .arg(key)
        .arg(format!("cow={}", cow.display()))
        .arg("name=disk")
        .start();
    let file = File::options().read(true).write(true).open(mount.file("disk")).unwrap();
    let grain = vec![0x5a; 64 << 10];
    file.write_all_at(&grain, (2 * 64) << 10).unwrap();
    assert_eq!(read(&file, 2 * GRAIN).unwrap(), [0x5a; 512]);
    assert_eq!(read(&file, 3 * GRAIN), Err(Some(libc::EIO)));
    drop(file);
    mount.unmount();
}

/// "a flat extent that is too short: EIO behind its end"
#[test]
fn a_flat_extent_that_is_too_short_is_read_up_to_its_end() {
    if !need_fuse() {
        return;
    }
    let scratch = Scratch::new();
    let (image, file, disk) = flat(&scratch, "disk-flat.vmdk");
    // Half a sector more than 4,000 sectors: that sector is lost too.
    File::options()
        .write(true)
        .open(&file)
        .unwrap()
        .set_len(4000 * 512 + 256)
        .unwrap();
    scratch
        .mount()
        .file(&image)
        .refused(1)
        .one_error(1, &["disk-flat.vmdk", "degraded=short"]);
    let mount = scratch
        .mount()
        .file(&image)
        .arg("degraded=short")
        .arg("name=disk")
        .start();
    let path = mount.file("disk");
    assert_eq!(fs::metadata(&path).unwrap().len(), SECTORS * 512);
    assert_eq!(digest_range(&path, 0, 4000 * 512), digest(&disk.read(0, 4000)));
    let file = File::open(&path).unwrap();
    for sector in [4000, 4001, SECTORS - 1] {
        assert_eq!(read(&file, sector), Err(Some(libc::EIO)), "sector {sector}");
    }
    assert!(
        File::options().write(true).open(&path).is_err(),
        "the disk is read-only"
    );
    drop(file);
    mount.unmount();
    let check = scratch
        .vmdkfuse()
        .arg("--check")
        .key("file", &image)
        .arg("degraded=short")
        .run();
    check.expect_code(4);
}
