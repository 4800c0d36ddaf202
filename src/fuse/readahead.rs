//! The read-ahead window of a mount.
//!
//! The kernel gives a FUSE mount 128 KiB. With 1 MiB a sequential reader is faster by half or more, so the window is
//! raised where possible: it is a file in sysfs that only root may write.

use std::fs;
use std::io;

use crate::config::Locality;
use crate::error::{Error, Result};
use crate::mountinfo::Device;

/// Default window in KiB. Sequential reads of a local disk gain nothing from a larger one.
const DEFAULT_KIB: u64 = 1024;

/// Default window in KiB where another process of this machine has to read first.
const OTHER_PROCESS_KIB: u64 = 2048;

/// Default window in KiB where an answer takes some milliseconds: what a network of 10 Gbit/s carries in 6 ms.
const OTHER_MACHINE_KIB: u64 = 8192;

/// Size of a window, in KiB.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Window {
    /// This size, unless the window is larger already.
    AtLeast(u64),
    /// Exactly this size, as configured.
    Exactly(u64),
}

impl Window {
    /// Returns the window for the disks of a mount, which share it. It is the largest `readahead=` of the disks, or the
    /// default if any disk has none.
    ///
    /// `locality` is that of the farthest disk: its blocks have to be requested long before they are read.
    pub fn of(bounds: impl Iterator<Item = Option<u64>>, locality: Locality) -> Self {
        let bounds: Option<Vec<u64>> = bounds.collect();
        match bounds.and_then(|b| b.into_iter().max()) {
            Some(bytes) => Self::Exactly(bytes / 1024),
            None => Self::AtLeast(match locality {
                Locality::Here => DEFAULT_KIB,
                Locality::OtherProcess => OTHER_PROCESS_KIB,
                Locality::OtherMachine => OTHER_MACHINE_KIB,
            }),
        }
    }
}

/// Sets the window of the mount on `device`. Returns the window in KiB afterwards.
///
/// Call it after the session's handshake, which resets the window. An error is not fatal: the mount is only slower.
pub fn set(device: Device, window: Window) -> Result<u64> {
    let path = format!("/sys/class/bdi/{device}/read_ahead_kb");
    let text = fs::read_to_string(&path).map_err(|e| Error::io(&path, e))?;
    let bad = |e| Error::io(&path, io::Error::new(io::ErrorKind::InvalidData, e));
    let current: u64 = text.trim().parse().map_err(bad)?;
    let kib = match window {
        Window::AtLeast(kib) if current >= kib => return Ok(current),
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
    fn the_largest_bound_counts_and_a_disk_without_one_has_the_default_window() {
        assert_eq!(
            Window::of([Some(0)].into_iter(), Locality::OtherMachine),
            Window::Exactly(0)
        );
        assert_eq!(
            Window::of([Some(65536), Some(2 << 20)].into_iter(), Locality::Here),
            Window::Exactly(2048)
        );
        assert_eq!(
            Window::of([Some(65536), None].into_iter(), Locality::Here),
            Window::AtLeast(DEFAULT_KIB)
        );
        assert_eq!(
            Window::of([None].into_iter(), Locality::OtherMachine),
            Window::AtLeast(OTHER_MACHINE_KIB)
        );
        assert_eq!(
            Window::of([None].into_iter(), Locality::OtherProcess),
            Window::AtLeast(OTHER_PROCESS_KIB)
        );
    }
}
