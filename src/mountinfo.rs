//! Reads the mount table of this process, `/proc/self/mountinfo`.
//!
//! A mount is identified by its ID and its device, not by its path. A path can be renamed or covered, and asking the
//! mount itself (`stat`) sends a request to a daemon that may be gone.

use std::ffi::OsString;
use std::fmt;
use std::fs;
use std::io;
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::ffi::OsStringExt;
use std::path::{Path, PathBuf};

use crate::error::{Error, Result};

/// Type of the mounts of this program.
pub const FSTYPE: &str = "fuse.vmdkfuse";

/// Device number of a file system, as `stat` of its files and sysfs name it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Device {
    /// Major number; 0 for every file system without a block device.
    pub major: u32,
    /// Minor number.
    pub minor: u32,
}

impl fmt::Display for Device {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.major, self.minor)
    }
}

/// One line of the table.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MountEntry {
    /// ID of the mount. The kernel reuses it after the mount is gone.
    pub id: u64,
    /// ID of the parent mount.
    pub parent: u64,
    /// Device of the file system.
    pub device: Device,
    /// Current mount point.
    pub point: PathBuf,
    /// Type with subtype, `fuse.vmdkfuse`.
    pub fstype: String,
    /// Source, as the mount names it.
    pub source: OsString,
    /// User and group that mounted a FUSE file system.
    pub owner: Option<(u32, u32)>,
}

/// Returns all mounts that this process sees, in the order of the kernel: a mount that covers another comes after it.
pub fn read() -> Result<Vec<MountEntry>> {
    let path = "/proc/self/mountinfo";
    let text = fs::read(path).map_err(|e| Error::io(path, e))?;
    // A line that cannot be parsed belongs to a foreign mount, and must not hide the mount of this process.
    Ok(text.split(|&b| b == b'\n').filter_map(parse_line).collect())
}

/// Maximum number of holders that are named.
const HOLDERS: usize = 3;

/// Describes processes in other mount namespaces in which the file system `device` is mounted, one of each namespace.
pub(crate) fn holders(device: Device) -> Vec<String> {
    // This process's own namespace: mounts in it are found by their mount points.
    let mut seen = vec![fs::read_link("/proc/self/ns/mnt").ok()];
    let mut found = Vec::new();
    for process in fs::read_dir("/proc").into_iter().flatten().flatten() {
        let path = process.path();
        let Some(pid) = process.file_name().to_str().and_then(|name| name.parse::<u32>().ok()) else {
            continue;
        };
        let namespace = fs::read_link(path.join("ns/mnt")).ok();
        // Hundreds of processes share a namespace, and its table is read once. `None` is a process that this user may
        // not look into.
        if found.len() >= HOLDERS || namespace.is_none() || seen.contains(&namespace) {
            continue;
        }
        seen.push(namespace);
        let table = fs::read(path.join("mountinfo")).unwrap_or_default();
        let holds = |line: &[u8]| parse_line(line).is_some_and(|entry| entry.device == device);
        if table.split(|&b| b == b'\n').any(holds) {
            let name = fs::read_to_string(path.join("comm")).unwrap_or_default();
            found.push(format!("the mount namespace of process {pid} ({})", name.trim_end()));
        }
    }
    found
}

/// Returns the topmost mount whose mount point is exactly `point` (an absolute path without symbolic links).
pub fn at(point: &Path) -> Result<Option<MountEntry>> {
    Ok(read()?.into_iter().rfind(|e| e.point == point))
}

/// Returns the ID of the mount that an open file lies on. Sends no request to that mount.
pub(crate) fn mount_id(file: impl AsFd) -> Result<u64> {
    let fdinfo = format!("/proc/self/fdinfo/{}", file.as_fd().as_raw_fd());
    let text = fs::read_to_string(&fdinfo).map_err(|e| Error::io(fdinfo.clone(), e))?;
    let id = text
        .lines()
        .find_map(|l| l.strip_prefix("mnt_id:"))
        .and_then(|v| v.trim().parse().ok());
    id.ok_or_else(|| Error::io(fdinfo, io::Error::from(io::ErrorKind::InvalidData)))
}

