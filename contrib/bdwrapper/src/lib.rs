//! An LD_PRELOAD library with which a process that insists on real disks (`/dev/hd*`, `/dev/sd*`) uses any block device
//! or raw file: an LVM volume, an md array, a loop device, a file of a vmdkfuse mount.
//!
//! ```text
//!   the program                       open, dup, close, fcntl, stat, truncate, ioctl, …
//!       │
//!   exports/     one wrapper for each C function; the next definition of the function (dlsym) does the work
//!       │
//!   devices      the listed names and their identities: is this descriptor, or this path, a listed disk?
//!       │
//!   answer/      the disk ioctls of a listed disk: block layer, IDE, SCSI
//!       │
//!   disk         size, geometry, serial number: everything that the answers are derived from
//! ```
//! **No table of descriptors decides.** A descriptor comes by open, fopen, dup, inheritance, a socket, or a vfork child,
//! so a table would be wrong. Each ioctl whose number is answered asks the kernel what the descriptor is (`fstat`), and
//! compares that with the identities of the listed names. An identity is read at the start, and again when a listed name
//! is opened.
//!
//! Rules for all code here, since it runs in any program, in any thread, after fork and in a vfork child:
//! - No lock and no allocation. What is shared is atomic, and valid at any moment at which a process may be killed.
//! - No call of a C function that this library wraps: system calls are made directly (`raw`).
//! - `errno` changes only where the wrapped function fails.
//! - No panic: no indexing, no arithmetic that is checked at run time. The crate uses only `core`.
//! - No value with a destructor in a wrapper: a cancelled thread unwinds through it (`extern "C-unwind"`).
#![no_std]
#![warn(clippy::indexing_slicing, clippy::arithmetic_side_effects, clippy::string_slice)]
#![cfg_attr(test, allow(clippy::indexing_slicing, clippy::arithmetic_side_effects))]

// Provides the panic handler, which `core` needs and no call reaches.
extern crate std;

mod answer;
mod bytes;
mod devices;
mod disk;
mod exports;
mod log;
mod next;
mod raw;
mod start;
mod trusted;
mod uapi;
