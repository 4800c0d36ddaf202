//! Changes that a server has answered but not yet made durable: what a server that is restarted may have forgotten.
//!
//! ```text
//!   change answered ─► entry ─ flush answered ─► gone
//!                        │ connection lost, flush failed
//!                        └─► sent again, in order, before anything else on the new connection
//! ```
//! A write that was durable when it was answered (FUA) is not kept, unless it lies on an earlier change that is kept: when
//! that is sent again, it has to follow.
//!
//! It is bounded. From [`SOFT`] on a flush is asked for that nobody ordered; at [`HARD`] changes wait for it. Where that does
//! not help, because flushes fail, or where a change can't be sent again, what was written is lost, and from then
//! on every flush says so: none pretends.

use std::collections::VecDeque;

use libnbd_sys::LIBNBD_CMD_FLAG_FAST_ZERO;

use super::buffer_pool::{Buffer, BufferPool};
use super::command::{Command, CommandKind};
use crate::error::Error;

/// Bytes from which on a flush is made without being asked for.
pub(super) const SOFT: usize = 24 << 20;

/// Bytes at which changes wait for that flush.
pub(super) const HARD: usize = 128 << 20;

/// What an entry counts for beside its data, and what it counts for at least: a durable write looks through all.
const ENTRY: usize = 256;
const LEAST: usize = 4096;

/// A change that was answered.
pub(super) struct Entry {
    number: u64,
    pub(super) kind: CommandKind,
    pub(super) offset: u64,
    pub(super) len: u64,
    pub(super) buf: Buffer,
}

impl Entry {
    fn cost(&self) -> usize {
        ENTRY + self.buf.len().max(LEAST)
    }

    /// Whether both change a byte.
    pub(super) fn overlaps(&self, other: &(u64, u64)) -> bool {
        self.offset < other.0 + other.1 && other.0 < self.offset + self.len
    }
}

/// What a flush covers.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct FlushToken {
    /// Changes with a lower number.
    number: u64,
    /// How often something had been forgotten when it was sent.
    forgotten: u64,
    /// How often a flush had failed.
    failed: u64,
}

/// The changes since the last flush; see the module.
#[derive(Default)]
pub(super) struct ReplayLog {
    entries: VecDeque<Entry>,
    bytes: usize,
    next: u64,
    /// Entries are out, to be sent again.
    replaying: bool,
    /// A flush that nobody ordered is under way.
    flushing: bool,
    /// How often a flush has made it forget something.
    forgotten: u64,
    /// How often one has failed.
    failed: u64,
    lost: Option<Error>,
}

impl ReplayLog {
    /// Takes what a change that was answered has written, if it has to be kept. It has to be flushed after `true`.
    pub(super) fn answered(&mut self, command: &mut Command) -> bool {
        let over = (command.offset, command.len);
        if command.kind.is_durable() && !self.entries.iter().any(|e| e.overlaps(&over)) {
            return false;
        }
        self.add(command);
        self.wants_flush()
    }

    /// Takes what a change has written, in any case.
    pub(super) fn add(&mut self, command: &mut Command) {
        let number = self.next;
        self.next += 1;
        let kind = match command.kind {
            // The next time it may be slow.
            CommandKind::Zero { flags } => CommandKind::Zero {
                flags: flags & !LIBNBD_CMD_FLAG_FAST_ZERO,
            },
            kind => kind,
        };
        let entry = Entry {
            number,
            kind,
            offset: command.offset,
            len: command.len,
            buf: command.buf.take(),
        };
        self.bytes += entry.cost();
        self.entries.push_back(entry);
    }

    /// Whether a flush has to be made now that nobody asked for; says so once, until [`Self::flush_ended`].
    pub(super) fn wants_flush(&mut self) -> bool {
        self.bytes > SOFT && !std::mem::replace(&mut self.flushing, true)
    }

    /// That flush is over, however it ended.
    pub(super) fn flush_ended(&mut self) {
        self.flushing = false;
    }

    /// What a flush covers which is sent now.
    pub(super) fn flush_token(&self) -> FlushToken {
        FlushToken {
            number: self.next,
            forgotten: self.forgotten,
            failed: self.failed,
        }
    }

