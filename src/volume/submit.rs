//! The boundary where a request may wait: `fuse/` submits a [`Request`], and its completion is called once, but for
//! [`Request::Finish`] where there is nothing to do.
//!
//! ```text
//!   submit ─┬─ local disk ──────────────── here, on the calling thread: no hop
//!           ├─ disk with a queue ───────── submitted; completed by the thread that reads the answer
//!           ├─ any other remote disk ───── a read of what is in memory: here; WouldBlock: again in the worker pool
//!           ├─ may take long, or block ─── worker pool, shared fairly by the disks of the mount
//!           └─ flush ───────────────────── group flush
//! ```
//! The caller is an event loop. It returns at once, or stays to poll the queue of the disk as long as it can be spared. A
//! completion may run on any thread, and before the call returns. A request whose handler panics drops its completion.

use std::cell::RefCell;
use std::sync::Arc;

use super::group_flush::{FlushAnswer, FlushKind, FlushOn};
use super::loop_budget::LoopBudget;
use super::queued::QueuedWrite;
use super::statistics::RequestKind;
use super::worker_pool::{DiskShare, WorkerPool};
use super::{ReadBuffer, Seek, Volume};
use crate::block::{BlockQueue, Completion, ReadCompletion, Stay};
use crate::error::Result;
use crate::write_latch::ErrorCursor;

/// Length in bytes from which on zeroing or allocating a range may take long, and runs in the worker pool.
const LONG_ZEROING: u64 = 64 << 20;

thread_local! {
    static READ_BUFFER: RefCell<ReadBuffer> = RefCell::new(ReadBuffer::new());
}

/// Called with the number of bytes written.
pub(crate) type WriteCompletion = Box<dyn FnOnce(Result<usize>) + Send>;

/// Called with the offset that was found.
pub(crate) type SeekCompletion = Box<dyn FnOnce(Result<Option<u64>>) + Send>;

/// A request to a disk, with its completion.
pub(crate) enum Request<'a> {
    /// Reads, as [`Volume::read`].
    Read {
        offset: u64,
        len: usize,
        done: ReadCompletion,
    },
    /// Writes, as [`Volume::write`]. With `sync` it completes when the data is durable.
    Write {
        offset: u64,
        data: &'a [u8],
        sync: bool,
        done: WriteCompletion,
    },
    /// Makes everything that was written before durable or, depending on `kind`, completes the image. Reports an error
    /// of the disk that `handle` has not reported yet.
    Flush {
        kind: FlushKind,
        handle: Option<Arc<ErrorCursor>>,
        done: FlushAnswer,
    },
    /// Completes the image at the end of an open, if it may be incomplete. No program waits for it: the next flush of each
    /// other handle reports an error of it. `done` is not called if there is nothing to complete.
    Finish { done: FlushAnswer },
    /// Zeroes a range, as [`Volume::zero_range`].
    Zero {
        offset: u64,
        len: u64,
        unmap: bool,
        done: Completion,
    },
    /// Zeroes everything from `size` on, if that is cheap.
    Truncate { size: u64, done: Completion },
    /// Allocates a range, as [`Volume::allocate`].
    Allocate { offset: u64, len: u64, done: Completion },
    /// Searches, as [`Volume::seek`].
    Seek {
        offset: u64,
        target: Seek,
        done: SeekCompletion,
    },
}

/// Threads that serve the requests of a disk.
#[derive(Debug, Clone)]
pub(crate) struct ServingThreads {
    pub(super) loops: Arc<LoopBudget>,
    share: Arc<DiskShare>,
}

impl ServingThreads {
    /// Returns the threads of a disk in a mount: its event loops, and a share of its worker pool.
    pub(crate) fn of_mount(loops: &Arc<LoopBudget>, pool: &Arc<WorkerPool>) -> Self {
        Self {
            loops: Arc::clone(loops),
            share: Arc::new(pool.add_disk()),
        }
    }

    /// Returns the threads of a disk without a mount: the caller alone, and a pool of its own.
    pub(super) fn alone() -> Self {
        Self::of_mount(&Arc::new(LoopBudget::new(1)), &Arc::default())
    }
}

