//! What a crash may leave of an image, searched through: a simulated store, its crashes, and a judge.
//!
//! ```text
//!   images    small disks of each kind, every sector telling which write it came from
//!     │
//!   store     files in memory that log each operation, and fail when told to ──┐
//!     │  run: writes, zeroes, flushes, closes, opens                           │ sabotage: the log as a store that
//!     ▼                                                                        ▼ breaks the engine's order would have it
//!   replay    walks the log; at each place knows what is durable and what is not, and makes crashes of it:
//!     │       any subset of the operations not yet synced, in any order, torn at sectors
//!     ▼
//!   left      opens what is left anew: sectors old or new (judge), tables sound, after a repair as well; qemu-img for some
//! ```
//! The search need not interrupt anything: a run is recorded once, and every place of its log is a crash. Everything
//! follows from seeds, so that a violation can be made again and its run made shorter.
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
pub use images::{Image, Kind};
pub use mutation::Mutation;
pub use oracle::{Oracle, fill, value_of};
pub use replay::{Crash, Machine, Style};
pub use run::{Run, Step, random_steps, record, record_threads};
pub use search::{Effort, Report, Violation, search, shrink};
pub use store::{Event, Faults, Mark, Op, SimStore};
