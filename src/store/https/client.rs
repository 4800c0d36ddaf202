//! Requests to one server: connections, limits of time, retries.
//!
//! ```text
//!   read ─► attempt ─► slot ─► authorization ─► headers checked ─► body, piece by piece ─► the caller
//!             ▲                                                      │
//!             └── pause ◄── cut, stalled, refused for now ◄──────────┘   the rest of the range alone is asked for again
//! ```
//! The callers are threads of the cache and of the mount, which do all of this themselves (`transport.rs`). Three limits of
//! time stand apart: to connect, to the first byte of an answer (a vCenter may need half an hour), and between two pieces
//! of a body. All attempts of a request together have `timeout=`.
//!
//! Bounds against a hostile server: at most [`MAX_REDIRECTS`] redirects, never to plain HTTP and never with credentials to
//! another host; error texts and pages are bounded (`page.rs`); a body that is longer than its range ends the request.

use std::cell::Cell;
use std::ops::Range;
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, Mutex, Weak};
use std::time::{Duration, Instant};

use reqwest::header::{ACCEPT_ENCODING, AUTHORIZATION, COOKIE, HeaderMap, HeaderName, HeaderValue};
use reqwest::header::{IF_RANGE, LOCATION, RANGE};
use reqwest::{Method, StatusCode, Url};

use super::address::{Address, AnsweredForms, ESXI_DATACENTER, same_origin};
use super::answer::{self, Misfit, Version};
use super::failure::{Failure, Next, pause_before};
use super::http1::Http1;
use super::library::{Library, LibraryOptions};
use super::logout::log_out;
use super::page::{error_text, page};
use super::request::{Limits, Piece, Request, TICK, Trouble};
use super::session::{Authorization, Session};
use super::slots::Slots;
use super::transport::{Answer, Transport};
use super::trust::{self, Refusal};
use crate::config::{HttpsAddress, HttpsConfig, HttpsServer};
use crate::error::{Error, ErrorKind, Result};
use crate::mutex::lock;
use crate::store::printable;

/// Default number of connections: an ESXi limits each connection, and more than eight gain little.
const CONNECTIONS: usize = 8;
/// Default deadline of a request.
const TIMEOUT: Duration = Duration::from_secs(60);
/// Default deadline of a request to a vCenter, whose first byte can take that long (virt-v2v's limit).
const VCENTER_TIMEOUT: Duration = Duration::from_secs(2000);
/// Longest time to connect, including the TLS handshake.
const CONNECT: Duration = Duration::from_secs(15);
/// Name of the program in requests to servers.
const USER_AGENT: &str = concat!(env!("CARGO_PKG_NAME"), "/", env!("CARGO_PKG_VERSION"));
/// Deadline of a request for the headers alone.
const VERSION_TIME: Duration = Duration::from_secs(10);

const MAX_REDIRECTS: u32 = 5;
/// Logins that replace an ended session, for one request.
const MAX_LOGINS: u32 = 2;
/// Retries at the start of errors that are not those of reaching the server.
const START_RETRIES: u32 = 3;

/// One server with one login.
pub(super) struct Client {
    transport: Transport,
    session: Session,
    /// Headers that the user wants with every request to the server.
    headers: HeaderMap,
    /// Certificate that was refused last.
    refusal: Refusal,
    slots: Slots,
    timeout: Duration,
    retry: Option<u32>,
    /// Scheme, host and port that the credentials are for.
    origin: Url,
    pub(super) forms: AnsweredForms,
}

impl std::fmt::Debug for Client {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Client")
            .field("origin", &self.origin.as_str())
            .field("session", &self.session)
            .finish_non_exhaustive()
    }
}

/// Range of a file to read.
pub(super) struct Ask<'a> {
    pub(super) address: &'a Address,
    /// Form of the query.
    pub(super) form: usize,
    /// Target of an earlier redirect by the server.
    pub(super) moved: &'a Mutex<Option<Url>>,
    pub(super) range: Range<u64>,
    pub(super) want: Want,
    /// Version of the file at its open; `None` for the open itself.
    pub(super) known: Option<&'a Version>,
    /// Becomes true when the file is closed, which ends the request.
    pub(super) closing: &'a AtomicBool,
}

