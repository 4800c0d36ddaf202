//! A disk as sectors: the trait that every source and layer has, and its units.
//!
//! Above [`crate::volume::Image`] everything counts bytes, below it sectors of 512 bytes. [`Lba`] keeps the
//! two apart. The traits are synchronous on purpose: FUSE threads block anyway, a layer costs some ten
//! nanoseconds, a hop to another thread some ten microseconds.

use std::fmt;
use std::num::NonZeroU64;
use std::ops::{ControlFlow, Range};
use std::os::fd::BorrowedFd;

use crate::error::{Error, ErrorKind, Result};

/// Bytes of a sector.
pub const SECTOR: u64 = 512;

/// The most sectors of a disk: its bytes must fit an `i64`, which is what a file offset can be.
pub const MAX_SECTORS: u64 = (i64::MAX as u64) / SECTOR;

/// A sector number of a disk, counted from 0.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Lba(pub u64);

impl Lba {
    /// The byte at which the sector starts. The sector must lie on a disk ([`MAX_SECTORS`]).
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

/// The size of a disk and the units it likes to be read in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Geometry {
    /// Number of sectors, at most [`MAX_SECTORS`].
    pub sectors: u64,
    /// Sectors of the smallest request; requests must start and end at its multiples (or at the end of the disk).
    pub granule: u64,
    /// Sectors of a request that costs little more than a smaller one (a compressed grain, say); ≥ granule.
    pub preferred: u64,
}

impl Geometry {
    /// Bytes of the disk.
    pub fn bytes(&self) -> u64 {
        self.sectors * SECTOR
    }
}

/// What a range of sectors holds, as far as it is known without reading it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Content {
    /// Stored data (which may be zeroes all the same).
    Data,
    /// Zeroes that the image says are there: a zeroed grain, a ZERO extent.
    Zero,
    /// Nothing was ever written: reads as zeroes.
    Hole,
}

impl Content {
    /// Whether it reads as zeroes without any I/O.
    pub fn is_zero(self) -> bool {
        self != Content::Data
    }
}

/// A disk that can be read, as 512-byte sectors. Size and granule never change while it is open.
pub trait BlockRead: fmt::Debug + Send + Sync {
    /// Size and units; does no I/O.
    fn geometry(&self) -> Geometry;

    /// Fills `buf` from sector `at`; never short. `buf` is whole sectors, whole granules, and within the disk.
    fn read_at(&self, at: Lba, buf: &mut [u8]) -> Result<()>;

    /// What is at `at`, and for how many sectors on (at least 1, within the disk), without reading data.
    /// The answer may stop early: neighbours of the same content may follow.
    fn content_at(&self, at: Lba) -> Result<(Content, u64)>;

    /// Whether the sectors read as zeroes, where memory alone can tell; `false`: they have to be read. Asked for
    /// every request, so that zeroes need no buffer.
    fn is_zero(&self, at: Lba, sectors: u64) -> bool;

    /// Its writing half; `None`: it is opened read-only.
    fn writer(&self) -> Option<&dyn BlockWrite> {
        None
    }

    /// Where its sectors lie in files; `None`: they don't lie there as they are read (compressed data).
    fn runs(&self) -> Option<&dyn Runs> {
        None
    }

    /// The way to read and write without waiting; `None`: it has none, and its calls return soon.
    fn queue(&self) -> Option<&dyn BlockQueue> {
        None
    }

    /// The open file whose bytes are this disk one to one from offset 0, and no byte more: lets the kernel
    /// read it without us, and write it where there is a [`writer`](Self::writer) (after
    /// [`prepare_external_write`](BlockWrite::begin)).
    fn backing_fd(&self) -> Option<BorrowedFd<'_>> {
        None
    }
}

/// A disk whose sectors lie in files as they are read, or read as zeroes.
pub trait Runs {
    /// The files, in the order of their numbers.
    fn files(&self) -> Vec<RunFile<'_>>;

    /// Tells where all sectors of the disk lie, run by run, from the first to the last, until `each` breaks. It keeps the
    /// caches of readers as they are.
    ///
    /// Errors: damaged tables, a run that does not lie in a file as it is read.
    fn walk(&self, each: &mut dyn FnMut(NonZeroU64, RunPlace) -> ControlFlow<()>) -> Result<()>;
}

