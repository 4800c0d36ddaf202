//! seSparse extents, the deltas of VMFS 6: 64-bit entries with a type in the top nibble, 4 KiB grains.
//!
//! Read-only on purpose: a write would have to keep a free bitmap, a back map and a journal consistent, and none of
//! them is documented.

use std::ops::Range;
use std::sync::Arc;

use crate::block::SECTOR;
use crate::error::{Error, Result};
use crate::store::StoredFile;
use crate::vmdk::header::SeSparse;
use crate::vmdk::tables::{DirectoryEntry, GrainEntry, Layout, Table, TableGeometry};

/// Directory and tables of one seSparse file.
#[derive(Debug)]
pub(crate) struct SeSparseTables {
    file: Arc<dyn StoredFile>,
    header: SeSparse,
    file_sectors: u64,
}

/// Position of the type, the top nibble of an entry.
const TYPE_SHIFT: u32 = 60;
const TYPE_MASK: u64 = 0xf << TYPE_SHIFT;

impl SeSparseTables {
    /// Creates the layout of `file`, whose checked header is `header`.
    pub(crate) fn new(file: Arc<dyn StoredFile>, header: SeSparse) -> Self {
        // Rounded down: a grain must lie in the file with all its bytes.
        let file_sectors = file.len() / SECTOR;
        Self {
            file,
            header,
            file_sectors,
        }
    }

    fn read_u64s(&self, offset: u64, count: u64) -> Result<Vec<u64>> {
        let mut bytes = vec![0; count as usize * 8];
        self.file.read_exact_at(offset, &mut bytes)?;
        let word = |b: &[u8]| u64::from_le_bytes([b[0], b[1], b[2], b[3], b[4], b[5], b[6], b[7]]);
        Ok(bytes.chunks_exact(8).map(word).collect())
    }

    /// Returns the raw entry at a byte of the file as text for messages.
    fn entry_text(&self, at: u64) -> String {
        match self.read_u64s(at, 1).as_deref() {
            Ok([raw]) => format!("{raw:#x}"),
            _ => "unreadable".to_owned(),
        }
    }

    /// Decodes a directory entry: 0, or 0x10000000 in the high half and a table index in the low one.
    fn decode_directory_entry(&self, raw: u64) -> DirectoryEntry {
        const ALLOCATED: u64 = 0x1000_0000;
        if raw == 0 {
            return DirectoryEntry::Absent;
        }
        let index = raw & 0xffff_ffff;
        if raw >> 32 == ALLOCATED && index < self.header.tables_size / SeSparse::TABLE_SECTORS {
            DirectoryEntry::At(self.header.tables_offset + index * SeSparse::TABLE_SECTORS)
        } else {
            DirectoryEntry::Bad
        }
    }

    /// Decodes a grain entry by its type.
    fn decode_entry(&self, raw: u64) -> GrainEntry {
        match raw >> TYPE_SHIFT {
            // Type 0 with other bits set is not defined.
            0 if raw == 0 => GrainEntry::Unallocated,
            // 1: discarded by the guest, with the number of the old grain for reclaiming. 2: zeroed.
            1 | 2 => GrainEntry::Zero,
            3 => self.decode_grain(raw & !TYPE_MASK),
            _ => GrainEntry::Bad,
        }
    }

    /// Decodes the grain's index, which lies in two pieces: its low 12 bits in bits 48 to 59 of the entry, the rest in
    /// bits 0 to 47.
    fn decode_grain(&self, bits: u64) -> GrainEntry {
        const LOW_BITS: u32 = 12;
        let index = bits >> 48 | (bits & ((1 << 48) - 1)) << LOW_BITS;
        let sector = index
            .checked_mul(SeSparse::GRAIN)
            .and_then(|s| s.checked_add(self.header.grains_offset));
        match sector {
            Some(s)
                if s.checked_add(SeSparse::GRAIN)
                    .is_some_and(|end| end <= self.file_sectors) =>
            {
                GrainEntry::At(s)
            }
            _ => GrainEntry::Bad,
        }
    }
}

impl Layout for SeSparseTables {
    fn geometry(&self) -> TableGeometry {
        TableGeometry {
            capacity: self.header.capacity,
            grain: SeSparse::GRAIN,
            entries_per_table: SeSparse::ENTRIES_PER_TABLE,
        }
    }

    fn table_sectors(&self) -> u64 {
        SeSparse::TABLE_SECTORS
    }

    fn load_directory(&self, tables: Range<u64>) -> Result<Vec<DirectoryEntry>> {
        let raw = self.read_u64s(
            self.header.directory * SECTOR + tables.start * 8,
            tables.end - tables.start,
        )?;
        Ok(raw.into_iter().map(|raw| self.decode_directory_entry(raw)).collect())
    }

    fn load_table(&self, _table: u64, at: u64) -> Result<Table> {
        // The last table is read whole too: `decode_directory_entry` only returns tables that lie inside of the region
        // of tables, and `check_regions` has found that region inside of the file.
        let raw = self.read_u64s(at * SECTOR, SeSparse::ENTRIES_PER_TABLE)?;
        Ok(Table::wide(raw.into_iter().map(|raw| self.decode_entry(raw))))
    }

    fn explain_directory(&self, table: u64) -> Error {
        let at = self.header.directory * SECTOR + table * 8;
        Error::corrupt(format!(
            "grain directory entry {table} (byte {at}) is {}, expected 0x10000000 and the number of one of {} tables",
            self.entry_text(at),
            self.header.tables_size / SeSparse::TABLE_SECTORS
        ))
        .at_byte(at)
        .in_file(self.file.label())
    }

    fn explain_entry(&self, table: u64, entry: u64) -> Error {
        let at = match self.load_directory(table..table + 1).as_deref() {
            Ok([DirectoryEntry::At(sector)]) => sector * SECTOR + entry * 8,
            _ => return self.explain_directory(table),
        };
        Error::corrupt(format!(
            "entry {entry} of grain table {table} (byte {at}) is {}, expected a type from 0 to 3 and a grain inside of the file's {} sectors",
            self.entry_text(at),
            self.file_sectors
        ))
        .at_byte(at)
        .in_file(self.file.label())
    }
}
