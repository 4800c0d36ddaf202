//! Writing bytes to sectors.
//!
//! ```text
//!   granules    |-------|-------|-------|-------|
//!   a write         [===|=======|=======|==]
//!                   head      body       tail
//! ```
//! The body goes to the disk as it is. Head and tail are parts of a granule whose other bytes are read and written
//! back, so nobody else may write to that granule meanwhile: see [`crate::range_lock`].

use std::ops::Range;
use std::sync::atomic::Ordering;

use crate::block::{BlockWrite, Lba, SECTOR};
use crate::error::{Error, ErrorKind, Result};
use crate::range_lock::Mode;
use crate::volume::Volume;

/// A range of bytes of a disk, as granules see it. Each part may be empty; together they are the range.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Parts {
    head: Range<u64>,
    body: Range<u64>,
    tail: Range<u64>,
    /// The granules that it touches, by number.
    pub(super) granules: Range<u64>,
}

impl Parts {
    /// The parts of `range`, which is not empty and within a disk of `len` bytes.
    pub(super) fn of(range: Range<u64>, granule: u64, len: u64) -> Self {
        let Range { start, end } = range;
        let granules = start / granule..end.div_ceil(granule);
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

    /// How the granules have to be taken.
    pub(super) fn mode(&self) -> Mode {
        if self.head.is_empty() && self.tail.is_empty() {
            Mode::Shared
        } else {
            Mode::Exclusive
        }
    }
}

impl Volume {
    /// Whether it can be written to at all.
    pub fn writable(&self) -> bool {
        self.disk.writer().is_some()
    }

    /// Writes `buf` from byte `offset` on: how many bytes, which are fewer where the disk ends before. Readers see them
    /// at once; they are durable after [`flush`](Self::flush).
    ///
    /// Errors: `Os(ENOSPC)` for a write that begins at the end or behind it, `ReadOnly`, what the disk says. After one
    /// any part of it may have been written.
    pub fn write(&self, offset: u64, buf: &[u8]) -> Result<usize> {
        let writer = self.writer()?;
        let len = (buf.len() as u64).min(self.len().saturating_sub(offset)) as usize;
        let buf = buf.get(..len).unwrap_or_default();
        if len == 0 {
            let text = format!("a write at byte {offset} of a disk of {} bytes", self.len());
            return Err(Error::new(ErrorKind::Os(libc::ENOSPC), text));
        }
        let parts = Parts::of(offset..offset + len as u64, self.granule(), self.len());
        let bytes = |part: &Range<u64>| {
            let (from, to) = (part.start - offset, part.end - offset);
            buf.get(from as usize..to as usize).unwrap_or_default()
        };
        self.change(
            &parts,
            |part| self.patch(writer, part.start, bytes(part)),
            |body| writer.write_at(Lba(body.start / SECTOR), bytes(body)),
        )?;
        Ok(len)
    }

    /// Makes a range read as zeroes, as far as it is on the disk. `unmap`: and gives its room back where that can be
    /// done.
    pub fn zero_range(&self, offset: u64, len: u64, unmap: bool) -> Result<()> {
        let writer = self.writer()?;
        let end = offset.saturating_add(len).min(self.len());
        if offset >= end {
            return Ok(());
        }
        let parts = Parts::of(offset..end, self.granule(), self.len());
        let zeroes = |part: &Range<u64>| self.patch(writer, part.start, &vec![0; (part.end - part.start) as usize]);
        self.change(&parts, zeroes, |body| {
            // the disk may end within its last granule, never within a sector
            writer.zero(Lba(body.start / SECTOR)..Lba(body.end / SECTOR), unmap)
        })
    }

    /// Makes durable what was written before. Nearly free where that is nothing.
    ///
    /// Errors: `Os(ENOSPC)` where somebody has written behind the end of the disk through its backing file (see
    /// [`prepare_external_write`](Self::begin)); what is on the disk is durable all the same. What the disk says.
    pub fn flush(&self) -> Result<()> {
        let trimmed = self.trim();
        self.disk.writer().map_or(Ok(()), BlockWrite::flush).and(trimmed)
    }

    /// Makes everything durable and marks the disk as closed properly. Errors as [`flush`](Self::flush).
    pub fn close(&self) -> Result<()> {
        let trimmed = self.trim();
        self.disk.writer().map_or(Ok(()), BlockWrite::close).and(trimmed)
    }

    /// To be called before the content is changed by somebody else, with our leave: the kernel, through
    /// [`backing_fd`](crate::block::BlockRead::backing_fd).
    pub fn prepare_external_write(&self) -> Result<()> {
        let begun = self.writer()?.prepare_external_write();
        self.behind.store(true, Ordering::Release);
        self.allocated.changed();
        self.settler.written(&self.disk);
        begun
    }

    /// Cuts what was written behind the end of the disk: the kernel, which writes to the backing file itself, does not
    /// know of the end.
    fn trim(&self) -> Result<()> {
        let Some(fd) = self.disk.backing_fd().filter(|_| self.behind.load(Ordering::Acquire)) else {
            return Ok(());
        };
        self.allocated.changed();
        let context = || format!("the end of the backing file, at byte {}", self.len());
        let stat = nix::sys::stat::fstat(fd).map_err(|e| Error::io(context(), e.into()))?;
        match u64::try_from(stat.st_size).unwrap_or(0).checked_sub(self.len()) {
            None | Some(0) => Ok(()),
            Some(behind) => {
                nix::unistd::ftruncate(fd, self.len() as i64).map_err(|e| Error::io(context(), e.into()))?;
                let text = format!("{behind} bytes were written behind the end of the disk, and are gone");
                Err(Error::new(ErrorKind::Os(libc::ENOSPC), text))
            }
        }
    }

    fn writer(&self) -> Result<&dyn BlockWrite> {
        self.disk
            .writer()
            .ok_or_else(|| Error::new(ErrorKind::ReadOnly, "the disk was opened for reading"))
    }

    /// Bytes of a granule.
    pub(super) fn granule(&self) -> u64 {
        self.disk.geometry().granule * SECTOR
    }

    /// Does a change part by part, with what it touches kept from others.
    fn change(
        &self,
        parts: &Parts,
        end: impl Fn(&Range<u64>) -> Result<()>,
        body: impl FnOnce(&Range<u64>) -> Result<()>,
    ) -> Result<()> {
        let _held = self.ranges.lock(parts.granules.clone(), parts.mode());
        let done = (|| {
            if !parts.head.is_empty() {
                end(&parts.head)?;
            }
            if !parts.body.is_empty() {
                body(&parts.body)?;
            }
            if !parts.tail.is_empty() {
                end(&parts.tail)?;
            }
            Ok(())
        })();
        self.allocated.changed();
        done
    }

    /// Changes a part of one granule, from byte `offset` on.
    fn patch(&self, writer: &dyn BlockWrite, offset: u64, bytes: &[u8]) -> Result<()> {
        let start = offset / self.granule() * self.granule();
        let mut granule = vec![0; self.granule().min(self.len() - start) as usize];
        let at = Lba(start / SECTOR);
        self.disk.read_at(at, &mut granule)?;
        let skip = (offset - start) as usize;
        let part = granule.get_mut(skip..skip + bytes.len());
        part.ok_or_else(|| super::out_of_range(offset))?.copy_from_slice(bytes);
        writer.write_at(at, &granule)
    }
}

#[cfg(test)]
mod tests;
