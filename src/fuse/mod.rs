//! The FUSE side: what the kernel asks, answered from images.

mod errno;
pub mod fs;

pub use fs::DiskFs;
