//! Writes to a disk of the mount, truncation, fallocate, and the requests that flush.
//!
//! Truncation to N bytes has the meaning that it has for a file, except that the size stays: everything from N on reads
//! as zeroes. The kernel drops its pages only from the size on that the answer names, and only if that is not the size
//! that it knows. So the answer says N, with an attribute timeout of zero, and the next getattr the true size. Between the
//! two answers a mapping ends at N, as it would for any truncated file.
//!
//! A write to a local disk runs on the event loop. A write to a remote disk is submitted to the disk's queue and
//! answered by its completion; one that may block (it overlaps another write, or has to read first) runs in the disk's
//! worker pool. A completion runs on another thread, so it gets an [`OwnedContext`], which keeps the mount's state
//! alive.

use std::sync::Arc;

use fuser::{Errno, FileHandle, OpenFlags, ReplyEmpty, ReplyWrite, WriteFlags};

use crate::block::{BlockQueue, Stay};
use crate::error::{Error, ErrorKind, Result};
use crate::error_log::ErrorLog;
use crate::fuse::disk_file::{DiskFile, writes};
use crate::fuse::errno::{errno, zeroing_errno};
use crate::fuse::flush::FlushKind;
use crate::fuse::loop_budget::LoopBudget;
use crate::volume::WriteCompletion;

/// State of the mount that a request needs besides its disk, borrowed for the request.
#[derive(Debug, Clone, Copy)]
pub(super) struct RequestContext<'a> {
    pub(super) error_log: &'a Arc<ErrorLog>,
    pub(super) loops: &'a Arc<LoopBudget>,
    pub(super) files: &'a Arc<[DiskFile]>,
}

impl RequestContext<'_> {
    /// Polls the queue for completions on this event loop, as long as the loop can be spared.
    pub(super) fn poll_completions(&self, queue: &dyn BlockQueue) {
        self.loops.poll_completions(queue);
    }

    /// Returns a context for an answer that is given later, by another thread.
    pub(super) fn later(&self) -> OwnedContext {
        let (error_log, loops) = (Arc::clone(self.error_log), Arc::clone(self.loops));
        OwnedContext {
            error_log,
            loops,
            files: Arc::clone(self.files),
        }
    }
}

/// A [`RequestContext`] that owns its parts.
#[derive(Debug)]
pub(super) struct OwnedContext {
    error_log: Arc<ErrorLog>,
    loops: Arc<LoopBudget>,
    files: Arc<[DiskFile]>,
}

impl OwnedContext {
    /// Borrows the context.
    pub(super) fn context(&self) -> RequestContext<'_> {
        RequestContext {
            error_log: &self.error_log,
            loops: &self.loops,
            files: &self.files,
        }
    }

    /// Returns the disk at `index` in the order of the mount.
    pub(super) fn file(&self, index: usize) -> Option<&DiskFile> {
        self.files.get(index)
    }
}

impl DiskFile {
    /// Answers a write. An open with O_SYNC or O_DSYNC gets the answer once the data is durable.
    pub(super) fn write(
        &self,
        offset: u64,
        data: &[u8],
        write_flags: WriteFlags,
        flags: OpenFlags,
        context: RequestContext<'_>,
        reply: ReplyWrite,
    ) {
        // The kernel writes a dirty page of a mapping back as a whole and ignores how much of it was accepted, so a short
        // write has to become an error.
        let write_back = write_flags.contains(WriteFlags::FUSE_WRITE_CACHE);
        let request = WriteRequest {
            offset,
            len: data.len(),
            write_back,
            flags,
        };
        let volume = self.volume();
        if !volume.is_remote() {
            return self.reply_written(request, volume.write(offset, data), false, context, reply);
        }
        let (later, index) = (context.later(), self.index);
        let done: WriteCompletion = Box::new(move |result, durable| {
            if let Some(file) = later.file(index) {
                file.reply_written(request, result, durable, later.context(), reply);
            }
        });
        let submitted = match volume.queue() {
            Some(queue) => volume
                .submit_write(queue, offset, data, request.is_sync(), done)
                .map(|()| context.poll_completions(queue)),
            None => Err(done),
        };
        match submitted {
            Ok(()) => {}
            // The queue refused the request: it has to wait for an overlapping write, or to read first. The kernel's
            // buffer ends with this call, so the worker gets a copy.
            Err(done) => {
                let (data, volume) = (data.to_vec(), Arc::clone(&volume));
                self.pool
                    .run(Box::new(move || done(volume.write(offset, &data), false)));
            }
        }
    }

