//! One extent of a disk: maps its sectors to runs of a file.
//!
//! Extents only translate addresses; [`super::disk`] does the I/O. A run continues over consecutive entries as long as
//! their grains are neighbours in the file, so that they become one read.
//!
//! Tables are read through one of three ways: the shared cache, the table of the last step of a walk
//! ([`TableCursor`]), or the tables of an extent that is written to ([`SparseExtent::writable`]).

use std::sync::Arc;

use crate::block::SECTOR;
use crate::error::{Error, Result};
use crate::store::StoredFile;
use crate::vmdk::tables::writable::WritableTables;
use crate::vmdk::tables::{CHUNK, DirectoryEntry, GrainEntry, Layout, Table, TableCache, TableGeometry};

/// Mapping of a range of sectors: where it is read from.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Mapping<'a> {
    /// Uncompressed in a file.
    Stored {
        /// The file.
        file: &'a Arc<dyn StoredFile>,
        /// Sector of the file at which the run starts.
        sector: u64,
        /// Length of the run.
        sectors: u64,
    },
    /// In one compressed grain.
    Compressed {
        /// The grain.
        grain: CompressedGrain<'a>,
        /// Sectors of the inflated grain before the run.
        skip: u64,
        /// Length of the run; it ends at the end of the grain or before.
        sectors: u64,
    },
    /// Zeroes that hide the parent.
    Zero {
        /// Length of the run.
        sectors: u64,
    },
    /// Nothing: the parent's content shows, or zeroes where there is no parent.
    Hole {
        /// Length of the run.
        sectors: u64,
    },
}

impl Mapping<'_> {
    /// Returns the length of the run in sectors.
    pub(crate) fn sectors(&self) -> u64 {
        match *self {
            Mapping::Stored { sectors, .. }
            | Mapping::Compressed { sectors, .. }
            | Mapping::Zero { sectors }
            | Mapping::Hole { sectors } => sectors,
        }
    }
}

/// Compressed grain: its location, and the values that its header and content are checked against.
#[derive(Debug, Clone, Copy)]
pub(crate) struct CompressedGrain<'a> {
    /// The file.
    pub(crate) file: &'a Arc<dyn StoredFile>,
    /// Sector of the file at which its header starts.
    pub(crate) sector: u64,
    /// Distance to the grain of the next entry, if that is plausible as the length of this one. A hint for the size of
    /// the first read; never trusted.
    pub(crate) likely_sectors: Option<u64>,
    /// First sector of the grain in the extent, which its header must repeat.
    pub(crate) lba: u64,
    /// Sectors of a whole grain.
    pub(crate) grain: u64,
    /// Sectors of the grain that lie inside of the extent: the minimum that it must inflate to.
    pub(crate) inside: u64,
    /// True if the header has the LBA before the length.
    pub(crate) markers: bool,
}

/// Extent of a link.
#[derive(Debug)]
pub(crate) enum Extent {
    /// Sectors of a file from `offset` on.
    Flat { file: Arc<dyn StoredFile>, offset: u64 },
    /// No file: zeroes.
    Zero,
    /// Sectors that the file should have and does not. The user accepts that; reading them returns the error.
    Lost(Error),
    /// Grains named by tables.
    Sparse(SparseExtent),
}

