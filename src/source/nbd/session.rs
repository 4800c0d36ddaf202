//! Session with one export, across all connections that it ever has.
//!
//! ```text
//!   submit ─┬─ connected: sent at once ─────────────────────────► answered ─► result
//!           └─ disconnected: queued ─┐                                │ connection lost
//!                                    ▼                                ▼
//!   manager   connect, with back-off ─ replay unflushed writes ─ send queued commands ─ connected
//!                                    └─ deadline of a command passed, or too many attempts: I/O error
//! ```
//! # Threads
//!
//! The *manager thread* connects and reconnects (`session/reconnect.rs`). It is the only thread that blocks on a
//! connection attempt. The *poller thread* reads answers while no other thread does (`session/serve.rs`). *Bulk
//! threads* (`bulk.rs`) carry large requests. Every other thread is a caller: it submits commands and may poll for
//! their answers. No thread holds a lock of the session while it sends a command, reads an answer or calls a
//! completion.
//!
//! # Lock order
//!
//! `queues`, `live`, `replay_log`, then those of the buffer pool: a thread that holds one of them acquires only later
//! ones. The poller thread acquires `live` and `retired` while it holds `poller_woken`. All other locks are acquired
//! alone.
//!
//! # Limit: writes of a lost connection
//!
//! The client cannot cancel a command at the server. A command of a lost connection may still be executed: the server
//! may be executing it, may hang before it, and can still read a command from its socket buffer after the client has
//! shut down its end. An unanswered write may therefore take effect at any time until the server closes its end of the
//! old connection: after the client has replayed it, after it was reported as failed, and even after newer writes to
//! the same bytes were answered and flushed on the new connection, which are then lost. This requires a server that
//! outlives its connection: one that hung or was slower than the deadline, or whose connection the network broke. A
//! server process that has exited does nothing more.
//!
//! The client cannot prevent this. The protocol neither cancels a command nor reports that the commands of another
//! connection have ended: a flush covers answered commands only, and no rule makes a server finish the commands that it
//! has started before it closes its end of a socket. Waiting for that close would take forever with a server that hangs
//! or is unreachable. Sending the newer writes a second time later would only postpone the moment from which on they
//! can be lost. Other clients that retry unanswered commands after a reconnect, such as qemu, have the same limit. The
//! README documents it.

mod reconnect;
mod serve;

use std::collections::VecDeque;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, OnceLock, RwLock, Weak};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use super::buffer_pool::BufferPool;
use super::bulk::{BulkRequest, BulkThreads};
use super::command::{Command, CommandCompletion, CommandKind};
use super::connect::Connector;
use super::connection::{Answer, Connection, is_loss};
use super::export::Export;
use super::export_identity::ExportIdentity;
use super::extent_cache::ExtentCache;
use super::ffi::Handle;
use super::replay_log::ReplayLog;
use crate::block::Stay;
use crate::error::{Error, ErrorKind, Result};
use crate::mutex::{lock, read_lock, write_lock};
use crate::write_latch::WriteLatch;

/// Smallest request in bytes that is passed to a bulk thread: its transfer costs more than the thread switch.
const BULK_MIN: u64 = 128 << 10;

/// Time for a command to wait for a connection if an earlier command has waited in vain for its whole timeout. Longer
/// than the pause between two attempts then. An attempt goes on after it.
const UNREACHABLE_TIMEOUT: Duration = Duration::from_secs(1);

/// Time for the threads of a session to exit in [`Session::close`].
const SHUTDOWN_TIMEOUT: Duration = Duration::from_secs(3);

/// Longest wait of a close for the answers to commands in flight.
const LAST_ANSWERS: Duration = Duration::from_millis(200);

/// Limits of a session, from the mount options.
#[derive(Debug, Clone, Copy)]
pub(super) struct SessionOptions {
    /// Maximum number of sockets of a connection.
    pub(super) connections: usize,
    /// Time from the submission of a command to its failure, including reconnects.
    pub(super) timeout: Duration,
    /// Reconnect attempts after a failed one. `None`: retries until the deadline of the command.
    pub(super) retry: Option<u32>,
    /// True if the disk may be written.
    pub(super) writable: bool,
}

