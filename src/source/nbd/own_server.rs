//! Server process of the daemon, and attempts to connect that can be cancelled.

use std::fmt;
use std::os::fd::OwnedFd;
use std::time::{Duration, Instant};

use crate::error::Result;

/// Returns true if the attempt is to be cancelled. Called repeatedly during the handshake.
pub(in crate::source) type Cancel<'a> = &'a dyn Fn() -> bool;

/// A server process of the daemon.
pub(in crate::source) trait OwnServer: fmt::Debug + Send + Sync {
    /// Opens a connection to the server. `first`: there is no other one, and none will be used that was opened before.
    ///
    /// Fails once `deadline` has passed or `cancel` returns true.
    fn connect(&self, first: bool, deadline: Instant, cancel: Cancel<'_>) -> Result<OwnedFd>;

    /// Waits up to `within` for the server to exit. Returns a message about its exit, or about the end that it has announced;
    /// `None` otherwise.
    fn exit_within(&self, within: Duration) -> Option<String>;

    /// Notes that connections to the server are about to be closed: what it says of that is no fault.
    fn closing(&self) {}
}

/// Never cancels: for an attempt that only the deadline ends.
pub(super) fn never() -> bool {
    false
}
