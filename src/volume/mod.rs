//! A disk as the bytes of a file: the border between bytes (above) and sectors (below).
//!
//! ```text
//!   stack       builds the disk below from its configuration
//!   write       bytes to sectors ── ranges: who writes where
//!   allocated   how much of it is data
//!   scratch     buffers for reads
//! ```

use std::collections::HashSet;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::{Duration, Instant};

use crate::block::{BlockRead, Lba, SECTOR};
use crate::error::{Error, ErrorKind, Result};
use crate::store::StoredFile;

mod block_count;
mod create;
pub(crate) mod open;
mod read_buffer;
mod submit;
pub(crate) mod worker_pool;
mod write;
mod writeback_timer;

use crate::range_lock::RangeLock;
use block_count::BlockCount;
pub use create::create;
pub use open::{Description, Source, is_dynamic, open, open_all, open_source};
pub use read_buffer::{MAX_READ, ReadBuffer};
pub use submit::WriteCompletion;
use writeback_timer::WritebackTimer;

/// Bytes from which on it is cheaper to ask whether they are zeroes than to fill a buffer with them.
const WORTH_ASKING: usize = 16 << 10;

/// The longest that one search for data or a hole takes; it keeps an event loop busy.
const SEEK_TIME: Duration = Duration::from_secs(2);

/// An open disk, byte by byte. Shared by all threads.
#[derive(Debug)]
pub struct Volume {
    disk: Arc<dyn BlockRead>,
    /// Every file that it is made of, once.
    files: Vec<Arc<dyn StoredFile>>,
    /// The writes under way.
    ranges: RangeLock,
    allocated: BlockCount,
    settler: WritebackTimer,
    /// Why it can't be written to although nobody asked for that.
    read_only: Option<String>,
    /// Somebody else may write to the backing file, with our leave.
    behind: AtomicBool,
    /// Requests may have to wait for a network.
    remote: bool,
}

/// What to look for from an offset on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Seek {
    /// The next byte that is stored.
    Data,
    /// The next byte that is in a hole; the end of the file is one.
    Hole,
}

impl Volume {
    /// The bytes of `disk`, which is made of `files`.
    pub fn new(disk: Arc<dyn BlockRead>, mut files: Vec<Arc<dyn StoredFile>>) -> Self {
        let mut seen = HashSet::new();
        let remote = disk.queue().is_some();
        files.retain(|f| seen.insert(f.identity_at_open().file));
        let stored = files
            .iter()
            .map(|f| f.allocated().unwrap_or(0))
            .fold(0u64, u64::saturating_add);
        let allocated = BlockCount::new(stored.min(disk.geometry().bytes()));
        Self {
            disk,
            files,
            ranges: RangeLock::default(),
            allocated,
            settler: WritebackTimer::default(),
            read_only: None,
            behind: AtomicBool::new(false),
            remote,
        }
    }

    /// The same, with parts behind a network although its disk has no way without waiting.
    #[must_use]
    pub(crate) fn remote(mut self, remote: bool) -> Self {
        self.remote |= remote;
        self
    }

    /// Whether requests may have to wait for a network.
    pub fn is_remote(&self) -> bool {
        self.remote
    }

    /// The same, read-only for a reason that the user has to be told.
    #[must_use]
    pub(crate) fn read_only_because(mut self, why: Option<String>) -> Self {
        self.read_only = why;
        self
    }

    /// Why it can't be written to although nobody asked for that.
    pub fn why_read_only(&self) -> Option<&str> {
        self.read_only.as_deref()
    }

    /// Bytes of the disk.
    pub fn len(&self) -> u64 {
        self.disk.geometry().bytes()
    }

    /// Whether the disk has no byte.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The sectors below.
    pub fn disk(&self) -> &Arc<dyn BlockRead> {
        &self.disk
    }

    /// The bytes from `offset` on: `len` of them ([`MAX_READ`] at most), fewer at the end of the disk, none behind it. They lie
    /// in `read_buffer`, or are zeroes that lie nowhere.
    pub fn read<'s>(&self, offset: u64, len: usize, read_buffer: &'s mut ReadBuffer) -> Result<&'s [u8]> {
        let len = len
            .min(MAX_READ)
            .min(usize::try_from(self.len().saturating_sub(offset)).unwrap_or(usize::MAX));
        if len == 0 {
            return Ok(&[]);
        }
        let granule = self.disk.geometry().granule * SECTOR;
        let start = offset / granule * granule;
        let end = (offset + len as u64).next_multiple_of(granule).min(self.len());
        if len >= WORTH_ASKING && self.disk.is_zero(Lba(start / SECTOR), (end - start) / SECTOR) {
            return Ok(ReadBuffer::zeroes(len));
        }
        let buf = read_buffer.bytes((end - start) as usize)?;
        self.disk.read_at(Lba(start / SECTOR), buf)?;
        let skip = (offset - start) as usize;
        buf.get(skip..skip + len).ok_or_else(|| out_of_range(offset))
    }

    /// Where the next data or hole is, from `offset` on. `None`: there is no more data, or `offset` is behind the end.
    ///
    /// It does not look for ever: an image can say in few bytes what takes hours to walk. Then it says that there is
    /// data, which is never wrong.
    pub fn seek(&self, offset: u64, what: Seek) -> Result<Option<u64>> {
        let end = self.len();
        let begun = Instant::now();
        let mut at = offset;
        while at < end {
            if begun.elapsed() > SEEK_TIME {
                return Ok(Some(if what == Seek::Data { at } else { end }));
            }
            let lba = Lba(at / SECTOR);
            let (content, sectors) = self.disk.content_at(lba)?;
            if content.is_zero() == (what == Seek::Hole) {
                return Ok(Some(at));
            }
            at = (lba + sectors.max(1)).bytes();
        }
        Ok((what == Seek::Hole && offset < end).then_some(end))
    }

    /// Bytes that are data. Begins to count them in the background when it is first asked and some time after changes;
    /// gives what the files take until the first count is done.
    pub fn allocated(&self) -> u64 {
        self.allocated.bytes(&self.disk)
    }

    /// Last change of the content now, nanoseconds since 1970: the latest of its files'.
    pub fn mtime_ns(&self) -> i128 {
        let now = |f: &Arc<dyn StoredFile>| f.identity().unwrap_or_else(|_| f.identity_at_open()).mtime_ns;
        self.files.iter().map(now).max().unwrap_or(0)
    }

    /// Whether none of its files was changed or replaced since it was opened, by somebody else. What is open for writing
    /// is changed by us, and locked against all others.
    pub fn is_unchanged(&self) -> bool {
        self.writable()
            || self
                .files
                .iter()
                .all(|f| f.identity().is_ok_and(|now| now == f.identity_at_open()))
    }

    /// Whether [`Self::is_unchanged`] would notice any change.
    pub fn detects_modification(&self) -> bool {
        self.files.iter().all(|f| f.detects_modification())
    }
}

fn out_of_range(offset: u64) -> Error {
    Error::new(ErrorKind::OutOfRange, format!("byte {offset} is not on the disk"))
}
