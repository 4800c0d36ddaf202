//! The functions that the wrappers stand before: the next definition of the same name, as the dynamic linker finds it.
//!
//! All are looked up at the start: a lookup takes the linker's lock, which another thread may hold at a fork. Only a call
//! that comes before that, from the start of another library, looks its function up by itself.
#![allow(unsafe_code, reason = "addresses of functions from the dynamic linker")]

use core::ffi::CStr;
use core::ptr::null_mut;
use core::sync::atomic::{AtomicPtr, Ordering};

use libc::{c_int, c_void};

/// The next definition of one function.
#[derive(Debug)]
pub(crate) struct Next {
    name: &'static CStr,
    address: AtomicPtr<c_void>,
}

impl Next {
    /// Names a function.
    pub(crate) const fn new(name: &'static CStr) -> Self {
        Self {
            name,
            address: AtomicPtr::new(null_mut()),
        }
    }

    /// Looks the function up; returns null if the C library has none of this name.
    #[cold]
    pub(crate) fn look_up(&self) -> *mut c_void {
        // SAFETY: the name ends with a NUL.
        let mut address = unsafe { libc::dlsym(libc::RTLD_NEXT, self.name.as_ptr()) };
        for version in OLD_VERSIONS {
            if address.is_null() {
                // SAFETY: both strings end with a NUL.
                address = unsafe { libc::dlvsym(libc::RTLD_NEXT, self.name.as_ptr(), version.as_ptr()) };
            }
        }
        self.address.store(address, Ordering::Release);
        address
    }

    /// Returns the address, or null.
    #[inline]
    pub(crate) fn address(&self) -> *mut c_void {
        let address = self.address.load(Ordering::Acquire);
        if address.is_null() { self.look_up() } else { address }
    }
}

/// Versions of functions that glibc 2.33 and newer keep only for old binaries (`__xstat` and its kin).
const OLD_VERSIONS: [&CStr; 4] = [c"GLIBC_2.2.5", c"GLIBC_2.17", c"GLIBC_2.2", c"GLIBC_2.0"];

/// Return value of a function that failed or does not exist.
pub(crate) trait Failed {
    /// The value.
    const FAILED: Self;
}

impl Failed for c_int {
    const FAILED: Self = -1;
}

impl Failed for () {
    const FAILED: Self = ();
}

impl<T> Failed for *mut T {
    const FAILED: Self = null_mut();
}

/// Defines exported functions: `fn NAME(ARGUMENTS) -> RESULT |next| BODY`, where `next` is the next definition.
///
/// Also defines `look_up_all`, which looks up all of them. Nothing is exported in the unit tests: the test program would
/// call these functions itself.
macro_rules! wrap {
    ($($(#[$attribute:meta])* fn $name:ident($($arg:ident: $type:ty),*) $(-> $result:ty)? |$next:ident| $body:block)*) => {
        #[allow(non_upper_case_globals, reason = "named after the functions")]
        mod next {
            $(pub(super) static $name: crate::next::Next = {
                const NAME: &str = concat!(stringify!($name), "\0");
                crate::next::Next::new(match core::ffi::CStr::from_bytes_with_nul(NAME.as_bytes()) {
                    Ok(name) => name,
                    Err(_) => c"",
                })
            };)*
        }

        /// Looks up the next definition of every function of this module.
        pub(super) fn look_up_all() {
            $(next::$name.look_up();)*
        }

        $(
            $(#[$attribute])*
            #[cfg_attr(not(test), unsafe(no_mangle))]
            #[allow(dead_code, reason = "called by other programs")]
            unsafe extern "C-unwind" fn $name($($arg: $type),*) $(-> $result)? {
                type Function = unsafe extern "C-unwind" fn($($type),*) $(-> $result)?;
                let address = next::$name.address();
                if address.is_null() {
                    crate::raw::set_errno(libc::ENOSYS);
                    return crate::next::Failed::FAILED;
                }
                // SAFETY: the linker found a function of this name, whose arguments and result are these.
                let $next = unsafe { core::mem::transmute::<*mut libc::c_void, Function>(address) };
                $body
            }
        )*
    };
}
pub(crate) use wrap;
