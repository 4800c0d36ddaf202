//! Polling the sockets of a connection: by a caller that waits, by a caller that has just submitted, or by the poller
//! thread.
//!
//! One thread at a time has the right to poll a connection (`Poller::acquire`). Polling in the calling thread saves
//! the wake-up of another thread, but callers come and go. The invariant is that a command in flight always has one of:
//! - a caller that polls, and that checks `Connection::unserved` after it has released the right;
//! - the poller thread, woken by [`Session::wake_poller`];
//! - the poller thread as watchdog ([`Session::watch`]), while callers leave between two commands and come back;
//! - a bulk thread that has claimed the socket.
//!
//! As a last resort the poller thread checks every [`LAST_RESORT`] for commands without any of these.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::Ordering;
use std::thread;
use std::time::{Duration, Instant};

use super::Session;
use crate::block::Stay;
use crate::mutex::{lock, wait_timeout};
use crate::source::nbd::bulk::ClaimedSocket;
use crate::source::nbd::connection::Connection;
use crate::source::nbd::poller::{PollEnd, PollUntil, Poller};

/// Time without an answer after which a thread that has other work leaves polling to the poller thread: the longest
/// that a local server with the data in memory should take.
const PATIENCE: Duration = Duration::from_millis(2);

/// Interval at which the sleeping poller thread checks for commands in flight that no thread polls for.
const LAST_RESORT: Duration = Duration::from_millis(500);

/// Interval at which the watching poller thread checks that callers still poll.
const WATCH_INTERVAL: Duration = Duration::from_millis(1);

/// Number of checks without traffic after which the poller thread stops watching.
const MAX_IDLE_CHECKS: usize = 50;

impl Session {
    /// Ensures that the answers to submitted commands are read.
    ///
    /// The calling thread polls for as long as `stay` allows, unless another thread polls already. What remains in
    /// flight is left to the poller thread.
    pub(in crate::source::nbd) fn poll_completions(&self, stay: Stay<'_>) {
        let Some(connection) = self.connection() else { return };
        match stay {
            Stay::No => {}
            Stay::Patiently => drop(self.poll_sockets(&connection, PollUntil::Quiet(PATIENCE))),
            Stay::Until(other) => match self.poll_sockets(&connection, PollUntil::Called(other)) {
                // The caller was called away and usually polls again soon. Waking the poller thread for each command
                // would cost more than the command: the watchdog takes over only if the caller stays away.
                Some(PollEnd::Left) => return self.watch(),
                Some(PollEnd::Idle) => {}
                // Another thread polls. Ask it to yield, so that this caller can poll after its next command.
                None => {
                    connection.request_yield();
                    // The poller thread then stops polling with commands in flight: something has to watch them.
                    self.watch();
                }
            },
        }
        if connection.unserved() > 0 {
            self.wake_poller(&connection);
        }
    }

    /// Polls for answers until `enough` returns true or nothing is in flight. Returns at once if another thread polls.
    pub(in crate::source::nbd) fn poll_until(&self, enough: impl Fn() -> bool) {
        let Some(connection) = self.connection() else { return };
        self.poll_sockets(&connection, PollUntil::Enough(&enough));
        if connection.unserved() > 0 {
            self.wake_poller(&connection);
        }
    }

    /// Polls the sockets of a connection. Returns `None` if another thread polls them.
    fn poll_sockets(&self, connection: &Connection, until: PollUntil<'_>) -> Option<PollEnd> {
        let poller = Poller::acquire(connection)?;
        Some(poller.poll_sockets(until, |back| self.on_completions(connection, back)))
    }

    /// Starts the watchdog in the poller thread: a caller has stopped polling with commands in flight, and its other
    /// work may take longer than expected.
    fn watch(&self) {
        // While the flag is set the poller thread is awake. It checks for unserved commands once more after it has
        // cleared the flag, so a caller that still finds it set need not wake the thread.
        if !self.watching.swap(true, Ordering::SeqCst) {
            *lock(&self.poller_woken) = true;
            self.wake_poller.notify_one();
        }
    }

