//! Folder that only this user can access, for files that a foreign library or program must find by name for a moment.

use std::fs;
use std::io;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use crate::process;

/// Names to try: another process may have a folder of the same name.
const TRIES: u32 = 100;

/// New folder of mode 0700 in the folder for temporary files. Removed with its content on drop, if it still exists.
#[derive(Debug)]
pub(in crate::source) struct PrivateDir(PathBuf);

impl PrivateDir {
    /// Creates the folder, below `TMPDIR` as it was meant when the program was started.
    pub(in crate::source) fn new() -> io::Result<Self> {
        let base = process::start_dir().join(std::env::temp_dir());
        let mut tries = 0u32;
        loop {
            let now = SystemTime::now()
                .duration_since(UNIX_EPOCH)
                .map_or(0, |d| d.subsec_nanos());
            let dir = base.join(format!("vmdkfuse-{}-{now}-{tries}", std::process::id()));
            match fs::DirBuilder::new().mode(0o700).create(&dir) {
                Ok(()) => return Ok(Self(dir)),
                // `create` does not take an existing folder, so no other user can have put files into this one.
                Err(e) if e.kind() == io::ErrorKind::AlreadyExists && tries < TRIES => tries += 1,
                Err(e) => return Err(io::Error::new(e.kind(), format!("{}: {e}", dir.display()))),
            }
        }
    }

    /// Returns the path of the folder.
    pub(in crate::source) fn path(&self) -> &Path {
        &self.0
    }
}

impl Drop for PrivateDir {
    fn drop(&mut self) {
        // Links in the folder are removed, not followed.
        if let Err(e) = fs::remove_dir_all(&self.0)
            && e.kind() != io::ErrorKind::NotFound
        {
            tracing::warn!("{}: removing this temporary folder: {e}", self.0.display());
        }
    }
}
