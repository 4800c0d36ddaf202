//! Directory and tables of an extent that is written to.
//!
//! ```text
//!   sector ─► directory[table] ─ 0 ───────► no table: all grains unallocated
//!                │ sectors of both copies, or NEW (a table that is only in memory)
//!                ▼
//!             shard (a mutex, a map) ─► WritableTable ─► entries, atomic
//! ```
//! The tables in memory are authoritative; the file follows at the next flush.
//!
//! Invariant: a table is not read from the file again while an entry of it is not written yet. A thread that changes
//! entries holds the [`WritableTable`], and so do the pending updates. Only a table that nothing else holds is evicted,
//! which keeps the memory bounded.
//!
//! States of a directory entry: 0 → NEW (first write to the table) → sectors in the file (a flush that succeeded).
//!
//! Lock order: a shard and `loading` are never held together, and neither is held while another lock is taken. A shard
//! is only held for a lookup; the file is read under `loading`, so that reads of other tables do not wait.

use std::collections::HashMap;
use std::ops::Range;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock};

use crate::error::Result;
use crate::mutex::lock;
use crate::vmdk::tables::hosted::{Copy, HostedTables};
use crate::vmdk::tables::{CHUNK, Layout, Table, TableGeometry};

/// Bytes of tables kept in memory, in addition to those with pending updates.
const KEPT_BYTES: u64 = 16 << 20;

/// Number of locks that the tables are spread over.
const SHARDS: usize = 16;

/// Directory entry of a table that is not in the file yet.
const NEW: u64 = u64::MAX;

/// Sectors of both copies of a table in the file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::vmdk) struct TableCopies {
    /// Sector of the table that is read.
    pub(in crate::vmdk) primary: u32,
    /// Sector of its copy; 0 where the extent has no redundant directory.
    pub(in crate::vmdk) redundant: u32,
}

/// One table in memory.
#[derive(Debug)]
pub(in crate::vmdk) struct WritableTable {
    pub(in crate::vmdk) number: u64,
    loaded: OnceLock<Arc<Table>>,
    /// Held while the table is read from the file. Single-flight: the first thread reads, the others wait for it.
    loading: Mutex<()>,
}

impl WritableTable {
    /// Returns the entries, which were loaded before the table was handed out.
    pub(in crate::vmdk) fn entries(&self) -> Option<&Arc<Table>> {
        self.loaded.get()
    }
}

type Shard = Mutex<HashMap<u64, Arc<WritableTable>>>;

/// Directory and tables of one hosted sparse extent that is written to.
#[derive(Debug)]
pub(crate) struct WritableTables {
    layout: Arc<HostedTables>,
    geometry: TableGeometry,
    /// For each table its [`TableCopies`], the primary one in the lower half; 0 if there is no table; or [`NEW`].
    directory: Box<[AtomicU64]>,
    shards: [Shard; SHARDS],
    /// Number of tables in a shard from which on it evicts some.
    shard_max: usize,
    /// True if grains may lie in holes of the file.
    holes: AtomicBool,
    /// One range of bytes of the file that was found to be stored, without holes. It saves a query of the file system
    /// for each grain, which may cost a walk to the end of the file. Only a change that creates holes has to reset it.
    /// If it covers a hole after all, zeroes are reported as data, which is never wrong.
    data: Mutex<Range<u64>>,
}

impl WritableTables {
    /// Reads the directories of an extent that passed the check. They take 8 bytes of memory for each possible table.
    /// `holes` is true if the file has holes.
    pub(in crate::vmdk) fn load(layout: Arc<HostedTables>, holes: bool) -> Result<Self> {
        let geometry = layout.geometry();
        let tables = geometry.tables();
        let mut directory = Vec::with_capacity(tables as usize);
        for first in (0..tables).step_by(CHUNK as usize) {
            let range = first..tables.min(first + CHUNK);
            // Empty without a redundant directory: the upper halves are then 0, which means "no copy".
            let redundant = layout.raw_directory(Copy::Redundant, range.clone())?;
            let primary = layout.raw_directory(Copy::Primary, range)?;
            let pairs = primary.iter().enumerate();
            directory.extend(pairs.map(|(i, &primary)| {
                AtomicU64::new(packed(TableCopies {
                    primary,
                    redundant: redundant.get(i).copied().unwrap_or(0),
                }))
            }));
        }
        let table_bytes = geometry.entries_per_table * 4;
        Ok(Self {
            geometry,
            directory: directory.into(),
            shards: Default::default(),
            holes: AtomicBool::new(holes),
            data: Mutex::new(0..0),
            // At least four tables for each shard, also of the largest size (256 KiB).
            shard_max: (KEPT_BYTES / table_bytes).max(64) as usize / SHARDS,
            layout,
        })
    }

    /// Returns the sectors of table `number`, or `None` if it is not in the file (yet).
    pub(in crate::vmdk) fn places(&self, number: u64) -> Option<TableCopies> {
        match self.raw(number) {
            0 | NEW => None,
            raw => Some(TableCopies {
                primary: raw as u32,
                redundant: (raw >> 32) as u32,
            }),
        }
    }

