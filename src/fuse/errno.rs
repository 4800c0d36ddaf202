//! Errors become numbers here, and nowhere else.

use fuser::Errno;

use crate::error::{Error, ErrorKind};

/// What the kernel is told.
pub(crate) fn errno(error: &Error) -> Errno {
    match error.kind() {
        // of a source's own failures only these mean the same to a reader of the file; a file that is
        // gone or not permitted below is an I/O error above
        ErrorKind::Os(code @ (libc::ENOSPC | libc::EDQUOT | libc::ENOMEM | libc::ETIMEDOUT | libc::EINTR)) => {
            Errno::from_i32(code)
        }
        ErrorKind::Os(_)
        | ErrorKind::NotFound
        | ErrorKind::Corrupt
        | ErrorKind::Unsupported
        | ErrorKind::Policy
        | ErrorKind::Usage => Errno::EIO,
        ErrorKind::Busy => Errno::EBUSY,
        ErrorKind::ReadOnly => Errno::EROFS,
        ErrorKind::OutOfRange => Errno::EINVAL,
    }
}
