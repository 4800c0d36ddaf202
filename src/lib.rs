//! `vmdkfuse` shows virtual disks as raw files in a FUSE mount. The README describes its use.
//!
//! ```text
//!  qemu, guestfish, mount -o loop, cp, dd
//!         │  bytes
//!    fuse/      mount, event loops, opens, errno
//!         │  reads and writes at any byte offset
//!    volume/    one disk as bytes: alignment, range locks, workers, flush; volume/open builds the layers below
//!         │  sectors
//!    overlay/   copy-on-write delta, if one is configured
//!    cache/     single-flight block cache and read-ahead, for expensive sources
//!    block.rs   traits BlockRead, BlockWrite, BlockQueue, Runs
//!    ┌──────────────┴──────────────┐
//!    vmdk/                         source/
//!    native VMDK engine            raw image or device, NBD export, disk of VMware's VDDK
//!    └──────────────┬──────────────┘
//!    cache/     the same cache, per stored file on a web server
//!    store/     the files of an image: in a local folder (identity, locks, atomic creation) or on a web server
//! ```
//!
//! | module | purpose |
//! | --- | --- |
//! | [`fuse`] | creates the mount and answers the kernel's requests from volumes |
//! | [`volume`] | the border between byte offsets (above) and sectors (below) |
//! | [`overlay`] | redirects the writes to a disk into a delta file, and commits that into its base |
//! | [`cache`] | keeps blocks of expensive sources in memory and prefetches for sequential readers |
//! | [`block`] | the traits and units that all disks share |
//! | [`vmdk`] | reads, writes, creates and checks every VMDK format that VMware's products write |
//! | [`source`] | disks that the engine does not read: raw images, NBD exports, disks of VMware's VDDK |
//! | [`store`] | opens and creates the files that an image consists of |
//! | [`kernel_view`] | describes a read-only disk to the kernel, which then reads it without the daemon |
//! | [`cli`] | parses the command line and the configuration file into a [`config::Config`] |
//! | [`config`] | the parsed and validated configuration |
//! | [`process`] | daemon, signals, pidfile, log, and the life of a mount from start to exit status |
//! | [`inspect`] | the actions that examine a disk and print the result |
//!
//! [`write_latch`] decides that nothing of a disk is durable any more, for all engines.
//!
//! Dependencies point downwards only. The engine in `vmdk/` knows no FUSE, no command line and no paths other than the
//! names that it passes to its store. [`error`] and [`error_log`] serve all layers; only `fuse/` converts errors to
//! `errno`.
//!
//! [`block::BlockRead`] and [`block::BlockWrite`] are synchronous: a request to a local disk is answered on the event
//! loop that read it. Requests to a network disk go through a [`block::BlockQueue`] or the worker threads of the
//! volume, so that a slow server does not occupy an event loop.

pub mod block;
pub mod cache;
pub mod cli;
pub mod config;
pub mod error;
pub mod error_log;
mod escape;
mod foreign_library;
pub mod fuse;
pub mod inspect;
pub mod kernel_view;
pub mod mountinfo;
mod mutex;
pub mod overlay;
pub mod process;
mod range_lock;
mod search;
pub mod source;
pub mod store;
#[cfg(test)]
mod test_disk;
pub mod vmdk;
pub mod volume;
pub mod write_latch;
