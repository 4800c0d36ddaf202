//! The one place that calls libnbd: a handle whose methods are safe.
//!
//! Who may touch what: libnbd locks a handle during each call, so any thread may call any method. A command's buffer
//! lives in its [`Command`], which belongs to the library from [`Handle::submit`] on until it calls one of the two
//! functions of [`Ticket`]; then the operation goes to the list of those that are [`CompletionQueue`]. The library retires every
//! command: when it is answered, when the connection dies, and when the handle is closed.
//!
//! The functions of a ticket run inside of a call of the library, under the handle's lock. They do nothing but move
//! the operation to the list; whoever made the call looks into the list afterwards.

#![allow(unsafe_code)] // Calls of a C library, and its callbacks.

mod callbacks;

use std::ffi::{CStr, CString, c_char, c_int};
use std::os::fd::{BorrowedFd, FromRawFd, IntoRawFd, OwnedFd};
use std::ptr::NonNull;
use std::sync::atomic::{AtomicI32, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use libnbd_sys as sys;

use self::callbacks::{
    free_listed, free_ticket, on_chunk, on_completion, on_context, on_export, on_extents, option_callback,
};
use super::command::{Command, CommandKind};
use crate::error::{Error, ErrorKind, Result};

/// The most exports, and metadata contexts of an export, that are taken from a server.
const MAX_LISTED: usize = 4096;

/// The most extents that are taken from one answer about block status.
const MAX_EXTENTS: usize = 1 << 16;

/// What a command failed with that was never completed: the library refused it, or the connection is over.
pub(super) const UNSENT: i32 = -1;

/// A handle of libnbd.
#[derive(Debug)]
pub(super) struct Handle(NonNull<sys::nbd_handle>);

// SAFETY: libnbd's functions may be called from any thread; they lock the handle.
unsafe impl Send for Handle {}
// SAFETY: as above.
unsafe impl Sync for Handle {}

/// Operations that the library has let go of, each with what it failed with.
#[derive(Debug, Default)]
pub(super) struct CompletionQueue {
    list: Mutex<Vec<(Box<Command>, Option<i32>)>>,
    len: AtomicUsize,
}

impl CompletionQueue {
    fn push(&self, command: Box<Command>, error: Option<i32>) {
        let mut list = self.list.lock().unwrap_or_else(PoisonError::into_inner);
        list.push((command, error));
        self.len.store(list.len(), Ordering::Release);
    }

    /// Moves them to the end of `out`.
    pub(super) fn take(&self, out: &mut Vec<(Box<Command>, Option<i32>)>) {
        if self.len.load(Ordering::Acquire) > 0 {
            let mut list = self.list.lock().unwrap_or_else(PoisonError::into_inner);
            out.append(&mut list);
            self.len.store(0, Ordering::Release);
        }
    }
}

/// What the library holds for a command: the operation, and where it goes afterwards.
#[derive(Debug)]
struct Ticket {
    command: Option<Box<Command>>,
    /// What a read that comes in chunks has been given.
    chunks: Option<Chunks>,
    completions: Arc<CompletionQueue>,
}

/// The parts of an answer, which the library does not compare with what was asked for.
#[derive(Debug)]
struct Chunks {
    /// From there on nothing has come yet, but for what is in `beyond`.
    next: u64,
    end: u64,
    /// Where parts that came out of order begin and end.
    beyond: Vec<(u64, u64)>,
}

impl Chunks {
    /// None yet, of a range.
    fn of(offset: u64, len: u64) -> Self {
        Self {
            next: offset,
            end: offset + len,
            beyond: Vec::new(),
        }
    }

    fn add(&mut self, offset: u64, count: u64) {
        if offset == self.next {
            self.next += count;
        } else if self.beyond.len() < MAX_EXTENTS {
            self.beyond.push((offset, offset + count));
        }
    }

    /// Whether each byte came, and came once.
    fn are_all(&mut self) -> bool {
        self.beyond.sort_unstable();
        for (start, end) in self.beyond.drain(..) {
            if start != self.next {
                return false;
            }
            self.next = end;
        }
        self.next == self.end
    }
}

impl Ticket {
    fn retire(&mut self, error: Option<i32>) {
        if let Some(command) = self.command.take() {
            self.completions.push(command, error);
        }
    }
}

/// An option of the handshake under way: -1, and its `errno` or 0 when it is done.
#[derive(Debug)]
pub(super) struct OptDone(AtomicI32);

impl OptDone {
    fn new() -> Arc<Self> {
        Arc::new(Self(AtomicI32::new(-1)))
    }

    /// Its `errno` or 0; `None`: not done yet.
    pub(super) fn get(&self) -> Option<i32> {
        Some(self.0.load(Ordering::Acquire)).filter(|e| *e >= 0)
    }
}

/// Texts that a server lists: a name and, of an export, its description.
pub(super) type Listed = Arc<Mutex<Vec<(CString, CString)>>>;

/// Numbers and abilities of an export.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Ask {
    /// See `nbd_is_read_only`, and so on.
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
    /// A new one that is not connected.
    pub(super) fn new() -> Result<Self> {
        // SAFETY: it takes nothing.
        let made = NonNull::new(unsafe { sys::nbd_create() })
            .map(Self)
            .ok_or_else(|| failure("a handle of libnbd"))?;
        // Every answer fills the buffer or is an error; where it comes in chunks they are counted.
        // SAFETY: the handle is alive.
        done(
            unsafe { sys::nbd_set_pread_initialize(made.raw(), false) },
            "nbd_set_pread_initialize",
        )?;
        // The end of an export may be no multiple of its blocks; whether it can be read then the server has to say.
        // SAFETY: the handle is alive.
        let strict = unsafe { sys::nbd_get_strict_mode(made.raw()) } & !sys::LIBNBD_STRICT_ALIGN;
        // SAFETY: the handle is alive.
        done(
            unsafe { sys::nbd_set_strict_mode(made.raw(), strict) },
            "nbd_set_strict_mode",
        )?;
        // SAFETY: the handle is alive.
        done(unsafe { sys::nbd_set_opt_mode(made.raw(), true) }, "nbd_set_opt_mode")?;
        Ok(made)
    }

    fn raw(&self) -> *mut sys::nbd_handle {
        self.0.as_ptr()
    }

    /// The version of the library.
    pub(super) fn version(&self) -> String {
        // SAFETY: the handle is alive; the text is static.
        text(unsafe { sys::nbd_get_version(self.raw()) })
            .to_string_lossy()
            .into_owned()
    }

    /// Names the export.
    pub(super) fn set_export(&self, name: &CStr) -> Result<()> {
        // SAFETY: handle and text are alive.
        done(
            unsafe { sys::nbd_set_export_name(self.raw(), name.as_ptr()) },
            "export name",
        )
    }

    /// The name of the export.
    pub(super) fn export(&self) -> CString {
        // SAFETY: the handle is alive; the text is ours.
        owned(unsafe { sys::nbd_get_export_name(self.raw()) })
    }

    /// The description of the export, empty where there is none.
    pub(super) fn description(&self) -> CString {
        // SAFETY: the handle is alive; the text is ours.
        owned(unsafe { sys::nbd_get_export_description(self.raw()) })
    }

    /// Asks for descriptions.
    pub(super) fn set_full_info(&self) -> Result<()> {
        // SAFETY: the handle is alive.
        done(unsafe { sys::nbd_set_full_info(self.raw(), true) }, "nbd_set_full_info")
    }

    /// Asks for block status, or (`false`) for the short replies, which have none.
    pub(super) fn set_block_status(&self, wanted: bool) -> Result<()> {
        // SAFETY: the handle is alive.
        done(
            unsafe { sys::nbd_set_request_structured_replies(self.raw(), wanted) },
            "structured replies",
        )?;
        if wanted {
            let context = sys::LIBNBD_CONTEXT_BASE_ALLOCATION.as_ptr();
            // SAFETY: handle and text are alive.
            done(
                unsafe { sys::nbd_add_meta_context(self.raw(), context) },
                "nbd_add_meta_context",
            )?;
        }
        Ok(())
    }

    /// Asks for no metadata context any more.
    pub(super) fn clear_contexts(&self) -> Result<()> {
        // SAFETY: the handle is alive.
        done(
            unsafe { sys::nbd_clear_meta_contexts(self.raw()) },
            "nbd_clear_meta_contexts",
        )
    }

    /// One of `LIBNBD_TLS_*`.
    pub(super) fn set_tls(&self, tls: c_int) -> Result<()> {
        // SAFETY: the handle is alive.
        if tls != sys::LIBNBD_TLS_DISABLE && unsafe { sys::nbd_supports_tls(self.raw()) } != 1 {
            return Err(Error::unsupported("this libnbd is built without TLS"));
        }
        // SAFETY: the handle is alive.
        done(unsafe { sys::nbd_set_tls(self.raw(), tls) }, "tls")
    }

    /// The folder of certificates.
    pub(super) fn set_tls_certificates(&self, dir: &CStr) -> Result<()> {
        // SAFETY: handle and text are alive.
        done(
            unsafe { sys::nbd_set_tls_certificates(self.raw(), dir.as_ptr()) },
            "tls-certificates",
        )
    }

    /// Whether the server's certificate is verified.
    pub(super) fn set_tls_verify(&self, verify: bool) -> Result<()> {
        // SAFETY: the handle is alive.
        done(
            unsafe { sys::nbd_set_tls_verify_peer(self.raw(), verify) },
            "tls-verify",
        )
    }

    /// The user of a pre-shared key.
    pub(super) fn set_tls_username(&self, name: &CStr) -> Result<()> {
        // SAFETY: handle and text are alive.
        done(
            unsafe { sys::nbd_set_tls_username(self.raw(), name.as_ptr()) },
            "tls-username",
        )
    }

    /// The file of pre-shared keys.
    pub(super) fn set_tls_psk(&self, file: &CStr) -> Result<()> {
        // SAFETY: handle and text are alive.
        done(
            unsafe { sys::nbd_set_tls_psk_file(self.raw(), file.as_ptr()) },
            "tls-psk",
        )
    }

    /// Whether what goes over the connection is encrypted.
    pub(super) fn is_encrypted(&self) -> bool {
        // SAFETY: the handle is alive.
        unsafe { sys::nbd_get_tls_negotiated(self.raw()) == 1 }
    }

    /// Begins to connect to what a URI says. The user wrote it, so it may name files and use every transport.
    pub(super) fn connect_uri(&self, uri: &CStr) -> Result<()> {
        // SAFETY: the handle is alive.
        if unsafe { sys::nbd_supports_uri(self.raw()) } != 1 {
            return Err(Error::unsupported("this libnbd is built without URIs"));
        }
        // SAFETY: handle and text are alive.
        unsafe {
            done(
                sys::nbd_set_uri_allow_transports(self.raw(), sys::LIBNBD_ALLOW_TRANSPORT_MASK),
                "transports",
            )?;
            done(
                sys::nbd_set_uri_allow_tls(self.raw(), sys::LIBNBD_TLS_ALLOW),
                "nbd_set_uri_allow_tls",
            )?;
            done(
                sys::nbd_set_uri_allow_local_file(self.raw(), true),
                "nbd_set_uri_allow_local_file",
            )?;
            done(sys::nbd_aio_connect_uri(self.raw(), uri.as_ptr()), "connect")
        }
    }

    /// Begins to connect to a Unix socket.
    pub(super) fn connect_unix(&self, path: &CStr) -> Result<()> {
        // SAFETY: handle and text are alive.
        done(
            unsafe { sys::nbd_aio_connect_unix(self.raw(), path.as_ptr()) },
            "connect",
        )
    }

    /// Begins to connect by TCP.
    pub(super) fn connect_tcp(&self, host: &CStr, port: &CStr) -> Result<()> {
        // SAFETY: handle and texts are alive.
        done(
            unsafe { sys::nbd_aio_connect_tcp(self.raw(), host.as_ptr(), port.as_ptr()) },
            "connect",
        )
    }

    /// Begins to connect by VSOCK.
    pub(super) fn connect_vsock(&self, cid: u32, port: u32) -> Result<()> {
        // SAFETY: the handle is alive.
        done(unsafe { sys::nbd_aio_connect_vsock(self.raw(), cid, port) }, "connect")
    }

    /// Begins the handshake on a connected socket.
    pub(super) fn connect_socket(&self, socket: OwnedFd) -> Result<()> {
        // SAFETY: the handle is alive; the library closes the descriptor, whatever becomes of the call.
        done(
            unsafe { sys::nbd_aio_connect_socket(self.raw(), socket.into_raw_fd()) },
            "connect",
        )
    }

    /// Begins to open the export.
    pub(super) fn opt_go(&self) -> Result<Arc<OptDone>> {
        let opt = OptDone::new();
        // SAFETY: the handle is alive, and the callback holds all it needs.
        done(
            unsafe { sys::nbd_aio_opt_go(self.raw(), option_callback(&opt)) },
            "open the export",
        )?;
        Ok(opt)
    }

    /// Begins to ask for the export's size and abilities.
    pub(super) fn opt_info(&self) -> Result<Arc<OptDone>> {
        let opt = OptDone::new();
        // SAFETY: the handle is alive, and the callback holds all it needs.
        done(
            unsafe { sys::nbd_aio_opt_info(self.raw(), option_callback(&opt)) },
            "ask for the export",
        )?;
        Ok(opt)
    }

    /// Begins to list the exports; the list may be read when it is done.
    pub(super) fn opt_list(&self) -> Result<(Arc<OptDone>, Listed)> {
        let (opt, listed) = (OptDone::new(), Listed::default());
        let list = sys::nbd_list_callback {
            callback: Some(on_export),
            user_data: Arc::into_raw(Arc::clone(&listed)).cast_mut().cast(),
            free: Some(free_listed),
        };
        // SAFETY: the handle is alive, and the callbacks hold all they need.
        done(
            unsafe { sys::nbd_aio_opt_list(self.raw(), list, option_callback(&opt)) },
            "list the exports",
        )?;
        Ok((opt, listed))
    }

    /// Begins to list the metadata contexts of the export.
    pub(super) fn opt_contexts(&self) -> Result<(Arc<OptDone>, Listed)> {
        let (opt, listed) = (OptDone::new(), Listed::default());
        let list = sys::nbd_context_callback {
            callback: Some(on_context),
            user_data: Arc::into_raw(Arc::clone(&listed)).cast_mut().cast(),
            free: Some(free_listed),
        };
        // SAFETY: the handle is alive, and the callbacks hold all they need.
        let begun = unsafe { sys::nbd_aio_opt_list_meta_context(self.raw(), list, option_callback(&opt)) };
        done(begun, "list the contexts")?;
        Ok((opt, listed))
    }

    /// Ends a handshake politely.
    pub(super) fn opt_abort(&self) {
        // SAFETY: the handle is alive. A failure changes nothing: the connection is closed anyway.
        unsafe { sys::nbd_aio_opt_abort(self.raw()) };
    }

    /// Tells the server that the connection ends, once all commands are answered.
    pub(super) fn disconnect(&self) {
        // SAFETY: the handle is alive. A failure changes nothing: the connection is closed anyway.
        unsafe { sys::nbd_aio_disconnect(self.raw(), 0) };
    }

    /// Whether the export has an ability.
    pub(super) fn can(&self, what: Ask) -> bool {
        let ask = match what {
            Ask::ReadOnly => sys::nbd_is_read_only,
            Ask::Rotational => sys::nbd_is_rotational,
            Ask::Flush => sys::nbd_can_flush,
            Ask::Fua => sys::nbd_can_fua,
            Ask::Trim => sys::nbd_can_trim,
            Ask::Zero => sys::nbd_can_zero,
            Ask::FastZero => sys::nbd_can_fast_zero,
            Ask::Df => sys::nbd_can_df,
            Ask::MultiConn => sys::nbd_can_multi_conn,
            Ask::Cache => sys::nbd_can_cache,
        };
        // SAFETY: the handle is alive.
        unsafe { ask(self.raw()) == 1 }
    }

    /// Whether the server tells holes and zeroes.
    pub(super) fn can_block_status(&self) -> bool {
        // SAFETY: handle and text are alive.
        unsafe { sys::nbd_can_meta_context(self.raw(), sys::LIBNBD_CONTEXT_BASE_ALLOCATION.as_ptr()) == 1 }
    }

    /// Whether the server gives structured replies.
    pub(super) fn is_structured(&self) -> bool {
        // SAFETY: the handle is alive.
        unsafe { sys::nbd_get_structured_replies_negotiated(self.raw()) == 1 }
    }

    /// The variant of the protocol.
    pub(super) fn protocol(&self) -> String {
        // SAFETY: the handle is alive; the text is static.
        text(unsafe { sys::nbd_get_protocol(self.raw()) })
            .to_string_lossy()
            .into_owned()
    }

    /// Bytes of the export.
    pub(super) fn size(&self) -> Result<u64> {
        // SAFETY: the handle is alive.
        u64::try_from(unsafe { sys::nbd_get_size(self.raw()) })
            .ok()
            .ok_or_else(|| failure("size of the export"))
    }

    /// Minimum, preferred and maximum bytes of a request; 0: not said.
    pub(super) fn block_sizes(&self) -> [u64; 3] {
        [
            sys::LIBNBD_SIZE_MINIMUM,
            sys::LIBNBD_SIZE_PREFERRED,
            sys::LIBNBD_SIZE_MAXIMUM,
        ]
        .map(|which| {
            // SAFETY: the handle is alive.
            u64::try_from(unsafe { sys::nbd_get_block_size(self.raw(), which) }).unwrap_or(0)
        })
    }

    /// The descriptor to poll, while the connection is not closed.
    pub(super) fn fd(&self) -> Option<BorrowedFd<'_>> {
        // SAFETY: the handle is alive.
        let fd = unsafe { sys::nbd_aio_get_fd(self.raw()) };
        // SAFETY: the library keeps it open until the handle is dropped or the server has closed the connection; then
        // polling another file in its place, or none, does no harm.
        (fd >= 0).then(|| unsafe { BorrowedFd::borrow_raw(fd) })
    }

    /// Whether it waits to read, and whether to write.
    pub(super) fn direction(&self) -> (bool, bool) {
        // SAFETY: the handle is alive.
        let direction = unsafe { sys::nbd_aio_get_direction(self.raw()) };
        (
            direction & sys::LIBNBD_AIO_DIRECTION_READ != 0,
            direction & sys::LIBNBD_AIO_DIRECTION_WRITE != 0,
        )
    }

    /// Goes on after the descriptor became readable. An error: the connection is dead, or the option failed.
    pub(super) fn readable(&self) -> Result<()> {
        // SAFETY: the handle is alive.
        done(unsafe { sys::nbd_aio_notify_read(self.raw()) }, "connection")
    }

    /// Goes on after the descriptor became writable. An error as for [`Self::readable`].
    pub(super) fn writable(&self) -> Result<()> {
        // SAFETY: the handle is alive.
        done(unsafe { sys::nbd_aio_notify_write(self.raw()) }, "connection")
    }

    /// Whether the connection is being made.
    pub(super) fn is_connecting(&self) -> bool {
        // SAFETY: the handle is alive.
        unsafe { sys::nbd_aio_is_connecting(self.raw()) == 1 }
    }

    /// Whether options can be sent.
    pub(super) fn is_negotiating(&self) -> bool {
        // SAFETY: the handle is alive.
        unsafe { sys::nbd_aio_is_negotiating(self.raw()) == 1 }
    }

    /// Whether commands can be sent.
    pub(super) fn is_up(&self) -> bool {
        // SAFETY: the handle is alive.
        unsafe { sys::nbd_aio_is_ready(self.raw()) == 1 || sys::nbd_aio_is_processing(self.raw()) == 1 }
    }

    /// Whether the connection is over.
    pub(super) fn is_over(&self) -> bool {
        // SAFETY: the handle is alive.
        unsafe { sys::nbd_aio_is_dead(self.raw()) == 1 || sys::nbd_aio_is_closed(self.raw()) == 1 }
    }

    /// Sends an operation. It comes back in `completions`, exactly once, whatever happens; maybe before this returns.
    /// `structured`: answers to reads come in chunks.
    pub(super) fn submit(&self, mut command: Box<Command>, structured: bool, completions: &Arc<CompletionQueue>) {
        let (kind, offset, len) = (command.kind, command.offset, command.len);
        let (buf, room) = command.buf.bytes();
        let count = if kind.has_data() { len as usize } else { 0 };
        if count > room {
            return completions.push(command, Some(libc::EINVAL));
        }
        let chunked = structured && kind == CommandKind::Read;
        let chunks = chunked.then(|| Chunks::of(offset, len));
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
        let raw = self.raw();
        // SAFETY: the handle is alive. There are at least `count` bytes on the heap, which belong to the ticket alone; the library frees the
        // ticket when it is done with the command, also where this call fails, and nobody else touches it before.
        // The extent and chunk callbacks are called before the completion callback, so the ticket is there.
        unsafe {
            match kind {
                CommandKind::Read if chunked => {
                    let chunk = sys::nbd_chunk_callback {
                        callback: Some(on_chunk),
                        user_data: ticket.cast(),
                        free: None,
                    };
                    sys::nbd_aio_pread_structured(raw, buf.cast(), count, offset, chunk, completion, 0)
                }
                CommandKind::Read => sys::nbd_aio_pread(raw, buf.cast(), count, offset, completion, 0),
                CommandKind::Write { flags } => {
                    sys::nbd_aio_pwrite(raw, buf.cast_const().cast(), count, offset, completion, flags)
                }
                CommandKind::Zero { flags } => sys::nbd_aio_zero(raw, len, offset, completion, flags),
                CommandKind::Trim => sys::nbd_aio_trim(raw, len, offset, completion, 0),
                CommandKind::Flush => sys::nbd_aio_flush(raw, completion, 0),
                CommandKind::Status => {
                    let extents = sys::nbd_extent_callback {
                        callback: Some(on_extents),
                        user_data: ticket.cast(),
                        free: None,
                    };
                    sys::nbd_aio_block_status(raw, len, offset, extents, completion, 0)
                }
            }
        };
    }
}

