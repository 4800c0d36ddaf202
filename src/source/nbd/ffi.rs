//! Safe interface to libnbd. No other module calls the library.
//!
//! # Ownership
//!
//! libnbd locks a handle during each call, so any thread may call any method of a [`Handle`].
//!
//! The buffer of a command is in its [`Command`]. [`Handle::submit`] moves the command into a [`Ticket`], which the
//! library owns from then on. The library calls `on_completion` at most once, and `free_ticket` exactly once after it;
//! the first of the two moves the command to the [`CompletionQueue`]. So each command is returned exactly once: when
//! the server has answered it, when the connection breaks, or when the handle is closed.
//!
//! # Callbacks
//!
//! The callbacks run in the thread that called the library, under the lock of the handle. They must not call the
//! library with that handle. They only store into the ticket and move the command to the queue; the thread that made
//! the call examines the queue afterwards.
//!
//! Lock order: the library's lock of the handle, then that of the [`CompletionQueue`]. No function calls the library
//! while it holds the latter.

#![allow(unsafe_code)] // Calls of a C library, and its callbacks.

mod callbacks;
mod handshake;
mod library;
mod option_reply;
mod text;
mod ticket;

use std::ffi::{CStr, CString, c_int};
use std::os::fd::{BorrowedFd, IntoRawFd, OwnedFd};
use std::ptr::NonNull;
use std::sync::Arc;
use std::time::Instant;

use libnbd_sys as sys;

use self::callbacks::{
    free_listed, free_ticket, on_chunk, on_completion, on_context, on_export, on_extents, option_callback,
};
pub(super) use self::handshake::HandshakeLimit;
use self::handshake::{LIST_TURNS, OPTION_TURNS, Turns};
use self::library::Libnbd;
pub(super) use self::library::library;
pub(super) use self::option_reply::{List, Listed, OptDone};
use self::option_reply::{MAX_CONTEXTS, MAX_EXPORTS};
pub(super) use self::text::c_text;
use self::text::{owned, text};
use self::ticket::{Chunks, Ticket};
pub(super) use self::ticket::{CompletionQueue, UNSENT};
use super::command::{Command, CommandKind};
use crate::error::{Error, ErrorKind, Result};

/// libnbd handle: one connection, in any state. Closes it on drop.
#[derive(Debug)]
pub(super) struct Handle {
    lib: &'static Libnbd,
    raw: NonNull<sys::nbd_handle>,
    /// Limits of the handshake, which libnbd reports each step to.
    turns: Arc<Turns>,
}

// SAFETY: the functions of libnbd may be called from any thread; they lock the handle.
unsafe impl Send for Handle {}
// SAFETY: as above.
unsafe impl Sync for Handle {}

/// Flag of an export, named like the `nbd_is_…` or `nbd_can_…` function that returns it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum ExportFlag {
    ReadOnly,
    Rotational,
    Flush,
    Fua,
    Trim,
    Zero,
    FastZero,
    Df,
    MultiConn,
    Cache,
}

impl Handle {
    /// Creates a handle that is not connected.
    pub(super) fn new() -> Result<Self> {
        let lib = library()?;
        // SAFETY: the function has no arguments and no preconditions.
        let raw = NonNull::new(unsafe { (lib.nbd_create)() }).ok_or_else(|| failure("nbd_create"))?;
        let turns = Turns::new();
        let handle = Self { lib, raw, turns };
        done(
            // SAFETY: the handle is alive, and the callback holds all it needs.
            unsafe { (lib.nbd_set_debug_callback)(handle.raw(), handshake::callback(&handle.turns)) },
            "nbd_set_debug_callback",
        )?;
        // SAFETY: the handle is alive.
        done(unsafe { (lib.nbd_set_debug)(handle.raw(), true) }, "nbd_set_debug")?;
        // The library need not clear buffers: a simple reply fills the whole buffer, and the chunks of a structured
        // reply are checked by `Chunks`.
        done(
            // SAFETY: the handle is alive.
            unsafe { (lib.nbd_set_pread_initialize)(handle.raw(), false) },
            "nbd_set_pread_initialize",
        )?;
        // The size of an export need not be a multiple of its block size. The library would refuse a request for the
        // last, incomplete block, which the server may accept.
        // SAFETY: the handle is alive.
        let strict = unsafe { (lib.nbd_get_strict_mode)(handle.raw()) } & !sys::LIBNBD_STRICT_ALIGN;
        done(
            // SAFETY: the handle is alive.
            unsafe { (lib.nbd_set_strict_mode)(handle.raw(), strict) },
            "nbd_set_strict_mode",
        )?;
        done(
            // SAFETY: the handle is alive.
            unsafe { (lib.nbd_set_opt_mode)(handle.raw(), true) },
            "nbd_set_opt_mode",
        )?;
        Ok(handle)
    }

