use std::fs;
use std::path::Path;
use std::sync::atomic::AtomicUsize;

use super::*;
use crate::store::{Access, Identity, OpenPolicy, Store, open_user_path};

/// A file of this machine whose syncs are counted and can be made to fail.
#[derive(Debug)]
struct Watched {
    file: Arc<dyn StoredFile>,
    syncs: AtomicUsize,
    fails: AtomicBool,
}

impl StoredFile for Watched {
    fn len(&self) -> u64 {
        self.file.len()
    }
    fn writer(&self) -> Option<&dyn StoredWrite> {
        self.file.writer().is_some().then_some(self as &dyn StoredWrite)
    }
    fn read_exact_at(&self, offset: u64, buf: &mut [u8]) -> Result<()> {
        self.file.read_exact_at(offset, buf)
    }
    fn identity(&self) -> Result<Identity> {
        self.file.identity()
    }
    fn identity_at_open(&self) -> Identity {
        self.file.identity_at_open()
    }
    fn shows_changes(&self) -> bool {
        self.file.shows_changes()
    }
    fn allocated(&self) -> Result<u64> {
        self.file.allocated()
    }
    fn data_at(&self, offset: u64) -> Result<(bool, u64)> {
        self.file.data_at(offset)
    }
    fn label(&self) -> &str {
        self.file.label()
    }
    fn siblings(&self) -> Result<Arc<dyn Store>> {
        self.file.siblings()
    }
}

impl StoredWrite for Watched {
    fn write_all_at(&self, offset: u64, buf: &[u8]) -> Result<()> {
        self.file.writer().unwrap().write_all_at(offset, buf)
    }
    fn len_now(&self) -> Result<u64> {
        self.file.writer().unwrap().len_now()
    }
    fn set_len(&self, len: u64) -> Result<()> {
        self.file.writer().unwrap().set_len(len)
    }
    fn zero(&self, offset: u64, len: u64, unmap: bool) -> Result<()> {
        self.file.writer().unwrap().zero(offset, len, unmap)
    }
    fn sync(&self) -> Result<()> {
        self.syncs.fetch_add(1, Ordering::Relaxed);
        match self.fails.load(Ordering::Relaxed) {
            true => Err(Error::new(ErrorKind::Os(libc::EIO), "the disk below is broken")),
            false => self.file.writer().unwrap().sync(),
        }
    }
}

fn open(path: &Path, access: Access) -> Arc<Watched> {
    let policy = Arc::new(OpenPolicy { allow: Vec::new(), lock: true });
    let file = open_user_path(path, policy, access).unwrap();
    Arc::new(Watched { file, syncs: AtomicUsize::new(0), fails: AtomicBool::new(false) })
}

/// A disk of `len` bytes of 1, in a folder of its own.
fn disk(len: usize) -> (RawDisk, Arc<Watched>, tempfile::TempDir) {
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("disk"), vec![1; len]).unwrap();
    let file = open(&dir.path().join("disk"), Access::Write);
    (RawDisk::new(Arc::clone(&file) as Arc<dyn StoredFile>).unwrap(), file, dir)
}

fn bytes(dir: &tempfile::TempDir) -> Vec<u8> {
    fs::read(dir.path().join("disk")).unwrap()
}

#[test]
fn writes_go_to_their_place_and_the_file_keeps_its_length() {
    let (disk, _, dir) = disk(4096);
    disk.write_at(Lba(2), &[7; 1024]).unwrap();
    disk.zero(Lba(6)..Lba(8), true).unwrap();
    disk.zero(Lba(0)..Lba(1), false).unwrap();
    let wanted = [vec![0; 512], vec![1; 512], vec![7; 1024], vec![1; 1024], vec![0; 1024]].concat();
    assert_eq!(bytes(&dir), wanted);
    let mut seen = vec![9; 4096];
    disk.read_at(Lba(0), &mut seen).unwrap();
    assert_eq!(seen, wanted);
    for (at, sectors) in [(7, 2), (8, 1), (u64::MAX, 1)] {
        let refused = disk.write_at(Lba(at), &vec![3; sectors * 512]).unwrap_err();
        assert_eq!(refused.kind(), ErrorKind::OutOfRange);
        assert_eq!(disk.zero(Lba(at)..Lba(at.saturating_add(2)), true).unwrap_err().kind(), ErrorKind::OutOfRange);
    }
    assert_eq!(bytes(&dir), wanted);
}

