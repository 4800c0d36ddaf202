//! Blocks in two sizes: large ones for readers that stay in a place, small ones for readers that jump about.
//!
//! ```text
//!   read ─► in large blocks? in small ones? ─► copy
//!     └ missing ─► long, continues a read, or beside what was read before ─► large
//!                  one of many short reads in a row that had nothing to do with any before ─► small
//! ```
//! A large block costs a far server no more time than a small one, and a guest's file system finds much of what it reads
//! next in it. A reader without locality only pays for it: with the server's and this machine's processors, and with the
//! line.
//!
//! The measure is the part of the last short reads that found what they wanted, or missed it beside something that was
//! read before. A reader that jumps about has such luck too, as often as its part of the file is cached.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use super::block_memory::BlockMemory;
use super::blocks::CachedBlocks;
use super::{Block, Fetch, FetchPool, may_wait, would_block};
use crate::error::Result;

/// A locality of all reads.
const ALL: u32 = 1 << 16;
/// Locality from which on large blocks pay: every fourth read.
const WORTH: u32 = ALL / 4;
/// Number of reads over which the locality is measured, about.
const WINDOW: u32 = 16;

/// Blocks of one file in two sizes, in one memory.
#[derive(Debug)]
pub struct AdaptiveBlocks {
    large: CachedBlocks,
    /// `None` if all blocks are large.
    small: Option<CachedBlocks>,
    /// Part of the last reads that showed locality, of [`ALL`].
    locality: AtomicU32,
}

impl AdaptiveBlocks {
    /// Creates the blocks of one file from its two origins, which differ in the size of their blocks. Read-ahead, of at
    /// most `readahead` bytes, fetches large blocks.
    ///
    /// Without `small`, all blocks are large: where they are kept on disk, a small one would be fetched once more as a
    /// part of a large one.
    pub fn new(
        large: Arc<dyn Fetch>,
        small: Option<Arc<dyn Fetch>>,
        memory: &Arc<BlockMemory>,
        pool: &Arc<FetchPool>,
        readahead: u64,
    ) -> Self {
        let small = small.map(|small| CachedBlocks::new(small, Arc::clone(memory), Arc::clone(pool), 0));
        Self {
            large: CachedBlocks::new(large, Arc::clone(memory), Arc::clone(pool), readahead),
            small,
            // Most readers are local, and until there are some reads the size hardly matters.
            locality: AtomicU32::new(ALL),
        }
    }

    /// Puts a large block into the memory that came with another request.
    pub fn put(&self, number: u64, block: Block) {
        self.large.file().put(number, block);
    }

    /// Reads from byte `offset` on and fills `buf` completely. The range must lie in the file.
    ///
    /// Errors: `WouldBlock` within `without_waiting`, those of the fetch.
    pub fn read(&self, offset: u64, buf: &mut [u8]) -> Result<()> {
        let len = buf.len() as u64;
        let Some(small) = self.small.as_ref().filter(|small| len <= 2 * small.file().block_size()) else {
            return self.large.read(offset, buf);
        };
        if self.large.file().holds(offset, len) {
            self.note(true);
            return self.large.read(offset, buf);
        }
        if small.file().holds(offset, len) {
            return small.read(offset, buf);
        }
        if !may_wait() {
            return Err(would_block());
        }
        let before = offset.saturating_sub(small.file().block_size());
        let after = offset + len + small.file().block_size() - 1;
        let continues = self.large.file().continues(offset, len);
        let is_local = self.note(continues || small.file().holds_byte(before) || small.file().holds_byte(after));
        match continues || is_local {
            true => self.large.read(offset, buf),
            false => small.read(offset, buf),
        }
    }

    /// Counts a read. Returns true if reads are local enough for large blocks.
    fn note(&self, local: bool) -> bool {
        let target = if local { ALL } else { 0 };
        // A count that is lost to another thread does not matter.
        let now = self.locality.load(Ordering::Relaxed);
        let next = (now * (WINDOW - 1) + target) / WINDOW;
        self.locality.store(next, Ordering::Relaxed);
        next >= WORTH
    }
}

#[cfg(test)]
mod tests {
    use std::ops::Range;
    use std::sync::Mutex;
    use std::time::Duration;

    use super::*;

    const LEN: u64 = 64 << 20;

    /// Origin whose byte at `n` is `n / 4096`, and which notes what is fetched.
    #[derive(Debug)]
    struct Origin {
        block: u64,
        fetched: Arc<Mutex<Vec<Range<u64>>>>,
    }

