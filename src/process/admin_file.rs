//! Files that the daemon keeps for the administrator: the pidfile and the log.
//!
//! Their folder may belong to another user, and that user can put anything in a file's place. So this module opens them
//! in the one safe way: no symbolic link is followed, a FIFO does not block, only a regular file with a single name is
//! accepted, and a new file gets the mode 0644 at most.

use std::fs::{File, OpenOptions};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::Path;

use crate::error::{Error, ErrorKind, Result};

/// Mode of a new file, before the umask: other users may read it, and never write to it.
const MODE: u32 = 0o644;

/// Opens the file `path`, called `what` in errors, with the access of `options`.
///
/// Errors: `Usage` if it is not a regular file, has other names (a hard link to another file) or is a symbolic link, and
/// those of the operating system.
pub(super) fn open(what: &str, path: &Path, options: &mut OpenOptions) -> Result<File> {
    let refuse = |text: &str| {
        let text = format!("{what} {}: {text}; name a regular file or a new one", path.display());
        Err(Error::new(ErrorKind::Usage, text))
    };
    // NONBLOCK: an open of a FIFO without a writer would wait for ever. NOCTTY: a terminal must not become the daemon's
    // own.
    let flags = libc::O_NOFOLLOW | libc::O_NONBLOCK | libc::O_NOCTTY;
    let file = match options.mode(MODE).custom_flags(flags).open(path) {
        Ok(file) => file,
        Err(e) if e.raw_os_error() == Some(libc::ELOOP) => return refuse("is a symbolic link"),
        // A FIFO without a reader, or a socket.
        Err(e) if e.raw_os_error() == Some(libc::ENXIO) => return refuse("is not a regular file"),
        Err(e) => return Err(Error::io(format!("{what} {}", path.display()), e)),
    };
    // Of the open descriptor: the name may be another file by now.
    let metadata = file
        .metadata()
        .map_err(|e| Error::io(format!("{what} {}", path.display()), e))?;
    match (metadata.is_file(), metadata.nlink()) {
        (false, _) => refuse("is not a regular file"),
        // 0: the file was removed after the open, and does no harm. Another name would let its owner make root append
        // to any file on the same file system.
        (true, 0 | 1) => Ok(file),
        (true, _) => refuse("has another name too (a hard link)"),
    }
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::{PermissionsExt, symlink};

    use nix::sys::stat::Mode;

    use super::*;

    #[test]
    fn only_a_regular_file_with_one_name_is_opened() {
        let dir = tempfile::tempdir().unwrap();
        let path = |name: &str| dir.path().join(name);
        fs::write(path("other"), "kept").unwrap();
        symlink(path("other"), path("link")).unwrap();
        symlink(path("absent"), path("dangling")).unwrap();
        fs::hard_link(path("other"), path("hard")).unwrap();
        nix::unistd::mkfifo(&path("fifo"), Mode::S_IRWXU).unwrap();
        let open = |name: &str, options: &mut OpenOptions| open("log file", &path(name), options);
        for (name, why) in [
            ("link", "symbolic link"),
            ("dangling", "symbolic link"),
            ("hard", "another name"),
            ("fifo", "not a regular file"),
        ] {
            let append = open(name, File::options().append(true).create(true)).unwrap_err();
            let read = open(name, File::options().read(true)).unwrap_err();
            for e in [append, read] {
                let text = e.to_string();
                assert!(text.starts_with("log file /") && text.contains(why), "{name}: {text}");
            }
        }
        assert!(open("/dev/null", File::options().read(true)).is_err());
        assert!(!path("absent").exists());
    }

    #[test]
    fn a_new_file_is_not_writable_by_others() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("new");
        let file = open("log file", &path, File::options().append(true).create(true)).unwrap();
        let mode = file.metadata().unwrap().permissions().mode();
        assert_eq!(mode & 0o777 & !0o644, 0, "{mode:o}");
    }
}
