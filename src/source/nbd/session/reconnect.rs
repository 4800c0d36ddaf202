//! The manager thread of a session: connects, replays unflushed writes, and fails commands whose deadline has passed.
//!
//! ```text
//!   connected:  add sockets ─► wait for a queued command ─► the connection is dead ─┐
//!                    ▲                                                              ▼
//!                    └── publish ◄── replay ◄── handshake ◄── old connection idle ◄─┘
//!                                      └─ failed: back off, fail late commands ─────┘
//! ```
//! Invariants:
//! - The old connection is idle before the replay log is drained: each write that it answered is in the log.
//! - A connection is published only after the replay: no command can overtake a replayed write.
//! - No change of the session reaches another disk than before: the sampled blocks are compared before the replay.
//! - Queued commands are sent only after the connection is published, flushes with a new [`FlushToken`].
//!
//! While it backs off, connects or replays, the manager still fails queued commands whose deadline passes.
//!
//! [`FlushToken`]: crate::source::nbd::unflushed::FlushToken

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::thread;
use std::time::{Duration, Instant};

use super::{CommandQueues, Session};
use crate::block::Stay;
use crate::error::{Error, ErrorKind, Result};
use crate::mutex::{lock, wait_timeout};
use crate::source::nbd::command::{Command, CommandKind};
use crate::source::nbd::connection::{Answer, Connection, TICK, is_loss};
use crate::source::nbd::poller::{PollUntil, Poller};
use crate::source::nbd::replay_log::{ReplayEntry, ReplayLog};

/// First and longest pause between two attempts to connect. The pause doubles with each failure.
const BACK_OFF: (Duration, Duration) = (Duration::from_millis(50), Duration::from_secs(2));

/// Longest pause while commands wait for less than their whole timeout.
const UNREACHABLE_PAUSE: Duration = Duration::from_millis(250);

/// Replayed changes in flight at a time.
const REPLAY_BATCH: usize = 32;

/// Sampled blocks that are read at a time.
const SAMPLE_BATCH: usize = 2;

/// Time limit for the handshake of an additional socket: a server at its connection limit may never answer it.
const ADD_SOCKET_TIMEOUT: Duration = Duration::from_secs(5);

/// Time that a lost connection is kept, for threads that fetched it before it was replaced and submit on it later.
const KEEP_RETIRED: Duration = Duration::from_secs(10);

/// Maximum number of lost connections kept: each holds open sockets.
const MAX_RETIRED: usize = 8;

impl Session {
    /// Runs the manager thread until the session is closed.
    pub(super) fn manage(&self) {
        // `came_up` is true from a successful attempt until its loss is examined. The connection that the session was
        // started with does not count: this thread did not make it.
        let (mut failures, mut came_up) = (0, false);
        loop {
            if let Some(connection) = self.connection().filter(|g| !g.is_dead()) {
                self.add_sockets(&connection);
            }
            if !self.wait_until_needed() {
                return;
            }
            if std::mem::take(&mut came_up)
                && let Some(connection) = self.connection().filter(|g| g.is_dead())
            {
                // A server that accepts connections and drops them again at once must not be retried in a tight loop: a
                // connection that answered nothing counts as a failed attempt.
                if !connection.has_answered() {
                    failures += 1;
                    let text = "the connection was lost before it answered anything";
                    self.after_failure(&Error::new(ErrorKind::Os(libc::ENOTCONN), text), failures);
                    continue;
                }
                failures = 0;
                // It worked, but not for long: back off once, without counting a failure.
                if connection.age() < BACK_OFF.1 {
                    self.pause(BACK_OFF.0);
                }
            }
            match self.connect() {
                Ok(()) => came_up = true,
                Err(e) => {
                    failures += 1;
                    self.after_failure(&e, failures);
                }
            }
        }
    }

    /// Waits until a command is queued for a connection, and fails late commands meanwhile. Returns false if the
    /// session is closing.
    fn wait_until_needed(&self) -> bool {
        let mut queues = lock(&self.queues);
        loop {
            if self.closing.load(Ordering::SeqCst) {
                return false;
            }
            let expired = self.take_late(&mut queues);
            if !expired.is_empty() {
                drop(queues);
                self.fail_commands(expired);
                queues = lock(&self.queues);
            } else if queues.awaiting_connection.is_empty()
                && !queues.held.is_empty()
                && lock(&self.replay_log).wants_flush()
            {
                // Changes wait for a flush, and none is in flight: the last background flush has failed. Send another
                // one, or they would wait until their deadline.
                drop(queues);
                self.start_background_flush();
                self.poll_completions(Stay::No);
                queues = lock(&self.queues);
            } else if queues.awaiting_connection.is_empty() {
                // With changes held back, check again before long: their deadlines, and the flush that they wait for.
                let wait = if queues.held.is_empty() {
                    Duration::from_secs(3600)
                } else {
                    BACK_OFF.1
                };
                queues = wait_timeout(&self.wake_manager, queues, wait).0;
            } else {
                return true;
            }
        }
    }

