//! A folder of its own for each test.

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

/// Somebody to run as.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct User {
    /// User number.
    pub uid: u32,
    /// Group number.
    pub gid: u32,
}

/// An ordinary user that every system has.
pub const NOBODY: User = User { uid: 65534, gid: 65534 };

/// A second ordinary user, with no name and nothing in common with the first.
pub const STRANGER: User = User { uid: 12345, gid: 12345 };

/// A folder with everything of one test in it.
///
/// Its Drop undoes every mount below it before it removes anything: removing first would reach through a mount.
#[derive(Debug)]
pub struct Scratch {
    dir: Option<TempDir>,
    root: PathBuf,
    user: Option<User>,
    count: AtomicU32,
}

impl Scratch {
    /// A folder of the user who runs the tests.
    pub fn new() -> Self {
        let dir = tempfile::Builder::new()
            .prefix("vmdkfuse-test-")
            .tempdir()
            .expect("a folder for the test");
        // The kernel's table of mounts shows the real path.
        let root = fs::canonicalize(dir.path()).expect("the folder's path");
        Self {
            dir: Some(dir),
            root,
            user: None,
            count: AtomicU32::new(0),
        }
    }

    /// A folder of somebody else, with the program copied into it: the target directory may be closed to others. Needs root.
    pub fn of(user: User) -> Self {
        let mut scratch = Self::new();
        let own = scratch.path("vmdkfuse");
        // Not by this process: what another test starts meanwhile would have the copy open for writing until it is
        // executed itself, and till then the copy can't be executed ("Text file busy").
        Cmd::new("install")
            .args(["-m", "755"])
            .arg(program())
            .arg(&own)
            .run()
            .ok();
        scratch.user = Some(user);
        scratch.give(Path::new(""));
        scratch
    }

    /// The folder itself.
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// The path of something in it.
    pub fn path(&self, name: impl AsRef<Path>) -> PathBuf {
        self.root.join(name)
    }

    /// Makes a folder in it.
    #[track_caller]
    pub fn mkdir(&self, name: impl AsRef<Path>) -> PathBuf {
        let path = self.path(&name);
        fs::create_dir_all(&path).expect("a folder");
        self.give(name.as_ref());
        path
    }

    /// Writes a file in it.
    #[track_caller]
    pub fn write(&self, name: impl AsRef<Path>, bytes: impl AsRef<[u8]>) -> PathBuf {
        let path = self.path(&name);
        fs::write(&path, bytes).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
        self.give(name.as_ref());
        path
    }

    /// Gives something in it to the folder's user.
    #[track_caller]
    pub fn give(&self, name: &Path) {
        if let Some(User { uid, gid }) = self.user {
            chown(self.path(name), Some(uid), Some(gid)).expect("giving a file away");
        }
    }

    /// Lets everybody pass through the folder itself.
    #[track_caller]
    pub fn open_to_all(&self) {
        fs::set_permissions(&self.root, fs::Permissions::from_mode(0o755)).expect("the mode of the folder");
    }

    /// The program under test, run as the folder's user.
    pub fn vmdkfuse(&self) -> Cmd {
        let own = self.path("vmdkfuse");
        let program = if self.user.is_some() { own } else { program() };
        Cmd::new(program).dir(&self.root).user(self.user)
    }

    /// A mount of it, at the folder `mnt` unless told otherwise.
    pub fn mount(&self) -> MountCmd<'_> {
        MountCmd::new(self)
    }

    /// A number that this folder has not given before.
    pub(super) fn next(&self) -> u32 {
        self.count.fetch_add(1, Ordering::Relaxed)
    }

    /// Panics if anything is mounted below.
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
            // Better a folder left behind than one emptied through a mount.
            let kept = self.dir.take().map(TempDir::keep);
            eprintln!("{kept:?} is left: something in it cannot be unmounted");
        }
    }
}

/// Takes a mount out of the tree, however busy or broken it is.
pub(super) fn detach(point: &Path) {
    if is_root() {
        umount2(point, MntFlags::MNT_DETACH).ok();
    } else {
        Cmd::new("fusermount3").arg("-uzq").arg(point).run();
    }
}
