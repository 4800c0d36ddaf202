//! Images on disk written by the library and by commands: written extents, created disks, overlays.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a failed step of a test is a panic that names it"
)]

mod create;
mod engine_write;
mod overlay;
mod write_regressions;