impl Extent {
    /// Returns the mapping at `sector` of the extent, of at most `max` sectors. `sector` and `max` must lie inside of
    /// the extent. The run may end before the mapping changes. With `cursor`, for a walk, the table of the last run is
    /// kept there and out of the cache.
    ///
    /// Errors: `Corrupt` for a damaged table or entry, those of reading a table.
    pub(crate) fn map(&self, sector: u64, max: u64, cursor: Option<&mut TableCursor>) -> Result<Mapping<'_>> {
        match self {
            Extent::Flat { file, offset } => Ok(Mapping::Stored {
                file,
                sector: offset + sector,
                sectors: max,
            }),
            Extent::Zero => Ok(Mapping::Zero { sectors: max }),
            Extent::Lost(error) => Err(error.clone()),
            Extent::Sparse(sparse) => sparse.map(sector, max, cursor),
        }
    }

    /// Returns the file that the extent lies in.
    pub(crate) fn file(&self) -> Option<&Arc<dyn StoredFile>> {
        match self {
            Extent::Flat { file, .. } => Some(file),
            Extent::Sparse(sparse) => Some(&sparse.file),
            Extent::Zero | Extent::Lost(_) => None,
        }
    }

    /// Returns the sectors of a grain, if the grains are compressed.
    pub(crate) fn compressed_grain(&self) -> Option<u64> {
        match self {
            Extent::Sparse(sparse) if sparse.encoding != Encoding::Plain => Some(sparse.geometry.grain),
            _ => None,
        }
    }

    /// Like [`Self::map`], but returns only the kind of mapping: data continues where the grains are not neighbours
    /// in the file. A damaged entry counts as data; reading it returns the error.
    pub(crate) fn mapping_kind_at(&self, sector: u64, max: u64) -> Result<(MappingKind, u64)> {
        match self {
            Extent::Flat { file, offset } => {
                let at = (offset + sector) * SECTOR;
                Ok(stored(&**file, at, file.data_at(at)?, max))
            }
            Extent::Zero => Ok((MappingKind::Zero, max)),
            Extent::Lost(_) => Ok((MappingKind::Data, max)),
            Extent::Sparse(sparse) => sparse.mapping_kind_at(sector, max),
        }
    }
}

/// Table that a walk used last. Most steps of a walk stay in it, and those that leave it never come back, so the walk
/// does not fill the cache with tables.
#[derive(Debug, Default)]
pub(crate) struct TableCursor(Option<(u32, u64, Option<Arc<Table>>)>);

impl TableCursor {
    /// Returns table `number` of `extent`, or `None` if there is no table.
    fn table(&mut self, extent: &SparseExtent, number: u64) -> Result<Option<&Table>> {
        if !matches!(self.0, Some((id, n, _)) if (id, n) == (extent.id, number)) {
            // An absent table is kept as well, so that the short runs of other links inside of its range do not search
            // it again. A walk never meets an extent that is written to: the kernel view refuses writable disks.
            let table = extent.cache.table_once(extent.id, &*extent.layout, number)?;
            self.0 = Some((extent.id, number, table));
        }
        Ok(self.0.as_ref().and_then(|(.., table)| table.as_deref()))
    }
}

/// Converts the answer of [`StoredFile::data_at`] for byte `at` to the kind of mapping, and for how many of `max`
/// sectors it holds.
fn stored(file: &dyn StoredFile, at: u64, (stored, bytes): (bool, u64), max: u64) -> (MappingKind, u64) {
    // A hole that ends inside of a sector, and not at the end of the file: the rest of the sector may be stored.
    let mixed = bytes < SECTOR && bytes < file.len().saturating_sub(at);
    // A hole of the file hides the parent, like a zeroed grain.
    let kind = if stored || mixed {
        MappingKind::Data
    } else {
        MappingKind::Zero
    };
    // At least one sector, so that a caller that adds the answers up makes progress.
    (kind, (bytes / SECTOR).clamp(1, max))
}

/// Kind of mapping at a sector of an extent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum MappingKind {
    Data,
    Zero,
    Hole,
}

/// Sparse extent of any format.
#[derive(Debug)]
pub(crate) struct SparseExtent {
    /// Number in the chain: the key in the shared cache.
    pub(crate) id: u32,
    pub(crate) file: Arc<dyn StoredFile>,
    pub(crate) layout: Arc<dyn Layout>,
    pub(crate) cache: TableCache,
    pub(crate) encoding: Encoding,
    /// Tables of an extent that is written to; they replace those of the cache.
    pub(crate) writable: Option<Arc<WritableTables>>,
    /// Copy of `layout.geometry()`, without the virtual call.
    geometry: TableGeometry,
}

