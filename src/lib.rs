//! `vmdkfuse` shows virtual disks as raw files; see the README for its use.
//!
//! ```text
//!  qemu, guestfish, mount -o loop, cp, dd
//!         │  read at any byte
//!    fuse/      fuser's Filesystem, thin: inode → Image, errno at this border only
//!    image/     Image: bytes above, sectors below; builds the stack of a disk
//!    image/overlay   where asked for: a delta that takes the writes
//!    layer/     block cache + read-ahead, for sources whose blocks are dear
//!    block.rs   trait BlockRead: sectors, never bytes
//!    ┌──────────────┴──────────────┐
//!    vmdk/                         source/raw
//!    built-in engine               a plain file or device
//!    store/  local
//! ```
//! Beside it, `kernel_view/` describes a read-only disk to the kernel, which then reads it without us.
//! Dependencies point downwards only; `image/stack.rs` alone knows all sides. `cli` turns words into a
//! [`config::Config`], and `run` is the order of life of a process.

pub mod block;
pub mod cache;
pub mod cli;
pub mod config;
pub mod error;
pub mod error_log;
pub mod fuse;
pub mod inspect;
pub mod kernel_view;
pub mod overlay;
pub mod process;
mod range_lock;
pub mod source;
pub mod store;
#[cfg(test)]
mod test_disk;
pub mod vmdk;
pub mod volume;
