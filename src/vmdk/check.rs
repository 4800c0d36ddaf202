//! `--check`: reads every directory and table of a chain, and compares them with each other and with their files.
//! Compressed grains are inflated too, which verifies their checksums.
//!
//! Every sector of a file that a table or grain occupies is noted in a bitmap, so that both overlaps and leaks (space
//! that nothing names) are found. The bitmap takes a 4096th of the occupied part of the file, up to a bound.
//!
//! The image is untrusted: no number in it may make the check take more time or memory than the file's size allows. So
//! a table is examined once, however often it is named, and tables in holes of the file are not read.

use std::collections::{HashMap, HashSet};
use std::ops::Range;

use serde::Serialize;

use crate::block::SECTOR;
use crate::error::Result;
use crate::vmdk::chain::{Link, PlacedExtent};
use crate::vmdk::extent::{Encoding, Extent, Mapping, SparseExtent};
use crate::vmdk::inflate::inflate;
use crate::vmdk::tables::hosted::{Copy, HostedTables};
use crate::vmdk::tables::{CHUNK, DirectoryEntry, GrainEntry, Layout};

/// Maximum number of error messages in a report; further errors are only counted.
const MAX_MESSAGES: usize = 100;

/// Result of a check.
#[derive(Debug, Clone, Default, Serialize)]
pub struct CheckReport {
    /// Error messages, at most 100.
    pub errors: Vec<String>,
    /// Number of errors, including those without a message.
    pub error_count: u64,
    /// Number of grains of space that no table names: lost space, no lost data.
    pub leaks: u64,
    /// Number of entries and tables that only one of both copies has, in an image that was not closed. Its writer
    /// crashed in the middle of a flush; opening the image for writing completes them.
    pub unfinished: u64,
    /// Conditions that are unusual, but not errors, at most 100.
    pub notes: Vec<String>,
    /// Number of notes, including those without a message.
    pub note_count: u64,
    /// Number of grains checked.
    pub grains: u64,
}

impl CheckReport {
    fn error(&mut self, message: impl FnOnce() -> String) {
        self.error_count += 1;
        if self.errors.len() < MAX_MESSAGES {
            self.errors.push(message());
        }
    }

    fn note(&mut self, message: impl FnOnce() -> String) {
        self.note_count += 1;
        if self.notes.len() < MAX_MESSAGES {
            self.notes.push(message());
        }
    }

    /// Adds a note.
    pub(super) fn add_note(&mut self, message: String) {
        self.note(|| message);
    }

    /// Adds an error.
    pub(crate) fn add_error(&mut self, message: String) {
        self.error(|| message);
    }

    /// Adds the report of another disk.
    pub fn add(&mut self, other: CheckReport) {
        self.errors.extend(other.errors);
        self.errors.truncate(MAX_MESSAGES);
        self.error_count += other.error_count;
        self.leaks += other.leaks;
        self.unfinished += other.unfinished;
        self.notes.extend(other.notes);
        self.notes.truncate(MAX_MESSAGES);
        self.note_count += other.note_count;
        self.grains += other.grains;
    }
}

/// Checks links, and how they fit together. A read error is an error in the report.
pub(super) fn check(links: &[Link]) -> CheckReport {
    let mut report = CheckReport::default();
    let mut seen = HashSet::new();
    for placed in links.iter().flat_map(|link| &link.extents) {
        if let Extent::Lost(error) = &placed.extent {
            report.error(|| error.to_string());
        }
        if let Extent::Sparse(sparse) = &placed.extent {
            if !seen.insert(sparse.file.identity_at_open().place()) {
                let label = sparse.file.label();
                report.error(|| format!("{label}: is used by several extents: a write to one would change the other"));
                continue;
            }
            if placed.unclean {
                report.note(|| format!("{}: was not closed after writing", sparse.file.label()));
            }
            let checked = Checker {
                placed,
                sparse,
                claims: Claims::default(),
                stored_ranges: Default::default(),
                report: &mut report,
            }
            .run();
            if let Err(e) = checked {
                report.error(|| e.to_string());
            }
        }
    }
    for warning in links.iter().flat_map(Link::all_warnings) {
        report.note(|| warning);
    }
    report
}

