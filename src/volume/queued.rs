//! Reads and writes of a disk with a queue ([`BlockQueue`]), without blocking.
//!
//! A request that the disk takes as it is goes this way: an event loop submits it, and a callback runs on completion. A
//! request that would block (a read-modify-write, a write whose range is locked) is handed back to the caller, which
//! runs it in the worker pool.

use std::sync::Arc;

use super::aligned_read::AlignedRead;
use super::write::Parts;
use super::{ReadBuffer, Volume};
use crate::block::{BlockQueue, Completion, ReadCompletion};
use crate::error::Result;
use crate::range_lock::Mode;

/// Called with the number of bytes written, and true if they are durable already.
pub(super) type QueuedWrite = Box<dyn FnOnce(Result<usize>, bool) + Send>;

/// Range lock of a write in flight. Owns its volume, as it outlives the call that submits the write.
struct HeldRange {
    volume: Arc<Volume>,
    /// Number of the lock in `volume.ranges`.
    number: u64,
}

impl Drop for HeldRange {
    fn drop(&mut self) {
        self.volume.ranges.unlock(self.number);
        self.volume.note_change();
    }
}

impl Volume {
    /// Returns the disk's queue, or `None` if its calls do not block for long.
    pub(super) fn queue(&self) -> Option<&dyn BlockQueue> {
        self.disk().queue()
    }

    /// Submits a [`read`](Self::read); `done` is called with its result. The caller polls the queue afterwards.
    pub(super) fn queue_read(&self, queue: &dyn BlockQueue, offset: u64, len: usize, done: ReadCompletion) {
        let disk = &**self.disk();
        let Some(read) = AlignedRead::of(disk.geometry(), offset, len) else {
            return done(Ok(&[]));
        };
        if read.is_zero(disk) {
            return done(Ok(ReadBuffer::zeroes(read.len())));
        }
        // The disk reads whole granules; the caller gets the part that it asked for.
        let trimmed: ReadCompletion = match read.is_whole() {
            true => done,
            false => Box::new(move |bytes| done(bytes.and_then(|bytes| read.part(bytes)))),
        };
        queue.submit_read(read.start, read.sectors, trimmed);
    }

    /// Submits a [`write`](Self::write) of all of `buf`; `done` is called with its result. With `sync` the write is
    /// durable on completion, if the disk can do that for less than the cost of a flush. The caller polls the queue
    /// afterwards.
    ///
    /// Errors: returns `done` if the write would block: it needs a read-modify-write, its range is locked, or it does
    /// not lie on the disk.
    pub(super) fn queue_write(
        self: &Arc<Self>,
        queue: &dyn BlockQueue,
        offset: u64,
        buf: &[u8],
        sync: bool,
        done: QueuedWrite,
    ) -> std::result::Result<(), QueuedWrite> {
        let end = offset.saturating_add(buf.len() as u64);
        if buf.is_empty() || end > self.len() || self.disk().writer().is_none() {
            return Err(done);
        }
        let parts = Parts::of(offset..end, self.granule(), self.len());
        // A disk may be able to write smaller units than it reads. Such a write needs no read-modify-write.
        let unit = queue.write_alignment();
        let fits = offset.is_multiple_of(unit) && (end.is_multiple_of(unit) || end == self.len());
        if parts.mode() != Mode::Shared && !fits {
            return Err(done);
        }
        // Shared is enough for a part of a granule too: no other bytes of the granule are written back. The lock only
        // has to exclude a read-modify-write by another thread.
        let Some(number) = self.ranges.try_lock(parts.granules, Mode::Shared) else {
            return Err(done);
        };
        let held = HeldRange {
            volume: Arc::clone(self),
            number,
        };
        let len = buf.len();
        let durable = sync && queue.supports_fua(offset, len as u64);
        let finish: Completion = Box::new(move |result| {
            // Released before the answer: the next write of the same caller must find the range unlocked.
            drop(held);
            done(result.map(|()| len), durable);
        });
        queue.submit_write(offset, buf, durable, finish);
        Ok(())
    }
}
