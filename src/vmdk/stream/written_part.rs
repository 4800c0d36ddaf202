//! Part of a stream that is in its file: compressed grains, and the tables that find them.

use std::ops::Range;
use std::sync::Arc;

use libdeflater::Decompressor;

use super::packed_grain::{GRAIN, GRAIN_BYTES, GRAIN_HEADER, compress};
use crate::block::SECTOR;
use crate::error::{Error, ErrorKind, Result};
use crate::store::{StoredFile, writer};
use crate::vmdk::header::{DirectoryAt, Hosted, KDMV_MAGIC, KDMV_UNFINISHED, MAX_DIRECTORY_ENTRIES};
use crate::vmdk::hosted_layout::{DESCRIPTOR_SECTORS, ENTRIES, MAX_FILE_SECTORS, TABLE_SECTORS};

// Types of markers, as the format numbers them.
const MARK_TABLE: u32 = 1;
const MARK_DIRECTORY: u32 = 2;
const MARK_FOOTER: u32 = 3;

/// Part of the stream that is in the file, compressed. A change is made on a clone where a failure has to undo it.
#[derive(Debug, Clone)]
pub(super) struct WrittenPart {
    pub(super) file: Arc<dyn StoredFile>,
    header: Hosted,
    /// Number of sectors of the file in use; the next grain is written there.
    pub(super) end: u64,
    /// Directory entries of the grain tables that are in the file; 0 for a table without grains.
    directory: Vec<u32>,
    /// Entries so far of the grain table after those, which is in memory only.
    table: Vec<u32>,
}

/// Lengths and current table of a [`WrittenPart`] before an append, to undo the append.
pub(super) struct Position {
    end: u64,
    tables: usize,
    table: Vec<u32>,
}

impl WrittenPart {
    /// Writes the start of a stream into the empty `file`: header and descriptor, durably.
    ///
    /// Errors: `Usage` if the grain tables cannot cover the size, otherwise the error of the system call.
    pub(super) fn start(file: Arc<dyn StoredFile>, sectors: u64, text: &[u8]) -> Result<Self> {
        let descriptor_sectors = (text.len() as u64).div_ceil(SECTOR).max(DESCRIPTOR_SECTORS);
        // A grain may start at any sector. VMware's streams begin them at 128, and so do these.
        let overhead = (1 + descriptor_sectors).next_multiple_of(GRAIN);
        let header = Hosted {
            version: 3,
            capacity: sectors,
            grain: GRAIN,
            descriptor: Some((1, descriptor_sectors)),
            entries_per_table: ENTRIES,
            redundant: None,
            directory: DirectoryAt::Footer,
            overhead,
            unclean: false,
            zeroed_grains: false,
            compressed: true,
            markers: true,
        };
        if header.tables() > MAX_DIRECTORY_ENTRIES {
            let most = MAX_DIRECTORY_ENTRIES * GRAIN * ENTRIES;
            return Err(Error::new(
                ErrorKind::Usage,
                format!(
                    "a stream has tables for {most} sectors at most, but the disk has {sectors}: choose another create-type"
                ),
            ));
        }
        let out = writer(&*file)?;
        out.set_len(overhead * SECTOR)?;
        out.write_all_at(0, &header.to_bytes(KDMV_UNFINISHED))?;
        out.write_all_at(SECTOR, text)?;
        out.sync()?;
        Ok(Self {
            file,
            header,
            end: overhead,
            directory: Vec::new(),
            table: Vec::new(),
        })
    }

    /// Returns where the next append begins, to undo it.
    pub(super) fn position(&self) -> Position {
        Position {
            end: self.end,
            tables: self.directory.len(),
            table: self.table.clone(),
        }
    }

    /// Undoes the appends since `to`. The file keeps the bytes, and the next append overwrites them.
    pub(super) fn roll_back(&mut self, to: Position) {
        self.end = to.end;
        self.directory.truncate(to.tables);
        self.table = to.table;
    }

    /// Compresses grains from number `first` on, and writes them with the grain tables that they complete. `kept` sectors
    /// that tables can address stay free.
    pub(super) fn append(&mut self, first: u64, bytes: &[u8], kept: u64) -> Result<()> {
        let compressed = compress(first, bytes)?;
        let mut out = Vec::with_capacity(compressed.iter().map(Vec::len).sum::<usize>() + GRAIN_BYTES);
        // Grains and tables are collected in memory, so that one write appends them all.
        let start = self.end;
        for (grain, body) in (first..).zip(compressed) {
            if body.is_empty() {
                continue;
            }
            self.tables_before(grain / ENTRIES, &mut out)?;
            self.table.resize((grain % ENTRIES) as usize, 0);
            self.table.push(self.next_sector(kept)?);
            self.append_padded(&body, &mut out);
        }
        writer(&*self.file)?.write_all_at(start * SECTOR, &out)
    }

    /// Appends the current grain table to `out`. The tables between it and table `number` are empty: each gets a
    /// directory entry of 0.
    fn tables_before(&mut self, number: u64, out: &mut Vec<u8>) -> Result<()> {
        while (self.directory.len() as u64) < number {
            if self.table.is_empty() {
                self.directory.push(0);
                continue;
            }
            self.append_padded(&marker(TABLE_SECTORS, MARK_TABLE), out);
            let at = self.next_sector(0)?;
            self.directory.push(at);
            let mut table = std::mem::take(&mut self.table);
            table.resize(ENTRIES as usize, 0);
            self.append_padded(&le_bytes(&table), out);
        }
        Ok(())
    }

