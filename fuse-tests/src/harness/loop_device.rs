//! A file as a block device.

use std::path::{Path, PathBuf};

use super::cmd::Cmd;

/// A loop device; detached on drop.
#[derive(Debug)]
pub struct LoopDevice(PathBuf);

impl LoopDevice {
    /// Attaches a file to a free loop device. Needs root.
    #[track_caller]
    pub fn attach(file: &Path) -> Self {
        let outcome = Cmd::new("losetup").args(["--find", "--show"]).arg(file).run().ok();
        Self(PathBuf::from(outcome.stdout.trim()))
    }

    /// Returns the name of the device.
    pub fn path(&self) -> &Path {
        &self.0
    }
}

impl Drop for LoopDevice {
    fn drop(&mut self) {
        Cmd::new("losetup").arg("--detach").arg(&self.0).run();
    }
}
