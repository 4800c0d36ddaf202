//! Cache of whole blocks over a source, with read-ahead and worker threads that fetch in parallel.
//!
//! ```text
//!   read ─► cached? ─ yes ─► copy
//!             │ no
//!             ├─ zeroes? ─► fill; zeroes are not cached
//!             └─ flight of the block ─► claimed by the reader or a worker ─► source ─► cache
//! ```
//! Blocks are single-flight (`single_flight.rs`): however many readers want a block, it is fetched once. A read of
//! several blocks queues all blocks that it misses for the workers, and fetches, in order, those that no worker has
//! started. So one reader keeps all processors busy, and a read of one block needs no other thread. Workers take
//! requested blocks before prefetched ones.
//!
//! # Locks
//!
//! `flights`, `streams` and `queue` are each held alone and only for a few instructions; the cache has its own locks
//! inside, which may be acquired while `flights` is held. No lock is held across a fetch or a copy.
//!
//! Invariant: a flight is in `flights` until its block is in the cache or its fetch has failed. A reader that checks
//! the cache again while it holds `flights` therefore never starts a second fetch of a block that has just been cached.

use std::collections::{HashMap, VecDeque};
use std::fmt;
use std::ops::Range;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;

use quick_cache::sync::Cache;
use quick_cache::{OptionsBuilder, Weighter};

use crate::block::{BlockRead, Content, Geometry, Lba, SECTOR, check_range};
use crate::cache::readahead::ReadStreams;
use crate::cache::single_flight::{Block, Claim, Flight};
use crate::error::Result;

/// Sizes of a cache.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CacheOptions {
    /// Memory for blocks in bytes.
    pub size: u64,
    /// Maximum number of bytes that are prefetched for a reader; 0 disables read-ahead.
    pub readahead: u64,
    /// Number of threads that fetch in parallel with the readers.
    pub workers: usize,
}

/// Minimum number of blocks that a cache holds, whatever size is requested.
const MIN_BLOCKS: u64 = 4;

/// Maximum number of queued blocks of either kind: two reads of 1 MiB in the smallest blocks. The reader fetches the
/// excess itself. The bound is needed for damaged blocks: a failed read is not cached, so a reader that repeats it adds
/// blocks faster than the workers remove them.
const MAX_QUEUED: usize = 4096;

/// Part of the cache for blocks that were read more than once. The rest is for new blocks, so that prefetched blocks do
/// not evict one another before they are read.
const HOT_PART: f64 = 0.5;

/// Cache over a source; see the module documentation.
pub struct BlockCache {
    shared: Arc<Shared>,
    workers: Vec<JoinHandle<()>>,
}

struct Shared {
    source: Arc<dyn BlockRead>,
    geometry: Geometry,
    /// Size of a block in sectors; the last block of the disk may be smaller.
    block: u64,
    cache: Cache<u64, Block, ByBytes>,
    /// Fetches that are queued or in flight, by block number. Never held across a fetch.
    flights: Mutex<HashMap<u64, Arc<Flight>>>,
    streams: Mutex<ReadStreams>,
    queue: Mutex<FetchQueue>,
    wake: Condvar,
}

/// Blocks for the workers. A block may be in both queues.
#[derive(Debug, Default)]
struct FetchQueue {
    /// Blocks that a reader waits for.
    requested: VecDeque<u64>,
    /// Blocks that a reader will probably want.
    prefetch: VecDeque<u64>,
    /// Set once on drop: the workers exit.
    closed: bool,
}

/// Weighs a block by its bytes, so that the capacity of the cache is in bytes.
#[derive(Clone)]
struct ByBytes;

impl Weighter<u64, Block> for ByBytes {
    fn weight(&self, _key: &u64, block: &Block) -> u64 {
        block.len() as u64
    }
}

impl fmt::Debug for BlockCache {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("BlockCache")
            .field("source", &self.shared.source)
            .field("block", &self.shared.block)
            .finish()
    }
}

