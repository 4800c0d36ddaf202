//! Identity of an export across the connections of a session: digests of sampled blocks.
//!
//! A server that comes back may serve another disk of the same size. The writes of a session must not be replayed into
//! it. The protocol has no identity of an export, so some blocks are remembered:
//!
//! ```text
//!   unknown ── first change of the session ──► sampling ── answers ──► known ── connection lost ──► compared
//!                                                                        ▲                             │ equal
//!                                                                        └─────────────────────────────┘
//! ```
//! - Changes are sent once the blocks are known, so none can have been answered by a disk of which nothing is known.
//! - A block that the session has changed is never compared again: a server that lost unflushed writes may have its old
//!   content or the new one.
//! - An answer that arrives after its connection was lost is ignored, as it may come from the next server.
//! - With nothing to replay the blocks are read again instead of compared: another client may have written to them.
//!
//! One mutex, held for a look or a change only.

use std::ops::Range;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, MutexGuard};

use crate::error::{Error, Result};
use crate::mutex::lock;
use crate::source::sample::{BlockDigest, QUICK, block_digest, sampled_ranges};

/// Identity of an export; see the module documentation.
#[derive(Debug, Default)]
pub(super) struct ExportIdentity {
    samples: Mutex<Samples>,
    /// Number of sampled blocks that are still being read. No change is sent before it is 0.
    unread: AtomicUsize,
}

#[derive(Debug, Default)]
struct Samples {
    /// In order; empty while unknown.
    blocks: Vec<Block>,
    /// Number of lost connections.
    epoch: u64,
}

#[derive(Debug)]
struct Block {
    range: Range<u64>,
    /// `None` until it is read, or if it cannot be read.
    digest: Option<BlockDigest>,
    /// True once the session has changed it.
    changed: bool,
}

impl ExportIdentity {
    /// Notes a change of the bytes from `from` to `to` before it is sent. The first change returns the blocks that the
    /// caller must read ahead of it, and the number that [`learn`](Self::learn) takes.
    pub(super) fn before_change(&self, from: u64, to: u64, size: u64, block: u64) -> Option<(u64, Vec<Range<u64>>)> {
        let mut samples = self.samples();
        let first = samples.blocks.is_empty();
        if first {
            samples.blocks = sampled_ranges(size, block, QUICK).into_iter().map(Block::new).collect();
        }
        // The blocks do not overlap and are in order, so those that end after `from` and start before `to` are neighbours.
        let start = samples.blocks.partition_point(|block| block.range.end <= from);
        for block in samples
            .blocks
            .iter_mut()
            .skip(start)
            .take_while(|block| block.range.start < to)
        {
            block.changed = true;
        }
        first.then(|| {
            let blocks = samples.unchanged();
            // Under the mutex: the next change must not see a sampling that has not begun yet.
            self.unread.store(blocks.len(), Ordering::Release);
            (samples.epoch, blocks)
        })
    }

    /// Returns true while changes have to wait for the sampled blocks. Sent before them, a change could be answered and
    /// the connection be lost with nothing known of the disk that has it.
    pub(super) fn is_sampling(&self) -> bool {
        self.unread.load(Ordering::Acquire) > 0
    }

    /// Notes that a sampled block was read, or cannot be.
    pub(super) fn was_read(&self) {
        self.unread.fetch_sub(1, Ordering::AcqRel);
    }

    /// Remembers what a block held, unless the connection was lost since.
    pub(super) fn learn(&self, epoch: u64, start: u64, bytes: &[u8]) {
        let mut samples = self.samples();
        if samples.epoch == epoch
            && let Ok(index) = samples.blocks.binary_search_by_key(&start, |block| block.range.start)
            && let Some(block) = samples.blocks.get_mut(index)
        {
            block.digest = Some(block_digest(bytes));
        }
    }

