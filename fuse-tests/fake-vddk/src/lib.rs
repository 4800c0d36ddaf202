//! Stand-in for VMware's VDDK: all functions of the table, on files of a folder.
//!
//! ```text
//!   FAKE_VDDK names a folder:
//!     knobs        lines KEY=VALUE, read by InitEx: see `knobs.rs`
//!     calls        log of the calls that do not move data, with what they were given
//!     violations   broken rules of the library; each also aborts the process
//!     DATASTORE/   the disks of the pretended server: `[DATASTORE] dir/x.vmdk` is the raw file DATASTORE/dir/x.vmdk
//! ```
//! A disk is a raw file, whatever its name. Without `FAKE_VDDK` the stand-in serves local files and logs nothing.
//!
//! | rule | broken by |
//! | --- | --- |
//! | InitEx once, on the main thread, before anything else | `VixDiskLib_InitEx` |
//! | Open and Close on one thread; queries on one thread of the handle | `disk.rs` |
//! | no synchronous and asynchronous requests on one handle; at most 2 MiB; on the disk; a buffer | `disk.rs` |
//! | Wait before Flush and before Close, with nothing in flight | `disk.rs`, `requests.rs` |
//! | one call at a time uses a handle, except for requests that are done within the call | `disk.rs` |
//! | a remote connection has a server, a user, a password and a virtual machine or datastore | `connect.rs` |
//! | Close, Disconnect, EndAccess, Exit in this order | `disk.rs`, `connect.rs` |
//!
//! A NULL log function is accepted, and a query on any one thread: an independent client does both.
#![allow(unsafe_code, reason = "a C library")]
#![allow(
    unsafe_op_in_unsafe_fn,
    reason = "every function is a C function whose caller keeps the contract of its arguments"
)]
#![allow(
    clippy::undocumented_unsafe_blocks,
    clippy::unwrap_used,
    clippy::panic,
    non_snake_case,
    missing_docs,
    reason = "a stand-in for tests, with the names of the library: a broken rule aborts the test"
)]

#[path = "../../../src/source/vddk/abi.rs"]
#[allow(dead_code, reason = "each side of the interface uses a part of it")]
mod abi;
mod connect;
mod connection;
mod disk;
mod knobs;
mod requests;

use std::ffi::{CStr, CString, c_char, c_void};
use std::fs::File;
use std::io::Write;
use std::path::PathBuf;
use std::ptr;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, Ordering};

use abi::{
    BlockList, CompletionFunction, ConnectParams, Connection, CreateParams, Handle, Info, LogFunction, VIX_OK,
    VixError, vddk_functions,
};
use connect::*;
use disk::*;
use knobs::Knobs;
use requests::*;

const INVALID_ARG: VixError = 3;

/// State of the library after InitEx.
struct Library {
    folder: Option<PathBuf>,
    knobs: Knobs,
    calls: Option<File>,
}

static LIBRARY: OnceLock<Library> = OnceLock::new();
static EXITED: AtomicBool = AtomicBool::new(false);

/// Compares the type of each function with the table, and so finds a function that is missing here.
macro_rules! compare {
    (
        required { $(fn $rname:ident($($rarg:ident: $rtype:ty),* $(,)?) $(-> $rresult:ty)?;)* }
        optional { $(fn $oname:ident($($oarg:ident: $otype:ty),* $(,)?) $(-> $oresult:ty)?;)* }
    ) => {
        $(const _: unsafe extern "C" fn($($rtype),*) $(-> $rresult)? = $rname;)*
        $(const _: unsafe extern "C" fn($($otype),*) $(-> $oresult)? = $oname;)*
    };
}

vddk_functions!(compare {});

/// Returns the state of the library. Using it before InitEx or after Exit breaks a rule.
fn library() -> &'static Library {
    let Some(library) = LIBRARY.get() else {
        violation("a function was called before InitEx")
    };
    if EXITED.load(Ordering::SeqCst) {
        violation("a function was called after Exit");
    }
    library
}

/// Records a broken rule, and aborts the process.
fn violation(text: &str) -> ! {
    if let Some(folder) = std::env::var_os("FAKE_VDDK") {
        let path = PathBuf::from(folder).join("violations");
        if let Ok(file) = File::options().append(true).create(true).open(path) {
            append_line(&file, text);
        }
    }
    append_line(std::io::stderr(), &format!("fake-vddk: VIOLATION: {text}"));
    std::process::abort()
}

/// Logs a call.
fn called(text: &str) {
    if let Some(calls) = &library().calls {
        append_line(calls, text);
    }
}

