//! Local files, and the check of where a name inside an image leads.
//!
//! ```text
//!   name ──openat2 beneath the image's folder──▶ file of that folder          opened
//!             │ leads out of it (absolute, `..`, a symlink), crosses a mount, or is hidden
//!             ▼
//!          the path it leads to ── in an allowed folder? ──no──▶ refused, with the option that would allow it
//!             └──yes: openat2 again, beneath that folder
//! ```
//! Invariants:
//! - The kernel confines every lookup to a folder (`RESOLVE_BENEATH`), so another process cannot replace a component of
//!   the path between a check and the open. The path that [`folder::leads_to`] computes is only a hint for the next
//!   lookup.
//! - A privileged process looks up and opens the names in an image with the rights of the image's owner ([`Owner`]).
//! - A file is opened with `O_PATH` first, which neither blocks on a FIFO nor acts on a device. Its type is checked on
//!   that descriptor, and the same inode is then opened through `/proc/self/fd`.
//! - A file is locked before its attributes or content are read, and stays locked until it is closed. Each file of an
//!   image is opened and locked once, whatever names the image gives it.

use std::fs::{self, File};
use std::io;
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use nix::fcntl::{OFlag, openat};
use nix::sys::stat::Mode;
use nix::unistd::{UnlinkatFlags, unlinkat};

use self::folder::{AllowedFolders, Folder, Leaves, leads_to};
use self::found::{FileType, Found};
use self::origin::Origin;
use super::owner::Owner;
use super::{Access, ExtentName, Identity, Neighbour, OpenPolicy, Store, StoredFile, printable};
use crate::error::{Error, ErrorKind, Result};

mod file;
mod folder;
mod found;
mod origin;

pub(super) use file::LocalFile;

/// Maximum number of folders in which one name is looked up, as each lookup can lead to another allowed folder.
const HOPS_MAX: usize = 8;

/// Store of the files in one folder and in the folders that the user allowed.
#[derive(Debug)]
pub struct LocalStore {
    folder: Folder,
    policy: Arc<OpenPolicy>,
    /// Owner of the image that the user named, if names are opened with the owner's rights.
    owner: Option<Owner>,
    /// True if names may be those of hidden files in the folder itself, because the image is one.
    hidden: bool,
}

/// Result of a lookup beneath one folder.
enum Beneath {
    Opened(Arc<LocalFile>),
    Leaves(Leaves),
}

/// A file as [`LocalStore::find`] found it.
enum Candidate {
    /// The image has named it before.
    Open(Arc<LocalFile>),
    New(Box<Found>, File),
    Leaves(Leaves),
}

impl LocalStore {
    /// Opens the store of folder `dir`. Names inside its files may also lead to the folders that `policy` allows.
    ///
    /// Errors: `NotFound`, `Unsupported` if `/proc` is not mounted, or the error of the operating system for `dir`.
    pub fn new(dir: &Path, policy: Arc<OpenPolicy>) -> Result<Self> {
        Ok(Self {
            folder: Folder::open(dir)?,
            policy,
            owner: None,
            hidden: true,
        })
    }

    /// Opens the file at `path`, relative to the folder.
    fn open_path(&self, path: &Path, access: Access) -> Result<Arc<LocalFile>> {
        let allowed = AllowedFolders {
            own: &self.folder,
            paths: &self.policy.allow,
        };
        // The folder of the present lookup; `None` is the image's own.
        let mut other: Option<Folder> = None;
        let mut rest = path.to_path_buf();
        let mut leaves = Leaves::Outside;
        // Bounded: links that lead from one allowed folder to another may form a ring.
        for _ in 0..HOPS_MAX {
            leaves = match self.open_beneath(other.as_ref(), &rest, &allowed, access)? {
                Beneath::Opened(file) => return Ok(file),
                Beneath::Leaves(leaves) => leaves,
            };
            let folder = other.as_ref().unwrap_or(&self.folder);
            let target = leads_to(&folder.real, &rest);
            let next = allowed.find(&target, leaves)?;
            (other, rest) = next.ok_or_else(|| self.refusal(path, &target, leaves))?;
        }
        Err(self.refusal(path, &self.folder.real.join(rest), leaves))
    }

