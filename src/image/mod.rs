//! A disk as the bytes of a file: the border between bytes (above) and sectors (below).

use std::collections::HashSet;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use crate::block::{BlockRead, Content, Lba, SECTOR};
use crate::error::{Error, ErrorKind, Result};
use crate::store::StoredFile;

mod new;
mod scratch;
mod stack;

pub use new::create;
pub use scratch::{MAX_READ, Scratch};
pub use stack::{Description, Source, is_dynamic, open, open_all, open_source};

/// Bytes from which on it is cheaper to ask whether they are zeroes than to fill a buffer with them.
const WORTH_ASKING: usize = 16 << 10;

/// The longest that one search for data or a hole takes; it keeps an event loop busy.
const SEEK_TIME: Duration = Duration::from_secs(2);

/// The longest that data are counted.
const COUNT_TIME: Duration = Duration::from_secs(10);

/// An open disk, byte by byte. Shared by all threads.
#[derive(Debug)]
pub struct Image {
    disk: Arc<dyn BlockRead>,
    /// Every file that it is made of, once.
    files: Vec<Arc<dyn StoredFile>>,
    allocated: Arc<Allocated>,
}

/// Bytes that are data, counted once, by a thread of its own, when somebody asks.
#[derive(Debug, Default)]
struct Allocated {
    counted: OnceLock<u64>,
    begun: AtomicBool,
    stop: AtomicBool,
    /// What is said until the count is there.
    estimate: AtomicU64,
}

/// What to look for from an offset on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Seek {
    /// The next byte that is stored.
    Data,
    /// The next byte that is in a hole; the end of the file is one.
    Hole,
}

impl Image {
    /// The bytes of `disk`, which is made of `files`.
    pub fn new(disk: Arc<dyn BlockRead>, mut files: Vec<Arc<dyn StoredFile>>) -> Self {
        let mut seen = HashSet::new();
        files.retain(|f| seen.insert(f.identity_at_open().file));
        let stored = files.iter().map(|f| f.allocated().unwrap_or(0)).fold(0u64, u64::saturating_add);
        let allocated = Allocated { estimate: stored.min(disk.geometry().bytes()).into(), ..Allocated::default() };
        Self { disk, files, allocated: Arc::new(allocated) }
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
    /// in `scratch`, or are zeroes that lie nowhere.
    pub fn read<'s>(&self, offset: u64, len: usize, scratch: &'s mut Scratch) -> Result<&'s [u8]> {
        let len = len.min(MAX_READ).min(usize::try_from(self.len().saturating_sub(offset)).unwrap_or(usize::MAX));
        if len == 0 {
            return Ok(&[]);
        }
        let granule = self.disk.geometry().granule * SECTOR;
        let start = offset / granule * granule;
        let end = (offset + len as u64).next_multiple_of(granule).min(self.len());
        if len >= WORTH_ASKING && self.disk.is_zero(Lba(start / SECTOR), (end - start) / SECTOR) {
            return Ok(Scratch::zeroes(len));
        }
        let buf = scratch.bytes((end - start) as usize)?;
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

    /// Bytes that are data. Begins to count them in the background when it is first asked, and gives what the files
    /// take until the count is known.
    pub fn allocated(&self) -> u64 {
        let state = &self.allocated;
        if let Some(&counted) = state.counted.get() {
            return counted;
        }
        if !state.begun.swap(true, Ordering::Relaxed) {
            let (disk, state) = (Arc::clone(&self.disk), Arc::clone(state));
            // where no thread is to be had the estimate stays
            let _ = std::thread::Builder::new().name("count".to_owned()).spawn(move || count(&*disk, &state));
        }
        state.estimate.load(Ordering::Relaxed)
    }

    /// Last change of the content now, nanoseconds since 1970: the latest of its files'.
    pub fn mtime_ns(&self) -> i128 {
        let now = |f: &Arc<dyn StoredFile>| f.identity().unwrap_or_else(|_| f.identity_at_open()).mtime_ns;
        self.files.iter().map(now).max().unwrap_or(0)
    }

    /// Whether none of its files was changed or replaced since it was opened.
    pub fn is_unchanged(&self) -> bool {
        self.files.iter().all(|f| f.identity().is_ok_and(|now| now == f.identity_at_open()))
    }

    /// Whether [`Self::is_unchanged`] would notice any change.
    pub fn shows_changes(&self) -> bool {
        self.files.iter().all(|f| f.shows_changes())
    }
}

impl Drop for Image {
    fn drop(&mut self) {
        self.allocated.stop.store(true, Ordering::Relaxed);
    }
}

/// Counts what is data. Neither an error nor a disk that goes away or takes too long matters to anybody: the estimate
/// stays.
fn count(disk: &dyn BlockRead, state: &Allocated) {
    let end = disk.geometry().sectors;
    let begun = Instant::now();
    let (mut at, mut data) = (0, 0);
    while at < end {
        if begun.elapsed() > COUNT_TIME || state.stop.load(Ordering::Relaxed) {
            return;
        }
        let Ok((content, sectors)) = disk.content_at(Lba(at)) else { return };
        if content == Content::Data {
            data += sectors;
        }
        at += sectors.max(1);
    }
    // a second count can't happen, so the cell is empty
    let _ = state.counted.set(data * SECTOR);
}

fn out_of_range(offset: u64) -> Error {
    Error::new(ErrorKind::OutOfRange, format!("byte {offset} is not on the disk"))
}
