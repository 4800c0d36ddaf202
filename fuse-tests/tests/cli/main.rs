//! Command line and life cycle of a mount: arguments, exit statuses, mount points, users, start and end.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a failed step of a test is a panic that names it"
)]

mod automount;
mod commands;
mod formats;
mod found;
mod fstab;
mod life;
mod log;
mod manual;
mod mount_forms;
mod output;
mod recipes;
mod rights;
mod systemd;
mod unmount;
mod user;
