//! A disk as the bytes of a file: the border between bytes (above) and sectors (below).

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use crate::block::{BlockRead, Content, Lba, SECTOR};
use crate::error::{Error, ErrorKind, Result};
use crate::store::{Identity, StoredFile};

mod scratch;
mod stack;

pub use scratch::{MAX_READ, Scratch};
pub use stack::{Description, Source, open, open_source};

/// The longest that somebody waits for the next data or hole: the tables of some TiB are walked in that time.
const SEEK_TIME: Duration = Duration::from_millis(500);

/// The longest that data are counted: who has more tables than can be walked in that time keeps the estimate.
const COUNT_TIME: Duration = Duration::from_secs(60);

/// An open disk, byte by byte. Shared by all threads.
#[derive(Debug)]
pub struct Image {
    disk: Arc<dyn BlockRead>,
    /// Every file that it is made of.
    files: Vec<Arc<dyn StoredFile>>,
    /// Their identities when it was opened.
    identity: Vec<Identity>,
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
    pub fn new(disk: Arc<dyn BlockRead>, files: Vec<Arc<dyn StoredFile>>) -> Result<Self> {
        let identity = identities(&files)?;
        let stored = files.iter().map(|f| f.allocated().unwrap_or(0)).fold(0u64, u64::saturating_add);
        let allocated = Allocated { estimate: stored.min(disk.geometry().bytes()).into(), ..Allocated::default() };
        Ok(Self { disk, files, identity, allocated: Arc::new(allocated) })
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
        if self.disk.is_zero(Lba(start / SECTOR), (end - start) / SECTOR) {
            return Ok(Scratch::zeroes(len));
        }
        let buf = scratch.bytes((end - start) as usize)?;
        self.disk.read_at(Lba(start / SECTOR), buf)?;
        let skip = (offset - start) as usize;
        buf.get(skip..skip + len).ok_or_else(|| out_of_range(offset))
    }

    /// Where the next data or hole is, from `offset` on. `None`: there is no more data, or `offset` is behind the end.
    ///
    /// A walk that takes too long ends where it came to, as if something had been found there; who goes on from
    /// there finds the rest. Few bytes of a directory can stand for years of walking.
    pub fn seek(&self, offset: u64, what: Seek) -> Result<Option<u64>> {
        self.seek_until(offset, what, Instant::now() + SEEK_TIME)
    }

    /// The same, but it ends soon after `deadline`, one step on at least.
    fn seek_until(&self, offset: u64, what: Seek, deadline: Instant) -> Result<Option<u64>> {
        let end = self.len();
        let mut at = offset;
        while at < end {
            if at > offset && Instant::now() >= deadline {
                return Ok(Some(at));
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
            let _ = std::thread::Builder::new()
                .name("count".to_owned())
                .spawn(move || count(&*disk, &state, Instant::now() + COUNT_TIME));
        }
        state.estimate.load(Ordering::Relaxed)
    }

    /// Last change of the content, nanoseconds since 1970: the latest of its files'.
    pub fn mtime_ns(&self) -> i128 {
        self.identity.iter().map(|i| i.mtime_ns).max().unwrap_or(0)
    }

    /// Whether none of its files was changed or replaced since it was opened.
    pub fn is_unchanged(&self) -> bool {
        identities(&self.files).is_ok_and(|now| now == self.identity)
    }
}

impl Drop for Image {
    fn drop(&mut self) {
        self.allocated.stop.store(true, Ordering::Relaxed);
    }
}

fn identities(files: &[Arc<dyn StoredFile>]) -> Result<Vec<Identity>> {
    files.iter().map(|f| f.identity()).collect()
}

/// Counts what is data, until `deadline`. Neither an error nor a disk that goes away matters to anybody: the estimate
/// stays.
fn count(disk: &dyn BlockRead, state: &Allocated, deadline: Instant) {
    let end = disk.geometry().sectors;
    let (mut at, mut data) = (0, 0);
    while at < end {
        if state.stop.load(Ordering::Relaxed) || Instant::now() >= deadline {
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::block::Geometry;

    /// Sectors of data, but for one hole at the end; it says so sector by sector.
    #[derive(Debug)]
    struct Crumbs;

    impl BlockRead for Crumbs {
        fn geometry(&self) -> Geometry {
            Geometry { sectors: 100, granule: 1, preferred: 1 }
        }
        fn read_at(&self, _at: Lba, buf: &mut [u8]) -> Result<()> {
            buf.fill(7);
            Ok(())
        }
        fn content_at(&self, at: Lba) -> Result<(Content, u64)> {
            Ok((if at.0 < 99 { Content::Data } else { Content::Hole }, 1))
        }
        fn is_zero(&self, _at: Lba, _sectors: u64) -> bool {
            false
        }
    }

    #[test]
    fn regression_a_count_over_endless_tables_ends_with_the_estimate() {
        let state = Allocated::default();
        count(&Crumbs, &state, Instant::now());
        assert_eq!(state.counted.get(), None);
        count(&Crumbs, &state, Instant::now() + COUNT_TIME);
        assert_eq!(state.counted.get(), Some(&(99 * SECTOR)));
    }

    #[test]
    fn regression_a_seek_over_endless_tables_ends_and_goes_on() {
        let image = Image::new(Arc::new(Crumbs), Vec::new()).unwrap();
        assert_eq!(image.seek(10, Seek::Hole).unwrap(), Some(99 * SECTOR));
        let late = Instant::now();
        let (mut at, mut steps) = (10, 0);
        while at < 99 * SECTOR {
            let next = image.seek_until(at, Seek::Hole, late).unwrap().unwrap();
            assert!(next > at, "it goes on");
            (at, steps) = (next, steps + 1);
        }
        assert_eq!((at, steps), (99 * SECTOR, 99));
        assert_eq!(image.seek_until(0, Seek::Data, late).unwrap(), Some(0));
    }
}
