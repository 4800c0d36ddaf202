//! Folder of cached files: its names, its lock, and the eviction.
//!
//! A cached file is a *pair*: map and data. A crash, or a user, may leave one without the other, or a map that is none.
//! Such leftovers are of no use to any mount, so they are evicted first. A pair that a process has open is never evicted:
//! byte 0 of its map is locked.
//!
//! On a read-only file system the files are only read, without the folder's lock: no process of this machine removes them.
//!
//! A file that cannot be opened for want of descriptors or memory is no leftover: such an error ends what was to be done.

use std::ffi::OsStr;
use std::fs::File;
use std::io::{self, ErrorKind as IoKind};
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{DirBuilderExt, FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant, SystemTime};

use rustix::fs::{AtFlags, Mode, OFlags, StatVfsMountFlags, openat, renameat, statat, unlinkat};
use rustix::io::Errno;

use super::completion;
use super::format::{ENTRY, FileKey, HEADER, MAX_BLOCKS, decode_header};
use super::lock::{Lock, LockMode};
use crate::error::{Error, ErrorKind, Result};

/// Permissions of group and others, which the folder must not have.
const OTHERS: u32 = 0o077;
/// Longest wait for the folder's lock, which is held for a few system calls.
pub(super) const LOCK_WAIT: Duration = Duration::from_secs(10);
/// Name of the file that is locked.
const LOCK: &str = "lock";
const LOCK_PAUSE: Duration = Duration::from_millis(2);
/// Time for verifying that the ends of all files of a mount have together: a mount must not read a whole disk before it
/// ends. Two seconds are 20 GB that the kernel has in memory, which is where what was just fetched is.
const END_TIME: Duration = Duration::from_secs(2);
/// Digits of a stem: half a SHA-256.
pub(super) const STEM: usize = 32;
/// Endings of the names of a pair, in the order in which they are removed: a crash in between leaves data without a map,
/// never a map that promises data.
const ENDINGS: [&str; 3] = ["map", "new", "data"];

/// Folder of cached files.
#[derive(Debug)]
pub(super) struct Folder {
    path: PathBuf,
    dir: OwnedFd,
    /// Largest size of all files together, in bytes.
    limit: Option<u64>,
    read_only: bool,
    /// What is left of [`END_TIME`].
    pub(super) end_time: Mutex<Duration>,
}

/// Names of the folder with one stem.
#[derive(Debug)]
pub(super) struct Pair {
    stem: String,
    /// Key, last use and completeness; `None` for a leftover.
    pub(super) state: Option<PairState>,
    /// Bytes on the disk.
    pub(super) allocated: u64,
}

/// State of a pair that a mount can use.
#[derive(Debug)]
pub(super) struct PairState {
    pub(super) key: FileKey,
    pub(super) used: SystemTime,
    pub(super) complete: bool,
}

/// Result of an eviction.
#[derive(Debug, Default)]
pub struct Evicted {
    /// Keys of the files that are gone.
    pub files: Vec<FileKey>,
    /// Number of leftovers that are gone: data without a map, or the reverse.
    pub leftovers: u64,
    /// True if the folder is within its limit now.
    pub within_limit: bool,
    /// Reason why the first of the files that were to be removed is still there.
    pub failure: Option<io::Error>,
}

impl Folder {
    /// Opens a folder, and creates it if `create` is true and it does not exist.
    ///
    /// Errors: it is no folder of this user, others may use it, or the error of the operating system.
    pub(super) fn open(path: &Path, limit: Option<u64>, create: bool) -> Result<Self> {
        let label = format!("cache-dir={}", path.display());
        let failed = |e: io::Error| Error::io(label.clone(), e);
        let created = match create {
            // With this mode from the start: a change after the creation would leave a moment in which others can enter.
            true => std::fs::DirBuilder::new().mode(0o700).create(path),
            false => Ok(()),
        };
        match created {
            Err(e) if e.kind() != IoKind::AlreadyExists => return Err(failed(e)),
            _ => {}
        }
        // All later calls start from this descriptor, so that the folder which was checked here is the one that is used.
        let flags = OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC | OFlags::RDONLY;
        let dir = rustix::fs::open(path, flags, Mode::empty()).map_err(|e| failed(e.into()))?;
        let dir = File::from(dir);
        let state = dir.metadata().map_err(failed)?;
        let refuse = |why: &str| Err(Error::new(ErrorKind::Policy, format!("{label}: {why}")));
        // The owner of a folder can replace what is in it, and would choose the bytes of the disk.
        if state.uid() != nix::unistd::geteuid().as_raw() {
            return refuse("belongs to another user; choose a folder of your own");
        }
        if state.mode() & OTHERS != 0 {
            return refuse("others may use it; run chmod 700 on it");
        }
        let file_system = rustix::fs::fstatvfs(&dir).map_err(|e| failed(e.into()))?;
        Ok(Self {
            path: path.to_owned(),
            dir: dir.into(),
            limit,
            read_only: file_system.f_flag.contains(StatVfsMountFlags::RDONLY),
            end_time: Mutex::new(END_TIME),
        })
    }

