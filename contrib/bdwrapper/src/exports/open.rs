//! Functions that open by name. A listed name is looked up again when it is opened; O_TRUNC is dropped for a listed file.
#![allow(unsafe_code, reason = "functions of C, called by C")]

use libc::{AT_FDCWD, FILE, O_TRUNC, O_WRONLY, c_char, c_int, mode_t, posix_spawn_file_actions_t};

use super::report;
use crate::bytes::Bytes;
use crate::devices::{Identity, TABLE};
use crate::log::{self, Level};
use crate::next::wrap;
use crate::raw;

/// A mode of `fopen`, with the NUL.
type Mode = Bytes<64>;

/// Returns the flags without O_TRUNC if the path is that of a listed file.
///
/// A block device ignores O_TRUNC. The kernel looks the path up twice, here and when it opens it; a name that is changed
/// in between may keep or lose O_TRUNC.
fn without_truncation(dir: c_int, path: *const c_char, flags: c_int) -> c_int {
    if flags & O_TRUNC == 0 || !is_listed_file(dir, path) {
        return flags;
    }
    log::print(Level::Descriptor, |line| {
        line.push(b"O_TRUNC dropped: a listed file keeps its size");
    });
    flags & !O_TRUNC
}

/// Returns true if the path is that of a listed file. Keeps `errno`.
pub(super) fn is_listed_file(dir: c_int, path: *const c_char) -> bool {
    if !TABLE.is_active() {
        return false;
    }
    raw::keeping_errno(|| {
        let Ok(status) = raw::stat_at(dir, path, 0) else {
            return false;
        };
        let identity = Identity::of(&status);
        // SAFETY: the kernel has just read the path, so it is a string.
        if let Some(device) = unsafe { TABLE.find_name(path) } {
            TABLE.set_identity(device, identity);
        }
        status.is(libc::S_IFREG) && TABLE.find(identity).is_some()
    })
}

/// Looks a listed name up again that was opened as `fd`, and reports the descriptor. Returns `fd`.
///
/// # Safety
/// If `fd` is not negative, `path` is the string that was opened.
unsafe fn opened(fd: c_int, path: *const c_char) -> c_int {
    if fd >= 0 && TABLE.is_active() {
        raw::keeping_errno(|| {
            // SAFETY: the kernel opened the path, so it is a string.
            if let Some(device) = unsafe { TABLE.find_name(path) }
                && let Ok(status) = raw::fstat(fd)
                // With O_PATH and O_NOFOLLOW, what is open is the link, not the disk.
                && !status.is(libc::S_IFLNK)
            {
                TABLE.set_identity(device, Identity::of(&status));
            }
        });
        report(fd, b" opened", None);
    }
    fd
}

/// Returns the mode of `fopen` that opens a listed file without emptying it, or `None` to leave the mode.
///
/// # Safety
/// `mode` is a string that ends with a NUL.
unsafe fn mode_without_truncation(path: *const c_char, mode: *const c_char) -> Option<Mode> {
    if !TABLE.is_active() || path.is_null() || mode.is_null() {
        return None;
    }
    // SAFETY: the caller promises it.
    let text = unsafe { core::ffi::CStr::from_ptr(mode) }.to_bytes();
    let rest = text.strip_prefix(b"w")?;
    // With `x` a file that exists is an error.
    if rest.iter().take_while(|byte| **byte != b',').any(|byte| *byte == b'x') || !is_listed_file(AT_FDCWD, path) {
        return None;
    }
    let mut mode = Mode::new();
    mode.push(b"r+").push(rest);
    mode.truncate(63);
    mode.push(b"\0");
    Some(mode)
}

/// Completes `fopen`: looks a listed name up again.
///
/// # Safety
/// If `file` is not null, it is the stream that was opened from the string `path`.
unsafe fn stream_opened(file: *mut FILE, path: *const c_char) -> *mut FILE {
    if !file.is_null() && !path.is_null() && TABLE.is_active() {
        // SAFETY: `file` is an open stream.
        let fd = unsafe { libc::fileno(file) };
        // SAFETY: the caller promises it.
        unsafe { opened(fd, path) };
    }
    file
}

/// Calls `call` with the mode of `fopen` that empties no listed file.
///
/// # Safety
/// `mode` is a string that ends with a NUL; `call` opens `path`.
unsafe fn open_stream(
    path: *const c_char,
    mode: *const c_char,
    call: impl FnOnce(*const c_char) -> *mut FILE,
) -> *mut FILE {
    // SAFETY: the caller promises it.
    let other = unsafe { mode_without_truncation(path, mode) };
    let file = call(other.as_ref().map_or(mode, |other| other.as_slice().as_ptr().cast()));
    // SAFETY: the caller promises it.
    unsafe { stream_opened(file, path) }
}

