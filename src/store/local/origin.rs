//! The place of a file that the user named.

use std::ffi::OsString;
use std::fs::File;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::sync::Arc;

use nix::errno::Errno;
use nix::fcntl::{OFlag, ResolveFlag};

use super::Owner;
use super::folder::{Folder, lookup, lookup_error};
use super::found::{FileType, Found};
use crate::error::{Error, ErrorKind, Result};
use crate::store::Access;

/// The place of a file that the user named: where it is looked for after another process has replaced it.
#[derive(Debug, Clone)]
pub(super) struct Origin {
    /// Held since the first open, so that a directory of the path that another user replaces does not redirect the lookup.
    folder: Arc<Folder>,
    name: OsString,
    /// User ID of the file's owner.
    owner: u32,
}

impl Origin {
    /// Returns the place of a regular file; `None` for a device, and for a file whose folder is not there any more.
    pub(super) fn of(found: &Found) -> Option<Self> {
        let name = found.real.file_name().filter(|_| found.metadata.is_file())?;
        // Without links, as `real` has none: one that is there now was put there after the lookup.
        let folder = Folder::open_unlinked(found.real.parent()?).ok()?;
        Some(Self {
            folder: Arc::new(folder),
            name: name.to_owned(),
            owner: found.metadata.uid(),
        })
    }

    /// Opens the file that has the name now. Follows no symbolic link: the file and its folder may belong to a user with
    /// fewer rights than this process.
    ///
    /// The name is looked up with the rights of `owner`, if there is one.
    pub(super) fn open(&self, label: &str, owner: Option<&Owner>) -> Result<(Found, File)> {
        match owner {
            Some(owner) => owner.act(|| self.find(label))?,
            None => self.find(label),
        }
    }

    fn find(&self, label: &str) -> Result<(Found, File)> {
        let refuse = |reason: String| Err(Error::new(ErrorKind::Policy, format!("{label}: {reason}")));
        let flags = OFlag::O_PATH | OFlag::O_CLOEXEC;
        // The name is a single component, so the flags concern the file alone: no link, and no mount over it.
        let resolve = ResolveFlag::RESOLVE_BENEATH | ResolveFlag::RESOLVE_NO_SYMLINKS | ResolveFlag::RESOLVE_NO_XDEV;
        let fd = match lookup(&self.folder.fd, Path::new(&self.name), flags, resolve) {
            Err(Errno::ELOOP | Errno::EXDEV) => {
                return refuse(
                    "the image was replaced by a link, which is not followed; unmount, then mount again".into(),
                );
            }
            found => found.map_err(|e| lookup_error(label.to_owned(), e))?,
        };
        let found = Found::new(fd, label.to_owned())?;
        if let FileType::Device | FileType::Other(_) = found.file_type() {
            return refuse("the image was replaced by something that is no regular file".into());
        }
        // Otherwise another user with write access to the folder could have the daemon show a file that only its own
        // user may read.
        if found.metadata.uid() != self.owner {
            let (now, before) = (found.metadata.uid(), self.owner);
            return refuse(format!(
                "the image was replaced by a file of another user ({now}, before {before}); unmount, then mount again"
            ));
        }
        let file = found.open(Access::Read)?;
        Ok((found, file))
    }
}
