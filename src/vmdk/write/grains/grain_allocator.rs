//! Allocates space for new grains and tables, at the end of the file.
//!
//! ```text
//!   |░░ old content ░░|░ new grains ░|░ two tables ░|░ new grains ░|   a hole   |
//!                                                                next          len
//! ```
//! The file grows in steps that are larger than one request. New space reads as zeroes, and `close` truncates the file
//! after the last grain. A crash leaves the tail, which recovery truncates.
//!
//! Invariant: the file has at least `known` bytes, and everything that was handed out lies within. A shorter file was
//! truncated by another process, so every change of the file checks its length here first.
//!
//! Lock order: `space` is the only lock; it is held over the system call that grows the file, so that the growth of one
//! thread is seen by the next.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};

use crate::block::SECTOR;
use crate::error::{Error, ErrorKind, Result};
use crate::mutex::lock;
use crate::store::{StoredFile, StoredWrite, writer};
use crate::vmdk::tables::Layout;
use crate::vmdk::tables::hosted::HostedTables;
use crate::vmdk::tables::writable::TableCopies;
use crate::write_latch::WriteLatch;

/// Minimum step by which the file grows: 2 MiB in sectors. The step costs no storage, as it is a hole.
const GROW_MIN: u64 = 2 << 11;
/// Maximum step by which the file grows: 64 MiB in sectors.
const GROW_MAX: u64 = 64 << 11;

/// Number of sectors that 32-bit table entries can address: 2 TiB of the file.
const LAST_SECTOR: u64 = 1 << 32;

/// Allocator for the end of one file.
#[derive(Debug)]
pub(super) struct GrainAllocator {
    file: Arc<dyn StoredFile>,
    layout: Arc<HostedTables>,
    /// Sectors of a grain.
    grain: u64,
    space: Mutex<Space>,
    /// Bytes that the file has at least, unless another process truncates it. Written under `space`, read without it.
    known: AtomicU64,
    /// Shared by all files of the disk.
    latch: Arc<WriteLatch>,
}

/// Allocated and free parts of the file.
#[derive(Debug)]
struct Space {
    /// First free sector after everything that is allocated, a multiple of the grain.
    next: u64,
    /// Sectors of the file; all from `next` on read as zeroes.
    len: u64,
    /// First sectors of single grains that were given back; they read as zeroes.
    spare: Vec<u64>,
    /// Sectors that are reserved for new tables.
    tables: std::ops::Range<u64>,
}

impl GrainAllocator {
    /// Creates an allocator for everything after the end of `file`. Space inside of the file that nothing names is not
    /// reused.
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

    /// Allocates `count` consecutive grains, which lie in the file and read as zeroes. Returns their first sector.
    ///
    /// Errors: `Os(ENOSPC)` at 2 TiB, `Corrupt` if another process truncated the file, those of growing the file.
    pub(super) fn take(&self, count: u64) -> Result<u64> {
        // Before the lock, as it is a system call. The file can only become longer meanwhile, unless it is truncated by
        // another process, which the next check finds.
        let writer = self.check_not_truncated()?;
        let mut space = self.space();
        // Spare grains are single: only requests for one grain use them.
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
            // An eighth of the file: few system calls for a large image, little waste for a small one.
            let step = (space.len / 8).clamp(GROW_MIN, GROW_MAX);
            let roomy = (end + step).min(LAST_SECTOR);
            // A limit on the size of files may refuse the step and still allow what is needed.
            let len = match writer.set_len(roomy * SECTOR) {
                Ok(()) => roomy,
                Err(_) => writer.set_len(end * SECTOR).map(|()| end)?,
            };
            space.len = len;
            // After the file has grown: a thread that compares between the two steps finds the file longer than
            // `known`, never shorter. In the other order it would report a truncation that did not happen.
            self.known.store(len * SECTOR, Ordering::Release);
            // Entries that name the new sectors are valid from here on.
            self.layout.grew_to(len);
        }
        space.next = end;
        Ok(place)
    }

    /// Gives back grains that nothing names, whatever they hold. If they can't be zeroed they are leaked.
    pub(super) fn give_back(&self, place: u64, count: u64) {
        // Zeroed before they are free: `fill` writes no zeroes into new grains. In place, not under the lock.
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

    /// Allocates space for a new table, and for its redundant copy if the extent has one. Called by one flush at a
    /// time: the reserved range is read and written in two critical sections.
    pub(super) fn for_table(&self) -> Result<TableCopies> {
        let sectors = self.layout.table_sectors();
        let copies = if self.layout.has_redundant() { 2 } else { 1 };
        let mut reserved = self.space().tables.clone();
        if reserved.end - reserved.start < sectors * copies {
            // Whole grains, so that grains after the tables stay aligned; several tables share a reservation.
            let grains = (sectors * copies).div_ceil(self.grain);
            let place = self.take(grains.max(2))?;
            reserved = place..place + grains.max(2) * self.grain;
        }
        self.space().tables = reserved.start + sectors * copies..reserved.end;
        let first = reserved.start as u32;
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

    /// Truncates the file after the last allocated grain. The caller excludes all other changes of the file.
    pub(super) fn truncate_unused(&self) -> Result<()> {
        let mut space = self.space();
        let writer = self.check_not_truncated()?;
        if space.len > space.next {
            writer.set_len(space.next * SECTOR)?;
            space.len = space.next;
            // Between these two lines the file is shorter than `known`. The caller's exclusion keeps other threads from
            // checking it then.
            self.known.store(space.len * SECTOR, Ordering::Release);
        }
        Ok(())
    }

    /// Returns the writing half of the file. Sets the write latch if another process truncated the file: its grains are
    /// lost, and growing it again would silently show zeroes in their place.
    ///
    /// Every change calls this, also one in place: a write after the new end extends the file, and one that reaches the
    /// old end would hide the truncation from all later checks.
    pub(super) fn check_not_truncated(&self) -> Result<&dyn StoredWrite> {
        // Loaded before the length of the file is read: this process only makes the file longer, so a length that is
        // read later can't be shorter than `known` for that reason.
        let known = self.known.load(Ordering::Acquire);
        self.latch.check_not_truncated(&*self.file, known)
    }

    fn space(&self) -> MutexGuard<'_, Space> {
        lock(&self.space)
    }
}
