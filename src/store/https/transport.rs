//! One request and its answer, whatever the protocol: the border between the client's policy and the two ways to send.
//!
//! ```text
//!   Client ─► Transport ─┬─ http1.rs   HTTP/1.1 on sockets of our own: the calling thread writes, reads and decrypts
//!                        └─ library.rs reqwest: HTTP/2, and proxies
//! ```
//! All calls block the calling thread, which is one of the cache's or of the mount's anyway. Handing the request to
//! another thread would cost two context switches, more than the request itself on a near server.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use reqwest::header::HeaderMap;
use reqwest::{StatusCode, Url};

use super::http1::{DirectBody, Http1};
use super::library::{Library, LibraryBody};

/// Longest time for which a thread waits without a look at its deadline.
pub(super) const TICK: Duration = Duration::from_millis(250);
/// Longest time between two pieces of a body.
const STALL: Duration = Duration::from_secs(20);

/// Ways to send requests.
#[derive(Debug)]
pub(super) enum Transport {
    Direct(Http1),
    Library(Library),
}

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

/// Answer of a server, whose body is still to be read.
pub(super) struct Answer {
    pub(super) status: StatusCode,
    pub(super) headers: HeaderMap,
    body: Body,
}

pub(super) enum Body {
    Direct(DirectBody),
    Library(LibraryBody),
}

/// Takes the pieces of a body.
pub(super) type Piece<'a> = &'a mut dyn FnMut(&[u8]);

impl Transport {
    /// Sends a request, and waits for the head of the answer.
    pub(super) fn send(&self, request: &Request<'_>, limits: Limits<'_>) -> Result<Answer, Trouble> {
        match self {
            Self::Direct(http1) => http1.send(request, limits),
            Self::Library(library) => library.send(request, limits),
        }
    }
}

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

impl Answer {
    pub(super) fn new(status: StatusCode, headers: HeaderMap, body: Body) -> Self {
        Self { status, headers, body }
    }

    /// Reads the next piece of the body. Returns false at its end, which the server has marked.
    pub(super) fn read(&mut self, limits: Limits<'_>, piece: Piece<'_>) -> Result<bool, Trouble> {
        limits.check()?;
        let stall = limits.within(STALL);
        let read = match &mut self.body {
            Body::Direct(body) => body.read(stall, piece),
            Body::Library(body) => body.read(stall, piece),
        };
        match read {
            Err(Trouble::TimedOut) if Instant::now() < limits.deadline => Err(Trouble::Stalled(STALL)),
            read => read,
        }
    }
}
