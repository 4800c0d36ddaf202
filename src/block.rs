//! Disks as sectors: the traits that every source and layer implements, and their units.
//!
//! [`Volume`](crate::volume::Volume) is the border: the code above it counts bytes, the code below it counts sectors of
//! 512 bytes. [`Lba`] keeps the two apart.
//!
//! - [`BlockRead`]: every disk. Optional abilities are methods that return `Option<&dyn …>`.
//! - [`BlockWrite`]: a disk that can be written. Failure semantics: after an error each sector of the request has its
//!   old or its new content, and a failed flush is final.
//! - [`BlockQueue`]: a disk behind a network, whose requests are submitted and completed later.
//! - [`Runs`]: a disk whose sectors are stored in files as they are read, for the kernel view.
//!
//! The first two are synchronous on purpose: the threads that serve FUSE requests block anyway, and a call through a
//! layer costs some ten nanoseconds, a switch to another thread some ten microseconds.

use std::fmt;
use std::num::NonZeroU64;
use std::ops::{ControlFlow, Range};
use std::os::fd::BorrowedFd;

mod poller;

pub use poller::{CompletionPoller, Stay};

use crate::error::{Error, ErrorKind, Result};
use crate::store::RoomNeeded;
use crate::write_latch::WriteLatch;

/// Size of a sector in bytes.
pub const SECTOR: u64 = 512;

/// Maximum number of sectors of a disk: its size in bytes must fit an `i64`, as a file offset must.
pub const MAX_SECTORS: u64 = (i64::MAX as u64) / SECTOR;

/// Number of a sector of a disk, counted from 0.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Lba(pub u64);

impl Lba {
    /// Returns the byte offset of the sector. The number must be at most [`MAX_SECTORS`], so that the product fits.
    pub fn bytes(self) -> u64 {
        self.0 * SECTOR
    }
}

impl std::ops::Add<u64> for Lba {
    type Output = Lba;
    fn add(self, sectors: u64) -> Lba {
        Lba(self.0 + sectors)
    }
}

impl fmt::Display for Lba {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "sector {}", self.0)
    }
}

/// Size of a disk and the units of its requests.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Geometry {
    /// Number of sectors, at most [`MAX_SECTORS`].
    pub sectors: u64,
    /// Smallest request in sectors. Requests must start and end at multiples of it or at the end of the disk.
    pub granule: u64,
    /// Number of sectors up to which a request costs little more than a smaller one, for example a compressed grain. At
    /// least the granule.
    pub preferred: u64,
}

impl Geometry {
    /// Returns the size of the disk in bytes.
    pub fn bytes(&self) -> u64 {
        self.sectors * SECTOR
    }
}

/// Content of a range of sectors, as far as it is known without reading it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Content {
    /// Stored data, which may happen to be zeroes.
    Data,
    /// A range that the image declares as zero: a zeroed grain or a zero extent.
    Zero,
    /// A range that was never written. Reads as zeroes.
    Hole,
}

impl Content {
    /// Returns true if the range reads as zeroes without any I/O.
    pub fn is_zero(self) -> bool {
        self != Content::Data
    }
}

/// Disk that can be read, as 512-byte sectors. Its size and its granule never change while it is open.
pub trait BlockRead: fmt::Debug + Send + Sync {
    /// Returns size and units. Does no I/O.
    fn geometry(&self) -> Geometry;

    /// Reads from sector `at` on and fills `buf` completely. The range must be whole granules within the disk.
    ///
    /// Errors: `OutOfRange` for a range that is not on the disk, otherwise why the content can't be read. `buf` is then
    /// unspecified.
    fn read_at(&self, at: Lba, buf: &mut [u8]) -> Result<()>;

    /// Returns the content at sector `at` and the number of sectors that have it, at least 1 and within the disk. Reads
    /// no data. The sectors after the range may have the same content.
    fn content_at(&self, at: Lba) -> Result<(Content, u64)>;

    /// Returns true if the sectors are known to read as zeroes; false if they have to be read. Reads no data: it is
    /// called for every request, so that zeroes need no buffer. An image may load a table, as a read would.
    fn is_zero(&self, at: Lba, sectors: u64) -> bool;

