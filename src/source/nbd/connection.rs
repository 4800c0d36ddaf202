//! Connection: a set of sockets to one server that are retired together.
//!
//! ```text
//!   submit ─► the socket with the fewest commands in flight ─► sent by the submitting thread itself
//!   poll   ─► poll all descriptors ─ read answers ─ call completions     by one thread at a time
//! ```
//! The thread that polls (`poller.rs`) is one that waits for an answer or has just submitted a command: at queue depth
//! 1 only the answer itself wakes a thread. If no caller polls, the poller thread of the session does
//! (`session/serve.rs`).
//!
//! The first socket negotiates structured replies, which block status needs. The others use simple replies.
//!
//! A socket that breaks, or an overdue answer, retires the whole connection: all sockets are shut down, libnbd returns
//! each command in flight, and the session sends them again on the next connection.
//!
//! # Ownership
//!
//! - Polling the connection: the one thread that has set `polled` and holds the [`Poller`].
//! - Reading a socket: the one thread that has set `Socket::served` and holds the [`SocketGuard`]. That is the polling
//!   thread, or a bulk thread that has claimed the socket.
//! - Sending: any thread. libnbd locks the handle.
//!
//! # Handing commands to the polling thread
//!
//! While the polling thread is awake, other threads queue commands for it instead of waiting for the lock of a handle:
//! see [`Handoff`], which also says why no command is stranded when the polling thread goes to sleep or stops.
//!
//! [`Poller`]: super::poller::Poller

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use nix::sys::eventfd::{EfdFlags, EventFd};
use nix::sys::socket::{Shutdown, shutdown};

use super::command::{Command, CommandKind};
use super::ffi::{CompletionQueue, Handle, UNSENT};
use super::handoff::{Handoff, Offered};
use crate::error::{Error, Result};

/// Interval between checks for overdue answers, and the resolution of the deadline counters.
pub(super) const TICK: Duration = Duration::from_millis(250);

/// Number of deadline counters, in ticks: half of the ring for future deadlines up to [`MAX_TIMEOUT`], half for overdue
/// ones.
const DEADLINE_TICKS: usize = 1 << 14;

/// Longest accepted `timeout=`: in ticks less than half of [`DEADLINE_TICKS`].
pub(crate) const MAX_TIMEOUT: Duration = Duration::from_secs(1800);

/// Number of small commands in flight on a socket before another socket is used. Any server takes this many at a time.
const MAX_SHARED: usize = 16;

/// Latency of a small command in microseconds below which a server is near. The cost of a request is then processor
/// time on both sides, not waiting.
const NEAR_US: u64 = 500;

/// A command that libnbd has returned, and its `errno`; `None` if the server answered it without an error.
pub(super) type Answer = (Box<Command>, Option<i32>);

/// Returns true if `errno` stands for a lost connection instead of an answer. The command must be sent again.
pub(super) fn is_loss(errno: i32) -> bool {
    matches!(errno, libc::ENOTCONN | libc::ESHUTDOWN)
}

/// One TCP or Unix socket with its libnbd handle.
#[derive(Debug)]
pub(super) struct Socket {
    pub(super) handle: Handle,
    /// A duplicate of the handle's descriptor. libnbd closes its own as soon as the connection breaks, and another file
    /// may get that number while this process still polls it or shuts it down.
    socket: OwnedFd,
    /// Filled by libnbd's callbacks, under the lock of the handle.
    completions: Arc<CompletionQueue>,
    /// Commands sent and not collected yet.
    in_flight: AtomicUsize,
    /// Set while one thread polls and reads this socket. It must be only one: a thread that reads and finds nothing,
    /// because another one has read the answer, makes libnbd wait for a further answer before it sends the next
    /// command.
    served: AtomicBool,
    /// Set while the thread that serves this socket has it for itself. Other threads send elsewhere.
    claimed: AtomicBool,
    /// True if structured replies were negotiated, which block status needs. Without them a reply is shorter, and a
    /// read takes half the system calls.
    structured: bool,
}

impl Socket {
    /// Returns the descriptor to poll.
    pub(super) fn socket(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }

    /// Returns true if no command is in flight on this socket.
    pub(super) fn is_idle(&self) -> bool {
        self.in_flight.load(Ordering::SeqCst) == 0
    }

