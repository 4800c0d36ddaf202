//! The start: reads the environment, looks up what the list names, before the program's `main`.
#![allow(
    unsafe_code,
    reason = "the environment, and the linker's list of functions to call at the start"
)]

use core::ffi::CStr;

use crate::devices::{Device, Identity, TABLE};
use crate::disk::Bus;
use crate::exports;
use crate::log::{self, Level, Line};
use crate::raw;

/// End of each warning about a name.
const LOOKED_UP_AGAIN: &[u8] = b"; it is looked up again when it is opened";

/// Called by the dynamic linker when the library is loaded, in the only thread there is.
#[used]
#[cfg_attr(not(test), unsafe(link_section = ".init_array"))]
static START: extern "C" fn() = start;

extern "C" fn start() {
    raw::keeping_errno(|| {
        exports::look_up_all();
        set_log_level();
        let Some(list) = variable(c"VMWARE_BDWRAPPER_DEVICES") else {
            return;
        };
        // SAFETY: no memory is passed.
        let is_secure = unsafe { libc::getauxval(libc::AT_SECURE) } != 0;
        TABLE.fill(list.to_bytes(), is_secure, is_free, |name, reason| {
            log::print(Level::Error, |line| message(line, name, reason));
        });
        TABLE.devices().for_each(look_up);
    });
}

/// Returns a variable of the environment, if it is set and not empty.
fn variable(name: &CStr) -> Option<&'static CStr> {
    // SAFETY: the name ends with a NUL. There is one thread, so nothing changes the environment in the meantime.
    let value = unsafe { libc::getenv(name.as_ptr()) };
    if value.is_null() {
        return None;
    }
    // SAFETY: `getenv` returned a string that ends with a NUL; its memory lives as long as the process.
    Some(unsafe { CStr::from_ptr(value) }).filter(|value| !value.is_empty())
}

fn set_log_level() {
    let Some(text) = variable(c"VMWARE_BDWRAPPER_LOG_LEVEL") else {
        return;
    };
    match text.to_str().ok().and_then(|text| text.trim_ascii().parse().ok()) {
        Some(level) => log::set_level(level),
        None => log::print(Level::Error, |line| {
            message(line, b"VMWARE_BDWRAPPER_LOG_LEVEL", b"not a number: using 1");
        }),
    }
}

/// Returns true if the kernel has no block device of this number.
fn is_free(number: u64) -> bool {
    let mut path = Line::new();
    path.push(b"/sys/dev/block/")
        .push_decimal(u64::from(libc::major(number)));
    path.push(b":").push_decimal(u64::from(libc::minor(number))).push(b"\0");
    raw::stat_at(libc::AT_FDCWD, path.as_slice().as_ptr().cast(), 0).is_err()
}

/// Looks up what a name leads to, and reports it. A name that leads nowhere may do so later: it is no error.
fn look_up(device: &Device) {
    let name = TABLE.name_of(device).to_bytes();
    match TABLE.resolve(device) {
        Ok(Identity::Nothing) => log::print(Level::Warning, |line| {
            let reason = b"neither a block device nor a regular file that this user may name";
            message(line, name, reason);
            line.push(LOOKED_UP_AGAIN);
        }),
        Ok(Identity::Block(number)) => report_found(device, b"block device ", number),
        Ok(Identity::File(..)) => report_found(device, b"file, shown as block device ", device.number()),
        Err(errno) => log::print(Level::Warning, |line| {
            message(line, name, b"cannot be looked up: error ");
            line.push_decimal(u64::from(errno.unsigned_abs())).push(LOOKED_UP_AGAIN);
        }),
    }
}

/// Reports what a name leads to, and the number of the block device.
fn report_found(device: &Device, what: &[u8], number: u64) {
    let bus: &[u8] = match device.bus() {
        Bus::Ide => b"IDE disk, ",
        Bus::Scsi => b"SCSI disk, ",
    };
    log::print(Level::Start, |line| {
        message(line, TABLE.name_of(device).to_bytes(), bus);
        line.push(what).push_decimal(u64::from(libc::major(number)));
        line.push(b":").push_decimal(u64::from(libc::minor(number)));
    });
}

/// Writes `name: text`.
fn message(line: &mut Line, name: &[u8], text: &[u8]) {
    line.push(name).push(b": ").push(text);
}