fn parse_line(line: &[u8]) -> Option<MountEntry> {
    let mut fields = line.split(|&b| b == b' ');
    let id = number(fields.next()?)?;
    let parent = number(fields.next()?)?;
    let device = parse_device(fields.next()?)?;
    // The folder of the file system that a bind mount shows; not needed here.
    let _root = fields.next()?;
    let point = PathBuf::from(unescape(fields.next()?));
    // Mount options, then any number of optional tags, then a lone dash.
    let mut fields = fields.skip_while(|f| *f != b"-").skip(1);
    let fstype = String::from_utf8_lossy(fields.next()?).into_owned();
    let source = unescape(fields.next()?);
    let options: Vec<_> = fields.next().unwrap_or_default().split(|&b| b == b',').collect();
    let id_of = |name: &[u8]| options.iter().find_map(|option| number(option.strip_prefix(name)?));
    let owner = id_of(b"user_id=").zip(id_of(b"group_id="));
    Some(MountEntry {
        id,
        parent,
        device,
        point,
        fstype,
        source,
        owner,
    })
}

fn number<T: std::str::FromStr>(field: &[u8]) -> Option<T> {
    std::str::from_utf8(field).ok()?.parse().ok()
}

fn parse_device(field: &[u8]) -> Option<Device> {
    let colon = field.iter().position(|&b| b == b':')?;
    Some(Device {
        major: number(&field[..colon])?,
        minor: number(&field[colon + 1..])?,
    })
}

/// Replaces the kernel's octal escapes (`\040` and others: blank, tab, newline, `\` and `#`).
fn unescape(field: &[u8]) -> OsString {
    let mut out = Vec::with_capacity(field.len());
    let mut rest = field;
    while let Some((&byte, tail)) = rest.split_first() {
        // A backslash without three digits stands for itself: the kernel writes none, but a table may be a test's.
        match (byte, octal(tail)) {
            (b'\\', Some(value)) => {
                out.push(value);
                rest = &tail[3..];
            }
            _ => {
                out.push(byte);
                rest = tail;
            }
        }
    }
    OsString::from_vec(out)
}

fn octal(digits: &[u8]) -> Option<u8> {
    let digits = std::str::from_utf8(digits.get(..3)?).ok()?;
    u8::from_str_radix(digits, 8).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_with_tags_blanks_and_subtype() {
        let line = b"36 35 0:54 / /mnt/two\\040words\\134x rw,nosuid shared:7 master:1 - fuse.vmdkfuse a\\040b.vmdk ro,user_id=0";
        let e = parse_line(line).unwrap();
        assert_eq!((e.id, e.parent, e.device), (36, 35, Device { major: 0, minor: 54 }));
        assert_eq!(e.point, Path::new("/mnt/two words\\x"));
        assert_eq!(e.fstype, "fuse.vmdkfuse");
        assert_eq!(e.source, "a b.vmdk");
        assert_eq!(e.device.to_string(), "0:54");
    }

    #[test]
    fn short_or_malformed_lines_are_skipped() {
        for line in [
            &b""[..],
            b"36",
            b"x 35 0:54 / /a rw - ext4 s",
            b"36 35 054 / /a rw - ext4 s",
            b"36 35 0:54 / /a rw",
        ] {
            assert_eq!(parse_line(line), None, "{}", String::from_utf8_lossy(line));
        }
        assert_eq!(unescape(b"a\\04"), "a\\04");
        assert_eq!(unescape(b"a\\999b"), "a\\999b");
    }

    #[test]
    fn the_root_is_found_by_path_and_by_id() {
        let root = fs::File::open("/").unwrap();
        let by_path = at(Path::new("/")).unwrap().unwrap();
        assert_eq!(by_path.point, Path::new("/"));
        assert_eq!(by_path.id, mount_id(&root).unwrap());
        assert_eq!(at(Path::new("/no such point")).unwrap(), None);
    }
}
