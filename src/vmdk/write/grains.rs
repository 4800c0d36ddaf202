//! Writing to one hosted sparse extent: in place where a grain is allocated, else into a new grain.
//!
//! ```text
//!   write ─ allocated? ─yes─► pwrite in place
//!              └no─► lock the grains ─ take room at the end of the file ─ write data, and the parent's around it
//!                    └► entry: in memory at once, in the file with the next flush
//! ```
//! A grain that was allocated never moves and is never given to another, so what is in place needs no lock. Entries
//! wait in memory (`waiting`) until their data are durable:
//! ```text
//!   flush: take what waits ─ new tables' room and content ─ SYNC ─ entries, both copies ─ SYNC
//! ```
//! so that a crash at any point leaves each sector old or new, and at most room that nothing names.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::block::SECTOR;
use crate::error::{Error, ErrorKind, Result};
use crate::ranges::{Mode, Ranges};
use crate::store::{StoredFile, StoredWrite};
use crate::vmdk::extent::{Run, SparseExtent};
use crate::vmdk::header::UNCLEAN_AT;
use crate::vmdk::sparse::{Copy, HostedTables};
use crate::vmdk::tables::{Layout, Shape, Slot};
use crate::vmdk::write::failure::Failure;
use crate::vmdk::write::live::{LiveTable, LiveTables, Places};

/// Entries that may wait in memory; a flush is due then. 8 bytes each.
const MAX_WAITING: usize = 1 << 18;

/// Bytes of tables with entries that may wait in memory.
const MAX_WAITING_BYTES: usize = 8 << 20;

/// The file grows by at least this many sectors at once, and by at most [`GROW_MAX`]: the room is a hole, and what is
/// not used is cut off at the end.
const GROW_MIN: u64 = 2 << 11;
const GROW_MAX: u64 = 64 << 11;

/// Table entries are sectors of 32 bits, so a file can't use more of itself.
const LAST_SECTOR: u64 = 1 << 32;

/// A table entry of a zeroed grain.
const ZEROED: u32 = 1;

/// What an unallocated grain shows: the links below, or zeroes. Sectors count from the start of the extent.
pub(super) trait Below {
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
    live: Arc<LiveTables>,
    shape: Shape,
    /// Of grains that are being allocated. Taken before all others here.
    locks: Ranges,
    space: Mutex<Space>,
    waiting: Mutex<Waiting>,
    /// Whether the header says that the image is in use.
    marked: AtomicBool,
    /// Held while that is written.
    marking: Mutex<()>,
    /// Written to since the last sync.
    dirty: AtomicBool,
    /// Shared by all files of the disk.
    failure: Arc<Failure>,
    /// Shared by all extents of the disk.
    backlog: Arc<Backlog>,
}

/// Where new grains and tables go.
#[derive(Debug)]
struct Space {
    /// First sector that nothing has, a multiple of the grain.
    next: u64,
    /// Sectors of the file; all from `next` on read as zeroes.
    len: u64,
    /// Grains that were taken and given back, all zeroes.
    spare: Vec<u64>,
    /// Room for new tables.
    tables: std::ops::Range<u64>,
}

/// How much waits in the memory of all extents of a disk.
#[derive(Debug, Default)]
pub(super) struct Backlog {
    entries: AtomicUsize,
    /// Memory of the tables that the entries are of.
    bytes: AtomicUsize,
}

impl Backlog {
    /// Whether anything waits.
    pub(super) fn is_empty(&self) -> bool {
        self.bytes.load(Ordering::Relaxed) == 0
    }

    /// Whether more waits than should.
    pub(super) fn is_full(&self) -> bool {
        self.entries.load(Ordering::Relaxed) > MAX_WAITING || self.bytes.load(Ordering::Relaxed) > MAX_WAITING_BYTES
    }

    fn add(&self, bytes: usize, entries: usize) {
        self.bytes.fetch_add(bytes, Ordering::Relaxed);
        self.entries.fetch_add(entries, Ordering::Relaxed);
    }

    fn sub(&self, bytes: usize, entries: usize) {
        self.bytes.fetch_sub(bytes, Ordering::Relaxed);
        self.entries.fetch_sub(entries, Ordering::Relaxed);
    }
}

/// Entries that are not in the file yet, by table.
#[derive(Debug, Default)]
struct Waiting {
    tables: BTreeMap<u64, WaitingTable>,
}

