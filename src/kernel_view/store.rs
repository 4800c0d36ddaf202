//! Where the bytes of an index lie: a file without a name, in memory.
//!
//! The kernel reads the index through the page cache of its file, page by page, so it takes no file of a tmpfs or a
//! memfd. Tried in this order:
//! 1. a ramfs of our own, mounted nowhere: its pages are the file, and they never leave memory;
//! 2. an unnamed file in `$TMPDIR`, then in `/var/tmp`, mapped and locked. With `view-dir=` only that folder, and
//!    no ramfs.
//!
//! Nothing of it has a path, so however this process ends, nothing of it is left.

use std::fs::{File, OpenOptions};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use nix::fcntl::{OFlag, openat};
use nix::sys::stat::Mode;

use crate::error::{Error, Result};
use crate::kernel_view::index::Index;
use crate::kernel_view::sys::{Context, LockedMapping};

/// A place for the index.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum IndexBacking {
    /// A ramfs of our own.
    Memory,
    /// An unnamed file in this folder.
    Folder(PathBuf),
}

/// An index in its place.
#[derive(Debug)]
pub(super) struct Stored {
    file: File,
    /// Keeps its pages in memory, where the file system alone does not.
    resident: Option<LockedMapping>,
}

/// The places to try, in order.
pub(super) fn homes(view_dir: Option<&Path>) -> Vec<IndexBacking> {
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
    /// An empty file there. Errors: what the system says.
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

    /// What to call it in messages.
    pub(super) fn name(&self) -> String {
        match self {
            Self::Memory => "memory".to_owned(),
            Self::Folder(dir) => dir.display().to_string(),
        }
    }
}

impl Stored {
    /// Writes `index` into `file`, an empty one of `home`.
    pub(super) fn write(home: &IndexBacking, file: File, index: Index) -> Result<Self> {
        let bytes = index.bytes();
        let context = |e| Error::io(format!("writing {bytes} bytes of index to {}", home.name()), e);
        file.set_len(bytes).map_err(context)?;
        index.drain(|offset, part| file.write_all_at(part, offset).map_err(context))?;
        let resident = match home {
            IndexBacking::Memory => None,
            IndexBacking::Folder(_) => match LockedMapping::new(&file, bytes as usize) {
                Ok(resident) => Some(resident),
                Err(e) => {
                    tracing::debug!("the index is not kept in memory, which costs speed: {e}");
                    None
                }
            },
        };
        Ok(Self { file, resident })
    }

    /// The file.
    pub(super) fn fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }

    /// What has to live as long as the index is read; the file is the reader's own matter.
    pub(super) fn into_resident(self) -> Option<LockedMapping> {
        self.resident
    }
}

/// A file of a new ramfs, which lives as long as the file is open.
fn in_memory() -> Result<File> {
    const NAME: &str = "index";
    let root = Context::open(c"ramfs").and_then(|ramfs| ramfs.mount(0));
    let root = root.map_err(|e| Error::io("a ramfs for the index", e))?;
    let flags = OFlag::O_RDWR | OFlag::O_CREAT | OFlag::O_EXCL | OFlag::O_CLOEXEC;
    let opened = openat(&root, NAME, flags, Mode::S_IRUSR | Mode::S_IWUSR);
    opened
        .map(File::from)
        .map_err(|e| Error::io("a file for the index in memory", e.into()))
}
