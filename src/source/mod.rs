//! Sources other than VMDK: raw images and NBD exports.
//!
//! Without the feature `nbd` the module of that name has the same items, which refuse every request, so that callers
//! need no conditional compilation.

mod export_name;
#[cfg(feature = "nbd")]
pub mod nbd;
#[cfg(not(feature = "nbd"))]
#[path = "nbd_absent.rs"]
pub mod nbd;
pub mod nbd_uri;
mod raw;
mod server_info;

pub use export_name::{export_file_name, export_file_names};
pub use raw::RawDisk;
