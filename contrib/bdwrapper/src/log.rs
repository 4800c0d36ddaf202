//! Messages on the standard error, from a buffer on the stack.

use core::sync::atomic::{AtomicI32, Ordering};

use crate::bytes::Bytes;
use crate::devices::{Identity, TABLE};
use crate::raw;

/// Importance of a message: it is printed if the log level is at least this.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(i32)]
pub(crate) enum Level {
    /// Error: a request of the user that the library cannot fulfil.
    Error = 0,
    /// Warning: an effect that the user may not expect.
    Warning = 1,
    /// Names and disks that the library found at the start.
    Start = 10,
    /// Descriptors of listed disks that are opened, duplicated or closed.
    Descriptor = 100,
    /// Ioctls that were answered.
    Ioctl = 1000,
}

/// Log level without the variable.
pub(crate) const DEFAULT_LEVEL: i32 = Level::Warning as i32;

static LEVEL: AtomicI32 = AtomicI32::new(DEFAULT_LEVEL);

/// Sets the log level.
pub(crate) fn set_level(level: i32) {
    LEVEL.store(level, Ordering::Relaxed);
}

/// Returns true if messages of this level are printed.
#[inline]
pub(crate) fn is_on(level: Level) -> bool {
    LEVEL.load(Ordering::Relaxed) >= level as i32
}

/// One message.
pub(crate) type Line = Bytes<512>;

/// Prints a message, if the log level asks for it. Keeps `errno`.
pub(crate) fn print(level: Level, write: impl FnOnce(&mut Line)) {
    if !is_on(level) {
        return;
    }
    let mut line = Line::new();
    line.push(b"vmware-bdwrapper: ");
    write(&mut line);
    // A line that is too long loses its end, never its line feed.
    line.truncate(511);
    line.push(b"\n");
    raw::keeping_errno(|| {
        if !is_disk(libc::STDERR_FILENO) {
            raw::write_stderr(line.as_slice());
        }
    });
}

/// Returns true if a descriptor is a disk: a program that closed its standard error may get the number for one.
fn is_disk(fd: i32) -> bool {
    raw::fstat(fd).is_ok_and(|status| status.is(libc::S_IFBLK) || TABLE.find(Identity::of(&status)).is_some())
}
