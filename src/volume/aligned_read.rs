//! Read of bytes as a read of whole granules.

use super::out_of_range;
use super::read_buffer::MAX_READ;
use crate::block::{BlockRead, Geometry, Lba, SECTOR};
use crate::error::Result;

/// Length of a read, in bytes, from which on a query for zeroes is cheaper than filling a buffer with them.
const ZERO_QUERY_MIN: usize = 16 << 10;

/// Granules that hold the bytes of a read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct AlignedRead {
    /// First sector of the granules.
    pub(super) start: Lba,
    /// Number of their sectors. The last granule may be cut by the end of the disk.
    pub(super) sectors: u64,
    /// Offset of the read in bytes.
    offset: u64,
    /// Bytes of the granules before the read.
    skip: usize,
    /// Bytes of the read.
    len: usize,
}

impl AlignedRead {
    /// Aligns a read of `len` bytes from `offset` on: at most [`MAX_READ`], fewer at the end of the disk. Returns `None` if
    /// there are none to read.
    pub(super) fn of(geometry: Geometry, offset: u64, len: usize) -> Option<Self> {
        let left = usize::try_from(geometry.bytes().saturating_sub(offset)).unwrap_or(usize::MAX);
        let len = len.min(MAX_READ).min(left);
        if len == 0 {
            return None;
        }
        let granule = geometry.granule * SECTOR;
        let start = offset / granule * granule;
        let end = (offset + len as u64).next_multiple_of(granule).min(geometry.bytes());
        Some(Self {
            start: Lba(start / SECTOR),
            sectors: (end - start) / SECTOR,
            offset,
            skip: (offset - start) as usize,
            len,
        })
    }

    /// Returns the number of bytes of the read.
    pub(super) fn len(&self) -> usize {
        self.len
    }

    /// Returns the number of bytes of the granules.
    pub(super) fn granule_bytes(&self) -> usize {
        (self.sectors * SECTOR) as usize
    }

    /// Returns true if the read is one of whole granules.
    pub(super) fn is_whole(&self) -> bool {
        self.skip == 0 && self.len == self.granule_bytes()
    }

    /// Returns true if the disk knows without I/O that it would read zeroes. A hole costs no copy this way; for short reads
    /// the query would cost more than it saves, and it is not asked.
    pub(super) fn is_zero(&self, disk: &dyn BlockRead) -> bool {
        self.len >= ZERO_QUERY_MIN && disk.is_zero(self.start, self.sectors)
    }

    /// Returns the bytes of the read in those of the granules.
    pub(super) fn part<'b>(&self, bytes: &'b [u8]) -> Result<&'b [u8]> {
        bytes
            .get(self.skip..self.skip + self.len)
            .ok_or_else(|| out_of_range(self.offset))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_granules_of_a_read_hold_its_bytes_and_end_with_the_disk() {
        // 21 sectors in granules of 8: the last granule has 5.
        let geometry = |sectors| Geometry {
            sectors,
            granule: 8,
            preferred: 8,
        };
        let read = |offset, len| AlignedRead::of(geometry(21), offset, len);
        for (offset, len, start, sectors, got) in [
            (0, 1, 0, 8, 1),
            (4096, 4096, 8, 8, 4096),
            (4000, 200, 0, 16, 200),
            (8192, 9999, 16, 5, 5 * 512),
            (21 * 512 - 1, 2, 16, 5, 1),
        ] {
            let read = read(offset, len).unwrap();
            assert_eq!((read.start, read.sectors, read.len()), (Lba(start), sectors, got));
            assert_eq!(read.is_whole(), got as u64 == sectors * SECTOR, "{offset} {len}");
            let bytes: Vec<u8> = (0..read.granule_bytes()).map(|n| (n / 256) as u8).collect();
            let skip = (offset - start * SECTOR) as usize;
            assert_eq!(read.part(&bytes).unwrap(), &bytes[skip..skip + got]);
            assert!(read.part(&bytes[..skip]).is_err());
        }
        for (offset, len) in [(21 * 512, 1), (u64::MAX, 1), (0, 0)] {
            assert_eq!(read(offset, len), None);
        }
        assert_eq!(
            AlignedRead::of(geometry(1 << 20), 0, usize::MAX).map(|read| read.len()),
            Some(MAX_READ)
        );
    }
}
