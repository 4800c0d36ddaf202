//! Writes through a cache: each one ends with the blocks that it touched updated or dropped.
//!
//! ```text
//!   begin ─► overlaps a write in flight? ─ yes ─► both are contended
//!     │
//!   the disk is written                             a fetch of the block may bring the old or the new bytes
//!     │
//!   end ─┬─ succeeded, not contended ─► cached blocks: updated ─┐
//!        └─ failed, or contended ─────► cached blocks: dropped ─┴─► fetches in flight are detached: not cached
//! ```
//! The order in which the disk executes two overlapping writes is not known here, so the blocks of both are dropped. A
//! fetch that has begun before the end of a write may have read the old bytes: its readers began before the end too, and
//! get them, but no later reader does.
//!
//! Lock order: `in_flight` is held while the blocks are updated or dropped, which acquires `flights` of `file_blocks.rs`.

use std::ops::Range;
use std::sync::{Mutex, MutexGuard};

use super::file_blocks::FileBlocks;
use crate::mutex::lock;

/// Number of blocks above which a write drops all blocks of the disk: more of them than that are hardly cached.
const MAX_DROPPED: u64 = 1 << 16;

/// Writes in flight through a cache.
#[derive(Debug, Default)]
pub(super) struct CacheWrites {
    in_flight: Mutex<WritesInFlight>,
}

#[derive(Debug, Default)]
struct WritesInFlight {
    next: u64,
    writes: Vec<WriteInFlight>,
}

#[derive(Debug)]
struct WriteInFlight {
    number: u64,
    /// Numbers of the blocks that it touches.
    blocks: Range<u64>,
    /// True if another write of one of these blocks was in flight at the same time.
    contended: bool,
}

/// A write in flight. Dropped without [`succeeded`](Self::succeeded) it drops the blocks that it touched.
#[derive(Debug)]
pub(super) struct CacheWrite<'a> {
    writes: &'a CacheWrites,
    cache: &'a FileBlocks,
    number: u64,
    blocks: Range<u64>,
}

impl CacheWrites {
    /// Begins a write of `bytes`. Must be called before the disk is written.
    pub(super) fn begin<'a>(&'a self, cache: &'a FileBlocks, bytes: Range<u64>) -> CacheWrite<'a> {
        let blocks = cache.blocks_of(&bytes);
        let mut in_flight = self.in_flight();
        let number = in_flight.next;
        in_flight.next += 1;
        let mut contended = false;
        for other in &mut in_flight.writes {
            if other.blocks.start < blocks.end && blocks.start < other.blocks.end {
                other.contended = true;
                contended = true;
            }
        }
        in_flight.writes.push(WriteInFlight {
            number,
            blocks: blocks.clone(),
            contended,
        });
        drop(in_flight);
        CacheWrite {
            writes: self,
            cache,
            number,
            blocks,
        }
    }

    fn in_flight(&self) -> MutexGuard<'_, WritesInFlight> {
        lock(&self.in_flight)
    }
}

impl CacheWrite<'_> {
    /// Ends a write that has succeeded: `data` is on the disk from byte `offset` on.
    pub(super) fn succeeded(self, offset: u64, data: &[u8]) {
        // Copied without a lock: a block that changes meanwhile is dropped below.
        let patched = self.cache.patched(offset, data);
        let mut in_flight = self.writes.in_flight();
        let mut own = in_flight.writes.iter().filter(|write| write.number == self.number);
        if own.any(|write| !write.contended) {
            // Under the lock: a write that begins from here on finds the blocks updated.
            self.cache.update(self.blocks.clone(), patched);
            in_flight.remove(self.number);
        }
    }
}

impl Drop for CacheWrite<'_> {
    fn drop(&mut self) {
        let mut in_flight = self.writes.in_flight();
        if !in_flight.remove(self.number) {
            return;
        }
        if self.blocks.end - self.blocks.start > MAX_DROPPED {
            self.cache.forget();
        } else {
            self.cache.update(self.blocks.clone(), Vec::new());
        }
    }
}

impl WritesInFlight {
    /// Removes a write. Returns false if it had been removed.
    fn remove(&mut self, number: u64) -> bool {
        let at = self.writes.iter().position(|write| write.number == number);
        at.map(|at| self.writes.swap_remove(at)).is_some()
    }
}

#[cfg(test)]
mod tests;