    /// Whether a further change has to wait.
    pub(super) fn is_full(&self) -> bool {
        self.bytes > HARD
    }

    /// Whether a flush that was sent at `flush_token` says nothing, as another one has failed since: a server tells of what it
    /// could not store once.
    pub(super) fn is_void(&self, flush_token: FlushToken) -> bool {
        self.failed != flush_token.failed
    }

    /// A flush was answered that was sent at `flush_token`.
    pub(super) fn flushed(&mut self, flush_token: FlushToken, pool: &BufferPool) {
        let before = self.entries.len();
        while self.entries.front().is_some_and(|e| e.number < flush_token.number) {
            if let Some(entry) = self.entries.pop_front() {
                self.bytes -= entry.cost();
                pool.give(entry.buf);
            }
        }
        self.forgotten += u64::from(self.entries.len() < before);
    }

    /// Takes everything out, to send it again; what is not lost comes back by [`Self::add`], up to [`Self::restore`].
    pub(super) fn drain(&mut self) -> VecDeque<Entry> {
        self.bytes = 0;
        self.replaying = !self.entries.is_empty();
        std::mem::take(&mut self.entries)
    }

    /// Puts back what could not be sent again, if anything. What there is was sent again before it, so it comes first.
    pub(super) fn restore(&mut self, mut rest: VecDeque<Entry>) {
        self.bytes += rest.iter().map(Entry::cost).sum::<usize>();
        // Later numbers than any mark that was given out.
        for entry in &mut rest {
            entry.number = self.next;
            self.next += 1;
        }
        self.entries.append(&mut rest);
        self.replaying = false;
    }

    /// What was written is lost.
    pub(super) fn lose(&mut self, error: Error) {
        self.lost.get_or_insert(error);
    }

    /// The server has refused a flush that was sent at `flush_token`. Where more is kept than can be for long, all is forgotten,
    /// and lost. So it is where another flush was answered meanwhile and what it covered forgotten: a server tells once of
    /// what it could not store, and it may not be the other flush that was told.
    pub(super) fn flush_failed(&mut self, error: &Error, flush_token: FlushToken, pool: &BufferPool) {
        self.failed += 1;
        if self.bytes > SOFT || self.forgotten != flush_token.forgotten {
            self.lose(error.clone().within("too many writes were not made durable"));
            self.flushed(self.flush_token(), pool);
        }
    }

    /// Why flushes fail.
    pub(super) fn lost(&self) -> Option<Error> {
        self.lost.clone()
    }

    /// Whether everything is durable.
    pub(super) fn is_empty(&self) -> bool {
        self.entries.is_empty() && !self.replaying
    }
}

#[cfg(test)]
mod tests {
    use std::time::Instant;

    use super::*;

    fn write(pool: &BufferPool, offset: u64, len: usize) -> Box<Command> {
        let buf = pool.take(len).unwrap();
        Command::new(
            CommandKind::Write { flags: 0 },
            offset,
            len as u64,
            buf,
            Instant::now(),
            Box::new(|_, _| ()),
        )
    }

    #[test]
    fn a_flush_forgets_what_was_answered_before_it_was_sent_and_no_more() {
        let (pool, mut replay_log) = (BufferPool::default(), ReplayLog::default());
        replay_log.add(&mut write(&pool, 0, 512));
        let flush_token = replay_log.flush_token();
        replay_log.add(&mut write(&pool, 512, 512));
        replay_log.flushed(flush_token, &pool);
        let left = replay_log.drain();
        assert_eq!(left.iter().map(|e| e.offset).collect::<Vec<_>>(), [512]);
        replay_log.restore(left);
        replay_log.flushed(flush_token, &pool);
        assert!(!replay_log.is_empty(), "an old flush covers nothing that is sent again");
        replay_log.flushed(replay_log.flush_token(), &pool);
        assert!(replay_log.is_empty());
        assert_eq!(replay_log.bytes, 0);
    }

