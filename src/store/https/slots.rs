//! Number of requests in flight to a server.

use std::sync::{Condvar, Mutex, MutexGuard};

use super::request::{Limits, TICK, Trouble};
use crate::mutex::{lock, wait_timeout};

/// Answers after which a limit that the server lowered is raised by one.
const RAISE_AFTER: usize = 64;

/// Requests in flight: as many as there are connections, fewer where the server says that it has too many.
#[derive(Debug)]
pub(super) struct Slots {
    /// Number of connections.
    pub(super) most: usize,
    state: Mutex<SlotState>,
    /// Notified when a slot becomes free.
    freed: Condvar,
}

#[derive(Debug)]
struct SlotState {
    used: usize,
    /// Present limit, at least 1.
    limit: usize,
    /// Answers since the limit was lowered or raised.
    answers: usize,
}

/// Right to have one request in flight. Dropping it frees the slot.
#[derive(Debug)]
pub(super) struct Slot<'s>(&'s Slots);

impl Slots {
    pub(super) fn new(most: usize) -> Self {
        let most = most.max(1);
        let state = SlotState {
            used: 0,
            limit: most,
            answers: 0,
        };
        Self {
            most,
            state: Mutex::new(state),
            freed: Condvar::new(),
        }
    }

    /// Waits for a free slot.
    pub(super) fn acquire(&self, limits: Limits<'_>) -> Result<Slot<'_>, Trouble> {
        let mut state = self.state();
        while state.used >= state.limit {
            limits.check()?;
            state = wait_timeout(&self.freed, state, TICK).0;
        }
        state.used += 1;
        Ok(Slot(self))
    }

    /// Lowers the limit: the server has refused a request as one too many.
    pub(super) fn lower(&self) {
        let mut state = self.state();
        state.answers = 0;
        state.limit = (state.limit - 1).max(1);
    }

    pub(super) fn succeeded(&self) {
        let mut state = self.state();
        state.answers += 1;
        if state.limit < self.most && state.answers >= RAISE_AFTER {
            state.limit += 1;
            state.answers = 0;
            self.freed.notify_one();
        }
    }

    fn state(&self) -> MutexGuard<'_, SlotState> {
        lock(&self.state)
    }
}

impl Drop for Slot<'_> {
    fn drop(&mut self) {
        self.0.state().used -= 1;
        self.0.freed.notify_one();
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::AtomicBool;
    use std::time::Instant;

    use super::*;

    #[test]
    fn a_limit_that_the_server_lowered_rises_again_and_never_falls_below_one() {
        let (slots, closing) = (Slots::new(2), AtomicBool::new(false));
        let now = Limits {
            deadline: Instant::now(),
            closing: &closing,
        };
        (0..3).for_each(|_| slots.lower());
        let first = slots.acquire(now).unwrap();
        assert!(matches!(slots.acquire(now), Err(Trouble::TimedOut)));
        (0..2 * RAISE_AFTER).for_each(|_| slots.succeeded());
        drop((first, slots.acquire(now).unwrap()));
        let both = (slots.acquire(now).unwrap(), slots.acquire(now).unwrap());
        assert!(slots.acquire(now).is_err());
        drop(both);
    }
}