    /// Returns the folder as the key that names it, for messages.
    pub(super) fn label(&self) -> String {
        format!("cache-dir={}", self.path.display())
    }

    /// Returns true if the folder was on a read-only file system when it was opened.
    pub(super) fn is_read_only(&self) -> bool {
        self.read_only
    }

    /// Returns the largest size of all files together.
    pub(super) fn limit(&self) -> Option<u64> {
        self.limit
    }

    /// Opens a file of the folder. Returns `None` if there is none, or if it is not a regular file of this user with one
    /// name.
    ///
    /// Errors: those that tell nothing about the file, such as too many open files.
    pub(super) fn open_own(&self, name: &str, access: OFlags) -> io::Result<Option<File>> {
        // NONBLOCK: the open of a FIFO would wait for its other end.
        let flags = access | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
        let file = match openat(&self.dir, name, flags, Mode::empty()) {
            Ok(file) => File::from(file),
            Err(e @ (Errno::MFILE | Errno::NFILE | Errno::NOMEM | Errno::INTR)) => return Err(e.into()),
            Err(_) => return Ok(None),
        };
        let state = file.metadata()?;
        // A second name could be in a folder that others write to, and a link leads out of this one.
        let is_own = state.is_file() && state.uid() == nix::unistd::geteuid().as_raw() && state.nlink() == 1;
        Ok(is_own.then_some(file))
    }

    /// Creates a file. Errors: the name exists, or the error of the operating system.
    pub(super) fn create(&self, name: &str) -> io::Result<File> {
        // EXCL: two processes that create the same file must not both believe that it is new.
        let flags = OFlags::RDWR | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let file = openat(&self.dir, name, flags, Mode::RUSR | Mode::WUSR)?;
        Ok(File::from(file))
    }

    /// Gives a file another name.
    pub(super) fn rename(&self, from: &str, to: &str) -> io::Result<()> {
        Ok(renameat(&self.dir, from, &self.dir, to)?)
    }

    /// Removes all names of a stem. The folder's lock must be held.
    pub(super) fn remove_all(&self, stem: &str) -> io::Result<()> {
        let remove = |ending: &&str| {
            let name = format!("{stem}.{ending}");
            match unlinkat(&self.dir, &name, AtFlags::empty()) {
                Ok(()) | Err(Errno::NOENT) => Ok(()),
                // The name of a folder is none of this program, and what is in it may be dear to the user.
                Err(Errno::ISDIR) => Err(in_the_way(&name)),
                Err(e) => Err(e.into()),
            }
        };
        ENDINGS.iter().try_for_each(remove)
    }

    /// Locks the folder against the creation and eviction of files by other processes, within `wait`.
    pub(super) fn lock(&self, wait: Duration) -> io::Result<Lock> {
        let flags = OFlags::RDWR | OFlags::CREATE | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let file = match openat(&self.dir, LOCK, flags, Mode::RUSR | Mode::WUSR) {
            Ok(file) => Arc::new(File::from(file)),
            Err(Errno::ISDIR | Errno::LOOP | Errno::NXIO) => return Err(in_the_way(LOCK)),
            Err(e) => return Err(e.into()),
        };
        let end = Instant::now() + wait;
        loop {
            if let Some(lock) = Lock::take(&file, 0..1, LockMode::Exclusive)? {
                return Ok(lock);
            }
            if Instant::now() > end {
                return Err(IoKind::TimedOut.into());
            }
            // Polled: a waiting lock of the kernel has no deadline.
            std::thread::sleep(LOCK_PAUSE);
        }
    }

    /// Returns the pairs and leftovers of the folder. Names that this program does not give are left out.
    pub(super) fn pairs(&self) -> io::Result<Vec<Pair>> {
        let mut stems = std::collections::BTreeSet::new();
        for entry in rustix::fs::Dir::read_from(&self.dir)? {
            let entry = entry?;
            let name = OsStr::from_bytes(entry.file_name().to_bytes()).to_str();
            let parts = name.and_then(|name| name.split_once('.'));
            stems.extend(parts.filter(is_ours).map(|(stem, _)| stem.to_owned()));
        }
        stems.into_iter().map(|stem| self.pair(stem)).collect()
    }