    impl Fetch for Origin {
        fn len(&self) -> u64 {
            LEN
        }

        fn block(&self) -> u64 {
            self.block
        }

        fn max_run(&self) -> u64 {
            8
        }

        fn deadline(&self) -> Duration {
            Duration::from_secs(60)
        }

        fn fetch(&self, blocks: Range<u64>, each: &mut (dyn FnMut(Block) + Send)) -> Result<()> {
            let bytes = blocks.start * self.block..blocks.end * self.block;
            self.fetched.lock().unwrap().push(bytes);
            for block in blocks {
                let start = block * self.block;
                each(Block::new(
                    (start..start + self.block).map(|n| (n / 4096) as u8).collect(),
                ));
            }
            Ok(())
        }
    }

    struct Fixture {
        blocks: AdaptiveBlocks,
        fetched: Arc<Mutex<Vec<Range<u64>>>>,
    }

    impl Fixture {
        fn new() -> Self {
            Self::with(Some(4 << 10))
        }

        fn with(small: Option<u64>) -> Self {
            let fetched = Arc::<Mutex<_>>::default();
            let origin = |block| {
                Arc::new(Origin {
                    block,
                    fetched: Arc::clone(&fetched),
                }) as Arc<dyn Fetch>
            };
            let memory = Arc::new(BlockMemory::new(LEN, 32 << 10, 8).unwrap());
            let pool = Arc::new(FetchPool::new(0).unwrap());
            let blocks = AdaptiveBlocks::new(origin(32 << 10), small.map(origin), &memory, &pool, 0);
            Self { blocks, fetched }
        }

        /// Reads 4 KiB, and returns the number of bytes that were fetched for it.
        fn read(&self, offset: u64) -> u64 {
            let mut buf = [0; 4096];
            self.blocks.read(offset, &mut buf).unwrap();
            let expected: Vec<u8> = (offset..offset + 4096).map(|n| (n / 4096) as u8).collect();
            assert!(buf == expected.as_slice(), "at {offset}");
            self.fetched
                .lock()
                .unwrap()
                .drain(..)
                .map(|bytes| bytes.end - bytes.start)
                .sum()
        }

        /// Reads `times` at places that have nothing to do with each other. Returns the bytes that the last read fetched.
        fn jump(&self, round: u64, times: u64) -> u64 {
            let place = |n: u64| ((n * 7 % 61) << 20) + (round << 17);
            (0..times).map(|n| self.read(place(n))).last().unwrap()
        }
    }

    #[test]
    fn a_reader_without_locality_gets_small_blocks_after_a_while() {
        let file = Fixture::new();
        assert_eq!(file.jump(0, 1), 32 << 10);
        assert_eq!(file.jump(1, 40), 4 << 10);
        // Some luck does not change that.
        file.read(3 << 17);
        file.read((3 << 17) + 4096);
        assert_eq!(file.jump(2, 5), 4 << 10);
    }

    #[test]
    fn reads_beside_earlier_ones_bring_large_blocks_back() {
        let file = Fixture::new();
        file.jump(0, 60);
        let at = 62 << 20;
        let fetched: Vec<u64> = (0..16).map(|n| file.read(at + n * 4096)).collect();
        assert_eq!(fetched[0], 4 << 10);
        assert!(
            fetched.contains(&(32 << 10)) && fetched.ends_with(&[0, 0]),
            "{fetched:?}"
        );
        assert_eq!(file.jump(1, 1), 32 << 10);
    }

    #[test]
    fn what_was_fetched_in_either_size_is_not_fetched_again() {
        let file = Fixture::new();
        file.jump(0, 60);
        for n in 0..60 {
            assert_eq!(file.read((n * 7 % 61) << 20), 0);
        }
    }

    #[test]
    fn without_small_blocks_no_byte_is_fetched_twice() {
        let file = Fixture::with(None);
        file.jump(0, 60);
        assert_eq!(file.jump(1, 5), 32 << 10);
        let of_the_block = (0..8).map(|n| file.read((62 << 20) + n * 4096));
        assert_eq!(of_the_block.sum::<u64>(), 32 << 10);
    }

    #[test]
    fn an_unaligned_read_is_one_fetch_of_two_small_blocks() {
        let file = Fixture::new();
        file.jump(0, 60);
        assert_eq!(file.read((62 << 20) + 512), 8 << 10);
    }
}
