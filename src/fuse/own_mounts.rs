//! Mounts of this program as other programs see them: the subtype, and how one whose process is gone is recognized and
//! removed.

use std::path::Path;

use nix::errno::Errno;
use nix::sys::statvfs::statvfs;

use crate::store::shell_word;

/// Subtype: the part of [`FSTYPE`](crate::mountinfo::FSTYPE) after `fuse.`.
pub(super) const SUBTYPE: &str = "vmdkfuse";

/// Returns true if a mount without a process is at `point`. Uses statfs: the kernel may still have cached attributes,
/// so that stat would succeed.
pub(super) fn is_dead(point: &Path) -> bool {
    statvfs(point) == Err(Errno::ENOTCONN)
}

/// Returns the shell command that unmounts `point`.
pub(super) fn unmount_command(point: &Path) -> String {
    let word = shell_word(&point.display().to_string());
    let program = if nix::unistd::geteuid().is_root() {
        "umount"
    } else {
        "fusermount3 -u"
    };
    format!("{program} {word}")
}
