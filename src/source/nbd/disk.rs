//! Export as a disk: turns requests for sectors into NBD commands.
//!
//! - A request larger than one command is split (`SplitRequest`, `disk/queue.rs`) and its parts are in flight at the same
//!   time.
//! - Sectors that block status reports as holes or zeroes need no command ([`BlockRead::is_zero`]).
//! - The size of an export may not be a multiple of [`SECTOR`]. The disk then ends with a whole sector, whose bytes
//!   beyond the export read as zeroes and cannot hold anything else.
//!
//! The disk has no lock of its own: all mutable state is in the [`Session`]. Completions hold the session weakly, so
//! that a command in flight does not keep a closed session alive.

use std::ops::Range;
use std::sync::Arc;
use std::time::{Duration, Instant};

use libnbd_sys::{LIBNBD_CMD_FLAG_FAST_ZERO, LIBNBD_CMD_FLAG_NO_HOLE};

use super::buffer_pool::{Buffer, BufferPool, CommandBuffer};
use super::command::{Command, CommandCompletion, CommandKind};
use super::connect::Connector;
use super::connection::MAX_TIMEOUT;
use super::export::Export;
use super::extent_cache::{REGION, content};
use super::ffi::is_ending;
use super::own_server::OwnServer;
use super::session::{Session, SessionOptions};
use super::split_request::Oneshot;
use crate::block::{BlockQueue, BlockRead, BlockWrite, Content, Geometry, Lba, SECTOR, SharedContent, check_range};
use crate::cache;
use crate::config::NbdConfig;
use crate::error::{Error, ErrorKind, Result};
use crate::store::RoomNeeded;
use crate::write_latch::WriteLatch;

mod queue;

/// Default of `connections=`, used if the server accepts several. nbdfuse and nbdcopy use the same number.
const CONNECTIONS: usize = 4;

/// Default of `timeout=`. Shorter than the 120 s after which the kernel reports a hung task by default.
const TIMEOUT: Duration = Duration::from_secs(30);

/// Time after the deadline of a command within which its result must have reached the waiting thread.
const GRACE: Duration = Duration::from_secs(10);

/// Returns the time within which a command with this `timeout=` has ended: it may wait for a connection, or for space in the
/// replay log, and then for its answer.
pub(in crate::source) fn longest_answer(timeout: Duration) -> Duration {
    2 * timeout + GRACE
}

/// Smallest read in bytes that prefetches the block status for the reads after it.
const PREFETCH_MIN: u64 = 64 << 10;

/// Maximum length in bytes of one command that writes zeroes.
const MAX_ZERO: u64 = 1 << 30;

/// Maximum length in bytes of one write of zeroes as data, for a server without a command for it.
const ZERO_DATA: u64 = 1 << 20;

/// A disk of an NBD server.
#[derive(Debug)]
pub struct NbdDisk {
    session: Arc<Session>,
    geometry: Geometry,
    writable: bool,
}

impl NbdDisk {
    /// Connects to the export of `config`.
    ///
    /// Retries a failed attempt as often as `retry=` says, with back-off; without `retry=` there is one attempt. A
    /// termination signal ends the retries.
    pub fn connect(config: &NbdConfig, writable: bool) -> Result<Self> {
        Self::connect_with(Connector::new(config)?, config, writable)
    }

    /// Connects to a server that this process has started. `config` has its name and the limits of the disk.
    pub(in crate::source) fn connect_to_own(
        server: Arc<dyn OwnServer>,
        config: &NbdConfig,
        writable: bool,
    ) -> Result<Self> {
        Self::connect_with(Connector::to_own(server, config.clone())?, config, writable)
    }

