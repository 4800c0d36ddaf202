//! Blocks of one file in memory, and the fetches of those that are missing.
//!
//! A run is one fetch of neighbouring blocks. Each block is cached, and its waiters are woken, as soon as it is complete.
//!
//! # Locks
//!
//! `flights` and `streams` are each held alone and only for a few instructions; the cache and the flights have their
//! own locks inside, which may be acquired while `flights` is held. No lock is held across a fetch or a copy.
//!
//! Invariant: a flight is in `flights` until its block is in the cache or its fetch has failed. A reader that checks
//! the cache again while it holds `flights` therefore never starts a second fetch of a block that has just been cached.
//! A write, or the end of trust in the content, takes flights out of `flights` before their fetches end (detaches them):
//! their blocks are never cached. See `writes.rs`.

use std::collections::HashMap;
use std::fmt;
use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Instant;

use super::block_memory::{BlockKey, BlockMemory};
use super::readahead::ReadStreams;
use super::single_flight::{Claim, Flight};
use super::{Block, Fetch, may_wait, would_block};
use crate::error::{Error, Result};
use crate::mutex::lock;

/// A cached block that a write changes.
#[derive(Debug)]
pub(super) struct PatchedBlock {
    number: u64,
    old: Block,
    new: Block,
}

/// Blocks of one file: those in memory, and the fetches of the others.
pub(super) struct FileBlocks {
    fetch: Arc<dyn Fetch>,
    memory: Arc<BlockMemory>,
    /// Number of the file in the keys. Another one after [`forget`](Self::forget): the blocks of the old number are found no
    /// more, and the memory evicts them.
    number: AtomicU64,
    len: u64,
    /// Size of a block in bytes; the last block may be smaller.
    block: u64,
    /// Fetches that are queued or in flight, by block number. Never held across a fetch.
    flights: Mutex<HashMap<u64, Arc<Flight>>>,
    streams: Mutex<ReadStreams>,
}

impl fmt::Debug for FileBlocks {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("FileBlocks")
            .field("fetch", &self.fetch)
            .field("block", &self.block)
            .finish_non_exhaustive()
    }
}

impl FileBlocks {
    /// Creates the blocks of `fetch`, whose read-ahead is at most `readahead` bytes.
    pub(super) fn new(fetch: Arc<dyn Fetch>, memory: Arc<BlockMemory>, readahead: u64) -> Self {
        let block = fetch.block().max(1);
        let window = readahead.min(memory.bytes_ahead()) / block;
        Self {
            number: memory.next_file().into(),
            len: fetch.len(),
            flights: Mutex::default(),
            streams: Mutex::new(ReadStreams::new(window)),
            block,
            memory,
            fetch,
        }
    }

    /// Puts a block into the memory that came with another request.
    pub(super) fn put(&self, number: u64, block: Block) {
        if block.len() as u64 == self.block_len(number) {
            self.memory.insert(self.key(number), block);
        }
    }

    /// Notes a read for the read-ahead. Returns the blocks to prefetch, and the number of blocks of the widest window.
    pub(super) fn note_read(&self, blocks: &Range<u64>) -> (Range<u64>, u64) {
        let mut streams = lock(&self.streams);
        let ahead = streams.read(blocks);
        let last = self.len.div_ceil(self.block);
        (ahead.start.min(last)..ahead.end.min(last), streams.widest())
    }

    /// Ends the fetches in flight with an error: no reader is left.
    pub(super) fn close(&self) {
        self.fetch.close();
    }

    /// Returns the numbers of the blocks that hold the bytes.
    pub(super) fn blocks_of(&self, bytes: &Range<u64>) -> Range<u64> {
        bytes.start / self.block..bytes.end.div_ceil(self.block)
    }

    /// Forgets all blocks, also those that are being fetched.
    pub(super) fn forget(&self) {
        let mut flights = lock(&self.flights);
        flights.clear();
        let next = self.memory.next_file();
        // Under the lock: a fetch checks there that its flight is not detached, and caches its block.
        self.number.store(next, Ordering::Release);
    }

    /// Returns the cached ones of the blocks that `data` changes, which lies at byte `offset`: each with its number, as it
    /// is, and as it becomes.
    pub(super) fn patched(&self, offset: u64, data: &[u8]) -> Vec<PatchedBlock> {
        let end = offset + data.len() as u64;
        let patched = self.blocks_of(&(offset..end)).filter_map(|number| {
            let old = self.memory.get(self.key(number))?;
            let (from, to) = (self.start(number), self.start(number) + self.block_len(number));
            let part = data.get((from.max(offset) - offset) as usize..(to.min(end) - offset) as usize)?;
            let mut bytes = Vec::clone(&old);
            let at = from.max(offset) - from;
            bytes
                .get_mut(at as usize..at as usize + part.len())?
                .copy_from_slice(part);
            Some(PatchedBlock {
                number,
                old,
                new: Block::new(bytes),
            })
        });
        patched.collect()
    }

