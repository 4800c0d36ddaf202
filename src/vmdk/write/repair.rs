//! Before writing: what is damaged is refused, and what an unclean stop left is put right.
//!
//! A writer that ended badly leaves, if it kept the order of things, at most
//! - entries that are in one copy of a table only: the grain they name is there, so the other copy gets it;
//! - tables that are in one directory only: likewise;
//! - a last grain that the file holds only a part of: the rest was never written, so it is zeroes;
//! - room behind the last grain that nothing names: cut off.
//!
//! Everything else is damage, and damage is not written to.

use crate::block::SECTOR;
use crate::error::{Error, ErrorKind, Result};
use crate::vmdk::check::check_link;
use crate::vmdk::extent::{Extent, SparseExtent};
use crate::vmdk::open::Link;
use crate::vmdk::sparse::{Copy, HostedTables};
use crate::vmdk::tables::{CHUNK, Layout, Slot};
use crate::vmdk::write::grains::writer;

/// Checks all tables of the link, and repairs extents that were not closed.
///
/// Errors: `Corrupt` where something is wrong that can't be repaired; nothing but repairs was written then.
pub(super) fn make_sound(link: &Link) -> Result<()> {
    let mut tails = Vec::new();
    for placed in link.extents.iter().filter(|p| p.unclean) {
        if let (Extent::Sparse(sparse), Some(hosted)) = (&placed.extent, &placed.hosted) {
            let repair = Repair { sparse, hosted };
            let (fixes, end) = repair.run()?;
            tails.push((repair, end));
            let label = sparse.file.label();
            tracing::warn!("{label}: was not closed after writing; its tables were checked, {fixes} repairs made");
        }
    }
    let report = check_link(link);
    let Some(first) = report.errors.first() else {
        // only now it is known that nothing else has something there
        return tails.iter().try_for_each(|(repair, end)| repair.cut_tail(*end));
    };
    let more = match report.error_count {
        1 => String::new(),
        n => format!(" and {} more errors", n - 1),
    };
    let way_out = "an image that is damaged is not written to: readonly=true reads what can be read, --check lists all";
    Err(Error::new(ErrorKind::Corrupt, format!("{first}{more}; {way_out}")))
}

/// The repair of one extent.
struct Repair<'a> {
    sparse: &'a SparseExtent,
    hosted: &'a HostedTables,
}

