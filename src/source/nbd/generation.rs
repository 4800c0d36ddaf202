//! The connections to a server that live and die together, and how they are served.
//!
//! ```text
//!   submit ─► the connection with the fewest commands under way ─► sent by the submitting thread itself
//!   drive  ─► poll all descriptors ─ read answers ─ tell results     by one thread at a time
//! ```
//! libnbd keeps a handle locked while its own `nbd_poll` sleeps, so the descriptors are polled here. Who drives is whoever
//! waits or has just submitted: at depth 1 no thread is woken but by the answer itself. Where nobody has the
//! time, the disk's own thread does it (see `link.rs`).
//!
//! `notify_read` is called only where there is something to read, and by the driver alone: a handle that was told to read
//! and found nothing holds new commands back until an answer comes, which may never be asked for then.
//!
//! The first connection has structured replies, which block status needs; the others do without.
//!
//! A connection that breaks, or on which an answer is overdue, ends the whole generation: its sockets are shut down, upon
//! which libnbd gives back every command, and all are sent again on the next one.

use std::os::fd::{AsFd, OwnedFd};
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicUsize, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::eventfd::{EfdFlags, EventFd};
use nix::sys::socket::{Shutdown, shutdown};

use super::ffi::{Handle, Retired};
use super::op::{Kind, Op};
use crate::error::{Error, Result};

/// How often it is looked whether an answer is overdue, and the step in which deadlines are counted.
const TICK: Duration = Duration::from_millis(250);

/// Steps of deadlines that are told apart: the longest `timeout=` in ticks, and as many again for what is overdue.
const STEPS: usize = 1 << 14;

/// The longest `timeout=`, seconds: less than half of [`STEPS`].
pub(crate) const MAX_TIMEOUT: Duration = Duration::from_secs(1800);

/// An operation that came back, and what it failed with.
pub(super) type Answer = (Box<Op>, Option<i32>);

/// One connection.
#[derive(Debug)]
struct Conn {
    handle: Handle,
    /// The socket, ours too: libnbd closes its own as soon as the connection breaks, and its number may be another file's then.
    socket: OwnedFd,
    retired: Arc<Retired>,
    in_flight: AtomicUsize,
    /// Block status can be asked for. Without it replies are short, and a read takes half the system calls.
    structured: bool,
}

/// See the module.
#[derive(Debug)]
pub(super) struct Generation {
    /// Filled from the front.
    conns: Box<[OnceLock<Conn>]>,
    count: AtomicUsize,
    /// Wakes a driver that polls for too little.
    event: EventFd,
    driven: AtomicBool,
    in_flight: AtomicUsize,
    dead: AtomicBool,
    /// Commands under way by the tick of their deadline, as a ring.
    due: Box<[AtomicU32]>,
    born: Instant,
}

/// The right to drive; there is one.
#[derive(Debug)]
pub(super) struct Driver<'g>(&'g Generation);

impl Drop for Driver<'_> {
    fn drop(&mut self) {
        self.0.driven.store(false, Ordering::SeqCst);
    }
}

/// Why driving ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Driven {
    /// Nothing is under way any more.
    Idle,
    /// What was waited for is there.
    Enough,
    /// Nothing came for as long as the driver has patience.
    Quiet,
}

impl Generation {
    /// One with room for so many connections.
    pub(super) fn new(most: usize) -> Result<Self> {
        let event = EventFd::from_flags(EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK);
        Ok(Self {
            conns: (0..most.max(1)).map(|_| OnceLock::new()).collect(),
            count: AtomicUsize::new(0),
            event: event.map_err(|e| Error::io("eventfd", e.into()))?,
            driven: AtomicBool::new(false),
            in_flight: AtomicUsize::new(0),
            dead: AtomicBool::new(false),
            due: (0..STEPS).map(|_| AtomicU32::new(0)).collect(),
            born: Instant::now(),
        })
    }

