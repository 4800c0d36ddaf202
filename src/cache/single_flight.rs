//! Fetches under way: one for a block, shared by all who want it.
//!
//! ```text
//!   wanted ─► Queued ─claimed by whoever comes first─► Running ─► Done(block or error)
//!                │ a worker, or the reader that needs it now      └─► every waiter gets the same
//! ```
//! A reader never waits for a fetch that nobody has begun: it claims it and does it itself.

use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::Duration;

use crate::error::{Error, ErrorKind, Result};

/// The bytes of a block. A vector behind a counter: bytes that were inflated into one are not copied once more.
pub(crate) type Block = Arc<Vec<u8>>;

/// The longest that a reader waits for somebody else's fetch.
const DEADLINE: Duration = Duration::from_secs(60);

#[derive(Debug)]
enum State {
    Queued,
    Running,
    Done(Result<Block>),
}

/// One fetch.
#[derive(Debug)]
pub(crate) struct Flight {
    state: Mutex<State>,
    done: Condvar,
}

/// The right to do a fetch. Dropped without [`Claim::finish`] (a panic), it tells the waiters so.
#[derive(Debug)]
pub(crate) struct Claim(Option<Arc<Flight>>);

impl Flight {
    pub(crate) fn new() -> Arc<Self> {
        Arc::new(Self {
            state: Mutex::new(State::Queued),
            done: Condvar::new(),
        })
    }

    /// Takes the fetch over, if nobody has begun it.
    pub(crate) fn claim(self: &Arc<Self>) -> Option<Claim> {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        if matches!(*state, State::Queued) {
            *state = State::Running;
            return Some(Claim(Some(Arc::clone(self))));
        }
        None
    }

    /// Waits for the result of a fetch that somebody else has claimed.
    pub(crate) fn wait(&self) -> Result<Block> {
        let state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        let waited = self
            .done
            .wait_timeout_while(state, DEADLINE, |s| !matches!(s, State::Done(_)));
        let (state, _) = waited.unwrap_or_else(PoisonError::into_inner);
        match &*state {
            State::Done(result) => result.clone(),
            _ => Err(Error::new(
                ErrorKind::Os(libc::ETIMEDOUT),
                format!("a block did not arrive within {} seconds", DEADLINE.as_secs()),
            )),
        }
    }

    fn set(&self, result: Result<Block>) {
        *self.state.lock().unwrap_or_else(PoisonError::into_inner) = State::Done(result);
        self.done.notify_all();
    }
}

impl Claim {
    /// Ends the fetch with its result.
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
                "the fetch of a block was given up",
            )));
        }
    }
}