#[test]
fn a_part_of_a_sector_at_the_end_becomes_whole_with_the_first_write_to_it_and_not_before() {
    let (disk, _, dir) = disk(700);
    assert_eq!(disk.geometry().sectors, 2);
    assert!(disk.backing_fd().is_none());
    disk.write_at(Lba(0), &[5; 512]).unwrap();
    disk.zero(Lba(1)..Lba(2), true).unwrap();
    assert_eq!(bytes(&dir), [vec![5; 512], vec![0; 188]].concat());
    disk.write_at(Lba(1), &[6; 512]).unwrap();
    assert_eq!(bytes(&dir), [vec![5; 512], vec![6; 512]].concat());
    let mut seen = [9; 512];
    disk.read_at(Lba(1), &mut seen).unwrap();
    assert_eq!(seen, [6; 512]);
}

#[test]
fn a_file_that_was_opened_for_reading_has_no_writer() {
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("disk"), [1; 512]).unwrap();
    let disk = RawDisk::new(open(&dir.path().join("disk"), Access::Read)).unwrap();
    assert!(disk.writer().is_none());
    assert_eq!(disk.write_at(Lba(0), &[2; 512]).unwrap_err().kind(), ErrorKind::ReadOnly);
    assert_eq!(bytes(&dir), [1; 512]);
}

#[test]
fn a_file_that_was_cut_is_not_made_longer_again() {
    let (disk, _, dir) = disk(4096);
    let file = fs::OpenOptions::new().write(true).open(dir.path().join("disk")).unwrap();
    file.set_len(1024).unwrap();
    let refused = disk.write_at(Lba(4), &[2; 512]).unwrap_err();
    assert_eq!(refused.kind(), ErrorKind::Corrupt);
    assert!(refused.to_string().contains("was cut from 4096 to 1024 bytes"), "{refused}");
    assert_eq!(bytes(&dir).len(), 1024);
}

#[test]
fn a_flush_syncs_what_was_written_since_the_last_and_nothing_else() {
    let (disk, file, _dir) = disk(4096);
    let syncs = || file.syncs.load(Ordering::Relaxed);
    disk.flush().unwrap();
    assert_eq!(syncs(), 0);
    disk.write_at(Lba(0), &[2; 512]).unwrap();
    disk.flush().unwrap();
    disk.flush().unwrap();
    assert_eq!(syncs(), 1);
    disk.zero(Lba(0)..Lba(1), true).unwrap();
    disk.close().unwrap();
    assert_eq!(syncs(), 2);
    // whoever writes behind our back is not counted
    disk.begin().unwrap();
    disk.flush().unwrap();
    disk.flush().unwrap();
    assert_eq!(syncs(), 4);
    disk.close().unwrap();
    disk.flush().unwrap();
    assert_eq!(syncs(), 5);
}

#[test]
fn after_a_flush_that_failed_none_succeeds_and_nothing_is_written() {
    let (disk, file, dir) = disk(1024);
    disk.write_at(Lba(0), &[2; 512]).unwrap();
    file.fails.store(true, Ordering::Relaxed);
    disk.flush().unwrap_err();
    file.fails.store(false, Ordering::Relaxed);
    for refused in
        [disk.flush(), disk.close(), disk.begin(), disk.write_at(Lba(1), &[3; 512]), disk.zero(Lba(1)..Lba(2), false)]
    {
        let error = refused.unwrap_err();
        assert!(error.to_string().contains("the disk below is broken"), "{error}");
        assert_eq!(error.kind(), ErrorKind::Os(libc::EIO));
    }
    assert_eq!(file.syncs.load(Ordering::Relaxed), 1);
    assert_eq!(bytes(&dir)[512..], [1; 512]);
}
