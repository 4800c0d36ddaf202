//! From the runs of a disk to an EROFS image: a pure function, fed run by run.
//!
//! ```text
//!   runs ── joined where one continues the other ──► pending run ──► entries, one a chunk
//!                                                        │ starts or ends inside of a chunk
//!                                                        ▼
//!                                                 chunks are halved until it does not
//! ```
//! Chunks start as large as the disk, so the result has the largest chunks that describe it, whatever the order of
//! surprises. An address is written only after it was found to lie inside of its file; an index that would grow
//! beyond its budget is given up at once.

use std::num::NonZeroU64;

use zerocopy::IntoBytes;

use crate::block::SECTOR;
use crate::error::{Error, Result};
use crate::kernel_view::format::{Block, Entry, HOLE, Head, MAX_CHUNK_BITS, MAX_DEVICES, entries_at};

/// Where a run of the disk lies.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum RunTarget {
    /// From a sector of a file on.
    Stored {
        /// Number of the file, from 0.
        device: usize,
        /// Its sector.
        sector: u64,
    },
    /// Nowhere: zeroes.
    Zero,
}

/// Gathers the runs of a disk.
#[derive(Debug)]
pub(super) struct Builder {
    /// Of the disk.
    sectors: u64,
    /// Whole sectors of each file.
    devices: Vec<u64>,
    /// What entries count while runs are gathered.
    block: Block,
    /// The most bytes of the image.
    budget: u64,
    /// log2 of the sectors of a chunk.
    chunk_bits: u32,
    entries: Vec<Entry>,
    /// The run that the next one may continue.
    pending: Option<Pending>,
    /// How far the runs reach.
    told: u64,
    /// All sectors that stored runs start at, or-ed: what they are multiples of.
    starts: u64,
}

#[derive(Debug, Clone, Copy)]
struct Pending {
    start: u64,
    sectors: u64,
    place: RunTarget,
}

/// A finished image.
#[derive(Debug)]
pub(super) struct Index {
    head: Vec<u8>,
    entries: Vec<Entry>,
    bytes: u64,
    chunk: u64,
}