    /// Answers a completed write. `durable`: it needs no flush any more.
    fn reply_written(
        &self,
        request: WriteRequest,
        result: Result<usize>,
        durable: bool,
        context: RequestContext<'_>,
        reply: ReplyWrite,
    ) {
        let WriteRequest {
            offset,
            len,
            write_back,
            ..
        } = request;
        let end = self.volume().len();
        let written = result.and_then(|n| match n {
            n if write_back && n < len => Err(beyond_the_end(offset + n as u64, end)),
            n => Ok(n as u32),
        });
        self.attributes.changed();
        let name = self.config.name.display();
        match written {
            Err(e) => {
                reply.error(errno(&e));
                // ENOSPC at or beyond the end is the mistake of the writer, which gets the error: not worth a log line.
                // A page is written back when its writer may have exited, so its failure is always logged.
                if write_back || e.kind() != ErrorKind::Os(libc::ENOSPC) || offset < end {
                    context
                        .error_log
                        .note(e.within(format!("{name}: write of {len} bytes at {offset}")));
                }
            }
            Ok(n) if request.is_sync() && !durable => {
                self.flush_then(context, FlushKind::Durable, move |result| match result {
                    Ok(()) => reply.written(n),
                    Err(e) => reply.error(errno(e)),
                });
                // The completion runs on a thread with other work, which must not stay to poll.
                if let Some(queue) = self.volume().queue() {
                    queue.poll_completions(Stay::No);
                }
            }
            Ok(n) => reply.written(n),
        }
    }

    /// Answers a close. A process that has written relies on its data being durable once close returns, and on the image
    /// being one that other programs can use.
    pub(super) fn flush(&self, handle: FileHandle, context: RequestContext<'_>, reply: ReplyEmpty) {
        if writes(handle) {
            self.sync(FlushKind::Complete, context, reply);
        } else {
            reply.ok();
        }
    }

    /// Completes the image at the end of an open. What a loop device or a mapping has written since the last close of a
    /// descriptor is covered by no flush.
    pub(super) fn finish(&self, handle: FileHandle, context: RequestContext<'_>) {
        if writes(handle) && self.writable && self.volume().is_unfinished() {
            let volume = self.volume();
            // No program waits for this flush: the next one reports what it found.
            self.flush_then(context, FlushKind::Complete, move |result| {
                if let Err(e) = result {
                    volume.keep_unheard(e);
                }
            });
            if let Some(queue) = self.volume().queue() {
                queue.poll_completions(Stay::No);
            }
        }
    }

    /// Answers once everything that was written before is durable or, depending on `kind`, the image is complete.
    pub(super) fn sync(&self, kind: FlushKind, context: RequestContext<'_>, reply: ReplyEmpty) {
        if !self.writable {
            return reply.ok();
        }
        self.flush_then(context, kind, move |result| match result {
            Ok(()) => reply.ok(),
            Err(e) => reply.error(errno(e)),
        });
        if let Some(queue) = self.volume().queue() {
            context.poll_completions(queue);
        }
    }

