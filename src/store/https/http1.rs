//! HTTP/1.1 on connections of our own.
//!
//! ```text
//!   send ─► idle connection, or a new one ─► head of the answer ─► body ─► the connection is idle again
//!             ├─ idle for too long: closed unused
//!             └─ closed by the server meanwhile: the next one, at once
//! ```
//! A connection whose other end has vanished without a word (a firewall that forgot it, a server that was restarted) shows
//! nothing of it: a request on it waits in vain. So an idle connection is used for [`MAX_IDLE`] only, and the kernel ends one
//! on which nothing is confirmed any more (`wire.rs`).
//!
//! The thread that asks does everything itself. A connection whose answer was not read to its end is closed, as what is
//! left of the answer would be taken for the next one.
//!
//! Bounds: those of `message.rs` for heads and the lines of chunked bodies. Bodies are bounded by their readers.

use std::fmt;
use std::net::IpAddr;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use rustls::ClientConfig;

use super::message::{Framing, Head, MAX_HEAD, framing_of, head_end, head_of, parse_head};
use super::request::{AnswerHead, Limits, Piece, Request, Trouble};
use super::wire::{Endpoint, Wire};
use crate::mutex::lock;

/// Most interim answers (status 1xx) before the answer.
const MAX_INTERIM: usize = 8;
/// Time after which an idle connection is tested before it is used.
const FRESH: Duration = Duration::from_millis(500);
/// Time after which an idle connection is not used any more. A new one costs two or three round trips, one that is dead
/// without a sign costs the time until that shows.
pub(super) const MAX_IDLE: Duration = Duration::from_secs(10);

/// Connections to servers.
pub(super) struct Http1 {
    tls: Arc<ClientConfig>,
    resolve: Vec<(String, IpAddr)>,
    /// Longest time to connect.
    connect: Duration,
    user_agent: &'static str,
    idle: Arc<IdlePool>,
}

/// Connections without a request.
struct IdlePool {
    most: usize,
    /// The last one used is the last of the list, and used next.
    wires: Mutex<Vec<(Endpoint, Instant, Wire)>>,
}

impl fmt::Debug for Http1 {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Http1").finish_non_exhaustive()
    }
}

impl Http1 {
    /// Creates the connections to servers, of which at most `most` are kept.
    pub(super) fn new(
        tls: ClientConfig,
        resolve: Vec<(String, IpAddr)>,
        connect: Duration,
        most: usize,
        user_agent: &'static str,
    ) -> Self {
        let wires = Mutex::default();
        Self {
            tls: Arc::new(tls),
            resolve,
            connect,
            user_agent,
            idle: Arc::new(IdlePool { most, wires }),
        }
    }

    /// Sends a request, and waits for the head of the answer.
    pub(super) fn send(&self, request: &Request<'_>, limits: Limits<'_>) -> Result<(AnswerHead, DirectBody), Trouble> {
        let endpoint = Endpoint::of(request.url);
        let head = head_of(request, self.user_agent);
        // A server may close an idle connection at the same moment. Each failure takes one connection out of the pool.
        while let Some(wire) = self.idle.take(&endpoint) {
            match self.exchange(wire, &endpoint, &head, request, limits) {
                Err((Trouble::Broken(text), true)) => tracing::trace!("idle connection: {text}"),
                Err((trouble, _)) => return Err(trouble),
                Ok(answer) => return Ok(answer),
            }
        }
        // The connection has a limit of its own, below the request's deadline: with a host that drops packets, time for a second
        // address is left.
        let wire = Wire::connect(&endpoint, &self.resolve, &self.tls, limits.within(self.connect));
        let wire = wire.map_err(|trouble| match trouble {
            Trouble::TimedOut if Instant::now() < limits.deadline => {
                Trouble::Unreachable(format!("no connection within {} s", self.connect.as_secs()))
            }
            other => other,
        })?;
        let answer = self.exchange(wire, &endpoint, &head, request, limits);
        answer.map_err(|(trouble, _)| trouble)
    }

