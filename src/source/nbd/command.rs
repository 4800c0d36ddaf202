//! One command for a server, from its submission to its result.

use std::fmt;
use std::time::Instant;

use libnbd_sys::LIBNBD_CMD_FLAG_FUA;

use super::buffer_pool::{Buffer, CommandBuffer};
use super::replay_log::FlushToken;
use crate::error::{Error, ErrorKind, Result};

/// Bytes up to which a command is small.
const SMALL: u64 = 32 << 10;

/// What a command does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum CommandKind {
    /// Fills the buffer.
    Read,
    /// Writes the buffer, with `LIBNBD_CMD_FLAG_*`.
    Write {
        /// See there.
        flags: u32,
    },
    /// Writes zeroes, with `LIBNBD_CMD_FLAG_*`.
    Zero {
        /// See there.
        flags: u32,
    },
    /// Gives room back; what is read afterwards is not said.
    Trim,
    /// Makes all that was answered before it durable.
    Flush,
    /// Asks where data, holes and zeroes are.
    Status,
}

impl CommandKind {
    /// Whether it changes the export's content.
    pub(super) fn is_change(self) -> bool {
        matches!(self, Self::Write { .. } | Self::Zero { .. } | Self::Trim)
    }

    /// Whether data goes with it, in either direction.
    pub(super) fn has_data(self) -> bool {
        matches!(self, Self::Read | Self::Write { .. })
    }

    /// Whether what it changes is durable when it is answered.
    pub(super) fn is_durable(self) -> bool {
        matches!(self, Self::Write { flags } if flags & LIBNBD_CMD_FLAG_FUA != 0)
    }

    /// For messages.
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

/// Told the result once, in whatever thread. The operation comes with it, for its buffer and extents.
pub(super) type CommandCompletion = Box<dyn FnOnce(Box<Command>, Result<()>) + Send>;

/// One command.
pub(super) struct Command {
    pub(super) kind: CommandKind,
    /// Byte of the export.
    pub(super) offset: u64,
    /// Bytes of the range.
    pub(super) len: u64,
    /// What is read or written: its first `len` bytes; empty for the other kinds.
    pub(super) buf: CommandBuffer,
    /// What a question about the status was answered: lengths and flags, from `offset` on.
    pub(super) extents: Vec<(u64, u32)>,
    /// When it fails, however often it was sent.
    pub(super) deadline: Instant,
    /// For a flush: what was answered when it was sent.
    pub(super) covers: FlushToken,
    /// When it was sent last.
    pub(super) sent: Option<Instant>,
    /// `None`: nobody waits for the result.
    finish: Option<CommandCompletion>,
}

impl Command {
    /// A command with a buffer of at least that length, or none.
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
            covers: FlushToken::default(),
            sent: None,
            finish: Some(finish),
        })
    }

    /// A flush that nobody waits for.
    pub(super) fn unasked_flush(deadline: Instant) -> Box<Self> {
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

    /// Whether nobody waits for its result.
    pub(super) fn is_unasked(&self) -> bool {
        self.finish.is_none()
    }

    /// Whether what it costs is the command, not its data.
    pub(super) fn is_small(&self) -> bool {
        self.len <= SMALL || !self.kind.has_data()
    }

    /// Tells the result.
    pub(super) fn finish(mut self: Box<Self>, result: Result<()>) {
        if let Some(finish) = self.finish.take() {
            finish(self, result);
        }
    }

    /// What it is, for messages.
    pub(super) fn describe(&self) -> String {
        match self.kind {
            CommandKind::Flush => "flush".to_owned(),
            kind => format!("{} of {} bytes at {}", kind.name(), self.len, self.offset),
        }
    }

    /// The error that the server answered it with.
    pub(super) fn refused(&self, errno: i32) -> Error {
        let what = format!("the NBD server's answer to a {}", self.describe());
        match (errno, self.kind.is_change()) {
            (libc::EPERM, true) => Error::new(ErrorKind::ReadOnly, format!("{what}: not permitted")),
            _ => Error::io(what, std::io::Error::from_raw_os_error(errno)),
        }
    }
}

impl fmt::Debug for Command {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Op({})", self.describe())
    }
}
