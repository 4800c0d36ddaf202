//! Writing to a VMDK: the newest link of its chain, in place or into new grains.
//!
//! ```text
//!   open_writable   formats ─ children ─ check (and repair of an unclean image) ─► Writer
//!   first write     new CID in the descriptor, durable, before any content changes
//!   write, zero     flat: in place · sparse: grains.rs
//!   flush           what waits ─► new tables ─ SYNC ─ entries ─ SYNC      (only SYNC where nothing waits)
//!   close           flush ─ room behind the last grain cut off, mark of use cleared ─ SYNC
//! ```
//! States: closed → begun (a write) → closed. A sync that fails is final: the system may have dropped what it was
//! about, so from then on nothing more is written or said to be durable; reads go on.
//!
//! Lock order: gate, flushing, then those of `grains.rs`.

use std::collections::HashMap;
use std::ops::Range;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError, RwLock};

use crate::block::{BlockRead, BlockWrite, Lba, SECTOR, check_range};
use crate::error::{Error, ErrorKind, Result};
use crate::store::{StoredFile, StoredWrite, WriteLatch, writer};
use crate::vmdk::descriptor::ExtentAccess;
use crate::vmdk::disk::{VmdkDisk, file_of};
use crate::vmdk::extent::{Encoding, Extent};
use crate::vmdk::open::{Link, PlacedExtent};
use crate::vmdk::write::cid::DescriptorWriter;
use crate::vmdk::write::grains::{Backing, Backlog, Batch, GrainWriter};

mod cid;
mod grains;
mod recover;
mod snapshot_guard;

use crate::vmdk::tables::writable::WritableTables;
pub(crate) use snapshot_guard::COMMIT_MARK;
pub(super) use snapshot_guard::refuse_with_children;

/// The writing half of a disk.
#[derive(Debug)]
pub(crate) struct Writer {
    descriptor: DescriptorWriter,
    /// One for each extent of the newest link.
    extents: Vec<ExtentWriter>,
    /// Whether the CID was changed since the image was opened or closed.
    begun: AtomicBool,
    /// Held while that is done.
    beginning: Mutex<()>,
    /// Somebody writes to the files without us: a flush has to sync them whatever we know.
    behind_us: AtomicBool,
    /// Taken note of by whoever syncs.
    latch: Arc<WriteLatch>,
    backlog: Arc<Backlog>,
    /// Shared by writes; `close` has it alone.
    gate: RwLock<()>,
    /// The number of the last flush that succeeded. Held while one is done.
    flushing: Mutex<u64>,
    /// The number of the last flush that was begun.
    started: AtomicU64,
}

/// How an extent is written to.
#[derive(Debug)]
enum ExtentWriter {
    /// It is not.
    None,
    /// In place; `true`: written to since the last sync, perhaps by a process before this one.
    Flat(AtomicBool),
    Grains(Box<GrainWriter>),
}

impl Writer {
    /// Makes the newest link writable: it was opened for writing, but nothing of that was checked yet.
    ///
    /// Errors: `ReadOnly` where its format can't be written in place, `Corrupt` where it is damaged.
    pub(super) fn new(link: &mut Link) -> Result<Self> {
        refuse_unwritable(link)?;
        refuse_shared_room(link)?;
        refuse_large_directories(link)?;
        recover::recover(link)?;
        let (latch, backlog) = (Arc::<WriteLatch>::default(), Arc::<Backlog>::default());
        let mut extents = Vec::with_capacity(link.extents.len());
        for placed in &mut link.extents {
            extents.push(extent_writer(placed, (Arc::clone(&latch), Arc::clone(&backlog)))?);
        }
        Ok(Self {
            descriptor: DescriptorWriter::new(link)?,
            latch,
            backlog,
            extents,
            begun: AtomicBool::new(false),
            beginning: Mutex::default(),
            behind_us: AtomicBool::new(false),
            gate: RwLock::default(),
            flushing: Mutex::new(0),
            started: AtomicU64::new(0),
        })
    }

    /// Before any content changes: whoever remembers the old CID must not find it over new content. `cid`: the new one,
    /// which was drawn before; `None`: any.
    fn begin(&self, cid: Option<u32>) -> Result<()> {
        self.latch.check()?;
        if self.begun.load(Ordering::Acquire) {
            return Ok(());
        }
        let _beginning = self.beginning.lock().unwrap_or_else(PoisonError::into_inner);
        if !self.begun.load(Ordering::Acquire) {
            let cid = cid.map_or_else(|| self.descriptor.draw_cid(), |cid| Ok(Some(cid)))?;
            if let Some(cid) = cid {
                self.descriptor.write_cid(cid, &self.latch)?;
            }
            self.begun.store(true, Ordering::Release);
        }
        Ok(())
    }

