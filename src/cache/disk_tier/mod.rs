//! Disk tier: keeps fetched blocks of files on servers in a folder, across mounts (`cache-dir=`).
//!
//! ```text
//!   DIR/                       0700, of this user
//!     lock                     locked while files are created and evicted
//!     SHA256-OF-ADDRESS.map    key (address, length, ETag, Last-Modified), then a checksum for each block (format.rs)
//!     SHA256-OF-ADDRESS.data   the blocks, at their places in a sparse file of the full length (file.rs)
//!                              folder.rs opens, lists and evicts the two; flusher.rs makes their blocks durable
//!
//!   AdaptiveBlocks ─► TieredFetch ─ has the block ─► data file
//!                        └ no ─► lock of its entry ─► server ─► data file, entry
//! ```
//! A file whose ETag or Last-Modified has changed is made anew. A file without either is not kept: a change could not be
//! noticed. Nothing in the folder is trusted: each block is compared with its checksum, which is bound to its place.

use std::fmt;
use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant, SystemTime};

use rustix::fs::OFlags;
use rustix::io::Errno;

use super::{Block, Fetch};
use crate::error::{Error, ErrorKind, Result};

mod checked;
mod completion;
mod entries;
mod file;
mod flusher;
mod folder;
mod format;
mod lock;
mod run_writer;
mod storage;
#[cfg(test)]
mod tests;

use file::Files;
pub use file::TierFile;
use flusher::FlushQueue;
pub use folder::Evicted;
use folder::{Folder, LOCK_WAIT, PairState, read_key, restore_lengths};
use format::{ENTRY, HEADER, MAX_BLOCKS, encode_header};
pub use format::{FileKey, address_hash};
use lock::{Lock, LockMode};
use run_writer::RunWriter;

/// Longest wait of a fetch for another process that fetches the same blocks. Afterwards they are fetched twice.
const SHARED_WAIT: Duration = Duration::from_secs(5);

/// Folder of cached files, and the thread that flushes them.
pub struct DiskTier {
    folder: Arc<Folder>,
    flusher: Arc<FlushQueue<TierFile>>,
    boot: u64,
}

/// A file in the folder that keeps the blocks of a disk, with the folder, which flushes them as long as it is open.
#[derive(Debug, Clone)]
pub struct KeptFile {
    /// The folder.
    pub tier: Arc<DiskTier>,
    /// The file.
    pub file: Arc<TierFile>,
}

/// A file that the folder holds.
#[derive(Debug, Clone)]
pub struct HeldFile {
    /// Its key.
    pub key: FileKey,
    /// Bytes on the disk.
    pub allocated: u64,
    /// Last use.
    pub used: SystemTime,
    /// True if all blocks are there.
    pub complete: bool,
}

impl fmt::Debug for DiskTier {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "DiskTier({})", self.folder.label())
    }
}

impl Drop for DiskTier {
    fn drop(&mut self) {
        self.flusher.close();
    }
}

impl DiskTier {
    /// Opens a folder, and creates it if `create` is true and it does not exist. `limit` is its largest size in bytes.
    ///
    /// Errors: it is no folder of this user, others may use it, or the error of the operating system.
    pub fn open(path: &Path, limit: Option<u64>, create: bool) -> Result<Arc<Self>> {
        Ok(Arc::new(Self {
            folder: Arc::new(Folder::open(path, limit, create)?),
            flusher: Arc::default(),
            boot: boot_identity(),
        }))
    }

    /// Returns the key that the folder has for an address ([`address_hash`]).
    pub fn lookup(&self, address: &str) -> Option<FileKey> {
        let stem = address.get(..folder::STEM)?;
        let map = self.folder.open_own(&format!("{stem}.map"), OFlags::RDONLY).ok()??;
        read_key(&map).filter(|key| key.address == address)
    }

