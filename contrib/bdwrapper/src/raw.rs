//! System calls, made directly: the C functions of the same name are wrapped, and may be wrapped by other libraries.
//!
//! `syscall` sets `errno` on failure; callers keep it with [`keeping_errno`].
#![allow(unsafe_code, reason = "system calls and the memory of the program")]

use core::mem::MaybeUninit;

use libc::{c_char, c_int, c_long, c_void};

#[cfg(target_pointer_width = "64")]
use libc::{SYS_fstat as FSTAT, SYS_newfstatat as FSTATAT, stat as KernelStat};
#[cfg(target_pointer_width = "32")]
use libc::{SYS_fstat64 as FSTAT, SYS_fstatat64 as FSTATAT, stat64 as KernelStat};

/// An error number.
pub(crate) type Errno = c_int;

/// Returns the error number of the thread.
pub(crate) fn errno() -> Errno {
    // SAFETY: the address is that of the thread's own variable, which lives as long as the thread.
    unsafe { *libc::__errno_location() }
}

/// Sets the error number of the thread.
pub(crate) fn set_errno(value: Errno) {
    // SAFETY: as in `errno`.
    unsafe { *libc::__errno_location() = value }
}

/// Runs `body` and restores the error number of the thread.
pub(crate) fn keeping_errno<T>(body: impl FnOnce() -> T) -> T {
    let kept = errno();
    let result = body();
    set_errno(kept);
    result
}

/// Turns the result of `syscall` into a number or an error.
fn outcome(result: c_long) -> Result<usize, Errno> {
    if result < 0 { Err(errno()) } else { Ok(result as usize) }
}

/// Attributes of a file, as the kernel reports them.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Status {
    pub(crate) mode: u32,
    pub(crate) uid: u32,
    pub(crate) dev: u64,
    pub(crate) ino: u64,
    pub(crate) rdev: u64,
    pub(crate) size: u64,
}

impl Status {
    /// Returns true if the type of the file is this `S_IF…`.
    pub(crate) fn is(&self, kind: libc::mode_t) -> bool {
        self.mode & libc::S_IFMT == kind
    }

    #[allow(clippy::unnecessary_cast, reason = "the types differ between architectures")]
    fn of(status: &KernelStat) -> Self {
        Self {
            mode: status.st_mode as u32,
            uid: status.st_uid as u32,
            dev: status.st_dev as u64,
            ino: status.st_ino as u64,
            rdev: status.st_rdev as u64,
            size: status.st_size as u64,
        }
    }
}

/// Asks what a descriptor is.
pub(crate) fn fstat(fd: c_int) -> Result<Status, Errno> {
    let mut status = MaybeUninit::<KernelStat>::zeroed();
    // SAFETY: the kernel writes one `KernelStat` to the address, which is valid for that.
    outcome(unsafe { libc::syscall(FSTAT, fd, status.as_mut_ptr()) })?;
    // SAFETY: all zeroes is a valid value, and the kernel wrote one.
    Ok(Status::of(unsafe { status.assume_init_ref() }))
}

/// Asks what a path is; `flags` as for `fstatat`. The kernel checks the address, so any value of `path` is safe.
pub(crate) fn stat_at(dir: c_int, path: *const c_char, flags: c_int) -> Result<Status, Errno> {
    let mut status = MaybeUninit::<KernelStat>::zeroed();
    // SAFETY: the kernel checks `path`, and writes one `KernelStat` to an address that is valid for that.
    outcome(unsafe { libc::syscall(FSTATAT, dir, path, status.as_mut_ptr(), flags) })?;
    // SAFETY: as in `fstat`.
    Ok(Status::of(unsafe { status.assume_init_ref() }))
}

/// Reads the target of a symbolic link into `to`; returns its length. `path` ends with a NUL.
pub(crate) fn read_link(path: &[u8], to: &mut [u8]) -> Result<usize, Errno> {
    // SAFETY: the kernel reads `path` up to its NUL, checks the address, and writes at most `to.len()` bytes.
    outcome(unsafe {
        libc::syscall(
            libc::SYS_readlinkat,
            libc::AT_FDCWD,
            path.as_ptr(),
            to.as_mut_ptr(),
            to.len(),
        )
    })
}

/// Makes the content of the file durable.
pub(crate) fn fsync(fd: c_int) -> Result<(), Errno> {
    // SAFETY: no memory is passed.
    outcome(unsafe { libc::syscall(libc::SYS_fsync, fd) }).map(drop)
}

/// Returns the flags of an open file (`F_GETFL`).
pub(crate) fn open_flags(fd: c_int) -> Result<c_int, Errno> {
    #[cfg(target_pointer_width = "64")]
    const FCNTL: c_long = libc::SYS_fcntl;
    #[cfg(target_pointer_width = "32")]
    const FCNTL: c_long = libc::SYS_fcntl64;
    // SAFETY: no memory is passed.
    outcome(unsafe { libc::syscall(FCNTL, fd, libc::F_GETFL) }).map(|flags| flags as c_int)
}

/// Returns true if the file system of the descriptor is mounted read-only.
pub(crate) fn on_read_only_mount(fd: c_int) -> bool {
    /// `ST_RDONLY` of linux/statfs.h.
    const READ_ONLY: u64 = 1;
    let mut status = MaybeUninit::<libc::statfs64>::zeroed();
    #[cfg(target_pointer_width = "64")]
    // SAFETY: the kernel writes one `struct statfs` to the address, which is valid for that.
    let result = unsafe { libc::syscall(libc::SYS_fstatfs, fd, status.as_mut_ptr()) };
    #[cfg(target_pointer_width = "32")]
    // SAFETY: as above; the kernel is told the size, and refuses another one.
    let result = unsafe {
        libc::syscall(
            libc::SYS_fstatfs64,
            fd,
            size_of::<libc::statfs64>(),
            status.as_mut_ptr(),
        )
    };
    // SAFETY: all zeroes is a valid value, and the kernel wrote one if it did not fail.
    let flags = unsafe { status.assume_init_ref() }.f_flags;
    #[allow(clippy::unnecessary_cast, reason = "the types differ between architectures")]
    (result == 0 && flags as u64 & READ_ONLY != 0)
}

