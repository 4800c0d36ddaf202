//! The process that serves a mount: start, daemonization, signals, log and exit status.
//!
//! ```text
//!   run       the life of a mount, in order ── daemon: fork ── handed_over: inherited descriptors ── pidfile
//!   signals   SIGTERM, SIGINT and SIGHUP as a descriptor
//!   log       log destination and level ── syslog: the system log ── admin_file: how the log and the pidfile are opened
//!   notify    messages to the service manager (systemd), watchdog
//!   unmount   `--unmount`: unmounts, and waits until the daemon has ended
//!   output    standard output and standard error ── progress: that of a long command
//!   inherited ignored signals and the role in write-back, which programs that are started do not keep
//!   arguments removal of secrets from the command line
//! ```
//! The order matters: descriptors are closed and the process forks before any file of the mount is opened and before
//! any thread starts; signals are blocked before any thread starts, so that every thread inherits the mask.

use std::path::{Path, PathBuf};
use std::sync::OnceLock;

mod admin_file;
pub mod arguments;
pub mod daemon;
pub mod handed_over;
pub mod inherited;
pub mod log;
mod notify;
pub mod output;
pub mod pidfile;
pub(crate) mod progress;
pub mod run;
pub mod signals;
mod syslog;
pub mod unmount;

/// Returns the working directory at the first call, which has to come before the process changes to `/`.
///
/// Relative names that the user gave (a program and its arguments, TMPDIR) keep their meaning for as long as the mount
/// lives.
pub fn start_dir() -> &'static Path {
    static START_DIR: OnceLock<PathBuf> = OnceLock::new();
    START_DIR.get_or_init(|| std::env::current_dir().unwrap_or_else(|_| PathBuf::from("/")))
}