/// Encoding of stored grains.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Encoding {
    Plain,
    /// Compressed; with `markers` the LBA precedes the length.
    Deflate {
        markers: bool,
    },
}

/// Maximum number of directory chunks that one query reads. A chain may have many directories of thousands of chunks,
/// and a search must be able to check its time limit in between; four chunks cover 512 GiB at the usual table size.
const ABSENT_CHUNKS: u64 = 4;

/// Position of a sector in the tables.
#[derive(Debug, Clone, Copy)]
struct Position {
    table: u64,
    entry: usize,
    /// Sectors from the start of the grain.
    within: u64,
}

impl SparseExtent {
    /// Creates an extent of `file` with the tables `layout`.
    pub(crate) fn new(
        id: u32,
        file: Arc<dyn StoredFile>,
        layout: Arc<dyn Layout>,
        cache: TableCache,
        encoding: Encoding,
    ) -> Self {
        let geometry = layout.geometry();
        Self {
            id,
            file,
            layout,
            cache,
            encoding,
            writable: None,
            geometry,
        }
    }

    /// Returns the geometry of the tables.
    pub(crate) fn geometry(&self) -> TableGeometry {
        self.geometry
    }

    /// Returns table `number`, or `None` if there is no table.
    fn table(&self, number: u64) -> Result<Option<Arc<Table>>> {
        match &self.writable {
            Some(writable) => writable.table(number),
            None => self.cache.table(self.id, &*self.layout, number),
        }
    }

    fn position(&self, sector: u64) -> Position {
        let grain = sector / self.geometry.grain;
        Position {
            table: grain / self.geometry.entries_per_table,
            entry: (grain % self.geometry.entries_per_table) as usize,
            within: sector % self.geometry.grain,
        }
    }

