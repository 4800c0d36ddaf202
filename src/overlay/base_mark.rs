//! Mark of a base into which a commit was started and not finished: an extended attribute of its file.
//!
//! Until the commit is completed the base alone is a mixture of two disks. The overlay knows that, but it may lie elsewhere,
//! so the base itself must say so when it is opened alone. An attribute fits a raw image as well as a VMDK, is no part of the
//! content, and follows the file when it is renamed. A file system without user attributes has no such mark.

use std::os::fd::BorrowedFd;
use std::sync::Arc;

use rustix::fs::{XattrFlags, fgetxattr, fremovexattr, fsetxattr, fsync};
use rustix::io::Errno;

use crate::error::{Error, Result};
use crate::process::output;
use crate::store::{StoredFile, printable};

/// Name of the attribute. Its value is the path of the overlay.
const ATTRIBUTE: &str = "user.vmdkfuse.commit";

/// Maximum number of bytes of the value that are shown.
const MAX_PATH: usize = 4096;

/// Marks the base in `file`, durably, before a commit of `overlay` changes its content.
///
/// Errors: those of I/O. Where the file system has no attributes, only a warning is printed.
pub(super) fn set(file: &dyn StoredFile, overlay: &str) -> Result<()> {
    let Some(fd) = file.fd() else { return Ok(()) };
    match fsetxattr(fd, ATTRIBUTE, overlay.as_bytes(), XattrFlags::empty()) {
        Ok(()) => sync(file, fd),
        // PERM: only regular files and folders have user attributes, and a base may be a device.
        Err(Errno::NOTSUP | Errno::NOSYS | Errno::PERM | Errno::ACCESS) => {
            let text = format!(
                "warning: {}: its file system cannot mark it ({ATTRIBUTE}): until the commit is finished, open it only with \
                 cow={overlay}",
                file.label()
            );
            output::message(&mut std::io::stderr(), &text);
            Ok(())
        }
        Err(e) => Err(failed(file, e)),
    }
}

/// Removes the mark, durably. Does nothing if there is none.
pub(super) fn clear(file: &dyn StoredFile) -> Result<()> {
    let Some(fd) = file.fd() else { return Ok(()) };
    match fremovexattr(fd, ATTRIBUTE) {
        Ok(()) => sync(file, fd),
        Err(Errno::NODATA | Errno::NOTSUP | Errno::NOSYS | Errno::PERM | Errno::ACCESS) => Ok(()),
        Err(e) => Err(failed(file, e)),
    }
}

/// Returns a sentence for each of `files` that is marked. For a source that is opened without an overlay.
pub(crate) fn unfinished_commits(files: &[Arc<dyn StoredFile>]) -> Vec<String> {
    let marked = |file: &Arc<dyn StoredFile>| {
        // A fixed buffer: asking for the length first would race with another process that changes the value.
        let mut value = [0; MAX_PATH];
        let overlay = match fgetxattr(file.fd()?, ATTRIBUTE, &mut value) {
            Ok(len) => String::from_utf8_lossy(value.get(..len).unwrap_or_default()).into_owned(),
            // Longer than any path: marked all the same.
            Err(Errno::RANGE) => "another overlay".to_owned(),
            Err(_) => return None,
        };
        Some(format!(
            "{0}: a commit of {1} into it was started and not finished: alone it is a mixture of two disks; with cow={1} it \
             shows the disk, --commit completes it (if that overlay is lost: setfattr -x {ATTRIBUTE} {0})",
            file.label(),
            printable(overlay)
        ))
    };
    files.iter().filter_map(marked).collect()
}

/// Makes the attribute durable: fdatasync would leave it out.
fn sync(file: &dyn StoredFile, fd: BorrowedFd<'_>) -> Result<()> {
    fsync(fd).map_err(|e| failed(file, e))
}

fn failed(file: &dyn StoredFile, e: Errno) -> Error {
    Error::io(format!("{}: {ATTRIBUTE}", file.label()), e.into())
}
