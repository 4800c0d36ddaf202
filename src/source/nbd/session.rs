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
//! connections where nobody else does (`session/connect.rs`, `session/poll_completions.rs`). Nobody holds a lock while a command is under way.
//!
//! Locks, in this order: `state`, `live`, `replay_log`.

mod reconnect;
mod serve;

use std::collections::VecDeque;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, RwLock};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use super::buffer_pool::BufferPool;
use super::bulk::{BulkRequest, BulkThreads};
use super::command::{Command, CommandKind};
use super::connect::Connector;
use super::connection::{Answer, Connection, is_loss};
use super::export::Export;
use super::extent_cache::ExtentCache;
use super::ffi::Handle;
use super::replay_log::ReplayLog;
use crate::block::Stay;
use crate::error::{Error, ErrorKind, Result};

/// Bytes of a request from which on it is long: more than the change to another thread costs.
const LONG: u64 = 128 << 10;

/// How long the threads may take to end.
const END: Duration = Duration::from_secs(3);

/// How the way behaves.
#[derive(Debug, Clone, Copy)]
pub(super) struct SessionOptions {
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
pub(super) struct Session {
    connector: Connector,
    export: Export,
    options: SessionOptions,
    state: Mutex<State>,
    /// For the manager: something waits, or it shall end.
    wanted: Condvar,
    live: RwLock<Option<Arc<Connection>>>,
    replay_log: Mutex<ReplayLog>,
    /// Connections that were lost, and until when they are kept.
    completions: Mutex<Vec<(Arc<Connection>, Instant)>>,
    /// For the driver.
    poller_woken: Mutex<bool>,
    wake_poller: Condvar,
    /// The driver's thread looks after those who come and go.
    watching: AtomicBool,
    closing: AtomicBool,
    pub(super) map: ExtentCache,
    pub(super) pool: BufferPool,
    bulk: BulkThreads,
    threads: Mutex<Vec<JoinHandle<()>>>,
}

#[derive(Debug, Default)]
struct State {
    /// To be sent when there is a connection.
    waiting: VecDeque<Box<Command>>,
    /// To be sent when the journal has room.
    awaiting_flush: VecDeque<Box<Command>>,
}

impl std::fmt::Debug for ReplayLog {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Journal({:?})", self.flush_token())
    }
}

impl Session {
    /// A way to `export`, up if there is a `first` connection, else connected when it is first used.
    pub(super) fn start(
        connector: Connector,
        export: Export,
        options: SessionOptions,
        first: Option<Handle>,
    ) -> Result<Arc<Self>> {
        let connections = if export.multi_conn && connector.can_repeat() {
            options.connections
        } else {
            1
        };
        let session = Arc::new(Self {
            connector,
            export,
            options: SessionOptions { connections, ..options },
            state: Mutex::default(),
            wanted: Condvar::new(),
            live: RwLock::new(None),
            replay_log: Mutex::default(),
            poller_woken: Mutex::new(false),
            completions: Mutex::default(),
            wake_poller: Condvar::new(),
            watching: AtomicBool::new(false),
            closing: AtomicBool::new(false),
            map: ExtentCache::default(),
            pool: BufferPool::default(),
            bulk: BulkThreads::default(),
            threads: Mutex::default(),
        });
        if let Some(handle) = first {
            let connection = Connection::new(connections)?;
            connection.add(handle)?;
            session.publish(Arc::new(connection));
        }
        session.spawn("nbd-manage", Self::manage)?;
        session.spawn("nbd-drive", Self::poll_loop)?;
        Ok(session)
    }

    fn spawn(self: &Arc<Self>, name: &str, work: fn(&Self)) -> Result<()> {
        let session = Arc::clone(self);
        let thread = thread::Builder::new()
            .name(name.to_owned())
            .stack_size(256 << 10)
            .spawn(move || work(&session));
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
        self.connection().is_some_and(|g| g.claimable() > 0)
    }

    /// For messages.
    pub(super) fn label(&self) -> String {
        self.connector.label()
    }

    /// When a command that begins now fails.
    pub(super) fn deadline(&self) -> Instant {
        Instant::now() + self.options.timeout
    }

