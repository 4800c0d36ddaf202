//! Folder of one test: its files, and the program that runs in it.

use std::ffi::OsString;
use std::fs;
use std::os::unix::fs::{PermissionsExt, chown};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};

use super::cmd::Cmd;
use super::requirements::program;
use super::user::User;

/// Name of the copy of the program in a folder that belongs to another user.
const COPY: &str = "vmdkfuse";

/// A folder, and the user whom it belongs to.
#[derive(Debug)]
pub struct Folder {
    root: PathBuf,
    user: Option<User>,
    count: AtomicU32,
}

impl Folder {
    /// Creates the description of the folder at `root`, which belongs to the user of the test process.
    pub(super) fn new(root: PathBuf) -> Self {
        Self {
            root,
            user: None,
            count: AtomicU32::new(0),
        }
    }

    /// Copies the program into the folder, and gives both to `user`.
    pub(super) fn give_to(&mut self, user: User) {
        // This process must not write the copy itself: a child that another test starts in that time would inherit the
        // open file until its exec, and executing the copy would fail with ETXTBSY ("Text file busy").
        Cmd::new("install")
            .args(["-m", "755"])
            .arg(program())
            .arg(self.path(COPY))
            .run()
            .ok();
        self.user = Some(user);
        self.give(Path::new(""));
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
        let program = if self.user.is_some() {
            self.path(COPY)
        } else {
            program()
        };
        let cmd = match words.split_first() {
            None => Cmd::new(program),
            Some((first, more)) => Cmd::new(first).args(more).arg(program),
        };
        cmd.dir(&self.root).user(self.user)
    }

    /// Returns a number that is unique in this folder.
    pub(super) fn next(&self) -> u32 {
        self.count.fetch_add(1, Ordering::Relaxed)
    }
}
