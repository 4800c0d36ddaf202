//! The file that holds the daemon's process number.

use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};

use crate::error::{Error, Result};

/// A written pidfile; removed when it is dropped, unless somebody else's number is in it by then.
#[derive(Debug)]
pub struct Pidfile {
    path: PathBuf,
    content: String,
}

impl Pidfile {
    /// Writes this process's number to `path`. Readers see the old file or the whole new one.
    pub fn write(path: &Path) -> Result<Self> {
        let content = format!("{}\n", std::process::id());
        let mut aside = path.as_os_str().to_owned();
        aside.push(format!(".{}", std::process::id()));
        let aside = PathBuf::from(aside);
        let written = fs::OpenOptions::new()
            .write(true)
            .create_new(true)
            .open(&aside)
            .and_then(|mut file| file.write_all(content.as_bytes()))
            .and_then(|()| fs::rename(&aside, path));
        if let Err(e) = written {
            if let Err(e) = fs::remove_file(&aside) {
                tracing::debug!("{}: {e}", aside.display());
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
    fn it_holds_our_number_and_goes_with_us() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("pid");
        fs::write(&path, "an older one").unwrap();
        let pidfile = Pidfile::write(&path).unwrap();
        assert_eq!(fs::read_to_string(&path).unwrap(), format!("{}\n", std::process::id()));
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1, "nothing left beside it");
        drop(pidfile);
        assert!(!path.exists());
    }

    #[test]
    fn somebody_elses_number_stays() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("pid");
        let pidfile = Pidfile::write(&path).unwrap();
        fs::write(&path, "1\n").unwrap();
        drop(pidfile);
        assert_eq!(fs::read_to_string(&path).unwrap(), "1\n");
    }

    #[test]
    fn a_missing_folder_is_an_error_that_names_the_file() {
        let e = Pidfile::write(Path::new("/no/such/folder/pid")).unwrap_err();
        assert!(e.to_string().starts_with("pidfile /no/such/folder/pid: "), "{e}");
    }
}
