//! Regression tests for defects that were found on mounts. Those of the engine are in `tests/engine/regressions.rs`.

use std::fs::{self, File, FileTimes};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use fuse_tests::harness::{
    Cmd, Mount, STRANGER, Scratch, data_ranges, need, need_fuse, need_root, poll_until, read_range,
};
use fuse_tests::make::write::{self, Descriptor, Hosted, Stream};
use fuse_tests::make::{Content as _, Ctx, Layer, SECTOR};
use nix::libc;

/// Sectors of a disk.
const DISK: u64 = 8192;
/// Sectors of a grain.
const GRAIN: u64 = 128;
/// Numbers of the grains that hold data.
const GRAINS: [u64; 4] = [0, 1, 5, 63];

/// Deadline for an event: the kernel caches attributes for a second. It only bounds a failure.
const DEADLINE: Duration = Duration::from_secs(60);

/// Returns version `n` of a disk; all versions have data in the same grains, but different data.
fn version(n: u64, sectors: u64) -> Layer {
    Layer::new(n, "disk", sectors, GRAIN).fill(GRAINS)
}

/// Types of images whose files are changed by the tests.
const IMAGE_TYPES: [&str; 4] = ["sparse", "stream", "flat", "raw"];

/// Writes a version of a disk as an image of this type into a folder.
///
/// Returns the file to open and the file that holds the content, which may be the same.
fn write_disk(dir: &Path, image_type: &str, layer: &Layer) -> (PathBuf, PathBuf) {
    let (open, sectors) = (
        dir.join(if image_type == "raw" { "disk.img" } else { "disk.vmdk" }),
        layer.sectors(),
    );
    let line = |word: &str, name: &str| format!("RW {sectors} {word} \"{name}\"");
    match image_type {
        "sparse" => {
            let text = Descriptor::new("monolithicSparse", [line("SPARSE", "disk.vmdk")])
                .bytes()
                .unwrap();
            // The grains have the same order in the file for every version, so that one can be written over another.
            let options = Hosted {
                shuffle: false,
                ..Hosted::default()
            };
            write::hosted(&open, layer, Some(&text), &options).unwrap();
        }
        "stream" => {
            let text = Descriptor::new("streamOptimized", [line("SPARSE", "disk.vmdk")])
                .bytes()
                .unwrap();
            write::stream(&open, layer, &text, &Stream::default()).unwrap();
        }
        "flat" => {
            let text = Descriptor::new("monolithicFlat", [line("FLAT", "disk-flat.vmdk") + " 0"])
                .bytes()
                .unwrap();
            write::flat(&dir.join("disk-flat.vmdk"), layer, 0).unwrap();
            write::put(open.clone(), &text).unwrap();
            return (open, dir.join("disk-flat.vmdk"));
        }
        _ => write::flat(&open, layer, 0).unwrap(),
    }
    (open.clone(), open)
}

/// Returns the content of the whole disk.
fn whole(layer: &Layer) -> Vec<u8> {
    layer.read(0, layer.sectors())
}

/// Panics unless each grain of an open file can be read and belongs to one of the two versions.
#[track_caller]
fn assert_one_of(file: &File, versions: [&Layer; 2]) {
    for grain in GRAINS {
        let mut seen = vec![0; (GRAIN * SECTOR) as usize];
        file.read_exact_at(&mut seen, grain * GRAIN * SECTOR)
            .unwrap_or_else(|e| panic!("grain {grain}: {e}"));
        let known = versions.iter().any(|v| v.read(grain * GRAIN, GRAIN) == seen);
        assert!(known, "grain {grain} of an open file belongs to neither version");
    }
}

/// Mounts one disk read-only as `disk`.
fn mount(scratch: &Scratch, open: &Path) -> Mount {
    scratch.mount().arg("readonly=true").file(open).arg("name=disk").start()
}

#[test]
fn regression_an_image_replaced_by_a_rename_is_detected() {
    if !need_fuse() {
        return;
    }
    for image_type in IMAGE_TYPES {
        let scratch = Scratch::new();
        let (images, next) = (scratch.mkdir("images"), scratch.mkdir("next"));
        let (old, new) = (version(1, DISK), version(2, DISK));
        let (open, content) = write_disk(&images, image_type, &old);
        let mount = mount(&scratch, &open);
        let path = mount.file("disk");
        assert!(fs::read(&path).unwrap() == whole(&old), "{image_type}");
        let held = File::open(&path).unwrap();
        let (_, other) = write_disk(&next, image_type, &new);
        fs::rename(other, content).unwrap();
        assert!(
            fs::read(&path).unwrap() == whole(&new),
            "{image_type}: a new open does not see the new image"
        );
        assert_one_of(&held, [&old, &new]);
        drop(held);
        assert!(fs::read(&path).unwrap() == whole(&new), "{image_type}");
        mount.unmount();
    }
}

