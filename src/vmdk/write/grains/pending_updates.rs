//! Pending updates: table entries that are in memory and not in the file, and how a flush writes them.
//!
//! An update stays pending until its grain's data are durable:
//! ```text
//!   flush: take batch ─ space and content of new tables ─ SYNC ─ entries, both copies ─ SYNC
//! ```
//! so that a crash at any point leaves each sector old or new, and at most space that nothing names.
//!
//! States of an update: pending → in a batch (a flush has taken it) → in the file, or pending again if the flush
//! failed. In all of them readers see the entry in [`WritableTable`].
//!
//! States of a table: in the file · new (only in memory) · placed (`new` is set: it has space and content in the file,
//! but no directory names it) · named (a directory may name it). A failed flush leaves a table placed or named, and the
//! next flush continues from there.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, MutexGuard};

use super::GrainWriter;
use crate::block::SECTOR;
use crate::error::Result;
use crate::mutex::lock;
use crate::store::StoredWrite;
use crate::vmdk::tables::Layout;
use crate::vmdk::tables::hosted::Copy;
use crate::vmdk::tables::writable::{TableCopies, WritableTable};

/// Number of pending updates from which on a write flushes. They take 8 bytes each: 2 MiB.
const MAX_PENDING: usize = 1 << 18;

/// Bytes of tables with pending updates from which on a write flushes; such tables can't be evicted.
const MAX_PENDING_BYTES: usize = 8 << 20;

/// Count of the pending updates of all extents of a disk. The counters are only limits, so they need no order.
#[derive(Debug, Default)]
pub(in crate::vmdk::write) struct Backlog {
    entries: AtomicUsize,
    /// Memory of the tables that have pending updates.
    bytes: AtomicUsize,
}

