//! Permissions of an image: those that all of its files grant.

use std::sync::Arc;

use nix::sys::stat::fstat;

use super::StoredFile;

/// Owner and mode of an image.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Permissions {
    /// Permission bits that every file of the image has.
    pub(crate) mode: u32,
    /// Owner of the first file, which is the one that the user named.
    pub(crate) uid: u32,
    /// Group of the first file.
    pub(crate) gid: u32,
}

impl Permissions {
    /// Returns the permissions of an image that consists of `files`; `None` if none of them is a local file.
    pub(crate) fn of(files: &[Arc<dyn StoredFile>]) -> Option<Self> {
        let stats = files.iter().filter_map(|file| fstat(file.fd()?).ok());
        let one = |stat: nix::sys::stat::FileStat| Self {
            mode: stat.st_mode & 0o777,
            uid: stat.st_uid,
            gid: stat.st_gid,
        };
        stats.map(one).reduce(|first, other| Self {
            mode: first.mode & other.mode,
            ..first
        })
    }

    /// Returns the mode of a file of group `gid` that shows the image: readable and writable by its owner, who opened the
    /// image, and by other users at most as the image is.
    pub(crate) fn mode_for_group(self, gid: u32) -> u32 {
        let mode = (self.mode & 0o666) | 0o600;
        if gid == self.gid {
            return mode;
        }
        // Members of either group are among the others of the other file, so both get what both classes have.
        let both = (mode >> 3) & mode & 0o7;
        (mode & 0o700) | (both << 3) | both
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn another_group_gets_what_both_classes_have() {
        let of = |mode| Permissions { mode, uid: 1, gid: 5 };
        for (mode, same, other) in [
            (0o600, 0o600, 0o600),
            (0o400, 0o600, 0o600),
            (0o640, 0o640, 0o600),
            (0o644, 0o644, 0o644),
            (0o660, 0o660, 0o600),
            (0o666, 0o666, 0o666),
            (0o604, 0o604, 0o600),
            (0o777, 0o666, 0o666),
        ] {
            let found = (of(mode).mode_for_group(5), of(mode).mode_for_group(6));
            assert_eq!(found, (same, other), "{mode:o}: {:o} {:o}", found.0, found.1);
        }
    }
}
