//! Crash-state search: a simulated store, the crash states of its log, and an oracle that checks each of them.
//!
//! ```text
//!   images           small disks of each kind; each sector encodes the write that it came from
//!     │
//!   store            files in memory that log each operation and inject faults ──┐
//!     │  run: writes, zeroes, flushes, closes, opens                             │ mutation: rewrites the log as if
//!     ▼                                                                          ▼ the engine broke its write order
//!   replay           walks the log; knows at each position what is durable, and creates crash states:
//!     │              any subset of the unsynced operations, in any order, torn at sectors
//!     ▼
//!   recovery_check   reopens a crash state: every sector old or new (oracle), tables sound, also after a recovery;
//!                    qemu-img checks a sample
//! ```
//! No process is interrupted: a run is recorded once, and each position of its log is a possible crash. All choices
//! derive from seeds, so that a violation can be reproduced and its run shortened.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a failed step of a test is a panic that names it; this module is only ever part of tests"
)]

mod bytes;
mod images;
mod mutation;
mod oracle;
mod recovery_check;
mod replay;
mod run;
mod search;
mod store;

pub use bytes::{Bytes, PAGE};
pub use images::{Image, ImageKind};
pub use mutation::Mutation;
pub use oracle::{Oracle, fill, value_of};
pub use replay::{Crash, Machine, Style};
pub use run::{Run, Step, random_steps, record, record_threads};
pub use search::{Effort, Report, Violation, search, shrink};
pub use store::{DiskEvent, Event, Faults, FileOp, SimStore};
