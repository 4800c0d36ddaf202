//! Grain directories and grain tables, loaded on demand in bounded memory.
//!
//! ```text
//!   sector ─► table number ─► TableCache ──hit──► entries[i] ─► GrainEntry
//!                                 │ miss
//!                                 ▼
//!             directory chunk (4096 entries, cached as well) ─► DirectoryEntry ─► Layout::load_table
//! ```
//! All extents of a chain share one cache, so its bound holds for the disk, however many files it has. A table is read
//! as a whole, and its entries are checked while they are loaded: a lookup afterwards is a cached index and fails only
//! if the entry was found to be damaged.
//!
//! A [`Layout`] holds the differences between the three formats. It only translates addresses.
//!
//! An extent that is written to has its tables in [`writable`] and not in the cache: its entries change.

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

/// Maximum bytes of tables and directory chunks kept for a whole chain: the tables of 128 GiB of disk at the usual 64
/// KiB grains.
const CACHE_BYTES: u64 = 8 << 20;

/// Directory entries loaded at once: 32 KiB of memory, 128 GiB of disk at the usual table size.
pub(crate) const CHUNK: u64 = 4096;

/// Decoded grain table entry.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum GrainEntry {
    /// Not allocated: shows the parent, or zeroes.
    Unallocated,
    /// Zeroes that hide the parent.
    Zero,
    /// The grain starts at this sector of the file.
    At(u64),
    /// The entry is damaged; [`Layout::explain_entry`] returns the error for it.
    Bad,
}

/// Decoded directory entry.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum DirectoryEntry {
    /// No table: all its grains are unallocated.
    Absent,
    /// The table starts at this sector of the file.
    At(u64),
    /// The entry is damaged; [`Layout::explain_directory`] returns the error for it.
    Bad,
}

/// Entries of one grain table, in the narrowest form that holds them.
///
/// In memory 0 is unallocated, 1 is zero, and the largest number is damaged; all others are sectors. No grain starts at
/// sector 0 or 1 of a file, as the header lies there.
#[derive(Debug)]
pub(crate) enum Table {
    /// Sectors below 2^32 − 1.
    Narrow(Box<[u32]>),
    /// Any sector.
    Wide(Box<[u64]>),
    /// Sectors below 2^32 − 1 of an extent that is written to: entries change while other threads read them.
    Writable(Box<[AtomicU32]>),
}

const UNALLOCATED: u64 = 0;
const ZERO: u64 = 1;

impl Table {
    /// Creates a table of 32-bit entries. A sector that does not fit becomes a damaged entry.
    pub(crate) fn narrow(entries: impl Iterator<Item = GrainEntry>) -> Self {
        Self::Narrow(
            entries
                .map(|s| match s {
                    GrainEntry::Unallocated => UNALLOCATED as u32,
                    GrainEntry::Zero => ZERO as u32,
                    GrainEntry::At(sector) => u32::try_from(sector).unwrap_or(u32::MAX),
                    GrainEntry::Bad => u32::MAX,
                })
                .collect(),
        )
    }

    /// Creates a table of `len` entries that can change: those of `self`, followed by unallocated ones.
    pub(crate) fn into_writable(self, len: usize) -> Self {
        let entry = |i| match self.entry(i) {
            _ if i >= self.len() => UNALLOCATED as u32,
            GrainEntry::Unallocated => UNALLOCATED as u32,
            GrainEntry::Zero => ZERO as u32,
            GrainEntry::At(sector) => u32::try_from(sector).unwrap_or(u32::MAX),
            GrainEntry::Bad => u32::MAX,
        };
        Self::Writable((0..len).map(|i| AtomicU32::new(entry(i))).collect())
    }

    /// Sets entry `i` of a writable table to `raw`, the value that the file will have. Does nothing for other tables.
    pub(crate) fn publish(&self, i: usize, raw: u32) {
        if let Self::Writable(entries) = self
            && let Some(entry) = entries.get(i)
        {
            // Pairs with the load in `entry`: a thread that sees the entry sees the writes to the grain before it.
            entry.store(raw, Ordering::Release);
        }
    }

