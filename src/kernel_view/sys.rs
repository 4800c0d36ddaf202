//! The system calls that mount a file system nowhere, and memory that holds a file: what `nix` has no safe form of.
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

/// A file system that is being put together.
#[derive(Debug)]
pub(super) struct Context(OwnedFd);

impl Context {
    /// Of the type `kind`. `EPERM` without CAP_SYS_ADMIN, `ENODEV` where the kernel has no such type.
    pub(super) fn open(kind: &CStr) -> io::Result<Self> {
        // SAFETY: `kind` is a string that ends with NUL and lives through the call, which only reads it.
        let fd = unsafe { libc::syscall(libc::SYS_fsopen, kind.as_ptr(), FSOPEN_CLOEXEC) };
        owned(fd).map(Self)
    }

    /// Sets a parameter.
    pub(super) fn set(&self, key: &CStr, value: &CStr) -> io::Result<()> {
        self.config(FSCONFIG_SET_STRING, key.as_ptr(), value.as_ptr())
    }

    /// Sets a parameter to the path by which the kernel finds an open file again.
    pub(super) fn set_file(&self, key: &CStr, file: BorrowedFd<'_>) -> io::Result<()> {
        self.set(key, &CString::new(format!("/proc/self/fd/{}", file.as_raw_fd()))?)
    }

    /// Sets a flag.
    pub(super) fn set_flag(&self, key: &CStr) -> io::Result<()> {
        self.config(FSCONFIG_SET_FLAG, key.as_ptr(), null())
    }

    /// Makes the file system and mounts it, with these `MOUNT_ATTR_…`, at no place at all: it is gone with its last
    /// user. The folder at its root.
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

    /// What the kernel has to say about a failure, where it says anything.
    pub(super) fn complaint(&self) -> Option<String> {
        let mut text = [0; 256];
        let len = File::from(self.0.try_clone().ok()?).read(&mut text).ok()?;
        let text = String::from_utf8_lossy(text.get(..len)?).trim().to_owned();
        // a message starts with its level: e, w or i
        Some(text.get(2..).unwrap_or_default().to_owned()).filter(|t| !t.is_empty())
    }

    /// `key` and `value` are null or strings that end with NUL and outlive the call.
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
    // SAFETY: the kernel just made this descriptor for us; nobody else knows it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// A file whose pages stay in memory as long as this lives. Nobody reads them through it.
#[derive(Debug)]
pub(super) struct LockedMapping {
    start: *mut c_void,
    len: usize,
}

// SAFETY: it is an address that is only ever given back to the kernel, from whatever thread.
unsafe impl Send for LockedMapping {}
// SAFETY: nothing can be done with a shared one.
unsafe impl Sync for LockedMapping {}

impl LockedMapping {
    /// Maps and locks all of `file`, `len` bytes.
    pub(super) fn new(file: impl AsFd, len: usize) -> io::Result<Self> {
        let fd = file.as_fd().as_raw_fd();
        // SAFETY: a new mapping at an address that the kernel chooses, so no memory of ours changes.
        let start = unsafe { libc::mmap(null_mut(), len, libc::PROT_READ, libc::MAP_SHARED, fd, 0) };
        if start == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let resident = Self { start, len };
        // SAFETY: the range is the mapping that was just made.
        if unsafe { libc::mlock(start, len) } == 0 {
            Ok(resident)
        } else {
            Err(io::Error::last_os_error())
        }
    }
}

impl Drop for LockedMapping {
    fn drop(&mut self) {
        // SAFETY: the mapping is ours, made in `new`, and nothing points into it.
        unsafe { libc::munmap(self.start, self.len) };
    }
}
