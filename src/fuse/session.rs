//! The session: fuser's event loops over a descriptor that [`super::mount`] got.
//!
//! ```text
//!   main thread      poll: signals, ended()        ── unmounts, never serves
//!   thread `session` waits for the loops, then tells ended()
//!   threads `fuser-0…` event loops, each with a cloned /dev/fuse
//! ```
//! fuser does neither mount nor unmount for us ([`fuser::Session::from_fd`]): the type shown is
//! `fuse.vmdkfuse`, the mount point may be a regular file, auto_unmount works without allow_other, and a busy
//! mount is detached lazily; fuser's own mounting has none of these.

use std::fs::OpenOptions;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::thread::{self, JoinHandle};

use fuser::{Filesystem, SessionACL};
use nix::sys::eventfd::{EfdFlags, EventFd};

use crate::config::MountOptions;
use crate::error::{Error, ErrorKind, Result};

/// Loops at least, so that one slow request does not hold up all others.
const MIN_LOOPS: usize = 2;

/// Loops at most by default: each has a buffer, and more gain nothing on one device.
const MAX_LOOPS: usize = 16;

/// A session that serves.
#[derive(Debug)]
pub struct Running {
    end: Arc<EventFd>,
    thread: JoinHandle<io::Result<()>>,
}

/// Tells the end when it is dropped, also by a panic.
struct TellOnDrop(Arc<EventFd>);

impl Drop for TellOnDrop {
    fn drop(&mut self) {
        if let Err(e) = self.0.write(1) {
            tracing::error!("eventfd of the session: {e}");
        }
    }
}

impl Running {
    /// Agrees with the kernel on the protocol, then serves `filesystem` until it is unmounted.
    ///
    /// `loops`: how many event loops. A loop that panics is lost, so `filesystem` has to
    /// catch what panics while it answers.
    pub fn start<F: Filesystem>(filesystem: F, device: OwnedFd, options: &MountOptions, loops: usize) -> Result<Self> {
        let mut config = fuser::Config::default();
        config.n_threads = Some(loops);
        config.clone_fd = loops > 1 && may_clone();
        let session = fuser::Session::from_fd(filesystem, device, acl(options), config)
            .map_err(|e| Error::io("handshake with the kernel", e))?;
        let event = EventFd::from_flags(EfdFlags::EFD_CLOEXEC).map_err(|e| Error::io("eventfd", e.into()))?;
        let end = Arc::new(event);
        let tell = TellOnDrop(Arc::clone(&end));
        let thread = thread::Builder::new()
            .name("session".into())
            .spawn(move || {
                let _tell = tell;
                session.run()
            })
            .map_err(|e| Error::io("thread of the session", e))?;
        Ok(Self { end, thread })
    }

    /// Readable as soon as the session is over.
    pub fn ended(&self) -> BorrowedFd<'_> {
        self.end.as_fd()
    }

    /// Waits for its end, and tells how it ended.
    pub fn result(self) -> Result<()> {
        match self.thread.join() {
            // Like ENODEV, which fuser takes for the end: the kernel has ended the connection, now and then with this error
            // where the last user of a detached mount has gone. Who cares whether it was an abort looks at the mount.
            Ok(Err(e)) if e.raw_os_error() == Some(libc::ECONNABORTED) => Ok(()),
            Ok(result) => result.map_err(|e| Error::io("session", e)),
            Err(_) => Err(Error::new(
                ErrorKind::Os(libc::EIO),
                "the thread of the session panicked",
            )),
        }
    }
}

/// Who may ask us, as fuser checks it.
///
/// Without `allow_*` the kernel already lets nobody but the owner in. fuser's own check would refuse more: root
/// who was handed an open file (a loop device's thread, qemu started by libvirt) and asks for `SEEK_HOLE`, say.
/// `allow_root` is not known to the kernel: it is `allow_other` there, and fuser keeps the others out.
fn acl(options: &MountOptions) -> SessionACL {
    if options.allow_root && !options.allow_other {
        SessionACL::RootAndOwner
    } else {
        SessionACL::All
    }
}

/// How many event loops a session has: `threads`, if that was asked for.
///
/// Where all disks are `remote` (answers of other processes are waited for) one is best: it never waits, and two would stand in each other's way at the
/// connections.
pub fn loops(threads: Option<usize>, remote: bool) -> usize {
    if remote && threads.is_none() {
        return 1;
    }
    let by_processors = || thread::available_parallelism().map_or(MIN_LOOPS, |n| n.get().clamp(MIN_LOOPS, MAX_LOOPS));
    threads.unwrap_or_else(by_processors).max(1)
}

/// Whether a loop may have a descriptor of its own, which needs `/dev/fuse` opened once more. Where only root
/// may open it (the helper did it for us), the loops share one descriptor.
fn may_clone() -> bool {
    match OpenOptions::new().read(true).write(true).open("/dev/fuse") {
        Ok(_) => true,
        Err(e) => {
            tracing::info!("the event loops share one descriptor, which costs speed: /dev/fuse: {e}");
            false
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_allow_root_alone_needs_our_own_check() {
        let options = |allow_other, allow_root| MountOptions {
            allow_other,
            allow_root,
            ..Default::default()
        };
        assert_eq!(acl(&options(false, false)), SessionACL::All);
        assert_eq!(acl(&options(true, false)), SessionACL::All);
        assert_eq!(acl(&options(false, true)), SessionACL::RootAndOwner);
        assert_eq!(acl(&options(true, true)), SessionACL::All);
    }
}
