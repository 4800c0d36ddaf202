//! Requests to one server: connections, limits of time, retries.
//!
//! ```text
//!   read ─► attempt ─► slot ─► authorization ─► headers checked ─► body, piece by piece ─► the caller
//!             ▲                                                      │
//!             └── pause ◄── cut, stalled, refused for now ◄──────────┘   the rest of the range alone is asked for again
//! ```
//! The callers are threads of the cache and of the mount, which wait; requests and sockets are served by the two threads of
//! a private runtime. Three limits of time stand apart: to connect, to the first byte of an answer (a vCenter may need half
//! an hour), and between two pieces of a body. All attempts of a request together have `timeout=`.
//!
//! Bounds against a hostile server: at most [`MAX_REDIRECTS`] redirects, never to plain HTTP and never with credentials to
//! another host; error texts are read up to [`MAX_ERROR_TEXT`]; a body that is longer than its range ends the request.

use std::future::poll_fn;
use std::net::SocketAddr;
use std::ops::Range;
use std::pin::pin;
use std::sync::mpsc::{Receiver, sync_channel};
use std::sync::{Arc, Mutex, OnceLock, PoisonError, Weak};
use std::task::Poll;
use std::time::{Duration, Instant};

use reqwest::header::{ACCEPT_ENCODING, AUTHORIZATION, CONTENT_TYPE, COOKIE, HeaderMap, HeaderName, HeaderValue};
use reqwest::header::{IF_RANGE, LOCATION, RANGE};
use reqwest::{Response, StatusCode, Url};
use tokio::runtime::Runtime;
use tokio::sync::{SemaphorePermit, watch};
use tokio::time::timeout;

use super::address::{Address, ESXI_DATACENTER};
use super::answer::{self, Misfit, Version};
use super::failure::{Failure, Next, pause_before};
use super::session::{Authorization, Session};
use super::slots::Slots;
use super::trust::{self, Refusal, with_causes};
use crate::config::{HttpsAddress, HttpsConfig, HttpsServer, Secret};
use crate::error::{Error, ErrorKind, Result};
use crate::store::printable;

/// Default number of connections: an ESXi limits each connection, and more than eight gain little.
const CONNECTIONS: usize = 8;
/// Default deadline of a request.
const TIMEOUT: Duration = Duration::from_secs(60);
/// Default deadline of a request to a vCenter, whose first byte can take that long (virt-v2v's limit).
const VCENTER_TIMEOUT: Duration = Duration::from_secs(2000);
/// Longest time to connect, including the TLS handshake.
const CONNECT: Duration = Duration::from_secs(15);
/// Longest time between two pieces of a body.
const STALL: Duration = Duration::from_secs(20);
/// Deadline of the logout, which no one depends on.
const LOGOUT: Duration = Duration::from_secs(5);

const MAX_REDIRECTS: u32 = 5;
/// Bytes of the text of an error answer that are read.
const MAX_ERROR_TEXT: usize = 4096;
/// Logins that replace an ended session, for one request.
const MAX_LOGINS: u32 = 2;
/// Retries at the start of errors that are not those of reaching the server.
const START_RETRIES: u32 = 3;

/// One server with one login.
pub(super) struct Client {
    http: reqwest::Client,
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
}

impl std::fmt::Debug for Client {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Client")
            .field("origin", &self.origin.as_str())
            .field("session", &self.session)
            .finish_non_exhaustive()
    }
}

/// Takes the bytes of a range, in order and each once.
pub(super) type Sink = Box<dyn FnMut(&[u8]) + Send>;

/// Range of a file to read.
pub(super) struct Ask {
    pub(super) address: Address,
    /// Form of the query.
    pub(super) form: usize,
    /// Where the server has redirected an earlier request to.
    pub(super) moved: Arc<Mutex<Option<Url>>>,
    pub(super) range: Range<u64>,
    /// Version of the file at its open; `None` for the open itself.
    pub(super) known: Option<Version>,
    /// Becomes true when the file is closed, which ends the request.
    pub(super) closing: Option<watch::Receiver<bool>>,
}

