//! Fault injection for tests: a stored file that calls a hook before every change and fails if the hook fails.

use std::fmt;
use std::os::fd::BorrowedFd;
use std::sync::Arc;

use super::{Identity, Store, StoredFile, StoredWrite};
use crate::error::Result;

/// Type of a change to a file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Change {
    /// A write, a zeroed range or a new length.
    Content,
    /// A sync, which makes earlier changes durable.
    Sync,
}

/// Stored file that calls `before` with every change. If `before` returns an error, the change fails with that error
/// and does not reach the file.
pub(crate) struct Watched<F> {
    file: Arc<dyn StoredFile>,
    before: F,
}

impl<F: Fn(Change) -> Result<()>> Watched<F> {
    /// Wraps `file`.
    pub(crate) fn new(file: Arc<dyn StoredFile>, before: F) -> Self {
        Self { file, before }
    }

    /// Calls the hook, then returns the writer of the wrapped file.
    fn change(&self, change: Change) -> Result<&dyn StoredWrite> {
        (self.before)(change)?;
        Ok(self.file.writer().unwrap())
    }
}

impl<F> fmt::Debug for Watched<F> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Watched").field(&self.file).finish()
    }
}

impl<F: Fn(Change) -> Result<()> + Send + Sync> StoredFile for Watched<F> {
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

    fn check_named(&self) -> Result<()> {
        self.file.check_named()
    }

    fn fd(&self) -> Option<BorrowedFd<'_>> {
        self.file.fd()
    }
}

impl<F: Fn(Change) -> Result<()> + Send + Sync> StoredWrite for Watched<F> {
    fn write_all_at(&self, offset: u64, buf: &[u8]) -> Result<()> {
        self.change(Change::Content)?.write_all_at(offset, buf)
    }

    fn current_len(&self) -> Result<u64> {
        self.file.writer().unwrap().current_len()
    }

    fn set_len(&self, len: u64) -> Result<()> {
        self.change(Change::Content)?.set_len(len)
    }

    fn zero(&self, offset: u64, len: u64, unmap: bool) -> Result<()> {
        self.change(Change::Content)?.zero(offset, len, unmap)
    }

    fn allocate(&self, offset: u64, len: u64) -> Result<()> {
        self.change(Change::Content)?.allocate(offset, len)
    }

    fn slow_zeroing(&self) -> Option<String> {
        self.file.writer().unwrap().slow_zeroing()
    }

    fn sync(&self) -> Result<()> {
        self.change(Change::Sync)?.sync()
    }
}
