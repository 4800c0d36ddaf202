//! `--check`: reads every directory and table of a chain and compares what they claim with each other and with
//! their files. Compressed grains are inflated as well, as their checksums are there to be used.
//!
//! Every sector of a file that something claims is noted in a map of bits, so that two claims on one sector and
//! space that nothing claims are both found. The map takes a 4096th of the claimed part of the file, up to a bound.

use std::collections::{HashMap, HashSet};
use std::ops::Range;

use serde::Serialize;

use crate::block::SECTOR;
use crate::error::Result;
use crate::vmdk::disk::VmdkDisk;
use crate::vmdk::extent::{Encoding, Extent, Run, SparseExtent};
use crate::vmdk::inflate::inflate;
use crate::vmdk::open::{Link, PlacedExtent};
use crate::vmdk::tables::hosted::{Copy, HostedTables};
use crate::vmdk::tables::{CHUNK, DirectoryEntry, GrainEntry, Layout};

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
    /// Entries and tables that only one of both copies has, in an image that was not closed: its writer came no
    /// further. Opening it for writing completes them.
    pub unfinished: u64,
    /// What is unusual without being wrong.
    pub notes: Vec<String>,
    /// Grains that were looked at.
    pub grains: u64,
}

impl CheckReport {
    fn error(&mut self, message: impl FnOnce() -> String) {
        self.error_count += 1;
        if self.errors.len() < MAX_MESSAGES {
            self.errors.push(message());
        }
    }
}

impl CheckReport {
    /// Adds what was found in another disk.
    pub fn add(&mut self, other: CheckReport) {
        self.errors.extend(other.errors);
        self.errors.truncate(MAX_MESSAGES);
        self.error_count += other.error_count;
        self.leaks += other.leaks;
        self.unfinished += other.unfinished;
        self.notes.extend(other.notes);
        self.grains += other.grains;
    }
}

/// Checks all links of the disk. What can't be read is an error of the report.
pub fn check(disk: &VmdkDisk) -> CheckReport {
    check_extents(disk.links().iter().flat_map(|l| &l.extents))
}

/// Checks one link alone.
pub(super) fn check_link(link: &Link) -> CheckReport {
    check_extents(link.extents.iter())
}

fn check_extents<'a>(extents: impl Iterator<Item = &'a PlacedExtent>) -> CheckReport {
    let mut report = CheckReport::default();
    let mut seen = HashSet::new();
    for placed in extents {
        if let Extent::Sparse(sparse) = &placed.extent {
            if !seen.insert(sparse.file.identity_at_open().file) {
                let label = sparse.file.label();
                report.error(|| {
                    format!("{label}: is the file of several extents: a write to one would change the other")
                });
                continue;
            }
            if placed.unclean {
                report
                    .notes
                    .push(format!("{}: was not closed after writing", sparse.file.label()));
            }
            let checked = Checker {
                placed,
                sparse,
                claims: Claims::default(),
                stretches: Default::default(),
                report: &mut report,
            }
            .run();
            if let Err(e) = checked {
                report.error(|| e.to_string());
            }
        }
    }
    report
}

struct Checker<'a> {
    placed: &'a PlacedExtent,
    sparse: &'a SparseExtent,
    claims: Claims,
    /// The last stretches of the file of which it is known whether they are stored: where primary tables are looked
    /// for, and where redundant ones are.
    stretches: [Stretch; 2],
    report: &'a mut CheckReport,
}

/// Bytes of a file that are all stored or all in a hole.
#[derive(Debug, Clone, Default)]
struct Stretch {
    bytes: Range<u64>,
    stored: bool,
}

