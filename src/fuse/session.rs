//! The session: fuser's event loops over the descriptor from [`super::mount`].
//!
//! ```text
//!   main thread        polls signals and ended()     ── unmounts, never serves
//!   thread `session`   waits for the loops, then signals ended()
//!   threads `fuser-0…` event loops, each with a cloned /dev/fuse
//! ```
//! fuser neither mounts nor unmounts ([`fuser::Session::from_fd`]): the type in mount tables is `fuse.vmdkfuse`, the
//! mount point may be a regular file, auto_unmount works without allow_other, and a busy mount is detached lazily.
//! fuser's own mounting has none of these.

use std::fs::OpenOptions;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::thread::{self, JoinHandle};

use fuser::{Filesystem, SessionACL};
use nix::sys::eventfd::{EfdFlags, EventFd};

use crate::config::MountOptions;
use crate::error::{Error, ErrorKind, Result};

/// Smallest default number of loops, so that one slow request does not hold up all others.
const MIN_LOOPS: usize = 2;

/// Largest default number of loops: each has a buffer, and more of them gain nothing on one device.
const MAX_LOOPS: usize = 16;

/// A running session.
#[derive(Debug)]
pub struct Running {
    end: Arc<EventFd>,
    thread: JoinHandle<io::Result<()>>,
}

/// Signals the end of the session when it is dropped, also by a panic of its thread.
struct SignalOnDrop(Arc<EventFd>);

impl Drop for SignalOnDrop {
    fn drop(&mut self) {
        if let Err(e) = self.0.write(1) {
            tracing::error!("eventfd of the session: {e}");
        }
    }
}

impl Running {
    /// Does the handshake with the kernel, then serves `filesystem` in threads until it is unmounted.
    ///
    /// `loops` is the number of event loops. A loop that panics is lost, so the handlers of `filesystem` have to catch
    /// panics.
    pub fn start<F: Filesystem>(filesystem: F, device: OwnedFd, options: &MountOptions, loops: usize) -> Result<Self> {
        let mut config = fuser::Config::default();
        config.n_threads = Some(loops);
        config.clone_fd = loops > 1 && can_clone_device();
        let session = fuser::Session::from_fd(filesystem, device, acl(options), config)
            .map_err(|e| Error::io("handshake with the kernel", e))?;
        // Created before the thread, so that `ended` becomes readable however the thread ends.
        let event = EventFd::from_flags(EfdFlags::EFD_CLOEXEC).map_err(|e| Error::io("eventfd", e.into()))?;
        let end = Arc::new(event);
        let signal = SignalOnDrop(Arc::clone(&end));
        let thread = thread::Builder::new()
            .name("session".into())
            .spawn(move || {
                let _signal = signal;
                session.run()
            })
            .map_err(|e| Error::io("starting the session thread", e))?;
        Ok(Self { end, thread })
    }

    /// Returns a descriptor that is readable once the session has ended.
    pub fn ended(&self) -> BorrowedFd<'_> {
        self.end.as_fd()
    }

    /// Waits for the end of the session and returns its result.
    pub fn result(self) -> Result<()> {
        match self.thread.join() {
            // ECONNABORTED means the same as ENODEV, which fuser takes for a normal end: the kernel has ended the
            // connection. It sometimes reports this when the last user of a detached mount exits. A real abort leaves a
            // dead mount, which the caller checks for.
            Ok(Err(e)) if e.raw_os_error() == Some(libc::ECONNABORTED) => Ok(()),
            Ok(result) => result.map_err(|e| Error::io("session", e)),
            Err(_) => Err(Error::new(ErrorKind::Os(libc::EIO), "the session thread panicked")),
        }
    }
}

/// Returns which users fuser lets access the mount.
///
/// Without `allow_*` the kernel already refuses everyone but the owner. fuser's own check would refuse more: for
/// example root with an inherited descriptor (the thread of a loop device, qemu started by libvirt) that sends
/// `SEEK_HOLE`. The kernel does not know `allow_root`: it is mounted with `allow_other`, and fuser refuses the others.
fn acl(options: &MountOptions) -> SessionACL {
    if options.allow_root && !options.allow_other {
        SessionACL::RootAndOwner
    } else {
        SessionACL::All
    }
}

/// Returns the number of event loops of a session: `threads` if configured, otherwise one per processor, within bounds.
///
/// If all disks are `remote` (they wait for answers of other processes), a single loop is best: it never blocks, and
/// two would contend for the connections.
pub fn loops(threads: Option<usize>, remote: bool) -> usize {
    if remote && threads.is_none() {
        return 1;
    }
    let by_processors = || thread::available_parallelism().map_or(MIN_LOOPS, |n| n.get().clamp(MIN_LOOPS, MAX_LOOPS));
    threads.unwrap_or_else(by_processors).max(1)
}

/// Returns true if each loop can have its own descriptor, which requires opening `/dev/fuse` again. Where only root may
/// open it (and the helper did that), the loops share one descriptor.
fn can_clone_device() -> bool {
    match OpenOptions::new().read(true).write(true).open("/dev/fuse") {
        Ok(_) => true,
        Err(e) => {
            tracing::info!("the event loops share one descriptor, which is slower: /dev/fuse: {e}");
            false
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_allow_root_alone_needs_the_check_of_fuser() {
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
