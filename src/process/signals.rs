//! Signals that end a mount, read as events by the main thread.
//!
//! They are blocked before any thread starts. Every thread inherits the mask, so the kernel keeps the signals pending
//! until they are read from the signalfd. SIGPIPE is ignored: if the reader of a message exits, only that write fails.

use std::os::fd::{AsFd, BorrowedFd};
use std::time::Instant;

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};

use crate::error::{Error, Result};

/// SIGTERM, SIGINT and SIGHUP, blocked and readable from a descriptor.
#[derive(Debug)]
pub struct Signals(SignalFd);

impl Signals {
    /// Blocks SIGTERM, SIGINT and SIGHUP for this thread and for all threads that it starts from now on. Child processes
    /// start with no signal blocked.
    pub fn block() -> Result<Self> {
        let context = |e: Errno| Error::io("blocking signals", e.into());
        // The Rust runtime ignores SIGPIPE before `main`, so it needs no handling here.
        let mut set = SigSet::empty();
        for signal in [Signal::SIGTERM, Signal::SIGINT, Signal::SIGHUP] {
            set.add(signal);
        }
        // Blocked before the descriptor exists: a signal in between stays pending and is read from it.
        set.thread_block().map_err(context)?;
        SignalFd::with_flags(&set, SfdFlags::SFD_CLOEXEC | SfdFlags::SFD_NONBLOCK)
            .map(Self)
            .map_err(context)
    }

    /// Returns the next pending signal, or `None` if there is none. Never blocks.
    pub fn take(&self) -> Result<Option<Signal>> {
        let next = self.0.read_signal().map_err(|e| Error::io("signalfd", e.into()))?;
        Ok(next.and_then(|info| {
            i32::try_from(info.ssi_signo)
                .ok()
                .and_then(|n| Signal::try_from(n).ok())
        }))
    }
}

impl AsFd for Signals {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// Waits until one of `fds` is readable, and returns which of them are. All `false` means that the deadline has passed.
pub fn wait<const N: usize>(fds: [BorrowedFd<'_>; N], deadline: Option<Instant>) -> Result<[bool; N]> {
    let mut polled = fds.map(|fd| PollFd::new(fd, PollFlags::POLLIN));
    loop {
        let left = deadline.map(|d| d.saturating_duration_since(Instant::now()));
        // Rounded up: rounding down would spin with a timeout of 0 during the last millisecond.
        let timeout = left.map_or(Ok(PollTimeout::NONE), |l| PollTimeout::try_from(l.as_millis() + 1));
        match poll(&mut polled, timeout.unwrap_or(PollTimeout::MAX)) {
            Err(Errno::EINTR) => {}
            Err(e) => return Err(Error::io("poll", e.into())),
            // The deadline may be further away than the longest timeout of poll, so only a round that starts after
            // the deadline reports the end.
            Ok(0) if left.is_some_and(|l| !l.is_zero()) => {}
            Ok(_) => return Ok(polled.map(|p| p.any().unwrap_or(false))),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use nix::sys::eventfd::EventFd;

    use super::*;

    #[test]
    fn wait_returns_the_readable_descriptors_and_keeps_the_deadline() {
        let (quiet, loud) = (EventFd::new().unwrap(), EventFd::new().unwrap());
        loud.write(1).unwrap();
        assert_eq!(wait([quiet.as_fd(), loud.as_fd()], None).unwrap(), [false, true]);
        let soon = Instant::now() + Duration::from_millis(2);
        assert_eq!(wait([quiet.as_fd()], Some(soon)).unwrap(), [false]);
        assert!(Instant::now() >= soon);
    }

    #[test]
    fn a_blocked_signal_is_read_once() {
        // `raise` sends the signal to this thread, the only one that blocks it.
        let signals = Signals::block().unwrap();
        assert_eq!(signals.take().unwrap(), None);
        nix::sys::signal::raise(Signal::SIGHUP).unwrap();
        assert_eq!(wait([signals.as_fd()], None).unwrap(), [true]);
        assert_eq!(signals.take().unwrap(), Some(Signal::SIGHUP));
        assert_eq!(signals.take().unwrap(), None);
    }
}
