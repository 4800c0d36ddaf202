//! An export as a disk: sectors above, commands below.

use std::ops::Range;
use std::sync::Arc;
use std::time::{Duration, Instant};

use libnbd_sys::{LIBNBD_CMD_FLAG_FAST_ZERO, LIBNBD_CMD_FLAG_FUA, LIBNBD_CMD_FLAG_NO_HOLE};

use super::buffer_pool::{Buffer, BufferPool, CommandBuffer, Shared};
use super::bulk::BulkRequest;
use super::command::{Command, CommandCompletion, CommandKind};
use super::connect::Connector;
use super::connection::MAX_TIMEOUT;
use super::export::Export;
use super::extent_cache::{REGION, content};
use super::ffi::is_ending;
use super::session::{Session, SessionOptions};
use super::split_request::{Oneshot, SplitRequest, pieces};
use crate::block::{
    BlockQueue, BlockRead, BlockWrite, Completion, Content, Geometry, Lba, ReadCompletion, SECTOR, Stay, check_range,
};
use crate::config::NbdConfig;
use crate::error::{Error, ErrorKind, Result};

/// Connections where the server takes several, as nbdfuse and nbdcopy have them.
const CONNECTIONS: usize = 4;

/// After which a request fails, where nothing else was said: before the kernel calls a task hung.
const TIMEOUT: Duration = Duration::from_secs(30);

/// How much longer than its deadline a result may take to reach who waits for it.
const GRACE: Duration = Duration::from_secs(10);

/// Bytes from which on it is worth to ask for holes ahead of a read.
const WORTH_ASKING: u64 = 64 << 10;

/// Bytes of zeroes that one command writes at most.
const MAX_ZERO: u64 = 1 << 30;

