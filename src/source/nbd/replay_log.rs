//! Replay log: changes that the server has answered and that no flush has made durable yet. A server that is restarted
//! may have lost them.
//!
//! ```text
//!   change answered ─► entry ─ flush answered ─► removed
//!                        │ connection lost, flush failed
//!                        └─► replayed, in order, before any other command on the new connection
//! ```
//! A write that was durable when it was answered (FUA) is not kept, unless it overlaps an earlier change in the log: a
//! replay of that change would overwrite it, so it has to be replayed afterwards.
//!
//! The log is bounded. Above [`SOFT_LIMIT`] the session starts a background flush. Above [`HARD_LIMIT`] further changes
//! wait for it (back-pressure). If flushes fail while the log is that large, or if the server refuses a replayed
//! change, the writes are lost, and the write latch of the disk is set: no flush reports success for lost data.
//!
//! # Numbers and tokens
//!
//! Each entry has a number, and numbers only grow. A [`FlushToken`] is taken when a flush is sent: the answered flush
//! covers the entries with lower numbers. Replayed entries get new numbers, so a flush that was sent before the replay
//! covers none of them.
//!
//! A server reports a failed write-back to one flush only. With several flushes in flight, a failed one makes the
//! answers to the others doubtful. The token therefore also holds two counters, of failed flushes and of flushes that
//! removed entries:
//! - a flush that is answered after another one failed is void, and is sent again after the replay;
//! - a flush that fails after another one has removed entries means that those may be lost, and they cannot be
//!   replayed.
//!
//! The session guards the log with one mutex, the last of its lock order.

use std::collections::VecDeque;
use std::sync::Arc;

use libnbd_sys::LIBNBD_CMD_FLAG_FAST_ZERO;

use super::buffer_pool::{Buffer, BufferPool};
use super::command::{Command, CommandKind};
use super::unflushed::{FlushToken, HARD_LIMIT, SOFT_LIMIT};
use crate::error::{Error, Result};
use crate::write_latch::WriteLatch;

/// Bytes that an entry counts for in addition to its data.
const ENTRY_COST: usize = 256;

/// Fewest bytes of data that an entry counts for. It bounds the number of entries, which each durable write searches.
const MIN_DATA_COST: usize = 4096;

/// Answered change that no flush covers yet.
pub(super) struct ReplayEntry {
    /// Position in the order of the answers; compared with [`FlushToken`].
    number: u64,
    pub(super) kind: CommandKind,
    pub(super) offset: u64,
    pub(super) len: u64,
    pub(super) buf: Buffer,
}

impl ReplayEntry {
    /// Returns the bytes that this entry counts for in the limits of the log.
    fn cost(&self) -> usize {
        ENTRY_COST + self.buf.len().max(MIN_DATA_COST)
    }

    /// Returns true if this entry and the range `other` (offset, length) have a byte in common.
    pub(super) fn overlaps(&self, other: &(u64, u64)) -> bool {
        self.offset < other.0 + other.1 && other.0 < self.offset + self.len
    }
}

/// Answered changes since the last flush; see the module documentation.
#[derive(Default)]
pub(super) struct ReplayLog {
    /// Ordered by their numbers.
    entries: VecDeque<ReplayEntry>,
    /// Sum of the costs of `entries`.
    bytes: usize,
    next_number: u64,
    /// True from [`Self::drain`] to [`Self::restore`], while the manager thread holds the entries.
    replaying: bool,
    /// True while a background flush is in flight.
    flushing: bool,
    /// Number of answered flushes that have removed entries.
    removals: u64,
    /// Number of failed flushes.
    failures: u64,
    /// Write latch of the disk, set when answered writes are lost.
    latch: Arc<WriteLatch>,
}

impl ReplayLog {
    /// Creates the log of a disk with the write latch `latch`.
    pub(super) fn new(latch: Arc<WriteLatch>) -> Self {
        Self {
            latch,
            ..Self::default()
        }
    }

    /// Adds an answered change, unless it is durable and overlaps no entry. Returns true if the caller must start a
    /// background flush.
    ///
    /// An added change gives its buffer to the log.
    pub(super) fn answered(&mut self, command: &mut Command) -> bool {
        let range = (command.offset, command.len);
        // The replay of an older entry would overwrite a durable write with older data, so such a write is kept too.
        if command.kind.is_durable() && !self.entries.iter().any(|e| e.overlaps(&range)) {
            return false;
        }
        self.add(command);
        self.wants_flush()
    }