    /// Sets the sectors of a table that was new. The caller has synced the table and both directory entries.
    pub(in crate::vmdk) fn set_places(&self, number: u64, places: TableCopies) {
        if let Some(entry) = self.directory.get(number as usize) {
            // From here on the table may be evicted, and read again from these sectors.
            entry.store(packed(places), Ordering::Release);
        }
    }

    /// Returns table `number` for reading, or `None` if there is no such table.
    pub(crate) fn table(&self, number: u64) -> Result<Option<Arc<Table>>> {
        match self.raw(number) {
            0 => Ok(None),
            _ => Ok(self.held(number)?.loaded.get().cloned()),
        }
    }

    /// Returns table `number` for changing. An absent table is created in memory, with nothing allocated.
    pub(in crate::vmdk) fn table_for_writing(&self, number: u64) -> Result<Arc<WritableTable>> {
        if let Some(entry) = self.directory.get(number as usize) {
            // Fails if the table exists or another thread was first; both are fine.
            let _ = entry.compare_exchange(0, NEW, Ordering::AcqRel, Ordering::Acquire);
        }
        self.held(number)
    }

    /// Returns the number of consecutive absent tables from `number` on, up to `end`.
    pub(crate) fn absent(&self, number: u64, end: u64) -> u64 {
        let range = self.directory.get(number as usize..end as usize).unwrap_or_default();
        range
            .iter()
            .take_while(|entry| entry.load(Ordering::Acquire) == 0)
            .count() as u64
    }

    /// Returns true if a grain may lie in a hole of the file, wholly or in part.
    pub(crate) fn has_holes(&self) -> bool {
        self.holes.load(Ordering::Relaxed)
    }

    /// Notes that space of a grain was discarded.
    pub(in crate::vmdk) fn note_hole(&self) {
        // Relaxed is enough: a reader that misses the flag for a moment reports zeroes as data, which is never wrong.
        self.holes.store(true, Ordering::Relaxed);
        *self.data() = 0..0;
    }

    /// Returns the number of bytes from byte `at` of the file on that are known to be stored.
    pub(crate) fn data_known_from(&self, at: u64) -> Option<u64> {
        let data = self.data();
        data.contains(&at).then(|| data.end - at)
    }

    /// Notes the answer of the store for byte `at`: true if it is stored, and for how many bytes the answer holds.
    pub(crate) fn note_data(&self, at: u64, (stored, bytes): (bool, u64)) {
        if stored {
            *self.data() = at..at.saturating_add(bytes);
        }
    }

    fn data(&self) -> MutexGuard<'_, Range<u64>> {
        lock(&self.data)
    }

    fn raw(&self, number: u64) -> u64 {
        self.directory
            .get(number as usize)
            .map_or(0, |entry| entry.load(Ordering::Acquire))
    }

    /// Returns the table, loaded, from memory or from the file.
    fn held(&self, number: u64) -> Result<Arc<WritableTable>> {
        let table = {
            let shard = &self.shards[number as usize % SHARDS];
            let mut tables = lock(shard);
            match tables.get(&number) {
                Some(table) => Arc::clone(table),
                None => {
                    if tables.len() >= self.shard_max {
                        evict_some(&mut tables);
                    }
                    // Inserted before it is loaded: a second thread finds this one and waits for its load. Two copies
                    // of one table would lose each other's entries.
                    let table = Arc::new(WritableTable {
                        number,
                        loaded: OnceLock::new(),
                        loading: Mutex::new(()),
                    });
                    tables.insert(number, Arc::clone(&table));
                    table
                }
            }
        };
        if table.loaded.get().is_none() {
            let _loading = lock(&table.loading);
            // After an error the table stays in the map without entries, and the next thread retries the load.
            if table.loaded.get().is_none() {
                let _ = table.loaded.set(Arc::new(self.load_one(number)?));
            }
        }
        Ok(table)
    }

    fn load_one(&self, number: u64) -> Result<Table> {
        let first = number * self.geometry.entries_per_table;
        let grains = self.geometry.capacity.div_ceil(self.geometry.grain);
        let len = grains.saturating_sub(first).min(self.geometry.entries_per_table) as usize;
        match self.places(number) {
            Some(places) => Ok(self
                .layout
                .load_table(number, places.primary.into())?
                .into_writable(len)),
            None => Ok(Table::narrow(std::iter::empty()).into_writable(len)),
        }
    }
}

/// Evicts about half of the tables that only the map holds.
///
/// The caller holds the lock of the shard, and tables are only handed out under it. So a count of one can't increase
/// here. A count above one may be a reader, a thread that changes entries, or pending updates.
fn evict_some(tables: &mut HashMap<u64, Arc<WritableTable>>) {
    let mut keep = false;
    tables.retain(|_, table| {
        if Arc::strong_count(table) > 1 {
            return true;
        }
        keep = !keep;
        keep
    });
}

fn packed(places: TableCopies) -> u64 {
    u64::from(places.redundant) << 32 | u64::from(places.primary)
}
