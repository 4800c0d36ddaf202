//! C libraries that are loaded at run time: one table of functions for each.
//!
//! [`function_table!`] turns a table (name and C signature of each function, required or optional) into a struct of
//! function pointers, the code that fills it, and the list that diagnostics print. A function that is not in the table
//! cannot be called, and one that is missing in the loaded library is found when it is loaded, not when it is called:
//! a missing required function is an error that names it, a missing optional one is `None`.
//!
//! A library that was loaded stays: function pointers, threads and thread-local destructors of it may outlive every
//! Rust value.
//!
//! A function pointer has the type that the table says, which no linker compares with the library. So the tables are
//! tested against the C headers.

#![allow(unsafe_code)] // Loads code, and converts addresses in it to function pointers.

use std::error::Error as _;
use std::ffi::{OsStr, OsString};
use std::mem::ManuallyDrop;

use libloading::os::unix::{Library, RTLD_LOCAL, RTLD_NOW};

use crate::error::{Error, Result};
use crate::escape::printable;

/// A function of a table.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Function {
    /// Name of its symbol.
    pub(crate) name: &'static str,
    /// True if the library is refused without it.
    pub(crate) required: bool,
}

/// A loaded library. It is never unloaded.
#[derive(Debug)]
pub(crate) struct ForeignLibrary {
    library: ManuallyDrop<Library>,
    file: OsString,
}

impl ForeignLibrary {
    /// Loads the first of `candidates` that can be loaded: a path with a `/`, or a name that the dynamic linker searches
    /// for. All symbols are bound now, and none becomes visible to other libraries.
    ///
    /// Errors: none can be loaded; the message has the dynamic linker's reason for each.
    ///
    /// # Safety
    /// The initializers of the library run, so it must be one that the user trusts.
    pub(crate) unsafe fn open<S: AsRef<OsStr>>(candidates: &[S]) -> Result<Self> {
        let mut reasons = Vec::new();
        for file in candidates.iter().map(AsRef::as_ref) {
            // SAFETY: the caller trusts the library.
            match unsafe { Library::open(Some(file), RTLD_NOW | RTLD_LOCAL) } {
                Ok(library) => {
                    return Ok(Self {
                        // Never dropped, also if a function is missing: its initializers have run and may have started
                        // threads.
                        library: ManuallyDrop::new(library),
                        file: file.to_owned(),
                    });
                }
                // The reason of the dynamic linker starts with the name of the file that it could not load, which may be
                // one that the library needs.
                Err(e) => reasons.push(e.source().map_or_else(|| e.to_string(), ToString::to_string)),
            }
        }
        Err(Error::unsupported(format!("cannot load {}", reasons.join("; "))))
    }

    /// Returns the functions of `table` that the library does not have.
    pub(crate) fn missing(&self, table: &[Function]) -> Vec<Function> {
        let is_missing = |function: &&Function| {
            // SAFETY: the address is not used.
            unsafe { self.library.get::<*const ()>(function.name) }.is_err()
        };
        table.iter().filter(is_missing).copied().collect()
    }

    /// Returns the name or path that the library was loaded by.
    pub(crate) fn file(&self) -> &OsStr {
        &self.file
    }

    /// Fails if the library lacks a required function of `table`. The message names each of them.
    pub(crate) fn require(&self, table: &[Function]) -> Result<()> {
        let missing = self.missing(table);
        let names: Vec<&str> = missing.iter().filter(|f| f.required).map(|f| f.name).collect();
        if names.is_empty() {
            return Ok(());
        }
        let file = printable(&self.file);
        Err(Error::unsupported(format!(
            "{file} has no function {}",
            names.join(", ")
        )))
    }

    /// Returns the function `name`, or `None` if the library does not have it.
    ///
    /// # Safety
    /// `F` is a function pointer of the type that the function has in C.
    pub(crate) unsafe fn function<F: Copy>(&self, name: &str) -> Option<F> {
        // SAFETY: the caller knows the type. The pointer stays valid, because the library is never unloaded.
        unsafe { self.library.get::<F>(name) }.ok().map(|symbol| *symbol)
    }
}