wrap! {
    fn open(path: *const c_char, flags: c_int, mode: mode_t) -> c_int |next| {
        // SAFETY: the arguments are the program's own.
        unsafe { opened(next(path, without_truncation(AT_FDCWD, path, flags), mode), path) }
    }

    fn open64(path: *const c_char, flags: c_int, mode: mode_t) -> c_int |next| {
        // SAFETY: the arguments are the program's own.
        unsafe { opened(next(path, without_truncation(AT_FDCWD, path, flags), mode), path) }
    }

    fn __open(path: *const c_char, flags: c_int, mode: mode_t) -> c_int |next| {
        // SAFETY: the arguments are the program's own.
        unsafe { opened(next(path, without_truncation(AT_FDCWD, path, flags), mode), path) }
    }

    fn __open64(path: *const c_char, flags: c_int, mode: mode_t) -> c_int |next| {
        // SAFETY: the arguments are the program's own.
        unsafe { opened(next(path, without_truncation(AT_FDCWD, path, flags), mode), path) }
    }

    fn __open_2(path: *const c_char, flags: c_int) -> c_int |next| {
        // SAFETY: the arguments are the program's own.
        unsafe { opened(next(path, without_truncation(AT_FDCWD, path, flags)), path) }
    }

    fn __open64_2(path: *const c_char, flags: c_int) -> c_int |next| {
        // SAFETY: the arguments are the program's own.
        unsafe { opened(next(path, without_truncation(AT_FDCWD, path, flags)), path) }
    }

    fn openat(dir: c_int, path: *const c_char, flags: c_int, mode: mode_t) -> c_int |next| {
        // SAFETY: the arguments are the program's own.
        unsafe { opened(next(dir, path, without_truncation(dir, path, flags), mode), path) }
    }

    fn openat64(dir: c_int, path: *const c_char, flags: c_int, mode: mode_t) -> c_int |next| {
        // SAFETY: the arguments are the program's own.
        unsafe { opened(next(dir, path, without_truncation(dir, path, flags), mode), path) }
    }

    fn __openat_2(dir: c_int, path: *const c_char, flags: c_int) -> c_int |next| {
        // SAFETY: the arguments are the program's own.
        unsafe { opened(next(dir, path, without_truncation(dir, path, flags)), path) }
    }

    fn __openat64_2(dir: c_int, path: *const c_char, flags: c_int) -> c_int |next| {
        // SAFETY: the arguments are the program's own.
        unsafe { opened(next(dir, path, without_truncation(dir, path, flags)), path) }
    }

    fn creat(path: *const c_char, mode: mode_t) -> c_int |next| {
        // SAFETY: the arguments are the program's own.
        unsafe {
            let fd = if is_listed_file(AT_FDCWD, path) { open(path, O_WRONLY, mode) } else { next(path, mode) };
            opened(fd, path)
        }
    }

    fn creat64(path: *const c_char, mode: mode_t) -> c_int |next| {
        // SAFETY: the arguments are the program's own.
        unsafe {
            let fd = if is_listed_file(AT_FDCWD, path) { open64(path, O_WRONLY, mode) } else { next(path, mode) };
            opened(fd, path)
        }
    }

    fn fopen(path: *const c_char, mode: *const c_char) -> *mut FILE |next| {
        // SAFETY: the arguments are the program's own.
        unsafe { open_stream(path, mode, |mode| next(path, mode)) }
    }

    fn fopen64(path: *const c_char, mode: *const c_char) -> *mut FILE |next| {
        // SAFETY: the arguments are the program's own.
        unsafe { open_stream(path, mode, |mode| next(path, mode)) }
    }

    fn freopen(path: *const c_char, mode: *const c_char, file: *mut FILE) -> *mut FILE |next| {
        // SAFETY: the arguments are the program's own.
        unsafe { open_stream(path, mode, |mode| next(path, mode, file)) }
    }

    fn freopen64(path: *const c_char, mode: *const c_char, file: *mut FILE) -> *mut FILE |next| {
        // SAFETY: the arguments are the program's own.
        unsafe { open_stream(path, mode, |mode| next(path, mode, file)) }
    }

    // Its child opens the file by itself, past these wrappers.
    fn posix_spawn_file_actions_addopen(
        actions: *mut posix_spawn_file_actions_t, fd: c_int, path: *const c_char, flags: c_int, mode: mode_t
    ) -> c_int |next| {
        // SAFETY: the arguments are the program's own.
        unsafe { next(actions, fd, path, without_truncation(AT_FDCWD, path, flags), mode) }
    }

    fn truncate(path: *const c_char, len: libc::off_t) -> c_int |next| {
        if is_listed_file(AT_FDCWD, path) {
            return refuse_truncation();
        }
        // SAFETY: the arguments are the program's own.
        unsafe { next(path, len) }
    }

    fn truncate64(path: *const c_char, len: libc::off64_t) -> c_int |next| {
        if is_listed_file(AT_FDCWD, path) {
            return refuse_truncation();
        }
        // SAFETY: the arguments are the program's own.
        unsafe { next(path, len) }
    }

    fn ftruncate(fd: c_int, len: libc::off_t) -> c_int |next| {
        if is_open_listed_file(fd) {
            return refuse_truncation();
        }
        // SAFETY: the arguments are the program's own.
        unsafe { next(fd, len) }
    }

    fn ftruncate64(fd: c_int, len: libc::off64_t) -> c_int |next| {
        if is_open_listed_file(fd) {
            return refuse_truncation();
        }
        // SAFETY: the arguments are the program's own.
        unsafe { next(fd, len) }
    }
}

/// Returns true if the descriptor is that of a listed file. Keeps `errno`.
fn is_open_listed_file(fd: c_int) -> bool {
    TABLE.is_active() && raw::keeping_errno(|| TABLE.find_open(fd).is_some_and(|(_, status)| status.is(libc::S_IFREG)))
}

/// Fails as truncating a block device does.
fn refuse_truncation() -> c_int {
    raw::set_errno(libc::EINVAL);
    -1
}
