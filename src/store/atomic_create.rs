//! Atomic creation of files, which appear under their name complete or not at all, and files without a name.
//!
//! ```text
//!   FOLDER/.vmdkfuse-PID-N.new/NAME    the caller writes the new file here
//!        │ rename without replacing an existing file, sync of FOLDER
//!        ▼
//!   FOLDER/NAME                        the complete file
//! ```
//! The file is written in a private folder, so that its name is already the final one: a VMDK may contain the names of
//! its own files.

use std::ffi::OsStr;
use std::fs::{self, File};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use nix::errno::Errno;
use nix::fcntl::{AT_FDCWD, RenameFlags, renameat2};

use super::local::{LocalFile, LocalStore};
use crate::error::{Error, ErrorKind, Result};
use crate::store::{Access, ExtentName, Identity, OpenPolicy, Store, StoredFile, printable};

/// Number of names that are tried for a folder that must not exist yet.
const TRIES: u32 = 100;

/// Creates the file `path` with `create`, which receives an empty store and the name of the file to create in it.
///
/// The file appears under its path when it is complete, and never replaces another file. Returns `Os(EEXIST)` if the
/// path exists by then, the error of `create`, or an error of the file system. After an error nothing is left, except
/// that the complete file stays where only the sync of its folder failed.
pub fn make_user_path(path: &Path, create: impl FnOnce(&dyn Store, &ExtentName) -> Result<()>) -> Result<()> {
    let label = printable(path);
    let Some(name) = path.file_name() else {
        return Err(Error::new(
            ErrorKind::Usage,
            format!("{label}: expected a path that ends in the name of a new file"),
        ));
    };
    let folder = path
        .parent()
        .filter(|folder| !folder.as_os_str().is_empty())
        .unwrap_or(Path::new("."));
    let temp_dir =
        PrivateTempDir::new(folder, name).map_err(|e| Error::io(format!("{label}: creating the file"), e))?;
    let store = LocalStore::new(&temp_dir.folder, no_locks())?;
    create(&store, &ExtentName::new(name.as_bytes())?)?;
    let context = || format!("{label}: renaming the new file");
    match renameat2(AT_FDCWD, &temp_dir.file, AT_FDCWD, path, RenameFlags::RENAME_NOREPLACE) {
        // The file system does not support RENAME_NOREPLACE. A hard link does not replace an existing file either.
        Err(Errno::EINVAL | Errno::ENOSYS) => {
            fs::hard_link(&temp_dir.file, path).map_err(|e| Error::io(context(), e))?;
        }
        done => done.map_err(|e| Error::io(context(), e.into()))?,
    }
    // The rename is durable only when the folder is.
    LocalStore::new(folder, no_locks())?.sync()
}

/// Returns a store that holds one file without a name, on the file system of `folder`. Its `create` and `open` return
/// that file for any name. Messages call the file `label`.
///
/// The kernel frees the space when the store and the last open file are closed, also if this process crashes.
pub fn unnamed(folder: &Path, label: &str) -> Result<Arc<dyn Store>> {
    let context = || format!("{label} in {}", printable(folder));
    let options = || {
        let mut options = File::options();
        options.read(true).write(true).mode(0o600);
        options
    };
    let file = match options().custom_flags(libc::O_TMPFILE).open(folder) {
        Ok(file) => file,
        // The errors of a file system or an old kernel without O_TMPFILE. There the file gets a name, which is removed
        // as soon as the file is open.
        Err(e) if matches!(e.raw_os_error(), Some(libc::EOPNOTSUPP | libc::EISDIR | libc::EINVAL)) => {
            let temp_dir = PrivateTempDir::new(folder, OsStr::new("overlay")).map_err(|e| Error::io(context(), e))?;
            options()
                .create_new(true)
                .open(&temp_dir.file)
                .map_err(|e| Error::io(context(), e))?
        }
        Err(e) => return Err(Error::io(context(), e)),
    };
    Ok(Arc::new(Unnamed {
        file,
        label: label.to_owned(),
        folder: folder.to_path_buf(),
    }))
}

/// Private folder for one file. Dropping it removes the file and the folder.
#[derive(Debug)]
struct PrivateTempDir {
    folder: PathBuf,
    file: PathBuf,
}

