//! Writing to one hosted sparse extent: in place where a grain is allocated, else into a new grain.
//!
//! ```text
//!   write ─ allocated? ─yes─► pwrite in place
//!              └no─► lock the grains ─ take room at the end of the file ─ write data, and the parent's around it
//!                    └► entry: in memory at once, in the file with the next flush
//! ```
//! A grain that was allocated never moves and is never given to another, so what is in place needs no lock. Where new
//! grains go is in `allocator.rs`, which also knows whether the file is as long as it has to be; how their entries get into
//! the file is in `entries.rs`.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use crate::block::SECTOR;
use crate::error::{Error, ErrorKind, Result};
use crate::range_lock::{Mode, RangeLock};
use crate::store::{StoredFile, StoredWrite, WriteLatch, writer};
use crate::vmdk::extent::{Run, SparseExtent};
use crate::vmdk::header::UNCLEAN_AT;
use crate::vmdk::tables::hosted::HostedTables;
use crate::vmdk::tables::writable::{WritableTable, WritableTables};
use crate::vmdk::tables::{GrainEntry, TableGeometry};

mod grain_allocator;
mod pending_updates;

use grain_allocator::GrainAllocator;
use pending_updates::PendingUpdates;
pub(super) use pending_updates::{Backlog, Batch};

/// A table entry of a zeroed grain.
const ZEROED: u32 = 1;

/// What an unallocated grain shows: the links below, or zeroes. Sectors count from the start of the extent.
pub(super) trait Backing {
    /// Reads whole sectors.
    fn read(&self, sector: u64, buf: &mut [u8]) -> Result<()>;
    /// Whether they are known to be zeroes.
    fn is_zero(&self, sector: u64, sectors: u64) -> bool;
    /// Whether what is at `sector` is zeroes, and for how many of `sectors` that holds.
    fn zeroes(&self, sector: u64, sectors: u64) -> Result<(bool, u64)>;
}

/// The writing half of a sparse extent.
#[derive(Debug)]
pub(super) struct GrainWriter {
    file: Arc<dyn StoredFile>,
    layout: Arc<HostedTables>,
    live: Arc<WritableTables>,
    geometry: TableGeometry,
    /// Of grains that are being allocated. Taken before all others here.
    locks: RangeLock,
    allocator: GrainAllocator,
    waiting: Mutex<PendingUpdates>,
    /// Whether the header says that the image is in use.
    marked: AtomicBool,
    /// Held while that is written.
    marking: Mutex<()>,
    /// Written to since the last sync.
    dirty: AtomicBool,
    /// Shared by all files of the disk.
    latch: Arc<WriteLatch>,
    /// Shared by all extents of the disk.
    backlog: Arc<Backlog>,
}

