//! Files that were looked up but not opened yet, and the place of a file that the user named.

use std::ffi::OsString;
use std::fs::{self, File};
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use nix::errno::Errno;
use nix::fcntl::{OFlag, ResolveFlag};

use super::file::{LocalFile, identity};
use super::folder::{Folder, lookup, lookup_error};
use super::{Owner, proc_path, real_path};
use crate::error::{Error, ErrorKind, Result};
use crate::store::{Access, OpenPolicy};

/// The place of a file that the user named: where it is looked for after another process has replaced it.
#[derive(Debug, Clone)]
pub(super) struct Origin {
    /// Held since the first open, so that a directory of the path that another user replaces does not redirect the lookup.
    folder: Arc<Folder>,
    name: OsString,
    /// User ID of the file's owner.
    owner: u32,
}

impl Origin {
    /// Returns the place of a regular file; `None` for a device, and for a file whose folder is not there any more.
    pub(super) fn of(found: &Found) -> Option<Self> {
        let name = found.real.file_name().filter(|_| found.metadata.is_file())?;
        // Without links, as `real` has none: one that is there now was put there after the lookup.
        let folder = Folder::open_unlinked(found.real.parent()?).ok()?;
        Some(Self {
            folder: Arc::new(folder),
            name: name.to_owned(),
            owner: found.metadata.uid(),
        })
    }

    /// Opens the file that has the name now. Follows no symbolic link: the file and its folder may belong to a user with
    /// fewer rights than this process.
    ///
    /// The name is looked up with the rights of `owner`, if there is one.
    pub(super) fn open(&self, label: &str, owner: Option<&Owner>, policy: Arc<OpenPolicy>) -> Result<LocalFile> {
        let (found, file) = match owner {
            Some(owner) => owner.act(|| self.find(label))??,
            None => self.find(label)?,
        };
        let mut file = LocalFile::new(file, found.label, found.real, policy, Access::Read)?;
        file.origin = Some(self.clone());
        Ok(file)
    }

    fn find(&self, label: &str) -> Result<(Found, File)> {
        let refuse = |reason: String| Err(Error::new(ErrorKind::Policy, format!("{label}: {reason}")));
        let flags = OFlag::O_PATH | OFlag::O_CLOEXEC;
        // The name is a single component, so the flags concern the file alone: no link, and no mount over it.
        let resolve = ResolveFlag::RESOLVE_BENEATH | ResolveFlag::RESOLVE_NO_SYMLINKS | ResolveFlag::RESOLVE_NO_XDEV;
        let fd = match lookup(&self.folder.fd, Path::new(&self.name), flags, resolve) {
            Err(Errno::ELOOP | Errno::EXDEV) => {
                return refuse(
                    "the image was replaced by a link, which is not followed; unmount, then mount again".into(),
                );
            }
            found => found.map_err(|e| lookup_error(label.to_owned(), e))?,
        };
        let found = Found::new(fd, label.to_owned())?;
        if let FileType::Device | FileType::Other(_) = found.file_type() {
            return refuse("the image was replaced by something that is no regular file".into());
        }
        // Otherwise another user with write access to the folder could have the daemon show a file that only its own
        // user may read.
        if found.metadata.uid() != self.owner {
            let (now, before) = (found.metadata.uid(), self.owner);
            return refuse(format!(
                "the image was replaced by a file of another user ({now}, before {before}); unmount, then mount again"
            ));
        }
        let file = found.open(Access::Read)?;
        Ok((found, file))
    }
}

/// File that was looked up but not opened: `fd` is an `O_PATH` descriptor.
pub(super) struct Found {
    fd: OwnedFd,
    pub(super) label: String,
    pub(super) real: PathBuf,
    pub(super) metadata: fs::Metadata,
}

/// Type of a file.
pub(super) enum FileType {
    Regular,
    /// Block device.
    Device,
    /// Any other type, with its name for messages.
    Other(&'static str),
}

impl Found {
    pub(super) fn new(fd: OwnedFd, label: String) -> Result<Self> {
        let real = real_path(&fd)?;
        // For `metadata`, which std only has for a `File`. An O_PATH descriptor allows fstat, and nothing that reads.
        let file = File::from(fd);
        let metadata = file.metadata().map_err(|e| Error::io(format!("{label}: fstat"), e))?;
        Ok(Self {
            fd: file.into(),
            label,
            real,
            metadata,
        })
    }

    pub(super) fn file_type(&self) -> FileType {
        let file_type = self.metadata.file_type();
        if file_type.is_file() {
            FileType::Regular
        } else if file_type.is_block_device() {
            FileType::Device
        } else if file_type.is_fifo() {
            FileType::Other("FIFO")
        } else if file_type.is_char_device() {
            FileType::Other("character device")
        } else if file_type.is_dir() {
            FileType::Other("directory")
        } else {
            FileType::Other("socket or file of another type")
        }
    }

    /// Returns the device and inode, as in [`Identity`](crate::store::Identity).
    pub(super) fn file_id(&self) -> (u64, u64) {
        identity(&self.metadata, 0).file
    }

    /// Opens the file for `access`.
    pub(super) fn open(&self, access: Access) -> Result<File> {
        // Through /proc, which opens the inode whose type was checked, and not what has its name now.
        let (path, label) = (proc_path(&self.fd), &self.label);
        match access {
            Access::Read | Access::Peek => {
                File::open(path).map_err(|e| Error::io(format!("{label}: open for reading"), e))
            }
            Access::Write => {
                let opened = fs::OpenOptions::new().read(true).write(true).open(path);
                opened.map_err(|e| refused_for_writing(label, e))
            }
        }
    }
}

/// Returns the error of an open for writing: `ReadOnly` if permissions or the file system do not allow it.
pub(super) fn refused_for_writing(label: &str, e: io::Error) -> Error {
    let context = format!("{label}: open for writing");
    match e.raw_os_error() {
        // EPERM: the file has the immutable or the append-only flag.
        Some(libc::EACCES | libc::EPERM | libc::EROFS) => Error::new(ErrorKind::ReadOnly, format!("{context}: {e}")),
        _ => Error::io(context, e),
    }
}