    /// As [`Extent::map`].
    pub(crate) fn map(&self, sector: u64, max: u64, cursor: Option<&mut TableCursor>) -> Result<Mapping<'_>> {
        let p = self.position(sector);
        let mapped = match cursor {
            Some(cursor) => cursor
                .table(self, p.table)?
                .map(|table| self.map_in(table, p, sector, max)),
            None => self.table(p.table)?.map(|table| self.map_in(&table, p, sector, max)),
        };
        mapped.unwrap_or_else(|| {
            Ok(Mapping::Hole {
                sectors: self.absent(sector, max)?,
            })
        })
    }

    /// Returns the mapping at `sector`, whose entry is at `p` in `table`.
    fn map_in(&self, table: &Table, p: Position, sector: u64, max: u64) -> Result<Mapping<'_>> {
        let (kind, grains) = self.equal_grains(table, p, max, true);
        let sectors = (grains * self.geometry.grain - p.within).min(max);
        // The entry of a writable table may have changed since `equal_grains` read it. It only changes from unallocated
        // or zero to a grain, never between grains, so a run of data has its own sector here.
        match (kind, table.entry(p.entry)) {
            (Some(MappingKind::Zero), _) => Ok(Mapping::Zero { sectors }),
            (Some(MappingKind::Hole), _) => Ok(Mapping::Hole { sectors }),
            (Some(MappingKind::Data), GrainEntry::At(at)) => {
                Ok(self.data_mapping(sector, sectors, at, table.entry(p.entry + 1)))
            }
            _ => Err(self.layout.explain_entry(p.table, p.entry as u64)),
        }
    }

    fn data_mapping(&self, sector: u64, sectors: u64, at: u64, next: GrainEntry) -> Mapping<'_> {
        let within = sector % self.geometry.grain;
        match self.encoding {
            Encoding::Plain => Mapping::Stored {
                file: &self.file,
                sector: at + within,
                sectors,
            },
            Encoding::Deflate { markers } => {
                let lba = sector - within;
                let grain = CompressedGrain {
                    file: &self.file,
                    sector: at,
                    likely_sectors: match next {
                        // The grains of a stream usually lie in the order of their entries, and then the next one ends
                        // this one. A distance above the limit of `check_header` says nothing.
                        GrainEntry::At(n) if n > at && n - at <= 2 * self.geometry.grain => Some(n - at),
                        _ => None,
                    },
                    lba,
                    grain: self.geometry.grain,
                    inside: self.geometry.grain_sectors(lba / self.geometry.grain),
                    markers,
                };
                Mapping::Compressed {
                    grain,
                    skip: within,
                    sectors,
                }
            }
        }
    }

    fn mapping_kind_at(&self, sector: u64, max: u64) -> Result<(MappingKind, u64)> {
        let p = self.position(sector);
        // A writable extent has passed the check, so its directory has no bad entries.
        if self.writable.is_none()
            && self.cache.directory_entry(self.id, &*self.layout, p.table)? == DirectoryEntry::Bad
        {
            // As for a damaged entry of a table, reading returns the error.
            let coverage = self.geometry.coverage();
            return Ok((MappingKind::Data, max.min(coverage - sector % coverage)));
        }
        let Some(table) = self.table(p.table)? else {
            return Ok((MappingKind::Hole, self.absent(sector, max)?));
        };
        // A discarded grain of a writable extent keeps its entry and is a hole of the file: then the file is queried.
        if let (Some(writable), GrainEntry::At(at)) = (&self.writable, table.entry(p.entry))
            && writable.has_holes()
        {
            let left = (self.geometry.grain - p.within).min(max);
            let at = (at + p.within) * SECTOR;
            let known = writable.data_known_from(at).filter(|&bytes| bytes >= SECTOR);
            let answer = known.map_or_else(|| self.file.data_at(at), |bytes| Ok((true, bytes)))?;
            if known.is_none() {
                writable.note_data(at, answer);
            }
            return Ok(stored(&*self.file, at, answer, left));
        }
        let (kind, grains) = self.equal_grains(&table, p, max, false);
        Ok((
            kind.unwrap_or(MappingKind::Data),
            (grains * self.geometry.grain - p.within).min(max),
        ))
    }

    /// Returns the kind of the grain at `p` (`None`: damaged), and the number of grains of this table from there on
    /// that have the same kind, within `max` sectors. With `adjacent` data only continues where the next grain also
    /// follows in the file, and a compressed grain is always alone.
    fn equal_grains(&self, table: &Table, p: Position, max: u64, adjacent: bool) -> (Option<MappingKind>, u64) {
        let kind = |entry| match entry {
            GrainEntry::Unallocated => Some(MappingKind::Hole),
            GrainEntry::Zero => Some(MappingKind::Zero),
            GrainEntry::At(_) => Some(MappingKind::Data),
            GrainEntry::Bad => None,
        };
        let first = table.entry(p.entry);
        // Not beyond the request: a table may have 65536 entries, and most requests touch a few.
        let requested = (p.within + max).div_ceil(self.geometry.grain);
        // A damaged entry stands alone, so that the grains after it can be read. So does a compressed grain: each is
        // inflated by itself.
        let alone = first == GrainEntry::Bad
            || (adjacent && self.encoding != Encoding::Plain && kind(first) == Some(MappingKind::Data));
        let most = if alone {
            1
        } else {
            requested.min((table.len() - p.entry.min(table.len())) as u64).max(1)
        };
        let mut n = 1;
        while n < most {
            let continues = match (first, table.entry(p.entry + n as usize)) {
                (GrainEntry::At(a), GrainEntry::At(b)) => !adjacent || a + n * self.geometry.grain == b,
                (a, b) => kind(a) == kind(b),
            };
            if !continues {
                break;
            }
            n += 1;
        }
        (kind(first), n)
    }

    /// Returns the number of sectors from `sector` on, at most `max`, that have no table. The caller knows that
    /// `sector` itself has none. Reads at most [`ABSENT_CHUNKS`] chunks of the directory; the caller repeats the query
    /// for more.
    fn absent(&self, sector: u64, max: u64) -> Result<u64> {
        let coverage = self.geometry.coverage();
        // The table of `sector` itself is not queried again: another program may have added it meanwhile, and the
        // answer would be an empty run.
        let mut table = sector / coverage + 1;
        // Counted in whole chunks, so that the bound does not depend on where in its chunk the range starts.
        let end = (sector + max).min((table / CHUNK + ABSENT_CHUNKS) * CHUNK * coverage);
        if let Some(writable) = &self.writable {
            table += writable.absent(table, end.div_ceil(coverage));
            return Ok((table * coverage).min(end) - sector);
        }
        while table * coverage < end {
            let chunk = self.cache.chunk(self.id, &*self.layout, table / CHUNK)?;
            let inside = (table % CHUNK) as usize;
            let rest = chunk.get(inside..).unwrap_or_default();
            let n = rest.iter().take_while(|p| **p == DirectoryEntry::Absent).count();
            table += n as u64;
            if n < rest.len() || rest.is_empty() {
                break;
            }
        }
        Ok((table * coverage).min(end) - sector)
    }

    /// Returns the error for a damaged directory entry, or for a damaged entry of a table.
    pub(crate) fn explain(&self, table: u64, entry: Option<u64>) -> Error {
        match entry {
            Some(entry) => self.layout.explain_entry(table, entry),
            None => self.layout.explain_directory(table),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::ops::Range;
    use std::sync::atomic::{AtomicBool, Ordering};

    use super::*;
    use crate::store::{Access, OpenPolicy, open_user_path};

    /// A directory that another program writes: its tables are absent when it is read the first time, and exist when it
    /// is read again.
    #[derive(Debug, Default)]
    struct Growing {
        was_read: AtomicBool,
    }

    impl Layout for Growing {
        fn geometry(&self) -> TableGeometry {
            TableGeometry {
                capacity: 8 * 1024,
                grain: 8,
                entries_per_table: 128,
            }
        }
        fn table_sectors(&self) -> u64 {
            1
        }
        fn load_directory(&self, tables: Range<u64>) -> Result<Vec<DirectoryEntry>> {
            let there = self.was_read.swap(true, Ordering::Relaxed);
            Ok(tables
                .map(|t| {
                    if there {
                        DirectoryEntry::At(t + 10)
                    } else {
                        DirectoryEntry::Absent
                    }
                })
                .collect())
        }
        fn load_table(&self, _table: u64, _at: u64) -> Result<Table> {
            Ok(Table::narrow((0..128).map(|_| GrainEntry::Zero)))
        }
        fn explain_directory(&self, table: u64) -> Error {
            Error::corrupt(format!("{table}"))
        }
        fn explain_entry(&self, table: u64, entry: u64) -> Error {
            Error::corrupt(format!("{table} {entry}"))
        }
    }

    /// A table that was found to be absent is absent for the whole request, even if the directory changes meanwhile.
    #[test]
    fn regression_a_directory_that_changes_between_two_reads() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let file = open_user_path(file.path(), Arc::new(OpenPolicy::new(Vec::new(), true)), Access::Read).unwrap();
        for sector in [0, 1, 1023] {
            // Nothing fits this cache, so each lookup reads the directory.
            let cache = TableCache::with_bytes(1);
            let layout = Arc::new(Growing::default());
            let extent = SparseExtent::new(1, Arc::clone(&file), layout, cache, Encoding::Plain);
            match extent.map(sector, 8 * 1024 - sector, None).unwrap() {
                Mapping::Hole { sectors } => assert_eq!(sectors, 1024 - sector),
                other => panic!("{other:?}"),
            }
        }
    }
}
