//! Refusals that change nothing: another base, a changed base, a base or an overlay that another process has open.

use std::fs::{self, File};
use std::time::{Duration, SystemTime};

use fuse_tests::harness::{need, qemu_img};
use fuse_tests::model::{alone, read};
use tempfile::tempdir;
use vmdkfuse::block::Lba;
use vmdkfuse::config::Overlay;
use vmdkfuse::error::ErrorKind;
use vmdkfuse::overlay::commit::Commit;
use vmdkfuse::volume::{self};

use super::pair::{close, disk, local, reading};
use super::text;

#[test]
fn an_overlay_over_another_base_is_refused_and_both_are_named() {
    let _alone = alone();
    let dir = tempdir().unwrap();
    let at = |name: &str| dir.path().join(name);
    if !need("qemu-img") {
        return;
    }
    for (name, size) in [("a.vmdk", "4M"), ("b.vmdk", "4M"), ("large.vmdk", "5M")] {
        qemu_img(["create", "-f", "vmdk", text(&at(name)), size]);
    }
    for (name, len) in [("a.img", 4 << 20), ("b.img", 4 << 20), ("large.img", 5 << 20)] {
        fs::write(at(name), vec![7; len]).unwrap();
    }
    // qemu gives each disk a random CID.
    volume::open(&disk(&at("a.vmdk"), &at("v.cow"))).unwrap();
    volume::open(&disk(&at("a.img"), &at("r.cow"))).unwrap();
    let cases = [
        ("b.vmdk", "v.cow", ErrorKind::Corrupt, "has the CID"),
        ("large.vmdk", "v.cow", ErrorKind::Corrupt, "8192 sectors"),
        ("a.img", "v.cow", ErrorKind::Corrupt, "a disk with the CID"),
        ("b.img", "r.cow", ErrorKind::Corrupt, "8192 sectors of a.img"),
        ("large.img", "r.cow", ErrorKind::Corrupt, "10240 sectors"),
        ("a.vmdk", "r.cow", ErrorKind::Corrupt, "has the CID"),
        ("a.vmdk", "b.vmdk", ErrorKind::Usage, "is not an overlay"),
    ];
    for (base, cow, kind, fragment) in cases {
        let before = fs::read(at(cow)).unwrap();
        for read_only in [false, true] {
            let mut disk = disk(&at(base), &at(cow));
            disk.read_only = read_only;
            let error = volume::open(&disk).expect_err("another base");
            assert_eq!(error.kind(), kind, "{error}");
            for fragment in [text(&at(cow)), fragment] {
                assert!(
                    error.to_string().contains(fragment),
                    "`{error}` does not contain {fragment}"
                );
            }
            assert!(
                kind == ErrorKind::Usage || error.to_string().contains(text(&at(base))),
                "{error}"
            );
        }
        assert!(
            fs::read(at(cow)).unwrap() == before,
            "{cow} over {base}: refused, but the overlay was changed"
        );
    }
    // `degraded=cid` accepts another state of the disk, but not another size.
    for (base, cow, accepted) in [
        ("b.vmdk", "v.cow", true),
        ("b.img", "r.cow", true),
        ("large.img", "r.cow", false),
    ] {
        let mut disk = disk(&at(base), &at(cow));
        local(&mut disk).degraded.cid = true;
        assert_eq!(volume::open(&disk).is_ok(), accepted, "{cow} over {base}");
    }
}

#[test]
fn a_changed_raw_base_is_refused_but_not_one_that_was_moved_with_its_overlay() {
    let _alone = alone();
    let dir = tempdir().unwrap();
    let [old, new] = ["old", "new"].map(|name| dir.path().join(name));
    fs::create_dir(&old).unwrap();
    fs::write(old.join("base.img"), [7; 9000]).unwrap();
    let image = volume::open(&disk(&old.join("base.img"), &old.join("cow.vmdk"))).unwrap();
    image.disk().writer().unwrap().write_at(Lba(3), &[1; 512]).unwrap();
    close(image);
    fs::rename(&old, &new).unwrap();
    let disk = disk(&new.join("base.img"), &new.join("cow.vmdk"));
    assert_eq!(read(volume::open(&disk).unwrap().disk().as_ref(), 3, 1), [1; 512]);
    let base = File::options().write(true).open(new.join("base.img")).unwrap();
    base.set_modified(SystemTime::now() + Duration::from_secs(5)).unwrap();
    let error = volume::open(&disk).unwrap_err();
    assert!(
        error.to_string().contains("was changed since") && error.to_string().contains("degraded=cid"),
        "{error}"
    );
}

#[test]
fn an_overlay_has_one_user_and_a_reader_does_not_create_it() {
    let _alone = alone();
    let dir = tempdir().unwrap();
    let [base, cow] = ["base.img", "cow.vmdk"].map(|name| dir.path().join(name));
    fs::write(&base, [7; 9000]).unwrap();
    let disk = disk(&base, &cow);
    let reading = reading(&disk);
    assert_eq!(volume::open(&reading).unwrap_err().kind(), ErrorKind::NotFound);
    assert!(!cow.exists());
    let first = volume::open(&disk).unwrap();
    let error = volume::open(&disk).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Busy);
    assert!(error.to_string().contains(text(&cow)), "{error}");
    assert_eq!(volume::open(&reading).unwrap_err().kind(), ErrorKind::Busy);
    drop(first);
    volume::open(&disk).unwrap();
    let mut itself = disk;
    itself.overlay = Some(Overlay::File(base.clone()));
    assert!(volume::open(&itself).is_err());
    local(&mut itself).lock = false;
    let error = volume::open(&itself).unwrap_err();
    assert!(error.to_string().contains("is a file of the disk itself"), "{error}");
    assert!(fs::read(&base).unwrap() == [7; 9000]);
}

#[test]
fn a_base_with_an_overlay_beside_it_is_not_written_to_without_force() {
    let _alone = alone();
    let dir = tempdir().unwrap();
    if !need("qemu-img") {
        return;
    }
    let [base, cow] = ["base.vmdk", "cow.vmdk"].map(|name| dir.path().join(name));
    qemu_img(["create", "-f", "vmdk", text(&base), "4M"]);
    drop(volume::open(&disk(&base, &cow)).unwrap());
    let other = dir.path().join("other.vmdk");
    drop(volume::open(&disk(&base, &other)).unwrap());
    // Two overlays share the base: after a commit of one, the other would be garbage.
    let mut disk = disk(&base, &cow);
    let error = Commit::open(&disk).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Policy);
    assert!(
        error.to_string().contains("other.vmdk") && error.to_string().contains("force=true"),
        "{error}"
    );
    local(&mut disk).force = true;
    Commit::open(&disk).unwrap();
    fs::remove_file(&other).unwrap();
    local(&mut disk).force = false;
    Commit::open(&disk).unwrap();
}
