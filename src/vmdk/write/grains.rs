//! Writes to one hosted sparse extent: in place where a grain is allocated, else into a new grain.
//!
//! ```text
//!   write ─ allocated? ─yes─► pwrite in place
//!              └no─► lock the grains ─ take space at the end of the file ─ write data, and the backing's around it
//!                    └► entry: in memory at once, in the file with the next flush
//! ```
//! Invariants:
//! - An allocated grain never moves and is never reused, so a write in place needs no lock.
//! - Data come first, then the entry that names them: in memory (`publish`) and in the file (flush).
//! - The in-use mark in the header is durable before the first grain is allocated, so a crash at any later point leaves
//!   an image that the next open for writing recovers.
//!
//! `grain_allocator.rs` hands out the space for new grains and checks the length of the file; `pending_updates.rs`
//! brings the entries into the file.
//!
//! Lock order: `grain_locks` (one range), then the locks of [`WritableTables`], `marking`, `pending` or the allocator's
//! `space`. None of these is held while another one of them is taken, and `pending` is never held over I/O.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};

use crate::block::SECTOR;
use crate::error::{Error, ErrorKind, Result};
use crate::mutex::lock;
use crate::range_lock::{Mode, RangeLock};
use crate::store::{StoredFile, StoredWrite, writer};
use crate::vmdk::extent::{Mapping, SparseExtent};
use crate::vmdk::header::{UNCLEAN_AT, VERSION_AT, with_zeroed_grains};
use crate::vmdk::tables::hosted::HostedTables;
use crate::vmdk::tables::writable::{WritableTable, WritableTables};
use crate::vmdk::tables::{GrainEntry, TableGeometry};
use crate::write_latch::WriteLatch;

mod grain_allocator;
mod pending_updates;

use grain_allocator::GrainAllocator;
use pending_updates::PendingUpdates;
pub(super) use pending_updates::{Backlog, Batch};

/// Raw table entry of a zeroed grain.
const ZEROED: u32 = 1;

/// Content of unallocated grains: the links below, or zeroes. Sectors count from the start of the extent.
pub(in crate::vmdk) trait Backing {
    /// Reads whole sectors.
    fn read(&self, sector: u64, buf: &mut [u8]) -> Result<()>;
    /// Returns true if the sectors are known to be zeroes without a read of their data.
    fn is_zero(&self, sector: u64, sectors: u64) -> bool;
    /// Returns true if the content at `sector` is zeroes, and for how many of `sectors` the answer holds.
    fn zeroes(&self, sector: u64, sectors: u64) -> Result<(bool, u64)>;
}

/// Writing half of a sparse extent.
#[derive(Debug)]
pub(in crate::vmdk) struct GrainWriter {
    file: Arc<dyn StoredFile>,
    layout: Arc<HostedTables>,
    tables: Arc<WritableTables>,
    geometry: TableGeometry,
    /// Range lock over grain numbers, held exclusively while the grains are allocated. First in the lock order.
    grain_locks: RangeLock,
    allocator: GrainAllocator,
    /// Updates that the next flush writes. Never held over I/O.
    pending: Mutex<PendingUpdates>,
    /// True while the header in the file has the in-use mark. Set under `marking`, read without it.
    marked: AtomicBool,
    /// True for an overlay of this program, which starts with version 1 of the format: more programs read it. Its header
    /// gets version 2 when the first zeroed grain is needed.
    may_enable_zeroed_grains: bool,
    /// Held while the header is written, so that concurrent first allocations write it once.
    marking: Mutex<()>,
    /// True if the file was written to since the last sync.
    dirty: AtomicBool,
    /// Shared by all files of the disk.
    latch: Arc<WriteLatch>,
    /// Shared by all extents of the disk.
    backlog: Arc<Backlog>,
}

