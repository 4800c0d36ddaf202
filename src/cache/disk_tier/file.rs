//! Blocks of one file in the folder: a sparse data file and its map.
//!
//! ```text
//!   write:  data ─► entry "in this boot" ─► (later, for many blocks) sync of the data ─► entry "durable"
//!   read:   entry ─► data ─► do they match? ─ no ─► entry 0: the block is fetched again
//! ```
//! The entry is written at once, so that other processes find the block, and so that a killed one loses nothing: the
//! kernel has the pages. Only a crash of the machine loses what was not synced, and the entries with it.
//!
//! # Locks
//!
//! OFD locks on the map, which end with the process: byte 0 shared while the file is in use (nothing evicts it), and the
//! bytes of an entry exclusively while a process fetches the block. `pending` is held for a push or a swap only.

use std::fmt;
use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use super::DiskTier;
use super::format::{self, COMPLETION, Durability, ENTRY, FileKey, HEADER};
use super::lock::{Lock, LockMode};

/// Blocks that are written before the data is synced: bounds what a crash of the machine loses, at 64 MiB.
const FLUSH_AFTER: usize = 2048;
/// Pause between two looks at a lock of another process.
const LOCK_PAUSE: Duration = Duration::from_millis(5);

/// Storage of bytes; in tests a simulation that loses what was not synced.
pub(super) trait Bytes: Send + Sync {
    fn read(&self, buf: &mut [u8], at: u64) -> io::Result<()>;
    fn write(&self, buf: &[u8], at: u64) -> io::Result<()>;
    fn sync(&self) -> io::Result<()>;
}

impl Bytes for Arc<File> {
    fn read(&self, buf: &mut [u8], at: u64) -> io::Result<()> {
        self.read_exact_at(buf, at)
    }

    fn write(&self, buf: &[u8], at: u64) -> io::Result<()> {
        self.write_all_at(buf, at)
    }

    fn sync(&self) -> io::Result<()> {
        self.sync_data()
    }
}

/// Blocks of one file.
pub struct TierFile {
    key: FileKey,
    data: Box<dyn Bytes>,
    map: Box<dyn Bytes>,
    /// The files behind `data` and `map`; `None` in a simulation.
    files: Option<Files>,
    boot: u64,
    /// Blocks whose data is not synced yet, with their durable entries.
    pending: Mutex<Vec<(u64, u64)>>,
    /// True if all blocks were verified, and none was damaged since.
    sound: AtomicBool,
    /// Set once a write has failed or the folder is full: nothing more is kept.
    full: AtomicBool,
}

/// Open files of the folder.
pub(super) struct Files {
    pub(super) tier: Arc<DiskTier>,
    pub(super) data: Arc<File>,
    pub(super) map: Arc<File>,
    /// Keeps the file from being evicted.
    pub(super) _in_use: Lock,
}

impl fmt::Debug for TierFile {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("TierFile")
            .field("key", &self.key)
            .finish_non_exhaustive()
    }
}

impl TierFile {
    pub(super) fn new(key: FileKey, files: Files, boot: u64) -> Self {
        let (data, map) = (Box::new(Arc::clone(&files.data)), Box::new(Arc::clone(&files.map)));
        Self::over(key, data, map, Some(files), boot)
    }

    pub(super) fn over(
        key: FileKey,
        data: Box<dyn Bytes>,
        map: Box<dyn Bytes>,
        files: Option<Files>,
        boot: u64,
    ) -> Self {
        Self {
            key,
            data,
            map,
            files,
            boot,
            pending: Mutex::default(),
            sound: AtomicBool::new(false),
            full: AtomicBool::new(false),
        }
    }

    /// Returns the key of the file.
    pub fn key(&self) -> &FileKey {
        &self.key
    }

    /// Returns true if the map has an entry for the block.
    pub fn has(&self, number: u64) -> bool {
        self.entry(number) != 0
    }

