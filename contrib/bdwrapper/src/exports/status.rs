//! Functions that describe files: a listed file is a block device, as a listed block device is.
//!
//! The answer of the kernel holds the file's identity, so no further call is needed to know a listed file. What changes is
//! what differs for a block device: its type, its number, and a size of 0.
#![allow(unsafe_code, reason = "functions of C, called by C")]

use libc::{c_char, c_int, c_uint};

use crate::devices::{Identity, TABLE};
use crate::next::wrap;
use crate::raw::{self, Status};

/// Block size that the kernel shows for a block device: a page.
const BLOCK: u32 = 4096;

/// A structure that describes a file.
trait Described {
    /// Returns what it says.
    fn status(&self) -> Status;
    /// Makes it say that the file is a block device with this number.
    fn disguise(&mut self, number: u64);
}

macro_rules! described {
    ($type:ty) => {
        #[allow(clippy::unnecessary_cast, reason = "the types differ between architectures")]
        impl Described for $type {
            fn status(&self) -> Status {
                Status {
                    mode: self.st_mode as u32,
                    dev: self.st_dev as u64,
                    ino: self.st_ino as u64,
                    ..Status::default()
                }
            }

            fn disguise(&mut self, number: u64) {
                self.st_mode = self.st_mode & !libc::S_IFMT | libc::S_IFBLK;
                self.st_rdev = number as _;
                self.st_size = 0;
                self.st_blocks = 0;
                self.st_blksize = BLOCK as _;
            }
        }
    };
}

described!(libc::stat);
described!(libc::stat64);

/// Completes a call that described a file. Keeps `errno`.
///
/// # Safety
/// If `result` is 0, `status` is valid.
unsafe fn described<T: Described>(result: c_int, status: *mut T) -> c_int {
    if result == 0 && TABLE.is_active() {
        // SAFETY: the call succeeded, so it wrote to `status`.
        let status = unsafe { &mut *status };
        if let Some(number) = number_of(&status.status()) {
            status.disguise(number);
        }
    }
    result
}

/// Returns the number that a listed file shows, or `None` for any other file.
fn number_of(status: &Status) -> Option<u64> {
    if !status.is(libc::S_IFREG) {
        return None;
    }
    TABLE.find(Identity::of(status)).map(|device| device.number())
}

/// Completes a call of `statx`: what was not asked for may be missing, so the identity is asked again. Keeps `errno`.
///
/// # Safety
/// If `result` is 0, `status` is valid and `path` is a string.
unsafe fn extended(result: c_int, dir: c_int, path: *const c_char, flags: c_int, status: *mut libc::statx) -> c_int {
    /// Basic flags of `fstatat`; the others of `statx` say how fresh the answer is.
    const FLAGS: c_int = libc::AT_EMPTY_PATH | libc::AT_SYMLINK_NOFOLLOW | libc::AT_NO_AUTOMOUNT;
    if result != 0 || !TABLE.is_active() {
        return result;
    }
    // SAFETY: the call succeeded, so it wrote to `status`.
    let status = unsafe { &mut *status };
    const NEEDED: c_uint = libc::STATX_TYPE | libc::STATX_INO;
    let number = if status.stx_mask & NEEDED == NEEDED {
        number_of(&Status {
            mode: u32::from(status.stx_mode),
            dev: libc::makedev(status.stx_dev_major, status.stx_dev_minor),
            ino: status.stx_ino,
            ..Status::default()
        })
    } else {
        raw::keeping_errno(|| number_of(&raw::stat_at(dir, path, flags & FLAGS).ok()?))
    };
    if let Some(number) = number {
        status.stx_mode = status.stx_mode & !(libc::S_IFMT as u16) | libc::S_IFBLK as u16;
        status.stx_rdev_major = libc::major(number);
        status.stx_rdev_minor = libc::minor(number);
        status.stx_size = 0;
        status.stx_blocks = 0;
        status.stx_blksize = BLOCK;
    }
    result
}

