//! Attributes that threads and child processes inherit, besides descriptors: ignored signals and the role in the
//! kernel's memory management. A program that this process starts gets the defaults back.

#![allow(unsafe_code)] // A signal's disposition, and calls between fork and exec.

use std::os::unix::process::CommandExt;
use std::process::Command;

use nix::sys::signal::{SigHandler, SigSet, Signal, signal};

/// From include/uapi/linux/prctl.h.
const PR_SET_IO_FLUSHER: libc::c_int = 57;

/// Ignores SIGXFSZ: a write beyond the limit of file sizes (`ulimit -f`) then only fails, with EFBIG. Must be called before
/// any thread is started.
pub fn ignore_file_size_signal() {
    // SAFETY: ignoring a signal installs no handler of this program, and no other thread exists.
    let ignored = unsafe { signal(Signal::SIGXFSZ, SigHandler::SigIgn) };
    if let Err(e) = ignored {
        tracing::debug!("SIGXFSZ: {e}");
    }
}

/// Tells the kernel that this thread, and those that it starts from now on, write what the kernel wants to free memory for
/// (PR_SET_IO_FLUSHER, Linux 5.6): without it, an allocation of the daemon may wait for a write-back to a disk that the
/// daemon itself serves. Needs CAP_SYS_RESOURCE; without it nothing changes.
pub(crate) fn become_io_flusher() {
    if let Err(e) = set_io_flusher(true) {
        tracing::debug!("PR_SET_IO_FLUSHER: {e}");
    }
}

/// Gives a program that `command` starts the defaults: no blocked signal, SIGXFSZ, and no role in write-back.
pub(crate) fn reset_in_child(command: &mut Command) {
    // SAFETY: sigprocmask, signal and prctl are async-signal-safe, and nothing is allocated.
    unsafe {
        command.pre_exec(|| {
            // exec keeps the signal mask and ignored signals. A server that never receives SIGTERM would outlive the
            // daemon.
            SigSet::empty().thread_set_mask()?;
            signal(Signal::SIGXFSZ, SigHandler::SigDfl)?;
            // Without the capability it was never set.
            let _ = set_io_flusher(false);
            Ok(())
        })
    };
}

fn set_io_flusher(on: bool) -> std::io::Result<()> {
    // SAFETY: the call takes numbers only.
    match unsafe { libc::prctl(PR_SET_IO_FLUSHER, libc::c_ulong::from(on), 0, 0, 0) } {
        0 => Ok(()),
        _ => Err(std::io::Error::last_os_error()),
    }
}
