//! Writing half of [`VmdkDisk`]: finds the extents that a request touches, and calls their writers.
//!
//! `write/` knows the newest link alone. What shows below it, which a new grain is filled from, comes from the disk
//! through [`Backing`].

use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use crate::block::{BlockRead, BlockWrite, Lba, SECTOR, check_range};
use crate::error::{Error, ErrorKind, Result};
use crate::mutex::{lock, read_lock, write_lock};
use crate::store::{RoomNeeded, StoredFile, StoredWrite};
use crate::vmdk::chain::{Link, PlacedExtent};
use crate::vmdk::descriptor::ExtentAccess;
use crate::vmdk::disk::{VmdkDisk, refuse_without_parent};
use crate::vmdk::extent::Extent;
use crate::vmdk::write::{
    Backing, ExtentWriter, Writer, refuse_overlapping_extents, refuse_unwritable, refuse_with_children,
};
use crate::write_latch::WriteLatch;

/// Sectors zeroed between two checks of the backlog: 1 GiB.
const ZERO_PIECE: u64 = 1 << 21;

impl VmdkDisk {
    /// Returns the error with which [`open_writable`](Self::open_writable) would refuse this disk, as far as a disk
    /// that is open for reading shows it, without a change or a lock: `ReadOnly` for its format, `Policy` if it has
    /// children. With `force` children do not matter.
    pub(crate) fn refuses_writing(&self, force: bool) -> Option<Error> {
        let link = self.links().first()?;
        let children = |()| {
            if force {
                Ok(())
            } else {
                refuse_with_children(link, None)
            }
        };
        refuse_without_parent(self.lost_parent.as_ref())
            .and_then(|()| refuse_unwritable(link))
            .and_then(|()| refuse_overlapping_extents(link))
            .and_then(children)
            .err()
    }

    /// Returns the files that a write may change: the descriptor and the writable extents of the newest link.
    pub(crate) fn files_written(&self) -> Vec<Arc<dyn StoredFile>> {
        let Some(link) = self.links().first() else {
            return Vec::new();
        };
        let written = link.extents.iter().filter(|p| p.access == ExtentAccess::ReadWrite);
        let extents = written.filter_map(|p| p.extent.file()).map(Arc::clone);
        std::iter::once(Arc::clone(&link.file)).chain(extents).collect()
    }

    /// Returns the writer and the link that it writes to.
    ///
    /// Errors: `ReadOnly` if the disk was opened for reading.
    pub(super) fn writer_and_link(&self) -> Result<(&Writer, &Link)> {
        match (&self.writer, self.links().first()) {
            (Some(writer), Some(link)) => Ok((writer, link)),
            _ => Err(Error::new(ErrorKind::ReadOnly, "the disk is opened for reading")),
        }
    }

    /// Returns a random CID for [`change_cid`](Self::change_cid), with as many digits as the descriptor has space for,
    /// or `None` if the disk has no CID.
    pub(crate) fn draw_cid(&self) -> Result<Option<u32>> {
        self.writer_and_link()?.0.draw_cid()
    }

    /// Changes the CID to `cid`, durably, before the first write. For a caller that stored the new CID elsewhere
    /// beforehand; other writes draw one on their own.
    pub(crate) fn change_cid(&self, cid: u32) -> Result<()> {
        self.writer_and_link()?.0.change_cid(Some(cid))
    }

    /// Replaces the value of a setting of the newest link's descriptor by one of the same length, durably, in place.
    /// The content of the disk and its CID do not change. Keys of the disk data base start with `ddb.`.
    /// [`descriptor`](Self::descriptor) continues to return the old value.
    ///
    /// Errors: `Unsupported` if the setting does not exist or has another length.
    pub fn rewrite(&self, key: &str, value: &str) -> Result<()> {
        self.writer_and_link()?.0.rewrite(key, value)
    }

