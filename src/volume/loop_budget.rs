//! Budget of event loops: how many may do something else than take requests from the kernel.
//!
//! All but one may, so that the requests of all disks are taken while a loop flushes or polls a network. A session with
//! a single loop may poll too, but only until the kernel's device has a request: it polls both descriptors.

use std::os::fd::{AsFd, OwnedFd};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicUsize, Ordering};

use crate::block::{CompletionPoller, Stay};

/// The event loops of one session.
#[derive(Debug)]
pub(crate) struct LoopBudget {
    single_loop: bool,
    /// Number of loops that may still become busy.
    spare: AtomicUsize,
    /// A duplicate of the FUSE device, readable while a request is queued. Set when the session begins.
    device: OnceLock<OwnedFd>,
}

/// One loop's right to be busy. Returned to the budget on drop.
#[derive(Debug)]
pub(crate) struct Spared<'a>(&'a LoopBudget);

impl LoopBudget {
    /// Creates the budget of a session with `count` event loops.
    pub(crate) fn new(count: usize) -> Self {
        Self {
            single_loop: count == 1,
            spare: AtomicUsize::new(count.saturating_sub(1)),
            device: OnceLock::new(),
        }
    }

    /// Sets the device that requests come from.
    pub(crate) fn set_device(&self, device: OwnedFd) {
        // A second call changes nothing: a session has one device.
        let _ = self.device.set(device);
    }

    /// Polls for completions, for as long as this loop can be spared.
    pub(crate) fn poll_completions(&self, poller: &dyn CompletionPoller) {
        self.stay(|stay| poller.poll_completions(stay));
    }

    /// Calls `work` with the time that this loop may stay in it.
    fn stay(&self, work: impl FnOnce(Stay<'_>)) {
        if self.single_loop {
            // No other loop takes requests, so the poll has to return as soon as the device has one.
            return work(self.device.get().map_or(Stay::No, |device| Stay::Until(device.as_fd())));
        }
        let spared = self.spare();
        work(if spared.is_some() { Stay::Patiently } else { Stay::No });
    }

    /// Takes the right to be busy. `None` if this is the last loop that takes requests.
    pub(crate) fn spare(&self) -> Option<Spared<'_>> {
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
    fn the_last_loop_is_never_spared() {
        let loops = LoopBudget::new(2);
        let first = loops.spare();
        assert!(first.is_some() && loops.spare().is_none());
        drop(first);
        assert!(loops.spare().is_some());
        assert!(LoopBudget::new(1).spare().is_none());
    }

    #[test]
    fn regression_flushing_and_polling_loops_share_one_budget() {
        let loops = LoopBudget::new(2);
        loops.stay(|stay| assert!(matches!(stay, Stay::Patiently)));
        let _flushing = loops.spare();
        loops.stay(|stay| assert!(matches!(stay, Stay::No)));
    }
}
