//! Recovery before writing: refuses a damaged link, and repairs extents that were not closed.
//!
//! A writer that crashed leaves, if it kept the order of data and entries, at most
//! - entries that are in one copy of a table only: the grain that they name is durable, so the other copy gets it;
//! - tables that are in one directory only: the other directory gets a copy of the table;
//! - a last grain that lies only partly in the file: the rest was never written, so it is zeroes;
//! - space after the last grain that nothing names: truncated.
//!
//! Everything else is damage, and a damaged image is refused.
//!
//! Order: the check of the whole link comes first and changes nothing. Then the repairs, none of which removes data: a
//! file is extended, a table gets a copy, two copies of an entry become equal. The tail is truncated last, after the
//! repairs are durable. So a crash during recovery leaves an image that can be recovered again. The in-use mark stays
//! set; the next `close` clears it.

use crate::block::SECTOR;
use crate::error::{Error, ErrorKind, Result};
use crate::store::writer;
use crate::vmdk::chain::Link;
use crate::vmdk::check::{CheckReport, check};
use crate::vmdk::descriptor::ExtentAccess;
use crate::vmdk::extent::{Extent, SparseExtent};
use crate::vmdk::tables::hosted::{Copy, HostedTables};
use crate::vmdk::tables::{CHUNK, GrainEntry, Layout};

/// Checks all tables of the link, and repairs extents that were not closed.
///
/// Errors: `Corrupt` for damage that can't be repaired; then no file was truncated.
pub(super) fn recover(link: &Link) -> Result<()> {
    let mut report = check(std::slice::from_ref(link));
    let repairs = repairs_of(link);
    // A last grain that the file holds only a part of is an error of the check; it is tried once without.
    if report.error_count > 0 && complete_last_grains(&repairs)? {
        report = check(std::slice::from_ref(link));
    }
    refuse_damaged(&report)?;
    // From here on each table is known to be named once and each grain to lie in the file.
    for repair in &repairs {
        let (fixes, end) = repair.run()?;
        repair.truncate_tail(end)?;
        let label = repair.sparse.file.label();
        tracing::warn!("{label}: was not closed after writing; its tables were checked, {fixes} repairs made");
    }
    if repairs.is_empty() {
        Ok(())
    } else {
        // The repaired image has to pass the same check.
        refuse_damaged(&check(std::slice::from_ref(link)))
    }
}

/// Returns the hosted extents of a link that are writable and were not closed.
fn repairs_of(link: &Link) -> Vec<Repair<'_>> {
    let unclean = link
        .extents
        .iter()
        .filter(|p| p.unclean && p.access == ExtentAccess::ReadWrite);
    let repair = unclean.filter_map(|placed| match (&placed.extent, &placed.hosted) {
        (Extent::Sparse(sparse), Some(hosted)) => Some(Repair { sparse, hosted }),
        _ => None,
    });
    repair.collect()
}

/// Extends the files that end inside of their last grain. Returns true if any file was extended.
fn complete_last_grains(repairs: &[Repair<'_>]) -> Result<bool> {
    let mut longer = false;
    for repair in repairs {
        longer |= repair.complete_last_grain()?;
    }
    Ok(longer)
}

fn refuse_damaged(report: &CheckReport) -> Result<()> {
    let Some(first) = report.errors.first() else {
        return Ok(());
    };
    let more = match report.error_count {
        1 => String::new(),
        n => format!(" and {} more errors", n - 1),
    };
    let way_out = "damaged images are not written to: readonly=true reads the intact part, --check lists all errors";
    Err(Error::new(ErrorKind::Corrupt, format!("{first}{more}; {way_out}")))
}

/// Repair of one extent.
struct Repair<'a> {
    sparse: &'a SparseExtent,
    hosted: &'a HostedTables,
}

