//! Storage of an index: a file without a name, kept in memory.
//!
//! The kernel reads the index through the page cache of its file, page by page. It does not accept a file of a tmpfs or
//! a memfd. The backings are tried in this order:
//! 1. a private ramfs without a mount point: its pages are the file, and they are never evicted;
//! 2. an unnamed file in `$TMPDIR`, then in `/var/tmp`, mapped and locked. With `view-dir=` only that directory is
//!    tried, and no ramfs.
//!
//! None of them has a path, so nothing is left behind however this process ends.

use std::fs::{File, OpenOptions};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use nix::fcntl::{OFlag, openat};
use nix::sys::stat::Mode;

use crate::error::{Error, Result};
use crate::kernel_view::index::Index;
use crate::kernel_view::sys::{Context, LockedMapping};

/// Backing of an index.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum IndexBacking {
    /// A private ramfs.
    Memory,
    /// An unnamed file in this directory.
    Folder(PathBuf),
}

/// An index in its backing file.
#[derive(Debug)]
pub(super) struct StoredIndex {
    file: File,
    /// Keeps the pages in memory where the file system can evict them.
    locked: Option<LockedMapping>,
}

/// Returns the backings to try, in order.
pub(super) fn backings(view_dir: Option<&Path>) -> Vec<IndexBacking> {
    let folder = |path: &Path| IndexBacking::Folder(path.to_owned());
    match view_dir {
        Some(dir) => vec![folder(dir)],
        None => {
            let tmp = std::env::var_os("TMPDIR").filter(|dir| Path::new(dir).is_absolute());
            let tmp = tmp.map(|dir| IndexBacking::Folder(dir.into()));
            [Some(IndexBacking::Memory), tmp, Some(folder(Path::new("/var/tmp")))]
                .into_iter()
                .flatten()
                .collect()
        }
    }
}

impl IndexBacking {
    /// Creates an empty file in the backing. Errors: those of the system call.
    pub(super) fn file(&self) -> Result<File> {
        match self {
            Self::Memory => in_memory(),
            Self::Folder(dir) => OpenOptions::new()
                .read(true)
                .write(true)
                .mode(0o600)
                .custom_flags(libc::O_TMPFILE | libc::O_CLOEXEC)
                .open(dir)
                .map_err(|e| Error::io(format!("an unnamed file in {}", dir.display()), e)),
        }
    }

    /// Returns the name for messages.
    pub(super) fn name(&self) -> String {
        match self {
            Self::Memory => "memory".to_owned(),
            Self::Folder(dir) => dir.display().to_string(),
        }
    }
}

impl StoredIndex {
    /// Writes `index` into `file`, an empty file of `backing`.
    pub(super) fn write(backing: &IndexBacking, file: File, index: Index) -> Result<Self> {
        let bytes = index.bytes();
        let context = |e| Error::io(format!("writing {bytes} bytes of index to {}", backing.name()), e);
        // Set first, as the parts are written from the end to the start.
        file.set_len(bytes).map_err(context)?;
        index.drain(|offset, part| file.write_all_at(part, offset).map_err(context))?;
        let locked = match backing {
            IndexBacking::Memory => None,
            IndexBacking::Folder(_) => match LockedMapping::new(&file, bytes as usize) {
                Ok(locked) => Some(locked),
                Err(e) => {
                    tracing::debug!("the index is not locked in memory, which is slower: {e}");
                    None
                }
            },
        };
        Ok(Self { file, locked })
    }

    /// Returns the file for the kernel to mount.
    pub(super) fn fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }

    /// Returns the lock that must live as long as the index is read. The file itself is kept open by its mount.
    pub(super) fn into_locked_mapping(self) -> Option<LockedMapping> {
        self.locked
    }
}

/// Creates a file in a new ramfs, which lives as long as the file is open.
fn in_memory() -> Result<File> {
    const NAME: &str = "index";
    // The mount has no path and ends with its last open file, and its pages with it.
    let root = Context::open(c"ramfs").and_then(|ramfs| ramfs.mount(0));
    let root = root.map_err(|e| Error::io("creating a ramfs for the index", e))?;
    let flags = OFlag::O_RDWR | OFlag::O_CREAT | OFlag::O_EXCL | OFlag::O_CLOEXEC;
    let opened = openat(&root, NAME, flags, Mode::S_IRUSR | Mode::S_IWUSR);
    opened
        .map(File::from)
        .map_err(|e| Error::io("creating the index file in a ramfs", e.into()))
}
