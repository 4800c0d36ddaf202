//! A plain file or block device as a disk.

use std::os::fd::BorrowedFd;
use std::sync::Arc;

use crate::block::{BlockRead, Content, Geometry, Lba, MAX_SECTORS, SECTOR, check_range};
use crate::error::{Error, Result};
use crate::store::StoredFile;

/// A raw image. Where its length is no multiple of 512, the rest of the last sector reads as zero.
#[derive(Debug)]
pub struct RawDisk {
    file: Arc<dyn StoredFile>,
    geometry: Geometry,
}

impl RawDisk {
    /// The whole of `file`.
    pub fn new(file: Arc<dyn StoredFile>) -> Result<Self> {
        let sectors = file.len().div_ceil(SECTOR);
        if sectors > MAX_SECTORS {
            return Err(Error::unsupported(format!("{}: longer than a disk can be", file.label())));
        }
        Ok(Self { file, geometry: Geometry { sectors, granule: 1, preferred: 1 } })
    }
}

impl BlockRead for RawDisk {
    fn geometry(&self) -> Geometry {
        self.geometry
    }

    fn read_at(&self, at: Lba, buf: &mut [u8]) -> Result<()> {
        check_range(&self.geometry, at, buf.len())?;
        let left = self.file.len().saturating_sub(at.bytes());
        let real = (buf.len() as u64).min(left) as usize;
        let (real, past) = buf.split_at_mut(real);
        past.fill(0);
        self.file.read_exact_at(at.bytes(), real)
    }

    fn content_at(&self, at: Lba) -> Result<(Content, u64)> {
        check_range(&self.geometry, at, SECTOR as usize)?;
        let (stored, bytes) = self.file.data_at(at.bytes())?;
        // a sector of which a part is stored is no hole
        let mixed = bytes < SECTOR && bytes < self.file.len().saturating_sub(at.bytes());
        let content = if stored || mixed { Content::Data } else { Content::Hole };
        Ok((content, (bytes / SECTOR).clamp(1, self.geometry.sectors - at.0)))
    }

    fn is_zero(&self, _at: Lba, _sectors: u64) -> bool {
        false
    }

    fn backing_fd(&self) -> Option<BorrowedFd<'_>> {
        self.file.fd().filter(|_| self.file.len() == self.geometry.bytes())
    }
}