/// Content of the answer to a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Want {
    /// The range of the file.
    Bytes,
    /// The headers alone: the version of the file.
    Version,
    /// The listing of a folder, which goes to the sink as a whole.
    Page,
}

/// Returns true for the errors that a wrong form of the query shows as: an absent file, or an internal error.
pub(super) fn may_be_wrong_form(e: &Error) -> bool {
    matches!(e.kind(), ErrorKind::NotFound | ErrorKind::Busy)
}

/// Returns the error to report of two forms of one query: an absent file in one form is the answer of the right one.
pub(super) fn of_forms(earlier: Option<Error>, later: Error) -> Option<Error> {
    match later.kind() {
        ErrorKind::NotFound => Some(later),
        _ => earlier.or(Some(later)),
    }
}

/// Clients in use: disks of the same server share one.
static CLIENTS: Mutex<Vec<(HttpsServer, Url, Weak<Client>)>> = Mutex::new(Vec::new());

impl Client {
    /// Returns the client of a server: that of another disk with the same server and settings, or a new one.
    pub(super) fn of(config: &HttpsConfig, origin: &Url) -> Result<Arc<Self>> {
        let mut clients = lock(&CLIENTS);
        // Under the lock, so that the first disks of a server do not log in twice.
        clients.retain(|(_, _, client)| client.strong_count() > 0);
        let same = clients
            .iter()
            .find(|(server, at, _)| *server == config.server && at == origin);
        if let Some(client) = same.and_then(|(_, _, client)| client.upgrade()) {
            return Ok(client);
        }
        let client = Arc::new(Self::new(config, origin)?);
        clients.push((config.server.clone(), origin.clone(), Arc::downgrade(&client)));
        Ok(client)
    }

    fn new(config: &HttpsConfig, origin: &Url) -> Result<Self> {
        let server = &config.server;
        let (tls, refusal) = trust::client_config(&server.trust)?;
        // Before its first byte a vCenter may need half an hour.
        let is_vcenter = matches!(
            &config.address,
            HttpsAddress::Datastore { datacenter: Some(name), .. } if name != ESXI_DATACENTER
        );
        let default = if is_vcenter { VCENTER_TIMEOUT } else { TIMEOUT };
        let timeout = server.timeout.unwrap_or(default);
        let connections = server.connections.unwrap_or(CONNECTIONS);
        let connect = CONNECT.min(timeout);
        // The library brings HTTP/2 and proxies, and costs a change of threads for each piece of an answer. The common case does
        // without.
        let transport = if server.http2 || server.proxy.is_some() {
            Transport::Library(Library::new(&LibraryOptions {
                tls,
                http2: server.http2,
                proxy: server.proxy.as_ref(),
                resolve: &server.resolve,
                connections,
                connect,
                user_agent: USER_AGENT,
            })?)
        } else {
            let resolve = server.resolve.clone();
            Transport::Direct(Http1::new(tls, resolve, connect, connections, USER_AGENT))
        };
        Ok(Self {
            transport,
            session: Session::new(server)?,
            headers: headers_of(server)?,
            refusal,
            slots: Slots::new(connections),
            timeout,
            retry: server.retry,
            origin: origin.clone(),
            forms: AnsweredForms::default(),
        })
    }

    /// Returns the number of connections.
    pub(super) fn connections(&self) -> usize {
        self.slots.most
    }

    /// Returns the deadline of a request.
    pub(super) fn timeout(&self) -> Duration {
        self.timeout
    }

