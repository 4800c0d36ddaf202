//! Writer of the blocks of one fetch.

use std::ops::Range;
use std::time::{Duration, Instant};

use super::file::TierFile;
use super::format::Checksum;

/// Blocks of one fetch on their way into the files. Their entries are written for several at a time.
pub(super) struct RunWriter<'a> {
    file: &'a TierFile,
    /// Number of the next block.
    number: u64,
    /// Number of the block after the last one.
    end: u64,
    /// Checksums of the last blocks, which are not published yet.
    sums: Vec<Checksum>,
    /// Time of the last publication, or of the start.
    published: Instant,
}

impl<'a> RunWriter<'a> {
    /// Blocks that are published at once.
    const MOST: usize = 16;
    /// Time after which a block is published at once: a slow line brings one after the other, and other processes wait.
    const DELAY: Duration = Duration::from_millis(50);

    /// Creates the writer of `blocks`.
    pub(super) fn new(file: &'a TierFile, blocks: Range<u64>) -> Self {
        RunWriter {
            file,
            number: blocks.start,
            end: blocks.end,
            sums: Vec::new(),
            published: Instant::now(),
        }
    }

    /// Keeps the next block.
    pub(super) fn write(&mut self, data: &[u8]) {
        let kept = self.file.write_data(self.number, data);
        match kept {
            Some(sum) => self.sums.push(sum),
            None => self.publish(),
        }
        self.number += 1;
        // A reader that gets the last block finds all of them published.
        if self.number == self.end || self.sums.len() >= Self::MOST || self.published.elapsed() >= Self::DELAY {
            self.publish();
        }
    }

    fn publish(&mut self) {
        if !self.sums.is_empty() {
            self.file.publish(self.number - self.sums.len() as u64, &self.sums);
        }
        self.sums.clear();
        self.published = Instant::now();
    }
}

impl Drop for RunWriter<'_> {
    fn drop(&mut self) {
        self.publish();
    }
}