/// A file that stands in an image's place later is not opened if another user could have chosen it.
#[test]
fn regression_a_replaced_image_is_reopened_without_following_links() {
    if !need_fuse() || !need_root() {
        return;
    }
    let scratch = Scratch::new();
    let secret = scratch.write("secret", [7; 4096]);
    scratch.mkdir("vms");
    let image = scratch.write("vms/disk.img", [1; 4096]);
    let mount = scratch.mount().arg("readonly=true").file("vms/disk.img").start();
    let path = mount.file("disk.raw");
    assert_eq!(fs::read(&path).unwrap(), [1; 4096]);

    fs::remove_file(&image).unwrap();
    std::os::unix::fs::symlink(&secret, &image).unwrap();
    assert!(fs::read(&path).is_err(), "a link was followed");

    fs::remove_file(&image).unwrap();
    fs::write(&image, [2; 4096]).unwrap();
    std::os::unix::fs::chown(&image, Some(STRANGER.uid), Some(STRANGER.gid)).unwrap();
    assert!(fs::read(&path).is_err(), "the file of another user was opened");

    // The folder is the one that was held, not the one that has its name now.
    fs::rename(scratch.path("vms"), scratch.path("moved")).unwrap();
    std::os::unix::fs::symlink(scratch.root(), scratch.path("vms")).unwrap();
    scratch.write("disk.img", [7; 4096]);
    assert!(fs::read(&path).is_err());
    fs::remove_file(scratch.path("moved/disk.img")).unwrap();
    fs::write(scratch.path("moved/disk.img"), [3; 4096]).unwrap();
    assert_eq!(fs::read(&path).unwrap(), [3; 4096]);
    mount.unmount();
}

/// A raw disk stays raw, and a VMDK header that appears in it is refused at the next open.
#[test]
fn regression_a_running_mount_never_changes_its_format() {
    if !need_fuse() {
        return;
    }
    let scratch = Scratch::new();
    let image = scratch.write("disk.img", [1; 4096]);
    let mount = scratch.mount().arg("readonly=true").file("disk.img").start();
    let path = mount.file("disk.raw");
    assert_eq!(fs::read(&path).unwrap(), [1; 4096]);
    let mut text = b"# Disk DescriptorFile\nversion=1\nCID=1\nparentCID=ffffffff\ncreateType=\"custom\"\n\
                     RW 8 FLAT \"other\"\n"
        .to_vec();
    scratch.write("other", [7; 4096]);
    text.resize(4096, b'\n');
    fs::write(&image, text).unwrap();
    assert!(fs::read(&path).is_err(), "the content chose another file");
    fs::write(&image, [2; 4096]).unwrap();
    assert_eq!(fs::read(&path).unwrap(), [2; 4096]);
    mount.unmount();
}

/// The bytes of an image change, but its length, inode and mtime do not.
#[test]
fn regression_a_change_with_a_restored_mtime_is_detected() {
    if !need_fuse() {
        return;
    }
    for image_type in ["sparse", "flat", "raw"] {
        let scratch = Scratch::new();
        let images = scratch.mkdir("images");
        let (old, new) = (version(1, DISK), version(2, DISK));
        let (open, content) = write_disk(&images, image_type, &old);
        let past = SystemTime::now() - Duration::from_secs(3600);
        let set_back = || {
            File::options()
                .write(true)
                .open(&content)
                .unwrap()
                .set_times(FileTimes::new().set_modified(past))
        };
        set_back().unwrap();
        let mount = mount(&scratch, &open);
        let path = mount.file("disk");
        assert!(fs::read(&path).unwrap() == whole(&old), "{image_type}");
        let held = File::open(&path).unwrap();
        let (before, ino) = (
            fs::metadata(&content).unwrap().len(),
            fs::metadata(&content).unwrap().ino(),
        );
        write_disk(&scratch.mkdir("next"), image_type, &new);
        let bytes = fs::read(scratch.path("next").join(content.file_name().unwrap())).unwrap();
        write::poke(&content, 0, &bytes).unwrap();
        set_back().unwrap();
        let after = fs::metadata(&content).unwrap();
        assert_eq!(
            (after.len(), after.ino(), after.modified().unwrap()),
            (before, ino, past),
            "length, inode or mtime changed, so the test shows nothing"
        );
        assert!(
            fs::read(&path).unwrap() == whole(&new),
            "{image_type}: a new open does not see the new bytes"
        );
        assert_one_of(&held, [&old, &new]);
        drop(held);
        mount.unmount();
    }
}

