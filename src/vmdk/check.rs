//! `--check`: reads every directory and table of a chain and compares what they claim with each other and with
//! their files. Compressed grains are inflated as well, as their checksums are there to be used.
//!
//! Every sector of a file that something claims is noted in a map of bits, so that two claims on one sector and
//! space that nothing claims are both found. The map takes a 4096th of the claimed part of the file.
//!
//! A check takes no longer than the file is large: a table or compressed grain that something else claims already
//! is an error and is not looked into again, as directories may name one table millions of times.

use std::collections::{HashMap, HashSet};
use std::fmt;
use std::ops::Range;

use serde::Serialize;

use crate::block::SECTOR;
use crate::error::Result;
use crate::vmdk::disk::VmdkDisk;
use crate::vmdk::extent::{Extent, Packing, Run, SparseExtent};
use crate::vmdk::inflate::inflate;
use crate::vmdk::open::PlacedExtent;
use crate::vmdk::sparse::{Copy, HostedTables};
use crate::vmdk::tables::{CHUNK, Layout, Place, Slot};

/// The most messages of a report; what is over is counted.
const MAX_MESSAGES: usize = 100;

/// What a check found.
#[derive(Debug, Clone, Default, Serialize)]
pub struct CheckReport {
    /// What is wrong, at most a hundred sentences.
    pub errors: Vec<String>,
    /// How many faults there are.
    pub error_count: u64,
    /// Grains of a file that no table names: lost room, but no lost data.
    pub leaks: u64,
    /// What is unusual without being wrong.
    pub notes: Vec<String>,
    /// Grains that were looked at.
    pub grains: u64,
}

impl CheckReport {
    /// Counts a fault; the message is made only where it is kept.
    fn error(&mut self, message: impl FnOnce() -> String) {
        self.error_count += 1;
        if self.errors.len() < MAX_MESSAGES {
            self.errors.push(message());
        }
    }
}

/// Checks all links of the disk. An error is returned only where the check itself could not go on.
pub fn check(disk: &VmdkDisk) -> Result<CheckReport> {
    let mut report = CheckReport::default();
    let mut seen = HashSet::new();
    for placed in disk.links().iter().flat_map(|l| &l.extents) {
        if let Extent::Sparse(sparse) = &placed.extent {
            if !seen.insert(sparse.file.identity()?.file) {
                report.error(|| format!("{}: is an extent of the disk more than once", sparse.file.label()));
                continue;
            }
            if placed.unclean {
                report.notes.push(format!("{}: was not closed after writing", sparse.file.label()));
            }
            Checker { placed, sparse, claims: Claims::new(Claims::MAX_PAGES), report: &mut report }.run()?;
        }
    }
    Ok(report)
}

struct Checker<'a> {
    placed: &'a PlacedExtent,
    sparse: &'a SparseExtent,
    claims: Claims,
    report: &'a mut CheckReport,
}

impl Checker<'_> {
    fn run(mut self) -> Result<()> {
        if let Some(hosted) = &self.placed.hosted {
            for range in hosted.fixed() {
                self.claims.claim(range.clone());
            }
        }
        let shape = self.sparse.shape();
        let tables = shape.tables();
        for first in (0..tables).step_by(CHUNK as usize) {
            let range = first..tables.min(first + CHUNK);
            let places = self.sparse.layout.load_directory(range.clone())?;
            if let Some(hosted) = &self.placed.hosted {
                self.compare_directories(hosted, range.clone())?;
            }
            for (table, place) in range.zip(places) {
                match place {
                    Place::Absent => {}
                    Place::Bad => self.report.error(|| self.sparse.explain(table, None).to_string()),
                    Place::At(at) => self.table(table, at)?,
                }
                if self.claims.full {
                    let label = self.sparse.file.label();
                    self.report
                        .notes
                        .push(format!("{label}: uses too much room for a check behind grain table {table}"));
                    return Ok(());
                }
            }
        }
        self.leaks();
        Ok(())
    }

    fn table(&mut self, number: u64, at: u64) -> Result<()> {
        let shape = self.sparse.shape();
        if !self.claim(at..at + self.sparse.layout.table_sectors(), format_args!("grain table {number}")) {
            return Ok(());
        }
        let table = self.sparse.layout.load_table(number, at)?;
        for entry in 0..table.len() {
            let grain = number * shape.entries_per_table + entry as u64;
            match table.slot(entry) {
                Slot::Unallocated | Slot::Zero => {}
                Slot::Bad => self.report.error(|| self.sparse.explain(number, Some(entry as u64)).to_string()),
                Slot::At(sector) => self.grain(grain, sector)?,
            }
        }
        Ok(())
    }

    fn grain(&mut self, grain: u64, sector: u64) -> Result<()> {
        let shape = self.sparse.shape();
        self.report.grains += 1;
        if self.sparse.packing == Packing::Plain {
            self.claim(sector..sector + shape.grain_sectors(grain), format_args!("grain {grain}"));
            return Ok(());
        }
        if !self.claim(sector..sector + 1, format_args!("grain {grain}")) {
            return Ok(());
        }
        if let Run::Deflate { grain: packed, .. } = self.placed.extent.run_at(grain * shape.grain, 1)? {
            let mut whole = vec![0; (shape.grain * SECTOR) as usize];
            if let Err(e) = inflate(&packed, &mut whole) {
                self.report.error(|| e.to_string());
            }
        }
        Ok(())
    }

    /// Claims sectors for `what`; whether they were free. If not, that is an error of the file.
    fn claim(&mut self, range: Range<u64>, what: fmt::Arguments<'_>) -> bool {
        let taken = self.claims.claim(range.clone());
        if taken {
            let (label, at) = (self.sparse.file.label(), range.start);
            self.report.error(|| format!("{label}: {what} at sector {at} overlaps something else"));
        }
        !taken
    }

    /// Both copies of the directory and of the tables must say the same.
    fn compare_directories(&mut self, hosted: &HostedTables, tables: Range<u64>) -> Result<()> {
        if !hosted.has_redundant() {
            return Ok(());
        }
        let label = self.sparse.file.label();
        let first = hosted.raw_directory(Copy::Primary, tables.clone())?;
        let second = hosted.raw_directory(Copy::Redundant, tables.clone())?;
        for (table, (&a, &b)) in tables.zip(first.iter().zip(&second)) {
            let good = |raw: u32| raw != 0 && hosted.table_fits(raw.into());
            let spare = u64::from(b)..u64::from(b) + hosted.table_sectors();
            if (a == 0) != (b == 0) {
                self.report.error(|| format!("{label}: grain table {table} is in one of both directories only"));
            } else if a != 0 && (!good(a) || !good(b)) {
                self.report.error(|| {
                    format!("{label}: directory entry {table} is {a:#x}, and {b:#x} in the redundant one: no place for a table")
                });
            } else if a != b
                && self.claim(spare, format_args!("redundant grain table {table}"))
                && hosted.raw_table(a.into())? != hosted.raw_table(b.into())?
            {
                self.report.error(|| format!("{label}: grain table {table} differs from its redundant copy"));
            }
        }
        Ok(())
    }

    /// Room that nothing claims. Only hosted files are written without gaps: ESX grows its own in steps.
    fn leaks(&mut self) {
        let Some(hosted) = self.placed.hosted.as_ref().filter(|_| self.sparse.packing == Packing::Plain) else {
            return;
        };
        /// Entries are 32-bit numbers of sectors: what is behind that can't be a grain, however long the file is.
        const REACH: u64 = 1 << 32;
        let end = (self.sparse.file.len() / SECTOR).min(REACH);
        let grain = self.sparse.shape().grain;
        let mut leaks = 0;
        self.claims.free(hosted.data_start()..end, |r| leaks += (r.end - r.start) / grain);
        self.report.leaks += leaks;
    }
}