    fn connect_with(connector: Connector, config: &NbdConfig, writable: bool) -> Result<Self> {
        let timeout = timeout(config);
        let mut retries_left = if connector.can_repeat() {
            config.retry.unwrap_or(0)
        } else {
            0
        };
        let mut pause = Duration::from_millis(100);
        let (handle, export) = loop {
            match connector.open(true, Instant::now() + timeout, &is_ending) {
                Ok(open) => break open,
                Err(e) if retries_left == 0 => return Err(e),
                Err(e) => tracing::info!("{retries_left} connection attempts left: {e}"),
            }
            retries_left -= 1;
            let until = Instant::now() + pause;
            // Signals are blocked and read only after the mount, so a sleep is not interrupted: poll for them.
            while Instant::now() < until && !is_ending() {
                std::thread::sleep(Duration::from_millis(20));
            }
            if is_ending() {
                // One more attempt, which the signal ends at once, gives the caller an error to report.
                retries_left = 0;
            }
            pause = (pause * 2).min(Duration::from_secs(2));
        };
        let writable = writable && !export.read_only;
        warn_of_incomplete_block(&connector, &export);
        let session = Session::start(connector, export, options(config, writable), Some(handle))?;
        Ok(Self {
            geometry: export.geometry(),
            session,
            writable,
        })
    }

    /// Creates a disk for an export whose properties are known already. Connects when the disk is first used.
    pub(super) fn connect_lazily(
        connector: Connector,
        export: Export,
        config: &NbdConfig,
        writable: bool,
    ) -> Result<Self> {
        let writable = writable && !export.read_only;
        warn_of_incomplete_block(&connector, &export);
        let session = Session::start(connector, export, options(config, writable), None)?;
        Ok(Self {
            geometry: export.geometry(),
            session,
            writable,
        })
    }

    /// Returns true if the server reports the export as read-only.
    pub(crate) fn is_read_only(&self) -> bool {
        self.session.export().read_only
    }

    /// Returns the server and the export, for messages. Secrets of a URI are left out.
    pub fn label(&self) -> String {
        self.session.label()
    }

    /// Returns the number of sockets of the current connection.
    #[cfg(test)]
    pub(super) fn connections(&self) -> usize {
        self.session.connections()
    }

    /// Returns the number of requests that bulk threads have carried.
    #[cfg(test)]
    pub(super) fn carried(&self) -> usize {
        self.session.carried()
    }

    /// Returns the size of the export in bytes: less than a sector smaller than that of the disk.
    fn size(&self) -> u64 {
        self.session.export().size
    }

    /// Submits one command. `done` is called with the command, whose buffer or extents hold the answer.
    fn submit(&self, kind: CommandKind, offset: u64, len: u64, buf: impl Into<CommandBuffer>, done: CommandCompletion) {
        self.session.submit(self.command(kind, offset, len, buf, done));
    }

    fn command(
        &self,
        kind: CommandKind,
        offset: u64,
        len: u64,
        buf: impl Into<CommandBuffer>,
        done: CommandCompletion,
    ) -> Box<Command> {
        let mut command = Command::new(kind, offset, len, buf, self.session.deadline(), done);
        self.session.limit_wait(&mut command);
        command
    }

    /// Executes a command without data. Returns its extents: lengths and flags.
    fn run(&self, kind: CommandKind, offset: u64, len: u64) -> Result<Vec<(u64, u32)>> {
        let oneshot = Oneshot::new();
        let sender = Arc::clone(&oneshot);
        let finish: CommandCompletion = Box::new(move |command, result| sender.put(result.map(|()| command.extents)));
        self.submit(kind, offset, len, Buffer::default(), finish);
        self.wait(&oneshot)
    }

