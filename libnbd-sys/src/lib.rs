//! Declarations of functions of [libnbd](https://libguestfs.org/libnbd.3.html), the NBD client library in C.
//!
//! Names and types are those of `libnbd.h`. The manual page of a function (`man 3 nbd_connect_uri`) describes its
//! behaviour and its preconditions. The declarations are written by hand. Macros generate the tables [`FUNCTIONS`],
//! [`CONSTANTS`] and [`CALLBACKS`] from them, and a test lets a C compiler compare these tables with the installed
//! header.
//!
//! The crate does not link with the library, so neither its headers nor the library are needed to build. The macro
//! [`functions!`] passes the declarations to a macro of the caller, which declares them for its own way of loading: a
//! struct of function pointers, or an `extern` block.
//!
//! Rules for all functions: any thread may use a handle, because the library locks it during each call. Most functions
//! return -1 or a null pointer for an error; `nbd_get_error` and `nbd_get_errno` then describe it, in the same
//! thread and before its next call. A callback runs inside a call and must not call the library with that handle.
#![no_std]
#![allow(non_camel_case_types)]

use core::ffi::{c_char, c_int, c_uint, c_void};
use core::marker::{PhantomData, PhantomPinned};

/// Handle of one connection, in any state. Created by `nbd_create`, valid until `nbd_close`.
#[repr(C)]
#[derive(Debug)]
pub struct nbd_handle {
    _opaque: [u8; 0],
    _not_send: PhantomData<(*mut u8, PhantomPinned)>,
}

