//! What changes a disk of the mount, and what makes that durable.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use fuser::{Errno, FileHandle, OpenFlags, ReplyEmpty, ReplyWrite, WriteFlags};

use crate::block::{BlockQueue, Stay};
use crate::error::{Error, ErrorKind, Result};
use crate::error_log::ErrorLog;
use crate::fuse::disk_file::{DiskFile, writes};
use crate::fuse::errno::errno;
use crate::fuse::loop_budget::LoopBudget;
use crate::volume::WriteCompletion;

/// What a request that makes something durable needs beside it.
#[derive(Debug, Clone, Copy)]
pub(super) struct RequestContext<'a> {
    pub(super) error_log: &'a Arc<ErrorLog>,
    pub(super) loops: &'a Arc<LoopBudget>,
    pub(super) files: &'a Arc<[DiskFile]>,
}

impl RequestContext<'_> {
    /// Has the answers of a network read: by this loop, as far as it can be spared.
    pub(super) fn poll_completions(&self, queue: &dyn BlockQueue) {
        self.loops.poll_completions(queue);
    }

    /// The same for an answer that comes later, in another thread.
    pub(super) fn later(&self) -> OwnedContext {
        let (error_log, loops) = (Arc::clone(self.error_log), Arc::clone(self.loops));
        OwnedContext {
            error_log,
            loops,
            files: Arc::clone(self.files),
        }
    }
}

/// A [`RequestContext`] that is kept.
#[derive(Debug)]
pub(super) struct OwnedContext {
    error_log: Arc<ErrorLog>,
    loops: Arc<LoopBudget>,
    files: Arc<[DiskFile]>,
}

impl OwnedContext {
    /// As it was.
    pub(super) fn context(&self) -> RequestContext<'_> {
        RequestContext {
            error_log: &self.error_log,
            loops: &self.loops,
            files: &self.files,
        }
    }

    /// A disk of the mount.
    pub(super) fn file(&self, index: usize) -> Option<&DiskFile> {
        self.files.get(index)
    }
}

impl DiskFile {
    /// Answers a write; where the file was opened with O_SYNC or O_DSYNC, once it is durable.
    pub(super) fn write(
        &self,
        offset: u64,
        data: &[u8],
        write_flags: WriteFlags,
        flags: OpenFlags,
        context: RequestContext<'_>,
        reply: ReplyWrite,
    ) {
        // pages are written back whole, and nobody looks at how much of one was: too little has to be an error
        let late = write_flags.contains(WriteFlags::FUSE_WRITE_CACHE);
        let request = Request {
            offset,
            len: data.len(),
            late,
            flags,
        };
        let volume = self.volume();
        if !volume.is_remote() {
            return self.written(request, volume.write(offset, data), false, context, reply);
        }
        let (later, index) = (context.later(), self.index);
        let done: WriteCompletion = Box::new(move |result, durable| {
            if let Some(file) = later.file(index) {
                file.written(request, result, durable, later.context(), reply);
            }
        });
        let begun = match volume.queue() {
            Some(queue) => volume
                .submit_write(queue, offset, data, request.is_sync(), done)
                .map(|()| context.poll_completions(queue)),
            None => Err(done),
        };
        match begun {
            Ok(()) => {}
            // it may have to wait for others, or to read first
            Err(done) => {
                let (data, volume) = (data.to_vec(), Arc::clone(&volume));
                self.pool
                    .run(Box::new(move || done(volume.write(offset, &data), false)));
            }
        }
    }

    /// Answers a write that was done; `durable`: it needs no flush any more.
    fn written(
        &self,
        request: Request,
        result: Result<usize>,
        durable: bool,
        context: RequestContext<'_>,
        reply: ReplyWrite,
    ) {
        let Request { offset, len, late, .. } = request;
        let end = self.volume().len();
        let written = result.and_then(|n| match n {
            n if late && n < len => Err(behind_the_end(offset + n as u64, end)),
            n => Ok(n as u32),
        });
        self.attributes.changed();
        let name = self.config.name.display();
        match written {
            Err(e) => {
                reply.error(errno(&e));
                // whoever writes too much is told so; of a page that is written late nobody may be left to hear it
                if late || e.kind() != ErrorKind::Os(libc::ENOSPC) || offset < end {
                    context
                        .error_log
                        .note(e.within(format!("{name}: write of {len} bytes at {offset}")));
                }
            }
            Ok(n) if request.is_sync() && !durable => {
                self.durable(context, move |result| match result {
                    Ok(()) => reply.written(n),
                    Err(e) => reply.error(errno(e)),
                });
                // by whatever thread had the answer, which has other work
                if let Some(queue) = self.volume().queue() {
                    queue.poll_completions(Stay::No);
                }
            }
            Ok(n) => reply.written(n),
        }
    }

