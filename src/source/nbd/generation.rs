//! The connections to a server that live and die together, and how they are served.
//!
//! ```text
//!   submit ─► the connection with the fewest commands under way ─► sent by the submitting thread itself
//!   drive  ─► poll all descriptors ─ read answers ─ tell results     by one thread at a time
//! ```
//! Who drives (`drive.rs`) is whoever waits or has just submitted: at depth 1 no thread is woken but by the answer itself.
//! Where nobody has the time, the disk's own thread does it (see `link.rs`).
//!
//! The first connection has structured replies, which block status needs; the others do without.
//!
//! A connection that breaks, or on which an answer is overdue, ends the whole generation: its sockets are shut down, upon
//! which libnbd gives back every command, and all are sent again on the next one.

use std::collections::VecDeque;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use nix::sys::eventfd::{EfdFlags, EventFd};
use nix::sys::socket::{Shutdown, shutdown};

use super::drive::Driver;
use super::ffi::{Handle, Retired};
use super::op::{Kind, Op};
use crate::error::{Error, Result};

/// How often it is looked whether an answer is overdue, and the step in which deadlines are counted.
pub(super) const TICK: Duration = Duration::from_millis(250);

/// Steps of deadlines that are told apart: the longest `timeout=` in ticks, and as many again for what is overdue.
const STEPS: usize = 1 << 14;

/// The longest `timeout=`, seconds: less than half of [`STEPS`].
pub(crate) const MAX_TIMEOUT: Duration = Duration::from_secs(1800);

/// Bytes up to which a command is small: what it costs is the command, not its data.
const SMALL: u64 = 32 << 10;

/// Small commands that are sent on one connection before another is used: so many does any server take at the same time.
const TOGETHER: usize = 16;

/// An operation that came back, and what it failed with.
pub(super) type Answer = (Box<Op>, Option<i32>);

/// One connection.
#[derive(Debug)]
pub(super) struct Conn {
    pub(super) handle: Handle,
    /// The socket, ours too: libnbd closes its own as soon as the connection breaks, and its number may be another file's then.
    socket: OwnedFd,
    retired: Arc<Retired>,
    in_flight: AtomicUsize,
    /// Block status can be asked for. Without it replies are short, and a read takes half the system calls.
    structured: bool,
}

