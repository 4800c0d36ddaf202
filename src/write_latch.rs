//! Write latch of a disk: the one place that decides that nothing of it is durable any more, and which flush reports
//! which error.
//!
//! ```text
//!   failed sync · truncated file · write lost in a replay ─► set     every later change or flush fails
//!   failed flush that no program waited for, lost bytes   ─► keep    the next flush of each handle fails, once
//! ```
//! After an error of write-back the kernel reports it to one sync only and drops the dirty pages. A later sync then
//! succeeds although data is lost. So when any sync has failed, for whatever reason it was called, the latch is set, and
//! never reset. The same holds for a file that another process has truncated: a write beyond its new end would silently
//! turn what was lost into zeroes.
//!
//! Every engine that writes has one latch for its disk ([`BlockWrite::latch`](crate::block::BlockWrite::latch)), and
//! checks it where it writes; the volume checks it before it calls anything durable.
//!
//! An error that is only kept is reported as Linux reports one of write-back (`errseq_t`): the `fsync` of each handle
//! that was open returns it once, and if none has, that of the next handle does. A `close` reports it too, but the
//! `fsync` after it still does, as a program may ignore what `close` says.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, OnceLock};

use crate::error::{Error, Result};
use crate::mutex::lock;
use crate::store::{StoredFile, StoredWrite, writer};

/// Errors after which the data of a disk may be lost; see the module documentation.
#[derive(Debug, Default)]
pub struct WriteLatch {
    /// First error after which nothing is durable any more. Empty while there is none.
    last: OnceLock<Error>,
    /// Held for a few instructions, with no other lock.
    kept: Mutex<KeptError>,
}

/// The last error that is reported once for each handle.
#[derive(Debug, Default)]
struct KeptError {
    /// Number of the error; 0 while there was none.
    number: u64,
    error: Option<Error>,
    /// True once a handle has reported it.
    reported: bool,
}

/// Number of the last kept error that a handle need not report any more.
#[derive(Debug, Default)]
pub struct ErrorCursor(AtomicU64);

impl WriteLatch {
    /// Syncs `file`. An error sets the latch, and every later [`check`](Self::check) returns it.
    pub fn sync(&self, file: &dyn StoredFile) -> Result<()> {
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
    pub fn set(&self, e: Error) -> Error {
        tracing::error!("{e}: recent writes may be lost, so nothing of this disk is durable until it is mounted again");
        self.last.get_or_init(|| e.clone());
        e
    }

    /// Returns an error if the latch is set.
    pub fn check(&self) -> Result<()> {
        match self.last.get() {
            Some(e) => Err(e
                .clone()
                .within("nothing is durable any more after an error that may have lost data")),
            None => Ok(()),
        }
    }

    /// Keeps an error for the next flush of each handle. While an earlier one has not been reported at all, that stays.
    pub(crate) fn keep(&self, e: &Error) {
        let mut kept = self.kept();
        if kept.number == 0 || kept.reported {
            kept.number += 1;
            kept.error = Some(e.clone());
            kept.reported = false;
        }
    }

    /// Returns the cursor of a new handle. It reports an error that no handle has reported.
    pub(crate) fn cursor(&self) -> ErrorCursor {
        let kept = self.kept();
        let known = if kept.reported {
            kept.number
        } else {
            kept.number.saturating_sub(1)
        };
        ErrorCursor(known.into())
    }

    /// Returns the kept error if the handle of `cursor` has not reported it. With `advance` it does so now.
    pub(crate) fn report(&self, cursor: &ErrorCursor, advance: bool) -> Result<()> {
        let mut kept = self.kept();
        if cursor.0.load(Ordering::Relaxed) >= kept.number {
            return Ok(());
        }
        if advance {
            cursor.0.store(kept.number, Ordering::Relaxed);
            kept.reported = true;
        }
        kept.error.clone().map_or(Ok(()), Err)
    }

    fn kept(&self) -> MutexGuard<'_, KeptError> {
        lock(&self.kept)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_error_stays() {
        let latch = WriteLatch::default();
        latch.check().unwrap();
        for text in ["first", "second"] {
            assert!(latch.set(Error::corrupt(text)).to_string().contains(text));
            let error = latch.check().unwrap_err().to_string();
            assert!(error.contains("first"), "{error}");
        }
    }

    #[test]
    fn a_kept_error_is_reported_once_by_each_handle_that_was_open() {
        let latch = WriteLatch::default();
        let open = [latch.cursor(), latch.cursor()];
        latch.report(&open[0], true).unwrap();
        latch.keep(&Error::corrupt("lost"));
        for cursor in &open {
            // A close does not count as the report of it.
            latch.report(cursor, false).unwrap_err();
            latch.report(cursor, true).unwrap_err();
            latch.report(cursor, true).unwrap();
        }
        latch.report(&latch.cursor(), true).unwrap();
        latch.keep(&Error::corrupt("lost again"));
        let error = latch.report(&open[1], true).unwrap_err().to_string();
        assert!(error.contains("lost again"), "{error}");
    }

    #[test]
    fn a_kept_error_that_no_handle_has_reported_is_that_of_the_next_one() {
        let latch = WriteLatch::default();
        latch.keep(&Error::corrupt("first"));
        latch.keep(&Error::corrupt("second"));
        let next = latch.cursor();
        let error = latch.report(&next, true).unwrap_err().to_string();
        assert!(error.contains("first"), "{error}");
        latch.report(&next, true).unwrap();
        latch.report(&latch.cursor(), true).unwrap();
    }
}