    /// Answers a close: who has written may rely on it afterwards.
    pub(super) fn flush(&self, handle: FileHandle, context: RequestContext<'_>, reply: ReplyEmpty) {
        if writes(handle) {
            self.sync(context, reply)
        } else {
            reply.ok()
        }
    }

    /// Answers once everything that was written before is durable.
    pub(super) fn sync(&self, context: RequestContext<'_>, reply: ReplyEmpty) {
        if !self.writable {
            return reply.ok();
        }
        self.durable(context, move |result| match result {
            Ok(()) => reply.ok(),
            Err(e) => reply.error(errno(e)),
        });
        if let Some(queue) = self.volume().queue() {
            context.poll_completions(queue);
        }
    }

    /// Gives a range back, or fills it with zeroes, as fallocate(2) says by `mode`.
    pub(super) fn fallocate(&self, offset: u64, len: u64, mode: i32) -> Result<(), Failed> {
        if !self.writable {
            return Err(Failed::Refused(Errno::EROFS));
        }
        let volume = self.volume();
        let end = offset.checked_add(len).ok_or(Failed::Refused(Errno::EFBIG))?;
        let grows = mode & libc::FALLOC_FL_KEEP_SIZE == 0 && end > volume.len();
        match mode & !libc::FALLOC_FL_KEEP_SIZE {
            // room for it is there or will be found, as for any write
            0 if end <= volume.len() => Ok(()),
            0 => Err(Failed::Refused(Errno::ENOSPC)),
            libc::FALLOC_FL_ZERO_RANGE if grows => Err(Failed::Refused(Errno::ENOSPC)),
            how @ (libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_ZERO_RANGE) => {
                self.attributes.changed();
                volume
                    .zero_range(offset, len, how == libc::FALLOC_FL_PUNCH_HOLE)
                    .map_err(Failed::Volume)
            }
            _ => Err(Failed::Refused(Errno::EOPNOTSUPP)),
        }
    }

    /// Answers a wish for another size: there is none. O_TRUNC of an open for writing reaches us as one for size 0,
    /// by the same thread and without the handle; it is taken and changes nothing.
    pub(super) fn truncate(&self, size: u64, handle: Option<FileHandle>, pid: u32) -> Result<(), Errno> {
        let opener = self.opener.swap(0, Ordering::AcqRel);
        if !self.writable {
            return Err(Errno::EROFS);
        }
        let is_open = size == 0 && handle.is_none() && opener != 0 && opener == pid;
        if is_open || size == self.volume().len() {
            Ok(())
        } else {
            Err(Errno::EINVAL)
        }
    }

    /// Makes everything durable for somebody who waits.
    fn durable(&self, context: RequestContext<'_>, answer: impl FnOnce(&Result<()>) + Send + 'static) {
        let (error_log, name) = (Arc::clone(context.error_log), self.config.name.display().to_string());
        let answer = Box::new(move |result: &Result<()>| {
            answer(result);
            if let Err(e) = result {
                error_log.note(e.clone().within(format!("{name}: making it durable")));
            }
        });
        self.flushes.flush(&self.volume(), context.loops, answer);
    }
}

/// A write that was asked for.
#[derive(Debug, Clone, Copy)]
struct Request {
    offset: u64,
    len: usize,
    /// Of a page that was changed some time ago.
    late: bool,
    flags: OpenFlags,
}

impl Request {
    /// Whether it is answered only once it is durable.
    fn is_sync(&self) -> bool {
        // O_SYNC has the bit of O_DSYNC and another one
        self.flags.0 & libc::O_DSYNC != 0
    }
}

/// Why a request was not done.
#[derive(Debug)]
pub(super) enum Failed {
    /// It is not possible as it was asked.
    Refused(Errno),
    /// The image failed.
    Volume(Error),
}

fn behind_the_end(at: u64, len: u64) -> Error {
    Error::new(
        ErrorKind::Os(libc::ENOSPC),
        format!("byte {at} is behind the end of the disk, which has {len} bytes"),
    )
}