impl Drop for Handle {
    fn drop(&mut self) {
        // SAFETY: nobody else has the handle any more.
        unsafe { sys::nbd_close(self.raw()) };
    }
}

/// Whether a signal that ends us has come and waits to be read: long work before the mount is to end then.
pub(super) fn is_ending() -> bool {
    // SAFETY: an all-zero set is a valid one, and only that is written to.
    let pending = unsafe {
        let mut set: libc::sigset_t = std::mem::zeroed();
        libc::sigpending(&raw mut set);
        set
    };
    // SAFETY: the set was filled in above.
    [libc::SIGTERM, libc::SIGINT]
        .iter()
        .any(|signal| unsafe { libc::sigismember(&raw const pending, *signal) == 1 })
}

/// Takes a connected socket over that was handed to this process by its number. Errors: it is none.
pub(super) fn adopt(number: i32) -> Result<OwnedFd> {
    let bad = |e: nix::errno::Errno| Error::io(format!("socket-fd={number}"), e.into());
    // SAFETY: only looked at.
    let borrowed = unsafe { BorrowedFd::borrow_raw(number) };
    let kind = nix::sys::stat::fstat(borrowed).map_err(bad)?.st_mode & libc::S_IFMT;
    if number < 3 || kind != libc::S_IFSOCK {
        return Err(Error::new(
            ErrorKind::Usage,
            format!("socket-fd={number}: this is no socket that was handed over"),
        ));
    }
    // Not for children of ours; the number itself is nobody's any more afterwards.
    let copy = borrowed
        .try_clone_to_owned()
        .map_err(|e| Error::io(format!("socket-fd={number}"), e))?;
    // SAFETY: whoever started us handed it over, and nothing in this process uses the number.
    drop(unsafe { OwnedFd::from_raw_fd(number) });
    Ok(copy)
}