    /// One whole flush; `flushing` is held.
    fn flush_now(&self, link: &Link) -> Result<()> {
        let mut batches: Vec<(&GrainWriter, Batch)> = Vec::new();
        for extent in &self.extents {
            if let ExtentWriter::Grains(grains) = extent {
                let batch = grains.take_batch();
                if !batch.is_empty() {
                    batches.push((grains.as_ref(), batch));
                }
            }
        }
        match self.write_batches(link, &mut batches) {
            Ok(()) => {
                batches.into_iter().for_each(|(grains, batch)| grains.settle(batch));
                Ok(())
            }
            Err(e) => {
                batches.into_iter().for_each(|(grains, batch)| grains.put_back(batch));
                Err(e)
            }
        }
    }

    fn write_batches(&self, link: &Link, batches: &mut [(&GrainWriter, Batch)]) -> Result<()> {
        for (grains, batch) in batches.iter_mut() {
            grains.write_new_tables(batch)?;
        }
        self.sync_all(link)?;
        for (grains, batch) in batches.iter_mut() {
            grains.write_entries(batch)?;
        }
        for (grains, _) in batches.iter() {
            grains.sync()?;
        }
        Ok(())
    }

    /// Makes every extent durable that was written to.
    fn sync_all(&self, link: &Link) -> Result<()> {
        let behind_us = self.behind_us.load(Ordering::Acquire);
        for (placed, extent) in link.extents.iter().zip(&self.extents) {
            match (extent, &placed.extent) {
                (ExtentWriter::Grains(grains), _) => grains.sync()?,
                (ExtentWriter::Flat(dirty), Extent::Flat { file, .. })
                    if dirty.swap(false, Ordering::AcqRel) || behind_us =>
                {
                    self.latch.check_not_truncated(&**file, file.len())?;
                    self.latch.sync(&**file)?;
                }
                _ => {}
            }
        }
        Ok(())
    }

    /// With nobody writing and all flushed: marks the extents as closed.
    fn unmark(&self, link: &Link) -> Result<()> {
        let mut marked = false;
        for extent in &self.extents {
            if let ExtentWriter::Grains(grains) = extent {
                marked |= grains.unmark()?;
            }
        }
        if marked { self.sync_all(link) } else { Ok(()) }
    }
}

impl VmdkDisk {
    /// Why [`open_writable`](Self::open_writable) would refuse it, as far as that can be told of a disk that is open for
    /// reading, without a change and without a lock: `ReadOnly` for its format, `Policy` where it has children.
    pub fn refuses_writing(&self, force: bool) -> Option<Error> {
        let link = self.links().first()?;
        let children = |()| {
            if force {
                Ok(())
            } else {
                refuse_with_children(link, None)
            }
        };
        refuse_unwritable(link)
            .and_then(|()| refuse_shared_room(link))
            .and_then(children)
            .err()
    }

    /// The files that a write to it may change: those of its newest link.
    pub fn files_written(&self) -> Vec<Arc<dyn StoredFile>> {
        let Some(link) = self.links().first() else {
            return Vec::new();
        };
        let written = link.extents.iter().filter(|p| p.access == ExtentAccess::ReadWrite);
        let extents = written.filter_map(|p| file_of(&p.extent)).map(Arc::clone);
        std::iter::once(Arc::clone(&link.file)).chain(extents).collect()
    }

    fn writing(&self) -> Result<(&Writer, &Link)> {
        match (&self.writer, self.links().first()) {
            (Some(writer), Some(link)) => Ok((writer, link)),
            _ => Err(Error::new(ErrorKind::ReadOnly, "the disk is opened for reading")),
        }
    }

    /// A CID that [`begin_with`](Self::begin_with) may be told: random, of as many digits as the descriptor has room for.
    /// `None`: the disk has no CID.
    pub fn draw_cid(&self) -> Result<Option<u32>> {
        self.writing()?.0.descriptor.draw_cid()
    }

