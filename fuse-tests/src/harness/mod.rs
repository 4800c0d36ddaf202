//! Harness of the black-box tests: run the program, examine the mount as a user would, clean up everything.
//!
//! ```text
//!   scratch            one folder for each test; its Drop unmounts everything below it, then removes it
//!     ├─ folder        its paths and files, and the program that runs in it
//!     ├─ images        raw originals with islands of data, conversions by qemu-img
//!     ├─ cmd           any program, with a deadline and captured output
//!     ├─ mount         one run of `vmdkfuse`; its Drop unmounts and ends the process, also after a panic
//!     └─ hostile_matrix   many images in one test, on several threads
//!   loop_device        a file as a block device; its Drop detaches it
//!   mounts             the kernel's mount table
//!   port               TCP ports for servers
//!   process            exit statuses, peak memory, polling with a deadline
//!   runs               the runs of a disk, as the library reports them
//!   bytes              comparison of whole files, random ranges, data and holes
//!   requirements       a missing tool skips the test loudly, or fails it where every test is required
//! ```
//! Three measures keep a broken program from hanging the tests. Every command has a deadline. Every wait polls for an
//! event until a deadline. Each [`Mount`] has a watchdog that kills its process, so that a read that hangs ends with an
//! error. The deadlines only bound a failure: they are generous, and a test that passes never waits for one.
//!
//! The test process is a child subreaper (`PR_SET_CHILD_SUBREAPER`): the daemon, which is orphaned when it goes into
//! the background, becomes its child. Tests can then assert the daemon's exit status, and no zombies pile up.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a failed step of a test is a panic that names it; this module is only ever part of tests"
)]

mod bytes;
mod cmd;
mod folder;
mod hostile_matrix;
mod images;
mod loop_device;
mod mount;
mod mounts;
mod notify;
mod port;
mod process;
mod requirements;
mod runs;
mod scratch;
mod user;

pub use bytes::{
    Aligned, Mapped, assert_same, assert_same_at_random, cached_bytes, data_ranges, digest, digest_grains,
    digest_range, map_bytes, read_range, sha256,
};
pub use cmd::{Cmd, GUEST_DEADLINE, Outcome, guestfish, guestfs};
pub use folder::Folder;
pub use hostile_matrix::{Answer, each, open_hostile};
pub use images::{Hosted, fill_islands, qemu_data_ranges, qemu_img, raw_with_islands};
pub use loop_device::LoopDevice;
pub use mount::{Mount, MountCmd};
pub use mounts::{MountEntry, mounts_below, umount, unmount, unmount_as};
pub use notify::NotifySocket;
pub use port::free_port;
pub use process::{Ended, is_running, peak_memory, poll_until, wait_end};
pub use requirements::{
    fake_vddk_library, is_root, need, need_allow_other, need_fuse, need_kernel_view, need_qemu, need_root,
    preload_library, program, skip,
};
pub use runs::{check_runs, open_read_only};
pub use scratch::Scratch;
pub use user::{NOBODY, STRANGER, User};
