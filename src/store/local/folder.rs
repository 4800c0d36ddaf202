//! Lookup of names beneath an open folder, which the kernel confines to it.

use std::collections::VecDeque;
use std::ffi::{OsStr, OsString};
use std::fs;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Component, Path, PathBuf};

use nix::errno::Errno;
use nix::fcntl::{OFlag, OpenHow, ResolveFlag, openat2};

use super::{Owner, proc_path, real_path};
use crate::error::{Error, ErrorKind, Result};
use crate::store::printable;

/// Maximum number of symlinks in a name, the same as the kernel's limit.
const SYMLINKS_MAX: usize = 40;
/// Maximum number of attempts of a lookup that a concurrent rename or a signal interrupts.
const LOOKUPS_MAX: usize = 64;
/// Open folder, beneath which names are looked up. The descriptor keeps it valid if the folder is renamed.
#[derive(Debug)]
pub(super) struct Folder {
    pub(super) fd: OwnedFd,
    /// Path without symlinks at the time of the open.
    pub(super) real: PathBuf,
}

impl Folder {
    /// Opens a folder by a path of the user, following symlinks.
    pub(super) fn open(path: &Path) -> Result<Self> {
        let opened = fs::OpenOptions::new()
            .read(true)
            .custom_flags(libc::O_PATH | libc::O_DIRECTORY)
            .open(path)
            .map_err(|e| Error::io(format!("folder {}", printable(path)), e))?;
        Self::of(opened.into())
    }

    /// Opens a folder by a path that must not contain a symlink.
    pub(super) fn open_unlinked(path: &Path) -> Result<Self> {
        let flags = OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
        let opened = lookup(nix::fcntl::AT_FDCWD, path, flags, ResolveFlag::RESOLVE_NO_SYMLINKS);
        Self::of(opened.map_err(|e| lookup_error(format!("folder {}", printable(path)), e))?)
    }

    pub(super) fn of(fd: OwnedFd) -> Result<Self> {
        let real = real_path(&fd)?;
        Ok(Self { fd, real })
    }

    /// Looks up `name` without leaving the folder. A folder that the user allowed may hold mounts and hidden folders.
    pub(super) fn beneath(&self, name: &Path) -> Result<std::result::Result<OwnedFd, Leaves>> {
        self.lookup(name, ResolveFlag::empty())
            .map(|fd| fd.ok_or(Leaves::Outside))
    }

    /// Looks up `name` without leaving the folder or the file system that is mounted there, and without a hidden folder or
    /// file. With `hidden`, a file in the folder itself may be hidden.
    pub(super) fn beneath_strictly(&self, name: &Path, hidden: bool) -> Result<std::result::Result<OwnedFd, Leaves>> {
        let Some(fd) = self.lookup(name, ResolveFlag::RESOLVE_NO_XDEV)? else {
            // EXDEV has two causes: the name leaves the folder, or it crosses a mount. Only without NO_XDEV they
            // differ.
            let crosses = self.lookup(name, ResolveFlag::empty())?.is_some();
            return Ok(Err(if crosses { Leaves::Mount } else { Leaves::Outside }));
        };
        // The path without links counts: a link with a harmless name may lead to a hidden folder.
        let real = real_path(&fd)?;
        let below = real.strip_prefix(&self.real).unwrap_or(name);
        let allowed = hidden && below.components().count() == 1;
        if !allowed && below.iter().any(is_hidden) {
            return Ok(Err(Leaves::Hidden));
        }
        Ok(Ok(fd))
    }

    /// Looks up `name` beneath the folder without following any link. `.` or nothing is the folder itself.
    pub(super) fn unlinked(&self, name: &Path, flags: OFlag) -> Result<OwnedFd> {
        let resolve = ResolveFlag::RESOLVE_BENEATH | ResolveFlag::RESOLVE_NO_SYMLINKS;
        let context = || printable(self.real.join(name));
        match lookup(
            &self.fd,
            &or_dot(name),
            flags | OFlag::O_PATH | OFlag::O_CLOEXEC,
            resolve,
        ) {
            Err(Errno::ELOOP) => Err(Error::new(
                ErrorKind::Policy,
                format!(
                    "{}: is a link, which a search does not follow; name it by file=",
                    context()
                ),
            )),
            found => found.map_err(|e| lookup_error(context(), e)),
        }
    }

    /// Returns the folder's owner, if it has fewer rights than this process.
    pub(super) fn owner(&self) -> Result<Option<Owner>> {
        let attributes = fs::metadata(proc_path(&self.fd)).map_err(|e| Error::io(printable(&self.real), e))?;
        Ok(Owner::of(attributes.uid(), attributes.gid()))
    }

    /// Looks up `name` beneath the folder. Returns `None` if the kernel refuses to leave it, or what `more` confines the
    /// lookup to.
    fn lookup(&self, name: &Path, more: ResolveFlag) -> Result<Option<OwnedFd>> {
        let flags = OFlag::O_PATH | OFlag::O_CLOEXEC;
        let resolve = ResolveFlag::RESOLVE_BENEATH | ResolveFlag::RESOLVE_NO_MAGICLINKS | more;
        let context = || printable(self.real.join(name));
        match lookup(&self.fd, name, flags, resolve) {
            Ok(fd) => Ok(Some(fd)),
            Err(Errno::EXDEV) => Ok(None),
            // A component of the path is not a folder, so the file does not exist either.
            Err(Errno::ENOTDIR) => Err(lookup_error(context(), Errno::ENOENT)),
            Err(Errno::ELOOP) => Err(Error::new(
                ErrorKind::Policy,
                format!(
                    "{}: the name leads through too many links or through a link of /proc",
                    context()
                ),
            )),
            Err(e) => Err(lookup_error(context(), e)),
        }
    }
}