/// A file that holds sectors of a disk.
#[derive(Debug, Clone, Copy)]
pub struct RunFile<'a> {
    /// Its length in bytes.
    pub len: u64,
    /// Its descriptor, where it is a regular file of this machine.
    pub fd: Option<BorrowedFd<'a>>,
}

/// Where a run of sectors lies.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RunPlace {
    /// In a file.
    Stored {
        /// Its number in [`Runs::files`].
        file: usize,
        /// The sector of the file that the run starts at.
        sector: u64,
    },
    /// Nowhere: zeroes.
    Zero,
}

/// A disk that can be written to. Each sector of a request that failed or was cut short by a crash is old or new.
pub trait BlockWrite: BlockRead {
    /// Does what has to be durable before the first change of content: a new CID, the mark of an image in use. Every
    /// other call does it by itself; who changes the content behind our back (a backing file) calls it before.
    fn prepare_external_write(&self) -> Result<()>;

    /// Writes `buf` from sector `at` on; whole sectors, whole granules, and within the disk. Readers see it at once.
    ///
    /// Errors: `ReadOnly` where this part of the disk can't be written, `Os(ENOSPC)` where its store is full, others.
    fn write_at(&self, at: Lba, buf: &[u8]) -> Result<()>;

    /// Makes a range read as zeroes. `unmap`: and gives its room back where that can be done.
    fn zero(&self, range: Range<Lba>, unmap: bool) -> Result<()>;

    /// On return everything that was written before the call is durable. After an error nothing is known to be,
    /// and no later call pretends otherwise.
    fn flush(&self) -> Result<()>;

    /// Whether something that was written is only in the memory of this process yet, and would be lost if it was killed:
    /// then somebody should flush soon.
    fn has_unflushed_metadata(&self) -> bool;

    /// Flushes, and marks the image as closed properly. A later write begins anew.
    fn close(&self) -> Result<()>;

    /// Whether it takes writes only in order, from the first sector up and each once (a compressed stream): nobody above
    /// may hold writes back to send them in another order, so a page cache with delayed writes must be off.
    fn sequential_write_only(&self) -> bool {
        false
    }
}

/// Given the bytes that were read, or why there are none.
pub type ReadCompletion = Box<dyn FnOnce(Result<&[u8]>) + Send>;

/// Given the result.
pub type Completion = Box<dyn FnOnce(Result<()>) + Send>;

/// A disk behind a network: requests are begun, and their results told later. So one that hangs holds no thread.
///
/// Each `done` is called once, in bounded time, by whatever thread, maybe before the call returns. It must not wait for
/// the disk. After one or more calls [`poll_completions`](Self::attend) is called, or nobody may read the answers.
pub trait BlockQueue: BlockRead {
    /// Begins [`BlockRead::read_at`].
    fn submit_read(&self, at: Lba, sectors: u64, done: ReadCompletion);

    /// Bytes at whose multiples a write may begin and end: a power of two, at most the granule. Not only sectors, as who can
    /// write less need not read before.
    fn write_alignment(&self) -> u64;

    /// Whether a write of that range can be durable when it is done, for less than a flush after it.
    fn supports_fua(&self, offset: u64, len: u64) -> bool;

    /// Begins a write of `data` from byte `offset` on, in whole [units](Self::write_unit) within the disk; `data` is copied.
    /// `durable`: it is durable when it is done; only where [`supports_fua`](Self::writes_durably) says that this can be.
    /// An error where the disk has no writer.
    fn submit_write(&self, offset: u64, data: &[u8], durable: bool, done: Completion);

    /// Begins [`BlockWrite::flush`].
    fn submit_flush(&self, done: Completion);

    /// Sees to it that answers are read, by this thread as far as it may stay, which spares the change to another thread.
    fn poll_completions(&self, stay: Stay<'_>);
}

/// How long a thread may read the answers of a [`BlockQueue`].
#[derive(Debug, Clone, Copy)]
pub enum Stay<'a> {
    /// Not at all: it has other work.
    No,
    /// For as long as they come soon one after the other.
    Patiently,
    /// Until the descriptor is readable: there comes its other work. Such a thread attends to the queue again soon.
    Until(BorrowedFd<'a>),
}

/// Checks that `buf` at `at` is whole sectors and inside of a disk of `geometry`; the number of its sectors.
pub fn check_range(geometry: &Geometry, at: Lba, bytes: usize) -> Result<u64> {
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
