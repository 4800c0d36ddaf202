//! Disks that are no VMDK of the built-in engine.

mod export_name;
#[cfg(feature = "nbd")]
pub mod nbd;
#[cfg(not(feature = "nbd"))]
#[path = "nbd_absent.rs"]
pub mod nbd;
mod raw;
mod server_info;

pub use export_name::{export_file_name, export_file_names};
pub use raw::RawDisk;
