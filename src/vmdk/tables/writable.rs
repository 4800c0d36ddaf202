//! The directory and tables of an extent that is written to.
//!
//! ```text
//!   sector ─► directory[table] ─ 0 ───────► no table: all unallocated
//!                │ a place, or NEW (a table that is only in memory yet)
//!                ▼
//!             shard (a mutex, a map) ─► LiveTable ─► entries, atomic
//! ```
//! What is in memory here is the truth; the file follows at the next flush. So a table must not be read from the file
//! a second time while an entry of it is not written yet: whoever changes entries holds the [`WritableTable`], what waits
//! to be written holds it too, and only a table that nobody holds is dropped to keep memory bounded.

use std::collections::HashMap;
use std::ops::Range;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

use crate::error::Result;
use crate::vmdk::tables::hosted::{Copy, HostedTables};
use crate::vmdk::tables::{CHUNK, Layout, Table, TableGeometry};

/// Bytes of tables kept in memory beside those that wait to be written.
const KEPT_BYTES: u64 = 16 << 20;

/// Locks that the tables are spread over.
const SHARDS: usize = 16;

/// A directory entry of a table that is not in the file yet.
const NEW: u64 = u64::MAX;

/// Where both copies of a table lie in the file.
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
    /// Held while it is read from the file, by the first who needs it; the others need it as well.
    loading: Mutex<()>,
}

impl WritableTable {
    /// Its entries; they were loaded when it was handed out.
    pub(in crate::vmdk) fn entries(&self) -> Option<&Arc<Table>> {
        self.loaded.get()
    }
}

type Shard = Mutex<HashMap<u64, Arc<WritableTable>>>;

/// Directory and tables of one hosted sparse extent, changing.
#[derive(Debug)]
pub(crate) struct WritableTables {
    layout: Arc<HostedTables>,
    geometry: TableGeometry,
    /// For each table its [`TableCopies`], the primary one in the lower half; 0 where there is none; [`NEW`].
    directory: Box<[AtomicU64]>,
    shards: [Shard; SHARDS],
    /// Tables of a shard from which on it drops some.
    shard_max: usize,
    /// Grains may lie in holes of the file.
    holes: AtomicBool,
    /// Bytes of the file that were found to be stored, not holes. The store is not asked for each grain, as its answer may
    /// cost a walk to the end of the file. Only what makes holes has to correct this; a hole that is not known of is data
    /// that is zeroes, which is never wrong.
    data: Mutex<Range<u64>>,
}

impl WritableTables {
    /// The tables of an extent whose directories were found to be sound: 8 bytes of memory for each table there
    /// could be. `holes`: the file has some.
    pub(in crate::vmdk) fn load(layout: Arc<HostedTables>, holes: bool) -> Result<Self> {
        let geometry = layout.geometry();
        let tables = geometry.tables();
        let mut directory = Vec::with_capacity(tables as usize);
        for first in (0..tables).step_by(CHUNK as usize) {
            let range = first..tables.min(first + CHUNK);
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
            shard_max: (KEPT_BYTES / table_bytes).max(64) as usize / SHARDS,
            layout,
        })
    }

    /// Where table `number` lies; `None`: nowhere in the file (yet).
    pub(in crate::vmdk) fn places(&self, number: u64) -> Option<TableCopies> {
        match self.raw(number) {
            0 | NEW => None,
            raw => Some(TableCopies {
                primary: raw as u32,
                redundant: (raw >> 32) as u32,
            }),
        }
    }

    /// Notes where a table that was new is in the file.
    pub(in crate::vmdk) fn settle(&self, number: u64, places: TableCopies) {
        if let Some(entry) = self.directory.get(number as usize) {
            entry.store(packed(places), Ordering::Release);
        }
    }

    /// Table `number` for reading; `None` where there is none.
    pub(crate) fn table(&self, number: u64) -> Result<Option<Arc<Table>>> {
        match self.raw(number) {
            0 => Ok(None),
            _ => Ok(self.held(number)?.loaded.get().cloned()),
        }
    }

    /// Table `number` for changing. Where there is none it begins to exist, with nothing allocated.
    pub(in crate::vmdk) fn table_for_writing(&self, number: u64) -> Result<Arc<WritableTable>> {
        if let Some(entry) = self.directory.get(number as usize) {
            let _ = entry.compare_exchange(0, NEW, Ordering::AcqRel, Ordering::Acquire);
        }
        self.held(number)
    }

    /// How many tables from `number` on, below `end`, do not exist.
    pub(crate) fn absent(&self, number: u64, end: u64) -> u64 {
        let range = self.directory.get(number as usize..end as usize).unwrap_or_default();
        range
            .iter()
            .take_while(|entry| entry.load(Ordering::Acquire) == 0)
            .count() as u64
    }

    /// Whether a grain may lie in a hole of the file, wholly or in part.
    pub(crate) fn has_holes(&self) -> bool {
        self.holes.load(Ordering::Relaxed)
    }

    /// Notes that room of a grain was given back.
    pub(in crate::vmdk) fn note_hole(&self) {
        self.holes.store(true, Ordering::Relaxed);
        *self.data() = 0..0;
    }

    /// How many bytes from `at` of the file on are known to be stored.
    pub(crate) fn data_known_from(&self, at: u64) -> Option<u64> {
        let data = self.data();
        data.contains(&at).then(|| data.end - at)
    }

    /// Notes what the store said of byte `at`: whether it is stored, and for how many bytes on that holds.
    pub(crate) fn note_data(&self, at: u64, (stored, bytes): (bool, u64)) {
        if stored {
            *self.data() = at..at.saturating_add(bytes);
        }
    }

    fn data(&self) -> MutexGuard<'_, Range<u64>> {
        self.data.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn raw(&self, number: u64) -> u64 {
        self.directory
            .get(number as usize)
            .map_or(0, |entry| entry.load(Ordering::Acquire))
    }

    /// The table, loaded.
    fn held(&self, number: u64) -> Result<Arc<WritableTable>> {
        let live = {
            let shard = &self.shards[number as usize % SHARDS];
            let mut tables = shard.lock().unwrap_or_else(PoisonError::into_inner);
            match tables.get(&number) {
                Some(live) => Arc::clone(live),
                None => {
                    if tables.len() >= self.shard_max {
                        drop_some(&mut tables);
                    }
                    let live = Arc::new(WritableTable {
                        number,
                        loaded: OnceLock::new(),
                        loading: Mutex::new(()),
                    });
                    tables.insert(number, Arc::clone(&live));
                    live
                }
            }
        };
        if live.loaded.get().is_none() {
            let _loading = live.loading.lock().unwrap_or_else(PoisonError::into_inner);
            if live.loaded.get().is_none() {
                let _ = live.loaded.set(Arc::new(self.load_one(number)?));
            }
        }
        Ok(live)
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

/// Drops about half of the tables that nobody holds. Under the lock of the shard nobody can begin to hold one.
fn drop_some(tables: &mut HashMap<u64, Arc<WritableTable>>) {
    let mut spare = false;
    tables.retain(|_, live| {
        if Arc::strong_count(live) > 1 {
            return true;
        }
        spare = !spare;
        spare
    });
}

fn packed(places: TableCopies) -> u64 {
    u64::from(places.redundant) << 32 | u64::from(places.primary)
}
