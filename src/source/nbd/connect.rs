//! From an address to a handle that is connected: the handshake, step by step, with a deadline for all of it.
//!
//! ```text
//!   new ─ tls, export, contexts ─ connect ─► negotiating ─┬─ opt_go ──────────► up (a disk)
//!                                                          └─ opt_list, opt_info ► a look at a server
//! ```

use std::ffi::{CStr, CString, OsStr};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use libnbd_sys as sys;
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use super::captive::Server;
use super::export::Export;
use super::ffi::{Handle, Listed, OptDone, adopt, failure};
use crate::config::{NbdAddress, NbdConfig, NbdTls};
use crate::error::{Error, ErrorKind, Result};

/// What a URI or an address without one means (IANA).
const DEFAULT_PORT: u32 = 10809;

/// How long after a failure the end of a server of ours is waited for, to be told what it said.
const LAST_WORDS: Duration = Duration::from_millis(200);

/// How often an attempt looks whether it is still wanted.
const STOP: Duration = Duration::from_millis(100);

/// Whether an attempt is not wanted any more.
pub(super) type Stop<'a> = &'a dyn Fn() -> bool;

/// Where a server is, and who answers there.
#[derive(Debug)]
pub(super) struct Connector {
    config: NbdConfig,
    /// The server that we run ourselves.
    server: Option<Arc<Server>>,
    /// The connection that was handed over, until it is used.
    socket: Mutex<Option<OwnedFd>>,
}

impl Connector {
    /// For the server of `config`; starts it, where it is a command.
    pub(super) fn new(config: &NbdConfig) -> Result<Self> {
        let server = match &config.address {
            NbdAddress::Command(words) => Some(Arc::new(Server::start(words)?)),
            _ => None,
        };
        let socket = match config.address {
            NbdAddress::Fd(number) => Some(adopt(number)?),
            _ => None,
        };
        Ok(Self {
            config: config.clone(),
            server,
            socket: Mutex::new(socket),
        })
    }

    /// The same server, for another export of it.
    pub(super) fn for_export(&self, name: &OsStr) -> Self {
        let config = NbdConfig {
            export: Some(name.to_owned()),
            ..self.config.clone()
        };
        Self {
            config,
            server: self.server.clone(),
            socket: Mutex::default(),
        }
    }

    /// For messages.
    pub(super) fn label(&self) -> String {
        self.config.label()
    }

    /// Whether a second connection, or a first one once more, can be made at all.
    pub(super) fn can_repeat(&self) -> bool {
        !matches!(self.config.address, NbdAddress::Fd(_))
    }

    /// Connects and opens the export.
    ///
    /// `status`: whether block status is wanted on this connection. `stop` ends the attempt.
    pub(super) fn open(&self, status: bool, deadline: Instant, stop: Stop<'_>) -> Result<(Handle, Export)> {
        let handle = self.negotiate(status, deadline, stop)?;
        // The oldest variant of the protocol has no options: there is one export, and it is open.
        if !handle.is_up() {
            let opt = handle.opt_go().map_err(|e| self.failed(e))?;
            self.option(&handle, &opt, deadline, stop)?;
            self.poll_sockets(&handle, deadline, stop, |h| h.is_up())?;
        }
        let export = Export::of(&handle).map_err(|e| self.failed(e))?;
        Ok((handle, export))
    }

    /// Connects up to where options can be sent.
    pub(super) fn negotiate(&self, status: bool, deadline: Instant, stop: Stop<'_>) -> Result<Handle> {
        let handle = Handle::new()?;
        let prepared = self.prepare(&handle, status).and_then(|()| self.connect(&handle));
        prepared.map_err(|e| self.failed(e))?;
        self.poll_sockets(&handle, deadline, stop, |h| h.is_negotiating() || h.is_up())?;
        if let (Some(name), NbdAddress::Uri(_)) = (&self.config.export, &self.config.address) {
            handle.set_export(&c_text(name.as_bytes())?)?;
        }
        Ok(handle)
    }

