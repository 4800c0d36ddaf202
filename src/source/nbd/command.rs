//! NBD command, from its submission to its result.
//!
//! A [`Command`] has one owner at a time, so its fields need no lock: the caller, a queue of the session or the
//! connection, libnbd while it is in flight (as a raw pointer, see `ffi.rs`), and at last its completion. It may be
//! sent several times, on one connection after the other, but its completion is called exactly once.

use std::fmt;
use std::time::Instant;

use libnbd_sys::LIBNBD_CMD_FLAG_FUA;

use super::buffer_pool::{Buffer, CommandBuffer};
use super::unflushed::FlushToken;
use crate::error::{Error, ErrorKind, Result};

/// Largest number of data bytes of a small command.
const MAX_SMALL: u64 = 32 << 10;

/// Operation of a command.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum CommandKind {
    /// Reads into the buffer.
    Read,
    /// Writes the buffer.
    Write {
        /// `LIBNBD_CMD_FLAG_FUA` or 0.
        flags: u32,
    },
    /// Writes zeroes.
    Zero {
        /// `LIBNBD_CMD_FLAG_FAST_ZERO`, `LIBNBD_CMD_FLAG_NO_HOLE` or 0.
        flags: u32,
    },
    /// Discards the range. The server may return anything for it afterwards.
    Trim,
    /// Makes all changes durable that were answered before the flush was sent.
    Flush,
    /// Queries block status: the extents of data, holes and zeroes.
    Status,
}

impl CommandKind {
    /// Returns true if the command may change the content of the export.
    pub(super) fn is_change(self) -> bool {
        matches!(self, Self::Write { .. } | Self::Zero { .. } | Self::Trim)
    }

    /// Returns true if the command transfers data, in either direction.
    pub(super) fn has_data(self) -> bool {
        matches!(self, Self::Read | Self::Write { .. })
    }

    /// Returns true if the change is durable when it is answered (FUA).
    pub(super) fn is_durable(self) -> bool {
        matches!(self, Self::Write { flags } if flags & LIBNBD_CMD_FLAG_FUA != 0)
    }

    /// Returns the name of the operation, for messages.
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Read => "read",
            Self::Write { .. } => "write",
            Self::Zero { .. } => "write of zeroes",
            Self::Trim => "trim",
            Self::Flush => "flush",
            Self::Status => "block status",
        }
    }
}

/// What the deadline of a command counts from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Clock {
    /// The submission: the command was sent at once.
    Sent,
    /// The submission, and the command waited for a connection, or for space in the replay log.
    Waited,
    /// The end of the wait.
    Restarted,
}

/// Called once with the result, in any thread and without a lock of the session held. The command is passed on for its
/// buffer and extents.
pub(super) type CommandCompletion = Box<dyn FnOnce(Box<Command>, Result<()>) + Send>;

/// NBD command with its buffer, its deadline and its completion.
pub(super) struct Command {
    pub(super) kind: CommandKind,
    /// Start of the range in the export, in bytes.
    pub(super) offset: u64,
    /// Length of the range in bytes.
    pub(super) len: u64,
    /// Data of a read or a write, in its first `len` bytes. Empty for the other kinds.
    pub(super) buf: CommandBuffer,
    /// Answer to a block status query: lengths and flags of the extents from `offset` on.
    pub(super) extents: Vec<(u64, u32)>,
    /// Time at which the command fails. Moves once at most, by [`Self::restart_clock`].
    pub(super) deadline: Instant,
    clock: Clock,
    /// For a flush: the state of the replay log when it was sent.
    pub(super) covers: FlushToken,
    /// Time at which it was sent last.
    pub(super) sent: Option<Instant>,
    /// `None` for a background flush.
    finish: Option<CommandCompletion>,
}

impl Command {
    /// Creates a command. A read or write needs a buffer of at least `len` bytes.
    pub(super) fn new(
        kind: CommandKind,
        offset: u64,
        len: u64,
        buf: impl Into<CommandBuffer>,
        deadline: Instant,
        finish: CommandCompletion,
    ) -> Box<Self> {
        let buf = buf.into();
        Box::new(Self {
            kind,
            offset,
            len,
            buf,
            extents: Vec::new(),
            deadline,
            clock: Clock::Sent,
            covers: FlushToken::default(),
            sent: None,
            finish: Some(finish),
        })
    }

    /// Creates a background flush: the session sends it to free space in the replay log, and no caller waits for it.
    pub(super) fn background_flush(deadline: Instant) -> Box<Self> {
        let mut command = Self::new(
            CommandKind::Flush,
            0,
            0,
            Buffer::default(),
            deadline,
            Box::new(|_, _| ()),
        );
        command.finish = None;
        command
    }

    /// Notes that the command waits, so that its deadline counts from before it is sent.
    pub(super) fn note_wait(&mut self) {
        if self.clock == Clock::Sent {
            self.clock = Clock::Waited;
        }
    }

    /// Moves the deadline of a command that has waited to `deadline`, before it is sent. The second wait moves it no more:
    /// a server that ends each connection must not make it wait for ever.
    pub(super) fn restart_clock(&mut self, deadline: impl FnOnce() -> Instant) {
        if self.clock == Clock::Waited {
            self.clock = Clock::Restarted;
            self.deadline = deadline();
        }
    }

    /// Returns true for a background flush.
    pub(super) fn is_background(&self) -> bool {
        self.finish.is_none()
    }

    /// Returns true if the cost of the command is the round trip, not the transfer of its data.
    pub(super) fn is_small(&self) -> bool {
        // A write of zeroes or a trim sends no data, however long its range is.
        self.len <= MAX_SMALL || !self.kind.has_data()
    }

    /// Calls the completion with the result.
    pub(super) fn finish(mut self: Box<Self>, result: Result<()>) {
        if let Some(finish) = self.finish.take() {
            finish(self, result);
        }
    }

    /// Returns the operation and its range, for messages.
    pub(super) fn describe(&self) -> String {
        match self.kind {
            CommandKind::Flush => "flush".to_owned(),
            kind => format!("{} of {} bytes at {}", kind.name(), self.len, self.offset),
        }
    }

    /// Returns the error for a command that the server answered with `errno`.
    pub(super) fn refused(&self, errno: i32) -> Error {
        let context = format!("NBD {}", self.describe());
        // EPERM for a change is the protocol's answer for a read-only export.
        match (errno, self.kind.is_change()) {
            (libc::EPERM, true) => Error::new(
                ErrorKind::ReadOnly,
                format!("{context}: not permitted by the server (EPERM)"),
            ),
            _ => Error::io(context, std::io::Error::from_raw_os_error(errno)),
        }
    }
}

impl fmt::Debug for Command {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Command({})", self.describe())
    }
}
