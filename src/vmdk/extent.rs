//! One extent of a disk: maps its sectors to runs of a file.
//!
//! Extents only translate addresses; what does the I/O is [`super::disk`]. A run is as long as one entry after
//! the other continues it, so that neighbouring grains become one read.

use std::sync::Arc;

use crate::block::SECTOR;
use crate::error::{Error, Result};
use crate::store::StoredFile;
use crate::vmdk::tables::writable::WritableTables;
use crate::vmdk::tables::{CHUNK, DirectoryEntry, GrainEntry, Layout, Table, TableCache, TableGeometry};

/// Where a range of sectors is to be read.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Run<'a> {
    /// In a file, as it is.
    Stored {
        /// The file.
        file: &'a Arc<dyn StoredFile>,
        /// Its sector at which the run starts.
        sector: u64,
        /// Length of the run.
        sectors: u64,
    },
    /// In one compressed grain.
    Deflate {
        /// The grain.
        grain: CompressedGrain<'a>,
        /// Sector inside of the inflated grain.
        skip: u64,
        /// Length of the run; it ends with the grain, at the latest.
        sectors: u64,
    },
    /// Zeroes that hide the parent.
    Zero {
        /// Length of the run.
        sectors: u64,
    },
    /// The parent's content; zeroes where there is no parent.
    Parent {
        /// Length of the run.
        sectors: u64,
    },
}

impl Run<'_> {
    /// Its length.
    pub(crate) fn sectors(&self) -> u64 {
        match *self {
            Run::Stored { sectors, .. }
            | Run::Deflate { sectors, .. }
            | Run::Zero { sectors }
            | Run::Parent { sectors } => sectors,
        }
    }
}

/// A compressed grain: where it is and what it must be.
#[derive(Debug, Clone, Copy)]
pub(crate) struct CompressedGrain<'a> {
    /// The file.
    pub(crate) file: &'a Arc<dyn StoredFile>,
    /// Sector of the file at which its header starts.
    pub(crate) sector: u64,
    /// Sectors up to where the next grain starts, where the table lets suppose that. A hint for the first read.
    pub(crate) likely_sectors: Option<u64>,
    /// Its first sector in the extent, which its header must repeat.
    pub(crate) lba: u64,
    /// Sectors of a whole grain.
    pub(crate) grain: u64,
    /// Sectors of it that lie inside of the extent: the least that it must inflate to.
    pub(crate) inside: u64,
    /// Whether its header has the LBA before the length.
    pub(crate) markers: bool,
}

/// An extent of a link of the chain.
#[derive(Debug)]
pub(crate) enum Extent {
    /// Sectors of a file from `offset` on.
    Flat { file: Arc<dyn StoredFile>, offset: u64 },
    /// No file: zeroes.
    Zero,
    /// Grains named by tables.
    Sparse(SparseExtent),
}

impl Extent {
    /// The run at `sector` of the extent, of at most `max` sectors, which lie inside of it.
    pub(crate) fn run_at(&self, sector: u64, max: u64) -> Result<Run<'_>> {
        match self {
            Extent::Flat { file, offset } => Ok(Run::Stored {
                file,
                sector: offset + sector,
                sectors: max,
            }),
            Extent::Zero => Ok(Run::Zero { sectors: max }),
            Extent::Sparse(sparse) => sparse.run_at(sector, max),
        }
    }

    /// Like [`Self::run_at`], for one who walks: the table of the last run is at hand in `near`.
    pub(crate) fn run_near(&self, sector: u64, max: u64, near: &mut Near) -> Result<Run<'_>> {
        match self {
            Extent::Sparse(sparse) => sparse.run_near(sector, max, near),
            Extent::Flat { .. } | Extent::Zero => self.run_at(sector, max),
        }
    }

    /// Like [`Self::run_at`], but asks only what is there: runs of data don't end where the file's grains are
    /// not neighbours.
    pub(crate) fn kind_at(&self, sector: u64, max: u64) -> Result<(Kind, u64)> {
        match self {
            Extent::Flat { file, offset } => {
                let at = (offset + sector) * SECTOR;
                Ok(stored(&**file, at, file.data_at(at)?, max))
            }
            Extent::Zero => Ok((Kind::Zero, max)),
            Extent::Sparse(sparse) => sparse.kind_at(sector, max),
        }
    }
}

/// The table that a walk looked at last: most of its steps stay in it, and those that leave it don't come back, so that the
/// cache is not filled with it either.
#[derive(Debug, Default)]
pub(crate) struct Near(Option<(u32, u64, Option<Arc<Table>>)>);

