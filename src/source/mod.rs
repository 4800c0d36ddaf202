//! Sources other than VMDK: raw images and NBD exports.

mod export_name;
pub mod nbd;
pub mod nbd_uri;
mod raw;
pub(crate) mod sample;
mod server_info;

pub use export_name::{export_file_name, export_file_names};
pub use raw::RawDisk;