impl GrainWriter {
    /// Creates the writing half of `sparse`, whose tables were checked. `unclean` is true if its header has the in-use
    /// mark already, `is_overlay` if it belongs to an overlay of this program.
    pub(super) fn new(
        sparse: &SparseExtent,
        layout: Arc<HostedTables>,
        (unclean, is_overlay): (bool, bool),
        (latch, backlog): (Arc<WriteLatch>, Arc<Backlog>),
    ) -> Result<Self> {
        let Some(tables) = sparse.writable.as_ref().map(Arc::clone) else {
            return Err(Error::new(
                ErrorKind::ReadOnly,
                format!("{}: opened for reading", sparse.file.label()),
            ));
        };
        let geometry = sparse.geometry();
        let file = Arc::clone(&sparse.file);
        let allocator = GrainAllocator::new(
            Arc::clone(&file),
            Arc::clone(&layout),
            geometry.grain,
            Arc::clone(&latch),
        )?;
        Ok(Self {
            file,
            layout,
            tables,
            geometry,
            grain_locks: RangeLock::default(),
            allocator,
            pending: Mutex::default(),
            marked: AtomicBool::new(unclean),
            may_enable_zeroed_grains: is_overlay,
            marking: Mutex::default(),
            // An earlier process may have ended without a sync.
            dirty: AtomicBool::new(true),
            latch,
            backlog,
        })
    }

    /// Writes `buf` from `sector` of the extent on. `sparse` must be the extent that this is the writing half of;
    /// `backing` fills the rest of a new grain.
    pub(in crate::vmdk) fn write(
        &self,
        sparse: &SparseExtent,
        sector: u64,
        buf: &[u8],
        backing: &dyn Backing,
    ) -> Result<()> {
        let mut rest = buf;
        let mut at = sector;
        while !rest.is_empty() {
            let left = rest.len() as u64 / SECTOR;
            let done = match sparse.map(at, left, None)? {
                Mapping::Stored {
                    sector: place, sectors, ..
                } => {
                    let written = self
                        .allocator
                        .check_not_truncated()?
                        .write_all_at(place * SECTOR, part(rest, sectors));
                    // Set after the write and before its result is returned, also after an error: a part of the data
                    // may be visible to readers, and a flush that starts later must sync it.
                    self.dirty.store(true, Ordering::Release);
                    written?;
                    sectors
                }
                // `allocate` may return 0, if another thread allocated the grain after `map` read the entry. The
                // next iteration then finds it stored. An entry never returns to unallocated, so this does not spin.
                Mapping::Zero { sectors } | Mapping::Hole { sectors } => {
                    self.allocate(at, sectors, Some(part(rest, sectors)), backing)?
                }
                Mapping::Compressed { .. } => return Err(self.read_only()),
            };
            rest = rest.get((done * SECTOR) as usize..).unwrap_or_default();
            at += done;
        }
        Ok(())
    }

    /// Makes `sectors` from `sector` on read as zeroes. With `unmap` the space of stored grains is discarded.
    pub(in crate::vmdk) fn zero(
        &self,
        sparse: &SparseExtent,
        sector: u64,
        sectors: u64,
        unmap: bool,
        backing: &dyn Backing,
    ) -> Result<()> {
        let end = sector + sectors;
        let mut at = sector;
        while at < end {
            at += match sparse.map(at, end - at, None)? {
                Mapping::Stored {
                    sector: place, sectors, ..
                } => {
                    // The grain keeps its entry and its place in the file. If it were freed and reused, a reader that
                    // looked up the entry before would read another grain's data.
                    let zeroed = self
                        .allocator
                        .check_not_truncated()?
                        .zero(place * SECTOR, sectors * SECTOR, unmap);
                    // Also after an error: a part of the range may be a hole or zeroes now.
                    // Without `unmap` too: a zeroed range is unwritten space, which SEEK_DATA reports as a hole.
                    self.tables.note_hole();
                    self.dirty.store(true, Ordering::Release);
                    zeroed?;
                    sectors
                }
                Mapping::Zero { sectors } => sectors,
                Mapping::Hole { sectors } => match backing.zeroes(at, sectors)? {
                    (true, sectors) => sectors,
                    (false, sectors) => self.hide_backing(at, sectors, backing)?,
                },
                Mapping::Compressed { .. } => return Err(self.read_only()),
            };
        }
        Ok(())
    }

