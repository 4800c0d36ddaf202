//! The tree of names: which inode a name leads to, and which disk or directory an inode is.
//!
//! ```text
//!   root ── Directory ─┬─ names of a fixed list ──► files, and directories of any depth: kept for the life of the mount
//!                      └─ names of a provider ────► files that are found when they are looked up, until FORGET
//! ```
//! Over a plain file the root is the disk itself. In a directory the names of an earlier provider hide the same names of
//! a later one.
//!
//! Inode numbers: the root is 1, the fixed entries follow in their order, and a provider chooses numbers of its own from
//! [`found_inode`] on. A number never leads to another disk than before while the kernel may use it, so that the requests
//! of an open, and its end, reach the disk that was opened.
//!
//! The kernel counts the answers to its lookups of an inode and returns that number with FORGET. So an inode is counted
//! before each answer, and an entry that is found is kept until its count is zero: memory grows with what the kernel
//! remembers, not with what a server lists.

use std::collections::{HashMap, HashSet};
use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::OsStrExt;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, RwLock};

use fuser::{FileHandle, FileType, INodeNo};

use crate::config::MountKind;
use crate::error::Result;
use crate::fuse::disk_file::DiskFile;
use crate::fuse::kernel_view_node::disk_inode_of;
use crate::mutex::{lock, read_lock, write_lock};

/// Inode of the root.
pub(super) const ROOT: INodeNo = INodeNo::ROOT;

/// Inode of the first fixed entry.
const FIRST_FIXED: u64 = 2;

/// First inode of entries that a provider finds.
const FIRST_FOUND: u64 = 1 << 33;

/// Returns the inode of the entry that was found as number `n`. Leaves out the bit that turns a disk inode into a view inode,
/// and never comes back to a number.
pub(super) fn found_inode(n: u64) -> INodeNo {
    let (high, low) = (n >> 32, n & u64::from(u32::MAX));
    INodeNo(FIRST_FOUND.wrapping_add(high << 33) | low)
}

/// Target of a name.
#[derive(Debug, Clone)]
pub(super) enum Entry {
    /// A directory.
    Directory(INodeNo, Arc<Directory>),
    /// The disk inode of a disk.
    File(INodeNo, Arc<DiskFile>),
}

/// A name in a directory.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Listed {
    pub(super) ino: INodeNo,
    pub(super) kind: FileType,
    pub(super) name: OsString,
}

/// Answers which names there are in a directory.
pub(super) trait Names: std::fmt::Debug + Send + Sync {
    /// Returns what the name leads to, or `None`.
    fn lookup(&self, name: &OsStr) -> Result<Option<Entry>>;

    /// Returns all names, each once.
    fn list(&self) -> Result<Vec<Listed>>;

    /// Returns true if an answer may wait for another process.
    fn may_wait(&self) -> bool;
}

/// One directory.
#[derive(Debug, Default)]
pub(super) struct Directory {
    names: Vec<Box<dyn Names>>,
}

/// Names that never change.
#[derive(Debug, Default)]
struct FixedNames(Vec<(OsString, Entry)>);

/// The tree of a mount.
#[derive(Debug)]
pub(super) struct Tree {
    root: Entry,
    /// Entries with the inodes from `FIRST_FIXED` on.
    fixed: Vec<Entry>,
    /// Entries that were found, by inode. Held only to look up or to count; last in the lock order.
    found: RwLock<HashMap<u64, Found>>,
    /// Disks that the kernel has forgotten, and that are being closed.
    closing: Mutex<Vec<Arc<DiskFile>>>,
    open_directories: OpenDirectories,
}

#[derive(Debug)]
struct Found {
    entry: Entry,
    /// Answers that the kernel has not returned by FORGET yet.
    lookups: u64,
}

/// Names of the directories that are open, as they were at the first read: a directory that changes meanwhile is read to
/// its end without a name twice or one left out.
#[derive(Debug, Default)]
struct OpenDirectories {
    last: AtomicU64,
    listings: Mutex<HashMap<u64, Arc<[Listed]>>>,
}

impl Entry {
    /// Returns the inode.
    pub(super) fn ino(&self) -> INodeNo {
        match self {
            Self::Directory(ino, _) | Self::File(ino, _) => *ino,
        }
    }

    fn kind(&self) -> FileType {
        match self {
            Self::Directory(..) => FileType::Directory,
            Self::File(..) => FileType::RegularFile,
        }
    }
}

