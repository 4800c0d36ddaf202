//! The kernel's mount table: what is mounted, and the lazy removal of a mount.

use std::ffi::OsString;
use std::fs;
use std::os::unix::ffi::OsStringExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use nix::mount::{MntFlags, umount2};

use super::cmd::{Cmd, Outcome};
use super::process::poll_until;
use super::requirements::is_root;
use super::user::User;

/// Deadline for a mount to stop being busy because of a file that a child process inherited.
const INHERITED_FILES: Duration = Duration::from_secs(60);

/// One line of `/proc/self/mountinfo`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MountEntry {
    /// Mount point.
    pub point: PathBuf,
    /// File system type, for example `fuse.vmdkfuse`.
    pub fs_type: String,
    /// Source, as the file system reports it (`fsname=`).
    pub source: String,
    /// Options of the mount and of its superblock, separated by commas.
    pub options: String,
}

/// Returns the mounts at `dir` and below it, the newest first: the order in which they can be unmounted.
pub fn mounts_below(dir: &Path) -> Vec<MountEntry> {
    let text = fs::read("/proc/self/mountinfo").expect("the table of mounts");
    let lines = text.split(|byte| *byte == b'\n').filter(|line| !line.is_empty());
    let mut found: Vec<_> = lines
        .filter_map(parse)
        .filter(|entry| entry.point.starts_with(dir))
        .collect();
    found.reverse();
    found
}

/// Unmounts with `fusermount3 -u` as `user`, and returns its outcome. A busy mount is tried again for a minute.
pub fn unmount_as(point: &Path, user: Option<User>) -> Outcome {
    while_busy(|| Cmd::new("fusermount3").arg("-u").arg(point).user(user).run())
}

/// Unmounts with `fusermount3 -u`; panics unless that succeeds. A busy mount is tried again for a minute.
#[track_caller]
pub fn unmount(point: &Path) {
    unmount_as(point, None).ok();
}

/// Unmounts a mount of any kind with umount(8); panics unless that succeeds. A busy mount is tried again for
/// a minute.
#[track_caller]
pub fn umount(point: &Path) {
    while_busy(|| Cmd::new("umount").arg(point).run()).ok();
}

/// Repeats a command while it says that the mount is busy, for up to a minute. Returns the last outcome.
///
/// A child process that another thread starts at this moment inherits the open files of this process until it calls exec,
/// also those that were closed here meanwhile, and keeps their mount busy for that time.
fn while_busy(run: impl Fn() -> Outcome) -> Outcome {
    let mut outcome = run();
    poll_until(INHERITED_FILES, || {
        let busy = outcome.stderr.contains("busy");
        if busy {
            outcome = run();
        }
        !busy
    });
    outcome
}

/// Unmounts lazily: the mount disappears from the tree at once, even if it is busy or its daemon has died.
pub(super) fn detach(point: &Path) {
    if is_root() {
        umount2(point, MntFlags::MNT_DETACH).ok();
    } else {
        Cmd::new("fusermount3").arg("-uzq").arg(point).run();
    }
}

/// Parses one line of mountinfo: `36 35 98:0 / /point rw,noatime master:1 - type source rw`.
///
/// The number of optional fields before the dash varies.
fn parse(line: &[u8]) -> Option<MountEntry> {
    let fields: Vec<&[u8]> = line.split(|byte| *byte == b' ').collect();
    let dash = fields.iter().position(|field| field == b"-")?;
    let field = |at: usize| fields.get(at).map(|field| String::from_utf8_lossy(field).into_owned());
    Some(MountEntry {
        point: PathBuf::from(OsString::from_vec(unescape(fields.get(4)?))),
        fs_type: field(dash + 1)?,
        source: field(dash + 2)?,
        options: format!("{},{}", field(5)?, field(dash + 3)?),
    })
}

/// Decodes the kernel's octal escapes (`\040` for a blank).
fn unescape(field: &[u8]) -> Vec<u8> {
    let mut out = Vec::with_capacity(field.len());
    let mut rest = field;
    while let Some((&byte, tail)) = rest.split_first() {
        let code = tail.get(..3).and_then(|code| std::str::from_utf8(code).ok());
        match code.and_then(|code| u8::from_str_radix(code, 8).ok()) {
            Some(value) if byte == b'\\' => {
                out.push(value);
                rest = &tail[3..];
            }
            _ => {
                out.push(byte);
                rest = tail;
            }
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_is_parsed_with_its_escapes() {
        let line = br"36 35 0:44 / /tmp/a\040b rw,nosuid shared:7 - fuse.vmdkfuse disk.vmdk ro,user_id=0";
        let entry = parse(line).unwrap();
        assert_eq!(entry.point, Path::new("/tmp/a b"));
        assert_eq!(
            (entry.fs_type.as_str(), entry.source.as_str()),
            ("fuse.vmdkfuse", "disk.vmdk")
        );
        assert_eq!(entry.options, "rw,nosuid,ro,user_id=0");
    }
}