    /// Connections that there are now.
    #[cfg(test)]
    pub(super) fn connections(&self) -> usize {
        self.connection().map_or(0, |g| g.count())
    }

    /// Long requests that had a connection for themselves.
    #[cfg(test)]
    pub(super) fn carried(&self) -> usize {
        self.connection().map_or(0, |g| g.claims())
    }

    fn connection(&self) -> Option<Arc<Connection>> {
        self.live.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn publish(&self, connection: Arc<Connection>) {
        *self.live.write().unwrap_or_else(PoisonError::into_inner) = Some(connection);
    }

    /// Begins a command. It is finished in bounded time, maybe before this returns. [`Self::poll_completions`] has to be called
    /// afterwards, so that somebody serves the connection.
    pub(super) fn submit(&self, command: Box<Command>) {
        if let Some(command) = self.admit(command) {
            self.send(command);
        }
    }

    /// Begins the commands of one request. Long ones to a near server are done by a thread of their own.
    pub(super) fn submit_all(self: &Arc<Self>, commands: BulkRequest) {
        let most = self.connection().map_or(0, |g| g.claimable());
        if most == 0 || commands.iter().map(|command| command.len).sum::<u64>() < LONG {
            return commands.into_iter().for_each(|command| self.submit(command));
        }
        let request: BulkRequest = commands.into_iter().filter_map(|command| self.admit(command)).collect();
        if self.bulk.push(request, most) && self.spawn("nbd-carry", Self::run_bulk).is_err() {
            self.bulk
                .not_started()
                .into_iter()
                .flatten()
                .for_each(|command| self.send(command));
        }
    }

    /// What has to be done before a command is sent; `None`: it is sent later, or came to an end.
    fn admit(&self, mut command: Box<Command>) -> Option<Box<Command>> {
        if command.kind.is_change() {
            self.map.change_begins(command.offset, command.offset + command.len);
            if self.must_wait(&command) {
                lock(&self.state).awaiting_flush.push_back(command);
                // The manager has to end it in time, and to see to a flush that nobody else does.
                self.wanted.notify_all();
                // It may have become free just now.
                self.resume_awaiting_flush();
                return None;
            }
        }
        if command.kind == CommandKind::Flush {
            let replay_log = lock(&self.replay_log);
            if let Some(e) = replay_log.lost() {
                drop(replay_log);
                self.finish(command, Err(e));
                return None;
            }
            command.covers = replay_log.flush_token();
        }
        Some(command)
    }

    /// Whether all changes that were answered are durable.
    pub(super) fn is_durable(&self) -> bool {
        let replay_log = lock(&self.replay_log);
        replay_log.is_empty() && replay_log.lost().is_none()
    }

    fn must_wait(&self, command: &Command) -> bool {
        self.export.flush && command.deadline > Instant::now() && lock(&self.replay_log).is_full()
    }

    /// Sends what is ready to be sent.
    fn send(&self, command: Box<Command>) {
        match self.connection() {
            Some(connection) if !connection.is_dead() => {
                let mut back = Vec::new();
                connection.submit(command, &mut back);
                self.on_completions(&connection, &mut back);
            }
            _ => self.wait_for_connection(command),
        }
    }

    fn wait_for_connection(&self, command: Box<Command>) {
        let mut state = lock(&self.state);
        if self.closing.load(Ordering::SeqCst) {
            drop(state);
            let e = self.error(&command, "the disk is closed");
            return self.finish(command, Err(e));
        }
        state.waiting.push_back(command);
        drop(state);
        self.wanted.notify_all();
    }

    /// Takes what came back from a generation.
    fn on_completions(&self, connection: &Connection, back: &mut Vec<Answer>) {
        let _settling = connection.completion_guard(back.len());
        for (command, error) in back.drain(..) {
            match error {
                None => self.succeeded(command),
                Some(errno) if is_loss(errno) => {
                    connection.fail();
                    self.requeue(command);
                }
                Some(errno) => {
                    let e = command.refused(errno);
                    if command.kind != CommandKind::Flush {
                        self.finish(command, Err(e));
                        continue;
                    }
                    // Nobody knows what of it the server has forgotten, so all of it is sent again.
                    connection.fail();
                    lock(&self.replay_log).flush_failed(&e, command.covers, &self.pool);
                    self.finish(command, Err(e));
                    self.make_room();
                }
            }
        }
    }

    fn succeeded(&self, mut command: Box<Command>) {
        if command.kind == CommandKind::Flush {
            let lost = {
                let mut replay_log = lock(&self.replay_log);
                if replay_log.is_void(command.covers) {
                    drop(replay_log);
                    return self.requeue(command);
                }
                replay_log.flushed(command.covers, &self.pool);
                // maybe only after this one was sent
                replay_log.lost()
            };
            self.finish(command, lost.map_or(Ok(()), Err));
            return self.make_room();
        }
        let flush = command.kind.is_change() && self.export.flush && lock(&self.replay_log).answered(&mut command);
        self.finish(command, Ok(()));
        if flush {
            self.flush_unasked();
        }
    }

    /// After a flush: has sent what waited for room in the journal, and the next flush, where that is still too little.
    fn make_room(&self) {
        let flush = lock(&self.replay_log).wants_flush();
        if flush {
            self.flush_unasked();
        }
        self.resume_awaiting_flush();
    }

    /// Ends a command.
    fn finish(&self, command: Box<Command>, result: Result<()>) {
        if command.kind.is_change() {
            self.map.change_ends();
            if result.is_ok() && matches!(command.kind, CommandKind::Zero { .. } | CommandKind::Trim) {
                self.map.emptied(command.offset, command.offset + command.len);
            }
        } else if command.is_unasked() {
            lock(&self.replay_log).flush_ended();
        }
        // What is told a result may panic: that is its own affair, but the others want theirs.
        if catch_unwind(AssertUnwindSafe(|| command.finish(result))).is_err() {
            tracing::error!("the end of a command for an NBD server panicked");
        }
    }

    /// Sends an operation again that a lost connection gave back.
    fn requeue(&self, command: Box<Command>) {
        if command.deadline <= Instant::now() {
            let e = self.timed_out(&command);
            return self.finish(command, Err(e));
        }
        self.wait_for_connection(command);
    }

    fn flush_unasked(&self) {
        let mut command = Command::unasked_flush(self.deadline());
        command.covers = lock(&self.replay_log).flush_token();
        self.send(command);
    }

    /// Sends what waited for room in the journal.
    fn resume_awaiting_flush(&self) {
        loop {
            let mut state = lock(&self.state);
            let full = lock(&self.replay_log).is_full();
            let Some(command) = (if full { None } else { state.awaiting_flush.pop_front() }) else {
                return;
            };
            drop(state);
            if command.deadline <= Instant::now() {
                // Sent now, it would end the connection at the next look, and who waited for it has gone.
                let e = self.timed_out(&command);
                self.finish(command, Err(e));
                continue;
            }
            self.send(command);
        }
    }

    fn timed_out(&self, command: &Command) -> Error {
        self.error(
            command,
            &format!("no answer within {} s", self.options.timeout.as_secs_f32()),
        )
    }

    fn error(&self, command: &Command, why: &str) -> Error {
        Error::new(
            ErrorKind::Os(libc::EIO),
            format!("{}: {}: {why}", self.connector.label(), command.describe()),
        )
    }

    /// Ends the way: what is under way fails, the threads end.
    pub(super) fn close(&self) {
        self.closing.store(true, Ordering::SeqCst);
        if let Some(connection) = self.connection() {
            if connection.is_idle() {
                connection.disconnect();
            } else {
                connection.fail();
                self.poll_completions(Stay::Patiently);
            }
        }
        let State {
            waiting,
            awaiting_flush,
        } = std::mem::take(&mut *lock(&self.state));
        for command in waiting.into_iter().chain(awaiting_flush) {
            let e = self.error(&command, "the disk is closed");
            self.finish(command, Err(e));
        }
        self.bulk.close();
        self.wanted.notify_all();
        *lock(&self.poller_woken) = true;
        self.wake_poller.notify_all();
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
