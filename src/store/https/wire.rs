//! Bytes of one connection: TCP, with or without TLS.
//!
//! TLS works on a buffer of ours: a read takes many records at once, and each is decrypted where it lies. The library's
//! own buffer takes 4 KiB with each system call.
//!
//! The limits of the request are checked before each read of the socket, and after each [`TICK`] without a byte.

use std::io::{self, ErrorKind, Read, Write};
use std::net::{IpAddr, SocketAddr, TcpStream, ToSocketAddrs};
use std::os::fd::{AsFd, AsRawFd};
use std::sync::Arc;
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{MsgFlags, recv, setsockopt, sockopt};
use reqwest::Url;
use rustls::client::UnbufferedClientConnection;
use rustls::pki_types::ServerName;
use rustls::unbuffered::{ConnectionState, EncodeError, EncryptError, InsufficientSizeError, UnbufferedStatus};
use rustls::{ClientConfig, pki_types};

use super::low_water::set_low_water;
use super::request::{Limits, Piece, TICK, Trouble};
use crate::store::printable;

/// Size of the buffer for received bytes: eight records, and more than any message of a handshake.
const INBOX: usize = 128 << 10;
/// Free part of the buffer below which what is left of it moves to its front.
const LEAST_FREE: usize = 32 << 10;
/// Bytes that a read of a long body waits for. A thread that is woken for each record of a fast server is woken 65,536 times
/// for a GiB.
const LOW_WATER: usize = 64 << 10;
/// Time without a byte after which the kernel asks whether the other end is still there.
pub(super) const KEEPALIVE: Duration = Duration::from_secs(15);
/// Time for which sent bytes may stay unconfirmed before the kernel ends the connection. A server that is slow to answer
/// confirms them at once.
pub(super) const UNCONFIRMED: Duration = Duration::from_secs(10);
/// Room for one encrypted record of a request. It grows where a message needs more.
const OUTBOX: usize = 4 << 10;

/// Scheme, host and port of a server.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Endpoint {
    pub(super) tls: bool,
    pub(super) host: String,
    pub(super) port: u16,
}

/// A connection to a server.
pub(super) struct Wire {
    socket: TcpStream,
    tls: Option<Box<UnbufferedClientConnection>>,
    /// Bytes received and not processed yet: those of `start..end`.
    inbox: Box<[u8]>,
    start: usize,
    end: usize,
    /// Bytes that a read of the socket waits for.
    low_water: usize,
    /// Encrypted bytes to send, the first `ready` of them.
    outbox: Vec<u8>,
    ready: usize,
}

/// Result of one step of TLS.
enum Step {
    /// Something was processed: go on.
    Again,
    /// The connection needs bytes from the server.
    Blocked,
    /// The handshake is done, and all received records are processed.
    Idle,
    /// The bytes that were to be sent are encrypted.
    Sent,
    /// The server has ended the connection.
    Ended,
}

impl Endpoint {
    pub(super) fn of(url: &Url) -> Self {
        let host = url.host_str().unwrap_or_default();
        Self {
            tls: url.scheme() == "https",
            host: host.trim_start_matches('[').trim_end_matches(']').to_owned(),
            port: url.port_or_known_default().unwrap_or_default(),
        }
    }
}

impl Wire {
    /// Connects to a server, including the TLS handshake: to the first of its addresses, in their order, that answers.
    pub(super) fn connect(
        to: &Endpoint,
        resolve: &[(String, IpAddr)],
        tls: &Arc<ClientConfig>,
        limits: Limits<'_>,
    ) -> Result<Self, Trouble> {
        let addresses = look_up(to, resolve, limits)?;
        let mut failed = Trouble::Unreachable("the name has no address".to_owned());
        for (number, address) in addresses.iter().enumerate() {
            limits.check()?;
            let left = limits.deadline.saturating_duration_since(Instant::now());
            // The addresses share the time, so that one that does not answer leaves some for the others.
            let share = (left / (addresses.len() - number) as u32).max(Duration::from_millis(1));
            match Self::connect_to(address, to, tls, limits.within(share)) {
                Ok(wire) => return Ok(wire),
                // It has answered, and what it says does not do: another address would be another server.
                Err(Refused::ByTls(trouble)) => return Err(trouble),
                Err(Refused::Unanswered(trouble)) => failed = trouble,
            }
        }
        Err(failed)
    }

