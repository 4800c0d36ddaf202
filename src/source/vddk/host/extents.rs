//! Holes of a disk, from the allocated ranges that the library reports.
//!
//! Rules of the library: a query starts and ends at chunks, and a query that goes beyond the end of the disk fails. So the
//! part of a chunk at the end of the disk counts as data. Where a query fails, everything from there on is data, for as
//! long as the disk is open. An answer does not know of writes by this handle, so what was written is data too.
//!
//! Nothing that the library reports is trusted: where the blocks of an answer are not in order, its whole range is data.

use std::collections::BTreeMap;

use crate::source::vddk::abi::{Block, CHUNK_SECTORS, SECTOR};

/// Bytes of a chunk.
const CHUNK: u64 = CHUNK_SECTORS * SECTOR;

/// Sectors of the longest query: 2 GiB.
const MAX_QUERY: u64 = (2 << 30) / SECTOR;

/// Ranges of written chunks that are remembered. With more of them the whole disk counts as written.
const MAX_RANGES: usize = 64 << 10;

/// Extents of one answer. The rest of the range is asked for again.
const MAX_EXTENTS: usize = 16 << 10;

/// Range of bytes with one content.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Extent {
    /// Length in bytes.
    pub(super) len: u64,
    pub(super) content: Content,
}

/// Content of an extent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Content {
    /// Allocated.
    Data,
    /// Not allocated, and zero.
    Zero,
}

/// Queries about the allocation of a disk.
#[derive(Debug)]
pub(super) struct AllocationMap {
    /// Bytes from the start that can be asked about: whole chunks. Shrinks at an error.
    known: u64,
}

impl AllocationMap {
    pub(super) fn new(sectors: u64) -> Self {
        Self {
            // A query beyond the last whole chunk fails, so it is never made.
            known: (sectors - sectors % CHUNK_SECTORS) * SECTOR,
        }
    }

    /// Returns the extents of `len` bytes from `offset`, in order, without a gap; perhaps fewer than the whole range.
    /// `one`: the first is enough. `query` returns the allocated blocks of a range of sectors.
    pub(super) fn extents(
        &mut self,
        offset: u64,
        len: u64,
        one: bool,
        query: &mut dyn FnMut(u64, u64) -> Result<Vec<Block>, ()>,
    ) -> Vec<Extent> {
        let end = offset + len;
        let mut extents = ExtentList {
            at: offset,
            end,
            list: Vec::new(),
        };
        // Rounded down to a chunk, as every query must start at one. `push` cuts off what lies in front of the request.
        let mut start = offset - offset % CHUNK;
        while extents.at < end && extents.list.len() < MAX_EXTENTS && !(one && extents.list.len() > 1) {
            // At least one chunk, at most what the library answers at once, and never beyond what it knows.
            let until = end
                .next_multiple_of(CHUNK)
                .min(self.known)
                .min(start + MAX_QUERY * SECTOR);
            if start >= until {
                extents.push(end, Content::Data);
                break;
            }
            match query(start / SECTOR, (until - start) / SECTOR) {
                // What an answer like this leaves out is not known to be zero.
                Ok(blocks) if !are_ordered(&blocks) => extents.push(until, Content::Data),
                Ok(blocks) => {
                    for (from, to) in blocks.iter().filter_map(|block| range_of(block, start, until)) {
                        extents.push(from, Content::Zero);
                        extents.push(to, Content::Data);
                    }
                    extents.push(until, Content::Zero);
                }
                // Each failure costs a round trip, and would be repeated for every later request.
                Err(()) => self.known = start,
            }
            start = until.min(self.known);
        }
        extents.list
    }
}

/// Returns true if each block starts at or after the end of the one before it, and ends where a disk can.
fn are_ordered(blocks: &[Block]) -> bool {
    let end = blocks.iter().try_fold(0, |end, block| {
        // Two numbers of the library; only after this check their sum and its bytes fit 64 bits.
        let to = block.offset.checked_add(block.length)?;
        (block.offset >= end && to <= u64::MAX / SECTOR).then_some(to)
    });
    end.is_some()
}

