//! Writes to a VMDK: the newest link of its chain, in place or into new grains.
//!
//! ```text
//!   open_writable   format ─ children ─ check (and recovery of an unclean image) ─► Writer
//!   first write     new CID in the descriptor, durable, before any content changes
//!   write, zero     flat: in place · sparse: grains.rs
//!   flush           pending updates ─► new tables ─ SYNC ─ entries ─ SYNC      (one SYNC if nothing is pending)
//!   close           flush ─ truncate after the last grain, clear the in-use mark ─ SYNC
//! ```
//! States: closed → CID changed (first write) → closed. An image that crashes in the second state has a new CID and, if
//! a grain was allocated, the in-use mark of its extent; the next open for writing recovers it (`recover.rs`).
//!
//! A failed sync is final. The kernel may have dropped the dirty pages that the sync covered, and reports the error
//! only once. So the write latch is set: nothing more is written or reported as durable. Reads continue.
//!
//! Lock order: `gate`, `last_flush`, then those of `grains.rs`. `cid_change` is taken under `gate` and holds no other.

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

/// Writing half of a disk.
#[derive(Debug)]
pub(crate) struct Writer {
    descriptor: DescriptorWriter,
    /// One for each extent of the newest link, in the same order.
    extents: Vec<ExtentWriter>,
    /// True once the CID was changed, until the image is closed. Set under `cid_change`, read without it.
    cid_changed: AtomicBool,
    /// Held while the new CID is written, so that concurrent first writes write it once.
    cid_change: Mutex<()>,
    /// True once the kernel may write to the backing file directly: then a flush syncs every flat file, dirty or not.
    external_writes: AtomicBool,
    /// Shared by all files of the disk; every sync goes through it.
    latch: Arc<WriteLatch>,
    backlog: Arc<Backlog>,
    /// Held shared by writes, exclusively by `close`. First in the lock order.
    gate: RwLock<()>,
    /// Number of the last flush that succeeded. Held for the whole of a flush: flushes run one at a time.
    last_flush: Mutex<u64>,
    /// Number of the last flush that was started. Only incremented under `last_flush`, read without it.
    started: AtomicU64,
}

/// Way in which an extent is written.
#[derive(Debug)]
enum ExtentWriter {
    /// Not at all: read-only, or without a file.
    None,
    /// In place; true while dirty. An extent starts dirty: an earlier process may have written to it without a sync.
    Flat(AtomicBool),
    Grains(Box<GrainWriter>),
}

impl Writer {
    /// Checks and recovers the newest link, which was opened for writing, and creates its writer.
    ///
    /// Errors: `ReadOnly` if its format can't be written in place, `Corrupt` if it is damaged.
    pub(super) fn new(link: &mut Link) -> Result<Self> {
        // The refusals come first: they change nothing, and recovery writes to the files.
        refuse_unwritable(link)?;
        refuse_overlapping_extents(link)?;
        refuse_large_directories(link)?;
        recover::recover(link)?;
        let (latch, backlog) = (Arc::<WriteLatch>::default(), Arc::<Backlog>::default());
        let is_overlay = link.descriptor.ddb_value(COMMIT_MARK).is_some();
        let mut extents = Vec::with_capacity(link.extents.len());
        for placed in &mut link.extents {
            let shared = (Arc::clone(&latch), Arc::clone(&backlog));
            extents.push(extent_writer(placed, is_overlay, shared)?);
        }
        Ok(Self {
            descriptor: DescriptorWriter::new(link)?,
            latch,
            backlog,
            extents,
            cid_changed: AtomicBool::new(false),
            cid_change: Mutex::default(),
            external_writes: AtomicBool::new(false),
            gate: RwLock::default(),
            last_flush: Mutex::new(0),
            started: AtomicU64::new(0),
        })
    }

    /// Changes the CID, durably, before the first change of content: a child that remembers the old CID must not find
    /// it over new content. `cid` is the new one; with `None` a random one is drawn.
    fn change_cid(&self, cid: Option<u32>) -> Result<()> {
        self.latch.check()?;
        // Double-checked: after the first write this is one atomic load.
        if self.cid_changed.load(Ordering::Acquire) {
            return Ok(());
        }
        let _changing = self.cid_change.lock().unwrap_or_else(PoisonError::into_inner);
        if !self.cid_changed.load(Ordering::Acquire) {
            let cid = cid.map_or_else(|| self.descriptor.draw_cid(), |cid| Ok(Some(cid)))?;
            if let Some(cid) = cid {
                self.descriptor.write_cid(cid, &self.latch)?;
            }
            // Only now may other writers pass the check above: the CID is durable.
            self.cid_changed.store(true, Ordering::Release);
        }
        Ok(())
    }