    fn prepare(&self, handle: &Handle, status: bool) -> Result<()> {
        let config = &self.config;
        handle.set_block_status(status)?;
        handle.set_tls(match config.tls {
            NbdTls::Off => sys::LIBNBD_TLS_DISABLE,
            NbdTls::On => sys::LIBNBD_TLS_ALLOW,
            NbdTls::Require => sys::LIBNBD_TLS_REQUIRE,
        })?;
        if let Some(dir) = &config.tls_certificates {
            handle.set_tls_certificates(&c_text(dir.as_os_str().as_bytes())?)?;
        }
        if let Some(verify) = config.tls_verify {
            handle.set_tls_verify(verify)?;
        }
        if let Some(name) = &config.tls_username {
            handle.set_tls_username(&c_text(name.as_bytes())?)?;
        }
        if let Some(file) = &config.tls_psk {
            handle.set_tls_psk(&c_text(file.as_os_str().as_bytes())?)?;
        }
        match &config.export {
            Some(name) => handle.set_export(&c_text(name.as_bytes())?),
            None => Ok(()),
        }
    }

    fn connect(&self, handle: &Handle) -> Result<()> {
        match &self.config.address {
            NbdAddress::Uri(uri) => handle.connect_uri(&c_text(uri.as_bytes())?),
            NbdAddress::Tcp { host, port } => {
                let port = port.clone().unwrap_or_else(|| DEFAULT_PORT.to_string());
                handle.connect_tcp(&c_text(host.as_bytes())?, &c_text(port.as_bytes())?)
            }
            NbdAddress::Unix(path) => handle.connect_unix(&c_text(path.as_os_str().as_bytes())?),
            NbdAddress::Vsock { cid, port } => handle.connect_vsock(*cid, port.unwrap_or(DEFAULT_PORT)),
            NbdAddress::Fd(_) => match self.socket.lock().unwrap_or_else(PoisonError::into_inner).take() {
                Some(socket) => handle.connect_socket(socket),
                None => Err(lost(
                    "the connection that was handed over is used up, and another one can't be made",
                )),
            },
            NbdAddress::Command(_) => match &self.server {
                Some(server) => handle.connect_socket(OwnedFd::from(server.connect()?)),
                None => Err(lost("its server was not started")),
            },
        }
    }

    /// The exports that the server lists.
    pub(super) fn list(&self, deadline: Instant) -> Result<Vec<(CString, CString)>> {
        let handle = self.negotiate(true, deadline, &never)?;
        let (opt, listed) = handle.opt_list().map_err(|e| self.failed(e))?;
        self.option(&handle, &opt, deadline, &never)
            .map_err(|e| e.within("listing the exports"))?;
        handle.opt_abort();
        Ok(taken(&listed))
    }

    /// What the server says of an export of that name, on a handle that is negotiating.
    pub(super) fn info(&self, handle: &Handle, name: &CStr, deadline: Instant) -> Result<Export> {
        handle.set_export(name)?;
        let opt = handle.opt_info().map_err(|e| self.failed(e))?;
        self.option(handle, &opt, deadline, &never)?;
        Export::of(handle)
    }

    /// The metadata contexts of the export that the handle names.
    pub(super) fn contexts(&self, handle: &Handle, deadline: Instant) -> Result<Vec<String>> {
        handle.clear_contexts()?;
        let (opt, listed) = handle.opt_contexts()?;
        self.option(handle, &opt, deadline, &never)?;
        Ok(taken(&listed)
            .into_iter()
            .map(|(name, _)| name.to_string_lossy().into_owned())
            .collect())
    }