/// Returns the bytes of a block within a range. The blocks are in order ([`are_ordered`]).
fn range_of(block: &Block, start: u64, end: u64) -> Option<(u64, u64)> {
    let from = (block.offset * SECTOR).max(start);
    let to = ((block.offset + block.length) * SECTOR).min(end);
    (from < to).then_some((from, to))
}

/// Extents in the order of the disk, within a range.
#[derive(Debug)]
struct ExtentList {
    at: u64,
    end: u64,
    list: Vec<Extent>,
}

impl ExtentList {
    /// Adds an extent from the end of the last one to `to`.
    fn push(&mut self, to: u64, content: Content) {
        // Answers are in chunks, and the request may end inside of one.
        let to = to.min(self.end);
        if to <= self.at {
            return;
        }
        let len = to - self.at;
        self.at = to;
        match self.list.last_mut() {
            Some(last) if last.content == content => last.len += len,
            _ => self.list.push(Extent { len, content }),
        }
    }
}

/// Chunks that were written since the disk was opened.
#[derive(Debug, Default)]
pub(super) struct WrittenRanges {
    /// Start and end of each range, in bytes; the ranges neither touch nor overlap.
    ranges: BTreeMap<u64, u64>,
    /// Set when there were too many ranges.
    all: bool,
}

impl WrittenRanges {
    /// Adds a range of bytes, rounded out to chunks.
    pub(super) fn add(&mut self, offset: u64, len: u64) {
        if self.all {
            return;
        }
        let (mut from, mut to) = (offset - offset % CHUNK, (offset + len).next_multiple_of(CHUNK));
        // From the last range that starts at `to` or before, so that a range which touches the new one is joined too.
        while let Some((&start, &end)) = self.ranges.range(..=to).next_back().filter(|(_, end)| **end >= from) {
            if start <= from && end >= to {
                return;
            }
            (from, to) = (from.min(start), to.max(end));
            self.ranges.remove(&start);
        }
        self.ranges.insert(from, to);
        if self.ranges.len() > MAX_RANGES {
            // Everything counts as written from here on: that costs holes, and no byte.
            self.all = true;
            self.ranges.clear();
        }
    }

