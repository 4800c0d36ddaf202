//! The metadata of a new hosted sparse file.
//!
//! ```text
//!   sector 0   header
//!          1   descriptor, where it has one
//!              redundant directory · its tables · directory · its tables      one after the other, tables as holes
//!              up to a whole grain: overHead, where the first grain will lie
//! ```

use crate::block::SECTOR;
use crate::error::Result;
use crate::store::StoredWrite;
use crate::vmdk::header::{DirectoryAt, Hosted, MAX_DIRECTORY_ENTRIES};

/// Entries of a grain table; every program expects it so.
pub(in crate::vmdk) const ENTRIES: u64 = 512;
/// Sectors of a grain table of as many 32-bit entries.
pub(in crate::vmdk) const TABLE_SECTORS: u64 = ENTRIES * 4 / SECTOR;
/// Sectors that VMware keeps for an embedded descriptor.
pub(in crate::vmdk) const DESCRIPTOR_SECTORS: u64 = 20;
/// Entries of tables and directories are 32 bits: the most sectors of a file.
pub(in crate::vmdk) const MAX_FILE_SECTORS: u64 = 1 << 32;

/// Directory entries that are written at once.
const STEP: u64 = 1 << 16;

/// Where everything of a new file goes.
#[derive(Debug)]
pub(super) struct HostedLayout {
    header: Hosted,
    /// Sector of the redundant directory.
    redundant: u64,
    /// Sector of the primary directory.
    directory: u64,
    directory_sectors: u64,
}

impl HostedLayout {
    /// The layout of a file for `sectors` sectors; `text`: bytes of the descriptor in it.
    ///
    /// Errors: `Usage` where no tables of such grains can cover the disk.
    pub(super) fn new(sectors: u64, grain: u64, text: Option<usize>, zeroed_grains: bool) -> Result<Self> {
        let descriptor = text.map(|bytes| (1, (bytes as u64).div_ceil(SECTOR).max(DESCRIPTOR_SECTORS)));
        let tables = sectors.div_ceil(grain.saturating_mul(ENTRIES));
        let directory_sectors = (tables * 4).div_ceil(SECTOR);
        let redundant = descriptor.map_or(1, |(at, sectors)| at + sectors);
        let directory = redundant + directory_sectors + tables * TABLE_SECTORS;
        let end = directory + directory_sectors + tables * TABLE_SECTORS;
        let overhead = end.next_multiple_of(grain);
        if tables > MAX_DIRECTORY_ENTRIES || overhead + grain > MAX_FILE_SECTORS {
            return Err(super::usage(format!(
                "a sparse file with grains of {grain} sectors has tables for {} sectors at most, but the disk has {sectors}",
                MAX_DIRECTORY_ENTRIES * grain * ENTRIES
            )));
        }
        let header = Hosted {
            version: if zeroed_grains { 2 } else { 1 },
            capacity: sectors,
            grain,
            descriptor,
            entries_per_table: ENTRIES,
            redundant: Some(redundant),
            directory: DirectoryAt::Sector(directory),
            overhead,
            unclean: false,
            zeroed_grains,
            compressed: false,
            markers: false,
        };
        Ok(Self {
            header,
            redundant,
            directory,
            directory_sectors,
        })
    }

    /// Sectors of the disk that it holds.
    pub(super) fn sectors(&self) -> u64 {
        self.header.capacity
    }

    /// Writes all of it into an empty file, durably; the header last, as only that makes an image of it.
    pub(super) fn write(&self, out: &dyn StoredWrite, text: Option<&[u8]>, magic: &[u8; 4]) -> Result<()> {
        out.set_len(self.header.overhead * SECTOR)?;
        for at in [self.redundant, self.directory] {
            self.write_directory(out, at)?;
        }
        if let (Some(text), Some((at, _))) = (text, self.header.descriptor) {
            out.write_all_at(at * SECTOR, text)?;
        }
        out.sync()?;
        out.write_all_at(0, &self.header.to_bytes(magic))?;
        out.sync()
    }

    /// The directory at sector `at`, whose tables follow it.
    fn write_directory(&self, out: &dyn StoredWrite, at: u64) -> Result<()> {
        let tables = self.header.tables();
        let first = at + self.directory_sectors;
        for start in (0..tables).step_by(STEP as usize) {
            let range = start..tables.min(start + STEP);
            // below 2^32, as `new` checked the end of all
            let entries = range.flat_map(|table| ((first + table * TABLE_SECTORS) as u32).to_le_bytes());
            out.write_all_at(at * SECTOR + start * 4, &entries.collect::<Vec<_>>())?;
        }
        Ok(())
    }
}
