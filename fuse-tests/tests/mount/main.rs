//! Real mounts over every type of image: reading, writing, holes, locks, the kernel view, guests.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a failed step of a test is a panic that names it"
)]

mod chains;
mod degraded;
mod descriptors;
mod fuse_behaviour;
mod guest;
mod image_names;
mod kernel_view;
mod kill;
mod locks;
mod package;
mod qemu_formats;
mod regressions;
mod shared_samples;
mod variants;
mod writing;
