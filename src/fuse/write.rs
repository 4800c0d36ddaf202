//! Writes to a disk of the mount, truncation, fallocate, and the requests that flush: names, rules and errno. The volume
//! decides on which thread each is done (`volume::submit`).
//!
//! Truncation to N bytes has the meaning that it has for a file, except that the size stays: everything from N on reads
//! as zeroes. The kernel drops its pages only from the size on that the answer names, and only if that is not the size
//! that it knows. So the answer says N, with an attribute timeout of zero, and the next getattr the true size. Between the
//! two answers a mapping ends at N, as it would for any truncated file.

use std::sync::Arc;

use fuser::{Errno, FileHandle, OpenFlags, ReplyEmpty, ReplyWrite, WriteFlags};

use crate::error::{Error, ErrorKind, Result};
use crate::fuse::disk_file::DiskFile;
use crate::fuse::errno::{errno, zeroing_errno};
use crate::fuse::open_plan::OpenHandle;
use crate::mutex::lock;
use crate::volume::{FlushKind, Request};

/// Called with the errno for the kernel.
pub(super) type EmptyAnswer = Box<dyn FnOnce(Result<(), Errno>) + Send>;

impl DiskFile {
    /// Answers a write. An open with O_SYNC or O_DSYNC gets the answer once the data is durable.
    pub(super) fn write(
        self: &Arc<Self>,
        offset: u64,
        data: &[u8],
        write_flags: WriteFlags,
        flags: OpenFlags,
        reply: ReplyWrite,
    ) {
        // The kernel writes a dirty page of a mapping back as a whole and ignores how much of it was accepted, so a short
        // write has to become an error.
        let write_back = write_flags.contains(WriteFlags::FUSE_WRITE_CACHE);
        let (file, len) = (Arc::clone(self), data.len());
        let done = Box::new(move |written: Result<usize>| {
            file.attributes.changed();
            let end = file.volume().len();
            let written = written.and_then(|n| match n {
                n if write_back && n < len => Err(beyond_the_end(offset + n as u64, end)),
                n => Ok(n as u32),
            });
            match written {
                Ok(n) => reply.written(n),
                Err(e) => {
                    reply.error(errno(&e));
                    // ENOSPC at or beyond the end is the mistake of the writer, which gets the error: not worth a log
                    // line. A page is written back when its writer may have exited, so its failure is always logged.
                    if write_back || e.kind() != ErrorKind::Os(libc::ENOSPC) || offset < end {
                        file.note(e, || format!("write of {len} bytes at {offset}"));
                    }
                }
            }
        });
        self.volume().submit(Request::Write {
            offset,
            data,
            // O_SYNC includes the bit of O_DSYNC.
            sync: flags.0 & libc::O_DSYNC != 0,
            done,
        });
    }

    /// Answers a close. A process that has written relies on its data being durable once close returns, and on the image
    /// being one that other programs can use.
    pub(super) fn flush(self: &Arc<Self>, handle: FileHandle, reply: ReplyEmpty) {
        if OpenHandle::from(handle).writes {
            self.sync(handle, FlushKind::Complete, reply);
        } else {
            reply.ok();
        }
    }

    /// Completes the image at the end of an open. What a loop device or a mapping has written since the last close of a
    /// descriptor is covered by no flush.
    pub(super) fn finish(self: &Arc<Self>, handle: FileHandle) {
        if OpenHandle::from(handle).writes && self.writable {
            let file = Arc::clone(self);
            let done = Box::new(move |result: &Result<()>| file.note_flush(result));
            self.volume().submit(Request::Finish { done });
        }
    }

    /// Answers once everything that was written before is durable or, depending on `kind`, the image is complete. An error
    /// that no program has heard yet is reported to each open for writing.
    pub(super) fn sync(self: &Arc<Self>, handle: FileHandle, kind: FlushKind, reply: ReplyEmpty) {
        if !self.writable {
            return reply.ok();
        }
        let file = Arc::clone(self);
        let done = Box::new(move |result: &Result<()>| {
            match result {
                Ok(()) => reply.ok(),
                Err(e) => reply.error(errno(e)),
            }
            file.note_flush(result);
        });
        let number = OpenHandle::from(handle).number;
        let handle = lock(&self.opens).error_cursor(number);
        self.volume().submit(Request::Flush { kind, handle, done });
    }

