//! Requests of several commands, and waiting for their end.

use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::Instant;

use super::session::Session;
use crate::block::Completion;
use crate::error::{Error, Result};

/// A place where a result is waited for.
#[derive(Debug)]
pub(super) struct Oneshot<T> {
    value: Mutex<Option<T>>,
    there: Condvar,
}

impl<T: Send + 'static> Oneshot<T> {
    /// With nothing in it.
    pub(super) fn new() -> Arc<Self> {
        Arc::new(Self {
            value: Mutex::new(None),
            there: Condvar::new(),
        })
    }

    /// Puts it there.
    pub(super) fn put(&self, value: T) {
        *self.value.lock().unwrap_or_else(PoisonError::into_inner) = Some(value);
        self.there.notify_all();
    }

    fn is_there(&self) -> bool {
        self.value.lock().unwrap_or_else(PoisonError::into_inner).is_some()
    }

    /// Waits for it, serving the connections meanwhile, if nobody else does. `None`: it did not come in time.
    pub(super) fn wait(&self, session: &Session, until: Instant) -> Option<T> {
        session.attend_until(|| self.is_there());
        let value = self.value.lock().unwrap_or_else(PoisonError::into_inner);
        let left = until.saturating_duration_since(Instant::now());
        let waited = self.there.wait_timeout_while(value, left, |v| v.is_none());
        waited.unwrap_or_else(PoisonError::into_inner).0.take()
    }
}

/// Splits a range at the multiples of `piece`.
pub(super) fn pieces(from: u64, to: u64, piece: u64) -> impl Iterator<Item = (u64, u64)> {
    let mut at = from;
    std::iter::from_fn(move || {
        let start = at;
        at = (start / piece + 1).saturating_mul(piece).min(to);
        (start < to).then_some((start, at))
    })
}

/// A request of several commands: its result is that of the last one, or the first failure.
pub(super) struct SplitRequest(Mutex<Counted>);

struct Counted {
    left: usize,
    failed: Option<Error>,
    done: Option<Completion>,
}

impl SplitRequest {
    /// Of so many.
    pub(super) fn new(parts: usize, done: Completion) -> Arc<Self> {
        Arc::new(Self(Mutex::new(Counted {
            left: parts,
            failed: None,
            done: Some(done),
        })))
    }

    /// One of them has ended.
    pub(super) fn done(&self, result: Result<()>) {
        let mut counted = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        counted.left = counted.left.saturating_sub(1);
        if let Err(e) = result {
            counted.failed.get_or_insert(e);
        }
        if counted.left > 0 {
            return;
        }
        let (done, failed) = (counted.done.take(), counted.failed.take());
        drop(counted);
        if let Some(done) = done {
            done(failed.map_or(Ok(()), Err));
        }
    }
}