    /// Discards a range, or fills it with zeroes, as the `mode` of fallocate(2) requests.
    ///
    /// Errors: [`Failed::Refused`] for a disk that is read-only, an unsupported mode, or a range beyond the end: a disk
    /// does not grow.
    pub(super) fn fallocate(&self, offset: u64, len: u64, mode: i32) -> Result<(), Failed> {
        if !self.writable {
            return Err(Failed::Refused(Errno::EROFS));
        }
        let volume = self.volume();
        let end = offset.checked_add(len).ok_or(Failed::Refused(Errno::EFBIG))?;
        let grows = mode & libc::FALLOC_FL_KEEP_SIZE == 0 && end > volume.len();
        match mode & !libc::FALLOC_FL_KEEP_SIZE {
            0 if end <= volume.len() => {
                self.attributes.changed();
                volume.allocate(offset, len).map_err(Failed::Volume)
            }
            0 => Err(Failed::Refused(Errno::ENOSPC)),
            libc::FALLOC_FL_ZERO_RANGE if grows => Err(Failed::Refused(Errno::ENOSPC)),
            operation @ (libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_ZERO_RANGE) => {
                self.attributes.changed();
                volume
                    .zero_range(offset, len, operation == libc::FALLOC_FL_PUNCH_HOLE)
                    .map_err(Failed::Volume)
            }
            _ => Err(Failed::Refused(Errno::EOPNOTSUPP)),
        }
    }

    /// Makes everything from byte `size` on read as zeroes: truncation of a disk, whose size is fixed.
    ///
    /// Errors: [`Failed::Refused`] for a disk that is read-only, and for a size beyond its end; `Unsupported` if the
    /// source cannot zero without writing as much.
    pub(super) fn truncate(&self, size: u64) -> Result<(), Failed> {
        if !self.writable {
            return Err(Failed::Refused(Errno::EROFS));
        }
        let volume = self.volume();
        match volume.len().checked_sub(size) {
            None => Err(Failed::Refused(Errno::EFBIG)),
            Some(0) => Ok(()),
            Some(len) => {
                volume.check_cheap_zeroing(size).map_err(Failed::Volume)?;
                self.attributes.changed();
                volume.zero_range(size, len, true).map_err(Failed::Volume)
            }
        }
    }

    /// Returns the errno for a failed truncation or fallocate. `what` names it in the log.
    pub(super) fn zeroed(
        &self,
        error_log: &ErrorLog,
        what: impl FnOnce() -> String,
        result: Result<(), Failed>,
    ) -> Result<(), Errno> {
        match result {
            Ok(()) => Ok(()),
            Err(Failed::Refused(e)) => Err(e),
            Err(Failed::Volume(e)) => {
                let errno = zeroing_errno(&e);
                error_log.note(e.within(format!("{}: {}", self.config.name.display(), what())));
                Err(errno)
            }
        }
    }

    /// Flushes the disk, then calls `answer`. A failure is logged too.
    fn flush_then(
        &self,
        context: RequestContext<'_>,
        kind: FlushKind,
        answer: impl FnOnce(&Result<()>) + Send + 'static,
    ) {
        let (error_log, name) = (Arc::clone(context.error_log), self.config.name.display().to_string());
        let answer = Box::new(move |result: &Result<()>| {
            answer(result);
            if let Err(e) = result {
                error_log.note(e.clone().within(format!("{name}: flush")));
            }
        });
        self.flushes.flush(&self.volume(), context.loops, kind, answer);
    }
}

/// A write request.
#[derive(Debug, Clone, Copy)]
struct WriteRequest {
    offset: u64,
    len: usize,
    /// Written back from the page cache, some time after the process changed the page.
    write_back: bool,
    flags: OpenFlags,
}

impl WriteRequest {
    /// Returns true if the answer has to wait until the data is durable.
    fn is_sync(&self) -> bool {
        // O_SYNC includes the bit of O_DSYNC.
        self.flags.0 & libc::O_DSYNC != 0
    }
}

/// Reason why a fallocate was not done.
#[derive(Debug)]
pub(super) enum Failed {
    /// Not possible as requested; not logged.
    Refused(Errno),
    /// The volume failed.
    Volume(Error),
}

fn beyond_the_end(at: u64, len: u64) -> Error {
    Error::new(
        ErrorKind::Os(libc::ENOSPC),
        format!("byte {at} is beyond the end of the disk, which has {len} bytes"),
    )
}