    fn raw(&self) -> *mut sys::nbd_handle {
        self.raw.as_ptr()
    }

    /// Limits the next calls to `deadline`, and to the transitions that an option may take.
    pub(super) fn limit_handshake(&mut self, deadline: Instant) -> Result<()> {
        let socket = self.fd().map(|fd| fd.try_clone_to_owned()).transpose();
        let socket = socket.map_err(|e| Error::io("duplicate the descriptor of an NBD socket", e))?;
        self.turns.watch(socket, deadline);
        Ok(())
    }

    /// Returns the limit of the handshake that the server has exceeded, if any. The connection has ended then.
    pub(super) fn exceeded(&self) -> Option<HandshakeLimit> {
        self.turns.exceeded()
    }

    /// Ends the limits of the handshake: the export is open.
    pub(super) fn end_handshake(&mut self) -> Result<()> {
        self.turns.unwatch();
        // SAFETY: the handle is alive.
        done(unsafe { (self.lib.nbd_set_debug)(self.raw(), false) }, "nbd_set_debug")
    }

    /// Returns the version of the library.
    pub(super) fn version(&self) -> String {
        // SAFETY: the handle is alive; the text is static.
        text(unsafe { (self.lib.nbd_get_version)(self.raw()) })
            .to_string_lossy()
            .into_owned()
    }

    /// Sets the name of the export to open or to ask for.
    pub(super) fn set_export(&self, name: &CStr) -> Result<()> {
        // SAFETY: handle and text are alive.
        done(
            unsafe { (self.lib.nbd_set_export_name)(self.raw(), name.as_ptr()) },
            "export name",
        )
    }

    /// Returns the name of the export.
    pub(super) fn export(&self) -> CString {
        // SAFETY: the handle is alive; the caller of the function owns the text.
        owned(unsafe { (self.lib.nbd_get_export_name)(self.raw()) })
    }

    /// Returns the description of the export, or an empty text if there is none.
    pub(super) fn description(&self) -> CString {
        // SAFETY: the handle is alive; the caller of the function owns the text.
        owned(unsafe { (self.lib.nbd_get_export_description)(self.raw()) })
    }

    /// Makes [`Self::opt_info`] ask for the description of the export too.
    pub(super) fn set_full_info(&self) -> Result<()> {
        // SAFETY: the handle is alive.
        done(
            unsafe { (self.lib.nbd_set_full_info)(self.raw(), true) },
            "nbd_set_full_info",
        )
    }

    /// Requests block status on this connection. `false` requests simple replies, which are shorter but have none.
    pub(super) fn set_block_status(&self, enabled: bool) -> Result<()> {
        done(
            // SAFETY: the handle is alive.
            unsafe { (self.lib.nbd_set_request_structured_replies)(self.raw(), enabled) },
            "structured replies",
        )?;
        if enabled {
            let context = sys::LIBNBD_CONTEXT_BASE_ALLOCATION.as_ptr();
            done(
                // SAFETY: handle and text are alive.
                unsafe { (self.lib.nbd_add_meta_context)(self.raw(), context) },
                "nbd_add_meta_context",
            )?;
        }
        Ok(())
    }

    /// Removes all requested metadata contexts.
    pub(super) fn clear_contexts(&self) -> Result<()> {
        // SAFETY: the handle is alive.
        done(
            unsafe { (self.lib.nbd_clear_meta_contexts)(self.raw()) },
            "nbd_clear_meta_contexts",
        )
    }

    /// Sets the TLS mode, one of `LIBNBD_TLS_*`. Errors: TLS is requested, but the library is built without it.
    pub(super) fn set_tls(&self, tls: c_int) -> Result<()> {
        // SAFETY: the handle is alive.
        if tls != sys::LIBNBD_TLS_DISABLE && unsafe { (self.lib.nbd_supports_tls)(self.raw()) } != 1 {
            return Err(Error::unsupported("this libnbd is built without TLS"));
        }
        // SAFETY: the handle is alive.
        done(unsafe { (self.lib.nbd_set_tls)(self.raw(), tls) }, "tls")
    }

