//! Answers to the disk ioctls of listed disks.
//!
//! ```text
//!   mod     which numbers are answered; the disk behind the descriptor
//!   block   block layer: sizes, geometry, flush
//!   ata     IDE: IDENTIFY
//!   sg      SG_IO: the memory of a SCSI command
//!   scsi    what a SCSI command does
//! ```

mod ata;
mod block;
mod scsi;
mod sg;

use libc::{c_int, c_void};

use crate::devices::TABLE;
use crate::disk::{Bus, Disk};
use crate::log::{self, Level};
use crate::raw::{self, Errno};
use crate::uapi;

/// An ioctl that is answered.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Request {
    Block(u32),
    Ata(u32),
    Scsi(u32),
}

impl Request {
    fn of(number: u32) -> Option<Self> {
        match number {
            uapi::BLKROGET
            | uapi::BLKRRPART
            | uapi::BLKGETSIZE
            | uapi::BLKFLSBUF
            | uapi::BLKRAGET
            | uapi::BLKSSZGET
            | uapi::BLKBSZGET
            | uapi::BLKGETSIZE64
            | uapi::BLKIOMIN
            | uapi::BLKIOOPT
            | uapi::BLKALIGNOFF
            | uapi::BLKPBSZGET
            | uapi::HDIO_GETGEO => Some(Self::Block(number)),
            uapi::HDIO_GET_IDENTITY | uapi::HDIO_DRIVE_CMD => Some(Self::Ata(number)),
            uapi::SG_IO | uapi::SG_GET_VERSION_NUM | uapi::SCSI_IOCTL_GET_IDLUN | uapi::SCSI_IOCTL_GET_BUS_NUMBER => {
                Some(Self::Scsi(number))
            }
            _ => None,
        }
    }
}

/// Answers an ioctl, or returns `None` if it is the kernel's. Keeps `errno`.
///
/// The numbers are 32 bits for the kernel; programs that pass an `int` extend its sign.
#[inline]
pub(crate) fn ioctl(fd: c_int, number: u32, argument: *mut c_void) -> Option<Result<(), Errno>> {
    if !TABLE.is_active() {
        return None;
    }
    let request = Request::of(number)?;
    raw::keeping_errno(|| answer(fd, request, number, argument))
}

fn answer(fd: c_int, request: Request, number: u32, argument: *mut c_void) -> Option<Result<(), Errno>> {
    let (device, status) = TABLE.find_open(fd)?;
    // A descriptor that only names the file (O_PATH) cannot do any ioctl; the kernel says so.
    if raw::open_flags(fd).is_ok_and(|flags| flags & libc::O_PATH != 0) {
        return None;
    }
    let result = device.disk(fd, &status).and_then(|disk| match request {
        Request::Block(number) => block::ioctl(fd, &disk, number, argument),
        Request::Ata(number) => ata::ioctl(&disk, number, argument),
        Request::Scsi(_) if disk.bus == Bus::Ide => Err(libc::EINVAL),
        Request::Scsi(number) => scsi_ioctl(fd, &disk, number, argument),
    });
    log::print(Level::Ioctl, |line| {
        line.push(TABLE.name_of(device).to_bytes()).push(b": ioctl 0x");
        line.push_hex(u64::from(number), 4).push(b" on descriptor ");
        line.push_decimal(u64::from(fd.unsigned_abs()));
        match result {
            Ok(()) => line.push(b": answered"),
            Err(errno) => line.push(b": error ").push_decimal(u64::from(errno.unsigned_abs())),
        };
    });
    Some(result)
}

/// Answers an ioctl of the SCSI layer. Each SCSI name is a target of its own on host 0, channel 0, LUN 0.
fn scsi_ioctl(fd: c_int, disk: &Disk, number: u32, argument: *mut c_void) -> Result<(), Errno> {
    match number {
        uapi::SG_IO => sg::ioctl(fd, disk, argument),
        uapi::SG_GET_VERSION_NUM => raw::copy_out(argument, uapi::SG_VERSION),
        uapi::SCSI_IOCTL_GET_BUS_NUMBER => raw::copy_out::<c_int>(argument, 0),
        _ => raw::copy_out(
            argument,
            uapi::ScsiIdLun {
                four_in_one: u32::from(disk.target),
                host_unique_id: 0,
            },
        ),
    }
}
