//! A cache of whole blocks over a source, with read-ahead and a few workers that fetch side by side.
//!
//! ```text
//!   read ─► in the cache? ─yes─► copy
//!             │ no
//!             ├─ zeroes? ─► fill, nothing is kept
//!             └─ flight of the block ─► claimed by the reader or a worker ─► source ─► cache
//! ```
//! A read of several blocks offers all that it misses to the workers and does, in order, what none of them has
//! begun; so one reader keeps all processors busy, and a read of one block never changes threads. Blocks that
//! are fetched ahead of time come after those that somebody waits for.

use std::collections::{HashMap, VecDeque};
use std::fmt;
use std::ops::Range;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;

use quick_cache::sync::Cache;
use quick_cache::{OptionsBuilder, Weighter};

use crate::block::{BlockRead, Content, Geometry, Lba, SECTOR, check_range};
use crate::cache::readahead::Streams;
use crate::cache::single_flight::{Block, Claim, Flight};
use crate::error::Result;

/// The sizes of a cache, in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CacheOptions {
    /// Memory for blocks.
    pub size: u64,
    /// The most that is fetched ahead of a reader; 0: nothing.
    pub readahead: u64,
    /// Threads that fetch beside the readers.
    pub workers: usize,
}

/// The fewest blocks that a cache holds, whatever size was asked for.
const MIN_BLOCKS: u64 = 4;

/// The most blocks that wait for the workers: two reads of 1 MiB in the smallest blocks. What is over is left to its
/// reader. A damaged place that is read again and again leaves blocks faster than the workers find it damaged.
const MAX_QUEUED: usize = 4096;

/// How much of the cache is for blocks that were read again. The rest is for those that were not read yet: fetched
/// ahead, they must not push each other out.
const READ_AGAIN: f64 = 0.5;

/// A cache over a source; see the module.
pub struct BlockCache {
    shared: Arc<Shared>,
    workers: Vec<JoinHandle<()>>,
}

struct Shared {
    source: Arc<dyn BlockRead>,
    geometry: Geometry,
    /// Sectors of a block.
    block: u64,
    cache: Cache<u64, Block, ByBytes>,
    /// Fetches under way. Taken before `queue`, never after; not held across a fetch.
    flights: Mutex<HashMap<u64, Arc<Flight>>>,
    streams: Mutex<Streams>,
    queue: Mutex<Queue>,
    wake: Condvar,
}