    /// Creates a table of 64-bit entries.
    pub(crate) fn wide(entries: impl Iterator<Item = GrainEntry>) -> Self {
        Self::Wide(
            entries
                .map(|s| match s {
                    GrainEntry::Unallocated => UNALLOCATED,
                    GrainEntry::Zero => ZERO,
                    GrainEntry::At(sector) => sector,
                    GrainEntry::Bad => u64::MAX,
                })
                .collect(),
        )
    }

    /// Returns entry `i`; an index past the table is `Bad`.
    pub(crate) fn entry(&self, i: usize) -> GrainEntry {
        let (value, bad) = match self {
            Self::Narrow(e) => (e.get(i).map_or(u64::from(u32::MAX), |&v| v.into()), u64::from(u32::MAX)),
            Self::Wide(e) => (e.get(i).copied().unwrap_or(u64::MAX), u64::MAX),
            Self::Writable(e) => (
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

    /// Returns the number of entries.
    pub(crate) fn len(&self) -> usize {
        match self {
            Self::Narrow(e) => e.len(),
            Self::Wide(e) => e.len(),
            Self::Writable(e) => e.len(),
        }
    }

    fn bytes(&self) -> u64 {
        match self {
            Self::Narrow(e) => size_of_val::<[u32]>(e) as u64,
            Self::Wide(e) => size_of_val::<[u64]>(e) as u64,
            Self::Writable(e) => size_of_val::<[AtomicU32]>(e) as u64,
        }
    }
}

/// Numbers that map a sector to its table and entry.
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
    /// Returns the number of sectors that one table covers.
    pub(crate) fn coverage(&self) -> u64 {
        self.grain * self.entries_per_table
    }

    /// Returns the number of tables.
    pub(crate) fn tables(&self) -> u64 {
        self.capacity.div_ceil(self.coverage())
    }

    /// Returns the number of sectors of grain `number` that lie inside of the extent: fewer for the last grain.
    pub(crate) fn grain_sectors(&self, number: u64) -> u64 {
        self.grain.min(self.capacity.saturating_sub(number * self.grain))
    }
}

/// Sparse format: location of its directory and tables, and meaning of their entries.
pub(crate) trait Layout: fmt::Debug + Send + Sync {
    /// Returns the geometry, which never changes.
    fn geometry(&self) -> TableGeometry;
    /// Returns the number of sectors that a table takes in the file.
    fn table_sectors(&self) -> u64;
    /// Reads and checks the directory entries of `tables` (at most [`CHUNK`]).
    fn load_directory(&self, tables: Range<u64>) -> Result<Vec<DirectoryEntry>>;
    /// Reads table `table`, which its directory entry places at sector `at`, and checks each entry. The result has at
    /// least as many entries as the table has grains inside of the capacity.
    fn load_table(&self, table: u64, at: u64) -> Result<Table>;
    /// Returns the error for a bad directory entry.
    fn explain_directory(&self, table: u64) -> crate::error::Error;
    /// Returns the error for a bad entry of a table.
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
        // Approximate memory of a cache entry without its data.
        const OVERHEAD: u64 = 96;
        OVERHEAD
            + match value {
                Cached::Table(t) => t.bytes(),
                Cached::Directory(d) => size_of_val::<[DirectoryEntry]>(d) as u64,
            }
    }
}

/// Cache of tables and directory chunks, shared by all extents of a chain.
#[derive(Clone)]
pub(crate) struct TableCache(Arc<Cache<u64, Cached, ByBytes>>);

impl fmt::Debug for TableCache {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "TableCache({} of {} bytes)", self.0.weight(), self.0.capacity())
    }
}

/// Position of the extent's number in a key; the bits below are the number of the table or chunk.
const EXTENT_SHIFT: u32 = 40;
/// Set in the keys of directory chunks.
const DIRECTORY_BIT: u64 = 1 << 39;

impl TableCache {
    /// Creates an empty cache of 8 MiB.
    pub(crate) fn new() -> Self {
        Self::with_bytes(CACHE_BYTES)
    }

