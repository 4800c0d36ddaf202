//! Raw images: a plain file or a block device as a disk.
//!
//! # Length
//!
//! Byte `n` of the disk is byte `n` of the file, and the number of sectors never changes. If the length of the file is
//! not a multiple of 512, the rest of the last sector reads as zeroes. The first write to that sector extends the file
//! to whole sectors; reads, and writes elsewhere, leave the length as it is.
//!
//! A file that is shorter than this process knows was truncated by another process. A write at its old end would make
//! it look whole again, with zeroes in place of the lost data, so a truncated file sets the write latch.
//!
//! # Durability
//!
//! Changes are counted, so a flush with nothing to do costs no system call. A failed flush is final: the kernel reports
//! a writeback error only once and drops the pages, so the next fsync would succeed although data is lost. The write
//! latch makes all later flushes and writes fail.
//!
//! # Lock order
//!
//! `growth` and `synced` are never held together. `growth` is held while the file is extended, `synced` during an
//! fsync. Reads and most writes acquire neither.

use std::ops::Range;
use std::os::fd::BorrowedFd;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use crate::block::{BlockRead, BlockWrite, Content, Geometry, Lba, MAX_SECTORS, SECTOR, check_range};
use crate::error::{Error, Result};
use crate::mutex::lock;
use crate::store::{RoomNeeded, StoredFile, StoredWrite, writer};
use crate::write_latch::WriteLatch;

/// Raw image; see the module documentation.
#[derive(Debug)]
pub struct RawDisk {
    file: Arc<dyn StoredFile>,
    geometry: Geometry,
    /// Length of the file in bytes, as known to this process. The bytes of the disk beyond it read as zeroes.
    len: AtomicU64,
    /// Held while the file is extended to whole sectors.
    growth: Mutex<()>,
    /// Number of completed changes.
    written: AtomicU64,
    /// True once the kernel may write to the file directly (passthrough). These writes are not counted.
    external_writes: AtomicBool,
    /// Number of durable changes. Held during an fsync, so that one fsync answers all flushes that wait for it.
    synced: Mutex<u64>,
    /// Set by a failed fsync or a truncated file.
    latch: WriteLatch,
}

impl RawDisk {
    /// Creates a disk over the whole of `file`. It can be written if the file can.
    ///
    /// Errors: the file has more than [`MAX_SECTORS`].
    pub fn new(file: Arc<dyn StoredFile>) -> Result<Self> {
        let sectors = file.len().div_ceil(SECTOR);
        if sectors > MAX_SECTORS {
            return Err(Error::unsupported(format!(
                "{}: {} bytes, more than a disk can have",
                file.label(),
                file.len()
            )));
        }
        Ok(Self {
            len: file.len().into(),
            file,
            geometry: Geometry {
                sectors,
                granule: 1,
                preferred: 1,
            },
            growth: Mutex::default(),
            written: AtomicU64::new(0),
            external_writes: AtomicBool::new(false),
            synced: Mutex::new(0),
            latch: WriteLatch::default(),
        })
    }

    fn len(&self) -> u64 {
        self.len.load(Ordering::Acquire)
    }

    /// Returns the file for a write of bytes up to `end`, extended to hold them. Errors: the latch is set, or the file
    /// was truncated.
    fn target(&self, end: u64) -> Result<&dyn StoredWrite> {
        self.latch.check()?;
        let file = self.check_not_truncated()?;
        if end > self.len() {
            self.grow(file)?;
        }
        Ok(file)
    }

    /// Returns the file after a check that no other process has truncated it. Otherwise sets the latch.
    fn check_not_truncated(&self) -> Result<&dyn StoredWrite> {
        // Loaded before the length of the file: `grow` may extend the file between the two, never the reverse.
        let known = self.len();
        self.latch.check_not_truncated(&*self.file, known)
    }

    /// Extends the file to whole sectors, for a write to its last one.
    fn grow(&self, file: &dyn StoredWrite) -> Result<()> {
        // One thread extends the file. The others wait here, because they must not write before it has its new length.
        let _growing = lock(&self.growth);
        let whole = self.geometry.bytes();
        if self.len() < whole {
            // Another program may have extended the file; it is not made shorter.
            if file.current_len()? < whole {
                file.set_len(whole)?;
            }
            // Published after the file has that length: a reader must not read beyond its end.
            self.len.store(whole, Ordering::Release);
        }
        Ok(())
    }

    /// Counts a change that has ended. A change that is counted before its end could be lost: a flush in between would
    /// fsync the file without it and still count it as durable.
    ///
    /// A failed change counts too, because it may have changed a part of its range.
    fn count_change<T>(&self, result: Result<T>) -> Result<T> {
        self.written.fetch_add(1, Ordering::Release);
        result
    }
}

