//! Creates the mount, identifies it later, and removes it.
//!
//! fuser gets only the descriptor. Its own mounting cannot show the type `fuse.vmdkfuse`, cover a regular file, do
//! auto_unmount without allow_other (see `auto_unmount.rs`), or detach a busy mount.
//!
//! ```text
//!   Target::resolve  the path that the user named ── stale mount, or already mounted: refused
//!        ▼
//!   Mount::new       mount(2); without permission: fusermount3
//!        ▼           → /dev/fuse for the session; ID and device of the mount are kept
//!   unmount          still in the mount table? ─ no → Gone
//!                       │ yes → umount2 / fusermount3 -u → Clean
//!                       └ busy → the same lazily → Detached: the session ends with the last user
//! ```
//! Before every unmount the mount table is read again: another process may have removed this mount, and mounted another
//! file system at the same path. [`Mount`] unmounts when it is dropped, so that an error or a panic leaves no mount.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::mount::MntFlags;

use super::own_mounts::is_dead;
use super::target::Target;
use super::{fusermount, mount_flags};
use crate::config::MountOptions;
use crate::error::{Error, ErrorKind, Result};
use crate::mountinfo::{self, Device, FSTYPE, MountEntry};

/// Result of an unmount.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Unmounted {
    /// The mount was not in use; the session has ended.
    Clean,
    /// The mount was busy: no new open reaches it, and the session ends when its last user closes its files.
    Detached,
    /// Another process had unmounted it before.
    Gone,
}

/// Identity of a mount while it exists. The kernel reuses both numbers afterwards.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Identity {
    /// ID in the mount table.
    pub id: u64,
    /// Device of the file system.
    pub device: Device,
}

impl Identity {
    /// Detaches the mount if it is still in the mount table. Returns true if it was.
    pub fn detach(self) -> Result<bool> {
        let found = self.find()?;
        if let Some(point) = &found {
            unmount_once(point, true)?;
        }
        Ok(found.is_some())
    }

    /// Returns the current mount point; `None` if the mount is gone.
    ///
    /// Errors: another mount covers it, so that an unmount by path would hit that one.
    fn find(self) -> Result<Option<PathBuf>> {
        let table = mountinfo::read()?;
        let same = |e: &&MountEntry| e.id == self.id && e.device == self.device && e.fstype == FSTYPE;
        let Some(ours) = table.iter().find(same) else {
            return Ok(None);
        };
        if table.iter().any(|e| e.parent == ours.id && e.point == ours.point) {
            let text = format!(
                "{}: another mount covers ours; unmount that one first",
                ours.point.display()
            );
            return Err(Error::new(ErrorKind::Os(libc::EBUSY), text));
        }
        Ok(Some(ours.point.clone()))
    }
}

/// A mount that this process created.
#[derive(Debug)]
pub struct Mount {
    identity: Identity,
    unmounted: bool,
}

impl Mount {
    /// Mounts on `target`. The descriptor is for the session.
    ///
    /// `source` is what mount tables show, unless `options` has a name (`fsname`).
    pub fn new(target: &Target, options: &MountOptions, source: &str) -> Result<(Self, OwnedFd)> {
        let source = options.fsname.as_deref().unwrap_or(source);
        let device = match mount_directly(target, options, source)? {
            Some(device) => device,
            None => fusermount::mount(target, options, source)?,
        };
        // From here on there is a mount: every failure has to remove it again.
        let entry = match target.mounted() {
            Ok(Some(entry)) => entry,
            found => {
                let cause = found.err().map_or_else(
                    || "something else was mounted there at the same time".to_owned(),
                    |e| e.to_string(),
                );
                let removed = unmount_once(&target.point, true).err();
                let left = removed.map_or_else(String::new, |e| format!("; the mount may be left behind: {e}"));
                let text = format!("{}: {cause}{left}", target.point.display());
                return Err(Error::new(ErrorKind::Os(libc::EBUSY), text));
            }
        };
        tracing::debug!("mounted on {} as {} {}", entry.point.display(), entry.id, entry.device);
        let identity = Identity {
            id: entry.id,
            device: entry.device,
        };
        Ok((
            Self {
                identity,
                unmounted: false,
            },
            device,
        ))
    }

    /// Returns the device of the mount.
    pub fn device(&self) -> Device {
        self.identity.device
    }

    /// Returns the identity of the mount.
    pub fn identity(&self) -> Identity {
        self.identity
    }

    /// Removes the mount from the mount table if it is still there. A busy mount is detached.
    pub fn unmount(&mut self) -> Result<Unmounted> {
        if self.unmounted {
            return Ok(Unmounted::Gone);
        }
        let how = match self.identity.find()? {
            None => Unmounted::Gone,
            Some(point) => self.unmount_at(&point)?,
        };
        self.unmounted = true;
        Ok(how)
    }

