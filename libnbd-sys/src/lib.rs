//! Declarations of functions of [libnbd](https://libguestfs.org/libnbd.3.html), the NBD client library in C.
//!
//! Names and types are those of `libnbd.h`; what a function does and what it asks of its caller stands in its manual
//! page (`man 3 nbd_connect_uri`). Written by hand: the tables [`FUNCTIONS`], [`CONSTANTS`] and [`CALLBACKS`] come out of
//! the very declarations, and a test has a C compiler compare them with the installed header.
//!
//! What all functions share: a handle may be used by any thread, since the library locks it during each call. Most
//! return -1 (or a null pointer) for an error, of which [`nbd_get_error`] and [`nbd_get_errno`] tell more, in the same
//! thread and before its next call. A callback runs inside of a call and must not call the library with that handle.
#![no_std]
#![allow(non_camel_case_types)]

use core::ffi::{c_char, c_int, c_uint, c_void};
use core::marker::{PhantomData, PhantomPinned};

/// A connection, in whatever state; from [`nbd_create`] to [`nbd_close`].
#[repr(C)]
#[derive(Debug)]
pub struct nbd_handle {
    _opaque: [u8; 0],
    _not_send: PhantomData<(*mut u8, PhantomPinned)>,
}

/// A callback's declaration: a structure that is passed by value, and its line in [`CALLBACKS`].
macro_rules! callbacks {
    ($($(#[$doc:meta])* $name:ident ($($arg:ident: $type:ty),*);)*) => {
        $(
            $(#[$doc])*
            #[repr(C)]
            #[derive(Debug, Clone, Copy)]
            pub struct $name {
                /// What is called; -1 is a failure.
                pub callback: Option<unsafe extern "C" fn(user_data: *mut c_void $(, $arg: $type)*) -> c_int>,
                /// Given to both functions.
                pub user_data: *mut c_void,
                /// Called once when the library needs the callback no more, also where its call failed.
                pub free: Option<unsafe extern "C" fn(user_data: *mut c_void)>,
            }
        )*

        /// Each callback structure with the types of its function's arguments after the first, as they are written here.
        pub const CALLBACKS: &[(&str, &[&str])] = &[$((stringify!($name), &[$(stringify!($type)),*])),*];
    };
}

callbacks! {
    /// Told that a command is done; 1 lets the library forget the command by itself.
    nbd_completion_callback(error: *mut c_int);
    /// Told a part of what was read, which is in the buffer already: `status` says what it is.
    nbd_chunk_callback(subbuf: *const c_void, count: usize, offset: u64, status: c_uint, error: *mut c_int);
    /// Told ranges of a metadata context: pairs of length and flags, one after the other from `offset` on.
    nbd_extent_callback(
        metacontext: *const c_char, offset: u64, entries: *mut u32, nr_entries: usize, error: *mut c_int
    );
    /// Told one export of a server.
    nbd_list_callback(name: *const c_char, description: *const c_char);
    /// Told one metadata context of an export.
    nbd_context_callback(name: *const c_char);
}

/// Constants, and their lines in [`CONSTANTS`].
macro_rules! constants {
    ($($(#[$doc:meta])* $name:ident: $type:ty = $value:expr;)*) => {
        $($(#[$doc])* pub const $name: $type = $value;)*

        /// Each constant with its value.
        pub const CONSTANTS: &[(&str, u32)] = &[$((stringify!($name), $name as u32)),*];
    };
}

constants! {
    /// Never encrypt.
    LIBNBD_TLS_DISABLE: c_int = 0;
    /// Encrypt where the server does.
    LIBNBD_TLS_ALLOW: c_int = 1;
    /// Encrypt, or don't connect.
    LIBNBD_TLS_REQUIRE: c_int = 2;
    /// Bytes of the smallest request.
    LIBNBD_SIZE_MINIMUM: c_int = 0;
    /// Bytes of a request that the server likes.
    LIBNBD_SIZE_PREFERRED: c_int = 1;
    /// Bytes of the largest request.
    LIBNBD_SIZE_MAXIMUM: c_int = 2;
    /// Durable when done.
    LIBNBD_CMD_FLAG_FUA: u32 = 0x01;
    /// Zeroes that keep their room.
    LIBNBD_CMD_FLAG_NO_HOLE: u32 = 0x02;
    /// Zeroes only where that is faster than writing them.
    LIBNBD_CMD_FLAG_FAST_ZERO: u32 = 0x10;
    /// Refuse ranges that do not begin and end at the server's blocks.
    LIBNBD_STRICT_ALIGN: u32 = 0x10;
    /// URIs may say TCP.
    LIBNBD_ALLOW_TRANSPORT_TCP: u32 = 0x01;
    /// URIs may say Unix sockets.
    LIBNBD_ALLOW_TRANSPORT_UNIX: u32 = 0x02;
    /// URIs may say VSOCK.
    LIBNBD_ALLOW_TRANSPORT_VSOCK: u32 = 0x04;
    /// All of them.
    LIBNBD_ALLOW_TRANSPORT_MASK: u32 = 0x07;
    /// The library waits to read.
    LIBNBD_AIO_DIRECTION_READ: c_uint = 1;
    /// The library waits to write.
    LIBNBD_AIO_DIRECTION_WRITE: c_uint = 2;
    /// Flag of `base:allocation`: no room is taken.
    LIBNBD_STATE_HOLE: u32 = 1;
    /// Flag of `base:allocation`: reads as zeroes.
    LIBNBD_STATE_ZERO: u32 = 2;
}

/// The context of block status that tells holes and zeroes.
pub const LIBNBD_CONTEXT_BASE_ALLOCATION: &core::ffi::CStr = c"base:allocation";

/// The functions, and their lines in [`FUNCTIONS`].
macro_rules! functions {
    ($($(#[$doc:meta])* fn $name:ident($($arg:ident: $type:ty),*) $(-> $result:ty)?;)*) => {
        unsafe extern "C" {
            $($(#[$doc])* pub fn $name($($arg: $type),*) $(-> $result)?;)*
        }

        /// Each function with the types of its arguments and of its result (empty: none), as they are written here.
        pub const FUNCTIONS: &[(&str, &[&str], &str)] =
            &[$((stringify!($name), &[$(stringify!($type)),*], stringify!($($result)?))),*];
    };
}

functions! {
    /// A new handle; null: no memory.
    fn nbd_create() -> *mut nbd_handle;
    /// Ends the connection and forgets the handle. Commands under way are dropped; their `free` is called.
    fn nbd_close(h: *mut nbd_handle);
    /// What the last failure of this thread was; null: there was none. Valid until its next call.
    fn nbd_get_error() -> *const c_char;
    /// Its `errno`; 0: not known.
    fn nbd_get_errno() -> c_int;
    /// The library's version, a static text.
    fn nbd_get_version(h: *mut nbd_handle) -> *const c_char;
    /// Whether the library was built with TLS.
    fn nbd_supports_tls(h: *mut nbd_handle) -> c_int;
    /// Whether the library was built with URIs.
    fn nbd_supports_uri(h: *mut nbd_handle) -> c_int;

    /// Names the export; at most 4096 bytes.
    fn nbd_set_export_name(h: *mut nbd_handle, export_name: *const c_char) -> c_int;
    /// The name that was set; to be freed.
    fn nbd_get_export_name(h: *mut nbd_handle) -> *mut c_char;
    /// Asks the server for description and canonical name too.
    fn nbd_set_full_info(h: *mut nbd_handle, request: bool) -> c_int;
    /// Description of the export, to be freed; null: none.
    fn nbd_get_export_description(h: *mut nbd_handle) -> *mut c_char;
    /// One of `LIBNBD_TLS_*`.
    fn nbd_set_tls(h: *mut nbd_handle, tls: c_int) -> c_int;
    /// Whether the connection is encrypted.
    fn nbd_get_tls_negotiated(h: *mut nbd_handle) -> c_int;
    /// Folder of the certificates.
    fn nbd_set_tls_certificates(h: *mut nbd_handle, dir: *const c_char) -> c_int;
    /// Whether the server's certificate is verified.
    fn nbd_set_tls_verify_peer(h: *mut nbd_handle, verify: bool) -> c_int;
    /// User name for pre-shared keys.
    fn nbd_set_tls_username(h: *mut nbd_handle, username: *const c_char) -> c_int;
    /// File of pre-shared keys.
    fn nbd_set_tls_psk_file(h: *mut nbd_handle, filename: *const c_char) -> c_int;
    /// Whether to ask for structured replies, without which there is no block status.
    fn nbd_set_request_structured_replies(h: *mut nbd_handle, request: bool) -> c_int;
    /// Whether the server gives structured replies.
    fn nbd_get_structured_replies_negotiated(h: *mut nbd_handle) -> c_int;
    /// Whether the library clears a buffer before it reads into it.
    fn nbd_set_pread_initialize(h: *mut nbd_handle, request: bool) -> c_int;
    /// What the library refuses by itself: bits of `LIBNBD_STRICT_*`, some of which have no name here.
    fn nbd_get_strict_mode(h: *mut nbd_handle) -> u32;
    /// Sets that.
    fn nbd_set_strict_mode(h: *mut nbd_handle, flags: u32) -> c_int;
    /// Stops the handshake where options can be sent.
    fn nbd_set_opt_mode(h: *mut nbd_handle, enable: bool) -> c_int;
    /// Asks for a metadata context.
    fn nbd_add_meta_context(h: *mut nbd_handle, name: *const c_char) -> c_int;
    /// Takes back what was asked for.
    fn nbd_clear_meta_contexts(h: *mut nbd_handle) -> c_int;
    /// Bits of `LIBNBD_ALLOW_TRANSPORT_*`.
    fn nbd_set_uri_allow_transports(h: *mut nbd_handle, mask: u32) -> c_int;
    /// Whether a URI may ask for TLS: one of `LIBNBD_TLS_*`.
    fn nbd_set_uri_allow_tls(h: *mut nbd_handle, tls: c_int) -> c_int;
    /// Whether a URI may name files.
    fn nbd_set_uri_allow_local_file(h: *mut nbd_handle, allow: bool) -> c_int;

    /// Begins to connect to what a URI says.
    fn nbd_aio_connect_uri(h: *mut nbd_handle, uri: *const c_char) -> c_int;
    /// Begins to connect to a Unix socket.
    fn nbd_aio_connect_unix(h: *mut nbd_handle, unixsocket: *const c_char) -> c_int;
    /// Begins to connect by VSOCK.
    fn nbd_aio_connect_vsock(h: *mut nbd_handle, cid: u32, port: u32) -> c_int;
    /// Begins to connect by TCP; resolves the name before it returns.
    fn nbd_aio_connect_tcp(h: *mut nbd_handle, hostname: *const c_char, port: *const c_char) -> c_int;
    /// Takes over a connected socket.
    fn nbd_aio_connect_socket(h: *mut nbd_handle, sock: c_int) -> c_int;

    /// Begins to open the export.
    fn nbd_aio_opt_go(h: *mut nbd_handle, completion_callback: nbd_completion_callback) -> c_int;
    /// Ends the handshake without an export.
    fn nbd_aio_opt_abort(h: *mut nbd_handle) -> c_int;
    /// Begins to list the exports.
    fn nbd_aio_opt_list(
        h: *mut nbd_handle, list_callback: nbd_list_callback, completion_callback: nbd_completion_callback
    ) -> c_int;
    /// Begins to ask for size and flags of the export without opening it.
    fn nbd_aio_opt_info(h: *mut nbd_handle, completion_callback: nbd_completion_callback) -> c_int;
    /// Begins to list the metadata contexts of the export.
    fn nbd_aio_opt_list_meta_context(
        h: *mut nbd_handle, context_callback: nbd_context_callback, completion_callback: nbd_completion_callback
    ) -> c_int;

    /// Whether the export can't be written to.
    fn nbd_is_read_only(h: *mut nbd_handle) -> c_int;
    /// Whether the export is on a disk that rotates.
    fn nbd_is_rotational(h: *mut nbd_handle) -> c_int;
    /// Whether there is a flush command.
    fn nbd_can_flush(h: *mut nbd_handle) -> c_int;
    /// Whether commands may ask to be durable when done.
    fn nbd_can_fua(h: *mut nbd_handle) -> c_int;
    /// Whether there is a trim command.
    fn nbd_can_trim(h: *mut nbd_handle) -> c_int;
    /// Whether there is a command that writes zeroes.
    fn nbd_can_zero(h: *mut nbd_handle) -> c_int;
    /// Whether it can be asked to be fast or to fail.
    fn nbd_can_fast_zero(h: *mut nbd_handle) -> c_int;
    /// Whether reads can be asked not to be fragmented.
    fn nbd_can_df(h: *mut nbd_handle) -> c_int;
    /// Whether several connections see one another's writes, and flush them.
    fn nbd_can_multi_conn(h: *mut nbd_handle) -> c_int;
    /// Whether there is a command to read ahead.
    fn nbd_can_cache(h: *mut nbd_handle) -> c_int;
    /// Whether the server gives a metadata context.
    fn nbd_can_meta_context(h: *mut nbd_handle, metacontext: *const c_char) -> c_int;
    /// The protocol's variant, a static text.
    fn nbd_get_protocol(h: *mut nbd_handle) -> *const c_char;
    /// Bytes of the export.
    fn nbd_get_size(h: *mut nbd_handle) -> i64;
    /// One of the `LIBNBD_SIZE_*`; 0: the server did not say.
    fn nbd_get_block_size(h: *mut nbd_handle, size_type: c_int) -> i64;

    /// Begins to read; `buf` belongs to the library until the command is retired.
    fn nbd_aio_pread(
        h: *mut nbd_handle, buf: *mut c_void, count: usize, offset: u64,
        completion_callback: nbd_completion_callback, flags: u32
    ) -> i64;
    /// Begins to read, and tells each part that comes; `buf` belongs to the library until the command is retired.
    fn nbd_aio_pread_structured(
        h: *mut nbd_handle, buf: *mut c_void, count: usize, offset: u64, chunk_callback: nbd_chunk_callback,
        completion_callback: nbd_completion_callback, flags: u32
    ) -> i64;
    /// Begins to write; `buf` must stay as it is until the command is retired.
    fn nbd_aio_pwrite(
        h: *mut nbd_handle, buf: *const c_void, count: usize, offset: u64,
        completion_callback: nbd_completion_callback, flags: u32
    ) -> i64;
    /// Begins to flush.
    fn nbd_aio_flush(h: *mut nbd_handle, completion_callback: nbd_completion_callback, flags: u32) -> i64;
    /// Begins to trim.
    fn nbd_aio_trim(
        h: *mut nbd_handle, count: u64, offset: u64, completion_callback: nbd_completion_callback, flags: u32
    ) -> i64;
    /// Begins to write zeroes.
    fn nbd_aio_zero(
        h: *mut nbd_handle, count: u64, offset: u64, completion_callback: nbd_completion_callback, flags: u32
    ) -> i64;
    /// Begins to ask for the block status of a range.
    fn nbd_aio_block_status(
        h: *mut nbd_handle, count: u64, offset: u64, extent_callback: nbd_extent_callback,
        completion_callback: nbd_completion_callback, flags: u32
    ) -> i64;
    /// Tells the server that no more commands come.
    fn nbd_aio_disconnect(h: *mut nbd_handle, flags: u32) -> c_int;

    /// The descriptor to poll.
    fn nbd_aio_get_fd(h: *mut nbd_handle) -> c_int;
    /// What to poll it for: bits of `LIBNBD_AIO_DIRECTION_*`.
    fn nbd_aio_get_direction(h: *mut nbd_handle) -> c_uint;
    /// It can be read.
    fn nbd_aio_notify_read(h: *mut nbd_handle) -> c_int;
    /// It can be written to.
    fn nbd_aio_notify_write(h: *mut nbd_handle) -> c_int;
    /// Whether the connection is being made.
    fn nbd_aio_is_connecting(h: *mut nbd_handle) -> c_int;
    /// Whether the handshake stands where options can be sent.
    fn nbd_aio_is_negotiating(h: *mut nbd_handle) -> c_int;
    /// Whether commands can be sent, and none is being sent or answered just now.
    fn nbd_aio_is_ready(h: *mut nbd_handle) -> c_int;
    /// Whether a command is being sent or answered just now.
    fn nbd_aio_is_processing(h: *mut nbd_handle) -> c_int;
    /// Whether the connection broke.
    fn nbd_aio_is_dead(h: *mut nbd_handle) -> c_int;
    /// Whether the connection was ended.
    fn nbd_aio_is_closed(h: *mut nbd_handle) -> c_int;
}
