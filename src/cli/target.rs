//! MOUNTPOINT, which has three forms.
//!
//! | path | mounted on | file in the mount |
//! | --- | --- | --- |
//! | a directory | the directory | named after its source or by `name=` |
//! | a regular file | the file, which the mount covers | the only disk |
//! | missing, in a directory | the directory that would hold it | named by the last component |

use std::ffi::{OsStr, OsString};
use std::fs;
use std::io::{self, ErrorKind};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use super::outcome::UsageError;
use super::values;
use crate::config::{MountKind, MountTarget};
use crate::mountinfo;
use crate::store::shell_word;

/// A resolved mount point.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Resolved {
    /// Directory or file that is mounted on.
    pub(super) target: MountTarget,
    /// File name that the mount point gives to its only disk.
    pub(super) file_name: Option<OsString>,
}

/// Type of the file at a path.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum PathKind {
    Dir,
    File,
    /// A device, FIFO or socket.
    Other,
    /// A FUSE mount whose daemon has ended.
    Stale,
    /// A FUSE mount of another user, whose mount refuses every other user, root included.
    Foreign,
    /// A symbolic link to a missing file.
    BrokenLink,
    Nothing,
}

/// Resolves `mountpoint` to one of the three forms. Fails if neither it nor its directory exists, or if it is neither a
/// directory nor a regular file.
pub(super) fn resolve(mountpoint: &OsStr) -> Result<Resolved, UsageError> {
    resolve_by(mountpoint, classify)
}

/// [`resolve`] with a replaceable access to the file system: tests cannot easily create a stale mount.
fn resolve_by(mountpoint: &OsStr, classify: impl Fn(&Path) -> io::Result<PathKind>) -> Result<Resolved, UsageError> {
    let fail = |reason: &str| UsageError::new(format!("mount point {}: {reason}", values::display(mountpoint)));
    let classify = |path: &Path| classify(path).map_err(|e| fail(&e.to_string()));
    let path = values::path(mountpoint).map_err(|e| fail(&e))?;
    // Collecting the components drops a slash at the end. Mount tables show paths without it.
    let path: PathBuf = path.components().collect();
    let dir = |path: &Path| MountTarget {
        path: path.to_owned(),
        kind: MountKind::Dir,
    };
    match classify(&path)? {
        PathKind::Dir => Ok(Resolved {
            target: dir(&path),
            file_name: None,
        }),
        PathKind::File => {
            let file_name = path.file_name().map(OsStr::to_owned);
            Ok(Resolved {
                target: MountTarget {
                    path,
                    kind: MountKind::File,
                },
                file_name,
            })
        }
        PathKind::Other => Err(fail("neither a directory nor a regular file")),
        PathKind::Foreign => Err(fail(&format!(
            "a FUSE mount of another user is there, or what is left of it; umount {} ends it",
            shell_word(&path.to_string_lossy())
        ))),
        PathKind::BrokenLink => Err(fail("a symbolic link to a missing file")),
        PathKind::Nothing if mountpoint.as_bytes().ends_with(b"/") => Err(fail("no such directory")),
        // Every path below a stale mount fails with ENOTCONN too. If the parent is stale as well, the parent is taken
        // as the mount point: the mount will report the stale mount itself, not a name below it.
        // Without a slash it is more likely a directory that was typed wrong.
        PathKind::Nothing if !mountpoint.as_bytes().contains(&b'/') => Err(fail(&format!(
            "no such directory; as the name of a new file it needs a slash: ./{}",
            values::display(mountpoint)
        ))),
        found @ (PathKind::Stale | PathKind::Nothing) => match (path.parent(), path.file_name()) {
            (Some(parent), Some(name)) => match (classify(parent)?, found) {
                (PathKind::Dir, PathKind::Nothing) | (PathKind::Stale, _) => Ok(Resolved {
                    target: dir(parent),
                    file_name: Some(name.to_owned()),
                }),
                (_, PathKind::Stale) => Ok(Resolved {
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

/// Returns the type of the file at `path`. Symbolic links are followed.
fn classify(path: &Path) -> io::Result<PathKind> {
    match fs::metadata(path) {
        Ok(meta) if meta.is_dir() => Ok(PathKind::Dir),
        Ok(meta) if meta.is_file() => Ok(PathKind::File),
        Ok(_) => Ok(PathKind::Other),
        // ENOTCONN: the kernel's answer for a FUSE mount whose daemon has ended.
        Err(e) if e.kind() == ErrorKind::NotConnected => Ok(PathKind::Stale),
        Err(e) if e.kind() == ErrorKind::PermissionDenied && is_fuse_mount(path) => Ok(PathKind::Foreign),
        Err(e) if e.kind() == ErrorKind::NotFound && path.is_symlink() => Ok(PathKind::BrokenLink),
        Err(e) if matches!(e.kind(), ErrorKind::NotFound | ErrorKind::NotADirectory) => Ok(PathKind::Nothing),
        Err(e) => Err(e),
    }
}

/// Returns true if the mount table has a FUSE mount at `path`. Asks the mount nothing.
fn is_fuse_mount(path: &Path) -> bool {
    let real = path
        .parent()
        .and_then(|parent| fs::canonicalize(parent).ok())
        .zip(path.file_name())
        .map(|(parent, name)| parent.join(name));
    let found = real.and_then(|real| mountinfo::at(&real).ok()).flatten();
    found.is_some_and(|mount| mount.fstype.starts_with("fuse"))
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
        assert!(error(&broken).ends_with("a symbolic link to a missing file"));
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
    fn a_missing_name_in_a_directory_names_the_file() {
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
            resolve(OsStr::new("./new.img")),
            Ok(resolved(&here, MountKind::Dir, Some("new.img")))
        );
        assert!(error(Path::new("new.img")).ends_with("it needs a slash: ./new.img"));
    }

    #[test]
    fn impossible_mount_points_are_refused() {
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
    fn a_stale_mount_is_accepted_and_reported_later() {
        let stale_at = |stale: &'static str| {
            move |path: &Path| {
                Ok(if path.starts_with(stale) {
                    PathKind::Stale
                } else {
                    PathKind::Dir
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
