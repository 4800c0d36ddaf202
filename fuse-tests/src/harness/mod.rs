//! Black-box tests of the program on real mounts: run it, look at the mount as a user would, leave nothing behind.
//!
//! ```text
//!   Scratch            a folder of its own for each test; ends with every mount below it undone
//!     ├─ images        raw originals with islands of data, qemu-img's conversions of them
//!     ├─ Cmd           any program, with a deadline and its output kept
//!     └─ Mount         one run of `vmdkfuse`; its Drop unmounts and ends the process, also after a panic
//!   runs               where a disk's sectors lie, by the library
//!   bytes              what is compared: whole files, random ranges, data and holes
//!   need               a tool that is missing skips loudly, or fails where everything is required
//! ```
//! Three things keep a broken program from hanging the tests: every command has a deadline, every wait polls for
//! an event until one, and each [`Mount`] has a watchdog that kills its process, so that a read that never comes
//! back ends with an error instead.
//!
//! The test process makes itself the reaper of orphans: the daemon's exit status, which no shell ever sees, can then
//! be asserted, and no zombies pile up.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a failed step of a test is a panic that names it; this module is only ever part of tests"
)]

mod bytes;
mod cmd;
mod hostile_matrix;
mod images;
mod mount;
mod mounts;
mod process;
mod requirements;
mod runs;
mod scratch;

pub use bytes::{
    Aligned, Mapped, assert_same, assert_same_at_random, data_ranges, digest, digest_grains, digest_range, map_bytes,
    read_range, sha256,
};
pub use cmd::{Cmd, Outcome};
pub use hostile_matrix::{Answer, each, open_hostile};
pub use images::{Hosted, fill_islands, qemu_data_ranges, qemu_img, raw_with_islands};
pub use mount::{Mount, MountCmd};
pub use mounts::{MountEntry, mounts_below};
pub use process::{Ended, is_running, peak_memory, poll_until, wait_end};
pub use requirements::{
    is_root, need, need_allow_other, need_fuse, need_kernel_view, need_qemu, need_root, program, skip,
};
pub use runs::{check_runs, open_read_only};
pub use scratch::{NOBODY, STRANGER, Scratch, User};