    /// Waits for an option's answer.
    fn option(&self, handle: &Handle, opt: &OptDone, deadline: Instant, stop: Stop<'_>) -> Result<()> {
        self.poll_sockets(handle, deadline, stop, |h| {
            opt.get().is_some() && (h.is_negotiating() || h.is_up() || h.is_over())
        })?;
        match opt.get() {
            Some(0) => Ok(()),
            Some(errno) => {
                let e = std::io::Error::from_raw_os_error(errno);
                let what = match errno {
                    libc::ENOENT => "the server has no such export",
                    _ => "the server refuses the export",
                };
                Err(self.failed(Error::io(what, e)))
            }
            None => Err(self.failed(lost("the server closed the connection"))),
        }
    }

    /// Serves the handle's descriptor until `until` is true.
    fn poll_sockets(
        &self,
        handle: &Handle,
        deadline: Instant,
        stop: Stop<'_>,
        until: impl Fn(&Handle) -> bool,
    ) -> Result<()> {
        // An option that failed is told by its callback; only a dead connection ends the way.
        let mut last = None;
        loop {
            if until(handle) {
                return Ok(());
            }
            if handle.is_over() {
                return Err(self.failed(last.unwrap_or_else(|| lost("the server closed the connection"))));
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                let what = if handle.is_connecting() {
                    "no connection"
                } else {
                    "no end of the handshake"
                };
                return Err(self.failed(Error::new(ErrorKind::Os(libc::ETIMEDOUT), format!("{what} in time"))));
            }
            if stop() {
                return Err(self.failed(lost("the attempt was given up")));
            }
            let (readable, writable) = wait(handle, left.min(STOP))?;
            let went = match (readable, writable, handle.direction()) {
                (true, _, (true, _)) => handle.readable(),
                (_, true, (_, true)) => handle.writable(),
                _ => Ok(()),
            };
            if let Err(e) = went {
                last = Some(e);
            } else if handle.is_over() {
                // a refusal of the other side is no failure of the call, but told as one
                last = Some(failure("connection"));
            }
        }
    }

    fn failed(&self, e: Error) -> Error {
        let died = self.server.as_ref().and_then(|s| s.ending(LAST_WORDS));
        match died {
            Some(how) => e.within(format!("{} ({how})", self.label())),
            None => e.within(self.label()),
        }
    }
}

/// Waits until the descriptor is ready for what the handle waits for.
fn wait(handle: &Handle, most: Duration) -> Result<(bool, bool)> {
    let Some(fd) = handle.fd() else {
        return Ok((false, false));
    };
    let (read, write) = handle.direction();
    let mut events = PollFlags::empty();
    events.set(PollFlags::POLLIN, read);
    events.set(PollFlags::POLLOUT, write);
    let mut polled = [PollFd::new(fd.as_fd(), events)];
    let timeout = PollTimeout::try_from(most.as_millis() + 1).unwrap_or(PollTimeout::MAX);
    match poll(&mut polled, timeout) {
        Ok(_) | Err(Errno::EINTR) => {}
        Err(e) => return Err(Error::io("poll", e.into())),
    }
    let got = polled[0].revents().unwrap_or(PollFlags::empty());
    let broken = got.intersects(PollFlags::POLLERR | PollFlags::POLLHUP | PollFlags::POLLNVAL);
    Ok((
        got.contains(PollFlags::POLLIN) || (broken && read),
        got.contains(PollFlags::POLLOUT) || (broken && write),
    ))
}

fn taken(listed: &Listed) -> Vec<(CString, CString)> {
    std::mem::take(&mut *listed.lock().unwrap_or_else(PoisonError::into_inner))
}

fn lost(what: &str) -> Error {
    Error::new(ErrorKind::Os(libc::ENOTCONN), what)
}

/// A text for a C library. Errors: it holds a NUL byte.
pub(super) fn c_text(bytes: &[u8]) -> Result<CString> {
    CString::new(bytes).map_err(|e| Error::new(ErrorKind::Usage, format!("a NUL byte at {}", e.nul_position())))
}

/// For an attempt that only the deadline ends.
pub(super) fn never() -> bool {
    false
}