impl Volume {
    /// Submits a request from an event loop.
    pub(crate) fn submit(self: &Arc<Self>, request: Request<'_>) {
        match request {
            Request::Read { offset, len, done } => self.submit_read(offset, len, done),
            Request::Write {
                offset,
                data,
                sync,
                done,
            } => self.submit_write(offset, data, sync, done),
            Request::Flush { kind, handle, done } => {
                self.flush_then(kind, handle, done);
                self.poll();
            }
            Request::Finish { done } => self.finish(done),
            Request::Zero {
                offset,
                len,
                unmap,
                done,
            } => {
                let work = move |volume: &Self| volume.zero_range(offset, len, unmap);
                self.run(RequestKind::Zero, self.is_long(len), work, done);
            }
            Request::Truncate { size, done } => {
                self.run(
                    RequestKind::Zero,
                    true,
                    move |volume: &Self| volume.truncate(size),
                    done,
                );
            }
            Request::Allocate { offset, len, done } => {
                let work = move |volume: &Self| volume.allocate(offset, len);
                self.run(RequestKind::Zero, self.is_long(len), work, done);
            }
            Request::Seek { offset, target, done } => {
                let work = move |volume: &Self| volume.seek(offset, target);
                self.run(RequestKind::Seek, self.is_remote(), work, done);
            }
        }
    }

    /// Returns a line of statistics for the log.
    pub(crate) fn statistics(&self) -> String {
        self.statistics.to_string()
    }

    fn submit_read(self: &Arc<Self>, offset: u64, len: usize, done: ReadCompletion) {
        let begun = self.statistics.begin(RequestKind::Read);
        if !self.is_remote() {
            return self.read_here(offset, len, |volume, read| volume.read_done(begun, read, done));
        }
        if let Some(queue) = self.queue() {
            let volume = Arc::clone(self);
            self.queue_read(
                queue,
                offset,
                len,
                Box::new(move |read| volume.read_done(begun, read, done)),
            );
            return self.poll();
        }
        // Blocks in memory are read here. A miss would wait, so the whole request is repeated by a thread that may: it
        // fetches all the missing blocks together.
        let missed = READ_BUFFER.with_borrow_mut(|buffer| match self.read_in_memory(offset, len, buffer) {
            Some(Ok(bytes)) => {
                self.read_done(begun, Ok(bytes), done);
                None
            }
            // The thread that may wait reports the error.
            Some(Err(_)) | None => Some(done),
        });
        if let Some(done) = missed {
            let volume = Arc::clone(self);
            self.threads.share.run(Box::new(move || {
                volume.read_here(offset, len, |volume, read| volume.read_done(begun, read, done));
            }));
        }
    }

    /// Reads on this thread, which may wait.
    fn read_here(&self, offset: u64, len: usize, done: impl FnOnce(&Self, Result<&[u8]>)) {
        READ_BUFFER.with_borrow_mut(|buffer| done(self, self.read(offset, len, buffer)));
    }

    fn read_done(&self, begun: std::time::Instant, read: Result<&[u8]>, done: ReadCompletion) {
        let bytes = read.as_ref().ok().map(|bytes| bytes.len() as u64);
        done(read);
        self.statistics.end(RequestKind::Read, begun, bytes);
    }

    fn submit_write(self: &Arc<Self>, offset: u64, data: &[u8], sync: bool, done: WriteCompletion) {
        let begun = self.statistics.begin(RequestKind::Write);
        let volume = Arc::clone(self);
        let done: WriteCompletion = Box::new(move |written| {
            let bytes = written.as_ref().ok().map(|n| *n as u64);
            done(written);
            volume.statistics.end(RequestKind::Write, begun, bytes);
        });
        if !self.is_remote() {
            return self.written(self.write(offset, data), sync, done);
        }
        let volume = Arc::clone(self);
        let done: QueuedWrite = Box::new(move |written, durable| {
            let written = match durable {
                true => written.and_then(|n| volume.check_latch().map(|()| n)),
                false => written,
            };
            volume.written(written, sync && !durable, done);
        });
        let refused = match self.queue() {
            Some(queue) => match self.queue_write(queue, offset, data, sync, done) {
                Ok(()) => return self.poll(),
                Err(done) => done,
            },
            None => done,
        };
        // It has to wait for an overlapping write, or to read first. The caller's buffer ends with this call, so the worker
        // gets a copy.
        let (data, volume) = (data.to_vec(), Arc::clone(self));
        self.threads
            .share
            .run(Box::new(move || refused(volume.write(offset, &data), false)));
    }