impl BlockCache {
    /// Creates a cache whose blocks have the preferred request size of `source`. Errors: a worker thread can't be
    /// started.
    pub fn new(source: Arc<dyn BlockRead>, options: CacheOptions) -> std::io::Result<Self> {
        let geometry = source.geometry();
        let block = geometry.preferred.max(1);
        let bytes = block * SECTOR;
        let blocks = (options.size / bytes).max(MIN_BLOCKS);
        let cache_options = OptionsBuilder::new()
            .estimated_items_capacity(blocks as usize)
            .weight_capacity(blocks * bytes)
            // The capacity is divided among the shards; with too many of them a shard could not hold a single block.
            .shards(((blocks / MIN_BLOCKS) as usize).clamp(1, 4))
            .hot_allocation(HOT_PART)
            .build()
            .map_err(std::io::Error::other)?;
        let shared = Arc::new(Shared {
            cache: Cache::with_options(cache_options, ByBytes, Default::default(), Default::default()),
            flights: Mutex::default(),
            // A prefetched block must still be cached when it is read, so a window covers at most a quarter of the
            // cache.
            streams: Mutex::new(ReadStreams::new((options.readahead / bytes).min(blocks / 4))),
            queue: Mutex::default(),
            wake: Condvar::new(),
            block,
            geometry,
            source,
        });
        let mut cache = Self {
            workers: Vec::new(),
            shared: Arc::clone(&shared),
        };
        for n in 0..options.workers {
            let shared = Arc::clone(&shared);
            let worker = std::thread::Builder::new()
                .name(format!("fetch-{n}"))
                .spawn(move || shared.work())?;
            cache.workers.push(worker);
        }
        Ok(cache)
    }
}

impl Drop for BlockCache {
    fn drop(&mut self) {
        lock(&self.shared.queue).closed = true;
        self.shared.wake.notify_all();
        for worker in self.workers.drain(..) {
            // The claim of a worker that panicked has failed its flight already, so no reader waits for it.
            let _ = worker.join();
        }
    }
}

impl BlockRead for BlockCache {
    fn geometry(&self) -> Geometry {
        self.shared.geometry
    }

    fn read_at(&self, at: Lba, buf: &mut [u8]) -> Result<()> {
        let shared = &self.shared;
        let sectors = check_range(&shared.geometry, at, buf.len())?;
        if sectors == 0 {
            return Ok(());
        }
        let blocks = at.0 / shared.block..(at.0 + sectors).div_ceil(shared.block);
        shared.enqueue_missing(&blocks, !self.workers.is_empty());
        let mut rest = buf;
        let mut skip = ((at.0 % shared.block) * SECTOR) as usize;
        for block in blocks {
            let have = shared.block_bytes(block) - skip;
            let (part, after) = rest.split_at_mut(have.min(rest.len()));
            shared.copy(block, skip, part)?;
            rest = after;
            skip = 0;
        }
        Ok(())
    }

    fn content_at(&self, at: Lba) -> Result<(Content, u64)> {
        self.shared.source.content_at(at)
    }

    fn is_zero(&self, at: Lba, sectors: u64) -> bool {
        self.shared.source.is_zero(at, sectors)
    }
}

impl Shared {
    /// Returns the number of sectors of a block: less than usual at the end of the disk.
    fn block_sectors(&self, block: u64) -> u64 {
        self.block.min(self.geometry.sectors - block * self.block)
    }

    fn block_bytes(&self, block: u64) -> usize {
        (self.block_sectors(block) * SECTOR) as usize
    }

    /// Queues for the workers the missing blocks of this read after its first one, and the blocks to prefetch.
    ///
    /// The reader fetches its first block itself, without waiting for a worker to wake.
    fn enqueue_missing(&self, blocks: &Range<u64>, have_workers: bool) {
        let ahead = lock(&self.streams).read(blocks);
        if !have_workers || (blocks.end - blocks.start == 1 && ahead.is_empty()) {
            return;
        }
        let last = self.geometry.sectors.div_ceil(self.block);
        let missing = |b: &u64| !self.cache.contains_key(b) && !self.is_zero_block(*b);
        let requested: Vec<u64> = (blocks.start + 1..blocks.end).filter(missing).collect();
        let prefetch: Vec<u64> = (ahead.start.min(last)..ahead.end.min(last)).filter(missing).collect();
        if requested.is_empty() && prefetch.is_empty() {
            return;
        }
        let added = requested.len() + prefetch.len();
        let mut queue = lock(&self.queue);
        let space = |queued: usize| MAX_QUEUED.saturating_sub(queued);
        let (requested_space, prefetch_space) = (space(queue.requested.len()), space(queue.prefetch.len()));
        queue.requested.extend(requested.into_iter().take(requested_space));
        queue.prefetch.extend(prefetch.into_iter().take(prefetch_space));
        // A worker that is woken while the lock is held would have to wait for it at once.
        drop(queue);
        if added > 1 {
            self.wake.notify_all();
        } else {
            self.wake.notify_one();
        }
    }

    fn is_zero_block(&self, block: u64) -> bool {
        self.source.is_zero(Lba(block * self.block), self.block_sectors(block))
    }

