//! Builds an EROFS image from the runs of a disk: a pure function, fed run by run.
//!
//! ```text
//!   runs ── merged where one continues the other ──► pending run ──► entries, one per chunk
//!                                                        │ starts or ends inside of a chunk
//!                                                        ▼
//!                                                 chunks are halved until it does not
//! ```
//! Chunks start as large as the disk and only shrink, so the result has the largest chunks that can describe it, in
//! whatever order small runs appear.
//!
//! Invariants: an address is stored only after it was found to lie inside of its file. The entries cover the disk from
//! its start without gaps, up to the pending run. An index that would exceed its budget is abandoned before the memory
//! is allocated.

use std::num::NonZeroU64;

use zerocopy::IntoBytes;

use crate::block::SECTOR;
use crate::error::{Error, Result};
use crate::kernel_view::format::{Block, ChunkEntry, HOLE, ImageHead, MAX_CHUNK_BITS, MAX_DEVICES, chunk_entries_at};

/// Location of a run.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum RunTarget {
    /// In a file, from a sector on.
    Stored {
        /// Number of the file, from 0.
        device: usize,
        /// First sector in the file.
        sector: u64,
    },
    /// Not stored: reads as zeroes.
    Zero,
}

/// Collects the runs of a disk.
#[derive(Debug)]
pub(super) struct Builder {
    /// Size of the disk in sectors.
    sectors: u64,
    /// Size of each file in whole sectors.
    devices: Vec<u64>,
    /// Block size that the entries count in while runs are added.
    block: Block,
    /// Largest size of the image in bytes.
    budget: u64,
    /// log2 of the sectors of a chunk.
    chunk_bits: u32,
    entries: Vec<ChunkEntry>,
    /// The last run, which the next one may continue.
    pending: Option<PendingRun>,
    /// End of the runs added so far, as a sector of the disk.
    end: u64,
    /// Bitwise OR of the first sectors of all stored runs: its trailing zeroes are the alignment that all of them have.
    starts: u64,
}

#[derive(Debug, Clone, Copy)]
struct PendingRun {
    start: u64,
    sectors: u64,
    target: RunTarget,
}

/// A finished image.
#[derive(Debug)]
pub(super) struct Index {
    head: Vec<u8>,
    entries: Vec<ChunkEntry>,
    bytes: u64,
    chunk: u64,
}

impl Builder {
    /// Creates a builder for a disk of `sectors` over files of these sizes in bytes. The image takes at most `budget`
    /// bytes.
    ///
    /// Errors: `Unsupported` if the format cannot describe such a disk, or not within the budget.
    pub(super) fn new(sectors: u64, devices: &[u64], budget: u64) -> Result<Self> {
        if sectors == 0 {
            return Err(Error::unsupported("the disk is empty"));
        }
        if devices.len() > MAX_DEVICES {
            return Err(Error::unsupported(format!(
                "{} extents, at most {MAX_DEVICES} are possible",
                devices.len()
            )));
        }
        let devices: Vec<u64> = devices.iter().map(|bytes| bytes / SECTOR).collect();
        // A block address has 32 bits, of which the largest marks a hole.
        let fits = |sectors: &u64| *sectors <= u64::from(HOLE);
        let block = if devices.iter().all(fits) {
            Block::Sector
        } else {
            Block::Page
        };
        // The power of two that holds the whole disk.
        let disk_bits = u64::BITS - (sectors - 1).leading_zeros();
        let chunk_bits = disk_bits.clamp(block.sector_bits(), MAX_CHUNK_BITS + block.sector_bits());
        let mut builder = Self {
            sectors,
            devices,
            block,
            budget,
            chunk_bits,
            entries: Vec::new(),
            pending: None,
            end: 0,
            starts: 0,
        };
        if block == Block::Page && !sectors.is_multiple_of(1 << block.sector_bits()) {
            return Err(builder.unaddressable());
        }
        // Fails here, before any table is read, where not even the largest chunks fit the budget.
        builder.reserve_entries(chunk_bits)?;
        Ok(builder)
    }

