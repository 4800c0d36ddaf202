//! Entries of tables that are not in the file yet, and how a flush writes them.
//!
//! They wait in memory until their data are durable:
//! ```text
//!   flush: take what waits ─ new tables' room and content ─ SYNC ─ entries, both copies ─ SYNC
//! ```
//! so that a crash at any point leaves each sector old or new, and at most room that nothing names.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, MutexGuard, PoisonError};

use super::GrainWriter;
use crate::block::SECTOR;
use crate::error::Result;
use crate::store::StoredWrite;
use crate::vmdk::tables::Layout;
use crate::vmdk::tables::hosted::Copy;
use crate::vmdk::tables::writable::{TableCopies, WritableTable};

/// Entries that may wait in memory; a flush is due then. 8 bytes each.
const MAX_WAITING: usize = 1 << 18;

/// Bytes of tables with entries that may wait in memory.
const MAX_WAITING_BYTES: usize = 8 << 20;

/// How much waits in the memory of all extents of a disk.
#[derive(Debug, Default)]
pub(in crate::vmdk::write) struct Backlog {
    entries: AtomicUsize,
    /// Memory of the tables that the entries are of.
    bytes: AtomicUsize,
}

impl Backlog {
    /// Whether anything waits.
    pub(in crate::vmdk::write) fn is_empty(&self) -> bool {
        self.bytes.load(Ordering::Relaxed) == 0
    }

    /// Whether more waits than should.
    pub(in crate::vmdk::write) fn is_full(&self) -> bool {
        self.entries.load(Ordering::Relaxed) > MAX_WAITING || self.bytes.load(Ordering::Relaxed) > MAX_WAITING_BYTES
    }

    fn add(&self, bytes: usize, entries: usize) {
        self.bytes.fetch_add(bytes, Ordering::Relaxed);
        self.entries.fetch_add(entries, Ordering::Relaxed);
    }

    fn sub(&self, bytes: usize, entries: usize) {
        self.bytes.fetch_sub(bytes, Ordering::Relaxed);
        self.entries.fetch_sub(entries, Ordering::Relaxed);
    }
}

/// Entries that are not in the file yet, by table.
#[derive(Debug, Default)]
pub(super) struct PendingUpdates {
    tables: BTreeMap<u64, PendingTable>,
}

impl PendingUpdates {
    fn count(&self, backlog: impl FnOnce(usize, usize)) {
        backlog(
            self.tables.len(),
            self.tables.values().map(|table| table.entries.len()).sum(),
        );
    }
}

/// Entries of one table that are not in the file yet, in the order in which they were made.
#[derive(Debug)]
struct PendingTable {
    /// Kept so that it is not read from the file again meanwhile.
    _table: Arc<WritableTable>,
    entries: Vec<(u32, u32)>,
    /// For a table that is new itself: where it goes, once that is known.
    new: Option<TableCopies>,
    /// A directory may name the new table already, as a flush got that far before it failed. Then its entries have to
    /// wait for their data like those of any other table.
    named: bool,
}

/// What one flush writes.
#[derive(Debug)]
pub(in crate::vmdk::write) struct Batch(PendingUpdates);

impl Batch {
    /// Whether nothing waited.
    pub(in crate::vmdk::write) fn is_empty(&self) -> bool {
        self.0.tables.is_empty()
    }
}

impl GrainWriter {
    /// Makes entries known: they wait for the flush first, and are seen second. The other way round somebody could
    /// write into a new grain and flush before its entry waits.
    pub(super) fn publish(&self, table: &Arc<WritableTable>, first: u64, raw: impl Iterator<Item = u32>) {
        let mut waiting = self.waiting();
        let before = waiting.tables.len();
        let known = waiting.tables.entry(table.number).or_insert_with(|| PendingTable {
            _table: Arc::clone(table),
            entries: Vec::new(),
            new: None,
            named: false,
        });
        let had = known.entries.len();
        for (entry, raw) in (first..).zip(raw) {
            known.entries.push((entry as u32, raw));
            if let Some(entries) = table.entries() {
                entries.publish(entry as usize, raw);
            }
        }
        let more = known.entries.len() - had;
        self.backlog
            .add((waiting.tables.len() - before) * self.table_bytes(), more);
        self.dirty.store(true, Ordering::Release);
    }

