//! Grain directories and grain tables, loaded on demand in bounded memory.
//!
//! ```text
//!   sector ─► table number ─► TableCache ──hit──► entries[i] ─► Slot
//!                                 │ miss
//!                                 ▼
//!             directory chunk (4096 entries, cached as well) ─► place of the table ─► Layout::load_table
//! ```
//! All extents of a chain share one cache, so its bound holds for the disk, however many files it has. A table
//! is read whole, once, and its entries are checked while they are loaded: a lookup afterwards is a cached
//! index and cannot fail, except where the entry was found to be bad.
//!
//! A [`Layout`] is what the three formats differ in. It only translates addresses.

pub(crate) mod cowd;
pub(crate) mod hosted;
pub(crate) mod sesparse;
pub(crate) mod writable;

use std::fmt;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use quick_cache::sync::Cache;
use quick_cache::{OptionsBuilder, Weighter};

use crate::error::Result;

/// Bytes of tables and directory chunks kept for a whole chain: the tables of 128 GiB of disk at the usual
/// 64 KiB grains.
const CACHE_BYTES: u64 = 8 << 20;

/// Directory entries loaded at once: 32 KiB of memory, 128 GiB of disk at the usual table size.
pub(crate) const CHUNK: u64 = 4096;

/// What a grain table entry says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum GrainEntry {
    /// Nothing here: the parent's, or zeroes.
    Unallocated,
    /// Zeroes that hide the parent.
    Zero,
    /// The grain starts at this sector of the file.
    At(u64),
    /// The entry is damaged; [`Layout::explain_entry`] says how.
    Bad,
}

/// What a directory entry says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum DirectoryEntry {
    /// No table: all its grains are unallocated.
    Absent,
    /// The table starts at this sector of the file.
    At(u64),
    /// The entry is damaged; [`Layout::explain_directory`] says how.
    Bad,
}

/// The entries of one grain table, in the narrowest form that holds them.
#[derive(Debug)]
pub(crate) enum Table {
    /// Sectors below 2^32 − 1.
    Narrow(Box<[u32]>),
    /// Any sector.
    Wide(Box<[u64]>),
    /// Sectors below 2^32 − 1, which change while they are read: of an extent that is written to.
    Live(Box<[AtomicU32]>),
}

const UNALLOCATED: u64 = 0;
const ZERO: u64 = 1;

impl Table {
    /// A table of 32-bit entries.
    pub(crate) fn narrow(slots: impl Iterator<Item = GrainEntry>) -> Self {
        Self::Narrow(
            slots
                .map(|s| match s {
                    GrainEntry::Unallocated => UNALLOCATED as u32,
                    GrainEntry::Zero => ZERO as u32,
                    GrainEntry::At(sector) => u32::try_from(sector).unwrap_or(u32::MAX),
                    GrainEntry::Bad => u32::MAX,
                })
                .collect(),
        )
    }

    /// A table whose entries can change, with those of `self`, and as many unallocated ones as `len` asks for.
    pub(crate) fn into_writable(self, len: usize) -> Self {
        let entry = |i| match self.slot(i) {
            _ if i >= self.len() => UNALLOCATED as u32,
            GrainEntry::Unallocated => UNALLOCATED as u32,
            GrainEntry::Zero => ZERO as u32,
            GrainEntry::At(sector) => u32::try_from(sector).unwrap_or(u32::MAX),
            GrainEntry::Bad => u32::MAX,
        };
        Self::Live((0..len).map(|i| AtomicU32::new(entry(i))).collect())
    }

    /// Changes entry `i` of a live table to `raw`, as it will be in the file. What was written to the grain before is
    /// seen by whoever sees the entry.
    pub(crate) fn publish(&self, i: usize, raw: u32) {
        if let Self::Live(entries) = self
            && let Some(entry) = entries.get(i)
        {
            entry.store(raw, Ordering::Release);
        }
    }

    /// A table of 64-bit entries.
    pub(crate) fn wide(slots: impl Iterator<Item = GrainEntry>) -> Self {
        Self::Wide(
            slots
                .map(|s| match s {
                    GrainEntry::Unallocated => UNALLOCATED,
                    GrainEntry::Zero => ZERO,
                    GrainEntry::At(sector) => sector,
                    GrainEntry::Bad => u64::MAX,
                })
                .collect(),
        )
    }

    /// Entry `i`; an index past the table is `Bad`.
    pub(crate) fn slot(&self, i: usize) -> GrainEntry {
        let (value, bad) = match self {
            Self::Narrow(e) => (e.get(i).map_or(u64::from(u32::MAX), |&v| v.into()), u64::from(u32::MAX)),
            Self::Wide(e) => (e.get(i).copied().unwrap_or(u64::MAX), u64::MAX),
            Self::Live(e) => (
                e.get(i)
                    .map_or(u64::from(u32::MAX), |v| v.load(Ordering::Acquire).into()),
                u64::from(u32::MAX),
            ),
        };
        match value {
            UNALLOCATED => GrainEntry::Unallocated,
            ZERO => GrainEntry::Zero,
            v if v == bad => GrainEntry::Bad,
            sector => GrainEntry::At(sector),
        }
    }

