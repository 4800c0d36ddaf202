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

/// Reads of one disk of the mount.
#[derive(Debug, Clone, Copy)]
pub struct DiskReads {
    /// `readahead=`, in bytes.
    pub bound: Option<u64>,
    /// Distance of its data.
    pub locality: Locality,
    /// True if the daemon reads ahead as far as the distance needs. A large window of the kernel is in its way then: all of
    /// its requests come at once, and each would take a connection for its MiB from the long fetches of the read-ahead.
    pub read_ahead_by_daemon: bool,
}

impl DiskReads {
    /// Returns the default window in KiB.
    fn default_kib(&self) -> u64 {
        match self.locality {
            Locality::Here => DEFAULT_KIB,
            Locality::OtherMachine if !self.read_ahead_by_daemon => OTHER_MACHINE_KIB,
            Locality::OtherProcess | Locality::OtherMachine => OTHER_PROCESS_KIB,
        }
    }

    /// Returns the window in KiB that the user asks for.
    fn asked_kib(&self) -> Option<u64> {
        let most = if self.read_ahead_by_daemon {
            self.default_kib()
        } else {
            u64::MAX
        };
        self.bound.map(|bytes| (bytes / 1024).min(most))
    }
}

impl Window {
    /// Returns the window for the disks of a mount, which share it. It is the largest `readahead=` of the disks, or the
    /// largest default if any disk has none: the farthest blocks have to be requested long before they are read.
    pub fn of(disks: &[DiskReads]) -> Self {
        let asked: Option<Vec<u64>> = disks.iter().map(DiskReads::asked_kib).collect();
        match asked.and_then(|asked| asked.into_iter().max()) {
            Some(kib) => Self::Exactly(kib),
            None => Self::AtLeast(disks.iter().map(DiskReads::default_kib).max().unwrap_or(DEFAULT_KIB)),
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

    fn disk(bound: Option<u64>, locality: Locality) -> DiskReads {
        DiskReads {
            bound,
            locality,
            read_ahead_by_daemon: false,
        }
    }

    #[test]
    fn the_largest_bound_counts_and_a_disk_without_one_has_the_default_window() {
        use Locality::{Here, OtherMachine, OtherProcess};
        for (disks, window) in [
            (&[disk(Some(0), OtherMachine)][..], Window::Exactly(0)),
            (
                &[disk(Some(65536), Here), disk(Some(2 << 20), Here)],
                Window::Exactly(2048),
            ),
            (
                &[disk(Some(65536), Here), disk(None, Here)],
                Window::AtLeast(DEFAULT_KIB),
            ),
            (
                &[disk(None, Here), disk(None, OtherMachine)],
                Window::AtLeast(OTHER_MACHINE_KIB),
            ),
            (&[disk(None, OtherProcess)], Window::AtLeast(OTHER_PROCESS_KIB)),
            (&[], Window::AtLeast(DEFAULT_KIB)),
        ] {
            assert_eq!(Window::of(disks), window, "{disks:?}");
        }
    }

    #[test]
    fn the_kernel_reads_ahead_a_little_where_the_daemon_does() {
        let served = |bound| DiskReads {
            read_ahead_by_daemon: true,
            ..disk(bound, Locality::OtherMachine)
        };
        assert_eq!(Window::of(&[served(None)]), Window::AtLeast(OTHER_PROCESS_KIB));
        assert_eq!(
            Window::of(&[served(Some(64 << 20))]),
            Window::Exactly(OTHER_PROCESS_KIB)
        );
        assert_eq!(Window::of(&[served(Some(65536))]), Window::Exactly(64));
        let other = disk(None, Locality::OtherMachine);
        assert_eq!(Window::of(&[served(None), other]), Window::AtLeast(OTHER_MACHINE_KIB));
    }
}
