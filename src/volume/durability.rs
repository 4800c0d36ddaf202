//! Durability of one disk: the meaning of "finished" and "durable".
//!
//! ```text
//!   changed ─► unfinished ─ flush(Durable) ──► durable, the image still marked as in use
//!                 ▲       └ flush(Complete) ─► durable, complete, marked as closed
//!                 └── the next change ◄──────────────┘
//! ```
//! Only the group flush (`group_flush.rs`) calls [`Durability::flush`]: requests, the writeback timer and the unmount all
//! go through it. Errors that may have lost data are in the disk's [`WriteLatch`].

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use super::FlushKind;
use crate::block::{BlockRead, BlockWrite};
use crate::error::{Error, ErrorKind, Result};
use crate::store::StoredFile;
use crate::write_latch::{ErrorCursor, WriteLatch};

/// A disk with its files, and whether it is finished.
#[derive(Debug)]
pub(super) struct Durability {
    pub(super) disk: Arc<dyn BlockRead>,
    /// Every file of the disk, once.
    pub(super) files: Vec<Arc<dyn StoredFile>>,
    /// True from a change until the image is completed.
    unfinished: AtomicBool,
    /// True once the kernel may write to the backing file directly.
    external_writes: AtomicBool,
}

impl Durability {
    /// Creates the durability of `disk`, which consists of `files`.
    pub(super) fn new(disk: Arc<dyn BlockRead>, files: Vec<Arc<dyn StoredFile>>) -> Self {
        Self {
            disk,
            files,
            unfinished: AtomicBool::new(false),
            external_writes: AtomicBool::new(false),
        }
    }

    /// Returns the write latch, or `None` if the disk was opened for reading.
    pub(super) fn latch(&self) -> Option<&WriteLatch> {
        self.disk.writer().map(BlockWrite::latch)
    }

    /// Makes all changes before the call durable and, depending on `kind`, completes the image. Cheap if there are none.
    ///
    /// Errors: those of the disk. `Os(ESTALE)` if one of its files was deleted or replaced. What the latch keeps is left
    /// to [`reported`](Self::reported).
    pub(super) fn flush(&self, kind: FlushKind) -> Result<()> {
        let Some(writer) = self.disk.writer() else {
            return Ok(());
        };
        // Truncated first, so that the flush covers the new length. The bytes are lost, whichever flush finds that out:
        // each handle has to report it.
        if let Err(e) = self.truncate_excess() {
            writer.latch().keep(&e);
        }
        match kind {
            FlushKind::Durable => writer.flush()?,
            FlushKind::Complete => {
                self.finishing();
                writer.close()?;
            }
        }
        self.check_named()
    }

    /// Returns what the handle of `cursor` reports after a flush with `result`: also an error that makes nothing durable
    /// any more, and one that the handle has not reported yet. `None`: no handle, for which the error of no other one is
    /// repeated.
    pub(super) fn reported(&self, cursor: Option<&ErrorCursor>, kind: FlushKind, result: Result<()>) -> Result<()> {
        let Some(latch) = self.latch() else {
            return result;
        };
        result.and_then(|()| latch.check())?;
        match cursor {
            Some(cursor) => latch.report(cursor, kind == FlushKind::Durable),
            None => latch.report(&latch.cursor(), true),
        }
    }

    /// Returns true if the disk may have changed since the last [`finishing`](Self::finishing).
    pub(super) fn is_unfinished(&self) -> bool {
        self.unfinished.load(Ordering::Acquire) || self.has_external_writes()
    }

    /// Notes a change.
    pub(super) fn changed(&self) {
        self.unfinished.store(true, Ordering::Release);
    }

    /// Notes that everything changed before is about to be completed.
    pub(super) fn finishing(&self) {
        self.unfinished.store(false, Ordering::Release);
    }

    /// Notes that the kernel may write to the backing file from now on.
    pub(super) fn allow_external_writes(&self) {
        self.external_writes.store(true, Ordering::Release);
    }

    /// Returns true if the kernel may write to the backing file directly.
    pub(super) fn has_external_writes(&self) -> bool {
        self.external_writes.load(Ordering::Acquire)
    }

