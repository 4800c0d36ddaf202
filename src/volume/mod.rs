//! A disk as bytes: the border between byte offsets (above) and sectors (below).
//!
//! ```text
//!   open              builds the layers below from the configuration
//!   find              patterns on servers → the disks that match them
//!   server_exports    disks that are found on a server when they are looked up
//!   write             byte writes to sectors, under range locks
//!   submit            the boundary: one request, and its completion
//!   queued            reads and writes of a disk with a queue, without blocking
//!   worker_pool       threads for requests that may block, shared by the disks of a mount
//!   group_flush       one flush at a time, shared by all that wait
//!   durability        what that flush does
//!   loop_budget       how many event loops may be busy with something else than requests
//!   statistics        counts and latencies of the requests
//!   writeback_timer   completion of the image some seconds after a write
//!   block_count       count of the bytes that are data
//!   read_buffer       buffers for reads
//!   aligned_read      the granules of a read
//! ```
//! Reads take no lock: a read that overlaps a write in flight may return old or new bytes of each sector. Writes take a
//! range lock over granules, see `write.rs`.

use std::collections::HashSet;
use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::block::{BlockRead, Lba, SECTOR};
use crate::cache::without_waiting;
use crate::error::{Error, ErrorKind, Result};
use crate::store::StoredFile;

mod aligned_read;
mod block_count;
mod durability;
mod find;
mod group_flush;
pub(crate) mod loop_budget;
pub(crate) mod open;
mod queued;
mod read_buffer;
mod server_exports;
mod statistics;
mod submit;
pub(crate) mod worker_pool;
mod write;
mod writeback_timer;

use crate::range_lock::RangeLock;
use aligned_read::AlignedRead;
use block_count::BlockCount;
use durability::Durability;
pub use find::{FoundDisks, find_disks};
pub(crate) use group_flush::FlushKind;
use group_flush::GroupFlush;
pub use open::{Description, OpenedDisks, create, describe, list, open, open_all, open_source, server};
pub(crate) use open::{cached_disk, reopen};
pub use read_buffer::{MAX_READ, ReadBuffer};
pub use server_exports::ServerExports;
use statistics::Statistics;
pub(crate) use submit::{Request, SeekCompletion, ServingThreads};
use writeback_timer::WritebackTimer;

/// Maximum time of one search for data or a hole. The search occupies an event loop.
const SEEK_TIME: Duration = Duration::from_secs(2);

/// An open disk as bytes. Shared by all threads.
#[derive(Debug)]
pub struct Volume {
    /// The disk with its files, and the flush that all threads share.
    flushes: Arc<GroupFlush>,
    /// Range lock over granule numbers, held by the writes in flight.
    ranges: RangeLock,
    block_count: BlockCount,
    writeback: WritebackTimer,
    /// Reason why the disk can't be written to, if it was opened read-only without a request for that.
    read_only: Option<String>,
    /// True if requests may have to wait for a network.
    remote: bool,
    /// True if other clients may change the content without this process noticing.
    shared: bool,
    /// Threads that requests run on.
    threads: ServingThreads,
    statistics: Statistics,
}

/// Target of a search.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Seek {
    /// The next byte that is stored.
    Data,
    /// The next byte in a hole. The end of the file counts as one.
    Hole,
}

impl Volume {
    /// Creates the volume of `disk`, which consists of `files`.
    pub fn new(disk: Arc<dyn BlockRead>, mut files: Vec<Arc<dyn StoredFile>>) -> Self {
        let mut seen = HashSet::new();
        let remote = disk.queue().is_some();
        files.retain(|f| seen.insert(f.identity_at_open().file));
        Self {
            flushes: Arc::new(GroupFlush::new(Durability::new(disk, files))),
            ranges: RangeLock::default(),
            block_count: BlockCount::default(),
            writeback: WritebackTimer::default(),
            read_only: None,
            remote,
            shared: false,
            threads: ServingThreads::alone(),
            statistics: Statistics::default(),
        }
    }

    /// Sets the threads that requests run on: those of a mount.
    #[must_use]
    pub(crate) fn served_by(mut self, threads: ServingThreads) -> Self {
        self.threads = threads;
        self
    }

    /// Sets the volume as remote if `remote` is true, although its disk has no queue: a layer or a base of it is
    /// reached over a network.
    #[must_use]
    pub(crate) fn remote(mut self, remote: bool) -> Self {
        self.remote |= remote;
        self
    }

    /// Sets the volume as shared if `shared` is true: other clients may change the source below, also one that an overlay
    /// is over.
    #[must_use]
    pub(crate) fn shared(mut self, shared: bool) -> Self {
        self.shared |= shared;
        self
    }

    /// Returns true if requests may have to wait for a network.
    pub fn is_remote(&self) -> bool {
        self.remote
    }

    /// Sets the reason for which the disk was opened read-only, for a message to the user.
    #[must_use]
    pub(crate) fn read_only_because(mut self, why: Option<String>) -> Self {
        self.read_only = why;
        self
    }

    /// Returns the reason why the disk can't be written to, if it was opened read-only without a request for that.
    pub fn why_read_only(&self) -> Option<&str> {
        self.read_only.as_deref()
    }

    /// Returns the size of the disk in bytes.
    pub fn len(&self) -> u64 {
        self.disk().geometry().bytes()
    }

    /// Returns true if the disk has no bytes.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Returns the disk as sectors.
    pub fn disk(&self) -> &Arc<dyn BlockRead> {
        &self.durability().disk
    }

    fn durability(&self) -> &Durability {
        self.flushes.durability()
    }

