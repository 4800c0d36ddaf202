//! What became of requests that failed: told once, and not told a thousand times.
//!
//! While a mount starts, the first failure is kept as the cause of a start that fails, and nothing is logged: there
//! is to be one error. Afterwards failures are logged, but of a damaged disk that somebody copies whole only so
//! many in a while.

use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use crate::error::Error;

/// Failures that are logged in each [`WINDOW`].
const MOST: u64 = 20;
const WINDOW: Duration = Duration::from_secs(60);

/// The failures of a mount.
#[derive(Debug, Default)]
pub struct ErrorLog(Mutex<Repeats>);

#[derive(Debug, Default)]
struct Repeats {
    started: bool,
    first: Option<Error>,
    window: Option<Instant>,
    in_window: u64,
}

impl ErrorLog {
    /// Notes a request that failed.
    pub fn note(&self, error: Error) {
        let mut state = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if !state.started {
            state.first.get_or_insert(error);
            return;
        }
        let now = Instant::now();
        if state.window.is_none_or(|began| now.duration_since(began) >= WINDOW) {
            if state.in_window > MOST {
                tracing::error!("{} more errors were not logged", state.in_window - MOST);
            }
            state.window = Some(now);
            state.in_window = 0;
        }
        state.in_window += 1;
        if state.in_window <= MOST {
            tracing::error!("{error}");
        } else if state.in_window == MOST + 1 {
            tracing::error!("further errors are not logged for a minute");
        }
    }

    /// What failed while the mount started.
    pub fn cause(&self) -> Option<Error> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).first.clone()
    }

    /// From now on failures are logged.
    pub fn started(&self) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).started = true;
    }
}
