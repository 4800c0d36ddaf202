//! Log of a host: lines on standard error, which the parent reads and logs with their level.
//!
//! The parent splits a line of more than [`MAX_LINE`] bytes, and would take the rest for another message. So each line is
//! shortened before, in its middle: the end of an error is the hint.

#![allow(unsafe_code)] // Called by the library.

use std::borrow::Cow;
use std::ffi::{c_char, c_int, c_void};
use std::io::{self, Write};

use tracing::level_filters::LevelFilter;

use crate::error::{Error, ErrorKind, Result};
use crate::escape;
use crate::source::nbd::MAX_LINE;
use crate::source::vddk::library::LogFunctions;

/// Longest message of the library that is logged, in bytes: with its level it is one line.
const MAX_MESSAGE: usize = MAX_LINE - 50;

/// Replaces what is left out of a line.
const LEFT_OUT: &str = " ... ";

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
        .with_writer(|| Lines);
    let installed = tracing::subscriber::set_global_default(subscriber.finish());
    installed.map_err(|e| Error::new(ErrorKind::Usage, format!("log: {e}")))
}

/// Writes a line without its end to standard error. Escapes it: a line break in a text of the library would be the start
/// of another message, which the parent takes for one of the host.
pub(super) fn write_line(line: &str) {
    let line = format!("{}\n", shortened(&escape::printable(line), MAX_LINE - 1));
    // One call, so that lines of several threads do not mix.
    let _ = io::stderr().write_all(line.as_bytes());
}

/// Writer of the log, which gets one line at a time.
struct Lines;

impl Write for Lines {
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        write_line(String::from_utf8_lossy(line).trim_end());
        Ok(line.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Returns a text of at most `limit` bytes, without its middle if it is longer.
fn shortened(text: &str, limit: usize) -> Cow<'_, str> {
    if text.len() <= limit {
        return Cow::Borrowed(text);
    }
    let half = limit.saturating_sub(LEFT_OUT.len()) / 2;
    let start = (0..=half).rev().find_map(|at| text.get(..at));
    let end = (text.len() - half..=text.len()).find_map(|at| text.get(at..));
    Cow::Owned([start.unwrap_or_default(), LEFT_OUT, end.unwrap_or_default()].concat())
}

/// Formats a message of the library.
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
    let text = String::from_utf8_lossy(buffer.get(..len)?);
    Some(text.trim_end().to_owned()).filter(|text| !text.is_empty())
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_long_line_keeps_its_start_and_its_end() {
        assert_eq!(shortened("short", 5), "short");
        let long = format!("ends: x.vmdk: {}; add readonly=true", "ä".repeat(2000));
        for limit in [MAX_LINE - 1, MAX_LINE - 2] {
            let line = shortened(&long, limit);
            assert!(line.len() <= limit && line.len() > limit - 8, "{}", line.len());
            assert!(line.starts_with("ends: x.vmdk: ää") && line.ends_with("ää; add readonly=true"));
        }
    }
}
