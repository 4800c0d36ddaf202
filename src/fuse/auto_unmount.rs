//! auto_unmount: a process that outlives the daemon and removes its mount.
//!
//! ```text
//!   daemon ── fork ── watcher            before any thread, and before /dev/fuse is opened
//!      │  MOUNT id dev  ─► │             once it is mounted
//!      │  DONE          ─► │ exits       the daemon or another process has unmounted
//!      ✗  end of socket ─► │ detaches    the daemon was killed
//! ```
//! The kernel closes the daemon's end of the socket however the daemon ends, SIGKILL included.
//!
//! `fusermount3 -o auto_unmount` does the same, but up to libfuse 3.14 (Debian 12) it examines the mount as root and is
//! refused, so for ordinary users without allow_other it leaves the dead mount in place.

use std::io;
use std::os::unix::net::UnixStream;

use nix::unistd::Pid;

use super::mount::{Identity, Mount};
use crate::error::{Error, Result};
use crate::mountinfo::Device;
use crate::process::daemon::{detach, helper, receive, send};

/// Message types: the mount to watch; nothing is left to do.
const MOUNT: u8 = b'M';
const DONE: u8 = b'D';

/// The daemon's end of the watcher. If it is dropped without `Self::dismiss`, the watcher detaches the mount.
#[derive(Debug)]
pub struct AutoUnmount {
    socket: UnixStream,
    process: Pid,
}

impl AutoUnmount {
    /// Forks the watcher. Errors: a thread is running already, or the fork failed.
    pub fn fork() -> Result<Self> {
        let (socket, process) = helper("socket of the auto_unmount process", |socket| {
            // The watcher must not hold the caller's standard error, nor exit with the daemon's terminal. A failure
            // cannot be reported to any process, and does not keep it from watching.
            let _ = detach().and_then(|()| crate::process::daemon::silence());
            let _ = watch(socket);
        })?;
        Ok(Self { socket, process })
    }

    /// Sends `mount` to the watcher.
    pub fn start(&mut self, mount: &Mount) -> Result<()> {
        let sent = send(&mut self.socket, MOUNT, encode(mount.identity()));
        sent.map_err(|e| Error::io("process that unmounts after a crash", e))
    }

    /// Ends the watcher and waits for its exit: the mount is gone.
    pub(crate) fn dismiss(mut self) {
        if let Err(e) = send(&mut self.socket, DONE, "") {
            tracing::debug!("auto_unmount process: {e}");
        }
        drop(self.socket);
        if let Err(e) = nix::sys::wait::waitpid(self.process, None) {
            tracing::debug!("auto_unmount process: {e}");
        }
    }
}

/// Main function of the watcher. Returns true if it detached a mount.
fn watch(mut socket: UnixStream) -> io::Result<bool> {
    // DONE ends the watcher without an unmount. The end of the socket, or an error of it, means that the daemon is
    // gone.
    let mut mount = None;
    loop {
        match receive(&mut socket) {
            Ok(Some((MOUNT, numbers))) => mount = decode(&numbers),
            Ok(Some(_)) => return Ok(false),
            Ok(None) | Err(_) => break,
        }
    }
    match mount {
        Some(mount) => mount.detach().map_err(|e| io::Error::other(e.to_string())),
        None => Ok(false),
    }
}

fn encode(mount: Identity) -> String {
    format!("{} {} {}", mount.id, mount.device.major, mount.device.minor)
}

fn decode(numbers: &[u8]) -> Option<Identity> {
    let mut words = std::str::from_utf8(numbers).ok()?.split(' ');
    let id = words.next()?.parse().ok()?;
    let device = Device {
        major: words.next()?.parse().ok()?,
        minor: words.next()?.parse().ok()?,
    };
    Some(Identity { id, device })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_survive_the_socket() {
        let mount = Identity {
            id: 77,
            device: Device { major: 0, minor: 54 },
        };
        assert_eq!(decode(encode(mount).as_bytes()), Some(mount));
        assert_eq!(decode(b"77 0"), None);
    }

    #[test]
    fn nothing_is_unmounted_without_a_mount_message_or_after_done() {
        let (daemon, watcher) = UnixStream::pair().unwrap();
        drop(daemon);
        assert!(!watch(watcher).unwrap());

        let (mut daemon, watcher) = UnixStream::pair().unwrap();
        let nothing = Identity {
            id: u64::MAX,
            device: Device {
                major: 0,
                minor: u32::MAX,
            },
        };
        send(&mut daemon, MOUNT, encode(nothing)).unwrap();
        drop(daemon);
        assert!(!watch(watcher).unwrap(), "a mount that does not exist");
    }
}
