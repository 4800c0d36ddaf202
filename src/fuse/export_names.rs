//! Names of the exports of a server: listed again when they are looked up or read, so that an export that appears or
//! vanishes does so in the mount.
//!
//! ```text
//!   lookup ─► names of now ─► export of that name ─► its properties of now ─┬─ as before ─► the disk of before
//!                                                                           └─ other ───► a new disk, a new inode
//! ```
//! The meaning of a name is stable: a file name stays with its export as long as either is known, in whatever order the server
//! lists. An export whose size or abilities changed is another disk with another inode; a program that has the old one open keeps it.
//! Two names never lead to one export.
//!
//! A disk is held weakly: it lives as long as the kernel knows its inode. Memory: one small entry for each listed name,
//! whose number the list bounds, and for each disk that the kernel knows.
//!
//! Lock order: the names in this file, then `taken`. Neither is held while the server is asked.

use std::collections::{HashMap, HashSet};
use std::ffi::{OsStr, OsString};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, Weak};
use std::time::{Duration, Instant};

use fuser::{FileType, INodeNo};

use crate::error::Result;
use crate::fuse::disk_file::{DiskFile, FileMaker};
use crate::fuse::tree::{Entry, Listed, Names, found_inode};
use crate::mutex::lock;
use crate::source::{FoundExport, export_file_names};
use crate::volume::ServerExports;

/// For how long the properties of an export are used without asking again.
const LIFETIME: Duration = Duration::from_secs(1);

/// State that the names of several servers share.
#[derive(Debug)]
pub(super) struct SharedNames {
    /// File names in use.
    taken: Mutex<HashSet<OsString>>,
    /// Number of inodes given so far.
    inodes: AtomicU64,
}

impl SharedNames {
    /// Creates the names of a mount that has the file names `taken` already.
    pub(super) fn new(taken: HashSet<OsString>) -> Self {
        Self {
            taken: Mutex::new(taken),
            inodes: AtomicU64::new(0),
        }
    }

    fn next_inode(&self) -> INodeNo {
        found_inode(self.inodes.fetch_add(1, Ordering::Relaxed))
    }
}

/// Names of the exports of one server.
#[derive(Debug)]
pub(super) struct ExportNames {
    exports: ServerExports,
    maker: FileMaker,
    shared: Arc<SharedNames>,
    known: Mutex<KnownExports>,
}

#[derive(Debug, Default)]
struct KnownExports {
    /// The list that `by_name` is up to date with.
    listed: Option<Arc<[OsString]>>,
    by_name: HashMap<OsString, KnownExport>,
}

#[derive(Debug)]
struct KnownExport {
    export: OsString,
    ino: INodeNo,
    /// False once the server lists it no more; kept while its disk is open.
    is_listed: bool,
    /// The disk that was made of it last.
    disk: Option<KnownDisk>,
}

#[derive(Debug)]
struct KnownDisk {
    file: Weak<DiskFile>,
    found: FoundExport,
    asked: Instant,
}

impl KnownExport {
    fn file(&self) -> Option<Arc<DiskFile>> {
        self.disk.as_ref()?.file.upgrade()
    }
}

impl ExportNames {
    /// Creates the names of the exports of a server.
    pub(super) fn new(exports: ServerExports, maker: FileMaker, shared: Arc<SharedNames>) -> Self {
        let names = Self {
            exports,
            maker,
            shared,
            known: Mutex::default(),
        };
        // The first list is there already. It gives its file names before another server can take them.
        drop(names.refresh());
        names
    }

    /// Brings the names up to date with the list of the server.
    fn refresh(&self) -> MutexGuard<'_, KnownExports> {
        let listed = self.exports.names();
        let mut known = self.lock();
        if known.listed.as_ref().is_some_and(|last| Arc::ptr_eq(last, &listed)) {
            return known;
        }
        let mut taken = lock(&self.shared.taken);
        let now: HashSet<&OsStr> = listed.iter().map(OsString::as_os_str).collect();
        known.by_name.retain(|name, export| {
            export.is_listed = now.contains(export.export.as_os_str());
            let stays = export.is_listed || export.file().is_some();
            if !stays {
                taken.remove(name);
            }
            stays
        });
        let old: HashSet<OsString> = known.by_name.values().map(|known| known.export.clone()).collect();
        let new: Vec<&OsStr> = listed
            .iter()
            .map(OsString::as_os_str)
            .filter(|export| !old.contains(*export))
            .collect();
        for (export, name) in new.iter().zip(export_file_names(new.iter().copied(), &taken)) {
            taken.insert(name.clone());
            let entry = KnownExport {
                export: (*export).to_owned(),
                ino: self.shared.next_inode(),
                is_listed: true,
                disk: None,
            };
            known.by_name.insert(name, entry);
        }
        known.listed = Some(Arc::clone(&listed));
        drop(taken);
        known
    }

    /// Returns the disk of a name, with the properties that the server has just reported. `None`: the name is gone meanwhile.
    fn disk_of(&self, name: &OsStr, found: FoundExport) -> Result<Option<Entry>> {
        let mut known = self.lock();
        let Some(export) = known.by_name.get_mut(name) else {
            return Ok(None);
        };
        let live = export.file();
        if let (Some(file), Some(disk)) = (&live, &mut export.disk)
            && disk.found == found
        {
            disk.asked = Instant::now();
            return Ok(Some(Entry::File(export.ino, Arc::clone(file))));
        }
        // The kernel may still use the inode of the disk before.
        if export.disk.is_some() {
            export.ino = self.shared.next_inode();
        }
        let (config, volume) = self.exports.disk(&export.export, &found, name)?;
        let file = self.maker.make(config, volume);
        file.set_counts_data(false);
        export.disk = Some(KnownDisk {
            file: Arc::downgrade(&file),
            found,
            asked: Instant::now(),
        });
        Ok(Some(Entry::File(export.ino, file)))
    }

    fn lock(&self) -> MutexGuard<'_, KnownExports> {
        lock(&self.known)
    }
}

impl Names for ExportNames {
    fn lookup(&self, name: &OsStr) -> Result<Option<Entry>> {
        let known = self.refresh();
        let Some(export) = known.by_name.get(name).filter(|export| export.is_listed) else {
            return Ok(None);
        };
        let live = export.file().map(|file| Entry::File(export.ino, file));
        let is_fresh = export.disk.as_ref().is_some_and(|disk| disk.asked.elapsed() < LIFETIME);
        if live.is_some() && (is_fresh || self.exports.is_paused()) {
            return Ok(live);
        }
        let export = export.export.clone();
        drop(known);
        match (self.exports.find(&export, live.is_some()), live) {
            (Ok(Some(found)), _) => self.disk_of(name, found),
            (Ok(None), _) => Ok(None),
            // The disk itself reconnects, and reports what it cannot do.
            (Err(e), Some(live)) => {
                tracing::debug!("{}: {e}", name.display());
                Ok(Some(live))
            }
            (Err(e), None) => Err(e.within(name.display().to_string())),
        }
    }

    fn list(&self) -> Result<Vec<Listed>> {
        let known = self.refresh();
        let listed = known.by_name.iter().filter(|(_, export)| export.is_listed);
        let mut names: Vec<Listed> = listed
            .map(|(name, export)| Listed {
                ino: export.ino,
                kind: FileType::RegularFile,
                name: name.clone(),
            })
            .collect();
        // The order in which the server listed them first.
        names.sort_by_key(|listed| listed.ino.0);
        Ok(names)
    }

    fn may_wait(&self) -> bool {
        true
    }
}