    /// Adds a connection that is up.
    pub(super) fn add(&self, handle: Handle) -> Result<()> {
        let no_socket = || Error::corrupt("a connection that is up has no socket");
        let socket = handle.fd().ok_or_else(no_socket)?.try_clone_to_owned();
        let socket = socket.map_err(|e| Error::io("descriptor of a connection", e))?;
        let structured = handle.is_structured();
        let conn = Conn { handle, socket, retired: Arc::default(), in_flight: AtomicUsize::new(0), structured };
        let at = self.count.load(Ordering::SeqCst);
        if self.conns.get(at).is_some_and(|place| place.set(conn).is_ok()) {
            self.count.store(at + 1, Ordering::SeqCst);
            self.wake();
        }
        Ok(())
    }

    fn conns(&self) -> impl Iterator<Item = &Conn> {
        self.conns.iter().take(self.count.load(Ordering::SeqCst)).filter_map(OnceLock::get)
    }

    /// Connections that there are.
    pub(super) fn count(&self) -> usize {
        self.count.load(Ordering::SeqCst)
    }

    /// Whether it is over.
    pub(super) fn is_dead(&self) -> bool {
        self.dead.load(Ordering::SeqCst)
    }

    /// Whether no command is under way.
    pub(super) fn is_idle(&self) -> bool {
        self.in_flight.load(Ordering::SeqCst) == 0
    }

    /// Ends it: every command comes back.
    pub(super) fn fail(&self) {
        if !self.dead.swap(true, Ordering::SeqCst) {
            for conn in self.conns() {
                let _ = shutdown(std::os::fd::AsRawFd::as_raw_fd(&conn.socket), Shutdown::Both);
            }
            self.wake();
        }
    }

    /// Says goodbye to the server on all connections.
    pub(super) fn disconnect(&self) {
        self.conns().for_each(|c| c.handle.disconnect());
    }

    /// Sends an operation. What comes back at once (because it could not be sent) is put into `back`.
    pub(super) fn submit(&self, op: Box<Op>, back: &mut Vec<Answer>) {
        let fit = self.conns().filter(|c| op.kind != Kind::Status || c.structured);
        let Some(conn) = fit.min_by_key(|c| (c.in_flight.load(Ordering::Relaxed), c.structured)) else {
            return back.push((op, Some(libc::ENOTCONN)));
        };
        self.in_flight.fetch_add(1, Ordering::SeqCst);
        conn.in_flight.fetch_add(1, Ordering::Relaxed);
        self.due(op.deadline).fetch_add(1, Ordering::Relaxed);
        conn.handle.submit(op, &conn.retired);
        self.collect(conn, back);
        // Where not all could be sent at once, whoever polls has to know. That one may poll for reading only.
        if conn.handle.direction().1 && self.driven.load(Ordering::SeqCst) {
            self.wake();
        }
    }

    /// The counter of the commands that are due in the same tick.
    fn due(&self, deadline: Instant) -> &AtomicU32 {
        &self.due[self.tick(deadline) % STEPS]
    }

    /// The tick after an instant.
    fn tick(&self, at: Instant) -> usize {
        let since = at.saturating_duration_since(self.born);
        usize::try_from(since.as_millis() / TICK.as_millis()).unwrap_or(0) + 1
    }

    fn is_overdue(&self) -> bool {
        let now = self.tick(Instant::now());
        // As far back as the longest silence between two looks, and no further than the ring tells apart.
        let first = now.saturating_sub(STEPS / 2);
        (first..now).any(|tick| self.due[tick % STEPS].load(Ordering::Relaxed) > 0)
    }

    fn wake(&self) {
        // A full counter wakes too.
        let _ = self.event.write(1);
    }

