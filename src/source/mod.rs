//! Sources that the VMDK engine does not read: raw images, NBD exports, and disks of VMware's VDDK.

mod export_name;
pub mod nbd;
pub mod nbd_uri;
mod raw;
pub(crate) mod sample;
mod server_info;
pub mod vddk;

pub use export_name::{export_file_name, export_file_names};
pub use raw::RawDisk;
