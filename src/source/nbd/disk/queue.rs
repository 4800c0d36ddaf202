//! Requests that do not wait: reads, writes and flushes whose completions come from the threads of the connections.

use std::sync::Arc;

use libnbd_sys::LIBNBD_CMD_FLAG_FUA;

use super::super::buffer_pool::{Buffer, Shared};
use super::super::bulk::BulkRequest;
use super::super::command::{CommandCompletion, CommandKind};
use super::super::split_request::{SplitRequest, pieces};
use super::{NbdDisk, PREFETCH_MIN};
use crate::block::{BlockQueue, Completion, CompletionPoller, Lba, ReadCompletion, SECTOR, Stay, check_range};
use crate::error::{Error, ErrorKind, Result};

impl BlockQueue for NbdDisk {
    fn submit_read(&self, at: Lba, sectors: u64, done: ReadCompletion) {
        let bytes = sectors * SECTOR;
        let export = *self.session.export();
        let len = bytes.min(export.size.saturating_sub(at.bytes()));
        if let Err(e) = check_range(&self.geometry, at, usize::try_from(bytes).unwrap_or(usize::MAX)) {
            return done(Err(e));
        }
        if bytes >= PREFETCH_MIN {
            self.prefetch_status(at.bytes());
        }
        let buf = match self.buffer(bytes) {
            Ok(buf) => buf,
            Err(e) => return done(Err(e)),
        };
        let session = Arc::downgrade(&self.session);
        let finish_read = move |mut buf: Buffer, result: Result<()>| {
            let (len, bytes) = (len as usize, bytes as usize);
            done(result.map(|()| {
                let read = &mut buf.bytes()[..bytes];
                // The part of the last sector beyond the export. The pool reuses buffers without clearing them.
                read[len..].fill(0);
                &*read
            }));
            if let Some(session) = session.upgrade() {
                session.pool.give(buf);
            }
        };
        let piece = self.piece();
        if len <= piece {
            let finish: CommandCompletion =
                Box::new(move |mut command, result| finish_read(command.buf.take(), result));
            return self.submit(CommandKind::Read, at.bytes(), len, buf, finish);
        }
        // Several commands fill parts of one buffer. The last part that ends calls `done` for all of them.
        let (from, to) = (at.bytes(), at.bytes() + len);
        let lens = pieces(from, to, piece).map(|(start, end)| (end - start) as usize);
        let (whole, buffers) = Shared::split(buf, lens);
        let parts = SplitRequest::new(
            buffers.len(),
            Box::new(move |result| match whole.into_buffer() {
                Some(buf) => finish_read(buf, result),
                None => finish_read(
                    Buffer::default(),
                    Err(Error::corrupt("a part of the read has not ended")),
                ),
            }),
        );
        let commands = pieces(from, to, piece).zip(buffers).map(|((start, end), part)| {
            let parts = Arc::clone(&parts);
            let finish: CommandCompletion = Box::new(move |command, result| {
                // Before the part counts as ended: the last one takes the whole buffer.
                drop(command);
                parts.done(result);
            });
            self.command(CommandKind::Read, start, end - start, part, finish)
        });
        self.session.submit_all(commands.collect());
    }

    fn write_alignment(&self) -> u64 {
        self.session.export().minimum
    }

    fn supports_fua(&self, offset: u64, len: u64) -> bool {
        // With several FUA commands the server waits for its disk for each; one flush after all of them waits once.
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
                "{} bytes at offset {offset} are not on the disk of {} bytes",
                data.len(),
                self.geometry.bytes()
            );
            return done(Err(Error::new(ErrorKind::OutOfRange, text)));
        }
        let export = *self.session.export();
        let (data, past) = data.split_at(data.len().min((export.size.saturating_sub(offset)) as usize));
        // The last sector extends beyond the export. Nonzero bytes there cannot be stored, and must not be lost
        // silently.
        if past.iter().any(|b| *b != 0) {
            let text = format!(
                "{}: the export ends at byte {}, within a sector: data beyond it can't be stored",
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
        // Read once: it changes when the server turns out to be near, and both uses must agree.
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
            // Submitted one at a time: the server receives this part while the next one is copied.
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
        // A server without a flush command offers no way to make answered writes more durable than they are.
        if !self.writable || !self.session.export().flush || self.session.is_durable() {
            return done(Ok(()));
        }
        self.submit(
            CommandKind::Flush,
            0,
            0,
            Buffer::default(),
            Box::new(move |_, result| done(result)),
        );
    }

    fn poller(&self) -> Option<&dyn CompletionPoller> {
        Some(self)
    }
}

impl CompletionPoller for NbdDisk {
    fn poll_completions(&self, stay: Stay<'_>) {
        self.session.poll_completions(stay);
    }
}
