//! The kernel's mount table: what is mounted, and the lazy removal of a mount.

use std::ffi::OsString;
use std::fs;
use std::os::unix::ffi::OsStringExt;
use std::path::{Path, PathBuf};

use nix::mount::{MntFlags, umount2};

use super::cmd::Cmd;
use super::requirements::is_root;

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