    /// Waits for a result, polling the connection meanwhile if no other thread does.
    fn wait<T: Send + 'static>(&self, oneshot: &Oneshot<Result<T>>) -> Result<T> {
        let timed_out = || {
            Err(Error::new(
                ErrorKind::Os(libc::EIO),
                format!(
                    "{}: a command has not completed {} s after its deadline",
                    self.label(),
                    GRACE.as_secs()
                ),
            ))
        };
        // The session fails each command at its deadline, so this limit is only reached if its threads are stuck.
        oneshot
            .wait(&self.session, Instant::now() + longest_answer(self.session.timeout()))
            .unwrap_or_else(timed_out)
    }

    fn pool(&self) -> &BufferPool {
        &self.session.pool
    }

    fn buffer(&self, len: u64) -> Result<Buffer> {
        let no_memory = || {
            Error::new(
                ErrorKind::Os(libc::ENOMEM),
                format!("no memory for a buffer of {len} bytes"),
            )
        };
        self.pool()
            .take(usize::try_from(len).ok().ok_or_else(no_memory)?)
            .ok_or_else(no_memory)
    }

    /// Asks the server for the block status at `byte`. Returns the content there and the byte at which it ends.
    fn query_status(&self, byte: u64) -> (Content, u64) {
        // Taken before the command is sent: a change that begins meanwhile makes the answer stale.
        let stamp = self.session.map.stamp();
        let end = ((byte / REGION + 1) * REGION).min(self.size());
        // An error is not passed on: without an answer the range counts as data, which is always correct.
        let extents = self.run(CommandKind::Status, byte, end - byte).unwrap_or_default();
        self.session.map.learn(stamp, byte, &extents);
        let mut at = byte;
        let mut found = None;
        // The server chooses how it divides the range, so neighbours of the same content are joined here.
        for (len, flags) in extents {
            let content = content(flags);
            if len == 0 || *found.get_or_insert(content) != content {
                break;
            }
            at = at.saturating_add(len).min(end);
        }
        found
            .filter(|_| at > byte)
            .map_or((Content::Data, end), |content| (content, at))
    }

    /// Prefetches the block status of the region of a read, for the reads after it. Does not wait for the answer.
    fn prefetch_status(&self, byte: u64) {
        let export = self.session.export();
        if !export.block_status || byte >= export.size || !self.session.map.ask_ahead(byte) {
            return;
        }
        let stamp = self.session.map.stamp();
        let end = ((byte / REGION + 1) * REGION).min(export.size);
        let session = Arc::downgrade(&self.session);
        let finish: CommandCompletion = Box::new(move |command, result| {
            if let (Ok(()), Some(session)) = (result, session.upgrade()) {
                session.map.learn(stamp, command.offset, &command.extents);
            }
        });
        self.submit(CommandKind::Status, byte, end - byte, Buffer::default(), finish);
    }

    /// Makes a range of the export read as zeroes. `unmap`: also discards it where the server can.
    fn zero_bytes(&self, from: u64, to: u64, unmap: bool) -> Result<()> {
        let export = *self.session.export();
        let mut at = from;
        while at < to {
            let len = (to - at).min(MAX_ZERO);
            if !export.zero {
                self.zero_without_command(at, len, unmap)?;
            } else if unmap && export.fast_zero {
                // A discard is fast or not possible at all. If it is refused, a slow write of zeroes still keeps the
                // promise of `zero`.
                match self.run(
                    CommandKind::Zero {
                        flags: LIBNBD_CMD_FLAG_FAST_ZERO,
                    },
                    at,
                    len,
                ) {
                    Err(e) if is_unsupported(&e) => self.run(CommandKind::Zero { flags: 0 }, at, len),
                    other => other,
                }?;
            } else {
                let flags = if unmap { 0 } else { LIBNBD_CMD_FLAG_NO_HOLE };
                self.run(CommandKind::Zero { flags }, at, len)?;
            }
            at += len;
        }
        Ok(())
    }

    /// Makes a range read as zeroes on a server without a command for it: trims it where block status can show that the
    /// trim created zeroes, and sends zeroes as data elsewhere.
    fn zero_without_command(&self, from: u64, len: u64, unmap: bool) -> Result<()> {
        let export = *self.session.export();
        if unmap && export.trim && export.block_status {
            // A trim guarantees nothing about the content afterwards, so the loop below checks every range.
            self.run(CommandKind::Trim, from, len)?;
        }
        let mut at = from;
        let end = from + len;
        while at < end {
            if export.block_status {
                let (content, until) = self.query_status(at);
                // Only whole granules can be skipped: a write must begin and end at a multiple of the granule.
                if content.is_zero() && until / export.granule() > at / export.granule() {
                    at = if until >= end {
                        end
                    } else {
                        until - until % export.granule()
                    };
                    continue;
                }
            }
            let max_len = ZERO_DATA.min(export.maximum);
            // After an unaligned start the next write is aligned.
            let len = (end - at).min(max_len - at % export.granule());
            let mut buf = self.buffer(len)?;
            buf.bytes().fill(0);
            self.write_buffer(at, len, buf)?;
            at += len;
        }
        Ok(())
    }

    fn write_buffer(&self, offset: u64, len: u64, buf: Buffer) -> Result<()> {
        let oneshot = Oneshot::new();
        let (sender, session) = (Arc::clone(&oneshot), Arc::downgrade(&self.session));
        let finish: CommandCompletion = Box::new(move |mut command, result| {
            if let Some(session) = session.upgrade() {
                session.pool.give(command.buf.take());
            }
            sender.put(result);
        });
        self.submit(CommandKind::Write { flags: 0 }, offset, len, buf, finish);
        self.wait(&oneshot)
    }

    /// Returns the length in bytes of the commands that a longer request is split into. For a far server this is its
    /// maximum: there the number of commands determines the cost, not their size.
    fn piece(&self) -> u64 {
        if self.session.is_near() {
            self.session.export().piece()
        } else {
            self.session.export().maximum
        }
    }

    fn check_writable(&self) -> Result<()> {
        if self.writable {
            return Ok(());
        }
        let reason = if self.is_read_only() {
            "the export is read-only"
        } else {
            "the disk was opened read-only"
        };
        Err(Error::new(ErrorKind::ReadOnly, format!("{}: {reason}", self.label())))
    }
}