struct Checker<'a> {
    placed: &'a PlacedExtent,
    sparse: &'a SparseExtent,
    claims: Claims,
    /// Last answers of the store to "is this stored": one near the primary tables, one near the redundant ones. Each
    /// kind of table is visited in order, so few queries are repeated.
    stored_ranges: [StoredRange; 2],
    report: &'a mut CheckReport,
}

/// Range of bytes of a file that are all stored or all in a hole.
#[derive(Debug, Clone, Default)]
struct StoredRange {
    bytes: Range<u64>,
    stored: bool,
}

impl Checker<'_> {
    fn run(mut self) -> Result<()> {
        if let Some(hosted) = &self.placed.hosted {
            // Claimed first, so that a table or grain which overlaps them is what the report names.
            for range in hosted.fixed() {
                if self.claims.claim(range.clone()) {
                    let (label, start) = (self.sparse.file.label(), range.start);
                    self.report
                        .error(|| format!("{label}: header, descriptor and directories overlap at sector {start}"));
                }
            }
            if hosted.redundant_is_lost() {
                let label = self.sparse.file.label();
                self.report
                    .error(|| format!("{label}: the redundant grain directory of the header lies outside of the file"));
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
                    DirectoryEntry::At(at) => self.check_table(table, at)?,
                }
            }
        }
        self.leaks()
    }

    fn check_table(&mut self, number: u64, at: u64) -> Result<()> {
        let geometry = self.sparse.geometry();
        // A table that overlaps an earlier one is reported and not examined again. So the size of the file bounds the
        // work, and not the size of the directory.
        if !self.claim(at..at + self.sparse.layout.table_sectors(), "grain table", number) {
            return Ok(());
        }
        if self.placed.hosted.is_some() && self.is_hole(Copy::Primary, at) {
            return Ok(());
        }
        let table = self.sparse.layout.load_table(number, at)?;
        for entry in 0..table.len() {
            let grain = number * geometry.entries_per_table + entry as u64;
            match table.entry(entry) {
                GrainEntry::Unallocated | GrainEntry::Zero => {}
                GrainEntry::Bad => self
                    .report
                    .error(|| self.sparse.explain(number, Some(entry as u64)).to_string()),
                GrainEntry::At(sector) => self.check_grain(grain, sector)?,
            }
        }
        Ok(())
    }

    /// Returns true if the table at sector `at` lies in a hole of the file, so that nothing is allocated in it. New
    /// images have space for all their tables: in a large one most of them are holes.
    fn is_hole(&mut self, copy: Copy, at: u64) -> bool {
        let (start, end) = (at * SECTOR, (at + self.sparse.layout.table_sectors()) * SECTOR);
        let range = &mut self.stored_ranges[usize::from(copy == Copy::Redundant)];
        if !range.bytes.contains(&start) {
            // If the store can't answer, the table is read.
            let (stored, bytes) = self.sparse.file.data_at(start).unwrap_or((true, 1));
            *range = StoredRange {
                bytes: start..start + bytes,
                stored,
            };
        }
        !range.stored && end <= range.bytes.end
    }

    fn check_grain(&mut self, grain: u64, sector: u64) -> Result<()> {
        let geometry = self.sparse.geometry();
        self.report.grains += 1;
        if self.sparse.encoding == Encoding::Plain {
            self.claim(sector..sector + geometry.grain_sectors(grain), "grain", grain);
            return Ok(());
        }
        // Compressed: only the first sector is known before the header is read. Two grains at one sector are found.
        if !self.claim(sector..sector + 1, "grain", grain) {
            return Ok(());
        }
        if let Mapping::Compressed { grain: packed, .. } = self.placed.extent.map(grain * geometry.grain, 1, None)? {
            let mut whole = vec![0; (geometry.grain * SECTOR) as usize];
            if let Err(e) = inflate(&packed, &mut whole) {
                self.report.error(|| e.to_string());
            }
        }
        Ok(())
    }

    /// Claims sectors for a grain or table. Returns false, and adds an error to the report, if any of them is claimed
    /// already.
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

    /// Checks that both copies of the directory, and both copies of each table, are equal. In an image that was not
    /// closed they may differ as a crash leaves them.
    fn compare_directories(&mut self, hosted: &HostedTables, tables: Range<u64>) -> Result<()> {
        if !hosted.has_redundant() {
            return Ok(());
        }
        let label = self.sparse.file.label();
        let first = hosted.raw_directory(Copy::Primary, tables.clone())?;
        let second = hosted.raw_directory(Copy::Redundant, tables.clone())?;
        for (table, (&a, &b)) in tables.zip(first.iter().zip(&second)) {
            let good = |raw: u32| raw != 0 && hosted.table_fits(raw.into());
            // If the primary entry is bad, the redundant table is the one that is read, and `check_table` claims it. A
            // redundant table that overlaps an earlier table was compared there.
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
                    .error(|| format!("{label}: grain table {table} is named by only one of both directories"));
            } else if a != 0 && (!good(a) || !good(b)) {
                self.report.error(|| {
                    format!(
                        "{label}: directory entry {table} is {a:#x}, and {b:#x} in the redundant one, expected the \
                     sectors of two tables inside of the file"
                    )
                });
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

    /// Returns the number of entries that differ between both copies of a table, or `None` if they differ in a way that
    /// a crashed writer does not leave. `own` are the sectors of the copies.
    fn unfinished(
        &self,
        hosted: &HostedTables,
        table: u64,
        own: [u64; 2],
        first: &[u32],
        second: &[u32],
    ) -> Option<u64> {
        let from = table * hosted.geometry().entries_per_table;
        let names_grain = |raw, grain| {
            matches!(
                hosted.decode_entry(raw, grain, &own),
                GrainEntry::At(_) | GrainEntry::Zero
            )
        };
        let mut entries = 0;
        for (grain, (&a, &b)) in (from..).zip(first.iter().zip(second)).filter(|(_, (a, b))| a != b) {
            // A crash leaves the old or the new value in each copy: each is unallocated, or names a grain that exists.
            let plausible = [a, b].into_iter().all(|raw| raw == 0 || names_grain(raw, grain));
            if !self.placed.unclean || !plausible {
                return None;
            }
            entries += 1;
        }
        Some(entries)
    }

    /// Counts the space that nothing claims. Only for hosted extents, which are written without gaps: ESX grows its
    /// files in steps.
    fn leaks(&mut self) -> Result<()> {
        let Some(hosted) = self
            .placed
            .hosted
            .as_ref()
            .filter(|_| self.sparse.encoding == Encoding::Plain)
        else {
            return Ok(());
        };
        // Entries have 32 bits, so nothing after 2 TiB can be in use. A sparse file may have any length, and a search
        // up to its end would take as long.
        let file_sectors = (self.sparse.file.len() / SECTOR).min(1 << 32);
        let grain = self.sparse.geometry().grain;
        // Sectors that were claimed and not noted would count as lost space.
        if self.claims.full {
            let label = self.sparse.file.label();
            self.report
                .note(|| format!("{label}: is too large to find all overlaps; leaks were not searched for"));
            return Ok(());
        }
        let free = self.claims.free(hosted.data_start()..file_sectors);
        let mut leaks = 0;
        for range in free.filter(|range| range.end - range.start >= grain) {
            leaks += self.stored(range)?.div_ceil(grain);
        }
        self.report.leaks += leaks;
        Ok(())
    }

    /// Returns the number of sectors of the range that are stored: holes of the file are no lost space.
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

/// Bitmap of the claimed sectors of a file, in pages that are allocated on demand.
#[derive(Debug, Default)]
struct Claims {
    pages: HashMap<u64, Box<[u64; Claims::WORDS]>>,
    /// True if a claim was not noted, because there are [`Claims::MAX_PAGES`] pages.
    full: bool,
}

impl Claims {
    const WORDS: usize = 512;
    const PAGE: u64 = Self::WORDS as u64 * 64;
    /// Maximum number of pages: 256 MiB of memory, a file of 1 TiB that is claimed everywhere.
    const MAX_PAGES: usize = 1 << 16;

    /// Claims a range. Returns true if any sector of it was claimed before.
    fn claim(&mut self, range: Range<u64>) -> bool {
        let mut taken = false;
        let mut at = range.start;
        while at < range.end {
            if self.pages.len() >= Self::MAX_PAGES && !self.pages.contains_key(&(at / Self::PAGE)) {
                // Existing pages continue to find overlaps; the rest of this page is skipped.
                self.full = true;
                at = (at / Self::PAGE + 1) * Self::PAGE;
                continue;
            }
            let page = self
                .pages
                .entry(at / Self::PAGE)
                .or_insert_with(|| Box::new([0; Self::WORDS]));
            // Word by word: `at` to `end` lie in one word of 64 sectors.
            let end = range.end.min((at / 64 + 1) * 64);
            // `end - at` is 1 to 64, so both shifts are shorter than a word.
            let mask = (u64::MAX >> (64 - (end - at))) << (at % 64);
            if let Some(word) = page.get_mut((at % Self::PAGE / 64) as usize) {
                taken |= *word & mask != 0;
                *word |= mask;
            }
            at = end;
        }
        taken
    }

    /// Returns the parts of `range` that are not claimed, in order.
    fn free(&self, range: Range<u64>) -> impl Iterator<Item = Range<u64>> {
        let mut at = range.start;
        // One by one: a hostile image can have a gap for every four bytes of its tables, too many to collect.
        std::iter::from_fn(move || {
            let mut start = None;
            while at < range.end {
                let (is_free, end) = self.equal_from(at, range.end);
                match (is_free, start) {
                    (true, None) => start = Some(at),
                    (false, Some(start)) => return Some(start..at),
                    _ => {}
                }
                at = end;
            }
            start.map(|start| start..at)
        })
    }

    /// Returns true if sector `at` is free, and a sector up to which that holds, at most `end`.
    fn equal_from(&self, at: u64, end: u64) -> (bool, u64) {
        let Some(page) = self.pages.get(&(at / Self::PAGE)) else {
            return (true, end.min((at / Self::PAGE + 1) * Self::PAGE));
        };
        // The bits of the word from `at` on start with ones (claimed) or with zeroes (free).
        let word = page.get((at % Self::PAGE / 64) as usize).copied().unwrap_or(u64::MAX) >> (at % 64);
        let left = 64 - at % 64;
        let bits = match word & 1 {
            1 => word.trailing_ones(),
            _ => word.trailing_zeros(),
        };
        (word & 1 == 0, end.min(at + u64::from(bits).min(left)))
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
            "pages that exist keep their claims"
        );
    }

    #[test]
    fn messages_are_bounded_and_counted() {
        let mut report = CheckReport::default();
        for _ in 0..MAX_MESSAGES + 50 {
            report.error(|| "e".to_owned());
            report.note(|| "n".to_owned());
        }
        report.add(report.clone());
        assert_eq!((report.errors.len(), report.notes.len()), (MAX_MESSAGES, MAX_MESSAGES));
        assert_eq!((report.error_count, report.note_count), (300, 300));
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
        let free: Vec<_> = claims.free(0..end).collect();
        assert_eq!(free, vec![131..Claims::PAGE - 1, Claims::PAGE + 6..end]);
        assert_eq!(claims.free(5..20).collect::<Vec<_>>(), vec![]);
        assert_eq!(claims.free(140..141).collect::<Vec<_>>(), vec![140..141]);
    }

    #[test]
    fn gaps_between_many_claims_are_found_one_by_one() {
        let mut claims = Claims::default();
        for sector in (0..4 * Claims::PAGE).step_by(2) {
            claims.claim(sector..sector + 1);
        }
        let mut free = claims.free(0..4 * Claims::PAGE);
        assert_eq!(free.next(), Some(1..2));
        assert_eq!(free.count() as u64, 2 * Claims::PAGE - 1);
    }
}
