//! Rules for opening the files of an image, and the list of those that are open.

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, Weak};

use super::local::LocalFile;
use super::{Access, StoredFile};
use crate::error::{Error, Result};
use crate::mutex::lock;

/// Maximum number of distinct files of one image with its parents.
pub(super) const FILES_MAX: usize = 1 << 15;

/// Rules for opening the files of an image. One value belongs to one open of a disk: it also remembers the files that
/// are open, so that each is opened and locked once, by whatever names the image calls it.
#[derive(Debug)]
pub struct OpenPolicy {
    /// Folders that names inside an image may lead to, besides the image's own.
    pub allow: Vec<PathBuf>,
    /// True if every file is locked when it is opened, and refused if another program uses it in a conflicting way.
    pub lock: bool,
    /// True if an image may name no other file: neither extents nor a parent.
    pub single_file: bool,
    /// Open files by device and inode.
    open: Mutex<HashMap<(u64, u64), Weak<LocalFile>>>,
}

impl OpenPolicy {
    /// Creates rules with which an image may name files in its own folder and in those of `allow`.
    pub fn new(allow: Vec<PathBuf>, lock: bool) -> Self {
        Self {
            allow,
            lock,
            single_file: false,
            open: Mutex::default(),
        }
    }

    /// Refuses every name inside an image.
    #[must_use]
    pub(crate) fn single_file(mut self, single_file: bool) -> Self {
        self.single_file = single_file;
        self
    }

    /// Returns the same rules for another open of the disk.
    pub(super) fn renewed(&self) -> Arc<Self> {
        Arc::new(Self::new(self.allow.clone(), self.lock).single_file(self.single_file))
    }

    /// Returns the open file with a device and inode, if it serves `access`.
    pub(super) fn opened(&self, file: (u64, u64), access: Access) -> Option<Arc<LocalFile>> {
        let open = lock(&self.open);
        // A weak reference: the list keeps no file open, and so none locked.
        let file = open.get(&file)?.upgrade()?;
        // A file that was opened for reading cannot serve a writer; the second open then meets the lock of the first.
        (access != Access::Write || file.writer().is_some()).then_some(file)
    }

    /// Remembers a file that was opened for `access`, and returns it.
    ///
    /// Errors: `Corrupt` if more than [`FILES_MAX`] are open.
    pub(super) fn remember(&self, file: LocalFile, access: Access) -> Result<Arc<LocalFile>> {
        let file = Arc::new(file);
        // It is not locked, so it cannot stand for a file of the image.
        if access == Access::Peek {
            return Ok(file);
        }
        let mut open = lock(&self.open);
        if open.len() >= FILES_MAX {
            // Only at the limit, as it visits every entry.
            open.retain(|_, file| file.strong_count() > 0);
        }
        if open.len() >= FILES_MAX {
            return Err(Error::corrupt(format!(
                "{}: the image and its parents have more than {FILES_MAX} files",
                file.label()
            )));
        }
        open.insert(file.identity_at_open().file, Arc::downgrade(&file));
        Ok(file)
    }
}
