//! What changes a disk of the mount, and what makes that durable.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use fuser::{Errno, FileHandle, OpenFlags, ReplyEmpty, ReplyWrite, WriteFlags};

use crate::error::{Error, ErrorKind, Result};
use crate::fuse::errno::errno;
use crate::fuse::faults::Faults;
use crate::fuse::flush::Spare;
use crate::fuse::node::{Node, writes};

/// What a request that makes something durable needs beside it.
#[derive(Debug, Clone, Copy)]
pub(super) struct Context<'a> {
    pub(super) faults: &'a Arc<Faults>,
    pub(super) spare: &'a Spare,
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
        let image = self.image();
        // pages are written back whole, and nobody looks at how much of one was: too little has to be an error
        let late = write_flags.contains(WriteFlags::FUSE_WRITE_CACHE);
        let written = image.write(offset, data).and_then(|n| match n {
            n if late && n < data.len() => Err(behind_the_end(offset + n as u64, image.len())),
            n => Ok(n as u32),
        });
        self.attributes.changed();
        let name = self.config.name.display();
        match written {
            Err(e) => {
                reply.error(errno(&e));
                // whoever writes too much is told so; of a page that is written late nobody may be left to hear it
                if late || e.kind() != ErrorKind::Os(libc::ENOSPC) || offset < image.len() {
                    context.faults.note(e.within(format!("{name}: write of {} bytes at {offset}", data.len())));
                }
            }
            // O_SYNC has the bit of O_DSYNC and another one
            Ok(n) if flags.0 & libc::O_DSYNC != 0 => self.durable(context, move |result| match result {
                Ok(()) => reply.written(n),
                Err(e) => reply.error(errno(e)),
            }),
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
        self.flushes.flush(&self.image(), context.spare, answer);
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
