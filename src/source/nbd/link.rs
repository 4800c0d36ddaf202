//! The way to one export, over all connections that it ever has.
//!
//! ```text
//!   submit ─┬─ up: sent at once ──────────────────────────► answered ─► result
//!           └─ down: waits ─┐                                   │ connection lost
//!                           ▼                                   ▼
//!   manager   connect, with back-off ─ unflushed changes sent again ─ what waits is sent ─ up
//!                           └─ deadline of what waits passed, or too many tries: an I/O error
//! ```
//! What it can't do is to end a command at the server. That of a lost connection may still be carried out: the server may
//! be at work on it, or hang before it, and what it has not even read yet it still can read after our end of the socket was
//! shut down. So a write that was not answered may happen at any time until the server's side of the old connection is
//! over; also after it was sent again, or has failed; and also after newer writes to the same bytes were answered on the
//! new connection and flushed, which are lost then. It needs a server that outlives its connection: one that hung or
//! was slow beyond the deadline, or whose connection was cut by the network. A process that has ended does nothing more.
//!
//! There is no way to prevent that from here. The protocol can neither take a command back nor say that those of another
//! connection are over: a flush covers what was answered, and nothing has a server close its end of a socket only after
//! the commands that it has begun. To wait for that end would be to wait for ever for a server that hangs, or is behind a
//! broken network. To send newer writes once more some time later would only move the time from which on it can
//! happen. Other clients that send again what a lost connection did not answer, as qemu's does, have the same limit. The
//! user is told (README, limits).
//!
//! Two threads belong to it. The *manager* connects, and is the only one that waits for a connection; the *driver* serves
//! connections where nobody else does. Nobody holds a lock while a command is under way.
//!
//! Locks, in this order: `state`, `live`, `journal`.

use std::collections::VecDeque;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, RwLock};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use super::carry::{Carriers, Load};
use super::dial::Dialer;
use super::drive::{Driven, Leave};
use super::export::Export;
use super::ffi::Handle;
use super::generation::{Answer, Generation};
use super::journal::{Entry, Journal};
use super::map::Map;
use super::op::{Kind, Op};
use super::pool::{Buffer, Pool};
use crate::block::Stay;
use crate::error::{Error, ErrorKind, Result};

/// The first pause between two attempts to connect, and the longest.
const BACK_OFF: (Duration, Duration) = (Duration::from_millis(50), Duration::from_secs(2));

/// How long a thread that has other work waits for an answer before it leaves that to the driver: as long as a server on
/// this machine may take that has the data in memory.
const PATIENCE: Duration = Duration::from_millis(2);

/// Bytes of a request from which on it is long: more than the change to another thread costs.
const LONG: u64 = 128 << 10;

/// Changes that are sent again at the same time.
const REPLAY: usize = 32;

/// How long a further connection may take: a server that has enough may let it wait for ever.
const WIDEN: Duration = Duration::from_secs(5);

/// How often the driver looks for commands that nobody serves, however that may have come.
const LOOK: Duration = Duration::from_millis(500);

/// How often the driver's thread looks after those who come and go, and after how many looks without traffic it stops.
const GUARD: Duration = Duration::from_millis(1);
const GUARD_IDLE: usize = 50;

/// How long a lost connection is kept, for a thread that was about to send something on it.
const RETIRED: Duration = Duration::from_secs(10);

/// How many of them are kept: each has open sockets.
const MAX_RETIRED: usize = 8;

/// How long the threads may take to end.
const END: Duration = Duration::from_secs(3);

/// How the way behaves.
#[derive(Debug, Clone, Copy)]
pub(super) struct Manners {
    /// Connections at most.
    pub(super) connections: usize,
    /// After which a command fails.
    pub(super) timeout: Duration,
    /// Attempts to connect after a failed one; `None`: until the deadline.
    pub(super) retry: Option<u32>,
    /// Changes are made.
    pub(super) writable: bool,
}