    /// Hides the backing with zeroes, in at most `sectors` from `sector` on. Returns the number of sectors done, 0 if
    /// another thread allocated the first grain meanwhile.
    fn hide_backing(&self, sector: u64, sectors: u64, backing: &dyn Backing) -> Result<u64> {
        let grain = self.geometry.grain;
        let within = sector % grain;
        let inside = self.geometry.grain_sectors(sector / grain);
        // A part of a grain needs a stored grain: the other part continues to show the backing.
        if within != 0 || sectors < inside {
            let sectors = sectors.min(inside - within);
            return self.allocate(sector, sectors, None, backing);
        }
        // Whole grains from here on; the last one of the extent may be short.
        let end = sector + sectors;
        let whole = if end == self.geometry.capacity {
            sectors
        } else {
            sectors / grain * grain
        };
        // Without the flag in the header, an entry of 1 is damage: such extents get grains of stored zeroes.
        if !self.layout.has_zeroed_grains() && !self.may_enable_zeroed_grains {
            return self.allocate(sector, whole, None, backing);
        }
        self.mark_in_use()?;
        self.enable_zeroed_grains()?;
        let (table, first, count) = self.split_at_table(sector, whole);
        let _held = self
            .grain_locks
            .lock(sector / grain..sector / grain + count, Mode::Exclusive);
        let table = self.tables.table_for_writing(table)?;
        let free = unallocated(&table, first, count);
        if free > 0 {
            self.publish(&table, first, (0..free).map(|_| ZEROED));
        }
        Ok((free * grain).min(whole))
    }

    /// Allocates grains at `sector` for `data` (`None`: zeroes) of at most `sectors`, and writes them, with the
    /// backing's content around the data. Returns the number of sectors done, 0 if another thread allocated the first
    /// grain meanwhile.
    fn allocate(&self, sector: u64, sectors: u64, data: Option<&[u8]>, backing: &dyn Backing) -> Result<u64> {
        self.mark_in_use()?;
        let grain = self.geometry.grain;
        let (table, first, count) = self.split_at_table(sector, sectors);
        // Single allocation: the entries are read again under the lock, and only those that are still free are taken.
        let _held = self
            .grain_locks
            .lock(sector / grain..sector / grain + count, Mode::Exclusive);
        let table = self.tables.table_for_writing(table)?;
        let count = unallocated(&table, first, count);
        if count == 0 {
            return Ok(0);
        }
        let sectors = sectors.min(count * grain - sector % grain);
        let place = self.allocator.take(count)?;
        let new = NewGrains {
            sector,
            sectors,
            place,
            count,
        };
        if let Err(e) = self.fill(&new, data, &table, first, backing) {
            // No entry names the grains yet, so no reader has seen them: they may be reused.
            self.allocator.give_back(place, count);
            return Err(e);
        }
        // From here on readers and writers in place use the grains. Their data are written, though not durable.
        self.publish(&table, first, (0..count).map(|i| (place + i * grain) as u32));
        Ok(sectors)
    }

    /// Returns the table and the entry of `sector`, and the number of grains of that table that `sectors` from there on
    /// overlap.
    fn split_at_table(&self, sector: u64, sectors: u64) -> (u64, u64, u64) {
        let grain = sector / self.geometry.grain;
        let (table, entry) = (
            grain / self.geometry.entries_per_table,
            grain % self.geometry.entries_per_table,
        );
        let touched = (sector % self.geometry.grain + sectors).div_ceil(self.geometry.grain);
        (table, entry, touched.min(self.geometry.entries_per_table - entry))
    }

    /// Writes data into new grains (copy-on-write): the caller's, and the backing's where the first and the last grain
    /// are not covered whole. Zeroes are not written, as new space reads as zeroes.
    fn fill(
        &self,
        new: &NewGrains,
        data: Option<&[u8]>,
        table: &WritableTable,
        first: u64,
        backing: &dyn Backing,
    ) -> Result<()> {
        let grain = self.geometry.grain;
        let start = new.sector / grain * grain;
        let end = (start + new.count * grain).min(self.geometry.capacity);
        let after = new.sector + new.sectors;
        for (from, to, entry) in [(start, new.sector, first), (after, end, first + new.count - 1)] {
            // A zeroed grain hides the backing: the rest of it stays zero.
            let zeroed = grain_entry(table, entry) == GrainEntry::Zero;
            if from < to && !zeroed && !backing.is_zero(from, to - from) {
                // A part of one grain, so at most 8 MiB (`MAX_GRAIN_SECTORS`).
                let mut around = vec![0; ((to - from) * SECTOR) as usize];
                backing.read(from, &mut around)?;
                self.writer()?
                    .write_all_at((new.place + from - start) * SECTOR, &around)?;
            }
        }
        match data {
            Some(data) => self
                .writer()?
                .write_all_at((new.place + new.sector - start) * SECTOR, part(data, new.sectors)),
            None => Ok(()),
        }
    }

