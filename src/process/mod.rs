//! The process: its life from the command line to the exit status, and what it needs of the system.
//!
//! ```text
//!   run       the life of a mount, in order ── daemon: fork, inherited descriptors ── pidfile
//!   signals   SIGTERM, SIGINT, SIGHUP as a descriptor
//!   log       where messages go
//! ```

pub mod daemon;
pub mod log;
pub mod pidfile;
pub mod run;
pub mod signals;
