//! Polling the sockets of a connection: by one thread at a time, the holder of the [`Poller`].
//!
//! libnbd's own `nbd_poll` keeps the handle locked while it sleeps, and no thread could send a command meanwhile. So
//! the descriptors are polled here. Commands that are submitted while the polling thread is awake are left to it, so
//! that no submitter waits for the lock of a handle. While it sleeps in `poll`, the submitters send their commands
//! themselves.
//!
//! `nbd_aio_notify_read` is called only if there is something to read, and only by the thread that holds the
//! `SocketGuard`. After a read that found nothing, the handle holds new commands back until an answer arrives, and with
//! nothing else in flight that answer would never come.

use std::os::fd::BorrowedFd;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use super::connection::{Answer, Connection, Socket, TICK};

/// Time that a thread spins for the next event before it sleeps. Waking a thread on an idle processor takes as long as
/// a local server takes to answer, and several times as long on a virtual machine.
const SPIN_TIME: Duration = Duration::from_micros(50);

/// Number of commands in flight up to which spinning pays off. With more of them an event comes soon anyway, and other
/// threads need the processor.
const SPIN_MAX_IN_FLIGHT: usize = 2;

/// Right to poll a connection, released on drop. At most one exists for each connection.
#[derive(Debug)]
pub(super) struct Poller<'g>(&'g Connection);

impl Drop for Poller<'_> {
    fn drop(&mut self) {
        self.0.release_poller();
    }
}

/// Condition on which a thread stops polling while commands are still in flight.
#[derive(Clone, Copy)]
pub(super) enum PollUntil<'a> {
    /// None: polls until no command is in flight.
    Idle,
    /// No answer came for this time.
    Quiet(Duration),
    /// The function returns true. It is called after each round.
    Enough(&'a dyn Fn() -> bool),
    /// The descriptor is readable: the thread has other work.
    Called(BorrowedFd<'a>),
    /// A caller has asked for the right to poll.
    YieldRequested,
}

/// Reason why a thread stopped polling.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum PollEnd {
    /// No command is in flight that a polling thread has to serve.
    Idle,
    /// The condition of [`PollUntil`] became true. Commands may be in flight.
    Left,
}

/// Events of one round of polling.
struct PollOutcome {
    /// At least one socket was ready.
    served: bool,
    /// The descriptor of [`PollUntil::Called`] is readable.
    called: bool,
}

impl<'g> Poller<'g> {
    /// Acquires the right to poll a connection. Returns `None` if another thread has it.
    pub(super) fn acquire(connection: &'g Connection) -> Option<Self> {
        // Lazily: dropping a poller releases the right, so none may be created while another thread has it.
        connection.acquire_poller().then(|| Self(connection))
    }

    /// Polls the sockets until no command is in flight or the condition `until` is true.
    ///
    /// Passes returned commands to `on_completions`, which drains the list. It is called without any lock held, and may
    /// submit further commands.
    pub(super) fn poll_sockets(
        &self,
        until: PollUntil<'_>,
        mut on_completions: impl FnMut(&mut Vec<Answer>),
    ) -> PollEnd {
        let mut back = Vec::new();
        let mut quiet = Duration::ZERO;
        let mut served = false;
        // Here too, not only after a round: a caller that is called away each time never completes one.
        self.0.fail_if_overdue();
        if let PollUntil::Called(other) = until
            && is_readable(other)
        {
            // More requests wait for this thread. Submitting them before polling lets one round read several answers.
            return PollEnd::Left;
        }
        loop {
            self.0.send_queued(&mut back);
            if !back.is_empty() {
                on_completions(&mut back);
            }
            let finished = match until {
                PollUntil::Enough(enough) => enough(),
                PollUntil::YieldRequested => self.0.is_yield_requested(),
                PollUntil::Quiet(patience) => quiet >= patience,
                PollUntil::Idle | PollUntil::Called(_) => false,
            };
            if finished {
                return PollEnd::Left;
            }
            if self.0.unserved() == 0 {
                // A caller that has just received an answer usually sends its next request at once. Spinning for it
                // saves this thread a sleep and a wake-up on the other descriptor.
                if let PollUntil::Called(other) = until
                    && served
                {
                    spin_until_readable(other);
                }
                return PollEnd::Idle;
            }
            // No longer than a tick: this thread also checks for overdue answers and for the condition.
            let max_wait = if let PollUntil::Quiet(patience) = until {
                patience.min(TICK)
            } else {
                TICK
            };
            let outcome = self.poll_once(max_wait, until, &mut back);
            quiet = if outcome.served {
                Duration::ZERO
            } else {
                quiet + max_wait
            };
            served |= outcome.served;
            on_completions(&mut back);
            self.0.fail_if_overdue();
            // Read all answers that have arrived before leaving: each batch of completions wakes other threads, which
            // costs more than the answers.
            if outcome.called && !outcome.served {
                return PollEnd::Left;
            }
        }
    }