    fn connect_to(
        address: &SocketAddr,
        to: &Endpoint,
        tls: &Arc<ClientConfig>,
        limits: Limits<'_>,
    ) -> Result<Self, Refused> {
        let left = limits.deadline.saturating_duration_since(Instant::now());
        let socket = match TcpStream::connect_timeout(address, left.max(Duration::from_millis(1))) {
            Ok(socket) => prepare(socket).map_err(|e| Refused::Unanswered(broken(&e)))?,
            Err(e) if e.kind() == ErrorKind::TimedOut => return Err(Refused::Unanswered(Trouble::TimedOut)),
            Err(e) => {
                let text = format!("connecting failed: {e}");
                return Err(Refused::Unanswered(Trouble::Unreachable(text)));
            }
        };
        let tls = match to.tls {
            true => Some(Box::new(client_of(&to.host, tls).map_err(Refused::ByTls)?)),
            false => None,
        };
        let mut wire = Self {
            socket,
            tls,
            inbox: vec![0; INBOX].into_boxed_slice(),
            start: 0,
            end: 0,
            low_water: 1,
            outbox: vec![0; OUTBOX],
            ready: 0,
        };
        let unanswered = |trouble| Refused::Unanswered(unreachable(trouble));
        // Before the server has sent a byte, an error is that of the connection, and another address may be better.
        let mut answered = false;
        while wire.tls.is_some() {
            let refused = |trouble| match answered {
                true => Refused::ByTls(unreachable(trouble)),
                false => unanswered(trouble),
            };
            match wire.step(None, &mut |_| ()).map_err(refused)? {
                Step::Idle => break,
                Step::Blocked if wire.fill(limits).map_err(unanswered)? => answered = true,
                Step::Blocked | Step::Ended => return Err(unanswered(ended())),
                Step::Again | Step::Sent => {}
            }
        }
        Ok(wire)
    }

    /// Returns true if the server has closed the connection, or sent something without a request, since its last answer.
    pub(super) fn is_stale(&self) -> bool {
        let mut byte = [0];
        let closed = self.socket.set_nonblocking(true).is_err()
            || !matches!(self.socket.peek(&mut byte), Err(e) if e.kind() == ErrorKind::WouldBlock);
        closed || self.socket.set_nonblocking(false).is_err()
    }

    /// Sends all of `bytes`.
    pub(super) fn send(&mut self, bytes: &[u8], limits: Limits<'_>) -> Result<(), Trouble> {
        if self.tls.is_none() {
            return write_all(&mut self.socket, bytes, limits);
        }
        loop {
            let mut unasked = false;
            match self.step(Some(bytes), &mut |_| unasked = true)? {
                Step::Sent => {
                    let ready = std::mem::take(&mut self.ready);
                    return write_all(&mut self.socket, self.outbox.get(..ready).unwrap_or_default(), limits);
                }
                Step::Blocked if self.fill(limits)? => {}
                Step::Blocked | Step::Idle | Step::Ended => return Err(ended()),
                Step::Again => {}
            }
            if unasked {
                return Err(Trouble::Broken("data that no request asked for".to_owned()));
            }
        }
    }

    /// Receives the next piece, which need not have the `expected` bytes that are certain to come. Returns false at the end
    /// of the connection.
    pub(super) fn receive(&mut self, expected: usize, limits: Limits<'_>, piece: Piece<'_>) -> Result<bool, Trouble> {
        if self.tls.is_none() {
            self.wait_for(expected);
            if !self.fill(limits)? {
                return Ok(false);
            }
            piece(self.inbox.get(self.start..self.end).unwrap_or_default());
            self.start = self.end;
            return Ok(true);
        }
        loop {
            // Anew for each read: the one before may have left no more than the end of a record to come.
            self.wait_for(expected);
            let mut received = false;
            let step = self.step(None, &mut |bytes| {
                received = true;
                piece(bytes);
            })?;
            match step {
                _ if received => return Ok(true),
                Step::Idle | Step::Blocked if self.fill(limits)? => {}
                Step::Idle | Step::Blocked | Step::Ended => return Ok(false),
                Step::Again | Step::Sent => {}
            }
        }
    }

