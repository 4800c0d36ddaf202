//! Hosted sparse extents (KDMV): directory and tables of 32-bit entries, and a redundant copy of both.
//!
//! The primary copy is the one that is read, as other programs do. If an entry of it can't be right (outside of the
//! file, or inside of the metadata), or if a directory entry is 0 and the redundant one is good, the redundant entry is
//! used instead. This only affects reads; the file is not changed, and the first such case is logged.
//!
//! Streams (`streamOptimized`) have the same tables; their entries name compressed grains.
//!
//! All methods may be called while the extent is written to: only `file_sectors` changes, and only grows.

use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use crate::block::SECTOR;
use crate::error::{Error, Result};
use crate::store::StoredFile;
use crate::vmdk::header::{DirectoryAt, Hosted};
use crate::vmdk::tables::{DirectoryEntry, GrainEntry, Layout, Table, TableGeometry};

/// Directory and tables of one hosted sparse file.
#[derive(Debug)]
pub(crate) struct HostedTables {
    file: Arc<dyn StoredFile>,
    geometry: TableGeometry,
    /// True if an entry of 1 means a zeroed grain. Set once, before the first such entry is published.
    zeroed_grains: AtomicBool,
    compressed: bool,
    version: u32,
    /// Sectors of the file, the last one perhaps only in part. Grows while the extent is written to.
    file_sectors: AtomicU64,
    /// Sectors of metadata at the front, from the header.
    overhead: u64,
    /// Sector of the primary directory.
    directory: u64,
    /// Sector of the redundant directory, if there is one inside of the file.
    redundant: Option<u64>,
    /// Sectors that no grain and no table may overlap: header, descriptor, directories.
    fixed: Vec<Range<u64>>,
    redundant_is_lost: bool,
    /// True once the use of the redundant copy was logged.
    warned_redundant: AtomicBool,
}

/// Copy of the directory and the tables.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Copy {
    Primary,
    Redundant,
}

impl HostedTables {
    /// Creates the layout of `file`, whose checked header (or footer) is `header`.
    ///
    /// Errors: `Corrupt` if no directory lies inside of the file.
    pub(crate) fn new(file: Arc<dyn StoredFile>, header: &Hosted) -> Result<Self> {
        let file_sectors = file.len().div_ceil(SECTOR);
        let directory_sectors = (header.tables() * 4).div_ceil(SECTOR);
        // Sector 0 is the header.
        let inside = |at: u64| at >= 1 && at.checked_add(directory_sectors).is_some_and(|end| end <= file_sectors);
        let DirectoryAt::Sector(directory) = header.directory else {
            return Err(Error::corrupt(
                "header: gdOffset (byte 56) is GD_AT_END in an extent without a footer",
            ));
        };
        let redundant = header.redundant.filter(|&at| inside(at));
        // If the primary directory lies outside of the file, the redundant one takes its place and has no copy.
        let (directory, redundant) = match redundant {
            Some(spare) if !inside(directory) => {
                tracing::warn!(
                    "{}: the grain directory at sector {directory} lies outside of the file's {file_sectors} sectors; \
                     reading the redundant one",
                    file.label()
                );
                (spare, None)
            }
            _ => (directory, redundant),
        };
        if !inside(directory) {
            return Err(Error::corrupt(format!(
                "header: the grain directory is {directory_sectors} sectors at sector {directory} (byte 56), expected it \
                 inside of the file's {file_sectors} sectors"
            )));
        }
        // Without the `overhead` of the header: it is advisory, and a grain in front of it may be valid.
        let mut fixed = vec![0..1, directory..directory + directory_sectors];
        fixed.extend(redundant.map(|at| at..at + directory_sectors));
        fixed.extend(header.descriptor.map(|(at, n)| at..at + n));
        Ok(Self {
            geometry: TableGeometry {
                capacity: header.capacity,
                grain: header.grain,
                entries_per_table: header.entries_per_table,
            },
            zeroed_grains: header.zeroed_grains.into(),
            compressed: header.compressed,
            version: header.version,
            file_sectors: file_sectors.into(),
            overhead: header.overhead,
            directory,
            redundant,
            fixed,
            file,
            redundant_is_lost: header.redundant.is_some() && redundant.is_none(),
            warned_redundant: AtomicBool::new(false),
        })
    }

    /// Returns the version in the header.
    pub(crate) fn version(&self) -> u32 {
        self.version
    }

    /// Returns true if an entry of 1 means a zeroed grain.
    pub(crate) fn has_zeroed_grains(&self) -> bool {
        self.zeroed_grains.load(Ordering::Acquire)
    }

    /// Notes that the header in the file has the flag of zeroed grains now, durably.
    pub(crate) fn enabled_zeroed_grains(&self) {
        self.zeroed_grains.store(true, Ordering::Release);
    }