impl Repair<'_> {
    /// Puts right what an unclean stop leaves: how many repairs that were, and the sector behind the last one that
    /// something has, as far as all of it is sound.
    fn run(&self) -> Result<(u64, u64)> {
        let mut fixes = self.complete_last_grain()?;
        let fixed = self.hosted.fixed().iter().map(|range| range.end);
        let mut end = fixed.fold(self.hosted.data_start(), u64::max);
        let tables = self.hosted.shape().tables();
        for first in (0..tables).step_by(CHUNK as usize) {
            let range = first..tables.min(first + CHUNK);
            let primary = self.hosted.raw_directory(Copy::Primary, range.clone())?;
            let redundant = self.hosted.raw_directory(Copy::Redundant, range.clone())?;
            for (i, (table, primary)) in range.zip(primary).enumerate() {
                let redundant = redundant.get(i).copied();
                fixes += self.table(table, primary, redundant, &mut end)?;
            }
        }
        if fixes > 0 {
            writer(&*self.sparse.file)?.sync()?;
        }
        Ok((fixes, end))
    }

    /// Makes the file as long as its last grain, where it ends inside of it.
    fn complete_last_grain(&self) -> Result<u64> {
        let writer = writer(&*self.sparse.file)?;
        let len = writer.len_now()?;
        let sectors = len.div_ceil(SECTOR);
        let mut end = 0;
        self.each_entry(|_, raw| {
            let start = u64::from(raw);
            if raw > 1 && start < sectors {
                end = end.max(start + self.hosted.shape().grain);
            }
        })?;
        if end <= sectors && len.is_multiple_of(SECTOR) {
            return Ok(0);
        }
        let end = end.max(sectors);
        writer.set_len(end * SECTOR)?;
        self.hosted.grew_to(end);
        Ok(1)
    }

    /// Gives every entry of all primary tables that can be read.
    fn each_entry(&self, mut f: impl FnMut(u64, u32)) -> Result<()> {
        let tables = self.hosted.shape().tables();
        for first in (0..tables).step_by(CHUNK as usize) {
            let range = first..tables.min(first + CHUNK);
            for (table, place) in range.clone().zip(self.hosted.raw_directory(Copy::Primary, range)?) {
                if place != 0 && self.hosted.table_fits(place.into()) {
                    let entries = self.hosted.raw_table(place.into())?;
                    entries.into_iter().for_each(|raw| f(table, raw));
                }
            }
        }
        Ok(())
    }

    /// Makes both copies of a table agree. `end` becomes the last sector that something has, if that is larger.
    fn table(&self, number: u64, primary: u32, redundant: Option<u32>, end: &mut u64) -> Result<u64> {
        let good = |place: u32| place != 0 && self.hosted.table_fits(place.into());
        let (place, spare) = match (good(primary), redundant.map(|r| (r, good(r)))) {
            (true, None) => (primary, None),
            (true, Some((spare, true))) => (primary, Some(spare)),
            // only one directory has it
            (true, Some((0, _))) => return self.adopt(Copy::Redundant, number, primary, end),
            (false, Some((spare, true))) if primary == 0 => return self.adopt(Copy::Primary, number, spare, end),
            // none, or damage that the check names
            _ => return Ok(0),
        };
        let sectors = self.hosted.table_sectors();
        *end = (*end).max(u64::from(place.max(spare.unwrap_or(0))) + sectors);
        let first = self.hosted.raw_table(place.into())?;
        let mut fixes = 0;
        let second = spare.map(|spare| self.hosted.raw_table(spare.into())).transpose()?;
        for (entry, &a) in first.iter().enumerate() {
            let mut kept = a;
            if let Some(b) = second.as_ref().and_then(|second| second.get(entry)).copied().filter(|&b| b != a) {
                kept = self.choose(number, entry as u64, a, b, &[place.into(), spare.unwrap_or(place).into()])?;
                for table in [Some(place), spare].into_iter().flatten() {
                    let at = u64::from(table) * SECTOR + entry as u64 * 4;
                    writer(&*self.sparse.file)?.write_all_at(at, &kept.to_le_bytes())?;
                }
                fixes += 1;
            }
            if kept > 1 {
                *end = (*end).max(u64::from(kept) + self.hosted.shape().grain);
            }
        }
        Ok(fixes)
    }

    /// Of two different entries the one that names a grain; the primary one where both do.
    fn choose(&self, table: u64, entry: u64, primary: u32, redundant: u32, own: &[u64]) -> Result<u32> {
        let grain = table * self.hosted.shape().entries_per_table + entry;
        let names = |raw| matches!(self.hosted.slot(raw, grain, own), Slot::At(_) | Slot::Zero);
        match (names(primary), names(redundant)) {
            (true, _) => Ok(primary),
            (false, true) => Ok(redundant),
            (false, false) => Err(Error::corrupt(format!(
                "{}: entry {entry} of grain table {table} is {primary:#x}, and {redundant:#x} in the redundant copy: \
                 neither names a grain inside of the file",
                self.sparse.file.label()
            ))),
        }
    }

    /// Gives a table that only one directory names to the other one as well, as a copy at the end of the file.
    fn adopt(&self, missing: Copy, number: u64, place: u32, end: &mut u64) -> Result<u64> {
        let Some(directory) = self.hosted.directory(missing) else { return Ok(0) };
        let writer = writer(&*self.sparse.file)?;
        let at = writer.len_now()?.div_ceil(SECTOR).next_multiple_of(self.hosted.shape().grain);
        let entries = self.hosted.raw_table(place.into())?;
        let content: Vec<u8> = entries.iter().flat_map(|raw| raw.to_le_bytes()).collect();
        let new = u32::try_from(at).ok().filter(|&at| at < u32::MAX - 8);
        let Some(new) = new else {
            let context = format!("{}: no room for grain table {number}", self.sparse.file.label());
            return Err(Error::new(ErrorKind::Os(libc::ENOSPC), context));
        };
        writer.write_all_at(at * SECTOR, &content)?;
        // the copy before what names it
        writer.sync()?;
        writer.write_all_at(directory * SECTOR + number * 4, &new.to_le_bytes())?;
        let sectors = self.hosted.table_sectors();
        self.hosted.grew_to(at + sectors);
        *end = (*end).max(at + sectors).max(u64::from(place) + sectors);
        for raw in entries.into_iter().filter(|&raw| raw > 1) {
            *end = (*end).max(u64::from(raw) + self.hosted.shape().grain);
        }
        Ok(1)
    }

    /// Cuts off room that nothing names.
    fn cut_tail(&self, end: u64) -> Result<()> {
        let writer = writer(&*self.sparse.file)?;
        let end = end.next_multiple_of(self.hosted.shape().grain);
        if end * SECTOR < writer.len_now()? {
            writer.set_len(end * SECTOR)?;
            writer.sync()?;
        }
        Ok(())
    }
}
