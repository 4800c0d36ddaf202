//! SG_IO: takes a SCSI command from the memory of the program, and returns data, status and sense data.

use libc::{c_int, c_void};

use super::scsi::{self, CDB, Outcome, Sense};
use crate::disk::Disk;
use crate::raw::{self, Errno};
use crate::uapi::{DRIVER_SENSE, IoVec, SG_DXFER_FROM_DEV, SG_DXFER_TO_FROM_DEV, SG_INFO_CHECK, SG_INTERFACE, SgIoHdr};

/// Status CHECK CONDITION of SCSI.
const CHECK_CONDITION: u8 = 2;
/// Longest CDB that the kernel accepts here (`SCSI_MAX_VARLEN_CDB_SIZE` is longer; disks take `BLK_MAX_CDB`).
const LONGEST_CDB: u8 = 32;

/// Answers SG_IO.
pub(super) fn ioctl(fd: c_int, disk: &Disk, argument: *mut c_void) -> Result<(), Errno> {
    let mut header = header(argument)?;
    if header.interface_id != SG_INTERFACE || header.cmd_len > LONGEST_CDB {
        return Err(libc::EINVAL);
    }
    let mut cdb = [0; CDB];
    let len = CDB.min(usize::from(header.cmd_len));
    raw::copy_bytes_in(cdb.get_mut(..len).unwrap_or_default(), header.cmdp)?;
    let sent = match scsi::execute(disk, &cdb) {
        Outcome::Good(data) => Ok(send(&header, data.as_slice())?),
        Outcome::Flush => raw::fsync(fd).map(|()| 0).or(Err(Sense::WRITE_ERROR)),
        Outcome::Check(sense) => Err(sense),
    };
    header.resid = header.dxfer_len.saturating_sub(sent.unwrap_or(0)) as c_int;
    header.status = 0;
    header.masked_status = 0;
    header.msg_status = 0;
    header.sb_len_wr = 0;
    header.host_status = 0;
    header.driver_status = 0;
    header.duration = 0;
    header.info = 0;
    if let Err(sense) = sent {
        report(&mut header, sense)?;
    }
    raw::copy_out(argument, header)
}

#[allow(unsafe_code, reason = "a structure from the memory of the program")]
fn header(argument: *const c_void) -> Result<SgIoHdr, Errno> {
    // SAFETY: the structure consists of integers and pointers, so any bits are valid.
    unsafe { raw::copy_in(argument) }
}

/// Sends data to the program; returns how much it took.
fn send(header: &SgIoHdr, data: &[u8]) -> Result<u32, Errno> {
    let is_wanted = matches!(header.dxfer_direction, SG_DXFER_FROM_DEV | SG_DXFER_TO_FROM_DEV);
    let len = data.len().min(if is_wanted { header.dxfer_len as usize } else { 0 });
    let mut rest = data.get(..len).unwrap_or_default();
    if header.iovec_count == 0 {
        raw::copy_bytes_out(header.dxferp, rest)?;
        return Ok(len as u32);
    }
    for i in 0..usize::from(header.iovec_count) {
        if rest.is_empty() {
            break;
        }
        let part = part(header.dxferp.cast::<IoVec>().wrapping_add(i).cast())?;
        let (now, later) = rest.split_at_checked(part.len.min(rest.len())).unwrap_or_default();
        raw::copy_bytes_out(part.base, now)?;
        rest = later;
    }
    Ok(len.saturating_sub(rest.len()) as u32)
}

#[allow(unsafe_code, reason = "a structure from the memory of the program")]
fn part(at: *const c_void) -> Result<IoVec, Errno> {
    // SAFETY: the structure consists of integers and pointers, so any bits are valid.
    unsafe { raw::copy_in(at) }
}

/// Reports CHECK CONDITION and the sense data, as far as the program has room for it.
fn report(header: &mut SgIoHdr, sense: Sense) -> Result<(), Errno> {
    header.status = CHECK_CONDITION;
    // The status without its lowest bit, which is reserved.
    header.masked_status = CHECK_CONDITION >> 1;
    header.info = SG_INFO_CHECK;
    header.driver_status = DRIVER_SENSE;
    let sense = sense.fixed();
    if !header.sbp.is_null() {
        let room = usize::from(header.mx_sb_len).min(sense.len());
        raw::copy_bytes_out(header.sbp, sense.get(..room).unwrap_or_default())?;
        header.sb_len_wr = room as u8;
    }
    Ok(())
}