    /// Number of entries.
    pub(crate) fn len(&self) -> usize {
        match self {
            Self::Narrow(e) => e.len(),
            Self::Wide(e) => e.len(),
            Self::Live(e) => e.len(),
        }
    }

    fn bytes(&self) -> u64 {
        match self {
            Self::Narrow(e) => size_of_val::<[u32]>(e) as u64,
            Self::Wide(e) => size_of_val::<[u64]>(e) as u64,
            Self::Live(e) => size_of_val::<[AtomicU32]>(e) as u64,
        }
    }
}

/// The numbers that say which table and entry a sector has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct TableGeometry {
    /// Sectors of the extent.
    pub(crate) capacity: u64,
    /// Sectors of a grain, a power of two.
    pub(crate) grain: u64,
    /// Entries of a table, a power of two.
    pub(crate) entries_per_table: u64,
}

impl TableGeometry {
    /// Sectors that one table covers.
    pub(crate) fn coverage(&self) -> u64 {
        self.grain * self.entries_per_table
    }

    /// Number of tables.
    pub(crate) fn tables(&self) -> u64 {
        self.capacity.div_ceil(self.coverage())
    }

    /// Sectors of grain `number` that lie inside of the extent.
    pub(crate) fn grain_sectors(&self, number: u64) -> u64 {
        self.grain.min(self.capacity.saturating_sub(number * self.grain))
    }
}

/// A sparse format: where its directory and tables lie, and what their entries mean.
pub(crate) trait Layout: fmt::Debug + Send + Sync {
    /// Its numbers; they never change.
    fn geometry(&self) -> TableGeometry;
    /// Sectors of a table in the file.
    fn table_sectors(&self) -> u64;
    /// The directory entries of `tables` (at most [`CHUNK`]), each checked.
    fn load_directory(&self, tables: Range<u64>) -> Result<Vec<DirectoryEntry>>;
    /// The table whose directory entry said `at`, each entry checked. It has as many entries as the table has
    /// grains inside of the capacity, at least.
    fn load_table(&self, table: u64, at: u64) -> Result<Table>;
    /// Why the directory entry is bad.
    fn explain_directory(&self, table: u64) -> crate::error::Error;
    /// Why an entry of the table is bad.
    fn explain_entry(&self, table: u64, entry: u64) -> crate::error::Error;
}

#[derive(Debug, Clone)]
enum Cached {
    Table(Arc<Table>),
    Directory(Arc<[DirectoryEntry]>),
}

#[derive(Debug, Clone)]
struct ByBytes;

impl Weighter<u64, Cached> for ByBytes {
    fn weight(&self, _key: &u64, value: &Cached) -> u64 {
        // what the entry takes in the cache beside its data, roughly
        const OVERHEAD: u64 = 96;
        OVERHEAD
            + match value {
                Cached::Table(t) => t.bytes(),
                Cached::Directory(d) => size_of_val::<[DirectoryEntry]>(d) as u64,
            }
    }
}

/// The tables and directory chunks of all extents of a chain.
#[derive(Clone)]
pub(crate) struct TableCache(Arc<Cache<u64, Cached, ByBytes>>);

impl fmt::Debug for TableCache {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "TableCache({} of {} bytes)", self.0.weight(), self.0.capacity())
    }
}

/// Which extent of the chain a key is of: extents are numbered from 0.
const EXTENT_SHIFT: u32 = 40;
const DIRECTORY_BIT: u64 = 1 << 39;

impl TableCache {
    /// An empty cache of the usual size.
    pub(crate) fn new() -> Self {
        Self::with_bytes(CACHE_BYTES)
    }

    /// An empty cache of at most `bytes`.
    pub(crate) fn with_bytes(bytes: u64) -> Self {
        const TYPICAL_TABLE: u64 = 2048;
        let options = OptionsBuilder::new()
            .estimated_items_capacity((bytes / TYPICAL_TABLE) as usize)
            .weight_capacity(bytes)
            // one table may weigh as much as all of a shard of a larger number of shards
            .shards(4)
            .build();
        let cache = match options {
            Ok(o) => Cache::with_options(o, ByBytes, Default::default(), Default::default()),
            Err(_) => Cache::with_weighter((bytes / TYPICAL_TABLE) as usize, bytes, ByBytes),
        };
        Self(Arc::new(cache))
    }

