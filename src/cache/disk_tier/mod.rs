//! Disk tier: keeps fetched blocks of files on servers in a folder, across mounts (`cache-dir=`).
//!
//! ```text
//!   DIR/                       0700, of this user
//!     lock                     locked while files are created and evicted
//!     SHA256-OF-ADDRESS.map    key (address, length, ETag, Last-Modified), then a checksum for each block (format.rs)
//!     SHA256-OF-ADDRESS.data   the blocks, at their places in a sparse file of the full length (file.rs)
//!
//!   AdaptiveBlocks ─► TieredFetch ─ has the block ─► data file
//!                        └ no ─► lock of its entry ─► server ─► data file, entry
//! ```
//! A file whose ETag or Last-Modified has changed is made anew. A file without either is not kept: a change could not be
//! noticed. Nothing in the folder is trusted: each block is compared with its checksum, which is bound to its place.

use std::ffi::OsString;
use std::fmt;
use std::fs::File;
use std::io::{self, ErrorKind as IoKind};
use std::ops::Range;
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{DirBuilderExt, FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use rustix::fs::{AtFlags, Mode, OFlags, openat, renameat, unlinkat};

use super::Fetch;
use crate::error::{Error, ErrorKind, Result};

mod file;
mod format;
mod lock;
#[cfg(test)]
mod tests;

use file::Files;
pub use file::TierFile;
use format::{ENTRY, HEADER, decode_header, encode_header};
pub use format::{FileKey, address_hash};
use lock::{Lock, LockMode};

/// Permissions of group and others, which the folder must not have.
const OTHERS: u32 = 0o077;
/// Longest wait for the folder's lock, which is held for a few system calls.
const LOCK_WAIT: Duration = Duration::from_secs(10);
const LOCK_PAUSE: Duration = Duration::from_millis(2);

/// Folder of cached files.
pub struct DiskTier {
    path: PathBuf,
    dir: OwnedFd,
    /// Largest size of all files together, in bytes.
    limit: Option<u64>,
    boot: u64,
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
        write!(f, "DiskTier({})", self.path.display())
    }
}

impl DiskTier {
    /// Opens a folder, and creates it if `create` is true and it does not exist.
    ///
    /// Errors: it is no folder of this user, others may use it, or the error of the operating system.
    pub fn open(path: &Path, limit: Option<u64>, create: bool) -> Result<Arc<Self>> {
        let label = format!("cache-dir={}", path.display());
        let failed = |e: io::Error| Error::io(label.clone(), e);
        let created = match create {
            true => std::fs::DirBuilder::new().mode(0o700).create(path),
            false => Ok(()),
        };
        match created {
            Err(e) if e.kind() != IoKind::AlreadyExists => return Err(failed(e)),
            _ => {}
        }
        let flags = OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC | OFlags::RDONLY;
        let dir = rustix::fs::open(path, flags, Mode::empty()).map_err(|e| failed(e.into()))?;
        let dir = File::from(dir);
        let state = dir.metadata().map_err(failed)?;
        let refuse = |why: &str| Err(Error::new(ErrorKind::Policy, format!("{label}: {why}")));
        if state.uid() != nix::unistd::geteuid().as_raw() {
            return refuse("belongs to another user; choose a folder of your own");
        }
        if state.mode() & OTHERS != 0 {
            return refuse("others may use it; run chmod 700 on it");
        }
        Ok(Arc::new(Self {
            path: path.to_owned(),
            dir: dir.into(),
            limit,
            boot: boot_identity(),
        }))
    }

    /// Returns the key that the folder has for an address ([`address_hash`]).
    pub fn lookup(&self, address: &str) -> Option<FileKey> {
        let stem = address.get(..32)?;
        let map = self.open_own(&format!("{stem}.map"), OFlags::RDONLY).ok()?;
        read_key(&map).filter(|key| key.address == address)
    }

    /// Opens the blocks of a file, and creates them if the folder has none for this version of the file.
    ///
    /// Errors: why the file cannot be kept.
    pub fn file(self: &Arc<Self>, key: FileKey) -> Result<TierFile> {
        let label = || format!("cache-dir={}", self.path.display());
        if key.etag.is_none() && key.modified.is_none() {
            return Err(Error::unsupported(format!(
                "{}: is not kept on disk: the server sends neither ETag nor Last-Modified, so a change would not show",
                key.label
            )));
        }
        let within = |e: io::Error| Error::io(label(), e);
        let lock = self.lock().map_err(within)?;
        let files = match self.open_files(&key).map_err(within)? {
            Some(files) => files,
            None => self.create_files(&key).map_err(within)?,
        };
        drop(lock);
        self.keep_within_limit();
        Ok(TierFile::new(key, files, self.boot))
    }