    #[test]
    fn a_durable_write_is_kept_only_where_it_has_to_follow_an_earlier_change() {
        let (pool, mut replay_log) = (BufferPool::default(), ReplayLog::default());
        let durable = |offset| {
            let mut command = write(&pool, offset, 512);
            command.kind = CommandKind::Write {
                flags: libnbd_sys::LIBNBD_CMD_FLAG_FUA,
            };
            command
        };
        assert!(!replay_log.answered(&mut durable(0)) && replay_log.is_empty());
        replay_log.answered(&mut write(&pool, 512, 512));
        let mut beside = durable(1024);
        replay_log.answered(&mut beside);
        assert!(beside.buf.take().len() > 0, "its buffer is not taken");
        replay_log.answered(&mut durable(768));
        let kept: Vec<_> = replay_log
            .drain()
            .iter()
            .map(|e| (e.offset, e.kind.is_durable()))
            .collect();
        assert_eq!(kept, [(512, false), (768, true)]);
    }

    #[test]
    fn it_asks_once_for_a_flush_and_is_full_some_time() {
        let (pool, mut replay_log) = (BufferPool::default(), ReplayLog::default());
        let mut asked = 0;
        while !replay_log.is_full() {
            asked += usize::from(replay_log.answered(&mut write(&pool, 0, 1 << 20)));
        }
        assert_eq!(asked, 1);
        assert!(replay_log.bytes < HARD + (2 << 20));
        let e = Error::corrupt("no");
        replay_log.flush_failed(&e, replay_log.flush_token(), &pool);
        assert!(replay_log.is_empty() && replay_log.lost().is_some());
    }

    #[test]
    fn regression_a_failed_flush_is_the_loss_of_what_another_one_has_made_it_forget() {
        for overtaken in [false, true] {
            let (pool, mut replay_log) = (BufferPool::default(), ReplayLog::default());
            replay_log.add(&mut write(&pool, 0, 512));
            let (failing, other) = (replay_log.flush_token(), replay_log.flush_token());
            if overtaken {
                replay_log.flushed(other, &pool);
            }
            assert!(!replay_log.is_void(other));
            replay_log.flush_failed(&Error::corrupt("no"), failing, &pool);
            assert!(replay_log.is_void(other) && !replay_log.is_void(replay_log.flush_token()));
            assert_eq!(replay_log.lost().is_some(), overtaken);
            assert_eq!(replay_log.is_empty(), overtaken);
        }
    }

    #[test]
    fn regression_zeroes_are_not_sent_again_as_fast_or_nothing() {
        let (pool, mut replay_log) = (BufferPool::default(), ReplayLog::default());
        let mut command = write(&pool, 0, 512);
        command.kind = CommandKind::Zero {
            flags: LIBNBD_CMD_FLAG_FAST_ZERO | libnbd_sys::LIBNBD_CMD_FLAG_NO_HOLE,
        };
        replay_log.add(&mut command);
        assert_eq!(
            replay_log.drain()[0].kind,
            CommandKind::Zero {
                flags: libnbd_sys::LIBNBD_CMD_FLAG_NO_HOLE
            }
        );
    }

    #[test]
    fn regression_what_was_not_sent_again_yet_follows_what_was() {
        let (pool, mut replay_log) = (BufferPool::default(), ReplayLog::default());
        replay_log.add(&mut write(&pool, 0, 512));
        replay_log.add(&mut write(&pool, 0, 1024));
        let mut rest = replay_log.drain();
        let Entry {
            kind, offset, len, buf, ..
        } = rest.pop_front().unwrap();
        replay_log.add(&mut Command::new(
            kind,
            offset,
            len,
            buf,
            Instant::now(),
            Box::new(|_, _| ()),
        ));
        // the connection breaks
        replay_log.restore(rest);
        assert_eq!(
            replay_log.drain().iter().map(|e| e.len).collect::<Vec<_>>(),
            [512, 1024]
        );
    }

    #[test]
    fn regression_what_was_sent_again_still_wants_a_flush() {
        let (pool, mut replay_log) = (BufferPool::default(), ReplayLog::default());
        for _ in 0..26 {
            replay_log.add(&mut write(&pool, 0, 1 << 20));
        }
        for entry in replay_log.drain() {
            let Entry {
                kind, offset, len, buf, ..
            } = entry;
            replay_log.add(&mut Command::new(
                kind,
                offset,
                len,
                buf,
                Instant::now(),
                Box::new(|_, _| ()),
            ));
        }
        assert!(replay_log.wants_flush() && !replay_log.wants_flush());
    }
}