    fn pair(&self, stem: String) -> io::Result<Pair> {
        let size = |ending: &&str| {
            let stat = statat(&self.dir, format!("{stem}.{ending}"), AtFlags::SYMLINK_NOFOLLOW);
            // What they take on the disk: data files are as long as the remote file, with holes.
            stat.map_or(0, |stat| stat.st_blocks.cast_unsigned() * 512)
        };
        Ok(Pair {
            allocated: ENDINGS.iter().map(size).sum(),
            state: self.pair_state(&stem)?,
            stem,
        })
    }

    /// Returns the state of a pair, or `None` for a leftover.
    fn pair_state(&self, stem: &str) -> io::Result<Option<PairState>> {
        let open = |ending: &str| self.open_own(&format!("{stem}.{ending}"), OFlags::RDONLY);
        let (Some(map), Some(data)) = (open("map")?, open("data")?) else {
            return Ok(None);
        };
        // A map that was renamed or copied names another file than its own name does.
        let key = read_key(&map).filter(|key| key.stem() == stem);
        // All work on a file is bounded by its number of blocks, which a forged map may overstate.
        let Some(key) = key.filter(|key| key.blocks() <= MAX_BLOCKS) else {
            return Ok(None);
        };
        Ok(Some(PairState {
            // Each open of a pair sets this time; the time of access is not kept on most mounts.
            used: map.metadata()?.modified()?,
            complete: completion::is_complete(&map, &data),
            key,
        }))
    }

    /// Evicts leftovers, then the files that were not used for the longest time, until the folder is within its limit.
    ///
    /// Errors: another process holds the folder's lock for longer than `wait`, or the folder cannot be read.
    pub(super) fn evict(&self, wait: Duration) -> io::Result<Evicted> {
        let _lock = self.lock(wait)?;
        let mut pairs = self.pairs()?;
        // Leftovers first: `None` sorts before every time.
        pairs.sort_by_key(|pair| pair.state.as_ref().map(|state| state.used));
        let mut size: u64 = pairs.iter().map(|pair| pair.allocated).sum();
        let limit = self.limit.unwrap_or(u64::MAX);
        let mut evicted = Evicted::default();
        for pair in pairs {
            if pair.state.is_some() && size <= limit {
                continue;
            }
            match self.evict_pair(&pair) {
                Ok(true) => {}
                Ok(false) => continue,
                Err(e) => {
                    evicted.failure.get_or_insert(e);
                    continue;
                }
            }
            // An estimate: another process may write meanwhile. The next eviction counts anew.
            size = size.saturating_sub(pair.allocated);
            match pair.state {
                Some(state) => {
                    tracing::debug!("{}: evicted {}", self.path.display(), state.key.label);
                    evicted.files.push(state.key);
                }
                None => evicted.leftovers += 1,
            }
        }
        evicted.within_limit = size <= limit;
        Ok(evicted)
    }

    /// Removes the names of a pair. Returns false if a process has it open.
    fn evict_pair(&self, pair: &Pair) -> io::Result<bool> {
        // Another open of the same file in this process is another owner, too. The lock ends with the open below.
        let map = self
            .open_own(&format!("{}.map", pair.stem), OFlags::RDWR)?
            .map(Arc::new);
        let lock = map.map(|map| Lock::take(&map, 0..1, LockMode::Exclusive)).transpose()?;
        if matches!(lock, Some(None)) {
            return Ok(false);
        }
        self.remove_all(&pair.stem).map(|()| true)
    }
}

/// Returns true for the names of a pair, split at the dot.
fn is_ours((stem, ending): &(&str, &str)) -> bool {
    stem.len() == STEM && stem.bytes().all(|b| b.is_ascii_hexdigit()) && ENDINGS.contains(ending)
}

/// Returns the error of a name of this program that something else has.
fn in_the_way(name: &str) -> io::Error {
    io::Error::other(format!("{name} is not a file of this program; remove it"))
}

/// Gives map and data the lengths that belong to the key. What was cut off is missing then, and the rest stays. Returns
/// false if that fails.
pub(super) fn restore_lengths(key: &FileKey, map: &File, data: &File) -> bool {
    let restore = |file: &File, len: u64| {
        let is_right = file.metadata().is_ok_and(|state| state.len() == len);
        // Only then: it would change the times of a complete file.
        is_right || file.set_len(len).is_ok()
    };
    restore(map, HEADER + key.blocks() * ENTRY) && restore(data, key.len)
}

/// Reads the key of a map; `None` if it is none.
pub(super) fn read_key(map: &File) -> Option<FileKey> {
    let mut header = vec![0; HEADER as usize];
    map.read_exact_at(&mut header, 0).ok()?;
    decode_header(&header)
}