    /// Ends a write, after a flush if it has to be durable.
    fn written(self: &Arc<Self>, written: Result<usize>, needs_flush: bool, done: WriteCompletion) {
        match written {
            Ok(n) if needs_flush => {
                let done: FlushAnswer = Box::new(move |flushed| done(flushed.clone().map(|()| n)));
                self.flush_then(FlushKind::Durable, None, done);
                // This may be the thread of a completion, which has other work and must not stay to poll.
                self.leave_polling();
            }
            written => done(written),
        }
    }

    fn finish(self: &Arc<Self>, done: FlushAnswer) {
        if !self.writable() || !self.durability().is_unfinished() {
            return;
        }
        let volume = Arc::clone(self);
        let done: FlushAnswer = Box::new(move |flushed| {
            if let Err(e) = flushed {
                volume.keep_unheard(e);
            }
            done(flushed);
        });
        self.run_flush(FlushKind::Complete, done);
        self.leave_polling();
    }

    /// Flushes, and passes to `done` what the handle has to report.
    fn flush_then(self: &Arc<Self>, kind: FlushKind, handle: Option<Arc<ErrorCursor>>, done: FlushAnswer) {
        let volume = Arc::clone(self);
        let done: FlushAnswer = Box::new(move |flushed| {
            done(&volume.durability().reported(handle.as_deref(), kind, flushed.clone()));
        });
        self.run_flush(kind, done);
    }

    fn run_flush(self: &Arc<Self>, kind: FlushKind, done: FlushAnswer) {
        let begun = self.statistics.begin(RequestKind::Flush);
        let volume = Arc::clone(self);
        let done: FlushAnswer = Box::new(move |flushed| {
            done(flushed);
            volume
                .statistics
                .end(RequestKind::Flush, begun, flushed.is_ok().then_some(0));
        });
        self.note_external_writes();
        // A remote flush may take arbitrarily long, so it never gets an event loop.
        let on = match self.is_remote() {
            true => FlushOn::OwnThread,
            false => FlushOn::SpareLoop(&self.threads.loops),
        };
        self.flushes.flush(on, kind, done);
    }

    /// Runs `work` in the worker pool, or here if it neither blocks nor takes long.
    fn run<T: 'static>(
        self: &Arc<Self>,
        kind: RequestKind,
        may_wait: bool,
        work: impl FnOnce(&Self) -> Result<T> + Send + 'static,
        done: impl FnOnce(Result<T>) + Send + 'static,
    ) {
        let begun = self.statistics.begin(kind);
        let work = move |volume: &Self| {
            let result = work(volume);
            let bytes = result.is_ok().then_some(0);
            done(result);
            volume.statistics.end(kind, begun, bytes);
        };
        if may_wait {
            let volume = Arc::clone(self);
            self.threads.share.run(Box::new(move || work(&volume)));
        } else {
            work(self);
        }
    }

    /// Returns true if zeroing or allocating `len` bytes must not run on an event loop.
    fn is_long(&self, len: u64) -> bool {
        self.is_remote() || len > LONG_ZEROING
    }

    /// Makes everything from byte `size` on read as zeroes.
    fn truncate(&self, size: u64) -> Result<()> {
        self.check_cheap_zeroing(size)?;
        self.zero_range(size, self.len().saturating_sub(size), true)
    }

    /// Polls the queue of the disk, if it can be polled, for as long as this event loop can be spared.
    fn poll(&self) {
        if let Some(poller) = self.queue().and_then(BlockQueue::poller) {
            self.threads.loops.poll_completions(poller);
        }
    }

    /// Leaves the polling of the queue to another thread.
    fn leave_polling(&self) {
        if let Some(poller) = self.queue().and_then(BlockQueue::poller) {
            poller.poll_completions(Stay::No);
        }
    }
}
