//! Configurable disk for unit tests. Everything that a test does not configure has the simplest behaviour.

use std::fmt;
use std::ops::Range;
use std::sync::mpsc::Sender;

use crate::block::{BlockQueue, BlockRead, BlockWrite, Completion, Content, Geometry, Lba, ReadCompletion, SECTOR};
use crate::error::{Error, Result};
use crate::store::RoomNeeded;
use crate::write_latch::WriteLatch;

type Read = dyn Fn(Lba, &mut [u8]) -> Result<()> + Send + Sync;
type Flush = dyn Fn() -> Result<()> + Send + Sync;

/// Disk with configurable reads and flushes. All of it is data, and writes have no effect.
pub(crate) struct TestDisk {
    sectors: u64,
    read: Box<Read>,
    /// `None` if the disk is read-only.
    flush: Option<Box<Flush>>,
    /// True if the disk has a [`BlockQueue`].
    queues: bool,
    /// Receives the completions of submitted flushes. `None`: they complete at once.
    begun: Option<Sender<Completion>>,
    latch: WriteLatch,
    /// Called while a range is zeroed.
    zero: Box<dyn Fn() + Send + Sync>,
}

impl TestDisk {
    /// Creates a read-only disk of that many sectors. Every read fails.
    pub(crate) fn new(sectors: u64) -> Self {
        let read = Box::new(|_: Lba, _: &mut [u8]| Err(Error::corrupt("damaged")));
        Self {
            sectors,
            read,
            flush: None,
            queues: false,
            begun: None,
            latch: WriteLatch::default(),
            zero: Box::new(|| ()),
        }
    }

    /// Sets the function that reads.
    pub(crate) fn reading(mut self, read: impl Fn(Lba, &mut [u8]) -> Result<()> + Send + Sync + 'static) -> Self {
        self.read = Box::new(read);
        self
    }

    /// Makes the disk writable, and sets the function that flushes.
    pub(crate) fn flushing(mut self, flush: impl Fn() -> Result<()> + Send + Sync + 'static) -> Self {
        self.flush = Some(Box::new(flush));
        self
    }

    /// Sets the function that is called while a range is zeroed.
    pub(crate) fn zeroing(mut self, zero: impl Fn() + Send + Sync + 'static) -> Self {
        self.zero = Box::new(zero);
        self
    }

    /// Makes the disk writable, with a queue. Submitted flushes are sent to `begun`, whose receiver completes them;
    /// without it they complete at once.
    pub(crate) fn queueing(mut self, begun: Option<Sender<Completion>>) -> Self {
        (self.queues, self.begun) = (true, begun);
        self.flushing(|| Ok(()))
    }
}

impl fmt::Debug for TestDisk {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("TestDisk")
            .field("sectors", &self.sectors)
            .finish_non_exhaustive()
    }
}

impl BlockRead for TestDisk {
    fn geometry(&self) -> Geometry {
        Geometry {
            sectors: self.sectors,
            granule: 1,
            preferred: 1,
        }
    }

    fn read_at(&self, at: Lba, buf: &mut [u8]) -> Result<()> {
        (self.read)(at, buf)
    }

    fn content_at(&self, at: Lba) -> Result<(Content, u64)> {
        Ok((Content::Data, self.sectors - at.0))
    }

    fn is_zero(&self, _at: Lba, _sectors: u64) -> bool {
        false
    }

    fn writer(&self) -> Option<&dyn BlockWrite> {
        self.flush.is_some().then_some(self as &dyn BlockWrite)
    }

    fn queue(&self) -> Option<&dyn BlockQueue> {
        self.queues.then_some(self as &dyn BlockQueue)
    }
}

impl BlockQueue for TestDisk {
    fn submit_read(&self, at: Lba, sectors: u64, done: ReadCompletion) {
        let mut buf = vec![0; (sectors * SECTOR) as usize];
        done(self.read_at(at, &mut buf).map(|()| &*buf));
    }

    fn write_alignment(&self) -> u64 {
        SECTOR
    }

    fn supports_fua(&self, _offset: u64, _len: u64) -> bool {
        false
    }

    fn submit_write(&self, _offset: u64, _data: &[u8], _durable: bool, done: Completion) {
        done(Ok(()));
    }

    fn submit_flush(&self, done: Completion) {
        match &self.begun {
            Some(begun) => drop(begun.send(done)),
            None => done(self.flush()),
        }
    }
}

impl BlockWrite for TestDisk {
    fn latch(&self) -> &WriteLatch {
        &self.latch
    }

    fn prepare_external_write(&self) -> Result<()> {
        Ok(())
    }

    fn write_at(&self, _at: Lba, _buf: &[u8]) -> Result<()> {
        Ok(())
    }

    fn zero(&self, _range: Range<Lba>, _unmap: bool) -> Result<()> {
        (self.zero)();
        Ok(())
    }

    fn add_room(&self, _range: Range<Lba>, _zero: bool, _needed: &mut RoomNeeded) -> Result<()> {
        Ok(())
    }

    fn allocate(&self, _range: Range<Lba>) -> Result<()> {
        Ok(())
    }

    fn slow_zeroing(&self, _range: Range<Lba>) -> Option<String> {
        None
    }

    fn flush(&self) -> Result<()> {
        self.flush.as_ref().map_or(Ok(()), |flush| flush())
    }

    fn close(&self) -> Result<()> {
        self.flush()
    }
}
