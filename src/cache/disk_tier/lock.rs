//! OFD locks on byte ranges, released on drop and at the end of the process.

use std::fs::File;
use std::ops::Range;
use std::sync::Arc;

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, fcntl};

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum LockMode {
    Shared,
    Exclusive,
}

/// Lock on bytes of a file. Another open of the same file is another owner, also within this process.
#[derive(Debug)]
pub(super) struct Lock {
    file: Arc<File>,
    bytes: Range<u64>,
}

impl Lock {
    /// Takes a lock, or returns `None` if another owner has a conflicting one. Errors: the file system has no locks.
    pub(super) fn take(file: &Arc<File>, bytes: Range<u64>, mode: LockMode) -> nix::Result<Option<Self>> {
        let kind = match mode {
            LockMode::Shared => libc::F_RDLCK,
            LockMode::Exclusive => libc::F_WRLCK,
        };
        match fcntl(&**file, FcntlArg::F_OFD_SETLK(&range(&bytes, kind))) {
            Ok(_) => Ok(Some(Self {
                file: Arc::clone(file),
                bytes,
            })),
            Err(Errno::EAGAIN | Errno::EACCES) => Ok(None),
            Err(e) => Err(e),
        }
    }
}

impl Drop for Lock {
    fn drop(&mut self) {
        let _ = fcntl(&*self.file, FcntlArg::F_OFD_SETLK(&range(&self.bytes, libc::F_UNLCK)));
    }
}

fn range(bytes: &Range<u64>, kind: libc::c_int) -> libc::flock {
    libc::flock {
        l_type: kind as libc::c_short,
        l_whence: libc::SEEK_SET as libc::c_short,
        l_start: bytes.start as libc::off_t,
        l_len: (bytes.end - bytes.start) as libc::off_t,
        l_pid: 0,
    }
}
