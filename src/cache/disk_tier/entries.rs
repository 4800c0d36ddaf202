//! Entries and completion record of a map: which blocks of a file are there.

use std::io;
use std::ops::{ControlFlow, Range};

use super::completion::RECORD;
use super::format::{COMPLETION, ENTRY, HEADER};
use super::storage::Storage;

/// Entries of one system call.
const CHUNK: u64 = 8192;

/// Entries of one map. An entry that cannot be read counts as 0: the map ends with its last entry.
pub(super) struct Entries {
    map: Box<dyn Storage>,
    blocks: u64,
}

impl Entries {
    pub(super) fn new(map: Box<dyn Storage>, blocks: u64) -> Self {
        Self { map, blocks }
    }

    /// Returns the entry of a block.
    pub(super) fn get(&self, number: u64) -> u64 {
        let mut entry = [0; ENTRY as usize];
        match self.map.read(&mut entry, HEADER + number * ENTRY) {
            Ok(()) => u64::from_le_bytes(entry),
            Err(_) => 0,
        }
    }

    /// Writes the entries of neighbouring blocks.
    pub(super) fn put(&self, first: u64, entries: &[u64]) -> io::Result<()> {
        let bytes: Vec<u8> = entries.iter().flat_map(|entry| entry.to_le_bytes()).collect();
        self.map.write(&bytes, HEADER + first * ENTRY)
    }

    /// Returns the number of blocks without an entry, one after the other, at the start of `blocks`.
    pub(super) fn missing(&self, blocks: Range<u64>) -> u64 {
        let mut entries = vec![0; ((blocks.end - blocks.start) * ENTRY) as usize];
        if self.map.read(&mut entries, HEADER + blocks.start * ENTRY).is_err() {
            return blocks.end - blocks.start;
        }
        let (entries, _) = entries.as_chunks::<8>();
        entries.iter().take_while(|entry| **entry == [0; 8]).count() as u64
    }

    /// Calls `each` with number and entry of each block from `first` on. Returns false if `each` broke that off.
    pub(super) fn each(&self, first: u64, mut each: impl FnMut(u64, u64) -> ControlFlow<()>) -> bool {
        let mut chunks = (first..self.blocks).step_by(CHUNK as usize);
        chunks.all(|first| self.each_of_chunk(first, &mut each))
    }

    /// The same for the blocks that have an entry alone. Skips the holes of the map: that of a large file has gigabytes.
    pub(super) fn each_present(&self, first: u64, mut each: impl FnMut(u64, u64) -> ControlFlow<()>) -> bool {
        let mut at = first;
        while at < self.blocks {
            let data = self.map.next_data(HEADER + at * ENTRY);
            at = at.max(data.saturating_sub(HEADER) / ENTRY);
            let present = |number, entry| match entry {
                0 => ControlFlow::Continue(()),
                _ => each(number, entry),
            };
            if !self.each_of_chunk(at, present) {
                return false;
            }
            at += CHUNK;
        }
        true
    }

    fn each_of_chunk(&self, first: u64, mut each: impl FnMut(u64, u64) -> ControlFlow<()>) -> bool {
        let count = CHUNK.min(self.blocks.saturating_sub(first));
        let mut entries = vec![0; (count * ENTRY) as usize];
        if self
            .map
            .read(&mut entries, HEADER + first.saturating_mul(ENTRY))
            .is_err()
        {
            entries.fill(0);
        }
        let (entries, _) = entries.as_chunks();
        let mut numbered = (first..).zip(entries);
        numbered.all(|(number, entry)| each(number, u64::from_le_bytes(*entry)).is_continue())
    }

    /// Returns the completion record, if it can be read.
    pub(super) fn record(&self) -> Option<[u8; RECORD]> {
        let mut record = [0; RECORD];
        self.map.read(&mut record, COMPLETION).ok()?;
        Some(record)
    }

    /// Writes the completion record, durably.
    pub(super) fn put_record(&self, record: &[u8; RECORD]) -> io::Result<()> {
        self.map.write(record, COMPLETION)?;
        self.map.sync()
    }
}