/// See the module.
#[derive(Debug)]
pub(super) struct Link {
    dialer: Dialer,
    export: Export,
    manners: Manners,
    state: Mutex<State>,
    /// For the manager: something waits, or it shall end.
    wanted: Condvar,
    live: RwLock<Option<Arc<Generation>>>,
    journal: Mutex<Journal>,
    /// Connections that were lost, and until when they are kept.
    retired: Mutex<Vec<(Arc<Generation>, Instant)>>,
    /// For the driver.
    kicked: Mutex<bool>,
    kick: Condvar,
    /// The driver's thread looks after those who come and go.
    guarding: AtomicBool,
    closing: AtomicBool,
    pub(super) map: Map,
    pub(super) pool: Pool,
    carriers: Carriers,
    threads: Mutex<Vec<JoinHandle<()>>>,
}

#[derive(Debug, Default)]
struct State {
    /// To be sent when there is a connection.
    waiting: VecDeque<Box<Op>>,
    /// To be sent when the journal has room.
    parked: VecDeque<Box<Op>>,
}

impl std::fmt::Debug for Journal {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Journal(from {})", self.mark())
    }
}

impl Link {
    /// A way to `export`, up if there is a `first` connection, else connected when it is first used.
    pub(super) fn start(dialer: Dialer, export: Export, manners: Manners, first: Option<Handle>) -> Result<Arc<Self>> {
        let connections = if export.multi_conn && dialer.can_repeat() { manners.connections } else { 1 };
        let link = Arc::new(Self {
            dialer,
            export,
            manners: Manners { connections, ..manners },
            state: Mutex::default(),
            wanted: Condvar::new(),
            live: RwLock::new(None),
            journal: Mutex::default(),
            kicked: Mutex::new(false),
            retired: Mutex::default(),
            kick: Condvar::new(),
            guarding: AtomicBool::new(false),
            closing: AtomicBool::new(false),
            map: Map::default(),
            pool: Pool::default(),
            carriers: Carriers::default(),
            threads: Mutex::default(),
        });
        if let Some(handle) = first {
            let generation = Generation::new(connections)?;
            generation.add(handle)?;
            link.publish(Arc::new(generation));
        }
        link.spawn("nbd-manage", Self::manage)?;
        link.spawn("nbd-drive", Self::drive_on)?;
        Ok(link)
    }

    fn spawn(self: &Arc<Self>, name: &str, work: fn(&Self)) -> Result<()> {
        let link = Arc::clone(self);
        let thread = thread::Builder::new().name(name.to_owned()).stack_size(256 << 10).spawn(move || work(&link));
        let thread = thread.map_err(|e| Error::io("a thread for an NBD server", e))?;
        let mut threads = lock(&self.threads);
        threads.retain(|t| !t.is_finished());
        threads.push(thread);
        Ok(())
    }

    /// What the server says of the export.
    pub(super) fn export(&self) -> &Export {
        &self.export
    }

    /// Whether long requests are better done in pieces, each by a thread of its own.
    pub(super) fn is_near(&self) -> bool {
        self.generation().is_some_and(|g| g.claimable() > 0)
    }

    /// For messages.
    pub(super) fn label(&self) -> String {
        self.dialer.label()
    }

    /// When a command that begins now fails.
    pub(super) fn deadline(&self) -> Instant {
        Instant::now() + self.manners.timeout
    }

    /// Connections that there are now.
    #[cfg(test)]
    pub(super) fn connections(&self) -> usize {
        self.generation().map_or(0, |g| g.count())
    }

    /// Long requests that had a connection for themselves.
    #[cfg(test)]
    pub(super) fn carried(&self) -> usize {
        self.generation().map_or(0, |g| g.claims())
    }

