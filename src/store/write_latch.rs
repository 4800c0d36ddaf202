//! Write latch: set by a failed sync or a truncated file, and never reset.
//!
//! After an error of write-back the kernel reports it to one sync only and drops the dirty pages. A later sync then
//! succeeds although data is lost. So when any sync has failed, for whatever reason it was called, no write may be
//! reported as durable afterwards.
//!
//! A file that another process has truncated has lost grains. Writing beyond its new end would silently turn the lost
//! grains into zeroes.

use std::sync::OnceLock;

use super::{StoredFile, StoredWrite, writer};
use crate::error::{Error, Result};

/// First error after which a disk must not be written any more. Empty while there is none.
#[derive(Debug, Default)]
pub(crate) struct WriteLatch(OnceLock<Error>);

impl WriteLatch {
    /// Syncs `file`. An error sets the latch, and every later [`check`](Self::check) returns it.
    pub(crate) fn sync(&self, file: &dyn StoredFile) -> Result<()> {
        self.check()?;
        writer(file)?.sync().map_err(|e| self.set(e))
    }

    /// Returns the writer of `file` after checking that the file still has at least `known` bytes. If it is shorter, it
    /// was truncated by another process, and the latch is set.
    pub(crate) fn check_not_truncated<'f>(&self, file: &'f dyn StoredFile, known: u64) -> Result<&'f dyn StoredWrite> {
        let writer = writer(file)?;
        let len = writer.current_len()?;
        if len >= known {
            return Ok(writer);
        }
        let context = format!("has {len} bytes, expected {known} or more: truncated by another process");
        Err(self.set(Error::corrupt(context).in_file(file.label())))
    }

    /// Sets the latch to `e` unless it is set already. Returns `e`.
    pub(crate) fn set(&self, e: Error) -> Error {
        tracing::error!("{e}: recent writes may be lost, so nothing more is written to this disk");
        self.0.get_or_init(|| e.clone());
        e
    }

    /// Returns an error if the latch is set.
    pub(crate) fn check(&self) -> Result<()> {
        match self.0.get() {
            Some(e) => Err(e
                .clone()
                .within("nothing more is written after an error that may have lost data")),
            None => Ok(()),
        }
    }
}