    /// Notes that the connection is lost: no answer of it arrives any more. Returns the blocks to compare.
    pub(super) fn connection_lost(&self) -> Vec<Range<u64>> {
        let mut samples = self.samples();
        samples.epoch += 1;
        samples.unchanged()
    }

    /// Checks what the blocks hold now. With `compare` each must hold what it held before; without, it is remembered.
    ///
    /// Errors: `Corrupt` if a block differs.
    pub(super) fn check(&self, read: &[(u64, Vec<u8>)], compare: bool) -> Result<()> {
        let mut samples = self.samples();
        let (mut compared, mut different) = (0, 0);
        for (start, bytes) in read {
            let index = samples.blocks.binary_search_by_key(start, |block| block.range.start);
            let Some(block) = index.ok().and_then(|index| samples.blocks.get_mut(index)) else {
                continue;
            };
            let now = block_digest(bytes);
            // Changed while it was read: another thread queues commands meanwhile.
            if let Some(before) = block.digest.filter(|_| compare && !block.changed) {
                compared += 1;
                different += u32::from(before != now);
            } else {
                block.digest = Some(now);
            }
        }
        if different == 0 {
            return Ok(());
        }
        Err(Error::corrupt(format!(
            "the NBD export has changed: {different} of {compared} sampled blocks differ, so it is another disk, or another \
             client has written to it; unflushed writes are not replayed into it: start the server with the former disk, or \
             unmount"
        )))
    }

    fn samples(&self) -> MutexGuard<'_, Samples> {
        lock(&self.samples)
    }
}

impl Samples {
    /// Returns the blocks that the session has not changed.
    fn unchanged(&self) -> Vec<Range<u64>> {
        let unchanged = self.blocks.iter().filter(|block| !block.changed);
        unchanged.map(|block| block.range.clone()).collect()
    }
}

impl Block {
    fn new(range: Range<u64>) -> Self {
        Self {
            range,
            digest: None,
            changed: false,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SIZE: u64 = 1 << 30;

    /// Returns an identity that knows a disk of `fill` bytes, after a first change of its second block.
    fn known(fill: u8) -> ExportIdentity {
        let identity = ExportIdentity::default();
        let (epoch, blocks) = identity.before_change(4096, 8192, SIZE, 4096).unwrap();
        assert!(!blocks.contains(&(4096..8192)), "the changed block is not sampled");
        for block in blocks {
            identity.learn(epoch, block.start, &vec![fill; 4096]);
        }
        assert!(identity.before_change(0, 1, SIZE, 4096).is_none(), "sampled once");
        identity
    }

    fn read(blocks: Vec<Range<u64>>, fill: u8) -> Vec<(u64, Vec<u8>)> {
        blocks
            .into_iter()
            .map(|block| (block.start, vec![fill; 4096]))
            .collect()
    }

    #[test]
    fn another_disk_is_recognized_and_the_same_one_is_not_refused() {
        let identity = known(b'a');
        let blocks = identity.connection_lost();
        assert!(
            blocks.iter().all(|block| block.start >= 8192),
            "not the two changed blocks"
        );
        identity.check(&read(blocks.clone(), b'a'), true).unwrap();
        let error = identity.check(&read(blocks, b'b'), true).unwrap_err().to_string();
        assert!(error.contains("another disk"), "{error}");
    }

    #[test]
    fn without_unflushed_writes_the_content_of_now_is_learned() {
        let identity = known(b'a');
        let blocks = identity.connection_lost();
        identity.check(&read(blocks.clone(), b'b'), false).unwrap();
        identity.check(&read(blocks, b'b'), true).unwrap();
    }

    #[test]
    fn an_answer_after_the_loss_of_the_connection_is_ignored() {
        let identity = ExportIdentity::default();
        let (epoch, blocks) = identity.before_change(0, 1, SIZE, 4096).unwrap();
        identity.connection_lost();
        for block in &blocks {
            identity.learn(epoch, block.start, &[b'b'; 4096]);
        }
        identity.check(&read(blocks, b'a'), true).unwrap();
    }
}
