//! System calls without a safe form in `nix`: mounting a file system without a mount point, and locking a file in
//! memory.
#![allow(unsafe_code)] // Only here; see the comment of each block.

use std::ffi::{CStr, CString, c_char, c_int, c_uint, c_void};
use std::fs::File;
use std::io::{self, Read};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::ptr::{null, null_mut};

/// From `linux/mount.h`.
const FSOPEN_CLOEXEC: c_uint = 1;
const FSMOUNT_CLOEXEC: c_uint = 1;
const FSCONFIG_SET_FLAG: c_uint = 0;
const FSCONFIG_SET_STRING: c_uint = 1;
const FSCONFIG_CMD_CREATE: c_uint = 6;

/// Configuration context of a file system that is not mounted yet (`fsopen`).
#[derive(Debug)]
pub(super) struct Context(OwnedFd);

impl Context {
    /// Opens a context for the file system type `kind`.
    ///
    /// Errors: `EPERM` without CAP_SYS_ADMIN, `ENODEV` if the kernel has no such type.
    pub(super) fn open(kind: &CStr) -> io::Result<Self> {
        // SAFETY: `kind` is a string that ends with NUL and lives through the call, which only reads it.
        let fd = unsafe { libc::syscall(libc::SYS_fsopen, kind.as_ptr(), FSOPEN_CLOEXEC) };
        owned(fd).map(Self)
    }

    /// Sets a string parameter.
    pub(super) fn set(&self, key: &CStr, value: &CStr) -> io::Result<()> {
        self.config(FSCONFIG_SET_STRING, key.as_ptr(), value.as_ptr())
    }

    /// Sets a parameter to a path that leads the kernel to an open file.
    pub(super) fn set_file(&self, key: &CStr, file: BorrowedFd<'_>) -> io::Result<()> {
        // By `FSCONFIG_SET_STRING`: EROFS takes paths, not descriptors. The link leads to this very file, whatever its
        // name is by now.
        self.set(key, &CString::new(format!("/proc/self/fd/{}", file.as_raw_fd()))?)
    }

    /// Sets a flag parameter.
    pub(super) fn set_flag(&self, key: &CStr) -> io::Result<()> {
        self.config(FSCONFIG_SET_FLAG, key.as_ptr(), null())
    }

    /// Creates the file system and mounts it with these `MOUNT_ATTR_…`, without a mount point. Returns its root
    /// directory. The kernel removes the mount with its last user.
    pub(super) fn mount(&self, attributes: u64) -> io::Result<OwnedFd> {
        self.config(FSCONFIG_CMD_CREATE, null(), null())?;
        // SAFETY: it takes three numbers; the descriptor is open as long as `self`.
        let fd = unsafe {
            libc::syscall(
                libc::SYS_fsmount,
                self.0.as_raw_fd(),
                FSMOUNT_CLOEXEC,
                attributes as c_uint,
            )
        };
        owned(fd)
    }

    /// Returns the kernel's message about the last failure, if it left one in the context.
    pub(super) fn message(&self) -> Option<String> {
        let mut text = [0; 256];
        let len = File::from(self.0.try_clone().ok()?).read(&mut text).ok()?;
        // One read returns one message.
        let text = String::from_utf8_lossy(text.get(..len)?).trim().to_owned();
        // A message starts with its level (e, w or i) and a blank.
        Some(text.get(2..).unwrap_or_default().to_owned()).filter(|t| !t.is_empty())
    }

    /// Calls `fsconfig`. `key` and `value` are null, or strings that end with NUL and outlive the call.
    fn config(&self, command: c_uint, key: *const c_char, value: *const c_char) -> io::Result<()> {
        let aux: c_int = 0;
        // SAFETY: the kernel reads the two strings, which the callers (all in this file) take from a `CStr` that they
        // hold, or are null where the command takes none.
        let done = unsafe { libc::syscall(libc::SYS_fsconfig, self.0.as_raw_fd(), command, key, value, aux) };
        if done == 0 {
            Ok(())
        } else {
            Err(io::Error::last_os_error())
        }
    }
}

fn owned(fd: libc::c_long) -> io::Result<OwnedFd> {
    let fd = RawFd::try_from(fd).map_err(io::Error::other)?;
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the kernel has just created this descriptor for this process; no other code knows it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// A mapping that locks the pages of a file in memory while it lives. It is never read through.
#[derive(Debug)]
pub(super) struct LockedMapping {
    start: *mut c_void,
    len: usize,
}

// SAFETY: the address is only ever passed back to the kernel, which accepts it from any thread.
unsafe impl Send for LockedMapping {}
// SAFETY: a shared reference gives no access to the mapped memory.
unsafe impl Sync for LockedMapping {}

impl LockedMapping {
    /// Maps and locks the first `len` bytes of `file`.
    pub(super) fn new(file: impl AsFd, len: usize) -> io::Result<Self> {
        let fd = file.as_fd().as_raw_fd();
        // SAFETY: this creates a mapping at an address that the kernel chooses, so it changes no memory in use.
        let start = unsafe { libc::mmap(null_mut(), len, libc::PROT_READ, libc::MAP_SHARED, fd, 0) };
        if start == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let resident = Self { start, len };
        // SAFETY: the range is the mapping created above.
        if unsafe { libc::mlock(start, len) } == 0 {
            Ok(resident)
        } else {
            Err(io::Error::last_os_error())
        }
    }
}

impl Drop for LockedMapping {
    fn drop(&mut self) {
        // SAFETY: `new` created the mapping, this object owns it, and no reference points into it.
        unsafe { libc::munmap(self.start, self.len) };
    }
}
