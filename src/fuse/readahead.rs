//! The read-ahead window of a mount.
//!
//! The kernel gives a FUSE mount 128 KiB. With 1 MiB a sequential reader gets half as much again and more,
//! so we raise it where we may: it is a file of sysfs that only root may write.

use std::fs;
use std::io;

use super::mountinfo::Device;
use crate::error::{Error, Result};

/// A window above which sequential reads gain no more.
pub const DEFAULT_KIB: u64 = 1024;

/// Raises the window of the mount on `device` to `kib`; a larger one stays. What it is afterwards, in KiB.
///
/// Call it after the session's handshake, which sets the window anew. An error is no reason to end: the mount
/// is only slower.
pub fn raise(device: Device, kib: u64) -> Result<u64> {
    let path = format!("/sys/class/bdi/{device}/read_ahead_kb");
    let text = fs::read_to_string(&path).map_err(|e| Error::io(&path, e))?;
    let bad = |e| Error::io(&path, io::Error::new(io::ErrorKind::InvalidData, e));
    let now: u64 = text.trim().parse().map_err(bad)?;
    if now >= kib {
        return Ok(now);
    }
    fs::write(&path, kib.to_string()).map_err(|e| Error::io(&path, e))?;
    Ok(kib)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_device_without_a_window_is_an_error_that_names_the_file() {
        let e = raise(Device { major: 4095, minor: 1 }, DEFAULT_KIB).unwrap_err();
        assert!(e.to_string().starts_with("/sys/class/bdi/4095:1/read_ahead_kb: "), "{e}");
    }
}
