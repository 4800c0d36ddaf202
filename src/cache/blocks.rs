//! Blocks of one file or disk, in memory that may be shared with others.
//!
//! ```text
//!   read ─► cached? ─ yes ─► copy
//!             │ no
//!             ├─ zeroes? ─► fill; zeroes are not cached
//!             └─ flight of the block ─► claimed by the reader or a thread of the pool ─► Fetch ─► cache
//! ```
//! Blocks are single-flight (`single_flight.rs`): however many readers want a block, it is fetched once. A reader fetches
//! the first run of blocks that it misses itself, and queues the rest for the pool; those that no thread has started when
//! it gets to them, it fetches as well. So one reader keeps all processors or connections busy, and a read of one block
//! needs no other thread.

use std::ops::Range;
use std::sync::Arc;

use super::block_memory::BlockMemory;
use super::file_blocks::FileBlocks;
use super::pool::FetchPool;
use super::{Fetch, may_wait, would_block};
use crate::error::Result;

/// Blocks of one file; see the module documentation.
#[derive(Debug)]
pub struct CachedBlocks {
    file: Arc<FileBlocks>,
    pool: Arc<FetchPool>,
}

impl CachedBlocks {
    /// Creates the blocks of `fetch`, whose read-ahead is at most `readahead` bytes.
    pub fn new(fetch: Arc<dyn Fetch>, memory: Arc<BlockMemory>, pool: Arc<FetchPool>, readahead: u64) -> Self {
        let file = Arc::new(FileBlocks::new(fetch, memory, readahead));
        Self { file, pool }
    }

    /// Returns the blocks without the pool that fetches them.
    pub(super) fn file(&self) -> &FileBlocks {
        &self.file
    }

    /// Reads from byte `offset` on and fills `buf` completely. The range must lie in the file.
    ///
    /// Errors: `WouldBlock` within `without_waiting`, those of the fetch.
    pub fn read(&self, offset: u64, buf: &mut [u8]) -> Result<()> {
        let file = &*self.file;
        if buf.is_empty() {
            return Ok(());
        }
        let blocks = file.blocks_of(&(offset..offset + buf.len() as u64));
        // Checked before the read is noted: the thread that reads it later notes it.
        if !may_wait() && !blocks.clone().all(|block| file.is_known(block)) {
            return Err(would_block());
        }
        self.enqueue_missing(&blocks);
        let mut rest = buf;
        let mut skip = (offset % file.block_size()) as usize;
        for block in blocks.clone() {
            let have = (file.block_len(block) as usize).saturating_sub(skip);
            let (part, after) = rest.split_at_mut(have.min(rest.len()));
            file.copy(block..blocks.end, skip, part)?;
            rest = after;
            skip = 0;
        }
        Ok(())
    }

    #[cfg(test)]
    pub(super) fn requested(&self) -> usize {
        self.pool.requested()
    }

    /// Queues for the pool the missing blocks of this read after its first run, and the blocks to prefetch.
    ///
    /// The reader fetches its first run itself, without waiting for a thread to wake.
    fn enqueue_missing(&self, blocks: &Range<u64>) {
        let file = &self.file;
        let (ahead, window) = file.note_read(blocks);
        let first_run = blocks.start + file.max_run();
        if self.pool.is_empty() || (first_run >= blocks.end && ahead.is_empty()) {
            return;
        }
        let missing = |b: &u64| !file.is_known(*b);
        let requested: Vec<u64> = (first_run..blocks.end).filter(missing).collect();
        let prefetch: Vec<u64> = ahead.filter(missing).collect();
        // All threads together have the window in flight.
        let run = (window / self.pool.threads()).clamp(file.max_run(), file.max_run_ahead());
        self.pool.queue(file, &requested, &prefetch, run);
    }
}

impl Drop for CachedBlocks {
    fn drop(&mut self) {
        // Without it the pool would wait for a prefetch from a server that does not answer.
        self.file.close();
    }
}

#[cfg(test)]
mod tests;