impl Checker<'_> {
    fn run(mut self) -> Result<()> {
        if let Some(hosted) = &self.placed.hosted {
            for range in hosted.fixed() {
                if self.claims.claim(range.clone()) {
                    let (label, start) = (self.sparse.file.label(), range.start);
                    self.report.error(|| {
                        format!("{label}: header, descriptor and directories lie over each other at sector {start}")
                    });
                }
            }
            if hosted.redundant_is_lost() {
                let label = self.sparse.file.label();
                self.report
                    .error(|| format!("{label}: the header names a redundant grain directory that is not in the file"));
            }
        }
        let geometry = self.sparse.geometry();
        let tables = geometry.tables();
        for first in (0..tables).step_by(CHUNK as usize) {
            let range = first..tables.min(first + CHUNK);
            let places = self.sparse.layout.load_directory(range.clone())?;
            if let Some(hosted) = &self.placed.hosted {
                self.compare_directories(hosted, range.clone())?;
            }
            for (table, place) in range.zip(places) {
                match place {
                    DirectoryEntry::Absent => {}
                    DirectoryEntry::Bad => self.report.error(|| self.sparse.explain(table, None).to_string()),
                    DirectoryEntry::At(at) => self.table(table, at)?,
                }
            }
        }
        self.leaks()
    }

    fn table(&mut self, number: u64, at: u64) -> Result<()> {
        let geometry = self.sparse.geometry();
        // a table that is another one's as well was looked at there: its size bounds the work, not the directory's
        if !self.claim(at..at + self.sparse.layout.table_sectors(), "grain table", number) {
            return Ok(());
        }
        if self.placed.hosted.is_some() && self.is_hole(Copy::Primary, at) {
            return Ok(());
        }
        let table = self.sparse.layout.load_table(number, at)?;
        for entry in 0..table.len() {
            let grain = number * geometry.entries_per_table + entry as u64;
            match table.slot(entry) {
                GrainEntry::Unallocated | GrainEntry::Zero => {}
                GrainEntry::Bad => self
                    .report
                    .error(|| self.sparse.explain(number, Some(entry as u64)).to_string()),
                GrainEntry::At(sector) => self.grain(grain, sector)?,
            }
        }
        Ok(())
    }

    /// Whether the table at sector `at` lies in a hole of the file, so that nothing is allocated there. New images have
    /// room for all their tables: of a large one most are holes.
    fn is_hole(&mut self, copy: Copy, at: u64) -> bool {
        let (start, end) = (at * SECTOR, (at + self.sparse.layout.table_sectors()) * SECTOR);
        let stretch = &mut self.stretches[usize::from(copy == Copy::Redundant)];
        if !stretch.bytes.contains(&start) {
            // where that can't be told, it is read
            let (stored, bytes) = self.sparse.file.data_at(start).unwrap_or((true, 1));
            *stretch = Stretch {
                bytes: start..start + bytes,
                stored,
            };
        }
        !stretch.stored && end <= stretch.bytes.end
    }

    fn grain(&mut self, grain: u64, sector: u64) -> Result<()> {
        let geometry = self.sparse.geometry();
        self.report.grains += 1;
        if self.sparse.packing == Encoding::Plain {
            self.claim(sector..sector + geometry.grain_sectors(grain), "grain", grain);
            return Ok(());
        }
        if !self.claim(sector..sector + 1, "grain", grain) {
            return Ok(());
        }
        if let Run::Deflate { grain: packed, .. } = self.placed.extent.run_at(grain * geometry.grain, 1)? {
            let mut whole = vec![0; (geometry.grain * SECTOR) as usize];
            if let Err(e) = inflate(&packed, &mut whole) {
                self.report.error(|| e.to_string());
            }
        }
        Ok(())
    }

    /// Claims sectors for a grain or table; `false`, and an error of the report, where something else has them.
    fn claim(&mut self, range: Range<u64>, what: &str, number: u64) -> bool {
        let start = range.start;
        let taken = self.claims.claim(range);
        if taken {
            let label = self.sparse.file.label();
            self.report
                .error(|| format!("{label}: {what} {number} at sector {start} overlaps something else"));
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
            // where the primary one is bad, the redundant table is the one that is read, and claimed there; one that is
            // another one's as well was compared there
            if a != b && good(a) && good(b) {
                let range = b.into()..u64::from(b) + hosted.table_sectors();
                if !self.claim(range, "redundant grain table", table) {
                    continue;
                }
            }
            if (a == 0) != (b == 0) && self.placed.unclean && (good(a) || good(b)) {
                self.report.unfinished += 1;
            } else if (a == 0) != (b == 0) {
                self.report
                    .error(|| format!("{label}: grain table {table} is in one of both directories only"));
            } else if a != 0 && (!good(a) || !good(b)) {
                self.report.error(|| format!(
                    "{label}: directory entry {table} is {a:#x}, and {b:#x} in the redundant one: no place for a table"
                ));
            } else if a != b && !(self.is_hole(Copy::Primary, a.into()) && self.is_hole(Copy::Redundant, b.into())) {
                let (first, second) = (hosted.raw_table(a.into())?, hosted.raw_table(b.into())?);
                match self.unfinished(hosted, table, [a.into(), b.into()], &first, &second) {
                    Some(entries) => self.report.unfinished += entries,
                    None => {
                        self.report
                            .error(|| format!("{label}: grain table {table} differs from its redundant copy"));
                    }
                }
            }
        }
        Ok(())
    }

    /// How many entries differ between both copies of a table; `None`: in a way that no writer leaves that stopped
    /// in between.
    fn unfinished(
        &self,
        hosted: &HostedTables,
        table: u64,
        own: [u64; 2],
        first: &[u32],
        second: &[u32],
    ) -> Option<u64> {
        let from = table * hosted.geometry().entries_per_table;
        let names = |raw, grain| matches!(hosted.slot(raw, grain, &own), GrainEntry::At(_) | GrainEntry::Zero);
        let mut entries = 0;
        for (grain, (&a, &b)) in (from..).zip(first.iter().zip(second)).filter(|(_, (a, b))| a != b) {
            let whole = [a, b].into_iter().all(|raw| raw == 0 || names(raw, grain));
            if !self.placed.unclean || !whole {
                return None;
            }
            entries += 1;
        }
        Some(entries)
    }

    /// Room that nothing claims. Only hosted files are written without gaps: ESX grows its own in steps.
    fn leaks(&mut self) -> Result<()> {
        let Some(hosted) = self
            .placed
            .hosted
            .as_ref()
            .filter(|_| self.sparse.packing == Encoding::Plain)
        else {
            return Ok(());
        };
        // entries are 32 bits: what lies behind can't be in use, and would take as long as the file is said to be
        let file_sectors = (self.sparse.file.len() / SECTOR).min(1 << 32);
        let grain = self.sparse.geometry().grain;
        if self.claims.full {
            let label = self.sparse.file.label();
            self.report.notes.push(format!(
                "{label}: is too large: not all overlaps were looked for, and no leaks"
            ));
            return Ok(());
        }
        let free = self.claims.free(hosted.data_start()..file_sectors);
        for range in free.into_iter().filter(|range| range.end - range.start >= grain) {
            self.report.leaks += self.stored(range)?.div_ceil(grain);
        }
        Ok(())
    }

    /// Sectors of the range that take room: holes of the file are no loss.
    fn stored(&self, range: Range<u64>) -> Result<u64> {
        let end = range.end * SECTOR;
        let (mut at, mut stored) = (range.start * SECTOR, 0);
        while at < end {
            let (data, bytes) = self.sparse.file.data_at(at)?;
            let bytes = bytes.min(end - at);
            if data {
                stored += bytes;
            }
            at += bytes;
        }
        Ok(stored.div_ceil(SECTOR))
    }
}

