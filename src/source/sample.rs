//! Sampled blocks of a disk: a few places that tell a disk from another one, and from another state of itself, where no
//! time and no number does.
//!
//! ```text
//!   |####|....#....|####|....#....#.. … ..#....|####|
//!    start          1 MiB     spread evenly     end
//! ```
//! The start and the end hold partition tables, and labels of volumes. At 1 MiB the first partition begins as a rule, with
//! the superblock of its file system, which changes with each mount for writing.

use std::ops::Range;

use ring::digest::{SHA256, digest};

/// Start of the first partition, as partitioning programs align it.
const PARTITION: u64 = 1 << 20;

/// Length of a block in bytes, unless the source reads larger units only.
pub(crate) const BLOCK: u64 = 4096;

/// Bytes of the digest of one block.
pub(crate) type BlockDigest = [u8; 32];

/// Amount of a disk that is sampled.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Density {
    /// Bytes at the start, at 1 MiB and at the end.
    label: u64,
    /// Number of blocks that are spread evenly.
    spread: u64,
}

/// For an overlay, which is compared once for each mount: some ninety blocks. A GPT has 17 KiB.
pub(crate) const THOROUGH: Density = Density {
    label: 32 << 10,
    spread: 64,
};

/// For each reconnect, perhaps to a server that is slow: some 16 blocks.
pub(crate) const QUICK: Density = Density {
    label: BLOCK,
    spread: 13,
};

/// Returns the ranges in bytes that are sampled of a disk of `len` bytes: blocks of `block` bytes, in order. The last one
/// ends with the disk.
pub(crate) fn sampled_ranges(len: u64, block: u64, density: Density) -> Vec<Range<u64>> {
    let Density { label, spread } = density;
    let labels = [0, PARTITION, len.saturating_sub(label)];
    let labels = labels
        .into_iter()
        .flat_map(|from| (from..from.saturating_add(label)).step_by(BLOCK as usize));
    let last = len.saturating_sub(1);
    let spread = (0..spread).map(|i| (u128::from(len) * u128::from(i) / u128::from(spread)) as u64);
    // The very last byte too: the label at the end may begin inside of a block.
    let mut starts: Vec<u64> = labels
        .chain(spread)
        .chain([last])
        .filter(|at| *at < len)
        .map(|at| at - at % block)
        .collect();
    starts.sort_unstable();
    starts.dedup();
    starts
        .into_iter()
        .map(|at| at..at.saturating_add(block).min(len))
        .collect()
}

/// Returns the digest of the bytes of one block.
pub(crate) fn block_digest(bytes: &[u8]) -> BlockDigest {
    let mut sum = [0; 32];
    sum.copy_from_slice(digest(&SHA256, bytes).as_ref());
    sum
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_start_the_end_and_places_between_are_sampled_in_whole_blocks() {
        for (len, block) in [
            (1, 4096),
            (512, 4096),
            (100 << 10, 4096),
            ((10 << 30) + 512, 4096),
            (1 << 40, 65536),
        ] {
            let ranges = sampled_ranges(len, block, THOROUGH);
            assert_eq!(ranges[0].start, 0);
            assert_eq!(ranges.last().unwrap().end, len);
            assert!(ranges.windows(2).all(|pair| pair[0].end <= pair[1].start));
            assert!(
                ranges
                    .iter()
                    .all(|r| r.start % block == 0 && r.start < r.end && r.end - r.start <= block)
            );
            assert!(sampled_ranges(len, block, QUICK).len() <= 18);
            assert!(ranges.len() <= 100, "{} ranges of {len} bytes", ranges.len());
            let total: u64 = ranges.iter().map(|r| r.end - r.start).sum();
            assert!(len > 200 << 10 || total == len, "a small disk is sampled whole");
        }
        assert!(sampled_ranges(0, 4096, QUICK).is_empty());
    }
}
