//! Metadata of a new hosted sparse file.
//!
//! ```text
//!   sector 0   header
//!          1   descriptor, if the file has one
//!              redundant directory · its tables · directory · its tables      contiguous; tables are holes
//!   overHead   first grain: the end of the metadata, rounded up to whole grains
//! ```

use crate::block::SECTOR;
use crate::error::{Error, ErrorKind, Result};
use crate::store::StoredWrite;
use crate::vmdk::header::{DirectoryAt, Hosted, MAX_DIRECTORY_ENTRIES};

/// Entries of a grain table: 512, which all programs expect.
pub(super) const ENTRIES: u64 = 512;
/// Sectors of a grain table of [`ENTRIES`] entries of 32 bits.
pub(super) const TABLE_SECTORS: u64 = ENTRIES * 4 / SECTOR;
/// Sectors that VMware reserves for an embedded descriptor.
pub(super) const DESCRIPTOR_SECTORS: u64 = 20;
/// Maximum number of sectors of a file: the 32-bit entries of tables and directories are sector numbers.
pub(super) const MAX_FILE_SECTORS: u64 = 1 << 32;

/// Number of directory entries per write: 256 KiB.
const WRITE_ENTRIES: u64 = 1 << 16;

/// Layout of a new file: the positions of its directories and tables.
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
    /// Computes the layout of a file for `sectors` sectors of the disk. `text` is the size of the embedded descriptor
    /// in bytes.
    ///
    /// Errors: `Usage` if tables with such grains cannot cover the disk.
    pub(super) fn new(sectors: u64, grain: u64, text: Option<usize>, zeroed_grains: bool) -> Result<Self> {
        let descriptor = text.map(|bytes| (1, (bytes as u64).div_ceil(SECTOR).max(DESCRIPTOR_SECTORS)));
        let tables = sectors.div_ceil(grain.saturating_mul(ENTRIES));
        let directory_sectors = (tables * 4).div_ceil(SECTOR);
        let redundant = descriptor.map_or(1, |(at, sectors)| at + sectors);
        let directory = redundant + directory_sectors + tables * TABLE_SECTORS;
        let end = directory + directory_sectors + tables * TABLE_SECTORS;
        let overhead = end.next_multiple_of(grain);
        if tables > MAX_DIRECTORY_ENTRIES || overhead + grain > MAX_FILE_SECTORS {
            return Err(Error::new(
                ErrorKind::Usage,
                format!(
                    "a sparse file with grains of {grain} sectors has tables for {} sectors at most, but the disk has {sectors}",
                    MAX_DIRECTORY_ENTRIES * grain * ENTRIES
                ),
            ));
        }
        // Zero grains came with version 2 of the format; version 1 is readable by the most programs.
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

    /// Returns the number of sectors of the disk that the file holds.
    pub(super) fn sectors(&self) -> u64 {
        self.header.capacity
    }

    /// Writes the metadata into an empty file, durably. The header is last, as the file is an image only with it.
    pub(super) fn write(&self, out: &dyn StoredWrite, text: Option<&[u8]>, magic: &[u8; 4]) -> Result<()> {
        // The tables become a hole of the file, which reads as "nothing is allocated".
        out.set_len(self.header.overhead * SECTOR)?;
        for at in [self.redundant, self.directory] {
            self.write_directory(out, at)?;
        }
        if let (Some(text), Some((at, _))) = (text, self.header.descriptor) {
            out.write_all_at(at * SECTOR, text)?;
        }
        // Everything the header points to is durable first, so a crash leaves no image with missing tables.
        out.sync()?;
        out.write_all_at(0, &self.header.to_bytes(magic))?;
        out.sync()
    }

    /// Writes the directory at sector `at`, whose tables follow it.
    fn write_directory(&self, out: &dyn StoredWrite, at: u64) -> Result<()> {
        let tables = self.header.tables();
        let first = at + self.directory_sectors;
        for start in (0..tables).step_by(WRITE_ENTRIES as usize) {
            let range = start..tables.min(start + WRITE_ENTRIES);
            // The cast does not truncate: `new` checked that the file ends below sector 2^32.
            let entries = range.flat_map(|table| ((first + table * TABLE_SECTORS) as u32).to_le_bytes());
            out.write_all_at(at * SECTOR + start * 4, &entries.collect::<Vec<_>>())?;
        }
        Ok(())
    }
}
