//! Writer of the blocks of one fetch.

use std::ops::Range;
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::file::TierFile;
use super::format::Checksum;
use crate::cache::Block;

/// Blocks of one fetch on their way into the files. Several at a time are written, then their entries.
pub(super) struct RunWriter<'a> {
    file: &'a TierFile,
    /// Number of the next block.
    number: u64,
    /// Number of the block after the last one.
    end: u64,
    /// Last blocks, which are not written yet.
    blocks: Vec<Block>,
    /// Their checksums.
    sums: Vec<Checksum>,
    /// Time of the last write, or of the start.
    written: Instant,
}

impl<'a> RunWriter<'a> {
    /// Bytes that are written at once. ext4 needs 0.18 s for a GiB, 0.27 s in writes of 32 KiB, and 2.4 s in writes of 8 MiB.
    const GATHERED: u64 = 1 << 20;
    /// Time after which a block is written at once: a slow line brings one after the other, and other processes wait.
    const DELAY: Duration = Duration::from_millis(50);

    /// Creates the writer of `blocks`.
    pub(super) fn new(file: &'a TierFile, blocks: Range<u64>) -> Self {
        RunWriter {
            file,
            number: blocks.start,
            end: blocks.end,
            blocks: Vec::new(),
            sums: Vec::new(),
            written: Instant::now(),
        }
    }

    /// Returns true if the next block is the last one.
    pub(super) fn is_at_last(&self) -> bool {
        self.number + 1 >= self.end
    }

    /// Keeps the next block.
    pub(super) fn push(&mut self, data: &Block) {
        if self.file.refusal().is_some() {
            // Nothing is kept any more, so nothing is gathered either.
            self.blocks.clear();
            return;
        }
        // While the bytes are in the processor's cache.
        self.sums.push(Checksum::of(data));
        self.blocks.push(Arc::clone(data));
        self.number += 1;
        let gathered = self.blocks.len() as u64 * self.file.key().block;
        if self.number == self.end || gathered >= Self::GATHERED || self.written.elapsed() >= Self::DELAY {
            self.write();
        }
    }

    fn write(&mut self) {
        if !self.blocks.is_empty() {
            let parts: Vec<&[u8]> = self.blocks.iter().map(|block| block.as_slice()).collect();
            self.file
                .write_run(self.number - parts.len() as u64, &parts, &self.sums);
        }
        self.blocks.clear();
        self.sums.clear();
        self.written = Instant::now();
    }
}

impl Drop for RunWriter<'_> {
    fn drop(&mut self) {
        self.write();
    }
}