/// What the library says of the last failure of this thread.
pub(super) fn failure(what: &str) -> Error {
    // SAFETY: the text is valid until the next call of this thread.
    let (said, errno) = unsafe { (sys::nbd_get_error(), sys::nbd_get_errno()) };
    let said = if said.is_null() {
        "the server closed the connection".into()
    } else {
        text(said).to_string_lossy()
    };
    // Each text starts with the name of a function of the library, or several.
    let said = said
        .rsplit_once("nbd_aio_")
        .map_or(&*said, |(_, rest)| rest.split_once(": ").map_or(rest, |(_, s)| s));
    Error::new(
        ErrorKind::Os(if errno > 0 { errno } else { libc::EIO }),
        format!("{what}: {said}"),
    )
}

fn done(result: c_int, what: &str) -> Result<()> {
    if result == -1 { Err(failure(what)) } else { Ok(()) }
}

/// A text of the library; empty for a null pointer.
fn text<'a>(text: *const c_char) -> &'a CStr {
    // SAFETY: callers pass texts of the library that live long enough.
    if text.is_null() {
        c""
    } else {
        unsafe { CStr::from_ptr(text) }
    }
}

/// A text that is ours to free.
fn owned(raw: *mut c_char) -> CString {
    let copy = text(raw).to_owned();
    // SAFETY: it was allocated by the library with malloc, for us; free takes a null pointer.
    unsafe { libc::free(raw.cast()) };
    copy
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn chunks_in_any_order_are_all_where_each_byte_came_once() {
        let whole = |parts: &[(u64, u64)]| {
            let mut chunks = Chunks::of(100, 50);
            parts.iter().for_each(|(offset, count)| chunks.add(*offset, *count));
            chunks.are_all()
        };
        assert!(whole(&[(100, 50)]) && whole(&[(100, 20), (120, 30)]));
        assert!(whole(&[(120, 10), (130, 20), (100, 20)]));
        for wrong in [
            &[(100, 49)][..],
            &[(100, 25), (100, 25)],
            &[(110, 40)],
            &[(100, 30), (120, 20)],
            &[],
        ] {
            assert!(!whole(wrong), "{wrong:?}");
        }
    }
}
