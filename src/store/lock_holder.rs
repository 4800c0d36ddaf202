//! Search for the program that holds a conflicting lock, for the message about it.

use std::collections::HashSet;
use std::fmt;
use std::fs::{self, File};
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use super::printable;
use crate::mountinfo::{self, FSTYPE};

/// Time limit of the search.
const SEARCH_TIME: Duration = Duration::from_secs(1);

/// Names of this program as the kernel shows them: its own and those of the helpers of mount(8), of which it keeps 15 bytes.
const PROGRAMS: [&str; 3] = ["vmdkfuse", "mount.vmdkfuse", "mount.fuse.vmdk"];

/// Time for which a daemon that is ending is waited for.
const ENDING_TIME: Duration = Duration::from_secs(5);

/// Time for which a holder that was not found is waited for: it may have ended during the search.
const UNKNOWN_TIME: Duration = Duration::from_millis(200);

/// Known facts about the holder of a lock.
#[derive(Debug, Default)]
pub(super) struct Holder {
    pid: Option<u32>,
    /// Name of its program.
    program: String,
    /// Its mount point, if it is a mount of this program.
    pub(super) mount_point: Option<PathBuf>,
}

impl Holder {
    /// Returns how long the lock is worth waiting for: a while if the holder is this program and its mount is gone (or not
    /// there yet), a moment if the holder was not found.
    pub(super) fn patience(&self) -> Duration {
        // A copy of this program may have another file name.
        let is_this_program = || PROGRAMS.contains(&self.program.as_str()) || self.program == program("self");
        match &self.mount_point {
            None if self.program.is_empty() => UNKNOWN_TIME,
            None if is_this_program() => ENDING_TIME,
            _ => Duration::ZERO,
        }
    }
}

impl fmt::Display for Holder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let known = [
            self.pid
                .map(|pid| format!("process {pid}, {}", printable(&self.program))),
            self.mount_point
                .as_ref()
                .map(|point| format!("mounted on {}", printable(point))),
        ];
        let known: Vec<_> = known.into_iter().flatten().collect();
        if known.is_empty() {
            return Ok(());
        }
        write!(f, " ({})", known.join(", "))
    }
}

/// Searches for the holder of a lock on `byte` of `file`. `pid` is the holder's process, if the kernel told it.
pub(super) fn find(file: &File, byte: i64, pid: Option<u32>) -> Holder {
    let pid = pid.or_else(|| find_process(file, byte));
    Holder {
        pid,
        program: pid.map_or_else(String::new, |pid| program(&pid.to_string())),
        mount_point: mount_point(file, pid),
    }
}

/// Returns the name of a process's program, as the kernel shows it. Empty if the process has ended since.
fn program(process: &str) -> String {
    let name = fs::read_to_string(format!("/proc/{process}/comm")).unwrap_or_default();
    name.trim_end().to_owned()
}

/// Returns the mount point of the mount of this program that has `file` open: the source of a mount is the path of its
/// first disk, or of the file that describes it, which its daemon keeps open.
///
/// The holder's open files tell it. Those of another user's process cannot be read; then only a mount of `file` itself is
/// found. Asks no mount anything: the file may be on the mount that waits for this call.
fn mount_point(file: &File, pid: Option<u32>) -> Option<PathBuf> {
    let links = |process: &str| -> HashSet<PathBuf> {
        let entries = fs::read_dir(format!("/proc/{process}/fd")).into_iter().flatten();
        entries
            .flatten()
            .filter_map(|entry| fs::read_link(entry.path()).ok())
            .collect()
    };
    let mut open = pid
        .filter(|&pid| pid != std::process::id())
        .map_or_else(HashSet::new, |pid| links(&pid.to_string()));
    // Also without a holder: the file itself may be the source of a mount.
    open.extend(super::real_path(file).ok());
    let mounts = mountinfo::read().ok()?;
    mounts
        .into_iter()
        .find(|mount| mount.fstype == FSTYPE && open.contains(Path::new(&mount.source)))
        .map(|mount| mount.point)
}

/// Searches `/proc` for the process that holds a lock on `byte` of `file`. Returns `None` if this user may not see it
/// or the time limit is exceeded.
///
/// It reads only `fdinfo` and never calls stat on the files of those processes: such a file may be in the mount that
/// waits for this call, which would deadlock.
fn find_process(file: &File, byte: i64) -> Option<u32> {
    // The device and inode as the kernel prints them in its lists of locks. On btrfs and overlayfs they differ from the
    // result of stat, so they are read from the entry of this process, which holds a lock too.
    let own_path = PathBuf::from(format!("/proc/{}/fdinfo/{}", std::process::id(), file.as_raw_fd()));
    let own = fs::read_to_string(&own_path).ok()?;
    let inode = fdinfo_locks(&own).next()?.inode;
    let holds = |path: &Path| {
        // The open file of this call is skipped: a writer holds the bytes that it tests.
        if path == own_path {
            return false;
        }
        let text = fs::read_to_string(path).unwrap_or_default();
        fdinfo_locks(&text).any(|lock| lock.inode == inode && lock.first <= byte && byte <= lock.last)
    };
    let deadline = Instant::now() + SEARCH_TIME;
    for process in fs::read_dir("/proc").ok()?.flatten() {
        let Some(pid) = process.file_name().to_str().and_then(|name| name.parse().ok()) else {
            continue;
        };
        for open in fs::read_dir(process.path().join("fdinfo"))
            .into_iter()
            .flatten()
            .flatten()
        {
            // Checked for each open file: one process may have a million of them.
            if Instant::now() > deadline {
                return None;
            }
            if holds(&open.path()) {
                return Some(pid);
            }
        }
    }
    None
}

/// Lock line in `/proc/PID/fdinfo/FD`.
struct FdinfoLock<'a> {
    /// Device and inode, as the kernel prints them.
    inode: &'a str,
    first: i64,
    last: i64,
}

/// Parses the lock lines of an fdinfo file: `lock: 1: OFDLCK ADVISORY READ -1 fe:00:4711 100 101`. The last word can be
/// `EOF`.
fn fdinfo_locks(fdinfo: &str) -> impl Iterator<Item = FdinfoLock<'_>> {
    fdinfo.lines().filter_map(|line| {
        let words: Vec<_> = line.strip_prefix("lock:")?.split_whitespace().collect();
        // Eight words; a line of a waiting lock has an arrow as one more, and is skipped.
        let &[_, _, _, _, _, inode, first, last] = words.as_slice() else {
            return None;
        };
        Some(FdinfoLock {
            inode,
            first: first.parse().ok()?,
            last: last.parse().unwrap_or(i64::MAX),
        })
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lock_lines_of_fdinfo_are_parsed() {
        let text = "pos:\t0\nflags:\t02\nlock:\t1: OFDLCK ADVISORY  READ -1 00:2a:57 100 101\n\
                    lock:\t2: FLOCK  ADVISORY  WRITE 12 00:2a:57 0 EOF\nlock:\tx\n";
        let seen: Vec<_> = fdinfo_locks(text).map(|l| (l.inode, l.first, l.last)).collect();
        assert_eq!(seen, [("00:2a:57", 100, 101), ("00:2a:57", 0, i64::MAX)]);
    }
}
