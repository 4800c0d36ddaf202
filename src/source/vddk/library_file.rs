//! Search for the library: `libvixDiskLib.so.N`, where N is its version.

use std::ffi::OsString;
use std::fs;
use std::path::Path;

use serde::{Deserialize, Serialize};

use crate::config::VddkLibrary;
use crate::error::{Error, ErrorKind, Result};

/// Folder of the library if the user names none, as packagers of VDDK install it.
pub(crate) const DEFAULT_LIBDIR: &str = "/usr/lib/vmware-vix-disklib";

/// Name of the library, without its version.
const NAME: &str = "libvixDiskLib.so.";

/// Versions that the dynamic linker is asked for, the newest first.
const KNOWN_VERSIONS: [u32; 5] = [10, 9, 8, 7, 6];

/// A file of the library.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct LibraryFile {
    /// Full path, or a name that the dynamic linker searches for.
    pub(super) path: OsString,
    /// Version, from the name.
    pub(super) version: u32,
}

/// Returns the files to try, the best first. Errors: the folder that the user named has no library.
pub(super) fn find(library: &VddkLibrary) -> Result<Vec<LibraryFile>> {
    let default = Path::new(DEFAULT_LIBDIR);
    match (&library.libdir, newest(library.libdir.as_deref().unwrap_or(default))) {
        (_, Some(file)) => Ok(vec![file]),
        (Some(dir), None) => {
            let dir = dir.display();
            let text = format!(
                "libdir={dir}: neither {dir}/lib64 nor {dir} has a file {NAME}N; give the folder that VMware's VDDK was \
                 unpacked to"
            );
            Err(Error::new(ErrorKind::NotFound, text))
        }
        // Not searched for here: the dynamic linker has folders and a cache of its own.
        (None, None) => Ok(KNOWN_VERSIONS.map(by_name).to_vec()),
    }
}

/// Returns the library of the highest version in `dir/lib64`, or else in `dir`.
fn newest(dir: &Path) -> Option<LibraryFile> {
    [dir.join("lib64"), dir.to_owned()].iter().find_map(|dir| {
        let files = fs::read_dir(dir).ok()?.flatten().filter_map(|entry| {
            let version = version(entry.file_name().to_str()?)?;
            let path = entry.path();
            // Follows links: the usual name is one, and a dangling one is no library.
            path.is_file().then(|| LibraryFile {
                path: path.into_os_string(),
                version,
            })
        });
        // As numbers: in the order of names version 10 would come before 8.
        files.max_by_key(|file| file.version)
    })
}

fn by_name(version: u32) -> LibraryFile {
    LibraryFile {
        path: format!("{NAME}{version}").into(),
        version,
    }
}

/// Returns the version in a file name. Names with a minor version are the targets of the links that are looked for.
fn version(name: &str) -> Option<u32> {
    let digits = name.strip_prefix(NAME)?;
    digits
        .bytes()
        .all(|b| b.is_ascii_digit())
        .then(|| digits.parse().ok())?
}

#[cfg(test)]
mod tests {
    use super::*;

    fn library(dir: &Path) -> VddkLibrary {
        VddkLibrary {
            libdir: Some(dir.to_owned()),
            config: None,
        }
    }

    #[test]
    fn the_highest_version_is_found_by_number_and_lib64_comes_first() {
        let dir = tempfile::tempdir().unwrap();
        for name in [
            "libvixDiskLib.so.9",
            "libvixDiskLib.so.10",
            "libvixDiskLib.so.10.2",
            "libvixDiskLib.so",
        ] {
            fs::write(dir.path().join(name), "").unwrap();
        }
        assert_eq!(find(&library(dir.path())).unwrap()[0].version, 10);
        fs::create_dir(dir.path().join("lib64")).unwrap();
        assert_eq!(find(&library(dir.path())).unwrap()[0].version, 10, "lib64 is empty");
        let path = dir.path().join("lib64/libvixDiskLib.so.7").into_os_string();
        fs::write(&path, "").unwrap();
        let found = find(&library(dir.path())).unwrap();
        assert_eq!(found, [LibraryFile { path, version: 7 }]);
    }

    #[test]
    fn a_folder_without_the_library_is_an_error_that_names_it() {
        let dir = tempfile::tempdir().unwrap();
        let text = find(&library(dir.path())).unwrap_err().to_string();
        assert!(
            text.starts_with(&format!("libdir={}: neither ", dir.path().display())),
            "{text}"
        );
    }
}
