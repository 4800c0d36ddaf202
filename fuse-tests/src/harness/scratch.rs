//! One folder for each test, from its creation to its removal.

use std::fs;
use std::ops::Deref;

use tempfile::TempDir;

use super::folder::Folder;
use super::mount::MountCmd;
use super::mounts::{detach, mounts_below};
use super::user::User;

/// The folder of one test. Dereferences to the [`Folder`].
///
/// Its Drop unmounts everything below the folder before it removes the folder: a recursive removal would otherwise
/// delete files through a mount.
#[derive(Debug)]
pub struct Scratch {
    dir: Option<TempDir>,
    folder: Folder,
}

impl Scratch {
    /// Creates a folder that belongs to the user of the test process.
    pub fn new() -> Self {
        let dir = tempfile::Builder::new()
            .prefix("vmdkfuse-test-")
            .tempdir()
            .expect("a folder for the test");
        // The kernel's mount table shows paths without symbolic links.
        let root = fs::canonicalize(dir.path()).expect("the folder's path");
        Self {
            dir: Some(dir),
            folder: Folder::new(root),
        }
    }

    /// Creates a folder that belongs to `user`, and copies the program into it. Needs root.
    ///
    /// The copy is needed since `user` may have no access to the target directory.
    pub fn of(user: User) -> Self {
        let mut scratch = Self::new();
        scratch.folder.give_to(user);
        scratch
    }

    /// Returns a command that mounts with the program under test, at the folder `mnt` by default.
    pub fn mount(&self) -> MountCmd<'_> {
        MountCmd::new(&self.folder)
    }

    /// Panics if anything is mounted below the folder.
    #[track_caller]
    pub fn assert_no_mounts(&self) {
        let left = mounts_below(self.root());
        assert!(left.is_empty(), "left mounted: {left:?}");
    }
}

impl Deref for Scratch {
    type Target = Folder;

    fn deref(&self) -> &Folder {
        &self.folder
    }
}

impl Default for Scratch {
    fn default() -> Self {
        Self::new()
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        for entry in mounts_below(self.root()) {
            detach(&entry.point);
        }
        if !mounts_below(self.root()).is_empty() {
            // Leave the folder behind: a removal would delete files through the mount.
            let kept = self.dir.take().map(TempDir::keep);
            eprintln!("{kept:?} is left behind: a mount in it cannot be unmounted");
        }
    }
}