    /// Allocates or discards a range, or fills it with zeroes, as the `mode` of fallocate(2) requests.
    ///
    /// A disk that is read-only, an unsupported mode, and a range beyond the end are refused: a disk does not grow.
    pub(super) fn fallocate(self: &Arc<Self>, offset: u64, len: u64, mode: i32, answer: EmptyAnswer) {
        if !self.writable {
            return answer(Err(Errno::EROFS));
        }
        let volume = self.volume();
        let Some(end) = offset.checked_add(len) else {
            return answer(Err(Errno::EFBIG));
        };
        let grows = mode & libc::FALLOC_FL_KEEP_SIZE == 0 && end > volume.len();
        let request = match mode & !libc::FALLOC_FL_KEEP_SIZE {
            0 if end > volume.len() => return answer(Err(Errno::ENOSPC)),
            libc::FALLOC_FL_ZERO_RANGE if grows => return answer(Err(Errno::ENOSPC)),
            0 => Request::Allocate {
                offset,
                len,
                done: self.zeroed(move || format!("allocating {len} bytes at {offset}"), answer),
            },
            operation @ (libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_ZERO_RANGE) => Request::Zero {
                offset,
                len,
                unmap: operation == libc::FALLOC_FL_PUNCH_HOLE,
                done: self.zeroed(move || format!("zeroing {len} bytes at {offset}"), answer),
            },
            _ => return answer(Err(Errno::EOPNOTSUPP)),
        };
        volume.submit(request);
    }

    /// Makes everything from byte `size` on read as zeroes: truncation of a disk, whose size is fixed.
    ///
    /// A disk that is read-only and a size beyond its end are refused. EOPNOTSUPP if the source cannot zero without writing
    /// as much.
    pub(super) fn truncate(self: &Arc<Self>, size: u64, answer: EmptyAnswer) {
        let volume = self.volume();
        match volume.len().checked_sub(size) {
            _ if !self.writable => answer(Err(Errno::EROFS)),
            None => answer(Err(Errno::EFBIG)),
            Some(0) => answer(Ok(())),
            Some(_) => {
                let done = self.zeroed(move || format!("truncating to {size} bytes"), answer);
                volume.submit(Request::Truncate { size, done });
            }
        }
    }

    /// Returns the completion of a request that zeroes or allocates. `what` names it in the log.
    fn zeroed(
        self: &Arc<Self>,
        what: impl FnOnce() -> String + Send + 'static,
        answer: EmptyAnswer,
    ) -> Box<dyn FnOnce(Result<()>) + Send> {
        let file = Arc::clone(self);
        Box::new(move |result| {
            // Now, and not when the request began: a getattr in between would take the time before the change for that of the
            // change. Also after an error, which may have come halfway.
            file.attributes.changed();
            match result {
                Ok(()) => answer(Ok(())),
                Err(e) => {
                    answer(Err(zeroing_errno(&e)));
                    file.note(e, what);
                }
            }
        })
    }

    /// Logs the failure of a flush.
    fn note_flush(&self, result: &Result<()>) {
        if let Err(e) = result {
            self.note(e.clone(), || "flush".to_owned());
        }
    }
}

fn beyond_the_end(at: u64, len: u64) -> Error {
    Error::new(
        ErrorKind::Os(libc::ENOSPC),
        format!("byte {at} is beyond the end of the disk, which has {len} bytes"),
    )
}

#[cfg(test)]
mod tests {
    use std::sync::{Mutex, OnceLock};
    use std::time::{SystemTime, UNIX_EPOCH};

    use fuser::INodeNo;

    use super::*;
    use crate::config::MountOptions;
    use crate::fuse::stat::StatRules;
    use crate::fuse::testfs::disk_file;
    use crate::test_disk::TestDisk;

    /// A getattr while a range is zeroed must not use up the change.
    #[test]
    fn the_time_of_a_zeroed_range_is_not_before_its_completion() {
        let (file, seen) = (
            Arc::new(OnceLock::<Arc<DiskFile>>::new()),
            Arc::new(Mutex::new(UNIX_EPOCH)),
        );
        let rules = Arc::new(StatRules::new(&MountOptions::default(), true));
        let mtime = {
            let (file, rules) = (Arc::clone(&file), Arc::clone(&rules));
            move || rules.file(INodeNo(2), file.get().unwrap()).mtime
        };
        let (during, hook) = (Arc::clone(&seen), mtime.clone());
        let disk = TestDisk::new(64).flushing(|| Ok(())).zeroing(move || {
            hook();
            *during.lock().unwrap() = SystemTime::now();
        });
        file.set(disk_file("x.raw", disk)).unwrap();
        for mode in [
            libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE,
            libc::FALLOC_FL_ZERO_RANGE,
        ] {
            let (sender, done) = std::sync::mpsc::channel();
            let answer: EmptyAnswer = Box::new(move |result| sender.send(result).unwrap());
            file.get().unwrap().fallocate(0, 4096, mode, answer);
            done.recv().unwrap().unwrap();
            assert!(mtime() >= *seen.lock().unwrap(), "the change came later");
        }
    }
}
