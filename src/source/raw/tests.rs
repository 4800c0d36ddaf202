use std::fs;
use std::path::Path;
use std::sync::atomic::AtomicUsize;

use super::*;
use crate::error::ErrorKind;
use crate::store::fault_injection::{Change, Watched};
use crate::store::{Access, OpenPolicy, open_user_path};

/// Counts the syncs of a file, and makes them fail on request.
#[derive(Debug, Default)]
struct Syncs {
    count: AtomicUsize,
    fail: AtomicBool,
}

fn open(path: &Path, access: Access) -> (Arc<dyn StoredFile>, Arc<Syncs>) {
    let policy = Arc::new(OpenPolicy::new(Vec::new(), true));
    let syncs = Arc::new(Syncs::default());
    let watch = Arc::clone(&syncs);
    let file = Watched::new(open_user_path(path, policy, access).unwrap(), move |change| {
        if change == Change::Sync {
            watch.count.fetch_add(1, Ordering::Relaxed);
            if watch.fail.load(Ordering::Relaxed) {
                return Err(Error::new(ErrorKind::Os(libc::EIO), "injected sync failure"));
            }
        }
        Ok(())
    });
    (Arc::new(file), syncs)
}

/// Creates a disk of `len` bytes with the value 1, in a new folder.
fn disk(len: usize) -> (RawDisk, Arc<Syncs>, tempfile::TempDir) {
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("disk"), vec![1; len]).unwrap();
    let (file, syncs) = open(&dir.path().join("disk"), Access::Write);
    (RawDisk::new(file).unwrap(), syncs, dir)
}

fn bytes(dir: &tempfile::TempDir) -> Vec<u8> {
    fs::read(dir.path().join("disk")).unwrap()
}

#[test]
fn writes_change_only_their_range_and_the_file_keeps_its_length() {
    let (disk, _, dir) = disk(4096);
    disk.write_at(Lba(2), &[7; 1024]).unwrap();
    disk.zero(Lba(6)..Lba(8), true).unwrap();
    disk.zero(Lba(0)..Lba(1), false).unwrap();
    let expected = [vec![0; 512], vec![1; 512], vec![7; 1024], vec![1; 1024], vec![0; 1024]].concat();
    assert_eq!(bytes(&dir), expected);
    let mut read = vec![9; 4096];
    disk.read_at(Lba(0), &mut read).unwrap();
    assert_eq!(read, expected);
    for (at, sectors) in [(7, 2), (8, 1), (u64::MAX, 1)] {
        let refused = disk.write_at(Lba(at), &vec![3; sectors * 512]).unwrap_err();
        assert_eq!(refused.kind(), ErrorKind::OutOfRange);
        assert_eq!(
            disk.zero(Lba(at)..Lba(at.saturating_add(2)), true).unwrap_err().kind(),
            ErrorKind::OutOfRange
        );
    }
    assert_eq!(bytes(&dir), expected);
}

#[test]
fn an_incomplete_last_sector_is_extended_by_the_first_write_to_it_and_not_before() {
    let (disk, _, dir) = disk(700);
    assert_eq!(disk.geometry().sectors, 2);
    assert!(disk.backing_fd().is_none());
    disk.write_at(Lba(0), &[5; 512]).unwrap();
    disk.zero(Lba(1)..Lba(2), true).unwrap();
    assert_eq!(bytes(&dir), [vec![5; 512], vec![0; 188]].concat());
    disk.write_at(Lba(1), &[6; 512]).unwrap();
    assert_eq!(bytes(&dir), [vec![5; 512], vec![6; 512]].concat());
    let mut read = [9; 512];
    disk.read_at(Lba(1), &mut read).unwrap();
    assert_eq!(read, [6; 512]);
}

#[test]
fn a_file_that_was_opened_for_reading_has_no_writer() {
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("disk"), [1; 512]).unwrap();
    let disk = RawDisk::new(open(&dir.path().join("disk"), Access::Read).0).unwrap();
    assert!(disk.writer().is_none());
    assert_eq!(
        disk.write_at(Lba(0), &[2; 512]).unwrap_err().kind(),
        ErrorKind::ReadOnly
    );
    assert_eq!(bytes(&dir), [1; 512]);
}

#[test]
fn a_truncated_file_is_not_extended_again() {
    let (disk, _, dir) = disk(4096);
    let file = fs::OpenOptions::new()
        .write(true)
        .open(dir.path().join("disk"))
        .unwrap();
    file.set_len(1024).unwrap();
    let refused = disk.write_at(Lba(4), &[2; 512]).unwrap_err();
    assert_eq!(refused.kind(), ErrorKind::Corrupt);
    assert!(
        refused.to_string().contains("has 1024 bytes, expected 4096 or more"),
        "{refused}"
    );
    assert_eq!(bytes(&dir).len(), 1024);
    // The latch stays set: the lost data does not come back with the length.
    file.set_len(4096).unwrap();
    assert_eq!(disk.write_at(Lba(0), &[2; 512]).unwrap_err().kind(), ErrorKind::Corrupt);
    assert_eq!(disk.flush().unwrap_err().kind(), ErrorKind::Corrupt);
}

#[test]
fn a_flush_syncs_only_if_there_were_writes_since_the_last_one() {
    let (disk, syncs, _dir) = disk(4096);
    let syncs = || syncs.count.load(Ordering::Relaxed);
    disk.flush().unwrap();
    assert_eq!(syncs(), 0);
    disk.write_at(Lba(0), &[2; 512]).unwrap();
    disk.flush().unwrap();
    disk.flush().unwrap();
    assert_eq!(syncs(), 1);
    disk.zero(Lba(0)..Lba(1), true).unwrap();
    disk.close().unwrap();
    assert_eq!(syncs(), 2);
}

#[test]
fn every_flush_syncs_once_the_kernel_may_write_also_after_a_close() {
    let (disk, syncs, _dir) = disk(4096);
    let syncs = || syncs.count.load(Ordering::Relaxed);
    // The writes of the kernel are not counted.
    disk.prepare_external_write().unwrap();
    disk.flush().unwrap();
    disk.flush().unwrap();
    assert_eq!(syncs(), 2);
    // One program closes the disk, and another one that has it open writes on and calls fsync.
    disk.close().unwrap();
    disk.flush().unwrap();
    assert_eq!(syncs(), 4);
}

#[test]
fn after_a_failed_flush_all_flushes_and_writes_fail() {
    let (disk, syncs, dir) = disk(1024);
    disk.write_at(Lba(0), &[2; 512]).unwrap();
    syncs.fail.store(true, Ordering::Relaxed);
    disk.flush().unwrap_err();
    syncs.fail.store(false, Ordering::Relaxed);
    for refused in [
        disk.flush(),
        disk.close(),
        disk.prepare_external_write(),
        disk.write_at(Lba(1), &[3; 512]),
        disk.zero(Lba(1)..Lba(2), false),
    ] {
        let error = refused.unwrap_err();
        assert!(error.to_string().contains("injected sync failure"), "{error}");
        assert_eq!(error.kind(), ErrorKind::Os(libc::EIO));
    }
    assert_eq!(syncs.count.load(Ordering::Relaxed), 1);
    assert_eq!(bytes(&dir)[512..], [1; 512]);
}