    /// Removes the commands whose deadline has passed from the queues. The caller fails them without the lock, because
    /// a completion may submit the next command.
    fn take_late(&self, queues: &mut CommandQueues) -> VecDeque<Box<Command>> {
        let now = Instant::now();
        let mut late = VecDeque::new();
        let CommandQueues {
            awaiting_connection,
            held,
        } = queues;
        for queue in [awaiting_connection, held] {
            // Usually none is late: the queue is not rebuilt then.
            if queue.iter().any(|command| command.deadline <= now) {
                let (expired, left): (VecDeque<_>, VecDeque<_>) =
                    queue.drain(..).partition(|command| command.deadline <= now);
                late.extend(expired);
                queue.extend(left);
            }
        }
        late
    }

    /// Fails the queued commands whose deadline has passed.
    fn fail_late(&self) {
        let late = self.take_late(&mut lock(&self.queues));
        self.fail_commands(late);
    }

    fn fail_commands(&self, late: VecDeque<Box<Command>>) {
        let connected = self.connection().is_some_and(|connection| !connection.is_dead());
        if !late.is_empty() && !connected {
            self.unreachable.store(true, Ordering::Relaxed);
        }
        for command in late {
            let e = self.timeout_error(&command);
            self.finish(command, Err(e));
        }
    }

    /// Connects if there is no live connection, replays unflushed writes, publishes the connection, and sends the
    /// queued commands.
    fn connect(&self) -> Result<()> {
        let old = self.connection();
        if let Some(old) = old.as_ref().filter(|g| g.is_dead()) {
            // Its sockets are shut down, so libnbd returns each of its commands. Until the last one has been handled
            // the replay log may lack an answered write, and the replay would miss it or reorder it.
            self.poll_until(|| old.is_idle());
            // Another thread may poll the old connection, or handle the last answers: wait for that thread.
            while !old.is_idle() && !self.closing.load(Ordering::SeqCst) {
                thread::sleep(Duration::from_millis(1));
            }
        }
        if old.as_ref().is_none_or(|g| g.is_dead()) {
            // Not the deadline of a command: those that wait fail on their own, and the next one can use the connection.
            let deadline = self.deadline();
            // `open` calls this repeatedly during the handshake.
            let closing = || {
                self.fail_late();
                self.closing.load(Ordering::SeqCst)
            };
            let (handle, export) = self.connector.open(true, deadline, &closing)?;
            // Before the replay, which may take long: the server is there.
            self.unreachable.store(false, Ordering::Relaxed);
            export.check_same(&self.export, self.options.writable, true)?;
            // The server may have been restarted with other data: drop all cached extents.
            self.map.clear();
            // Before any command can be answered by it.
            self.epoch.fetch_add(1, Ordering::AcqRel);
            let connection = Arc::new(Connection::new(self.options.connections)?);
            connection.add(handle)?;
            self.check_identity(&connection)?;
            // Before it is published: no other thread can send a command ahead of the replayed writes.
            self.replay(&connection)?;
            self.publish(Arc::clone(&connection));
            // Again: a command may have timed out during the replay.
            self.unreachable.store(false, Ordering::Relaxed);
            // A thread that fetched the old connection just before may still submit a command on it. The poller thread
            // collects such commands from the retired connections and queues them again.
            if let Some(old) = &old {
                let mut retired = lock(&self.retired);
                if retired.len() >= MAX_RETIRED {
                    retired.remove(0);
                }
                retired.push((Arc::clone(old), Instant::now() + KEEP_RETIRED));
                tracing::warn!("{}: reconnected", self.connector.label());
            }
            self.continue_after_flush();
        }
        // A command that is late already would count as overdue and fail the new connection in the next tick.
        self.fail_late();
        let awaiting_connection = std::mem::take(&mut lock(&self.queues).awaiting_connection);
        for mut command in awaiting_connection {
            // Replay has renumbered the entries of the log. With its old token an answered flush would cover none of
            // them, although the server has made all of them durable.
            if command.kind == CommandKind::Flush {
                command.covers = lock(&self.replay_log).flush_token();
            }
            self.send(command);
        }
        self.poll_completions(Stay::No);
        Ok(())
    }

