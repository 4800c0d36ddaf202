//! What changes a disk of the mount, and what makes that durable.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use fuser::{Errno, FileHandle, OpenFlags, ReplyEmpty, ReplyWrite, WriteFlags};

use crate::block::{BlockQueue, Stay};
use crate::error::{Error, ErrorKind, Result};
use crate::fuse::errno::errno;
use crate::fuse::faults::Faults;
use crate::fuse::loops::Loops;
use crate::fuse::node::{Node, writes};
use crate::image::Written;

/// What a request that makes something durable needs beside it.
#[derive(Debug, Clone, Copy)]
pub(super) struct Context<'a> {
    pub(super) faults: &'a Arc<Faults>,
    pub(super) loops: &'a Arc<Loops>,
    pub(super) nodes: &'a Arc<[Node]>,
}

impl Context<'_> {
    /// Has the answers of a network read: by this loop, as far as it can be spared.
    pub(super) fn attend(&self, queue: &dyn BlockQueue) {
        self.loops.attend(queue);
    }

    /// The same for an answer that comes later, in another thread.
    pub(super) fn later(&self) -> Later {
        let (faults, loops) = (Arc::clone(self.faults), Arc::clone(self.loops));
        Later { faults, loops, nodes: Arc::clone(self.nodes) }
    }
}

/// A [`Context`] that is kept.
#[derive(Debug)]
pub(super) struct Later {
    faults: Arc<Faults>,
    loops: Arc<Loops>,
    nodes: Arc<[Node]>,
}

impl Later {
    /// As it was.
    pub(super) fn context(&self) -> Context<'_> {
        Context { faults: &self.faults, loops: &self.loops, nodes: &self.nodes }
    }

    /// A disk of the mount.
    pub(super) fn node(&self, index: usize) -> Option<&Node> {
        self.nodes.get(index)
    }
}

impl Node {
    /// Answers a write; where the file was opened with O_SYNC or O_DSYNC, once it is durable.
    pub(super) fn write(
        &self,
        offset: u64,
        data: &[u8],
        write_flags: WriteFlags,
        flags: OpenFlags,
        context: Context<'_>,
        reply: ReplyWrite,
    ) {
        // pages are written back whole, and nobody looks at how much of one was: too little has to be an error
        let late = write_flags.contains(WriteFlags::FUSE_WRITE_CACHE);
        let request = Request { offset, len: data.len(), late, flags };
        let image = self.image();
        if !image.is_remote() {
            return self.written(request, image.write(offset, data), false, context, reply);
        }
        let (later, index) = (context.later(), self.index);
        let done: Written = Box::new(move |result, durable| {
            if let Some(node) = later.node(index) {
                node.written(request, result, durable, later.context(), reply);
            }
        });
        let begun = match image.queue() {
            Some(queue) => {
                image.begin_write(queue, offset, data, request.is_sync(), done).map(|()| context.attend(queue))
            }
            None => Err(done),
        };
        match begun {
            Ok(()) => {}
            // it may have to wait for others, or to read first
            Err(done) => {
                let (data, image) = (data.to_vec(), Arc::clone(&image));
                self.lane.run(Box::new(move || done(image.write(offset, &data), false)));
            }
        }
    }

    /// Answers a write that was done; `durable`: it needs no flush any more.
    fn written(&self, request: Request, result: Result<usize>, durable: bool, context: Context<'_>, reply: ReplyWrite) {
        let Request { offset, len, late, .. } = request;
        let end = self.image().len();
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
                    context.faults.note(e.within(format!("{name}: write of {len} bytes at {offset}")));
                }
            }
            Ok(n) if request.is_sync() && !durable => {
                self.durable(context, move |result| match result {
                    Ok(()) => reply.written(n),
                    Err(e) => reply.error(errno(e)),
                });
                // by whatever thread had the answer, which has other work
                if let Some(queue) = self.image().queue() {
                    queue.attend(Stay::No);
                }
            }
            Ok(n) => reply.written(n),
        }
    }

    /// Answers a close: who has written may rely on it afterwards.
    pub(super) fn flush(&self, handle: FileHandle, context: Context<'_>, reply: ReplyEmpty) {
        if writes(handle) { self.sync(context, reply) } else { reply.ok() }
    }

    /// Answers once everything that was written before is durable.
    pub(super) fn sync(&self, context: Context<'_>, reply: ReplyEmpty) {
        if !self.writable {
            return reply.ok();
        }
        self.durable(context, move |result| match result {
            Ok(()) => reply.ok(),
            Err(e) => reply.error(errno(e)),
        });
        if let Some(queue) = self.image().queue() {
            context.attend(queue);
        }
    }

    /// Gives a range back, or fills it with zeroes, as fallocate(2) says by `mode`.
    pub(super) fn fallocate(&self, offset: u64, len: u64, mode: i32) -> Result<(), Failed> {
        if !self.writable {
            return Err(Failed::Refused(Errno::EROFS));
        }
        let image = self.image();
        let end = offset.checked_add(len).ok_or(Failed::Refused(Errno::EFBIG))?;
        let grows = mode & libc::FALLOC_FL_KEEP_SIZE == 0 && end > image.len();
        match mode & !libc::FALLOC_FL_KEEP_SIZE {
            // room for it is there or will be found, as for any write
            0 if end <= image.len() => Ok(()),
            0 => Err(Failed::Refused(Errno::ENOSPC)),
            libc::FALLOC_FL_ZERO_RANGE if grows => Err(Failed::Refused(Errno::ENOSPC)),
            how @ (libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_ZERO_RANGE) => {
                self.attributes.changed();
                image.zero_range(offset, len, how == libc::FALLOC_FL_PUNCH_HOLE).map_err(Failed::Image)
            }
            _ => Err(Failed::Refused(Errno::EOPNOTSUPP)),
        }
    }

    /// Answers a wish for another size: there is none. O_TRUNC of an open for writing reaches us as one for size 0,
    /// by the same thread and without the handle; it is taken and changes nothing.
    pub(super) fn cut(&self, size: u64, handle: Option<FileHandle>, pid: u32) -> Result<(), Errno> {
        let opener = self.opener.swap(0, Ordering::AcqRel);
        if !self.writable {
            return Err(Errno::EROFS);
        }
        let is_open = size == 0 && handle.is_none() && opener != 0 && opener == pid;
        if is_open || size == self.image().len() { Ok(()) } else { Err(Errno::EINVAL) }
    }

    /// Makes everything durable for somebody who waits.
    fn durable(&self, context: Context<'_>, answer: impl FnOnce(&Result<()>) + Send + 'static) {
        let (faults, name) = (Arc::clone(context.faults), self.config.name.display().to_string());
        let answer = Box::new(move |result: &Result<()>| {
            answer(result);
            if let Err(e) = result {
                faults.note(e.clone().within(format!("{name}: making it durable")));
            }
        });
        self.flushes.flush(&self.image(), context.loops, answer);
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
    Image(Error),
}

fn behind_the_end(at: u64, len: u64) -> Error {
    Error::new(ErrorKind::Os(libc::ENOSPC), format!("byte {at} is behind the end of the disk, which has {len} bytes"))
}