    /// Opens the blocks of a file, and creates them if the folder has none for this version of the file.
    ///
    /// Errors: why the file cannot be kept.
    pub fn file(&self, key: FileKey) -> Result<Arc<TierFile>> {
        let refused = |why: &str| Err(Error::unsupported(format!("{}: is not kept on disk: {why}", key.label)));
        if key.etag.is_none() && key.modified.is_none() {
            return refused("the server sends neither ETag nor Last-Modified, so a change would not show");
        }
        if key.blocks() > MAX_BLOCKS {
            return refused("it is too large");
        }
        let within = |e: io::Error| Error::io(self.folder.label(), e);
        let is_read_only = self.folder.is_read_only();
        let lock = self.lock().map_err(within)?;
        let files = match self.open_files(&key, true).map_err(within)? {
            Some(files) => files,
            None if is_read_only => return Err(within(Errno::ROFS.into())),
            None => self.create_files(&key).map_err(within)?,
        };
        drop(lock);
        if self.folder.limit().is_some() && !is_read_only {
            // Best effort: the flushes try again.
            let _ = self.folder.evict(LOCK_WAIT);
        }
        let file = TierFile::new(key, files, self.boot, Some(&self.flusher));
        if is_read_only {
            file.give_up(&Errno::ROFS.into());
        } else if file.complete().is_none() {
            // All blocks may be there, in a copied folder or after a damage: the thread verifies them.
            file.schedule(Duration::ZERO, false);
        }
        Ok(file)
    }

    /// Locks the folder. Returns `None` if it is read-only.
    fn lock(&self) -> io::Result<Option<Lock>> {
        match self.folder.is_read_only() {
            true => Ok(None),
            false => self.folder.lock(LOCK_WAIT).map(Some),
        }
    }

    /// Opens the files of a key. Returns `None` if there are none, or if they are of another version or no cached files.
    /// `use_now`: this is a use, for the eviction.
    fn open_files(&self, key: &FileKey, use_now: bool) -> io::Result<Option<Files>> {
        let stem = key.stem();
        let is_read_only = self.folder.is_read_only();
        let access = if is_read_only { OFlags::RDONLY } else { OFlags::RDWR };
        let open = |ending: &str| self.folder.open_own(&format!("{stem}.{ending}"), access);
        let (Some(map), Some(data)) = (open("map")?, open("data")?) else {
            return Ok(None);
        };
        if read_key(&map).as_ref() != Some(key) || !restore_lengths(key, &map, &data) {
            return Ok(None);
        }
        if use_now && !is_read_only {
            map.set_modified(SystemTime::now())?;
        }
        self.files(data, map).map(Some)
    }

    /// Creates empty files for a key, in place of those that have its names.
    fn create_files(&self, key: &FileKey) -> io::Result<Files> {
        let header = encode_header(key).ok_or_else(|| io::Error::other("the address is too long"))?;
        let stem = key.stem();
        self.folder.remove_all(stem)?;
        let data = self.folder.create(&format!("{stem}.data"))?;
        data.set_len(key.len)?;
        let new_name = format!("{stem}.new");
        let map = self.folder.create(&new_name)?;
        map.write_all_at(&header, 0)?;
        map.set_len(HEADER + key.blocks() * ENTRY)?;
        // The map has its name only once it is whole.
        self.folder.rename(&new_name, &format!("{stem}.map"))?;
        self.files(data, map)
    }

    fn files(&self, data: File, map: File) -> io::Result<Files> {
        let map = Arc::new(map);
        let in_use = Lock::take(&map, 0..1, LockMode::Shared)?;
        Ok(Files {
            folder: Arc::clone(&self.folder),
            data: Arc::new(data),
            map,
            // The folder's lock is held, so no other process evicts the file.
            _in_use: in_use.ok_or_else(|| io::Error::other("the file is being evicted"))?,
        })
    }

    /// Returns the files that the folder holds, the least recently used first.
    ///
    /// Errors: the folder, or a file of it, cannot be opened.
    pub fn held(&self) -> Result<Vec<HeldFile>> {
        let usable = |pair: folder::Pair| {
            let PairState { key, used, complete } = pair.state?;
            Some(HeldFile {
                key,
                allocated: pair.allocated,
                used,
                complete,
            })
        };
        let pairs = self.folder.pairs().map_err(|e| Error::io(self.folder.label(), e))?;
        let mut held: Vec<HeldFile> = pairs.into_iter().filter_map(usable).collect();
        held.sort_by_key(|file| file.used);
        Ok(held)
    }

