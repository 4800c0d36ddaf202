//! Range locks over numbers.
//!
//! Used for the granules of a disk, so that a read-modify-write excludes every other write to the same granules, and
//! for the grains of a sparse extent, so that each is allocated once.
//!
//! ```text
//!   shared      writes of whole granules, several of which the kernel may send at once
//!   exclusive   a granule whose other bytes are read and written back; a grain that is allocated
//! ```
//! The locks are a list under a mutex, in order of arrival. It is short: there are never more entries than writes in
//! flight. Each request waits for the earlier ones that overlap it, unless both are shared, so it is never overtaken
//! and cannot starve.
//!
//! Deadlocks: a caller locks one range of one list at a time, so waits cannot form a cycle. Lock order between lists:
//! granules before grains. A lock is released when its I/O ends, which has a deadline of its own.

use std::ops::Range;
use std::sync::{Condvar, Mutex, MutexGuard};

use crate::mutex::{lock, wait_while};

/// Mode of a lock.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Mode {
    /// Excludes exclusive locks only.
    Shared,
    /// Excludes every other lock.
    Exclusive,
}

/// List of range locks, held and waited for.
#[derive(Debug, Default)]
pub(crate) struct RangeLock {
    list: Mutex<LockList>,
    released: Condvar,
}

#[derive(Debug, Default)]
struct LockList {
    /// Number of the next request.
    next: u64,
    /// Number of threads that wait.
    waiting: usize,
    /// Locks held or waited for, in order of arrival.
    entries: Vec<LockEntry>,
}

#[derive(Debug)]
struct LockEntry {
    number: u64,
    range: Range<u64>,
    mode: Mode,
}

/// A held lock, released on drop.
#[derive(Debug)]
#[must_use]
pub(crate) struct RangeGuard<'a> {
    lock: &'a RangeLock,
    number: u64,
}

impl RangeLock {
    /// Locks `range`, which must not be empty. Waits for the earlier locks that conflict with it.
    pub(crate) fn lock(&self, range: Range<u64>, mode: Mode) -> RangeGuard<'_> {
        let mut list = self.list();
        let number = list.next;
        list.next += 1;
        // Decided and noted under one lock of the list, so that no later request can come between.
        let must_wait = list.conflicts(number, &range, mode);
        list.entries.push(LockEntry {
            number,
            range: range.clone(),
            mode,
        });
        // From here on the guard removes the entry, even if the wait below panics.
        let guard = RangeGuard { lock: self, number };
        if must_wait {
            list.waiting += 1;
            let waits = |list: &mut LockList| list.conflicts(number, &range, mode);
            list = wait_while(&self.released, list, waits);
            list.waiting -= 1;
        }
        drop(list);
        guard
    }

    /// Locks `range` without waiting. Returns the number for [`Self::unlock`], or `None` if an earlier lock conflicts.
    pub(super) fn try_lock(&self, range: Range<u64>, mode: Mode) -> Option<u64> {
        let mut list = self.list();
        let number = list.next;
        if list.conflicts(number, &range, mode) {
            return None;
        }
        list.next += 1;
        list.entries.push(LockEntry { number, range, mode });
        Some(number)
    }

    /// Releases the lock with this number.
    pub(super) fn unlock(&self, number: u64) {
        let mut list = self.list();
        list.entries.retain(|e| e.number != number);
        let waiting = list.waiting;
        drop(list);
        // A wake-up without waiting threads would cost a system call for each write.
        if waiting > 0 {
            self.released.notify_all();
        }
    }

    /// Returns the number of waiting threads.
    #[cfg(test)]
    pub(crate) fn waiting(&self) -> usize {
        self.list().waiting
    }

    fn list(&self) -> MutexGuard<'_, LockList> {
        // A panic cannot leave the list half changed, so poisoning means nothing.
        lock(&self.list)
    }
}

impl LockList {
    /// Returns true if a lock that arrived before `number` conflicts with `range` in `mode`.
    fn conflicts(&self, number: u64, range: &Range<u64>, mode: Mode) -> bool {
        let before = self.entries.iter().take_while(|e| e.number < number);
        before
            .filter(|e| e.mode == Mode::Exclusive || mode == Mode::Exclusive)
            .any(|e| e.range.start < range.end && range.start < e.range.end)
    }
}

impl Drop for RangeGuard<'_> {
    fn drop(&mut self) {
        self.lock.unlock(self.number);
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc::{RecvTimeoutError, channel};
    use std::thread;
    use std::time::Duration;

    use super::*;

    /// Conflicts of a second request while `0..10` is locked.
    #[test]
    fn only_overlapping_ranges_with_an_exclusive_lock_conflict() {
        let ranges = RangeLock::default();
        for (first, second, range, waits) in [
            (Mode::Shared, Mode::Shared, 0..10, false),
            (Mode::Shared, Mode::Exclusive, 9..12, true),
            (Mode::Exclusive, Mode::Shared, 9..12, true),
            (Mode::Exclusive, Mode::Exclusive, 4..5, true),
            (Mode::Exclusive, Mode::Exclusive, 10..11, false),
            (Mode::Shared, Mode::Exclusive, 10..11, false),
        ] {
            let held = ranges.lock(0..10, first);
            let number = ranges.list().next;
            assert_eq!(
                ranges.list().conflicts(number, &range, second),
                waits,
                "{first:?} {second:?} {range:?}"
            );
            drop(held);
            assert!(ranges.list().entries.is_empty());
        }
    }

    #[test]
    fn a_waiting_lock_is_granted_on_release_and_keeps_later_ones_waiting() {
        let ranges = RangeLock::default();
        let (acquired, order) = channel();
        thread::scope(|scope| {
            let first = ranges.lock(0..1, Mode::Shared);
            let (ranges, exclusive) = (&ranges, acquired.clone());
            scope.spawn(move || {
                let _held = ranges.lock(0..1, Mode::Exclusive);
                exclusive.send("exclusive").unwrap();
            });
            while ranges.list().waiting < 1 {
                thread::yield_now();
            }
            // Compatible with the first lock, but it arrived after one that is not.
            scope.spawn(move || {
                let _held = ranges.lock(0..1, Mode::Shared);
                acquired.send("shared").unwrap();
            });
            while ranges.list().waiting < 2 {
                thread::yield_now();
            }
            assert_eq!(order.recv_timeout(Duration::ZERO), Err(RecvTimeoutError::Timeout));
            drop(first);
            assert_eq!((order.recv(), order.recv()), (Ok("exclusive"), Ok("shared")));
        });
        assert!(ranges.list().entries.is_empty());
    }

    #[test]
    fn a_panic_releases_the_lock() {
        let ranges = RangeLock::default();
        let panics = thread::scope(|scope| {
            let panics = || {
                let _held = ranges.lock(0..1, Mode::Exclusive);
                std::panic::resume_unwind(Box::new(()));
            };
            scope.spawn(panics).join().is_err()
        });
        assert!(panics);
        drop(ranges.lock(0..1, Mode::Exclusive));
    }
}