    /// Opens the files of a key. Returns `None` if there are none, or if they are of another version or no cached files.
    fn open_files(self: &Arc<Self>, key: &FileKey) -> io::Result<Option<Files>> {
        let stem = key.stem();
        let open = |ending: &str| self.open_own(&format!("{stem}.{ending}"), OFlags::RDWR);
        let (Ok(map), Ok(data)) = (open("map"), open("data")) else {
            return Ok(None);
        };
        if read_key(&map).as_ref() != Some(key) || data.metadata()?.len() != key.len {
            return Ok(None);
        }
        // The time of the last use, for the eviction.
        map.set_modified(SystemTime::now())?;
        self.files(data, map).map(Some)
    }

    /// Creates empty files for a key, in place of those that have its names.
    fn create_files(self: &Arc<Self>, key: &FileKey) -> io::Result<Files> {
        let header = encode_header(key).ok_or_else(|| io::Error::other("the address is too long"))?;
        let stem = key.stem();
        let names = [format!("{stem}.map"), format!("{stem}.data"), format!("{stem}.new")];
        for name in &names {
            self.remove(name)?;
        }
        let create = |name: &str| {
            let flags = OFlags::RDWR | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
            let file = openat(&self.dir, name, flags, Mode::RUSR | Mode::WUSR)?;
            Ok::<_, io::Error>(File::from(file))
        };
        let [map_name, data_name, new_name] = &names;
        let data = create(data_name)?;
        data.set_len(key.len)?;
        let map = create(new_name)?;
        map.write_all_at(&header, 0)?;
        map.set_len(HEADER + key.blocks() * ENTRY)?;
        // The map has its name only once it is whole.
        renameat(&self.dir, new_name, &self.dir, map_name)?;
        self.files(data, map)
    }

    fn files(self: &Arc<Self>, data: File, map: File) -> io::Result<Files> {
        let map = Arc::new(map);
        let in_use = Lock::take(&map, 0..1, LockMode::Shared)?;
        Ok(Files {
            tier: Arc::clone(self),
            data: Arc::new(data),
            map,
            // The folder's lock is held, so no other process evicts the file.
            _in_use: in_use.ok_or_else(|| io::Error::other("the file is being evicted"))?,
        })
    }

    /// Opens a file of the folder. Errors: it does not exist, or is not a regular file of this user with one name.
    fn open_own(&self, name: &str, access: OFlags) -> io::Result<File> {
        let flags = access | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
        let file = File::from(openat(&self.dir, name, flags, Mode::empty())?);
        let state = file.metadata()?;
        let is_own = state.is_file() && state.uid() == nix::unistd::geteuid().as_raw() && state.nlink() == 1;
        match is_own {
            true => Ok(file),
            false => Err(io::Error::other("is not a file of this cache")),
        }
    }

    fn remove(&self, name: &str) -> io::Result<()> {
        match unlinkat(&self.dir, name, AtFlags::empty()) {
            Ok(()) | Err(rustix::io::Errno::NOENT) => Ok(()),
            Err(e) => Err(e.into()),
        }
    }

    /// Locks the folder against the creation and eviction of files by other processes.
    fn lock(&self) -> io::Result<Lock> {
        let flags = OFlags::RDWR | OFlags::CREATE | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let file = Arc::new(File::from(openat(&self.dir, "lock", flags, Mode::RUSR | Mode::WUSR)?));
        let end = Instant::now() + LOCK_WAIT;
        loop {
            if let Some(lock) = Lock::take(&file, 0..1, LockMode::Exclusive)? {
                return Ok(lock);
            }
            if Instant::now() > end {
                return Err(IoKind::TimedOut.into());
            }
            std::thread::sleep(LOCK_PAUSE);
        }
    }

    /// Returns the names of the maps, without their endings.
    fn stems(&self) -> io::Result<Vec<String>> {
        let mut stems = Vec::new();
        for entry in rustix::fs::Dir::read_from(&self.dir)? {
            let name = OsString::from(std::ffi::OsStr::from_bytes(entry?.file_name().to_bytes()));
            let stem = name.to_str().and_then(|name| name.strip_suffix(".map"));
            stems.extend(stem.map(str::to_owned));
        }
        Ok(stems)
    }

    /// Returns the files that the folder holds, the least recently used first.
    pub fn held(self: &Arc<Self>) -> Vec<HeldFile> {
        let mut held: Vec<HeldFile> = self.all().into_iter().map(|(_, held)| held).collect();
        held.sort_by_key(|file| file.used);
        held
    }

