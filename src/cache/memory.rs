//! Cache of whole blocks over a disk whose blocks are expensive.

use std::ops::Range;
use std::sync::Arc;
use std::time::Duration;

use super::blocks::{BlockMemory, CachedBlocks};
use super::{Fetch, FetchPool};
use crate::block::{BlockRead, Content, Geometry, Lba, SECTOR, check_range};
use crate::error::{Error, Result};

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

/// Maximum time that a reader waits for the fetch of another thread.
const DEADLINE: Duration = Duration::from_secs(60);

/// Cache over a disk; see the documentation of `blocks.rs`.
#[derive(Debug)]
pub struct BlockCache {
    disk: Arc<DiskBlocks>,
    blocks: CachedBlocks,
}

/// A disk as the origin of blocks.
#[derive(Debug)]
struct DiskBlocks {
    disk: Arc<dyn BlockRead>,
    geometry: Geometry,
}

impl BlockCache {
    /// Creates a cache whose blocks have the preferred request size of `source`. Errors: a worker thread can't be
    /// started.
    pub fn new(source: Arc<dyn BlockRead>, options: CacheOptions) -> Result<Self> {
        let disk = Arc::new(DiskBlocks {
            geometry: source.geometry(),
            disk: source,
        });
        let pool = FetchPool::new(options.workers).map_err(|e| Error::io("starting the threads that inflate", e))?;
        let memory = BlockMemory::new(options.size, disk.block(), MIN_BLOCKS)?;
        let fetch = Arc::clone(&disk) as Arc<dyn Fetch>;
        let blocks = CachedBlocks::new(fetch, Arc::new(memory), Arc::new(pool), options.readahead);
        Ok(Self { disk, blocks })
    }
}

impl BlockRead for BlockCache {
    fn geometry(&self) -> Geometry {
        self.disk.geometry
    }

    fn read_at(&self, at: Lba, buf: &mut [u8]) -> Result<()> {
        check_range(&self.disk.geometry, at, buf.len())?;
        self.blocks.read(at.bytes(), buf)
    }

    fn content_at(&self, at: Lba) -> Result<(Content, u64)> {
        self.disk.disk.content_at(at)
    }

    fn is_zero(&self, at: Lba, sectors: u64) -> bool {
        self.disk.disk.is_zero(at, sectors)
    }
}

impl Fetch for DiskBlocks {
    fn len(&self) -> u64 {
        self.geometry.bytes()
    }

    fn block(&self) -> u64 {
        self.geometry.preferred.max(1) * SECTOR
    }

    fn max_run(&self) -> u64 {
        // Each block is work of its own for a processor.
        1
    }

    fn deadline(&self) -> Duration {
        DEADLINE
    }

    fn is_zero(&self, range: Range<u64>) -> bool {
        self.disk
            .is_zero(Lba(range.start / SECTOR), (range.end - range.start) / SECTOR)
    }

    fn fetch(&self, blocks: Range<u64>, each: &mut (dyn FnMut(Vec<u8>) + Send)) -> Result<()> {
        for block in blocks {
            let start = block * self.block();
            let mut data = vec![0; self.block().min(self.len() - start) as usize];
            self.disk.read_at(Lba(start / SECTOR), &mut data)?;
            each(data);
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::sync::RwLock;

    use super::super::pool::MAX_QUEUED;
    use super::*;
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
        assert_eq!(cache.blocks.requested(), MAX_QUEUED);
        drop(workers_blocked);
    }
}