/// Calls an ioctl of the kernel that writes one `T`.
///
/// # Safety
/// The ioctl writes at most one `T` and has no other effect on memory.
pub(crate) unsafe fn ioctl_read<T: Copy + Default>(fd: c_int, number: u32) -> Result<T, Errno> {
    let mut value = T::default();
    // SAFETY: the caller promises that the kernel writes at most one `T`.
    outcome(unsafe { libc::syscall(libc::SYS_ioctl, fd, number, &raw mut value) })?;
    Ok(value)
}

/// Writes to the standard error; a failure is ignored.
pub(crate) fn write_stderr(text: &[u8]) {
    // SAFETY: the kernel reads `text.len()` bytes from the address of `text`.
    let _ = unsafe { libc::syscall(libc::SYS_write, libc::STDERR_FILENO, text.as_ptr(), text.len()) };
}

/// Copies a value to memory that the program named. Fails with EFAULT where the kernel would.
pub(crate) fn copy_out<T: Copy>(to: *mut c_void, value: T) -> Result<(), Errno> {
    copy(
        libc::SYS_process_vm_writev,
        (&raw const value).cast_mut().cast(),
        to,
        size_of::<T>(),
    )
}

/// Copies bytes to memory that the program named, as [`copy_out`] does.
pub(crate) fn copy_bytes_out(to: *mut c_void, bytes: &[u8]) -> Result<(), Errno> {
    copy(
        libc::SYS_process_vm_writev,
        bytes.as_ptr().cast_mut().cast(),
        to,
        bytes.len(),
    )
}

/// Reads a value from memory that the program named. Fails with EFAULT where the kernel would.
///
/// # Safety
/// Every pattern of bits is a valid `T`.
pub(crate) unsafe fn copy_in<T: Copy>(from: *const c_void) -> Result<T, Errno> {
    let mut value = MaybeUninit::<T>::zeroed();
    copy(
        libc::SYS_process_vm_readv,
        value.as_mut_ptr().cast(),
        from.cast_mut(),
        size_of::<T>(),
    )?;
    // SAFETY: the caller promises that any bits are a `T`.
    Ok(unsafe { value.assume_init() })
}

/// Reads bytes from memory that the program named, as [`copy_in`] does.
pub(crate) fn copy_bytes_in(to: &mut [u8], from: *const c_void) -> Result<(), Errno> {
    copy(
        libc::SYS_process_vm_readv,
        to.as_mut_ptr().cast(),
        from.cast_mut(),
        to.len(),
    )
}

/// Copies between `own` memory and memory of the program, whose address may be wrong.
///
/// A plain copy to a wrong address would end the process with SIGSEGV, where an ioctl of the kernel fails with EFAULT.
/// So the kernel copies: a thread may always do that with its own memory. Only where the kernel lacks the call, or a
/// filter forbids it, is the copy a plain one.
fn copy(call: c_long, own: *mut c_void, theirs: *mut c_void, len: usize) -> Result<(), Errno> {
    if len == 0 {
        return Ok(());
    }
    let (local, remote) = (
        libc::iovec {
            iov_base: own,
            iov_len: len,
        },
        libc::iovec {
            iov_base: theirs,
            iov_len: len,
        },
    );
    // SAFETY: no memory is passed. The ID of the thread is asked from the kernel, as it is new after fork and vfork.
    let thread = unsafe { libc::syscall(libc::SYS_gettid) };
    // SAFETY: `own` is valid for `len` bytes, both lists have one element, and the kernel checks the other address.
    let copied = unsafe {
        libc::syscall(
            call,
            thread,
            &raw const local,
            1_usize,
            &raw const remote,
            1_usize,
            0_usize,
        )
    };
    match outcome(copied) {
        Ok(copied) if copied == len => Ok(()),
        Ok(_) | Err(libc::EFAULT) => Err(libc::EFAULT),
        Err(_) if theirs.is_null() => Err(libc::EFAULT),
        Err(_) => {
            let (from, to) = if call == libc::SYS_process_vm_writev {
                (own, theirs)
            } else {
                (theirs, own)
            };
            // SAFETY: `own` is valid for `len` bytes; the program promises the same of its address, as for any ioctl.
            unsafe { core::ptr::copy(from.cast::<u8>(), to.cast::<u8>(), len) };
            Ok(())
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_wrong_address_is_an_error() {
        let mut place = 0_u32;
        assert_eq!(copy_out((&raw mut place).cast(), 7_u32), Ok(()));
        assert_eq!(place, 7);
        for wrong in [0_usize, 16, usize::MAX & !7] {
            assert_eq!(copy_out(wrong as *mut c_void, 7_u32), Err(libc::EFAULT));
            // SAFETY: any bits are a `u32`.
            assert_eq!(unsafe { copy_in::<u32>(wrong as *const c_void) }, Err(libc::EFAULT));
        }
    }

    #[test]
    fn errno_is_kept() {
        set_errno(libc::ENXIO);
        assert_eq!(keeping_errno(|| fstat(-1)).unwrap_err(), libc::EBADF);
        assert_eq!(errno(), libc::ENXIO);
    }
}
