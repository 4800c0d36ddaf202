//! The wrappers: C functions of this library that take the place of those of the C library.
//!
//! ```text
//!   open         open, fopen and their kin: O_TRUNC empties no disk
//!   descriptors  dup, fcntl, close: only for the log; ioctl; truncate
//!   status       stat and its kin: a listed file is a block device
//! ```
//! A variadic function takes its third argument as a fixed one: C passes both alike on x86 and ARM Linux.

mod descriptors;
mod open;
mod status;

use libc::c_int;

use crate::devices::TABLE;
use crate::log::{self, Level};

/// Looks up the next definition of every function.
pub(crate) fn look_up_all() {
    open::look_up_all();
    descriptors::look_up_all();
    status::look_up_all();
}

/// Reports what happened to a descriptor of a listed disk. Keeps `errno`.
fn report(fd: c_int, what: &[u8], other: Option<c_int>) {
    if !TABLE.is_active() || !log::is_on(Level::Descriptor) {
        return;
    }
    crate::raw::keeping_errno(|| {
        let Some((device, _)) = TABLE.find_open(fd) else {
            return;
        };
        log::print(Level::Descriptor, |line| {
            line.push(TABLE.name_of(device).to_bytes()).push(b": descriptor ");
            line.push_decimal(u64::from(fd.unsigned_abs())).push(what);
            if let Some(other) = other {
                line.push_decimal(u64::from(other.unsigned_abs()));
            }
        });
    });
}