/// Session with one export: queues, sends and replays commands; see the module documentation.
#[derive(Debug)]
pub(super) struct Session {
    connector: Connector,
    export: Export,
    options: SessionOptions,
    /// First in the lock order.
    queues: Mutex<CommandQueues>,
    /// Wakes the manager thread, together with `queues`: a command was queued, or the session is closing.
    wake_manager: Condvar,
    /// The connection that commands are sent on; it may be dead already. Second in the lock order, held only to clone
    /// or replace the `Arc`.
    live: RwLock<Option<Arc<Connection>>>,
    /// Last in the lock order.
    replay_log: Mutex<ReplayLog>,
    /// Write latch of the disk; the replay log sets it.
    pub(super) latch: Arc<WriteLatch>,
    /// Lost connections, each with the time until which it is kept for late submitters.
    retired: Mutex<Vec<(Arc<Connection>, Instant)>>,
    /// Wake-up flag of the poller thread, together with `wake_poller`. A flag, because a notification alone is lost
    /// while the thread polls.
    poller_woken: Mutex<bool>,
    wake_poller: Condvar,
    /// True while the poller thread watches for callers that leave without polling to the end.
    watching: AtomicBool,
    /// Set when a command has waited for a connection until its deadline; cleared by the next handshake and connection.
    unreachable: AtomicBool,
    /// Set once by [`Session::close`], before the queues are drained.
    closing: AtomicBool,
    /// Block status answers; all changes are reported to it.
    pub(super) map: ExtentCache,
    /// Number of connections so far.
    epoch: AtomicU64,
    /// Tells a server that comes back with another disk. Shared with the completions of its reads.
    identity: Arc<ExportIdentity>,
    /// Buffers of the commands and of the replay log.
    pub(super) pool: BufferPool,
    bulk: BulkThreads,
    /// Joined by [`Self::close`].
    threads: Mutex<Vec<JoinHandle<()>>>,
    /// Set once the manager and the poller thread were started.
    started: OnceLock<Result<()>>,
    /// For the threads.
    me: Weak<Self>,
}

/// Commands that are not sent yet. Each fails when its deadline passes.
#[derive(Debug, Default)]
struct CommandQueues {
    /// Sent when there is a connection.
    awaiting_connection: VecDeque<Box<Command>>,
    /// Changes held back until the sampled blocks are known, or a flush frees space in the replay log.
    held: VecDeque<Box<Command>>,
}

impl CommandQueues {
    /// Returns true if a command may change the export.
    fn has_changes(&self) -> bool {
        let mut queued = self.awaiting_connection.iter().chain(&self.held);
        queued.any(|command| command.kind.is_change())
    }
}

impl std::fmt::Debug for ReplayLog {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "ReplayLog({:?})", self.flush_token())
    }
}

impl Session {
    /// Starts a session with `export` and its threads.
    ///
    /// `first` is a handle that is connected already. Without it the session connects when the first command is
    /// submitted.
    pub(super) fn start(
        connector: Connector,
        export: Export,
        options: SessionOptions,
        first: Option<Handle>,
    ) -> Result<Arc<Self>> {
        // Several sockets need NBD_FLAG_CAN_MULTI_CONN: without it a flush on one socket does not cover the writes of
        // another one.
        let connections = if export.multi_conn && connector.can_repeat() {
            options.connections
        } else {
            1
        };
        let latch = Arc::<WriteLatch>::default();
        let session = Arc::new_cyclic(|me| Self {
            me: Weak::clone(me),
            connector,
            export,
            options: SessionOptions { connections, ..options },
            queues: Mutex::default(),
            wake_manager: Condvar::new(),
            live: RwLock::new(None),
            replay_log: Mutex::new(ReplayLog::new(Arc::clone(&latch))),
            latch,
            poller_woken: Mutex::new(false),
            retired: Mutex::default(),
            wake_poller: Condvar::new(),
            watching: AtomicBool::new(false),
            unreachable: AtomicBool::new(false),
            closing: AtomicBool::new(false),
            map: ExtentCache::default(),
            epoch: AtomicU64::new(0),
            identity: Arc::default(),
            pool: BufferPool::default(),
            bulk: BulkThreads::default(),
            threads: Mutex::default(),
            started: OnceLock::new(),
        });
        if let Some(handle) = first {
            let connection = Connection::new(connections)?;
            connection.add(handle)?;
            session.publish(Arc::new(connection));
            session.start_threads()?;
        }
        Ok(session)
    }

