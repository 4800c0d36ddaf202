//! Single-flight: one fetch for a block, shared by all threads that want it.
//!
//! ```text
//!   created ─► Queued ── claimed by a worker or a reader ──► Running ──► Done(block or error)
//!                        (the first that claims it)                        └─► every waiter gets the result
//! ```
//! A reader never waits for a fetch that no thread has started: it claims the flight and fetches the block itself. The
//! claim ends the flight also if the fetch panics, so a waiter always gets a result.

use std::sync::{Arc, Condvar, Mutex};
use std::time::Instant;

use super::Block;
use crate::error::{Error, ErrorKind, Result};
use crate::mutex::{lock, wait_timeout_while};

#[derive(Debug)]
enum FlightState {
    Queued,
    Running,
    Done(Result<Block>),
}

/// One fetch of a block.
#[derive(Debug)]
pub(crate) struct Flight {
    state: Mutex<FlightState>,
    /// Notified when the state becomes `Done`.
    done: Condvar,
}

/// Right and duty to do a fetch. If it is dropped without [`Claim::finish`] (a panic), the flight fails.
#[derive(Debug)]
pub(crate) struct Claim(Option<Arc<Flight>>);

impl Flight {
    pub(crate) fn new() -> Arc<Self> {
        // Created unclaimed: a queued block belongs to the first thread that gets to it.
        Arc::new(Self {
            state: Mutex::new(FlightState::Queued),
            done: Condvar::new(),
        })
    }

    /// Claims the fetch for the calling thread. Returns `None` if another thread has claimed it.
    pub(crate) fn claim(self: &Arc<Self>) -> Option<Claim> {
        let mut state = lock(&self.state);
        if matches!(*state, FlightState::Queued) {
            *state = FlightState::Running;
            return Some(Claim(Some(Arc::clone(self))));
        }
        None
    }

    /// Waits until `deadline` for the result of a fetch that another thread has claimed. Errors: that of the fetch, or
    /// `ETIMEDOUT`.
    pub(crate) fn wait(&self, deadline: Instant) -> Result<Block> {
        let left = deadline.saturating_duration_since(Instant::now());
        let state = wait_timeout_while(&self.done, lock(&self.state), left, |s| {
            !matches!(s, FlightState::Done(_))
        });
        match &*state {
            FlightState::Done(result) => result.clone(),
            _ => Err(Error::new(
                ErrorKind::Os(libc::ETIMEDOUT),
                "another thread did not fetch the block in time",
            )),
        }
    }

    /// Returns true while a thread fetches the block.
    pub(crate) fn is_running(&self) -> bool {
        matches!(*lock(&self.state), FlightState::Running)
    }

    fn set(&self, result: Result<Block>) {
        *lock(&self.state) = FlightState::Done(result);
        self.done.notify_all();
    }
}

impl Claim {
    /// Returns true if this is the claim of that flight.
    pub(crate) fn is_of(&self, flight: &Arc<Flight>) -> bool {
        self.0.as_ref().is_some_and(|own| Arc::ptr_eq(own, flight))
    }

    /// Ends the flight with the result of the fetch, and wakes the waiters.
    pub(crate) fn finish(mut self, result: Result<Block>) {
        if let Some(flight) = self.0.take() {
            flight.set(result);
        }
    }
}

impl Drop for Claim {
    fn drop(&mut self) {
        if let Some(flight) = self.0.take() {
            flight.set(Err(Error::new(
                ErrorKind::Os(libc::EIO),
                "the fetch of the block panicked",
            )));
        }
    }
}
