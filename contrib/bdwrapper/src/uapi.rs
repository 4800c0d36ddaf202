//! Numbers and structures of the kernel's disk ioctls, each with its source in `include/uapi/` of Linux 6.1.
//!
//! The encodings of `asm-generic/ioctl.h` hold on x86 and ARM, where hypervisors run; they differ on others.
#[cfg(not(any(
    target_arch = "x86_64",
    target_arch = "x86",
    target_arch = "aarch64",
    target_arch = "arm"
)))]
compile_error!("vmware-bdwrapper knows the ioctl numbers of x86 and ARM only");

use libc::{c_int, c_uint, c_ulong, c_void};

/// `_IO(kind, number)`: a number without size and direction.
const fn plain(kind: u8, number: u8) -> u32 {
    ((kind as u32) << 8) | number as u32
}

/// `_IOR(kind, number, size_t)`: the kernel writes a `size_t`, whose size is part of the number.
const fn reads_size(kind: u8, number: u8) -> u32 {
    (2 << 30) | ((size_of::<usize>() as u32) << 16) | plain(kind, number)
}

// linux/hdreg.h
/// Geometry of the disk, a `struct hd_geometry`.
pub(crate) const HDIO_GETGEO: u32 = 0x0301;
/// The 512 bytes of IDENTIFY.
pub(crate) const HDIO_GET_IDENTITY: u32 = 0x030d;
/// A command of IDE: 4 bytes (command, sector number, feature, sectors of data), then the data.
pub(crate) const HDIO_DRIVE_CMD: u32 = 0x031f;

// linux/fs.h
/// Read-only flag, an `int`.
pub(crate) const BLKROGET: u32 = plain(0x12, 94);
/// Reads the partition table again.
pub(crate) const BLKRRPART: u32 = plain(0x12, 95);
/// Size in sectors, an `unsigned long`.
pub(crate) const BLKGETSIZE: u32 = plain(0x12, 96);
/// Flushes the buffers.
pub(crate) const BLKFLSBUF: u32 = plain(0x12, 97);
/// Read-ahead in sectors, a `long`.
pub(crate) const BLKRAGET: u32 = plain(0x12, 99);
/// Logical sector size, an `int`.
pub(crate) const BLKSSZGET: u32 = plain(0x12, 104);
/// Block size of the page cache, an `int` in spite of the number's `size_t`.
pub(crate) const BLKBSZGET: u32 = reads_size(0x12, 112);
/// Size in bytes, a `u64` in spite of the number's `size_t`.
pub(crate) const BLKGETSIZE64: u32 = reads_size(0x12, 114);
/// Smallest good request in bytes, an `unsigned int`.
pub(crate) const BLKIOMIN: u32 = plain(0x12, 120);
/// Best request in bytes, an `unsigned int`; 0 if unknown.
pub(crate) const BLKIOOPT: u32 = plain(0x12, 121);
/// Offset of the first physical sector in bytes, an `int`.
pub(crate) const BLKALIGNOFF: u32 = plain(0x12, 122);
/// Physical sector size, an `unsigned int`.
pub(crate) const BLKPBSZGET: u32 = plain(0x12, 123);

// scsi/sg.h
/// Version of the SCSI interface, an `int`.
pub(crate) const SG_GET_VERSION_NUM: u32 = 0x2282;
/// A SCSI command, a `struct sg_io_hdr`.
pub(crate) const SG_IO: u32 = 0x2285;

// scsi/scsi_ioctl.h, include/scsi/scsi.h
/// Target, LUN, channel and host, a `struct scsi_idlun`.
pub(crate) const SCSI_IOCTL_GET_IDLUN: u32 = 0x5382;
/// Number of the host, an `int`.
pub(crate) const SCSI_IOCTL_GET_BUS_NUMBER: u32 = 0x5386;

/// Answer of `SG_GET_VERSION_NUM` for a disk (`sg_version_num` in block/scsi_ioctl.c): version 3.5.27.
pub(crate) const SG_VERSION: c_int = 30527;

/// `struct hd_geometry` of linux/hdreg.h.
#[repr(C)]
#[derive(Clone, Copy)]
pub(crate) struct HdGeometry {
    pub(crate) heads: u8,
    pub(crate) sectors: u8,
    pub(crate) cylinders: u16,
    pub(crate) start: c_ulong,
}

/// `struct scsi_idlun` of drivers/scsi/scsi_ioctl.c.
#[repr(C)]
#[derive(Clone, Copy)]
pub(crate) struct ScsiIdLun {
    pub(crate) four_in_one: u32,
    pub(crate) host_unique_id: u32,
}

/// `struct sg_io_hdr` of scsi/sg.h.
#[repr(C)]
#[derive(Clone, Copy)]
pub(crate) struct SgIoHdr {
    pub(crate) interface_id: c_int,
    pub(crate) dxfer_direction: c_int,
    pub(crate) cmd_len: u8,
    pub(crate) mx_sb_len: u8,
    pub(crate) iovec_count: u16,
    pub(crate) dxfer_len: c_uint,
    pub(crate) dxferp: *mut c_void,
    pub(crate) cmdp: *mut c_void,
    pub(crate) sbp: *mut c_void,
    pub(crate) timeout: c_uint,
    pub(crate) flags: c_uint,
    pub(crate) pack_id: c_int,
    pub(crate) usr_ptr: *mut c_void,
    pub(crate) status: u8,
    pub(crate) masked_status: u8,
    pub(crate) msg_status: u8,
    pub(crate) sb_len_wr: u8,
    pub(crate) host_status: u16,
    pub(crate) driver_status: u16,
    pub(crate) resid: c_int,
    pub(crate) duration: c_uint,
    pub(crate) info: c_uint,
}

/// `interface_id` of a `struct sg_io_hdr`.
pub(crate) const SG_INTERFACE: c_int = b'S' as c_int;
/// `dxfer_direction`: from the disk to memory.
pub(crate) const SG_DXFER_FROM_DEV: c_int = -3;
/// `dxfer_direction`: both ways; the result goes to memory.
pub(crate) const SG_DXFER_TO_FROM_DEV: c_int = -4;
/// `info`: the command did not end well.
pub(crate) const SG_INFO_CHECK: c_uint = 1;
/// `driver_status`: there is sense data (`DRIVER_SENSE`).
pub(crate) const DRIVER_SENSE: u16 = 8;

/// `struct iovec` of linux/uio.h, an element of `dxferp` if `iovec_count` is not 0.
#[repr(C)]
#[derive(Clone, Copy)]
pub(crate) struct IoVec {
    pub(crate) base: *mut c_void,
    pub(crate) len: usize,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_those_of_the_kernel() {
        assert_eq!(BLKROGET, 0x125e);
        assert_eq!(BLKGETSIZE, 0x1260);
        assert_eq!(BLKSSZGET, libc::BLKSSZGET as u32);
        assert_eq!(BLKPBSZGET, libc::BLKPBSZGET as u32);
        assert_eq!(
            BLKGETSIZE64,
            if cfg!(target_pointer_width = "64") {
                0x8008_1272
            } else {
                0x8004_1272
            }
        );
        assert_eq!(
            size_of::<SgIoHdr>(),
            if cfg!(target_pointer_width = "64") { 88 } else { 64 }
        );
    }
}
