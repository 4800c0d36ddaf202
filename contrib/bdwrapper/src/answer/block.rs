//! Ioctls of the block layer.

use libc::{c_int, c_long, c_uint, c_ulong, c_void};

use crate::disk::{Disk, SECTOR};
use crate::raw::{self, Errno};
use crate::uapi::{self, HdGeometry};

/// Block size of the page cache, in bytes: a page.
const CACHE_BLOCK: c_int = 4096;
/// Read-ahead in sectors: the kernel's default of 128 KiB (`VM_READAHEAD_PAGES`, linux/mm.h).
const READ_AHEAD: c_long = 256;

/// Answers an ioctl of the block layer.
pub(super) fn ioctl(fd: c_int, disk: &Disk, number: u32, argument: *mut c_void) -> Result<(), Errno> {
    match number {
        uapi::BLKGETSIZE => match c_ulong::try_from(disk.sectors) {
            Ok(sectors) => raw::copy_out(argument, sectors),
            Err(_) => Err(libc::EFBIG),
        },
        uapi::BLKGETSIZE64 => raw::copy_out(argument, disk.sectors.wrapping_mul(SECTOR)),
        uapi::BLKSSZGET => raw::copy_out(argument, SECTOR as c_int),
        uapi::BLKPBSZGET | uapi::BLKIOMIN => raw::copy_out(argument, SECTOR as c_uint),
        uapi::BLKBSZGET => raw::copy_out(argument, CACHE_BLOCK),
        uapi::BLKRAGET => raw::copy_out(argument, READ_AHEAD),
        uapi::BLKIOOPT => raw::copy_out::<c_uint>(argument, 0),
        uapi::BLKALIGNOFF => raw::copy_out::<c_int>(argument, 0),
        uapi::BLKROGET => raw::copy_out(argument, c_int::from(disk.read_only)),
        // There are no partition devices that could be stale.
        uapi::BLKRRPART => Ok(()),
        uapi::BLKFLSBUF => raw::fsync(fd),
        _ => {
            let geometry = disk.bios_geometry();
            raw::copy_out(
                argument,
                HdGeometry {
                    heads: geometry.heads,
                    sectors: geometry.sectors,
                    cylinders: geometry.cylinders,
                    start: 0,
                },
            )
        }
    }
}
