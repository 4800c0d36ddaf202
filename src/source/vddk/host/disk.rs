//! Open disk of a host: requests in flight, jobs for the main thread, and what a failed request means.
//!
//! ```text
//!   connection thread ─ submit ─► ReadAsync / WriteAsync ─ callback ─► reply
//!                        │ written ranges               └─ FUA ─► job: flush ─► reply
//!                        └─ slot: at most MAX_IN_FLIGHT
//! ```
//! A request whose connection to the server is lost gets no reply: the host ends, and the parent repeats the request on
//! the next one.
//!
//! The library gets the number of a request, not its address ([`TRANSFERS`]): the first result of a request counts,
//! whatever a library does that calls back twice, or calls back and returns an error.
//!
//! `submission` is acquired first; each other lock guards one field, and no other lock is acquired while it is held.

#![allow(unsafe_code)] // Passes buffers to the library.

use std::collections::{BTreeMap, VecDeque};
use std::ffi::c_void;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, Sender};
use std::sync::{Arc, Condvar, Mutex, RwLock, RwLockWriteGuard};
use std::time::{Duration, Instant};

use super::End;
use super::extents::{AllocationMap, WrittenRanges};
use super::reply::Reply;
use crate::error::{Error, Result};
use crate::mutex::{lock, read_lock, wait, wait_timeout, write_lock};
use crate::source::vddk::abi::{CHUNK_SECTORS, SECTOR, VIX_OK, VixError};
use crate::source::vddk::failure::{Circumstances, Failure, Trouble, nbd_error, trouble};
use crate::source::vddk::library::{DiskHandle, Vddk};
use crate::source::vddk::spec::DiskSpec;

/// Longest request in bytes. Larger ones exhaust the buffers of a host's NFC service.
pub(super) const MAX_REQUEST: u32 = 2 << 20;

/// Requests in flight at a time, over all connections. Bounds the memory for buffers.
const MAX_IN_FLIGHT: usize = 64;

/// Buffers that are kept for reuse.
const MAX_BUFFERS: usize = 32;

/// Largest disk in sectors: more than 8 EiB is no file.
const MAX_SECTORS: u64 = (i64::MAX as u64) / SECTOR;

/// Transport modes that do the work within the call, instead of queueing the request.
const INLINE_TRANSPORTS: [&str; 3] = ["file", "hotadd", "san"];

/// Requests that the library has, by the number that it passes to the callback. A number is used once.
static TRANSFERS: Mutex<BTreeMap<usize, Transfer>> = Mutex::new(BTreeMap::new());

/// Number of the next request.
static NEXT_TRANSFER: AtomicUsize = AtomicUsize::new(1);

/// An open disk.
pub(super) struct Disk {
    vddk: &'static Vddk,
    handle: DiskHandle,
    at: Circumstances,
    /// Size in bytes.
    size: u64,
    writable: bool,
    /// True if a request is done within the call that submits it.
    inline: bool,
    /// Held during each call that uses the handle: shared by submissions that do the work within the call, exclusively by
    /// all others. So nothing is submitted while the library waits for the end of all requests: under load that wait would
    /// have no end.
    submission: RwLock<()>,
    in_flight: Mutex<usize>,
    /// Notified when a request has ended.
    ended: Condvar,
    jobs: Sender<Job>,
    /// Allocation of the disk, if the library reports it. Only the main thread locks it.
    allocation: Option<Mutex<AllocationMap>>,
    /// Ranges that were written since the disk was opened.
    written: Mutex<WrittenRanges>,
    buffers: Mutex<Vec<Vec<u8>>>,
    /// Set when the end is decided: later requests get no reply.
    ending: AtomicBool,
}

/// Work for the main thread.
pub(super) enum Job {
    /// Make the answered writes durable.
    Flush(Reply),
    /// Report the extents of a range of bytes.
    Extents {
        offset: u64,
        len: u64,
        one: bool,
        reply: Reply,
    },
    /// End the host.
    End(End),
}

