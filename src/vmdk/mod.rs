//! The built-in VMDK engine: reads every kind of image that VMware's products write, and trusts none.
//!
//! ```text
//!   open.rs        a file → links of a chain → extents     (descriptor.rs, header.rs)
//!   extent.rs      sector of an extent → run               (tables.rs, with sparse.rs, cowd.rs, sesparse.rs)
//!   disk.rs        sector of the disk → the link that has it → run → read   (inflate.rs)
//!   walk.rs        all runs of the disk, in order, for one who maps them elsewhere
//!   write/         open for writing, allocate, flush, close
//!   create.rs, stream.rs   new images; a compressed stream in the course of being written
//!   info.rs, check.rs   what is there, and whether it is sound
//! ```
//! Format code maps addresses; `disk.rs` is the one place that reads data, `write/` the one that changes any of an image
//! (a stream, which none can read yet, does both for itself). Names found inside of an image are opened by the store,
//! which holds the gate.
#![forbid(unsafe_code)]

mod check;
mod create;
pub mod descriptor;
mod disk;
mod extent;
mod extent_walk;
mod header;
mod inflate;
mod info;
mod open;
mod stream;
mod tables;
#[cfg(test)]
mod test_store;
mod write;

pub use check::{CheckReport, check};
pub use create::{DeltaParent, NewDelta, NewDisk, create, create_delta, create_stream};
pub use disk::VmdkDisk;
pub use info::{DiskInfo, ExtentInfo, LinkInfo};
pub use open::{FileKind, MAX_LINKS, OpenOptions, file_kind, read_head};
pub use stream::StreamDisk;
pub(crate) use write::COMMIT_MARK;
