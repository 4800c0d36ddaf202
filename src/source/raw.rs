//! A plain file or block device as a disk.
//!
//! Writes go to their place in the file, which never gets more sectors. Where its length is no multiple of 512, the
//! rest of its last sector reads as zero; the first write to that sector makes the file whole sectors long before
//! anything else, so that the rest has a place. Whoever only reads, or writes elsewhere, leaves the length alone.
//!
//! What was written is counted, so that a flush with nothing to do costs nothing. A flush that fails is final: what it
//! was about may be lost although the next one would succeed (the kernel reports an error of its writeback once and
//! drops the pages), so from then on every flush fails and nothing more is written.

use std::ops::Range;
use std::os::fd::BorrowedFd;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use crate::block::{BlockRead, BlockWrite, Content, Geometry, Lba, MAX_SECTORS, SECTOR, check_range};
use crate::error::{Error, Result};
use crate::store::{StoredFile, StoredWrite, WriteLatch, writer};

/// A raw image; see the module.
#[derive(Debug)]
pub struct RawDisk {
    file: Arc<dyn StoredFile>,
    geometry: Geometry,
    /// Bytes of the file as we know it: what is behind them on the disk reads as zero.
    len: AtomicU64,
    /// Held while the file is made whole sectors long.
    growth: Mutex<()>,
    /// Changes that have been handed to the file.
    written: AtomicU64,
    /// Somebody else writes to the file with our leave, uncounted.
    behind: AtomicBool,
    /// How many changes are durable. Held during a sync, so that of several flushes one does the work.
    synced: Mutex<u64>,
    /// Why nothing is known to be durable any more.
    latch: WriteLatch,
}

impl RawDisk {
    /// The whole of `file`. It can be written to if the file can.
    pub fn new(file: Arc<dyn StoredFile>) -> Result<Self> {
        let sectors = file.len().div_ceil(SECTOR);
        if sectors > MAX_SECTORS {
            return Err(Error::unsupported(format!(
                "{}: longer than a disk can be",
                file.label()
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
            behind: AtomicBool::new(false),
            synced: Mutex::new(0),
            latch: WriteLatch::default(),
        })
    }

    fn len(&self) -> u64 {
        self.len.load(Ordering::Acquire)
    }

    /// The file's writing half, if nothing speaks against a write of bytes up to `end`.
    fn target(&self, end: u64) -> Result<&dyn StoredWrite> {
        self.latch.check()?;
        let file = self.check_not_truncated()?;
        if end > self.len() {
            self.grow(file)?;
        }
        Ok(file)
    }

    /// Written past its end, a file that somebody cut would seem whole and hold zeroes.
    fn check_not_truncated(&self) -> Result<&dyn StoredWrite> {
        // before the file's length: that may only grow meanwhile
        let known = self.len();
        self.latch.check_not_truncated(&*self.file, known)
    }

    /// Makes room for the rest of the last sector.
    fn grow(&self, file: &dyn StoredWrite) -> Result<()> {
        let _one_at_a_time = self.growth.lock().unwrap_or_else(PoisonError::into_inner);
        let whole = self.geometry.bytes();
        if self.len() < whole {
            if file.current_len()? < whole {
                file.set_len(whole)?;
            }
            self.len.store(whole, Ordering::Release);
        }
        Ok(())
    }

    /// Counts a change. Only once it is done: counted before, a flush in between would take it for durable.
    fn changed<T>(&self, done: Result<T>) -> Result<T> {
        self.written.fetch_add(1, Ordering::Release);
        done
    }
}

impl BlockRead for RawDisk {
    fn geometry(&self) -> Geometry {
        self.geometry
    }

    fn read_at(&self, at: Lba, buf: &mut [u8]) -> Result<()> {
        check_range(&self.geometry, at, buf.len())?;
        let left = self.len().saturating_sub(at.bytes());
        let real = (buf.len() as u64).min(left) as usize;
        let (real, past) = buf.split_at_mut(real);
        past.fill(0);
        self.file.read_exact_at(at.bytes(), real)
    }

    fn content_at(&self, at: Lba) -> Result<(Content, u64)> {
        check_range(&self.geometry, at, SECTOR as usize)?;
        let (stored, bytes) = self.file.data_at(at.bytes())?;
        // a sector of which a part is stored is no hole
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

    fn backing_fd(&self) -> Option<BorrowedFd<'_>> {
        self.file.fd().filter(|_| self.file.len() == self.geometry.bytes())
    }
}

impl BlockWrite for RawDisk {
    fn prepare_external_write(&self) -> Result<()> {
        self.target(0)?;
        self.behind.store(true, Ordering::Release);
        Ok(())
    }

    fn write_at(&self, at: Lba, buf: &[u8]) -> Result<()> {
        check_range(&self.geometry, at, buf.len())?;
        let file = self.target(at.bytes() + buf.len() as u64)?;
        self.changed(file.write_all_at(at.bytes(), buf))
    }

    fn zero(&self, range: Range<Lba>, unmap: bool) -> Result<()> {
        let sectors = range.end.0.saturating_sub(range.start.0);
        let bytes = usize::try_from(sectors.saturating_mul(SECTOR)).unwrap_or(usize::MAX);
        check_range(&self.geometry, range.start, bytes)?;
        // what the file lacks of its last sector reads as zero anyhow
        let file = self.target(0)?;
        let end = range.end.bytes().min(self.len());
        self.changed(file.zero(range.start.bytes(), end.saturating_sub(range.start.bytes()), unmap))
    }

    fn flush(&self) -> Result<()> {
        writer(&*self.file)?;
        let mut synced = self.synced.lock().unwrap_or_else(PoisonError::into_inner);
        self.latch.check()?;
        let written = self.written.load(Ordering::Acquire);
        if *synced == written && !self.behind.load(Ordering::Acquire) {
            return Ok(());
        }
        self.check_not_truncated()?;
        self.latch.sync(&*self.file)?;
        *synced = written;
        Ok(())
    }

    fn has_unflushed_metadata(&self) -> bool {
        false
    }

    fn close(&self) -> Result<()> {
        self.flush()?;
        self.behind.store(false, Ordering::Release);
        Ok(())
    }
}

#[cfg(test)]
mod tests;