    /// Appends bytes to `out`, padded with zeroes to whole sectors.
    fn append_padded(&mut self, bytes: &[u8], out: &mut Vec<u8>) {
        out.extend_from_slice(bytes);
        out.resize(out.len().next_multiple_of(SECTOR as usize), 0);
        self.end += (bytes.len() as u64).div_ceil(SECTOR);
    }

    /// Returns the sector of the next append.
    ///
    /// Errors: `ENOSPC` if table entries of 32 bits cannot address it and `kept` sectors after it.
    fn next_sector(&self, kept: u64) -> Result<u32> {
        let full = || {
            let context = format!(
                "{}: the stream has reached {MAX_FILE_SECTORS} sectors, the most that its tables can address",
                self.file.label()
            );
            Error::new(ErrorKind::Os(libc::ENOSPC), context)
        };
        u32::try_from(self.end)
            .ok()
            .filter(|_| self.end + kept < MAX_FILE_SECTORS)
            .ok_or_else(full)
    }

    /// Writes the end of the stream: the last tables, the directory, the footer and the end-of-stream marker.
    pub(super) fn finish(&mut self) -> Result<()> {
        let start = self.end;
        let mut out = Vec::new();
        self.tables_before(self.header.tables(), &mut out)?;
        let directory = le_bytes(&self.directory);
        self.append_padded(
            &marker((directory.len() as u64).div_ceil(SECTOR), MARK_DIRECTORY),
            &mut out,
        );
        let at = u64::from(self.next_sector(0)?);
        self.append_padded(&directory, &mut out);
        self.append_padded(&marker(1, MARK_FOOTER), &mut out);
        let footer = Hosted {
            directory: DirectoryAt::Sector(at),
            ..self.header.clone()
        };
        self.append_padded(&footer.to_bytes(KDMV_MAGIC), &mut out);
        // The marker of the end: one of type 0 is a sector of zeroes.
        self.append_padded(&[0; SECTOR as usize], &mut out);
        let file = writer(&*self.file)?;
        file.write_all_at(start * SECTOR, &out)?;
        // Readers find the footer from the end of the file, so the leftovers of an earlier attempt have to go.
        file.set_len(self.end * SECTOR)
    }

    /// Returns the table entry of a grain: its sector in the file, or 0 if the file does not have it.
    fn entry(&self, grain: u64) -> Result<u32> {
        let (table, entry) = (grain / ENTRIES, grain % ENTRIES);
        match self.directory.get(table as usize) {
            Some(0) => Ok(0),
            Some(&at) => {
                let mut raw = [0; 4];
                self.file.read_exact_at(u64::from(at) * SECTOR + entry * 4, &mut raw)?;
                Ok(u32::from_le_bytes(raw))
            }
            None if table == self.directory.len() as u64 => Ok(self.table.get(entry as usize).copied().unwrap_or(0)),
            None => Ok(0),
        }
    }

    /// Returns true if the grain is in the file, and the number of grains from it on for which the answer holds.
    pub(super) fn content(&self, grain: u64) -> Result<(bool, u64)> {
        match self.directory.get((grain / ENTRIES) as usize) {
            // Without a table the answer holds up to the end of the range that the table would cover.
            Some(0) => Ok((false, ENTRIES - grain % ENTRIES)),
            _ => Ok((self.entry(grain)? != 0, 1)),
        }
    }

    /// Returns true if any of these grains is in the file. A table in the file names at least one grain, so the search
    /// ends soon.
    pub(super) fn holds(&self, grains: Range<u64>) -> Result<bool> {
        let mut grain = grains.start;
        while grain < grains.end {
            let (stored, grains) = self.content(grain)?;
            if stored {
                return Ok(true);
            }
            grain += grains;
        }
        Ok(false)
    }

    /// Returns the bytes of a grain; zeroes if the file does not have it.
    ///
    /// Errors: `Corrupt` if the compressed grain is damaged.
    pub(super) fn read(&self, grain: u64) -> Result<Vec<u8>> {
        let mut whole = vec![0; GRAIN_BYTES];
        let sector = self.entry(grain)?;
        if sector == 0 {
            return Ok(whole);
        }
        let at = u64::from(sector) * SECTOR;
        let mut header = [0; GRAIN_HEADER];
        self.file.read_exact_at(at, &mut header)?;
        let [_, _, _, _, _, _, _, _, size @ ..] = header;
        let size = u32::from_le_bytes(size) as usize;
        let damaged = || {
            let label = self.file.label();
            Error::corrupt(format!(
                "{label}: grain {grain} at byte {at} differs from what was written there: another process changed the file"
            ))
        };
        // The size comes from the file: it is bounded before it becomes an allocation.
        if size > 2 * GRAIN_BYTES {
            return Err(damaged());
        }
        let mut body = vec![0; size];
        self.file.read_exact_at(at + GRAIN_HEADER as u64, &mut body)?;
        match Decompressor::new().zlib_decompress(&body, &mut whole) {
            Ok(GRAIN_BYTES) => Ok(whole),
            _ => Err(damaged()),
        }
    }
}

/// Returns the bytes of a marker: the number of sectors that follow it, and their type.
fn marker(sectors: u64, kind: u32) -> Vec<u8> {
    [sectors.to_le_bytes().as_slice(), &[0; 4], &kind.to_le_bytes()].concat()
}

fn le_bytes(entries: &[u32]) -> Vec<u8> {
    entries.iter().flat_map(|entry| entry.to_le_bytes()).collect()
}
