//! Log of a host: lines on standard error, which the parent reads and logs with their level.

#![allow(unsafe_code)] // Called by the library.

use std::ffi::{c_char, c_int, c_void};

use tracing::level_filters::LevelFilter;

use crate::error::{Error, ErrorKind, Result};
use crate::escape;
use crate::source::vddk::library::LogFunctions;

/// Longest message of the library that is logged, in bytes.
const MAX_MESSAGE: usize = 2000;

/// Parts of messages about VMware's telemetry, which fail on most hosts and mean nothing.
const NOISE: [&str; 2] = ["Get CEIP status failed", "VDDK_PhoneHome:"];

/// Log functions for the library. None may be NULL: those of the library itself are not safe with threads.
pub(super) const FUNCTIONS: LogFunctions = LogFunctions { log, warn, panic };

unsafe extern "C" {
    /// vsnprintf(3). A `va_list` argument is a pointer on x86-64.
    fn vsnprintf(buffer: *mut c_char, size: usize, format: *const c_char, arguments: *mut c_void) -> c_int;
}

/// Sends the log of this process to standard error.
pub(super) fn install(verbosity: u8) -> Result<()> {
    let level = match verbosity {
        0 => LevelFilter::WARN,
        1 => LevelFilter::INFO,
        2 => LevelFilter::DEBUG,
        _ => LevelFilter::TRACE,
    };
    let subscriber = tracing_subscriber::fmt()
        .with_max_level(level)
        .with_ansi(false)
        .without_time()
        .with_target(false)
        .log_internal_errors(false)
        .with_writer(std::io::stderr);
    let installed = tracing::subscriber::set_global_default(subscriber.finish());
    installed.map_err(|e| Error::new(ErrorKind::Usage, format!("log: {e}")))
}

/// Formats a message of the library as one line.
///
/// # Safety
/// The arguments are those of the format, as for vprintf(3).
unsafe fn message(format: *const c_char, arguments: *mut c_void) -> Option<String> {
    if format.is_null() {
        return None;
    }
    let mut buffer = vec![0u8; MAX_MESSAGE];
    // SAFETY: the buffer has that size; the caller guarantees the arguments.
    let len = unsafe { vsnprintf(buffer.as_mut_ptr().cast(), buffer.len(), format, arguments) };
    let len = usize::try_from(len).ok()?.min(MAX_MESSAGE - 1);
    let text = String::from_utf8_lossy(buffer.get(..len)?).into_owned();
    Some(escape::printable(text.trim_end())).filter(|text| !text.is_empty())
}

unsafe extern "C" fn log(format: *const c_char, arguments: *mut c_void) {
    // SAFETY: the library passes a format and its arguments.
    if let Some(text) = unsafe { message(format, arguments) } {
        tracing::debug!("VDDK: {text}");
    }
}

unsafe extern "C" fn warn(format: *const c_char, arguments: *mut c_void) {
    // SAFETY: the library passes a format and its arguments.
    match unsafe { message(format, arguments) } {
        Some(text) if NOISE.iter().any(|noise| text.contains(noise)) => tracing::debug!("VDDK: {text}"),
        Some(text) => tracing::warn!("VDDK: {text}"),
        None => {}
    }
}

unsafe extern "C" fn panic(format: *const c_char, arguments: *mut c_void) {
    // SAFETY: the library passes a format and its arguments.
    if let Some(text) = unsafe { message(format, arguments) } {
        tracing::error!("VDDK: {text}");
    }
}
