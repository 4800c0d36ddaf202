//! libvmware-bdwrapper (contrib/bdwrapper): block devices and raw files as physical disks, for real programs.
//!
//! Each program runs in a mount namespace of its own, whose `/dev` is a folder of the test: the machine's `/dev` never gets
//! another name.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a failed step of a test is a panic that names it"
)]

mod answers;
mod fixture;
mod library;
mod listed;
mod tools;
mod unlisted;
