//! The end of trust: a sync that failed, or a file that somebody else has cut.
//!
//! The system tells an error of writing to one sync only, and drops the pages that it was about. So whichever sync is
//! told, for whatever reason it was done, nothing may be called durable afterwards. And a file that was cut has lost
//! grains: what is written behind its end would make zeroes of them, without a trace.

use std::sync::OnceLock;

use super::{StoredFile, StoredWrite, writer};
use crate::error::{Error, Result};

/// Why nothing more is written to a disk.
#[derive(Debug, Default)]
pub(crate) struct WriteLatch(OnceLock<Error>);

impl WriteLatch {
    /// Syncs `file`. An error is kept, and is the answer to every later [`check`](Self::check).
    pub(crate) fn sync(&self, file: &dyn StoredFile) -> Result<()> {
        self.check()?;
        writer(file)?.sync().map_err(|e| self.set(e))
    }

    /// The writing half of `file`, which had `known` bytes or more. An error is kept: somebody else has cut it.
    pub(crate) fn check_not_truncated<'f>(&self, file: &'f dyn StoredFile, known: u64) -> Result<&'f dyn StoredWrite> {
        let writer = writer(file)?;
        let len = writer.current_len()?;
        if len >= known {
            return Ok(writer);
        }
        let label = file.label();
        let context = format!("{label}: has {len} bytes, expected {known} or more: somebody else has cut it");
        Err(self.set(Error::corrupt(context)))
    }

    /// Keeps `e`, the first one for all that come later, and answers it.
    pub(crate) fn set(&self, e: Error) -> Error {
        tracing::error!("{e}: what was written may be lost, so nothing more is written to this disk");
        self.0.get_or_init(|| e.clone());
        e
    }

    /// Errors: something was kept.
    pub(crate) fn check(&self) -> Result<()> {
        match self.0.get() {
            Some(e) => Err(e
                .clone()
                .within("nothing more is written after an error that may have lost data")),
            None => Ok(()),
        }
    }
}
