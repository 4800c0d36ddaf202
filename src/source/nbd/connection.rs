//! The connections to a server that live and die together, and how they are served.
//!
//! ```text
//!   submit ─► the connection with the fewest commands under way ─► sent by the submitting thread itself
//!   drive  ─► poll all descriptors ─ read answers ─ tell results     by one thread at a time
//! ```
//! Who drives (`poll_sockets.rs`) is whoever waits or has just submitted: at depth 1 no thread is woken but by the answer itself.
//! Where nobody has the time, the disk's own thread does it (see `session.rs`).
//!
//! The first connection has structured replies, which block status needs; the others do without.
//!
//! A connection that breaks, or on which an answer is overdue, ends the whole generation: its sockets are shut down, upon
//! which libnbd gives back every command, and all are sent again on the next one.

use std::collections::VecDeque;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use nix::sys::eventfd::{EfdFlags, EventFd};
use nix::sys::socket::{Shutdown, shutdown};

use super::bulk::ClaimedSocket;
use super::command::{Command, CommandKind};
use super::ffi::{CompletionQueue, Handle, UNSENT};
use super::poller::Poller;
use crate::error::{Error, Result};

/// How often it is looked whether an answer is overdue, and the step in which deadlines are counted.
pub(super) const TICK: Duration = Duration::from_millis(250);

/// Steps of deadlines that are told apart: the longest `timeout=` in ticks, and as many again for what is overdue.
const STEPS: usize = 1 << 14;

/// The longest `timeout=`, seconds: less than half of [`STEPS`].
pub(crate) const MAX_TIMEOUT: Duration = Duration::from_secs(1800);

/// Small commands that are sent on one connection before another is used: so many does any server take at the same time.
const TOGETHER: usize = 16;

/// A server that has answered a small command in fewer microseconds is near: what a request costs is the processors' work.
const NEAR_US: u64 = 500;

/// An operation that came back, and what it failed with.
pub(super) type Answer = (Box<Command>, Option<i32>);

/// Whether that is no answer, but the end of the connection: the command has to be sent again on another one.
pub(super) fn is_loss(errno: i32) -> bool {
    matches!(errno, libc::ENOTCONN | libc::ESHUTDOWN)
}

/// One connection.
#[derive(Debug)]
pub(super) struct Socket {
    pub(super) handle: Handle,
    /// The socket, ours too: libnbd closes its own as soon as the connection breaks, and its number may be another file's then.
    socket: OwnedFd,
    completions: Arc<CompletionQueue>,
    in_flight: AtomicUsize,
    /// Somebody polls and reads it. That is one at a time: who finds nothing because another has read it makes libnbd
    /// wait for an answer before it sends the next command.
    served: AtomicBool,
    /// He has it for himself.
    claimed: AtomicBool,
    /// Block status can be asked for. Without it replies are short, and a read takes half the system calls.
    structured: bool,
}

impl Socket {
    /// What to poll.
    pub(super) fn socket(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }

    /// Whether no command is under way on it.
    pub(super) fn is_idle(&self) -> bool {
        self.in_flight.load(Ordering::SeqCst) == 0
    }

    /// Whether a thread has it for itself.
    fn is_claimed(&self) -> bool {
        self.claimed.load(Ordering::SeqCst)
    }

    /// The right to poll and to read it, if nobody has it.
    fn serve(&self) -> Option<SocketGuard<'_>> {
        (!self.served.swap(true, Ordering::SeqCst)).then(|| SocketGuard(self))
    }

    /// The same, and what others send goes elsewhere.
    fn claim(&self) -> Option<SocketGuard<'_>> {
        let serving = self.serve()?;
        self.claimed.store(true, Ordering::SeqCst);
        Some(serving)
    }
}

/// The right to poll and to read a connection, until it is dropped.
#[derive(Debug)]
pub(super) struct SocketGuard<'g>(&'g Socket);

impl Drop for SocketGuard<'_> {
    fn drop(&mut self) {
        self.0.claimed.store(false, Ordering::SeqCst);
        self.0.served.store(false, Ordering::SeqCst);
    }
}

impl std::ops::Deref for SocketGuard<'_> {
    type Target = Socket;
    fn deref(&self) -> &Socket {
        self.0
    }
}

/// Commands that came back and are being dealt with, until it is dropped.
#[derive(Debug)]
pub(super) struct CompletionGuard<'g> {
    in_flight: &'g AtomicUsize,
    count: usize,
}

impl Drop for CompletionGuard<'_> {
    fn drop(&mut self) {
        self.in_flight.fetch_sub(self.count, Ordering::SeqCst);
    }
}

