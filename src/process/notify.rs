//! Messages to the service manager, as sd_notify(3) describes them: READY=1, STATUS=, WATCHDOG=1, STOPPING=1.
//!
//! ```text
//!   systemd ◄── NOTIFY_SOCKET ── daemon ◄── a byte for each answer ── watchdog process ── getxattr of the mount
//! ```
//! WATCHDOG=1 says that the event loops answer. A process of its own asks them, through the kernel, for an attribute that
//! is never cached and that no disk is needed for: a server that is gone does not stop it. It is a process for the reason
//! that the prober (`fuse/probe.rs`) is one: a request of the daemon to its own hung mount could not even be killed.

use std::ffi::OsStr;
use std::io::{self, ErrorKind, Read, Write};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::linux::net::SocketAddrExt;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::{SocketAddr, UnixDatagram, UnixStream};
use std::path::{Path, PathBuf};
use std::time::Duration;

use rustix::fs::getxattr;

use super::daemon::helper;
use super::unmount::DAEMON_XATTR;
use crate::error::{Error, Result};
use crate::escape::printable;

/// Asks between two deadlines of the service manager: one may be late.
const ASKS: u32 = 3;

/// Longest wait for space in the queue of the service manager. READY=1 must not get lost, as the manager would wait for it
/// in vain; a manager that reads no more must not stop the daemon.
const PATIENCE: Duration = Duration::from_secs(1);

/// Connection to the service manager, if it started this process and waits for messages.
#[derive(Debug)]
pub(super) struct ServiceManager(Option<UnixDatagram>);

impl ServiceManager {
    /// Connects to the socket that `NOTIFY_SOCKET` names: a path, or after an `@` an abstract name. A socket that cannot be
    /// connected to is reported in the log and ignored, as in sd_notify(3).
    pub(super) fn of_environment() -> Self {
        match std::env::var_os("NOTIFY_SOCKET") {
            Some(name) => Self::at(&name, PATIENCE),
            None => Self(None),
        }
    }

    /// Connects to the socket of that name. A message waits for space in its queue for `patience`.
    fn at(name: &OsStr, patience: Duration) -> Self {
        let connect = || -> io::Result<UnixDatagram> {
            let address = match name.as_bytes() {
                [b'@', abstract_name @ ..] => SocketAddr::from_abstract_name(abstract_name)?,
                path => SocketAddr::from_pathname(OsStr::from_bytes(path))?,
            };
            let socket = UnixDatagram::unbound()?;
            socket.set_write_timeout(Some(patience))?;
            socket.connect_addr(&address)?;
            Ok(socket)
        };
        Self(
            connect()
                .inspect_err(|e| tracing::warn!("NOTIFY_SOCKET={}: {e}", printable(name)))
                .ok(),
        )
    }

    /// Reports that the mount at `point` can be read.
    pub(super) fn ready(&self, point: &Path, disks: usize) {
        let (pid, point) = (std::process::id(), printable(point));
        let plural = if disks == 1 { "" } else { "s" };
        self.send(&format!("READY=1\nMAINPID={pid}\nSTATUS={point}: {disks} disk{plural}"));
    }

    /// Reports that the mount is about to end.
    pub(super) fn stopping(&self, why: &str) {
        self.send(&format!("STOPPING=1\nSTATUS={why}"));
    }

    /// Reports that the event loops have answered.
    fn alive(&self) {
        self.send("WATCHDOG=1");
    }

    fn send(&self, text: &str) {
        if let Some(Err(e)) = self.0.as_ref().map(|socket| socket.send(text.as_bytes())) {
            tracing::debug!("message to the service manager: {e}");
        }
    }
}

/// The daemon's end of the watchdog process. Dropping it ends the process.
#[derive(Debug)]
pub(super) struct Watchdog(UnixStream);

impl Watchdog {
    /// Forks the watchdog process, if the service manager wants to be told that this process is alive.
    ///
    /// Errors: a thread is running already, or the fork failed.
    pub(super) fn fork() -> Result<Option<Self>> {
        let Some(interval) = interval(|name| std::env::var(name).ok()) else {
            return Ok(None);
        };
        let (socket, _) = helper("socket of the watchdog", move |socket| {
            // An error means that the daemon is gone.
            let _ = watch(socket, interval);
        })?;
        Ok(Some(Self(socket)))
    }

    /// Starts to ask the mount at `point`.
    pub(super) fn start(&mut self, point: &Path) -> Result<()> {
        let sent = self.0.write_all(&[point.as_os_str().as_bytes(), b"\0"].concat());
        sent.map_err(|e| Error::io("process of the watchdog", e))
    }

    /// Returns a descriptor that is readable when the mount has answered.
    pub(super) fn answered(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }

