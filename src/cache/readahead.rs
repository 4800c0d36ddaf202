//! Read-ahead policy: predicts which blocks sequential readers will want next.
//!
//! Each sequential reader is a *read stream*; a few are tracked at once. A read that continues where a read stream
//! stopped widens its window to four times of what the stream has read: a reader that stops has cost no more than that. The
//! streams that are read at the time share the largest window. Any other read replaces the least recently used read stream
//! with a new one that has no window, so random reads prefetch nothing.
//!
//! The kernel sends the parts of one large read at once, and several threads take them: they may arrive out of order. A
//! read within what a stream has prefetched, or a short way behind its end, therefore belongs to the stream too.

use std::ops::Range;

/// Number of read streams that are tracked: more sequential readers of one disk at a time are rare.
const STREAMS: usize = 8;

/// Blocks of a window for each block that its stream has read.
const READ_AHEAD: u64 = 4;

/// Number of reads after which a stream that had none of them is taken for one that has ended.
const RECENT: u64 = 64;

/// Blocks behind the end of a stream in which a read still belongs to it: some parts of 1 MiB in the smallest blocks.
const BEHIND: u64 = 128;

#[derive(Debug, Clone, Copy, Default)]
struct ReadStream {
    /// Block after the last one that was read.
    next: u64,
    /// Block after the last one that was prefetched.
    fetched: u64,
    /// Number of blocks that were read.
    read: u64,
    /// Number of blocks to prefetch after `next`.
    window: u64,
    /// Value of the clock at its last read; 0 if the read stream is unused.
    used: u64,
}

impl ReadStream {
    fn is_continued_by(&self, blocks: &Range<u64>) -> bool {
        // A stream without a window has read once: only the blocks after it show that it is one.
        let behind = if self.window == 0 { 1 } else { BEHIND };
        // Reads need not end at block borders, so a sequential read may begin with the last block of the previous one.
        self.used > 0 && blocks.start + behind >= self.next && blocks.start <= self.next.max(self.fetched)
    }
}

/// Read streams of one disk.
#[derive(Debug)]
pub(crate) struct ReadStreams {
    streams: [ReadStream; STREAMS],
    /// Number of reads so far.
    clock: u64,
    /// Maximum window, in blocks.
    max_window: u64,
}

impl ReadStreams {
    /// Creates a tracker with windows of at most `max_window` blocks; 0 disables read-ahead.
    pub(crate) fn new(max_window: u64) -> Self {
        Self {
            streams: [ReadStream::default(); STREAMS],
            clock: 0,
            max_window,
        }
    }

    /// Returns the largest window of a stream.
    pub(crate) fn widest(&self) -> u64 {
        self.streams.iter().map(|s| s.window).max().unwrap_or(0)
    }

    /// Returns true if a block was prefetched for a stream that has not read it yet.
    pub(crate) fn wants(&self, block: u64) -> bool {
        self.streams.iter().any(|s| (s.next..s.fetched).contains(&block))
    }

    /// Returns true if a read of `blocks` belongs to a stream. Records nothing.
    pub(crate) fn continues(&self, blocks: &Range<u64>) -> bool {
        self.streams.iter().any(|s| s.is_continued_by(blocks))
    }

    /// Returns the number of streams that blocks are prefetched for. What is prefetched for all of them must fit into the
    /// memory, or the blocks of one would evict those of another before they are read.
    fn prefetching(&self) -> u64 {
        let prefetches = |s: &&ReadStream| s.window > 0 && self.clock - s.used < RECENT;
        self.streams.iter().filter(prefetches).count() as u64
    }