    /// Starts the manager and the poller thread, unless they run. A mount of every export of a server has a session for each
    /// name that was looked up, and most of them never get a command.
    fn start_threads(&self) -> Result<()> {
        let start = || {
            // The caller has the session by an `Arc`.
            let Some(session) = self.me.upgrade() else {
                return Ok(());
            };
            session.spawn("nbd-manager", Self::manage)?;
            session.spawn("nbd-poller", Self::poll_loop)
        };
        self.started.get_or_init(start).clone()
    }

    fn spawn(self: &Arc<Self>, name: &str, work: fn(&Self)) -> Result<()> {
        let session = Arc::clone(self);
        let thread = thread::Builder::new()
            .name(name.to_owned())
            .stack_size(256 << 10)
            .spawn(move || work(&session));
        let thread = thread.map_err(|e| Error::io(format!("{}: start thread {name}", self.label()), e))?;
        let mut threads = lock(&self.threads);
        // Bulk threads come and go: without this the list would grow with each of them.
        threads.retain(|t| !t.is_finished());
        threads.push(thread);
        Ok(())
    }

    /// Returns the size and the abilities that the server reported for the export.
    pub(super) fn export(&self) -> &Export {
        &self.export
    }

    /// Returns true if the server is near and has a socket to spare, so that long requests are best split.
    pub(super) fn is_near(&self) -> bool {
        self.connection().is_some_and(|g| g.claimable() > 0)
    }

    /// Returns a number that changes with each connection. Between two of them other clients may have written, and a server
    /// that was restarted may have lost what it had.
    pub(super) fn epoch(&self) -> u64 {
        self.epoch.load(Ordering::Acquire)
    }

    /// Returns the address of the server, for messages.
    pub(super) fn label(&self) -> String {
        self.connector.label()
    }

    /// Returns the deadline of a command that is sent now.
    pub(super) fn deadline(&self) -> Instant {
        Instant::now() + self.options.timeout
    }

    /// Returns the time that a command may wait for a connection, and then for its answer.
    pub(super) fn timeout(&self) -> Duration {
        self.options.timeout
    }

    /// Limits the wait of a new command if the server has been gone for a whole timeout.
    ///
    /// After a failed read-ahead the kernel reads the same page again, which would double the time after which the
    /// application gets its error.
    pub(super) fn limit_wait(&self, command: &mut Command) {
        if self.unreachable.load(Ordering::Relaxed) {
            command.deadline = command.deadline.min(Instant::now() + UNREACHABLE_TIMEOUT);
            // The server may be back before the command is sent, and then has the whole timeout.
            command.note_wait();
        }
    }

    /// Returns the number of sockets of the current connection.
    #[cfg(test)]
    pub(super) fn connections(&self) -> usize {
        self.connection().map_or(0, |g| g.count())
    }

    /// Returns how often a bulk thread has claimed a socket of the current connection.
    #[cfg(test)]
    pub(super) fn carried(&self) -> usize {
        self.connection().map_or(0, |g| g.claims())
    }

    /// Returns the current connection. It may be dead, and the manager may replace it at any time: a command that is
    /// submitted on it afterwards comes back as lost.
    fn connection(&self) -> Option<Arc<Connection>> {
        read_lock(&self.live).clone()
    }

    fn publish(&self, connection: Arc<Connection>) {
        *write_lock(&self.live) = Some(connection);
    }

    /// Submits a command.
    ///
    /// Its completion is called within its timeout, possibly before this returns. The caller must call
    /// [`Self::poll_completions`] afterwards, so that a thread reads the answer.
    pub(super) fn submit(&self, command: Box<Command>) {
        if let Some(command) = self.admit(command) {
            self.send(command);
        }
    }

