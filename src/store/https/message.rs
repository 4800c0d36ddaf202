//! Messages of HTTP/1.1: heads of requests and answers, and where bodies end. No I/O.
//!
//! Bounds: a head has at most [`MAX_HEAD`] bytes and [`MAX_HEADERS`] lines, and so has each line between the chunks of a body.

use std::fmt::Write as _;

use reqwest::header::{ACCEPT, CONNECTION, CONTENT_LENGTH, HOST, HeaderMap, HeaderName, HeaderValue};
use reqwest::header::{TRANSFER_ENCODING, USER_AGENT};
use reqwest::{Method, StatusCode, Url};

use super::request::{Piece, Request};

/// Largest head of an answer, in bytes.
pub(super) const MAX_HEAD: usize = 64 << 10;
/// Most header lines of an answer.
const MAX_HEADERS: usize = 128;

/// Returns the head of a request. Headers of the request take the place of those that all requests have, and the values go
/// out byte for byte.
pub(super) fn head_of(request: &Request<'_>, user_agent: &str) -> Vec<u8> {
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
pub(super) struct Head {
    pub(super) status: StatusCode,
    pub(super) headers: HeaderMap,
    /// True for HTTP/1.1, false for 1.0.
    is_modern: bool,
}

/// Returns the length of a head that ends after byte `from`: an empty line ends it.
pub(super) fn head_end(bytes: &[u8], from: usize) -> Option<usize> {
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

pub(super) fn parse_head(bytes: &[u8]) -> Result<Head, &'static str> {
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
pub(super) enum Framing {
    /// After that many more bytes.
    Length(u64),
    /// In chunks, each after its size.
    Chunked(Chunks),
    /// With the connection.
    UntilEnd,
}

/// Returns the framing of a body, and true if the connection can be used afterwards.
pub(super) fn framing_of(head: &Head, request: &Request<'_>) -> Result<(Framing, bool), &'static str> {
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

impl Framing {
    /// Returns true once the body has been passed on.
    pub(super) fn is_complete(&self) -> bool {
        match self {
            Self::Length(left) => *left == 0,
            Self::Chunked(chunks) => chunks.state == ChunkState::End,
            Self::UntilEnd => false,
        }
    }

    /// Passes on the part of `bytes` that belongs to the body. Returns its length, and true if bytes are left over.
    pub(super) fn take(&mut self, bytes: &[u8], piece: Piece<'_>) -> Result<(usize, bool), &'static str> {
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
pub(super) struct Chunks {
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
    use super::*;

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
}