impl Waiting {
    fn count(&self, backlog: impl FnOnce(usize, usize)) {
        backlog(self.tables.len(), self.tables.values().map(|table| table.entries.len()).sum());
    }
}

/// Entries of one table that are not in the file yet, in the order in which they were made.
#[derive(Debug)]
struct WaitingTable {
    /// Kept so that it is not read from the file again meanwhile.
    _table: Arc<LiveTable>,
    entries: Vec<(u32, u32)>,
    /// For a table that is new itself: where it goes, once that is known.
    new: Option<Places>,
    /// A directory may name the new table already, as a flush got that far before it failed. Then its entries have to
    /// wait for their data like those of any other table.
    named: bool,
}

/// What one flush writes.
#[derive(Debug)]
pub(super) struct Batch(Waiting);

impl GrainWriter {
    /// The writing half of `sparse`, whose tables were checked; `unclean`: its header says that it is in use.
    pub(super) fn new(
        sparse: &SparseExtent,
        layout: Arc<HostedTables>,
        unclean: bool,
        (failure, backlog): (Arc<Failure>, Arc<Backlog>),
    ) -> Result<Self> {
        let Some(live) = sparse.live.as_ref().map(Arc::clone) else {
            return Err(Error::new(ErrorKind::ReadOnly, format!("{}: opened for reading", sparse.file.label())));
        };
        let shape = sparse.shape();
        let file = Arc::clone(&sparse.file);
        let len = writer(&*file)?.len_now()?.div_ceil(SECTOR);
        let next = len.max(layout.data_start()).next_multiple_of(shape.grain);
        let space = Space { next, len, spare: Vec::new(), tables: 0..0 };
        Ok(Self {
            file,
            layout,
            live,
            shape,
            locks: Ranges::default(),
            space: Mutex::new(space),
            waiting: Mutex::default(),
            marked: AtomicBool::new(unclean),
            marking: Mutex::default(),
            // a process before this one may have ended without
            dirty: AtomicBool::new(true),
            failure,
            backlog,
        })
    }