    /// Opens a name beneath the allowed folder `other`, or beneath the image's own.
    ///
    /// With an owner, the name is looked up with the owner's rights. A file of the owner that only this process can reach
    /// is opened too: its folder was chosen by the user who named the image.
    fn open_beneath(
        &self,
        other: Option<&Folder>,
        name: &Path,
        allowed: &AllowedFolders<'_>,
        access: Access,
    ) -> Result<Beneath> {
        let devices = other.is_some() || allowed.holds_own()?;
        let find = || self.find(other, name, devices, access);
        let found = match &self.owner {
            None => find()?,
            Some(owner) => match owner.act(find)? {
                Err(e) if is_permission(&e) => self.find_own(owner, find, e)?,
                found => found?,
            },
        };
        match found {
            Candidate::Open(file) => Ok(Beneath::Opened(file)),
            Candidate::Leaves(leaves) => Ok(Beneath::Leaves(leaves)),
            // Outside of the owner's rights: the lock files of other programs must not be missed.
            Candidate::New(found, file) => {
                let policy = Arc::clone(&self.policy);
                let mut file = LocalFile::new(file, found.label, found.real, policy, access)?;
                file.owner.clone_from(&self.owner);
                file.share(access).map(Beneath::Opened)
            }
        }
    }

    /// Finds a file with the rights of this process, after the owner was refused with `refusal`. Only a file of the same
    /// user is accepted.
    fn find_own(&self, owner: &Owner, find: impl Fn() -> Result<Candidate>, refusal: Error) -> Result<Candidate> {
        match find() {
            Ok(Candidate::New(found, file)) if found.metadata.uid() == owner.uid() => Ok(Candidate::New(found, file)),
            Ok(Candidate::Leaves(leaves)) => Ok(Candidate::Leaves(leaves)),
            Err(e) if !is_permission(&e) => Err(e),
            // Of a file that the owner may read, but not write to, the disk is opened for reading.
            _ if refusal.kind() == ErrorKind::ReadOnly => Err(refusal),
            _ => Err(Error::new(
                ErrorKind::Policy,
                format!(
                    "{refusal}: the image belongs to user {}, and the files that it names are opened with that user's \
                     rights; let that user read the file, or give the image to root (chown)",
                    owner.uid()
                ),
            )),
        }
    }

    /// Looks up and opens a name beneath a folder, with the rights of this thread. Block devices only if `devices`.
    fn find(&self, other: Option<&Folder>, name: &Path, devices: bool, access: Access) -> Result<Candidate> {
        let (folder, fd) = match other {
            Some(folder) => (folder, folder.beneath(name)?),
            // A peek is at a file that was found in the folder, and not at one that an image names.
            None => {
                let hidden = self.hidden || access == Access::Peek;
                (&self.folder, self.folder.beneath_strictly(name, hidden)?)
            }
        };
        let fd = match fd {
            Ok(fd) => fd,
            Err(leaves) => return Ok(Candidate::Leaves(leaves)),
        };
        let found = Found::new(fd, printable(folder.real.join(name)))?;
        check_type(&found, devices)?;
        if let Some(file) = self.policy.opened(found.file_id(), access) {
            return Ok(Candidate::Open(file));
        }
        let file = found.open(access)?;
        Ok(Candidate::New(Box::new(found), file))
    }

    /// Returns the path of a file in the folder itself, and its label.
    ///
    /// Errors: `Policy` if the name has more than one component or is `.` or `..`.
    fn in_folder<'n>(&self, name: &'n ExtentName) -> Result<(&'n Path, String)> {
        let path = name.as_path();
        let label = printable(self.folder.real.join(path));
        if path.components().count() != 1 || path.file_name() != Some(path.as_os_str()) {
            let context = format!("{label}: a new file can only be created in the folder of its image");
            return Err(Error::new(ErrorKind::Policy, context));
        }
        Ok((path, label))
    }

    /// Returns the error for a name that leads out of the allowed folders, to `target`: `NotFound` if nothing is there.
    fn refusal(&self, name: &Path, target: &Path, leaves: Leaves) -> Error {
        // An advice to allow a folder is of no use if the file is not there.
        let missing = fs::symlink_metadata(target)
            .is_err_and(|e| matches!(e.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory));
        if missing {
            let context = format!(
                "the image names `{}`, and there is no {}",
                printable(name),
                printable(target)
            );
            return Error::new(ErrorKind::NotFound, context);
        }
        let folder = target.parent().unwrap_or(target);
        let own = printable(&self.folder.real);
        let reason = match leaves {
            Leaves::Outside => format!("outside of its folder {own}"),
            Leaves::Mount => format!("another file system that is mounted below its folder {own}"),
            Leaves::Hidden => format!("a hidden file or folder below its folder {own}"),
        };
        Error::new(
            ErrorKind::Policy,
            format!(
                "the image names `{}`, which leads to {}, {reason}; allow-dir={} would allow it",
                printable(name),
                printable(target),
                printable(folder)
            ),
        )
    }
}

