//! auto_unmount: a process that outlives the daemon by one unmount.
//!
//! ```text
//!   daemon ── fork ── watcher            before any thread, and before /dev/fuse is opened
//!      │  "this mount" ──► │             once it is mounted
//!      │  "all is done" ─► │ leaves      the daemon has unmounted, or somebody else has
//!      ✗  end of socket ─► │ detaches    the daemon was killed
//! ```
//! `fusermount3 -o auto_unmount` does the same, but up to libfuse 3.14 (Debian 12) it looks at the mount as root
//! and is refused, so for ordinary users without allow_other it leaves the dead mount where it is.

use std::io;
use std::os::unix::net::UnixStream;

use nix::unistd::Pid;

use super::mount::{Identity, Mount};
use super::mountinfo::Device;
use crate::error::{Error, Result};
use crate::process::daemon::{detach, helper, receive, send};

/// Kinds of messages: the mount to watch; nothing is left to be done.
const MOUNT: u8 = b'M';
const DONE: u8 = b'D';

/// The daemon's end. Dropped without [`Self::dismiss`], the mount is detached.
#[derive(Debug)]
pub struct AutoUnmount {
    socket: UnixStream,
    process: Pid,
}

impl AutoUnmount {
    /// Forks it; an error where threads run already.
    pub fn fork() -> Result<Self> {
        let (socket, process) = helper("socket of the watcher", |socket| {
            // It must not hold the caller's standard error, nor die with the daemon's terminal. What fails here can
            // be told to nobody, and is no reason not to watch.
            let _ = detach().and_then(|()| crate::process::daemon::silence());
            let _ = watch(socket);
        })?;
        Ok(Self { socket, process })
    }

    /// Gives it `mount` to watch.
    pub fn start(&mut self, mount: &Mount) -> Result<()> {
        let told = send(&mut self.socket, MOUNT, encode(mount.identity()));
        told.map_err(|e| Error::io("process that watches the mount", e))
    }

    /// Ends it: the mount is gone.
    pub fn dismiss(mut self) {
        if let Err(e) = send(&mut self.socket, DONE, "") {
            tracing::debug!("watcher: {e}");
        }
        drop(self.socket);
        if let Err(e) = nix::sys::wait::waitpid(self.process, None) {
            tracing::debug!("watcher: {e}");
        }
    }
}

/// The watcher's whole work. Whether it detached a mount.
fn watch(mut socket: UnixStream) -> io::Result<bool> {
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
    fn it_touches_nothing_that_it_was_not_told_of_or_that_is_done() {
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
        assert!(!watch(watcher).unwrap(), "no such mount");
    }
}
