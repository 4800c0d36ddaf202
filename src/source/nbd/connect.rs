//! Connector: makes connections to one server, from the address to the end of the handshake.
//!
//! ```text
//!   new ─ tls, export, contexts ─ connect ─► negotiating ─┬─ opt_go ────────────► up: a disk
//!                                                         └─ opt_list, opt_info ► `--list`, `--info`
//! ```
//! libnbd is asynchronous: each call starts a transition, and `poll_sockets` polls the descriptor of the handle until
//! the transition has ended. One deadline bounds all transitions of an attempt together, also those within one call
//! (`ffi/handshake.rs`), and a callback can cancel the attempt between two calls.
//!
//! A server of the oldest protocol variant has no options: its handle is up at once, with the one export that it has.

use std::ffi::{CStr, CString, OsStr};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use super::captive::CaptiveServer;
use super::connection::is_loss;
use super::export::Export;
use super::ffi::{Handle, HandshakeLimit, List, Listed, OptDone, c_text, failure, library};
use super::own_server::{Cancel, OwnServer, never};
use super::private_dir::PrivateDir;
use super::tls;
use crate::config::{NbdAddress, NbdConfig, NbdTls, SourceSettings};
use crate::error::{Error, ErrorKind, Result};
use crate::mutex::lock;
use crate::process::handed_over;
use crate::source::nbd_uri;

/// Port of an address that names none (IANA).
const DEFAULT_PORT: u32 = 10809;

/// Time to wait after a failure for the exit of a captive server, so that the error can report its status and output.
const EXIT_WAIT: Duration = Duration::from_millis(200);

/// Interval at which an attempt checks if it was cancelled.
const CANCEL_INTERVAL: Duration = Duration::from_millis(100);

/// Makes connections to one server, and owns the server if this process started it.
#[derive(Debug)]
pub(super) struct Connector {
    config: NbdConfig,
    /// The server that this process started, shared by the connectors for its exports.
    server: Option<Arc<dyn OwnServer>>,
    /// The connected socket of `socket-fd=`, until it is used.
    socket: Mutex<Option<OwnedFd>>,
    /// Set once a connection to the server was encrypted, and shared by the connectors for its exports: from then on no
    /// connection may be plain.
    encrypted: Arc<AtomicBool>,
}

impl Connector {
    /// Creates a connector for the server of `config`. Starts a captive server, and takes the socket of `socket-fd=`.
    pub(super) fn new(config: &NbdConfig) -> Result<Self> {
        // Before a server is started that no client could be made for.
        library().map_err(|e| e.within(config.label()))?;
        let server: Option<Arc<dyn OwnServer>> = match &config.address {
            NbdAddress::Command(words) => Some(Arc::new(CaptiveServer::start(words)?)),
            _ => None,
        };
        let socket = match config.address {
            NbdAddress::Fd(number) => Some(handed_over::take(number).ok_or_else(|| {
                let text = format!(
                    "socket-fd={number}: not a socket that was passed to this process (3 or higher), or used already"
                );
                Error::new(ErrorKind::Usage, text)
            })?),
            _ => None,
        };
        tls::warn_if_unverified(config);
        Ok(Self {
            config: config.clone(),
            server,
            socket: Mutex::new(socket),
            encrypted: Arc::default(),
        })
    }

    /// Creates a connector for a server that was started already.
    pub(super) fn to_own(server: Arc<dyn OwnServer>, config: NbdConfig) -> Result<Self> {
        library().map_err(|e| e.within(config.label()))?;
        Ok(Self {
            config,
            server: Some(server),
            socket: Mutex::default(),
            encrypted: Arc::default(),
        })
    }

    /// Creates a connector for another export of the same server.
    pub(super) fn for_export(&self, name: &OsStr) -> Self {
        let config = NbdConfig {
            export: Some(name.to_owned()),
            ..self.config.clone()
        };
        Self {
            config,
            server: self.server.clone(),
            socket: Mutex::default(),
            encrypted: Arc::clone(&self.encrypted),
        }
    }