    /// Returns a block, if it is there and undamaged. Forgets a damaged one, and that the file is complete.
    pub fn read(&self, number: u64) -> Option<Vec<u8>> {
        let entry = self.entry(number);
        if entry == 0 {
            return None;
        }
        let mut data = vec![0; self.key.block_len(number)];
        let read = self.data.read(&mut data, number * self.key.block);
        if read.is_ok() && format::matches(entry, number, &data, self.boot) {
            return Some(data);
        }
        tracing::info!("{}: a cached block was damaged: fetching it again", self.key.label);
        self.revoke_completion();
        let _ = self.put_entry(number, 0);
        None
    }

    /// Keeps a block. A failure only means that it is not kept.
    pub fn write(&self, number: u64, data: &[u8]) {
        if self.full.load(Ordering::Relaxed) || data.len() != self.key.block_len(number) {
            return;
        }
        let entry = format::entry_of(number, data, Durability::InBoot(self.boot));
        let written = self.data.write(data, number * self.key.block);
        // First the data, then the entry that publishes it.
        if let Err(e) = written.and_then(|()| self.put_entry(number, entry)) {
            return self.give_up(&e);
        }
        let durable = format::entry_of(number, data, Durability::Durable);
        let count = {
            let mut pending = self.pending.lock().unwrap_or_else(PoisonError::into_inner);
            pending.push((number, durable));
            pending.len()
        };
        if count >= FLUSH_AFTER {
            self.flush();
        }
    }

    /// Makes the blocks that were written durable, and keeps the folder within its limit.
    pub fn flush(&self) {
        let mut pending = std::mem::take(&mut *self.pending.lock().unwrap_or_else(PoisonError::into_inner));
        if pending.is_empty() {
            return;
        }
        if let Err(e) = self.data.sync() {
            // The entries stay those of this boot.
            return self.give_up(&e);
        }
        pending.sort_unstable();
        for run in pending.chunk_by(|a, b| a.0 + 1 == b.0) {
            let entries: Vec<u8> = run.iter().flat_map(|(_, entry)| entry.to_le_bytes()).collect();
            let first = run.first().map_or(0, |(number, _)| *number);
            if let Err(e) = self.map.write(&entries, HEADER + first * ENTRY) {
                return self.give_up(&e);
            }
        }
        if let Some(files) = &self.files
            && !files.tier.keep_within_limit()
        {
            self.full.store(true, Ordering::Relaxed);
        }
    }

    fn give_up(&self, error: &io::Error) {
        if !self.full.swap(true, Ordering::Relaxed) {
            tracing::warn!("{}: the disk cache keeps no more blocks: {error}", self.key.label);
        }
    }

    fn entry(&self, number: u64) -> u64 {
        let mut entry = [0; ENTRY as usize];
        match self.map.read(&mut entry, HEADER + number * ENTRY) {
            Ok(()) => u64::from_le_bytes(entry),
            // The map ends with its last entry.
            Err(_) => 0,
        }
    }

    fn put_entry(&self, number: u64, entry: u64) -> io::Result<()> {
        self.map.write(&entry.to_le_bytes(), HEADER + number * ENTRY)
    }

    /// Locks blocks against fetches by other processes. Returns without a lock once the first block has arrived, or at the
    /// deadline.
    pub(super) fn lock(&self, blocks: Range<u64>, deadline: Duration) -> Option<Lock> {
        let files = self.files.as_ref()?;
        let end = Instant::now() + deadline;
        let bytes = HEADER + blocks.start * ENTRY..HEADER + blocks.end * ENTRY;
        loop {
            match Lock::take(&files.map, bytes.clone(), LockMode::Exclusive) {
                Ok(Some(lock)) => return Some(lock),
                Ok(None) if Instant::now() < end && !self.has(blocks.start) => std::thread::sleep(LOCK_PAUSE),
                // A file system without such locks: the block may be fetched twice.
                Ok(None) | Err(_) => return None,
            }
        }
    }

    /// Returns the number of blocks with an entry, and of those that are damaged, which it forgets.
    pub fn verify(&self) -> (u64, u64) {
        let (mut all, mut damaged) = (0, 0);
        self.each_entry(|number, entry| {
            if entry != 0 {
                all += 1;
                damaged += u64::from(self.read(number).is_none());
            }
            true
        });
        self.sound.store(damaged == 0, Ordering::Relaxed);
        (all, damaged)
    }