    /// As [`BlockWrite::begin`], before anything was written, and with a CID that was drawn before: somebody else
    /// remembers it already.
    pub fn begin_with(&self, cid: u32) -> Result<()> {
        self.writing()?.0.begin(Some(cid))
    }

    /// Writes another value of the same length for a setting of the newest link's descriptor, durably, in place. The
    /// content, and with it the CID, does not change. Names of the disk data base start with `ddb.`. What was read of
    /// the descriptor when the disk was opened stays what it was.
    ///
    /// Errors: `Unsupported` where there is no such setting, or one of another length.
    pub fn rewrite(&self, key: &str, value: &str) -> Result<()> {
        let (writer, _) = self.writing()?;
        writer.latch.check()?;
        writer.descriptor.replace(key, value, &writer.latch)
    }

    /// Does `change` for each extent that `range` touches: the extent, its writer, the sector of the disk where it
    /// starts to be touched, and how many sectors are.
    fn change(
        &self,
        range: Range<u64>,
        mut change: impl FnMut(&PlacedExtent, &ExtentWriter, u64, u64) -> Result<()>,
    ) -> Result<()> {
        let (writer, link) = self.writing()?;
        let full = {
            let _gate = writer.gate.read().unwrap_or_else(PoisonError::into_inner);
            writer.begin(None)?;
            let mut at = range.start;
            while at < range.end {
                let after = link.extents.partition_point(|p| p.start <= at);
                let found = after
                    .checked_sub(1)
                    .and_then(|i| Some((link.extents.get(i)?, writer.extents.get(i)?)));
                let Some((placed, extent)) = found else {
                    return Err(Error::new(
                        ErrorKind::OutOfRange,
                        format!("{}: no extent holds it", Lba(at)),
                    ));
                };
                let sectors = (range.end - at)
                    .min((placed.start + placed.sectors).saturating_sub(at))
                    .max(1);
                change(placed, extent, at, sectors)?;
                at += sectors;
            }
            writer.backlog.is_full()
        };
        if full { self.flush() } else { Ok(()) }
    }

    fn zero_piece(&self, range: Range<u64>, unmap: bool) -> Result<()> {
        self.change(range, |placed, extent, start, sectors| {
            let within = start - placed.start;
            match (extent, &placed.extent) {
                (ExtentWriter::Grains(grains), Extent::Sparse(sparse)) => {
                    grains.zero(sparse, within, sectors, unmap, &self.below(placed))
                }
                (ExtentWriter::Flat(dirty), Extent::Flat { file, offset }) => {
                    let zeroed = self
                        .flat(file)?
                        .zero((offset + within) * SECTOR, sectors * SECTOR, unmap);
                    dirty.store(true, Ordering::Release);
                    zeroed
                }
                // it is zeroes
                (_, Extent::Zero) => Ok(()),
                _ => Err(read_only_extent(placed, start)),
            }
        })
    }

    /// The writing half of a flat extent's file. Behind the end of one that somebody has cut nothing is written: it would
    /// be as long as before, and hold zeroes.
    fn flat<'f>(&self, file: &'f Arc<dyn StoredFile>) -> Result<&'f dyn StoredWrite> {
        self.writing()?.0.latch.check_not_truncated(&**file, file.len())
    }

    fn below<'a>(&'a self, placed: &PlacedExtent) -> BackingChain<'a> {
        BackingChain {
            disk: self,
            start: placed.start,
            end: placed.start + placed.sectors,
        }
    }
}

impl BlockWrite for VmdkDisk {
    fn prepare_external_write(&self) -> Result<()> {
        let (writer, _) = self.writing()?;
        let _gate = writer.gate.read().unwrap_or_else(PoisonError::into_inner);
        writer.behind_us.store(true, Ordering::Release);
        writer.begin(None)
    }

    fn write_at(&self, at: Lba, buf: &[u8]) -> Result<()> {
        let sectors = check_range(&self.geometry(), at, buf.len())?;
        self.change(at.0..at.0 + sectors, |placed, extent, start, sectors| {
            let from = ((start - at.0) * SECTOR) as usize;
            let part = buf.get(from..from + (sectors * SECTOR) as usize).unwrap_or_default();
            let within = start - placed.start;
            match (extent, &placed.extent) {
                (ExtentWriter::Grains(grains), Extent::Sparse(sparse)) => {
                    grains.write(sparse, within, part, &self.below(placed))
                }
                (ExtentWriter::Flat(dirty), Extent::Flat { file, offset }) => {
                    let written = self.flat(file)?.write_all_at((offset + within) * SECTOR, part);
                    dirty.store(true, Ordering::Release);
                    written
                }
                _ => Err(read_only_extent(placed, start)),
            }
        })
    }

