//! "The raw file becomes writable": guarantees to every writer of the raw file, tested over every kind of image.

mod ends;
mod estimates;
mod exerciser;
mod finished;
mod kinds;
mod refusals;
mod tools;
mod truncation;

use std::fs::{self, File, OpenOptions};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::thread;
use std::time::{Duration, SystemTime};

use fuse_tests::harness::{data_ranges, poll_until};
use nix::fcntl::{FallocateFlags, fallocate};
use nix::libc;
use nix::sys::stat::{UtimensatFlags, utimensat};
use nix::sys::time::TimeSpec;
use nix::unistd::{Gid, Uid, chown};

use exerciser::Exerciser;
use kinds::{Disk, SIZE, for_each_kind};

/// Opens a file for reading and writing; panics with its path if that fails.
fn open(path: &std::path::Path) -> File {
    OpenOptions::new()
        .read(true)
        .write(true)
        .open(path)
        .unwrap_or_else(|e| panic!("{}: {e}", path.display()))
}

/// Returns the number of exerciser operations for each kind of image: `VMDKFUSE_OPERATIONS`, else 3000.
fn operations() -> usize {
    std::env::var("VMDKFUSE_OPERATIONS").map_or(3000, |n| n.parse().expect("VMDKFUSE_OPERATIONS is a number"))
}

/// "byte-exact random writes against a model through the mount": by write, O_DIRECT, O_DSYNC and a mapping in turn,
/// with punched holes and zeroed ranges in between.
#[test]
fn random_operations_match_a_model_in_memory() {
    for_each_kind(|mut disk| {
        let mount = disk.mount();
        let path = mount.file("disk");
        let mut bytes = std::mem::take(&mut disk.bytes);
        Exerciser::new(path, &mut bytes, 7).run(operations());
        disk.bytes = bytes;
        mount.unmount();
        disk.check();
    });
}

/// "so that parallel neighbours never lose each other's bytes": in pieces of 100 bytes that share sectors and grains.
#[test]
fn writers_of_neighbouring_bytes_lose_no_byte() {
    for_each_kind(|mut disk| {
        let mount = disk.mount();
        let path = mount.file("disk");
        thread::scope(|scope| {
            for n in 0..4usize {
                let path = &path;
                scope.spawn(move || {
                    // A write-only open bypasses the page cache, which would combine the pieces of all writers.
                    let file = OpenOptions::new().write(true).open(path).unwrap();
                    for piece in (n..2000).step_by(4) {
                        file.write_all_at(&[piece as u8; 100], piece as u64 * 100 + 65_000)
                            .unwrap();
                    }
                });
            }
        });
        for piece in 0..2000 {
            disk.bytes[piece * 100 + 65_000..][..100].fill(piece as u8);
        }
        disk.holds(&path);
        mount.unmount();
        disk.check();
    });
}

#[test]
fn a_huge_write_is_written_completely() {
    for_each_kind(|mut disk| {
        let mount = disk.mount();
        let bytes: Vec<u8> = (0..SIZE as usize - 4567).map(|n| (n / 7) as u8).collect();
        open(&mount.file("disk")).write_all_at(&bytes, 4321).unwrap();
        disk.bytes[4321..][..bytes.len()].copy_from_slice(&bytes);
        disk.holds(&mount.file("disk"));
        mount.unmount();
        disk.check();
    });
}

/// "punch-hole and zero-range (free or zero grains)"
#[test]
fn punched_ranges_are_holes_and_zeroed_ranges_are_zero() {
    for_each_kind(|mut disk| {
        let mount = disk.mount();
        let path = mount.file("disk");
        let file = open(&path);
        let keep = FallocateFlags::FALLOC_FL_KEEP_SIZE;
        let call_fallocate = |mode, at, len| fallocate(&file, mode, at, len);
        // A plain fallocate allocates, and changes no byte.
        call_fallocate(FallocateFlags::empty(), 0, SIZE as i64).unwrap();
        disk.holds(&path);
        file.write_all_at(&vec![7; 4 << 20], 0).unwrap();
        call_fallocate(keep | FallocateFlags::FALLOC_FL_PUNCH_HOLE, 1 << 20, 1 << 20).unwrap();
        call_fallocate(keep | FallocateFlags::FALLOC_FL_ZERO_RANGE, 3 << 20, 12_345).unwrap();
        call_fallocate(FallocateFlags::FALLOC_FL_ZERO_RANGE, 17, 600).unwrap();
        // The part of the range beyond the end of the disk is ignored.
        call_fallocate(keep | FallocateFlags::FALLOC_FL_PUNCH_HOLE, SIZE as i64 - 700, 1 << 20).unwrap();
        disk.bytes[..4 << 20].fill(7);
        for (at, len) in [
            (1 << 20, 1 << 20),
            (3 << 20, 12_345),
            (17, 600),
            (SIZE as usize - 700, 700),
        ] {
            disk.bytes[at..at + len].fill(0);
        }
        disk.holds(&path);
        file.sync_all().unwrap();
        drop(file);
        let has_hole = || {
            data_ranges(&path)
                .into_iter()
                .all(|data| data.end <= 1 << 20 || data.start >= 2 << 20)
        };
        // The kernel reports the end of an open a moment after the close.
        assert!(
            poll_until(Duration::from_secs(60), has_hole),
            "{:?}",
            data_ranges(&path)
        );
        mount.unmount();
        disk.check();
    });
}