#[test]
fn regression_an_image_of_another_size_is_refused_during_a_mount() {
    if !need_fuse() {
        return;
    }
    for image_type in IMAGE_TYPES {
        let scratch = Scratch::new();
        let images = scratch.mkdir("images");
        let (old, new) = (version(1, DISK), version(2, 2 * DISK));
        let (open, _) = write_disk(&images, image_type, &old);
        let mount = mount(&scratch, &open);
        let path = mount.file("disk");
        let held = File::open(&path).unwrap();
        for file in ["disk.vmdk", "disk-flat.vmdk", "disk.img"] {
            let file = images.join(file);
            fs::remove_file(file).ok();
        }
        write_disk(&images, image_type, &new);
        let error = File::open(&path).map(|_| ()).unwrap_err();
        assert_eq!(error.raw_os_error(), Some(libc::EIO), "{image_type}: {error}");
        assert!(mount.is_running() && mount.is_mounted(), "{image_type}");
        assert_eq!(
            fs::metadata(&path).unwrap().len(),
            DISK * SECTOR,
            "{image_type}: the size of the disk"
        );
        assert_one_of(&held, [&old, &new]);
        write_disk(&images, image_type, &old);
        assert!(
            fs::read(&path).unwrap() == whole(&old),
            "{image_type}: an image of the old size does not open again"
        );
        drop(held);
        mount.unmount();
    }
}

/// Overwrites a descriptor in place with `text`, padded with line feeds: its inode and its length stay the same.
fn rewrite(path: &Path, text: &Descriptor) {
    let mut bytes = text.bytes().unwrap();
    let len = write::length(path).unwrap() as usize;
    assert!(bytes.len() <= len, "{} bytes for {len}", bytes.len());
    bytes.resize(len, b'\n');
    write::poke(path, 0, &bytes).unwrap();
}

/// A folder with two flat extents and a sparse one, all of the same size, and a descriptor that names one of them.
struct SwitchedDisk {
    scratch: Scratch,
    flats: [Layer; 2],
    sparse: Layer,
    descriptor: PathBuf,
}

impl SwitchedDisk {
    fn new() -> Self {
        let scratch = Scratch::new();
        let c = Ctx::new(&scratch.path("images"), 1).unwrap();
        let (flats, sparse) = ([version(1, DISK), version(2, DISK)], version(3, DISK));
        write::flat(&c.at("one.bin"), &flats[0], 0).unwrap();
        write::flat(&c.at("two.bin"), &flats[1], 0).unwrap();
        write::hosted(&c.at("sparse.bin"), &sparse, None, &Hosted::default()).unwrap();
        let descriptor = write::put(c.at("disk.vmdk"), &[b'\n'; 1024]).unwrap();
        Self {
            scratch,
            flats,
            sparse,
            descriptor,
        }
    }

    /// Rewrites the descriptor so that it names this extent.
    fn switch_to(&self, name: &str) {
        let extent = if name == "sparse.bin" {
            "SPARSE \"sparse.bin\""
        } else {
            &format!("FLAT \"{name}\" 0")
        };
        rewrite(
            &self.descriptor,
            &Descriptor::new("custom", [format!("RW {DISK} {extent}")]),
        );
    }
}

/// All opens of a disk use the same mode (passthrough or served). If the image changes to one that needs the other
/// mode, existing and new opens must both work.
#[test]
fn regression_a_flat_disk_changes_while_it_is_open() {
    if !need_fuse() {
        return;
    }
    let s = SwitchedDisk::new();
    for next in ["two.bin", "sparse.bin"] {
        s.switch_to("one.bin");
        let mount = mount(&s.scratch, &s.descriptor);
        let path = mount.file("disk");
        let [one, two] = &s.flats;
        let new = if next == "two.bin" { two } else { &s.sparse };
        let held = File::open(&path).unwrap();
        assert_one_of(&held, [one, one]);
        s.switch_to(next);
        for round in 0..3 {
            let second = File::open(&path).unwrap_or_else(|e| panic!("{next}: open {round}: {e}"));
            assert_one_of(&second, [new, new]);
            assert_one_of(&held, [one, new]);
            assert!(fs::read(&path).unwrap() == whole(new), "{next}");
        }
        drop(held);
        assert!(
            fs::read(&path).unwrap() == whole(new),
            "{next}: after the last open of the old disk was closed"
        );
        mount.unmount();
    }
}