    /// Replaces the blocks of a range by those in `patched`, if they are still as they were then, and drops the others. No
    /// fetch that is in flight caches one of them.
    pub(super) fn update(&self, blocks: Range<u64>, patched: Vec<PatchedBlock>) {
        let mut patched = patched.into_iter().peekable();
        let mut flights = lock(&self.flights);
        for number in blocks {
            flights.remove(&number);
            let key = self.key(number);
            let new = patched.next_if(|block| block.number == number);
            let cached = self.memory.get(key);
            match (new, cached) {
                (Some(block), Some(cached)) if Arc::ptr_eq(&block.old, &cached) => {
                    self.memory.insert(key, block.new);
                }
                (_, Some(_)) => self.memory.remove(key),
                (_, None) => {}
            }
        }
    }

    /// Returns the size of a block in bytes.
    pub(super) fn block_size(&self) -> u64 {
        self.block
    }

    /// Returns true if a read of the range needs no fetch.
    pub(super) fn holds(&self, offset: u64, len: u64) -> bool {
        let block = self.block;
        (offset / block..(offset + len).div_ceil(block)).all(|block| self.is_known(block))
    }

    /// Returns true if the block of a byte is cached; false behind the end.
    pub(super) fn holds_byte(&self, offset: u64) -> bool {
        self.memory.contains(self.key(offset / self.block))
    }

    /// Returns true if a read of the range would go on where an earlier one has stopped.
    pub(super) fn continues(&self, offset: u64, len: u64) -> bool {
        let block = self.block;
        lock(&self.streams).continues(&(offset / block..(offset + len).div_ceil(block)))
    }

    /// Returns the largest number of neighbouring blocks that one fetch brings a reader.
    pub(super) fn max_run(&self) -> u64 {
        self.fetch.max_run().max(1)
    }

    /// Returns the largest number of neighbouring blocks that one fetch brings ahead of a reader.
    pub(super) fn max_run_ahead(&self) -> u64 {
        self.fetch.max_run_ahead().max(self.max_run())
    }

    fn key(&self, block: u64) -> BlockKey {
        BlockKey::new(self.number.load(Ordering::Acquire), block)
    }

    #[cfg(test)]
    pub(super) fn has_flights(&self) -> bool {
        !lock(&self.flights).is_empty()
    }

    fn start(&self, block: u64) -> u64 {
        block.saturating_mul(self.block)
    }

    /// Returns the number of bytes of a block: less than usual at the end of the file.
    pub(super) fn block_len(&self, block: u64) -> u64 {
        self.block.min(self.len.saturating_sub(self.start(block)))
    }

    fn is_zero(&self, block: u64) -> bool {
        let start = self.start(block);
        self.fetch.is_zero(start..start + self.block_len(block))
    }

    /// Returns true if a block needs no fetch.
    pub(super) fn is_known(&self, block: u64) -> bool {
        self.memory.contains(self.key(block)) || self.is_zero(block)
    }

    /// Copies bytes of the first of `blocks` from byte `skip` on. The reader will want the others too.
    pub(super) fn copy(&self, blocks: Range<u64>, skip: usize, part: &mut [u8]) -> Result<()> {
        if let Some(data) = self.memory.get(self.key(blocks.start)) {
            return copy_from(&data, skip, part);
        }
        if self.is_zero(blocks.start) {
            part.fill(0);
            return Ok(());
        }
        copy_from(&self.block(blocks)?, skip, part)
    }

    /// Returns the first of `blocks`, which was not cached: fetches it with its neighbours, or waits for another thread
    /// that fetches it.
    fn block(&self, blocks: Range<u64>) -> Result<Block> {
        if !may_wait() {
            return Err(would_block());
        }
        let block = blocks.start;
        let flight = {
            let mut flights = lock(&self.flights);
            // Another thread may have fetched it since the caller checked. A flight leaves the list after its block is
            // cached, so a block whose flight is gone is found here.
            if let Some(data) = self.memory.get(self.key(block)) {
                return Ok(data);
            }
            Arc::clone(flights.entry(block).or_insert_with(Flight::new))
        };
        let Some(claim) = flight.claim() else {
            let deadline = Instant::now() + self.fetch.deadline();
            if let Some(last) = self.last_in_flight(block + 1..blocks.end) {
                // Its result is that of its own block, which the reader asks for next.
                let _ = last.wait(deadline);
            }
            return flight.wait(deadline);
        };
        // Unclaimed, or queued for a thread that has not started: do not wait for it.
        let mut run = vec![Fetching::new(self, block, claim)];
        let most = blocks.end.min(block + self.max_run());
        run.extend((block + 1..most).map_while(|next| self.claim(next)));
        // The result of the first block is that of its flight: a later block of the run may have failed alone.
        let _ = self.fetch(run);
        flight.wait(Instant::now() + self.fetch.deadline())
    }

