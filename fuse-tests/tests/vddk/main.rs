//! Tests of disks that VMware's VDDK opens, with a stand-in library that enforces the rules of the real one.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a failed step of a test is a panic that names it"
)]

mod disk_tier;
mod faults;
mod foreign;
mod library;
mod local;
mod privileges;
mod remote;
mod secrets;

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use fuse_tests::harness::{Cmd, Mount, MountCmd, Scratch, fake_vddk_library, need_fuse};

const SOON: Duration = Duration::from_secs(60);

/// The stand-in library in a folder of a test, with its knobs and its records.
struct Vddk {
    libdir: PathBuf,
    folder: PathBuf,
}

impl Vddk {
    /// Installs the stand-in with this version in its name.
    fn new(scratch: &Scratch, version: u32) -> Self {
        let (libdir, folder) = (scratch.mkdir("vddk"), scratch.mkdir("fake"));
        fs::create_dir_all(libdir.join("lib64")).unwrap();
        let vddk = Self { libdir, folder };
        fs::copy(fake_vddk_library(), vddk.library(version)).unwrap();
        vddk.set(&[&format!("version={version}")]);
        vddk
    }

    fn library(&self, version: u32) -> PathBuf {
        self.libdir.join(format!("lib64/libvixDiskLib.so.{version}"))
    }

    /// Sets the knobs of the stand-in.
    fn set(&self, knobs: &[&str]) {
        fs::write(self.folder.join("knobs"), knobs.join("\n") + "\n").unwrap();
    }

    fn libdir(&self) -> String {
        format!("libdir={}", self.libdir.display())
    }

    /// Returns a mount of disks that the stand-in opens.
    fn mount<'s>(&self, scratch: &'s Scratch) -> MountCmd<'s> {
        scratch
            .mount()
            .env("FAKE_VDDK", self.folder.to_str().unwrap())
            .arg(self.libdir())
    }

    /// Returns a command that does not mount.
    fn command(&self, scratch: &Scratch) -> Cmd {
        scratch.vmdkfuse().env("FAKE_VDDK", self.folder.to_str().unwrap())
    }

    /// Returns the calls that do not move data, a line each.
    fn calls(&self) -> Vec<String> {
        let text = fs::read_to_string(self.folder.join("calls")).unwrap_or_default();
        text.lines().map(str::to_owned).collect()
    }

    /// Returns the calls of one function.
    fn calls_of(&self, function: &str) -> Vec<String> {
        let is_call = |line: &String| line.split(' ').next() == Some(function);
        self.calls().into_iter().filter(is_call).collect()
    }

    /// Panics if a rule of the library was broken.
    #[track_caller]
    fn assert_rules_kept(&self) {
        let broken = fs::read_to_string(self.folder.join("violations")).unwrap_or_default();
        assert_eq!(broken, "", "rules of the library were broken");
    }
}

impl Drop for Vddk {
    fn drop(&mut self) {
        if !std::thread::panicking() {
            self.assert_rules_kept();
        }
    }
}

/// Returns the statistics of the library that the root of a mount shows.
fn statistics(mount: &Mount) -> String {
    let code = "import os, sys; sys.stdout.buffer.write(os.getxattr(sys.argv[1], 'user.vmdkfuse.vddk'))";
    let read = Cmd::new("python3").args(["-c", code]).arg(mount.point()).run();
    read.ok().stdout
}

/// Returns the calls and the bytes of one function since the mount, 0 if it was not called.
fn counted(mount: &Mount, function: &str) -> (u64, u64) {
    let text = statistics(mount);
    let line = text.lines().find(|line| line.split(' ').next() == Some(function));
    let number = |at: usize| line.map_or(0, |line| line.split(' ').nth(at).unwrap().parse().unwrap());
    (number(2), number(4))
}

/// Returns true if FUSE and libnbd are available.
fn ready() -> bool {
    need_fuse()
}

/// Returns pseudo-random bytes, the same for the same seed.
fn noise(len: usize, seed: u64) -> Vec<u8> {
    let mut state = seed.wrapping_mul(2) | 1;
    let mut bytes = Vec::with_capacity(len + 8);
    while bytes.len() < len {
        state = state
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        bytes.extend(state.to_be_bytes());
    }
    bytes.truncate(len);
    bytes
}

/// Writes bytes to a file that exists.
fn write_at(path: &Path, offset: u64, bytes: &[u8]) {
    use std::os::unix::fs::FileExt;
    let file = fs::File::options().write(true).open(path).unwrap();
    file.write_all_at(bytes, offset).unwrap();
}