    /// Sets how many bytes the next read of the socket waits for.
    fn wait_for(&mut self, expected: usize) {
        // Encrypted bytes are more than the same bytes in the clear, so at least the rest is still to come.
        let rest = expected.saturating_sub(self.end - self.start).max(1);
        let wanted = match rest >= LOW_WATER {
            true => LOW_WATER,
            // A short answer costs no system call for this.
            false if self.low_water == 1 => 1,
            false => rest,
        };
        if wanted != self.low_water && set_low_water(&self.socket, wanted).is_ok() {
            self.low_water = wanted;
        }
    }

    /// Processes one received record, or encrypts `send` once the handshake is done.
    fn step(&mut self, send: Option<&[u8]>, piece: Piece<'_>) -> Result<Step, Trouble> {
        let Some(tls) = &mut self.tls else {
            return Ok(Step::Idle);
        };
        let received = self.inbox.get_mut(self.start..self.end).unwrap_or_default();
        let UnbufferedStatus { mut discard, state } = tls.process_tls_records(received);
        let step = match state.map_err(|e| Trouble::Broken(format!("TLS: {e}")))? {
            ConnectionState::ReadTraffic(mut traffic) => {
                while let Some(record) = traffic.next_record() {
                    let record = record.map_err(|e| Trouble::Broken(format!("TLS: {e}")))?;
                    discard += record.discard;
                    piece(record.payload);
                }
                Step::Again
            }
            ConnectionState::EncodeTlsData(mut data) => {
                encode(&mut self.outbox, &mut self.ready, |free| match data.encode(free) {
                    Err(EncodeError::InsufficientSize(e)) => Err(Some(e)),
                    written => written.map_err(|_e| None),
                })?;
                Step::Again
            }
            ConnectionState::TransmitTlsData(data) => {
                let ready = std::mem::take(&mut self.ready);
                let bytes = self.outbox.get(..ready).unwrap_or_default();
                // A handshake message fits into the buffer of a new socket.
                self.socket.write_all(bytes).map_err(|e| broken(&e))?;
                data.done();
                Step::Again
            }
            ConnectionState::WriteTraffic(mut traffic) => match send {
                Some(bytes) => {
                    encode(&mut self.outbox, &mut self.ready, |free| {
                        match traffic.encrypt(bytes, free) {
                            Err(EncryptError::InsufficientSize(e)) => Err(Some(e)),
                            written => written.map_err(|_e| None),
                        }
                    })?;
                    Step::Sent
                }
                None => Step::Idle,
            },
            ConnectionState::BlockedHandshake => Step::Blocked,
            _ => Step::Ended,
        };
        self.start += discard;
        Ok(step)
    }

    /// Waits for bytes of the server. Returns false at the end of the connection.
    fn fill(&mut self, limits: Limits<'_>) -> Result<bool, Trouble> {
        // Also when bytes keep coming: a server that sends one in each tick would hold the request forever.
        limits.check()?;
        if self.start == self.end {
            (self.start, self.end) = (0, 0);
        } else if self.inbox.len() - self.end < LEAST_FREE {
            // Less than one record is left of what was received.
            self.inbox.copy_within(self.start..self.end, 0);
            (self.start, self.end) = (0, self.end - self.start);
        }
        let free = self.inbox.get_mut(self.end..).unwrap_or_default();
        if free.is_empty() {
            return Err(Trouble::Broken("TLS: a message is too long".to_owned()));
        }
        loop {
            let read = match self.low_water {
                1 => self.socket.read(free),
                _ => read_many(&self.socket, free),
            };
            match read {
                Ok(0) => return Ok(false),
                Ok(read) => {
                    self.end += read;
                    return Ok(true);
                }
                Err(e) if is_tick(&e) => limits.check()?,
                Err(e) => return Err(broken(&e)),
            }
        }
    }
}

/// Waits until as many bytes have arrived as the low-water mark says, for a [`TICK`] at most, and reads what is there.
///
/// Not by a read that blocks: it takes what is there first, and is then woken only when that many bytes more have come.
fn read_many(socket: &TcpStream, free: &mut [u8]) -> io::Result<usize> {
    let mut waiting = [PollFd::new(socket.as_fd(), PollFlags::POLLIN)];
    poll(&mut waiting, PollTimeout::try_from(TICK).unwrap_or(PollTimeout::ZERO))?;
    Ok(recv(socket.as_raw_fd(), free, MsgFlags::MSG_DONTWAIT)?)
}