    fn is_claimed(&self) -> bool {
        self.claimed.load(Ordering::SeqCst)
    }

    /// Acquires the right to poll and read this socket. Returns `None` if another thread has it.
    fn try_serve(&self) -> Option<SocketGuard<'_>> {
        (!self.served.swap(true, Ordering::SeqCst)).then(|| SocketGuard(self))
    }

    /// Acquires the right to poll and read this socket, and makes other threads send on other sockets.
    ///
    /// A thread that picked this socket just before may still send on it. The guard's holder reads that answer too, as
    /// long as it polls.
    fn claim(&self) -> Option<SocketGuard<'_>> {
        let guard = self.try_serve()?;
        self.claimed.store(true, Ordering::SeqCst);
        Some(guard)
    }
}

/// Right to poll and read a socket, released on drop.
#[derive(Debug)]
pub(super) struct SocketGuard<'g>(&'g Socket);

impl Drop for SocketGuard<'_> {
    fn drop(&mut self) {
        // In this order: once `served` is false another thread may claim the socket, and its `claimed` must stay.
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

/// Keeps a connection from being idle while returned commands are handled. Counts them as handled on drop.
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

/// Set of sockets to one server that are retired together; see the module documentation.
#[derive(Debug)]
pub(super) struct Connection {
    /// Filled from the front by the manager thread; `count` publishes the next one.
    sockets: Box<[OnceLock<Socket>]>,
    count: AtomicUsize,
    /// Wakes a polling thread whose poll set or poll events have become too small.
    event: EventFd,
    /// Set while a thread holds the [`Poller`](super::poller::Poller).
    polled: AtomicBool,
    /// Commands that are left to the polling thread while it is awake.
    handoff: Handoff<Box<Command>>,
    /// Set by a caller that wants to poll; only a polling thread with [`PollUntil::YieldRequested`] obeys.
    ///
    /// [`PollUntil::YieldRequested`]: super::poller::PollUntil::YieldRequested
    yield_requested: AtomicBool,
    /// Number of times that the right to poll was released; shows the watchdog that callers still poll.
    releases: AtomicUsize,
    /// Commands submitted, whose results were not handled yet: more than those in flight on the sockets.
    in_flight: AtomicUsize,
    /// Latency of the fastest answer to a small command, in microseconds.
    fastest_us: AtomicU64,
    claims: AtomicUsize,
    /// Set once the server has answered a command.
    answered: AtomicBool,
    /// Set once by [`Self::fail`], never cleared.
    dead: AtomicBool,
    /// Tick of the last check for overdue answers.
    last_overdue_check: AtomicUsize,
    /// Ring of counters: commands in flight by the tick of their deadline.
    due_counters: Box<[AtomicU32]>,
    created: Instant,
}

impl Connection {
    /// Creates a connection with space for `most` sockets, and none yet.
    pub(super) fn new(most: usize) -> Result<Self> {
        let event = EventFd::from_flags(EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK);
        Ok(Self {
            sockets: (0..most.max(1)).map(|_| OnceLock::new()).collect(),
            count: AtomicUsize::new(0),
            event: event.map_err(|e| Error::io("eventfd", e.into()))?,
            polled: AtomicBool::new(false),
            handoff: Handoff::new(),
            yield_requested: AtomicBool::new(false),
            releases: AtomicUsize::new(0),
            in_flight: AtomicUsize::new(0),
            fastest_us: AtomicU64::new(u64::MAX),
            claims: AtomicUsize::new(0),
            answered: AtomicBool::new(false),
            dead: AtomicBool::new(false),
            last_overdue_check: AtomicUsize::new(0),
            due_counters: (0..DEADLINE_TICKS).map(|_| AtomicU32::new(0)).collect(),
            created: Instant::now(),
        })
    }

    /// Adds a socket whose handshake is complete. Only the manager thread calls this once the connection is published.
    pub(super) fn add(&self, mut handle: Handle) -> Result<()> {
        let no_socket = || Error::corrupt("libnbd returned no descriptor for a connected handle");
        let socket = handle.fd().ok_or_else(no_socket)?.try_clone_to_owned();
        let socket = socket.map_err(|e| Error::io("duplicate the descriptor of an NBD socket", e))?;
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
        if self.sockets.get(at).is_some_and(|cell| cell.set(socket).is_ok()) {
            self.count.store(at + 1, Ordering::SeqCst);
            // `fail` sets `dead` and then shuts down the sockets up to `count`. It may have done so before this one was
            // counted, so check again after the store.
            if self.is_dead() {
                self.shut_down_sockets();
            }
            // The polling thread has to poll the new socket too.
            self.wake();
        }
        Ok(())
    }

    /// Iterates over the sockets.
    pub(super) fn sockets(&self) -> impl Iterator<Item = &Socket> {
        self.sockets
            .iter()
            .take(self.count.load(Ordering::SeqCst))
            .filter_map(OnceLock::get)
    }

    /// Returns the number of sockets.
    pub(super) fn count(&self) -> usize {
        self.count.load(Ordering::SeqCst)
    }

    /// Returns true once the connection has been retired. It never becomes live again.
    pub(super) fn is_dead(&self) -> bool {
        self.dead.load(Ordering::SeqCst)
    }

    /// Returns true if no command is in flight and the results of all returned commands were handled.
    pub(super) fn is_idle(&self) -> bool {
        self.in_flight.load(Ordering::SeqCst) == 0
    }

    /// Retires the connection: shuts down all sockets, upon which libnbd returns every command.
    pub(super) fn fail(&self) {
        if !self.dead.swap(true, Ordering::SeqCst) {
            self.shut_down_sockets();
            self.wake();
        }
    }

    fn shut_down_sockets(&self) {
        for socket in self.sockets() {
            let _ = shutdown(std::os::fd::AsRawFd::as_raw_fd(&socket.socket), Shutdown::Both);
        }
    }

    /// Returns true if the server has answered any command. A lost command does not count.
    pub(super) fn has_answered(&self) -> bool {
        self.answered.load(Ordering::Relaxed)
    }

    /// Makes [`Self::has_answered`] ignore the answers so far.
    pub(super) fn forget_answers(&self) {
        self.answered.store(false, Ordering::Relaxed);
    }

    /// Returns the time since the connection was created.
    pub(super) fn age(&self) -> Duration {
        self.created.elapsed()
    }

    /// Sends NBD_CMD_DISC on all sockets.
    pub(super) fn disconnect(&self) {
        self.sockets().for_each(|c| c.handle.disconnect());
    }

    /// Sends a command, or leaves it to the polling thread. Adds commands that are returned at once to `back`: those
    /// that could not be sent, and answers that libnbd has read meanwhile.
    pub(super) fn submit(&self, command: Box<Command>, back: &mut Vec<Answer>) {
        self.count_submitted(&command);
        match self.handoff.offer(command) {
            Offered::SendIt(command) => self.send(command, back),
            Offered::Queued => {}
            Offered::SendQueue => self.send_queued(back),
        }
    }

    /// Counts a command that is about to be sent or queued.
    pub(super) fn count_submitted(&self, command: &Command) {
        self.in_flight.fetch_add(1, Ordering::SeqCst);
        self.due_counter(command.deadline).fetch_add(1, Ordering::Relaxed);
    }

    /// Sends the commands that were left to the polling thread.
    pub(super) fn send_queued(&self, back: &mut Vec<Answer>) {
        while self.has_queued() {
            // The queue is not locked while the commands are sent: sending may block on the lock of a handle.
            for command in self.handoff.take() {
                self.send(command, back);
            }
        }
    }

    /// Sends a command on the socket that suits it best, and wakes the polling thread if it must poll differently now.
    fn send(&self, command: Box<Command>, back: &mut Vec<Answer>) {
        let Some(socket) = self.pick_socket(&command) else {
            self.count_returned(&command, None);
            return back.push((command, Some(libc::ENOTCONN)));
        };
        self.send_on(socket, command, back);
        // A thread asleep in `poll` keeps its poll set. It may lack this socket, which was idle when the set was built,
        // or it may poll it for reading only, although the kernel's send buffer took just a part of the command.
        let asleep = self.polled.load(Ordering::SeqCst) && !self.handoff.is_awake();
        if asleep && (socket.handle.direction().1 || (!socket.is_idle() && !socket.served.load(Ordering::SeqCst))) {
            self.wake();
        }
    }

    /// Sends a command on the given socket.
    pub(super) fn send_on(&self, socket: &Socket, mut command: Box<Command>, back: &mut Vec<Answer>) {
        command.sent = Some(Instant::now());
        // Before the submission: its completion may run in another thread before `submit` returns.
        socket.in_flight.fetch_add(1, Ordering::SeqCst);
        socket.handle.submit(command, socket.structured, &socket.completions);
        self.collect(socket, back);
    }

    /// Returns the socket to send a command on, or `None` if there is no suitable one.
    ///
    /// Small commands share a socket while the server can execute all of them at the same time: each unused socket
    /// saves the wake-up of a thread on either side.
    fn pick_socket(&self, command: &Command) -> Option<&Socket> {
        let fit = self
            .sockets()
            .filter(|c| !c.is_claimed() && (command.kind != CommandKind::Status || c.structured));
        let small = command.is_small();
        fit.min_by_key(|c| {
            let load = c.in_flight.load(Ordering::Relaxed);
            let load = if small && load < MAX_SHARED { 0 } else { load };
            // Among equals prefer simple replies.
            (load, c.structured)
        })
    }

    /// Returns the counter of the commands whose deadline is in the same tick.
    fn due_counter(&self, deadline: Instant) -> &AtomicU32 {
        &self.due_counters[self.tick(deadline) % DEADLINE_TICKS]
    }

    /// Returns the number of the tick that contains `at`, from 1 on: 0 in `last_overdue_check` means no check yet.
    fn tick(&self, at: Instant) -> usize {
        let since = at.saturating_duration_since(self.created);
        usize::try_from(since.as_millis() / TICK.as_millis()).unwrap_or(0) + 1
    }

    fn is_overdue(&self, now: usize) -> bool {
        // A deadline in an earlier tick has passed, whatever its time within the tick. All earlier ticks count, because
        // no thread may have checked for long, but at most half of the ring: counters further back are those of future
        // deadlines.
        let first = now.saturating_sub(DEADLINE_TICKS / 2);
        (first..now).any(|tick| self.due_counters[tick % DEADLINE_TICKS].load(Ordering::Relaxed) > 0)
    }

    fn wake(&self) {
        // Fails only if the counter is full, and then the descriptor is readable already.
        let _ = self.event.write(1);
    }

    /// Acquires the right to poll, for a new [`Poller`]. Returns false if another thread has it.
    ///
    /// [`Poller`]: super::poller::Poller
    pub(super) fn acquire_poller(&self) -> bool {
        let free = self
            .polled
            .compare_exchange(false, true, Ordering::SeqCst, Ordering::SeqCst)
            .is_ok();
        if free {
            self.handoff.wake_up();
            self.yield_requested.store(false, Ordering::Relaxed);
        }
        free
    }

    /// Releases the right to poll. Called when the [`Poller`] is dropped, also by a panic.
    ///
    /// [`Poller`]: super::poller::Poller
    pub(super) fn release_poller(&self) {
        // `awake` before `polled`: the next holder sets `awake` after it has acquired the right, and this thread must
        // not clear it then. A command that was queued in between is found by the check that follows each release.
        self.handoff.fall_asleep();
        self.releases.fetch_add(1, Ordering::Relaxed);
        self.polled.store(false, Ordering::SeqCst);
    }

    /// Returns how often the right to poll was released.
    pub(super) fn releases(&self) -> usize {
        self.releases.load(Ordering::Relaxed)
    }

    /// Asks a polling thread that polls for others to stop.
    pub(super) fn request_yield(&self) {
        self.yield_requested.store(true, Ordering::Relaxed);
    }

    /// Returns true if a thread has requested that since the right to poll was acquired.
    pub(super) fn is_yield_requested(&self) -> bool {
        self.yield_requested.load(Ordering::Relaxed)
    }

    /// Acquires the sockets to poll: the first one, on which the next command is most likely sent, and those with
    /// commands in flight. Leaves out sockets that a bulk thread has claimed.
    pub(super) fn sockets_to_poll(&self) -> Vec<SocketGuard<'_>> {
        let candidates = self.sockets().enumerate().filter(|(i, c)| *i == 0 || !c.is_idle());
        candidates.filter_map(|(_, socket)| socket.try_serve()).collect()
    }

    /// Returns true if a command is in flight on a socket that no thread reads.
    fn is_unserved(&self) -> bool {
        self.sockets().any(|c| !c.is_idle() && !c.served.load(Ordering::SeqCst))
    }

    /// Runs `wait`, in which the polling thread sleeps. Its argument is false if there is something to send or to read
    /// on a socket outside of the poll set, so that it must not sleep.
    pub(super) fn sleep_in<T>(&self, wait: impl FnOnce(bool) -> T) -> T {
        // First the flag, then the checks. A submitter does it the other way round: it queues or sends a command and
        // then checks the flag. So it sends its queued command itself, or wakes this thread by the event.
        self.handoff.fall_asleep();
        let waited = wait(!self.has_queued() && !self.is_unserved());
        self.handoff.wake_up();
        waited
    }

    /// Returns true if commands were left to the polling thread.
    pub(super) fn has_queued(&self) -> bool {
        self.handoff.len() > 0
    }

    /// Returns the number of commands that a polling thread has to send or to read the answers of.
    pub(super) fn unserved(&self) -> usize {
        let sent = self
            .sockets()
            .filter(|c| !c.is_claimed())
            .map(|c| c.in_flight.load(Ordering::SeqCst));
        self.handoff.len() + sent.sum::<usize>()
    }

    /// Returns the number of sockets that bulk threads may claim: none if the server is far, or if there is only one.
    pub(super) fn claimable(&self) -> usize {
        let near = self.fastest_us.load(Ordering::Relaxed) < NEAR_US;
        if near && !self.is_dead() {
            self.count().saturating_sub(1)
        } else {
            0
        }
    }

    /// Claims an idle socket for the calling thread, if there is one. The first socket is always shared.
    pub(super) fn claim(&self) -> Option<SocketGuard<'_>> {
        let mut free = self.sockets().skip(1).take(self.claimable()).filter(|c| c.is_idle());
        let claim = free.find_map(Socket::claim)?;
        self.claims.fetch_add(1, Ordering::Relaxed);
        Some(claim)
    }

    /// Returns how often a socket was claimed.
    #[cfg(test)]
    pub(super) fn claims(&self) -> usize {
        self.claims.load(Ordering::Relaxed)
    }

    /// Returns the descriptor that [`Self::wake`] makes readable.
    pub(super) fn waker(&self) -> BorrowedFd<'_> {
        self.event.as_fd()
    }

    /// Resets the descriptor of [`Self::waker`].
    pub(super) fn clear_wake(&self) {
        let _ = self.event.read();
    }

    /// Retires the connection if an answer is overdue. Checks once in a tick.
    pub(super) fn fail_if_overdue(&self) {
        let now = self.tick(Instant::now());
        // The load keeps the shared cache line clean in the common case. The swap lets one thread do the check.
        if self.last_overdue_check.load(Ordering::Relaxed) != now
            && self.last_overdue_check.swap(now, Ordering::Relaxed) != now
            && self.is_overdue(now)
        {
            self.fail();
        }
    }

    /// Moves the commands that libnbd has returned on a socket to `back`.
    ///
    /// They still count as in flight for [`Self::is_idle`], until the caller drops a [`Self::completion_guard`] for
    /// them.
    pub(super) fn collect(&self, socket: &Socket, back: &mut Vec<Answer>) {
        let before = back.len();
        socket.completions.take(back);
        for (command, error) in &mut back[before..] {
            self.count_returned(command, Some(socket));
            let is_answer = error.is_none_or(|errno| errno != UNSENT && !is_loss(errno));
            // libnbd refused the command, or dropped it with the connection. Only the latter is worth a retry.
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
                self.fastest_us.fetch_min(took, Ordering::Relaxed);
            }
        }
    }

    /// Uncounts a command that was returned. The count for [`Self::is_idle`] stays until its result has been handled.
    fn count_returned(&self, command: &Command, from: Option<&Socket>) {
        self.due_counter(command.deadline).fetch_sub(1, Ordering::Relaxed);
        if let Some(socket) = from {
            socket.in_flight.fetch_sub(1, Ordering::SeqCst);
        }
    }

    /// Returns a guard whose drop counts `count` returned commands as handled.
    ///
    /// By then the replay log must hold their changes: once the connection is idle, the manager thread replays what the
    /// log holds on the next connection.
    pub(super) fn completion_guard(&self, count: usize) -> CompletionGuard<'_> {
        CompletionGuard {
            in_flight: &self.in_flight,
            count,
        }
    }
}