/// See the module.
#[derive(Debug)]
pub(super) struct Connection {
    /// Filled from the front.
    sockets: Box<[OnceLock<Socket>]>,
    count: AtomicUsize,
    /// Wakes a driver that polls for too little.
    event: EventFd,
    polled: AtomicBool,
    /// The driver is awake: what is submitted meanwhile it sends itself, so that nobody waits for the lock of a handle.
    awake: AtomicBool,
    yield_requested: AtomicBool,
    turns: AtomicUsize,
    queued: Mutex<VecDeque<Box<Command>>>,
    queued_len: AtomicUsize,
    /// Commands that were begun and not dealt with yet.
    in_flight: AtomicUsize,
    /// Microseconds of the fastest answer to a small command.
    nearest: AtomicU64,
    claims: AtomicUsize,
    answered: AtomicBool,
    dead: AtomicBool,
    /// The tick in which it was looked last whether one is overdue.
    looked: AtomicUsize,
    /// Commands under way by the tick of their deadline, as a ring.
    due: Box<[AtomicU32]>,
    born: Instant,
}

impl Connection {
    /// One with room for so many connections.
    pub(super) fn new(most: usize) -> Result<Self> {
        let event = EventFd::from_flags(EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK);
        Ok(Self {
            sockets: (0..most.max(1)).map(|_| OnceLock::new()).collect(),
            count: AtomicUsize::new(0),
            event: event.map_err(|e| Error::io("eventfd", e.into()))?,
            polled: AtomicBool::new(false),
            awake: AtomicBool::new(false),
            yield_requested: AtomicBool::new(false),
            turns: AtomicUsize::new(0),
            queued: Mutex::default(),
            queued_len: AtomicUsize::new(0),
            in_flight: AtomicUsize::new(0),
            nearest: AtomicU64::new(u64::MAX),
            claims: AtomicUsize::new(0),
            answered: AtomicBool::new(false),
            dead: AtomicBool::new(false),
            looked: AtomicUsize::new(0),
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
        let socket = Socket {
            handle,
            socket,
            completions: Arc::default(),
            in_flight: AtomicUsize::new(0),
            served: AtomicBool::new(false),
            claimed: AtomicBool::new(false),
            structured,
        };
        let at = self.count.load(Ordering::SeqCst);
        if self.sockets.get(at).is_some_and(|place| place.set(socket).is_ok()) {
            self.count.store(at + 1, Ordering::SeqCst);
            if self.is_dead() {
                // maybe only since its connections were ended
                self.shut();
            }
            self.wake();
        }
        Ok(())
    }

    /// All connections.
    pub(super) fn sockets(&self) -> impl Iterator<Item = &Socket> {
        self.sockets
            .iter()
            .take(self.count.load(Ordering::SeqCst))
            .filter_map(OnceLock::get)
    }

    /// Connections that there are.
    pub(super) fn count(&self) -> usize {
        self.count.load(Ordering::SeqCst)
    }

    /// Whether it is over.
    pub(super) fn is_dead(&self) -> bool {
        self.dead.load(Ordering::SeqCst)
    }

    /// Whether no command is under way, and all that came back were dealt with.
    pub(super) fn is_idle(&self) -> bool {
        self.in_flight.load(Ordering::SeqCst) == 0
    }

    /// Ends it: every command comes back.
    pub(super) fn fail(&self) {
        if !self.dead.swap(true, Ordering::SeqCst) {
            self.shut();
            self.wake();
        }
    }

    fn shut(&self) {
        for socket in self.sockets() {
            let _ = shutdown(std::os::fd::AsRawFd::as_raw_fd(&socket.socket), Shutdown::Both);
        }
    }

    /// Whether any command was answered, otherwise than by a loss of the connection.
    pub(super) fn has_answered(&self) -> bool {
        self.answered.load(Ordering::Relaxed)
    }

    /// Takes no notice of the answers so far.
    pub(super) fn forget_answers(&self) {
        self.answered.store(false, Ordering::Relaxed);
    }

    /// Since when it is there.
    pub(super) fn age(&self) -> Duration {
        self.born.elapsed()
    }

    /// Says goodbye to the server on all connections.
    pub(super) fn disconnect(&self) {
        self.sockets().for_each(|c| c.handle.disconnect());
    }

    /// Sends an operation, or has the driver do it. What comes back at once (because it could not be sent) is put into `back`.
    pub(super) fn submit(&self, command: Box<Command>, back: &mut Vec<Answer>) {
        self.begins(&command);
        if !self.awake.load(Ordering::SeqCst) {
            return self.send(command, back);
        }
        {
            let mut queued = self.queued();
            queued.push_back(command);
            self.queued_len.store(queued.len(), Ordering::SeqCst);
        }
        // The driver looks into the queue after it has said that it goes to sleep.
        if !self.awake.load(Ordering::SeqCst) {
            self.send_queued(back);
        }
    }

    /// Counts a command that is about to be sent.
    pub(super) fn begins(&self, command: &Command) {
        self.in_flight.fetch_add(1, Ordering::SeqCst);
        self.due(command.deadline).fetch_add(1, Ordering::Relaxed);
    }

    fn queued(&self) -> MutexGuard<'_, VecDeque<Box<Command>>> {
        self.queued.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Sends what was left to the driver.
    pub(super) fn send_queued(&self, back: &mut Vec<Answer>) {
        while self.has_queued() {
            let commands = {
                let mut queued = self.queued();
                self.queued_len.store(0, Ordering::SeqCst);
                std::mem::take(&mut *queued)
            };
            for command in commands {
                self.send(command, back);
            }
        }
    }

    fn send(&self, command: Box<Command>, back: &mut Vec<Answer>) {
        let Some(socket) = self.connection_for(&command) else {
            self.came_back(&command, None);
            return back.push((command, Some(libc::ENOTCONN)));
        };
        self.send_on(socket, command, back);
        // Whoever polls may do without this connection, or poll it for reading only where not all could be sent at once.
        let asleep = self.polled.load(Ordering::SeqCst) && !self.awake.load(Ordering::SeqCst);
        if asleep && (socket.handle.direction().1 || (!socket.is_idle() && !socket.served.load(Ordering::SeqCst))) {
            self.wake();
        }
    }

    /// Sends a command on that connection.
    pub(super) fn send_on(&self, socket: &Socket, mut command: Box<Command>, back: &mut Vec<Answer>) {
        command.sent = Some(Instant::now());
        socket.in_flight.fetch_add(1, Ordering::SeqCst);
        socket.handle.submit(command, socket.structured, &socket.completions);
        self.collect(socket, back);
    }

    /// The connection to send it on. Small ones go together, as long as the server may have them all under way at the same
    /// time: one thread is less awake on either side for each connection that is not used.
    fn connection_for(&self, command: &Command) -> Option<&Socket> {
        let fit = self
            .sockets()
            .filter(|c| !c.is_claimed() && (command.kind != CommandKind::Status || c.structured));
        let small = command.is_small();
        fit.min_by_key(|c| {
            let request = c.in_flight.load(Ordering::Relaxed);
            let request = if small && request < TOGETHER { 0 } else { request };
            (request, c.structured)
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

    fn is_overdue(&self, now: usize) -> bool {
        // As far back as the longest silence between two looks, and no further than the ring tells apart.
        let first = now.saturating_sub(STEPS / 2);
        (first..now).any(|tick| self.due[tick % STEPS].load(Ordering::Relaxed) > 0)
    }

    fn wake(&self) {
        // A full counter wakes too.
        let _ = self.event.write(1);
    }

    /// The right to drive, if nobody has it.
    pub(super) fn poller(&self) -> Option<Poller<'_>> {
        let free = self
            .polled
            .compare_exchange(false, true, Ordering::SeqCst, Ordering::SeqCst)
            .is_ok();
        // made only where it is free: the end of a driver gives the right back
        free.then(|| {
            self.awake.store(true, Ordering::SeqCst);
            self.yield_requested.store(false, Ordering::Relaxed);
            Poller::of(self)
        })
    }

    /// Gives it back, for the end of a driver.
    pub(super) fn give_right(&self) {
        self.awake.store(false, Ordering::SeqCst);
        self.turns.fetch_add(1, Ordering::Relaxed);
        self.polled.store(false, Ordering::SeqCst);
    }

    /// How often the right was given back.
    pub(super) fn turns(&self) -> usize {
        self.turns.load(Ordering::Relaxed)
    }

    /// Asks a driver that needs not drive to leave.
    pub(super) fn request_yield(&self) {
        self.yield_requested.store(true, Ordering::Relaxed);
    }

    /// Whether somebody has asked for that since it has begun.
    pub(super) fn is_yield_requested(&self) -> bool {
        self.yield_requested.load(Ordering::Relaxed)
    }

    /// The connections that a driver polls: the first one, on which the next command is most likely sent, and those with
    /// commands under way.
    pub(super) fn to_serve(&self) -> Vec<SocketGuard<'_>> {
        let wanted = self.sockets().enumerate().filter(|(i, c)| *i == 0 || !c.is_idle());
        wanted.filter_map(|(_, socket)| socket.serve()).collect()
    }

    /// Whether a command is under way on a connection that nobody serves.
    fn is_unserved(&self) -> bool {
        self.sockets().any(|c| !c.is_idle() && !c.served.load(Ordering::SeqCst))
    }

    /// Lets the driver sleep in `wait`, which is told whether it may: not where there is something to send or to serve.
    pub(super) fn asleep<T>(&self, wait: impl FnOnce(bool) -> T) -> T {
        self.awake.store(false, Ordering::SeqCst);
        let waited = wait(!self.has_queued() && !self.is_unserved());
        self.awake.store(true, Ordering::SeqCst);
        waited
    }

    /// Whether something was left to the driver.
    pub(super) fn has_queued(&self) -> bool {
        self.queued_len.load(Ordering::SeqCst) > 0
    }

    /// Commands under way that a driver has to send or to serve.
    pub(super) fn unserved(&self) -> usize {
        let sent = self
            .sockets()
            .filter(|c| !c.is_claimed())
            .map(|c| c.in_flight.load(Ordering::SeqCst));
        self.queued_len.load(Ordering::SeqCst) + sent.sum::<usize>()
    }

    /// How many threads may have a connection for themselves: none where the server is far away, or has one connection.
    pub(super) fn claimable(&self) -> usize {
        let near = self.nearest.load(Ordering::Relaxed) < NEAR_US;
        if near && !self.is_dead() {
            self.count().saturating_sub(1)
        } else {
            0
        }
    }

    /// A connection for a thread alone, if there is a free one. The first one is always for all.
    pub(super) fn claim(&self) -> Option<ClaimedSocket<'_>> {
        let mut free = self.sockets().skip(1).take(self.claimable()).filter(|c| c.is_idle());
        let claim = free
            .find_map(Socket::claim)
            .map(|socket| ClaimedSocket::of(self, socket))?;
        self.claims.fetch_add(1, Ordering::Relaxed);
        Some(claim)
    }

    /// How often that was.
    #[cfg(test)]
    pub(super) fn claims(&self) -> usize {
        self.claims.load(Ordering::Relaxed)
    }

    /// What [`Self::wake`] makes readable.
    pub(super) fn waker(&self) -> BorrowedFd<'_> {
        self.event.as_fd()
    }

    /// Makes it unreadable again.
    pub(super) fn woken(&self) {
        let _ = self.event.read();
    }

    /// Ends the generation if an answer is overdue. Looks once in a tick.
    pub(super) fn end_if_overdue(&self) {
        let now = self.tick(Instant::now());
        if self.looked.load(Ordering::Relaxed) != now
            && self.looked.swap(now, Ordering::Relaxed) != now
            && self.is_overdue(now)
        {
            self.fail();
        }
    }

    /// Moves what a connection has given back to `back`.
    pub(super) fn collect(&self, socket: &Socket, back: &mut Vec<Answer>) {
        let before = back.len();
        socket.completions.take(back);
        for (command, error) in &mut back[before..] {
            self.came_back(command, Some(socket));
            let is_answer = error.is_none_or(|errno| errno != UNSENT && !is_loss(errno));
            if *error == Some(UNSENT) {
                *error = Some(if socket.handle.is_over() {
                    libc::ENOTCONN
                } else {
                    libc::EINVAL
                });
            }
            if is_answer && !self.has_answered() {
                self.answered.store(true, Ordering::Relaxed);
            }
            if let (None, true, Some(sent)) = (error, command.is_small(), command.sent) {
                let took = u64::try_from(sent.elapsed().as_micros()).unwrap_or(u64::MAX);
                self.nearest.fetch_min(took, Ordering::Relaxed);
            }
        }
    }

    fn came_back(&self, command: &Command, from: Option<&Socket>) {
        self.due(command.deadline).fetch_sub(1, Ordering::Relaxed);
        if let Some(socket) = from {
            socket.in_flight.fetch_sub(1, Ordering::SeqCst);
        }
    }

    /// So many commands that came back are dealt with, when what this returns is dropped. What they have changed has to
    /// be kept by then: once all are, it is sent again on the next connections.
    pub(super) fn completion_guard(&self, count: usize) -> CompletionGuard<'_> {
        CompletionGuard {
            in_flight: &self.in_flight,
            count,
        }
    }
}
