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
//! connections where nobody else does (`link/connect.rs`, `link/attend.rs`). Nobody holds a lock while a command is under way.
//!
//! Locks, in this order: `state`, `live`, `journal`.

mod attend;
mod connect;

use std::collections::VecDeque;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, RwLock};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use super::carry::{Carriers, Load};
use super::dial::Dialer;
use super::export::Export;
use super::ffi::Handle;
use super::generation::{Answer, Generation, is_loss};
use super::journal::Journal;
use super::map::Map;
use super::op::{Kind, Op};
use super::pool::Pool;
use crate::block::Stay;
use crate::error::{Error, ErrorKind, Result};

/// Bytes of a request from which on it is long: more than the change to another thread costs.
const LONG: u64 = 128 << 10;

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
        write!(f, "Journal({:?})", self.mark())
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

    /// What has to be done before a command is sent; `None`: it is sent later, or came to an end.
    fn admit(&self, mut op: Box<Op>) -> Option<Box<Op>> {
        if op.kind.is_change() {
            self.map.change_begins(op.offset, op.offset + op.len);
            if self.must_wait(&op) {
                lock(&self.state).parked.push_back(op);
                // The manager has to end it in time, and to see to a flush that nobody else does.
                self.wanted.notify_all();
                // It may have become free just now.
                self.unpark();
                return None;
            }
        }
        if op.kind == Kind::Flush {
            let journal = lock(&self.journal);
            if let Some(e) = journal.lost() {
                drop(journal);
                self.finish(op, Err(e));
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

    /// Takes what came back from a generation.
    fn told(&self, generation: &Generation, back: &mut Vec<Answer>) {
        let _settling = generation.settle(back.len());
        for (op, error) in back.drain(..) {
            match error {
                None => self.succeeded(op),
                Some(errno) if is_loss(errno) => {
                    generation.fail();
                    self.again(op);
                }
                Some(errno) => {
                    let e = op.refused(errno);
                    if op.kind != Kind::Flush {
                        self.finish(op, Err(e));
                        continue;
                    }
                    // Nobody knows what of it the server has forgotten, so all of it is sent again.
                    generation.fail();
                    lock(&self.journal).flush_failed(&e, op.covers, &self.pool);
                    self.finish(op, Err(e));
                    self.make_room();
                }
            }
        }
    }

    fn succeeded(&self, mut op: Box<Op>) {
        if op.kind == Kind::Flush {
            let lost = {
                let mut journal = lock(&self.journal);
                if journal.is_void(op.covers) {
                    drop(journal);
                    return self.again(op);
                }
                journal.flushed(op.covers, &self.pool);
                // maybe only after this one was sent
                journal.lost()
            };
            self.finish(op, lost.map_or(Ok(()), Err));
            return self.make_room();
        }
        let flush = op.kind.is_change() && self.export.flush && lock(&self.journal).answered(&mut op);
        self.finish(op, Ok(()));
        if flush {
            self.flush_unasked();
        }
    }

    /// After a flush: has sent what waited for room in the journal, and the next flush, where that is still too little.
    fn make_room(&self) {
        let flush = lock(&self.journal).wants_flush();
        if flush {
            self.flush_unasked();
        }
        self.unpark();
    }

    /// Ends a command.
    fn finish(&self, op: Box<Op>, result: Result<()>) {
        if op.kind.is_change() {
            self.map.change_ends();
            if result.is_ok() && matches!(op.kind, Kind::Zero { .. } | Kind::Trim) {
                self.map.emptied(op.offset, op.offset + op.len);
            }
        } else if op.is_unasked() {
            lock(&self.journal).flush_ended();
        }
        // What is told a result may panic: that is its own affair, but the others want theirs.
        if catch_unwind(AssertUnwindSafe(|| op.finish(result))).is_err() {
            tracing::error!("the end of a command for an NBD server panicked");
        }
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
        let mut op = Op::unasked_flush(self.deadline());
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
            if op.deadline <= Instant::now() {
                // Sent now, it would end the connection at the next look, and who waited for it has gone.
                let e = self.late(&op);
                self.finish(op, Err(e));
                continue;
            }
            self.send(op);
        }
    }

    fn late(&self, op: &Op) -> Error {
        self.error(op, &format!("no answer within {} s", self.manners.timeout.as_secs_f32()))
    }

    fn error(&self, op: &Op, why: &str) -> Error {
        Error::new(ErrorKind::Os(libc::EIO), format!("{}: {}: {why}", self.dialer.label(), op.describe()))
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