impl Directory {
    /// Returns what the name leads to, as far as no provider is asked that may have to wait. `None`: one of those must be
    /// asked, by [`Self::lookup`].
    pub(super) fn lookup_at_once(&self, name: &OsStr) -> Option<Result<Option<Entry>>> {
        for names in &self.names {
            // Not the others after it: an earlier provider has the right to the name.
            if names.may_wait() {
                return None;
            }
            match names.lookup(name) {
                Ok(None) => {}
                found => return Some(found),
            }
        }
        Some(Ok(None))
    }

    /// Returns what the name leads to.
    pub(super) fn lookup(&self, name: &OsStr) -> Result<Option<Entry>> {
        let mut found = self.names.iter().map(|names| names.lookup(name));
        found.find(|found| !matches!(found, Ok(None))).unwrap_or(Ok(None))
    }

    /// Returns all names, each once.
    pub(super) fn list(&self) -> Result<Vec<Listed>> {
        let mut all = Vec::new();
        for names in &self.names {
            all.extend(names.list()?);
        }
        // The first one wins, as in a lookup.
        let mut seen = HashSet::new();
        all.retain(|listed: &Listed| seen.insert(listed.name.clone()));
        Ok(all)
    }

    /// Returns true if an answer may wait for another process.
    pub(super) fn may_wait(&self) -> bool {
        self.names.iter().any(|names| names.may_wait())
    }
}

impl Names for FixedNames {
    fn lookup(&self, name: &OsStr) -> Result<Option<Entry>> {
        let found = self.0.iter().find(|(known, _)| known == name);
        Ok(found.map(|(_, entry)| entry.clone()))
    }

    fn list(&self) -> Result<Vec<Listed>> {
        let listed = self.0.iter().map(|(name, entry)| Listed {
            ino: entry.ino(),
            kind: entry.kind(),
            name: name.clone(),
        });
        Ok(listed.collect())
    }

    fn may_wait(&self) -> bool {
        false
    }
}

impl Tree {
    /// Creates the tree of the disks `files`, in this order, and of the names that `more` answers for. A `/` in the name of
    /// a disk separates the directories that it lies in. Over a plain file the first disk is the root.
    pub(super) fn new(kind: MountKind, files: Vec<Arc<DiskFile>>, more: Vec<Box<dyn Names>>) -> Self {
        let numbered = files.into_iter().zip(FIRST_FIXED..);
        let mut fixed: Vec<Entry> = numbered.map(|(file, ino)| Entry::File(INodeNo(ino), file)).collect();
        let root = match (kind, fixed.first()) {
            (MountKind::File, Some(Entry::File(_, file))) => Entry::File(ROOT, Arc::clone(file)),
            _ => {
                let paths = fixed.iter().filter_map(path_of).collect();
                let names = fixed_names(paths, &mut fixed);
                let names = std::iter::once(Box::new(names) as Box<dyn Names>).chain(more);
                let directory = Directory { names: names.collect() };
                Entry::Directory(ROOT, Arc::new(directory))
            }
        };
        Self {
            root,
            fixed,
            found: RwLock::default(),
            closing: Mutex::default(),
            open_directories: OpenDirectories::default(),
        }
    }

    /// Returns the entry of an inode, which may be the view inode of a disk. `None` if the kernel may not know it.
    pub(super) fn entry(&self, ino: INodeNo) -> Option<Entry> {
        let ino = disk_inode_of(ino);
        if ino == ROOT {
            return Some(self.root.clone());
        }
        if let Some(fixed) = self.fixed_entry(ino) {
            return Some(fixed.clone());
        }
        let found = read_lock(&self.found);
        found.get(&ino.0).map(|found| found.entry.clone())
    }

    fn fixed_entry(&self, ino: INodeNo) -> Option<&Entry> {
        let index = ino.0.checked_sub(FIRST_FIXED).and_then(|i| usize::try_from(i).ok())?;
        self.fixed.get(index)
    }

    /// Counts the answer to a lookup that returns `entry`. Must come before the answer, after which a FORGET may arrive.
    pub(super) fn looked_up(&self, entry: &Entry) {
        let ino = entry.ino();
        if ino == ROOT || self.fixed_entry(ino).is_some() {
            return;
        }
        let mut found = write_lock(&self.found);
        let counted = found.entry(ino.0).or_insert_with(|| Found {
            entry: entry.clone(),
            lookups: 0,
        });
        counted.lookups += 1;
    }