    /// Adds a change, durable or not, and takes its buffer.
    pub(super) fn add(&mut self, command: &mut Command) {
        let number = self.next_number;
        self.next_number += 1;
        let kind = match command.kind {
            // FAST_ZERO asks for an error instead of a slow write of zeroes. A replay must not fail for that reason.
            CommandKind::Zero { flags } => CommandKind::Zero {
                flags: flags & !LIBNBD_CMD_FLAG_FAST_ZERO,
            },
            kind => kind,
        };
        let entry = ReplayEntry {
            number,
            kind,
            offset: command.offset,
            len: command.len,
            buf: command.buf.take(),
        };
        self.bytes += entry.cost();
        self.entries.push_back(entry);
    }

    /// Returns true if the caller must start a background flush now. Returns true only once until
    /// [`Self::flush_ended`].
    pub(super) fn wants_flush(&mut self) -> bool {
        self.bytes > SOFT_LIMIT && !std::mem::replace(&mut self.flushing, true)
    }

    /// Reports that the background flush has ended, successfully or not.
    pub(super) fn flush_ended(&mut self) {
        self.flushing = false;
    }

    /// Returns the token for a flush that is sent now.
    pub(super) fn flush_token(&self) -> FlushToken {
        FlushToken {
            number: self.next_number,
            removals: self.removals,
            failures: self.failures,
        }
    }

    /// Returns true if further changes have to wait for a flush.
    pub(super) fn is_full(&self) -> bool {
        self.bytes > HARD_LIMIT
    }

    /// Returns true if the answer to a flush sent at `flush_token` proves nothing, because another flush has failed
    /// since: the server reports a failed write-back only once.
    pub(super) fn is_void(&self, flush_token: FlushToken) -> bool {
        self.failures != flush_token.failures
    }

    /// Removes the entries that a successful flush covers, and returns their buffers to the pool.
    pub(super) fn flushed(&mut self, flush_token: FlushToken, pool: &BufferPool) {
        let before = self.entries.len();
        // Entries are ordered by number, so the covered ones are at the front.
        while self.entries.front().is_some_and(|e| e.number < flush_token.number) {
            if let Some(entry) = self.entries.pop_front() {
                self.bytes -= entry.cost();
                pool.give(entry.buf);
            }
        }
        // Only if entries were removed: otherwise every write that a later failure concerns can still be replayed.
        self.removals += u64::from(self.entries.len() < before);
    }

    /// Takes all entries out for a replay. The caller adds the replayed ones by [`Self::add`] and ends the replay with
    /// [`Self::restore`].
    pub(super) fn drain(&mut self) -> VecDeque<ReplayEntry> {
        self.bytes = 0;
        // While the entries are out the log must not pass for durable.
        self.replaying = !self.entries.is_empty();
        std::mem::take(&mut self.entries)
    }

    /// Ends a replay and puts back the entries that were not replayed. They follow the replayed ones, which were before
    /// them in the log.
    pub(super) fn restore(&mut self, mut remaining: VecDeque<ReplayEntry>) {
        self.bytes += remaining.iter().map(ReplayEntry::cost).sum::<usize>();
        // New numbers, above those of the replayed entries and of every token that was given out: `entries` stays
        // ordered, and no flush of the lost connection covers them.
        for entry in &mut remaining {
            entry.number = self.next_number;
            self.next_number += 1;
        }
        self.entries.append(&mut remaining);
        self.replaying = false;
    }

    /// Records that answered writes were lost: every later flush fails.
    pub(super) fn set_lost(&mut self, error: Error) {
        self.latch.set(error);
    }

    /// Records that the server refused a flush sent at `flush_token`. The entries are kept for a replay, except in two
    /// cases, in which all of them are dropped and count as lost:
    /// - the log is above [`SOFT_LIMIT`], and would only grow while flushes fail;
    /// - another flush was answered meanwhile and has removed entries. The server reports a failed write-back to one
    ///   flush only, so the failed data may be that of the removed entries.
    pub(super) fn flush_failed(&mut self, error: &Error, flush_token: FlushToken, pool: &BufferPool) {
        self.failures += 1;
        if self.bytes > SOFT_LIMIT || self.removals != flush_token.removals {
            let text = "answered writes were lost: a flush failed and they cannot be replayed";
            self.set_lost(error.clone().within(text));
            self.flushed(self.flush_token(), pool);
        }
    }