    /// Checks that the files that are written to still have a name: what is durable in a file without one is gone after the
    /// unmount.
    fn check_named(&self) -> Result<()> {
        let mut written = self.files.iter().filter(|file| file.writer().is_some());
        written.try_for_each(|file| file.check_named())
    }

    /// Truncates the backing file to the size of the disk. The kernel, which writes to the backing file directly, does
    /// not know that size, so such a write may extend the file.
    ///
    /// Errors: `Os(ENOSPC)` if the file was longer: the write that extended it is lost, and had returned no error.
    fn truncate_excess(&self) -> Result<()> {
        let Some(fd) = self.disk.backing_fd().filter(|_| self.has_external_writes()) else {
            return Ok(());
        };
        let len = self.disk.geometry().bytes();
        let context = || format!("truncating the backing file to the disk's {len} bytes");
        let stat = nix::sys::stat::fstat(fd).map_err(|e| Error::io(context(), e.into()))?;
        match u64::try_from(stat.st_size).unwrap_or(0).checked_sub(len) {
            None | Some(0) => Ok(()),
            Some(excess) => {
                nix::unistd::ftruncate(fd, len as i64).map_err(|e| Error::io(context(), e.into()))?;
                let text = format!("{excess} bytes were written after the end of the disk at byte {len}, and are lost");
                Err(Error::new(ErrorKind::Os(libc::ENOSPC), text))
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc::channel;

    use super::*;
    use crate::test_disk::TestDisk;
    use crate::volume::{Request, Volume};

    fn lost() -> Error {
        Error::new(ErrorKind::Os(libc::ENOSPC), "lost")
    }

    /// Flushes for a handle, and returns true if it succeeded.
    fn flushes(volume: &Arc<Volume>, kind: FlushKind, handle: Option<&Arc<ErrorCursor>>) -> bool {
        let (answer, answered) = channel();
        let done = Box::new(move |result: &Result<()>| answer.send(result.is_ok()).unwrap());
        let handle = handle.map(Arc::clone);
        volume.submit(Request::Flush { kind, handle, done });
        answered.recv().unwrap()
    }

    /// Returns the volume of a disk that flushes through a queue, or on the calling thread.
    fn volume(queues: bool) -> Arc<Volume> {
        let disk = TestDisk::new(8);
        let disk = if queues {
            disk.queueing(None)
        } else {
            disk.flushing(|| Ok(()))
        };
        Arc::new(Volume::new(Arc::new(disk), Vec::new()))
    }

    #[test]
    fn regression_an_error_that_no_program_heard_fails_the_next_fsync_of_each_handle() {
        for queues in [false, true] {
            let volume = volume(queues);
            let handles = [Arc::new(volume.error_cursor()), Arc::new(volume.error_cursor())];
            volume.keep_unheard(&lost());
            for handle in &handles {
                assert!(
                    !flushes(&volume, FlushKind::Complete, Some(handle)),
                    "a close reports it too"
                );
                assert!(!flushes(&volume, FlushKind::Durable, Some(handle)));
                assert!(flushes(&volume, FlushKind::Durable, Some(handle)), "reported twice");
            }
            volume.close().unwrap();
        }
    }

    #[test]
    fn an_error_that_no_handle_reported_is_that_of_the_unmount() {
        let volume = volume(false);
        volume.keep_unheard(&lost());
        assert_eq!(volume.close().unwrap_err().kind(), ErrorKind::Os(libc::ENOSPC));
        volume.close().unwrap();
    }

    #[test]
    fn after_the_latch_is_set_no_flush_and_no_durable_write_succeeds() {
        for queues in [false, true] {
            let volume = volume(queues);
            let handle = Arc::new(volume.error_cursor());
            assert!(flushes(&volume, FlushKind::Durable, Some(&handle)));
            volume.durability().latch().unwrap().set(lost());
            for _ in 0..2 {
                assert!(!flushes(&volume, FlushKind::Durable, Some(&handle)));
                assert!(!flushes(&volume, FlushKind::Complete, None));
                volume.close().unwrap_err();
            }
            let (answer, answered) = channel();
            volume.submit(Request::Write {
                offset: 0,
                data: &[1; 512],
                sync: true,
                done: Box::new(move |written| answer.send(written.is_ok()).unwrap()),
            });
            assert!(!answered.recv().unwrap(), "O_SYNC, queue: {queues}");
        }
    }
}
