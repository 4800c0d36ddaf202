//! Transport of a request and its answer, whatever the protocol: the border between the client's policy and the two ways to send.
//!
//! ```text
//!   Client ─► Transport ─┬─ http1.rs   HTTP/1.1 on sockets of our own: the calling thread writes, reads and decrypts
//!                        └─ library.rs reqwest: HTTP/2, and proxies
//! ```
//! All calls block the calling thread, which is one of the cache's or of the mount's anyway. Handing the request to
//! another thread would cost two context switches, more than the request itself on a near server.

use std::time::{Duration, Instant};

use reqwest::StatusCode;
use reqwest::header::HeaderMap;

use super::http1::{DirectBody, Http1};
use super::library::{Library, LibraryBody};
use super::request::{AnswerHead, Limits, Piece, Request, Trouble};

/// Longest time between two pieces of a body.
const STALL: Duration = Duration::from_secs(20);

/// Ways to send requests.
#[derive(Debug)]
pub(super) enum Transport {
    Direct(Http1),
    Library(Library),
}

/// Answer of a server, whose body is still to be read.
pub(super) struct Answer {
    pub(super) status: StatusCode,
    pub(super) headers: HeaderMap,
    body: Body,
}

/// Body of an answer, by the way that it comes.
enum Body {
    Direct(DirectBody),
    Library(LibraryBody),
}

impl Transport {
    /// Sends a request, and waits for the head of the answer.
    pub(super) fn send(&self, request: &Request<'_>, limits: Limits<'_>) -> Result<Answer, Trouble> {
        match self {
            Self::Direct(http1) => {
                let (head, body) = http1.send(request, limits)?;
                Ok(Answer::new(head, Body::Direct(body)))
            }
            Self::Library(library) => {
                let (head, body) = library.send(request, limits)?;
                Ok(Answer::new(head, Body::Library(body)))
            }
        }
    }
}

impl Answer {
    fn new(head: AnswerHead, body: Body) -> Self {
        Self {
            status: head.status,
            headers: head.headers,
            body,
        }
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