    /// Submits the commands of one request. Passes a long request to a near server to a bulk thread.
    pub(super) fn submit_all(self: &Arc<Self>, commands: BulkRequest) {
        let most = self.connection().map_or(0, |g| g.claimable());
        if most == 0 || commands.iter().map(|command| command.len).sum::<u64>() < BULK_MIN {
            return commands.into_iter().for_each(|command| self.submit(command));
        }
        let request: BulkRequest = commands.into_iter().filter_map(|command| self.admit(command)).collect();
        if self.bulk.push(request, most) && self.spawn("nbd-bulk", Self::run_bulk).is_err() {
            // Without any bulk thread the queued requests would wait forever: this thread sends them.
            self.bulk
                .thread_not_started()
                .into_iter()
                .flatten()
                .for_each(|command| self.send(command));
        }
    }

    /// Prepares a command for sending. Returns `None` if the command was queued for later, or has failed.
    fn admit(&self, mut command: Box<Command>) -> Option<Box<Command>> {
        if let Err(e) = self.start_threads() {
            self.finish(command, Err(e));
            return None;
        }
        if command.kind.is_change() {
            // Before the command can reach the server: a block status answer that crosses it must not be cached.
            self.map.begin_change(command.offset, command.offset + command.len);
            self.sample_before(&command);
            if self.must_hold(&command) {
                self.enqueue(command, |queues| &mut queues.held);
                // The manager fails the command at its deadline, and flushes if no other flush is in flight.
                // The flush or the sampling that it waits for may have ended between the check and the push, and its
                // thread found the queue empty. Check again, or the command would wait for an end that never comes.
                self.resume_held();
                return None;
            }
        }
        if command.kind == CommandKind::Flush {
            let replay_log = lock(&self.replay_log);
            if let Err(e) = replay_log.check_lost() {
                drop(replay_log);
                self.finish(command, Err(e));
                return None;
            }
            // Taken before the flush is sent: a write answered later is not covered, even if the server flushes it.
            command.covers = replay_log.flush_token();
        }
        Some(command)
    }

    /// Reads the sampled blocks of the export ahead of the first change of the session, which waits for them.
    fn sample_before(&self, change: &Command) {
        let (from, to) = (change.offset, change.offset + change.len);
        let blocks = self
            .identity
            .before_change(from, to, self.export.size, self.export.sample_len());
        let Some((epoch, blocks)) = blocks else { return };
        for block in blocks {
            let Some(buf) = self.pool.take((block.end - block.start) as usize) else {
                self.identity.was_read();
                continue;
            };
            let identity = Arc::clone(&self.identity);
            // A block that cannot be read is not compared later.
            let learn: CommandCompletion = Box::new(move |mut command, result| {
                let len = command.len as usize;
                if let (Ok(()), Some(bytes)) = (result, command.buf.take().bytes().get(..len)) {
                    identity.learn(epoch, command.offset, bytes);
                }
                identity.was_read();
            });
            let (offset, len) = (block.start, block.end - block.start);
            self.send(Command::new(
                CommandKind::Read,
                offset,
                len,
                buf,
                self.deadline(),
                learn,
            ));
        }
    }

    /// Returns true if every answered change is durable, so that a flush has nothing to do.
    pub(super) fn is_durable(&self) -> bool {
        let replay_log = lock(&self.replay_log);
        replay_log.is_empty() && replay_log.check_lost().is_ok()
    }

    /// Returns true if a change has to wait for the sampled blocks, or (back-pressure) until a flush frees space in the
    /// replay log.
    fn must_hold(&self, command: &Command) -> bool {
        let is_full = || self.export.flush && command.deadline > Instant::now() && lock(&self.replay_log).is_full();
        self.identity.is_sampling() || is_full()
    }