#[test]
fn regression_a_sparse_disk_becomes_flat_while_it_is_open() {
    if !need_fuse() {
        return;
    }
    let s = SwitchedDisk::new();
    s.switch_to("sparse.bin");
    let mount = mount(&s.scratch, &s.descriptor);
    let path = mount.file("disk");
    assert!(fs::read(&path).unwrap() == whole(&s.sparse));
    let held = File::open(&path).unwrap();
    for (next, new) in [("one.bin", &s.flats[0]), ("two.bin", &s.flats[1])] {
        s.switch_to(next);
        let second = File::open(&path).unwrap_or_else(|e| panic!("{next}: {e}"));
        assert_one_of(&second, [new, new]);
        assert!(fs::read(&path).unwrap() == whole(new), "{next}");
        held.read_at(&mut [0; 4096], 0).unwrap();
    }
    drop(held);
    assert!(fs::read(&path).unwrap() == whole(&s.flats[1]));
    mount.unmount();
}

/// With `allow_other`, owner and mode are enforced for other users without `default_permissions`.
#[test]
fn regression_umask_is_enforced_for_other_users() {
    if !need_fuse() || !need_root() {
        return;
    }
    let scratch = Scratch::new();
    scratch.open_to_all();
    let (open, _) = write_disk(&scratch.mkdir("images"), "raw", &version(1, DISK));
    for (option, allowed) in [
        ("allow_other,umask=077", false),
        ("allow_other,umask=022", true),
        ("allow_other", true),
    ] {
        let mount = scratch.mount().arg("-o").arg(option).file(&open).start();
        let outcome = Cmd::new("cat").arg(mount.file("disk.raw")).user(Some(STRANGER)).run();
        if allowed {
            outcome.ok();
        } else {
            outcome.expect_code(1).error_names(&["permission denied"]);
        }
        mount.unmount();
    }
}

/// The cache is bounded by its size in bytes, with a minimum of a few blocks, not by a number of blocks of any size.
///
/// The event loops and the stacks of all threads use 50 MiB of the memory limits here.
#[test]
fn regression_a_small_cache_stays_small() {
    if !need_fuse() || !need("prlimit") {
        return;
    }
    for (grain, blocks, memory) in [(128, 300, 64 << 20), (2048, 96, 96 << 20)] {
        let scratch = Scratch::new();
        let c = Ctx::new(&scratch.path("images"), 1).unwrap();
        let block = |n: u64| format!("{n:>16}").repeat((grain * SECTOR / 16) as usize).into_bytes();
        let empty = c.layer("disk", blocks * grain - 77, grain);
        let layer = (0..blocks)
            .filter(|n| n % 10 != 3)
            .fold(empty, |layer, n| layer.with_grain(n, block(n)));
        let made = c.stream_of(layer, "disk.vmdk", &Stream::default()).unwrap();
        let mount = scratch
            .mount()
            .arg("cache-size=1M")
            .memory(memory)
            .file(&made.path)
            .arg("name=disk")
            .start();
        let file = File::open(mount.file("disk")).unwrap();
        for n in [0..blocks, 0..blocks].into_iter().flatten() {
            let sectors = grain.min(made.layer.sectors() - n * grain);
            let mut seen = vec![0; (sectors * SECTOR) as usize];
            file.read_exact_at(&mut seen, n * grain * SECTOR)
                .unwrap_or_else(|e| panic!("block {n} of {grain}: {e}"));
            assert!(seen == made.layer.read(n * grain, sectors), "block {n} of {grain}");
        }
        drop(file);
        mount.unmount();
    }
}

#[test]
fn regression_the_mtime_follows_that_of_the_image() {
    if !need_fuse() {
        return;
    }
    for image_type in IMAGE_TYPES {
        let scratch = Scratch::new();
        let (open, content) = write_disk(&scratch.mkdir("images"), image_type, &version(1, DISK));
        let mount = mount(&scratch, &open);
        let path = mount.file("disk");
        fs::metadata(&path).unwrap();
        let times = [
            SystemTime::now() + Duration::from_secs(7200),
            SystemTime::now() + Duration::from_secs(3600),
        ];
        for time in times {
            let times = FileTimes::new().set_modified(time);
            File::options()
                .write(true)
                .open(&content)
                .unwrap()
                .set_times(times)
                .unwrap();
            let seen = || fs::metadata(&path).unwrap().modified().unwrap();
            assert!(
                poll_until(DEADLINE, || seen() == time),
                "{image_type}: {:?}, not {time:?}",
                seen()
            );
        }
        mount.unmount();
    }
}