    /// Sets the folder of the certificates.
    pub(super) fn set_tls_certificates(&self, dir: &CStr) -> Result<()> {
        // SAFETY: handle and text are alive.
        done(
            unsafe { (self.lib.nbd_set_tls_certificates)(self.raw(), dir.as_ptr()) },
            "tls-certificates",
        )
    }

    /// Sets if the certificate of the server is verified.
    pub(super) fn set_tls_verify(&self, verify: bool) -> Result<()> {
        // SAFETY: the handle is alive.
        done(
            unsafe { (self.lib.nbd_set_tls_verify_peer)(self.raw(), verify) },
            "tls-verify",
        )
    }

    /// Sets the user name for a pre-shared key.
    pub(super) fn set_tls_username(&self, name: &CStr) -> Result<()> {
        // SAFETY: handle and text are alive.
        done(
            unsafe { (self.lib.nbd_set_tls_username)(self.raw(), name.as_ptr()) },
            "tls-username",
        )
    }

    /// Sets the file of pre-shared keys.
    pub(super) fn set_tls_psk(&self, file: &CStr) -> Result<()> {
        // SAFETY: handle and text are alive.
        done(
            unsafe { (self.lib.nbd_set_tls_psk_file)(self.raw(), file.as_ptr()) },
            "tls-psk",
        )
    }

    /// Returns true if the connection is encrypted.
    pub(super) fn is_encrypted(&self) -> bool {
        // SAFETY: the handle is alive.
        unsafe { (self.lib.nbd_get_tls_negotiated)(self.raw()) == 1 }
    }

    /// Starts to connect to a URI. The URI comes from the user, so it may name local files and use every transport, but
    /// it can require TLS only if `tls` is true.
    pub(super) fn connect_uri(&self, uri: &CStr, tls: bool) -> Result<()> {
        // SAFETY: the handle is alive.
        if unsafe { (self.lib.nbd_supports_uri)(self.raw()) } != 1 {
            return Err(Error::unsupported("this libnbd is built without URI support"));
        }
        let tls = if tls {
            sys::LIBNBD_TLS_ALLOW
        } else {
            sys::LIBNBD_TLS_DISABLE
        };
        // SAFETY: handle and text are alive.
        unsafe {
            done(
                (self.lib.nbd_set_uri_allow_transports)(self.raw(), sys::LIBNBD_ALLOW_TRANSPORT_MASK),
                "transports",
            )?;
            done(
                (self.lib.nbd_set_uri_allow_tls)(self.raw(), tls),
                "nbd_set_uri_allow_tls",
            )?;
            done(
                (self.lib.nbd_set_uri_allow_local_file)(self.raw(), true),
                "nbd_set_uri_allow_local_file",
            )?;
            done((self.lib.nbd_aio_connect_uri)(self.raw(), uri.as_ptr()), "connect")
        }
    }

    /// Starts to connect to a Unix socket.
    pub(super) fn connect_unix(&self, path: &CStr) -> Result<()> {
        // SAFETY: handle and text are alive.
        done(
            unsafe { (self.lib.nbd_aio_connect_unix)(self.raw(), path.as_ptr()) },
            "connect",
        )
    }

    /// Starts to connect by TCP. Blocks while the host name is resolved.
    pub(super) fn connect_tcp(&self, host: &CStr, port: &CStr) -> Result<()> {
        // SAFETY: handle and texts are alive.
        done(
            unsafe { (self.lib.nbd_aio_connect_tcp)(self.raw(), host.as_ptr(), port.as_ptr()) },
            "connect",
        )
    }

    /// Starts to connect by VSOCK.
    pub(super) fn connect_vsock(&self, cid: u32, port: u32) -> Result<()> {
        // SAFETY: the handle is alive.
        done(
            unsafe { (self.lib.nbd_aio_connect_vsock)(self.raw(), cid, port) },
            "connect",
        )
    }

    /// Starts the handshake on a connected socket.
    pub(super) fn connect_socket(&self, socket: OwnedFd) -> Result<()> {
        // SAFETY: the handle is alive; the library closes the descriptor, also if the call fails.
        done(
            unsafe { (self.lib.nbd_aio_connect_socket)(self.raw(), socket.into_raw_fd()) },
            "connect",
        )
    }