#[derive(Debug, Default)]
struct Queue {
    /// Somebody waits for these.
    wanted: VecDeque<u64>,
    /// Somebody may want these.
    ahead: VecDeque<u64>,
    closed: bool,
}

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
    /// A cache whose blocks are the preferred size of `source`.
    pub fn new(source: Arc<dyn BlockRead>, options: CacheOptions) -> std::io::Result<Self> {
        let geometry = source.geometry();
        let block = geometry.preferred.max(1);
        let bytes = block * SECTOR;
        let blocks = (options.size / bytes).max(MIN_BLOCKS);
        let cache_options = OptionsBuilder::new()
            .estimated_items_capacity(blocks as usize)
            .weight_capacity(blocks * bytes)
            // a small cache in many shards would hold no block in any
            .shards(((blocks / MIN_BLOCKS) as usize).clamp(1, 4))
            .hot_allocation(READ_AGAIN)
            .build()
            .map_err(std::io::Error::other)?;
        let shared = Arc::new(Shared {
            cache: Cache::with_options(cache_options, ByBytes, Default::default(), Default::default()),
            flights: Mutex::default(),
            // what is fetched ahead must still be there when it is read
            streams: Mutex::new(Streams::new((options.readahead / bytes).min(blocks / 4))),
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
            // a worker that panicked has told its waiters already
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
        shared.prepare(&blocks, !self.workers.is_empty());
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
    fn block_sectors(&self, block: u64) -> u64 {
        self.block.min(self.geometry.sectors - block * self.block)
    }

    fn block_bytes(&self, block: u64) -> usize {
        (self.block_sectors(block) * SECTOR) as usize
    }

    /// Offers to the workers what this read misses beyond its first block, and what will be read next.
    fn prepare(&self, blocks: &Range<u64>, have_workers: bool) {
        let ahead = lock(&self.streams).read(blocks);
        if !have_workers || (blocks.end - blocks.start == 1 && ahead.is_empty()) {
            return;
        }
        let last = self.geometry.sectors.div_ceil(self.block);
        let missing = |b: &u64| !self.cache.contains_key(b) && !self.zero(*b);
        let wanted: Vec<u64> = (blocks.start + 1..blocks.end).filter(missing).collect();
        let ahead: Vec<u64> = (ahead.start.min(last)..ahead.end.min(last)).filter(missing).collect();
        if wanted.is_empty() && ahead.is_empty() {
            return;
        }
        let wake = wanted.len() + ahead.len();
        let mut queue = lock(&self.queue);
        let room = |queued: usize| MAX_QUEUED.saturating_sub(queued);
        let (for_wanted, for_ahead) = (room(queue.wanted.len()), room(queue.ahead.len()));
        queue.wanted.extend(wanted.into_iter().take(for_wanted));
        queue.ahead.extend(ahead.into_iter().take(for_ahead));
        drop(queue);
        if wake > 1 {
            self.wake.notify_all()
        } else {
            self.wake.notify_one()
        }
    }

    fn zero(&self, block: u64) -> bool {
        self.source.is_zero(Lba(block * self.block), self.block_sectors(block))
    }

    /// Copies bytes `skip …` of a block.
    fn copy(&self, block: u64, skip: usize, part: &mut [u8]) -> Result<()> {
        if let Some(data) = self.cache.get(&block) {
            return copy_from(&data, skip, part);
        }
        if self.zero(block) {
            part.fill(0);
            return Ok(());
        }
        copy_from(&self.block(block)?, skip, part)
    }

    /// The block, from a flight: an own one, or somebody else's.
    fn block(&self, block: u64) -> Result<Block> {
        let flight = {
            let mut flights = lock(&self.flights);
            // it may have landed since it was looked for
            if let Some(data) = self.cache.get(&block) {
                return Ok(data);
            }
            Arc::clone(flights.entry(block).or_insert_with(Flight::new))
        };
        match flight.claim() {
            Some(claim) => self.fetch(block, claim),
            None => flight.wait(),
        }
    }

    fn fetch(&self, block: u64, claim: Claim) -> Result<Block> {
        let remove = Removal { shared: self, block };
        let mut data = vec![0; self.block_bytes(block)];
        let result = self
            .source
            .read_at(Lba(block * self.block), &mut data)
            .map(|()| Block::new(data));
        if let Ok(data) = &result {
            self.cache.insert(block, Arc::clone(data));
        }
        drop(remove);
        claim.finish(result.clone());
        result
    }

    /// A worker's life.
    fn work(&self) {
        while let Some(block) = self.next() {
            if !self.cache.contains_key(&block) {
                // the error, if any, is the readers' to report: they fetch it again
                let flight = Arc::clone(lock(&self.flights).entry(block).or_insert_with(Flight::new));
                if let Some(claim) = flight.claim() {
                    let _ = self.fetch(block, claim);
                }
            }
        }
    }

    /// The next block for a worker; `None` at the end.
    fn next(&self) -> Option<u64> {
        let mut queue = lock(&self.queue);
        loop {
            if queue.closed {
                return None;
            }
            if let Some(block) = queue.wanted.pop_front() {
                return Some(block);
            }
            if let Some(block) = queue.ahead.pop_front() {
                return Some(block);
            }
            queue = self.wake.wait(queue).unwrap_or_else(PoisonError::into_inner);
        }
    }
}

/// Takes a flight off the list at its end, also when the fetch panics.
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
        Some(wanted) => {
            part.copy_from_slice(wanted);
            Ok(())
        }
        None => Err(crate::error::Error::corrupt("a read past the end of a block")),
    }
}

/// Locks; a panic of another thread has left nothing half done behind these locks.
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
    fn regression_reads_of_a_damaged_place_leave_no_endless_queue() {
        // workers are held up while it is locked
        let gate = Arc::new(RwLock::new(()));
        let held = gate.write().unwrap();
        let workers_gate = Arc::clone(&gate);
        let source = TestDisk::new(64).reading(move |_, _| {
            if std::thread::current().name().is_some_and(|n| n.starts_with("fetch-")) {
                let _held_up = workers_gate.read();
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
        assert_eq!(lock(&cache.shared.queue).wanted.len(), MAX_QUEUED);
        drop(held);
    }
}