    /// Watches while there is traffic. Returns true if commands are in flight that no caller polls for.
    fn watch_once(&self) -> bool {
        // Callers that poll count up `releases` each time they stop. Commands in flight without a change within one
        // interval have no poller, or a caller that is still polling: then this thread does not get the right to poll.
        // `usize::MAX` is no possible count: the first check only takes a sample.
        let (mut releases, mut idle) = (usize::MAX, 0);
        while let Some(connection) = self.connection().filter(|_| !self.closing.load(Ordering::SeqCst)) {
            let before = std::mem::replace(&mut releases, connection.releases());
            if before != releases {
                idle = 0;
            } else if connection.unserved() > 0 {
                // `watching` stays set: the poller thread watches again after it has polled.
                return true;
            } else if idle > MAX_IDLE_CHECKS {
                break;
            } else {
                idle += 1;
            }
            thread::sleep(WATCH_INTERVAL);
        }
        // Clear the flag first, then check: a caller that left before the store has not woken this thread.
        self.watching.store(false, Ordering::SeqCst);
        self.connection().is_some_and(|g| g.unserved() > 0)
    }

    /// Wakes the poller thread if no thread polls the connection.
    fn wake_poller(&self, connection: &Connection) {
        // The right is taken only to find out whether it is free. If it is not, its holder checks for unserved commands
        // after releasing it, and wakes the poller thread then.
        if let Some(poller) = Poller::acquire(connection) {
            drop(poller);
            *lock(&self.poller_woken) = true;
            self.wake_poller.notify_one();
        }
    }

    /// Runs the poller thread until the session is closed.
    pub(super) fn poll_loop(&self) {
        loop {
            let mut poller_woken = lock(&self.poller_woken);
            // `watching` stays set while the watchdog is interrupted by polling: continue to watch, do not sleep.
            while !std::mem::take(&mut *poller_woken) && !self.watching.load(Ordering::SeqCst) {
                if self.closing.load(Ordering::SeqCst) {
                    return;
                }
                let waited = wait_timeout(&self.wake_poller, poller_woken, LAST_RESORT);
                poller_woken = waited.0;
                if waited.1.timed_out() && self.has_unserved() {
                    break;
                }
            }
            drop(poller_woken);
            self.poll_retired();
            if self.watching.load(Ordering::SeqCst) && !self.watch_once() {
                continue;
            }
            let Some(connection) = self.connection() else { continue };
            // Commands may have arrived just before the right to poll was released, so poll again while some are
            // unserved. A panic must not end the thread that every caller relies on.
            let turn = || loop {
                let end = self.poll_sockets(&connection, PollUntil::YieldRequested);
                if end != Some(PollEnd::Idle) || connection.unserved() == 0 {
                    return;
                }
            };
            if catch_unwind(AssertUnwindSafe(turn)).is_err() {
                tracing::error!("{}: polling for answers panicked", self.label());
                // Start over without waiting: the panic may have left commands in flight.
                *lock(&self.poller_woken) = true;
            }
        }
    }

    /// Returns true if commands may be in flight that no thread polls for.
    fn has_unserved(&self) -> bool {
        self.connection().is_some_and(|g| g.unserved() > 0) || !lock(&self.retired).is_empty()
    }

    /// Collects commands from retired connections and queues them again. A thread may have submitted them on such a
    /// connection because it fetched it just before it was lost.
    fn poll_retired(&self) {
        // The list is not locked meanwhile: a completion may submit commands.
        let retired = std::mem::take(&mut *lock(&self.retired));
        for (connection, until) in retired {
            self.poll_sockets(&connection, PollUntil::Idle);
            if Instant::now() < until {
                lock(&self.retired).push((connection, until));
            }
        }
    }

    /// Runs a bulk thread until there is no request for some time or the session is closed.
    pub(super) fn run_bulk(&self) {
        while let Some(request) = self.bulk.next() {
            let work = || {
                // Without a free socket, or once the connection is lost, the commands take the normal path.
                let connection = self.connection();
                let claim = connection
                    .as_ref()
                    .and_then(|g| ClaimedSocket::claim(g).map(|claim| (g, claim)));
                for mut command in request {
                    match &claim {
                        Some((connection, claim)) if !connection.is_dead() && command.deadline > Instant::now() => {
                            command.restart_clock(|| self.deadline());
                            claim.run(command, |back| self.on_completions(connection, back));
                        }
                        _ if command.deadline > Instant::now() => self.send(command),
                        _ => self.requeue(command),
                    }
                }
                drop(claim);
                // The commands that were sent the normal way need a poller, and so do commands that other threads sent
                // on the claimed socket just before the claim.
                self.poll_completions(Stay::No);
            };
            if catch_unwind(AssertUnwindSafe(work)).is_err() {
                tracing::error!("{}: bulk request panicked", self.label());
            }
        }
    }
}
