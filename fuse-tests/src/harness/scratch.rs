//! One folder for each test, and the users that tests run as.

use std::ffi::OsString;
use std::fs;
use std::os::unix::fs::{PermissionsExt, chown};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};

use nix::mount::{MntFlags, umount2};
use tempfile::TempDir;

use super::cmd::Cmd;
use super::mount::MountCmd;
use super::mounts::mounts_below;
use super::requirements::{is_root, program};

/// A user to run programs as.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct User {
    /// User ID.
    pub uid: u32,
    /// Group ID.
    pub gid: u32,
}

/// The unprivileged user `nobody`.
pub const NOBODY: User = User { uid: 65534, gid: 65534 };

/// A second unprivileged user, without a name and without a common group with [`NOBODY`].
pub const STRANGER: User = User { uid: 12345, gid: 12345 };

/// The folder of one test.
///
/// Its Drop unmounts everything below the folder before it removes the folder: a recursive removal would otherwise
/// delete files through a mount.
#[derive(Debug)]
pub struct Scratch {
    dir: Option<TempDir>,
    root: PathBuf,
    user: Option<User>,
    count: AtomicU32,
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
            root,
            user: None,
            count: AtomicU32::new(0),
        }
    }

    /// Creates a folder that belongs to `user`, and copies the program into it. Needs root.
    ///
    /// The copy is needed since `user` may have no access to the target directory.
    pub fn of(user: User) -> Self {
        let mut scratch = Self::new();
        let copy = scratch.path("vmdkfuse");
        // This process must not write the copy itself: a child that another test starts in that time would inherit the
        // open file until its exec, and executing the copy would fail with ETXTBSY ("Text file busy").
        Cmd::new("install")
            .args(["-m", "755"])
            .arg(program())
            .arg(&copy)
            .run()
            .ok();
        scratch.user = Some(user);
        scratch.give(Path::new(""));
        scratch
    }

    /// Returns the path of the folder.
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// Returns the path of `name` in the folder.
    pub fn path(&self, name: impl AsRef<Path>) -> PathBuf {
        self.root.join(name)
    }

    /// Creates a folder and its parents in the folder.
    #[track_caller]
    pub fn mkdir(&self, name: impl AsRef<Path>) -> PathBuf {
        let path = self.path(&name);
        fs::create_dir_all(&path).expect("a folder");
        self.give(name.as_ref());
        path
    }

    /// Writes a file in the folder and returns its path.
    #[track_caller]
    pub fn write(&self, name: impl AsRef<Path>, bytes: impl AsRef<[u8]>) -> PathBuf {
        let path = self.path(&name);
        fs::write(&path, bytes).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
        self.give(name.as_ref());
        path
    }

    /// Changes the owner of `name` to the folder's user, if it has one.
    #[track_caller]
    pub fn give(&self, name: &Path) {
        if let Some(User { uid, gid }) = self.user {
            chown(self.path(name), Some(uid), Some(gid)).expect("giving a file away");
        }
    }

    /// Sets the mode of the folder to 755, so that every user can reach the files in it.
    #[track_caller]
    pub fn open_to_all(&self) {
        fs::set_permissions(&self.root, fs::Permissions::from_mode(0o755)).expect("the mode of the folder");
    }

    /// Returns a command that runs the program under test in the folder, as the folder's user.
    pub fn vmdkfuse(&self) -> Cmd {
        self.vmdkfuse_through(&[])
    }

    /// Returns a command that runs the program by another one: `words`, and then the program.
    pub(super) fn vmdkfuse_through(&self, words: &[OsString]) -> Cmd {
        let copy = self.path("vmdkfuse");
        let program = if self.user.is_some() { copy } else { program() };
        let cmd = match words.split_first() {
            None => Cmd::new(program),
            Some((first, more)) => Cmd::new(first).args(more).arg(program),
        };
        cmd.dir(&self.root).user(self.user)
    }

    /// Returns a command that mounts with the program under test, at the folder `mnt` by default.
    pub fn mount(&self) -> MountCmd<'_> {
        MountCmd::new(self)
    }

    /// Returns a number that is unique in this folder.
    pub(super) fn next(&self) -> u32 {
        self.count.fetch_add(1, Ordering::Relaxed)
    }

    /// Panics if anything is mounted below the folder.
    #[track_caller]
    pub fn assert_no_mounts(&self) {
        let left = mounts_below(&self.root);
        assert!(left.is_empty(), "left mounted: {left:?}");
    }
}

impl Default for Scratch {
    fn default() -> Self {
        Self::new()
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        for entry in mounts_below(&self.root) {
            detach(&entry.point);
        }
        if !mounts_below(&self.root).is_empty() {
            // Leave the folder behind: a removal would delete files through the mount.
            let kept = self.dir.take().map(TempDir::keep);
            eprintln!("{kept:?} is left behind: a mount in it cannot be unmounted");
        }
    }
}

/// Unmounts lazily: the mount disappears from the tree at once, even if it is busy or its daemon has died.
pub(super) fn detach(point: &Path) {
    if is_root() {
        umount2(point, MntFlags::MNT_DETACH).ok();
    } else {
        Cmd::new("fusermount3").arg("-uzq").arg(point).run();
    }
}