/// Declares callback structures, which are passed by value, and their entries in [`CALLBACKS`].
macro_rules! callbacks {
    ($($(#[$doc:meta])* $name:ident ($($arg:ident: $type:ty),*);)*) => {
        $(
            $(#[$doc])*
            #[repr(C)]
            #[derive(Debug, Clone, Copy)]
            pub struct $name {
                /// Function that the library calls; it returns -1 for a failure.
                pub callback: Option<unsafe extern "C" fn(user_data: *mut c_void $(, $arg: $type)*) -> c_int>,
                /// Passed to both functions.
                pub user_data: *mut c_void,
                /// Called once when the library no longer needs the callback, also after a failed call.
                pub free: Option<unsafe extern "C" fn(user_data: *mut c_void)>,
            }
        )*

        /// Callback structures, each with the types of its function's arguments after the first, as written above.
        pub const CALLBACKS: &[(&str, &[&str])] = &[$((stringify!($name), &[$(stringify!($type)),*])),*];
    };
}

callbacks! {
    /// Called when a command has completed. If it returns 1, the library forgets the command on its own.
    nbd_completion_callback(error: *mut c_int);
    /// Called with a part of the answer to a read, which is in the buffer already; `status` is data, hole or error.
    nbd_chunk_callback(subbuf: *const c_void, count: usize, offset: u64, status: c_uint, error: *mut c_int);
    /// Called with extents of a metadata context: pairs of length and flags, contiguous from `offset` on.
    nbd_extent_callback(
        metacontext: *const c_char, offset: u64, entries: *mut u32, nr_entries: usize, error: *mut c_int
    );
    /// Called with one export of a server.
    nbd_list_callback(name: *const c_char, description: *const c_char);
    /// Called with one metadata context of an export.
    nbd_context_callback(name: *const c_char);
    /// Called with one message for debugging, such as each transition of the state machine.
    nbd_debug_callback(context: *const c_char, msg: *const c_char);
}

/// Declares constants and their entries in [`CONSTANTS`].
macro_rules! constants {
    ($($(#[$doc:meta])* $name:ident: $type:ty = $value:expr;)*) => {
        $($(#[$doc])* pub const $name: $type = $value;)*

        /// Constants, each with its value.
        pub const CONSTANTS: &[(&str, u32)] = &[$((stringify!($name), $name as u32)),*];
    };
}

constants! {
    /// Never encrypt.
    LIBNBD_TLS_DISABLE: c_int = 0;
    /// Encrypt if the server supports it.
    LIBNBD_TLS_ALLOW: c_int = 1;
    /// Encrypt, or fail to connect.
    LIBNBD_TLS_REQUIRE: c_int = 2;
    /// Minimum length of a request in bytes.
    LIBNBD_SIZE_MINIMUM: c_int = 0;
    /// Preferred length of a request in bytes.
    LIBNBD_SIZE_PREFERRED: c_int = 1;
    /// Maximum length of a request in bytes.
    LIBNBD_SIZE_MAXIMUM: c_int = 2;
    /// Complete the command when its data is durable (FUA).
    LIBNBD_CMD_FLAG_FUA: u32 = 0x01;
    /// Write zeroes without a hole: the range stays allocated.
    LIBNBD_CMD_FLAG_NO_HOLE: u32 = 0x02;
    /// Write zeroes only if that is faster than writing data; otherwise fail.
    LIBNBD_CMD_FLAG_FAST_ZERO: u32 = 0x10;
    /// Refuse ranges that do not start and end at multiples of the server's minimum block size.
    LIBNBD_STRICT_ALIGN: u32 = 0x10;
    /// URIs may use TCP.
    LIBNBD_ALLOW_TRANSPORT_TCP: u32 = 0x01;
    /// URIs may use Unix sockets.
    LIBNBD_ALLOW_TRANSPORT_UNIX: u32 = 0x02;
    /// URIs may use VSOCK.
    LIBNBD_ALLOW_TRANSPORT_VSOCK: u32 = 0x04;
    /// URIs may use all transports.
    LIBNBD_ALLOW_TRANSPORT_MASK: u32 = 0x07;
    /// The library waits to read.
    LIBNBD_AIO_DIRECTION_READ: c_uint = 1;
    /// The library waits to write.
    LIBNBD_AIO_DIRECTION_WRITE: c_uint = 2;
    /// Flag of `base:allocation`: the range is not allocated.
    LIBNBD_STATE_HOLE: u32 = 1;
    /// Flag of `base:allocation`: the range reads as zeroes.
    LIBNBD_STATE_ZERO: u32 = 2;
}

/// Metadata context that reports holes and zeroes.
pub const LIBNBD_CONTEXT_BASE_ALLOCATION: &core::ffi::CStr = c"base:allocation";

/// Passes the table of functions to another macro: `functions!(table { head })` becomes `table! { head required { fn
/// nbd_create() -> …; … } optional { } }`.
///
/// The types are written as in this crate's documentation, so the caller must have them in scope: those of
/// `core::ffi` and of this crate. `required` are the functions of libnbd 1.14, the oldest supported release; an older
/// library lacks some of them.
#[macro_export]
macro_rules! functions {
    ($table:ident { $($head:tt)* }) => {
        $table! {
            $($head)*
            required {
                /// Creates a handle. Returns null if there is no memory.
                fn nbd_create() -> *mut nbd_handle;
                /// Closes the connection and frees the handle. Drops commands in flight, and calls their `free`.
                fn nbd_close(h: *mut nbd_handle);
                /// Returns the text of the last error of this thread, or null. Valid until the next call of this thread.
                fn nbd_get_error() -> *const c_char;
                /// Returns the `errno` of the last error of this thread; 0 if it is not known.
                fn nbd_get_errno() -> c_int;
                /// Returns the version of the library, a static text.
                fn nbd_get_version(h: *mut nbd_handle) -> *const c_char;
                /// Returns 1 if the library was built with TLS.
                fn nbd_supports_tls(h: *mut nbd_handle) -> c_int;
                /// Returns 1 if the library was built with URI support.
                fn nbd_supports_uri(h: *mut nbd_handle) -> c_int;

                /// Switches messages for debugging on or off.
                fn nbd_set_debug(h: *mut nbd_handle, debug: bool) -> c_int;
                /// Sets the receiver of messages for debugging; without one they go to standard error.
                fn nbd_set_debug_callback(h: *mut nbd_handle, debug_callback: nbd_debug_callback) -> c_int;

                /// Sets the name of the export; at most 4096 bytes.
                fn nbd_set_export_name(h: *mut nbd_handle, export_name: *const c_char) -> c_int;
                /// Returns the name that was set. The caller must free it.
                fn nbd_get_export_name(h: *mut nbd_handle) -> *mut c_char;
                /// Requests description and canonical name of the export too.
                fn nbd_set_full_info(h: *mut nbd_handle, request: bool) -> c_int;
                /// Returns the description of the export, or null if there is none. The caller must free it.
                fn nbd_get_export_description(h: *mut nbd_handle) -> *mut c_char;
                /// Sets the TLS mode, one of `LIBNBD_TLS_*`.
                fn nbd_set_tls(h: *mut nbd_handle, tls: c_int) -> c_int;
                /// Returns 1 if the connection is encrypted.
                fn nbd_get_tls_negotiated(h: *mut nbd_handle) -> c_int;
                /// Sets the folder of the certificates.
                fn nbd_set_tls_certificates(h: *mut nbd_handle, dir: *const c_char) -> c_int;
                /// Sets if the certificate of the server is verified.
                fn nbd_set_tls_verify_peer(h: *mut nbd_handle, verify: bool) -> c_int;
                /// Sets the user name for pre-shared keys.
                fn nbd_set_tls_username(h: *mut nbd_handle, username: *const c_char) -> c_int;
                /// Sets the file of pre-shared keys.
                fn nbd_set_tls_psk_file(h: *mut nbd_handle, filename: *const c_char) -> c_int;
                /// Sets if structured replies are requested. Block status needs them.
                fn nbd_set_request_structured_replies(h: *mut nbd_handle, request: bool) -> c_int;
                /// Returns 1 if structured replies were negotiated.
                fn nbd_get_structured_replies_negotiated(h: *mut nbd_handle) -> c_int;
                /// Sets if the library clears a buffer before it reads into it.
                fn nbd_set_pread_initialize(h: *mut nbd_handle, request: bool) -> c_int;
                /// Returns which requests the library itself refuses: bits of `LIBNBD_STRICT_*`, not all declared here.
                fn nbd_get_strict_mode(h: *mut nbd_handle) -> u32;
                /// Sets which requests the library itself refuses: bits of `LIBNBD_STRICT_*`.
                fn nbd_set_strict_mode(h: *mut nbd_handle, flags: u32) -> c_int;
                /// Sets if the handshake stops in the state in which options can be sent.
                fn nbd_set_opt_mode(h: *mut nbd_handle, enable: bool) -> c_int;
                /// Requests a metadata context.
                fn nbd_add_meta_context(h: *mut nbd_handle, name: *const c_char) -> c_int;
                /// Removes all requested metadata contexts.
                fn nbd_clear_meta_contexts(h: *mut nbd_handle) -> c_int;
                /// Sets the transports that URIs may use: bits of `LIBNBD_ALLOW_TRANSPORT_*`.
                fn nbd_set_uri_allow_transports(h: *mut nbd_handle, mask: u32) -> c_int;
                /// Sets if URIs may request TLS: one of `LIBNBD_TLS_*`.
                fn nbd_set_uri_allow_tls(h: *mut nbd_handle, tls: c_int) -> c_int;
                /// Sets if URIs may name local files.
                fn nbd_set_uri_allow_local_file(h: *mut nbd_handle, allow: bool) -> c_int;

                /// Starts to connect to a URI.
                fn nbd_aio_connect_uri(h: *mut nbd_handle, uri: *const c_char) -> c_int;
                /// Starts to connect to a Unix socket.
                fn nbd_aio_connect_unix(h: *mut nbd_handle, unixsocket: *const c_char) -> c_int;
                /// Starts to connect by VSOCK.
                fn nbd_aio_connect_vsock(h: *mut nbd_handle, cid: u32, port: u32) -> c_int;
                /// Starts to connect by TCP. Blocks while it resolves the host name.
                fn nbd_aio_connect_tcp(h: *mut nbd_handle, hostname: *const c_char, port: *const c_char) -> c_int;
                /// Starts the handshake on a connected socket, which the library owns from then on.
                fn nbd_aio_connect_socket(h: *mut nbd_handle, sock: c_int) -> c_int;

                /// Starts to open the export.
                fn nbd_aio_opt_go(h: *mut nbd_handle, completion_callback: nbd_completion_callback) -> c_int;
                /// Ends the handshake without opening an export.
                fn nbd_aio_opt_abort(h: *mut nbd_handle) -> c_int;
                /// Starts to list the exports.
                fn nbd_aio_opt_list(
                    h: *mut nbd_handle, list_callback: nbd_list_callback, completion_callback: nbd_completion_callback
                ) -> c_int;
                /// Starts to ask for size and flags of the export without opening it.
                fn nbd_aio_opt_info(h: *mut nbd_handle, completion_callback: nbd_completion_callback) -> c_int;
                /// Starts to list the metadata contexts of the export.
                fn nbd_aio_opt_list_meta_context(
                    h: *mut nbd_handle, context_callback: nbd_context_callback, completion_callback: nbd_completion_callback
                ) -> c_int;

                /// Returns 1 if the export is read-only.
                fn nbd_is_read_only(h: *mut nbd_handle) -> c_int;
                /// Returns 1 if the export is on a rotational disk.
                fn nbd_is_rotational(h: *mut nbd_handle) -> c_int;
                /// Returns 1 if the server has a flush command.
                fn nbd_can_flush(h: *mut nbd_handle) -> c_int;
                /// Returns 1 if the server supports `LIBNBD_CMD_FLAG_FUA`.
                fn nbd_can_fua(h: *mut nbd_handle) -> c_int;
                /// Returns 1 if the server has a trim command.
                fn nbd_can_trim(h: *mut nbd_handle) -> c_int;
                /// Returns 1 if the server has a command that writes zeroes.
                fn nbd_can_zero(h: *mut nbd_handle) -> c_int;
                /// Returns 1 if the server supports `LIBNBD_CMD_FLAG_FAST_ZERO`.
                fn nbd_can_fast_zero(h: *mut nbd_handle) -> c_int;
                /// Returns 1 if a read can request an answer in one chunk.
                fn nbd_can_df(h: *mut nbd_handle) -> c_int;
                /// Returns 1 if several connections see one another's writes, and a flush on one covers the writes on all.
                fn nbd_can_multi_conn(h: *mut nbd_handle) -> c_int;
                /// Returns 1 if the server has a command that prefetches.
                fn nbd_can_cache(h: *mut nbd_handle) -> c_int;
                /// Returns 1 if the metadata context was negotiated.
                fn nbd_can_meta_context(h: *mut nbd_handle, metacontext: *const c_char) -> c_int;
                /// Returns the name of the protocol variant, a static text.
                fn nbd_get_protocol(h: *mut nbd_handle) -> *const c_char;
                /// Returns the size of the export in bytes.
                fn nbd_get_size(h: *mut nbd_handle) -> i64;
                /// Returns one of the block sizes `LIBNBD_SIZE_*` in bytes; 0 if the server does not report it.
                fn nbd_get_block_size(h: *mut nbd_handle, size_type: c_int) -> i64;

                /// Starts a read. `buf` belongs to the library until the command is retired.
                fn nbd_aio_pread(
                    h: *mut nbd_handle, buf: *mut c_void, count: usize, offset: u64,
                    completion_callback: nbd_completion_callback, flags: u32
                ) -> i64;
                /// Starts a read, and calls `chunk_callback` with each part of the answer. `buf` belongs to the library until the
                /// command is retired.
                fn nbd_aio_pread_structured(
                    h: *mut nbd_handle, buf: *mut c_void, count: usize, offset: u64, chunk_callback: nbd_chunk_callback,
                    completion_callback: nbd_completion_callback, flags: u32
                ) -> i64;
                /// Starts a write. `buf` must not change until the command is retired.
                fn nbd_aio_pwrite(
                    h: *mut nbd_handle, buf: *const c_void, count: usize, offset: u64,
                    completion_callback: nbd_completion_callback, flags: u32
                ) -> i64;
                /// Starts a flush.
                fn nbd_aio_flush(h: *mut nbd_handle, completion_callback: nbd_completion_callback, flags: u32) -> i64;
                /// Starts a trim.
                fn nbd_aio_trim(
                    h: *mut nbd_handle, count: u64, offset: u64, completion_callback: nbd_completion_callback, flags: u32
                ) -> i64;
                /// Starts to write zeroes.
                fn nbd_aio_zero(
                    h: *mut nbd_handle, count: u64, offset: u64, completion_callback: nbd_completion_callback, flags: u32
                ) -> i64;
                /// Starts to ask for the block status of a range.
                fn nbd_aio_block_status(
                    h: *mut nbd_handle, count: u64, offset: u64, extent_callback: nbd_extent_callback,
                    completion_callback: nbd_completion_callback, flags: u32
                ) -> i64;
                /// Sends NBD_CMD_DISC: the client will send no more commands.
                fn nbd_aio_disconnect(h: *mut nbd_handle, flags: u32) -> c_int;

                /// Returns the descriptor to poll.
                fn nbd_aio_get_fd(h: *mut nbd_handle) -> c_int;
                /// Returns the events to poll it for: bits of `LIBNBD_AIO_DIRECTION_*`.
                fn nbd_aio_get_direction(h: *mut nbd_handle) -> c_uint;
                /// Notifies the library that the descriptor is readable. The library then reads from it.
                fn nbd_aio_notify_read(h: *mut nbd_handle) -> c_int;
                /// Notifies the library that the descriptor is writable. The library then writes to it.
                fn nbd_aio_notify_write(h: *mut nbd_handle) -> c_int;
                /// Returns 1 while the transport is connecting.
                fn nbd_aio_is_connecting(h: *mut nbd_handle) -> c_int;
                /// Returns 1 if the handshake is in the state in which options can be sent.
                fn nbd_aio_is_negotiating(h: *mut nbd_handle) -> c_int;
                /// Returns 1 if the connection is ready for commands, and none is being sent or received.
                fn nbd_aio_is_ready(h: *mut nbd_handle) -> c_int;
                /// Returns 1 if a command is being sent or its answer received.
                fn nbd_aio_is_processing(h: *mut nbd_handle) -> c_int;
                /// Returns 1 if the connection has failed.
                fn nbd_aio_is_dead(h: *mut nbd_handle) -> c_int;
                /// Returns 1 if the connection was closed in order.
                fn nbd_aio_is_closed(h: *mut nbd_handle) -> c_int;
            }
            optional {}
        }
    };
}

/// Defines [`FUNCTIONS`].
macro_rules! names_and_types {
    (required { $($(#[$doc:meta])* fn $name:ident($($arg:ident: $type:ty),*) $(-> $result:ty)?;)* } optional {}) => {
        /// Functions, each with the types of its arguments and of its result (empty if none).
        pub const FUNCTIONS: &[(&str, &[&str], &str)] =
            &[$((stringify!($name), &[$(stringify!($type)),*], stringify!($($result)?))),*];
    };
}

functions!(names_and_types {});
