//! Completion record: says that all blocks of a data file are there, durable and verified.
//!
//! The record holds the identity and the times of the data file. A later write of any program changes the times, and the
//! record of a copied folder names another inode: neither matches, so the blocks are verified before there is a new one.

use std::fs::File;
use std::os::unix::fs::{FileExt, MetadataExt};

use super::format::COMPLETION;

/// Bytes of a completion record.
pub(super) const RECORD: usize = 48;
/// Completion record of a file that is not complete. Matches no data file.
pub(super) const NONE: [u8; RECORD] = [0; RECORD];

const MAGIC: u64 = 0x7631_6c6c_6120_7364;

/// Returns true if a data file is complete, and unchanged since its map notes that.
pub(super) fn is_complete(map: &File, data: &File) -> bool {
    let mut record = [0; RECORD];
    let noted = map.read_exact_at(&mut record, COMPLETION);
    noted.is_ok() && completion_of(data) == Some(record)
}

/// Returns the completion record for the present state of a data file: any later write changes its times.
pub(super) fn completion_of(data: &File) -> Option<[u8; RECORD]> {
    let state = data.metadata().ok()?;
    let values = [
        MAGIC,
        state.ino(),
        state.len(),
        (state.mtime() as u64).wrapping_mul(1_000_000_000) + state.mtime_nsec() as u64,
        (state.ctime() as u64).wrapping_mul(1_000_000_000) + state.ctime_nsec() as u64,
    ];
    let mut record = [0; RECORD];
    for (place, value) in record.chunks_mut(8).zip(values) {
        place.copy_from_slice(&value.to_le_bytes());
    }
    let sum = libdeflater::crc32(record.get(..40)?);
    record.get_mut(40..44)?.copy_from_slice(&sum.to_le_bytes());
    Some(record)
}