    /// Where table `number` of the extent lies.
    pub(crate) fn place(&self, extent: u32, layout: &dyn Layout, number: u64) -> Result<DirectoryEntry> {
        let chunk = self.chunk(extent, layout, number / CHUNK)?;
        Ok(chunk
            .get((number % CHUNK) as usize)
            .copied()
            .unwrap_or(DirectoryEntry::Bad))
    }

    /// The directory entries `n × CHUNK …` of the extent.
    pub(crate) fn chunk(&self, extent: u32, layout: &dyn Layout, n: u64) -> Result<Arc<[DirectoryEntry]>> {
        let key = u64::from(extent) << EXTENT_SHIFT | DIRECTORY_BIT | n;
        if let Some(Cached::Directory(d)) = self.0.get(&key) {
            return Ok(d);
        }
        let first = n * CHUNK;
        let chunk: Arc<[DirectoryEntry]> = layout
            .load_directory(first..layout.geometry().tables().min(first + CHUNK))?
            .into();
        self.0.insert(key, Cached::Directory(Arc::clone(&chunk)));
        Ok(chunk)
    }

    /// Table `number` of the extent; `None` where there is no table.
    pub(crate) fn table(&self, extent: u32, layout: &dyn Layout, number: u64) -> Result<Option<Arc<Table>>> {
        let key = u64::from(extent) << EXTENT_SHIFT | number;
        if let Some(Cached::Table(t)) = self.0.get(&key) {
            return Ok(Some(t));
        }
        // Two threads may load the same table at once: that costs a read, a lock across it would cost a wait.
        let table = self.load(extent, layout, number)?;
        if let Some(table) = &table {
            self.0.insert(key, Cached::Table(Arc::clone(table)));
        }
        Ok(table)
    }

    /// The same for one who needs it only once: where it is not in the cache, it does not come there.
    pub(crate) fn table_once(&self, extent: u32, layout: &dyn Layout, number: u64) -> Result<Option<Arc<Table>>> {
        match self.0.get(&(u64::from(extent) << EXTENT_SHIFT | number)) {
            Some(Cached::Table(t)) => Ok(Some(t)),
            _ => self.load(extent, layout, number),
        }
    }

    fn load(&self, extent: u32, layout: &dyn Layout, number: u64) -> Result<Option<Arc<Table>>> {
        let at = match self.place(extent, layout, number)? {
            DirectoryEntry::Absent => return Ok(None),
            DirectoryEntry::Bad => return Err(layout.explain_directory(number)),
            DirectoryEntry::At(sector) => sector,
        };
        Ok(Some(Arc::new(layout.load_table(number, at)?)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn slots_survive_both_widths() {
        let slots = [
            GrainEntry::Unallocated,
            GrainEntry::Zero,
            GrainEntry::At(2),
            GrainEntry::At(0xffff_fffe),
            GrainEntry::Bad,
        ];
        let (narrow, wide) = (Table::narrow(slots.into_iter()), Table::wide(slots.into_iter()));
        for (i, s) in slots.into_iter().enumerate() {
            assert_eq!(narrow.slot(i), s);
            assert_eq!(wide.slot(i), s);
        }
        assert_eq!(narrow.slot(5), GrainEntry::Bad);
        assert_eq!(wide.slot(5), GrainEntry::Bad);
    }

    /// Every table exists, at its number + 10, and says so in its entries.
    #[derive(Debug)]
    struct Regular;

    impl Layout for Regular {
        fn geometry(&self) -> TableGeometry {
            TableGeometry {
                capacity: 1 << 36,
                grain: 128,
                entries_per_table: 512,
            }
        }
        fn table_sectors(&self) -> u64 {
            4
        }
        fn load_directory(&self, tables: Range<u64>) -> Result<Vec<DirectoryEntry>> {
            assert!(tables.end - tables.start <= CHUNK);
            Ok(tables.map(|t| DirectoryEntry::At(t + 10)).collect())
        }
        fn load_table(&self, table: u64, at: u64) -> Result<Table> {
            assert_eq!(at, table + 10);
            Ok(Table::narrow((0..512).map(|_| GrainEntry::At(table + 2))))
        }
        fn explain_directory(&self, table: u64) -> crate::error::Error {
            crate::error::Error::corrupt(format!("{table}"))
        }
        fn explain_entry(&self, table: u64, entry: u64) -> crate::error::Error {
            crate::error::Error::corrupt(format!("{table} {entry}"))
        }
    }

    #[test]
    fn memory_stays_bounded_over_a_huge_disk() {
        let cache = TableCache::with_bytes(1 << 20);
        for table in (0..Regular.geometry().tables()).step_by(97) {
            for extent in [0, 1] {
                let got = cache.table(extent, &Regular, table).unwrap().unwrap();
                assert_eq!(got.slot(511), GrainEntry::At(table + 2));
                assert!(cache.0.weight() <= 1 << 20);
            }
        }
        assert!(cache.0.weight() > 1 << 19, "the cache is used");
    }
}