    /// Returns the sector of a directory, or `None` if there is no redundant one.
    pub(crate) fn directory(&self, copy: Copy) -> Option<u64> {
        match copy {
            Copy::Primary => Some(self.directory),
            Copy::Redundant => self.redundant,
        }
    }

    /// Notes that the file has at least `sectors` now. Must be called before an entry names one of the new sectors.
    pub(crate) fn grew_to(&self, sectors: u64) {
        self.file_sectors.fetch_max(sectors, Ordering::AcqRel);
    }

    fn file_sectors(&self) -> u64 {
        self.file_sectors.load(Ordering::Acquire)
    }

    /// Returns true if the header names a redundant directory that does not lie inside of the file.
    pub(crate) fn redundant_is_lost(&self) -> bool {
        self.redundant_is_lost
    }

    /// Returns true if the header names a redundant directory that lies inside of the file.
    pub(crate) fn has_redundant(&self) -> bool {
        self.redundant.is_some()
    }

    /// Reads the raw directory entries of one copy. Empty if there is no such copy.
    pub(crate) fn raw_directory(&self, copy: Copy, tables: Range<u64>) -> Result<Vec<u32>> {
        match self.directory(copy) {
            Some(at) => self.read_u32s(at * SECTOR + tables.start * 4, tables.end - tables.start),
            None => Ok(Vec::new()),
        }
    }

    /// Reads the raw entries of the table at sector `at`.
    pub(crate) fn raw_table(&self, at: u64) -> Result<Vec<u32>> {
        self.read_u32s(at * SECTOR, self.geometry.entries_per_table)
    }

    /// Returns true if a table may start at this sector: inside of the file and outside of the fixed metadata.
    pub(crate) fn table_fits(&self, at: u64) -> bool {
        let end = at + self.table_sectors();
        end <= self.file_sectors() && !self.in_fixed(at..end)
    }

    /// Returns the sectors of header, descriptor and directories.
    pub(crate) fn fixed(&self) -> &[Range<u64>] {
        &self.fixed
    }

    /// Returns the first sector after the metadata at the front of the file, from the header.
    pub(crate) fn data_start(&self) -> u64 {
        self.overhead
    }

    /// Decodes `raw`, the entry of grain number `grain`. `own` are the sectors of the copies of its table, which the
    /// grain must not overlap.
    pub(crate) fn decode_entry(&self, raw: u32, grain: u64, own: &[u64]) -> GrainEntry {
        match raw {
            0 => GrainEntry::Unallocated,
            1 if self.has_zeroed_grains() => GrainEntry::Zero,
            // A grain never starts at sector 1, even if the metadata lie elsewhere.
            1 => GrainEntry::Bad,
            raw if self.grain_fits(raw.into(), grain, own) => GrainEntry::At(raw.into()),
            _ => GrainEntry::Bad,
        }
    }

    /// Returns true if the grain may start at sector `at`: inside of the file, outside of the fixed metadata and of its
    /// own table. Overlaps with other tables are only found by `--check`.
    fn grain_fits(&self, at: u64, grain: u64, own: &[u64]) -> bool {
        // The length of a compressed grain is in its header. Here only its first sector is known to be its own.
        let sectors = if self.compressed {
            1
        } else {
            self.geometry.grain_sectors(grain)
        };
        let range = at..at + sectors;
        let own_table = |&t: &u64| t < range.end && range.start < t + self.table_sectors();
        range.end <= self.file_sectors() && !self.in_fixed(range.clone()) && !own.iter().any(own_table)
    }

    fn in_fixed(&self, range: Range<u64>) -> bool {
        self.fixed.iter().any(|f| f.start < range.end && range.start < f.end)
    }

    fn read_u32s(&self, offset: u64, count: u64) -> Result<Vec<u32>> {
        let mut bytes = vec![0; count as usize * 4];
        self.file.read_exact_at(offset, &mut bytes)?;
        Ok(bytes
            .chunks_exact(4)
            .map(|b| u32::from_le_bytes([b[0], b[1], b[2], b[3]]))
            .collect())
    }

    /// Returns the sector of the redundant copy of `table`, if its directory entry is good.
    fn redundant_place(&self, table: u64) -> Result<Option<u64>> {
        // Read for each call: the redundant directory is only needed for damage, so it is not kept.
        let raw = self.raw_directory(Copy::Redundant, table..table + 1)?;
        Ok(raw
            .first()
            .map(|&at| at.into())
            .filter(|&at| at != 0 && self.table_fits(at)))
    }

    /// Logs, once for this file, that a redundant copy is used in place of `what`.
    fn warn_redundant(&self, what: &str) {
        if !self.warned_redundant.swap(true, Ordering::Relaxed) {
            tracing::warn!("{}: {what} is damaged; reading the redundant copy", self.file.label());
        }
    }
}

