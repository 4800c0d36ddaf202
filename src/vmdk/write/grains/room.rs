//! Room for new grains and tables, at the end of the file.
//!
//! ```text
//!   |░░ what there was ░░|░ new grains ░|░ two tables ░|░ new grains ░|   a hole   |
//!                                                                   next          len
//! ```
//! The file grows by more than is wanted at once. What is new reads as zeroes, and what is behind the last grain is cut
//! off at the end.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::writer;
use crate::block::SECTOR;
use crate::error::{Error, ErrorKind, Result};
use crate::store::{StoredFile, StoredWrite};
use crate::vmdk::sparse::HostedTables;
use crate::vmdk::tables::Layout;
use crate::vmdk::write::live::Places;

/// The file grows by at least this many sectors at once, and by at most [`GROW_MAX`]: the room is a hole, and what is
/// not used is cut off at the end.
const GROW_MIN: u64 = 2 << 11;
const GROW_MAX: u64 = 64 << 11;

/// Table entries are sectors of 32 bits, so a file can't use more of itself.
const LAST_SECTOR: u64 = 1 << 32;

/// Where new grains and tables go.
#[derive(Debug)]
pub(super) struct Room {
    file: Arc<dyn StoredFile>,
    layout: Arc<HostedTables>,
    /// Sectors of one.
    grain: u64,
    space: Mutex<Space>,
}

/// What of the file is taken.
#[derive(Debug)]
struct Space {
    /// First sector that nothing has, a multiple of the grain.
    next: u64,
    /// Sectors of the file; all from `next` on read as zeroes.
    len: u64,
    /// Grains that were taken and given back, all zeroes.
    spare: Vec<u64>,
    /// Room for new tables.
    tables: std::ops::Range<u64>,
}

impl Room {
    /// All from the end of `file` on.
    pub(super) fn new(file: Arc<dyn StoredFile>, layout: Arc<HostedTables>, grain: u64) -> Result<Self> {
        let len = writer(&*file)?.len_now()?.div_ceil(SECTOR);
        let next = len.max(layout.data_start()).next_multiple_of(grain);
        let space = Mutex::new(Space { next, len, spare: Vec::new(), tables: 0..0 });
        Ok(Self { file, layout, grain, space })
    }

    /// Room for `count` grains, in the file and all zeroes.
    pub(super) fn take(&self, count: u64) -> Result<u64> {
        let mut space = self.space();
        self.check_uncut(&space)?;
        if let (1, Some(place)) = (count, space.spare.pop()) {
            return Ok(place);
        }
        let place = space.next;
        let end = place + count * self.grain;
        if end > LAST_SECTOR {
            let context = format!("{}: a sparse extent can't use more than 2 TiB of its file", self.file.label());
            return Err(Error::new(ErrorKind::Os(libc::ENOSPC), context));
        }
        if end > space.len {
            let step = (space.len / 8).clamp(GROW_MIN, GROW_MAX);
            let wanted = (end + step).min(LAST_SECTOR);
            let writer = self.writer()?;
            // where so much is too much, just enough may do
            let len = match writer.set_len(wanted * SECTOR) {
                Ok(()) => wanted,
                Err(_) => writer.set_len(end * SECTOR).map(|()| end)?,
            };
            space.len = len;
            self.layout.grew_to(len);
        }
        space.next = end;
        Ok(place)
    }

    /// Gives back room of grains that nothing names. It may hold anything; where it can't be made zeroes, it is lost.
    pub(super) fn give_back(&self, place: u64, count: u64) {
        let bytes = count * self.grain * SECTOR;
        if self.writer().and_then(|w| w.zero(place * SECTOR, bytes, true)).is_err() {
            return;
        }
        let mut space = self.space();
        if space.next == place + count * self.grain {
            space.next = place;
        } else {
            space.spare.extend((0..count).map(|i| place + i * self.grain));
        }
    }

    /// Room for a new table, and for its copy where there are copies.
    pub(super) fn for_table(&self) -> Result<Places> {
        let sectors = self.layout.table_sectors();
        let copies = if self.layout.has_redundant() { 2 } else { 1 };
        let mut room = self.space().tables.clone();
        if room.end - room.start < sectors * copies {
            let grains = (sectors * copies).div_ceil(self.grain);
            let place = self.take(grains.max(2))?;
            room = place..place + grains.max(2) * self.grain;
        }
        self.space().tables = room.start + sectors * copies..room.end;
        let first = room.start as u32;
        Ok(match copies {
            1 => Places { primary: first, redundant: 0 },
            _ => Places { redundant: first, primary: first + sectors as u32 },
        })
    }

    /// Gives the file's room behind the last grain back.
    pub(super) fn cut_unused(&self) -> Result<()> {
        let mut space = self.space();
        self.check_uncut(&space)?;
        if space.len > space.next {
            self.writer()?.set_len(space.next * SECTOR)?;
            space.len = space.next;
        }
        Ok(())
    }

    /// Refuses a file that somebody else has cut: its grains are lost, and to make it longer again would show zeroes
    /// in their place, as if nothing had happened.
    fn check_uncut(&self, space: &Space) -> Result<()> {
        let (len, known) = (self.writer()?.len_now()?, space.len);
        if len.div_ceil(SECTOR) >= known {
            return Ok(());
        }
        let label = self.file.label();
        Err(Error::corrupt(format!("{label}: has {len} bytes, expected {known} sectors: somebody else has cut it")))
    }

    fn writer(&self) -> Result<&dyn StoredWrite> {
        writer(&*self.file)
    }

    fn space(&self) -> MutexGuard<'_, Space> {
        self.space.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