    fn zero(&self, range: Range<Lba>, unmap: bool) -> Result<()> {
        let bytes = range
            .end
            .0
            .checked_sub(range.start.0)
            .and_then(|s| usize::try_from(s.checked_mul(SECTOR)?).ok());
        check_range(&self.geometry(), range.start, bytes.unwrap_or(usize::MAX))?;
        // piece by piece, as each may leave entries in memory that have to be written before there are too many
        for start in (range.start.0..range.end.0).step_by(ZERO_AT_ONCE as usize) {
            self.zero_piece(start..range.end.0.min(start + ZERO_AT_ONCE), unmap)?;
        }
        Ok(())
    }

    fn flush(&self) -> Result<()> {
        let (writer, link) = self.writing()?;
        // a flush that is begun after this covers what this one is asked for
        let before = writer.started.load(Ordering::Acquire);
        let mut last = writer.flushing.lock().unwrap_or_else(PoisonError::into_inner);
        writer.latch.check()?;
        if *last > before {
            return Ok(());
        }
        let number = writer.started.fetch_add(1, Ordering::AcqRel) + 1;
        writer.flush_now(link)?;
        *last = number;
        Ok(())
    }

    fn has_unflushed_metadata(&self) -> bool {
        self.writer.as_ref().is_some_and(|writer| !writer.backlog.is_empty())
    }

    fn close(&self) -> Result<()> {
        let (writer, link) = self.writing()?;
        let _gate = writer.gate.write().unwrap_or_else(PoisonError::into_inner);
        self.flush()?;
        let _flushing = writer.flushing.lock().unwrap_or_else(PoisonError::into_inner);
        writer.unmark(link)?;
        writer.begun.store(false, Ordering::Release);
        Ok(())
    }
}

/// What an extent of the newest link shows where it has nothing: the links below.
struct BackingChain<'a> {
    disk: &'a VmdkDisk,
    /// The sectors of the disk that the extent holds.
    start: u64,
    end: u64,
}

impl Backing for BackingChain<'_> {
    fn read(&self, sector: u64, buf: &mut [u8]) -> Result<()> {
        // what a grain has behind the end of its extent is shown by nobody
        let inside = self.end.saturating_sub(self.start + sector) * SECTOR;
        let inside = (buf.len() as u64).min(inside) as usize;
        let (real, past) = buf.split_at_mut(inside);
        past.fill(0);
        self.disk.read_below(Lba(self.start + sector), real)
    }

    fn is_zero(&self, sector: u64, sectors: u64) -> bool {
        let at = self.start + sector;
        self.disk
            .is_zero_below(Lba(at), sectors.min(self.end.saturating_sub(at)))
    }

    fn zeroes(&self, sector: u64, sectors: u64) -> Result<(bool, u64)> {
        self.disk.zeroes_below(Lba(self.start + sector), sectors)
    }
}

/// Refuses links whose format can't be written in place.
fn refuse_unwritable(link: &Link) -> Result<()> {
    let refuse = |file: &str, why: &str| {
        let way_out = "cow=FILE writes to an overlay instead";
        Err(Error::new(ErrorKind::ReadOnly, format!("{file}: {why}; {way_out}")))
    };
    let descriptor = &link.descriptor;
    if descriptor.version != 1 || descriptor.change_tracking.is_some() {
        let why = "tracks changed blocks (CBT) or is encrypted, which a writer that doesn't know it would break";
        return refuse(link.file.label(), why);
    }
    for placed in &link.extents {
        match &placed.extent {
            Extent::Flat { .. } | Extent::Zero => {}
            Extent::Sparse(sparse) => {
                let label = sparse.file.label();
                match &placed.hosted {
                    _ if sparse.packing != Encoding::Plain => {
                        return refuse(label, "its grains are compressed (streamOptimized), they are only read");
                    }
                    None => return refuse(label, &format!("{} extents are only read", placed.kind)),
                    Some(hosted) if hosted.version() > 2 => {
                        return refuse(
                            label,
                            "header version 3 is written by programs that track changed blocks",
                        );
                    }
                    Some(_) if !sparse.file.detects_modification() => {
                        return refuse(label, "a sparse extent on a device can't grow");
                    }
                    Some(_) if sparse.geometry().grain < MIN_GRAIN => {
                        return refuse(label, "grains of less than 4 KiB are only read");
                    }
                    Some(_) => {}
                }
            }
        }
    }
    if link
        .extents
        .iter()
        .all(|p| p.access != ExtentAccess::ReadWrite || matches!(p.extent, Extent::Zero))
    {
        return refuse(
            link.file.label(),
            "its descriptor says that none of its extents is to be written (RDONLY)",
        );
    }
    Ok(())
}