    /// Writes `buf` from `sector` of the extent on. `sparse` is the extent that this writes to.
    pub(super) fn write(&self, sparse: &SparseExtent, sector: u64, buf: &[u8], below: &dyn Below) -> Result<()> {
        let mut rest = buf;
        let mut at = sector;
        while !rest.is_empty() {
            let left = rest.len() as u64 / SECTOR;
            let done = match sparse.run_at(at, left)? {
                Run::Stored { sector: place, sectors, .. } => {
                    let written = self.writer()?.write_all_at(place * SECTOR, part(rest, sectors));
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
        below: &dyn Below,
    ) -> Result<()> {
        let end = sector + sectors;
        let mut at = sector;
        while at < end {
            at += match sparse.run_at(at, end - at)? {
                Run::Stored { sector: place, sectors, .. } => {
                    // the grain keeps its entry: it can't be given to another while somebody still reads it
                    let zeroed = self.writer()?.zero(place * SECTOR, sectors * SECTOR, unmap);
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
    fn hide(&self, sector: u64, sectors: u64, below: &dyn Below) -> Result<u64> {
        let grain = self.shape.grain;
        let within = sector % grain;
        let inside = self.shape.grain_sectors(sector / grain);
        if within != 0 || sectors < inside {
            let sectors = sectors.min(inside - within);
            return self.allocate(sector, sectors, None, below);
        }
        // whole grains, of which the last one of the extent may be short
        let end = sector + sectors;
        let whole = if end == self.shape.capacity { sectors } else { sectors / grain * grain };
        if !self.layout.has_zeroed_grains() {
            return self.allocate(sector, whole, None, below);
        }
        self.mark()?;
        let (table, first, count) = self.cut(sector, whole);
        let _held = self.locks.take(sector / grain..sector / grain + count, Mode::Alone);
        let table = self.live.table_for_writing(table)?;
        let free = unallocated(&table, first, count);
        if free > 0 {
            self.publish(&table, first, (0..free).map(|_| ZEROED));
        }
        Ok((free * grain).min(whole))
    }

    /// Allocates grains for `data` (`None`: zeroes) at `sector`, of at most `sectors`, and writes them, together with
    /// what was below around the data. How many sectors it did: none where another thread was faster.
    fn allocate(&self, sector: u64, sectors: u64, data: Option<&[u8]>, below: &dyn Below) -> Result<u64> {
        self.mark()?;
        let grain = self.shape.grain;
        let (table, first, count) = self.cut(sector, sectors);
        let _held = self.locks.take(sector / grain..sector / grain + count, Mode::Alone);
        let table = self.live.table_for_writing(table)?;
        let count = unallocated(&table, first, count);
        if count == 0 {
            return Ok(0);
        }
        let sectors = sectors.min(count * grain - sector % grain);
        let place = self.take(count)?;
        let new = NewGrains { sector, sectors, place, count };
        if let Err(e) = self.fill(&new, data, &table, first, below) {
            self.give_back(place, count);
            return Err(e);
        }
        self.publish(&table, first, (0..count).map(|i| (place + i * grain) as u32));
        Ok(sectors)
    }

    /// Table and entry of `sector`, and how many grains of that table `sectors` from there on touch.
    fn cut(&self, sector: u64, sectors: u64) -> (u64, u64, u64) {
        let grain = sector / self.shape.grain;
        let (table, entry) = (grain / self.shape.entries_per_table, grain % self.shape.entries_per_table);
        let touched = (sector % self.shape.grain + sectors).div_ceil(self.shape.grain);
        (table, entry, touched.min(self.shape.entries_per_table - entry))
    }

    /// Writes data into new grains, and what is below where the first and the last one are not covered whole. What
    /// reads as zeroes is not written: new room does.
    fn fill(
        &self,
        new: &NewGrains,
        data: Option<&[u8]>,
        table: &LiveTable,
        first: u64,
        below: &dyn Below,
    ) -> Result<()> {
        let grain = self.shape.grain;
        let start = new.sector / grain * grain;
        let end = (start + new.count * grain).min(self.shape.capacity);
        let behind = new.sector + new.sectors;
        for (from, to, entry) in [(start, new.sector, first), (behind, end, first + new.count - 1)] {
            let zeroed = slot(table, entry) == Slot::Zero;
            if from < to && !zeroed && !below.is_zero(from, to - from) {
                let mut around = vec![0; ((to - from) * SECTOR) as usize];
                below.read(from, &mut around)?;
                self.writer()?.write_all_at((new.place + from - start) * SECTOR, &around)?;
            }
        }
        match data {
            Some(data) => {
                self.writer()?.write_all_at((new.place + new.sector - start) * SECTOR, part(data, new.sectors))
            }
            None => Ok(()),
        }
    }

    /// Makes entries known: they wait for the flush first, and are seen second. The other way round somebody could
    /// write into a new grain and flush before its entry waits.
    fn publish(&self, table: &Arc<LiveTable>, first: u64, raw: impl Iterator<Item = u32>) {
        let mut waiting = self.waiting();
        let before = waiting.tables.len();
        let known = waiting.tables.entry(table.number).or_insert_with(|| WaitingTable {
            _table: Arc::clone(table),
            entries: Vec::new(),
            new: None,
            named: false,
        });
        let had = known.entries.len();
        for (entry, raw) in (first..).zip(raw) {
            known.entries.push((entry as u32, raw));
            if let Some(entries) = table.entries() {
                entries.publish(entry as usize, raw);
            }
        }
        let more = known.entries.len() - had;
        self.backlog.add((waiting.tables.len() - before) * self.table_bytes(), more);
        self.dirty.store(true, Ordering::Release);
    }

    /// Room for `count` grains, in the file and all zeroes.
    fn take(&self, count: u64) -> Result<u64> {
        let mut space = self.space();
        self.check_uncut(&space)?;
        if let (1, Some(place)) = (count, space.spare.pop()) {
            return Ok(place);
        }
        let place = space.next;
        let end = place + count * self.shape.grain;
        if end > LAST_SECTOR {
            let context = format!("{}: a sparse extent can't use more than 2 TiB of its file", self.file.label());
            return Err(Error::new(ErrorKind::Os(libc::ENOSPC), context));
        }
        if end > space.len {
            let step = (space.len / 8).clamp(GROW_MIN, GROW_MAX);
            let wanted = (end + step).min(LAST_SECTOR);
            let writer = self.writer()?;
            // where so much is too much, just enough may do
            let len = match writer.set_len(wanted * SECTOR) {
                Ok(()) => wanted,
                Err(_) => writer.set_len(end * SECTOR).map(|()| end)?,
            };
            space.len = len;
            self.layout.grew_to(len);
        }
        space.next = end;
        Ok(place)
    }

    /// Refuses a file that somebody else has cut: its grains are lost, and to make it longer again would show zeroes
    /// in their place, as if nothing had happened.
    fn check_uncut(&self, space: &Space) -> Result<()> {
        let (len, known) = (self.writer()?.len_now()?, space.len);
        if len.div_ceil(SECTOR) >= known {
            return Ok(());
        }
        let label = self.file.label();
        Err(Error::corrupt(format!("{label}: has {len} bytes, expected {known} sectors: somebody else has cut it")))
    }

    /// Gives back room of grains that nothing names. It may hold anything; where it can't be made zeroes, it is lost.
    fn give_back(&self, place: u64, count: u64) {
        let bytes = count * self.shape.grain * SECTOR;
        if self.writer().and_then(|w| w.zero(place * SECTOR, bytes, true)).is_err() {
            return;
        }
        let mut space = self.space();
        if space.next == place + count * self.shape.grain {
            space.next = place;
        } else {
            space.spare.extend((0..count).map(|i| place + i * self.shape.grain));
        }
    }

    /// Says in the header that the image is in use, once, and waits until that is durable.
    fn mark(&self) -> Result<()> {
        if self.marked.load(Ordering::Acquire) {
            return Ok(());
        }
        let _marking = self.marking.lock().unwrap_or_else(PoisonError::into_inner);
        if !self.marked.load(Ordering::Acquire) {
            self.writer()?.write_all_at(UNCLEAN_AT, &[1])?;
            self.failure.sync(&*self.file)?;
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
        let writer = self.writer()?;
        {
            let mut space = self.space();
            self.check_uncut(&space)?;
            if space.len > space.next {
                writer.set_len(space.next * SECTOR)?;
                space.len = space.next;
            }
        }
        writer.write_all_at(UNCLEAN_AT, &[0])?;
        self.marked.store(false, Ordering::Release);
        self.dirty.store(true, Ordering::Release);
        Ok(true)
    }

    /// What waits now, for a flush. All data of it are written already, though not durable.
    pub(super) fn take_batch(&self) -> Batch {
        let waiting = std::mem::take(&mut *self.waiting());
        waiting.count(|tables, entries| self.backlog.sub(tables * self.table_bytes(), entries));
        Batch(waiting)
    }

    /// Lets a batch wait again after its flush failed.
    pub(super) fn put_back(&self, batch: Batch) {
        let mut waiting = self.waiting();
        waiting.count(|tables, entries| self.backlog.sub(tables * self.table_bytes(), entries));
        for (number, mut older) in batch.0.tables {
            if let Some(newer) = waiting.tables.remove(&number) {
                older.entries.extend(newer.entries);
            }
            waiting.tables.insert(number, older);
        }
        waiting.count(|tables, entries| self.backlog.add(tables * self.table_bytes(), entries));
    }

    /// Writes the tables of a batch that are new, where nothing refers to them yet.
    pub(super) fn write_new_tables(&self, batch: &mut Batch) -> Result<()> {
        for (&number, table) in &mut batch.0.tables {
            if table.named || self.live.places(number).is_some() {
                continue;
            }
            let places = match table.new {
                Some(places) => places,
                None => self.table_room()?,
            };
            table.new = Some(places);
            let mut content = vec![0; (self.layout.table_sectors() * SECTOR) as usize];
            for &(entry, raw) in &table.entries {
                if let Some(bytes) = content.get_mut(entry as usize * 4..entry as usize * 4 + 4) {
                    bytes.copy_from_slice(&raw.to_le_bytes());
                }
            }
            for place in copies(places) {
                self.writer()?.write_all_at(u64::from(place) * SECTOR, &content)?;
            }
            self.dirty.store(true, Ordering::Release);
        }
        Ok(())
    }

    /// Writes the entries of a batch, whose data are durable now, into both tables, and those of new tables into both
    /// directories.
    pub(super) fn write_entries(&self, batch: &mut Batch) -> Result<()> {
        for (&number, table) in &mut batch.0.tables {
            if let Some(places) = table.new {
                if std::mem::replace(&mut table.named, true) {
                    self.write_runs(places, &table.entries)?;
                }
                for (copy, place) in [(Copy::Redundant, places.redundant), (Copy::Primary, places.primary)] {
                    if let Some(at) = self.layout.directory(copy) {
                        self.writer()?.write_all_at(at * SECTOR + number * 4, &place.to_le_bytes())?;
                    }
                }
            } else if let Some(places) = self.live.places(number) {
                self.write_runs(places, &table.entries)?;
            }
            self.dirty.store(true, Ordering::Release);
        }
        Ok(())
    }

    fn write_runs(&self, places: Places, entries: &[(u32, u32)]) -> Result<()> {
        for (entry, run) in runs(entries) {
            for place in copies(places) {
                self.writer()?.write_all_at(u64::from(place) * SECTOR + u64::from(entry) * 4, &run)?;
            }
        }
        Ok(())
    }

    /// The batch is in the file.
    pub(super) fn settle(&self, batch: Batch) {
        for (number, table) in batch.0.tables {
            if let Some(places) = table.new {
                self.live.settle(number, places);
            }
        }
    }

    /// Makes durable what was written since the last time.
    pub(super) fn sync(&self) -> Result<()> {
        if self.dirty.swap(false, Ordering::AcqRel) { self.failure.sync(&*self.file) } else { Ok(()) }
    }

    /// Room for a new table, and for its copy where there are copies.
    fn table_room(&self) -> Result<Places> {
        let sectors = self.layout.table_sectors();
        let copies = if self.layout.has_redundant() { 2 } else { 1 };
        let mut room = self.space().tables.clone();
        if room.end - room.start < sectors * copies {
            let grains = (sectors * copies).div_ceil(self.shape.grain);
            let place = self.take(grains.max(2))?;
            room = place..place + grains.max(2) * self.shape.grain;
        }
        self.space().tables = room.start + sectors * copies..room.end;
        let first = room.start as u32;
        Ok(match copies {
            1 => Places { primary: first, redundant: 0 },
            _ => Places { redundant: first, primary: first + sectors as u32 },
        })
    }

    fn table_bytes(&self) -> usize {
        self.shape.entries_per_table as usize * 4
    }

    fn writer(&self) -> Result<&dyn StoredWrite> {
        writer(&*self.file)
    }

    fn read_only(&self) -> Error {
        Error::new(ErrorKind::ReadOnly, format!("{}: compressed grains are not written in place", self.file.label()))
    }

    fn space(&self) -> MutexGuard<'_, Space> {
        self.space.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn waiting(&self) -> MutexGuard<'_, Waiting> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Batch {
    /// Whether nothing waited.
    pub(super) fn is_empty(&self) -> bool {
        self.0.tables.is_empty()
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

/// The writing half of a file.
pub(super) fn writer(file: &dyn StoredFile) -> Result<&dyn StoredWrite> {
    file.writer()
        .ok_or_else(|| Error::new(ErrorKind::ReadOnly, format!("{}: the file is not opened for writing", file.label())))
}

/// The first `sectors` of `buf`.
fn part(buf: &[u8], sectors: u64) -> &[u8] {
    buf.get(..(sectors * SECTOR) as usize).unwrap_or(buf)
}

fn slot(table: &LiveTable, entry: u64) -> Slot {
    table.entries().map_or(Slot::Bad, |entries| entries.slot(entry as usize))
}

/// How many of `count` grains from entry `first` on have no room yet.
fn unallocated(table: &LiveTable, first: u64, count: u64) -> u64 {
    let free = |entry: &u64| matches!(slot(table, *entry), Slot::Unallocated | Slot::Zero);
    (first..first + count).take_while(free).count() as u64
}

/// The copies of a table that there are, the redundant one first.
fn copies(places: Places) -> impl Iterator<Item = u32> {
    [places.redundant, places.primary].into_iter().filter(|&place| place != 0)
}

/// Entries as stretches of bytes that follow each other in the table; of two for one place the later one counts.
fn runs(entries: &[(u32, u32)]) -> Vec<(u32, Vec<u8>)> {
    let by_place: BTreeMap<u32, u32> = entries.iter().copied().collect();
    let mut runs: Vec<(u32, Vec<u8>)> = Vec::new();
    for (entry, raw) in by_place {
        match runs.last_mut() {
            Some((first, bytes)) if *first + (bytes.len() / 4) as u32 == entry => bytes.extend(raw.to_le_bytes()),
            _ => runs.push((entry, raw.to_le_bytes().to_vec())),
        }
    }
    runs
}