    /// Reads `len` bytes from `offset` on: at most [`MAX_READ`], fewer at the end of the disk, none after it. The
    /// result lies in `read_buffer`, or is a shared page of zeroes.
    pub fn read<'s>(&self, offset: u64, len: usize, read_buffer: &'s mut ReadBuffer) -> Result<&'s [u8]> {
        let disk = &**self.disk();
        let Some(read) = AlignedRead::of(disk.geometry(), offset, len) else {
            return Ok(&[]);
        };
        // A hole costs neither a buffer nor a copy: all reads of zeroes share the same pages.
        if read.is_zero(disk) {
            return Ok(ReadBuffer::zeroes(read.len()));
        }
        let buf = read_buffer.bytes(read.granule_bytes())?;
        disk.read_at(read.start, buf)?;
        read.part(buf)
    }

    /// Returns what [`read`](Self::read) returns if it is in memory, or `None` if the read may have to wait.
    pub(crate) fn read_in_memory<'s>(
        &self,
        offset: u64,
        len: usize,
        read_buffer: &'s mut ReadBuffer,
    ) -> Option<Result<&'s [u8]>> {
        match without_waiting(|| self.read(offset, len, read_buffer)) {
            Err(e) if e.kind() == ErrorKind::WouldBlock => None,
            read => Some(read),
        }
    }

    /// Returns the offset of the next data or hole from `offset` on. `None` if there is no more data, or if `offset` is
    /// at the end or after it.
    ///
    /// The search is limited to two seconds: an image of few bytes can describe a disk that takes hours to walk. On
    /// timeout the rest counts as data, which is never wrong.
    pub fn seek(&self, offset: u64, target: Seek) -> Result<Option<u64>> {
        let end = self.len();
        let started = Instant::now();
        let mut at = offset;
        while at < end {
            if started.elapsed() > SEEK_TIME {
                return Ok(Some(if target == Seek::Data { at } else { end }));
            }
            let lba = Lba(at / SECTOR);
            let (content, sectors) = self.disk().content_at(lba)?;
            if content.is_zero() == (target == Seek::Hole) {
                return Ok(Some(at));
            }
            // A disk that answers with a length of zero would keep this thread here.
            at = (lba + sectors.max(1)).bytes();
        }
        Ok((target == Seek::Hole && offset < end).then_some(end))
    }

    /// Returns the number of bytes that are data, or `None` if it is not known. The first call, and calls some time after
    /// a change, start a count in the background.
    pub fn allocated(&self) -> Option<u64> {
        self.block_count.bytes(self.disk())
    }

    /// Returns true if no other thread uses the disk any more: the `owners` have all references to the volume, and it is
    /// closed when they drop them. Ends a count of the data.
    pub(crate) fn is_unused(self: &Arc<Self>, owners: usize) -> bool {
        self.block_count.stop();
        let of_timer = usize::from(self.writeback.is_started());
        Arc::strong_count(self) <= owners
            && !self.block_count.is_running()
            && Arc::strong_count(&self.flushes) <= 1 + of_timer
    }

    /// Forgets what is known of the disk's content, which may have been changed without this process: what lies where,
    /// and how much.
    pub(crate) fn forget_content(&self) {
        self.block_count.changed();
        if let Some(shared) = self.disk().shared_content() {
            shared.forget_content();
        }
    }

    /// Returns the files that the disk consists of, each once.
    pub fn files(&self) -> &[Arc<dyn StoredFile>] {
        &self.durability().files
    }

    /// Returns true if the content of every file is in a local file: the kernel may read them itself. Files of a server
    /// are once the disk cache has all of them.
    pub(crate) fn is_local(&self) -> bool {
        self.files().iter().all(|file| file.content_fd().is_some())
    }

    /// Returns true if the volume is not local, and will be once the disk cache is complete.
    pub(crate) fn may_become_local(&self) -> bool {
        let is_or_will_be = |file: &Arc<dyn StoredFile>| {
            let incomplete = matches!(file.cached(), Some(Ok(cached)) if cached.complete().is_none());
            incomplete || file.content_fd().is_some()
        };
        !self.is_local() && self.files().iter().all(is_or_will_be)
    }

    /// Returns the time of the last change of the image by another process or the kernel, in nanoseconds since 1970: the
    /// latest of all files.
    ///
    /// Writes of this process to the files move their time too, also when it completes the image long after the last
    /// write: programs that compare times would take that for a change of the disk. So for a disk that it alone writes to,
    /// this is the time at the open.
    pub fn mtime_ns(&self) -> i128 {
        let is_ours = self.writable() && !self.has_external_writes();
        let time = |f: &Arc<dyn StoredFile>| {
            let now = if is_ours { None } else { f.identity().ok() };
            now.unwrap_or_else(|| f.identity_at_open()).mtime_ns
        };
        self.files().iter().map(time).max().unwrap_or(0)
    }

    /// Returns true if no file was changed or replaced by another process since it was opened. Always true for a disk
    /// that is open for writing: this process changes its files and locks them against others.
    pub(crate) fn is_unchanged(&self) -> bool {
        self.writable()
            || self
                .files()
                .iter()
                .all(|f| f.identity().is_ok_and(|now| now == f.identity_at_open()))
    }

    /// Returns true if every change of the content by another process is detected: by `Self::is_unchanged` for local files,
    /// and by each read for files of a web server that says which version it sends. It is not for a device, nor for a disk
    /// behind a protocol.
    pub fn detects_modification(&self) -> bool {
        !self.shared && self.files().iter().all(|f| f.detects_modification())
    }
}

fn out_of_range(offset: u64) -> Error {
    Error::new(ErrorKind::OutOfRange, format!("byte {offset} is not on the disk"))
}
