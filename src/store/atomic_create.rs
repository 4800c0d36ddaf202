//! New files that appear whole or not at all, and files that have no name.

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

/// How many names are tried for a folder that must be new.
const TRIES: u32 = 100;

/// Makes the file `path` by `make`, which is given a store with nothing in it and the name to make there. The file is
/// seen under its path when it is complete, and never takes the place of another one.
///
/// Errors: `Os(EEXIST)` where there is a file meanwhile, what `make` says, or what the system says. Then nothing is left.
pub fn make_user_path(path: &Path, make: impl FnOnce(&dyn Store, &ExtentName) -> Result<()>) -> Result<()> {
    let label = printable(path);
    let Some(name) = path.file_name() else {
        return Err(Error::new(
            ErrorKind::Usage,
            format!("{label}: expected the name of a new file"),
        ));
    };
    let folder = path
        .parent()
        .filter(|folder| !folder.as_os_str().is_empty())
        .unwrap_or(Path::new("."));
    let temp_dir = PrivateTempDir::new(folder, name).map_err(|e| Error::io(format!("{label}: making the file"), e))?;
    let store = LocalStore::new(&temp_dir.folder, no_locks())?;
    make(&store, &ExtentName::new(name.as_bytes())?)?;
    let context = || format!("{label}: giving the new file its name");
    match renameat2(AT_FDCWD, &temp_dir.file, AT_FDCWD, path, RenameFlags::RENAME_NOREPLACE) {
        // a file system that can't rename so; a link does not replace anything either
        Err(Errno::EINVAL | Errno::ENOSYS) => {
            fs::hard_link(&temp_dir.file, path).map_err(|e| Error::io(context(), e))?;
        }
        done => done.map_err(|e| Error::io(context(), e.into()))?,
    }
    LocalStore::new(folder, no_locks())?.sync()
}

/// A store for one file without a name in `folder`: `create` makes it, `open` opens it again, whatever it is called. Its
/// room is free again when the last of both is closed, however this process ends. Messages call it `label`.
pub fn unnamed(folder: &Path, label: &str) -> Result<Arc<dyn Store>> {
    let context = || format!("{label} in {}", printable(folder));
    let options = || {
        let mut options = File::options();
        options.read(true).write(true).mode(0o600);
        options
    };
    let file = match options().custom_flags(libc::O_TMPFILE).open(folder) {
        Ok(file) => file,
        // what the file system, or an old kernel, says that has no such files
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

/// A folder that only this process uses, for one file; both go away with this.
#[derive(Debug)]
struct PrivateTempDir {
    folder: PathBuf,
    file: PathBuf,
}

impl PrivateTempDir {
    fn new(parent: &Path, name: &OsStr) -> std::io::Result<Self> {
        let mut last = None;
        for n in 0..TRIES {
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
        // mostly it has its name elsewhere by now
        fs::remove_file(&self.file).ok();
        if let Err(e) = fs::remove_dir(&self.folder) {
            tracing::warn!(
                "{}: a folder that is not needed any more is left: {e}",
                printable(&self.folder)
            );
        }
    }
}

/// See [`unnamed`].
#[derive(Debug)]
struct Unnamed {
    file: File,
    label: String,
    folder: PathBuf,
}

impl Unnamed {
    fn again(&self, access: Access) -> Result<Arc<dyn StoredFile>> {
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
        self.again(access)
    }

    fn create(&self, _name: &ExtentName) -> Result<Arc<dyn StoredFile>> {
        self.again(Access::Write)
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

/// Nobody else has a way to such a file.
fn no_locks() -> Arc<OpenPolicy> {
    Arc::new(OpenPolicy {
        allow: Vec::new(),
        lock: false,
    })
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
    fn a_new_file_is_there_whole_or_not_at_all_and_replaces_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("new");
        make_user_path(&path, |store, name| {
            write(store, name)?;
            assert!(!path.exists(), "it is not complete yet");
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
    fn an_unnamed_file_is_nowhere_and_can_be_opened_again_while_it_is_held() {
        let dir = tempfile::tempdir().unwrap();
        let store = unnamed(dir.path(), "scratch").unwrap();
        let name = ExtentName::new("x").unwrap();
        write(&*store, &name).unwrap();
        let file = store.open(&name, Access::Read).unwrap();
        let mut seen = [0; 5];
        file.read_exact_at(0, &mut seen).unwrap();
        assert_eq!((&seen, file.len(), file.label()), (b"whole", 5, "scratch"));
        assert!(names(dir.path()).is_empty());
    }
}