impl Near {
    /// Table `number` of `extent`; `None` where there is no table.
    fn table(&mut self, extent: &SparseExtent, number: u64) -> Result<Option<&Table>> {
        if !matches!(self.0, Some((id, n, _)) if (id, n) == (extent.id, number)) {
            let table = extent.cache.table_once(extent.id, &*extent.layout, number)?;
            self.0 = Some((extent.id, number, table));
        }
        Ok(self.0.as_ref().and_then(|(.., table)| table.as_deref()))
    }
}

/// Whether a file has data at byte `at` or a hole, and for how many of `max` sectors, by what
/// [`StoredFile::data_at`] says.
fn stored(file: &dyn StoredFile, at: u64, (stored, bytes): (bool, u64), max: u64) -> (Kind, u64) {
    // a sector of which a part is stored is no hole
    let mixed = bytes < SECTOR && bytes < file.len().saturating_sub(at);
    // a hole of the file hides the parent like a zeroed grain does
    let kind = if stored || mixed { Kind::Data } else { Kind::Zero };
    (kind, (bytes / SECTOR).clamp(1, max))
}

/// What an extent has at a place.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    Data,
    Zero,
    Parent,
}

/// A sparse extent of any format.
#[derive(Debug)]
pub(crate) struct SparseExtent {
    /// Its number in the chain, for the shared cache.
    pub(crate) id: u32,
    pub(crate) file: Arc<dyn StoredFile>,
    pub(crate) layout: Arc<dyn Layout>,
    pub(crate) cache: TableCache,
    pub(crate) packing: Encoding,
    /// The tables of an extent that is written to, instead of those of the cache.
    pub(crate) live: Option<Arc<WritableTables>>,
    /// `layout.geometry()`, at hand.
    geometry: TableGeometry,
}

/// How grains are stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Encoding {
    Plain,
    /// Compressed; `markers`: with the LBA in front.
    Deflate {
        markers: bool,
    },
}

/// Chunks of a directory that one question is answered from. A chain may have many directories of thousands of chunks,
/// and a search has to come to its clock in between; four cover 512 GiB at the usual table size.
const ABSENT_CHUNKS: u64 = 4;

/// A sector's place in the tables.
#[derive(Debug, Clone, Copy)]
struct Position {
    table: u64,
    entry: usize,
    /// Sectors from the start of the grain.
    within: u64,
}

impl SparseExtent {
    /// An extent of `file` with the tables `layout`.
    pub(crate) fn new(
        id: u32,
        file: Arc<dyn StoredFile>,
        layout: Arc<dyn Layout>,
        cache: TableCache,
        packing: Encoding,
    ) -> Self {
        let geometry = layout.geometry();
        Self {
            id,
            file,
            layout,
            cache,
            packing,
            live: None,
            geometry,
        }
    }

    /// Its numbers.
    pub(crate) fn geometry(&self) -> TableGeometry {
        self.geometry
    }

    /// Table `number`; `None` where there is none.
    fn table(&self, number: u64) -> Result<Option<Arc<Table>>> {
        match &self.live {
            Some(live) => live.table(number),
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

    /// The run at `sector` of the extent, of at most `max` sectors, which lie inside of it.
    pub(crate) fn run_at(&self, sector: u64, max: u64) -> Result<Run<'_>> {
        let p = self.position(sector);
        let Some(table) = self.table(p.table)? else {
            return Ok(Run::Parent {
                sectors: self.absent(sector, max)?,
            });
        };
        self.run_in(&table, p, sector, max)
    }

    fn run_near(&self, sector: u64, max: u64, near: &mut Near) -> Result<Run<'_>> {
        let p = self.position(sector);
        match near.table(self, p.table)? {
            Some(table) => self.run_in(table, p, sector, max),
            None => Ok(Run::Parent {
                sectors: self.absent(sector, max)?,
            }),
        }
    }