/// Sectors of a file that something claims.
#[derive(Debug, Default)]
struct Claims {
    pages: HashMap<u64, Box<[u64; Claims::WORDS]>>,
    /// Something was not noted, as there are [`Claims::MAX_PAGES`].
    full: bool,
}

impl Claims {
    const WORDS: usize = 512;
    const PAGE: u64 = Self::WORDS as u64 * 64;
    /// 256 MiB of pages: a file of 1 TiB where all is claimed.
    const MAX_PAGES: usize = 1 << 16;

    /// Claims a range; whether some of it was claimed before.
    fn claim(&mut self, range: Range<u64>) -> bool {
        let mut taken = false;
        let mut at = range.start;
        while at < range.end {
            if self.pages.len() >= Self::MAX_PAGES && !self.pages.contains_key(&(at / Self::PAGE)) {
                self.full = true;
                at = (at / Self::PAGE + 1) * Self::PAGE;
                continue;
            }
            let page = self
                .pages
                .entry(at / Self::PAGE)
                .or_insert_with(|| Box::new([0; Self::WORDS]));
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

    /// The stretches of `range` that are not claimed.
    fn free(&self, range: Range<u64>) -> Vec<Range<u64>> {
        let mut free: Vec<Range<u64>> = Vec::new();
        let mut at = range.start;
        while at < range.end {
            let Some(page) = self.pages.get(&(at / Self::PAGE)) else {
                let end = range.end.min((at / Self::PAGE + 1) * Self::PAGE);
                push(&mut free, at..end);
                at = end;
                continue;
            };
            let word = page.get((at % Self::PAGE / 64) as usize).copied().unwrap_or(u64::MAX) >> (at % 64);
            let left = 64 - at % 64;
            let claimed = u64::from(word.trailing_ones()).min(left);
            let open = if claimed > 0 {
                0
            } else {
                u64::from(word.trailing_zeros()).min(left)
            };
            let end = range.end.min(at + claimed.max(open));
            if open > 0 {
                push(&mut free, at..end);
            }
            at = end;
        }
        free
    }
}

/// Appends a stretch, joined to the last one where they touch.
fn push(free: &mut Vec<Range<u64>>, range: Range<u64>) {
    match free.last_mut() {
        Some(last) if last.end == range.start => last.end = range.end,
        _ => free.push(range),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn regression_scattered_claims_stay_bounded() {
        let mut claims = Claims::default();
        for n in 0..Claims::MAX_PAGES as u64 + 10 {
            assert!(!claims.claim(n * Claims::PAGE..n * Claims::PAGE + 1));
        }
        assert!(claims.full);
        assert_eq!(claims.pages.len(), Claims::MAX_PAGES);
        assert!(
            claims.claim(5 * Claims::PAGE..5 * Claims::PAGE + 1),
            "what is noted stays known"
        );
    }

    #[test]
    fn claims_find_overlaps_and_gaps() {
        let mut claims = Claims::default();
        assert!(!claims.claim(10..130));
        assert!(!claims.claim(130..131));
        assert!(claims.claim(0..11));
        assert!(!claims.claim(Claims::PAGE - 1..Claims::PAGE + 5));
        assert!(claims.claim(Claims::PAGE + 4..Claims::PAGE + 6));
        let end = 2 * Claims::PAGE + 70;
        let free = claims.free(0..end);
        assert_eq!(free, vec![131..Claims::PAGE - 1, Claims::PAGE + 6..end]);
    }
}