impl Builder {
    /// For a disk of `sectors` over files of these lengths, in bytes. The image takes `budget` bytes at most.
    ///
    /// Errors: `Unsupported` where no such image is possible.
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
        let fits = |sectors: &u64| *sectors <= u64::from(HOLE);
        let block = if devices.iter().all(fits) {
            Block::Sector
        } else {
            Block::Page
        };
        // the power of two that holds the disk
        let wanted = u64::BITS - (sectors - 1).leading_zeros();
        let chunk_bits = wanted.clamp(block.sector_bits(), MAX_CHUNK_BITS + block.sector_bits());
        let mut builder = Self {
            sectors,
            devices,
            block,
            budget,
            chunk_bits,
            entries: Vec::new(),
            pending: None,
            told: 0,
            starts: 0,
        };
        if block == Block::Page && !sectors.is_multiple_of(1 << block.sector_bits()) {
            return Err(builder.too_far());
        }
        builder.room_for(chunk_bits)?;
        Ok(builder)
    }

    /// The next run; they come in order, without gaps.
    ///
    /// Errors: `Corrupt` where it leaves the disk, `Unsupported` where it leaves its file, or the image would exceed its
    /// budget or the format.
    pub(super) fn add(&mut self, sectors: NonZeroU64, place: RunTarget) -> Result<()> {
        let sectors = sectors.get();
        let start = self.told;
        self.told = start
            .checked_add(sectors)
            .filter(|&end| end <= self.sectors)
            .ok_or_else(|| {
                Error::corrupt(format!(
                    "a run of {sectors} sectors at sector {start} leaves the disk of {}",
                    self.sectors
                ))
            })?;
        self.check(place, sectors)?;
        match &mut self.pending {
            Some(pending) if pending.is_continued_by(place) => pending.sectors += sectors,
            pending => {
                if let Some(done) = pending.replace(Pending { start, sectors, place }) {
                    self.put(done)?;
                }
            }
        }
        Ok(())
    }

    /// The image, after the last run.
    pub(super) fn finish(mut self) -> Result<Index> {
        if self.told != self.sectors {
            let text = format!("the runs end at sector {} of a disk of {}", self.told, self.sectors);
            return Err(Error::corrupt(text));
        }
        if let Some(last) = self.pending.take() {
            self.put(last)?;
        }
        self.widen();
        let head = self.head(self.chunk_bits);
        Ok(Index {
            bytes: head.image_bytes(),
            chunk: SECTOR << self.chunk_bits,
            head: head.to_bytes(),
            entries: self.entries,
        })
    }

    /// Checks that the run lies inside of its file and that its blocks have numbers. Only whole sectors of a file count:
    /// the kernel does not read a block that is there in part.
    fn check(&mut self, place: RunTarget, sectors: u64) -> Result<()> {
        let RunTarget::Stored { device, sector } = place else {
            return Ok(());
        };
        let have = self.devices.get(device).copied().unwrap_or(0);
        let end = sector.checked_add(sectors).filter(|&end| end <= have).ok_or_else(|| {
            let text = format!("{sectors} sectors at sector {sector} leave extent {device} of {have} whole sectors");
            Error::unsupported(text)
        })?;
        self.starts |= sector;
        let bits = self.block.sector_bits();
        if sector.is_multiple_of(1 << bits) && (end - 1) >> bits < u64::from(HOLE) {
            return Ok(());
        }
        Err(self.too_far())
    }

    fn too_far(&self) -> Error {
        match self.block {
            Block::Sector => Error::unsupported("an extent is larger than 2 TiB"),
            Block::Page => {
                Error::unsupported("an extent is larger than 2 TiB and its grains are not at multiples of 4 KiB")
            }
        }
    }

    /// Writes the entries of a run, with chunks that are small enough for it.
    fn put(&mut self, run: Pending) -> Result<()> {
        let end = run.start + run.sectors;
        let borders = run.start | if end == self.sectors { 0 } else { end };
        let fit = borders.trailing_zeros();
        if fit < self.chunk_bits {
            self.halve_to(fit)?;
        }
        let first = run.start >> self.chunk_bits;
        let chunks = end.div_ceil(1 << self.chunk_bits) - first;
        let blocks = self.block.sector_bits();
        let entry = |chunk: u64| match run.place {
            RunTarget::Zero => Entry::hole(),
            RunTarget::Stored { device, sector } => {
                Entry::at(device as u16, ((sector + (chunk << self.chunk_bits)) >> blocks) as u32)
            }
        };
        self.entries.extend((0..chunks).map(entry));
        Ok(())
    }

    /// Makes chunks of 2^`bits` sectors of those that there are.
    fn halve_to(&mut self, bits: u32) -> Result<()> {
        if bits < self.block.sector_bits() {
            return Err(self.too_far());
        }
        let pieces = 1usize << (self.chunk_bits - bits);
        let step = 1u32 << (bits - self.block.sector_bits());
        let old = self.entries.len();
        self.room_for(bits)?;
        self.entries.resize(old * pieces, Entry::hole());
        // from the end, so that no entry is overwritten before it was read
        for i in (0..old).rev() {
            let Some(&entry) = self.entries.get(i) else { continue };
            for (k, piece) in self.entries.iter_mut().skip(i * pieces).take(pieces).enumerate() {
                *piece = entry
                    .block()
                    .map_or(entry, |block| entry.moved_to(block.wrapping_add(k as u32 * step)));
            }
        }
        self.chunk_bits = bits;
        Ok(())
    }

    /// Takes the memory for chunks of 2^`bits` sectors, if the budget has it.
    fn room_for(&mut self, bits: u32) -> Result<()> {
        let chunks = self.sectors.div_ceil(1 << bits);
        // the head is larger where blocks are pages, which may still come
        let head = entries_at(Block::Page, self.devices.len());
        let bytes = (head + chunks * Entry::BYTES).next_multiple_of(Block::Page.bytes());
        if bytes > self.budget {
            return Err(Error::unsupported(format!(
                "its index would take {} KiB for chunks of {} bytes, view-size= allows {} KiB",
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

    /// Lets blocks be pages, where all addresses are multiples of them.
    fn widen(&mut self) {
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

    fn head(&self, chunk_bits: u32) -> Head {
        Head {
            block: self.block,
            bytes: self.sectors * SECTOR,
            chunk_bits: chunk_bits - self.block.sector_bits(),
            chunks: self.sectors.div_ceil(1 << chunk_bits),
            devices: self.devices.clone(),
        }
    }
}

impl Pending {
    /// Whether a run at `place` goes on where this one ends, on the disk and in its file.
    fn is_continued_by(&self, place: RunTarget) -> bool {
        match (self.place, place) {
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
    /// Bytes of the image.
    pub(super) fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Bytes of a chunk.
    pub(super) fn chunk(&self) -> u64 {
        self.chunk
    }

    /// Gives all of the image to `write`, as (offset, bytes), from its end to its start, and its memory back on the
    /// way: it is not to be there twice.
    pub(super) fn drain(mut self, mut write: impl FnMut(u64, &[u8]) -> Result<()>) -> Result<()> {
        /// 8 MiB at a time.
        const STEP: usize = 1 << 20;
        let base = self.head.len() as u64;
        let end = base + self.entries.len() as u64 * Entry::BYTES;
        if end < self.bytes {
            write(end, &vec![0; (self.bytes - end) as usize])?;
        }
        while !self.entries.is_empty() {
            let from = (self.entries.len() - 1) / STEP * STEP;
            let part = self.entries.get(from..).unwrap_or_default();
            write(base + from as u64 * Entry::BYTES, part.as_bytes())?;
            self.entries.truncate(from);
            self.entries.shrink_to_fit();
        }
        write(0, &self.head)
    }
}

#[cfg(test)]
mod tests;
