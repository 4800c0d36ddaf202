//! A stored file that counts the bytes of its I/O and injects failures.

use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use fuse_tests::make::model::Random;
use fuse_tests::model::policy;
use vmdkfuse::error::{Error, ErrorKind, Result};
use vmdkfuse::store::{Access, Identity, Store, StoredFile, StoredWrite, open_user_path};

/// Limit on the bytes read and written; far more than the small files of these tests need.
const MAX_BYTES: u64 = 1 << 30;

/// Wrapper of a real file that counts the bytes read and written, and in which some writes fail completely or after a
/// part. Syncs do nothing: no test here crashes.
#[derive(Debug)]
pub(crate) struct FaultyFile {
    file: Arc<dyn StoredFile>,
    /// Bytes read and written so far.
    bytes: AtomicU64,
    random: Mutex<Random>,
    /// One in this many writes fails, chosen at random; 0: none.
    one_in: AtomicU64,
}

impl FaultyFile {
    /// Opens a file for writing. No write fails until [`fail_one_in`](Self::fail_one_in) is called.
    pub(crate) fn open(path: &Path, seed: u64) -> Arc<Self> {
        let file = open_user_path(path, policy(&[]), Access::Write).unwrap();
        Arc::new(Self {
            file,
            bytes: 0.into(),
            random: Mutex::new(Random::new(seed)),
            one_in: 0.into(),
        })
    }

    /// Lets one in `writes` writes fail from now on, chosen at random; 0: none.
    pub(crate) fn fail_one_in(&self, writes: u64) {
        self.one_in.store(writes, Ordering::Relaxed);
    }

    /// Returns the next random number.
    pub(crate) fn draw(&self) -> u64 {
        self.random.lock().unwrap().next()
    }

    /// Counts the bytes of an I/O, and panics when they exceed the limit.
    fn count(&self, bytes: usize) {
        let total = self.bytes.fetch_add(bytes as u64, Ordering::Relaxed);
        assert!(total < MAX_BYTES, "more than {MAX_BYTES} bytes were read and written");
    }

    /// Fails with ENOSPC at random.
    fn inject_failure(&self) -> Result<()> {
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

impl StoredFile for FaultyFile {
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
    fn check_named(&self) -> Result<()> {
        Ok(())
    }

    fn label(&self) -> &str {
        self.file.label()
    }
    fn siblings(&self) -> Result<Arc<dyn Store>> {
        self.file.siblings()
    }
}

impl StoredWrite for FaultyFile {
    fn write_all_at(&self, offset: u64, buf: &[u8]) -> Result<()> {
        self.count(buf.len());
        if let Err(e) = self.inject_failure() {
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
        self.inject_failure()?;
        self.inner().set_len(len)
    }
    fn zero(&self, offset: u64, len: u64, unmap: bool) -> Result<()> {
        self.inject_failure()?;
        self.inner().zero(offset, len, unmap)
    }
    fn allocate(&self, offset: u64, len: u64) -> Result<()> {
        self.inject_failure()?;
        self.inner().allocate(offset, len)
    }
    fn slow_zeroing(&self) -> Option<String> {
        self.inner().slow_zeroing()
    }
    fn sync(&self) -> Result<()> {
        Ok(())
    }
}