    /// Runs one whole flush. The caller holds `last_flush`.
    fn flush_now(&self, link: &Link) -> Result<()> {
        // The batches are taken before anything is synced. A grain's data are written before its update is published,
        // so the sync that follows covers the data of every entry in the batches.
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
                batches
                    .into_iter()
                    .for_each(|(grains, batch)| grains.finish_batch(batch));
                Ok(())
            }
            Err(e) => {
                // The entries stay in memory as pending updates: readers see them, and a later flush retries.
                batches.into_iter().for_each(|(grains, batch)| grains.put_back(batch));
                Err(e)
            }
        }
    }

    /// Writes the batches: data and new tables first, then the entries that name them.
    ///
    /// A crash before the first sync leaves space at the end of the file that nothing names, and the old disk. A crash
    /// after it leaves some entries in the file, perhaps in one of both copies of a table; each names a grain whose
    /// data are durable. `recover.rs` completes the copies and truncates the rest.
    fn write_batches(&self, link: &Link, batches: &mut [(&GrainWriter, Batch)]) -> Result<()> {
        // 1. New tables, which no directory names yet: their content need not be in order with the data.
        for (grains, batch) in batches.iter_mut() {
            grains.write_new_tables(batch)?;
        }
        // 2. Data of grains and new tables become durable, and those of all flat extents too.
        self.sync_all(link)?;
        // 3. The entries that name them.
        for (grains, batch) in batches.iter_mut() {
            grains.write_entries(batch)?;
        }
        // 4. Only extents whose entries were written are dirty again; this sync is the end of the flush.
        for (grains, _) in batches.iter() {
            grains.sync()?;
        }
        Ok(())
    }

    /// Syncs every dirty extent.
    fn sync_all(&self, link: &Link) -> Result<()> {
        let external_writes = self.external_writes.load(Ordering::Acquire);
        for (placed, extent) in link.extents.iter().zip(&self.extents) {
            match (extent, &placed.extent) {
                (ExtentWriter::Grains(grains), _) => grains.sync()?,
                (ExtentWriter::Flat(dirty), Extent::Flat { file, .. })
                    // The flag is cleared before the sync: a write during it sets the flag again for the next flush. If
                    // the sync fails, the write latch makes every later flush fail, so the lost flag does no harm.
                    if dirty.swap(false, Ordering::AcqRel) || external_writes =>
                {
                    self.latch.check_not_truncated(&**file, file.len())?;
                    self.latch.sync(&**file)?;
                }
                _ => {}
            }
        }
        Ok(())
    }

    /// Marks the extents as closed. The caller excludes writers and has flushed: the mark must not be cleared before
    /// the tables are durable, or a crash would leave an image that looks closed and is not.
    fn mark_closed(&self, link: &Link) -> Result<()> {
        let mut changed = false;
        for extent in &self.extents {
            if let ExtentWriter::Grains(grains) = extent {
                changed |= grains.mark_closed()?;
            }
        }
        if changed { self.sync_all(link) } else { Ok(()) }
    }
}

