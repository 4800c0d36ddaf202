//! Memory for blocks.

use std::fmt;
use std::sync::atomic::{AtomicU64, Ordering};

use quick_cache::sync::Cache;
use quick_cache::{OptionsBuilder, Weighter};

use super::Block;
use crate::error::{Error, ErrorKind, Result};

/// Part of the cache for blocks that were read more than once. The rest is for new blocks, so that prefetched blocks do
/// not evict one another before they are read.
const HOT_PART: f64 = 0.2;

/// Minimum number of blocks of a memory, whatever size is requested.
const MIN_BLOCKS: u64 = 4;

/// Least blocks of a shard where there are several.
const SHARD_BLOCKS: u64 = 512;

/// Position of the file's number in a key; the bits below are the number of the block.
const FILE_SHIFT: u32 = 40;

/// Memory for blocks, shared by files.
pub struct BlockMemory {
    cache: Cache<BlockKey, Block, ByBytes>,
    /// Number of the next file.
    files: AtomicU64,
    bytes: u64,
}

/// Key of a block in the memory.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub(super) struct BlockKey(u64);

impl BlockKey {
    /// Creates the key of block `block` of the file that [`BlockMemory::next_file`] has numbered `file`.
    pub(super) fn new(file: u64, block: u64) -> Self {
        Self(file << FILE_SHIFT | block)
    }
}

/// Weighs a block by its bytes, so that the capacity of the cache is in bytes.
#[derive(Clone)]
struct ByBytes;

impl Weighter<BlockKey, Block> for ByBytes {
    fn weight(&self, _key: &BlockKey, block: &Block) -> u64 {
        block.len() as u64
    }
}

impl fmt::Debug for BlockMemory {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "BlockMemory({} of {} bytes)", self.cache.weight(), self.bytes)
    }
}

impl BlockMemory {
    /// Creates memory of `size` bytes for blocks of `block` bytes, but for at least `least` blocks.
    ///
    /// Errors: the size is not possible.
    pub fn new(size: u64, block: u64, least: u64) -> Result<Self> {
        let blocks = (size / block).max(least).max(MIN_BLOCKS);
        let bytes = blocks.saturating_mul(block);
        let options = OptionsBuilder::new()
            // Only an estimate for the tables of the cache, which grow.
            .estimated_items_capacity(usize::try_from(blocks).unwrap_or(usize::MAX).min(1 << 20))
            .weight_capacity(bytes)
            // The capacity is divided among the shards, and blocks among them by chance: a shard of few blocks would evict
            // some while others have room.
            .shards(((blocks / SHARD_BLOCKS) as usize).clamp(1, 4))
            .hot_allocation(HOT_PART)
            .build()
            .map_err(|e| Error::new(ErrorKind::Usage, format!("cache-size: {e}")))?;
        Ok(Self {
            cache: Cache::with_options(options, ByBytes, Default::default(), Default::default()),
            files: AtomicU64::new(0),
            bytes,
        })
    }

    /// Returns the largest number of bytes that may be prefetched and not read yet. A prefetched block must still be cached
    /// when it is read, so they are less than the part of the memory that new blocks have.
    pub(super) fn bytes_ahead(&self) -> u64 {
        self.bytes / 3 * 2
    }

    /// Returns a number for the blocks of a file that no other blocks have.
    pub(super) fn next_file(&self) -> u64 {
        self.files.fetch_add(1, Ordering::Relaxed)
    }

    pub(super) fn get(&self, key: BlockKey) -> Option<Block> {
        self.cache.get(&key)
    }

    pub(super) fn contains(&self, key: BlockKey) -> bool {
        self.cache.contains_key(&key)
    }

    pub(super) fn insert(&self, key: BlockKey, block: Block) {
        self.cache.insert(key, block);
    }

    pub(super) fn remove(&self, key: BlockKey) {
        self.cache.remove(&key);
    }
}