    /// Starts to open the export.
    pub(super) fn opt_go(&self) -> Result<Arc<OptDone>> {
        let opt = OptDone::new();
        self.turns.allow(OPTION_TURNS);
        done(
            // SAFETY: the handle is alive, and the callback holds all it needs.
            unsafe { (self.lib.nbd_aio_opt_go)(self.raw(), option_callback(&opt)) },
            "open the export",
        )?;
        Ok(opt)
    }

    /// Starts to ask for the size and the flags of the export.
    pub(super) fn opt_info(&self) -> Result<Arc<OptDone>> {
        let opt = OptDone::new();
        self.turns.allow(OPTION_TURNS);
        done(
            // SAFETY: the handle is alive, and the callback holds all it needs.
            unsafe { (self.lib.nbd_aio_opt_info)(self.raw(), option_callback(&opt)) },
            "ask for the export",
        )?;
        Ok(opt)
    }

    /// Starts to list the exports. The list is complete when the option has its reply.
    pub(super) fn opt_list(&self) -> Result<(Arc<OptDone>, Listed)> {
        let (opt, listed) = (OptDone::new(), List::new(MAX_EXPORTS));
        self.turns.allow(LIST_TURNS);
        let list = sys::nbd_list_callback {
            callback: Some(on_export),
            user_data: Arc::into_raw(Arc::clone(&listed)).cast_mut().cast(),
            free: Some(free_listed),
        };
        done(
            // SAFETY: the handle is alive, and the callbacks hold all they need.
            unsafe { (self.lib.nbd_aio_opt_list)(self.raw(), list, option_callback(&opt)) },
            "list the exports",
        )?;
        Ok((opt, listed))
    }

    /// Starts to list the metadata contexts of the export. The list is complete when the option has its reply.
    pub(super) fn opt_contexts(&self) -> Result<(Arc<OptDone>, Listed)> {
        let (opt, listed) = (OptDone::new(), List::new(MAX_CONTEXTS));
        self.turns.allow(OPTION_TURNS);
        let list = sys::nbd_context_callback {
            callback: Some(on_context),
            user_data: Arc::into_raw(Arc::clone(&listed)).cast_mut().cast(),
            free: Some(free_listed),
        };
        // SAFETY: the handle is alive, and the callbacks hold all they need.
        let result = unsafe { (self.lib.nbd_aio_opt_list_meta_context)(self.raw(), list, option_callback(&opt)) };
        done(result, "list the contexts")?;
        Ok((opt, listed))
    }

    /// Ends the handshake with NBD_OPT_ABORT.
    pub(super) fn opt_abort(&self) {
        // SAFETY: the handle is alive. A failure changes nothing: the connection is closed anyway.
        unsafe { (self.lib.nbd_aio_opt_abort)(self.raw()) };
    }

    /// Sends NBD_CMD_DISC: the server closes the connection once it has answered all commands.
    pub(super) fn disconnect(&self) {
        // SAFETY: the handle is alive. A failure changes nothing: the connection is closed anyway.
        unsafe { (self.lib.nbd_aio_disconnect)(self.raw(), 0) };
    }

    /// Returns true if the export has the flag. An error counts as false.
    pub(super) fn can(&self, flag: ExportFlag) -> bool {
        let function = match flag {
            ExportFlag::ReadOnly => self.lib.nbd_is_read_only,
            ExportFlag::Rotational => self.lib.nbd_is_rotational,
            ExportFlag::Flush => self.lib.nbd_can_flush,
            ExportFlag::Fua => self.lib.nbd_can_fua,
            ExportFlag::Trim => self.lib.nbd_can_trim,
            ExportFlag::Zero => self.lib.nbd_can_zero,
            ExportFlag::FastZero => self.lib.nbd_can_fast_zero,
            ExportFlag::Df => self.lib.nbd_can_df,
            ExportFlag::MultiConn => self.lib.nbd_can_multi_conn,
            ExportFlag::Cache => self.lib.nbd_can_cache,
        };
        // SAFETY: the handle is alive.
        unsafe { function(self.raw()) == 1 }
    }

    /// Returns true if the server reports holes and zeroes.
    pub(super) fn can_block_status(&self) -> bool {
        // SAFETY: handle and text are alive.
        unsafe { (self.lib.nbd_can_meta_context)(self.raw(), sys::LIBNBD_CONTEXT_BASE_ALLOCATION.as_ptr()) == 1 }
    }