    /// Reads a range, whose bytes go to `sink`, in order and each once. Returns the version of the file.
    ///
    /// Errors: `NotFound`, `Busy` for a locked file, `Corrupt` for a file that has changed, and otherwise why the server
    /// did not send the range within the deadline.
    pub(super) fn read(&self, ask: &Ask<'_>, sink: Piece<'_>) -> Result<Version> {
        // Without the headers alone, the file is read instead: a server that is slow to send them may have the time then.
        let time = match ask.want {
            Want::Version => self.timeout.min(VERSION_TIME),
            Want::Bytes | Want::Page => self.timeout,
        };
        let limits = Limits {
            deadline: Instant::now() + time,
            closing: ask.closing,
        };
        let (mut done, mut tries, mut logins) = (0, 0u32, 0u32);
        loop {
            let before = done;
            let failure = match self.attempt(ask, limits, &mut done, sink) {
                Ok(version) => return Ok(version),
                Err(failure) => failure,
            };
            // Progress pays for the failure: a server that cuts each answer after a while is read to the end.
            if done > before {
                tries = 0;
            }
            tries += 1;
            let started = ask.known.is_some();
            // Before the first answer a wrong name or address is more likely than a passing fault, so the user gets an answer soon.
            // Later, a mount goes on trying until the deadline.
            let (most, wanted) = match failure.next {
                Next::GiveUp => return Err(failure.error),
                Next::TimedOut => {
                    let text = format!("no answer within {} s (timeout=)", self.timeout.as_secs());
                    return Err(Error::new(ErrorKind::Os(libc::EIO), text));
                }
                Next::Return => {
                    // The next attempt asks the server again, which redirects to an address that is valid now.
                    *lock(ask.moved) = None;
                    (START_RETRIES, Some(Duration::ZERO))
                }
                Next::Login if logins >= MAX_LOGINS => return Err(failure.error),
                Next::Login => {
                    logins += 1;
                    (u32::MAX, Some(Duration::ZERO))
                }
                Next::Retry(pause) => (if started { u32::MAX } else { START_RETRIES }, pause),
                Next::Reconnect => (if started { u32::MAX } else { 0 }, None),
            };
            let pause = wanted.unwrap_or_else(|| pause_before(tries));
            // A pause that would outlast the deadline is not begun: the reason is known now.
            if tries > self.retry.unwrap_or(most) || Instant::now() + pause >= limits.deadline {
                return Err(failure.error);
            }
            tracing::debug!("{}: {}; trying again in {pause:?}", ask.address.label(), failure.error);
            sleep(pause, limits).map_err(|trouble| Failure::from(trouble).error)?;
        }
    }

    /// Asks once for what is missing of a range after its first `done` bytes.
    fn attempt(&self, ask: &Ask<'_>, limits: Limits<'_>, done: &mut u64, sink: Piece<'_>) -> Result<Version, Failure> {
        // For the whole attempt, redirects included: a slot stands for one connection that is busy.
        let _slot = self.slots.acquire(limits)?;
        let moved = lock(ask.moved).clone();
        let was_moved = moved.is_some();
        let mut url = moved.unwrap_or_else(|| ask.address.url(ask.form));
        let start = ask.range.start + *done;
        for _ in 0..=MAX_REDIRECTS {
            let (answer, authorization) = self.send(&url, ask, start..ask.range.end, limits)?;
            let status = answer.status;
            if status.is_redirection() && status != StatusCode::NOT_MODIFIED {
                url = self.redirected(&url, &answer, &authorization)?;
                continue;
            }
            // A storage service signs the address that it redirects to for some minutes; afterwards it refuses it in one of these ways.
            let gone = [
                StatusCode::UNAUTHORIZED,
                StatusCode::FORBIDDEN,
                StatusCode::NOT_FOUND,
                StatusCode::GONE,
            ];
            if was_moved && gone.contains(&status) {
                return Err(Failure::new(
                    Next::Return,
                    ErrorKind::NotFound,
                    "the redirection has expired",
                ));
            }
            if !status.is_success() {
                return self.explain(ask, answer, &authorization, limits);
            }
            let session = match &authorization {
                Authorization::Cookie(_, generation) => Some(*generation),
                _ => None,
            };
            // From here on other requests can use the login.
            drop(authorization);
            if let Some(generation) = session {
                self.session.accepted(generation);
            }
            if !same_origin(&url, &self.origin) {
                *lock(ask.moved) = Some(url);
            }
            let version = match ask.want {
                Want::Version => {
                    return answer::version_of(&answer.headers)
                        .ok_or_else(|| Failure::retry("no length in the answer"));
                }
                Want::Page => page(answer, limits, sink)?,
                Want::Bytes => self.body(ask, answer, session, limits, done, sink)?,
            };
            self.slots.succeeded();
            return Ok(version);
        }
        Err(Failure::fatal(
            ErrorKind::Os(libc::ELOOP),
            format!("more than {MAX_REDIRECTS} redirects"),
        ))
    }

