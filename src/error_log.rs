//! Log of failed requests, limited in rate.
//!
//! While a mount starts, the first failure is kept as the cause of a failed start and nothing is logged: the user gets
//! one error. Afterwards failures are logged, but a copy of a damaged disk fails thousands of times, so each window of
//! time has a limit.

use std::sync::Mutex;
use std::time::{Duration, Instant};

use crate::error::Error;
use crate::mutex::lock;

/// Number of failures that are logged per [`WINDOW`].
const MAX_PER_WINDOW: u64 = 20;
/// Length of a window. It starts with the first failure after the previous one has ended.
const WINDOW: Duration = Duration::from_secs(60);

/// The failed requests of a mount.
#[derive(Debug, Default)]
pub struct ErrorLog(Mutex<LogState>);

#[derive(Debug, Default)]
struct LogState {
    started: bool,
    first: Option<Error>,
    window: Option<Instant>,
    in_window: u64,
}

impl ErrorLog {
    /// Records a failed request: keeps it while the mount starts, logs it afterwards.
    pub fn note(&self, error: Error) {
        let mut state = lock(&self.0);
        if !state.started {
            state.first.get_or_insert(error);
            return;
        }
        let now = Instant::now();
        if state.window.is_none_or(|began| now.duration_since(began) >= WINDOW) {
            // There is no timer: the failure that opens a window reports what the last one suppressed.
            if state.in_window > MAX_PER_WINDOW {
                tracing::error!("{} more errors were not logged", state.in_window - MAX_PER_WINDOW);
            }
            state.window = Some(now);
            state.in_window = 0;
        }
        state.in_window += 1;
        if state.in_window <= MAX_PER_WINDOW {
            tracing::error!("{error}");
        } else if state.in_window == MAX_PER_WINDOW + 1 {
            tracing::error!("further errors are not logged for a minute");
        }
    }

    /// Returns the first failure while the mount started.
    pub fn cause(&self) -> Option<Error> {
        lock(&self.0).first.clone()
    }

    /// Ends the start of the mount: from now on failures are logged.
    pub fn started(&self) {
        lock(&self.0).started = true;
    }
}