/// A read or write in flight. The library has its buffer until the callback.
pub(super) struct Transfer {
    pub(super) write: bool,
    /// A write that must be durable before it is answered.
    pub(super) fua: bool,
    pub(super) offset: u64,
    pub(super) len: usize,
    /// At least `len` bytes.
    pub(super) buffer: Vec<u8>,
    pub(super) reply: Reply,
    pub(super) disk: Arc<Disk>,
}

impl Disk {
    /// Wraps a disk that was opened. Asks for its size and, for a remote disk, if it can report extents.
    pub(super) fn new(
        vddk: &'static Vddk,
        handle: DiskHandle,
        spec: &DiskSpec,
        at: &Circumstances,
        jobs: Sender<Job>,
    ) -> Result<Self> {
        let info = vddk.info(handle).map_err(|f| f.describe(at))?;
        let transport = vddk.transport(handle);
        if info.sectors > MAX_SECTORS {
            let text = format!(
                "{}: VDDK reports {} sectors, more than a file can have",
                at.disk, info.sectors
            );
            return Err(Error::corrupt(text));
        }
        tracing::info!(
            "{}: {} sectors, {} links, transport {transport}",
            at.disk,
            info.sectors,
            info.links
        );
        // Of local files the library reports every block as allocated or refuses, so it is not asked.
        let can_query = at.remote && vddk.can_query() && can_query(vddk, handle, info.sectors);
        // Such a disk is a whole chain (`single-link` is for local files), so what is not allocated is zero.
        let allocation = can_query.then(|| Mutex::new(AllocationMap::new(info.sectors)));
        Ok(Self {
            vddk,
            handle,
            at: at.clone(),
            size: info.sectors * SECTOR,
            writable: spec.writable,
            inline: INLINE_TRANSPORTS.contains(&transport.as_str()),
            submission: RwLock::default(),
            in_flight: Mutex::default(),
            ended: Condvar::new(),
            jobs,
            allocation,
            written: Mutex::default(),
            buffers: Mutex::default(),
            ending: AtomicBool::new(false),
        })
    }

    /// Returns the size in bytes.
    pub(super) fn size(&self) -> u64 {
        self.size
    }

    /// Returns true if the disk was opened for writing.
    pub(super) fn is_writable(&self) -> bool {
        self.writable
    }

    /// Returns true if extents can be asked for.
    pub(super) fn has_extents(&self) -> bool {
        self.allocation.is_some()
    }

    /// Returns true if several threads should submit requests, because each is occupied until its request is done.
    pub(super) fn is_inline(&self) -> bool {
        self.inline
    }

    /// Sends a job to the main thread. Dropped if the host ends: the parent repeats the request.
    pub(super) fn send(&self, job: Job) {
        let _ = self.jobs.send(job);
    }

    /// Returns a buffer of at least `len` bytes, at most [`MAX_REQUEST`]. Its content is that of an earlier request.
    pub(super) fn buffer(&self, len: usize) -> Vec<u8> {
        let mut buffer = lock(&self.buffers).pop().unwrap_or_default();
        if buffer.len() < len {
            buffer.resize(len.next_power_of_two().min(MAX_REQUEST as usize), 0);
        }
        buffer
    }

    /// Takes a buffer back for reuse.
    pub(super) fn give_back(&self, buffer: Vec<u8>) {
        let mut buffers = lock(&self.buffers);
        if buffers.len() < MAX_BUFFERS {
            buffers.push(buffer);
        }
    }