    /// Returns true if structured replies were negotiated.
    pub(super) fn is_structured(&self) -> bool {
        // SAFETY: the handle is alive.
        unsafe { (self.lib.nbd_get_structured_replies_negotiated)(self.raw()) == 1 }
    }

    /// Returns the name of the protocol variant.
    pub(super) fn protocol(&self) -> String {
        // SAFETY: the handle is alive; the text is static.
        text(unsafe { (self.lib.nbd_get_protocol)(self.raw()) })
            .to_string_lossy()
            .into_owned()
    }

    /// Returns the size of the export in bytes.
    pub(super) fn size(&self) -> Result<u64> {
        // SAFETY: the handle is alive.
        u64::try_from(unsafe { (self.lib.nbd_get_size)(self.raw()) })
            .ok()
            .ok_or_else(|| failure("size of the export"))
    }

    /// Returns the minimum, preferred and maximum length of a request in bytes; 0 if the server does not report one.
    pub(super) fn block_sizes(&self) -> [u64; 3] {
        [
            sys::LIBNBD_SIZE_MINIMUM,
            sys::LIBNBD_SIZE_PREFERRED,
            sys::LIBNBD_SIZE_MAXIMUM,
        ]
        .map(|which| {
            // SAFETY: the handle is alive.
            u64::try_from(unsafe { (self.lib.nbd_get_block_size)(self.raw(), which) }).unwrap_or(0)
        })
    }

    /// Returns the descriptor of the socket, or `None` if the connection is closed.
    ///
    /// Exclusive, because the library closes the descriptor in whatever call finds that the connection has ended: no
    /// other thread can make one while it is borrowed. A shared connection polls a duplicate.
    pub(super) fn fd(&mut self) -> Option<BorrowedFd<'_>> {
        // SAFETY: the handle is alive.
        let fd = unsafe { (self.lib.nbd_aio_get_fd)(self.raw()) };
        // SAFETY: the library closes the descriptor only inside a call with this handle, or when the handle is dropped.
        // The exclusive borrow of the handle, which lasts as long as that of the descriptor, excludes both.
        (fd >= 0).then(|| unsafe { BorrowedFd::borrow_raw(fd) })
    }

    /// Returns if the library waits to read, and if it waits to write.
    pub(super) fn direction(&self) -> (bool, bool) {
        // SAFETY: the handle is alive.
        let direction = unsafe { (self.lib.nbd_aio_get_direction)(self.raw()) };
        (
            direction & sys::LIBNBD_AIO_DIRECTION_READ != 0,
            direction & sys::LIBNBD_AIO_DIRECTION_WRITE != 0,
        )
    }

    /// Lets the library read, after the descriptor became readable. Errors: the connection is dead, or an option was
    /// refused.
    pub(super) fn readable(&self) -> Result<()> {
        // SAFETY: the handle is alive.
        done(unsafe { (self.lib.nbd_aio_notify_read)(self.raw()) }, "connection")
    }

    /// Lets the library write, after the descriptor became writable. Errors: those of [`Self::readable`].
    pub(super) fn writable(&self) -> Result<()> {
        // SAFETY: the handle is alive.
        done(unsafe { (self.lib.nbd_aio_notify_write)(self.raw()) }, "connection")
    }

    /// Returns true while the transport is connecting.
    pub(super) fn is_connecting(&self) -> bool {
        // SAFETY: the handle is alive.
        unsafe { (self.lib.nbd_aio_is_connecting)(self.raw()) == 1 }
    }

    /// Returns true if options can be sent.
    pub(super) fn is_negotiating(&self) -> bool {
        // SAFETY: the handle is alive.
        unsafe { (self.lib.nbd_aio_is_negotiating)(self.raw()) == 1 }
    }

    /// Returns true if commands can be sent.
    pub(super) fn is_up(&self) -> bool {
        // SAFETY: the handle is alive.
        unsafe { (self.lib.nbd_aio_is_ready)(self.raw()) == 1 || (self.lib.nbd_aio_is_processing)(self.raw()) == 1 }
    }

    /// Returns true if the connection has ended, in order or not.
    pub(super) fn is_over(&self) -> bool {
        // SAFETY: the handle is alive.
        unsafe { (self.lib.nbd_aio_is_dead)(self.raw()) == 1 || (self.lib.nbd_aio_is_closed)(self.raw()) == 1 }
    }

    /// Sends a command, and returns it in `completions` exactly once, possibly before this function returns.
    ///
    /// `structured`: the server answers reads in chunks.
    pub(super) fn submit(&self, mut command: Box<Command>, structured: bool, completions: &Arc<CompletionQueue>) {
        let (kind, offset, len) = (command.kind, command.offset, command.len);
        let (buf, capacity) = command.buf.bytes();
        let count = if kind.has_data() { len as usize } else { 0 };
        // The library would read or write beyond the buffer.
        if count > capacity {
            return completions.push(command, Some(libc::EINVAL));
        }
        let chunked = structured && kind == CommandKind::Read;
        let chunks = chunked.then(|| Chunks::new(offset, len));
        let ticket = Box::into_raw(Box::new(Ticket {
            command: Some(command),
            chunks,
            completions: Arc::clone(completions),
        }));
        let completion = sys::nbd_completion_callback {
            callback: Some(on_completion),
            user_data: ticket.cast(),
            free: Some(free_ticket),
        };
        let (raw, lib) = (self.raw(), self.lib);
        // SAFETY: the handle is alive. `buf` points to at least `count` bytes on the heap, which belong to the ticket
        // alone. The library frees the ticket when it has finished the command, also if this call fails, and no other
        // code accesses it before. The extent and chunk callbacks are called before the completion callback, so they
        // find a live ticket.
        unsafe {
            match kind {
                CommandKind::Read if chunked => {
                    let chunk = sys::nbd_chunk_callback {
                        callback: Some(on_chunk),
                        user_data: ticket.cast(),
                        free: None,
                    };
                    (lib.nbd_aio_pread_structured)(raw, buf.cast(), count, offset, chunk, completion, 0)
                }
                CommandKind::Read => (lib.nbd_aio_pread)(raw, buf.cast(), count, offset, completion, 0),
                CommandKind::Write { flags } => {
                    (lib.nbd_aio_pwrite)(raw, buf.cast_const().cast(), count, offset, completion, flags)
                }
                CommandKind::Zero { flags } => (lib.nbd_aio_zero)(raw, len, offset, completion, flags),
                CommandKind::Trim => (lib.nbd_aio_trim)(raw, len, offset, completion, 0),
                CommandKind::Flush => (lib.nbd_aio_flush)(raw, completion, 0),
                CommandKind::Status => {
                    let extents = sys::nbd_extent_callback {
                        callback: Some(on_extents),
                        user_data: ticket.cast(),
                        free: None,
                    };
                    (lib.nbd_aio_block_status)(raw, len, offset, extents, completion, 0)
                }
            }
        };
    }
}