/// Reason why a name is not opened beneath a folder.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Leaves {
    /// It leads out of the folder.
    Outside,
    /// It leads to another file system below the folder.
    Mount,
    /// It leads to a hidden file or through a hidden folder.
    Hidden,
}

/// Returns true for the name of a hidden file or folder: keys, tokens and settings of programs.
pub(super) fn is_hidden(name: &OsStr) -> bool {
    name.as_bytes().starts_with(b".") && name != "." && name != ".."
}

/// Folders that a name may lead to.
pub(super) struct AllowedFolders<'a> {
    /// Folder of the image.
    pub(super) own: &'a Folder,
    /// Folders of the option `allow-dir`.
    pub(super) paths: &'a [PathBuf],
}

impl AllowedFolders<'_> {
    /// Returns the allowed folder that contains `target`, and the path of `target` relative to it. The folder is `None`
    /// for the image's own folder. The whole result is `None` if no allowed folder contains `target`.
    ///
    /// `leaves` is the reason why `target` was not opened so far: the image's own folder has refused it already, unless
    /// the name led out of another folder.
    pub(super) fn find(&self, target: &Path, leaves: Leaves) -> Result<Option<(Option<Folder>, PathBuf)>> {
        if leaves == Leaves::Outside
            && let Ok(rest) = target.strip_prefix(&self.own.real)
        {
            return Ok(Some((None, or_dot(rest))));
        }
        for path in self.paths {
            let folder = Folder::open(path).map_err(|e| e.within("allow-dir"))?;
            // `target` is computed partly from text, so it may start with the folder's path as the user wrote it,
            // instead of the resolved path.
            let as_written = std::path::absolute(path).unwrap_or_else(|_| path.clone());
            let rest = target
                .strip_prefix(&folder.real)
                .or_else(|_| target.strip_prefix(as_written))
                .map(or_dot);
            if let Ok(rest) = rest {
                return Ok(Some((Some(folder), rest)));
            }
        }
        Ok(None)
    }

    /// Returns true if the user allowed the image's own folder or a folder above it.
    pub(super) fn holds_own(&self) -> Result<bool> {
        for path in self.paths {
            let folder = Folder::open(path).map_err(|e| e.within("allow-dir"))?;
            if self.own.real.starts_with(&folder.real) {
                return Ok(true);
            }
        }
        Ok(false)
    }
}
/// Calls `openat2`, and retries if a concurrent rename or a signal interrupts it.
///
/// The kernel returns EAGAIN if a rename or mount anywhere on the system could have moved a component out of `dir`
/// during a `RESOLVE_BENEATH` lookup with `..` in it.
pub(super) fn lookup(
    dir: impl AsFd,
    path: &Path,
    flags: OFlag,
    resolve: ResolveFlag,
) -> std::result::Result<OwnedFd, Errno> {
    for _ in 1..LOOKUPS_MAX {
        match openat2(&dir, path, OpenHow::new().flags(flags).resolve(resolve)) {
            Err(Errno::EAGAIN | Errno::EINTR) => {}
            done => return done,
        }
    }
    openat2(&dir, path, OpenHow::new().flags(flags).resolve(resolve))
}

/// Returns the error of a failed lookup. ENOSYS means that the kernel is too old for `openat2`.
pub(super) fn lookup_error(context: String, errno: Errno) -> Error {
    if errno == Errno::ENOSYS {
        return Error::unsupported(format!(
            "{context}: the kernel has no system call openat2; Linux 5.6 or later is required"
        ));
    }
    Error::io(context, io::Error::from(errno))
}
/// Returns the path that `name` leads to from `folder`. Reads symlinks only inside `folder`; outside, it processes the
/// components as text.
///
/// The result is not safe against concurrent changes and grants nothing: it only selects the folder of the next lookup.
pub(super) fn leads_to(folder: &Path, name: &Path) -> PathBuf {
    let components = |path: &Path| {
        path.components()
            .map(|c| c.as_os_str().to_owned())
            .collect::<VecDeque<OsString>>()
    };
    let mut todo = components(name);
    let mut at = folder.to_path_buf();
    let mut symlinks = 0;
    while let Some(component) = todo.pop_front() {
        match Path::new(&component).components().next() {
            Some(Component::ParentDir) => {
                at.pop();
            }
            Some(Component::RootDir) => at = PathBuf::from("/"),
            Some(Component::CurDir) => {}
            _ => at.push(&component),
        }
        // A symlink outside the folder is not read: nothing there may have an effect before its folder is allowed.
        if symlinks < SYMLINKS_MAX
            && at != folder
            && at.starts_with(folder)
            && let Ok(target) = fs::read_link(&at)
        {
            symlinks += 1;
            at.pop();
            let mut first = components(&target);
            first.append(&mut todo);
            todo = first;
        }
    }
    at
}

/// Returns a path relative to a folder, with `.` for the folder itself.
fn or_dot(rest: &Path) -> PathBuf {
    if rest.as_os_str().is_empty() {
        PathBuf::from(".")
    } else {
        rest.to_path_buf()
    }
}