    /// Submits a read or write whose range lies on the disk and is aligned to sectors. Waits while too many are in flight.
    /// Leaves it without an answer if the host ends.
    pub(super) fn submit(&self, mut transfer: Transfer) {
        let mut in_flight = lock(&self.in_flight);
        while *in_flight >= MAX_IN_FLIGHT {
            in_flight = wait(&self.ended, in_flight);
        }
        // `wait_idle` acquires this lock after `ending` is set: a request passes here before it, and is waited for, or is
        // turned away. None reaches a handle that is being closed.
        if self.ending.load(Ordering::SeqCst) {
            drop(in_flight);
            self.give_back(transfer.buffer);
            return transfer.reply.abandon();
        }
        *in_flight += 1;
        drop(in_flight);
        if transfer.write && self.has_extents() {
            // Before the write is submitted: an answer about extents that crosses it must not call it a hole.
            lock(&self.written).add(transfer.offset, transfer.len as u64);
        }
        let range = (transfer.offset / SECTOR, transfer.len as u64 / SECTOR);
        let write = transfer.write;
        // The heap block of the buffer does not move with the transfer.
        let buffer = transfer.buffer.as_mut_ptr();
        let number = NEXT_TRANSFER.fetch_add(1, Ordering::Relaxed);
        let data = std::ptr::without_provenance_mut::<c_void>(number);
        lock(&TRANSFERS).insert(number, transfer);
        let submit = || {
            // SAFETY: the buffer has the bytes of the range, and lives until the request has a result.
            unsafe {
                if write {
                    self.vddk.write(self.handle, range, buffer, completed, data)
                } else {
                    self.vddk.read(self.handle, range, buffer, completed, data)
                }
            }
        };
        let submitted = if self.inline {
            let _shared = read_lock(&self.submission);
            submit()
        } else {
            let _exclusive = self.exclusive();
            submit()
        };
        if let Err(failure) = submitted {
            match take_transfer(number) {
                Some(transfer) => self.finish(transfer, Err(failure)),
                None => tracing::warn!("{}: after its callback", failure.describe(&self.at)),
            }
        }
    }