impl BlockRead for RawDisk {
    fn geometry(&self) -> Geometry {
        self.geometry
    }

    fn read_at(&self, at: Lba, buf: &mut [u8]) -> Result<()> {
        check_range(&self.geometry, at, buf.len())?;
        let left = self.len().saturating_sub(at.bytes());
        let stored = (buf.len() as u64).min(left) as usize;
        // By the length that is known and not by that of the file: a truncated file must give an error, and no zeroes.
        let (stored, beyond_end) = buf.split_at_mut(stored);
        beyond_end.fill(0);
        self.file.read_exact_at(at.bytes(), stored)
    }

    fn content_at(&self, at: Lba) -> Result<(Content, u64)> {
        check_range(&self.geometry, at, SECTOR as usize)?;
        let (stored, bytes) = self.file.data_at(at.bytes())?;
        // A hole may end within a sector. A sector that is stored in part counts as data.
        let mixed = bytes < SECTOR && bytes < self.len().saturating_sub(at.bytes());
        let content = if stored || mixed { Content::Data } else { Content::Hole };
        Ok((content, (bytes / SECTOR).clamp(1, self.geometry.sectors - at.0)))
    }

    fn is_zero(&self, _at: Lba, _sectors: u64) -> bool {
        false
    }

    fn writer(&self) -> Option<&dyn BlockWrite> {
        self.file.writer().is_some().then_some(self as &dyn BlockWrite)
    }

    fn why_no_runs(&self) -> &'static str {
        match self.file.len() == self.geometry.bytes() {
            true => "it is not a file on this machine",
            false => "its file ends inside of its last sector, the rest of which is shown as zeroes",
        }
    }

    fn backing_fd(&self) -> Option<BorrowedFd<'_>> {
        // Not with an incomplete last sector: the kernel would show a shorter file than this process.
        self.file
            .content_fd()
            .filter(|_| self.file.len() == self.geometry.bytes())
    }
}

impl BlockWrite for RawDisk {
    fn prepare_external_write(&self) -> Result<()> {
        self.target(0)?;
        // Never cleared: one program may close the disk while another one, or a copy of the same descriptor, continues to
        // write through the kernel. Its next fsync would otherwise find nothing counted and sync nothing.
        self.external_writes.store(true, Ordering::Release);
        Ok(())
    }

    fn write_at(&self, at: Lba, buf: &[u8]) -> Result<()> {
        check_range(&self.geometry, at, buf.len())?;
        let file = self.target(at.bytes() + buf.len() as u64)?;
        self.count_change(file.write_all_at(at.bytes(), buf))
    }

    fn zero(&self, range: Range<Lba>, unmap: bool) -> Result<()> {
        let sectors = range.end.0.saturating_sub(range.start.0);
        let bytes = usize::try_from(sectors.saturating_mul(SECTOR)).unwrap_or(usize::MAX);
        check_range(&self.geometry, range.start, bytes)?;
        // The file is not extended: the missing part of its last sector reads as zeroes already.
        let file = self.target(0)?;
        let end = range.end.bytes().min(self.len());
        self.count_change(file.zero(range.start.bytes(), end.saturating_sub(range.start.bytes()), unmap))
    }

    fn add_room(&self, range: Range<Lba>, zero: bool, needed: &mut RoomNeeded) -> Result<()> {
        writer(&*self.file)?;
        if zero {
            return Ok(());
        }
        needed.add_holes(&self.file, range.start.bytes()..range.end.bytes().min(self.len()))
    }

    fn allocate(&self, range: Range<Lba>) -> Result<()> {
        let end = range.end.bytes();
        let file = self.target(end)?;
        self.count_change(file.allocate(range.start.bytes(), end - range.start.bytes()))
    }

    fn slow_zeroing(&self, _range: Range<Lba>) -> Option<String> {
        self.file.writer().and_then(StoredWrite::slow_zeroing)
    }

    fn latch(&self) -> &WriteLatch {
        &self.latch
    }

    fn flush(&self) -> Result<()> {
        writer(&*self.file)?;
        let mut synced = lock(&self.synced);
        // Checked under the lock: the flush that this one has waited for may have failed.
        self.latch.check()?;
        // Loaded before the fsync, which covers at least these changes.
        let written = self.written.load(Ordering::Acquire);
        if *synced == written && !self.external_writes.load(Ordering::Acquire) {
            return Ok(());
        }
        self.check_not_truncated()?;
        self.latch.sync(&*self.file)?;
        *synced = written;
        Ok(())
    }

    fn close(&self) -> Result<()> {
        self.flush()
    }
}

#[cfg(test)]
mod tests;