impl Store for LocalStore {
    fn open(&self, name: &ExtentName, access: Access) -> Result<Arc<dyn StoredFile>> {
        // A file that is only peeked at was found in the folder, and is no part of the image.
        if self.policy.single_file && access != Access::Peek {
            return Err(Error::new(
                ErrorKind::Policy,
                format!(
                    "the image names the file `{name}`, which extents=self does not allow; extents=any would open it"
                ),
            ));
        }
        // The second spelling is tried only where nothing has the first name: an error of the file itself must not lead
        // to another one.
        let opened = match (self.open_path(name.as_path(), access), name.raw_path()) {
            (Err(missing), Some(raw)) if missing.kind() == ErrorKind::NotFound => match self.open_path(raw, access) {
                Err(e) if e.kind() == ErrorKind::NotFound => Err(missing),
                other => other,
            },
            (other, _) => other,
        };
        Ok(opened?)
    }

    fn create(&self, name: &ExtentName) -> Result<Arc<dyn StoredFile>> {
        let (path, label) = self.in_folder(name)?;
        let flags = OFlag::O_RDWR | OFlag::O_CREAT | OFlag::O_EXCL | OFlag::O_CLOEXEC | OFlag::O_NOFOLLOW;
        let created = openat(&self.folder.fd, path, flags, Mode::from_bits_truncate(0o666));
        let fd = created.map_err(|e| Error::io(format!("{label}: creating the file"), e.into()))?;
        let real = self.folder.real.join(path);
        let file = LocalFile::new(fd.into(), label, real, Arc::clone(&self.policy), Access::Write);
        if file.is_err() {
            // The lock was refused. O_EXCL guarantees that the name was free, so removing it restores the folder.
            unlinkat(&self.folder.fd, path, UnlinkatFlags::NoRemoveDir).ok();
        }
        Ok(Arc::new(file?))
    }

    fn remove(&self, name: &ExtentName, identity: &Identity) -> Result<()> {
        let (path, label) = self.in_folder(name)?;
        let context = || format!("{label}: removing the file");
        // Not atomic with the removal, as the system has no call for that. The folder is that of the user, so the race
        // needs the user's own help.
        let found = nix::sys::stat::fstatat(&self.folder.fd, path, nix::fcntl::AtFlags::AT_SYMLINK_NOFOLLOW);
        let found = found.map_err(|e| Error::io(context(), e.into()))?;
        if (found.st_dev, found.st_ino) != identity.file {
            return Err(Error::new(
                ErrorKind::NotFound,
                format!("{}: another file has this name now", context()),
            ));
        }
        unlinkat(&self.folder.fd, path, UnlinkatFlags::NoRemoveDir).map_err(|e| Error::io(context(), e.into()))
    }

    fn sync(&self) -> Result<()> {
        let context = || format!("folder {}: fsync", printable(&self.folder.real));
        let folder = File::open(proc_path(&self.folder.fd)).map_err(|e| Error::io(context(), e))?;
        match folder.sync_all() {
            // Some file systems do not support fsync on a folder.
            Err(e) if e.raw_os_error() == Some(libc::EINVAL) => Ok(()),
            done => done.map_err(|e| Error::io(context(), e)),
        }
    }

    fn names(&self, most: usize) -> Result<Vec<ExtentName>> {
        let context = || format!("folder {}", printable(&self.folder.real));
        let entries = fs::read_dir(proc_path(&self.folder.fd)).map_err(|e| Error::io(context(), e))?;
        let mut names = Vec::new();
        for entry in entries {
            if names.len() >= most {
                break;
            }
            let entry = entry.map_err(|e| Error::io(context(), e))?;
            // A name that `ExtentName` refuses cannot occur inside an image, so it belongs to no file of an image.
            if !entry.file_type().is_ok_and(|kind| kind.is_dir()) {
                names.extend(ExtentName::new(entry.file_name().as_bytes()).ok());
            }
        }
        Ok(names)
    }

    fn allowed(&self) -> Vec<ExtentName> {
        let paths = self.policy.allow.iter();
        paths
            .filter_map(|path| ExtentName::new(path.as_os_str().as_bytes()).ok())
            .collect()
    }

    fn neighbour(&self, which: Neighbour) -> Result<Arc<dyn Store>> {
        let real = &self.folder.real;
        let path = match which {
            Neighbour::Above => real.parent().map(Path::to_path_buf),
            Neighbour::Snapshots => Some(real.join(which.path())),
        };
        let none = || Error::new(ErrorKind::NotFound, format!("{}: no folder is above", printable(real)));
        Ok(Arc::new(Self {
            // Not through a link: it could lead anywhere.
            folder: Folder::open_unlinked(&path.ok_or_else(none)?)?,
            policy: Arc::clone(&self.policy),
            owner: self.owner.clone(),
            hidden: self.hidden,
        }))
    }
}

