//! Who serves the connections: who waits, who has just submitted, or the driver's thread.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::PoisonError;
use std::sync::atomic::Ordering;
use std::thread;
use std::time::{Duration, Instant};

use super::{Session, lock};
use crate::block::Stay;
use crate::source::nbd::connection::Connection;
use crate::source::nbd::poller::{PollEnd, PollUntil};

/// How long a thread that has other work waits for an answer before it leaves that to the driver: as long as a server on
/// this machine may take that has the data in memory.
const PATIENCE: Duration = Duration::from_millis(2);

/// How often the driver looks for commands that nobody serves, however that may have come.
const LOOK: Duration = Duration::from_millis(500);

/// How often the driver's thread looks after those who come and go, and after how many looks without traffic it stops.
const GUARD: Duration = Duration::from_millis(1);
const GUARD_IDLE: usize = 50;

impl Session {
    /// Sees to it that what was submitted is served: by this thread, as long as it may stay and nobody else does it, else by
    /// the driver.
    pub(in crate::source::nbd) fn poll_completions(&self, stay: Stay<'_>) {
        let Some(connection) = self.connection() else { return };
        match stay {
            Stay::No => {}
            Stay::Patiently => drop(self.poll_sockets(&connection, PollUntil::Quiet(PATIENCE))),
            Stay::Until(other) => match self.poll_sockets(&connection, PollUntil::Called(other)) {
                // It comes back, or else the guard will notice.
                Some(PollEnd::Left) => return self.watch(),
                Some(PollEnd::Idle) => {}
                None => {
                    connection.request_yield();
                    // It leaves before all is answered.
                    self.watch();
                }
            },
        }
        if connection.unserved() > 0 {
            self.wake_poller(&connection);
        }
    }

    /// Serves what was submitted until `enough` is true.
    pub(in crate::source::nbd) fn attend_until(&self, enough: impl Fn() -> bool) {
        let Some(connection) = self.connection() else { return };
        self.poll_sockets(&connection, PollUntil::Enough(&enough));
        if connection.unserved() > 0 {
            self.wake_poller(&connection);
        }
    }

    /// Serves a generation, if nobody else does.
    fn poll_sockets(&self, connection: &Connection, leave: PollUntil<'_>) -> Option<PollEnd> {
        let poller = connection.poller()?;
        Some(poller.poll_sockets(leave, |back| self.on_completions(connection, back)))
    }

    /// Has the driver's thread look from time to time whether somebody serves what is under way: who has left to do
    /// something else may have found that to be longer work.
    fn watch(&self) {
        if !self.watching.swap(true, Ordering::SeqCst) {
            *lock(&self.poller_woken) = true;
            self.wake_poller.notify_one();
        }
    }

    /// Looks for as long as there is traffic. Whether somebody has to serve.
    fn watch_once(&self) -> bool {
        // no number of turns: at first it is not known whether somebody is at it
        let (mut turns, mut idle) = (usize::MAX, 0);
        while let Some(connection) = self.connection().filter(|_| !self.closing.load(Ordering::SeqCst)) {
            let before = std::mem::replace(&mut turns, connection.turns());
            if before != turns {
                idle = 0;
            } else if connection.unserved() > 0 {
                return true;
            } else if idle > GUARD_IDLE {
                break;
            } else {
                idle += 1;
            }
            thread::sleep(GUARD);
        }
        self.watching.store(false, Ordering::SeqCst);
        self.connection().is_some_and(|g| g.unserved() > 0)
    }

    /// Has the driver serve a generation that nobody serves.
    fn wake_poller(&self, connection: &Connection) {
        // Who has the right looks for commands once more after giving it back.
        if let Some(poller) = connection.poller() {
            drop(poller);
            *lock(&self.poller_woken) = true;
            self.wake_poller.notify_one();
        }
    }

    /// The driver's work.
    pub(super) fn poll_loop(&self) {
        loop {
            let mut poller_woken = lock(&self.poller_woken);
            // Who stands guard has not been relieved yet, where he was called away to serve.
            while !std::mem::take(&mut *poller_woken) && !self.watching.load(Ordering::SeqCst) {
                if self.closing.load(Ordering::SeqCst) {
                    return;
                }
                let waited = self
                    .wake_poller
                    .wait_timeout(poller_woken, LOOK)
                    .unwrap_or_else(PoisonError::into_inner);
                poller_woken = waited.0;
                if waited.1.timed_out() && self.has_unserved() {
                    break;
                }
            }
            drop(poller_woken);
            self.serve_retired();
            if self.watching.load(Ordering::SeqCst) && !self.watch_once() {
                continue;
            }
            let Some(connection) = self.connection() else { continue };
            // A flaw of ours must not end the thread that all rely on.
            let turn = || loop {
                let why = self.poll_sockets(&connection, PollUntil::YieldRequested);
                if why != Some(PollEnd::Idle) || connection.unserved() == 0 {
                    return;
                }
            };
            if catch_unwind(AssertUnwindSafe(turn)).is_err() {
                tracing::error!("serving an NBD server panicked");
                *lock(&self.poller_woken) = true;
            }
        }
    }

    /// Whether commands are under way that nobody may be serving.
    fn has_unserved(&self) -> bool {
        self.connection().is_some_and(|g| g.unserved() > 0) || !lock(&self.completions).is_empty()
    }

    /// Takes back what was sent on a lost connection by somebody who had looked just before it was lost.
    fn serve_retired(&self) {
        let completions = std::mem::take(&mut *lock(&self.completions));
        for (connection, until) in completions {
            self.poll_sockets(&connection, PollUntil::Idle);
            if Instant::now() < until {
                lock(&self.completions).push((connection, until));
            }
        }
    }

    /// The work of a thread for long requests.
    pub(super) fn run_bulk(&self) {
        while let Some(request) = self.bulk.next() {
            let work = || {
                let connection = self.connection();
                let claim = connection.as_ref().and_then(|g| g.claim().map(|claim| (g, claim)));
                for command in request {
                    match &claim {
                        Some((connection, claim)) if !connection.is_dead() && command.deadline > Instant::now() => {
                            claim.run(command, |back| self.on_completions(connection, back));
                        }
                        _ if command.deadline > Instant::now() => self.send(command),
                        _ => self.requeue(command),
                    }
                }
                drop(claim);
                // Also for what others have sent on that connection just before it was taken.
                self.poll_completions(Stay::No);
            };
            if catch_unwind(AssertUnwindSafe(work)).is_err() {
                tracing::error!("serving an NBD server panicked");
            }
        }
    }
}
