//! A file between the engine and the real one.

use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use fuse_tests::make::model::Random;
use fuse_tests::model::policy;
use vmdkfuse::error::{Error, ErrorKind, Result};
use vmdkfuse::store::{Access, Identity, Store, StoredFile, StoredWrite, open_user_path};

/// More bytes than this nobody needs to read and write for the small files here.
const MOST: u64 = 1 << 30;

/// A file of which the bytes that are read and written are counted, and some changes fail, in whole or after a part was
/// done. It leaves out syncs: no test here crashes.
#[derive(Debug)]
pub(crate) struct Watched {
    file: Arc<dyn StoredFile>,
    moved: AtomicU64,
    random: Mutex<Random>,
    /// One of so many changes fails; 0: none.
    one_in: AtomicU64,
}

impl Watched {
    /// Opens a file for writing, of which nothing fails yet.
    pub(crate) fn open(path: &Path, seed: u64) -> Arc<Self> {
        let file = open_user_path(path, policy(&[]), Access::Write).unwrap();
        Arc::new(Self {
            file,
            moved: 0.into(),
            random: Mutex::new(Random::new(seed)),
            one_in: 0.into(),
        })
    }

    /// From now on one of so many changes fails; 0: none.
    pub(crate) fn fail_one_in(&self, changes: u64) {
        self.one_in.store(changes, Ordering::Relaxed);
    }

    /// The next number of what it decides by.
    pub(crate) fn draw(&self) -> u64 {
        self.random.lock().unwrap().next()
    }

    fn count(&self, bytes: usize) {
        let moved = self.moved.fetch_add(bytes as u64, Ordering::Relaxed);
        assert!(moved < MOST, "more than {MOST} bytes were read and written");
    }

    /// Whether a change shall be done.
    fn chance(&self) -> Result<()> {
        match self.one_in.load(Ordering::Relaxed) {
            0 => Ok(()),
            n if self.draw().is_multiple_of(n) => Err(Error::new(ErrorKind::Os(libc::ENOSPC), "full")),
            _ => Ok(()),
        }
    }

    fn inner(&self) -> &dyn StoredWrite {
        self.file.writer().unwrap()
    }
}

impl StoredFile for Watched {
    fn len(&self) -> u64 {
        self.file.len()
    }
    fn writer(&self) -> Option<&dyn StoredWrite> {
        Some(self)
    }
    fn read_exact_at(&self, offset: u64, buf: &mut [u8]) -> Result<()> {
        self.count(buf.len());
        self.file.read_exact_at(offset, buf)
    }
    fn identity(&self) -> Result<Identity> {
        self.file.identity()
    }
    fn identity_at_open(&self) -> Identity {
        self.file.identity_at_open()
    }
    fn detects_modification(&self) -> bool {
        self.file.detects_modification()
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
        self.count(buf.len());
        if let Err(e) = self.chance() {
            let part = (self.draw() % (buf.len() as u64 + 1)) as usize / 512 * 512;
            self.inner().write_all_at(offset, &buf[..part])?;
            return Err(e);
        }
        self.inner().write_all_at(offset, buf)
    }
    fn current_len(&self) -> Result<u64> {
        self.inner().current_len()
    }
    fn set_len(&self, len: u64) -> Result<()> {
        self.chance()?;
        self.inner().set_len(len)
    }
    fn zero(&self, offset: u64, len: u64, unmap: bool) -> Result<()> {
        self.chance()?;
        self.inner().zero(offset, len, unmap)
    }
    fn sync(&self) -> Result<()> {
        Ok(())
    }
}