    /// Returns the write interface, or `None` if the disk was opened read-only.
    fn writer(&self) -> Option<&dyn BlockWrite> {
        None
    }

    /// Returns the runs of the disk, or `None` if files do not hold its sectors as they are read, for example
    /// compressed.
    fn runs(&self) -> Option<&dyn Runs> {
        None
    }

    /// Returns the reason why there are no [`runs`](Self::runs), for messages.
    fn why_no_runs(&self) -> &'static str {
        "its data are not stored as they are read"
    }

    /// Returns the interface that submits requests without waiting, or `None` if there is none: the calls above return
    /// soon.
    fn queue(&self) -> Option<&dyn BlockQueue> {
        None
    }

    /// Returns the interface of a disk whose content other clients may change, or `None` if this process notices or
    /// excludes such changes.
    fn shared_content(&self) -> Option<&dyn SharedContent> {
        None
    }

    /// Returns the descriptor of the open file whose bytes are exactly the bytes of this disk, from offset 0 to the
    /// end. With it the kernel reads the disk without this process (passthrough), and writes it if there is a
    /// [`writer`](Self::writer), after [`prepare_external_write`](BlockWrite::prepare_external_write).
    fn backing_fd(&self) -> Option<BorrowedFd<'_>> {
        None
    }
}

/// Disk whose content other clients may change.
pub trait SharedContent {
    /// Returns a number that is another one after each moment in which the content may have changed unnoticed: a
    /// reconnect. Does no I/O.
    fn epoch(&self) -> u64;

    /// Forgets what is known of the content: a read from now on returns what other clients have written before.
    fn forget_content(&self);
}

/// Disk whose sectors are stored in files as they are read, or read as zeroes.
pub trait Runs {
    /// Returns the files. [`RunPlace::Stored`] refers to them by index.
    fn files(&self) -> Vec<RunFile<'_>>;

    /// Calls `each` with length and location of every run of the disk, in order, until it breaks. Does not change the
    /// caches that readers use.
    ///
    /// Errors: damaged tables; a run that no file holds as it is read.
    fn walk(&self, each: &mut dyn FnMut(NonZeroU64, RunPlace) -> ControlFlow<()>) -> Result<()>;
}

/// File that holds sectors of a disk.
#[derive(Debug, Clone, Copy)]
pub struct RunFile<'a> {
    /// Length in bytes.
    pub len: u64,
    /// Descriptor, if it is a regular file of this machine.
    pub fd: Option<BorrowedFd<'a>>,
}

/// Location of a run of sectors.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RunPlace {
    /// Stored in a file.
    Stored {
        /// Index in [`Runs::files`].
        file: usize,
        /// Sector of the file at which the run starts.
        sector: u64,
    },
    /// Stored nowhere: reads as zeroes.
    Zero,
}

/// Disk that can be written. If a request fails or a crash interrupts it, each of its sectors has the old or the new
/// content.
pub trait BlockWrite: BlockRead {
    /// Returns the write latch of the disk, which all users of the disk share. Does no I/O.
    fn latch(&self) -> &WriteLatch;

    /// Makes durable what must be durable before the first change of content: a new CID, the mark of an image in use.
    ///
    /// All methods that write do this on their own. The caller must call it before the content is changed from outside,
    /// by the kernel through [`backing_fd`](BlockRead::backing_fd).
    fn prepare_external_write(&self) -> Result<()>;

    /// Writes `buf` from sector `at` on: whole granules within the disk. Later reads return the new content.
    ///
    /// Errors: `ReadOnly` if this part of the disk can't be written, `Os(ENOSPC)` if its store is full, and others.
    fn write_at(&self, at: Lba, buf: &[u8]) -> Result<()>;

    /// Makes a range read as zeroes. `unmap`: also discards it, to free its space, where that is possible.
    fn zero(&self, range: Range<Lba>, unmap: bool) -> Result<()>;

