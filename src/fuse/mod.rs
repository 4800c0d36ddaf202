//! The FUSE side: creates the mount, runs the threads that serve it, and answers the kernel's requests from volumes.
//!
//! ```text
//!   mount              creates and removes the mount ── fusermount: the same through the setuid helper
//!   session            the threads that take requests
//!   fs                 the file system ── operations: its requests ── errno: conversion of errors
//!   tree               which disk or directory an inode is ── name_requests: lookup, readdir, forget ── stat
//!   export_names       names of the exports of a server
//!   disk_file          one disk: its content and reads ── open ── write ── attributes
//!     open_plan        pure decision on how an open is served ── open_state: the current opens
//!     kernel_view_node its second inode, which the kernel reads without the daemon ── kernel_view_builder
//!   readahead          the mount's read-ahead window
//!   probe              a first read through the mount, by a separate process
//!   auto_unmount       removes the mount of a killed daemon, by a separate process
//! ```
//!
//! Threads: the main thread only handles signals and the unmount. Event loops take requests and submit them to the volume
//! of the disk, which decides where each may wait (`volume::submit`). Completions hold the disk file, and may run on any
//! thread. At least one loop is always free to take requests.
//!
//! Lock order: `opens` of a disk file first. Its `volume`, its attributes and the state of its kernel view node are
//! leaf locks below that.

mod attributes;
pub mod auto_unmount;
mod disk_file;
mod errno;
mod export_names;
pub mod fs;
mod fusermount;
mod kernel_view_builder;
mod kernel_view_node;
pub mod mount;
pub(crate) mod mount_flags;
mod name_requests;
mod open;
mod open_plan;
mod open_state;
mod own_mounts;
pub mod probe;
pub mod readahead;
pub mod session;
mod stat;
pub mod target;
#[cfg(test)]
mod testfs;
#[cfg(test)]
mod tests;
mod tree;
mod write;

pub use fs::{DiskFs, Disks, Requests};