    /// Calls `each` with number and entry of each block, until it returns false. Returns true if it never did.
    fn each_entry(&self, mut each: impl FnMut(u64, u64) -> bool) -> bool {
        /// Entries of one system call.
        const CHUNK: u64 = 8192;
        let blocks = self.key.blocks();
        (0..blocks).step_by(CHUNK as usize).all(|first| {
            let count = CHUNK.min(blocks - first);
            let mut entries = vec![0; (count * ENTRY) as usize];
            if self.map.read(&mut entries, HEADER + first * ENTRY).is_err() {
                entries.fill(0);
            }
            let (entries, _) = entries.as_chunks();
            (first..)
                .zip(entries)
                .all(|(number, entry)| each(number, u64::from_le_bytes(*entry)))
        })
    }

    /// Notes that all blocks are there and durable, if they are. Their file can then be read without this program.
    fn note_completion(&self) {
        let Some(files) = &self.files else { return };
        if self.complete().is_some() {
            return;
        }
        // Taken first: a write after the checks below changes the times, and the record does not match.
        let Some(record) = completion_of(&files.data) else {
            return;
        };
        if self.each_entry(|_, entry| entry & 1 == 1) && self.may_be_noted() {
            self.put_completion(&record);
        }
    }

    /// Returns true if nothing speaks against the data. Reads all of it where something does: a record that does not match
    /// is that of a copied folder, of a data file that another program wrote to, or of damage.
    fn may_be_noted(&self) -> bool {
        let mut record = [0; RECORD];
        let is_first = self.map.read(&mut record, COMPLETION).is_ok() && record == [0; RECORD];
        is_first || self.sound.load(Ordering::Relaxed) || self.verify().1 == 0
    }

    /// Withdraws the completion record: it would let the damage that was found be read without a look at the checksums.
    fn revoke_completion(&self) {
        self.sound.store(false, Ordering::Relaxed);
        if self.files.is_some() {
            // Not zeroes: what else is damaged must be looked for before the file counts as complete again.
            self.put_completion(&REVOKED);
        }
    }

    fn put_completion(&self, record: &[u8; RECORD]) {
        let noted = self.map.write(record, COMPLETION).and_then(|()| self.map.sync());
        if let Err(e) = noted {
            tracing::debug!("{}: {e}", self.key.label);
        }
    }

    /// Returns the data file if it is complete, and unchanged since that was noted.
    pub fn complete(&self) -> Option<BorrowedFd<'_>> {
        let files = self.files.as_ref()?;
        is_complete(&files.map, &files.data).then(|| files.data.as_fd())
    }
}

impl Drop for TierFile {
    fn drop(&mut self) {
        self.flush();
        self.note_completion();
    }
}

/// Bytes of a completion record.
const RECORD: usize = 48;
/// Completion record of a file in which damage was found. Matches no data file.
const REVOKED: [u8; RECORD] = [0xff; RECORD];

/// Returns true if a data file is complete, and unchanged since its map notes that.
pub(super) fn is_complete(map: &File, data: &File) -> bool {
    let mut record = [0; RECORD];
    let noted = map.read_exact_at(&mut record, COMPLETION);
    noted.is_ok() && completion_of(data) == Some(record)
}

/// Returns the completion record for the present state of a data file: any later write changes its times.
pub(super) fn completion_of(data: &File) -> Option<[u8; RECORD]> {
    let state = data.metadata().ok()?;
    let values = [
        0x7631_6c6c_6120_7364,
        state.ino(),
        state.len(),
        (state.mtime() as u64).wrapping_mul(1_000_000_000) + state.mtime_nsec() as u64,
        (state.ctime() as u64).wrapping_mul(1_000_000_000) + state.ctime_nsec() as u64,
    ];
    let mut record = [0; RECORD];
    for (place, value) in record.chunks_mut(8).zip(values) {
        place.copy_from_slice(&value.to_le_bytes());
    }
    let sum = libdeflater::crc32(record.get(..40)?);
    record.get_mut(40..44)?.copy_from_slice(&sum.to_le_bytes());
    Some(record)
}