/// Lets `write` append to the first `ready` bytes of a buffer, which grows as far as it wants.
fn encode(
    outbox: &mut Vec<u8>,
    ready: &mut usize,
    mut write: impl FnMut(&mut [u8]) -> Result<usize, Option<InsufficientSizeError>>,
) -> Result<(), Trouble> {
    loop {
        match write(outbox.get_mut(*ready..).unwrap_or_default()) {
            Ok(written) => {
                *ready += written;
                return Ok(());
            }
            Err(Some(InsufficientSizeError { required_size })) => outbox.resize(*ready + required_size, 0),
            Err(None) => return Err(Trouble::Broken("TLS: the request cannot be encrypted".to_owned())),
        }
    }
}

fn client_of(host: &str, tls: &Arc<ClientConfig>) -> Result<UnbufferedClientConnection, Trouble> {
    let invalid = |e: pki_types::InvalidDnsNameError| Trouble::Unreachable(format!("{}: {e}", printable(host)));
    let name = ServerName::try_from(host.to_owned()).map_err(invalid)?;
    UnbufferedClientConnection::new(Arc::clone(tls), name).map_err(|e| Trouble::Unreachable(format!("TLS: {e}")))
}

/// Reason why an address gave no connection.
enum Refused {
    /// Nothing answered there, or the connection was cut.
    Unanswered(Trouble),
    /// The handshake failed.
    ByTls(Trouble),
}

fn prepare(socket: TcpStream) -> io::Result<TcpStream> {
    let seconds = |time: Duration| u32::try_from(time.as_secs()).unwrap_or(u32::MAX);
    socket.set_nodelay(true)?;
    socket.set_read_timeout(Some(TICK))?;
    socket.set_write_timeout(Some(TICK))?;
    setsockopt(&socket, sockopt::KeepAlive, &true)?;
    setsockopt(&socket, sockopt::TcpKeepIdle, &seconds(KEEPALIVE))?;
    setsockopt(&socket, sockopt::TcpKeepInterval, &seconds(UNCONFIRMED / 4))?;
    setsockopt(&socket, sockopt::TcpUserTimeout, &(seconds(UNCONFIRMED) * 1000))?;
    Ok(socket)
}

/// Returns the addresses of a host. The lookup, which has no deadline of its own, runs on a thread of its own.
fn look_up(to: &Endpoint, resolve: &[(String, IpAddr)], limits: Limits<'_>) -> Result<Vec<SocketAddr>, Trouble> {
    let given: Vec<SocketAddr> = resolve
        .iter()
        .filter(|(name, _)| name.eq_ignore_ascii_case(&to.host))
        .map(|(_, address)| SocketAddr::new(*address, to.port))
        .collect();
    if !given.is_empty() {
        return Ok(given);
    }
    if let Ok(address) = to.host.parse::<IpAddr>() {
        return Ok(vec![SocketAddr::new(address, to.port)]);
    }
    let (sender, found) = channel();
    let (host, port) = (to.host.clone(), to.port);
    let started = std::thread::Builder::new().name("lookup".to_owned()).spawn(move || {
        let addresses = (host.as_str(), port).to_socket_addrs();
        let _ = sender.send(addresses.map(Iterator::collect::<Vec<_>>));
    });
    started.map_err(|e| Trouble::Unreachable(format!("starting the lookup of the name: {e}")))?;
    loop {
        match found.recv_timeout(TICK) {
            Ok(Ok(addresses)) => return Ok(addresses),
            Ok(Err(e)) => return Err(Trouble::Unreachable(format!("the name was not found: {e}"))),
            Err(RecvTimeoutError::Timeout) => limits.check()?,
            Err(RecvTimeoutError::Disconnected) => {
                return Err(Trouble::Unreachable("the lookup of the name panicked".to_owned()));
            }
        }
    }
}

fn write_all(socket: &mut TcpStream, mut bytes: &[u8], limits: Limits<'_>) -> Result<(), Trouble> {
    while !bytes.is_empty() {
        limits.check()?;
        match socket.write(bytes) {
            Ok(0) => return Err(ended()),
            Ok(written) => bytes = bytes.get(written..).unwrap_or_default(),
            Err(e) if is_tick(&e) => {}
            Err(e) => return Err(broken(&e)),
        }
    }
    Ok(())
}

fn is_tick(error: &io::Error) -> bool {
    // A wait that has passed is WouldBlock. TimedOut is the kernel's word that the other end confirms nothing any more.
    matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted)
}

fn broken(error: &io::Error) -> Trouble {
    Trouble::Broken(error.to_string())
}