    /// Sends one request and waits for the headers of its answer.
    fn send(
        &self,
        url: &Url,
        ask: &Ask<'_>,
        range: Range<u64>,
        limits: Limits<'_>,
    ) -> Result<(Answer, Authorization<'_>), Failure> {
        let mut headers = HeaderMap::new();
        // The one place where credentials are added. Scheme, host and port must be those that the user named.
        let authorization = if same_origin(url, &self.origin) {
            // May hold tokens, as credentials do.
            headers.clone_from(&self.headers);
            self.session.authorize(url.as_str(), limits)?
        } else {
            Authorization::Anonymous
        };
        let range = format!("bytes={}-{}", range.start, range.end.saturating_sub(1));
        if let Some(Ok(range)) = (ask.want == Want::Bytes).then(|| HeaderValue::from_str(&range)) {
            headers.insert(RANGE, range);
        }
        // Offsets are those of the file itself. A compressed body would have others.
        headers.insert(ACCEPT_ENCODING, HeaderValue::from_static("identity"));
        // A server that knows If-Range answers with the whole file if the file has changed, which `answer` then reports.
        if let Some(Ok(etag)) = ask.known.and_then(Version::if_range).map(HeaderValue::from_str) {
            headers.insert(IF_RANGE, etag);
        }
        match &authorization {
            Authorization::Anonymous => {}
            Authorization::Cookie(cookie, _) => {
                headers.insert(COOKIE, cookie.clone());
            }
            Authorization::Basic(basic) | Authorization::Login { basic, .. } => {
                headers.insert(AUTHORIZATION, basic.clone());
            }
        }
        let request = Request {
            method: match ask.want {
                Want::Version => Method::HEAD,
                Want::Bytes | Want::Page => Method::GET,
            },
            url,
            headers,
            body: &[],
        };
        let answer = self.transport.send(&request, limits);
        let answer = answer.map_err(|trouble| self.no_answer(trouble))?;
        if let Authorization::Login { .. } = authorization {
            let status = answer.status;
            // Status 404 and 416 come after the login was checked: a datastore may lack the file, and its session is valid.
            let accepted =
                status.is_success() || status == StatusCode::NOT_FOUND || status == StatusCode::RANGE_NOT_SATISFIABLE;
            self.session.logged_in(&answer.headers, accepted);
        }
        Ok((answer, authorization))
    }

    /// Explains a request that got no answer.
    fn no_answer(&self, trouble: Trouble) -> Failure {
        let host = self.host();
        match trouble {
            Trouble::Unreachable(text) => {
                // The TLS library reports a certificate that was refused as a connection that failed; the verifier left its reason here.
                let refusal = lock(&self.refusal).take();
                match refusal {
                    Some(refusal) => Failure::fatal(ErrorKind::Os(libc::EACCES), refusal),
                    None => Trouble::Unreachable(format!("{host}: {}", printable(text))).into(),
                }
            }
            Trouble::Broken(text) => Trouble::Broken(format!("{host}: {}", printable(text))).into(),
            other => other.into(),
        }
    }

    fn host(&self) -> String {
        let host = self.origin.host_str().unwrap_or_default();
        let port = self.origin.port_or_known_default().unwrap_or_default();
        format!("{host}:{port}")
    }

    /// Returns the target of a redirect.
    fn redirected(&self, from: &Url, answer: &Answer, authorization: &Authorization<'_>) -> Result<Url, Failure> {
        // A server whose session has ended sends its login page.
        if let Authorization::Cookie(_, generation) = authorization
            && self.session.expired(*generation)
        {
            return Err(self.ended());
        }
        let location = answer.headers.get(LOCATION).and_then(|value| value.to_str().ok());
        let target = location.and_then(|location| from.join(location).ok());
        let Some(target) = target else {
            return Err(Failure::retry("a redirect without a valid address"));
        };
        // The bytes of a disk would come unprotected from there on.
        let downgraded = from.scheme() == "https" && target.scheme() != "https";
        if downgraded || !matches!(target.scheme(), "https" | "http") {
            let scheme = printable(target.scheme());
            let text = format!("redirected from https to {scheme}, which is refused");
            return Err(Failure::fatal(ErrorKind::Policy, text));
        }
        Ok(target)
    }

