//! Functions of descriptors: `ioctl`; and, for the log alone, those that duplicate and close.
#![allow(unsafe_code, reason = "functions of C, called by C")]

use libc::{c_int, c_uint, c_ulong, c_void};

use super::report;
use crate::answer;
use crate::next::wrap;
use crate::raw;

/// Reports a duplicate of a descriptor. Returns the duplicate.
fn duplicated(from: c_int, to: c_int) -> c_int {
    if to >= 0 {
        report(to, b" is a duplicate of ", Some(from));
    }
    to
}

/// Reports the duplicate that `fcntl` made, if it made one. Returns its result.
fn controlled(from: c_int, command: c_int, result: c_int) -> c_int {
    if matches!(command, libc::F_DUPFD | libc::F_DUPFD_CLOEXEC) {
        duplicated(from, result)
    } else {
        result
    }
}

wrap! {
    fn ioctl(fd: c_int, request: c_ulong, argument: *mut c_void) -> c_int |next| {
        match answer::ioctl(fd, request as u32, argument) {
            // SAFETY: the arguments are the program's own.
            None => unsafe { next(fd, request, argument) },
            Some(Ok(())) => 0,
            Some(Err(errno)) => {
                raw::set_errno(errno);
                -1
            }
        }
    }

    fn dup(fd: c_int) -> c_int |next| {
        // SAFETY: the argument is the program's own.
        duplicated(fd, unsafe { next(fd) })
    }

    fn dup2(fd: c_int, to: c_int) -> c_int |next| {
        // SAFETY: the arguments are the program's own.
        duplicated(fd, unsafe { next(fd, to) })
    }

    fn dup3(fd: c_int, to: c_int, flags: c_int) -> c_int |next| {
        // SAFETY: the arguments are the program's own.
        duplicated(fd, unsafe { next(fd, to, flags) })
    }

    fn fcntl(fd: c_int, command: c_int, argument: *mut c_void) -> c_int |next| {
        // SAFETY: the arguments are the program's own.
        controlled(fd, command, unsafe { next(fd, command, argument) })
    }

    fn fcntl64(fd: c_int, command: c_int, argument: *mut c_void) -> c_int |next| {
        // SAFETY: the arguments are the program's own.
        controlled(fd, command, unsafe { next(fd, command, argument) })
    }

    fn close(fd: c_int) -> c_int |next| {
        report(fd, b" closed", None);
        // SAFETY: the argument is the program's own.
        unsafe { next(fd) }
    }

    fn close_range(first: c_uint, last: c_uint, flags: c_int) -> c_int |next| {
        report_range(first, last);
        // SAFETY: the arguments are the program's own.
        unsafe { next(first, last, flags) }
    }

    fn closefrom(first: c_int) |next| {
        report_range(first.max(0).unsigned_abs(), c_uint::MAX);
        // SAFETY: the argument is the program's own.
        unsafe { next(first) }
    }
}

/// Reports the first descriptors of a range that is closed.
fn report_range(first: c_uint, last: c_uint) {
    /// Programs close up to 2^32 numbers at once, few of which are open.
    const MOST: c_uint = 1024;
    for fd in first..=last.min(first.saturating_add(MOST)) {
        match c_int::try_from(fd) {
            Ok(fd) => report(fd, b" closed", None),
            Err(_) => return,
        }
    }
}
