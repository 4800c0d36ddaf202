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
//! Bounds: a head has at most [`MAX_HEAD`] bytes and [`MAX_HEADERS`] lines; the size lines of a chunked body are bounded by
//! the parser. Bodies are bounded by their readers.

use std::fmt::{self, Write as _};
use std::net::IpAddr;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use reqwest::header::{ACCEPT, CONNECTION, CONTENT_LENGTH, HOST, HeaderMap, HeaderName, HeaderValue};
use reqwest::header::{TRANSFER_ENCODING, USER_AGENT};
use reqwest::{Method, StatusCode, Url};
use rustls::ClientConfig;

use super::transport::{Answer, Body, Limits, Piece, Request, Trouble};
use super::wire::{Endpoint, Wire};

/// Largest head of an answer, in bytes.
const MAX_HEAD: usize = 64 << 10;
/// Most header lines of an answer.
const MAX_HEADERS: usize = 128;
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
    pub(super) fn send(&self, request: &Request<'_>, limits: Limits<'_>) -> Result<Answer, Trouble> {
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
    ) -> Result<Answer, (Trouble, bool)> {
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
            return Ok(Answer::new(head.status, head.headers, Body::Direct(body)));
        }
        Err((Trouble::Broken("too many interim answers".to_owned()), false))
    }
}

