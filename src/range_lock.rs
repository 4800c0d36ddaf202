//! Who is changing what: locks on ranges of numbers.
//!
//! Used for the granules of a disk, so that a read-modify-write keeps every other write to the same granules away, and
//! for the grains of a sparse extent, so that each is allocated once.
//!
//! ```text
//!   shared   beside others that are shared: whole granules, as the kernel may send them at once
//!   alone    a granule whose other bytes are read and written back; a grain that gets its room
//! ```
//! A list under a mutex, in the order of arrival: there are never more writes under way than threads that serve.
//! Each waits for those before it that it overlaps and does not go with, so nobody is overtaken for ever; and as each
//! asks for one range of one list, once, nobody waits in a circle. Granules are taken before grains. Whoever holds a
//! range ends when its I/O ends, and that has a deadline of its own.

use std::ops::Range;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};

/// How a range is used.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Mode {
    /// Beside others that do the same.
    Shared,
    /// By nobody else.
    Exclusive,
}

/// The ranges that are being written.
#[derive(Debug, Default)]
pub(crate) struct RangeLock {
    list: Mutex<Queue>,
    ended: Condvar,
}

#[derive(Debug, Default)]
struct Queue {
    /// Number of the next who comes.
    next: u64,
    /// How many wait.
    waiting: usize,
    /// Held or waited for, in the order of arrival.
    entries: Vec<Entry>,
}

#[derive(Debug)]
struct Entry {
    number: u64,
    range: Range<u64>,
    mode: Mode,
}

/// The use of a range, until it is dropped.
#[derive(Debug)]
#[must_use]
pub(crate) struct RangeGuard<'a> {
    ranges: &'a RangeLock,
    number: u64,
}

impl RangeLock {
    /// Waits for those before that `range`, which is not empty, does not go with.
    pub(crate) fn lock(&self, range: Range<u64>, mode: Mode) -> RangeGuard<'_> {
        let mut list = self.list();
        let number = list.next;
        list.next += 1;
        let wait = list.is_in_the_way(number, &range, mode);
        list.entries.push(Entry {
            number,
            range: range.clone(),
            mode,
        });
        // from here on it is on the list, whatever happens
        let held = RangeGuard { ranges: self, number };
        if wait {
            list.waiting += 1;
            let waits = |list: &mut Queue| list.is_in_the_way(number, &range, mode);
            list = self
                .ended
                .wait_while(list, waits)
                .unwrap_or_else(PoisonError::into_inner);
            list.waiting -= 1;
        }
        drop(list);
        held
    }

    /// The same without waiting: a number to be given back by [`Self::unlock`]; `None`: somebody is in the way.
    pub(super) fn try_lock(&self, range: Range<u64>, mode: Mode) -> Option<u64> {
        let mut list = self.list();
        let number = list.next;
        if list.is_in_the_way(number, &range, mode) {
            return None;
        }
        list.next += 1;
        list.entries.push(Entry { number, range, mode });
        Some(number)
    }

    /// Ends the use of a range.
    pub(super) fn unlock(&self, number: u64) {
        let mut list = self.list();
        list.entries.retain(|e| e.number != number);
        let waiting = list.waiting;
        drop(list);
        if waiting > 0 {
            self.ended.notify_all();
        }
    }

    /// How many wait.
    #[cfg(test)]
    pub(crate) fn waiting(&self) -> usize {
        self.list().waiting
    }

    fn list(&self) -> MutexGuard<'_, Queue> {
        // nothing is left half done under it
        self.list.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Queue {
    /// Whether somebody who came before `number` keeps it from `range`.
    fn is_in_the_way(&self, number: u64, range: &Range<u64>, mode: Mode) -> bool {
        let before = self.entries.iter().take_while(|e| e.number < number);
        before
            .filter(|e| e.mode == Mode::Exclusive || mode == Mode::Exclusive)
            .any(|e| e.range.start < range.end && range.start < e.range.end)
    }
}

impl Drop for RangeGuard<'_> {
    fn drop(&mut self) {
        self.ranges.unlock(self.number);
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc::{RecvTimeoutError, channel};
    use std::thread;
    use std::time::Duration;

    use super::*;

    /// What goes together, and what does not, for a second who comes while `0..10` is held.
    #[test]
    fn only_what_overlaps_and_is_alone_waits() {
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
                ranges.list().is_in_the_way(number, &range, second),
                waits,
                "{first:?} {second:?} {range:?}"
            );
            drop(held);
            assert!(ranges.list().entries.is_empty());
        }
    }

    #[test]
    fn who_waits_goes_on_when_the_range_is_free_and_keeps_those_behind_waiting() {
        let ranges = RangeLock::default();
        let (say, heard) = channel();
        thread::scope(|scope| {
            let first = ranges.lock(0..1, Mode::Shared);
            let (ranges, alone) = (&ranges, say.clone());
            scope.spawn(move || {
                let _held = ranges.lock(0..1, Mode::Exclusive);
                alone.send("alone").unwrap();
            });
            while ranges.list().waiting < 1 {
                thread::yield_now();
            }
            // goes with the first, but came after one that does not
            scope.spawn(move || {
                let _held = ranges.lock(0..1, Mode::Shared);
                say.send("shared").unwrap();
            });
            while ranges.list().waiting < 2 {
                thread::yield_now();
            }
            assert_eq!(heard.recv_timeout(Duration::ZERO), Err(RecvTimeoutError::Timeout));
            drop(first);
            assert_eq!((heard.recv(), heard.recv()), (Ok("alone"), Ok("shared")));
        });
        assert!(ranges.list().entries.is_empty());
    }

    #[test]
    fn a_panic_gives_the_range_back() {
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
