//! Room for new grains and tables, at the end of the file.
//!
//! ```text
//!   |░░ what there was ░░|░ new grains ░|░ two tables ░|░ new grains ░|   a hole   |
//!                                                                   next          len
//! ```
//! The file grows by more than is wanted at once. What is new reads as zeroes, and what is behind the last grain is cut
//! off at the end.
//!
//! How long the file has to be is known here, so whatever changes it asks here first whether it still is.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::block::SECTOR;
use crate::error::{Error, ErrorKind, Result};
use crate::store::{StoredFile, StoredWrite, WriteLatch, writer};
use crate::vmdk::tables::Layout;
use crate::vmdk::tables::hosted::HostedTables;
use crate::vmdk::tables::writable::TableCopies;

/// The file grows by at least this many sectors at once, and by at most [`GROW_MAX`]: the room is a hole, and what is
/// not used is cut off at the end.
const GROW_MIN: u64 = 2 << 11;
const GROW_MAX: u64 = 64 << 11;

/// Table entries are sectors of 32 bits, so a file can't use more of itself.
const LAST_SECTOR: u64 = 1 << 32;

/// Where new grains and tables go.
#[derive(Debug)]
pub(super) struct GrainAllocator {
    file: Arc<dyn StoredFile>,
    layout: Arc<HostedTables>,
    /// Sectors of one.
    grain: u64,
    space: Mutex<Space>,
    /// Bytes that the file has at least, unless somebody else has cut it. What was taken lies within.
    known: AtomicU64,
    /// Shared by all files of the disk.
    latch: Arc<WriteLatch>,
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

impl GrainAllocator {
    /// All from the end of `file` on.
    pub(super) fn new(
        file: Arc<dyn StoredFile>,
        layout: Arc<HostedTables>,
        grain: u64,
        latch: Arc<WriteLatch>,
    ) -> Result<Self> {
        let known = writer(&*file)?.current_len()?;
        let len = known.div_ceil(SECTOR);
        let next = len.max(layout.data_start()).next_multiple_of(grain);
        let space = Mutex::new(Space {
            next,
            len,
            spare: Vec::new(),
            tables: 0..0,
        });
        Ok(Self {
            file,
            layout,
            grain,
            space,
            known: known.into(),
            latch,
        })
    }

    /// Room for `count` grains, in the file and all zeroes.
    pub(super) fn take(&self, count: u64) -> Result<u64> {
        let writer = self.check_not_truncated()?;
        let mut space = self.space();
        if let (1, Some(place)) = (count, space.spare.pop()) {
            return Ok(place);
        }
        let place = space.next;
        let end = place + count * self.grain;
        if end > LAST_SECTOR {
            let context = format!(
                "{}: a sparse extent can't use more than 2 TiB of its file",
                self.file.label()
            );
            return Err(Error::new(ErrorKind::Os(libc::ENOSPC), context));
        }
        if end > space.len {
            let step = (space.len / 8).clamp(GROW_MIN, GROW_MAX);
            let wanted = (end + step).min(LAST_SECTOR);
            // where so much is too much, just enough may do
            let len = match writer.set_len(wanted * SECTOR) {
                Ok(()) => wanted,
                Err(_) => writer.set_len(end * SECTOR).map(|()| end)?,
            };
            space.len = len;
            // it is longer already, so who compares at this moment finds more than is known
            self.known.store(len * SECTOR, Ordering::Release);
            self.layout.grew_to(len);
        }
        space.next = end;
        Ok(place)
    }

    /// Gives back room of grains that nothing names. It may hold anything; where it can't be made zeroes, it is lost.
    pub(super) fn give_back(&self, place: u64, count: u64) {
        let bytes = count * self.grain * SECTOR;
        if self
            .check_not_truncated()
            .and_then(|w| w.zero(place * SECTOR, bytes, true))
            .is_err()
        {
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
    pub(super) fn for_table(&self) -> Result<TableCopies> {
        let sectors = self.layout.table_sectors();
        let copies = if self.layout.has_redundant() { 2 } else { 1 };
        let mut allocator = self.space().tables.clone();
        if allocator.end - allocator.start < sectors * copies {
            let grains = (sectors * copies).div_ceil(self.grain);
            let place = self.take(grains.max(2))?;
            allocator = place..place + grains.max(2) * self.grain;
        }
        self.space().tables = allocator.start + sectors * copies..allocator.end;
        let first = allocator.start as u32;
        Ok(match copies {
            1 => TableCopies {
                primary: first,
                redundant: 0,
            },
            _ => TableCopies {
                redundant: first,
                primary: first + sectors as u32,
            },
        })
    }

    /// Gives the file's room behind the last grain back. Nobody changes the file meanwhile.
    pub(super) fn truncate_unused(&self) -> Result<()> {
        let mut space = self.space();
        let writer = self.check_not_truncated()?;
        if space.len > space.next {
            writer.set_len(space.next * SECTOR)?;
            space.len = space.next;
            self.known.store(space.len * SECTOR, Ordering::Release);
        }
        Ok(())
    }

    /// The file, for a change. Refuses one that somebody else has cut, for good: its grains are lost, and to make it
    /// longer again would show zeroes in their place, as if nothing had happened.
    ///
    /// Whatever changes the file asks, also in place: a change behind the end makes the file longer, and one that reaches
    /// the end that it had would hide the cut from all who ask later.
    pub(super) fn check_not_truncated(&self) -> Result<&dyn StoredWrite> {
        // before the file's length: that may only grow meanwhile
        let known = self.known.load(Ordering::Acquire);
        self.latch.check_not_truncated(&*self.file, known)
    }

    fn space(&self) -> MutexGuard<'_, Space> {
        self.space.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