impl IdlePool {
    fn take(&self, endpoint: &Endpoint) -> Option<Wire> {
        loop {
            let mut wires = self.wires.lock().unwrap_or_else(PoisonError::into_inner);
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
        let mut wires = self.wires.lock().unwrap_or_else(PoisonError::into_inner);
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

/// Returns the head of a request. Headers of the request take the place of those that all requests have, and the values go
/// out byte for byte.
fn head_of(request: &Request<'_>, user_agent: &str) -> Vec<u8> {
    let url: &Url = request.url;
    let mut head = format!("{} {}", request.method, url.path());
    if let Some(query) = url.query() {
        let _ = write!(head, "?{query}");
    }
    let _ = write!(head, " HTTP/1.1\r\nhost: {}", url.host_str().unwrap_or_default());
    if let Some(port) = url.port() {
        let _ = write!(head, ":{port}");
    }
    head.push_str("\r\n");
    for (name, value) in [(USER_AGENT, user_agent), (ACCEPT, "*/*")] {
        if !request.headers.contains_key(&name) {
            let _ = write!(head, "{name}: {value}\r\n");
        }
    }
    if !request.body.is_empty() {
        let _ = write!(head, "content-length: {}\r\n", request.body.len());
    }
    let mut head = head.into_bytes();
    for (name, value) in &request.headers {
        // A message with two hosts or two lengths is one thing to one server and another to the next.
        if name != HOST && name != CONTENT_LENGTH {
            head.extend_from_slice(name.as_str().as_bytes());
            head.extend_from_slice(b": ");
            head.extend_from_slice(value.as_bytes());
            head.extend_from_slice(b"\r\n");
        }
    }
    head.extend_from_slice(b"\r\n");
    head
}

/// Head of an answer.
#[derive(Debug)]
struct Head {
    status: StatusCode,
    headers: HeaderMap,
    /// True for HTTP/1.1, false for 1.0.
    is_modern: bool,
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

/// Returns the length of a head that ends after byte `from`: an empty line ends it.
fn head_end(bytes: &[u8], from: usize) -> Option<usize> {
    let mut at = from;
    loop {
        at += bytes.get(at..)?.iter().position(|b| *b == b'\n')? + 1;
        match bytes.get(at..)? {
            [b'\n', ..] => return Some(at + 1),
            [b'\r', b'\n', ..] => return Some(at + 2),
            _ => {}
        }
    }
}

fn parse_head(bytes: &[u8]) -> Result<Head, &'static str> {
    // On the stack: the parser fails for more lines than this has room for.
    let mut lines = [httparse::EMPTY_HEADER; MAX_HEADERS];
    let mut answer = httparse::Response::new(&mut lines);
    match answer.parse(bytes) {
        Ok(httparse::Status::Complete(_)) => {}
        Ok(httparse::Status::Partial) | Err(_) => return Err("the answer is not HTTP"),
    }
    let status = answer.code.and_then(|code| StatusCode::from_u16(code).ok());
    let mut headers = HeaderMap::with_capacity(answer.headers.len());
    for line in answer.headers.iter() {
        let name = HeaderName::from_bytes(line.name.as_bytes());
        // A line that is no valid header is left out, as browsers do. Those that decide something are checked where they are used.
        if let (Ok(name), Ok(value)) = (name, HeaderValue::from_bytes(line.value)) {
            headers.append(name, value);
        }
    }
    Ok(Head {
        status: status.ok_or("the answer is not HTTP")?,
        headers,
        is_modern: answer.version == Some(1),
    })
}

/// End of a body.
#[derive(Debug, PartialEq, Eq)]
enum Framing {
    /// After that many more bytes.
    Length(u64),
    /// In chunks, each after its size.
    Chunked(Chunks),
    /// With the connection.
    UntilEnd,
}

/// Returns the framing of a body, and true if the connection can be used afterwards.
fn framing_of(head: &Head, request: &Request<'_>) -> Result<(Framing, bool), &'static str> {
    let has_token = |name: HeaderName, token: &str| {
        let values = head.headers.get_all(name);
        let mut tokens = values
            .iter()
            .filter_map(|value| value.to_str().ok())
            .flat_map(|v| v.split(','));
        tokens.any(|t| t.trim().eq_ignore_ascii_case(token))
    };
    // HTTP/1.1 keeps a connection unless told otherwise, HTTP/1.0 closes it unless told otherwise.
    let keep = match head.is_modern {
        true => !has_token(CONNECTION, "close"),
        false => has_token(CONNECTION, "keep-alive"),
    };
    // Such an answer may have a Content-Length all the same: that of the body that a GET would have.
    let bodiless = request.method == Method::HEAD
        || head.status == StatusCode::NO_CONTENT
        || head.status == StatusCode::NOT_MODIFIED;
    if bodiless {
        return Ok((Framing::Length(0), keep));
    }
    // It comes before Content-Length: a message with both ends where its chunks do (RFC 9112, 6.3).
    if head.headers.contains_key(TRANSFER_ENCODING) {
        // Nothing else before it either: `gzip, chunked` would pass compressed bytes on as those of the file.
        let mut codings = head.headers.get_all(TRANSFER_ENCODING).iter();
        let chunked = |value: &HeaderValue| value.as_bytes().trim_ascii().eq_ignore_ascii_case(b"chunked");
        return match (codings.next(), codings.next()) {
            (Some(only), None) if chunked(only) => Ok((Framing::Chunked(Chunks::default()), keep)),
            _ => Err("the answer has an unknown transfer encoding"),
        };
    }
    // Equal repetitions are one length. Different ones are a sign that two programs on the way disagree about the end of the
    // answer, and `+5` or an empty value is none.
    let mut lengths = head.headers.get_all(CONTENT_LENGTH).iter().map(|value| {
        let text = value.to_str().ok()?.trim();
        let digits = !text.is_empty() && text.bytes().all(|b| b.is_ascii_digit());
        text.parse::<u64>().ok().filter(|_| digits)
    });
    match lengths.next() {
        // Without a length the connection ends with the body, so it cannot be used again.
        None => Ok((Framing::UntilEnd, false)),
        Some(Some(first)) if lengths.all(|other| other == Some(first)) => Ok((Framing::Length(first), keep)),
        Some(_) => Err("the answer has an invalid Content-Length"),
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
            if self.is_complete() {
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

    fn is_complete(&self) -> bool {
        match &self.framing {
            Framing::Length(left) => *left == 0,
            Framing::Chunked(chunks) => chunks.state == ChunkState::End,
            Framing::UntilEnd => false,
        }
    }

    /// Gives the connection back once the body is complete.
    fn finish(&mut self) {
        if self.is_complete()
            && let Some((endpoint, wire)) = self.wire.take()
            // Otherwise the connection is dropped here, which closes it.
            && self.keep
            && self.early.is_empty()
        {
            self.idle.put(endpoint, wire);
        }
    }
}

impl Framing {
    /// Passes on the part of `bytes` that belongs to the body. Returns its length, and true if bytes are left over.
    fn take(&mut self, bytes: &[u8], piece: Piece<'_>) -> Result<(usize, bool), &'static str> {
        match self {
            Self::UntilEnd => {
                piece(bytes);
                Ok((bytes.len(), false))
            }
            Self::Length(left) => {
                let now = bytes.len().min(usize::try_from(*left).unwrap_or(usize::MAX));
                *left -= now as u64;
                piece(bytes.get(..now).unwrap_or_default());
                Ok((now, now < bytes.len()))
            }
            Self::Chunked(chunks) => chunks.take(bytes, piece),
        }
    }
}

/// Decoder of a chunked body: `SIZE [;extension] CRLF data CRLF … 0 CRLF [trailer lines] CRLF`.
#[derive(Debug, Default, PartialEq, Eq)]
struct Chunks {
    state: ChunkState,
    /// Size of the present chunk, or what is left of it.
    left: u64,
    /// Bytes of the present line.
    line: usize,
}

#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
enum ChunkState {
    /// The hexadecimal digits of a size.
    #[default]
    Size,
    /// The rest of the line of a size.
    SizeEnd,
    Data,
    /// The line end after the data.
    DataEnd,
    Trailer,
    End,
}

impl Chunks {
    fn take(&mut self, mut bytes: &[u8], piece: Piece<'_>) -> Result<(usize, bool), &'static str> {
        let mut passed = 0;
        while let Some((first, rest)) = bytes.split_first() {
            match self.state {
                ChunkState::End => return Ok((passed, true)),
                ChunkState::Data => {
                    let now = bytes.len().min(usize::try_from(self.left).unwrap_or(usize::MAX));
                    let (data, rest) = bytes.split_at(now);
                    piece(data);
                    passed += now;
                    self.left -= now as u64;
                    bytes = rest;
                    if self.left == 0 {
                        self.enter(ChunkState::DataEnd);
                    }
                }
                _ => {
                    self.control(*first)?;
                    bytes = rest;
                }
            }
        }
        Ok((passed, false))
    }

    /// Processes one byte outside of the data.
    fn control(&mut self, byte: u8) -> Result<(), &'static str> {
        const INVALID: &str = "the answer has an invalid chunk";
        self.line += 1;
        if self.line > MAX_HEAD {
            return Err(INVALID);
        }
        match (self.state, byte) {
            (ChunkState::Size, digit) if digit.is_ascii_hexdigit() => {
                let digit = char::from(digit).to_digit(16).unwrap_or(0);
                let size = self.left.checked_mul(16).ok_or(INVALID)?;
                self.left = size + u64::from(digit);
            }
            // At least one digit: an empty line is no size. Extensions after `;` are skipped, within the limit of the line.
            (ChunkState::Size, b'\r' | b'\n' | b';' | b' ' | b'\t') if self.line > 1 => {
                self.state = ChunkState::SizeEnd;
                if byte == b'\n' {
                    self.size_is_complete();
                }
            }
            (ChunkState::SizeEnd, b'\n') => self.size_is_complete(),
            (ChunkState::SizeEnd, _) => {}
            (ChunkState::DataEnd, b'\r') if self.line == 1 => {}
            (ChunkState::DataEnd, b'\n') => self.enter(ChunkState::Size),
            // Not counted, so that CR LF alone is an empty line.
            (ChunkState::Trailer, b'\r') => self.line -= 1,
            // An empty line ends the body.
            (ChunkState::Trailer, b'\n') if self.line == 1 => self.enter(ChunkState::End),
            (ChunkState::Trailer, b'\n') => self.enter(ChunkState::Trailer),
            (ChunkState::Trailer, _) => {}
            _ => return Err(INVALID),
        }
        Ok(())
    }

    fn size_is_complete(&mut self) {
        let next = if self.left == 0 {
            ChunkState::Trailer
        } else {
            ChunkState::Data
        };
        self.enter(next);
    }

    fn enter(&mut self, state: ChunkState) {
        (self.state, self.line) = (state, 0);
    }
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};
    use std::net::TcpListener;
    use std::sync::atomic::AtomicBool;

    use super::*;
    use crate::config::Trust;
    use crate::store::https::trust;

    fn decode(bytes: &[u8], step: usize) -> Result<(Vec<u8>, ChunkState, bool), &'static str> {
        let (mut chunks, mut out, mut excess) = (Chunks::default(), Vec::new(), false);
        for part in bytes.chunks(step) {
            excess |= chunks.take(part, &mut |piece| out.extend_from_slice(piece))?.1;
        }
        Ok((out, chunks.state, excess))
    }

    #[test]
    fn chunks_are_decoded_however_they_are_cut() {
        let body = b"4\r\nWiki\r\n0A;x=\"y\"\r\n0123456789\r\n0\r\nExpires: never\r\n\r\n";
        for step in 1..body.len() {
            let (out, state, excess) = decode(body, step).unwrap();
            assert_eq!(
                (out.as_slice(), state, excess),
                (&b"Wiki0123456789"[..], ChunkState::End, false)
            );
        }
        assert!(decode(b"0\r\n\r\nHTTP/1.1", 3).unwrap().2);
    }

    #[test]
    fn invalid_chunks_are_refused() {
        let long = vec![b'1'; 17];
        for bad in [&b"x\r\n"[..], b"\r\n", b"-1\r\n", b"1\r\nab", &long] {
            assert!(decode(bad, 1).is_err(), "{}", String::from_utf8_lossy(bad));
        }
        let endless = vec![b' '; MAX_HEAD + 2];
        assert!(decode(&[b"1", endless.as_slice()].concat(), 4096).is_err());
    }

    fn framing(head: &str) -> Result<(Framing, bool), &'static str> {
        let url = Url::parse("http://h/").unwrap();
        let request = Request {
            method: Method::GET,
            url: &url,
            headers: HeaderMap::new(),
            body: &[],
        };
        framing_of(&parse_head(head.as_bytes()).unwrap(), &request)
    }

    #[test]
    fn the_end_of_a_body_is_that_of_its_headers() {
        let length = framing("HTTP/1.1 206 x\r\nContent-Length: 7\r\n\r\n");
        assert_eq!(length, Ok((Framing::Length(7), true)));
        let closed = framing("HTTP/1.1 200 x\r\nContent-Length: 7\r\nConnection: x, Close\r\n\r\n");
        assert_eq!(closed, Ok((Framing::Length(7), false)));
        assert_eq!(framing("HTTP/1.0 200 x\r\n\r\n"), Ok((Framing::UntilEnd, false)));
        let chunked = framing("HTTP/1.1 200 x\r\nContent-Length: 7\r\nTransfer-Encoding: chunked\r\n\r\n");
        assert_eq!(chunked, Ok((Framing::Chunked(Chunks::default()), true)));
        assert_eq!(framing("HTTP/1.1 304 x\r\n\r\n"), Ok((Framing::Length(0), true)));
        for bad in [
            "Content-Length: 7\r\nContent-Length: 8",
            "Content-Length: +7",
            "Content-Length: ",
            "Transfer-Encoding: gzip",
            "Transfer-Encoding: gzip, chunked",
            "Transfer-Encoding: gzip\r\nTransfer-Encoding: chunked",
        ] {
            assert!(framing(&format!("HTTP/1.1 200 x\r\n{bad}\r\n\r\n")).is_err(), "{bad}");
        }
    }

    #[test]
    fn a_head_ends_with_an_empty_line() {
        assert_eq!(head_end(b"HTTP/1.1 200 x\r\nA: b\r\n\r\nrest", 0), Some(24));
        assert_eq!(head_end(b"HTTP/1.1 200 x\nA: b\n\nrest\r\n\r\n", 0), Some(21));
        assert_eq!(head_end(b"HTTP/1.1 200 x\r\nA: b\r\n", 0), None);
        assert!(parse_head(b"SSH-2.0-x\r\n\r\n").is_err());
    }

    #[test]
    fn a_request_names_path_query_and_host() {
        let url = Url::parse("https://u@h:8443/a%20b?c=d").unwrap();
        let mut headers = HeaderMap::new();
        headers.insert(CONNECTION, HeaderValue::from_static("x"));
        let request = Request {
            method: Method::GET,
            url: &url,
            headers,
            body: b"abc",
        };
        let head = head_of(&request, "me");
        assert_eq!(
            head,
            b"GET /a%20b?c=d HTTP/1.1\r\nhost: h:8443\r\nuser-agent: me\r\naccept: */*\r\ncontent-length: 3\r\n\
             connection: x\r\n\r\n"
        );
    }

    #[test]
    fn a_header_is_sent_once_and_byte_for_byte() {
        let url = Url::parse("https://h/").unwrap();
        let mut headers = HeaderMap::new();
        for (name, value) in [
            (HOST, &b"evil"[..]),
            (USER_AGENT, b"mine"),
            (ACCEPT, b"x/y"),
            (CONTENT_LENGTH, b"9"),
            (HeaderName::from_static("x"), b"a\xffb"),
        ] {
            headers.append(name, HeaderValue::from_bytes(value).unwrap());
        }
        let request = Request {
            method: Method::GET,
            url: &url,
            headers,
            body: b"abc",
        };
        let head = head_of(&request, "me");
        let mut lines: Vec<&[u8]> = head.split(|b| *b == b'\n').map(<[u8]>::trim_ascii).collect();
        lines.sort_unstable();
        let expected = [
            &b""[..],
            b"",
            b"GET / HTTP/1.1",
            b"accept: x/y",
            b"content-length: 3",
            b"host: h",
            b"user-agent: mine",
            b"x: a\xffb",
        ];
        assert_eq!(lines, expected);
    }

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
            let (mut answer, mut body) = (http1.send(&request, limits).unwrap(), Vec::new());
            while answer.read(limits, &mut |bytes| body.extend_from_slice(bytes)).unwrap() {}
            String::from_utf8(body).unwrap()
        };
        assert_eq!([connection(), connection()], ["0", "0"]);
        for (_, since, _) in http1.idle.wires.lock().unwrap().iter_mut() {
            *since -= MAX_IDLE;
        }
        assert_eq!([connection(), connection()], ["1", "1"]);
    }
}
