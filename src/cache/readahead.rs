//! Which blocks a reader will want next.
//!
//! A few streams are followed at once. A read that goes on where one of them stopped makes its window grow up to
//! the bound; any other read begins a new stream in the place of the one that was idle longest, with no window,
//! so random reads fetch nothing ahead.

use std::ops::Range;

/// Streams that are followed: more readers of one disk at a time are rare.
const STREAMS: usize = 8;

#[derive(Debug, Clone, Copy, Default)]
struct Stream {
    /// The block after the last one that was read.
    next: u64,
    /// The block after the last one that was asked for ahead of time.
    fetched: u64,
    /// Blocks to be ahead by.
    window: u64,
    /// When it was last used, in reads.
    used: u64,
}

/// Follows the reads of one disk.
#[derive(Debug)]
pub(crate) struct Streams {
    streams: [Stream; STREAMS],
    clock: u64,
    /// The largest window, in blocks.
    most: u64,
}

impl Streams {
    /// Follows reads with windows of at most `most` blocks; 0: nothing is fetched ahead.
    pub(crate) fn new(most: u64) -> Self {
        Self {
            streams: [Stream::default(); STREAMS],
            clock: 0,
            most,
        }
    }

    /// Notes a read of `blocks`; the blocks to fetch ahead for it.
    pub(crate) fn read(&mut self, blocks: &Range<u64>) -> Range<u64> {
        self.clock += 1;
        let clock = self.clock;
        // the last block of the previous read may be read again, where reads don't end at block borders
        let goes_on = |s: &Stream| s.used > 0 && (blocks.start == s.next || blocks.start + 1 == s.next);
        if let Some(s) = self.streams.iter_mut().find(|s| goes_on(s)) {
            let grown = blocks.end > s.next;
            s.next = s.next.max(blocks.end);
            s.used = clock;
            if grown {
                let least = blocks.end - blocks.start;
                s.window = (s.window * 2).max(least).min(self.most);
            }
            let from = s.fetched.max(s.next);
            let to = s.next + s.window;
            // half a window at a time, so that workers get batches and not single blocks
            if to <= from || to - from < s.window / 2 {
                return 0..0;
            }
            s.fetched = to;
            return from..to;
        }
        if let Some(oldest) = self.streams.iter_mut().min_by_key(|s| s.used) {
            *oldest = Stream {
                next: blocks.end,
                fetched: blocks.end,
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
    fn a_sequential_reader_is_fetched_for_once_and_within_the_bound() {
        let mut s = Streams::new(16);
        let mut ahead = 0;
        assert!(s.read(&(0..2)).is_empty());
        for at in (2..200).step_by(2) {
            let want = s.read(&(at..at + 2));
            assert!(want.is_empty() || want.start >= ahead, "no block twice");
            assert!(want.end <= at + 2 + 16, "within the bound");
            ahead = ahead.max(want.end);
        }
        assert!(ahead > 200);
    }

    #[test]
    fn random_reads_fetch_nothing() {
        let mut s = Streams::new(16);
        let mut at = 12345u64;
        for _ in 0..1000 {
            at = at.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            let block = at >> 20;
            assert!(s.read(&(block..block + 1)).is_empty());
        }
    }

    #[test]
    fn several_streams_keep_their_windows() {
        let mut s = Streams::new(8);
        let mut fetched = [0u64; 4];
        for i in 0..50 {
            for (k, f) in fetched.iter_mut().enumerate() {
                let base = k as u64 * 1_000_000 + i;
                let want = s.read(&(base..base + 1));
                *f += want.end - want.start;
            }
        }
        assert!(fetched.iter().all(|f| *f >= 49), "{fetched:?}");
    }
}