    fn generation(&self) -> Option<Arc<Generation>> {
        self.live.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn publish(&self, generation: Arc<Generation>) {
        *self.live.write().unwrap_or_else(PoisonError::into_inner) = Some(generation);
    }

    /// Begins a command. It is finished in bounded time, maybe before this returns. [`Self::attend`] has to be called
    /// afterwards, so that somebody serves the connection.
    pub(super) fn submit(&self, op: Box<Op>) {
        if let Some(op) = self.admit(op) {
            self.send(op);
        }
    }

    /// Begins the commands of one request. Long ones to a near server are done by a thread of their own.
    pub(super) fn submit_all(self: &Arc<Self>, ops: Load) {
        let most = self.generation().map_or(0, |g| g.claimable());
        if most == 0 || ops.iter().map(|op| op.len).sum::<u64>() < LONG {
            return ops.into_iter().for_each(|op| self.submit(op));
        }
        let load: Load = ops.into_iter().filter_map(|op| self.admit(op)).collect();
        if self.carriers.push(load, most) && self.spawn("nbd-carry", Self::carry).is_err() {
            self.carriers.not_started().into_iter().flatten().for_each(|op| self.send(op));
        }
    }

    /// The work of a thread for long requests.
    fn carry(&self) {
        while let Some(load) = self.carriers.next() {
            let work = || {
                let generation = self.generation();
                let claim = generation.as_ref().and_then(|g| g.claim().map(|claim| (g, claim)));
                for op in load {
                    match &claim {
                        Some((generation, claim)) if !generation.is_dead() && op.deadline > Instant::now() => {
                            claim.run(op, |back| self.told(generation, back));
                        }
                        // The manager sends it, or says that it is too late.
                        _ => self.again(op),
                    }
                }
            };
            if catch_unwind(AssertUnwindSafe(work)).is_err() {
                tracing::error!("the end of a command for an NBD server panicked");
            }
        }
    }

    /// What has to be done before a command is sent; `None`: it is sent later, or came to an end.
    fn admit(&self, mut op: Box<Op>) -> Option<Box<Op>> {
        if op.kind.is_change() {
            self.map.change_begins(op.offset, op.offset + op.len);
            if self.must_wait(&op) {
                lock(&self.state).parked.push_back(op);
                // It may have become free just now.
                self.unpark();
                return None;
            }
        }
        if op.kind == Kind::Flush {
            let journal = lock(&self.journal);
            if let Some(e) = journal.lost() {
                drop(journal);
                op.finish(Err(e));
                return None;
            }
            op.covers = journal.mark();
        }
        Some(op)
    }

    /// Whether all changes that were answered are durable.
    pub(super) fn is_durable(&self) -> bool {
        let journal = lock(&self.journal);
        journal.is_empty() && journal.lost().is_none()
    }

    fn must_wait(&self, op: &Op) -> bool {
        self.export.flush && op.deadline > Instant::now() && lock(&self.journal).is_full()
    }

    /// Sends what is ready to be sent.
    fn send(&self, op: Box<Op>) {
        match self.generation() {
            Some(generation) if !generation.is_dead() => {
                let mut back = Vec::new();
                generation.submit(op, &mut back);
                self.told(&generation, &mut back);
            }
            _ => self.wait_for_connection(op),
        }
    }

    fn wait_for_connection(&self, op: Box<Op>) {
        let mut state = lock(&self.state);
        if self.closing.load(Ordering::SeqCst) {
            drop(state);
            let e = self.error(&op, "the disk is closed");
            return self.finish(op, Err(e));
        }
        state.waiting.push_back(op);
        drop(state);
        self.wanted.notify_all();
    }

    /// Sees to it that what was submitted is served: by this thread, as long as it may stay and nobody else does it, else by
    /// the driver.
    pub(super) fn attend(&self, stay: Stay<'_>) {
        let Some(generation) = self.generation() else { return };
        match stay {
            Stay::No => {}
            Stay::Patiently => drop(self.drive(&generation, Leave::Quiet(PATIENCE))),
            Stay::Until(other) => match self.drive(&generation, Leave::Called(other)) {
                // It comes back, or else the guard will notice.
                Some(Driven::Left) => return self.guard(),
                Some(Driven::Idle) => {}
                None => generation.hurry(),
            },
        }
        if generation.loose() > 0 {
            self.kick(&generation);
        }
    }

    /// Serves what was submitted until `enough` is true.
    pub(super) fn attend_until(&self, enough: impl Fn() -> bool) {
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
        let (mut turns, mut idle) = (0, 0);
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
    fn drive_on(&self) {
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
            // What is told a result may panic: that is its own affair, but the others want theirs.
            let turn = || loop {
                let why = self.drive(&generation, Leave::Hurried);
                if why != Some(Driven::Idle) || generation.loose() == 0 {
                    return;
                }
            };
            if catch_unwind(AssertUnwindSafe(turn)).is_err() {
                tracing::error!("the end of a command for an NBD server panicked");
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

    /// Takes what came back from a generation.
    fn told(&self, generation: &Generation, back: &mut Vec<Answer>) {
        let _settling = generation.settle(back.len());
        for (op, error) in back.drain(..) {
            match error {
                None => self.succeeded(op),
                Some(libc::ENOTCONN | libc::ESHUTDOWN) => {
                    generation.fail();
                    self.again(op);
                }
                Some(errno) => {
                    let e = op.refused(errno);
                    if op.kind == Kind::Flush {
                        // Nobody knows what of it the server has forgotten, so all of it is sent again.
                        generation.fail();
                        lock(&self.journal).flush_failed(&e, &self.pool);
                    }
                    self.finish(op, Err(e));
                }
            }
        }
    }

    fn succeeded(&self, mut op: Box<Op>) {
        let mut flush = false;
        if op.kind.is_change() && self.export.flush {
            flush = lock(&self.journal).answered(&mut op);
        } else if op.kind == Kind::Flush {
            lock(&self.journal).flushed(op.covers, &self.pool);
        }
        let flushed = op.kind == Kind::Flush;
        self.finish(op, Ok(()));
        if flush {
            self.flush_unasked();
        } else if flushed {
            self.unpark();
        }
    }

    /// Ends a command.
    fn finish(&self, op: Box<Op>, result: Result<()>) {
        if op.kind.is_change() {
            self.map.change_ends();
        } else if op.kind == Kind::Flush {
            lock(&self.journal).flushing = false;
        }
        op.finish(result);
    }

    /// Sends an operation again that a lost connection gave back.
    fn again(&self, op: Box<Op>) {
        if op.deadline <= Instant::now() {
            let e = self.late(&op);
            return self.finish(op, Err(e));
        }
        self.wait_for_connection(op);
    }

    fn flush_unasked(&self) {
        let done = |_: Box<Op>, _| {};
        let mut op = Op::new(Kind::Flush, 0, 0, Buffer::default(), self.deadline(), Box::new(done));
        op.covers = lock(&self.journal).mark();
        self.send(op);
    }

    /// Sends what waited for room in the journal.
    fn unpark(&self) {
        loop {
            let mut state = lock(&self.state);
            let full = lock(&self.journal).is_full();
            let Some(op) = (if full { None } else { state.parked.pop_front() }) else { return };
            drop(state);
            self.send(op);
        }
    }

    fn late(&self, op: &Op) -> Error {
        self.error(op, &format!("no answer within {} s", self.manners.timeout.as_secs_f32()))
    }

    fn error(&self, op: &Op, why: &str) -> Error {
        Error::new(ErrorKind::Os(libc::EIO), format!("{}: {}: {why}", self.dialer.label(), op.describe()))
    }

    /// The manager's work.
    fn manage(&self) {
        let mut failures = 0;
        loop {
            if let Some(generation) = self.generation().filter(|g| !g.is_dead()) {
                self.widen(&generation);
            }
            if !self.wait_until_wanted() {
                return;
            }
            match self.connect() {
                Ok(()) => failures = 0,
                Err(e) => {
                    failures += 1;
                    self.after_failure(&e, failures);
                }
            }
        }
    }

    /// Waits until something waits for a connection; `false`: for the end. Fails what is late meanwhile.
    fn wait_until_wanted(&self) -> bool {
        let mut state = lock(&self.state);
        loop {
            if self.closing.load(Ordering::SeqCst) {
                return false;
            }
            let over = self.take_late(&mut state);
            if !over.is_empty() {
                drop(state);
                self.fail_late(over);
                state = lock(&self.state);
            } else if state.waiting.is_empty() {
                let wait = if state.parked.is_empty() { Duration::from_secs(3600) } else { BACK_OFF.1 };
                let waited = self.wanted.wait_timeout(state, wait);
                state = waited.unwrap_or_else(PoisonError::into_inner).0;
            } else {
                return true;
            }
        }
    }

    fn take_late(&self, state: &mut State) -> VecDeque<Box<Op>> {
        let now = Instant::now();
        let mut late = VecDeque::new();
        let State { waiting, parked } = state;
        for queue in [waiting, parked] {
            // mostly none is
            if queue.iter().any(|op| op.deadline <= now) {
                let (over, left): (VecDeque<_>, VecDeque<_>) = queue.drain(..).partition(|op| op.deadline <= now);
                late.extend(over);
                queue.extend(left);
            }
        }
        late
    }

    fn fail_late(&self, late: VecDeque<Box<Op>>) {
        for op in late {
            let e = self.late(&op);
            self.finish(op, Err(e));
        }
    }

    /// Connects, sends the unflushed changes again and then what waits.
    fn connect(&self) -> Result<()> {
        let old = self.generation();
        if let Some(old) = old.as_ref().filter(|g| g.is_dead()) {
            // Its commands come back by themselves; before the last one did, their order is not known.
            self.attend_until(|| old.is_idle());
            while !old.is_idle() && !self.closing.load(Ordering::SeqCst) {
                thread::sleep(Duration::from_millis(1));
            }
        }
        if old.as_ref().is_none_or(|g| g.is_dead()) {
            let deadline = self.earliest().unwrap_or_else(|| self.deadline());
            let closing = || self.closing.load(Ordering::SeqCst);
            let (handle, export) = self.dialer.open(true, deadline, &closing)?;
            export.check_same(&self.export, self.manners.writable)?;
            self.map.clear();
            let generation = Arc::new(Generation::new(self.manners.connections)?);
            generation.add(handle)?;
            self.replay(&generation)?;
            self.publish(Arc::clone(&generation));
            if let Some(old) = &old {
                let mut retired = lock(&self.retired);
                if retired.len() >= MAX_RETIRED {
                    retired.remove(0);
                }
                retired.push((Arc::clone(old), Instant::now() + RETIRED));
                tracing::warn!("{}: connected again", self.dialer.label());
            }
            if lock(&self.journal).wants_flush() {
                self.flush_unasked();
            }
        }
        let waiting = std::mem::take(&mut lock(&self.state).waiting);
        for mut op in waiting {
            if op.kind == Kind::Flush {
                op.covers = lock(&self.journal).mark();
            }
            self.send(op);
        }
        self.attend(Stay::No);
        Ok(())
    }

    fn earliest(&self) -> Option<Instant> {
        lock(&self.state).waiting.iter().map(|op| op.deadline).min()
    }

    /// After an attempt that failed: a pause, and the end of what waits where there were too many.
    fn after_failure(&self, e: &Error, failures: u32) {
        tracing::info!("attempt {failures} to connect again: {e}");
        let hopeless = e.kind() == ErrorKind::Corrupt || self.manners.retry.is_some_and(|most| failures > most);
        if hopeless || !self.dialer.can_repeat() {
            let waiting = std::mem::take(&mut lock(&self.state).waiting);
            for op in waiting {
                let failed = self.error(&op, &e.to_string());
                self.finish(op, Err(failed));
            }
        }
        let pause = BACK_OFF.0.saturating_mul(1 << failures.min(10).saturating_sub(1)).min(BACK_OFF.1);
        let until = Instant::now() + pause;
        let mut state = lock(&self.state);
        while Instant::now() < until && !self.closing.load(Ordering::SeqCst) {
            let late = self.take_late(&mut state);
            if !late.is_empty() {
                drop(state);
                self.fail_late(late);
                state = lock(&self.state);
                continue;
            }
            let next = state.waiting.iter().map(|op| op.deadline).min().map_or(until, |d| d.min(until));
            let wait = next.saturating_duration_since(Instant::now());
            state = self.wanted.wait_timeout(state, wait).unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    /// Adds connections up to what was asked for. A server that takes fewer is no failure.
    fn widen(&self, generation: &Generation) {
        while generation.count() < self.manners.connections && !generation.is_dead() {
            if self.closing.load(Ordering::SeqCst) || !lock(&self.state).waiting.is_empty() {
                return;
            }
            let deadline = Instant::now() + self.manners.timeout.min(WIDEN);
            let needed = || self.closing.load(Ordering::SeqCst) || !lock(&self.state).waiting.is_empty();
            let added = self.dialer.open(false, deadline, &needed).and_then(|(handle, export)| {
                export.check_same(&self.export, self.manners.writable)?;
                generation.add(handle)
            });
            if let Err(e) = added {
                if needed() {
                    return;
                }
                let count = generation.count();
                tracing::info!("{count} connections and no more: {e}");
                return;
            }
        }
    }

    /// Sends all changes again that no flush has covered, in their order; those that overlap one after the other.
    fn replay(&self, generation: &Generation) -> Result<()> {
        let mut rest = lock(&self.journal).drain();
        if rest.is_empty() {
            return Ok(());
        }
        tracing::info!("{}: {} unflushed changes are sent again", self.dialer.label(), rest.len());
        while !rest.is_empty() {
            let mut batch: Vec<Entry> = Vec::new();
            while batch.len() < REPLAY
                && let Some(next) = rest.pop_front()
            {
                if batch.iter().any(|e| e.overlaps(&(next.offset, next.len))) {
                    rest.push_front(next);
                    break;
                }
                batch.push(next);
            }
            if let Err((e, unsent)) = self.replay_batch(generation, batch) {
                for entry in unsent.into_iter().rev() {
                    rest.push_front(entry);
                }
                lock(&self.journal).restore(rest);
                return Err(e);
            }
        }
        Ok(())
    }

    /// Sends changes that don't overlap. What was not answered, where the connection is lost, comes back.
    fn replay_batch(&self, generation: &Generation, batch: Vec<Entry>) -> Result<(), (Error, Vec<Entry>)> {
        let mut back = Vec::new();
        let count = batch.len();
        for entry in batch {
            let Entry { kind, offset, len, buf, .. } = entry;
            let op = Op::new(kind, offset, len, buf, self.deadline(), Box::new(|_, _| ()));
            generation.submit(op, &mut back);
        }
        let mut answers: Vec<Answer> = Vec::with_capacity(count);
        answers.append(&mut back);
        while answers.len() < count {
            match generation.driver() {
                Some(driver) => {
                    driver.drive(Leave::Idle, |back| answers.append(back));
                }
                None => thread::yield_now(),
            }
        }
        drop(generation.settle(answers.len()));
        let mut unsent = Vec::new();
        let mut journal = lock(&self.journal);
        for (mut op, error) in answers {
            match error {
                None => {
                    journal.add(&mut op);
                }
                Some(libc::ENOTCONN | libc::ESHUTDOWN) => unsent.push(op),
                Some(errno) => {
                    let e = op.refused(errno).within(format!("{}: a write that was lost", self.dialer.label()));
                    tracing::error!("{e}");
                    journal.lose(e);
                }
            }
        }
        drop(journal);
        if unsent.is_empty() {
            return Ok(());
        }
        let e = Error::new(ErrorKind::Os(libc::ENOTCONN), "the connection broke while changes were sent again");
        let mut journal = Journal::default();
        unsent.iter_mut().for_each(|op| {
            journal.add(op);
        });
        Err((e, Vec::from(journal.drain())))
    }

    /// Ends the way: what is under way fails, the threads end.
    pub(super) fn close(&self) {
        self.closing.store(true, Ordering::SeqCst);
        if let Some(generation) = self.generation() {
            if generation.is_idle() {
                generation.disconnect();
            } else {
                generation.fail();
                self.attend(Stay::Patiently);
            }
        }
        let State { waiting, parked } = std::mem::take(&mut *lock(&self.state));
        for op in waiting.into_iter().chain(parked) {
            let e = self.error(&op, "the disk is closed");
            self.finish(op, Err(e));
        }
        self.carriers.close();
        self.wanted.notify_all();
        *lock(&self.kicked) = true;
        self.kick.notify_all();
        let until = Instant::now() + END;
        for thread in std::mem::take(&mut *lock(&self.threads)) {
            while !thread.is_finished() && Instant::now() < until {
                thread::sleep(Duration::from_millis(1));
            }
            if thread.is_finished() {
                let _ = thread.join();
            }
        }
        *self.live.write().unwrap_or_else(PoisonError::into_inner) = None;
    }
}

/// Locks; a panic of another thread has left nothing half done behind these locks.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
