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
use std::sync::{Arc, Mutex, RwLock};

use crate::error::{Error, ErrorKind, Result};
use crate::mutex::lock;
use crate::store::writer;
use crate::vmdk::chain::{Link, PlacedExtent};
use crate::vmdk::descriptor::ExtentAccess;
use crate::vmdk::extent::{Encoding, Extent};
use crate::vmdk::write::cid::DescriptorWriter;
use crate::vmdk::write::grains::{Backlog, Batch, GrainWriter};
pub(in crate::vmdk) use grains::Backing;

mod cid;
mod grains;
mod recover;
mod snapshot_guard;

use crate::vmdk::tables::writable::WritableTables;
use crate::write_latch::WriteLatch;
pub(crate) use snapshot_guard::COMMIT_MARK;
pub(super) use snapshot_guard::refuse_with_children;

/// Writing half of a disk.
#[derive(Debug)]
pub(crate) struct Writer {
    descriptor: DescriptorWriter,
    /// One for each extent of the newest link, in the same order.
    pub(super) extents: Vec<ExtentWriter>,
    /// True once the CID was changed, until the image is closed. Set under `cid_change`, read without it.
    pub(super) cid_changed: AtomicBool,
    /// Held while the new CID is written, so that concurrent first writes write it once.
    cid_change: Mutex<()>,
    /// True once the kernel may write to the backing file directly: then a flush syncs every flat file, dirty or not.
    pub(super) external_writes: AtomicBool,
    /// Shared by all files of the disk; every sync goes through it.
    pub(super) latch: Arc<WriteLatch>,
    backlog: Arc<Backlog>,
    /// Held shared by writes, exclusively by `close`. First in the lock order.
    pub(super) gate: RwLock<()>,
    /// Number of the last flush that succeeded. Held for the whole of a flush: flushes run one at a time.
    pub(super) last_flush: Mutex<u64>,
    /// Number of the last flush that was started. Only incremented under `last_flush`, read without it.
    pub(super) started: AtomicU64,
}

/// Way in which an extent is written.
#[derive(Debug)]
pub(super) enum ExtentWriter {
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
        let descriptor = DescriptorWriter::new(link)?;
        recover::recover(link)?;
        // One latch for all files: after a failed sync of one of them, no order between them is certain.
        let (latch, backlog) = (Arc::<WriteLatch>::default(), Arc::<Backlog>::default());
        let is_overlay = link.descriptor.ddb_value(COMMIT_MARK).is_some();
        let mut extents = Vec::with_capacity(link.extents.len());
        for placed in &mut link.extents {
            let shared = (Arc::clone(&latch), Arc::clone(&backlog));
            extents.push(extent_writer(placed, is_overlay, shared)?);
        }
        Ok(Self {
            descriptor,
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
    pub(super) fn change_cid(&self, cid: Option<u32>) -> Result<()> {
        self.latch.check()?;
        // Double-checked: after the first write this is one atomic load.
        if self.cid_changed.load(Ordering::Acquire) {
            return Ok(());
        }
        let _changing = lock(&self.cid_change);
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

    /// Returns a random CID with as many digits as the descriptor has space for; `None` if the disk has no CID.
    pub(super) fn draw_cid(&self) -> Result<Option<u32>> {
        self.descriptor.draw_cid()
    }

    /// Replaces the value of a setting of the descriptor, as [`VmdkDisk::rewrite`](crate::vmdk::VmdkDisk::rewrite).
    pub(super) fn rewrite(&self, key: &str, value: &str) -> Result<()> {
        self.latch.check()?;
        self.descriptor.replace(key, value, &self.latch)
    }

    /// Returns true if so many updates are pending that the caller has to flush.
    pub(super) fn has_full_backlog(&self) -> bool {
        self.backlog.is_full()
    }

    /// Runs one whole flush. The caller holds `last_flush`.
    pub(super) fn flush_now(&self, link: &Link) -> Result<()> {
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
    pub(super) fn mark_closed(&self, link: &Link) -> Result<()> {
        let mut changed = false;
        for extent in &self.extents {
            if let ExtentWriter::Grains(grains) = extent {
                changed |= grains.mark_closed()?;
            }
        }
        if changed { self.sync_all(link) } else { Ok(()) }
    }
}

/// Refuses a link whose format can't be written in place.
pub(super) fn refuse_unwritable(link: &Link) -> Result<()> {
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
            Extent::Lost(error) => return refuse(link.file.label(), &format!("a part of it is lost ({error})")),
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
pub(super) fn refuse_overlapping_extents(link: &Link) -> Result<()> {
    // By device and inode: two names in the descriptor may lead to the same file.
    let mut taken: HashMap<(u64, u64), Vec<Range<u64>>> = HashMap::new();
    let is_own = |p: &PlacedExtent| p.extent.file().is_some_and(|file| Arc::ptr_eq(file, &link.file));
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
            Extent::Zero | Extent::Lost(_) => continue,
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