    /// Opens a file that the folder holds, to verify it. That is no use of it.
    ///
    /// Errors: it was evicted meanwhile.
    pub fn reopen(&self, held: &HeldFile) -> Result<Arc<TierFile>> {
        let within = |e: io::Error| Error::io(held.key.label.clone(), e);
        let _lock = self.lock().map_err(within)?;
        let files = self.open_files(&held.key, false).map_err(within)?;
        let gone = || Error::new(ErrorKind::NotFound, format!("{}: is no longer there", held.key.label));
        Ok(TierFile::new(
            held.key.clone(),
            files.ok_or_else(gone)?,
            self.boot,
            None,
        ))
    }

    /// Removes what is of no use, and, if the folder has a limit, the files that were not used for the longest time.
    ///
    /// Errors: another process holds the folder's lock, or the folder cannot be read.
    pub fn evict(&self) -> Result<Evicted> {
        if self.folder.is_read_only() && self.folder.limit().is_none() {
            return Ok(Evicted::default());
        }
        let evicted = self.folder.evict(LOCK_WAIT);
        evicted.map_err(|e| Error::io(self.folder.label(), e))
    }
}

/// Returns a number that changes with each boot of the machine.
fn boot_identity() -> u64 {
    let text = std::fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default();
    let hash = address_hash(text.trim());
    // Never 0, the salt of durable entries.
    u64::from_str_radix(hash.get(..16).unwrap_or_default(), 16).unwrap_or(1) | 1
}

/// Origin of blocks that keeps what it fetches in the folder.
#[derive(Debug)]
pub struct TieredFetch {
    origin: Arc<dyn Fetch>,
    file: Arc<TierFile>,
    /// Longest time that a fetch waits for other processes: a part of what it may take itself.
    shared_wait: Duration,
    /// True once no reader is left: ends a wait for another process.
    closing: AtomicBool,
}

impl TieredFetch {
    /// Puts the blocks of `file` before `origin`, whose blocks must have the same size.
    pub fn new(origin: Arc<dyn Fetch>, file: Arc<TierFile>) -> Self {
        Self {
            shared_wait: SHARED_WAIT.min(origin.deadline() / 4),
            origin,
            file,
            closing: AtomicBool::new(false),
        }
    }

    /// Fetches blocks that the folder does not have.
    fn fetch_missing(&self, blocks: Range<u64>, each: &mut (dyn FnMut(Block) + Send)) -> Result<()> {
        let mut writer = RunWriter::new(&self.file, blocks.clone());
        self.origin.fetch(blocks, &mut |data| {
            // The readers of all but the last block need not wait for the disk. Those of the last one find all of them kept.
            if writer.is_at_last() {
                writer.push(&data);
                each(data);
            } else {
                each(Arc::clone(&data));
                writer.push(&data);
            }
        })
    }
}

impl Fetch for TieredFetch {
    fn len(&self) -> u64 {
        self.origin.len()
    }

    fn block(&self) -> u64 {
        self.origin.block()
    }

    fn max_run(&self) -> u64 {
        self.origin.max_run()
    }

    fn max_run_ahead(&self) -> u64 {
        self.origin.max_run_ahead()
    }

    fn deadline(&self) -> Duration {
        self.origin.deadline() + self.shared_wait
    }

    fn is_zero(&self, range: Range<u64>) -> bool {
        self.origin.is_zero(range)
    }

    fn fetch(&self, blocks: Range<u64>, each: &mut (dyn FnMut(Block) + Send)) -> Result<()> {
        // One deadline for all blocks: another process that hangs is waited for once.
        let wait_end = Instant::now() + self.shared_wait;
        let (mut at, mut waited_for) = (blocks.start, None);
        while at < blocks.end {
            if let Some(data) = self.file.read(at) {
                each(Block::new(data));
                at += 1;
                continue;
            }
            let missing = at..at + self.file.missing(at..blocks.end).max(1);
            let lock = self.file.lock(missing.clone(), wait_end, &self.closing)?;
            // Another process may have fetched some of them while this one waited, or just before.
            let missing = at..at + self.file.missing(missing);
            // Looked for once: a damaged entry that cannot be removed does not go away.
            if missing.is_empty() && waited_for.replace(at) != Some(at) {
                continue;
            }
            let end = missing.end.max(at + 1);
            self.fetch_missing(at..end, each)?;
            drop(lock);
            at = end;
        }
        Ok(())
    }

    fn close(&self) {
        self.closing.store(true, Ordering::Relaxed);
        self.origin.close();
    }
}