impl Repair<'_> {
    /// Makes both copies of the directory and of all tables agree, and syncs the file if anything changed. Returns the
    /// number of repairs, and the first sector after everything that is allocated. The link must have passed the check.
    fn run(&self) -> Result<(u64, u64)> {
        let mut fixes = 0;
        let fixed = self.hosted.fixed().iter().map(|range| range.end);
        // The metadata may lie behind the grains, so the truncation must not go before their end either.
        let mut end = fixed.fold(self.hosted.data_start(), u64::max);
        let tables = self.hosted.geometry().tables();
        for first in (0..tables).step_by(CHUNK as usize) {
            let range = first..tables.min(first + CHUNK);
            let primary = self.hosted.raw_directory(Copy::Primary, range.clone())?;
            let redundant = self.hosted.raw_directory(Copy::Redundant, range.clone())?;
            for (i, (table, primary)) in range.zip(primary).enumerate() {
                let redundant = redundant.get(i).copied();
                fixes += self.reconcile_table(table, primary, redundant, &mut end)?;
            }
        }
        // Before the tail is truncated by the caller: the truncation relies on these entries.
        if fixes > 0 {
            writer(&*self.sparse.file)?.sync()?;
        }
        Ok((fixes, end))
    }

    /// Extends the file to the end of its last grain, if it ends inside of that grain. Returns true if it did. The
    /// tables may still be damaged here.
    fn complete_last_grain(&self) -> Result<bool> {
        let writer = writer(&*self.sparse.file)?;
        let sectors = writer.current_len()?.div_ceil(SECTOR);
        let mut end = 0;
        for table in self.tables()? {
            // Only grains that start inside of the file: so the file grows by less than one grain, whatever a damaged
            // table names. An entry up to 1 names no grain.
            let inside = |raw: &u32| *raw > 1 && u64::from(*raw) < sectors;
            let last = self.hosted.raw_table(table.into())?.into_iter().filter(inside).max();
            end = end.max(last.map_or(0, |raw| u64::from(raw) + self.hosted.geometry().grain));
        }
        if end <= sectors {
            return Ok(false);
        }
        writer.set_len(end * SECTOR)?;
        self.hosted.grew_to(end);
        Ok(true)
    }

    /// Returns the sectors of the primary tables, each once: a damaged directory may name one table many times, and the
    /// work must not grow with that.
    fn tables(&self) -> Result<Vec<u32>> {
        let tables = self.hosted.geometry().tables();
        let mut places = Vec::new();
        for first in (0..tables).step_by(CHUNK as usize) {
            let chunk = self
                .hosted
                .raw_directory(Copy::Primary, first..tables.min(first + CHUNK))?;
            places.extend(
                chunk
                    .into_iter()
                    .filter(|&place| place != 0 && self.hosted.table_fits(place.into())),
            );
        }
        places.sort_unstable();
        places.dedup();
        Ok(places)
    }

    /// Makes both copies of a table agree. Raises `end` to the first sector after the table's copies and grains.
    /// Returns the number of repairs.
    fn reconcile_table(&self, number: u64, primary: u32, redundant: Option<u32>, end: &mut u64) -> Result<u64> {
        let good = |place: u32| place != 0 && self.hosted.table_fits(place.into());
        let (place, spare) = match (good(primary), redundant.map(|r| (r, good(r)))) {
            (true, None) => (primary, None),
            (true, Some((spare, true))) => (primary, Some(spare)),
            // Only one directory has the table: the crash was between the writes of both directory entries.
            (true, Some((0, _))) => return self.restore_copy(Copy::Redundant, number, primary, end),
            (false, Some((spare, true))) if primary == 0 => {
                return self.restore_copy(Copy::Primary, number, spare, end);
            }
            // No table, or damage that the check has reported.
            _ => return Ok(0),
        };
        let sectors = self.hosted.table_sectors();
        *end = (*end).max(u64::from(place.max(spare.unwrap_or(0))) + sectors);
        let first = self.hosted.raw_table(place.into())?;
        let mut fixes = 0;
        let second = spare.map(|spare| self.hosted.raw_table(spare.into())).transpose()?;
        for (entry, &a) in first.iter().enumerate() {
            let mut kept = a;
            if let Some(b) = second
                .as_ref()
                .and_then(|second| second.get(entry))
                .copied()
                .filter(|&b| b != a)
            {
                kept = self.choose(
                    number,
                    entry as u64,
                    a,
                    b,
                    &[place.into(), spare.unwrap_or(place).into()],
                )?;
                for table in [Some(place), spare].into_iter().flatten() {
                    let at = u64::from(table) * SECTOR + entry as u64 * 4;
                    writer(&*self.sparse.file)?.write_all_at(at, &kept.to_le_bytes())?;
                }
                fixes += 1;
            }
            if kept > 1 {
                *end = (*end).max(u64::from(kept) + self.hosted.geometry().grain);
            }
        }
        Ok(fixes)
    }

    /// Returns the one of two different entries that names a grain, or the primary one if both do.
    ///
    /// Entries are written after their data are durable, so an entry that names a grain is newer than one that names
    /// nothing, and its data are there. `own` are the sectors of the table's copies, which no grain may overlap.
    fn choose(&self, table: u64, entry: u64, primary: u32, redundant: u32, own: &[u64]) -> Result<u32> {
        let grain = table * self.hosted.geometry().entries_per_table + entry;
        let names_grain = |raw| {
            matches!(
                self.hosted.decode_entry(raw, grain, own),
                GrainEntry::At(_) | GrainEntry::Zero
            )
        };
        match (names_grain(primary), names_grain(redundant)) {
            (true, _) => Ok(primary),
            (false, true) => Ok(redundant),
            (false, false) => Err(Error::corrupt(format!(
                "{}: entry {entry} of grain table {table} is {primary:#x}, and {redundant:#x} in the redundant copy, \
                 expected one that names a grain inside of the file",
                self.sparse.file.label()
            ))),
        }
    }

    /// Copies a table that only one directory names to the end of the file, and names the copy in the directory
    /// `missing`.
    fn restore_copy(&self, missing: Copy, number: u64, place: u32, end: &mut u64) -> Result<u64> {
        let Some(directory) = self.hosted.directory(missing) else {
            return Ok(0);
        };
        let writer = writer(&*self.sparse.file)?;
        // At a multiple of the grain, as the allocator places everything.
        let at = writer
            .current_len()?
            .div_ceil(SECTOR)
            .next_multiple_of(self.hosted.geometry().grain);
        let entries = self.hosted.raw_table(place.into())?;
        let content: Vec<u8> = entries.iter().flat_map(|raw| raw.to_le_bytes()).collect();
        let new = u32::try_from(at).ok().filter(|&at| at < u32::MAX - 8);
        let Some(new) = new else {
            let context = format!(
                "{}: no space for a copy of grain table {number}: sector {at} is beyond 2 TiB",
                self.sparse.file.label()
            );
            return Err(Error::new(ErrorKind::Os(libc::ENOSPC), context));
        };
        writer.write_all_at(at * SECTOR, &content)?;
        // The copy must be durable before the directory names it.
        writer.sync()?;
        writer.write_all_at(directory * SECTOR + number * 4, &new.to_le_bytes())?;
        let sectors = self.hosted.table_sectors();
        self.hosted.grew_to(at + sectors);
        *end = (*end).max(at + sectors).max(u64::from(place) + sectors);
        for raw in entries.into_iter().filter(|&raw| raw > 1) {
            *end = (*end).max(u64::from(raw) + self.hosted.geometry().grain);
        }
        Ok(1)
    }

    /// Truncates the file after `end`, rounded up to a grain. Everything there is named by nothing.
    fn truncate_tail(&self, end: u64) -> Result<()> {
        let writer = writer(&*self.sparse.file)?;
        let end = end.next_multiple_of(self.hosted.geometry().grain);
        if end * SECTOR < writer.current_len()? {
            writer.set_len(end * SECTOR)?;
            writer.sync()?;
        }
        Ok(())
    }
}