    /// The run at `sector`, which has its entry at `p` in `table`.
    fn run_in(&self, table: &Table, p: Position, sector: u64, max: u64) -> Result<Run<'_>> {
        let (kind, grains) = self.stretch(table, p, max, true);
        let sectors = (grains * self.geometry.grain - p.within).min(max);
        match (kind, table.slot(p.entry)) {
            (Some(Kind::Zero), _) => Ok(Run::Zero { sectors }),
            (Some(Kind::Parent), _) => Ok(Run::Parent { sectors }),
            (Some(Kind::Data), GrainEntry::At(at)) => Ok(self.data_run(sector, sectors, at, table.slot(p.entry + 1))),
            _ => Err(self.layout.explain_entry(p.table, p.entry as u64)),
        }
    }

    fn data_run(&self, sector: u64, sectors: u64, at: u64, next: GrainEntry) -> Run<'_> {
        let within = sector % self.geometry.grain;
        match self.packing {
            Encoding::Plain => Run::Stored {
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
                        GrainEntry::At(n) if n > at && n - at <= 2 * self.geometry.grain => Some(n - at),
                        _ => None,
                    },
                    lba,
                    grain: self.geometry.grain,
                    inside: self.geometry.grain_sectors(lba / self.geometry.grain),
                    markers,
                };
                Run::Deflate {
                    grain,
                    skip: within,
                    sectors,
                }
            }
        }
    }

    fn kind_at(&self, sector: u64, max: u64) -> Result<(Kind, u64)> {
        let p = self.position(sector);
        // what is written to was checked before
        if self.live.is_none() && self.cache.place(self.id, &*self.layout, p.table)? == DirectoryEntry::Bad {
            // like a damaged entry of a table: reading it is what tells
            let coverage = self.geometry.coverage();
            return Ok((Kind::Data, max.min(coverage - sector % coverage)));
        }
        let Some(table) = self.table(p.table)? else {
            return Ok((Kind::Parent, self.absent(sector, max)?));
        };
        if let (Some(live), GrainEntry::At(at)) = (&self.live, table.slot(p.entry))
            && live.has_holes()
        {
            let left = (self.geometry.grain - p.within).min(max);
            let at = (at + p.within) * SECTOR;
            let known = live.data_known_from(at).filter(|&bytes| bytes >= SECTOR);
            let answer = known.map_or_else(|| self.file.data_at(at), |bytes| Ok((true, bytes)))?;
            if known.is_none() {
                live.note_data(at, answer);
            }
            return Ok(stored(&*self.file, at, answer, left));
        }
        let (kind, grains) = self.stretch(&table, p, max, false);
        // a damaged entry is data: reading it is what tells
        Ok((
            kind.unwrap_or(Kind::Data),
            (grains * self.geometry.grain - p.within).min(max),
        ))
    }

    /// The kind of the grain at `p` (`None`: damaged), and how many grains of this table go on like it within
    /// `max` sectors. With `adjacent`, data only goes on where the next grain follows in the file, and a
    /// compressed grain stands alone.
    fn stretch(&self, table: &Table, p: Position, max: u64, adjacent: bool) -> (Option<Kind>, u64) {
        let kind = |slot| match slot {
            GrainEntry::Unallocated => Some(Kind::Parent),
            GrainEntry::Zero => Some(Kind::Zero),
            GrainEntry::At(_) => Some(Kind::Data),
            GrainEntry::Bad => None,
        };
        let first = table.slot(p.entry);
        let wanted = (p.within + max).div_ceil(self.geometry.grain);
        let alone = first == GrainEntry::Bad
            || (adjacent && self.packing != Encoding::Plain && kind(first) == Some(Kind::Data));
        let most = if alone {
            1
        } else {
            wanted.min((table.len() - p.entry.min(table.len())) as u64).max(1)
        };
        let mut n = 1;
        while n < most {
            let goes_on = match (first, table.slot(p.entry + n as usize)) {
                (GrainEntry::At(a), GrainEntry::At(b)) => !adjacent || a + n * self.geometry.grain == b,
                (a, b) => kind(a) == kind(b),
            };
            if !goes_on {
                break;
            }
            n += 1;
        }
        (kind(first), n)
    }

    /// Sectors from `sector` on, at most `max`, that have no table, where it is known already that `sector` has none.
    /// It looks no further than [`ABSENT_CHUNKS`]: whoever wants to know more asks again.
    fn absent(&self, sector: u64, max: u64) -> Result<u64> {
        let coverage = self.geometry.coverage();
        let mut table = sector / coverage + 1;
        let end = (sector + max).min((table / CHUNK + ABSENT_CHUNKS) * CHUNK * coverage);
        if let Some(live) = &self.live {
            table += live.absent(table, end.div_ceil(coverage));
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

    /// What a damaged directory or table entry is, for messages of `--check`.
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

    /// A directory that somebody else writes: its tables are absent when it is read the first time, and there when it
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

    /// What was found to be absent stays so for the request, however the directory looks a moment later.
    #[test]
    fn regression_a_directory_that_changes_between_two_looks() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let file = open_user_path(
            file.path(),
            Arc::new(OpenPolicy {
                allow: Vec::new(),
                lock: true,
            }),
            Access::Read,
        )
        .unwrap();
        for sector in [0, 1, 1023] {
            // nothing fits this cache, so each look reads the directory
            let cache = TableCache::with_bytes(1);
            let layout = Arc::new(Growing::default());
            let extent = SparseExtent::new(1, Arc::clone(&file), layout, cache, Encoding::Plain);
            match extent.run_at(sector, 8 * 1024 - sector).unwrap() {
                Run::Parent { sectors } => assert_eq!(sectors, 1024 - sector),
                other => panic!("{other:?}"),
            }
        }
    }
}