/// Opens a file that the user named: a regular file or a block device. Symlinks are followed. Never blocks on a FIFO.
///
/// Names inside the file are relative to the folder of the symlink's target, and may also lead to the folders that
/// `policy` allows.
///
/// Errors: `NotFound`, `Usage` for any other type of file, `Busy` if another program uses the file in a way that
/// conflicts with `access`, `ReadOnly` if its permissions or its file system do not allow writing, or the error of the
/// operating system.
pub fn open_user_path(path: &Path, policy: Arc<OpenPolicy>, access: Access) -> Result<Arc<dyn StoredFile>> {
    let label = printable(path);
    // O_PATH opens nothing yet, so that neither a FIFO blocks nor a device acts before its type is known.
    let opened = fs::OpenOptions::new().read(true).custom_flags(libc::O_PATH).open(path);
    let found = Found::new(opened.map_err(|e| Error::io(label.clone(), e))?.into(), label)?;
    check_user_type(&found)?;
    let opened = found.open(access)?;
    admit(found, opened, policy, access)
}

/// Opens a file that a search below `folder` found. The user chose the folder and not the file, so no link in the path
/// below the folder is followed, and a privileged process opens the file with the rights of its folder's owner.
///
/// Errors: those of [`open_user_path`]; `Policy` if a link has replaced a part of the path.
pub fn open_found_path(
    folder: &Path,
    path: &Path,
    policy: Arc<OpenPolicy>,
    access: Access,
) -> Result<Arc<dyn StoredFile>> {
    let label = printable(path);
    let (Ok(below), Some(name)) = (path.strip_prefix(folder), path.file_name()) else {
        let context = format!("{label}: is not below the folder {}", printable(folder));
        return Err(Error::new(ErrorKind::Usage, context));
    };
    let parent = Folder::open(folder)?.unlinked(below.parent().unwrap_or(Path::new("")), OFlag::O_DIRECTORY)?;
    let parent = Folder::of(parent)?;
    let find = || -> Result<(Found, File)> {
        let found = Found::new(parent.unlinked(Path::new(name), OFlag::empty())?, label.clone())?;
        check_user_type(&found)?;
        let opened = found.open(access)?;
        Ok((found, opened))
    };
    let (found, opened) = match parent.owner()? {
        Some(owner) => owner.act(find)??,
        None => find()?,
    };
    admit(found, opened, policy, access)
}

/// Refuses a file that is neither a regular file nor a block device.
fn check_user_type(found: &Found) -> Result<()> {
    let FileType::Other(name) = found.file_type() else {
        return Ok(());
    };
    let context = format!(
        "{}: it is a {name}, expected a regular file or a block device",
        found.label
    );
    Err(Error::new(ErrorKind::Usage, context))
}

/// Makes an open file the image: the names in it are opened with the rights of its owner.
fn admit(found: Found, opened: File, policy: Arc<OpenPolicy>, access: Access) -> Result<Arc<dyn StoredFile>> {
    let origin = Origin::of(&found);
    let owner = Owner::of(found.metadata.uid(), found.metadata.gid());
    let mut file = LocalFile::new(opened, found.label, found.real, policy, access)?;
    file.origin = origin;
    file.owner = owner;
    Ok(file.share(access)?)
}

/// Refuses a file that is not of a type which a name inside an image may lead to.
fn check_type(found: &Found, devices: bool) -> Result<()> {
    let reason = match found.file_type() {
        FileType::Regular => return Ok(()),
        FileType::Device if devices => return Ok(()),
        FileType::Device => {
            let folder = printable(found.real.parent().unwrap_or(&found.real));
            format!("block device; allow-dir={folder} would allow it")
        }
        FileType::Other(name) => format!("{name}, expected a regular file"),
    };
    let context = format!("{}: a name inside an image leads to a {reason}", found.label);
    Err(Error::new(ErrorKind::Policy, context))
}

/// Returns true for an error of file permissions.
fn is_permission(e: &Error) -> bool {
    matches!(
        e.kind(),
        ErrorKind::Os(libc::EACCES | libc::EPERM) | ErrorKind::ReadOnly
    )
}
/// Returns the magic link in `/proc` that opens the same inode as `fd` again, whatever its path is by then.
pub(crate) fn proc_path(fd: impl AsFd) -> PathBuf {
    PathBuf::from(format!("/proc/self/fd/{}", fd.as_fd().as_raw_fd()))
}

/// Returns the path of an open file as the kernel reports it: absolute and without symlinks.
pub(crate) fn real_path(fd: impl AsFd) -> Result<PathBuf> {
    let link = proc_path(fd);
    fs::read_link(&link).map_err(|e| {
        let context = format!("{} (is /proc mounted?)", link.display());
        Error::new(ErrorKind::Unsupported, format!("{context}: {e}"))
    })
}

#[cfg(test)]
mod gate_tests;
#[cfg(test)]
mod tests;
