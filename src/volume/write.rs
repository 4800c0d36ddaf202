//! Byte writes to sectors.
//!
//! ```text
//!   granules    |-------|-------|-------|-------|
//!   a write         [===|=======|=======|==]
//!                   head      body       tail
//! ```
//! The body goes to the disk as it is. Head and tail cover a part of a granule and are a read-modify-write: the other
//! bytes of the granule are read and written back. If another thread wrote to that granule in between, its write would
//! be lost. So every write holds a range lock over its granules: shared if it has only a body, exclusive otherwise. Two
//! whole writes to one granule may overlap, as they may on a real disk.
//!
//! Lock order: the range lock over granules comes before all locks of the disk below. See [`crate::range_lock`].

use std::ops::Range;

use crate::block::{BlockWrite, Lba, SECTOR};
use crate::error::{Error, ErrorKind, Result};
use crate::range_lock::Mode;
use crate::store::RoomNeeded;
use crate::volume::{FlushKind, Volume};
use crate::write_latch::{ErrorCursor, WriteLatch};

/// Maximum number of bytes that are allocated at once. Other writes of the range wait meanwhile.
const ALLOCATION_STEP: u64 = 8 << 20;

/// A range of bytes, split at the borders of granules. Each part may be empty; together they are the range.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Parts {
    head: Range<u64>,
    body: Range<u64>,
    tail: Range<u64>,
    /// Numbers of the granules that the range overlaps.
    pub(super) granules: Range<u64>,
}

impl Parts {
    /// Splits `range`, which must not be empty and must lie within a disk of `len` bytes.
    pub(super) fn of(range: Range<u64>, granule: u64, len: u64) -> Self {
        let Range { start, end } = range;
        let granules = start / granule..end.div_ceil(granule);
        // The last granule may be short: the end of the disk is a border too.
        let whole = |at: u64| at.is_multiple_of(granule) || at == len;
        let body_start = if whole(start) {
            start
        } else {
            (granules.start + 1).saturating_mul(granule).min(end)
        };
        let body_end = if whole(end) {
            end
        } else {
            (end / granule * granule).max(body_start)
        };
        Self {
            head: start..body_start,
            body: body_start..body_end,
            tail: body_end..end,
            granules,
        }
    }

    /// Returns the mode in which the granules must be locked.
    pub(super) fn mode(&self) -> Mode {
        if self.head.is_empty() && self.tail.is_empty() {
            Mode::Shared
        } else {
            Mode::Exclusive
        }
    }
}

impl Volume {
    /// Returns true if the disk was opened for writing.
    pub fn writable(&self) -> bool {
        self.disk().writer().is_some()
    }

    /// Writes `buf` from byte `offset` on. Returns the number of bytes written, which is smaller than `buf` if the disk
    /// ends before. Readers see the bytes at once; they are durable after a flush.
    ///
    /// Errors: `Os(ENOSPC)` for a write that starts at the end of the disk or after it, `ReadOnly`, those of the disk.
    /// After an error any part of `buf` may have been written.
    pub fn write(&self, offset: u64, buf: &[u8]) -> Result<usize> {
        let writer = self.writer()?;
        let len = (buf.len() as u64).min(self.len().saturating_sub(offset)) as usize;
        let buf = buf.get(..len).unwrap_or_default();
        if len == 0 {
            let text = format!(
                "write at byte {offset}: after the end of the disk at byte {}",
                self.len()
            );
            return Err(Error::new(ErrorKind::Os(libc::ENOSPC), text));
        }
        let parts = Parts::of(offset..offset + len as u64, self.granule(), self.len());
        let bytes = |part: &Range<u64>| {
            let (from, to) = (part.start - offset, part.end - offset);
            buf.get(from as usize..to as usize).unwrap_or_default()
        };
        self.change_parts(
            &parts,
            |part| self.patch(writer, part.start, bytes(part)),
            |body| writer.write_at(Lba(body.start / SECTOR), bytes(body)),
        )?;
        Ok(len)
    }

    /// Makes a range read as zeroes, as far as it lies on the disk. With `unmap` its space is discarded where the disk
    /// can do that.
    pub(crate) fn zero_range(&self, offset: u64, len: u64, unmap: bool) -> Result<()> {
        let writer = self.writer()?;
        let end = offset.saturating_add(len).min(self.len());
        if offset >= end {
            return Ok(());
        }
        let parts = Parts::of(offset..end, self.granule(), self.len());
        let zeroes = |part: &Range<u64>| self.patch(writer, part.start, &vec![0; (part.end - part.start) as usize]);
        self.change_parts(&parts, zeroes, |body| {
            // Exact: the body starts and ends at borders of granules or at the end of the disk, which are whole
            // sectors.
            writer.zero(Lba(body.start / SECTOR)..Lba(body.end / SECTOR), unmap)
        })
    }