    /// Backs off after a failed attempt. Fails all queued commands if another attempt is useless or not allowed.
    fn after_failure(&self, e: &Error, failures: u32) {
        tracing::info!("{}: reconnect attempt {failures} failed: {e}", self.connector.label());
        // `Corrupt`: the export is malformed or is not the same as before. A retry does not change that.
        let hopeless = e.kind() == ErrorKind::Corrupt || self.options.retry.is_some_and(|most| failures > most);
        if hopeless || !self.connector.can_repeat() {
            // Changes that wait for a flush need a connection too.
            let CommandQueues {
                awaiting_connection,
                held,
            } = std::mem::take(&mut *lock(&self.queues));
            for command in awaiting_connection.into_iter().chain(held) {
                let failed = self.error(&command, &e.to_string());
                self.finish(command, Err(failed));
            }
        }
        let longest = if self.unreachable.load(Ordering::Relaxed) {
            UNREACHABLE_PAUSE
        } else {
            BACK_OFF.1
        };
        let pause = BACK_OFF.0.saturating_mul(1 << failures.min(10).saturating_sub(1));
        self.pause(pause.min(longest));
    }

    /// Sleeps for `pause`, and fails late commands meanwhile. Returns early when the session is closing.
    fn pause(&self, pause: Duration) {
        let until = Instant::now() + pause;
        let mut queues = lock(&self.queues);
        while Instant::now() < until && !self.closing.load(Ordering::SeqCst) {
            let late = self.take_late(&mut queues);
            if !late.is_empty() {
                drop(queues);
                self.fail_commands(late);
                queues = lock(&self.queues);
                continue;
            }
            let next = queues
                .awaiting_connection
                .iter()
                .map(|command| command.deadline)
                .min()
                .map_or(until, |d| d.min(until));
            let wait = next.saturating_duration_since(Instant::now());
            queues = wait_timeout(&self.wake_manager, queues, wait).0;
        }
    }

    /// Opens further sockets, up to the number in the options. A server that accepts fewer is not an error.
    ///
    /// Stops as soon as a command is queued: reconnecting comes first.
    fn add_sockets(&self, connection: &Connection) {
        while connection.count() < self.options.connections && !connection.is_dead() {
            if self.closing.load(Ordering::SeqCst) || !lock(&self.queues).awaiting_connection.is_empty() {
                return;
            }
            let deadline = Instant::now() + self.options.timeout.min(ADD_SOCKET_TIMEOUT);
            let needed = || {
                self.fail_late();
                self.closing.load(Ordering::SeqCst) || !lock(&self.queues).awaiting_connection.is_empty()
            };
            let added = self
                .connector
                .open(false, deadline, &needed)
                .and_then(|(handle, export)| {
                    export.check_same(&self.export, self.options.writable, false)?;
                    connection.add(handle)
                });
            if let Err(e) = added {
                if needed() {
                    return;
                }
                let (label, count) = (self.connector.label(), connection.count());
                tracing::info!("{label}: continuing with {count} sockets: adding one failed: {e}");
                return;
            }
        }
    }

    /// Replays all changes that no flush has covered, in their order.
    ///
    /// The server may execute commands in flight in any order. So a batch holds changes that do not overlap, and a
    /// change that overlaps one of the batch waits for the next batch. On an error the changes not yet answered go back
    /// to the log, after the replayed ones.
    fn replay(&self, connection: &Connection) -> Result<()> {
        let mut remaining = lock(&self.replay_log).drain();
        if remaining.is_empty() {
            return Ok(());
        }
        tracing::info!(
            "{}: replaying {} unflushed writes",
            self.connector.label(),
            remaining.len()
        );
        while !remaining.is_empty() {
            let mut batch: Vec<ReplayEntry> = Vec::new();
            while batch.len() < REPLAY_BATCH
                && let Some(next) = remaining.pop_front()
            {
                // Later changes must not overtake `next` either: they may overlap it.
                if batch.iter().any(|e| e.overlaps(&(next.offset, next.len))) {
                    remaining.push_front(next);
                    break;
                }
                batch.push(next);
            }
            if let Err((e, unsent)) = self.replay_batch(connection, batch) {
                for entry in unsent.into_iter().rev() {
                    remaining.push_front(entry);
                }
                lock(&self.replay_log).restore(remaining);
                return Err(e);
            }
        }
        lock(&self.replay_log).restore(remaining);
        // Only answers to queued commands count as progress: a server that accepts the replay and then dies from the
        // first queued command must run out of attempts.
        connection.forget_answers();
        Ok(())
    }

