//! The read-ahead window of a mount.
//!
//! The kernel gives a FUSE mount 128 KiB. With 1 MiB a sequential reader gets half as much again and more,
//! so we raise it where we may: it is a file of sysfs that only root may write.

use std::fs;
use std::io;

use super::mountinfo::Device;
use crate::config::Distance;
use crate::error::{Error, Result};

/// A window above which sequential reads gain no more.
const DEFAULT_KIB: u64 = 1024;

/// The same where another process of this machine has to read first.
const BESIDE_KIB: u64 = 2048;

/// The same where an answer takes some milliseconds: what a network of 10 Gbit/s carries in six of them.
const FAR_KIB: u64 = 8192;

/// What a window is to be, in KiB.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Window {
    /// That or larger.
    AtLeast(u64),
    /// Just that: somebody asked for it.
    Exactly(u64),
}

impl Window {
    /// What the disks of a mount want: they share its one window, so the largest bound of `readahead=` that was given,
    /// and the usual one where some disk has none.
    ///
    /// `distance`: that of the farthest disk; what it sends has to be on its way before it is wanted.
    pub fn of(bounds: impl Iterator<Item = Option<u64>>, distance: Distance) -> Self {
        let bounds: Option<Vec<u64>> = bounds.collect();
        match bounds.and_then(|b| b.into_iter().max()) {
            Some(bytes) => Self::Exactly(bytes / 1024),
            None => Self::AtLeast(match distance {
                Distance::Here => DEFAULT_KIB,
                Distance::OtherProcess => BESIDE_KIB,
                Distance::OtherMachine => FAR_KIB,
            }),
        }
    }
}

/// Sets the window of the mount on `device`. What it is afterwards, in KiB.
///
/// Call it after the session's handshake, which sets the window anew. An error is no reason to end: the mount
/// is only slower.
pub fn set(device: Device, window: Window) -> Result<u64> {
    let path = format!("/sys/class/bdi/{device}/read_ahead_kb");
    let text = fs::read_to_string(&path).map_err(|e| Error::io(&path, e))?;
    let bad = |e| Error::io(&path, io::Error::new(io::ErrorKind::InvalidData, e));
    let now: u64 = text.trim().parse().map_err(bad)?;
    let kib = match window {
        Window::AtLeast(kib) if now >= kib => return Ok(now),
        Window::AtLeast(kib) | Window::Exactly(kib) => kib,
    };
    fs::write(&path, kib.to_string()).map_err(|e| Error::io(&path, e))?;
    Ok(kib)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_device_without_a_window_is_an_error_that_names_the_file() {
        let e = set(Device { major: 4095, minor: 1 }, Window::AtLeast(DEFAULT_KIB)).unwrap_err();
        assert!(
            e.to_string().starts_with("/sys/class/bdi/4095:1/read_ahead_kb: "),
            "{e}"
        );
    }

    #[test]
    fn the_largest_bound_counts_and_a_disk_without_one_has_the_usual_window() {
        assert_eq!(
            Window::of([Some(0)].into_iter(), Distance::OtherMachine),
            Window::Exactly(0)
        );
        assert_eq!(
            Window::of([Some(65536), Some(2 << 20)].into_iter(), Distance::Here),
            Window::Exactly(2048)
        );
        assert_eq!(
            Window::of([Some(65536), None].into_iter(), Distance::Here),
            Window::AtLeast(DEFAULT_KIB)
        );
        assert_eq!(
            Window::of([None].into_iter(), Distance::OtherMachine),
            Window::AtLeast(FAR_KIB)
        );
        assert_eq!(
            Window::of([None].into_iter(), Distance::OtherProcess),
            Window::AtLeast(BESIDE_KIB)
        );
    }
}
