//! Files that were looked up but not opened yet.

use std::fs::{self, File};
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::PathBuf;

use super::{proc_path, real_path};
use crate::error::{Error, ErrorKind, Result};
use crate::store::{Access, Identity};

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

/// Returns the identity from attributes. `device_len` is the length of a block device, which its attributes do not
/// contain.
pub(super) fn identity(now: &fs::Metadata, device_len: u64) -> Identity {
    let device = now.file_type().is_block_device();
    Identity {
        // Several nodes may stand for one device, so a device is identified by its number instead of its node.
        file: if device {
            (u64::MAX, now.rdev())
        } else {
            (now.dev(), now.ino())
        },
        start: 0,
        len: if device { device_len } else { now.len() },
        mtime_ns: i128::from(now.mtime()) * 1_000_000_000 + i128::from(now.mtime_nsec()),
        ctime_ns: i128::from(now.ctime()) * 1_000_000_000 + i128::from(now.ctime_nsec()),
    }
}
