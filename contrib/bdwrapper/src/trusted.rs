//! Names that a set-user-ID program may follow: its user chooses the list, so only root may have chosen what it names.

use core::ffi::CStr;

use crate::raw;

/// Longest path (`PATH_MAX`, linux/limits.h).
const PATH: usize = 4096;
/// Most symbolic links on a path, as the kernel follows (`MAXSYMLINKS`, linux/namei.h).
const LINKS: usize = 40;
/// Most components on a path, those of its links included.
const COMPONENTS: usize = 4096;

/// Returns true if the name is without `..`, and every component, every link and every target belongs to root.
pub(crate) fn is_trusted(name: &CStr) -> bool {
    !components(name.to_bytes()).any(|part| part == b"..") && walk(name.to_bytes()).is_some()
}

/// Walks the path as the kernel does, component by component; returns `None` at the first that root does not own.
fn walk(name: &[u8]) -> Option<()> {
    let mut rest = Path::new();
    rest.push(name)?;
    let mut done = Path::new();
    let mut links = 0_usize;
    for _ in 0..COMPONENTS {
        let Some((part, after)) = rest.split_first() else {
            return owned_by_root(&done).map(drop);
        };
        let mut after = after;
        if part.as_slice() == b".." {
            // Only a link's target leads here. `done` has no links left in it, so its last component can be dropped.
            done.drop_last();
        } else {
            let before = done;
            done.push(b"/")?;
            done.push(part.as_slice())?;
            if owned_by_root(&done)?.is(libc::S_IFLNK) {
                links = links.checked_add(1).filter(|links| *links <= LINKS)?;
                let target = done.read_link()?;
                done = if target.as_slice().first() == Some(&b'/') {
                    Path::new()
                } else {
                    before
                };
                after = target.join(&after)?;
            }
        }
        rest = after;
    }
    None
}

/// Returns the status of a path, links not followed, if it belongs to root.
fn owned_by_root(path: &Path) -> Option<raw::Status> {
    let text = if path.as_slice().is_empty() {
        &b"/\0"[..]
    } else {
        path.with_nul()
    };
    let path = CStr::from_bytes_until_nul(text).ok()?;
    let status = raw::stat_at(libc::AT_FDCWD, path.as_ptr(), libc::AT_SYMLINK_NOFOLLOW).ok()?;
    (status.uid == 0).then_some(status)
}

/// Splits a path into its components, without empty ones and `.`.
fn components(path: &[u8]) -> impl Iterator<Item = &[u8]> {
    path.split(|byte| *byte == b'/')
        .filter(|part| !part.is_empty() && *part != b".")
}

/// A path in a buffer of its own. The byte behind it is a NUL.
#[derive(Clone, Copy)]
struct Path {
    bytes: [u8; PATH],
    len: usize,
}

impl Path {
    fn new() -> Self {
        Self {
            bytes: [0; PATH],
            len: 0,
        }
    }

    /// Appends bytes; returns `None` if there is no room.
    fn push(&mut self, more: &[u8]) -> Option<()> {
        let end = self.len.checked_add(more.len()).filter(|end| *end < PATH)?;
        self.bytes.get_mut(self.len..end)?.copy_from_slice(more);
        *self.bytes.get_mut(end)? = 0;
        self.len = end;
        Some(())
    }

    fn as_slice(&self) -> &[u8] {
        self.bytes.get(..self.len).unwrap_or_default()
    }

    fn with_nul(&self) -> &[u8] {
        self.bytes.get(..=self.len).unwrap_or_default()
    }

    /// Splits off the first component; `None` if there is none.
    fn split_first(&self) -> Option<(Self, Self)> {
        let part = components(self.as_slice()).next()?;
        let mut first = Self::new();
        first.push(part)?;
        // The component lies in `self`, behind slashes and single dots.
        let start = (part.as_ptr().addr()).checked_sub(self.bytes.as_ptr().addr())?;
        let mut rest = Self::new();
        rest.push(self.as_slice().get(start.checked_add(part.len())?..)?)?;
        Some((first, rest))
    }

    /// Drops the last component, with its slash.
    fn drop_last(&mut self) {
        let slash = self.as_slice().iter().rposition(|byte| *byte == b'/');
        self.len = slash.unwrap_or(0);
        if let Some(end) = self.bytes.get_mut(self.len) {
            *end = 0;
        }
    }

    /// Reads the target of this symbolic link.
    fn read_link(&self) -> Option<Self> {
        let mut target = Self::new();
        let len = raw::read_link(self.with_nul(), &mut target.bytes).ok()?;
        // A target that fills the buffer may be cut.
        target.len = Some(len).filter(|len| *len < PATH)?;
        Some(target)
    }

    /// Appends what follows.
    fn join(mut self, rest: &Self) -> Option<Self> {
        self.push(b"/")?;
        self.push(rest.as_slice())?;
        Some(self)
    }
}

#[cfg(test)]
mod tests {
    use std::ffi::CString;
    use std::fs;
    use std::os::unix::fs::{chown, symlink};

    use super::*;

    fn trusted(name: &str) -> bool {
        is_trusted(&CString::new(name).unwrap())
    }

    #[test]
    fn names_of_the_system_are_trusted() {
        assert!(trusted("/dev/null"));
        assert!(trusted("//dev/./null"));
        assert!(trusted("/"));
        assert!(!trusted("/dev/../dev/null"), "a name with `..`");
        assert!(!trusted("/nothing/here"));
    }

    #[test]
    fn every_component_and_target_belongs_to_root() {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir_all(dir.path().join("sub/deep")).unwrap();
        fs::write(dir.path().join("sub/disk"), "").unwrap();
        symlink("../disk", dir.path().join("sub/deep/up")).unwrap();
        symlink(dir.path().join("sub/deep/up"), dir.path().join("absolute")).unwrap();
        symlink("loop", dir.path().join("loop")).unwrap();
        let trusted = |name: &str| trusted(dir.path().join(name).to_str().unwrap());
        // The folder of all temporary files may itself belong to another user than root.
        let root_made_it = trusted("sub/disk");
        assert_eq!(trusted("absolute"), root_made_it);
        assert!(!trusted("loop"));
        assert!(!trusted("sub/../sub/disk"));
        if root_made_it {
            chown(dir.path().join("sub/deep"), Some(12345), None).unwrap();
            assert!(!trusted("absolute"), "a folder of a link's target");
            assert!(trusted("sub/disk"));
            chown(dir.path().join("sub/disk"), Some(12345), None).unwrap();
            assert!(!trusted("sub/disk"), "the target");
        }
    }
}