    /// Creates an empty cache of at most `bytes`.
    pub(crate) fn with_bytes(bytes: u64) -> Self {
        const TYPICAL_TABLE: u64 = 2048;
        let options = OptionsBuilder::new()
            .estimated_items_capacity((bytes / TYPICAL_TABLE) as usize)
            .weight_capacity(bytes)
            // Each shard has its part of the capacity, and rejects what is larger: with many shards a large table would
            // never be cached.
            .shards(4)
            .build();
        let cache = match options {
            Ok(o) => Cache::with_options(o, ByBytes, Default::default(), Default::default()),
            // Only a missing option fails, and none is missing. The bound holds in any case.
            Err(_) => Cache::with_weighter((bytes / TYPICAL_TABLE) as usize, bytes, ByBytes),
        };
        Self(Arc::new(cache))
    }

    /// Returns the directory entry of table `number` of the extent.
    pub(crate) fn directory_entry(&self, extent: u32, layout: &dyn Layout, number: u64) -> Result<DirectoryEntry> {
        let chunk = self.chunk(extent, layout, number / CHUNK)?;
        Ok(chunk
            .get((number % CHUNK) as usize)
            .copied()
            .unwrap_or(DirectoryEntry::Bad))
    }

    /// Returns chunk `n` of the extent's directory: the entries from `n × CHUNK` on.
    pub(crate) fn chunk(&self, extent: u32, layout: &dyn Layout, n: u64) -> Result<Arc<[DirectoryEntry]>> {
        // The parts cannot overlap: a directory has at most 2^25 entries, so numbers of tables and of chunks stay below
        // bit 39.
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

    /// Returns table `number` of the extent, or `None` if there is no table.
    pub(crate) fn table(&self, extent: u32, layout: &dyn Layout, number: u64) -> Result<Option<Arc<Table>>> {
        let key = u64::from(extent) << EXTENT_SHIFT | number;
        if let Some(Cached::Table(t)) = self.0.get(&key) {
            return Ok(Some(t));
        }
        // Not single-flight: two threads may load the same table at once. That costs one read more; a lock held over
        // the read would make other threads wait for it.
        let table = self.load(extent, layout, number)?;
        if let Some(table) = &table {
            self.0.insert(key, Cached::Table(Arc::clone(table)));
        }
        Ok(table)
    }

    /// Like [`table`](Self::table), for a caller that needs the table only once: a miss is not put into the cache.
    pub(crate) fn table_once(&self, extent: u32, layout: &dyn Layout, number: u64) -> Result<Option<Arc<Table>>> {
        match self.0.get(&(u64::from(extent) << EXTENT_SHIFT | number)) {
            Some(Cached::Table(t)) => Ok(Some(t)),
            _ => self.load(extent, layout, number),
        }
    }

    fn load(&self, extent: u32, layout: &dyn Layout, number: u64) -> Result<Option<Arc<Table>>> {
        let at = match self.directory_entry(extent, layout, number)? {
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
    fn entries_survive_both_widths() {
        let entries = [
            GrainEntry::Unallocated,
            GrainEntry::Zero,
            GrainEntry::At(2),
            GrainEntry::At(0xffff_fffe),
            GrainEntry::Bad,
        ];
        let (narrow, wide) = (Table::narrow(entries.into_iter()), Table::wide(entries.into_iter()));
        for (i, s) in entries.into_iter().enumerate() {
            assert_eq!(narrow.entry(i), s);
            assert_eq!(wide.entry(i), s);
        }
        assert_eq!(narrow.entry(5), GrainEntry::Bad);
        assert_eq!(wide.entry(5), GrainEntry::Bad);
    }

    /// Every table exists, at sector number + 10, and all its entries name sector number + 2.
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
                assert_eq!(got.entry(511), GrainEntry::At(table + 2));
                assert!(cache.0.weight() <= 1 << 20);
            }
        }
        assert!(cache.0.weight() > 1 << 19, "the cache is used");
    }
}