    /// Waits up to `max_wait` for answers, once, and reads them.
    fn poll_once(&self, max_wait: Duration, until: PollUntil<'_>, back: &mut Vec<Answer>) -> PollOutcome {
        // Held during the round, and acquired again in the next one: bulk threads may claim or release sockets, and the
        // manager thread may add some.
        let sockets = self.0.sockets_to_poll();
        let mut fds = Vec::with_capacity(2 + sockets.len());
        fds.push(PollFd::new(self.0.waker(), PollFlags::POLLIN));
        for socket in &sockets {
            fds.push(PollFd::new(socket.socket(), events_of(socket)));
        }
        if let PollUntil::Called(other) = until {
            fds.push(PollFd::new(other, PollFlags::POLLIN));
        }
        match self.wait(&mut fds, max_wait) {
            Ok(_) | Err(Errno::EINTR) => {}
            // For example ENOMEM. Handled as a lost connection, because otherwise this thread would fail forever.
            Err(e) => {
                tracing::error!("poll on the sockets of an NBD server failed: {e}; reconnecting");
                self.0.fail();
            }
        }
        let ready: Vec<PollFlags> = fds.iter().map(ready).collect();
        if !ready[0].is_empty() {
            self.0.clear_wake();
        }
        let mut outcome = PollOutcome {
            served: false,
            called: ready.get(1 + sockets.len()).is_some_and(|r| !r.is_empty()),
        };
        for (socket, revents) in sockets.iter().zip(&ready[1..]) {
            if !revents.is_empty() {
                outcome.served = true;
                serve(self.0, socket, *revents);
            }
            // Also if it was not ready: libnbd reads answers when another thread sends on the handle.
            self.0.collect(socket, back);
        }
        // `fds` borrows the guards of the sockets, which are released when this returns.
        drop(fds);
        outcome
    }

    /// Polls the descriptors. Spins for [`SPIN_TIME`] before it sleeps.
    fn wait(&self, fds: &mut [PollFd<'_>], max_wait: Duration) -> nix::Result<i32> {
        // While spinning this thread counts as awake: commands are queued for it, so the queue is checked as well.
        if self.0.unserved() <= SPIN_MAX_IN_FLIGHT {
            let until = Instant::now() + SPIN_TIME;
            while Instant::now() < until && !self.0.has_queued() {
                match poll(fds, PollTimeout::ZERO) {
                    Ok(0) => std::thread::yield_now(),
                    other => return other,
                }
            }
        }
        let timeout = PollTimeout::try_from(max_wait.as_millis().max(1)).unwrap_or(PollTimeout::MAX);
        self.0
            .sleep_in(|may_sleep| poll(fds, if may_sleep { timeout } else { PollTimeout::ZERO }))
    }
}

/// Returns the events to poll a socket for: writing only while libnbd has a command to send that the kernel's send
/// buffer did not take yet.
pub(super) fn events_of(socket: &Socket) -> PollFlags {
    let (_, write) = socket.handle.direction();
    if write {
        PollFlags::POLLIN | PollFlags::POLLOUT
    } else {
        PollFlags::POLLIN
    }
}

/// Returns the events that a poll has reported, none if the kernel set an unknown bit.
pub(super) fn ready(fd: &PollFd<'_>) -> PollFlags {
    fd.revents().unwrap_or(PollFlags::empty())
}

/// Lets libnbd read answers from a ready socket, or continue to send. Retires the connection if the socket broke.
pub(super) fn serve(connection: &Connection, socket: &Socket, revents: PollFlags) {
    // Reading comes first: a server that is blocked in sending answers reads no commands.
    let (read, write) = socket.handle.direction();
    let broken = revents.intersects(PollFlags::POLLERR | PollFlags::POLLHUP | PollFlags::POLLNVAL);
    let result = if read && (broken || revents.contains(PollFlags::POLLIN)) {
        socket.handle.readable()
    } else if write && (broken || revents.contains(PollFlags::POLLOUT)) {
        socket.handle.writable()
    } else {
        Ok(())
    };
    if socket.handle.is_over() {
        if let Err(e) = result {
            tracing::info!("NBD socket lost: {e}");
        }
        connection.fail();
    }
}

/// Spins until the descriptor is readable, for up to [`SPIN_TIME`].
fn spin_until_readable(other: BorrowedFd<'_>) {
    let until = Instant::now() + SPIN_TIME;
    while Instant::now() < until && !is_readable(other) {
        std::thread::yield_now();
    }
}

/// Returns true if the descriptor is readable. A failed poll counts as readable, so that the caller checks it itself.
fn is_readable(other: BorrowedFd<'_>) -> bool {
    let mut fds = [PollFd::new(other, PollFlags::POLLIN)];
    poll(&mut fds, PollTimeout::ZERO) != Ok(0)
}
