//! A maker of VMDK variants: valid ones with what they hold, hostile ones with what must become of them.
//!
//! ```text
//!   model    what a disk holds: layers of grains over parents, extents in a row
//!     │
//!   write    one function for each kind of file, whose options make the oddities
//!     │
//!   ctx      the folder of one variant, and the disks that many of them start from
//!     │
//!   valid    tables of variants: name, note, build        hostile    the same, with what is expected
//!   raw      plain images with a file system in them
//! ```
//! Everything follows from the seed and the name of the variant, so a failure can be made again. No other
//! program is needed to make a variant (only [`raw`] calls mkfs.ext4). Files are small: large disks are mostly holes.

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
