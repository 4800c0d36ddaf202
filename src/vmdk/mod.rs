//! The built-in VMDK engine: reads every kind of image that VMware's products write, and treats all as untrusted.
//!
//! ```text
//!   open.rs          a file → links of a chain → extents     (descriptor.rs, header.rs)
//!   chain.rs         data model of a chain; sector of the disk → the link that has it → mapping
//!   extent.rs        sector of an extent → mapping              (tables.rs, with hosted.rs, cowd.rs, sesparse.rs)
//!   disk.rs          mapping → read   (inflate.rs)
//!   extent_walk.rs   all mappings of the disk, in order, for the kernel view
//!   write/           open for writing, allocate, flush, close   (tables/writable.rs)
//!   disk_write.rs    request → the extents that it touches → their writers
//!   create.rs        new images
//!   stream.rs        a compressed stream while it is written
//!   info.rs          description of an image
//!   sizes.rs         sizes that contradict each other
//!   neighbours.rs    images near an image: parents by UUID, children
//!   near_names.rs    names in a folder that a missing name probably means
//!   orphan.rs        the missing parent of a snapshot that is opened without it
//!   lost_descriptor.rs   advice for an extent that is named instead of its descriptor
//!   check.rs         verification of an image
//! ```
//! Format code maps addresses. `disk.rs` is the only module that reads data, and `write/` the only one that changes an
//! existing image. A stream does both on its own, as it can't be opened before it is complete. Names found inside of an
//! image are opened through the store, which holds the gate.
#![forbid(unsafe_code)]

mod chain;
mod check;
mod create;
pub mod descriptor;
mod disk;
mod disk_room;
mod disk_write;
mod extent;
mod extent_walk;
mod file_kind;
mod header;
mod hosted_layout;
mod inflate;
mod info;
pub(crate) mod lost_descriptor;
mod near_names;
mod neighbours;
mod open;
mod open_options;
mod orphan;
mod sizes;
mod stream;
mod tables;
#[cfg(test)]
mod test_store;
mod write;

pub use chain::MAX_LINKS;
pub use check::CheckReport;
pub use create::{DeltaParent, NewDelta, NewDisk, create, create_delta, create_stream};
pub use disk::VmdkDisk;
pub use file_kind::{FileKind, file_kind, read_head};
pub use info::{DiskInfo, ExtentInfo, LinkInfo};
pub use open_options::{Degraded, OpenOptions};
pub use stream::StreamDisk;
pub(crate) use write::COMMIT_MARK;
