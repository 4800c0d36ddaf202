//! The mount point: resolved once, and held as a descriptor from then on.
//!
//! Another user may rename a directory of the path, or put a symbolic link in its place, while the disks are opened. A
//! mount by path would then land wherever that user wants. The descriptor names the directory itself: root mounts through
//! `/proc/self/fd`, and fusermount3 is started in that directory.
//!
//! ```text
//!   resolve ── dead or vmdkfuse mount already, `/`, not empty: refused
//!      │ descriptor held
//!      ├─ refuse_sources   the mount would hide or cover a file of its own disks: refused
//!      └─ Mount::new       mounts on the descriptor, finds the new mount by the descriptor's mount ID
//! ```

use std::fs::{self, File};
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use super::own_mounts::{is_dead, unmount_command};
use crate::error::{Error, ErrorKind, Result};
use crate::mountinfo::{self, FSTYPE, MountEntry};
use crate::store::{StoredFile, proc_path, real_path};

/// A mount point that exists and can be mounted on.
#[derive(Debug)]
pub struct Target {
    /// The mount point at the time of [`Self::resolve`]: absolute, without symbolic links.
    pub point: PathBuf,
    /// True for a regular file: the root of the mount is the disk itself.
    pub is_file: bool,
    /// The mount point itself, opened with O_PATH.
    held: OwnedFd,
    /// The directory that holds a mount point which is a file.
    parent: Option<OwnedFd>,
}

impl Target {
    /// Opens the mount point `path`: a directory, or a regular file to cover. With `nonempty` it may hold something.
    ///
    /// Errors: it cannot be mounted on, it is `/`, it is not empty, it is a vmdkfuse mount already, or a mount whose
    /// process is gone (with the command that clears it).
    pub fn resolve(path: &Path, nonempty: bool) -> Result<Self> {
        let held = open_path(path).map_err(|e| dead_or(path, e))?;
        let point = real_path(&held)?;
        refuse_ours(&point)?;
        let metadata = File::from(held.try_clone().map_err(|e| Error::io(path.display().to_string(), e))?)
            .metadata()
            .map_err(|e| dead_or(&point, e))?;
        let kind = metadata.file_type();
        let refuse = |text: String| Err(Error::new(ErrorKind::Usage, format!("{}: {text}", point.display())));
        if !kind.is_dir() && !kind.is_file() {
            let what = if kind.is_block_device() || kind.is_char_device() {
                "a device"
            } else {
                "a pipe or socket"
            };
            return refuse(format!("is {what}; mount on a directory or a regular file"));
        }
        if point == Path::new("/") {
            return refuse("the root directory is not a mount point for a disk; name an empty directory".to_owned());
        }
        if !nonempty && kind.is_dir() && holds_something(&held) {
            return refuse(
                "the directory is not empty, and the mount would hide what is in it; mount on an empty directory, or say \
                 -o nonempty"
                    .to_owned(),
            );
        }
        if !nonempty && kind.is_file() && metadata.len() > 0 {
            return refuse(format!(
                "the file has {} bytes, which the mount would hide; the mount point comes first, then the image; mount on an \
                 empty file or directory, or say -o nonempty",
                metadata.len()
            ));
        }
        let parent = match point.parent().filter(|_| kind.is_file()) {
            Some(parent) => Some(open_path(parent).map_err(|e| dead_or(parent, e))?),
            None => None,
        };
        Ok(Self {
            is_file: kind.is_file(),
            point,
            held,
            parent,
        })
    }

    /// Refuses a mount point that is a file of the mount's own disks, or a directory above one: the mount would hide it,
    /// and a read of the disk would wait for itself.
    ///
    /// Errors: `Usage`, with the file.
    pub(crate) fn refuse_sources<'a>(&self, files: impl IntoIterator<Item = &'a dyn StoredFile>) -> Result<()> {
        let here = identity(&self.held)?;
        for file in files {
            let Some(fd) = file.fd() else { continue };
            let hides = if self.is_file {
                identity(fd)? == here
            } else {
                real_path(fd)?.starts_with(&self.point)
            };
            if hides {
                return Err(Error::new(
                    ErrorKind::Usage,
                    format!(
                        "{}: the mount would hide {}, which it reads; mount on another directory",
                        self.point.display(),
                        file.label()
                    ),
                ));
            }
        }
        Ok(())
    }

    /// Returns the path through which the kernel mounts on the held mount point, wherever it is by now.
    pub(super) fn proc_path(&self) -> PathBuf {
        proc_path(&self.held)
    }

    /// Returns the directory to start fusermount3 in, and the name of the mount point from there.
    pub(super) fn folder_and_name(&self) -> (PathBuf, PathBuf) {
        match (&self.parent, self.point.file_name()) {
            (Some(parent), Some(name)) => (proc_path(parent), PathBuf::from(name)),
            _ => (self.proc_path(), PathBuf::from(".")),
        }
    }

    /// Returns the topmost vmdkfuse mount on the held mount point; `None` if another file system, or nothing, covers it.
    pub(super) fn mounted(&self) -> Result<Option<MountEntry>> {
        // The descriptor is older than the mount, so it lies on the mount below.
        let below = mountinfo::mount_id(&self.held)?;
        let point = real_path(&self.held)?;
        let top = mountinfo::read()?
            .into_iter()
            .rfind(|entry| entry.parent == below && entry.point == point);
        Ok(top.filter(|entry| entry.fstype == FSTYPE))
    }
}

/// Opens a path without opening the file, so that a pipe does not block and a device does nothing.
fn open_path(path: &Path) -> io::Result<OwnedFd> {
    let mut options = File::options();
    options.read(true).custom_flags(libc::O_PATH);
    options.open(path).map(OwnedFd::from)
}

/// Returns device and inode of an open file.
fn identity(fd: impl AsFd) -> Result<(u64, u64)> {
    let link = proc_path(fd);
    let metadata = fs::metadata(&link).map_err(|e| Error::io(link.display().to_string(), e))?;
    Ok((metadata.dev(), metadata.ino()))
}

/// Returns true if a directory has an entry. One that this user may not list counts as empty: nothing is lost.
fn holds_something(dir: &OwnedFd) -> bool {
    fs::read_dir(proc_path(dir)).is_ok_and(|mut entries| entries.next().is_some())
}

/// Refuses a point on which a mount of this program lies, alive or dead.
fn refuse_ours(point: &Path) -> Result<()> {
    match mountinfo::at(point)? {
        Some(entry) if entry.fstype == FSTYPE => {}
        _ => return Ok(()),
    }
    if is_dead(point) {
        return Err(dead(point));
    }
    let text = format!(
        "{}: is a vmdkfuse mount already; unmount it first: {}",
        point.display(),
        unmount_command(point)
    );
    Err(Error::new(ErrorKind::Os(libc::EBUSY), text))
}

/// Returns the error for `path`. If the path leads through a dead mount, the error names that mount.
fn dead_or(path: &Path, error: io::Error) -> Error {
    match path.ancestors().filter(|p| is_dead(p)).last() {
        // The topmost ancestor that is dead is the mount point itself.
        Some(point) => dead(point),
        None => Error::io(path.display().to_string(), error),
    }
}

fn dead(point: &Path) -> Error {
    let text = format!(
        "{}: a mount whose process is gone (transport endpoint is not connected); clear it with: {}",
        point.display(),
        unmount_command(point)
    );
    Error::new(ErrorKind::Os(libc::ENOTCONN), text)
}
