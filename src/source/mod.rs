//! Disks that are no VMDK of the built-in engine.

mod raw;

pub use raw::RawDisk;
