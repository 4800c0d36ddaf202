//! The manager: connects, has sent again what was not flushed, and ends what waited too long.

use std::collections::VecDeque;
use std::sync::atomic::Ordering;
use std::sync::{Arc, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use super::{Session, State, lock};
use crate::block::Stay;
use crate::error::{Error, ErrorKind, Result};
use crate::source::nbd::command::{Command, CommandKind};
use crate::source::nbd::connection::{Answer, Connection, TICK, is_loss};
use crate::source::nbd::poller::PollUntil;
use crate::source::nbd::replay_log::{Entry, ReplayLog};

/// The first pause between two attempts to connect, and the longest.
const BACK_OFF: (Duration, Duration) = (Duration::from_millis(50), Duration::from_secs(2));

/// Changes that are sent again at the same time.
const REPLAY: usize = 32;

/// How long a further connection may take: a server that has enough may let it wait for ever.
const WIDEN: Duration = Duration::from_secs(5);

/// How long a lost connection is kept, for a thread that was about to send something on it.
const RETIRED: Duration = Duration::from_secs(10);

/// How many of them are kept: each has open sockets.
const MAX_RETIRED: usize = 8;

impl Session {
    /// The manager's work.
    pub(super) fn manage(&self) {
        // whether there was a connection since the last look at how it has ended; the first one was no attempt of ours
        let (mut failures, mut came_up) = (0, false);
        loop {
            if let Some(connection) = self.connection().filter(|g| !g.is_dead()) {
                self.widen(&connection);
            }
            if !self.wait_until_wanted() {
                return;
            }
            if std::mem::take(&mut came_up)
                && let Some(connection) = self.connection().filter(|g| g.is_dead())
            {
                if !connection.has_answered() {
                    failures += 1;
                    let text = "the connection was lost before it answered anything";
                    self.after_failure(&Error::new(ErrorKind::Os(libc::ENOTCONN), text), failures);
                    continue;
                }
                failures = 0;
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
            } else if state.waiting.is_empty()
                && !state.awaiting_flush.is_empty()
                && lock(&self.replay_log).wants_flush()
            {
                // The last one has come to nothing.
                drop(state);
                self.flush_unasked();
                self.poll_completions(Stay::No);
                state = lock(&self.state);
            } else if state.waiting.is_empty() {
                let wait = if state.awaiting_flush.is_empty() {
                    Duration::from_secs(3600)
                } else {
                    BACK_OFF.1
                };
                let waited = self.wanted.wait_timeout(state, wait);
                state = waited.unwrap_or_else(PoisonError::into_inner).0;
            } else {
                return true;
            }
        }
    }

    fn take_late(&self, state: &mut State) -> VecDeque<Box<Command>> {
        let now = Instant::now();
        let mut timed_out = VecDeque::new();
        let State {
            waiting,
            awaiting_flush,
        } = state;
        for queue in [waiting, awaiting_flush] {
            // mostly none is
            if queue.iter().any(|command| command.deadline <= now) {
                let (over, left): (VecDeque<_>, VecDeque<_>) =
                    queue.drain(..).partition(|command| command.deadline <= now);
                timed_out.extend(over);
                queue.extend(left);
            }
        }
        timed_out
    }

    /// Fails what has waited too long.
    fn end_late(&self) {
        let timed_out = self.take_late(&mut lock(&self.state));
        self.fail_late(timed_out);
    }

    fn fail_late(&self, timed_out: VecDeque<Box<Command>>) {
        for command in timed_out {
            let e = self.timed_out(&command);
            self.finish(command, Err(e));
        }
    }

    /// Connects, sends the unflushed changes again and then what waits.
    fn connect(&self) -> Result<()> {
        let old = self.connection();
        if let Some(old) = old.as_ref().filter(|g| g.is_dead()) {
            // Its commands come back by themselves; before the last one did, their order is not known.
            self.attend_until(|| old.is_idle());
            while !old.is_idle() && !self.closing.load(Ordering::SeqCst) {
                thread::sleep(Duration::from_millis(1));
            }
        }
        if old.as_ref().is_none_or(|g| g.is_dead()) {
            let deadline = self.earliest().unwrap_or_else(|| self.deadline());
            // It is asked every now and then while the connection is made.
            let closing = || {
                self.end_late();
                self.closing.load(Ordering::SeqCst)
            };
            let (handle, export) = self.connector.open(true, deadline, &closing)?;
            export.check_same(&self.export, self.options.writable, true)?;
            self.map.clear();
            let connection = Arc::new(Connection::new(self.options.connections)?);
            connection.add(handle)?;
            self.replay(&connection)?;
            self.publish(Arc::clone(&connection));
            if let Some(old) = &old {
                let mut completions = lock(&self.completions);
                if completions.len() >= MAX_RETIRED {
                    completions.remove(0);
                }
                completions.push((Arc::clone(old), Instant::now() + RETIRED));
                tracing::warn!("{}: connected again", self.connector.label());
            }
            self.make_room();
        }
        // A command that is late already would end the connection at the next look.
        self.end_late();
        let waiting = std::mem::take(&mut lock(&self.state).waiting);
        for mut command in waiting {
            if command.kind == CommandKind::Flush {
                command.covers = lock(&self.replay_log).flush_token();
            }
            self.send(command);
        }
        self.poll_completions(Stay::No);
        Ok(())
    }

    fn earliest(&self) -> Option<Instant> {
        lock(&self.state).waiting.iter().map(|command| command.deadline).min()
    }

    /// After an attempt that failed: a pause, and the end of what waits where there were too many.
    fn after_failure(&self, e: &Error, failures: u32) {
        tracing::info!("attempt {failures} to connect again: {e}");
        let hopeless = e.kind() == ErrorKind::Corrupt || self.options.retry.is_some_and(|most| failures > most);
        if hopeless || !self.connector.can_repeat() {
            let waiting = std::mem::take(&mut lock(&self.state).waiting);
            for command in waiting {
                let failed = self.error(&command, &e.to_string());
                self.finish(command, Err(failed));
            }
        }
        self.pause(
            BACK_OFF
                .0
                .saturating_mul(1 << failures.min(10).saturating_sub(1))
                .min(BACK_OFF.1),
        );
    }

    /// Waits, and fails what is late meanwhile.
    fn pause(&self, pause: Duration) {
        let until = Instant::now() + pause;
        let mut state = lock(&self.state);
        while Instant::now() < until && !self.closing.load(Ordering::SeqCst) {
            let timed_out = self.take_late(&mut state);
            if !timed_out.is_empty() {
                drop(state);
                self.fail_late(timed_out);
                state = lock(&self.state);
                continue;
            }
            let next = state
                .waiting
                .iter()
                .map(|command| command.deadline)
                .min()
                .map_or(until, |d| d.min(until));
            let wait = next.saturating_duration_since(Instant::now());
            state = self
                .wanted
                .wait_timeout(state, wait)
                .unwrap_or_else(PoisonError::into_inner)
                .0;
        }
    }

    /// Adds connections up to what was asked for. A server that takes fewer is no failure.
    fn widen(&self, connection: &Connection) {
        while connection.count() < self.options.connections && !connection.is_dead() {
            if self.closing.load(Ordering::SeqCst) || !lock(&self.state).waiting.is_empty() {
                return;
            }
            let deadline = Instant::now() + self.options.timeout.min(WIDEN);
            let needed = || {
                self.end_late();
                self.closing.load(Ordering::SeqCst) || !lock(&self.state).waiting.is_empty()
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
                let count = connection.count();
                tracing::info!("{count} connections and no more: {e}");
                return;
            }
        }
    }

    /// Sends all changes again that no flush has covered, in their order; those that overlap one after the other.
    fn replay(&self, connection: &Connection) -> Result<()> {
        let mut rest = lock(&self.replay_log).drain();
        if rest.is_empty() {
            return Ok(());
        }
        tracing::info!(
            "{}: {} unflushed changes are sent again",
            self.connector.label(),
            rest.len()
        );
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
            if let Err((e, unsent)) = self.replay_batch(connection, batch) {
                for entry in unsent.into_iter().rev() {
                    rest.push_front(entry);
                }
                lock(&self.replay_log).restore(rest);
                return Err(e);
            }
        }
        lock(&self.replay_log).restore(rest);
        // That it takes changes says nothing of what it does with the commands that wait.
        connection.forget_answers();
        Ok(())
    }

    /// Sends changes that don't overlap. What was not answered, where the connection is lost, comes back.
    fn replay_batch(&self, connection: &Connection, batch: Vec<Entry>) -> Result<(), (Error, Vec<Entry>)> {
        let mut back = Vec::new();
        let count = batch.len();
        for entry in batch {
            let Entry {
                kind, offset, len, buf, ..
            } = entry;
            let command = Command::new(kind, offset, len, buf, self.deadline(), Box::new(|_, _| ()));
            connection.submit(command, &mut back);
        }
        let mut answers: Vec<Answer> = Vec::with_capacity(count);
        answers.append(&mut back);
        while answers.len() < count {
            let until = Instant::now() + TICK;
            match connection.poller() {
                Some(poller) => {
                    poller.poll_sockets(PollUntil::Enough(&|| Instant::now() >= until), |back| {
                        answers.append(back)
                    });
                }
                None => thread::yield_now(),
            }
            // Others wait for something else meanwhile.
            self.end_late();
        }
        drop(connection.completion_guard(answers.len()));
        let mut unsent = Vec::new();
        let mut replay_log = lock(&self.replay_log);
        for (mut command, error) in answers {
            match error {
                None => replay_log.add(&mut command),
                Some(errno) if is_loss(errno) => unsent.push(command),
                Some(errno) => {
                    let e = command
                        .refused(errno)
                        .within(format!("{}: a write that was lost", self.connector.label()));
                    tracing::error!("{e}");
                    replay_log.lose(e);
                }
            }
        }
        drop(replay_log);
        if unsent.is_empty() {
            return Ok(());
        }
        let e = Error::new(
            ErrorKind::Os(libc::ENOTCONN),
            "the connection broke while changes were sent again",
        );
        let mut replay_log = ReplayLog::default();
        unsent.iter_mut().for_each(|command| replay_log.add(command));
        Err((e, Vec::from(replay_log.drain())))
    }
}