/// Bytes of zeroes that are sent as data at once, where the server can't write them by itself.
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
    /// Where that fails it is tried again as often as `retry=` says, and once where it says nothing.
    pub fn connect(config: &NbdConfig, writable: bool) -> Result<Self> {
        let connector = Connector::new(config)?;
        let timeout = timeout(config);
        let mut left = if connector.can_repeat() {
            config.retry.unwrap_or(0)
        } else {
            0
        };
        let mut pause = Duration::from_millis(100);
        let (handle, export) = loop {
            match connector.open(true, Instant::now() + timeout, &is_ending) {
                Ok(open) => break open,
                Err(e) if left == 0 => return Err(e),
                Err(e) => tracing::info!("{left} attempts are left: {e}"),
            }
            left -= 1;
            let until = Instant::now() + pause;
            while Instant::now() < until && !is_ending() {
                std::thread::sleep(Duration::from_millis(20));
            }
            if is_ending() {
                left = 0;
            }
            pause = (pause * 2).min(Duration::from_secs(2));
        };
        let writable = writable && !export.read_only;
        let session = Session::start(connector, export, options(config, writable), Some(handle))?;
        Ok(Self {
            geometry: export.geometry(),
            session,
            writable,
        })
    }

    /// An export of a server that is known already; connected to when it is first used.
    pub(super) fn later(connector: Connector, export: Export, config: &NbdConfig, writable: bool) -> Result<Self> {
        let writable = writable && !export.read_only;
        let session = Session::start(connector, export, options(config, writable), None)?;
        Ok(Self {
            geometry: export.geometry(),
            session,
            writable,
        })
    }

    /// Whether the server takes no writes.
    pub fn is_read_only(&self) -> bool {
        self.session.export().read_only
    }

    /// The server, for messages.
    pub fn label(&self) -> String {
        self.session.label()
    }

    /// Connections that there are now.
    #[cfg(test)]
    pub(super) fn connections(&self) -> usize {
        self.session.connections()
    }

    /// Long requests that had a connection for themselves.
    #[cfg(test)]
    pub(super) fn carried(&self) -> usize {
        self.session.carried()
    }

    /// Bytes of the export: up to a sector fewer than of the disk.
    fn size(&self) -> u64 {
        self.session.export().size
    }

    /// Begins a command of any length; `done` is given the operation that was made.
    fn prepare_external_write(
        &self,
        kind: CommandKind,
        offset: u64,
        len: u64,
        buf: impl Into<CommandBuffer>,
        done: CommandCompletion,
    ) {
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
        Command::new(kind, offset, len, buf, self.session.deadline(), done)
    }

    /// A command without data, and its end waited for.
    fn run(&self, kind: CommandKind, offset: u64, len: u64) -> Result<Vec<(u64, u32)>> {
        let slot = Oneshot::new();
        let there = Arc::clone(&slot);
        let finish: CommandCompletion = Box::new(move |command, result| there.put(result.map(|()| command.extents)));
        self.prepare_external_write(kind, offset, len, Buffer::default(), finish);
        self.waited(&slot)
    }

    fn waited<T: Send + 'static>(&self, slot: &Oneshot<Result<T>>) -> Result<T> {
        let timed_out = || {
            Err(Error::new(
                ErrorKind::Os(libc::EIO),
                format!("{}: a command has no end", self.label()),
            ))
        };
        slot.wait(&self.session, self.session.deadline() + GRACE)
            .unwrap_or_else(timed_out)
    }

    fn pool(&self) -> &BufferPool {
        &self.session.pool
    }

    fn buffer(&self, len: u64) -> Result<Buffer> {
        let none = || Error::new(ErrorKind::Os(libc::ENOMEM), format!("no memory for {len} bytes"));
        self.pool()
            .take(usize::try_from(len).ok().ok_or_else(none)?)
            .ok_or_else(none)
    }

    /// Asks for what is at `byte` and after it.
    fn ask(&self, byte: u64) -> (Content, u64) {
        let stamp = self.session.map.stamp();
        let end = ((byte / REGION + 1) * REGION).min(self.size());
        // A server that can't tell just now: to say that there is data is never wrong.
        let extents = self.run(CommandKind::Status, byte, end - byte).unwrap_or_default();
        self.session.map.learn(stamp, byte, &extents);
        let mut at = byte;
        let mut found = None;
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

    /// Asks for the region of a read ahead of the next ones. Nobody waits for the answer.
    fn ask_ahead(&self, byte: u64) {
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
        self.prepare_external_write(CommandKind::Status, byte, end - byte, Buffer::default(), finish);
    }

    /// Makes a range of the export read as zeroes.
    fn zero_bytes(&self, from: u64, to: u64, unmap: bool) -> Result<()> {
        let export = *self.session.export();
        let mut at = from;
        while at < to {
            let len = (to - at).min(MAX_ZERO);
            if !export.zero {
                self.zero_without(at, len, unmap)?;
            } else if unmap && export.fast_zero {
                // Giving room back is fast or not possible; writing zeroes may take long, but keeps the promise.
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

    /// The same where the server has no command for it: a trim, where it can be seen that it made zeroes, else zeroes sent
    /// as data.
    fn zero_without(&self, from: u64, len: u64, unmap: bool) -> Result<()> {
        let export = *self.session.export();
        if unmap && export.trim && export.block_status {
            self.run(CommandKind::Trim, from, len)?;
        }
        let mut at = from;
        let end = from + len;
        while at < end {
            if export.block_status {
                let (content, until) = self.ask(at);
                if content.is_zero() && until / export.granule() > at / export.granule() {
                    at = if until >= end {
                        end
                    } else {
                        until - until % export.granule()
                    };
                    continue;
                }
            }
            let most = ZERO_DATA.min(export.maximum);
            let len = (end - at).min(most - at % export.granule());
            let mut buf = self.buffer(len)?;
            buf.bytes().fill(0);
            self.write_buffer(at, len, buf)?;
            at += len;
        }
        Ok(())
    }

    fn write_buffer(&self, offset: u64, len: u64, buf: Buffer) -> Result<()> {
        let slot = Oneshot::new();
        let (there, session) = (Arc::clone(&slot), Arc::downgrade(&self.session));
        let finish: CommandCompletion = Box::new(move |mut command, result| {
            if let Some(session) = session.upgrade() {
                session.pool.give(command.buf.take());
            }
            there.put(result);
        });
        self.prepare_external_write(CommandKind::Write { flags: 0 }, offset, len, buf, finish);
        self.waited(&slot)
    }

    /// Bytes of one command where there is more to read or write. To a server far away as much as it takes: there only
    /// the number of commands counts.
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
        let why = if self.is_read_only() {
            "the export is read-only"
        } else {
            "it was opened read-only"
        };
        Err(Error::new(ErrorKind::ReadOnly, format!("{}: {why}", self.label())))
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
        let slot = Oneshot::new();
        let there = Arc::clone(&slot);
        // The bytes are copied once more: a buffer of the caller's would have to outlive a command that is given up.
        self.submit_read(at, sectors, Box::new(move |read| there.put(read.map(<[u8]>::to_vec))));
        let read = self.waited(&slot)?;
        match buf.get_mut(..read.len()) {
            Some(part) if part.len() == read.len() => part.copy_from_slice(&read),
            _ => return Err(Error::corrupt("more was read than asked for")),
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
        // A server tells of whole blocks of its own only.
        let granule = self.session.export().granule();
        let first = byte - byte % granule;
        let (content, end) = match self.session.map.at(byte) {
            Some(known) => known,
            None => self.ask(first),
        };
        let sectors = match content {
            // A sector that is zeroes in part is none.
            _ if end >= self.size() => left,
            Content::Data => end.div_ceil(SECTOR).saturating_sub(at.0),
            _ => (end / SECTOR).saturating_sub(at.0),
        };
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
}

impl BlockWrite for NbdDisk {
    fn prepare_external_write(&self) -> Result<()> {
        self.check_writable()
    }

    fn write_at(&self, at: Lba, buf: &[u8]) -> Result<()> {
        let slot = Oneshot::new();
        let there = Arc::clone(&slot);
        check_range(&self.geometry, at, buf.len())?;
        self.submit_write(at.bytes(), buf, false, Box::new(move |result| there.put(result)));
        self.waited(&slot)
    }

    fn zero(&self, range: Range<Lba>, unmap: bool) -> Result<()> {
        self.check_writable()?;
        if range.end.0 > self.geometry.sectors || range.start > range.end {
            let text = format!("sectors {} to {} are not on the disk", range.start.0, range.end.0);
            return Err(Error::new(ErrorKind::OutOfRange, text));
        }
        self.zero_bytes(range.start.bytes(), range.end.bytes().min(self.size()), unmap)
    }

    fn has_unflushed_metadata(&self) -> bool {
        // the journal is only for a server that is restarted: the server has all of it
        false
    }

    fn flush(&self) -> Result<()> {
        if !self.writable {
            return Ok(());
        }
        let slot = Oneshot::new();
        let there = Arc::clone(&slot);
        self.submit_flush(Box::new(move |result| there.put(result)));
        self.waited(&slot)
    }

    fn close(&self) -> Result<()> {
        BlockWrite::flush(self)
    }
}

impl BlockQueue for NbdDisk {
    fn submit_read(&self, at: Lba, sectors: u64, done: ReadCompletion) {
        let bytes = sectors * SECTOR;
        let export = *self.session.export();
        let len = bytes.min(export.size.saturating_sub(at.bytes()));
        if let Err(e) = check_range(&self.geometry, at, usize::try_from(bytes).unwrap_or(usize::MAX)) {
            return done(Err(e));
        }
        if bytes >= WORTH_ASKING {
            self.ask_ahead(at.bytes());
        }
        let buf = match self.buffer(bytes) {
            Ok(buf) => buf,
            Err(e) => return done(Err(e)),
        };
        let session = Arc::downgrade(&self.session);
        let give = move |mut buf: Buffer, result: Result<()>| {
            let (len, bytes) = (len as usize, bytes as usize);
            done(result.map(|()| {
                let read = &mut buf.bytes()[..bytes];
                read[len..].fill(0);
                &*read
            }));
            if let Some(session) = session.upgrade() {
                session.pool.give(buf);
            }
        };
        let piece = self.piece();
        if len <= piece {
            let finish: CommandCompletion = Box::new(move |mut command, result| give(command.buf.take(), result));
            return self.prepare_external_write(CommandKind::Read, at.bytes(), len, buf, finish);
        }
        let whole = Shared::new(buf);
        let all = Arc::clone(&whole);
        let (from, to) = (at.bytes(), at.bytes() + len);
        let parts = SplitRequest::new(
            pieces(from, to, piece).count(),
            Box::new(move |result| give(all.take(), result)),
        );
        let commands = pieces(from, to, piece).map(|(start, end)| {
            let parts = Arc::clone(&parts);
            let place = CommandBuffer::Part {
                of: Arc::clone(&whole),
                start: (start - from) as usize,
            };
            self.command(
                CommandKind::Read,
                start,
                end - start,
                place,
                Box::new(move |_, result| parts.done(result)),
            )
        });
        self.session.submit_all(commands.collect());
    }

    fn write_alignment(&self) -> u64 {
        self.session.export().minimum
    }

    fn supports_fua(&self, offset: u64, len: u64) -> bool {
        // Of several commands each would wait for the disk; one flush after them waits once.
        let export = self.session.export();
        export.fua && pieces(offset, offset.saturating_add(len), export.piece()).count() <= 1
    }

    fn submit_write(&self, offset: u64, data: &[u8], durable: bool, done: Completion) {
        if let Err(e) = self.check_writable() {
            return done(Err(e));
        }
        let end = offset
            .checked_add(data.len() as u64)
            .filter(|end| *end <= self.geometry.bytes());
        if end.is_none() {
            let text = format!(
                "{} bytes at {offset} are not on a disk of {}",
                data.len(),
                self.geometry.bytes()
            );
            return done(Err(Error::new(ErrorKind::OutOfRange, text)));
        }
        let export = *self.session.export();
        let (data, past) = data.split_at(data.len().min((export.size.saturating_sub(offset)) as usize));
        // The last sector has bytes that the export does not: they can't be kept.
        if past.iter().any(|b| *b != 0) {
            let text = format!(
                "{}: the export ends at byte {}, within a sector",
                self.label(),
                export.size
            );
            return done(Err(Error::new(ErrorKind::Os(libc::ENOSPC), text)));
        }
        if data.is_empty() {
            return done(Ok(()));
        }
        let flags = if durable { LIBNBD_CMD_FLAG_FUA } else { 0 };
        let (from, to) = (offset, offset + data.len() as u64);
        // asked once: it may be another one a moment later
        let piece = self.piece();
        let parts = SplitRequest::new(pieces(from, to, piece).count(), done);
        for (start, end) in pieces(from, to, piece) {
            let part = &data[(start - from) as usize..(end - from) as usize];
            let mut buf = match self.buffer(part.len() as u64) {
                Ok(buf) => buf,
                Err(e) => {
                    parts.done(Err(e));
                    continue;
                }
            };
            buf.bytes()[..part.len()].copy_from_slice(part);
            let (parts, session) = (Arc::clone(&parts), Arc::downgrade(&self.session));
            let finish: CommandCompletion = Box::new(move |mut command, result| {
                if let Some(session) = session.upgrade() {
                    session.pool.give(command.buf.take());
                }
                parts.done(result);
            });
            // Each by itself: it is on its way while the next one is copied.
            self.session.submit_all(BulkRequest::from([self.command(
                CommandKind::Write { flags },
                start,
                end - start,
                buf,
                finish,
            )]));
        }
    }

    fn submit_flush(&self, done: Completion) {
        // Without the command all that was answered is durable, as far as anybody can know.
        if !self.writable || !self.session.export().flush || self.session.is_durable() {
            return done(Ok(()));
        }
        self.prepare_external_write(
            CommandKind::Flush,
            0,
            0,
            Buffer::default(),
            Box::new(move |_, result| done(result)),
        );
    }

    fn poll_completions(&self, stay: Stay<'_>) {
        self.session.poll_completions(stay);
    }
}

fn is_unsupported(e: &Error) -> bool {
    matches!(e.kind(), ErrorKind::Os(libc::EOPNOTSUPP | libc::EINVAL))
}

pub(super) fn timeout(config: &NbdConfig) -> Duration {
    config.timeout.unwrap_or(TIMEOUT).min(MAX_TIMEOUT)
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