impl VmdkDisk {
    /// Returns the error with which [`open_writable`](Self::open_writable) would refuse this disk, as far as a disk
    /// that is open for reading shows it, without a change or a lock: `ReadOnly` for its format, `Policy` if it has
    /// children. With `force` children do not matter.
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
            .and_then(|()| refuse_overlapping_extents(link))
            .and_then(children)
            .err()
    }

    /// Returns the files that a write may change: the descriptor and the writable extents of the newest link.
    pub fn files_written(&self) -> Vec<Arc<dyn StoredFile>> {
        let Some(link) = self.links().first() else {
            return Vec::new();
        };
        let written = link.extents.iter().filter(|p| p.access == ExtentAccess::ReadWrite);
        let extents = written.filter_map(|p| file_of(&p.extent)).map(Arc::clone);
        std::iter::once(Arc::clone(&link.file)).chain(extents).collect()
    }

    /// Returns the writer and the link that it writes to.
    ///
    /// Errors: `ReadOnly` if the disk was opened for reading.
    fn writer_and_link(&self) -> Result<(&Writer, &Link)> {
        match (&self.writer, self.links().first()) {
            (Some(writer), Some(link)) => Ok((writer, link)),
            _ => Err(Error::new(ErrorKind::ReadOnly, "the disk is opened for reading")),
        }
    }

    /// Returns a random CID for [`change_cid`](Self::change_cid), with as many digits as the descriptor has space for,
    /// or `None` if the disk has no CID.
    pub fn draw_cid(&self) -> Result<Option<u32>> {
        self.writer_and_link()?.0.descriptor.draw_cid()
    }

    /// Changes the CID to `cid`, durably, before the first write. For a caller that stored the new CID elsewhere
    /// beforehand; other writes draw one on their own.
    pub fn change_cid(&self, cid: u32) -> Result<()> {
        self.writer_and_link()?.0.change_cid(Some(cid))
    }

    /// Replaces the value of a setting of the newest link's descriptor by one of the same length, durably, in place.
    /// The content of the disk and its CID do not change. Keys of the disk data base start with `ddb.`.
    /// [`descriptor`](Self::descriptor) continues to return the old value.
    ///
    /// Errors: `Unsupported` if the setting does not exist or has another length.
    pub fn rewrite(&self, key: &str, value: &str) -> Result<()> {
        let (writer, _) = self.writer_and_link()?;
        writer.latch.check()?;
        writer.descriptor.replace(key, value, &writer.latch)
    }

    /// Calls `change` for each extent that `range` overlaps, with the extent, its writer, the first sector of the disk
    /// in the overlap, and the number of its sectors. Flushes afterwards if too many updates are pending.
    fn change_extents(
        &self,
        range: Range<u64>,
        mut change: impl FnMut(&PlacedExtent, &ExtentWriter, u64, u64) -> Result<()>,
    ) -> Result<()> {
        let (writer, link) = self.writer_and_link()?;
        let full = {
            // Shared with other writers. Holding the gate keeps `close` from clearing the in-use mark under a write.
            let _gate = writer.gate.read().unwrap_or_else(PoisonError::into_inner);
            writer.change_cid(None)?;
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
                // At least one sector, so that a faulty list of extents can't make this loop spin.
                let sectors = (range.end - at)
                    .min((placed.start + placed.sectors).saturating_sub(at))
                    .max(1);
                change(placed, extent, at, sectors)?;
                at += sectors;
            }
            writer.backlog.is_full()
        };
        // Back-pressure: the writer that fills the backlog runs the flush. The gate is released first, as a flush does
        // not need it.
        if full { self.flush() } else { Ok(()) }
    }

    fn zero_piece(&self, range: Range<u64>, unmap: bool) -> Result<()> {
        self.change_extents(range, |placed, extent, start, sectors| {
            let within = start - placed.start;
            match (extent, &placed.extent) {
                (ExtentWriter::Grains(grains), Extent::Sparse(sparse)) => {
                    grains.zero(sparse, within, sectors, unmap, &self.backing_of(placed))
                }
                (ExtentWriter::Flat(dirty), Extent::Flat { file, offset }) => {
                    let zeroed = self
                        .flat_file(file)?
                        .zero((offset + within) * SECTOR, sectors * SECTOR, unmap);
                    // Also after an error: a part of the range may have been zeroed.
                    dirty.store(true, Ordering::Release);
                    zeroed
                }
                // A ZERO extent reads as zeroes already.
                (_, Extent::Zero) => Ok(()),
                _ => Err(read_only_extent(placed, start)),
            }
        })
    }

    /// Returns the writing half of a flat extent's file. Sets the write latch if another process truncated the file: a
    /// write after the new end would extend it again, with zeroes in place of the lost data.
    fn flat_file<'f>(&self, file: &'f Arc<dyn StoredFile>) -> Result<&'f dyn StoredWrite> {
        self.writer_and_link()?.0.latch.check_not_truncated(&**file, file.len())
    }

    fn backing_of<'a>(&'a self, placed: &PlacedExtent) -> BackingChain<'a> {
        BackingChain {
            disk: self,
            start: placed.start,
            end: placed.start + placed.sectors,
        }
    }
}

impl BlockWrite for VmdkDisk {
    fn prepare_external_write(&self) -> Result<()> {
        let (writer, _) = self.writer_and_link()?;
        let _gate = writer.gate.read().unwrap_or_else(PoisonError::into_inner);
        // Never cleared: this process does not see the kernel's writes to the backing file, nor the last of them.
        writer.external_writes.store(true, Ordering::Release);
        writer.change_cid(None)
    }