    /// Waits until no other thread uses the handle, and keeps it until the guard is dropped.
    fn exclusive(&self) -> RwLockWriteGuard<'_, ()> {
        write_lock(&self.submission)
    }

    /// Answers a request whose result is known.
    fn finish(&self, transfer: Transfer, result: Result<(), Failure>) {
        let Transfer {
            write,
            fua,
            len,
            buffer,
            reply,
            ..
        } = transfer;
        match result {
            Ok(()) if write && fua => self.send(Job::Flush(reply)),
            Ok(()) if write => reply.done(),
            Ok(()) => reply.data(buffer.get(..len).unwrap_or_default()),
            Err(failure) => self.refuse(reply, &failure),
        }
        self.give_back(buffer);
        *lock(&self.in_flight) -= 1;
        self.ended.notify_all();
    }

    /// Reports a failed request: as an error of the request, or by the end of the host if the server is lost.
    fn refuse(&self, reply: Reply, failure: &Failure) {
        match trouble(failure.error) {
            Trouble::Other => {
                tracing::error!("{}", failure.describe(&self.at));
                reply.error(nbd_error(failure.error));
            }
            lost => {
                if !self.ending.swap(true, Ordering::SeqCst) {
                    tracing::warn!("{}: opening the disk again", failure.describe(&self.at));
                    self.send(Job::End(End::Lost(lost)));
                }
                reply.abandon();
            }
        }
    }

    /// Performs the jobs of the main thread until the end of the host, whose reason it returns.
    pub(super) fn run_jobs(&self, received: &Receiver<Job>) -> End {
        let mut waiting = VecDeque::new();
        loop {
            let job = match waiting.pop_front() {
                Some(job) => job,
                None => match received.recv() {
                    Ok(job) => job,
                    Err(_) => Job::End(End::Asked),
                },
            };
            match job {
                Job::End(end) => {
                    self.ending.store(true, Ordering::SeqCst);
                    return end;
                }
                Job::Extents {
                    offset,
                    len,
                    one,
                    reply,
                } => self.report_extents(offset, len, one, reply),
                Job::Flush(first) => {
                    // One flush answers all that wait: each of their writes was answered before.
                    let mut replies = vec![first];
                    for job in received.try_iter() {
                        match job {
                            Job::Flush(reply) => replies.push(reply),
                            other => waiting.push_back(other),
                        }
                    }
                    self.flush(replies);
                }
            }
        }
    }

    fn flush(&self, replies: Vec<Reply>) {
        let exclusive = self.exclusive();
        if let Err(failure) = self.vddk.wait(self.handle) {
            // The requests that it waits for have reported their errors themselves.
            tracing::warn!("{}", failure.describe(&self.at));
        }
        let result = self.vddk.flush(self.handle);
        drop(exclusive);
        for reply in replies {
            match &result {
                Ok(()) => reply.done(),
                Err(failure) => self.refuse(reply, failure),
            }
        }
    }

    fn report_extents(&self, offset: u64, len: u64, one: bool, reply: Reply) {
        let Some(allocation) = &self.allocation else {
            return reply.error(libc::EINVAL as u32);
        };
        let mut lost = None;
        let mut query = |start, sectors| {
            let exclusive = self.exclusive();
            let answer = self.vddk.query(self.handle, start, sectors, CHUNK_SECTORS);
            drop(exclusive);
            answer.map_err(|failure| {
                tracing::info!(
                    "{}: extents are data from sector {start} on",
                    failure.describe(&self.at)
                );
                if trouble(failure.error) != Trouble::Other {
                    lost = Some(failure);
                }
            })
        };
        let extents = lock(allocation).extents(offset, len, one, &mut query);
        if let Some(failure) = lost {
            return self.refuse(reply, &failure);
        }
        // After the query, so that no write that was answered before it can be missing.
        let mut extents = lock(&self.written).hide(offset, extents);
        if one {
            extents.truncate(1);
        }
        reply.extents(&extents);
    }

    /// Waits up to `limit` until no request is in flight and no call uses the handle. Returns false if a request still is.
    /// Must be called after [`Self::run_jobs`], which admits no more.
    pub(super) fn wait_idle(&self, limit: Duration) -> bool {
        let until = Instant::now() + limit;
        let mut in_flight = lock(&self.in_flight);
        while *in_flight > 0 && Instant::now() < until {
            let left = until.saturating_duration_since(Instant::now());
            in_flight = wait_timeout(&self.ended, in_flight, left).0;
        }
        let is_idle = *in_flight == 0;
        drop(in_flight);
        if is_idle {
            // A callback may come before the call that submitted its request has returned.
            drop(self.exclusive());
        }
        is_idle
    }
}

/// Asks once if the library can report the allocation of a disk: many combinations of versions and transports can't.
fn can_query(vddk: &Vddk, handle: DiskHandle, sectors: u64) -> bool {
    if sectors < CHUNK_SECTORS {
        return false;
    }
    match vddk.query(handle, 0, CHUNK_SECTORS, CHUNK_SECTORS) {
        Ok(_) => true,
        Err(failure) => {
            tracing::info!(
                "holes of the disk are not known: {}: {}",
                failure.function,
                failure.text
            );
            false
        }
    }
}

/// Callback of a request. Runs on the thread that submitted it, or on one of the library.
unsafe extern "C" fn completed(data: *mut c_void, result: VixError) {
    // A panic must not unwind into the library.
    let finished = catch_unwind(AssertUnwindSafe(|| {
        let Some(transfer) = take_transfer(data.addr()) else {
            return tracing::warn!("VDDK reports the result of a request that has one already");
        };
        let disk = Arc::clone(&transfer.disk);
        let function = if transfer.write {
            "VixDiskLib_WriteAsync"
        } else {
            "VixDiskLib_ReadAsync"
        };
        let result = match result {
            VIX_OK => Ok(()),
            error => Err(disk.vddk.failure(function, error)),
        };
        disk.finish(transfer, result);
    }));
    if finished.is_err() {
        tracing::error!("the answer to a request panicked");
    }
}

/// Takes a request from the library. Returns `None` if it had its result before.
fn take_transfer(number: usize) -> Option<Transfer> {
    lock(&TRANSFERS).remove(&number)
}
