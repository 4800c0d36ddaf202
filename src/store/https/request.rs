//! One request, the bounds of its time, and what can happen to it.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use reqwest::header::HeaderMap;
use reqwest::{StatusCode, Url};

/// Longest time for which a thread waits without a look at its deadline.
pub(super) const TICK: Duration = Duration::from_millis(250);
/// Request to a server. The URL's host becomes the `Host` header.
pub(super) struct Request<'a> {
    pub(super) method: reqwest::Method,
    pub(super) url: &'a Url,
    pub(super) headers: HeaderMap,
    pub(super) body: &'a [u8],
}

/// Bounds of the time that a request may take.
#[derive(Debug, Clone, Copy)]
pub(super) struct Limits<'a> {
    pub(super) deadline: Instant,
    /// Becomes true when the file is closed, which ends the request.
    pub(super) closing: &'a AtomicBool,
}

/// Reason why a request got no answer, or a part of it.
#[derive(Debug)]
pub(super) enum Trouble {
    /// The server cannot be reached.
    Unreachable(String),
    /// The connection was cut or sent something that is not HTTP.
    Broken(String),
    /// No byte for that long in the middle of a body.
    Stalled(Duration),
    /// The deadline of the request has passed.
    TimedOut,
    /// The file was closed.
    Closed,
}

/// Head of an answer.
pub(super) struct AnswerHead {
    pub(super) status: StatusCode,
    pub(super) headers: HeaderMap,
}

/// Takes the pieces of a body.
pub(super) type Piece<'a> = &'a mut dyn FnMut(&[u8]);

impl Limits<'_> {
    /// Returns an error once the request must end.
    pub(super) fn check(&self) -> Result<(), Trouble> {
        if self.closing.load(Ordering::Relaxed) {
            return Err(Trouble::Closed);
        }
        match Instant::now() >= self.deadline {
            true => Err(Trouble::TimedOut),
            false => Ok(()),
        }
    }

    /// Returns these limits with an earlier deadline.
    pub(super) fn within(self, time: Duration) -> Self {
        let deadline = self.deadline.min(Instant::now() + time);
        Self { deadline, ..self }
    }
}