    /// Sends an admitted command, or queues it until there is a connection.
    fn send(&self, mut command: Box<Command>) {
        match self.connection() {
            Some(connection) if !connection.is_dead() => {
                // Its wait is no fault of this connection, which an overdue answer retires: with what is left of the time,
                // a slow server would lose one connection after the other.
                command.restart_clock(|| self.deadline());
                let mut back = Vec::new();
                connection.submit(command, &mut back);
                self.on_completions(&connection, &mut back);
            }
            _ => self.wait_for_connection(command),
        }
    }

    /// Queues a command for the next connection.
    fn wait_for_connection(&self, command: Box<Command>) {
        self.enqueue(command, |queues| &mut queues.awaiting_connection);
    }

    /// Appends a command to one of the queues and wakes the manager thread. Fails the command if the session is closed.
    fn enqueue(
        &self,
        mut command: Box<Command>,
        queue: impl FnOnce(&mut CommandQueues) -> &mut VecDeque<Box<Command>>,
    ) {
        let mut queues = lock(&self.queues);
        // Checked under the lock: `close` sets the flag before it drains the queues under the same lock, so no command
        // can enter a queue that is not drained any more.
        if self.closing.load(Ordering::SeqCst) {
            drop(queues);
            let e = self.error(&command, "the disk is closed");
            return self.finish(command, Err(e));
        }
        command.note_wait();
        queue(&mut queues).push_back(command);
        drop(queues);
        self.wake_manager.notify_all();
    }

    /// Handles commands that libnbd has returned: answered, refused, or lost with the connection. Drains `back`.
    fn on_completions(&self, connection: &Connection, back: &mut Vec<Answer>) {
        // Until it is dropped the connection is not idle. The manager waits for that before it drains the replay log,
        // so each answered write of `back` is in the log by then, and each lost command is queued.
        let _guard = connection.completion_guard(back.len());
        for (command, error) in back.drain(..) {
            match error {
                None => self.succeeded(command),
                Some(errno) if is_loss(errno) => {
                    connection.fail();
                    self.requeue(command);
                }
                Some(errno) => {
                    let e = command.refused(errno).within(self.label());
                    if command.kind != CommandKind::Flush {
                        self.finish(command, Err(e));
                        continue;
                    }
                    // A refused flush does not report which of the writes the server has dropped. Retire the
                    // connection: the manager replays the whole log on the next one.
                    connection.fail();
                    lock(&self.replay_log).flush_failed(&e, command.covers, &self.pool);
                    self.finish(command, Err(e));
                    self.continue_after_flush();
                }
            }
        }
    }

    /// Handles a command that the server answered without an error.
    fn succeeded(&self, mut command: Box<Command>) {
        if command.kind == CommandKind::Flush {
            let lost = {
                let mut replay_log = lock(&self.replay_log);
                if replay_log.is_void(command.covers) {
                    // Another flush failed while this one was in flight, and the server reports a failed write-back
                    // only once: this answer proves nothing. Flush again after the replay.
                    drop(replay_log);
                    return self.requeue(command);
                }
                replay_log.flushed(command.covers, &self.pool);
                // Not only in `admit`: writes may have been lost after this flush was sent.
                replay_log.check_lost()
            };
            self.finish(command, lost);
            return self.continue_after_flush();
        }
        // Data first, then the result: once the caller knows that the write succeeded, the log must hold it.
        let flush = command.kind.is_change() && self.export.flush && lock(&self.replay_log).answered(&mut command);
        self.finish(command, Ok(()));
        if flush {
            self.start_background_flush();
        }
    }

    /// Sends the changes that waited for a flush. Starts another background flush if the replay log is still too large.
    fn continue_after_flush(&self) {
        let flush = lock(&self.replay_log).wants_flush();
        if flush {
            self.start_background_flush();
        }
        self.resume_held();
    }

    /// Ends a command: updates the extent cache and the flush state, then calls its completion.
    fn finish(&self, command: Box<Command>, result: Result<()>) {
        if command.kind.is_change() {
            self.map.end_change();
            if result.is_ok() && matches!(command.kind, CommandKind::Zero { .. } | CommandKind::Trim) {
                self.map.zeroed(command.offset, command.offset + command.len);
            }
        } else if command.is_background() {
            lock(&self.replay_log).flush_ended();
        }
        let was_sampling = self.identity.is_sampling();
        // A completion that panics must not take the remaining answers of the batch, or the polling thread, with it.
        if catch_unwind(AssertUnwindSafe(|| command.finish(result))).is_err() {
            tracing::error!("{}: completion handler of a command panicked", self.label());
        }
        // Several threads may see the end of the sampling; the queue is emptied once.
        if was_sampling && !self.identity.is_sampling() {
            self.resume_held();
        }
    }