/// Refuses links whose directories would take too much memory, at 8 bytes a table.
fn refuse_large_directories(link: &Link) -> Result<()> {
    let tables = link.extents.iter().filter_map(|p| match &p.extent {
        Extent::Sparse(sparse) if p.access == ExtentAccess::ReadWrite => Some(sparse.geometry().tables()),
        _ => None,
    });
    let tables = tables.fold(0, u64::saturating_add);
    if tables <= MAX_TABLES {
        return Ok(());
    }
    let label = link.file.label();
    let context = format!("{label}: its directories have {tables} entries, and only {MAX_TABLES} are written to");
    Err(Error::new(
        ErrorKind::ReadOnly,
        format!("{context}; cow=FILE writes to an overlay instead"),
    ))
}

/// The most tables of a link that is written to: 64 MiB of directories, 256 TiB of disk at the usual table size.
const MAX_TABLES: u64 = 1 << 23;

/// Refuses extents that lie over each other in one file: a write to one would change the other.
fn refuse_shared_room(link: &Link) -> Result<()> {
    let mut taken: HashMap<(u64, u64), Vec<Range<u64>>> = HashMap::new();
    let is_own = |p: &PlacedExtent| file_of(&p.extent).is_some_and(|file| Arc::ptr_eq(file, &link.file));
    if !link.extents.iter().any(is_own) {
        taken
            .entry(link.file.identity_at_open().file)
            .or_default()
            .push(0..u64::MAX);
    }
    for placed in &link.extents {
        let (file, range) = match &placed.extent {
            Extent::Flat { file, offset } => (file, *offset..*offset + placed.sectors),
            Extent::Sparse(sparse) => (&sparse.file, 0..u64::MAX),
            Extent::Zero => continue,
        };
        taken.entry(file.identity_at_open().file).or_default().push(range);
    }
    for ranges in taken.values_mut() {
        ranges.sort_by_key(|range| range.start);
        if ranges.windows(2).any(|pair| matches!(pair, [a, b] if b.start < a.end)) {
            let context = format!(
                "{}: two of its extents lie over each other in one file",
                link.file.label()
            );
            return Err(Error::new(
                ErrorKind::ReadOnly,
                format!("{context}; cow=FILE writes to an overlay instead"),
            ));
        }
    }
    Ok(())
}

/// Sectors that are made zeroes between two looks at how much waits: 1 GiB.
const ZERO_AT_ONCE: u64 = 1 << 21;

/// Sectors of the smallest grain that is written: smaller ones are no valid KDMV.
const MIN_GRAIN: u64 = 8;

fn extent_writer(placed: &mut PlacedExtent, shared: (Arc<WriteLatch>, Arc<Backlog>)) -> Result<ExtentWriter> {
    if placed.access != ExtentAccess::ReadWrite {
        return Ok(ExtentWriter::None);
    }
    match (&mut placed.extent, &placed.hosted) {
        (Extent::Flat { file, .. }, _) => {
            writer(&**file)?;
            Ok(ExtentWriter::Flat(AtomicBool::new(true)))
        }
        (Extent::Sparse(sparse), Some(hosted)) => {
            let file = &sparse.file;
            let holes = file.allocated()? < file.len();
            sparse.live = Some(Arc::new(WritableTables::load(Arc::clone(hosted), holes)?));
            let grains = GrainWriter::new(sparse, Arc::clone(hosted), placed.unclean, shared)?;
            Ok(ExtentWriter::Grains(Box::new(grains)))
        }
        _ => Ok(ExtentWriter::None),
    }
}

fn read_only_extent(placed: &PlacedExtent, at: u64) -> Error {
    let (kind, access) = (placed.kind, placed.access.as_str());
    Error::new(
        ErrorKind::ReadOnly,
        format!("{}: lies in a {kind} extent ({access}) that is not written", Lba(at)),
    )
}