    /// Detaches the dead mount after the session has ended, if it is still there. Returns true if it was.
    ///
    /// Another process may have unmounted it and mounted another file system since, and the kernel reuses the ID and
    /// the device. So only a mount that answers ENOTCONN ("transport endpoint is not connected") is taken for this one.
    pub(crate) fn clear_dead(&mut self) -> Result<bool> {
        let found = self.identity.find()?.filter(|point| is_dead(point));
        if let Some(point) = &found {
            unmount_once(point, true)?;
        }
        self.unmounted = true;
        Ok(found.is_some())
    }

    fn unmount_at(&self, point: &Path) -> Result<Unmounted> {
        match unmount_once(point, false) {
            Ok(()) => return Ok(Unmounted::Clean),
            Err(e) => tracing::debug!("unmounting failed, trying again lazily: {e}"),
        }
        // Another process may have unmounted it in the meantime; the mount below must not be detached in its place.
        if self.identity.find()?.is_none() {
            return Ok(Unmounted::Gone);
        }
        unmount_once(point, true)?;
        Ok(Unmounted::Detached)
    }
}

impl Drop for Mount {
    fn drop(&mut self) {
        match self.unmount() {
            Ok(how) => tracing::trace!("mount dropped: {how:?}"),
            Err(e) => tracing::error!("could not unmount: {e}"),
        }
    }
}

/// Mounts with mount(2). `None` if this process has no permission.
fn mount_directly(target: &Target, options: &MountOptions, source: &str) -> Result<Option<OwnedFd>> {
    let device = match open_device() {
        Ok(file) => file,
        Err(e) if e.kind() == io::ErrorKind::PermissionDenied => return Ok(None),
        Err(e) => return Err(no_fuse(e)),
    };
    let data = mount_data(device.as_raw_fd(), target.is_file, options);
    let flags = mount_flags::bits(&options.flags, options.read_only);
    match nix::mount::mount(
        Some(source),
        &target.proc_path(),
        Some(FSTYPE),
        flags,
        Some(data.as_str()),
    ) {
        Ok(()) => Ok(Some(device.into())),
        Err(Errno::EPERM | Errno::EACCES) => Ok(None),
        Err(Errno::ENODEV) => Err(no_fuse(Errno::ENODEV.into())),
        Err(e) => Err(Error::io(format!("{}: mount", target.point.display()), e.into())),
    }
}

fn open_device() -> io::Result<File> {
    // The standard library opens every file with O_CLOEXEC.
    OpenOptions::new().read(true).write(true).open("/dev/fuse")
}

fn no_fuse(e: io::Error) -> Error {
    Error::io(
        "/dev/fuse: this kernel has no FUSE (try `modprobe fuse`; in a container, pass the device in)",
        e,
    )
}

/// Returns the mount options that the kernel parses.
fn mount_data(fd: i32, is_file: bool, options: &MountOptions) -> String {
    let rootmode = if is_file { libc::S_IFREG } else { libc::S_IFDIR };
    let (uid, gid) = (nix::unistd::getuid(), nix::unistd::getgid());
    let mut data = format!("fd={fd},rootmode={rootmode:o},user_id={uid},group_id={gid}");
    if options.allow_other || options.allow_root {
        data.push_str(",allow_other");
    }
    if options.default_permissions {
        data.push_str(",default_permissions");
    }
    for context in &options.contexts {
        data.push(',');
        data.push_str(context);
    }
    data
}

/// Time for which a busy mount is tried again. A file of it that was closed just now may still be open in a process that
/// another thread forks, until that process starts its program; and the watchdog asks the mount from time to time.
const BUSY_FOR: Duration = Duration::from_secs(1);

/// Time between two tries.
const BUSY_PAUSE: Duration = Duration::from_millis(20);

/// Unmounts what is mounted at `point`. With `lazy` a mount that is in use is detached.
pub(crate) fn unmount_at_point(point: &Path, lazy: bool) -> Result<()> {
    let deadline = Instant::now() + BUSY_FOR;
    let mut result = unmount_once(point, lazy);
    while result.as_ref().is_err_and(|e| e.kind() == ErrorKind::Os(libc::EBUSY)) && Instant::now() < deadline {
        std::thread::sleep(BUSY_PAUSE);
        result = unmount_once(point, lazy);
    }
    result.map_err(|e| match e.kind() {
        ErrorKind::Os(libc::EBUSY) => {
            let hint = "a program uses it (`fuser -vm` shows which); close its files, then try again";
            Error::new(ErrorKind::Os(libc::EBUSY), format!("{e}: {hint}"))
        }
        _ => e,
    })
}

fn unmount_once(point: &Path, lazy: bool) -> Result<()> {
    let how = if lazy { MntFlags::MNT_DETACH } else { MntFlags::empty() };
    match nix::mount::umount2(point, how | MntFlags::UMOUNT_NOFOLLOW) {
        Ok(()) => Ok(()),
        Err(Errno::EPERM) => fusermount::unmount(point, lazy),
        Err(e) => Err(Error::io(format!("{}: umount", point.display()), e.into())),
    }
}
