//! Disks that VMware's VDDK opens: local VMDKs, and disks of ESXi hosts and vCenters.
//!
//! VDDK is a closed library that is loaded at run time. It brings its own versions of common libraries, starts threads,
//! and may crash or hang. So each disk has a process of its own, the *host*, which alone loads the library and serves the
//! disk to the daemon as an NBD server.
//!
//! ```text
//!   daemon                                             host (the same program)
//!   source/nbd ─ Connector ─ process.rs ── socket ──►  host/: NBD server ─ library.rs ─► libvixDiskLib.so
//!                               ├──────── memory file ► spec.rs: disk, login; statistics.rs
//!                               ◄──────── stderr ────── host/log.rs: log, and the error that ended it
//! ```
//! To `source/nbd` the host is a captive server. A crash or a hang of the library is a lost connection: another host is
//! started, the writes that no flush covers are replayed there, and no other disk notices. A host that is replaced is
//! ended first, so none of its requests can take effect afterwards.
//!
//! `LD_LIBRARY_PATH` is set for the host alone: neither the daemon nor a captive NBD server finds VDDK's libraries.

mod abi;
mod api;
mod backend;
mod failure;
mod host;
mod library;
mod library_file;
mod process;
mod spec;
mod statistics;

use std::ffi::OsString;
use std::process::ExitCode;

pub(crate) use library_file::DEFAULT_LIBDIR;
pub(crate) use process::{describe, report};
pub(crate) use spec::LibraryDescription;

/// Extended attribute of the root of a mount that has the statistics of its disks that VDDK opened ([`report`]).
pub(crate) const STATISTICS_XATTR: &str = "user.vmdkfuse.vddk";

/// Argument by which this program starts itself as a host.
const HOST_ARGUMENT: &str = "--vddk-host";

/// Start of the line on standard error that says why a host ended. No library writes such a line of its own.
const FATAL: &str = "vmdkfuse host ends: ";

/// Exit status of a host that lost its server.
const EXIT_LOST: u8 = 75;

/// Exit status of a host whose server is in maintenance.
const EXIT_MAINTENANCE: u8 = 76;

/// Exit status of a host whose login or disk the server refuses, for a reason that remains.
const EXIT_REFUSED: u8 = 77;

/// Runs a host process, if the arguments of the program say that it is one. Must be called before any thread starts.
pub fn run_host(arguments: &[OsString]) -> Option<ExitCode> {
    let [_, argument] = arguments else { return None };
    (argument == HOST_ARGUMENT).then(host::run)
}
