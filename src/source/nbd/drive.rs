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

use super::generation::{Answer, Conn, Generation, TICK};

/// How long a thread looks for the next event before it goes to sleep for it. To wake a thread on a processor that has gone
/// to sleep too costs as much (on a virtual machine several times as much) as a server on this machine takes to answer.
const LOOK_FOR: Duration = Duration::from_micros(50);

/// Commands under way up to which it is worth to look: with more, something comes anyway, and others need the processor.
const FEW: usize = 2;

/// The right to drive; there is one.
#[derive(Debug)]
pub(super) struct Driver<'g>(&'g Generation);

impl Drop for Driver<'_> {
    fn drop(&mut self) {
        self.0.give_right();
    }
}

/// When a driver stops, beside the end of all commands.
#[derive(Clone, Copy)]
pub(super) enum Leave<'a> {
    /// Never.
    Idle,
    /// When nothing came for so long.
    Quiet(Duration),
    /// When this is true.
    Enough(&'a dyn Fn() -> bool),
    /// When the descriptor is readable.
    Called(BorrowedFd<'a>),
    /// When somebody else wants to drive.
    Hurried,
}

/// Why driving ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Driven {
    /// Nothing is under way any more that a driver has to serve.
    Idle,
    /// As [`Leave`] said.
    Left,
}

/// What a turn has seen.
struct Seen {
    /// Some connection was served.
    served: bool,
    /// The descriptor of [`Leave::Called`] is readable.
    called: bool,
}

impl<'g> Driver<'g> {
    /// Of a generation whose right was taken.
    pub(super) fn of(generation: &'g Generation) -> Self {
        Self(generation)
    }

    /// Serves the connections until nothing is under way or it is time to leave.
    ///
    /// What came back is given to `told`, outside of all locks.
    pub(super) fn drive(&self, leave: Leave<'_>, mut told: impl FnMut(&mut Vec<Answer>)) -> Driven {
        let mut back = Vec::new();
        let mut quiet = Duration::ZERO;
        let mut served = false;
        // Who is called away each time looks too.
        self.0.end_if_overdue();
        if let Leave::Called(other) = leave
            && is_readable(other)
        {
            // First all requests that are there, for the same reason.
            return Driven::Left;
        }
        loop {
            self.0.send_queued(&mut back);
            if !back.is_empty() {
                told(&mut back);
            }
            let over = match leave {
                Leave::Enough(enough) => enough(),
                Leave::Hurried => self.0.is_hurried(),
                Leave::Quiet(patience) => quiet >= patience,
                Leave::Idle | Leave::Called(_) => false,
            };
            if over {
                return Driven::Left;
            }
            if self.0.loose() == 0 {
                if let Leave::Called(other) = leave
                    && served
                {
                    look_for(other);
                }
                return Driven::Idle;
            }
            let most = if let Leave::Quiet(patience) = leave { patience.min(TICK) } else { TICK };
            let seen = self.turn(most, leave, &mut back);
            quiet = if seen.served { Duration::ZERO } else { quiet + most };
            served |= seen.served;
            told(&mut back);
            self.0.end_if_overdue();
            // First all answers that are there: each batch wakes others once, which costs more than the answers.
            if seen.called && !seen.served {
                return Driven::Left;
            }
        }
    }

    /// Waits once for answers, `most` at most, and reads them.
    fn turn(&self, most: Duration, leave: Leave<'_>, back: &mut Vec<Answer>) -> Seen {
        let conns = self.0.to_serve();
        let mut fds = Vec::with_capacity(2 + conns.len());
        fds.push(PollFd::new(self.0.waker(), PollFlags::POLLIN));
        for conn in &conns {
            fds.push(PollFd::new(conn.socket(), events_of(conn)));
        }
        if let Leave::Called(other) = leave {
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
        let mut seen = Seen { served: false, called: ready.get(1 + conns.len()).is_some_and(|r| !r.is_empty()) };
        for (conn, got) in conns.iter().zip(&ready[1..]) {
            if !got.is_empty() {
                seen.served = true;
                serve(self.0, conn, *got);
            }
            self.0.collect(conn, back);
        }
        // The connections are free for others only now.
        drop(fds);
        seen
    }

    /// Polls; before it goes to sleep it looks for a while.
    fn wait(&self, fds: &mut [PollFd<'_>], most: Duration) -> nix::Result<i32> {
        if self.0.loose() <= FEW {
            let until = Instant::now() + LOOK_FOR;
            while Instant::now() < until && !self.0.has_queued() {
                match poll(fds, PollTimeout::ZERO) {
                    Ok(0) => std::thread::yield_now(),
                    other => return other,
                }
            }
        }
        let timeout = PollTimeout::try_from(most.as_millis().max(1)).unwrap_or(PollTimeout::MAX);
        self.0.asleep(|may_sleep| poll(fds, if may_sleep { timeout } else { PollTimeout::ZERO }))
    }
}

/// What a connection is polled for.
pub(super) fn events_of(conn: &Conn) -> PollFlags {
    let (_, write) = conn.handle.direction();
    if write { PollFlags::POLLIN | PollFlags::POLLOUT } else { PollFlags::POLLIN }
}

/// What a poll has found.
pub(super) fn ready(fd: &PollFd<'_>) -> PollFlags {
    fd.revents().unwrap_or(PollFlags::empty())
}

/// Reads what a connection has to be read, or goes on with sending.
pub(super) fn serve(generation: &Generation, conn: &Conn, got: PollFlags) {
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
        generation.fail();
    }
}

/// Looks for a while whether a descriptor is readable.
fn look_for(other: BorrowedFd<'_>) {
    let until = Instant::now() + LOOK_FOR;
    while Instant::now() < until && !is_readable(other) {
        std::thread::yield_now();
    }
}

fn is_readable(other: BorrowedFd<'_>) -> bool {
    let mut fds = [PollFd::new(other, PollFlags::POLLIN)];
    poll(&mut fds, PollTimeout::ZERO) != Ok(0)
}