    /// Copies bytes of a block from byte `skip` on.
    fn copy(&self, block: u64, skip: usize, part: &mut [u8]) -> Result<()> {
        if let Some(data) = self.cache.get(&block) {
            return copy_from(&data, skip, part);
        }
        if self.is_zero_block(block) {
            part.fill(0);
            return Ok(());
        }
        copy_from(&self.block(block)?, skip, part)
    }

    /// Returns a block that was not cached: fetches it, or waits for another thread that fetches it.
    fn block(&self, block: u64) -> Result<Block> {
        let flight = {
            let mut flights = lock(&self.flights);
            // Another thread may have fetched it since the caller checked. A flight leaves the list after its block is
            // cached, so a block whose flight is gone is found here.
            if let Some(data) = self.cache.get(&block) {
                return Ok(data);
            }
            Arc::clone(flights.entry(block).or_insert_with(Flight::new))
        };
        match flight.claim() {
            // Unclaimed, or queued for a worker that has not started: do not wait for it.
            Some(claim) => self.fetch(block, claim),
            None => flight.wait(),
        }
    }

    fn fetch(&self, block: u64, claim: Claim) -> Result<Block> {
        // Dropped before the claim, also if `read_at` panics: readers that come later start a new flight.
        let remove = Removal { shared: self, block };
        let mut data = vec![0; self.block_bytes(block)];
        let result = self
            .source
            .read_at(Lba(block * self.block), &mut data)
            .map(|()| Block::new(data));
        if let Ok(data) = &result {
            // First the data, then the end of the flight: a reader that finds no flight finds the block.
            self.cache.insert(block, Arc::clone(data));
        }
        drop(remove);
        claim.finish(result.clone());
        result
    }

    /// Fetches queued blocks until the cache is dropped. Runs in each worker thread.
    fn work(&self) {
        while let Some(block) = self.next() {
            if !self.cache.contains_key(&block) {
                // An error is not reported here: the readers fetch the block again and report theirs.
                let flight = Arc::clone(lock(&self.flights).entry(block).or_insert_with(Flight::new));
                if let Some(claim) = flight.claim() {
                    let _ = self.fetch(block, claim);
                }
            }
        }
    }

    /// Waits for the next block for a worker. Returns `None` once the cache is dropped.
    fn next(&self) -> Option<u64> {
        let mut queue = lock(&self.queue);
        loop {
            if queue.closed {
                return None;
            }
            if let Some(block) = queue.requested.pop_front() {
                return Some(block);
            }
            if let Some(block) = queue.prefetch.pop_front() {
                return Some(block);
            }
            queue = self.wake.wait(queue).unwrap_or_else(PoisonError::into_inner);
        }
    }
}

/// Removes a flight from the list on drop, also if the fetch panics.
struct Removal<'a> {
    shared: &'a Shared,
    block: u64,
}

impl Drop for Removal<'_> {
    fn drop(&mut self) {
        lock(&self.shared.flights).remove(&self.block);
    }
}

fn copy_from(data: &[u8], skip: usize, part: &mut [u8]) -> Result<()> {
    match data.get(skip..skip + part.len()) {
        Some(bytes) => {
            part.copy_from_slice(bytes);
            Ok(())
        }
        None => Err(crate::error::Error::corrupt("read beyond the end of a cached block")),
    }
}

/// Acquires a mutex. Ignores poisoning: no thread can panic while the data of these mutexes is inconsistent.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use std::sync::RwLock;

    use super::*;
    use crate::error::Error;
    use crate::test_disk::TestDisk;

    #[test]
    fn regression_repeated_reads_of_a_damaged_block_do_not_grow_the_queue_without_bound() {
        // Workers block while the test holds the write lock.
        let gate = Arc::new(RwLock::new(()));
        let workers_blocked = gate.write().unwrap();
        let workers_gate = Arc::clone(&gate);
        let source = TestDisk::new(64).reading(move |_, _| {
            if std::thread::current().name().is_some_and(|n| n.starts_with("fetch-")) {
                let _passed = workers_gate.read();
            }
            Err(Error::corrupt("damaged"))
        });
        let options = CacheOptions {
            size: 0,
            readahead: 0,
            workers: 1,
        };
        let cache = BlockCache::new(Arc::new(source), options).unwrap();
        let mut buf = [0; 64 * 512];
        for _ in 0..2 * MAX_QUEUED / 64 {
            cache.read_at(Lba(0), &mut buf).unwrap_err();
        }
        assert_eq!(lock(&cache.shared.queue).requested.len(), MAX_QUEUED);
        drop(workers_blocked);
    }
}