    /// Returns the extents from `offset` with the written ranges as data.
    pub(super) fn hide(&self, offset: u64, extents: Vec<Extent>) -> Vec<Extent> {
        let mut at = offset;
        let end = extents.iter().fold(offset, |end, extent| end + extent.len);
        let mut out = ExtentList {
            at,
            end,
            list: Vec::new(),
        };
        for Extent { len, content } in extents {
            let until = at + len;
            if content != Content::Data {
                // The range that starts before the extent may still reach into it.
                let first = self.ranges.range(..=at).next_back();
                let rest = self.ranges.range(at + 1..until);
                for (from, to) in first.into_iter().chain(rest).filter(|(_, to)| **to > at) {
                    out.push((*from).min(until), content);
                    out.push((*to).min(until), Content::Data);
                }
            }
            out.push(until, if self.all { Content::Data } else { content });
            at = until;
        }
        out.list
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;

    fn extent(len: u64, content: Content) -> Extent {
        Extent { len, content }
    }

    /// Answers queries about a disk of which these ranges of bytes are allocated. Panics where the library would fail.
    fn disk(allocated: &'static [(u64, u64)], sectors: u64) -> impl FnMut(u64, u64) -> Result<Vec<Block>, ()> {
        move |start, count| {
            assert!(start % CHUNK_SECTORS == 0 && count % CHUNK_SECTORS == 0 && count > 0);
            assert!(start + count <= sectors && count <= MAX_QUERY);
            let blocks = allocated.iter().map(|(from, to)| (from / SECTOR, to / SECTOR));
            let inside = blocks.map(|(from, to)| (from.max(start), to.min(start + count)));
            Ok(inside
                .filter(|(from, to)| from < to)
                .map(|(from, to)| Block {
                    offset: from,
                    length: to - from,
                })
                .collect())
        }
    }

    #[test]
    fn holes_lie_between_the_blocks_and_the_tail_is_data() {
        let sectors = 10 * MIB / SECTOR + 5;
        let mut query = disk(&[(MIB, 2 * MIB), (4 * MIB, 5 * MIB)], sectors);
        let mut map = AllocationMap::new(sectors);
        let found = map.extents(512, sectors * SECTOR - 512, false, &mut query);
        let expected = [
            (MIB - 512, Content::Zero),
            (MIB, Content::Data),
            (2 * MIB, Content::Zero),
            (MIB, Content::Data),
            (5 * MIB, Content::Zero),
            (5 * SECTOR, Content::Data),
        ];
        assert_eq!(found, expected.map(|(len, content)| extent(len, content)));
    }

    #[test]
    fn an_error_makes_everything_from_there_on_data() {
        let sectors = (6 << 30) / SECTOR;
        let mut calls = 0;
        let mut map = AllocationMap::new(sectors);
        let mut query = |start, _| {
            calls += 1;
            if start < MAX_QUERY { Ok(Vec::new()) } else { Err(()) }
        };
        for _ in 0..2 {
            let found = map.extents(0, 6 << 30, false, &mut query);
            assert_eq!(found, [extent(2 << 30, Content::Zero), extent(4 << 30, Content::Data)]);
        }
        assert_eq!(calls, 3, "the failed range is asked for once");
    }

    #[test]
    fn an_answer_whose_blocks_are_not_in_order_makes_its_range_data() {
        for blocks in [
            [(0, 128), (64, 128)],
            [(512, 128), (0, 128)],
            [(0, 128), (u64::MAX, 5)],
            [(64, u64::MAX), (128, 128)],
            [(0, 128), (u64::MAX / SECTOR, 128)],
        ] {
            let mut map = AllocationMap::new(MIB / SECTOR);
            let mut query = |_, _| Ok(blocks.map(|(offset, length)| Block { offset, length }).to_vec());
            assert_eq!(
                map.extents(0, MIB, false, &mut query),
                [extent(MIB, Content::Data)],
                "{blocks:?}"
            );
        }
    }

    #[test]
    fn blocks_are_clipped_to_the_range_of_the_query() {
        let mut map = AllocationMap::new(MIB / SECTOR);
        let blocks = [(128, 128), (1920, 4000), (8000, 1)];
        let mut query = |_, _| Ok(blocks.map(|(offset, length)| Block { offset, length }).to_vec());
        let found = map.extents(128 * SECTOR, MIB - 128 * SECTOR, false, &mut query);
        let expected = [(128, Content::Data), (1664, Content::Zero), (128, Content::Data)];
        assert_eq!(
            found,
            expected.map(|(sectors, content)| extent(sectors * SECTOR, content))
        );
    }

    #[test]
    fn written_chunks_are_data() {
        let mut written = WrittenRanges::default();
        written.add(3 * CHUNK + 512, 512);
        written.add(4 * CHUNK, 1);
        written.add(9 * CHUNK, CHUNK);
        written.add(0, 1);
        assert_eq!(written.ranges.len(), 3, "{written:?}");
        let hole = vec![extent(10 * CHUNK, Content::Zero), extent(CHUNK, Content::Data)];
        let expected = [
            (CHUNK, Content::Data),
            (2 * CHUNK, Content::Zero),
            (2 * CHUNK, Content::Data),
            (4 * CHUNK, Content::Zero),
            (2 * CHUNK, Content::Data),
        ];
        assert_eq!(
            written.hide(0, hole.clone()),
            expected.map(|(len, content)| extent(len, content))
        );
        // The first ten chunks are partly written already.
        for at in 0..=MAX_RANGES as u64 {
            written.add((20 + at * 2) * CHUNK, 1);
        }
        assert_eq!(written.hide(0, hole), [extent(11 * CHUNK, Content::Data)]);
    }
}