fn ended() -> Trouble {
    Trouble::Broken("the server closed the connection".to_owned())
}

/// Turns trouble during the handshake into that of reaching the server.
fn unreachable(trouble: Trouble) -> Trouble {
    match trouble {
        Trouble::Broken(text) => Trouble::Unreachable(format!("connecting failed: {text}")),
        other => other,
    }
}

#[cfg(test)]
mod tests {
    use std::net::TcpListener;
    use std::sync::atomic::AtomicBool;

    use super::*;
    use crate::config::Trust;
    use crate::store::https::trust;

    /// Returns a connection without TLS, and its other end.
    fn connected() -> (Wire, TcpStream) {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let to = Endpoint {
            tls: false,
            host: address.ip().to_string(),
            port: address.port(),
        };
        let (tls, _) = trust::client_config(&Trust::default()).unwrap();
        let limits = limits_of(&OPEN);
        let wire = Wire::connect(&to, &[], &Arc::new(tls), limits).unwrap();
        (wire, listener.accept().unwrap().0)
    }

    static OPEN: AtomicBool = AtomicBool::new(false);
    static CLOSED: AtomicBool = AtomicBool::new(true);

    fn limits_of(closing: &AtomicBool) -> Limits<'_> {
        Limits {
            deadline: Instant::now() + Duration::from_secs(60),
            closing,
        }
    }

    /// "in their order, that answers"
    #[test]
    fn an_address_that_does_not_answer_gives_way_to_the_next_within_the_limit() {
        // Takes connections, and never says a word; the other one closes them.
        let silent = TcpListener::bind("127.0.0.2:0").unwrap();
        let port = silent.local_addr().unwrap().port();
        let cutting = TcpListener::bind(("127.0.0.4", port)).unwrap();
        std::thread::spawn(move || cutting.incoming().for_each(drop));
        let (tls, _) = trust::client_config(&Trust::default()).unwrap();
        let tls = Arc::new(tls);
        let answering = TcpListener::bind(("127.0.0.5", port)).unwrap();
        let reached = std::thread::spawn(move || {
            answering
                .accept()
                .map(|(mut socket, _)| socket.read(&mut [0; 64]).unwrap())
        });
        // No server is at the second address.
        let resolve = ["127.0.0.2", "127.0.0.3", "127.0.0.4", "127.0.0.5"];
        let resolve: Vec<_> = resolve.iter().map(|at| ("h".to_owned(), at.parse().unwrap())).collect();
        let to = Endpoint {
            tls: true,
            host: "h".to_owned(),
            port,
        };
        let limits = limits_of(&OPEN).within(Duration::from_secs(4));
        let failed = Wire::connect(&to, &resolve, &tls, limits).err();
        assert!(
            matches!(failed, Some(Trouble::Unreachable(_) | Trouble::TimedOut)),
            "{failed:?}"
        );
        assert!(reached.join().unwrap().unwrap() > 0, "the last address was not tried");
    }

    #[test]
    fn the_kernel_ends_a_connection_whose_other_end_has_vanished() {
        let (wire, _server) = connected();
        assert!(sockopt_of(&wire, sockopt::KeepAlive));
        assert_eq!(sockopt_of(&wire, sockopt::TcpUserTimeout), 10_000);
        // The end of such a connection is an error, and no wait that goes on.
        assert!(!is_tick(&io::Error::from_raw_os_error(libc::ETIMEDOUT)));
        assert!(is_tick(&io::Error::from_raw_os_error(libc::EAGAIN)));
    }

    fn sockopt_of<O: nix::sys::socket::GetSockOpt>(wire: &Wire, option: O) -> O::Val {
        nix::sys::socket::getsockopt(&wire.socket, option).unwrap()
    }

    #[test]
    fn bytes_that_keep_coming_do_not_hold_a_request_beyond_its_limits() {
        let (mut wire, mut server) = connected();
        server.write_all(b"one byte after the other").unwrap();
        let past = limits_of(&OPEN).within(Duration::ZERO);
        assert!(matches!(
            wire.receive(1, limits_of(&CLOSED), &mut |_| ()),
            Err(Trouble::Closed)
        ));
        assert!(matches!(wire.receive(1, past, &mut |_| ()), Err(Trouble::TimedOut)));
        assert!(matches!(wire.receive(1, limits_of(&OPEN), &mut |_| ()), Ok(true)));
    }
}