/// Appends a line in one write: several processes log to one file, and the end of one's line must not come after the
/// start of another's.
fn append_line(mut file: impl Write, text: &str) {
    let _ = file.write_all(format!("{text}\n").as_bytes());
}

fn thread_id() -> i32 {
    unsafe { libc::gettid() }
}

unsafe fn text(raw: *const c_char) -> Option<String> {
    (!raw.is_null()).then(|| unsafe { CStr::from_ptr(raw) }.to_string_lossy().into_owned())
}

/// A `va_list` on x86-64, with all arguments in memory.
#[repr(C)]
struct VaList {
    gp_offset: u32,
    fp_offset: u32,
    overflow: *const u64,
    registers: *const c_void,
}

unsafe fn send_log(function: Option<LogFunction>, format: &CStr, arguments: &[u64]) {
    if let Some(function) = function {
        let mut list = VaList {
            gp_offset: 48,
            fp_offset: 304,
            overflow: arguments.as_ptr(),
            registers: ptr::null(),
        };
        function(format.as_ptr(), ptr::addr_of_mut!(list).cast());
    }
}

#[unsafe(no_mangle)]
unsafe extern "C" fn VixDiskLib_InitEx(
    major: u32,
    minor: u32,
    log: Option<LogFunction>,
    warn: Option<LogFunction>,
    _panic: Option<LogFunction>,
    libdir: *const c_char,
    config: *const c_char,
) -> VixError {
    if thread_id() != libc::getpid() {
        violation("InitEx was not called on the main thread");
    }
    let folder = std::env::var_os("FAKE_VDDK").map(PathBuf::from);
    let knobs = Knobs::read(folder.as_deref());
    let calls = folder.as_ref().map(|folder| {
        let calls = File::options().append(true).create(true).open(folder.join("calls"));
        calls.unwrap()
    });
    if LIBRARY.set(Library { folder, knobs, calls }).is_err() {
        violation("InitEx was called twice");
    }
    let config = text(config);
    let settings = config
        .as_ref()
        .map(|path| std::fs::read_to_string(path).unwrap_or_default());
    called(&format!(
        "InitEx {major}.{minor} libdir={} config={} settings={}",
        text(libdir).unwrap_or_default(),
        config.unwrap_or_default(),
        settings.unwrap_or_default().replace('\n', " ")
    ));
    let what = CString::new("threads").unwrap_or_default();
    send_log(log, c"fake-vddk: started %d %s", &[3, what.as_ptr() as u64]);
    send_log(warn, c"VDDK_PhoneHome: Get CEIP status failed", &[]);
    if let Some(error) = knobs::fault("InitEx") {
        return error;
    }
    if (major, minor) == (6, 5) { VIX_OK } else { INVALID_ARG }
}

#[unsafe(no_mangle)]
unsafe extern "C" fn VixDiskLib_Exit() {
    called("Exit");
    connect::check_none_left();
    EXITED.store(true, Ordering::SeqCst);
}

#[unsafe(no_mangle)]
unsafe extern "C" fn VixDiskLib_GetErrorText(error: VixError, _locale: *const c_char) -> *mut c_char {
    let more = library().knobs.number("error-text").unwrap_or(0) as usize;
    let line = library().knobs.text("error-line").map(|line| format!("\n{line}"));
    let text = format!(
        "fake error text {}{}{}",
        error & 0xffff,
        " and more".repeat(more / 9),
        line.unwrap_or_default()
    );
    let text = CString::new(text).unwrap_or_default();
    libc::strdup(text.as_ptr())
}

#[unsafe(no_mangle)]
unsafe extern "C" fn VixDiskLib_FreeErrorText(text: *mut c_char) {
    libc::free(text.cast());
}

#[unsafe(no_mangle)]
unsafe extern "C" fn VixDiskLib_ListTransportModes() -> *const c_char {
    c"file:san:hotadd:nbdssl:nbd".as_ptr()
}

#[cfg(test)]
mod tests {
    use std::os::fd::{FromRawFd, IntoRawFd};

    use super::*;

    #[test]
    fn regression_a_line_is_one_write() {
        let (reader, writer) = std::os::unix::net::UnixDatagram::pair().unwrap();
        append_line(unsafe { File::from_raw_fd(writer.into_raw_fd()) }, "Exit");
        let mut first = [0; 16];
        let len = reader.recv(&mut first).unwrap();
        assert_eq!(&first[..len], b"Exit\n");
    }
}