impl Conn {
    /// What to poll.
    pub(super) fn socket(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
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
    /// The driver is awake: what is submitted meanwhile it sends itself, so that nobody waits for the lock of a handle.
    awake: AtomicBool,
    hurried: AtomicBool,
    turns: AtomicUsize,
    queued: Mutex<VecDeque<Box<Op>>>,
    queued_len: AtomicUsize,
    in_flight: AtomicUsize,
    dead: AtomicBool,
    /// Commands under way by the tick of their deadline, as a ring.
    due: Box<[AtomicU32]>,
    born: Instant,
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
            awake: AtomicBool::new(false),
            hurried: AtomicBool::new(false),
            turns: AtomicUsize::new(0),
            queued: Mutex::default(),
            queued_len: AtomicUsize::new(0),
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

    /// All connections.
    pub(super) fn conns(&self) -> impl Iterator<Item = &Conn> {
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

    /// Sends an operation, or has the driver do it. What comes back at once (because it could not be sent) is put into `back`.
    pub(super) fn submit(&self, op: Box<Op>, back: &mut Vec<Answer>) {
        self.in_flight.fetch_add(1, Ordering::SeqCst);
        self.due(op.deadline).fetch_add(1, Ordering::Relaxed);
        if !self.awake.load(Ordering::SeqCst) {
            return self.send(op, back);
        }
        {
            let mut queued = self.queued();
            queued.push_back(op);
            self.queued_len.store(queued.len(), Ordering::SeqCst);
        }
        // The driver looks into the queue after it has said that it goes to sleep.
        if !self.awake.load(Ordering::SeqCst) {
            self.send_queued(back);
        }
    }

    fn queued(&self) -> MutexGuard<'_, VecDeque<Box<Op>>> {
        self.queued.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Sends what was left to the driver.
    pub(super) fn send_queued(&self, back: &mut Vec<Answer>) {
        while self.has_queued() {
            let ops = {
                let mut queued = self.queued();
                self.queued_len.store(0, Ordering::SeqCst);
                std::mem::take(&mut *queued)
            };
            for op in ops {
                self.send(op, back);
            }
        }
    }

    fn send(&self, op: Box<Op>, back: &mut Vec<Answer>) {
        let Some(conn) = self.connection_for(&op) else {
            self.came_back(&op, None);
            return back.push((op, Some(libc::ENOTCONN)));
        };
        conn.in_flight.fetch_add(1, Ordering::Relaxed);
        conn.handle.submit(op, &conn.retired);
        self.collect(conn, back);
        // Where not all could be sent at once, whoever polls has to know. That one may poll for reading only.
        if conn.handle.direction().1 && self.driven.load(Ordering::SeqCst) && !self.awake.load(Ordering::SeqCst) {
            self.wake();
        }
    }

    /// The connection to send it on. Small ones go together, as long as the server may have them all under way at the same
    /// time: one thread is less awake on either side for each connection that is not used.
    fn connection_for(&self, op: &Op) -> Option<&Conn> {
        let fit = self.conns().filter(|c| op.kind != Kind::Status || c.structured);
        let small = op.len <= SMALL || !op.kind.has_data();
        fit.min_by_key(|c| {
            let load = c.in_flight.load(Ordering::Relaxed);
            let load = if small && load < TOGETHER { 0 } else { load };
            (load, c.structured)
        })
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
        free.then(|| {
            self.awake.store(true, Ordering::SeqCst);
            self.hurried.store(false, Ordering::Relaxed);
            Driver::of(self)
        })
    }

    /// Gives it back, for the end of a driver.
    pub(super) fn give_right(&self) {
        self.awake.store(false, Ordering::SeqCst);
        self.turns.fetch_add(1, Ordering::Relaxed);
        self.driven.store(false, Ordering::SeqCst);
    }

    /// How often the right was given back.
    pub(super) fn turns(&self) -> usize {
        self.turns.load(Ordering::Relaxed)
    }

    /// Asks a driver that needs not drive to leave.
    pub(super) fn hurry(&self) {
        self.hurried.store(true, Ordering::Relaxed);
    }

    /// Whether somebody has asked for that since it has begun.
    pub(super) fn is_hurried(&self) -> bool {
        self.hurried.load(Ordering::Relaxed)
    }

    /// Lets the driver sleep in `wait`, which is told whether it may: not where there is something to send.
    pub(super) fn asleep<T>(&self, wait: impl FnOnce(bool) -> T) -> T {
        self.awake.store(false, Ordering::SeqCst);
        let waited = wait(!self.has_queued());
        self.awake.store(true, Ordering::SeqCst);
        waited
    }

    /// Whether something was left to the driver.
    pub(super) fn has_queued(&self) -> bool {
        self.queued_len.load(Ordering::SeqCst) > 0
    }

    /// Commands under way.
    pub(super) fn under_way(&self) -> usize {
        self.in_flight.load(Ordering::Relaxed)
    }

    /// What [`Self::wake`] makes readable.
    pub(super) fn waker(&self) -> BorrowedFd<'_> {
        self.event.as_fd()
    }

    /// Makes it unreadable again.
    pub(super) fn woken(&self) {
        let _ = self.event.read();
    }

    /// Ends the generation if an answer is overdue.
    pub(super) fn end_if_overdue(&self) {
        if self.is_overdue() {
            self.fail();
        }
    }

    /// Moves what a connection has given back to `back`.
    pub(super) fn collect(&self, conn: &Conn, back: &mut Vec<Answer>) {
        let before = back.len();
        conn.retired.take(back);
        for (op, _) in &back[before..] {
            self.came_back(op, Some(conn));
        }
    }

    fn came_back(&self, op: &Op, from: Option<&Conn>) {
        self.due(op.deadline).fetch_sub(1, Ordering::Relaxed);
        if let Some(conn) = from {
            conn.in_flight.fetch_sub(1, Ordering::Relaxed);
        }
        self.in_flight.fetch_sub(1, Ordering::SeqCst);
    }
}