impl PrivateTempDir {
    fn new(parent: &Path, name: &OsStr) -> std::io::Result<Self> {
        let mut last = None;
        for n in 0..TRIES {
            // In the same folder, as a rename must not leave the file system.
            let folder = parent.join(format!(".vmdkfuse-{}-{n}.new", std::process::id()));
            match fs::DirBuilder::new().mode(0o700).create(&folder) {
                Ok(()) => {
                    return Ok(Self {
                        file: folder.join(name),
                        folder,
                    });
                }
                Err(e) if e.kind() == std::io::ErrorKind::AlreadyExists => last = Some(e),
                Err(e) => return Err(e),
            }
        }
        Err(last.unwrap_or_else(|| std::io::ErrorKind::AlreadyExists.into()))
    }
}

impl Drop for PrivateTempDir {
    fn drop(&mut self) {
        // Usually fails, because the file has been renamed to its final path.
        fs::remove_file(&self.file).ok();
        // Not recursively: nothing but the one file can lie there.
        if let Err(e) = fs::remove_dir(&self.folder) {
            tracing::warn!(
                "{}: the temporary folder could not be removed: {e}; remove it by hand",
                printable(&self.folder)
            );
        }
    }
}

/// Store that [`unnamed`] returns.
#[derive(Debug)]
struct Unnamed {
    file: File,
    label: String,
    folder: PathBuf,
}

impl Unnamed {
    /// Returns a new handle of the file with `access`.
    fn reopen(&self, access: Access) -> Result<Arc<dyn StoredFile>> {
        // Shares the open file description. That does no harm, as every access names its own offset.
        let file = self.file.try_clone().map_err(|e| Error::io(self.label.clone(), e))?;
        Ok(Arc::new(LocalFile::new(
            file,
            self.label.clone(),
            self.folder.clone(),
            no_locks(),
            access,
        )?))
    }
}

impl Store for Unnamed {
    fn open(&self, _name: &ExtentName, access: Access) -> Result<Arc<dyn StoredFile>> {
        self.reopen(access)
    }

    fn create(&self, _name: &ExtentName) -> Result<Arc<dyn StoredFile>> {
        self.reopen(Access::Write)
    }

    fn remove(&self, _name: &ExtentName, _identity: &Identity) -> Result<()> {
        Ok(())
    }

    fn sync(&self) -> Result<()> {
        Ok(())
    }

    fn names(&self, _most: usize) -> Result<Vec<ExtentName>> {
        Ok(Vec::new())
    }
}

/// Policy without locks: no other process has a path to the file.
fn no_locks() -> Arc<OpenPolicy> {
    Arc::new(OpenPolicy::new(Vec::new(), false))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(folder: &Path) -> Vec<std::ffi::OsString> {
        fs::read_dir(folder).unwrap().map(|e| e.unwrap().file_name()).collect()
    }

    fn write(store: &dyn Store, name: &ExtentName) -> Result<()> {
        store.create(name)?.writer().unwrap().write_all_at(0, b"whole")
    }

    #[test]
    fn a_new_file_appears_complete_and_replaces_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("new");
        make_user_path(&path, |store, name| {
            write(store, name)?;
            assert!(!path.exists(), "the file is not complete yet");
            Ok(())
        })
        .unwrap();
        assert_eq!(fs::read(&path).unwrap(), b"whole");
        fs::write(&path, "old").unwrap();
        let error = make_user_path(&path, write).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Os(libc::EEXIST), "{error}");
        assert_eq!(fs::read(&path).unwrap(), b"old");
        let failed = make_user_path(&dir.path().join("other"), |store, name| {
            write(store, name)?;
            Err(Error::corrupt("no"))
        });
        assert_eq!(failed.unwrap_err().kind(), ErrorKind::Corrupt);
        assert_eq!(names(dir.path()), ["new"]);
    }

    #[test]
    fn an_unnamed_file_has_no_name_and_can_be_reopened_while_its_store_exists() {
        let dir = tempfile::tempdir().unwrap();
        let store = unnamed(dir.path(), "scratch").unwrap();
        let name = ExtentName::new("x").unwrap();
        write(&*store, &name).unwrap();
        let file = store.open(&name, Access::Read).unwrap();
        let mut content = [0; 5];
        file.read_exact_at(0, &mut content).unwrap();
        assert_eq!((&content, file.len(), file.label()), (b"whole", 5, "scratch"));
        assert!(names(dir.path()).is_empty());
    }
}