/// Sectors of a file that something claims.
#[derive(Debug)]
struct Claims {
    pages: HashMap<u64, Box<[u64; Claims::WORDS]>>,
    /// There was no room for a claim: what it says about sectors is not the whole truth any more.
    full: bool,
    /// The most pages.
    most: usize,
}

impl Claims {
    const WORDS: usize = 512;
    const PAGE: u64 = Self::WORDS as u64 * 64;
    /// 512 MiB, for the 2 TiB of a file that 32-bit entries can name. A file with holes need not be large to claim that.
    const MAX_PAGES: usize = 1 << 17;

    fn new(most: usize) -> Self {
        Self { pages: HashMap::new(), full: false, most }
    }

    /// Claims a range; whether some of it was claimed before.
    fn claim(&mut self, range: Range<u64>) -> bool {
        let mut taken = false;
        let mut at = range.start;
        while at < range.end {
            if self.pages.len() >= self.most && !self.pages.contains_key(&(at / Self::PAGE)) {
                self.full = true;
                return taken;
            }
            let page = self.pages.entry(at / Self::PAGE).or_insert_with(|| Box::new([0; Self::WORDS]));
            let end = range.end.min((at / 64 + 1) * 64);
            let mask = (u64::MAX >> (64 - (end - at))) << (at % 64);
            if let Some(word) = page.get_mut((at % Self::PAGE / 64) as usize) {
                taken |= *word & mask != 0;
                *word |= mask;
            }
            at = end;
        }
        taken
    }

    /// Gives the stretches of `range` that are not claimed to `each`, joined where they touch.
    fn free(&self, range: Range<u64>, mut each: impl FnMut(Range<u64>)) {
        // all from here to `at` is free
        let mut from = range.start;
        let mut at = range.start;
        while at < range.end {
            let Some(page) = self.pages.get(&(at / Self::PAGE)) else {
                at = range.end.min((at / Self::PAGE + 1) * Self::PAGE);
                continue;
            };
            let word = page.get((at % Self::PAGE / 64) as usize).copied().unwrap_or(u64::MAX) >> (at % 64);
            let left = 64 - at % 64;
            let claimed = u64::from(word.trailing_ones()).min(left);
            if claimed == 0 {
                at = range.end.min(at + u64::from(word.trailing_zeros()).min(left));
                continue;
            }
            if from < at {
                each(from..at);
            }
            at += claimed;
            from = at;
        }
        if from < range.end {
            each(from..range.end);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn claims_find_overlaps_and_gaps() {
        let mut claims = Claims::new(3);
        assert!(!claims.claim(10..130));
        assert!(!claims.claim(130..131));
        assert!(claims.claim(0..11));
        assert!(!claims.claim(Claims::PAGE - 1..Claims::PAGE + 5));
        assert!(claims.claim(Claims::PAGE + 4..Claims::PAGE + 6));
        let end = 2 * Claims::PAGE + 70;
        let mut free = Vec::new();
        claims.free(0..end, |r| free.push(r));
        assert_eq!(free, vec![131..Claims::PAGE - 1, Claims::PAGE + 6..end]);
    }

    #[test]
    fn regression_claims_all_over_a_huge_file_stay_bounded() {
        let mut claims = Claims::new(100);
        for page in 0..110 {
            claims.claim(page * Claims::PAGE..page * Claims::PAGE + 1);
        }
        assert!(claims.full);
        assert_eq!(claims.pages.len(), 100);
    }
}