    /// Sends a request on a connection. The error tells whether the connection ended before any byte of an answer.
    fn exchange(
        &self,
        mut wire: Wire,
        endpoint: &Endpoint,
        head: &[u8],
        request: &Request<'_>,
        limits: Limits<'_>,
    ) -> Result<(AnswerHead, DirectBody), (Trouble, bool)> {
        // Head and body in one write: two small segments would wait for each other's confirmation (Nagle, delayed ACK).
        let mut message = head.to_vec();
        message.extend_from_slice(request.body);
        // A connection that the server has closed accepts a write at first, or fails it. Both count as "before any byte", so that
        // another connection is tried; a GET may be sent twice.
        wire.send(&message, limits).map_err(|trouble| (trouble, true))?;
        let mut bytes = Vec::new();
        for _ in 0..=MAX_INTERIM {
            let parsed = receive_head(&mut wire, &mut bytes, limits);
            let head = parsed.map_err(|trouble| (trouble, bytes.is_empty()))?;
            // 100 and 103 announce the answer and have no body.
            if head.status.is_informational() {
                continue;
            }
            let (framing, keep) =
                framing_of(&head, request).map_err(|text| (Trouble::Broken(text.to_owned()), false))?;
            // What came behind the head already belongs to the body.
            let mut body = DirectBody {
                wire: Some((endpoint.clone(), wire)),
                early: bytes,
                framing,
                keep,
                idle: Arc::clone(&self.idle),
            };
            body.finish();
            let answer = AnswerHead {
                status: head.status,
                headers: head.headers,
            };
            return Ok((answer, body));
        }
        Err((Trouble::Broken("too many interim answers".to_owned()), false))
    }
}

impl IdlePool {
    fn take(&self, endpoint: &Endpoint) -> Option<Wire> {
        loop {
            let mut wires = lock(&self.wires);
            let expired = expired(&mut wires);
            let last = wires.iter().rposition(|(at, ..)| at == endpoint);
            let taken = last.map(|last| wires.remove(last));
            // Closing a socket may take some time.
            drop(wires);
            drop(expired);
            let (_, since, wire) = taken?;
            // A test costs a system call. Between the requests of one reader it never finds anything.
            if since.elapsed() < FRESH || !wire.is_stale() {
                return Some(wire);
            }
        }
    }

    fn put(&self, endpoint: Endpoint, wire: Wire) {
        let mut wires = lock(&self.wires);
        let expired = expired(&mut wires);
        wires.push((endpoint, Instant::now(), wire));
        // The list is in the order of use, so the first one is the next that the server would close.
        let oldest = (wires.len() > self.most).then(|| wires.remove(0));
        drop(wires);
        drop((expired, oldest));
    }
}

/// Takes those connections out of the list that were idle for too long. They stand at its front.
fn expired(wires: &mut Vec<(Endpoint, Instant, Wire)>) -> Vec<(Endpoint, Instant, Wire)> {
    let fresh = wires.iter().position(|(_, since, _)| since.elapsed() < MAX_IDLE);
    wires.drain(..fresh.unwrap_or(wires.len())).collect()
}

/// Receives the head of an answer. What was received after it stays in `bytes`.
fn receive_head(wire: &mut Wire, bytes: &mut Vec<u8>, limits: Limits<'_>) -> Result<Head, Trouble> {
    let mut searched = 0;
    loop {
        if let Some(end) = head_end(bytes, searched) {
            let head = parse_head(bytes.get(..end).unwrap_or_default());
            bytes.drain(..end);
            return head.map_err(|text| Trouble::Broken(text.to_owned()));
        }
        // After the search, so that a head which ends in the last piece is accepted.
        if bytes.len() > MAX_HEAD {
            return Err(Trouble::Broken("the head of the answer is too long".to_owned()));
        }
        // The end of a head may be cut anywhere: its last three bytes are looked at again, and no byte more often than that, as a
        // server may send its head in single bytes.
        searched = bytes.len().saturating_sub(3);
        if !wire.receive(1, limits, &mut |piece| bytes.extend_from_slice(piece))? {
            return Err(Trouble::Broken(
                "the server closed the connection before its answer".to_owned(),
            ));
        }
    }
}

/// Body of an answer on a connection of our own.
pub(super) struct DirectBody {
    /// `None` once the connection is idle again.
    wire: Option<(Endpoint, Wire)>,
    /// Bytes that came with the head.
    early: Vec<u8>,
    framing: Framing,
    keep: bool,
    idle: Arc<IdlePool>,
}

