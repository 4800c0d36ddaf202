//! HTTP by a library: HTTP/2, and requests through a proxy.
//!
//! Its sockets are served by the two threads of a private runtime; the calling threads wait for their own requests, in
//! steps of a [`TICK`].
//!
//! HTTP/2 has one connection for all requests of a client of the library, and a server limits what one connection carries.
//! There are therefore several such clients, which take turns.

use std::net::{IpAddr, SocketAddr};
use std::pin::pin;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use reqwest::Response;
use rustls::ClientConfig;
use tokio::runtime::Runtime;
use tokio::time::timeout;

use super::http1::MAX_IDLE;
use super::request::{AnswerHead, Limits, Piece, Request, TICK, Trouble};
use super::trust::with_causes;
use super::wire::{KEEPALIVE, UNCONFIRMED};
use crate::config::Secret;
use crate::error::{Error, ErrorKind, Result};
use crate::store::printable;

/// Clients of HTTP/2, each with a connection.
const HTTP2_CLIENTS: usize = 4;
/// Bytes of an answer that an HTTP/2 server may send without a confirmation: more than a fast line has in flight in
/// 100 ms.
const STREAM_WINDOW: u32 = 16 << 20;
/// The same for all answers of a connection.
const CONNECTION_WINDOW: u32 = 64 << 20;

/// Settings of the library.
pub(super) struct LibraryOptions<'a> {
    pub(super) tls: ClientConfig,
    pub(super) http2: bool,
    pub(super) proxy: Option<&'a Secret>,
    pub(super) resolve: &'a [(String, IpAddr)],
    pub(super) connections: usize,
    /// Longest time to connect.
    pub(super) connect: Duration,
    pub(super) user_agent: &'static str,
}

/// Clients of the library.
#[derive(Debug)]
pub(super) struct Library {
    clients: Vec<reqwest::Client>,
    /// Number of requests so far.
    turn: AtomicUsize,
    connect: Duration,
}

impl Library {
    /// Sets up the library. Errors: `Usage` for the address of a proxy that is none.
    pub(super) fn new(options: &LibraryOptions<'_>) -> Result<Self> {
        let number = if options.http2 { HTTP2_CLIENTS } else { 1 };
        let clients = (0..number).map(|_| client_of(options)).collect::<Result<_>>()?;
        Ok(Self {
            clients,
            turn: AtomicUsize::new(0),
            connect: options.connect,
        })
    }

    /// Sends a request, and waits for the head of the answer.
    pub(super) fn send(&self, request: &Request<'_>, limits: Limits<'_>) -> Result<(AnswerHead, LibraryBody), Trouble> {
        // In turn, and not to the least loaded: a client of HTTP/2 has one connection, and all requests are about as long.
        let turn = self.turn.fetch_add(1, Ordering::Relaxed);
        let Some(client) = self.clients.get(turn % self.clients.len().max(1)) else {
            return Err(Trouble::Unreachable("no client".to_owned()));
        };
        let sent = client
            .request(request.method.clone(), request.url.clone())
            .headers(request.headers.clone())
            .body(request.body.to_vec())
            .send();
        let answer = wait(sent, limits)?.map_err(|e| {
            let (connecting, timed_out) = (e.is_connect(), e.is_timeout());
            // The address of the request may hold a token in its query.
            let text = printable(with_causes(&e.without_url()));
            match (connecting, timed_out) {
                (true, true) => Trouble::Unreachable(format!("no connection within {} s", self.connect.as_secs())),
                (true, false) => Trouble::Unreachable(format!("connecting failed: {text}")),
                _ => Trouble::Broken(text),
            }
        })?;
        let head = AnswerHead {
            status: answer.status(),
            headers: answer.headers().clone(),
        };
        Ok((head, LibraryBody(answer)))
    }
}

/// Body of an answer that the library receives.
pub(super) struct LibraryBody(Response);

impl LibraryBody {
    /// Reads the next piece. Returns false at the end of the body.
    pub(super) fn read(&mut self, limits: Limits<'_>, piece: Piece<'_>) -> Result<bool, Trouble> {
        match wait(self.0.chunk(), limits)? {
            Ok(Some(chunk)) => {
                piece(&chunk);
                Ok(true)
            }
            Ok(None) => Ok(false),
            Err(e) => Err(Trouble::Broken(printable(with_causes(&e.without_url())))),
        }
    }
}

/// Waits for the result of a future within the limits.
fn wait<T>(future: impl Future<Output = T>, limits: Limits<'_>) -> Result<T, Trouble> {
    let runtime = runtime().map_err(|e| Trouble::Unreachable(e.to_string()))?;
    runtime.block_on(async {
        let mut future = pin!(future);
        loop {
            // In short waits, as the library knows nothing of a file that is closed meanwhile.
            match timeout(TICK, &mut future).await {
                Ok(result) => return Ok(result),
                Err(_) => limits.check()?,
            }
        }
    })
}

fn client_of(options: &LibraryOptions<'_>) -> Result<reqwest::Client> {
    let mut tls = options.tls.clone();
    let mut builder = reqwest::Client::builder();
    if options.http2 {
        tls.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
        builder = builder
            .http2_initial_stream_window_size(STREAM_WINDOW)
            .http2_initial_connection_window_size(CONNECTION_WINDOW)
            .http2_keep_alive_interval(KEEPALIVE)
            .http2_keep_alive_timeout(UNCONFIRMED);
    } else {
        builder = builder.http1_only();
    }
    builder = builder
        .tls_backend_preconfigured(tls)
        // Neither proxies of the environment nor redirects by the library: both could send credentials to another host.
        .no_proxy()
        .redirect(reqwest::redirect::Policy::none())
        .referer(false)
        .connect_timeout(options.connect)
        .pool_max_idle_per_host(options.connections)
        .pool_idle_timeout(MAX_IDLE)
        .tcp_keepalive(KEEPALIVE)
        .tcp_user_timeout(UNCONFIRMED)
        .user_agent(options.user_agent);
    for (name, address) in options.resolve {
        // Port 0: that of the URL.
        builder = builder.resolve(name, SocketAddr::new(*address, 0));
    }
    if let Some(proxy) = options.proxy {
        builder = builder.proxy(proxy_of(proxy)?);
    }
    builder
        .build()
        .map_err(|e| Error::new(ErrorKind::Unsupported, format!("HTTPS: {}", with_causes(&e))))
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