/// Both copies of the grain directory have an invalid entry for a table far from the start of the disk.
#[test]
fn regression_data_before_a_damaged_directory_entry_is_found() {
    if !need_fuse() {
        return;
    }
    const TABLE: u64 = 512 * 8;
    let scratch = Scratch::new();
    let c = Ctx::new(&scratch.path("images"), 1).unwrap();
    let made = c.simple_of(10 * TABLE, 8, &[2 * 512 + 8], &Hosted::lazy()).unwrap();
    for directory in [made.at.gd, made.at.rgd] {
        write::poke(&made.path, directory * SECTOR + 7 * 4, &0x00ff_ffffu32.to_le_bytes()).unwrap();
    }
    let mount = mount(&scratch, &made.path);
    let path = mount.file("disk");
    let bytes = |sectors: std::ops::Range<u64>| sectors.start * SECTOR..sectors.end * SECTOR;
    assert_eq!(
        data_ranges(&path),
        [bytes(2 * TABLE + 64..2 * TABLE + 72), bytes(7 * TABLE..8 * TABLE)]
    );
    let error = File::open(&path)
        .unwrap()
        .read_at(&mut [0; 4096], 7 * TABLE * SECTOR)
        .unwrap_err();
    assert_eq!(error.raw_os_error(), Some(libc::EIO), "{error}");
    assert!(read_range(&path, 0, (7 * TABLE * SECTOR) as usize) == made.layer.read(0, 7 * TABLE));
    assert!(read_range(&path, 8 * TABLE * SECTOR, 4096) == [0; 4096]);
    mount.unmount();
}

/// "or prints one clear error and returns 1"
#[test]
fn regression_a_completely_unreadable_disk_is_one_error() {
    if !need_fuse() {
        return;
    }
    let scratch = Scratch::new();
    let directory = Ctx::new(&scratch.path("directory"), 1).unwrap().simple().unwrap();
    for at in [directory.at.gd, directory.at.rgd] {
        write::poke(&directory.path, at * SECTOR, &0x00ff_ffffu32.to_le_bytes()).unwrap();
    }
    let table = Ctx::new(&scratch.path("table"), 1).unwrap().simple().unwrap();
    damage_table(&table.path, [table.at.tables[&0], table.at.rtables[&0]], 0..64);
    for (path, cause) in [
        (&directory.path, "grain directory entry 0"),
        (&table.path, "of grain table 0"),
    ] {
        for arg in ["-v", "-f"] {
            let outcome = scratch
                .mount()
                .arg("readonly=true")
                .arg("name=disk")
                .file(path)
                .refused(1);
            outcome.one_error(1, &[cause, "disk.vmdk", "byte"]);
            let outcome = scratch
                .mount()
                .arg("readonly=true")
                .arg(arg)
                .arg("name=disk")
                .file(path)
                .refused(1);
            let errors = outcome.stderr.lines().filter(|l| l.contains(cause)).count();
            assert_eq!(errors, 1, "{arg}: {outcome}");
        }
    }
    scratch.assert_no_mounts();
}

/// Makes entries of both copies of a grain table point beyond the end of the file.
fn damage_table(path: &Path, copies: [u64; 2], entries: std::ops::Range<u64>) {
    for at in copies {
        let bad = 0x7fff_ff80u32
            .to_le_bytes()
            .repeat((entries.end - entries.start) as usize);
        write::poke(path, at * SECTOR + entries.start * 4, &bad).unwrap();
    }
}

#[test]
fn regression_the_log_of_a_damaged_disk_is_short() {
    if !need_fuse() {
        return;
    }
    let scratch = Scratch::new();
    let c = Ctx::new(&scratch.path("images"), 1).unwrap();
    let made = c.simple_of(512 * 8, 8, &[0, 1, 2], &Hosted::default()).unwrap();
    damage_table(&made.path, [made.at.tables[&0], made.at.rtables[&0]], 2..512);
    let log = scratch.path("log");
    let mount = scratch
        .mount()
        .arg("readonly=true")
        .arg("--log-file")
        .arg(&log)
        .arg("cache=none")
        .arg("name=disk")
        .file(&made.path)
        .start();
    let path = mount.file("disk");
    let dd = Cmd::new("dd").args(["bs=4096", "conv=noerror,sync", "of=/dev/null"]);
    let outcome = dd.arg(format!("if={}", path.display())).run();
    assert!(
        outcome.stderr.contains("2+510 records in"),
        "dd did not read all of the damage: {outcome}"
    );
    assert!(read_range(&path, 0, 4096) == made.layer.read(0, 8));
    mount.unmount();
    let text = fs::read_to_string(&log).unwrap();
    let lines = text.lines().count();
    assert!((2..=25).contains(&lines), "{lines} lines:\n{text}");
    assert!(text.contains("of grain table 0"), "{text}");
}