    /// Allocates a range of the disk, so that later writes to it do not fail for lack of room. Its bytes stay the same.
    ///
    /// Errors: `Os(ENOSPC)`, before anything is allocated where the free space is known.
    pub fn allocate(&self, offset: u64, len: u64) -> Result<()> {
        let writer = self.writer()?;
        let end = offset.saturating_add(len).min(self.len());
        if offset >= end {
            return Ok(());
        }
        let granules = offset / self.granule()..end.div_ceil(self.granule());
        let sectors = |granules: &Range<u64>| {
            let end = (granules.end * self.granule()).min(self.len());
            Lba(granules.start * self.granule() / SECTOR)..Lba(end / SECTOR)
        };
        let mut needed = RoomNeeded::default();
        writer.add_room(sectors(&granules), false, &mut needed)?;
        needed.check()?;
        let step = (ALLOCATION_STEP / self.granule()).max(1);
        for start in granules.clone().step_by(step as usize) {
            let part = start..granules.end.min(start + step);
            // Exclusive: the engine may write back what it has read.
            let _held = self.ranges.lock(part.clone(), Mode::Exclusive);
            let done = writer.allocate(sectors(&part));
            self.note_change();
            done?;
        }
        Ok(())
    }

    /// Returns an error of the kind `Unsupported`, with the reason, if zeroing everything from byte `offset` on takes as
    /// long as writing it. Changes nothing.
    pub(crate) fn check_cheap_zeroing(&self, offset: u64) -> Result<()> {
        let range = Lba(offset / SECTOR)..Lba(self.len() / SECTOR);
        let slow = self.writer()?.slow_zeroing(range);
        slow.map_or(Ok(()), |why| Err(Error::unsupported(why)))
    }

    /// Makes everything durable and marks the image as closed, on this thread. Cheap if nothing was written.
    ///
    /// Errors: those of the disk. `Os(ESTALE)` if one of its files was deleted or replaced. `Os(ENOSPC)` if the backing
    /// file was written to after the end of the disk (see `prepare_external_write`); the
    /// disk itself is durable then. An error that no handle has reported.
    pub fn close(&self) -> Result<()> {
        let kind = FlushKind::Complete;
        self.note_external_writes();
        let flushed = self.flushes.flush_here(kind);
        self.durability().reported(None, kind, flushed)
    }

    /// Keeps the error of a flush that no program waits for, until the next flush of each handle.
    pub(super) fn keep_unheard(&self, e: &Error) {
        if let Some(latch) = self.durability().latch() {
            latch.keep(e);
        }
    }

    /// Returns the cursor of a new handle, which reports the errors of the disk from now on.
    pub(crate) fn error_cursor(&self) -> ErrorCursor {
        self.durability().latch().map(WriteLatch::cursor).unwrap_or_default()
    }

    /// Returns an error if nothing of the disk is durable any more.
    pub(super) fn check_latch(&self) -> Result<()> {
        self.durability().latch().map_or(Ok(()), WriteLatch::check)
    }

    /// Lets the count of data learn of the kernel's writes to the backing file, of which it may have made any number.
    pub(super) fn note_external_writes(&self) {
        if self.has_external_writes() {
            self.block_count.changed();
        }
    }

    /// Prepares the disk for writes by the kernel to its [`backing_fd`](crate::block::BlockRead::backing_fd). Must be
    /// called before the kernel gets the file descriptor (FUSE passthrough).
    pub(crate) fn prepare_external_write(&self) -> Result<()> {
        let prepared = self.writer()?.prepare_external_write();
        self.durability().allow_external_writes();
        self.note_change();
        prepared
    }

    /// Returns true if the kernel may write to the backing file directly.
    pub(crate) fn has_external_writes(&self) -> bool {
        self.durability().has_external_writes()
    }

    fn writer(&self) -> Result<&dyn BlockWrite> {
        self.disk()
            .writer()
            .ok_or_else(|| Error::new(ErrorKind::ReadOnly, "the disk was opened for reading"))
    }

    /// Returns the bytes of a granule.
    pub(super) fn granule(&self) -> u64 {
        self.disk().geometry().granule * SECTOR
    }

    /// Changes a range part by part, with its granules locked. `partial` changes head and tail, `body` the whole
    /// granules.
    fn change_parts(
        &self,
        parts: &Parts,
        partial: impl Fn(&Range<u64>) -> Result<()>,
        body: impl FnOnce(&Range<u64>) -> Result<()>,
    ) -> Result<()> {
        let _held = self.ranges.lock(parts.granules.clone(), parts.mode());
        let done = (|| {
            if !parts.head.is_empty() {
                partial(&parts.head)?;
            }
            if !parts.body.is_empty() {
                body(&parts.body)?;
            }
            if !parts.tail.is_empty() {
                partial(&parts.tail)?;
            }
            Ok(())
        })();
        // Also after an error: a part may have been written.
        self.note_change();
        done
    }

    /// Notes a change of the disk, after it has been made: every way to write ends here.
    pub(super) fn note_change(&self) {
        self.durability().changed();
        self.block_count.changed();
        self.writeback.written(&self.flushes);
    }

    /// Writes a part of one granule from byte `offset` on (read-modify-write). The caller holds the granule
    /// exclusively.
    fn patch(&self, writer: &dyn BlockWrite, offset: u64, bytes: &[u8]) -> Result<()> {
        let start = offset / self.granule() * self.granule();
        let mut granule = vec![0; self.granule().min(self.len() - start) as usize];
        let at = Lba(start / SECTOR);
        self.disk().read_at(at, &mut granule)?;
        let skip = (offset - start) as usize;
        let part = granule.get_mut(skip..skip + bytes.len());
        part.ok_or_else(|| super::out_of_range(offset))?.copy_from_slice(bytes);
        writer.write_at(at, &granule)
    }
}

#[cfg(test)]
mod tests;