    /// Calls `change` for each extent that `range` overlaps, with the extent, its writer, the first sector of the disk
    /// in the overlap, and the number of its sectors. Flushes afterwards if too many updates are pending.
    fn change_extents(
        &self,
        range: Range<u64>,
        mut change: impl FnMut(&PlacedExtent, &ExtentWriter, u64, u64) -> Result<()>,
    ) -> Result<()> {
        let (writer, link) = self.writer_and_link()?;
        let full = {
            // Shared with other writers. Holding the gate keeps `close` from clearing the in-use mark under a write.
            let _gate = read_lock(&writer.gate);
            writer.change_cid(None)?;
            let mut at = range.start;
            while at < range.end {
                let after = link.extents.partition_point(|p| p.start <= at);
                let found = after
                    .checked_sub(1)
                    .and_then(|i| Some((link.extents.get(i)?, writer.extents.get(i)?)));
                let Some((placed, extent)) = found else {
                    return Err(Error::new(
                        ErrorKind::OutOfRange,
                        format!("{}: no extent holds it", Lba(at)),
                    ));
                };
                // At least one sector, so that a faulty list of extents can't make this loop spin.
                let sectors = (range.end - at)
                    .min((placed.start + placed.sectors).saturating_sub(at))
                    .max(1);
                change(placed, extent, at, sectors)?;
                at += sectors;
            }
            writer.has_full_backlog()
        };
        // Back-pressure: the writer that fills the backlog runs the flush. The gate is released first, as a flush does
        // not need it.
        if full { self.flush() } else { Ok(()) }
    }

    fn zero_piece(&self, range: Range<u64>, unmap: bool) -> Result<()> {
        self.change_extents(range, |placed, extent, start, sectors| {
            let within = start - placed.start;
            match (extent, &placed.extent) {
                (ExtentWriter::Grains(grains), Extent::Sparse(sparse)) => {
                    grains.zero(sparse, within, sectors, unmap, &self.backing_of(placed))
                }
                (ExtentWriter::Flat(dirty), Extent::Flat { file, offset }) => {
                    let zeroed = self
                        .flat_file(file)?
                        .zero((offset + within) * SECTOR, sectors * SECTOR, unmap);
                    // Also after an error: a part of the range may have been zeroed.
                    dirty.store(true, Ordering::Release);
                    zeroed
                }
                // A ZERO extent reads as zeroes already.
                (_, Extent::Zero) => Ok(()),
                _ => Err(read_only_extent(placed, start)),
            }
        })
    }

    /// Returns the writing half of a flat extent's file. Sets the write latch if another process truncated the file: a
    /// write after the new end would extend it again, with zeroes in place of the lost data.
    fn flat_file<'f>(&self, file: &'f Arc<dyn StoredFile>) -> Result<&'f dyn StoredWrite> {
        self.latch.check_not_truncated(&**file, file.len())
    }

    fn backing_of<'a>(&'a self, placed: &PlacedExtent) -> BackingChain<'a> {
        BackingChain {
            disk: self,
            start: placed.start,
            end: placed.start + placed.sectors,
        }
    }
}

impl BlockWrite for VmdkDisk {
    fn latch(&self) -> &WriteLatch {
        &self.latch
    }

    fn prepare_external_write(&self) -> Result<()> {
        let (writer, _) = self.writer_and_link()?;
        let _gate = read_lock(&writer.gate);
        // Never cleared: this process does not see the kernel's writes to the backing file, nor the last of them.
        writer.external_writes.store(true, Ordering::Release);
        writer.change_cid(None)
    }

    fn write_at(&self, at: Lba, buf: &[u8]) -> Result<()> {
        let sectors = check_range(&self.geometry(), at, buf.len())?;
        self.change_extents(at.0..at.0 + sectors, |placed, extent, start, sectors| {
            let from = ((start - at.0) * SECTOR) as usize;
            let part = buf.get(from..from + (sectors * SECTOR) as usize).unwrap_or_default();
            let within = start - placed.start;
            match (extent, &placed.extent) {
                (ExtentWriter::Grains(grains), Extent::Sparse(sparse)) => {
                    grains.write(sparse, within, part, &self.backing_of(placed))
                }
                (ExtentWriter::Flat(dirty), Extent::Flat { file, offset }) => {
                    let written = self.flat_file(file)?.write_all_at((offset + within) * SECTOR, part);
                    // After the write, so that a flush which clears the flag has it in its sync; and also after an
                    // error, as a part of the data may have been written.
                    dirty.store(true, Ordering::Release);
                    written
                }
                _ => Err(read_only_extent(placed, start)),
            }
        })
    }