    /// Sets the in-use mark in the header, once, and waits until it is durable.
    fn mark_in_use(&self) -> Result<()> {
        // Double-checked: after the first allocation this is one atomic load.
        if self.marked.load(Ordering::Acquire) {
            return Ok(());
        }
        let _marking = lock(&self.marking);
        if !self.marked.load(Ordering::Acquire) {
            self.allocator.check_not_truncated()?.write_all_at(UNCLEAN_AT, &[1])?;
            self.latch.sync(&*self.file)?;
            // After the sync: no other thread may allocate while only the page cache has the mark.
            self.marked.store(true, Ordering::Release);
        }
        Ok(())
    }

    /// Makes the header say that an entry of 1 is a zeroed grain, durably, before the first such entry.
    fn enable_zeroed_grains(&self) -> Result<()> {
        if self.layout.has_zeroed_grains() {
            return Ok(());
        }
        let _marking = lock(&self.marking);
        if !self.layout.has_zeroed_grains() {
            let mut fields = [0; 8];
            self.file.read_exact_at(VERSION_AT, &mut fields)?;
            // Both fields lie in one sector: a crash leaves the old ones or the new ones.
            let out = self.allocator.check_not_truncated()?;
            out.write_all_at(VERSION_AT, &with_zeroed_grains(fields))?;
            self.latch.sync(&*self.file)?;
            self.layout.enabled_zeroed_grains();
        }
        Ok(())
    }

    /// Truncates the file after the last grain and clears the in-use mark. Returns true if the file was changed and has
    /// to be synced. The caller has flushed and excludes writers and flushes.
    pub(super) fn mark_closed(&self) -> Result<bool> {
        if !self.marked.load(Ordering::Acquire) {
            return Ok(false);
        }
        // In either order after a crash: a marked file without the tail is recovered, and an unmarked file with a tail
        // has only space that nothing names.
        self.allocator.truncate_unused()?;
        self.allocator.check_not_truncated()?.write_all_at(UNCLEAN_AT, &[0])?;
        self.marked.store(false, Ordering::Release);
        self.dirty.store(true, Ordering::Release);
        Ok(true)
    }

    /// Syncs the file if it is dirty.
    ///
    /// Errors: those of the sync, and `Corrupt` if another process truncated the file. Both set the write latch.
    pub(super) fn sync(&self) -> Result<()> {
        if !self.dirty.load(Ordering::Acquire) {
            return Ok(());
        }
        self.allocator.check_not_truncated()?;
        // Cleared before the sync: a write during it sets the flag again, for the next flush.
        if self.dirty.swap(false, Ordering::AcqRel) {
            self.latch.sync(&*self.file)
        } else {
            Ok(())
        }
    }

    /// Returns the writing half of the file without a check of its length. For new grains only: taking their space has
    /// checked it.
    fn writer(&self) -> Result<&dyn StoredWrite> {
        writer(&*self.file)
    }

    fn read_only(&self) -> Error {
        Error::new(
            ErrorKind::ReadOnly,
            format!("{}: compressed grains can't be written in place", self.file.label()),
        )
    }
}

/// Grains that have space in the file and are being filled. Consecutive in the extent and in the file.
#[derive(Debug)]
struct NewGrains {
    /// First sector of the data in the extent; may lie inside of the first grain.
    sector: u64,
    /// Sectors of the data.
    sectors: u64,
    /// Sector of the file at which the first grain starts.
    place: u64,
    /// Number of grains.
    count: u64,
}

/// Returns the first `sectors` of `buf`.
fn part(buf: &[u8], sectors: u64) -> &[u8] {
    buf.get(..(sectors * SECTOR) as usize).unwrap_or(buf)
}

fn grain_entry(table: &WritableTable, entry: u64) -> GrainEntry {
    table
        .entries()
        .map_or(GrainEntry::Bad, |entries| entries.entry(entry as usize))
}

/// Returns how many of `count` grains from entry `first` on have no space in the file, up to the first that has.
fn unallocated(table: &WritableTable, first: u64, count: u64) -> u64 {
    let free = |entry: &u64| matches!(grain_entry(table, *entry), GrainEntry::Unallocated | GrainEntry::Zero);
    (first..first + count).take_while(free).count() as u64
}