wrap! {
    fn stat(path: *const c_char, status: *mut libc::stat) -> c_int |next| {
        // SAFETY: the arguments are the program's own.
        unsafe { described(next(path, status), status) }
    }

    fn stat64(path: *const c_char, status: *mut libc::stat64) -> c_int |next| {
        // SAFETY: the arguments are the program's own.
        unsafe { described(next(path, status), status) }
    }

    fn lstat(path: *const c_char, status: *mut libc::stat) -> c_int |next| {
        // SAFETY: the arguments are the program's own.
        unsafe { described(next(path, status), status) }
    }

    fn lstat64(path: *const c_char, status: *mut libc::stat64) -> c_int |next| {
        // SAFETY: the arguments are the program's own.
        unsafe { described(next(path, status), status) }
    }

    fn fstat(fd: c_int, status: *mut libc::stat) -> c_int |next| {
        // SAFETY: the arguments are the program's own.
        unsafe { described(next(fd, status), status) }
    }

    fn fstat64(fd: c_int, status: *mut libc::stat64) -> c_int |next| {
        // SAFETY: the arguments are the program's own.
        unsafe { described(next(fd, status), status) }
    }

    fn fstatat(dir: c_int, path: *const c_char, status: *mut libc::stat, flags: c_int) -> c_int |next| {
        // SAFETY: the arguments are the program's own.
        unsafe { described(next(dir, path, status, flags), status) }
    }

    fn fstatat64(dir: c_int, path: *const c_char, status: *mut libc::stat64, flags: c_int) -> c_int |next| {
        // SAFETY: the arguments are the program's own.
        unsafe { described(next(dir, path, status, flags), status) }
    }

    fn __xstat(version: c_int, path: *const c_char, status: *mut libc::stat) -> c_int |next| {
        // SAFETY: the arguments are the program's own.
        unsafe { described(next(version, path, status), status) }
    }

    fn __xstat64(version: c_int, path: *const c_char, status: *mut libc::stat64) -> c_int |next| {
        // SAFETY: the arguments are the program's own.
        unsafe { described(next(version, path, status), status) }
    }

    fn __lxstat(version: c_int, path: *const c_char, status: *mut libc::stat) -> c_int |next| {
        // SAFETY: the arguments are the program's own.
        unsafe { described(next(version, path, status), status) }
    }

    fn __lxstat64(version: c_int, path: *const c_char, status: *mut libc::stat64) -> c_int |next| {
        // SAFETY: the arguments are the program's own.
        unsafe { described(next(version, path, status), status) }
    }

    fn __fxstat(version: c_int, fd: c_int, status: *mut libc::stat) -> c_int |next| {
        // SAFETY: the arguments are the program's own.
        unsafe { described(next(version, fd, status), status) }
    }

    fn __fxstat64(version: c_int, fd: c_int, status: *mut libc::stat64) -> c_int |next| {
        // SAFETY: the arguments are the program's own.
        unsafe { described(next(version, fd, status), status) }
    }

    fn __fxstatat(
        version: c_int, dir: c_int, path: *const c_char, status: *mut libc::stat, flags: c_int
    ) -> c_int |next| {
        // SAFETY: the arguments are the program's own.
        unsafe { described(next(version, dir, path, status, flags), status) }
    }

    fn __fxstatat64(
        version: c_int, dir: c_int, path: *const c_char, status: *mut libc::stat64, flags: c_int
    ) -> c_int |next| {
        // SAFETY: the arguments are the program's own.
        unsafe { described(next(version, dir, path, status, flags), status) }
    }

    fn statx(dir: c_int, path: *const c_char, flags: c_int, mask: c_uint, status: *mut libc::statx) -> c_int |next| {
        // SAFETY: the arguments are the program's own.
        unsafe { extended(next(dir, path, flags, mask, status), dir, path, flags, status) }
    }
}
