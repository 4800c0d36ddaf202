//! Which event loops may do something else than take requests: all but one. Where there is one only, it may serve a network's
//! answers until a request comes.

use std::os::fd::{AsFd, OwnedFd};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicUsize, Ordering};

use crate::block::{BlockQueue, Stay};

/// The event loops of a session.
#[derive(Debug)]
pub(super) struct LoopBudget {
    alone: bool,
    /// How many more may be busy.
    spare: AtomicUsize,
    /// Readable when there is a request, from the beginning of the session on.
    device: OnceLock<OwnedFd>,
}

/// A loop that is busy, until it is dropped.
#[derive(Debug)]
pub(super) struct Spared<'a>(&'a LoopBudget);

impl LoopBudget {
    /// So many.
    pub(super) fn new(count: usize) -> Self {
        Self {
            alone: count == 1,
            spare: AtomicUsize::new(count.saturating_sub(1)),
            device: OnceLock::new(),
        }
    }

    /// Told where requests come from.
    pub(super) fn begin(&self, device: OwnedFd) {
        // the first one holds
        let _ = self.device.set(device);
    }

    /// Has the answers of a network read.
    pub(super) fn poll_completions(&self, queue: &dyn BlockQueue) {
        self.stay(|stay| queue.poll_completions(stay));
    }

    /// Does something in this loop that is told for how long.
    fn stay(&self, work: impl FnOnce(Stay<'_>)) {
        if self.alone {
            return work(self.device.get().map_or(Stay::No, |device| Stay::Until(device.as_fd())));
        }
        let spared = self.spare();
        work(if spared.is_some() { Stay::Patiently } else { Stay::No });
    }

    /// The right to be busy, if a loop can be spared.
    pub(super) fn spare(&self) -> Option<Spared<'_>> {
        let taken = self
            .spare
            .fetch_update(Ordering::AcqRel, Ordering::Acquire, |n| n.checked_sub(1));
        taken.is_ok().then(|| Spared(self))
    }
}

impl Drop for Spared<'_> {
    fn drop(&mut self) {
        self.0.spare.fetch_add(1, Ordering::AcqRel);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_loop_is_never_spared() {
        let loops = LoopBudget::new(2);
        let first = loops.spare();
        assert!(first.is_some() && loops.spare().is_none());
        drop(first);
        assert!(loops.spare().is_some());
        assert!(LoopBudget::new(1).spare().is_none());
    }

    #[test]
    fn regression_a_loop_that_flushes_and_one_that_waits_are_counted_together() {
        let loops = LoopBudget::new(2);
        loops.stay(|stay| assert!(matches!(stay, Stay::Patiently)));
        let _flushing = loops.spare();
        loops.stay(|stay| assert!(matches!(stay, Stay::No)));
    }
}