    /// Queues a command that a lost connection returned, or fails it if its deadline has passed.
    fn requeue(&self, command: Box<Command>) {
        if command.deadline <= Instant::now() {
            self.unreachable.store(true, Ordering::Relaxed);
            let e = self.timeout_error(&command);
            return self.finish(command, Err(e));
        }
        self.wait_for_connection(command);
    }

    /// Sends a flush on the session's own behalf, to free space in the replay log.
    fn start_background_flush(&self) {
        let mut command = Command::background_flush(self.deadline());
        command.covers = lock(&self.replay_log).flush_token();
        self.send(command);
    }

    /// Sends the changes that were held back, while the replay log has space.
    fn resume_held(&self) {
        while !self.identity.is_sampling() {
            // Lock order: the queues, then the replay log. Both are released before the command is sent.
            let mut queues = lock(&self.queues);
            let full = lock(&self.replay_log).is_full();
            let Some(command) = (if full { None } else { queues.held.pop_front() }) else {
                return;
            };
            drop(queues);
            if command.deadline <= Instant::now() {
                // Sent now, it would count as overdue in the next tick and fail the whole connection.
                let e = self.timeout_error(&command);
                self.finish(command, Err(e));
                continue;
            }
            self.send(command);
        }
    }

    fn timeout_error(&self, command: &Command) -> Error {
        self.error(
            command,
            &format!(
                "no answer within {} s (option timeout=)",
                self.options.timeout.as_secs_f32()
            ),
        )
    }

    fn error(&self, command: &Command, why: &str) -> Error {
        Error::new(
            ErrorKind::Os(libc::EIO),
            format!("{}: {}: {why}", self.connector.label(), command.describe()),
        )
    }

    /// Closes the session: waits up to [`LAST_ANSWERS`] for what is in flight, disconnects, fails all other commands, and
    /// waits up to [`SHUTDOWN_TIMEOUT`] for the threads.
    pub(super) fn close(&self) {
        // First: from here on `wait_for_connection` fails commands instead of queueing them.
        self.closing.store(true, Ordering::SeqCst);
        self.connector.closing();
        if let Some(connection) = self.connection() {
            // A socket that is closed with answers unread looks like a crash to the server: those of queries that no caller
            // waits for any more come soon.
            let until = Instant::now() + LAST_ANSWERS;
            while !connection.is_idle() && Instant::now() < until {
                self.poll_completions(Stay::Patiently);
                thread::sleep(Duration::from_millis(1));
            }
            if connection.is_idle() {
                connection.disconnect();
            } else {
                connection.fail();
                self.poll_completions(Stay::Patiently);
            }
        }
        let CommandQueues {
            awaiting_connection,
            held,
        } = std::mem::take(&mut *lock(&self.queues));
        for command in awaiting_connection.into_iter().chain(held) {
            let e = self.error(&command, "the disk is closed");
            self.finish(command, Err(e));
        }
        self.bulk.close();
        // The flag was set before the queues were locked above. A manager thread that saw it unset under that lock
        // waits on the condition variable by now, and is woken here.
        self.wake_manager.notify_all();
        *lock(&self.poller_woken) = true;
        self.wake_poller.notify_all();
        let until = Instant::now() + SHUTDOWN_TIMEOUT;
        for thread in std::mem::take(&mut *lock(&self.threads)) {
            while !thread.is_finished() && Instant::now() < until {
                thread::sleep(Duration::from_millis(1));
            }
            // A thread that hangs in a connection attempt is not waited for: it exits when the attempt ends.
            if thread.is_finished() {
                let _ = thread.join();
            }
        }
        *write_lock(&self.live) = None;
    }
}