    fn ended(&self) -> Failure {
        Failure::new(
            Next::Login,
            ErrorKind::Os(libc::EACCES),
            "the session has ended, and a new login does not help",
        )
    }

    /// Explains an answer that is an error.
    fn explain(
        &self,
        ask: &Ask<'_>,
        answer: Answer,
        authorization: &Authorization<'_>,
        limits: Limits<'_>,
    ) -> Result<Version, Failure> {
        let (status, headers) = (answer.status, answer.headers.clone());
        match status {
            StatusCode::UNAUTHORIZED => Err(self.login_needed(authorization)),
            StatusCode::FORBIDDEN => Err(Failure::fatal(
                ErrorKind::Os(libc::EACCES),
                "not allowed (status 403): the user may not read this file",
            )),
            StatusCode::NOT_FOUND | StatusCode::GONE => Err(Failure::fatal(
                ErrorKind::NotFound,
                format!("no such file on the server (status {})", status.as_u16()),
            )),
            StatusCode::RANGE_NOT_SATISFIABLE if ask.known.is_none() && answer::is_empty_file(&headers) => {
                Ok(Version::of(0, &headers))
            }
            StatusCode::RANGE_NOT_SATISFIABLE => Err(Failure::fatal(
                ErrorKind::Corrupt,
                "the file has become shorter on the server (status 416); unmount, and mount again",
            )),
            StatusCode::TOO_MANY_REQUESTS | StatusCode::SERVICE_UNAVAILABLE => {
                let text = error_text(answer, limits);
                self.slots.lower();
                let text = format!("the server is busy (status {}){text}", status.as_u16());
                let pause = answer::retry_after(&headers);
                Err(Failure::new(Next::Retry(pause), ErrorKind::Os(libc::EIO), text))
            }
            StatusCode::INTERNAL_SERVER_ERROR if ask.want == Want::Page => Err(Failure::fatal(
                ErrorKind::NotFound,
                "the server cannot list it (status 500): check that datacenter= and the datastore are right",
            )),
            StatusCode::INTERNAL_SERVER_ERROR if ask.address.site.is_datastore() => {
                let next = if ask.known.is_some() {
                    Next::Retry(None)
                } else {
                    Next::GiveUp
                };
                let text = "is locked by a running VM (status 500): power the VM off, or check that datacenter= and the \
                            datastore are right";
                Err(Failure::new(next, ErrorKind::Busy, text))
            }
            _ => {
                let text = error_text(answer, limits);
                Err(Failure::retry(format!("status {}{text}", status.as_u16())))
            }
        }
    }

    fn login_needed(&self, authorization: &Authorization<'_>) -> Failure {
        match authorization {
            Authorization::Cookie(_, generation) if self.session.expired(*generation) => self.ended(),
            Authorization::Basic(_) | Authorization::Login { .. } => self.session.refused().into(),
            Authorization::Cookie(..) | Authorization::Anonymous => self.session.unauthorized().into(),
        }
    }

