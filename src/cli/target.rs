//! The three forms of MOUNTPOINT.
//!
//! | there is | the mount is put on | the file |
//! | --- | --- | --- |
//! | a directory | it | named after its source or `name=` |
//! | a regular file | it: the mount covers it | the one disk |
//! | nothing, in a directory | that directory | named by the last component |

use std::ffi::{OsStr, OsString};
use std::fs;
use std::io::{self, ErrorKind};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use super::{UsageError, values};
use crate::config::{MountKind, MountTarget};

/// A mount point, understood.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Resolved {
    /// Where the mount goes.
    pub(super) target: MountTarget,
    /// The name that the mount point gives to the one disk.
    pub(super) file_name: Option<OsString>,
}

/// What is found under a name.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Found {
    Dir,
    File,
    /// A device, FIFO or socket.
    Other,
    /// A mount whose server has gone.
    Stale,
    /// A link that leads nowhere.
    BrokenLink,
    Nothing,
}

/// Finds out which form `mountpoint` has. Errors: nothing there and no directory to hold it, or something unfit.
pub(super) fn resolve(mountpoint: &OsStr) -> Result<Resolved, UsageError> {
    resolve_by(mountpoint, look)
}

/// [`resolve`] with the look at the file system as a parameter.
fn resolve_by(mountpoint: &OsStr, look: impl Fn(&Path) -> io::Result<Found>) -> Result<Resolved, UsageError> {
    let fail = |reason: &str| UsageError::new(format!("mount point {}: {reason}", values::shown(mountpoint)));
    let look = |path: &Path| look(path).map_err(|e| fail(&e.to_string()));
    let path = values::path(mountpoint).map_err(|e| fail(&e))?;
    // Without the slash that may stand at its end: mount tables show none.
    let path: PathBuf = path.components().collect();
    let dir = |path: &Path| MountTarget {
        path: path.to_owned(),
        kind: MountKind::Dir,
    };
    match look(&path)? {
        Found::Dir => Ok(Resolved {
            target: dir(&path),
            file_name: None,
        }),
        Found::File => {
            let file_name = path.file_name().map(OsStr::to_owned);
            Ok(Resolved {
                target: MountTarget {
                    path,
                    kind: MountKind::File,
                },
                file_name,
            })
        }
        Found::Other => Err(fail("neither a directory nor a regular file")),
        Found::BrokenLink => Err(fail("a symbolic link that leads nowhere")),
        Found::Nothing if mountpoint.as_bytes().ends_with(b"/") => Err(fail("no such directory")),
        // A name below a stale mount cannot be looked at either, and the mount above is the one to report.
        found @ (Found::Stale | Found::Nothing) => match (path.parent(), path.file_name()) {
            (Some(parent), Some(name)) => match (look(parent)?, found) {
                (Found::Dir, Found::Nothing) | (Found::Stale, _) => Ok(Resolved {
                    target: dir(parent),
                    file_name: Some(name.to_owned()),
                }),
                (_, Found::Stale) => Ok(Resolved {
                    target: dir(&path),
                    file_name: None,
                }),
                _ => Err(fail(&format!("neither it nor a directory {} exists", parent.display()))),
            },
            _ => Ok(Resolved {
                target: dir(&path),
                file_name: None,
            }),
        },
    }
}