    /// Adds the next run. Runs come in order of the disk, without gaps.
    ///
    /// Errors: `Corrupt` where it leaves the disk, `Unsupported` where it leaves its file, or the image would exceed
    /// its budget or the format.
    pub(super) fn add(&mut self, sectors: NonZeroU64, target: RunTarget) -> Result<()> {
        let sectors = sectors.get();
        let start = self.end;
        self.end = start
            .checked_add(sectors)
            .filter(|&end| end <= self.sectors)
            .ok_or_else(|| {
                Error::corrupt(format!(
                    "a run of {sectors} sectors at sector {start} leaves the disk of {}",
                    self.sectors
                ))
            })?;
        self.check(target, sectors)?;
        match &mut self.pending {
            // Merged: each end of a run is a border between chunks, and one inside of contiguous data would halve them
            // for nothing.
            Some(pending) if pending.is_continued_by(target) => pending.sectors += sectors,
            pending => {
                if let Some(done) = pending.replace(PendingRun { start, sectors, target }) {
                    self.append(done)?;
                }
            }
        }
        Ok(())
    }

    /// Completes the image after the last run.
    pub(super) fn finish(mut self) -> Result<Index> {
        if self.end != self.sectors {
            let text = format!("the runs end at sector {} of a disk of {}", self.end, self.sectors);
            return Err(Error::corrupt(text));
        }
        if let Some(last) = self.pending.take() {
            self.append(last)?;
        }
        self.use_page_blocks();
        let head = self.head(self.chunk_bits);
        Ok(Index {
            bytes: head.image_bytes(),
            chunk: SECTOR << self.chunk_bits,
            head: head.to_bytes(),
            entries: self.entries,
        })
    }

    /// Checks that the run lies inside of its file, and that the format has numbers for its blocks. Only whole sectors
    /// of a file count: the kernel does not read a block that the file holds in part.
    fn check(&mut self, target: RunTarget, sectors: u64) -> Result<()> {
        let RunTarget::Stored { device, sector } = target else {
            return Ok(());
        };
        let available = self.devices.get(device).copied().unwrap_or(0);
        let end = sector
            .checked_add(sectors)
            .filter(|&end| end <= available)
            .ok_or_else(|| {
                let text =
                    format!("{sectors} sectors at sector {sector} leave extent {device} of {available} whole sectors");
                Error::unsupported(text)
            })?;
        // Of the file alone: `sectors` and `chunk_bits` tell how the runs lie on the disk.
        self.starts |= sector;
        let bits = self.block.sector_bits();
        if sector.is_multiple_of(1 << bits) && (end - 1) >> bits < u64::from(HOLE) {
            return Ok(());
        }
        Err(self.unaddressable())
    }

    fn unaddressable(&self) -> Error {
        match self.block {
            Block::Sector => Error::unsupported("an extent is larger than 2 TiB"),
            Block::Page => {
                Error::unsupported("an extent is larger than 2 TiB and its grains are not at multiples of 4 KiB")
            }
        }
    }

    /// Appends the entries of a run, after halving the chunks if they are too large for it.
    fn append(&mut self, run: PendingRun) -> Result<()> {
        let end = run.start + run.sectors;
        // The last chunk may end beyond the disk, so the end of the disk is no border.
        // A chunk holds sectors of one run only, so both ends of the run have to be multiples of the chunk.
        let borders = run.start | if end == self.sectors { 0 } else { end };
        let fit = borders.trailing_zeros();
        if fit < self.chunk_bits {
            self.halve_to(fit)?;
        }
        let first = run.start >> self.chunk_bits;
        let chunks = end.div_ceil(1 << self.chunk_bits) - first;
        let blocks = self.block.sector_bits();
        let entry = |chunk: u64| match run.target {
            RunTarget::Zero => ChunkEntry::hole(),
            RunTarget::Stored { device, sector } => {
                ChunkEntry::at(device as u16, ((sector + (chunk << self.chunk_bits)) >> blocks) as u32)
            }
        };
        self.entries.extend((0..chunks).map(entry));
        Ok(())
    }

    /// Splits all chunks into chunks of 2^`bits` sectors.
    fn halve_to(&mut self, bits: u32) -> Result<()> {
        if bits < self.block.sector_bits() {
            return Err(self.unaddressable());
        }
        let pieces = 1usize << (self.chunk_bits - bits);
        let blocks_per_piece = 1u32 << (bits - self.block.sector_bits());
        let old = self.entries.len();
        self.reserve_entries(bits)?;
        self.entries.resize(old * pieces, ChunkEntry::hole());
        // In place and from the end: piece `i * pieces` is never before entry `i`, so no entry is overwritten before it
        // was read.
        for i in (0..old).rev() {
            let Some(&entry) = self.entries.get(i) else { continue };
            for (k, piece) in self.entries.iter_mut().skip(i * pieces).take(pieces).enumerate() {
                *piece = entry.block().map_or(entry, |block| {
                    entry.moved_to(block.wrapping_add(k as u32 * blocks_per_piece))
                });
            }
        }
        self.chunk_bits = bits;
        Ok(())
    }