    /// Returns the error that every flush fails with, if writes were lost.
    pub(super) fn check_lost(&self) -> Result<()> {
        self.latch.check()
    }

    /// Returns true if all answered changes are durable.
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
    fn a_flush_removes_only_changes_answered_before_it_was_sent() {
        let (pool, mut replay_log) = (BufferPool::default(), ReplayLog::default());
        replay_log.add(&mut write(&pool, 0, 512));
        let flush_token = replay_log.flush_token();
        replay_log.add(&mut write(&pool, 512, 512));
        replay_log.flushed(flush_token, &pool);
        let kept_entries = replay_log.drain();
        assert_eq!(kept_entries.iter().map(|e| e.offset).collect::<Vec<_>>(), [512]);
        replay_log.restore(kept_entries);
        replay_log.flushed(flush_token, &pool);
        assert!(
            !replay_log.is_empty(),
            "a flush of the old connection covers no replayed change"
        );
        replay_log.flushed(replay_log.flush_token(), &pool);
        assert!(replay_log.is_empty());
        assert_eq!(replay_log.bytes, 0);
    }

    #[test]
    fn a_durable_write_is_kept_only_if_it_overlaps_an_entry() {
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
        assert!(beside.buf.take().len() > 0, "the log took the buffer");
        replay_log.answered(&mut durable(768));
        let kept: Vec<_> = replay_log
            .drain()
            .iter()
            .map(|e| (e.offset, e.kind.is_durable()))
            .collect();
        assert_eq!(kept, [(512, false), (768, true)]);
    }

    #[test]
    fn one_background_flush_is_requested_before_the_log_is_full() {
        let (pool, mut replay_log) = (BufferPool::default(), ReplayLog::default());
        let mut requested = 0;
        while !replay_log.is_full() {
            requested += usize::from(replay_log.answered(&mut write(&pool, 0, 1 << 20)));
        }
        assert_eq!(requested, 1);
        assert!(replay_log.bytes < HARD_LIMIT + (2 << 20));
        let e = Error::corrupt("no");
        replay_log.flush_failed(&e, replay_log.flush_token(), &pool);
        assert!(replay_log.is_empty() && replay_log.check_lost().is_err());
    }

    #[test]
    fn regression_a_failed_flush_loses_the_entries_that_another_flush_removed() {
        for overtaken in [false, true] {
            let (pool, mut replay_log) = (BufferPool::default(), ReplayLog::default());
            replay_log.add(&mut write(&pool, 0, 512));
            let (failed, other) = (replay_log.flush_token(), replay_log.flush_token());
            if overtaken {
                replay_log.flushed(other, &pool);
            }
            assert!(!replay_log.is_void(other));
            replay_log.flush_failed(&Error::corrupt("no"), failed, &pool);
            assert!(replay_log.is_void(other) && !replay_log.is_void(replay_log.flush_token()));
            assert_eq!(replay_log.check_lost().is_err(), overtaken);
            assert_eq!(replay_log.is_empty(), overtaken);
        }
    }

    #[test]
    fn regression_zeroes_are_replayed_without_fast_zero() {
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
    fn regression_entries_not_replayed_yet_follow_replayed_ones() {
        let (pool, mut replay_log) = (BufferPool::default(), ReplayLog::default());
        replay_log.add(&mut write(&pool, 0, 512));
        replay_log.add(&mut write(&pool, 0, 1024));
        let mut remaining = replay_log.drain();
        let ReplayEntry {
            kind, offset, len, buf, ..
        } = remaining.pop_front().unwrap();
        replay_log.add(&mut Command::new(
            kind,
            offset,
            len,
            buf,
            Instant::now(),
            Box::new(|_, _| ()),
        ));
        // The connection is lost here.
        replay_log.restore(remaining);
        assert_eq!(
            replay_log.drain().iter().map(|e| e.len).collect::<Vec<_>>(),
            [512, 1024]
        );
    }

    #[test]
    fn regression_a_replay_requests_a_flush() {
        let (pool, mut replay_log) = (BufferPool::default(), ReplayLog::default());
        for _ in 0..26 {
            replay_log.add(&mut write(&pool, 0, 1 << 20));
        }
        for entry in replay_log.drain() {
            let ReplayEntry {
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
