//! The built library as the dynamic linker sees it.
#![allow(unsafe_code, reason = "the dynamic linker")]

use std::ffi::{CStr, CString};
use std::fs;
use std::mem::MaybeUninit;
use std::os::unix::ffi::OsStrExt;

use fuse_tests::harness::preload_library;

#[test]
fn the_soname_is_that_of_the_original() {
    let bytes = fs::read(preload_library()).unwrap();
    let soname = b"\0libvmware-bdwrapper.so.0\0";
    assert!(bytes.windows(soname.len()).any(|window| window == soname));
}

#[test]
fn it_defines_every_kind_of_function() {
    let path = CString::new(preload_library().as_os_str().as_bytes()).unwrap();
    // SAFETY: the path ends with a NUL; without a list in the environment, loading the library has no effect.
    let handle = unsafe { libc::dlopen(path.as_ptr(), libc::RTLD_NOW | libc::RTLD_LOCAL) };
    assert!(!handle.is_null());
    for name in [
        c"open",
        c"__open64_2",
        c"fopen",
        c"fcntl64",
        c"__xstat",
        c"statx",
        c"ftruncate64",
        c"ioctl",
    ] {
        // SAFETY: the handle is that of the library, and the name ends with a NUL.
        let address = unsafe { libc::dlsym(handle, name.as_ptr()) };
        assert!(!address.is_null(), "{name:?}");
        let mut found = MaybeUninit::<libc::Dl_info>::zeroed();
        // SAFETY: `dladdr` writes one `Dl_info`, for which zeroes are valid as well.
        let file = unsafe {
            assert_ne!(libc::dladdr(address, found.as_mut_ptr()), 0);
            CStr::from_ptr(found.assume_init().dli_fname)
        };
        assert!(
            file.to_str().unwrap().ends_with("/libvmware_bdwrapper.so"),
            "{name:?} is in {file:?}"
        );
    }
}