fn look(path: &Path) -> io::Result<Found> {
    match fs::metadata(path) {
        Ok(meta) if meta.is_dir() => Ok(Found::Dir),
        Ok(meta) if meta.is_file() => Ok(Found::File),
        Ok(_) => Ok(Found::Other),
        // std's name for ENOTCONN, what a FUSE mount answers when its server has gone.
        Err(e) if e.kind() == ErrorKind::NotConnected => Ok(Found::Stale),
        Err(e) if e.kind() == ErrorKind::NotFound && path.is_symlink() => Ok(Found::BrokenLink),
        Err(e) if matches!(e.kind(), ErrorKind::NotFound | ErrorKind::NotADirectory) => Ok(Found::Nothing),
        Err(e) => Err(e),
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;

    fn resolved(path: &Path, kind: MountKind, name: Option<&str>) -> Resolved {
        let target = MountTarget {
            path: path.to_owned(),
            kind,
        };
        Resolved {
            target,
            file_name: name.map(OsString::from),
        }
    }

    fn error(mountpoint: &Path) -> String {
        resolve(mountpoint.as_os_str()).unwrap_err().to_string()
    }

    #[test]
    fn a_directory_is_mounted_on() {
        let dir = tempfile::tempdir().unwrap();
        let expected = resolved(dir.path(), MountKind::Dir, None);
        assert_eq!(resolve(dir.path().as_os_str()).as_ref(), Ok(&expected));
        assert_eq!(
            resolve(dir.path().join("").as_os_str()),
            Ok(expected),
            "a slash at the end"
        );
        let here = std::env::current_dir().unwrap();
        assert_eq!(
            resolve(OsStr::new("src")),
            Ok(resolved(&here.join("src"), MountKind::Dir, None))
        );
    }

    #[test]
    fn links_are_followed_but_not_resolved() {
        let dir = tempfile::tempdir().unwrap();
        let link = dir.path().join("link");
        symlink(".", &link).unwrap();
        assert_eq!(resolve(link.as_os_str()), Ok(resolved(&link, MountKind::Dir, None)));
        let broken = dir.path().join("broken");
        symlink("nowhere", &broken).unwrap();
        assert!(error(&broken).ends_with("a symbolic link that leads nowhere"));
    }

    #[test]
    fn a_regular_file_is_covered() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("disk.img");
        fs::write(&file, "").unwrap();
        assert_eq!(
            resolve(file.as_os_str()),
            Ok(resolved(&file, MountKind::File, Some("disk.img")))
        );
    }

    #[test]
    fn a_new_name_in_a_directory_is_the_files() {
        let dir = tempfile::tempdir().unwrap();
        let new = dir.path().join("new.img");
        assert_eq!(
            resolve(new.as_os_str()),
            Ok(resolved(dir.path(), MountKind::Dir, Some("new.img")))
        );
        let odd = dir.path().join(OsStr::from_bytes(b"\xff"));
        let name = resolve(odd.as_os_str()).unwrap().file_name;
        assert_eq!(name.as_deref(), Some(OsStr::from_bytes(b"\xff")));
        let here = std::env::current_dir().unwrap();
        assert_eq!(
            resolve(OsStr::new("new.img")),
            Ok(resolved(&here, MountKind::Dir, Some("new.img")))
        );
    }

    #[test]
    fn what_cannot_be_a_mount_point() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("file");
        fs::write(&file, "").unwrap();
        assert!(error(&dir.path().join("none/")).ends_with("no such directory"));
        assert!(error(&dir.path().join("none/new")).contains("neither it nor a directory "));
        assert!(error(&file.join("new")).contains("neither it nor a directory "));
        assert!(error(Path::new("/dev/null")).ends_with("neither a directory nor a regular file"));
        assert!(error(Path::new("")).ends_with("a path is missing"));
        assert!(error(&dir.path().join("x".repeat(256))).contains("too long"));
    }

    #[test]
    fn a_stale_mount_is_left_for_the_mount_to_report() {
        let stale_at = |stale: &'static str| {
            move |path: &Path| {
                Ok(if path.starts_with(stale) {
                    Found::Stale
                } else {
                    Found::Dir
                })
            }
        };
        let found = resolve_by(OsStr::new("/a/mnt"), stale_at("/a/mnt"));
        assert_eq!(found, Ok(resolved(Path::new("/a/mnt"), MountKind::Dir, None)));
        let found = resolve_by(OsStr::new("/a/mnt/new.raw"), stale_at("/a/mnt"));
        assert_eq!(
            found,
            Ok(resolved(Path::new("/a/mnt"), MountKind::Dir, Some("new.raw")))
        );
    }
}