    /// Tells a server of this process that connections to it are about to be closed.
    pub(super) fn closing(&self) {
        if let Some(server) = &self.server {
            server.closing();
        }
    }

    /// Returns the server and the export, for messages.
    pub(super) fn label(&self) -> String {
        self.config.label()
    }

    /// Returns true if more than one connection can be made: not with a socket that was passed to this process.
    pub(super) fn can_repeat(&self) -> bool {
        !matches!(self.config.address, NbdAddress::Fd(_))
    }

    /// Connects and opens the export. Returns a handle that commands can be sent on.
    ///
    /// `status`: asks for block status on this connection. Fails once `deadline` has passed or `cancel` returns true.
    pub(super) fn open(&self, status: bool, deadline: Instant, cancel: Cancel<'_>) -> Result<(Handle, Export)> {
        let mut handle = self.negotiate(status, deadline, cancel)?;
        // The oldest protocol variant has no options: there is one export, and it is open.
        if !handle.is_up() {
            let opt = handle.opt_go().map_err(|e| self.failed(e))?;
            self.wait_option(&mut handle, &opt, deadline, cancel)?;
            // The reply to the option arrives before the state machine of the handle is ready for commands.
            self.poll_sockets(&mut handle, deadline, cancel, |h| h.is_up())?;
        }
        handle.end_handshake()?;
        let export = Export::of(&handle).map_err(|e| self.failed(e))?;
        Ok((handle, export))
    }

    /// Connects up to the state in which options can be sent; a handle of the oldest protocol variant is up instead.
    pub(super) fn negotiate(&self, status: bool, deadline: Instant, cancel: Cancel<'_>) -> Result<Handle> {
        let mut handle = Handle::new()?;
        let required = self.encrypted.load(Ordering::SeqCst);
        let trusted = self.prepare(&handle, status, required).map_err(|e| self.failed(e))?;
        self.connect(
            &handle,
            (trusted.as_ref().map(PrivateDir::path), status),
            deadline,
            cancel,
        )
        .map_err(|e| self.failed(e))?;
        self.poll_sockets(&mut handle, deadline, cancel, |h| h.is_negotiating() || h.is_up())?;
        tls::check(&handle, &self.config, required).map_err(|e| self.failed(e))?;
        if handle.is_encrypted() {
            self.encrypted.store(true, Ordering::SeqCst);
        }
        // Connecting to a URI sets the export that the URI names, even to an empty one. `export=` has priority.
        if let (Some(name), NbdAddress::Uri(_)) = (&self.config.export, &self.config.address) {
            handle.set_export(&c_text(name.as_bytes())?)?;
        }
        Ok(handle)
    }

    /// Sets all options that must be set before the handle connects. Returns the folder of the trusted certificates.
    fn prepare(&self, handle: &Handle, status: bool, required: bool) -> Result<Option<PrivateDir>> {
        handle.set_block_status(status)?;
        let trusted = tls::prepare(handle, &self.config, required)?;
        if let Some(name) = &self.config.export {
            handle.set_export(&c_text(name.as_bytes())?)?;
        }
        Ok(trusted)
    }

    fn connect(
        &self,
        handle: &Handle,
        (trusted, first): (Option<&Path>, bool),
        deadline: Instant,
        cancel: Cancel<'_>,
    ) -> Result<()> {
        match &self.config.address {
            NbdAddress::Uri(uri) => {
                // libnbd takes the certificates of the URI's last parameter, whatever was set before.
                let uri = match trusted {
                    Some(dir) => nbd_uri::with_parameter(uri, "tls-certificates", dir),
                    None => uri.clone(),
                };
                handle.connect_uri(&c_text(uri.as_bytes())?, self.config.tls != NbdTls::Off)
            }
            NbdAddress::Tcp { host, port } => {
                let port = port.clone().unwrap_or_else(|| DEFAULT_PORT.to_string());
                handle.connect_tcp(&c_text(host.as_bytes())?, &c_text(port.as_bytes())?)
            }
            NbdAddress::Unix(path) => handle.connect_unix(&c_text(path.as_os_str().as_bytes())?),
            NbdAddress::Vsock { cid, port } => handle.connect_vsock(*cid, port.unwrap_or(DEFAULT_PORT)),
            NbdAddress::Fd(_) => match lock(&self.socket).take() {
                Some(socket) => handle.connect_socket(socket),
                None => Err(lost(
                    "the socket of socket-fd= is used up, and another connection can't be made",
                )),
            },
            NbdAddress::Command(_) | NbdAddress::Own(_) => match &self.server {
                Some(server) => handle.connect_socket(server.connect(first, deadline, cancel)?),
                None => Err(lost("the server was not started")),
            },
        }
    }

