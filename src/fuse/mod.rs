//! The FUSE side: the mount, the threads that serve it, and what the kernel asks, answered from images.
//!
//! ```text
//!   mountinfo     what is mounted where
//!   mount         makes and removes the mount ── fusermount: the same by the setuid helper
//!   session       serves the kernel's requests on threads of their own
//!   fs            the answers ── errno, faults: what errors become
//!   node          one disk: how an open is served ── change: writes ── flush: who makes them durable ── attr
//!     view        its second node, which the kernel reads by itself
//!   lane          work for remote disks that may wait ── loops: which event loops may be busy with something else
//!   readahead     the mount's read-ahead window
//!   probe         a first read through the mount, by a process of its own
//!   watcher       auto_unmount, by another one
//! ```

mod attributes;
pub mod auto_unmount;
mod disk_file;
mod errno;
mod flush;
pub mod fs;
mod fusermount;
mod kernel_view_node;
mod loop_budget;
pub mod mount;
pub mod mountinfo;
pub mod probe;
pub mod readahead;
pub mod session;
#[cfg(test)]
mod testfs;
#[cfg(test)]
mod tests;
mod write;

pub use fs::{DiskFs, Disks, Requests};
