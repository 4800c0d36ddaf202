//! Pidfile: holds the daemon's process ID while the daemon runs.

use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};

use crate::error::{Error, Result};

/// Written pidfile. Dropping it removes the file, unless another process has written its own ID in the meantime.
#[derive(Debug)]
pub struct Pidfile {
    path: PathBuf,
    content: String,
}

impl Pidfile {
    /// Writes the ID of this process to `path`, atomically: a reader finds the old file or the complete new one.
    pub fn write(path: &Path) -> Result<Self> {
        let content = format!("{}\n", std::process::id());
        // The file is written under a temporary name in the same directory, then renamed over `path`.
        let mut temporary = path.as_os_str().to_owned();
        temporary.push(format!(".{}", std::process::id()));
        let temporary = PathBuf::from(temporary);
        let written = fs::OpenOptions::new()
            .write(true)
            .create_new(true)
            .open(&temporary)
            .and_then(|mut file| file.write_all(content.as_bytes()))
            .and_then(|()| fs::rename(&temporary, path));
        if let Err(e) = written {
            if let Err(e) = fs::remove_file(&temporary) {
                tracing::debug!("{}: {e}", temporary.display());
            }
            return Err(Error::io(format!("pidfile {}", path.display()), e));
        }
        Ok(Self {
            path: path.to_owned(),
            content,
        })
    }
}

impl Drop for Pidfile {
    fn drop(&mut self) {
        let ours = fs::read_to_string(&self.path).is_ok_and(|c| c == self.content);
        if ours && let Err(e) = fs::remove_file(&self.path) {
            tracing::warn!("pidfile {}: {e}", self.path.display());
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
    fn the_error_for_a_missing_folder_names_the_file() {
        let e = Pidfile::write(Path::new("/no/such/folder/pid")).unwrap_err();
        assert!(e.to_string().starts_with("pidfile /no/such/folder/pid: "), "{e}");
    }
}
