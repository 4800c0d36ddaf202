//! Sizes and holes that the daemon reports beside a writer: never less than what a read shows.

use std::fs::{self, File};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::Path;
use std::thread;
use std::time::{Duration, SystemTime};

use fuse_tests::harness::{Cmd, Mapped, data_ranges, need, poll_until};
use nix::sys::stat::utimes;
use nix::sys::time::{TimeVal, TimeValLike};

use crate::writing::kinds::{Disk, SIZE, for_each_kind};
use crate::writing::open;

/// Panics unless programs that skip holes copy `disk.bytes`.
#[track_caller]
fn assert_copies_are_whole(disk: &Disk, path: &Path) {
    let copy = disk.scratch.path("copy");
    Cmd::new("cp").args(["--sparse=auto"]).arg(path).arg(&copy).run().ok();
    disk.holds(&copy);
    let (from, to) = (path.to_str().unwrap(), copy.to_str().unwrap());
    Cmd::new("qemu-img")
        .args(["convert", "-U", "-f", "raw", "-O", "raw", from, to])
        .run()
        .ok();
    disk.holds(&copy);
    let archive = disk.scratch.path("copy.tar");
    let folder = path.parent().unwrap();
    Cmd::new("tar")
        .args(["-cSf"])
        .arg(&archive)
        .arg("-C")
        .arg(folder)
        .arg("disk")
        .run()
        .ok();
    Cmd::new("tar")
        .args(["-xOf"])
        .arg(&archive)
        .arg("--to-command=cat >copy")
        .dir(disk.scratch.root())
        .run()
        .ok();
    disk.holds(&copy);
}

/// Zeroes the whole disk and waits until it counts as one hole.
fn empty(disk: &mut Disk, path: &Path) {
    open(path).set_len(0).unwrap();
    disk.bytes.fill(0);
    if disk.kind.name == "delta" {
        // Its zeroes are stored grains, as its format has no entry for a zeroed one.
        return;
    }
    // A part of a page at the end of a file stays allocated.
    let empty = || data_ranges(path).iter().all(|data| data.start > SIZE - 65_536);
    let counted = || fs::metadata(path).unwrap().blocks() * 512 <= 65_536 && empty();
    assert!(
        poll_until(Duration::from_secs(60), counted),
        "{}: not empty",
        disk.kind.name
    );
}

/// "While a file is open for reading and writing … SEEK_DATA and SEEK_HOLE answer that all of it is data": for dirty pages
/// of a mapping, whose writer stays open, over a disk that was just seen to be empty.
#[test]
fn copies_beside_a_writer_have_what_a_read_shows() {
    if !need("tar") {
        return;
    }
    for_each_kind(|mut disk| {
        let mount = disk.mount();
        let path = mount.file("disk");
        for mapped in [false, true] {
            empty(&mut disk, &path);
            let file = open(&path);
            let mut mapping = mapped.then(|| Mapped::new(&file));
            match &mut mapping {
                Some(mapping) => mapping.bytes()[1 << 20..][..65_536].fill(1),
                None => file.write_all_at(&[1; 65_536], 1 << 20).unwrap(),
            }
            disk.bytes[1 << 20..][..65_536].fill(1);
            assert_copies_are_whole(&disk, &path);
            // The mapping outlives the descriptor, and stays dirty.
            drop(file);
            if let Some(mapping) = &mut mapping {
                mapping.bytes()[5 << 20..][..4096].fill(2);
                disk.bytes[5 << 20..][..4096].fill(2);
            }
            assert_copies_are_whole(&disk, &path);
            drop(mapping);
            assert_copies_are_whole(&disk, &path);
        }
        mount.unmount();
        disk.check();
    });
}

/// "`st_blocks` … until it is counted, the whole size".
#[test]
fn st_blocks_is_never_too_small() {
    for_each_kind(|mut disk| {
        let mount = disk.mount();
        let path = mount.file("disk");
        empty(&mut disk, &path);
        let file = open(&path);
        let blocks = || fs::metadata(&path).unwrap().blocks() * 512;
        for n in 1..=20u64 {
            file.write_all_at(&[1; 131_072], n * 300_000).unwrap();
            assert!(
                blocks() >= n * 131_072,
                "{}: {} after {n} writes",
                disk.kind.name,
                blocks()
            );
        }
        drop(file);
        for _ in 0..20 {
            assert!(
                blocks() >= 20 * 131_072,
                "{}: {} after the close",
                disk.kind.name,
                blocks()
            );
        }
        let counted = || blocks() < SIZE / 2;
        assert!(
            poll_until(Duration::from_secs(60), counted),
            "{}: never counted",
            disk.kind.name
        );
        mount.unmount();
    });
}

/// "Times move with writes, also where the kernel writes": after a time was set explicitly, with the writer still open.
#[test]
fn times_move_with_writes_of_an_open_file() {
    for_each_kind(|disk| {
        let mount = disk.mount();
        let path = mount.file("disk");
        let long_ago = TimeVal::seconds(1_000_000_000);
        let moved = |since| fs::metadata(&path).unwrap().modified().unwrap() >= since;
        let writer: File = open(&path);
        for n in 0..2u64 {
            utimes(&path, &long_ago, &long_ago).unwrap();
            assert_eq!(
                fs::metadata(&path).unwrap().mtime(),
                1_000_000_000,
                "{}",
                disk.kind.name
            );
            // A write by the kernel shows only in the image's time, whose clock ticks each 10 ms at most.
            thread::sleep(Duration::from_millis(50));
            let before = SystemTime::now() - Duration::from_secs(2);
            writer.write_all_at(b"now", 100 + n).unwrap();
            assert!(
                poll_until(Duration::from_secs(60), || moved(before)),
                "{}",
                disk.kind.name
            );
        }
        drop(writer);
        mount.unmount();
    });
}