    /// Returns the flight of the last of the first of `blocks` that other threads are fetching.
    ///
    /// The reader needs all of them, and those of one fetch come in their order: a thread that waits for the last one is
    /// woken once, and not for each of 32 blocks.
    fn last_in_flight(&self, blocks: Range<u64>) -> Option<Arc<Flight>> {
        let flights = lock(&self.flights);
        let running = blocks.map_while(|block| flights.get(&block).filter(|flight| flight.is_running()));
        running.last().map(Arc::clone)
    }

    /// Claims the fetch of a block. Returns `None` if it needs no fetch, or another thread fetches it.
    fn claim(&self, block: u64) -> Option<Fetching<'_>> {
        if self.is_known(block) {
            return None;
        }
        let flight = {
            let mut flights = lock(&self.flights);
            if self.memory.contains(self.key(block)) {
                return None;
            }
            Arc::clone(flights.entry(block).or_insert_with(Flight::new))
        };
        flight.claim().map(|claim| Fetching::new(self, block, claim))
    }

    /// Fetches those of `blocks` that no other thread fetches. Blocks that no reader has requested are left out if the
    /// reader that they were prefetched for has passed them, and perhaps evicted them, in the meantime.
    pub(super) fn fetch_unclaimed(&self, blocks: Range<u64>, requested: bool) {
        let mut run = Vec::new();
        for block in blocks {
            let wanted = requested || lock(&self.streams).wants(block);
            match wanted.then(|| self.claim(block)).flatten() {
                Some(fetching) => run.push(fetching),
                None if run.is_empty() => {}
                // An error is not reported: the readers fetch the block again and report theirs.
                None => drop(self.fetch(std::mem::take(&mut run))),
            }
        }
        if !run.is_empty() {
            let _ = self.fetch(run);
        }
    }

    /// Fetches neighbouring blocks that are claimed. All flights have ended when it returns.
    fn fetch(&self, run: Vec<Fetching<'_>>) -> Result<()> {
        let Some(first) = run.first().map(|fetching| fetching.block) else {
            return Ok(());
        };
        let blocks = first..first + run.len() as u64;
        let mut run = run.into_iter();
        let mut take = |data: Block| {
            if let Some(fetching) = run.next() {
                fetching.finish(data);
            }
        };
        let fetched = self.fetch.fetch(blocks, &mut take);
        let error = match &fetched {
            Ok(()) => Error::corrupt("a fetch ended without all of its blocks"),
            Err(e) => e.clone(),
        };
        run.for_each(|fetching| fetching.fail(error.clone()));
        fetched
    }
}

/// Claimed fetch of one block. If it is dropped (a panic), the flight fails and leaves the list.
struct Fetching<'a> {
    file: &'a FileBlocks,
    block: u64,
    claim: Option<Claim>,
}

impl<'a> Fetching<'a> {
    fn new(file: &'a FileBlocks, block: u64, claim: Claim) -> Self {
        let claim = Some(claim);
        Self { file, block, claim }
    }

    fn finish(mut self, data: Block) {
        let result = if data.len() as u64 == self.file.block_len(self.block) {
            Ok(data)
        } else {
            Err(Error::corrupt("a fetched block has a wrong length"))
        };
        self.end(result);
    }

    fn fail(mut self, error: Error) {
        self.end(Err(error));
    }

    fn end(&mut self, result: Result<Block>) {
        let Some(claim) = self.claim.take() else { return };
        self.leave(&claim, result.as_ref().ok());
        claim.finish(result);
    }

    /// Takes the flight off the list and caches its block, unless it was detached: then another flight may have its place,
    /// and the block may be older than a write.
    fn leave(&self, claim: &Claim, data: Option<&Block>) {
        let mut flights = lock(&self.file.flights);
        if !flights.get(&self.block).is_some_and(|flight| claim.is_of(flight)) {
            return;
        }
        // Both under the lock: a reader that finds no flight finds the block.
        if let Some(data) = data {
            let key = self.file.key(self.block);
            self.file.memory.insert(key, Arc::clone(data));
        }
        flights.remove(&self.block);
    }
}

impl Drop for Fetching<'_> {
    fn drop(&mut self) {
        // Dropped before the claim: readers that come later start a new flight.
        if let Some(claim) = &self.claim {
            self.leave(claim, None);
        }
    }
}

fn copy_from(data: &[u8], skip: usize, part: &mut [u8]) -> Result<()> {
    match data.get(skip..skip + part.len()) {
        Some(bytes) => {
            part.copy_from_slice(bytes);
            Ok(())
        }
        None => Err(Error::corrupt("read beyond the end of a cached block")),
    }
}
