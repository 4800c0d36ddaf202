//! Serving the connections of a generation: by one thread at a time, the one with the right to drive.
//!
//! libnbd keeps a handle locked while its own `nbd_poll` sleeps, so the descriptors are polled here. What others submit
//! while the driver is awake is left to it, so that nobody waits for the lock of a handle; while it sleeps in `poll`
//! they send by themselves.
//!
//! `notify_read` is called only where there is something to read, and by the driver alone: a handle that was told to read
//! and found nothing holds new commands back until an answer comes, which may never be asked for then.

use std::os::fd::BorrowedFd;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use super::connection::{Answer, Connection, Socket, TICK};

/// How long a thread looks for the next event before it goes to sleep for it. To wake a thread on a processor that has gone
/// to sleep too costs as much (on a virtual machine several times as much) as a server on this machine takes to answer.
const SPIN: Duration = Duration::from_micros(50);

/// Commands under way up to which it is worth to look: with more, something comes anyway, and others need the processor.
const FEW: usize = 2;

/// The right to drive; there is one.
#[derive(Debug)]
pub(super) struct Poller<'g>(&'g Connection);

impl Drop for Poller<'_> {
    fn drop(&mut self) {
        self.0.give_right();
    }
}

/// When a driver stops, beside the end of all commands.
#[derive(Clone, Copy)]
pub(super) enum PollUntil<'a> {
    /// Never.
    Idle,
    /// When nothing came for so long.
    Quiet(Duration),
    /// When this is true.
    Enough(&'a dyn Fn() -> bool),
    /// When the descriptor is readable.
    Called(BorrowedFd<'a>),
    /// When somebody else wants to drive.
    YieldRequested,
}

/// Why driving ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum PollEnd {
    /// Nothing is under way any more that a driver has to serve.
    Idle,
    /// As [`PollUntil`] said.
    Left,
}

/// What a turn has seen.
struct PollOutcome {
    /// Some connection was served.
    served: bool,
    /// The descriptor of [`PollUntil::Called`] is readable.
    called: bool,
}

impl<'g> Poller<'g> {
    /// Of a generation whose right was taken.
    pub(super) fn of(connection: &'g Connection) -> Self {
        Self(connection)
    }

    /// Serves the connections until nothing is under way or it is time to leave.
    ///
    /// What came back is given to `on_completions`, outside of all locks.
    pub(super) fn poll_sockets(
        &self,
        leave: PollUntil<'_>,
        mut on_completions: impl FnMut(&mut Vec<Answer>),
    ) -> PollEnd {
        let mut back = Vec::new();
        let mut quiet = Duration::ZERO;
        let mut served = false;
        // Who is called away each time looks too.
        self.0.end_if_overdue();
        if let PollUntil::Called(other) = leave
            && is_readable(other)
        {
            // First all requests that are there, for the same reason.
            return PollEnd::Left;
        }
        loop {
            self.0.send_queued(&mut back);
            if !back.is_empty() {
                on_completions(&mut back);
            }
            let over = match leave {
                PollUntil::Enough(enough) => enough(),
                PollUntil::YieldRequested => self.0.is_yield_requested(),
                PollUntil::Quiet(patience) => quiet >= patience,
                PollUntil::Idle | PollUntil::Called(_) => false,
            };
            if over {
                return PollEnd::Left;
            }
            if self.0.unserved() == 0 {
                if let PollUntil::Called(other) = leave
                    && served
                {
                    spin_until_readable(other);
                }
                return PollEnd::Idle;
            }
            let most = if let PollUntil::Quiet(patience) = leave {
                patience.min(TICK)
            } else {
                TICK
            };
            let seen = self.turn(most, leave, &mut back);
            quiet = if seen.served { Duration::ZERO } else { quiet + most };
            served |= seen.served;
            on_completions(&mut back);
            self.0.end_if_overdue();
            // First all answers that are there: each batch wakes others once, which costs more than the answers.
            if seen.called && !seen.served {
                return PollEnd::Left;
            }
        }
    }

