//! The file system as a tree to search.

use std::fs::{self, File};
use std::io::{self, ErrorKind, Read};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use super::{Names, Tree};

/// The file system.
#[derive(Debug)]
pub(crate) struct LocalTree;

impl Tree for LocalTree {
    fn exists(&self, path: &Path) -> bool {
        let absent = [libc::ENOENT, libc::ENOTDIR, libc::ENAMETOOLONG].map(Some);
        path.symlink_metadata()
            .map_or_else(|e| !absent.contains(&e.raw_os_error()), |_| true)
    }

    fn is_folder(&self, path: &Path) -> bool {
        path.is_dir()
    }

    fn names_in(&self, folder: &Path) -> Result<Names, String> {
        // The user did not name what a search finds: a link in a folder that others write to may lead anywhere.
        let is_link = |entry: &fs::DirEntry| entry.file_type().is_ok_and(|kind| kind.is_symlink());
        let names = fs::read_dir(folder).and_then(|entries| {
            let entries = entries.collect::<io::Result<Vec<_>>>()?;
            let names = entries
                .iter()
                .filter(|entry| !is_link(entry))
                .map(fs::DirEntry::file_name);
            Ok(names.collect())
        });
        Ok(match names {
            Ok(names) => Names::Known(names),
            // A pattern such as `*/x` also tries to list plain files, which is not an error worth reporting.
            Err(e) if e.kind() == ErrorKind::NotADirectory => Names::NoFolder,
            Err(e) => Names::Unreadable(format!("{}: {e}", folder.display())),
        })
    }

    fn read_start(&self, path: &Path, most: u64) -> io::Result<Vec<u8>> {
        // O_NONBLOCK: if another process put a FIFO in its place, the open must not block.
        let flags = libc::O_NONBLOCK | libc::O_NOFOLLOW;
        let file = File::options().read(true).custom_flags(flags).open(path)?;
        if !file.metadata()?.is_file() {
            return Err(ErrorKind::InvalidInput.into());
        }
        let mut bytes = Vec::new();
        file.take(most).read_to_end(&mut bytes)?;
        Ok(bytes)
    }
}
