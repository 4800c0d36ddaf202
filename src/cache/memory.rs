//! Cache of whole blocks over a disk whose blocks are expensive.
//!
//! A disk that is written to has its writes go through the cache, which updates or drops the blocks (`writes.rs`). Where
//! the content may change without this process ([`SharedContent`]), all blocks are dropped: after a reconnect, and at each
//! open if other clients may write meanwhile.

use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use super::block_memory::BlockMemory;
use super::blocks::CachedBlocks;
use super::disk_tier::{DiskTier, KeptFile, TieredFetch};
use super::writes::CacheWrites;
use super::{Block, Fetch, FetchPool};
use crate::block::{BlockRead, BlockWrite, Content, Geometry, Lba, SECTOR, SharedContent, check_range};
use crate::error::{Error, ErrorKind, Result};
use crate::store::RoomNeeded;
use crate::write_latch::WriteLatch;

/// Sizes of a cache.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CacheOptions {
    /// Memory for blocks in bytes.
    pub size: u64,
    /// Maximum number of bytes that are prefetched for a reader; 0 disables read-ahead.
    pub readahead: u64,
    /// Number of threads that fetch in parallel with the readers.
    pub workers: usize,
    /// Sectors of a block: a multiple of the granule of the disk.
    pub block: u64,
    /// Largest number of neighbouring blocks of one fetch.
    pub max_run: u64,
    /// Maximum time that a reader waits for the fetch of another thread: more than the fetch itself may take.
    pub deadline: Duration,
    /// Drop all blocks when a program opens the disk, as other clients may have written.
    pub drop_at_open: bool,
}

/// Cache over a disk; see the documentation of `blocks.rs`.
#[derive(Debug)]
pub struct BlockCache {
    disk: Arc<DiskBlocks>,
    blocks: CachedBlocks,
    writes: CacheWrites,
    drop_at_open: bool,
    /// [`SharedContent::epoch`] that the blocks belong to.
    epoch: AtomicU64,
    /// Latch of a disk without a writer: never set.
    no_latch: WriteLatch,
    /// Folder that keeps the blocks. It flushes them as long as it is open.
    _tier: Option<Arc<DiskTier>>,
}

/// A disk as the origin of blocks.
#[derive(Debug)]
struct DiskBlocks {
    disk: Arc<dyn BlockRead>,
    geometry: Geometry,
    /// Sectors of a block.
    block: u64,
    max_run: u64,
    deadline: Duration,
}

impl BlockCache {
    /// Creates a cache over `source`, which keeps its blocks in `kept` too. Errors: a worker thread can't be started.
    pub fn new(source: Arc<dyn BlockRead>, options: CacheOptions, kept: Option<KeptFile>) -> Result<Self> {
        let disk = Arc::new(DiskBlocks {
            geometry: source.geometry(),
            block: options.block.max(1),
            max_run: options.max_run.max(1),
            deadline: options.deadline,
            disk: source,
        });
        let pool = FetchPool::new(options.workers).map_err(|e| Error::io("starting the threads of the cache", e))?;
        let memory = BlockMemory::new(options.size, disk.block(), 0)?;
        let fetch = Arc::clone(&disk) as Arc<dyn Fetch>;
        let fetch = match &kept {
            Some(kept) => Arc::new(TieredFetch::new(fetch, Arc::clone(&kept.file))),
            None => fetch,
        };
        let blocks = CachedBlocks::new(fetch, Arc::new(memory), Arc::new(pool), options.readahead);
        Ok(Self {
            epoch: disk.epoch().into(),
            disk,
            blocks,
            writes: CacheWrites::default(),
            drop_at_open: options.drop_at_open,
            no_latch: WriteLatch::default(),
            _tier: kept.map(|kept| kept.tier),
        })
    }

    /// Drops all blocks if the content may have changed without this process since they were read.
    fn check_epoch(&self) {
        let epoch = self.disk.epoch();
        if self.epoch.load(Ordering::Acquire) != epoch {
            // Dropped first: another reader that finds the new epoch must not find old blocks.
            self.blocks.file().forget();
            self.epoch.store(epoch, Ordering::Release);
        }
    }

    fn target(&self) -> Result<&dyn BlockWrite> {
        let none = || Error::new(ErrorKind::ReadOnly, "the disk was opened for reading");
        self.disk.disk.writer().ok_or_else(none)
    }
}

impl BlockRead for BlockCache {
    fn geometry(&self) -> Geometry {
        self.disk.geometry
    }

    fn read_at(&self, at: Lba, buf: &mut [u8]) -> Result<()> {
        check_range(&self.disk.geometry, at, buf.len())?;
        self.check_epoch();
        self.blocks.read(at.bytes(), buf)
    }

    fn content_at(&self, at: Lba) -> Result<(Content, u64)> {
        self.disk.disk.content_at(at)
    }

    fn is_zero(&self, at: Lba, sectors: u64) -> bool {
        self.disk.disk.is_zero(at, sectors)
    }