    /// Takes an answer and passes it on. Returns false if the watchdog process has ended.
    pub(super) fn pass_on(&mut self, manager: &ServiceManager) -> bool {
        let is_alive = matches!(self.0.read(&mut [0; 64]), Ok(count) if count > 0);
        if is_alive {
            manager.alive();
        }
        is_alive
    }
}

/// Returns the time between two asks, by `WATCHDOG_USEC` and `WATCHDOG_PID`.
fn interval(variable: impl Fn(&str) -> Option<String>) -> Option<Duration> {
    let is_other = |pid: String| pid.parse() != Ok(std::process::id());
    if variable("WATCHDOG_PID").is_some_and(is_other) {
        return None;
    }
    let limit = variable("WATCHDOG_USEC")?.parse().ok().filter(|limit| *limit > 0)?;
    Some((Duration::from_micros(limit) / ASKS).max(Duration::from_millis(1)))
}

/// Main function of the watchdog process.
fn watch(mut socket: UnixStream, interval: Duration) -> io::Result<()> {
    let mut point = Vec::new();
    let mut byte = [0];
    loop {
        match socket.read(&mut byte)? {
            0 => return Ok(()),
            _ if byte == [0] => break,
            _ => point.extend(byte),
        }
    }
    let point = PathBuf::from(OsStr::from_bytes(&point));
    socket.set_read_timeout(Some(interval))?;
    loop {
        if getxattr(&point, DAEMON_XATTR, &mut [0; 128]).is_ok() {
            socket.write_all(b"A")?;
        }
        match socket.read(&mut byte) {
            Err(e) if matches!(e.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => {}
            // The daemon never sends more: this is its end.
            _ => return Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicI32, Ordering};

    use super::*;

    /// Fills the queue of `manager` until it takes no more, and returns the number of messages.
    fn fill(manager: &UnixDatagram) -> usize {
        let other = UnixDatagram::unbound().unwrap();
        other.set_nonblocking(true).unwrap();
        other.connect_addr(&manager.local_addr().unwrap()).unwrap();
        let sent = std::iter::from_fn(|| other.send(b"X=1").ok());
        sent.count()
    }

    /// Returns true if the thread of this process sleeps in a system call.
    fn is_asleep(thread: i32) -> bool {
        let stat = std::fs::read_to_string(format!("/proc/self/task/{thread}/stat")).unwrap_or_default();
        stat.rsplit(") ").next().is_some_and(|rest| rest.starts_with('S'))
    }

    #[test]
    fn ready_waits_for_a_full_queue_that_is_drained() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("notify");
        let manager = UnixDatagram::bind(&path).unwrap();
        manager.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
        let daemon = ServiceManager::at(path.as_os_str(), Duration::from_secs(60));
        let before = fill(&manager);
        assert!(before > 0);
        let thread = AtomicI32::new(0);
        std::thread::scope(|scope| {
            let ready = scope.spawn(|| {
                thread.store(nix::unistd::gettid().as_raw(), Ordering::SeqCst);
                daemon.ready(Path::new("/mnt"), 1);
            });
            // Drained only once the sender sleeps in the kernel: before that it would just find space in the queue.
            while !ready.is_finished() && !is_asleep(thread.load(Ordering::SeqCst)) {
                std::thread::yield_now();
            }
            let mut buf = [0; 256];
            let messages = (0..=before).map(|_| manager.recv(&mut buf).map(|len| buf[..len].to_vec()).unwrap());
            assert!(messages.last().unwrap().starts_with(b"READY=1\n"));
        });
    }

    #[test]
    fn a_manager_that_never_reads_does_not_stop_the_daemon() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("notify");
        let manager = UnixDatagram::bind(&path).unwrap();
        let daemon = ServiceManager::at(path.as_os_str(), Duration::from_millis(1));
        fill(&manager);
        daemon.stopping("test");
    }

    #[test]
    fn the_interval_follows_from_the_environment_of_this_process_alone() {
        let of = |usec: Option<&str>, pid: Option<&str>| {
            interval(|name| if name == "WATCHDOG_USEC" { usec } else { pid }.map(str::to_owned))
        };
        let own = std::process::id().to_string();
        assert_eq!(of(Some("3000000"), None), Some(Duration::from_secs(1)));
        assert_eq!(of(Some("3000000"), Some(&own)), Some(Duration::from_secs(1)));
        for (usec, pid) in [
            (None, None),
            (Some("0"), None),
            (Some("x"), None),
            (Some("3000000"), Some("1")),
            (Some("3000000"), Some("")),
        ] {
            assert_eq!(of(usec, pid), None, "{usec:?} {pid:?}");
        }
    }
}
