//! Reading and writing without waiting, for disks behind a network ([`BlockQueue`]).
//!
//! What goes to the disk as it is goes this way. What doesn't (a write of a part of what the disk can write, one in the way
//! of another) is left to who may wait.

use std::sync::Arc;

use super::write::Parts;
use super::{MAX_READ, ReadBuffer, Volume, WORTH_ASKING, out_of_range};
use crate::block::{BlockQueue, Completion, Lba, ReadCompletion, SECTOR};
use crate::error::Result;
use crate::range_lock::Mode;

/// Told how many bytes were written, and whether they are durable already.
pub type WriteCompletion = Box<dyn FnOnce(Result<usize>, bool) + Send>;

/// The right to a range, held until the write's end.
struct Kept {
    volume: Arc<Volume>,
    number: u64,
}

impl Drop for Kept {
    fn drop(&mut self) {
        self.volume.ranges.unlock(self.number);
        self.volume.allocated.changed();
    }
}

impl Volume {
    /// The way without waiting, where the disk has one.
    pub fn queue(&self) -> Option<&dyn BlockQueue> {
        self.disk.queue()
    }

    /// Begins [`read`](Self::read). Afterwards the queue wants to be attended to.
    pub fn submit_read(&self, queue: &dyn BlockQueue, offset: u64, len: usize, done: ReadCompletion) {
        let len = len
            .min(MAX_READ)
            .min(usize::try_from(self.len().saturating_sub(offset)).unwrap_or(usize::MAX));
        if len == 0 {
            return done(Ok(&[]));
        }
        let granule = self.disk.geometry().granule * SECTOR;
        let start = offset / granule * granule;
        let end = (offset + len as u64).next_multiple_of(granule).min(self.len());
        if len >= WORTH_ASKING && self.disk.is_zero(Lba(start / SECTOR), (end - start) / SECTOR) {
            return done(Ok(ReadBuffer::zeroes(len)));
        }
        let skip = (offset - start) as usize;
        let whole = skip == 0 && end - start == len as u64;
        let cut: ReadCompletion = match whole {
            true => done,
            false => Box::new(move |read| {
                done(read.and_then(|bytes| bytes.get(skip..skip + len).ok_or_else(|| out_of_range(offset))));
            }),
        };
        queue.submit_read(Lba(start / SECTOR), (end - start) / SECTOR, cut);
    }

    /// Begins a [`write`](Self::write) of all of `buf`, if the disk takes it as it is and nobody is in the way.
    /// Gives `done` back otherwise. `sync`: it shall be durable when it is done, where the disk can do that for less than a
    /// flush costs. Afterwards the queue wants to be attended to.
    pub fn submit_write(
        self: &Arc<Self>,
        queue: &dyn BlockQueue,
        offset: u64,
        buf: &[u8],
        sync: bool,
        done: WriteCompletion,
    ) -> std::result::Result<(), WriteCompletion> {
        let end = offset.saturating_add(buf.len() as u64);
        if buf.is_empty() || end > self.len() || self.disk.writer().is_none() {
            return Err(done);
        }
        let parts = Parts::of(offset..end, self.granule(), self.len());
        let unit = queue.write_alignment();
        let fits = offset.is_multiple_of(unit) && (end.is_multiple_of(unit) || end == self.len());
        if parts.mode() != Mode::Shared && !fits {
            return Err(done);
        }
        let Some(number) = self.ranges.try_lock(parts.granules, Mode::Shared) else {
            return Err(done);
        };
        let kept = Kept {
            volume: Arc::clone(self),
            number,
        };
        let len = buf.len();
        let durable = sync && queue.supports_fua(offset, len as u64);
        let finish: Completion = Box::new(move |result| {
            drop(kept);
            done(result.map(|()| len), durable);
        });
        queue.submit_write(offset, buf, durable, finish);
        Ok(())
    }
}