    /// Returns the exports that the server lists, each with its description, and the number of those beyond the limits.
    pub(super) fn list(&self, deadline: Instant) -> Result<(Vec<(CString, CString)>, usize)> {
        let mut handle = self.negotiate(true, deadline, &never)?;
        if handle.is_up() {
            // The oldest protocol variant has no list, and one export without a name.
            handle.disconnect();
            return Ok((vec![(CString::default(), CString::default())], 0));
        }
        let (opt, listed) = handle.opt_list().map_err(|e| self.failed(e))?;
        self.wait_option(&mut handle, &opt, deadline, &never)
            .map_err(|e| e.within("listing the exports"))?;
        handle.opt_abort();
        Ok(with_list(&listed, |list| {
            (std::mem::take(&mut list.entries), list.dropped)
        }))
    }

    /// Returns the warning for a list whose last `dropped` exports are left out.
    pub(super) fn left_out(&self, dropped: usize, accepted: usize) -> String {
        format!(
            "{}: the server lists more exports than are accepted: {dropped} after the first {accepted} are left out; \
             name one by export=",
            self.label()
        )
    }

    /// Returns the properties of the export of that name. `handle` must be negotiating, or up with the one export of the
    /// oldest protocol variant.
    pub(super) fn info(&self, handle: &mut Handle, name: &CStr, deadline: Instant) -> Result<Export> {
        if handle.is_up() {
            return Export::of(handle);
        }
        handle.set_export(name)?;
        let opt = handle.opt_info().map_err(|e| self.failed(e))?;
        self.wait_option(handle, &opt, deadline, &never)?;
        Export::of(handle)
    }

    /// Returns the names of the metadata contexts of the export that is set on the handle.
    pub(super) fn contexts(&self, handle: &mut Handle, deadline: Instant) -> Result<Vec<String>> {
        // Without a context in the query the server lists all of them.
        handle.clear_contexts()?;
        let (opt, listed) = handle.opt_contexts()?;
        self.wait_option(handle, &opt, deadline, &never)?;
        let text = |(name, _): &(CString, CString)| name.to_string_lossy().into_owned();
        Ok(with_list(&listed, |list| list.entries.iter().map(text).collect()))
    }

    /// Waits for the reply to an option. Errors: the server refused it, or the connection ended.
    fn wait_option(&self, handle: &mut Handle, opt: &OptDone, deadline: Instant, cancel: Cancel<'_>) -> Result<()> {
        self.poll_sockets(handle, deadline, cancel, |h| {
            opt.get().is_some() && (h.is_negotiating() || h.is_up() || h.is_over())
        })?;
        if let Some(e) = limit_error(handle, Duration::MAX) {
            return Err(self.failed(e));
        }
        match opt.get() {
            Some(0) => Ok(()),
            Some(errno) if !is_loss(errno) => {
                let e = std::io::Error::from_raw_os_error(errno);
                let message = match errno {
                    libc::ENOENT => "the server has no such export",
                    _ => "the server refuses the export",
                };
                Err(self.failed(Error::io(message, e)))
            }
            _ => Err(self.failed(lost("the server closed the connection"))),
        }
    }