impl Backlog {
    /// Returns true if a flush is due.
    pub(in crate::vmdk::write) fn is_full(&self) -> bool {
        self.entries.load(Ordering::Relaxed) > MAX_PENDING || self.bytes.load(Ordering::Relaxed) > MAX_PENDING_BYTES
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

/// Pending updates of one extent, by table.
#[derive(Debug, Default)]
pub(super) struct PendingUpdates {
    tables: BTreeMap<u64, PendingTable>,
}

impl PendingUpdates {
    /// Calls `backlog` with the number of tables and of entries.
    fn count(&self, backlog: impl FnOnce(usize, usize)) {
        backlog(
            self.tables.len(),
            self.tables.values().map(|table| table.entries.len()).sum(),
        );
    }
}

/// Pending updates of one table, in the order in which they were published.
#[derive(Debug)]
struct PendingTable {
    /// Held so that the table is not evicted: read again from the file, it would lack these entries.
    _table: Arc<WritableTable>,
    /// Index and raw value of each entry. An index may occur twice (zeroed, then allocated); the later one counts.
    entries: Vec<(u32, u32)>,
    /// Space of a table that is itself new, once it is allocated.
    new: Option<TableCopies>,
    /// True if a directory may name the new table already, because an earlier flush failed after that. Then its entries
    /// must not be written before their data are durable, like those of any other table.
    named: bool,
}

/// Updates that one flush writes.
#[derive(Debug)]
pub(in crate::vmdk::write) struct Batch(PendingUpdates);

impl Batch {
    /// Returns true if nothing was pending.
    pub(in crate::vmdk::write) fn is_empty(&self) -> bool {
        self.0.tables.is_empty()
    }
}

impl GrainWriter {
    /// Publishes entries of grains whose data are written: adds them to the pending updates and makes them visible to
    /// readers and writers.
    ///
    /// Both under `pending`, and pending first. In the other order another thread could write in place into the new
    /// grain and flush before the entry is pending: its data would be durable, but nothing in the file would name them.
    pub(super) fn publish(&self, table: &Arc<WritableTable>, first: u64, raw: impl Iterator<Item = u32>) {
        let mut pending = self.pending();
        let before = pending.tables.len();
        let updates = pending.tables.entry(table.number).or_insert_with(|| PendingTable {
            _table: Arc::clone(table),
            entries: Vec::new(),
            new: None,
            named: false,
        });
        let had = updates.entries.len();
        for (entry, raw) in (first..).zip(raw) {
            updates.entries.push((entry as u32, raw));
            if let Some(entries) = table.entries() {
                entries.publish(entry as usize, raw);
            }
        }
        let more = updates.entries.len() - had;
        self.backlog
            .add((pending.tables.len() - before) * self.table_bytes(), more);
        // Before the lock is released: a flush that takes these updates finds the file dirty and syncs their data.
        self.dirty.store(true, Ordering::Release);
    }

    /// Takes all pending updates for a flush. Their data are written, though not durable.
    pub(in crate::vmdk::write) fn take_batch(&self) -> Batch {
        let pending = std::mem::take(&mut *self.pending());
        pending.count(|tables, entries| self.backlog.sub(tables * self.table_bytes(), entries));
        Batch(pending)
    }

    /// Makes the updates of a batch pending again after its flush failed.
    pub(in crate::vmdk::write) fn put_back(&self, batch: Batch) {
        let mut pending = self.pending();
        // The backlog is counted again as a whole: the tables of the batch and the newer ones may be the same.
        pending.count(|tables, entries| self.backlog.sub(tables * self.table_bytes(), entries));
        for (number, mut older) in batch.0.tables {
            // The batch's entries come first, as they are older. Its `new` and `named` are kept: they say how far the
            // table got in the file.
            if let Some(newer) = pending.tables.remove(&number) {
                older.entries.extend(newer.entries);
            }
            pending.tables.insert(number, older);
        }
        pending.count(|tables, entries| self.backlog.add(tables * self.table_bytes(), entries));
    }

    /// Writes the tables of a batch that are new. Nothing in the file names them, so they may be written before the
    /// data of their grains are durable; the sync that follows covers both.
    pub(in crate::vmdk::write) fn write_new_tables(&self, batch: &mut Batch) -> Result<()> {
        let writer = self.allocator.check_not_truncated()?;
        for (&number, table) in &mut batch.0.tables {
            // A named table counts as one in the file: `write_entries` writes its entries after the sync.
            if table.named || self.tables.places(number).is_some() {
                continue;
            }
            // After a failed flush the table has its space already; its content is written again, with newer entries.
            let places = match table.new {
                Some(places) => places,
                None => self.allocator.for_table()?,
            };
            table.new = Some(places);
            // The whole table: all entries that it has are in this batch, as it was never in the file.
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

    /// Writes the entries of a batch into both copies of their tables, and those of new tables into both directories.
    /// The caller has synced: the data of all these entries and the new tables are durable.
    pub(in crate::vmdk::write) fn write_entries(&self, batch: &mut Batch) -> Result<()> {
        let writer = self.allocator.check_not_truncated()?;
        for (&number, table) in &mut batch.0.tables {
            if let Some(places) = table.new {
                // Set before the directory is written: an error in between leaves open whether it names the table. A
                // table that was named before was skipped by `write_new_tables`, so its entries are written here.
                if std::mem::replace(&mut table.named, true) {
                    write_runs(writer, places, &table.entries)?;
                }
                // Redundant before primary, like the entries below. After a crash in between one directory lacks the
                // table, and recovery gives it a copy.
                for (copy, place) in [(Copy::Redundant, places.redundant), (Copy::Primary, places.primary)] {
                    if let Some(at) = self.layout.directory(copy) {
                        writer.write_all_at(at * SECTOR + number * 4, &place.to_le_bytes())?;
                    }
                }
            } else if let Some(places) = self.tables.places(number) {
                write_runs(writer, places, &table.entries)?;
            }
            self.dirty.store(true, Ordering::Release);
        }
        Ok(())
    }

    /// Ends a batch whose flush succeeded: notes the places of its new tables, and lets its tables be evicted.
    pub(in crate::vmdk::write) fn finish_batch(&self, batch: Batch) {
        for (number, table) in batch.0.tables {
            if let Some(places) = table.new {
                self.tables.set_places(number, places);
            }
        }
    }

    fn table_bytes(&self) -> usize {
        self.geometry.entries_per_table as usize * 4
    }

    fn pending(&self) -> MutexGuard<'_, PendingUpdates> {
        lock(&self.pending)
    }
}

/// Writes entries into each copy of their table, one write for each run of consecutive entries.
fn write_runs(writer: &dyn StoredWrite, places: TableCopies, entries: &[(u32, u32)]) -> Result<()> {
    for (entry, run) in runs(entries) {
        for place in copies(places) {
            writer.write_all_at(u64::from(place) * SECTOR + u64::from(entry) * 4, &run)?;
        }
    }
    Ok(())
}

/// Returns the sectors of the existing copies of a table, the redundant one first.
fn copies(places: TableCopies) -> impl Iterator<Item = u32> {
    [places.redundant, places.primary]
        .into_iter()
        .filter(|&place| place != 0)
}

/// Coalesces consecutive entries into runs: the index of the first and the bytes of all. Of two entries with the same
/// index the later one counts.
fn runs(entries: &[(u32, u32)]) -> Vec<(u32, Vec<u8>)> {
    // Collecting into a map sorts the entries and keeps the last value of each key.
    let by_index: BTreeMap<u32, u32> = entries.iter().copied().collect();
    let mut runs: Vec<(u32, Vec<u8>)> = Vec::new();
    for (entry, raw) in by_index {
        match runs.last_mut() {
            Some((first, bytes)) if *first + (bytes.len() / 4) as u32 == entry => bytes.extend(raw.to_le_bytes()),
            _ => runs.push((entry, raw.to_le_bytes().to_vec())),
        }
    }
    runs
}