    /// Checks the headers of an answer and passes on its body. `session`: number of the cookie that was sent.
    fn body(
        &self,
        ask: &Ask<'_>,
        mut answer: Answer,
        session: Option<u64>,
        limits: Limits<'_>,
        done: &mut u64,
        sink: Piece<'_>,
    ) -> Result<Version, Failure> {
        let start = ask.range.start + *done;
        let (status, len) = (answer.status, ask.range.end - start);
        let checked = answer::check(status, &answer.headers, start, len, ask.known);
        let part = checked.map_err(|misfit| self.misfit(misfit, session))?;
        // Without a length, only the end tells that the answer is the range: until then nothing of it is passed on.
        let is_announced = answer::announces_length(&answer.headers);
        let mut held = Vec::new();
        let mut left = part.len;
        let is_too_long = Cell::new(false);
        let mut take = |bytes: &[u8]| {
            let Some(after) = left.checked_sub(bytes.len() as u64) else {
                is_too_long.set(true);
                return;
            };
            left = after;
            if is_announced {
                *done += bytes.len() as u64;
                sink(bytes);
            } else {
                held.extend_from_slice(bytes);
            }
        };
        let end = loop {
            match answer.read(limits, &mut take) {
                // Not read to its end, which may never come.
                Ok(true) if !is_too_long.get() => {}
                end => break end,
            }
        };
        if end.is_ok() && left == 0 && !is_too_long.get() && !held.is_empty() {
            *done += held.len() as u64;
            sink(&held);
        }
        let early = |why: String| Failure::retry(format!("{why}, {left} bytes early"));
        match end {
            _ if is_too_long.get() => Err(Failure::retry("the answer is longer than the range that was asked for")),
            Ok(_) if left == 0 => Ok(part.version),
            Ok(_) => Err(early("the answer ended".to_owned())),
            Err(Trouble::Broken(text)) => Err(early(format!("the answer was cut ({})", printable(text)))),
            Err(Trouble::Stalled(time)) => Err(early(format!("the answer stalled for {} s", time.as_secs()))),
            Err(trouble) => Err(trouble.into()),
        }
    }

    fn misfit(&self, misfit: Misfit, session: Option<u64>) -> Failure {
        match misfit {
            Misfit::Changed(how) => Failure::fatal(
                ErrorKind::Corrupt,
                format!("the file was changed on the server ({how}): unmount, and mount again"),
            ),
            Misfit::NoRanges(how) => Failure::fatal(
                ErrorKind::Unsupported,
                format!("the server does not send ranges: {how}; download the file instead"),
            ),
            Misfit::TooLong(len) => Failure::fatal(
                ErrorKind::Unsupported,
                format!(
                    "the server says that the file has {len} bytes, which is more than any disk: check the address"
                ),
            ),
            Misfit::Page if session.is_some_and(|generation| self.session.expired(generation)) => self.ended(),
            Misfit::Page => Failure::fatal(
                ErrorKind::Unsupported,
                "the server sent a web page: the address is that of a folder or of a login page",
            ),
            Misfit::Wrong(how) => Failure::retry(format!("the answer does not fit the request: {how}")),
        }
    }
}

impl Drop for Client {
    fn drop(&mut self) {
        if let Some(cookie) = self.session.take() {
            log_out(&self.transport, &self.origin, &cookie);
        }
    }
}

/// Returns the headers of `header=`.
fn headers_of(server: &HttpsServer) -> Result<HeaderMap> {
    let mut headers = HeaderMap::new();
    for (name, value) in &server.headers {
        let invalid = || {
            Error::new(
                ErrorKind::Usage,
                format!("header=: {name:?} is not a header that HTTP can send"),
            )
        };
        let mut value = HeaderValue::from_bytes(value.reveal().as_bytes()).map_err(|_e| invalid())?;
        value.set_sensitive(true);
        headers.append(HeaderName::from_bytes(name.as_bytes()).map_err(|_e| invalid())?, value);
    }
    Ok(headers)
}

/// Pauses, but no longer than the limits allow.
fn sleep(pause: Duration, limits: Limits<'_>) -> Result<(), Trouble> {
    let end = Instant::now() + pause;
    loop {
        limits.check()?;
        let left = end.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Ok(());
        }
        std::thread::sleep(left.min(TICK));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_absent_file_in_one_form_of_its_address_is_the_answer() {
        let error = |kind| Error::new(kind, "x");
        for (first, second, reported) in [
            (ErrorKind::Busy, ErrorKind::NotFound, ErrorKind::NotFound),
            (ErrorKind::NotFound, ErrorKind::Busy, ErrorKind::NotFound),
            (ErrorKind::Busy, ErrorKind::Busy, ErrorKind::Busy),
        ] {
            let failed = of_forms(of_forms(None, error(first)), error(second));
            assert_eq!(failed.unwrap().kind(), reported);
        }
        assert!(!may_be_wrong_form(&error(ErrorKind::Policy)));
    }
}
