//! Locks on ranges of grains: who allocates has them alone.

use std::ops::Range;
use std::sync::{Condvar, Mutex, PoisonError};

/// Ranges that somebody has.
#[derive(Debug, Default)]
pub(super) struct GrainLocks {
    held: Mutex<Vec<Range<u64>>>,
    freed: Condvar,
}

/// A range that is held until this is dropped.
#[derive(Debug)]
pub(super) struct Held<'a> {
    locks: &'a GrainLocks,
    range: Range<u64>,
}

impl GrainLocks {
    /// Waits until nobody has any of `range`, and takes it. Who holds a range takes no second one, so nobody waits in a
    /// circle, and a wait is as long as the others' I/O.
    pub(super) fn lock(&self, range: Range<u64>) -> Held<'_> {
        let mut held = self.held.lock().unwrap_or_else(PoisonError::into_inner);
        while held.iter().any(|other| other.start < range.end && range.start < other.end) {
            held = self.freed.wait(held).unwrap_or_else(PoisonError::into_inner);
        }
        held.push(range.clone());
        Held { locks: self, range }
    }
}

impl Drop for Held<'_> {
    fn drop(&mut self) {
        let mut held = self.locks.held.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(i) = held.iter().position(|other| *other == self.range) {
            held.swap_remove(i);
        }
        self.locks.freed.notify_all();
    }
}
