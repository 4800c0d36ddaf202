//! Set of the blocks that this process has written, or compared with their checksums.

use std::collections::HashMap;

/// Set of block numbers, in words of 64.
#[derive(Debug, Default)]
pub(super) struct CheckedBlocks {
    words: HashMap<u64, u64>,
    count: u64,
}

impl CheckedBlocks {
    pub(super) fn insert(&mut self, number: u64) {
        let word = self.words.entry(number / 64).or_default();
        let bit = 1 << (number % 64);
        self.count += u64::from(*word & bit == 0);
        *word |= bit;
    }

    pub(super) fn contains(&self, number: u64) -> bool {
        self.words
            .get(&(number / 64))
            .is_some_and(|word| word >> (number % 64) & 1 == 1)
    }

    /// Returns the number of blocks in the set.
    pub(super) fn count(&self) -> u64 {
        self.count
    }

    pub(super) fn clear(&mut self) {
        *self = Self::default();
    }
}
