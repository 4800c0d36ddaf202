//! Conversion of errors to errno. No other module does this.

use fuser::Errno;

use crate::error::{Error, ErrorKind};

/// Returns the errno that answers a request to zero a range which failed with `error`: one that the source does not
/// support can be done by writing zeroes.
pub(crate) fn zeroing_errno(error: &Error) -> Errno {
    match error.kind() {
        ErrorKind::Unsupported => Errno::EOPNOTSUPP,
        _ => errno(error),
    }
}

/// Returns the errno that answers a request which failed with `error`.
pub(crate) fn errno(error: &Error) -> Errno {
    match error.kind() {
        // Of a source's own errors only these mean the same to a reader of the file. A source file that is missing or
        // not accessible is an I/O error of the disk: the disk's own name is there and was opened.
        ErrorKind::Os(
            code @ (libc::ENOSPC | libc::EDQUOT | libc::EFBIG | libc::ENOMEM | libc::ETIMEDOUT | libc::EINTR),
        ) => Errno::from_i32(code),
        ErrorKind::Os(_)
        | ErrorKind::NotFound
        | ErrorKind::Corrupt
        | ErrorKind::Unsupported
        | ErrorKind::Policy
        | ErrorKind::Usage => Errno::EIO,
        ErrorKind::WouldBlock => Errno::EAGAIN,
        ErrorKind::Busy => Errno::EBUSY,
        ErrorKind::ReadOnly => Errno::EROFS,
        ErrorKind::OutOfRange => Errno::EINVAL,
    }
}