    fn zero(&self, range: Range<Lba>, unmap: bool) -> Result<()> {
        let bytes = range
            .end
            .0
            .checked_sub(range.start.0)
            .and_then(|s| usize::try_from(s.checked_mul(SECTOR)?).ok());
        check_range(&self.geometry(), range.start, bytes.unwrap_or(usize::MAX))?;
        // In pieces: each may add pending updates, and the backlog is only checked after each piece.
        for start in (range.start.0..range.end.0).step_by(ZERO_PIECE as usize) {
            self.zero_piece(start..range.end.0.min(start + ZERO_PIECE), unmap)?;
        }
        Ok(())
    }

    fn slow_zeroing(&self, range: Range<Lba>) -> Option<String> {
        let (writer, link) = self.writer_and_link().ok()?;
        let extents = link.extents.iter().zip(&writer.extents);
        let inside = extents.filter(|(p, _)| p.start < range.end.0 && range.start.0 < p.start + p.sectors);
        inside
            .into_iter()
            .find_map(|(placed, extent)| match (extent, placed.extent.file()) {
                (_, None) => None,
                (ExtentWriter::None, _) => Some(read_only_extent(placed, placed.start.max(range.start.0)).to_string()),
                (_, Some(file)) => file.writer().and_then(StoredWrite::slow_zeroing),
            })
    }

    fn add_room(&self, range: Range<Lba>, zero: bool, needed: &mut RoomNeeded) -> Result<()> {
        self.add_room_of(range, zero, needed)
    }

    fn allocate(&self, range: Range<Lba>) -> Result<()> {
        self.allocate_range(range)
    }

    fn flush(&self) -> Result<()> {
        let (writer, link) = self.writer_and_link()?;
        // Group flush. A flush that starts after this load covers every write that returned before this call. So a
        // caller that waited for the lock while such a flush ran and succeeded is done. A flush with a number up to
        // `before` may have taken its batches before those writes, and does not count.
        let before = writer.started.load(Ordering::Acquire);
        let mut last = lock(&writer.last_flush);
        // Under the lock, as the flush that was waited for may have set the latch.
        writer.latch.check()?;
        if *last > before {
            return Ok(());
        }
        let number = writer.started.fetch_add(1, Ordering::AcqRel) + 1;
        // On an error `last` keeps its value, so waiters run a flush of their own and get their own error.
        writer.flush_now(link)?;
        *last = number;
        Ok(())
    }

    fn close(&self) -> Result<()> {
        let (writer, link) = self.writer_and_link()?;
        // The gate excludes writers from here on, so no update can become pending between the flush and the mark.
        let _gate = write_lock(&writer.gate);
        self.flush()?;
        // Excludes flushes, which do not take the gate, while the file is truncated and the mark is cleared.
        let _flushing = lock(&writer.last_flush);
        writer.mark_closed(link)?;
        // A write after this starts over: with a new CID and, for a new grain, the in-use mark. Not where the kernel writes
        // without this process, which could not change the CID first.
        if !writer.external_writes.load(Ordering::Acquire) {
            writer.cid_changed.store(false, Ordering::Release);
        }
        Ok(())
    }
}

/// Backing of an extent of the newest link: the links below it, and the base.
struct BackingChain<'a> {
    disk: &'a VmdkDisk,
    /// First sector of the disk that the extent holds.
    start: u64,
    /// First sector of the disk after the extent.
    end: u64,
}

impl Backing for BackingChain<'_> {
    fn read(&self, sector: u64, buf: &mut [u8]) -> Result<()> {
        // The last grain may reach past the end of its extent. No reader sees that part; it is filled with zeroes, as
        // the links below have other sectors of the disk there.
        let inside = self.end.saturating_sub(self.start + sector) * SECTOR;
        let inside = (buf.len() as u64).min(inside) as usize;
        let (real, past) = buf.split_at_mut(inside);
        past.fill(0);
        self.disk.read_below(Lba(self.start + sector), real)
    }

    fn is_zero(&self, sector: u64, sectors: u64) -> bool {
        let at = self.start + sector;
        self.disk
            .is_zero_below(Lba(at), sectors.min(self.end.saturating_sub(at)))
    }

    fn zeroes(&self, sector: u64, sectors: u64) -> Result<(bool, u64)> {
        self.disk.zeroes_below(Lba(self.start + sector), sectors)
    }
}

pub(super) fn read_only_extent(placed: &PlacedExtent, at: u64) -> Error {
    let (kind, access) = (placed.kind, placed.access.as_str());
    Error::new(
        ErrorKind::ReadOnly,
        format!(
            "{}: lies in a {kind} extent ({access}) that can't be written to",
            Lba(at)
        ),
    )
}