impl Layout for HostedTables {
    fn geometry(&self) -> TableGeometry {
        self.geometry
    }

    fn table_sectors(&self) -> u64 {
        (self.geometry.entries_per_table * 4).div_ceil(SECTOR)
    }

    fn load_directory(&self, tables: Range<u64>) -> Result<Vec<DirectoryEntry>> {
        // An error of one copy is no error as long as the other copy can be read.
        let redundant = self.raw_directory(Copy::Redundant, tables.clone());
        let (primary, redundant) = match (self.raw_directory(Copy::Primary, tables), redundant) {
            (Ok(primary), redundant) => (primary, redundant.unwrap_or_default()),
            (Err(_), Ok(spare)) if !spare.is_empty() => {
                self.warn_redundant("the grain directory can't be read and");
                (spare, Vec::new())
            }
            (Err(e), _) => return Err(e),
        };
        let good = |raw: u32| raw != 0 && self.table_fits(raw.into());
        let places = primary.iter().enumerate().map(|(i, &raw)| {
            let spare = redundant.get(i).copied().unwrap_or(0);
            if good(raw) {
                DirectoryEntry::At(raw.into())
            } else if good(spare) {
                self.warn_redundant("an entry of the grain directory");
                DirectoryEntry::At(spare.into())
            } else if raw == 0 {
                DirectoryEntry::Absent
            } else {
                DirectoryEntry::Bad
            }
        });
        Ok(places.collect())
    }

    fn load_table(&self, table: u64, at: u64) -> Result<Table> {
        let raw = match self.raw_table(at) {
            Ok(raw) => raw,
            Err(e) => match self.redundant_place(table)?.filter(|&spare| spare != at) {
                Some(spare) => {
                    self.warn_redundant("a grain table can't be read and");
                    self.raw_table(spare)?
                }
                None => return Err(e),
            },
        };
        let first = table * self.geometry.entries_per_table;
        let mut entries: Vec<GrainEntry> = raw
            .iter()
            .enumerate()
            .map(|(i, &raw)| self.decode_entry(raw, first + i as u64, &[at]))
            .collect();
        let inside = self
            .geometry
            .capacity
            .div_ceil(self.geometry.grain)
            .saturating_sub(first);
        // The last table may have entries beyond the capacity. They are not used, and may hold anything.
        entries.truncate(inside as usize);
        // The redundant table is only read if it is needed.
        if entries.contains(&GrainEntry::Bad)
            && let Some(spare_at) = self.redundant_place(table)?
        {
            let spare = self.raw_table(spare_at)?;
            for (i, entry) in entries.iter_mut().enumerate().filter(|(_, e)| **e == GrainEntry::Bad) {
                let other = spare.get(i).map_or(GrainEntry::Bad, |&raw| {
                    self.decode_entry(raw, first + i as u64, &[at, spare_at])
                });
                // The damaged entry named a grain. An unallocated one in its place would silently show the parent's
                // data.
                if let GrainEntry::At(_) | GrainEntry::Zero = other {
                    self.warn_redundant("an entry of a grain table");
                    *entry = other;
                }
            }
        }
        Ok(Table::narrow(entries.into_iter()))
    }

    fn explain_directory(&self, table: u64) -> Error {
        let at = self.directory * SECTOR + table * 4;
        let raw = self
            .raw_directory(Copy::Primary, table..table + 1)
            .ok()
            .and_then(|d| d.first().copied());
        let raw = raw.map_or_else(|| "unreadable".to_owned(), |raw| format!("{raw:#x}"));
        Error::corrupt(format!(
            "grain directory entry {table} (byte {at}) is {raw}, expected the sector of a grain table inside of the file's {} sectors and outside of its header and directories",
            self.file_sectors()
        ))
        .at_byte(at)
        .in_file(self.file.label())
    }

    fn explain_entry(&self, table: u64, entry: u64) -> Error {
        // Read again: a decoded table has no raw values left.
        let place = match self.load_directory(table..table + 1).as_deref() {
            Ok([DirectoryEntry::At(sector)]) => *sector,
            _ => return self.explain_directory(table),
        };
        let at = place * SECTOR + entry * 4;
        let mut raw = [0; 4];
        let value = match self.file.read_exact_at(at, &mut raw) {
            Ok(()) => format!("{:#x}", u32::from_le_bytes(raw)),
            Err(e) => format!("unreadable ({e})"),
        };
        Error::corrupt(format!(
            "entry {entry} of grain table {table} (byte {at}) is {value}, expected the sector of a grain inside of the file's {} sectors and outside of its metadata",
            self.file_sectors()
        ))
        .at_byte(at)
        .in_file(self.file.label())
    }
}
