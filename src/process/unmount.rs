//! `--unmount`, also as `umount.vmdkfuse`: unmounts, and returns when the daemon has ended and its locks are gone.
//!
//! ```text
//!   mount point ─ in the mount table? ─ the root's xattr names the daemon ─ unmount ─ daemon ended? ─► done
//!                                                                              still there ─ SIGTERM ─┘
//! ```
//! umount(8) returns when the mount is gone from the mount table; the daemon then still completes and closes its images.
//! The xattr holds process ID and start time, so that a reused ID is not taken for the daemon. A mount of another user
//! answers only that user: root reads the xattr in a thread with that user's IDs.

use std::ffi::CStr;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::mpsc;
use std::time::{Duration, Instant};
use std::{fs, io, thread};

use rustix::fs::getxattr;
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};
use rustix::thread::{set_thread_res_gid, set_thread_res_uid};

use crate::config::UnmountConfig;
use crate::error::{Error, ErrorKind, Result};
use crate::escape::printable;
use crate::fuse::mount;
use crate::mountinfo::{self, FSTYPE, MountEntry};
use crate::process::signals;

/// Extended attribute of the root of a mount that identifies its daemon.
pub(crate) const DAEMON_XATTR: &str = "user.vmdkfuse.daemon";

/// The same, as the system call takes it.
const DAEMON_XATTR_C: &CStr = c"user.vmdkfuse.daemon";

/// Time limit for the answer of a daemon about itself.
const ANSWER_TIME: Duration = Duration::from_secs(20);

/// Time after which a daemon whose mount is gone is told to end: the mount may live on in another mount namespace.
const SIGTERM_AFTER: Duration = Duration::from_secs(2);

/// Time limit for the end of a daemon, which first writes what its images still need.
const END_TIME: Duration = Duration::from_secs(120);

/// Unmounts every mount point. An error does not keep the others from being unmounted.
///
/// Errors: the first one; each further one is printed.
pub fn unmount(config: &UnmountConfig) -> Result<()> {
    let mut first = Ok(());
    for point in &config.points {
        match (unmount_one(point, config.lazy), &first) {
            (Err(e), Ok(())) => first = Err(e),
            (Err(e), Err(_)) => super::output::message(&mut io::stderr(), &e.to_string()),
            (Ok(()), _) => {}
        }
    }
    first
}

fn unmount_one(point: &Path, lazy: bool) -> Result<()> {
    let entry = mounted_at(point)?;
    // Before the unmount: afterwards no path leads to the xattr any more.
    let daemon = Daemon::of(&entry);
    mount::unmount_at_point(&entry.point, lazy)?;
    match daemon {
        // A lazily detached mount lasts until its last user has gone, and that was asked for.
        _ if lazy => Ok(()),
        Ok(daemon) => daemon.wait_for_end(&entry.point),
        // The mount was dead: its daemon has ended before.
        Err(e) if e.kind() == ErrorKind::Os(libc::ENOTCONN) => Ok(()),
        Err(e) => Err(e.within(format!(
            "{}: unmounted, but its daemon cannot be found to wait for its end",
            printable(&entry.point)
        ))),
    }
}

/// Returns the mount of this program at `point`.
fn mounted_at(point: &Path) -> Result<MountEntry> {
    // The last component is not followed: the mount may be dead, and does not answer then.
    let parent = point.parent().and_then(|parent| fs::canonicalize(parent).ok());
    let named = parent.zip(point.file_name()).map(|(parent, name)| parent.join(name));
    let candidates: Vec<PathBuf> = named.into_iter().chain(fs::canonicalize(point)).collect();
    let table = mountinfo::read()?;
    // The last entry: mounts on one point lie on each other, and the newest is the one that shows.
    let found = table.into_iter().rev().find(|entry| candidates.contains(&entry.point));
    let label = printable(point);
    match found {
        Some(entry) if entry.fstype == FSTYPE => Ok(entry),
        Some(entry) => Err(Error::new(
            ErrorKind::Usage,
            format!(
                "{label}: a file system of the type {} is mounted there, not {FSTYPE}; umount removes it",
                entry.fstype
            ),
        )),
        None => Err(Error::new(
            ErrorKind::NotFound,
            format!("{label}: nothing is mounted there"),
        )),
    }
}

/// The process that serves a mount.
#[derive(Debug)]
struct Daemon {
    pid: i32,
    fd: OwnedFd,
}

