//! Texts of the library and for it.

#![allow(unsafe_code)] // Texts that a C library owns or gives away.

use std::ffi::{CStr, CString, c_char};

use crate::error::{Error, ErrorKind, Result};

/// Borrows a text of the library. Returns an empty text for a null pointer.
pub(super) fn text<'a>(text: *const c_char) -> &'a CStr {
    if text.is_null() {
        c""
    } else {
        // SAFETY: callers pass texts of the library that are valid for as long as they use the result.
        unsafe { CStr::from_ptr(text) }
    }
}

/// Returns `bytes` as a C string. Errors: they contain a NUL byte.
pub(in crate::source::nbd) fn c_text(bytes: &[u8]) -> Result<CString> {
    CString::new(bytes).map_err(|e| Error::new(ErrorKind::Usage, format!("NUL byte at offset {}", e.nul_position())))
}

/// Copies a text that the library has allocated for the caller, and frees it.
pub(super) fn owned(raw: *mut c_char) -> CString {
    let copy = text(raw).to_owned();
    // SAFETY: the library has allocated the text with malloc and passed its ownership; free accepts a null pointer.
    unsafe { libc::free(raw.cast()) };
    copy
}
