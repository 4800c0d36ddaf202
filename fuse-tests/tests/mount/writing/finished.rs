//! Finished images: complete and marked clean at each close, and some seconds after the last write of any open.

use std::fs::{self, OpenOptions};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::time::Duration;

use fuse_tests::harness::{Cmd, Mapped, poll_until};

use crate::writing::kinds::{Disk, SIZE, for_each_kind};
use crate::writing::open;

/// Returns true if a copy of the image, made while it is mounted, is sound, needs no repair and holds `disk.bytes`.
fn copy_is_complete(disk: &Disk) -> bool {
    let copy = disk.scratch.mkdir("complete");
    let image = disk.image();
    let name = image.file_name().unwrap();
    for entry in fs::read_dir(disk.scratch.root()).unwrap().map(Result::unwrap) {
        let kept = ["vmdk", "img"].map(std::ffi::OsStr::new).map(Some);
        if kept.contains(&entry.path().extension()) {
            fs::copy(entry.path(), copy.join(entry.file_name())).unwrap();
        }
    }
    let format = if image.extension() == Some("vmdk".as_ref()) {
        "vmdk"
    } else {
        "raw"
    };
    let run = |cmd: Cmd| cmd.dir(&copy).run();
    let check = disk.scratch.vmdkfuse().arg("--check").key("file", copy.join(name));
    let sound = format == "raw" || run(check).ended.code == Some(0);
    let convert = Cmd::new("qemu-img")
        .args(["convert", "-f", format, "-O", "raw"])
        .arg(name)
        .arg("seen");
    sound
        && run(convert).ended.code == Some(0)
        && fs::read(copy.join("seen")).unwrap() == disk.bytes
        && (format == "raw" || !is_marked(&copy.join(name)))
}

/// Returns true if a sparse image has the mark of an image in use.
fn is_marked(image: &std::path::Path) -> bool {
    let bytes = fs::read(image).unwrap();
    bytes.starts_with(b"KDMV") && bytes[72] != 0
}

/// "`close` … completes the image": a copy that is made right after it is whole, with other opens of the disk still there.
#[test]
fn an_image_is_complete_after_each_close() {
    for_each_kind(|mut disk| {
        let mount = disk.mount();
        let path = mount.file("disk");
        let reader = fs::File::open(&path).unwrap();
        for n in 0..3u8 {
            let file = match n {
                0 => open(&path),
                _ => OpenOptions::new().write(true).open(&path).unwrap(),
            };
            let at = 2_000_000 + usize::from(n) * 3_000_000;
            file.write_all_at(&[n + 1; 300_000], at as u64).unwrap();
            disk.bytes[at..at + 300_000].fill(n + 1);
            drop(file);
            assert!(copy_is_complete(&disk), "{}: after close {n}", disk.kind.name);
        }
        drop(reader);
        mount.unmount();
        disk.check();
    });
}

/// "some five seconds after the last write the image is complete and marked clean": with a writer that stays open, by
/// write, by a mapping whose descriptor is closed, and for a descriptor that a child has inherited.
#[test]
fn an_image_is_complete_some_seconds_after_the_last_write_of_an_open_file() {
    for_each_kind(|mut disk| {
        let mount = disk.mount();
        let file = open(&mount.file("disk"));
        file.write_all_at(&[1; 300_000], 3_000_000).unwrap();
        disk.bytes[3_000_000..3_300_000].fill(1);
        let times = || {
            fs::metadata(mount.file("disk"))
                .map(|m| (m.modified().unwrap(), m.ctime(), m.ctime_nsec()))
                .unwrap()
        };
        let written = times();
        let complete = |disk: &Disk| poll_until(Duration::from_secs(60), || copy_is_complete(disk));
        assert!(complete(&disk), "{}: the writer is open", disk.kind.name);
        // The completion changes the files of the image, but not the disk: `tar` would find it changed while reading.
        if !["raw", "flat"].contains(&disk.kind.name) {
            assert_eq!(times(), written, "{}: the time moved without a write", disk.kind.name);
        }
        let mut mapped = Mapped::new(&file);
        drop(file);
        mapped.bytes()[7_000_000..7_300_000].fill(2);
        disk.bytes[7_000_000..7_300_000].fill(2);
        mapped.sync().unwrap();
        assert!(complete(&disk), "{}: the mapping is there", disk.kind.name);
        mapped.bytes()[SIZE as usize - 300_000..].fill(3);
        disk.bytes[SIZE as usize - 300_000..].fill(3);
        // Its end reaches the daemon as the end of the open, without a flush.
        drop(mapped);
        assert!(complete(&disk), "{}: the mapping has ended", disk.kind.name);
        mount.unmount();
        disk.check();
    });
}
