//! Tests that write images with the library and the program: writes to extents, created disks, overlays.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a failed step of a test is a panic that names it"
)]

mod create;
mod engine_write;
mod overlay;
mod streams;
mod write_regressions;