impl Drop for NbdDisk {
    fn drop(&mut self) {
        self.session.close();
    }
}

impl BlockRead for NbdDisk {
    fn geometry(&self) -> Geometry {
        self.geometry
    }

    fn read_at(&self, at: Lba, buf: &mut [u8]) -> Result<()> {
        let sectors = check_range(&self.geometry, at, buf.len())?;
        // Below an overlay the reader may be an event loop, which asks first for what is in memory.
        if !cache::may_wait() {
            return Err(cache::would_block());
        }
        let oneshot = Oneshot::new();
        let sender = Arc::clone(&oneshot);
        // The bytes are copied once more. This function returns at its timeout, but libnbd writes to the buffer of a
        // command until it has returned the command, so that buffer cannot be the caller's.
        self.submit_read(at, sectors, Box::new(move |read| sender.put(read.map(<[u8]>::to_vec))));
        let read = self.wait(&oneshot)?;
        match buf.get_mut(..read.len()) {
            Some(part) if part.len() == read.len() => part.copy_from_slice(&read),
            _ => return Err(Error::corrupt("a read returned more bytes than were requested")),
        }
        Ok(())
    }

    fn content_at(&self, at: Lba) -> Result<(Content, u64)> {
        check_range(&self.geometry, at, SECTOR as usize)?;
        let left = self.geometry.sectors - at.0;
        let byte = at.bytes();
        if !self.session.export().block_status {
            return Ok((Content::Data, left));
        }
        // Aligned to the server's block size: a server may refuse a request that is not, and reports whole blocks only.
        let granule = self.session.export().granule();
        let first = byte - byte % granule;
        let (content, end) = match self.session.map.at(byte) {
            Some(known) => known,
            None => self.query_status(first),
        };
        let sectors = match content {
            _ if end >= self.size() => left,
            // A range may end within a sector. Data is rounded up and zeroes are rounded down, so that a sector that
            // is zero only in part counts as data.
            Content::Data => end.div_ceil(SECTOR).saturating_sub(at.0),
            _ => (end / SECTOR).saturating_sub(at.0),
        };
        // Less than a whole sector of zeroes: the sector is mixed.
        Ok(if sectors == 0 {
            (Content::Data, 1)
        } else {
            (content, sectors.min(left))
        })
    }

    fn is_zero(&self, at: Lba, sectors: u64) -> bool {
        let end = (at + sectors).bytes().min(self.size());
        at.bytes() < end && self.session.map.is_zero(at.bytes(), end)
    }