impl DirectBody {
    /// Reads the next piece. Returns false at the end of the body.
    pub(super) fn read(&mut self, limits: Limits<'_>, piece: Piece<'_>) -> Result<bool, Trouble> {
        loop {
            if self.framing.is_complete() {
                return Ok(false);
            }
            // A hint for the socket, which wakes this thread once that many bytes have arrived. Of a chunk's end nothing is known.
            let expected = match &self.framing {
                Framing::Length(left) => usize::try_from(*left).unwrap_or(usize::MAX),
                Framing::Chunked(_) | Framing::UntilEnd => 1,
            };
            let framing = &mut self.framing;
            let mut taken = Ok((0, false));
            if !self.early.is_empty() {
                let early = std::mem::take(&mut self.early);
                taken = framing.take(&early, piece);
            } else if let Some((_, wire)) = &mut self.wire {
                let more = wire.receive(expected, limits, &mut |bytes| taken = framing.take(bytes, piece))?;
                // The end of the connection is the end of the body. A cut cannot be told from it here; the reader compares the length.
                if !more && *framing == Framing::UntilEnd {
                    self.framing = Framing::Length(0);
                    return Ok(false);
                }
                if !more {
                    return Err(Trouble::Broken("the connection was cut".to_owned()));
                }
            } else {
                return Ok(false);
            }
            let (passed, excess) = taken.map_err(|text| Trouble::Broken(text.to_owned()))?;
            // Bytes after a body belong to no request.
            self.keep &= !excess;
            self.finish();
            // A piece may consist of the lines between two chunks alone. Then the next one is read, within the limits.
            if passed > 0 {
                return Ok(true);
            }
            limits.check()?;
        }
    }

    /// Gives the connection back once the body is complete.
    fn finish(&mut self) {
        if self.framing.is_complete()
            && let Some((endpoint, wire)) = self.wire.take()
            // Otherwise the connection is dropped here, which closes it.
            && self.keep
            && self.early.is_empty()
        {
            self.idle.put(endpoint, wire);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};
    use std::net::TcpListener;
    use std::sync::atomic::AtomicBool;

    use reqwest::header::HeaderMap;
    use reqwest::{Method, Url};

    use super::*;
    use crate::config::Trust;
    use crate::store::https::trust;

    /// Server that answers each request on each of its connections, and returns for each the number of its connection.
    fn counting_server() -> u16 {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        std::thread::spawn(move || {
            for (number, stream) in listener.incoming().map_while(Result::ok).enumerate() {
                std::thread::spawn(move || {
                    let mut stream = stream;
                    let mut last = [0; 4];
                    while stream.read_exact(&mut last[3..]).is_ok() {
                        if last == *b"\r\n\r\n" {
                            let answer = format!("HTTP/1.1 200 OK\r\nContent-Length: 1\r\n\r\n{number}");
                            let _ = stream.write_all(answer.as_bytes());
                        }
                        last.rotate_left(1);
                    }
                });
            }
        });
        port
    }

    #[test]
    fn a_connection_that_was_idle_for_long_is_not_used_again() {
        let url = Url::parse(&format!("http://127.0.0.1:{}/", counting_server())).unwrap();
        let (tls, _) = trust::client_config(&Trust::default()).unwrap();
        let http1 = Http1::new(tls, Vec::new(), Duration::from_secs(15), 8, "me");
        let closing = AtomicBool::new(false);
        let connection = || {
            let limits = Limits {
                deadline: Instant::now() + Duration::from_secs(60),
                closing: &closing,
            };
            let request = Request {
                method: Method::GET,
                url: &url,
                headers: HeaderMap::new(),
                body: &[],
            };
            let (mut body, mut text) = (http1.send(&request, limits).unwrap().1, Vec::new());
            while body.read(limits, &mut |bytes| text.extend_from_slice(bytes)).unwrap() {}
            String::from_utf8(text).unwrap()
        };
        assert_eq!([connection(), connection()], ["0", "0"]);
        for (_, since, _) in http1.idle.wires.lock().unwrap().iter_mut() {
            *since -= MAX_IDLE;
        }
        assert_eq!([connection(), connection()], ["1", "1"]);
    }
}