    fn writer(&self) -> Option<&dyn BlockWrite> {
        self.target().is_ok().then_some(self)
    }

    fn shared_content(&self) -> Option<&dyn SharedContent> {
        self.disk.disk.shared_content().is_some().then_some(self)
    }
}

impl BlockWrite for BlockCache {
    fn latch(&self) -> &WriteLatch {
        self.disk.disk.writer().map_or(&self.no_latch, BlockWrite::latch)
    }

    fn prepare_external_write(&self) -> Result<()> {
        self.target()?.prepare_external_write()
    }

    fn write_at(&self, at: Lba, buf: &[u8]) -> Result<()> {
        check_range(&self.disk.geometry, at, buf.len())?;
        let target = self.target()?;
        let write = self
            .writes
            .begin(self.blocks.file(), at.bytes()..at.bytes() + buf.len() as u64);
        target.write_at(at, buf)?;
        write.succeeded(at.bytes(), buf);
        Ok(())
    }

    fn zero(&self, range: Range<Lba>, unmap: bool) -> Result<()> {
        let target = self.target()?;
        let end = Lba(range.end.0.min(self.disk.geometry.sectors));
        // Dropped at the end: the disk may know then, without reading, that they are zeroes.
        let _write =
            (range.start < end).then(|| self.writes.begin(self.blocks.file(), range.start.bytes()..end.bytes()));
        target.zero(range, unmap)
    }

    fn slow_zeroing(&self, range: Range<Lba>) -> Option<String> {
        self.disk.disk.writer().and_then(|writer| writer.slow_zeroing(range))
    }

    fn add_room(&self, range: Range<Lba>, zero: bool, needed: &mut RoomNeeded) -> Result<()> {
        self.target()?.add_room(range, zero, needed)
    }

    fn allocate(&self, range: Range<Lba>) -> Result<()> {
        // The bytes stay the same, but the disk may write back what it has read.
        let _write = (range.start < range.end).then(|| {
            self.writes
                .begin(self.blocks.file(), range.start.bytes()..range.end.bytes())
        });
        self.target()?.allocate(range)
    }

    fn flush(&self) -> Result<()> {
        self.target()?.flush()
    }

    fn close(&self) -> Result<()> {
        self.target()?.close()
    }

    fn sequential_write_only(&self) -> bool {
        self.disk.disk.writer().is_some_and(BlockWrite::sequential_write_only)
    }
}

impl SharedContent for BlockCache {
    fn epoch(&self) -> u64 {
        self.disk.epoch()
    }

    fn forget_content(&self) {
        if let Some(shared) = self.disk.disk.shared_content() {
            shared.forget_content();
        }
        if self.drop_at_open {
            self.blocks.file().forget();
        }
    }
}

impl DiskBlocks {
    fn epoch(&self) -> u64 {
        self.disk.shared_content().map_or(0, SharedContent::epoch)
    }
}

impl Fetch for DiskBlocks {
    fn len(&self) -> u64 {
        self.geometry.bytes()
    }

    fn block(&self) -> u64 {
        self.block * SECTOR
    }

    fn max_run(&self) -> u64 {
        self.max_run
    }

    fn deadline(&self) -> Duration {
        self.deadline
    }

    fn is_zero(&self, range: Range<u64>) -> bool {
        self.disk
            .is_zero(Lba(range.start / SECTOR), (range.end - range.start) / SECTOR)
    }

    fn fetch(&self, blocks: Range<u64>, each: &mut (dyn FnMut(Block) + Send)) -> Result<()> {
        let read = |blocks: Range<u64>| {
            let (start, end) = (blocks.start * self.block(), blocks.end * self.block());
            let mut data = vec![0; (end.min(self.len()) - start) as usize];
            self.disk.read_at(Lba(start / SECTOR), &mut data).map(|()| data)
        };
        if blocks.end - blocks.start > 1 {
            let began = Instant::now();
            match read(blocks.clone()) {
                Ok(run) => {
                    run.chunks(self.block() as usize)
                        .for_each(|block| each(Block::new(block.to_vec())));
                    return Ok(());
                }
                // A source that hangs would take as long for each block, and readers wait no longer than the deadline.
                Err(e) if began.elapsed() * 2 >= self.deadline => return Err(e),
                Err(_) => {}
            }
        }
        // One at a time after an error: those before a damaged block are valid.
        for block in blocks {
            each(Block::new(read(block..block + 1)?));
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
            block: 1,
            max_run: 1,
            deadline: Duration::from_secs(60),
            drop_at_open: false,
        };
        let cache = BlockCache::new(Arc::new(source), options, None).unwrap();
        let mut buf = [0; 64 * 512];
        for _ in 0..2 * MAX_QUEUED / 64 {
            cache.read_at(Lba(0), &mut buf).unwrap_err();
        }
        assert_eq!(cache.blocks.requested(), MAX_QUEUED);
        drop(workers_blocked);
    }
}