    fn write_at(&self, at: Lba, buf: &[u8]) -> Result<()> {
        let sectors = check_range(&self.geometry(), at, buf.len())?;
        self.change_extents(at.0..at.0 + sectors, |placed, extent, start, sectors| {
            let from = ((start - at.0) * SECTOR) as usize;
            let part = buf.get(from..from + (sectors * SECTOR) as usize).unwrap_or_default();
            let within = start - placed.start;
            match (extent, &placed.extent) {
                (ExtentWriter::Grains(grains), Extent::Sparse(sparse)) => {
                    grains.write(sparse, within, part, &self.backing_of(placed))
                }
                (ExtentWriter::Flat(dirty), Extent::Flat { file, offset }) => {
                    let written = self.flat_file(file)?.write_all_at((offset + within) * SECTOR, part);
                    // After the write, so that a flush which clears the flag has it in its sync; and also after an
                    // error, as a part of the data may have been written.
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
        // In pieces: each may add pending updates, and the backlog is only checked after each piece.
        for start in (range.start.0..range.end.0).step_by(ZERO_PIECE as usize) {
            self.zero_piece(start..range.end.0.min(start + ZERO_PIECE), unmap)?;
        }
        Ok(())
    }

    fn slow_zeroing(&self, range: Range<Lba>) -> Option<String> {
        let (writer, link) = self.writer_and_link().ok()?;
        let extents = link.extents.iter().zip(&writer.extents);
        let inside = extents.filter(|(p, _)| p.start < range.end.0 && range.start.0 < p.start + p.sectors);
        inside
            .into_iter()
            .find_map(|(placed, extent)| match (extent, file_of(&placed.extent)) {
                (_, None) => None,
                (ExtentWriter::None, _) => Some(read_only_extent(placed, placed.start.max(range.start.0)).to_string()),
                (_, Some(file)) => file.writer().and_then(StoredWrite::slow_zeroing),
            })
    }

    fn flush(&self) -> Result<()> {
        let (writer, link) = self.writer_and_link()?;
        // Group flush. A flush that starts after this load covers every write that returned before this call. So a
        // caller that waited for the lock while such a flush ran and succeeded is done. A flush with a number up to
        // `before` may have taken its batches before those writes, and does not count.
        let before = writer.started.load(Ordering::Acquire);
        let mut last = writer.last_flush.lock().unwrap_or_else(PoisonError::into_inner);
        // Under the lock, as the flush that was waited for may have set the latch.
        writer.latch.check()?;
        if *last > before {
            return Ok(());
        }
        let number = writer.started.fetch_add(1, Ordering::AcqRel) + 1;
        // On an error `last` keeps its value, so waiters run a flush of their own and get their own error.
        writer.flush_now(link)?;
        *last = number;
        Ok(())
    }

    fn close(&self) -> Result<()> {
        let (writer, link) = self.writer_and_link()?;
        // The gate excludes writers from here on, so no update can become pending between the flush and the mark.
        let _gate = writer.gate.write().unwrap_or_else(PoisonError::into_inner);
        self.flush()?;
        // Excludes flushes, which do not take the gate, while the file is truncated and the mark is cleared.
        let _flushing = writer.last_flush.lock().unwrap_or_else(PoisonError::into_inner);
        writer.mark_closed(link)?;
        // A write after this starts over: with a new CID and, for a new grain, the in-use mark. Not where the kernel writes
        // without this process, which could not change the CID first.
        if !writer.external_writes.load(Ordering::Acquire) {
            writer.cid_changed.store(false, Ordering::Release);
        }
        Ok(())
    }
}

/// Backing of an extent of the newest link: the links below it, and the base.
struct BackingChain<'a> {
    disk: &'a VmdkDisk,
    /// First sector of the disk that the extent holds.
    start: u64,
    /// First sector of the disk after the extent.
    end: u64,
}

impl Backing for BackingChain<'_> {
    fn read(&self, sector: u64, buf: &mut [u8]) -> Result<()> {
        // The last grain may reach past the end of its extent. No reader sees that part; it is filled with zeroes, as
        // the links below have other sectors of the disk there.
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

/// Refuses a link whose format can't be written in place.
fn refuse_unwritable(link: &Link) -> Result<()> {
    let refuse = |file: &str, why: &str| {
        let way_out = "cow=FILE writes to an overlay instead";
        Err(Error::new(ErrorKind::ReadOnly, format!("{file}: {why}; {way_out}")))
    };
    let descriptor = &link.descriptor;
    if !matches!(descriptor.version, Some(1..=3)) {
        return refuse(link.file.label(), "the version of its descriptor is unknown");
    }
    if descriptor.version != Some(1) || descriptor.change_tracking.is_some() {
        let why = "tracks changed blocks (CBT) or is encrypted, and a write would break that";
        return refuse(link.file.label(), why);
    }
    for placed in &link.extents {
        match &placed.extent {
            Extent::Flat { .. } | Extent::Zero => {}
            Extent::Sparse(sparse) => {
                let label = sparse.file.label();
                match &placed.hosted {
                    _ if sparse.encoding != Encoding::Plain => {
                        return refuse(
                            label,
                            "its grains are compressed (streamOptimized) and can only be read",
                        );
                    }
                    None => return refuse(label, &format!("{} extents can only be read", placed.kind)),
                    // Such programs keep a map of changed blocks, which a write from here would not update.
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
                        return refuse(label, "grains of less than 4 KiB can only be read");
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
            "its descriptor marks all extents as read-only (RDONLY)",
        );
    }
    Ok(())
}

/// Refuses a link whose directories would take too much memory: [`WritableTables`] keeps 8 bytes for each table.
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
    let context = format!("{label}: its directories have {tables} entries, expected at most {MAX_TABLES} for writing");
    Err(Error::new(
        ErrorKind::ReadOnly,
        format!("{context}; cow=FILE writes to an overlay instead"),
    ))
}

/// Maximum number of tables of a link that is written to: 64 MiB of directories, 256 TiB of disk at the usual table
/// size.
const MAX_TABLES: u64 = 1 << 23;

/// Refuses extents that overlap in one file, or overlap the descriptor's file: a write to one would change the other.
fn refuse_overlapping_extents(link: &Link) -> Result<()> {
    // By device and inode: two names in the descriptor may lead to the same file.
    let mut taken: HashMap<(u64, u64), Vec<Range<u64>>> = HashMap::new();
    let is_own = |p: &PlacedExtent| file_of(&p.extent).is_some_and(|file| Arc::ptr_eq(file, &link.file));
    // A monolithic image is its own descriptor file: then the whole file is claimed once, by the extent.
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
            let context = format!("{}: two of its extents overlap in one file", link.file.label());
            return Err(Error::new(
                ErrorKind::ReadOnly,
                format!("{context}; cow=FILE writes to an overlay instead"),
            ));
        }
    }
    Ok(())
}

/// Sectors zeroed between two checks of the backlog: 1 GiB.
const ZERO_PIECE: u64 = 1 << 21;

/// Sectors of the smallest grain that is written (4 KiB): smaller ones are not valid in KDMV.
const MIN_GRAIN: u64 = 8;

/// Creates the writer of one extent, and for a sparse one the tables that replace those of the cache.
fn extent_writer(
    placed: &mut PlacedExtent,
    is_overlay: bool,
    shared: (Arc<WriteLatch>, Arc<Backlog>),
) -> Result<ExtentWriter> {
    if placed.access != ExtentAccess::ReadWrite {
        return Ok(ExtentWriter::None);
    }
    match (&mut placed.extent, &placed.hosted) {
        (Extent::Flat { file, .. }, _) => {
            // Fails here rather than at the first write if the file is not open for writing.
            writer(&**file)?;
            Ok(ExtentWriter::Flat(AtomicBool::new(true)))
        }
        (Extent::Sparse(sparse), Some(hosted)) => {
            let file = &sparse.file;
            // A file that takes less space than its length has holes: then an allocated grain may read as zeroes.
            let holes = file.allocated()? < file.len();
            sparse.writable = Some(Arc::new(WritableTables::load(Arc::clone(hosted), holes)?));
            let grains = GrainWriter::new(sparse, Arc::clone(hosted), (placed.unclean, is_overlay), shared)?;
            Ok(ExtentWriter::Grains(Box::new(grains)))
        }
        _ => Ok(ExtentWriter::None),
    }
}

fn read_only_extent(placed: &PlacedExtent, at: u64) -> Error {
    let (kind, access) = (placed.kind, placed.access.as_str());
    Error::new(
        ErrorKind::ReadOnly,
        format!(
            "{}: lies in a {kind} extent ({access}) that can't be written to",
            Lba(at)
        ),
    )
}
