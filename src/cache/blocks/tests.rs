use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use super::*;
use crate::cache::{Block, without_waiting};
use crate::error::{Error, ErrorKind};
use crate::mutex::lock;

const BLOCK: u64 = 512;

/// File whose bytes are their block's number, and the fetches that it was asked for.
#[derive(Debug)]
struct Numbered {
    len: u64,
    asked: Mutex<Vec<Range<u64>>>,
    /// Blocks from this one on cannot be fetched.
    broken: AtomicU64,
}

impl Numbered {
    fn new(len: u64) -> Arc<Self> {
        Arc::new(Self {
            len,
            asked: Mutex::default(),
            broken: u64::MAX.into(),
        })
    }

    fn asked(&self) -> Vec<(u64, u64)> {
        std::mem::take(&mut *lock(&self.asked))
            .iter()
            .map(|run| (run.start, run.end))
            .collect()
    }
}

impl Fetch for Numbered {
    fn len(&self) -> u64 {
        self.len
    }

    fn block(&self) -> u64 {
        BLOCK
    }

    fn max_run(&self) -> u64 {
        8
    }

    fn deadline(&self) -> Duration {
        Duration::from_secs(60)
    }

    fn fetch(&self, blocks: Range<u64>, each: &mut (dyn FnMut(Block) + Send)) -> Result<()> {
        lock(&self.asked).push(blocks.clone());
        for block in blocks {
            if block >= self.broken.load(Ordering::Relaxed) {
                return Err(Error::corrupt(format!("block {block} is broken")));
            }
            each(Block::new(vec![
                block as u8;
                BLOCK.min(self.len - block * BLOCK) as usize
            ]));
        }
        Ok(())
    }
}

/// Returns the cache of a file, with a pool of `threads`.
fn cache(file: &Arc<Numbered>, threads: usize, readahead: u64) -> CachedBlocks {
    // Larger than any file of these tests: nothing is evicted.
    let memory = Arc::new(BlockMemory::new(16384 * BLOCK, BLOCK, 16).unwrap());
    let pool = Arc::new(FetchPool::new(threads).unwrap());
    CachedBlocks::new(Arc::clone(file) as Arc<dyn Fetch>, memory, pool, readahead)
}

fn check(cache: &CachedBlocks, offset: u64, len: usize) {
    let mut buf = vec![0xff; len];
    cache.read(offset, &mut buf).unwrap();
    let expected = (offset..).map(|at| (at / BLOCK) as u8);
    assert!(buf.iter().copied().eq(expected.take(len)), "{len} bytes at {offset}");
}

#[test]
fn neighbouring_blocks_are_one_fetch_up_to_the_longest_run() {
    let file = Numbered::new(100 * BLOCK + 7);
    let cache = cache(&file, 0, 0);
    check(&cache, 3 * BLOCK + 5, 4 * BLOCK as usize);
    assert_eq!(file.asked(), [(3, 8)]);
    check(&cache, 5 * BLOCK, 20 * BLOCK as usize);
    assert_eq!(file.asked(), [(8, 16), (16, 24), (24, 25)]);
    check(&cache, 99 * BLOCK, BLOCK as usize + 7);
    assert_eq!(file.asked(), [(99, 101)]);
    check(&cache, 3 * BLOCK, 22 * BLOCK as usize);
    assert_eq!(file.asked(), []);
}

#[test]
fn a_run_ends_before_a_block_that_is_cached() {
    let file = Numbered::new(100 * BLOCK);
    let cache = cache(&file, 0, 0);
    check(&cache, 4 * BLOCK, 1);
    check(&cache, 2 * BLOCK, 5 * BLOCK as usize);
    assert_eq!(file.asked(), [(4, 5), (2, 4), (5, 7)]);
}

#[test]
fn blocks_before_a_broken_one_are_kept() {
    let file = Numbered::new(100 * BLOCK);
    let cache = cache(&file, 0, 0);
    file.broken.store(3, Ordering::Relaxed);
    let error = cache.read(0, &mut [0; 6 * BLOCK as usize]).unwrap_err();
    assert!(error.to_string().contains("block 3 is broken"), "{error}");
    assert!(!cache.file.has_flights());
    file.asked();
    check(&cache, 0, 3 * BLOCK as usize);
    assert_eq!(file.asked(), []);
    file.broken.store(u64::MAX, Ordering::Relaxed);
    check(&cache, 0, 6 * BLOCK as usize);
}

#[test]
fn what_is_not_in_memory_would_block_and_is_not_fetched() {
    let file = Numbered::new(100 * BLOCK);
    let cache = cache(&file, 0, 0);
    check(&cache, 0, BLOCK as usize);
    file.asked();
    without_waiting(|| check(&cache, 0, BLOCK as usize));
    let mut buf = [0; 2 * BLOCK as usize];
    let error = without_waiting(|| cache.read(0, &mut buf)).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::WouldBlock);
    assert_eq!(file.asked(), []);
    cache.read(0, &mut buf).unwrap();
}

#[test]
fn a_sequential_reader_finds_the_next_blocks_in_memory() {
    let file = Numbered::new(4000 * BLOCK);
    let cache = cache(&file, 2, 64 * BLOCK);
    for at in (0..4000).step_by(4) {
        check(&cache, at * BLOCK, 4 * BLOCK as usize);
    }
    let asked = file.asked();
    let blocks: u64 = asked.iter().map(|(start, end)| end - start).sum();
    assert_eq!(blocks, 4000, "no block is fetched twice");
    assert!(asked.len() < 1000, "{} fetches", asked.len());
}

#[test]
fn a_fetch_ahead_of_a_reader_is_longer_than_one_that_it_waits_for() {
    let file = Numbered::new(100 * BLOCK);
    let cache = cache(&file, 0, 0);
    let (requested, ahead): (Vec<u64>, Vec<u64>) = ((0..10).collect(), (10..60).collect());
    cache.pool.queue(&cache.file, &requested, &ahead, 32);
    let taken: Vec<_> = (0..4).map_while(|_| cache.pool.next()).collect();
    assert_eq!(taken, [(0..8, true), (8..10, true), (10..42, false), (42..60, false)]);
}

#[test]
fn files_that_share_memory_keep_their_blocks_apart() {
    let (one, other) = (Numbered::new(8 * BLOCK), Numbered::new(8 * BLOCK));
    let memory = Arc::new(BlockMemory::new(256 * BLOCK, BLOCK, 16).unwrap());
    let pool = Arc::new(FetchPool::new(0).unwrap());
    for file in [&one, &other] {
        let fetch = Arc::clone(file) as Arc<dyn Fetch>;
        let cache = CachedBlocks::new(fetch, Arc::clone(&memory), Arc::clone(&pool), 0);
        check(&cache, 0, 8 * BLOCK as usize);
        assert_eq!(file.asked(), [(0, 8)]);
    }
}

#[test]
fn a_block_of_another_request_is_used_only_if_it_is_complete() {
    let file = Numbered::new(2 * BLOCK);
    let cache = cache(&file, 0, 0);
    cache.file.put(0, Block::new(vec![0; BLOCK as usize]));
    cache.file.put(1, Block::new(vec![1; 7]));
    check(&cache, 0, 2 * BLOCK as usize);
    assert_eq!(file.asked(), [(1, 2)]);
}