/// "mtime must move on writes", and the attributes that `cp -p` and rsync set are accepted.
#[test]
fn attributes_follow_writes_and_explicit_changes() {
    for_each_kind(|disk| {
        let mount = disk.mount();
        let path = mount.file("disk");
        assert_eq!(fs::metadata(&path).unwrap().mode() & 0o7777, 0o644);
        let long_ago = TimeSpec::new(1_000_000_000, 0);
        utimensat(
            nix::fcntl::AT_FDCWD,
            &path,
            &long_ago,
            &long_ago,
            UtimensatFlags::FollowSymlink,
        )
        .unwrap();
        chown(&path, Some(Uid::current()), Some(Gid::current())).unwrap();
        fs::set_permissions(&path, std::os::unix::fs::PermissionsExt::from_mode(0o600)).unwrap();
        let seen = fs::metadata(&path).unwrap();
        assert_eq!(
            (seen.mtime(), seen.mode() & 0o7777, seen.len()),
            (1_000_000_000, 0o600, SIZE)
        );
        let before = SystemTime::now() - Duration::from_secs(2);
        let file = open(&path);
        file.write_all_at(b"now", 100).unwrap();
        file.sync_all().unwrap();
        drop(file);
        let mtime_moved = || fs::metadata(&path).unwrap().modified().unwrap() >= before;
        assert!(
            poll_until(Duration::from_secs(60), mtime_moved),
            "{:?}",
            fs::metadata(&path)
        );
        mount.unmount();
    });
}

#[test]
fn st_blocks_follows_writes_and_punched_holes() {
    for_each_kind(|disk| {
        let mount = disk.mount();
        let path = mount.file("disk");
        let file = open(&path);
        let wait_for_blocks = |what: &str, matches: &dyn Fn(u64) -> bool| {
            let blocks = || fs::metadata(&path).unwrap().blocks() * 512;
            assert!(
                poll_until(Duration::from_secs(60), || matches(blocks())),
                "{what}: {} bytes",
                blocks()
            );
        };
        file.write_all_at(&vec![1; SIZE as usize], 0).unwrap();
        file.sync_all().unwrap();
        wait_for_blocks("all is data", &|bytes| bytes >= SIZE);
        let flags = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
        fallocate(&file, flags, 0, SIZE as i64).unwrap();
        file.sync_all().unwrap();
        drop(file);
        wait_for_blocks("all is a hole", &|bytes| bytes < 1 << 20);
        mount.unmount();
    });
}

/// `readonly=true` after a disk applies to that disk only; the other disk of the mount stays writable.
#[test]
fn a_read_only_disk_and_a_writable_one_in_one_mount() {
    if !kinds::ready() {
        return;
    }
    let mut disk = Disk::new(kinds::KINDS[0]);
    disk.scratch.write("other.img", [1; 4096]);
    let mount = disk
        .scratch
        .mount()
        .file("disk.img")
        .file("other.img")
        .arg("readonly=true")
        .start();
    let (written, other) = (mount.file("disk.raw"), mount.file("other.raw"));
    assert_eq!(fs::metadata(&written).unwrap().mode() & 0o777, 0o644);
    assert_eq!(fs::metadata(&other).unwrap().mode() & 0o777, 0o444);
    open(&written).write_all_at(b"new", 5).unwrap();
    disk.bytes[5..8].copy_from_slice(b"new");
    let refused = OpenOptions::new().write(true).open(&other).unwrap_err();
    assert_eq!(refused.raw_os_error(), Some(libc::EROFS));
    mount.unmount();
    disk.check();
    assert_eq!(fs::read(disk.scratch.path("other.img")).unwrap(), [1; 4096]);
}