    /// Returns the reason why zeroing a large part of the range takes as long as writing it, or is not possible at all;
    /// `None` if it is cheap. Changes nothing.
    fn slow_zeroing(&self, range: Range<Lba>) -> Option<String>;

    /// Adds to `needed` the room that a write of `range` would newly take in the stores of the disk, as far as that is
    /// known: an upper bound, without what their file systems need for themselves. `zero`: the range is zeroed instead.
    /// Ranges are added in rising order. Changes nothing.
    ///
    /// Errors: `ReadOnly` if a part of the range can't be written; those of reading tables.
    fn add_room(&self, range: Range<Lba>, zero: bool, needed: &mut RoomNeeded) -> Result<()>;

    /// Allocates `range`, so that later writes to it do not fail for lack of room. What it reads as stays the same. The
    /// caller excludes other writes of the range.
    ///
    /// A stream allocates nothing: how much room its data take shows when they are compressed.
    fn allocate(&self, range: Range<Lba>) -> Result<()>;

    /// Makes durable everything that was written before the call.
    ///
    /// An error after which data may be lost sets the [`latch`](Self::latch): all later flushes fail too. After any other
    /// error a later flush covers the same writes.
    fn flush(&self) -> Result<()>;

    /// Flushes, and marks the image as properly closed. A later write is possible and marks it as in use again.
    fn close(&self) -> Result<()>;

    /// Returns true if the disk accepts writes only in order, from the first sector on and each sector once (a stream).
    /// No layer above may reorder writes, so the page cache must not delay them (write-back).
    fn sequential_write_only(&self) -> bool {
        false
    }
}

/// Called once with the bytes that were read, or the error.
pub type ReadCompletion = Box<dyn FnOnce(Result<&[u8]>) + Send>;

/// Called once with the result.
pub type Completion = Box<dyn FnOnce(Result<()>) + Send>;

/// Disk behind a network: requests are submitted, and completed later, so a request that hangs blocks no thread.
///
/// Each `done` is called once, within bounded time, by any thread, possibly before the submitting call returns. It must
/// not wait for this disk.
pub trait BlockQueue: BlockRead {
    /// Submits a read, as [`BlockRead::read_at`].
    fn submit_read(&self, at: Lba, sectors: u64, done: ReadCompletion);

    /// Returns the unit in bytes at whose multiples writes may begin and end: a power of two, at most the granule. It
    /// may be less than a sector, which spares the caller a read-modify-write.
    fn write_alignment(&self) -> u64;

    /// Returns true if a write of that range can be made durable by the write itself (FUA), at a lower cost than a
    /// flush after it.
    fn supports_fua(&self, offset: u64, len: u64) -> bool;

    /// Submits a write of `data` from byte `offset` on: whole [units](Self::write_alignment) within the disk. Copies
    /// `data`.
    ///
    /// `durable`: completes when the data is durable. Allowed only if [`supports_fua`](Self::supports_fua) returns true
    /// for the range. Fails if the disk has no writer.
    fn submit_write(&self, offset: u64, data: &[u8], durable: bool, done: Completion);

    /// Submits a flush, as [`BlockWrite::flush`].
    fn submit_flush(&self, done: Completion);

    /// Returns the interface by which the submitting thread reads the answers, or `None` if the queue has threads of its
    /// own for that.
    fn poller(&self) -> Option<&dyn CompletionPoller> {
        None
    }
}

/// Checks that `bytes` at sector `at` are whole sectors on a disk of `geometry`. Returns the number of sectors.
pub(crate) fn check_range(geometry: &Geometry, at: Lba, bytes: usize) -> Result<u64> {
    let sectors = bytes as u64 / SECTOR;
    let whole = (bytes as u64).is_multiple_of(SECTOR);
    match at.0.checked_add(sectors) {
        Some(end) if whole && end <= geometry.sectors => Ok(sectors),
        _ => Err(Error::new(
            ErrorKind::OutOfRange,
            format!(
                "{bytes} bytes at {at} are not whole sectors of a disk of {} sectors",
                geometry.sectors
            ),
        )),
    }
}