    fn writer(&self) -> Option<&dyn BlockWrite> {
        self.writable.then_some(self)
    }

    fn queue(&self) -> Option<&dyn BlockQueue> {
        Some(self)
    }

    fn shared_content(&self) -> Option<&dyn SharedContent> {
        Some(self)
    }
}

impl BlockWrite for NbdDisk {
    fn latch(&self) -> &WriteLatch {
        &self.session.latch
    }

    fn prepare_external_write(&self) -> Result<()> {
        self.check_writable()
    }

    fn write_at(&self, at: Lba, buf: &[u8]) -> Result<()> {
        check_range(&self.geometry, at, buf.len())?;
        let oneshot = Oneshot::new();
        let sender = Arc::clone(&oneshot);
        self.submit_write(at.bytes(), buf, false, Box::new(move |result| sender.put(result)));
        self.wait(&oneshot)
    }

    fn zero(&self, range: Range<Lba>, unmap: bool) -> Result<()> {
        self.check_writable()?;
        if range.end.0 > self.geometry.sectors || range.start > range.end {
            let text = format!(
                "sectors {} to {} are not on the disk of {} sectors",
                range.start.0, range.end.0, self.geometry.sectors
            );
            return Err(Error::new(ErrorKind::OutOfRange, text));
        }
        self.zero_bytes(range.start.bytes(), range.end.bytes().min(self.size()), unmap)
    }

    fn add_room(&self, _range: Range<Lba>, _zero: bool, _needed: &mut RoomNeeded) -> Result<()> {
        // The protocol tells nothing of the server's room.
        Ok(())
    }

    fn allocate(&self, range: Range<Lba>) -> Result<()> {
        let mut at = range.start;
        while at < range.end {
            let (content, sectors) = self.content_at(at)?;
            let end = Lba((at + sectors.max(1)).0.min(range.end.0));
            // Zeroes that are no hole: the server allocates them, or reports that it cannot.
            if content.is_zero() {
                self.zero(at..end, false)?;
            }
            at = end;
        }
        Ok(())
    }

    fn slow_zeroing(&self, _range: Range<Lba>) -> Option<String> {
        (!self.session.export().zero).then(|| "the NBD server has no command that writes zeroes".to_owned())
    }

    fn flush(&self) -> Result<()> {
        if !self.writable {
            return Ok(());
        }
        let oneshot = Oneshot::new();
        let sender = Arc::clone(&oneshot);
        self.submit_flush(Box::new(move |result| sender.put(result)));
        self.wait(&oneshot)
    }

    fn close(&self) -> Result<()> {
        BlockWrite::flush(self)
    }
}

impl SharedContent for NbdDisk {
    fn epoch(&self) -> u64 {
        self.session.epoch()
    }

    fn forget_content(&self) {
        self.session.map.clear();
    }
}

/// Returns true if the server refused a fast write of zeroes because it would be slow or is not implemented.
fn is_unsupported(e: &Error) -> bool {
    matches!(e.kind(), ErrorKind::Os(libc::EOPNOTSUPP | libc::EINVAL))
}

/// Returns the time from the submission of a request to its failure.
pub(super) fn timeout(config: &NbdConfig) -> Duration {
    config.timeout.unwrap_or(TIMEOUT).min(MAX_TIMEOUT)
}

/// Warns of an export whose end is within a block: its server may refuse requests for the rest.
fn warn_of_incomplete_block(connector: &Connector, export: &Export) {
    let (size, block) = (export.size, export.minimum);
    if size % block != 0 {
        tracing::warn!(
            "{}: its size of {size} bytes is no multiple of its block size of {block} bytes: the last {} bytes may give \
             I/O errors; resize the disk on the server to avoid them",
            connector.label(),
            size % block
        );
    }
}

fn options(config: &NbdConfig, writable: bool) -> SessionOptions {
    let connections = config.connections.unwrap_or(CONNECTIONS);
    SessionOptions {
        connections,
        timeout: timeout(config),
        retry: config.retry,
        writable,
    }
}