    /// Waits once for answers, `most` at most, and reads them.
    fn turn(&self, most: Duration, leave: PollUntil<'_>, back: &mut Vec<Answer>) -> PollOutcome {
        let sockets = self.0.to_serve();
        let mut fds = Vec::with_capacity(2 + sockets.len());
        fds.push(PollFd::new(self.0.waker(), PollFlags::POLLIN));
        for socket in &sockets {
            fds.push(PollFd::new(socket.socket(), events_of(socket)));
        }
        if let PollUntil::Called(other) = leave {
            fds.push(PollFd::new(other, PollFlags::POLLIN));
        }
        match self.wait(&mut fds, most) {
            Ok(_) | Err(Errno::EINTR) => {}
            // No memory in the kernel, say: told as any loss.
            Err(e) => {
                tracing::error!("polling the connections to an NBD server: {e}");
                self.0.fail();
            }
        }
        let ready: Vec<PollFlags> = fds.iter().map(ready).collect();
        if !ready[0].is_empty() {
            self.0.woken();
        }
        let mut seen = PollOutcome {
            served: false,
            called: ready.get(1 + sockets.len()).is_some_and(|r| !r.is_empty()),
        };
        for (socket, got) in sockets.iter().zip(&ready[1..]) {
            if !got.is_empty() {
                seen.served = true;
                serve(self.0, socket, *got);
            }
            self.0.collect(socket, back);
        }
        // The connections are free for others only now.
        drop(fds);
        seen
    }

    /// Polls; before it goes to sleep it looks for a while.
    fn wait(&self, fds: &mut [PollFd<'_>], most: Duration) -> nix::Result<i32> {
        if self.0.unserved() <= FEW {
            let until = Instant::now() + SPIN;
            while Instant::now() < until && !self.0.has_queued() {
                match poll(fds, PollTimeout::ZERO) {
                    Ok(0) => std::thread::yield_now(),
                    other => return other,
                }
            }
        }
        let timeout = PollTimeout::try_from(most.as_millis().max(1)).unwrap_or(PollTimeout::MAX);
        self.0
            .asleep(|may_sleep| poll(fds, if may_sleep { timeout } else { PollTimeout::ZERO }))
    }
}

/// What a connection is polled for.
pub(super) fn events_of(socket: &Socket) -> PollFlags {
    let (_, write) = socket.handle.direction();
    if write {
        PollFlags::POLLIN | PollFlags::POLLOUT
    } else {
        PollFlags::POLLIN
    }
}

/// What a poll has found.
pub(super) fn ready(fd: &PollFd<'_>) -> PollFlags {
    fd.revents().unwrap_or(PollFlags::empty())
}

/// Reads what a connection has to be read, or goes on with sending.
pub(super) fn serve(connection: &Connection, socket: &Socket, got: PollFlags) {
    let (read, write) = socket.handle.direction();
    let broken = got.intersects(PollFlags::POLLERR | PollFlags::POLLHUP | PollFlags::POLLNVAL);
    let went = if read && (broken || got.contains(PollFlags::POLLIN)) {
        socket.handle.readable()
    } else if write && (broken || got.contains(PollFlags::POLLOUT)) {
        socket.handle.writable()
    } else {
        Ok(())
    };
    if socket.handle.is_over() {
        if let Err(e) = went {
            tracing::info!("a connection to an NBD server broke: {e}");
        }
        connection.fail();
    }
}

/// Looks for a while whether a descriptor is readable.
fn spin_until_readable(other: BorrowedFd<'_>) {
    let until = Instant::now() + SPIN;
    while Instant::now() < until && !is_readable(other) {
        std::thread::yield_now();
    }
}

fn is_readable(other: BorrowedFd<'_>) -> bool {
    let mut fds = [PollFd::new(other, PollFlags::POLLIN)];
    poll(&mut fds, PollTimeout::ZERO) != Ok(0)
}