    /// Reserves the memory for chunks of 2^`bits` sectors.
    ///
    /// Errors: the image would exceed the budget, or there is not enough memory.
    fn reserve_entries(&mut self, bits: u32) -> Result<()> {
        let chunks = self.sectors.div_ceil(1 << bits);
        // The head is larger with page blocks, which `finish` may still choose.
        let head = chunk_entries_at(Block::Page, self.devices.len());
        let bytes = (head + chunks * ChunkEntry::BYTES).next_multiple_of(Block::Page.bytes());
        if bytes > self.budget {
            return Err(Error::unsupported(format!(
                "its index would take {} KiB for chunks of {} bytes, view-size= allows {} KiB (at most a quarter of the available memory)",
                bytes.div_ceil(1024),
                SECTOR << bits,
                self.budget / 1024
            )));
        }
        let more = chunks.saturating_sub(self.entries.len() as u64) as usize;
        self.entries
            .try_reserve_exact(more)
            .map_err(|e| Error::unsupported(format!("memory for its index: {e}")))
    }

    /// Changes to page blocks if all addresses are multiples of a page. The EROFS tools of Debian 12 know no other
    /// blocks; only chunks that are not aligned to pages need blocks of a sector.
    fn use_page_blocks(&mut self) {
        let page = Block::Page.sector_bits();
        let fit = (self.starts | self.sectors | 1 << self.chunk_bits).trailing_zeros();
        if self.block == Block::Page || fit < page {
            return;
        }
        for entry in &mut self.entries {
            if let Some(block) = entry.block() {
                *entry = entry.moved_to(block >> page);
            }
        }
        self.block = Block::Page;
    }

    fn head(&self, chunk_bits: u32) -> ImageHead {
        ImageHead {
            block: self.block,
            bytes: self.sectors * SECTOR,
            chunk_bits: chunk_bits - self.block.sector_bits(),
            chunks: self.sectors.div_ceil(1 << chunk_bits),
            devices: self.devices.clone(),
        }
    }
}

impl PendingRun {
    /// Returns true if a run at `target` continues this one, on the disk and in its file.
    fn is_continued_by(&self, target: RunTarget) -> bool {
        match (self.target, target) {
            (RunTarget::Zero, RunTarget::Zero) => true,
            (
                RunTarget::Stored {
                    device: a,
                    sector: from,
                },
                RunTarget::Stored { device: b, sector },
            ) => a == b && from + self.sectors == sector,
            _ => false,
        }
    }
}

impl Index {
    /// Returns the size of the image in bytes.
    pub(super) fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Returns the size of a chunk in bytes.
    pub(super) fn chunk(&self) -> u64 {
        self.chunk
    }

    /// Passes the whole image to `write` as (offset, bytes), from its end to its start. Frees the memory of each part
    /// after it was written, so that the image does not exist twice in memory.
    pub(super) fn drain(mut self, mut write: impl FnMut(u64, &[u8]) -> Result<()>) -> Result<()> {
        /// Entries per write: 8 MiB.
        const ENTRIES_PER_WRITE: usize = 1 << 20;
        let base = self.head.len() as u64;
        let end = base + self.entries.len() as u64 * ChunkEntry::BYTES;
        if end < self.bytes {
            write(end, &vec![0; (self.bytes - end) as usize])?;
        }
        while !self.entries.is_empty() {
            let from = (self.entries.len() - 1) / ENTRIES_PER_WRITE * ENTRIES_PER_WRITE;
            let part = self.entries.get(from..).unwrap_or_default();
            write(base + from as u64 * ChunkEntry::BYTES, part.as_bytes())?;
            self.entries.truncate(from);
            // `truncate` alone keeps the memory.
            self.entries.shrink_to_fit();
        }
        write(0, &self.head)
    }
}

#[cfg(test)]
mod tests;