    /// What waits now, for a flush. All data of it are written already, though not durable.
    pub(in crate::vmdk::write) fn take_batch(&self) -> Batch {
        let waiting = std::mem::take(&mut *self.waiting());
        waiting.count(|tables, entries| self.backlog.sub(tables * self.table_bytes(), entries));
        Batch(waiting)
    }

    /// Lets a batch wait again after its flush failed.
    pub(in crate::vmdk::write) fn put_back(&self, batch: Batch) {
        let mut waiting = self.waiting();
        waiting.count(|tables, entries| self.backlog.sub(tables * self.table_bytes(), entries));
        for (number, mut older) in batch.0.tables {
            if let Some(newer) = waiting.tables.remove(&number) {
                older.entries.extend(newer.entries);
            }
            waiting.tables.insert(number, older);
        }
        waiting.count(|tables, entries| self.backlog.add(tables * self.table_bytes(), entries));
    }

    /// Writes the tables of a batch that are new, where nothing refers to them yet.
    pub(in crate::vmdk::write) fn write_new_tables(&self, batch: &mut Batch) -> Result<()> {
        let writer = self.allocator.check_not_truncated()?;
        for (&number, table) in &mut batch.0.tables {
            if table.named || self.live.places(number).is_some() {
                continue;
            }
            let places = match table.new {
                Some(places) => places,
                None => self.allocator.for_table()?,
            };
            table.new = Some(places);
            let mut content = vec![0; (self.layout.table_sectors() * SECTOR) as usize];
            for &(entry, raw) in &table.entries {
                if let Some(bytes) = content.get_mut(entry as usize * 4..entry as usize * 4 + 4) {
                    bytes.copy_from_slice(&raw.to_le_bytes());
                }
            }
            for place in copies(places) {
                writer.write_all_at(u64::from(place) * SECTOR, &content)?;
            }
            self.dirty.store(true, Ordering::Release);
        }
        Ok(())
    }

    /// Writes the entries of a batch, whose data are durable now, into both tables, and those of new tables into both
    /// directories.
    pub(in crate::vmdk::write) fn write_entries(&self, batch: &mut Batch) -> Result<()> {
        let writer = self.allocator.check_not_truncated()?;
        for (&number, table) in &mut batch.0.tables {
            if let Some(places) = table.new {
                if std::mem::replace(&mut table.named, true) {
                    write_runs(writer, places, &table.entries)?;
                }
                for (copy, place) in [(Copy::Redundant, places.redundant), (Copy::Primary, places.primary)] {
                    if let Some(at) = self.layout.directory(copy) {
                        writer.write_all_at(at * SECTOR + number * 4, &place.to_le_bytes())?;
                    }
                }
            } else if let Some(places) = self.live.places(number) {
                write_runs(writer, places, &table.entries)?;
            }
            self.dirty.store(true, Ordering::Release);
        }
        Ok(())
    }

    /// The batch is in the file.
    pub(in crate::vmdk::write) fn settle(&self, batch: Batch) {
        for (number, table) in batch.0.tables {
            if let Some(places) = table.new {
                self.live.settle(number, places);
            }
        }
    }

    fn table_bytes(&self) -> usize {
        self.geometry.entries_per_table as usize * 4
    }

    fn waiting(&self) -> MutexGuard<'_, PendingUpdates> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Writes entries into each copy of their table.
fn write_runs(writer: &dyn StoredWrite, places: TableCopies, entries: &[(u32, u32)]) -> Result<()> {
    for (entry, run) in runs(entries) {
        for place in copies(places) {
            writer.write_all_at(u64::from(place) * SECTOR + u64::from(entry) * 4, &run)?;
        }
    }
    Ok(())
}

/// The copies of a table that there are, the redundant one first.
fn copies(places: TableCopies) -> impl Iterator<Item = u32> {
    [places.redundant, places.primary]
        .into_iter()
        .filter(|&place| place != 0)
}

/// Entries as stretches of bytes that follow each other in the table; of two for one place the later one counts.
fn runs(entries: &[(u32, u32)]) -> Vec<(u32, Vec<u8>)> {
    let by_place: BTreeMap<u32, u32> = entries.iter().copied().collect();
    let mut runs: Vec<(u32, Vec<u8>)> = Vec::new();
    for (entry, raw) in by_place {
        match runs.last_mut() {
            Some((first, bytes)) if *first + (bytes.len() / 4) as u32 == entry => bytes.extend(raw.to_le_bytes()),
            _ => runs.push((entry, raw.to_le_bytes().to_vec())),
        }
    }
    runs
}