    /// Takes back `lookups` answers. Returns the entry if the kernel does not know its inode any more; a disk must then be
    /// closed, and be passed to [`Self::closed`].
    pub(super) fn forget(&self, ino: INodeNo, lookups: u64) -> Option<Entry> {
        let ino = disk_inode_of(ino);
        let mut found = write_lock(&self.found);
        let counted = found.get_mut(&ino.0)?;
        // Never below zero: the number comes from the kernel, and an inode must not be kept forever for a wrong one.
        counted.lookups = counted.lookups.saturating_sub(lookups);
        if counted.lookups > 0 {
            return None;
        }
        let entry = found.remove(&ino.0)?.entry;
        // Before the lock of `found` is released: the end of the mount closes each disk that is in one of the two lists.
        if let Entry::File(_, file) = &entry {
            self.closing().push(Arc::clone(file));
        }
        Some(entry)
    }

    /// Records that a disk which was forgotten has been closed.
    pub(super) fn closed(&self, file: &Arc<DiskFile>) {
        self.closing().retain(|closing| !Arc::ptr_eq(closing, file));
    }

    fn closing(&self) -> MutexGuard<'_, Vec<Arc<DiskFile>>> {
        lock(&self.closing)
    }

    /// Returns the disks of the fixed list, which last as long as the mount.
    pub(super) fn fixed_files(&self) -> impl Iterator<Item = &Arc<DiskFile>> {
        self.fixed.iter().filter_map(|entry| match entry {
            Entry::File(_, file) => Some(file),
            Entry::Directory(..) => None,
        })
    }

    /// Returns every disk that the mount has now, also those that are being closed.
    pub(super) fn files(&self) -> Vec<Arc<DiskFile>> {
        let found = read_lock(&self.found);
        let found = found.values().filter_map(|found| match &found.entry {
            Entry::File(_, file) => Some(file),
            Entry::Directory(..) => None,
        });
        let mut files: Vec<_> = self.fixed_files().chain(found).cloned().collect();
        files.extend(self.closing().iter().cloned());
        files
    }

    /// Opens a directory for reading. Its names are those of the first read.
    pub(super) fn open_directory(&self) -> FileHandle {
        FileHandle(self.open_directories.last.fetch_add(1, Ordering::Relaxed) + 1)
    }

    /// Returns the names that an open directory had at its first read.
    pub(super) fn listing(&self, handle: FileHandle) -> Option<Arc<[Listed]>> {
        self.listings().get(&handle.0).cloned()
    }

    /// Sets the names of an open directory.
    pub(super) fn set_listing(&self, handle: FileHandle, listing: &Arc<[Listed]>) {
        self.listings().insert(handle.0, Arc::clone(listing));
    }

    /// Closes a directory.
    pub(super) fn close_directory(&self, handle: FileHandle) {
        self.listings().remove(&handle.0);
    }

    fn listings(&self) -> MutexGuard<'_, HashMap<u64, Arc<[Listed]>>> {
        lock(&self.open_directories.listings)
    }
}

/// Returns the path of a file from the root, as its name says.
fn path_of(entry: &Entry) -> Option<(OsString, Entry)> {
    match entry {
        Entry::File(_, file) => Some((file.config.name.clone(), entry.clone())),
        Entry::Directory(..) => None,
    }
}

/// Returns the names of a directory that holds files at these paths. Its directories are appended to `fixed`.
fn fixed_names(paths: Vec<(OsString, Entry)>, fixed: &mut Vec<Entry>) -> FixedNames {
    let mut names = FixedNames::default();
    // In the order of the first file of each.
    let mut below: Vec<(OsString, Vec<(OsString, Entry)>)> = Vec::new();
    for (path, entry) in paths {
        let split = path.as_bytes().iter().position(|b| *b == b'/');
        let Some((first, rest)) = split.and_then(|at| path.as_bytes().split_at_checked(at)) else {
            names.0.push((path, entry));
            continue;
        };
        let rest = OsStr::from_bytes(rest.get(1..).unwrap_or_default()).to_owned();
        let first = OsStr::from_bytes(first);
        match below.iter_mut().find(|(name, _)| name == first) {
            Some((_, inside)) => inside.push((rest, entry)),
            None => below.push((first.to_owned(), vec![(rest, entry)])),
        }
    }
    for (name, inside) in below {
        let inside = fixed_names(inside, fixed);
        let directory = Directory {
            names: vec![Box::new(inside)],
        };
        let ino = INodeNo(FIRST_FIXED + fixed.len() as u64);
        let entry = Entry::Directory(ino, Arc::new(directory));
        fixed.push(entry.clone());
        names.0.push((name, entry));
    }
    names
}

#[cfg(test)]
mod tests;
