//! Callbacks from libnbd. They run in the thread that called the library, inside that call and under the lock of the
//! handle, so they only store and never call the library or block.
//!
//! A callback must not panic: a panic cannot unwind through C, so it would abort the process.

use std::ffi::{CStr, c_char, c_int, c_uint, c_void};
use std::sync::{Arc, Mutex};

use libnbd_sys as sys;

use super::option_reply::{List, OptDone};
use super::text::text;
use super::ticket::{Chunks, MAX_EXTENTS, Ticket, UNSENT};
use crate::mutex::lock;

/// Returns a callback that stores the reply to an option in `opt`, of which it holds a reference until it is freed.
pub(super) fn option_callback(opt: &Arc<OptDone>) -> sys::nbd_completion_callback {
    sys::nbd_completion_callback {
        callback: Some(on_option),
        user_data: Arc::into_raw(Arc::clone(opt)).cast_mut().cast(),
        free: Some(free_option),
    }
}

/// Reads the `errno` that a callback is called with.
///
/// # Safety
/// `error` is null or valid, as the library passes it.
unsafe fn errno_at(error: *mut c_int) -> i32 {
    // SAFETY: see above.
    if error.is_null() { 0 } else { unsafe { *error } }
}

unsafe extern "C" fn on_option(data: *mut c_void, error: *mut c_int) -> c_int {
    // SAFETY: `data` is the pointer of `option_callback`, not freed yet; `error` is the library's.
    unsafe { (*data.cast::<OptDone>()).set(errno_at(error)) };
    1
}

unsafe extern "C" fn free_option(data: *mut c_void) {
    // SAFETY: `data` is the pointer of `option_callback`; it is freed once.
    drop(unsafe { Arc::from_raw(data.cast_const().cast::<OptDone>()) });
}

pub(super) unsafe extern "C" fn on_export(data: *mut c_void, name: *const c_char, description: *const c_char) -> c_int {
    // SAFETY: `data` is the pointer of `opt_list`, not freed yet; the texts are valid during this call.
    unsafe { add_listed(data, text(name), text(description)) };
    0
}

pub(super) unsafe extern "C" fn on_context(data: *mut c_void, name: *const c_char) -> c_int {
    // SAFETY: `data` is the pointer of `opt_contexts`, not freed yet; the text is valid during this call.
    unsafe { add_listed(data, text(name), c"") };
    0
}

/// Appends to a list. Drops entries beyond its limits.
///
/// # Safety
/// `data` comes from `Arc::into_raw` of a [`Listed`](super::Listed).
unsafe fn add_listed(data: *mut c_void, name: &CStr, description: &CStr) {
    // SAFETY: see above.
    let listed = unsafe { &*data.cast_const().cast::<Mutex<List>>() };
    lock(listed).add(name, description);
}

pub(super) unsafe extern "C" fn free_listed(data: *mut c_void) {
    // SAFETY: `data` comes from `Arc::into_raw` of a `Listed`; it is freed once.
    drop(unsafe { Arc::from_raw(data.cast_const().cast::<Mutex<List>>()) });
}

pub(super) unsafe extern "C" fn on_completion(data: *mut c_void, error: *mut c_int) -> c_int {
    // SAFETY: `data` is the ticket of `submit`, not freed yet, and only the callbacks of the library access it; `error` is
    // the library's, valid during this call.
    let (ticket, error) = unsafe { (&mut *data.cast::<Ticket>(), errno_at(error)) };
    let complete = ticket.chunks.as_mut().is_none_or(Chunks::are_complete);
    // The server reported success, but the buffer is not filled: a violation of the protocol.
    let error = if error == 0 && !complete { libc::EPROTO } else { error };
    ticket.retire((error != 0).then_some(error));
    // 1 makes the library forget the command without a further call.
    1
}

pub(super) unsafe extern "C" fn on_chunk(
    data: *mut c_void,
    _bytes: *const c_void,
    count: usize,
    offset: u64,
    _status: c_uint,
    _error: *mut c_int,
) -> c_int {
    // SAFETY: `data` is the ticket of `submit`, not freed yet, and only the callbacks of the library access it.
    let ticket = unsafe { &mut *data.cast::<Ticket>() };
    if let Some(chunks) = &mut ticket.chunks {
        chunks.add(offset, count as u64);
    }
    0
}

pub(super) unsafe extern "C" fn free_ticket(data: *mut c_void) {
    // SAFETY: `data` is the ticket of `submit`; it is freed once.
    let mut ticket = unsafe { Box::from_raw(data.cast::<Ticket>()) };
    // Without effect unless the command was never completed.
    ticket.retire(Some(UNSENT));
}

pub(super) unsafe extern "C" fn on_extents(
    data: *mut c_void,
    context: *const c_char,
    _offset: u64,
    entries: *mut u32,
    count: usize,
    _error: *mut c_int,
) -> c_int {
    // SAFETY: `data` is the ticket of `submit`, not freed yet, and only the callbacks of the library access it.
    // `entries` points to `count` numbers, valid during this call.
    let (ticket, entries) = unsafe {
        if entries.is_null() || text(context) != sys::LIBNBD_CONTEXT_BASE_ALLOCATION {
            return 0;
        }
        (&mut *data.cast::<Ticket>(), std::slice::from_raw_parts(entries, count))
    };
    if let Some(command) = &mut ticket.command {
        command.extents.clear();
        let pairs = entries.chunks_exact(2).take(MAX_EXTENTS);
        // One extent is two numbers: its length and its flags.
        command.extents.extend(pairs.map(|p| (u64::from(p[0]), p[1])));
    }
    0
}