    /// Records a read of `blocks`. Returns the blocks to prefetch, which may be none or lie beyond the end of the disk.
    pub(crate) fn read(&mut self, blocks: &Range<u64>) -> Range<u64> {
        self.clock += 1;
        let clock = self.clock;
        let most = self.max_window / self.prefetching().max(1);
        if let Some(s) = self.streams.iter_mut().find(|s| s.is_continued_by(blocks)) {
            let grown = blocks.end.saturating_sub(s.next);
            s.next += grown;
            s.read += grown;
            s.used = clock;
            if grown > 0 {
                s.window = (s.read * READ_AHEAD).min(most);
            }
            let from = s.fetched.max(s.next);
            let to = s.next + s.window;
            // A quarter of a window at a time, so that the workers get batches instead of single blocks, and never run dry.
            if to <= from || to - from < s.window / 4 {
                return 0..0;
            }
            s.fetched = to;
            return from..to;
        }
        if let Some(oldest) = self.streams.iter_mut().min_by_key(|s| s.used) {
            *oldest = ReadStream {
                next: blocks.end,
                fetched: blocks.end,
                read: blocks.end - blocks.start,
                window: 0,
                used: clock,
            };
        }
        0..0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn blocks_that_a_stream_has_passed_are_not_wanted() {
        let mut s = ReadStreams::new(16);
        for at in 0..4 {
            s.read(&(at * 2..at * 2 + 2));
        }
        assert!(s.wants(8) && !s.wants(7) && !s.wants(1000));
        for n in 9..9 + STREAMS as u64 {
            s.read(&(n << 20..(n << 20) + 1));
        }
        assert!(!s.wants(8), "the stream was replaced");
    }

    #[test]
    fn each_block_of_a_sequential_read_is_prefetched_once_and_within_the_window() {
        let mut s = ReadStreams::new(16);
        let mut ahead = 0;
        assert!(s.read(&(0..2)).is_empty());
        for at in (2..200).step_by(2) {
            let prefetch = s.read(&(at..at + 2));
            assert!(
                prefetch.is_empty() || prefetch.start >= ahead,
                "a block was prefetched twice"
            );
            assert!(prefetch.end <= at + 2 + 16, "prefetched beyond the window");
            ahead = ahead.max(prefetch.end);
        }
        assert!(ahead > 200);
    }

    #[test]
    fn a_reader_that_stops_has_cost_a_few_times_of_what_it_has_read() {
        for len in [1, 32] {
            let mut s = ReadStreams::new(1 << 20);
            let mut fetched = 0;
            for n in 0..20 {
                let prefetch = s.read(&(n * len..(n + 1) * len));
                fetched += prefetch.end - prefetch.start;
                let read = (n + 1) * len;
                assert!(fetched <= 5 * read, "{fetched} after {read}");
            }
            assert!(fetched >= 60 * len, "{fetched}");
        }
    }

    #[test]
    fn random_reads_prefetch_nothing() {
        let mut s = ReadStreams::new(16);
        let mut at = 12345u64;
        for _ in 0..1000 {
            at = at.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            let block = at >> 20;
            assert!(s.read(&(block..block + 1)).is_empty());
        }
    }

    #[test]
    fn concurrent_sequential_readers_share_the_largest_window() {
        let mut s = ReadStreams::new(64);
        let mut ahead = [0u64; 2];
        for i in 0..300 {
            // The second reader begins later, and ends earlier.
            let readers = if (100..150).contains(&i) { 0..2 } else { 0..1 };
            for reader in readers {
                let base = reader as u64 * 1_000_000 + i;
                let prefetch = s.read(&(base..base + 1));
                if !prefetch.is_empty() {
                    ahead[reader] = prefetch.end - (base + 1);
                }
            }
            match i {
                99 | 299 => assert!(ahead[0] > 40, "{ahead:?} at {i}"),
                149 => assert!(ahead.iter().all(|ahead| (16..=32).contains(ahead)), "{ahead:?}"),
                _ => {}
            }
        }
    }

    #[test]
    fn concurrent_sequential_readers_keep_their_windows() {
        let mut s = ReadStreams::new(8);
        let mut fetched = [0u64; 4];
        for i in 0..50 {
            for (k, f) in fetched.iter_mut().enumerate() {
                let base = k as u64 * 1_000_000 + i;
                let prefetch = s.read(&(base..base + 1));
                *f += prefetch.end - prefetch.start;
            }
        }
        assert!(fetched.iter().all(|f| *f >= 49), "{fetched:?}");
    }
}
