//! ESX sparse extents (COWD, `vmfsSparse`): one directory, tables of 4096 entries that are created on demand.
//!
//! Tables and grains follow the directory in any order; there is no redundant copy. Sector 1 lies inside of the header,
//! so an entry of 1 can only mean a zeroed grain.

use std::ops::Range;
use std::sync::Arc;

use crate::block::SECTOR;
use crate::error::{Error, Result};
use crate::store::StoredFile;
use crate::vmdk::header::Cowd;
use crate::vmdk::tables::{DirectoryEntry, GrainEntry, Layout, Table, TableGeometry};

/// Directory and tables of one COWD file.
#[derive(Debug)]
pub(crate) struct CowdTables {
    file: Arc<dyn StoredFile>,
    geometry: TableGeometry,
    file_sectors: u64,
    directory: u64,
    /// First sector after the directory.
    data: u64,
}

impl CowdTables {
    /// Creates the layout of `file`, whose checked header is `header`.
    ///
    /// Errors: `Corrupt` if the directory does not lie between the header and the end of the file.
    pub(crate) fn new(file: Arc<dyn StoredFile>, header: &Cowd) -> Result<Self> {
        /// Sectors of the header.
        const HEADER: u64 = 4;
        // Rounded up: the last grain may end inside of a sector; see `read_stored` in `disk.rs`.
        let file_sectors = file.len().div_ceil(SECTOR);
        let data = header.directory + (header.tables() * 4).div_ceil(SECTOR);
        if header.directory < HEADER || data > file_sectors {
            return Err(Error::corrupt(format!(
                "COWD header: the grain directory is at sectors {} to {data} (byte 20), expected sectors from {HEADER} to {file_sectors}, \
                 the end of the file",
                header.directory
            )));
        }
        let geometry = TableGeometry {
            capacity: header.capacity,
            grain: header.grain,
            entries_per_table: Cowd::ENTRIES_PER_TABLE,
        };
        Ok(Self {
            file,
            geometry,
            file_sectors,
            directory: header.directory,
            data,
        })
    }

    fn read_u32s(&self, offset: u64, count: u64) -> Result<Vec<u32>> {
        // At most a chunk of the directory or one table, so 16 KiB, whatever the image says.
        let mut bytes = vec![0; count as usize * 4];
        self.file.read_exact_at(offset, &mut bytes)?;
        Ok(bytes
            .chunks_exact(4)
            .map(|b| u32::from_le_bytes([b[0], b[1], b[2], b[3]]))
            .collect())
    }

    /// Returns the raw entry at a byte of the file as text for messages.
    fn entry_text(&self, at: u64) -> String {
        match self.read_u32s(at, 1).as_deref() {
            Ok([raw]) => format!("{raw:#x}"),
            _ => "unreadable".to_owned(),
        }
    }

    fn decode_directory_entry(&self, raw: u32) -> DirectoryEntry {
        match u64::from(raw) {
            0 => DirectoryEntry::Absent,
            // Tables and grains may lie anywhere behind the directory, and nowhere else. The sums fit: an entry has 32
            // bits.
            at if at >= self.data && at + self.table_sectors() <= self.file_sectors => DirectoryEntry::At(at),
            _ => DirectoryEntry::Bad,
        }
    }

    /// Decodes the entry of grain number `grain`.
    fn decode_entry(&self, raw: u32, grain: u64) -> GrainEntry {
        match u64::from(raw) {
            0 => GrainEntry::Unallocated,
            1 => GrainEntry::Zero,
            at if at >= self.data && at + self.geometry.grain_sectors(grain) <= self.file_sectors => GrainEntry::At(at),
            _ => GrainEntry::Bad,
        }
    }
}

impl Layout for CowdTables {
    fn geometry(&self) -> TableGeometry {
        self.geometry
    }

    fn table_sectors(&self) -> u64 {
        Cowd::ENTRIES_PER_TABLE * 4 / SECTOR
    }

    fn load_directory(&self, tables: Range<u64>) -> Result<Vec<DirectoryEntry>> {
        let raw = self.read_u32s(self.directory * SECTOR + tables.start * 4, tables.end - tables.start)?;
        Ok(raw.into_iter().map(|raw| self.decode_directory_entry(raw)).collect())
    }

    fn load_table(&self, table: u64, at: u64) -> Result<Table> {
        let first = table * self.geometry.entries_per_table;
        let inside = self
            .geometry
            .capacity
            .div_ceil(self.geometry.grain)
            .saturating_sub(first);
        // Only the entries inside of the capacity: the rest of the last table is not used.
        let count = self.geometry.entries_per_table.min(inside);
        let raw = self.read_u32s(at * SECTOR, count)?;
        Ok(Table::narrow(
            raw.into_iter()
                .enumerate()
                .map(|(i, raw)| self.decode_entry(raw, first + i as u64)),
        ))
    }

    fn explain_directory(&self, table: u64) -> Error {
        let at = self.directory * SECTOR + table * 4;
        Error::corrupt(format!(
            "grain directory entry {table} (byte {at}) is {}, expected the sector of a grain table inside of the file's {} sectors",
            self.entry_text(at),
            self.file_sectors
        ))
        .at_byte(at)
        .in_file(self.file.label())
    }

    fn explain_entry(&self, table: u64, entry: u64) -> Error {
        // Read again: a decoded table has no raw values left.
        let at = match self.load_directory(table..table + 1).as_deref() {
            Ok([DirectoryEntry::At(sector)]) => sector * SECTOR + entry * 4,
            _ => return self.explain_directory(table),
        };
        Error::corrupt(format!(
            "entry {entry} of grain table {table} (byte {at}) is {}, expected the sector of a grain inside of the file's {} sectors",
            self.entry_text(at),
            self.file_sectors
        ))
        .at_byte(at)
        .in_file(self.file.label())
    }
}