/// Clients in use: disks of the same server share one.
static CLIENTS: Mutex<Vec<(HttpsServer, Url, Weak<Client>)>> = Mutex::new(Vec::new());

impl Client {
    /// Returns the client of a server: that of another disk with the same server and settings, or a new one.
    pub(super) fn of(config: &HttpsConfig, origin: &Url) -> Result<Arc<Self>> {
        let mut clients = CLIENTS.lock().unwrap_or_else(PoisonError::into_inner);
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
        let is_vcenter = matches!(
            &config.address,
            HttpsAddress::Datastore { datacenter: Some(name), .. } if name != ESXI_DATACENTER
        );
        let default = if is_vcenter { VCENTER_TIMEOUT } else { TIMEOUT };
        let timeout = server.timeout.unwrap_or(default);
        let connections = server.connections.unwrap_or(CONNECTIONS);
        let mut builder = reqwest::Client::builder()
            .tls_backend_preconfigured(tls)
            .http1_only()
            .no_proxy()
            .redirect(reqwest::redirect::Policy::none())
            .referer(false)
            .connect_timeout(CONNECT.min(timeout))
            .pool_max_idle_per_host(connections)
            .tcp_keepalive(Duration::from_secs(15))
            .user_agent(concat!(env!("CARGO_PKG_NAME"), "/", env!("CARGO_PKG_VERSION")));
        for (name, address) in &server.resolve {
            // Port 0: that of the URL.
            builder = builder.resolve(name, SocketAddr::new(*address, 0));
        }
        if let Some(proxy) = &server.proxy {
            builder = builder.proxy(proxy_of(proxy)?);
        }
        let http = builder
            .build()
            .map_err(|e| Error::new(ErrorKind::Unsupported, format!("HTTPS: {}", with_causes(&e))))?;
        Ok(Self {
            http,
            session: Session::new(server)?,
            headers: headers_of(server)?,
            refusal,
            slots: Slots::new(connections),
            timeout,
            retry: server.retry,
            origin: origin.clone(),
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

    /// Starts to read a range, whose bytes go to `sink`. The receiver gets the version of the file, or the error, once the
    /// sink is dropped.
    ///
    /// The sink runs on the threads that serve the sockets: a thread that waited for each piece of a body would be woken
    /// for every TLS record, which costs more than the decryption.
    ///
    /// Errors: `NotFound`, `Busy` for a locked file, `Corrupt` for a file that has changed, and otherwise why the server
    /// did not send the range within the deadline.
    pub(super) fn start(self: &Arc<Self>, ask: Ask, mut sink: Sink) -> Result<Receiver<Result<Version>>> {
        let (sender, receiver) = sync_channel(1);
        let client = Arc::clone(self);
        runtime()?.spawn(async move {
            let read = client.read_with_retries(&ask, &mut *sink);
            let result = match ask.closing.clone() {
                Some(closing) => until_closed(closing, read).await,
                None => read.await,
            };
            drop(sink);
            // Before the caller gets the result, and may drop its own: the last drop logs out, and waits for that.
            drop(client);
            let _ = sender.send(result);
        });
        Ok(receiver)
    }

    async fn read_with_retries(&self, ask: &Ask, sink: &mut (dyn FnMut(&[u8]) + Send)) -> Result<Version> {
        let deadline = Instant::now() + self.timeout;
        let (mut done, mut tries, mut logins) = (0, 0u32, 0u32);
        loop {
            let before = done;
            let left = deadline.saturating_duration_since(Instant::now());
            let attempt = self.attempt(ask, &mut done, sink);
            let failure = match timeout(left, attempt).await {
                Ok(Ok(version)) => return Ok(version),
                Ok(Err(failure)) => failure,
                Err(_) => {
                    let text = format!("no answer within {} s (timeout=)", self.timeout.as_secs());
                    return Err(Error::new(ErrorKind::Os(libc::EIO), text));
                }
            };
            if done > before {
                tries = 0;
            }
            tries += 1;
            let started = ask.known.is_some();
            let (most, wanted) = match failure.next {
                Next::GiveUp => return Err(failure.error),
                Next::Return => {
                    *ask.moved.lock().unwrap_or_else(PoisonError::into_inner) = None;
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
            if tries > self.retry.unwrap_or(most) || Instant::now() + pause >= deadline {
                return Err(failure.error);
            }
            tracing::debug!("{}: {}; trying again in {pause:?}", ask.address.label(), failure.error);
            tokio::time::sleep(pause).await;
        }
    }

    /// Asks once for what is missing of a range after its first `done` bytes.
    async fn attempt(
        &self,
        ask: &Ask,
        done: &mut u64,
        sink: &mut (dyn FnMut(&[u8]) + Send),
    ) -> Result<Version, Failure> {
        let slot = self.slots.acquire().await;
        let moved = ask.moved.lock().unwrap_or_else(PoisonError::into_inner).clone();
        let was_moved = moved.is_some();
        let mut url = moved.unwrap_or_else(|| ask.address.url(ask.form));
        let start = ask.range.start + *done;
        for _ in 0..=MAX_REDIRECTS {
            let (answer, authorization) = self.send(&url, start..ask.range.end, ask.known.as_ref()).await?;
            let status = answer.status();
            if status.is_redirection() && status != StatusCode::NOT_MODIFIED {
                url = self.redirected(&url, &answer, &authorization)?;
                continue;
            }
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
                return self.explain(ask, answer, authorization, slot).await;
            }
            let session = match &authorization {
                Authorization::Cookie(_, generation) => Some(*generation),
                _ => None,
            };
            // From here on other requests can use the login.
            drop(authorization);
            if !same_origin(&url, &self.origin) {
                *ask.moved.lock().unwrap_or_else(PoisonError::into_inner) = Some(url);
            }
            let version = self.body(ask, answer, session, done, sink).await?;
            self.slots.succeeded();
            return Ok(version);
        }
        Err(Failure::fatal(
            ErrorKind::Os(libc::ELOOP),
            format!("more than {MAX_REDIRECTS} redirects"),
        ))
    }

    /// Sends one request and waits for the headers of its answer.
    async fn send(
        &self,
        url: &Url,
        range: Range<u64>,
        known: Option<&Version>,
    ) -> Result<(Response, Authorization<'_>), Failure> {
        let mut request = self
            .http
            .get(url.clone())
            .header(RANGE, format!("bytes={}-{}", range.start, range.end - 1))
            .header(ACCEPT_ENCODING, "identity");
        if let Some(etag) = known.and_then(Version::if_range) {
            request = request.header(IF_RANGE, etag);
        }
        let authorization = if same_origin(url, &self.origin) {
            // May hold tokens, as credentials do.
            request = request.headers(self.headers.clone());
            self.session.authorize().await?
        } else {
            Authorization::Anonymous
        };
        request = match &authorization {
            Authorization::Anonymous => request,
            Authorization::Cookie(cookie, _) => request.header(COOKIE, cookie.clone()),
            Authorization::Basic(basic) | Authorization::Login { basic, .. } => {
                request.header(AUTHORIZATION, basic.clone())
            }
        };
        let answer = request.send().await.map_err(|e| self.unreachable(e))?;
        if let Authorization::Login { .. } = authorization {
            let status = answer.status();
            let accepted =
                status.is_success() || status == StatusCode::NOT_FOUND || status == StatusCode::RANGE_NOT_SATISFIABLE;
            self.session.logged_in(answer.headers(), accepted);
        }
        Ok((answer, authorization))
    }

    /// Explains a request that got no answer.
    fn unreachable(&self, error: reqwest::Error) -> Failure {
        let refusal = self.refusal.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(refusal) = refusal.filter(|_| error.is_connect()) {
            return Failure::fatal(ErrorKind::Os(libc::EACCES), refusal);
        }
        let (connecting, timed_out) = (error.is_connect(), error.is_timeout());
        let text = printable(with_causes(&error.without_url()));
        match (connecting, timed_out) {
            (true, true) => Failure::new(
                Next::Reconnect,
                ErrorKind::Os(libc::EIO),
                format!("{}: no connection within {} s", self.host(), CONNECT.as_secs()),
            ),
            (true, false) => Failure::new(
                Next::Reconnect,
                ErrorKind::Os(libc::EIO),
                format!("{}: connecting failed: {text}", self.host()),
            ),
            _ => Failure::retry(format!("{}: {text}", self.host())),
        }
    }

    fn host(&self) -> String {
        let host = self.origin.host_str().unwrap_or_default();
        let port = self.origin.port_or_known_default().unwrap_or_default();
        format!("{host}:{port}")
    }

    /// Returns the target of a redirect.
    fn redirected(&self, from: &Url, answer: &Response, authorization: &Authorization<'_>) -> Result<Url, Failure> {
        // A server whose session has ended sends its login page.
        if let Authorization::Cookie(_, generation) = authorization
            && self.session.expired(*generation)
        {
            return Err(self.ended());
        }
        let location = answer.headers().get(LOCATION).and_then(|value| value.to_str().ok());
        let target = location.and_then(|location| from.join(location).ok());
        let Some(target) = target else {
            return Err(Failure::retry("a redirect without a valid address"));
        };
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
    async fn explain(
        &self,
        ask: &Ask,
        answer: Response,
        authorization: Authorization<'_>,
        slot: SemaphorePermit<'_>,
    ) -> Result<Version, Failure> {
        let (status, headers) = (answer.status(), answer.headers().clone());
        match status {
            StatusCode::UNAUTHORIZED => Err(self.login_needed(&authorization)),
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
                let text = error_text(answer).await;
                self.slots.lower(slot);
                let text = format!("the server is busy (status {}){text}", status.as_u16());
                let pause = answer::retry_after(&headers);
                Err(Failure::new(Next::Retry(pause), ErrorKind::Os(libc::EIO), text))
            }
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
                let text = error_text(answer).await;
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
    async fn body(
        &self,
        ask: &Ask,
        mut answer: Response,
        session: Option<u64>,
        done: &mut u64,
        sink: &mut (dyn FnMut(&[u8]) + Send),
    ) -> Result<Version, Failure> {
        let start = ask.range.start + *done;
        let checked = answer::check(
            answer.status(),
            answer.headers(),
            start,
            ask.range.end - start,
            ask.known.as_ref(),
        );
        let part = checked.map_err(|misfit| self.misfit(misfit, session))?;
        let mut left = part.len;
        loop {
            let chunk = match timeout(STALL.min(self.timeout), answer.chunk()).await {
                Ok(Ok(Some(chunk))) => chunk,
                Ok(Ok(None)) if left == 0 => return Ok(part.version),
                Ok(Ok(None)) => {
                    let text = format!("the answer ended {left} bytes early");
                    return Err(Failure::retry(text));
                }
                Ok(Err(e)) => {
                    let text = printable(with_causes(&e.without_url()));
                    return Err(Failure::retry(format!("the answer was cut {left} bytes early: {text}")));
                }
                Err(_) => {
                    let seconds = STALL.min(self.timeout).as_secs();
                    return Err(Failure::retry(format!(
                        "the answer stalled for {seconds} s, {left} bytes early"
                    )));
                }
            };
            left = left
                .checked_sub(chunk.len() as u64)
                .ok_or_else(|| Failure::retry("the answer is longer than the range that was asked for"))?;
            *done += chunk.len() as u64;
            sink(&chunk);
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
            Misfit::Page if session.is_some_and(|generation| self.session.expired(generation)) => self.ended(),
            Misfit::Page => Failure::fatal(
                ErrorKind::Unsupported,
                "the server sent a web page: the address is that of a folder or of a login page",
            ),
            Misfit::Wrong(how) => Failure::retry(format!("the answer does not fit the request: {how}")),
        }
    }

    /// Ends the session that this process began.
    fn log_out(&self) {
        let (Some(cookie), Ok(runtime)) = (self.session.take(), runtime()) else {
            return;
        };
        // The name of the session manager: that of a vCenter, then that of an ESXi.
        let ask = async {
            for manager in ["SessionManager", "ha-sessionmgr"] {
                if self.ask_to_log_out(&cookie, manager).await {
                    return true;
                }
            }
            false
        };
        // Within the runtime, as a timer cannot be created outside of it.
        match runtime.block_on(async { timeout(LOGOUT, ask).await }) {
            Ok(true) => tracing::debug!("{}: logged out", self.host()),
            _ => tracing::info!(
                "{}: the logout failed: the session ends by itself after some time",
                self.host()
            ),
        }
    }

    async fn ask_to_log_out(&self, cookie: &HeaderValue, manager: &str) -> bool {
        let body = format!(
            "<?xml version=\"1.0\" encoding=\"UTF-8\"?><soapenv:Envelope \
             xmlns:soapenv=\"http://schemas.xmlsoap.org/soap/envelope/\"><soapenv:Body><Logout xmlns=\"urn:vim25\">\
             <_this type=\"SessionManager\">{manager}</_this></Logout></soapenv:Body></soapenv:Envelope>"
        );
        let mut url = self.origin.clone();
        url.set_path("/sdk");
        let request = self
            .http
            .post(url)
            .header(COOKIE, cookie.clone())
            .header(CONTENT_TYPE, "text/xml; charset=utf-8")
            .header("SOAPAction", "urn:vim25")
            .body(body);
        request.send().await.is_ok_and(|answer| answer.status().is_success())
    }
}

impl Drop for Client {
    fn drop(&mut self) {
        self.log_out();
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

/// Returns the proxy of `proxy=`. The error does not show the address, which may hold a password.
fn proxy_of(address: &Secret) -> Result<reqwest::Proxy> {
    let invalid = |_e| {
        Error::new(
            ErrorKind::Usage,
            "proxy=: is not the http:// or https:// address of a proxy",
        )
    };
    reqwest::Proxy::all(address.reveal()).map_err(invalid)
}

/// Returns the runtime that serves the sockets. It is started after the daemon has forked, as it has threads.
fn runtime() -> Result<&'static Runtime> {
    static RUNTIME: OnceLock<Runtime> = OnceLock::new();
    if let Some(runtime) = RUNTIME.get() {
        return Ok(runtime);
    }
    let new = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .thread_name("https")
        .enable_all()
        .build()
        .map_err(|e| Error::io("starting the threads for HTTPS", e))?;
    Ok(RUNTIME.get_or_init(|| new))
}

/// Waits for `read`, but no longer than until the file is closed.
async fn until_closed<T>(mut closing: watch::Receiver<bool>, read: impl Future<Output = Result<T>>) -> Result<T> {
    let (mut read, mut closed) = (pin!(read), pin!(closing.wait_for(|closed| *closed)));
    poll_fn(|context| {
        if let Poll::Ready(result) = read.as_mut().poll(context) {
            return Poll::Ready(result);
        }
        let closed = closed.as_mut().poll(context);
        closed.map(|_| Err(Error::new(ErrorKind::Os(libc::ECANCELED), "the file was closed")))
    })
    .await
}

fn same_origin(a: &Url, b: &Url) -> bool {
    a.scheme() == b.scheme() && a.host_str() == b.host_str() && a.port_or_known_default() == b.port_or_known_default()
}

/// Returns the first line of the text of an error answer, after a colon; empty if there is none.
async fn error_text(mut answer: Response) -> String {
    let mut text = Vec::new();
    while let Ok(Ok(Some(chunk))) = timeout(STALL, answer.chunk()).await {
        text.extend_from_slice(&chunk);
        if text.len() > MAX_ERROR_TEXT {
            break;
        }
    }
    let text = String::from_utf8_lossy(&text);
    let line = text.lines().next().unwrap_or_default().trim();
    // A page in HTML says nothing in its first line.
    if line.is_empty() || line.starts_with('<') {
        return String::new();
    }
    format!(": {}", printable(line.chars().take(200).collect::<String>()))
}
