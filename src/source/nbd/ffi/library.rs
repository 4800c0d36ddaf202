//! The C library libnbd, loaded when the first NBD disk needs it.

use std::ffi::{c_char, c_int, c_uint, c_void};
use std::sync::OnceLock;

use libnbd_sys::{
    nbd_chunk_callback, nbd_completion_callback, nbd_context_callback, nbd_debug_callback, nbd_extent_callback,
    nbd_handle, nbd_list_callback,
};

use crate::error::Result;
use crate::foreign_library::{ForeignLibrary, function_table};

/// Name that every release of libnbd 1 has.
const SONAME: &str = "libnbd.so.0";

/// Ends an error about a library that cannot be used.
const ADVICE: &str = "NBD disks need libnbd 1.14 or newer (package libnbd0 in Debian and Ubuntu, libnbd in Fedora, Arch and \
                      openSUSE)";

libnbd_sys::functions!(function_table {
    /// Functions of libnbd, as declared by `libnbd-sys`.
    pub(in crate::source::nbd) struct Libnbd;
});

/// Returns the functions of libnbd. Loads it first, once; a failure is kept.
///
/// Errors: the library is not installed, or an older one lacks functions, which the message names.
pub(in crate::source::nbd) fn library() -> Result<&'static Libnbd> {
    static LIBRARY: OnceLock<Result<Libnbd>> = OnceLock::new();
    LIBRARY
        .get_or_init(|| load(SONAME).map_err(|e| e.within(ADVICE)))
        .as_ref()
        .map_err(Clone::clone)
}

fn load(soname: &str) -> Result<Libnbd> {
    // SAFETY: the soname is that of libnbd, which the dynamic linker searches for in the folders of the system.
    let library = unsafe { ForeignLibrary::open(&[soname]) }?;
    // SAFETY: the tests of libnbd-sys compare each type with the C header.
    unsafe { Libnbd::load(&library) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_declared_function_is_in_the_table() {
        let declared: Vec<&str> = libnbd_sys::FUNCTIONS.iter().map(|(name, ..)| *name).collect();
        let loaded: Vec<&str> = Libnbd::FUNCTIONS.iter().map(|function| function.name).collect();
        assert_eq!(loaded, declared);
    }

    #[test]
    fn a_library_that_lacks_functions_is_refused_with_their_names() {
        let text = load("libc.so.6").unwrap_err().to_string();
        assert!(
            text.starts_with("libc.so.6 has no function nbd_create, nbd_close, "),
            "{text}"
        );
    }
}