impl GrainWriter {
    /// The writing half of `sparse`, whose tables were checked; `unclean`: its header says that it is in use.
    pub(super) fn new(
        sparse: &SparseExtent,
        layout: Arc<HostedTables>,
        unclean: bool,
        (latch, backlog): (Arc<WriteLatch>, Arc<Backlog>),
    ) -> Result<Self> {
        let Some(live) = sparse.live.as_ref().map(Arc::clone) else {
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
            live,
            geometry,
            locks: RangeLock::default(),
            allocator,
            waiting: Mutex::default(),
            marked: AtomicBool::new(unclean),
            marking: Mutex::default(),
            // a process before this one may have ended without
            dirty: AtomicBool::new(true),
            latch,
            backlog,
        })
    }

    /// Writes `buf` from `sector` of the extent on. `sparse` is the extent that this writes to.
    pub(super) fn write(&self, sparse: &SparseExtent, sector: u64, buf: &[u8], below: &dyn Backing) -> Result<()> {
        let mut rest = buf;
        let mut at = sector;
        while !rest.is_empty() {
            let left = rest.len() as u64 / SECTOR;
            let done = match sparse.run_at(at, left)? {
                Run::Stored {
                    sector: place, sectors, ..
                } => {
                    let written = self
                        .allocator
                        .check_not_truncated()?
                        .write_all_at(place * SECTOR, part(rest, sectors));
                    // before it is said to be done or not: a flush that comes later must not miss what readers see
                    self.dirty.store(true, Ordering::Release);
                    written?;
                    sectors
                }
                Run::Zero { sectors } | Run::Parent { sectors } => {
                    self.allocate(at, sectors, Some(part(rest, sectors)), below)?
                }
                Run::Deflate { .. } => return Err(self.read_only()),
            };
            rest = rest.get((done * SECTOR) as usize..).unwrap_or_default();
            at += done;
        }
        Ok(())
    }

    /// Makes `sectors` from `sector` on read as zeroes.
    pub(super) fn zero(
        &self,
        sparse: &SparseExtent,
        sector: u64,
        sectors: u64,
        unmap: bool,
        below: &dyn Backing,
    ) -> Result<()> {
        let end = sector + sectors;
        let mut at = sector;
        while at < end {
            at += match sparse.run_at(at, end - at)? {
                Run::Stored {
                    sector: place, sectors, ..
                } => {
                    // the grain keeps its entry: it can't be given to another while somebody still reads it
                    let zeroed = self
                        .allocator
                        .check_not_truncated()?
                        .zero(place * SECTOR, sectors * SECTOR, unmap);
                    self.live.note_hole();
                    self.dirty.store(true, Ordering::Release);
                    zeroed?;
                    sectors
                }
                Run::Zero { sectors } => sectors,
                Run::Parent { sectors } => match below.zeroes(at, sectors)? {
                    (true, sectors) => sectors,
                    (false, sectors) => self.hide(at, sectors, below)?,
                },
                Run::Deflate { .. } => return Err(self.read_only()),
            };
        }
        Ok(())
    }

    /// Hides what is below with zeroes, in at most `sectors` from `sector` on; how many it did.
    fn hide(&self, sector: u64, sectors: u64, below: &dyn Backing) -> Result<u64> {
        let grain = self.geometry.grain;
        let within = sector % grain;
        let inside = self.geometry.grain_sectors(sector / grain);
        if within != 0 || sectors < inside {
            let sectors = sectors.min(inside - within);
            return self.allocate(sector, sectors, None, below);
        }
        // whole grains, of which the last one of the extent may be short
        let end = sector + sectors;
        let whole = if end == self.geometry.capacity {
            sectors
        } else {
            sectors / grain * grain
        };
        if !self.layout.has_zeroed_grains() {
            return self.allocate(sector, whole, None, below);
        }
        self.mark()?;
        let (table, first, count) = self.split_at_table(sector, whole);
        let _held = self.locks.lock(sector / grain..sector / grain + count, Mode::Exclusive);
        let table = self.live.table_for_writing(table)?;
        let free = unallocated(&table, first, count);
        if free > 0 {
            self.publish(&table, first, (0..free).map(|_| ZEROED));
        }
        Ok((free * grain).min(whole))
    }

    /// Allocates grains for `data` (`None`: zeroes) at `sector`, of at most `sectors`, and writes them, together with
    /// what was below around the data. How many sectors it did: none where another thread was faster.
    fn allocate(&self, sector: u64, sectors: u64, data: Option<&[u8]>, below: &dyn Backing) -> Result<u64> {
        self.mark()?;
        let grain = self.geometry.grain;
        let (table, first, count) = self.split_at_table(sector, sectors);
        let _held = self.locks.lock(sector / grain..sector / grain + count, Mode::Exclusive);
        let table = self.live.table_for_writing(table)?;
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
        if let Err(e) = self.fill(&new, data, &table, first, below) {
            self.allocator.give_back(place, count);
            return Err(e);
        }
        self.publish(&table, first, (0..count).map(|i| (place + i * grain) as u32));
        Ok(sectors)
    }

    /// Table and entry of `sector`, and how many grains of that table `sectors` from there on touch.
    fn split_at_table(&self, sector: u64, sectors: u64) -> (u64, u64, u64) {
        let grain = sector / self.geometry.grain;
        let (table, entry) = (
            grain / self.geometry.entries_per_table,
            grain % self.geometry.entries_per_table,
        );
        let touched = (sector % self.geometry.grain + sectors).div_ceil(self.geometry.grain);
        (table, entry, touched.min(self.geometry.entries_per_table - entry))
    }

    /// Writes data into new grains, and what is below where the first and the last one are not covered whole. What
    /// reads as zeroes is not written: new room does.
    fn fill(
        &self,
        new: &NewGrains,
        data: Option<&[u8]>,
        table: &WritableTable,
        first: u64,
        below: &dyn Backing,
    ) -> Result<()> {
        let grain = self.geometry.grain;
        let start = new.sector / grain * grain;
        let end = (start + new.count * grain).min(self.geometry.capacity);
        let behind = new.sector + new.sectors;
        for (from, to, entry) in [(start, new.sector, first), (behind, end, first + new.count - 1)] {
            let zeroed = slot(table, entry) == GrainEntry::Zero;
            if from < to && !zeroed && !below.is_zero(from, to - from) {
                let mut around = vec![0; ((to - from) * SECTOR) as usize];
                below.read(from, &mut around)?;
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

    /// Says in the header that the image is in use, once, and waits until that is durable.
    fn mark(&self) -> Result<()> {
        if self.marked.load(Ordering::Acquire) {
            return Ok(());
        }
        let _marking = self.marking.lock().unwrap_or_else(PoisonError::into_inner);
        if !self.marked.load(Ordering::Acquire) {
            self.allocator.check_not_truncated()?.write_all_at(UNCLEAN_AT, &[1])?;
            self.latch.sync(&*self.file)?;
            self.marked.store(true, Ordering::Release);
        }
        Ok(())
    }

    /// After a flush, with nobody writing: gives back the room behind the last grain, and says that the image is
    /// closed. Whether there was anything to do; then it has to be synced once more.
    pub(super) fn unmark(&self) -> Result<bool> {
        if !self.marked.load(Ordering::Acquire) {
            return Ok(false);
        }
        self.allocator.truncate_unused()?;
        self.allocator.check_not_truncated()?.write_all_at(UNCLEAN_AT, &[0])?;
        self.marked.store(false, Ordering::Release);
        self.dirty.store(true, Ordering::Release);
        Ok(true)
    }

    /// Makes durable what was written since the last time.
    ///
    /// Errors: also where it was cut since then.
    pub(super) fn sync(&self) -> Result<()> {
        if !self.dirty.load(Ordering::Acquire) {
            return Ok(());
        }
        self.allocator.check_not_truncated()?;
        if self.dirty.swap(false, Ordering::AcqRel) {
            self.latch.sync(&*self.file)
        } else {
            Ok(())
        }
    }

    /// For what was taken just now: to take it asked whether the file was cut.
    fn writer(&self) -> Result<&dyn StoredWrite> {
        writer(&*self.file)
    }

    fn read_only(&self) -> Error {
        Error::new(
            ErrorKind::ReadOnly,
            format!("{}: compressed grains are not written in place", self.file.label()),
        )
    }
}

/// Grains that are being filled.
#[derive(Debug)]
struct NewGrains {
    /// Where the data go, in the extent, and how many there are.
    sector: u64,
    sectors: u64,
    /// Where the first grain is in the file, and how many follow each other.
    place: u64,
    count: u64,
}

/// The first `sectors` of `buf`.
fn part(buf: &[u8], sectors: u64) -> &[u8] {
    buf.get(..(sectors * SECTOR) as usize).unwrap_or(buf)
}

fn slot(table: &WritableTable, entry: u64) -> GrainEntry {
    table
        .entries()
        .map_or(GrainEntry::Bad, |entries| entries.slot(entry as usize))
}

/// How many of `count` grains from entry `first` on have no room yet.
fn unallocated(table: &WritableTable, first: u64, count: u64) -> u64 {
    let free = |entry: &u64| matches!(slot(table, *entry), GrainEntry::Unallocated | GrainEntry::Zero);
    (first..first + count).take_while(free).count() as u64
}