impl Daemon {
    /// Returns the daemon of a mount.
    fn of(entry: &MountEntry) -> Result<Self> {
        let text = daemon_xattr(&entry.point, entry.owner)
            .map_err(|e| Error::io(format!("{}: {DAEMON_XATTR}", printable(&entry.point)), e))?;
        let unknown = || {
            Error::new(
                ErrorKind::NotFound,
                format!("{DAEMON_XATTR} names no process here: {text:?}"),
            )
        };
        let (pid, start) = text.split_once(' ').ok_or_else(unknown)?;
        let pid: i32 = pid.parse().ok().ok_or_else(unknown)?;
        let id = Pid::from_raw(pid).ok_or_else(unknown)?;
        let fd = pidfd_open(id, PidfdFlags::empty()).map_err(|e| Error::io(format!("process {pid}"), e.into()))?;
        // Compared after the open: the descriptor keeps the process from being another one later.
        match start_time(&pid.to_string()) {
            Some(running) if running == start => Ok(Self { pid, fd }),
            _ => Err(unknown()),
        }
    }

    /// Waits until the process has ended. One that goes on after its mount is gone gets one SIGTERM.
    fn wait_for_end(&self, point: &Path) -> Result<()> {
        let started = Instant::now();
        if signals::wait([self.fd.as_fd()], Some(started + SIGTERM_AFTER))? == [true] {
            return Ok(());
        }
        // Without permission it ends on its own, or the time limit passes.
        let _ = pidfd_send_signal(&self.fd, Signal::TERM);
        if signals::wait([self.fd.as_fd()], Some(started + END_TIME))? == [true] {
            return Ok(());
        }
        let (point, pid, seconds) = (printable(point), self.pid, END_TIME.as_secs());
        Err(Error::new(
            ErrorKind::Os(libc::ETIMEDOUT),
            format!(
                "{point}: unmounted, but process {pid} still serves it after {seconds} s: its files are in use elsewhere \
                 (its log says by whom)"
            ),
        ))
    }
}

/// Returns the value of [`DAEMON_XATTR`] for this process.
pub(crate) fn daemon_identity() -> Option<String> {
    Some(format!("{} {}", std::process::id(), start_time("self")?))
}

/// Returns the start time of a process, in clock ticks since the boot.
fn start_time(process: &str) -> Option<String> {
    let stat = fs::read_to_string(format!("/proc/{process}/stat")).ok()?;
    // The name of the process, in parentheses, may hold anything; the start time is the 20th field after it.
    let (_, fields) = stat.rsplit_once(')')?;
    fields.split_whitespace().nth(19).map(str::to_owned)
}

/// Reads the xattr within [`ANSWER_TIME`]. A daemon that hangs does not answer, and its mount must still be removable.
fn daemon_xattr(point: &Path, owner: Option<(u32, u32)>) -> io::Result<String> {
    let (sender, answer) = mpsc::channel();
    let point = point.to_owned();
    // A thread that waits for the mount ends with this process.
    let reader = thread::Builder::new().name("xattr".to_owned());
    reader.spawn(move || sender.send(read_daemon_xattr(&point, owner)))?;
    answer
        .recv_timeout(ANSWER_TIME)
        .unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into()))
}

/// Reads the xattr, as the owner of the mount if this process may become that user. Changes the IDs of this thread.
fn read_daemon_xattr(point: &Path, owner: Option<(u32, u32)>) -> io::Result<String> {
    let read = move |point: &Path| {
        let mut value = vec![0; 128];
        let len = getxattr(point, DAEMON_XATTR_C, &mut value)?;
        value.truncate(len);
        String::from_utf8(value).map_err(|e| io::Error::new(io::ErrorKind::InvalidData, e))
    };
    match (read(point), owner) {
        (Err(e), Some(owner)) if e.kind() == io::ErrorKind::PermissionDenied => {
            become_user(owner).map_err(|_failed| e)?;
            read(point)
        }
        (other, _) => other,
    }
}

/// Gives the IDs of a user to this thread, and to no other.
fn become_user((user, group): (u32, u32)) -> io::Result<()> {
    let group = rustix::process::Gid::from_raw(group);
    let user = rustix::process::Uid::from_raw(user);
    set_thread_res_gid(group, group, group)?;
    Ok(set_thread_res_uid(user, user, user)?)
}