    /// Replays changes that do not overlap and waits for all answers.
    ///
    /// Answered changes are added to the log again: they are still not flushed. If the connection is lost, the
    /// unanswered ones are returned with the error. A change that the server refuses is lost, and every later flush
    /// fails.
    fn replay_batch(&self, connection: &Connection, batch: Vec<ReplayEntry>) -> Result<(), (Error, Vec<ReplayEntry>)> {
        let commands = batch.into_iter().map(|entry| {
            let ReplayEntry {
                kind, offset, len, buf, ..
            } = entry;
            Command::new(kind, offset, len, buf, self.deadline(), Box::new(|_, _| ()))
        });
        let answers = self.run_unpublished(connection, commands);
        let mut unsent = Vec::new();
        let mut replay_log = lock(&self.replay_log);
        for (mut command, error) in answers {
            match error {
                None => replay_log.add(&mut command),
                Some(errno) if is_loss(errno) => unsent.push(command),
                Some(errno) => {
                    let e = command
                        .refused(errno)
                        .within(format!("{}: unflushed write lost in replay", self.connector.label()));
                    replay_log.set_lost(e);
                }
            }
        }
        drop(replay_log);
        if unsent.is_empty() {
            return Ok(());
        }
        let e = Error::new(
            ErrorKind::Os(libc::ENOTCONN),
            "the connection was lost while unflushed writes were replayed",
        );
        // A temporary log turns the commands back into entries. They do not overlap, so their order is free.
        let mut replay_log = ReplayLog::default();
        unsent.iter_mut().for_each(|command| replay_log.add(command));
        Err((e, Vec::from(replay_log.drain())))
    }

    /// Checks that the server still serves the disk that this session has changed, if changes are to be sent to it:
    /// unflushed or queued ones. The connection is not published yet.
    ///
    /// Errors: `Corrupt` if it is another one; `ENOTCONN` if the connection was lost.
    fn check_identity(&self, connection: &Connection) -> Result<()> {
        let blocks = self.identity.connection_lost();
        let mut read = Vec::new();
        // Few at a time: a slow server must answer each batch within the timeout.
        for batch in blocks.chunks(SAMPLE_BATCH) {
            let commands = batch.iter().filter_map(|block| {
                let len = block.end - block.start;
                let buf = self.pool.take(len as usize)?;
                let (kind, deadline) = (CommandKind::Read, self.deadline());
                Some(Command::new(kind, block.start, len, buf, deadline, Box::new(|_, _| ())))
            });
            for (mut command, error) in self.run_unpublished(connection, commands) {
                match error {
                    None => {
                        let bytes = command
                            .buf
                            .take()
                            .bytes()
                            .get(..command.len as usize)
                            .map(<[u8]>::to_vec);
                        read.extend(bytes.map(|bytes| (command.offset, bytes)));
                    }
                    Some(errno) if is_loss(errno) => {
                        let text = "the connection was lost while the export was compared with what it was";
                        return Err(Error::new(ErrorKind::Os(libc::ENOTCONN), text));
                    }
                    // A block that cannot be read says nothing.
                    Some(_) => {}
                }
            }
        }
        // Only answers to queued commands count as progress, as after a replay.
        connection.forget_answers();
        let queued = lock(&self.queues).has_changes();
        self.identity.check(&read, queued || !lock(&self.replay_log).is_empty())
    }

    /// Runs commands on a connection that is not published, and waits for all answers.
    fn run_unpublished(&self, connection: &Connection, commands: impl Iterator<Item = Box<Command>>) -> Vec<Answer> {
        let (mut answers, mut count) = (Vec::<Answer>::new(), 0);
        for command in commands {
            count += 1;
            connection.submit(command, &mut answers);
        }
        while answers.len() < count {
            let until = Instant::now() + TICK;
            match Poller::acquire(connection) {
                // This thread alone knows the connection. The poll ends in each tick, also without an answer; an
                // overdue answer fails the connection, so the loop ends within the timeout.
                Some(poller) => {
                    poller.poll_sockets(PollUntil::Enough(&|| Instant::now() >= until), |back| {
                        answers.append(back);
                    });
                }
                None => thread::yield_now(),
            }
            // The queued commands wait for this connection, and may run late meanwhile.
            self.fail_late();
        }
        // No thread waits for this connection to become idle yet: count the answers as handled at once.
        drop(connection.completion_guard(answers.len()));
        answers
    }
}
