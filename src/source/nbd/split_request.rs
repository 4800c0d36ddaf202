//! Requests that are split into several commands, and waiting for a result.
//!
//! Both types are completed from any thread. Each has one mutex, under which no other lock is acquired and no
//! completion is called.

use std::sync::{Arc, Condvar, Mutex};
use std::time::Instant;

use super::session::Session;
use crate::block::Completion;
use crate::error::{Error, Result};
use crate::mutex::{lock, wait_timeout_while};

/// Single-use channel for the result of a command.
#[derive(Debug)]
pub(super) struct Oneshot<T> {
    value: Mutex<Option<T>>,
    filled: Condvar,
}

impl<T: Send + 'static> Oneshot<T> {
    /// Creates an empty channel.
    pub(super) fn new() -> Arc<Self> {
        Arc::new(Self {
            value: Mutex::new(None),
            filled: Condvar::new(),
        })
    }

    /// Stores the result and wakes the waiting thread.
    pub(super) fn put(&self, value: T) {
        *lock(&self.value) = Some(value);
        self.filled.notify_all();
    }

    fn is_filled(&self) -> bool {
        lock(&self.value).is_some()
    }

    /// Waits for the result until `until`. Returns `None` if there is none by then.
    ///
    /// Polls the sockets of the session meanwhile, unless another thread does.
    pub(super) fn wait(&self, session: &Session, until: Instant) -> Option<T> {
        // Returns without a result if another thread polls, or if the connection was lost and the command is queued.
        // That thread or the manager completes the command, and the condition variable reports it.
        session.poll_until(|| self.is_filled());
        let value = lock(&self.value);
        let remaining = until.saturating_duration_since(Instant::now());
        wait_timeout_while(&self.filled, value, remaining, |v| v.is_none()).take()
    }
}

/// Splits the range from `from` to `to` at the multiples of `piece`.
pub(super) fn pieces(from: u64, to: u64, piece: u64) -> impl Iterator<Item = (u64, u64)> {
    let mut next = from;
    std::iter::from_fn(move || {
        let start = next;
        next = (start / piece + 1).saturating_mul(piece).min(to);
        (start < to).then_some((start, next))
    })
}

/// Request of several commands. Its completion is called after the last of them has ended, with the first error if any
/// of them failed.
pub(super) struct SplitRequest(Mutex<SplitProgress>);

struct SplitProgress {
    remaining: usize,
    failed: Option<Error>,
    done: Option<Completion>,
}

impl SplitRequest {
    /// Creates a request of `parts` commands.
    pub(super) fn new(parts: usize, done: Completion) -> Arc<Self> {
        Arc::new(Self(Mutex::new(SplitProgress {
            remaining: parts,
            failed: None,
            done: Some(done),
        })))
    }

    /// Reports that one of the commands has ended.
    pub(super) fn done(&self, result: Result<()>) {
        let mut progress = lock(&self.0);
        progress.remaining = progress.remaining.saturating_sub(1);
        if let Err(e) = result {
            progress.failed.get_or_insert(e);
        }
        if progress.remaining > 0 {
            return;
        }
        // Outside of the lock: the completion is the caller's code, and may submit the next request.
        let (done, failed) = (progress.done.take(), progress.failed.take());
        drop(progress);
        if let Some(done) = done {
            done(failed.map_or(Ok(()), Err));
        }
    }
}