    /// The right to drive, if nobody has it.
    pub(super) fn driver(&self) -> Option<Driver<'_>> {
        let free = self.driven.compare_exchange(false, true, Ordering::SeqCst, Ordering::SeqCst).is_ok();
        // made only where it is free: the end of a driver gives the right back
        free.then(|| Driver(self))
    }

    /// Moves what a connection has given back to `back`.
    fn collect(&self, conn: &Conn, back: &mut Vec<Answer>) {
        let before = back.len();
        conn.retired.take(back);
        for (op, _) in &back[before..] {
            self.due(op.deadline).fetch_sub(1, Ordering::Relaxed);
        }
        let came = back.len() - before;
        if came > 0 {
            conn.in_flight.fetch_sub(came, Ordering::Relaxed);
            self.in_flight.fetch_sub(came, Ordering::SeqCst);
        }
    }
}

impl Driver<'_> {
    /// Serves the connections until nothing is under way, `enough` says so, or nothing came for `patience`.
    ///
    /// What came back is given to `told`, outside of all locks.
    pub(super) fn drive(
        &self,
        patience: Option<Duration>,
        mut enough: impl FnMut() -> bool,
        mut told: impl FnMut(&mut Vec<Answer>),
    ) -> Driven {
        let mut back = Vec::new();
        let mut quiet = Duration::ZERO;
        let mut looked = Instant::now();
        loop {
            if enough() {
                return Driven::Enough;
            }
            if self.0.is_idle() {
                return Driven::Idle;
            }
            let most = patience.map_or(TICK, |p| p.saturating_sub(quiet).min(TICK));
            if self.turn(most, &mut back) {
                quiet = Duration::ZERO;
            } else {
                quiet += most;
            }
            told(&mut back);
            if looked.elapsed() >= TICK {
                looked = Instant::now();
                if self.0.is_overdue() {
                    self.0.fail();
                }
            }
            if patience.is_some_and(|p| quiet >= p) {
                return Driven::Quiet;
            }
        }
    }

    /// Waits once for answers, `most` at most, and reads them. Whether anything happened.
    fn turn(&self, most: Duration, back: &mut Vec<Answer>) -> bool {
        let mut happened = false;
        let mut fds = Vec::with_capacity(1 + self.0.count());
        // All of them: a command may be sent on an idle one meanwhile.
        let conns: Vec<&Conn> = self.0.conns().collect();
        fds.push(PollFd::new(self.0.event.as_fd(), PollFlags::POLLIN));
        for conn in &conns {
            let (_, write) = conn.handle.direction();
            let events = if write { PollFlags::POLLIN | PollFlags::POLLOUT } else { PollFlags::POLLIN };
            fds.push(PollFd::new(conn.socket.as_fd(), events));
        }
        let timeout = PollTimeout::try_from(most.as_millis().max(1)).unwrap_or(PollTimeout::MAX);
        match poll(&mut fds, timeout) {
            Ok(_) | Err(Errno::EINTR) => {}
            // No memory in the kernel, say: told as any loss.
            Err(e) => {
                tracing::error!("polling the connections to an NBD server: {e}");
                self.0.fail();
            }
        }
        let ready = |fd: &PollFd<'_>| fd.revents().unwrap_or(PollFlags::empty());
        if !ready(&fds[0]).is_empty() {
            let _ = self.0.event.read();
        }
        for (conn, fd) in conns.iter().zip(&fds[1..]) {
            let got = ready(fd);
            if !got.is_empty() {
                happened = true;
                self.serve(conn, got);
            }
            self.0.collect(conn, back);
        }
        happened
    }

    fn serve(&self, conn: &Conn, got: PollFlags) {
        let (read, write) = conn.handle.direction();
        let broken = got.intersects(PollFlags::POLLERR | PollFlags::POLLHUP | PollFlags::POLLNVAL);
        let went = if read && (broken || got.contains(PollFlags::POLLIN)) {
            conn.handle.readable()
        } else if write && (broken || got.contains(PollFlags::POLLOUT)) {
            conn.handle.writable()
        } else {
            Ok(())
        };
        if conn.handle.is_over() {
            if let Err(e) = went {
                tracing::info!("a connection to an NBD server broke: {e}");
            }
            self.0.fail();
        }
    }
}