impl Drop for Handle {
    fn drop(&mut self) {
        // SAFETY: this is the only owner of the handle. The library frees the tickets of commands in flight.
        unsafe { (self.lib.nbd_close)(self.raw()) };
    }
}

/// Returns true if a termination signal is pending. These signals are blocked and read from a descriptor once the
/// volume is mounted, so long work before that calls this function.
pub(super) fn is_ending() -> bool {
    // SAFETY: an all-zero signal set is valid, and sigpending writes to nothing else.
    let pending = unsafe {
        let mut set: libc::sigset_t = std::mem::zeroed();
        libc::sigpending(&raw mut set);
        set
    };
    // SAFETY: sigpending has filled in the set above.
    [libc::SIGTERM, libc::SIGINT]
        .iter()
        .any(|signal| unsafe { libc::sigismember(&raw const pending, *signal) == 1 })
}

/// Returns the last error of the library in this thread. `context`: what failed.
pub(super) fn failure(context: &str) -> Error {
    let lib = match library() {
        Ok(lib) => lib,
        Err(e) => return e.within(context),
    };
    // SAFETY: the text is valid until this thread calls the library again.
    let (message, errno) = unsafe { ((lib.nbd_get_error)(), (lib.nbd_get_errno)()) };
    let message = if message.is_null() {
        "the server closed the connection".into()
    } else {
        text(message).to_string_lossy()
    };
    // Each message starts with the names of one or more functions of the library, which mean nothing to a user.
    let message = message
        .rsplit_once("nbd_aio_")
        .map_or(&*message, |(_, rest)| rest.split_once(": ").map_or(rest, |(_, s)| s));
    Error::new(
        ErrorKind::Os(if errno > 0 { errno } else { libc::EIO }),
        format!("{context}: {message}"),
    )
}

fn done(result: c_int, context: &str) -> Result<()> {
    if result == -1 { Err(failure(context)) } else { Ok(()) }
}
