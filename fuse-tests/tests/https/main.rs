//! Tests of disks on web servers: the simulator of a vCenter (`fuse-tests/vsim`), nginx with TLS, and a server of the
//! tests' own for answers that no real server gives.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a failed step of a test is a panic that names it"
)]

mod complete_cache;
mod datastore;
mod disk_tier;
mod faults;
mod fstab;
mod guest;
mod listing;
mod server;
mod web;
