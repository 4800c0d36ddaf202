//! Generator of VMDK variants: valid ones with a model of their content, hostile ones with the result to expect.
//!
//! ```text
//!   model    content of a disk: layers of grains over parents, extents in sequence
//!     │
//!   write    one function for each kind of file; its options produce the unusual forms
//!     │
//!   ctx      the folder of one variant, and the disks that many variants start from
//!     │
//!   valid    tables of variants: name, note, build        hostile    also with the expected result
//!   raw      raw images that contain a file system
//! ```
//! All content derives from the seed and the name of the variant, so that failures are reproducible. Building a variant
//! needs no other program (only [`raw`] calls mkfs.ext4). Files are small: large disks are mostly holes.

pub mod ctx;
pub mod hostile;
pub mod model;
pub mod raw;
pub mod valid;
pub mod write;

#[cfg(test)]
mod tests;

pub use ctx::{Ctx, Made};
pub use hostile::{Bad, Expect, Hostile, hostile};
pub use model::{Content, Joined, Layer, SECTOR, Shifted};
pub use valid::{Variant, valid};
