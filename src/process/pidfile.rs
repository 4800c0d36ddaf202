//! Pidfile: holds the daemon's process ID while the daemon runs.

use std::fs::{self, File};
use std::io::{Read, Write};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use crate::error::{Error, ErrorKind, Result};
use crate::process::admin_file;

/// Written pidfile. Dropping it removes the file, unless another process has written its own ID in the meantime.
#[derive(Debug)]
pub struct Pidfile {
    path: PathBuf,
    content: String,
    /// Device and inode of the written file.
    identity: (u64, u64),
}

impl Pidfile {
    /// Writes the ID of this process to `path`, atomically: a reader finds the old file or the complete new one.
    ///
    /// Errors: `Usage` if something else than a regular file has the name already.
    pub fn write(path: &Path) -> Result<Self> {
        // The rename below would replace a device or a link that is in its place.
        match open(path) {
            Err(e) if e.kind() != ErrorKind::NotFound => return Err(e),
            _ => {}
        }
        let content = format!("{}\n", std::process::id());
        // The file is written under a temporary name in the same directory, then renamed over `path`.
        let mut temporary = path.as_os_str().to_owned();
        temporary.push(format!(".{}", std::process::id()));
        let temporary = PathBuf::from(temporary);
        let what = format!("pidfile {}: temporary file", path.display());
        let mut file = admin_file::open(&what, &temporary, File::options().write(true).create_new(true))?;
        let written = file
            .write_all(content.as_bytes())
            .and_then(|()| fs::rename(&temporary, path))
            .and_then(|()| file.metadata());
        match written {
            Ok(metadata) => Ok(Self {
                path: path.to_owned(),
                content,
                identity: (metadata.dev(), metadata.ino()),
            }),
            Err(e) => {
                if let Err(e) = fs::remove_file(&temporary) {
                    tracing::debug!("{}: {e}", temporary.display());
                }
                Err(Error::io(format!("pidfile {}", path.display()), e))
            }
        }
    }

    /// Returns true if the file is still the one that was written, with our process ID.
    fn is_ours(&self) -> Result<bool> {
        let file = open(&self.path)?;
        let context = |e| Error::io(format!("pidfile {}", self.path.display()), e);
        let metadata = file.metadata().map_err(context)?;
        // One byte more than ours, so that a longer file is told apart without reading all of it.
        let mut content = String::new();
        file.take(self.content.len() as u64 + 1)
            .read_to_string(&mut content)
            .map_err(context)?;
        Ok((metadata.dev(), metadata.ino()) == self.identity && content == self.content)
    }
}

/// Opens an existing pidfile for reading.
fn open(path: &Path) -> Result<File> {
    admin_file::open("pidfile", path, File::options().read(true))
}

impl Drop for Pidfile {
    fn drop(&mut self) {
        match self.is_ours() {
            Ok(true) => {
                if let Err(e) = fs::remove_file(&self.path) {
                    tracing::warn!("pidfile {}: {e}", self.path.display());
                }
            }
            Ok(false) => tracing::info!("pidfile {}: belongs to another process now", self.path.display()),
            Err(e) => tracing::info!("{e}; it is left as it is"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_holds_our_process_id_and_is_removed_on_drop() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("pid");
        fs::write(&path, "an older one").unwrap();
        let pidfile = Pidfile::write(&path).unwrap();
        assert_eq!(fs::read_to_string(&path).unwrap(), format!("{}\n", std::process::id()));
        assert_eq!(
            fs::read_dir(dir.path()).unwrap().count(),
            1,
            "no temporary file is left"
        );
        drop(pidfile);
        assert!(!path.exists());
    }

    #[test]
    fn the_id_of_another_process_stays() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("pid");
        let pidfile = Pidfile::write(&path).unwrap();
        fs::write(&path, "1\n").unwrap();
        drop(pidfile);
        assert_eq!(fs::read_to_string(&path).unwrap(), "1\n");
    }

    #[test]
    fn regression_a_fifo_in_its_place_does_not_block_and_stays() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("pid");
        let fifo = || nix::unistd::mkfifo(&path, nix::sys::stat::Mode::S_IRWXU).unwrap();
        let pidfile = Pidfile::write(&path).unwrap();
        fs::remove_file(&path).unwrap();
        fifo();
        drop(pidfile);
        assert!(path.exists(), "the file of another process is not removed");
        let e = Pidfile::write(&path).unwrap_err().to_string();
        assert!(e.contains("not a regular file"), "{e}");
    }

    #[test]
    fn links_are_neither_followed_nor_replaced() {
        let dir = tempfile::tempdir().unwrap();
        let (path, victim) = (dir.path().join("pid"), dir.path().join("victim"));
        fs::write(&victim, format!("{}\n", std::process::id())).unwrap();
        let pidfile = Pidfile::write(&path).unwrap();
        fs::remove_file(&path).unwrap();
        std::os::unix::fs::symlink(&victim, &path).unwrap();
        assert!(Pidfile::write(&path).unwrap_err().to_string().contains("symbolic link"));
        drop(pidfile);
        assert!(path.is_symlink() && victim.exists());
    }

    #[test]
    fn a_temporary_file_of_another_process_is_not_removed() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("pid");
        let temporary = dir.path().join(format!("pid.{}", std::process::id()));
        fs::write(&temporary, "").unwrap();
        assert!(Pidfile::write(&path).is_err());
        assert!(temporary.exists());
    }

    #[test]
    fn the_error_for_a_missing_folder_names_the_file() {
        let e = Pidfile::write(Path::new("/no/such/folder/pid")).unwrap_err();
        assert!(e.to_string().starts_with("pidfile /no/such/folder/pid: "), "{e}");
    }
}