/// Defines a struct of function pointers from a table of C functions.
///
/// ```text
/// function_table! {
///     /// Functions of libexample.
///     pub(super) struct Example;
///     required { fn example_new(size: c_int) -> *mut c_void; }
///     optional { fn example_version() -> c_int; }
/// }
/// ```
///
/// A required function becomes a field of its function pointer's type, an optional one an `Option` of it.
/// `Example::FUNCTIONS` lists them for diagnostics, and `Example::load(&library)` finds them in a loaded library.
macro_rules! function_table {
    (
        $(#[$doc:meta])*
        $vis:vis struct $table:ident;
        required { $($(#[$rdoc:meta])* fn $rname:ident($($rarg:ident: $rtype:ty),* $(,)?) $(-> $rresult:ty)?;)* }
        optional { $($(#[$odoc:meta])* fn $oname:ident($($oarg:ident: $otype:ty),* $(,)?) $(-> $oresult:ty)?;)* }
    ) => {
        $(#[$doc])*
        #[derive(Debug)]
        #[allow(non_snake_case)] // The names of C.
        $vis struct $table {
            $($(#[$rdoc])* $vis $rname: unsafe extern "C" fn($($rtype),*) $(-> $rresult)?,)*
            $($(#[$odoc])* $vis $oname: Option<unsafe extern "C" fn($($otype),*) $(-> $oresult)?>,)*
        }

        impl $table {
            /// All functions of the table.
            $vis const FUNCTIONS: &[$crate::foreign_library::Function] = &[
                $($crate::foreign_library::Function { name: stringify!($rname), required: true },)*
                $($crate::foreign_library::Function { name: stringify!($oname), required: false },)*
            ];

            /// Finds the functions in a loaded library. Errors: required functions are missing, which the message names.
            ///
            /// # Safety
            /// The functions have the types that the table says.
            $vis unsafe fn load(library: &$crate::foreign_library::ForeignLibrary) -> $crate::error::Result<Self> {
                library.require(Self::FUNCTIONS)?;
                let gone = |name| $crate::error::Error::unsupported(format!("{name} cannot be found twice"));
                // SAFETY: the caller guarantees the types.
                unsafe {
                    Ok(Self {
                        $($rname: library.function(stringify!($rname)).ok_or_else(|| gone(stringify!($rname)))?,)*
                        $($oname: library.function(stringify!($oname)),)*
                    })
                }
            }
        }
    };
}

pub(crate) use function_table;

#[cfg(test)]
mod tests {
    use std::ffi::{c_char, c_int};

    use super::*;

    function_table! {
        /// Functions of the C library, and one that it does not have.
        struct Complete;
        required { fn strlen(text: *const c_char) -> usize; }
        optional { fn abs(value: c_int) -> c_int; fn vmdkfuse_optional(); }
    }

    function_table! {
        /// Functions that no library has.
        #[allow(dead_code)] // It is never loaded.
        struct Incomplete;
        required { fn strlen(text: *const c_char) -> usize; fn vmdkfuse_first(); fn vmdkfuse_second(x: c_int) -> c_int; }
        optional { fn vmdkfuse_third(); }
    }

    fn c_library() -> ForeignLibrary {
        // SAFETY: the C library is loaded already.
        unsafe { ForeignLibrary::open(&["/no/such/library.so", "libc.so.6"]) }.unwrap()
    }

    #[test]
    fn functions_of_the_table_are_found_and_can_be_called() {
        let library = c_library();
        // SAFETY: the types are those of the C library.
        let table = unsafe { Complete::load(&library) }.unwrap();
        // SAFETY: the text is valid.
        assert_eq!(unsafe { (table.strlen)(c"four".as_ptr()) }, 4);
        // SAFETY: any number may be passed that has an absolute value.
        assert_eq!(table.abs.map(|abs| unsafe { abs(-3) }), Some(3));
        assert!(table.vmdkfuse_optional.is_none());
        let missing = library.missing(Complete::FUNCTIONS);
        assert_eq!(
            missing.iter().map(|f| (f.name, f.required)).collect::<Vec<_>>(),
            [("vmdkfuse_optional", false)]
        );
    }

    #[test]
    fn a_library_without_a_required_function_is_refused_by_name() {
        // SAFETY: no function is called.
        let e = unsafe { Incomplete::load(&c_library()) }.unwrap_err();
        assert_eq!(
            e.to_string(),
            "libc.so.6 has no function vmdkfuse_first, vmdkfuse_second"
        );
    }

    #[test]
    fn a_library_that_is_nowhere_is_an_error_with_each_name_tried() {
        // SAFETY: there is nothing to load.
        let e = unsafe { ForeignLibrary::open(&["libvmdkfuse-absent.so.1", "/no/such/library.so"]) }.unwrap_err();
        let text = e.to_string();
        for part in ["cannot load libvmdkfuse-absent.so.1: ", "; /no/such/library.so: "] {
            assert!(text.contains(part), "{text}");
        }
    }
}
