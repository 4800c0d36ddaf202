//! Who serves the connections: who waits, who has just submitted, or the driver's thread.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::PoisonError;
use std::sync::atomic::Ordering;
use std::thread;
use std::time::{Duration, Instant};

use super::{Link, lock};
use crate::block::Stay;
use crate::source::nbd::drive::{Driven, Leave};
use crate::source::nbd::generation::Generation;

/// How long a thread that has other work waits for an answer before it leaves that to the driver: as long as a server on
/// this machine may take that has the data in memory.
const PATIENCE: Duration = Duration::from_millis(2);

/// How often the driver looks for commands that nobody serves, however that may have come.
const LOOK: Duration = Duration::from_millis(500);

/// How often the driver's thread looks after those who come and go, and after how many looks without traffic it stops.
const GUARD: Duration = Duration::from_millis(1);
const GUARD_IDLE: usize = 50;

impl Link {
    /// Sees to it that what was submitted is served: by this thread, as long as it may stay and nobody else does it, else by
    /// the driver.
    pub(in crate::source::nbd) fn attend(&self, stay: Stay<'_>) {
        let Some(generation) = self.generation() else { return };
        match stay {
            Stay::No => {}
            Stay::Patiently => drop(self.drive(&generation, Leave::Quiet(PATIENCE))),
            Stay::Until(other) => match self.drive(&generation, Leave::Called(other)) {
                // It comes back, or else the guard will notice.
                Some(Driven::Left) => return self.guard(),
                Some(Driven::Idle) => {}
                None => {
                    generation.hurry();
                    // It leaves before all is answered.
                    self.guard();
                }
            },
        }
        if generation.loose() > 0 {
            self.kick(&generation);
        }
    }

    /// Serves what was submitted until `enough` is true.
    pub(in crate::source::nbd) fn attend_until(&self, enough: impl Fn() -> bool) {
        let Some(generation) = self.generation() else { return };
        self.drive(&generation, Leave::Enough(&enough));
        if generation.loose() > 0 {
            self.kick(&generation);
        }
    }

    /// Serves a generation, if nobody else does.
    fn drive(&self, generation: &Generation, leave: Leave<'_>) -> Option<Driven> {
        let driver = generation.driver()?;
        Some(driver.drive(leave, |back| self.told(generation, back)))
    }

    /// Has the driver's thread look from time to time whether somebody serves what is under way: who has left to do
    /// something else may have found that to be longer work.
    fn guard(&self) {
        if !self.guarding.swap(true, Ordering::SeqCst) {
            *lock(&self.kicked) = true;
            self.kick.notify_one();
        }
    }

    /// Looks for as long as there is traffic. Whether somebody has to serve.
    fn stand_guard(&self) -> bool {
        // no number of turns: at first it is not known whether somebody is at it
        let (mut turns, mut idle) = (usize::MAX, 0);
        while let Some(generation) = self.generation().filter(|_| !self.closing.load(Ordering::SeqCst)) {
            let before = std::mem::replace(&mut turns, generation.turns());
            if before != turns {
                idle = 0;
            } else if generation.loose() > 0 {
                return true;
            } else if idle > GUARD_IDLE {
                break;
            } else {
                idle += 1;
            }
            thread::sleep(GUARD);
        }
        self.guarding.store(false, Ordering::SeqCst);
        self.generation().is_some_and(|g| g.loose() > 0)
    }

    /// Has the driver serve a generation that nobody serves.
    fn kick(&self, generation: &Generation) {
        // Who has the right looks for commands once more after giving it back.
        if let Some(driver) = generation.driver() {
            drop(driver);
            *lock(&self.kicked) = true;
            self.kick.notify_one();
        }
    }

    /// The driver's work.
    pub(super) fn drive_on(&self) {
        loop {
            let mut kicked = lock(&self.kicked);
            // Who stands guard has not been relieved yet, where he was called away to serve.
            while !std::mem::take(&mut *kicked) && !self.guarding.load(Ordering::SeqCst) {
                if self.closing.load(Ordering::SeqCst) {
                    return;
                }
                let waited = self.kick.wait_timeout(kicked, LOOK).unwrap_or_else(PoisonError::into_inner);
                kicked = waited.0;
                if waited.1.timed_out() && self.has_unserved() {
                    break;
                }
            }
            drop(kicked);
            self.serve_retired();
            if self.guarding.load(Ordering::SeqCst) && !self.stand_guard() {
                continue;
            }
            let Some(generation) = self.generation() else { continue };
            // A flaw of ours must not end the thread that all rely on.
            let turn = || loop {
                let why = self.drive(&generation, Leave::Hurried);
                if why != Some(Driven::Idle) || generation.loose() == 0 {
                    return;
                }
            };
            if catch_unwind(AssertUnwindSafe(turn)).is_err() {
                tracing::error!("serving an NBD server panicked");
                *lock(&self.kicked) = true;
            }
        }
    }

    /// Whether commands are under way that nobody may be serving.
    fn has_unserved(&self) -> bool {
        self.generation().is_some_and(|g| g.loose() > 0) || !lock(&self.retired).is_empty()
    }

    /// Takes back what was sent on a lost connection by somebody who had looked just before it was lost.
    fn serve_retired(&self) {
        let retired = std::mem::take(&mut *lock(&self.retired));
        for (generation, until) in retired {
            self.drive(&generation, Leave::Idle);
            if Instant::now() < until {
                lock(&self.retired).push((generation, until));
            }
        }
    }

    /// The work of a thread for long requests.
    pub(super) fn carry(&self) {
        while let Some(load) = self.carriers.next() {
            let work = || {
                let generation = self.generation();
                let claim = generation.as_ref().and_then(|g| g.claim().map(|claim| (g, claim)));
                for op in load {
                    match &claim {
                        Some((generation, claim)) if !generation.is_dead() && op.deadline > Instant::now() => {
                            claim.run(op, |back| self.told(generation, back));
                        }
                        _ if op.deadline > Instant::now() => self.send(op),
                        _ => self.again(op),
                    }
                }
                drop(claim);
                // Also for what others have sent on that connection just before it was taken.
                self.attend(Stay::No);
            };
            if catch_unwind(AssertUnwindSafe(work)).is_err() {
                tracing::error!("serving an NBD server panicked");
            }
        }
    }
}