    /// Polls the descriptor of the handle and lets libnbd read and write, until `until` returns true.
    fn poll_sockets(
        &self,
        handle: &mut Handle,
        deadline: Instant,
        cancel: Cancel<'_>,
        until: impl Fn(&Handle) -> bool,
    ) -> Result<()> {
        // libnbd also returns an error for an option that the server refused, which leaves the connection usable and is
        // reported by its callback. So an error counts only if the connection turns out to be dead.
        let mut last_error = None;
        loop {
            if until(handle) {
                return Ok(());
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if let Some(e) = limit_error(handle, left) {
                return Err(self.failed(e));
            }
            if handle.is_over() {
                return Err(self.failed(last_error.unwrap_or_else(|| lost("the server closed the connection"))));
            }
            if cancel() {
                return Err(self.failed(lost("the attempt was cancelled")));
            }
            let (readable, writable) = wait(handle, left.min(CANCEL_INTERVAL))?;
            handle.limit_handshake(deadline).map_err(|e| self.failed(e))?;
            // One event at a time: after it the handle may wait for something else.
            let notified = match (readable, writable, handle.direction()) {
                (true, _, (true, _)) => handle.readable(),
                (_, true, (_, true)) => handle.writable(),
                _ => Ok(()),
            };
            if let Err(e) = notified {
                last_error = Some(e);
            } else if handle.is_over() {
                // The call itself succeeds when the server ends the handshake, but libnbd has set an error text.
                last_error = Some(failure("connection"));
            }
        }
    }

    fn failed(&self, e: Error) -> Error {
        // A captive server that fails closes the connection before it exits.
        let exit = self.server.as_ref().and_then(|s| s.exit_within(EXIT_WAIT));
        match exit {
            // The report of our own process is a whole message, and the lost connection only its consequence.
            Some(report) if matches!(self.config.address, NbdAddress::Own(_)) => Error::new(e.kind(), report),
            Some(report) => e.within(format!("{} ({report})", self.label())),
            None => e.within(self.label()),
        }
    }
}

/// Returns the error of a handshake that has exceeded a limit, or whose deadline is `left` from now, zero if it passed.
fn limit_error(handle: &Handle, left: Duration) -> Option<Error> {
    let message = match handle.exceeded() {
        Some(HandshakeLimit::Turns) => {
            let text = "the handshake has no end: the server sends more replies than any server needs; check that the \
                        address is that of an NBD server";
            return Some(Error::corrupt(text));
        }
        None if !left.is_zero() => return None,
        None if handle.is_connecting() => "connecting timed out",
        _ => "handshake timed out",
    };
    Some(Error::new(ErrorKind::Os(libc::ETIMEDOUT), message))
}

/// Waits up to `max_wait` until the descriptor is ready in a direction that the handle waits for. Returns if it is
/// readable and if it is writable.
fn wait(handle: &mut Handle, max_wait: Duration) -> Result<(bool, bool)> {
    let (read, write) = handle.direction();
    let Some(fd) = handle.fd() else {
        return Ok((false, false));
    };
    let mut events = PollFlags::empty();
    events.set(PollFlags::POLLIN, read);
    events.set(PollFlags::POLLOUT, write);
    let mut polled = [PollFd::new(fd.as_fd(), events)];
    // Rounded up: a wait below a millisecond would otherwise spin.
    let timeout = PollTimeout::try_from(max_wait.as_millis() + 1).unwrap_or(PollTimeout::MAX);
    match poll(&mut polled, timeout) {
        Ok(_) | Err(Errno::EINTR) => {}
        Err(e) => return Err(Error::io("poll", e.into())),
    }
    let revents = polled[0].revents().unwrap_or(PollFlags::empty());
    // libnbd finds the cause of an error in its next read or write.
    let broken = revents.intersects(PollFlags::POLLERR | PollFlags::POLLHUP | PollFlags::POLLNVAL);
    Ok((
        revents.contains(PollFlags::POLLIN) || (broken && read),
        revents.contains(PollFlags::POLLOUT) || (broken && write),
    ))
}

fn with_list<T>(listed: &Listed, use_it: impl FnOnce(&mut List) -> T) -> T {
    use_it(&mut lock(listed))
}

fn lost(what: &str) -> Error {
    Error::new(ErrorKind::Os(libc::ENOTCONN), what)
}