    /// Opens a file that the folder holds, to verify it.
    ///
    /// Errors: it was evicted meanwhile.
    pub fn reopen(self: &Arc<Self>, held: &HeldFile) -> Result<TierFile> {
        let _lock = self.lock().map_err(|e| Error::io(held.key.label.clone(), e))?;
        let files = self
            .open_files(&held.key)
            .map_err(|e| Error::io(held.key.label.clone(), e))?;
        let gone = || Error::new(ErrorKind::NotFound, format!("{}: is no longer there", held.key.label));
        Ok(TierFile::new(held.key.clone(), files.ok_or_else(gone)?, self.boot))
    }

    fn all(self: &Arc<Self>) -> Vec<(Arc<File>, HeldFile)> {
        let stems = self.stems().unwrap_or_default();
        let held = stems.iter().filter_map(|stem| {
            let open = |ending: &str| self.open_own(&format!("{stem}.{ending}"), OFlags::RDWR).ok();
            let (map, data) = (open("map")?, open("data")?);
            let key = read_key(&map).filter(|key| key.stem() == stem)?;
            let (of_map, of_data) = (map.metadata().ok()?, data.metadata().ok()?);
            let held = HeldFile {
                allocated: (of_map.blocks() + of_data.blocks()) * 512,
                used: of_map.modified().ok()?,
                complete: file::is_complete(&map, &data),
                key,
            };
            Some((Arc::new(map), held))
        });
        held.collect()
    }

    /// Evicts the files that were not used for the longest time, until the folder is within its limit. Returns false if
    /// what is left is in use and still too large.
    pub(super) fn keep_within_limit(self: &Arc<Self>) -> bool {
        let Some(limit) = self.limit else { return true };
        let Ok(_lock) = self.lock() else { return true };
        let mut all = self.all();
        all.sort_by_key(|(_, held)| held.used);
        let mut size: u64 = all.iter().map(|(_, held)| held.allocated).sum();
        for (map, held) in all {
            if size <= limit {
                return true;
            }
            // Another open of the same file in this process is another owner, too.
            if let Ok(Some(_unused)) = Lock::take(&map, 0..1, LockMode::Exclusive) {
                let names = [format!("{}.map", held.key.stem()), format!("{}.data", held.key.stem())];
                if names.iter().all(|name| self.remove(name).is_ok()) {
                    tracing::debug!("{}: evicted {}", self.path.display(), held.key.label);
                    size = size.saturating_sub(held.allocated);
                }
            }
        }
        size <= limit
    }
}

fn read_key(map: &File) -> Option<FileKey> {
    let mut header = vec![0; HEADER as usize];
    map.read_exact_at(&mut header, 0).ok()?;
    decode_header(&header)
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
}

impl TieredFetch {
    /// Puts the blocks of `file` before `origin`, whose blocks must have the same size.
    pub fn new(origin: Arc<dyn Fetch>, file: Arc<TierFile>) -> Self {
        Self { origin, file }
    }

    /// Fetches blocks that the folder does not have.
    fn fetch_missing(&self, blocks: Range<u64>, each: &mut (dyn FnMut(Vec<u8>) + Send)) -> Result<()> {
        let mut number = blocks.start;
        self.origin.fetch(blocks, &mut |data| {
            self.file.write(number, &data);
            number += 1;
            each(data);
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

    fn deadline(&self) -> Duration {
        // The fetch of another process may take its time before this one begins its own.
        self.origin.deadline() * 2
    }

    fn is_zero(&self, range: Range<u64>) -> bool {
        self.origin.is_zero(range)
    }

    fn fetch(&self, blocks: Range<u64>, each: &mut (dyn FnMut(Vec<u8>) + Send)) -> Result<()> {
        let (mut at, mut waited_for) = (blocks.start, None);
        while at < blocks.end {
            if let Some(data) = self.file.read(at) {
                each(data);
                at += 1;
                continue;
            }
            let missing = (at..blocks.end).take_while(|number| !self.file.has(*number)).count() as u64;
            let end = at + missing.max(1);
            let lock = self.file.lock(at..end, self.origin.deadline());
            // Another process may have fetched some of them while this one waited, or just before.
            // Looked for once: a damaged entry that cannot be removed does not go away.
            if self.file.has(at) && waited_for.replace(at) != Some(at) {
                continue;
            }
            let end = (at + 1..end).find(|number| self.file.has(*number)).unwrap_or(end);
            self.fetch_missing(at..end, each)?;
            drop(lock);
            at = end;
        }
        Ok(())
    }

    fn close(&self) {
        self.origin.close();
    }
}
