//! Locks on the files of an image, the same as qemu's, so that it and this program keep out of each other's way.
//!
//! ```text
//!   byte 100 + n   shared lock of whoever uses permission n
//!   byte 200 + n   shared lock of whoever lets nobody else use permission n
//!                  n: 0 consistent read, 1 write, 2 write of what is there already, 3 resize
//!   a reader       takes 100, 201 and 203, then looks whether anybody has 200, 101 or 103
//! ```
//! The bytes need not exist. All who cooperate only ever take shared locks, so taking them succeeds and readers don't
//! disturb each other; who looks asks whether an exclusive lock would be possible. To take first and look then leaves
//! no gap: of two who start at once at least one sees the other.
//!
//! The locks belong to the open file description (`F_OFD_SETLK`): the last close ends them, another open of the same
//! file in this process is one more reader, and closing that one takes nothing away.

use std::fs::{self, File};
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, fcntl};

use super::{Access, printable};
use crate::error::{Error, ErrorKind, Result};

/// The byte for the use of permission 0.
const USES: i64 = 100;
/// The byte for letting nobody else use permission 0.
const FORBIDS: i64 = 200;
/// Permissions: data that fit together, writing, resizing.
const READ: i64 = 0;
const WRITE: i64 = 1;
const RESIZE: i64 = 3;

/// What one takes.
fn held(access: Access) -> &'static [i64] {
    match access {
        Access::Read => &[USES + READ, FORBIDS + WRITE, FORBIDS + RESIZE],
        Access::Write => &[
            USES + READ,
            USES + WRITE,
            USES + RESIZE,
            FORBIDS + WRITE,
            FORBIDS + RESIZE,
        ],
    }
}

/// What nobody may have beside it.
fn tested(access: Access) -> &'static [i64] {
    match access {
        Access::Read => &[FORBIDS + READ, USES + WRITE, USES + RESIZE],
        Access::Write => &[
            FORBIDS + READ,
            FORBIDS + WRITE,
            FORBIDS + RESIZE,
            USES + WRITE,
            USES + RESIZE,
        ],
    }
}

/// The longest search for the process that is in the way.
const SEARCH: Duration = Duration::from_secs(1);

/// Locks `file` for `access` until it is closed. Where its file system has no such locks, there is nothing to do.
///
/// Errors: `Busy` if another program uses the file in a way that does not go with `access`, or what the system says.
pub(super) fn lock(file: &File, access: Access, label: &str) -> Result<()> {
    match take(file, access) {
        Ok(None) => Ok(()),
        Ok(Some(conflict)) => Err(Error::new(ErrorKind::Busy, conflict.message(file, access, label))),
        Err(e @ (Errno::EINVAL | Errno::ENOLCK | Errno::EOPNOTSUPP | Errno::ENOSYS)) => {
            tracing::debug!("{label}: not locked, its file system has no such locks: {e}");
            Ok(())
        }
        Err(e) => Err(Error::io(format!("{label}: lock"), e.into())),
    }
}

/// Takes what belongs to `access`; a lock of somebody else that is in the way.
fn take(file: &File, access: Access) -> nix::Result<Option<Conflict>> {
    for &byte in held(access) {
        match fcntl(file, FcntlArg::F_OFD_SETLK(&of_byte(byte, libc::F_RDLCK))) {
            Ok(_) => {}
            // somebody has it exclusively, which qemu never does
            Err(Errno::EAGAIN | Errno::EACCES) => return Ok(look(file, byte)?.or(Some(Conflict { byte, pid: None }))),
            Err(e) => return Err(e),
        }
    }
    for &byte in tested(access) {
        if let Some(conflict) = look(file, byte)? {
            return Ok(Some(conflict));
        }
    }
    Ok(None)
}

/// The lock that somebody else has on `byte`.
fn look(file: &File, byte: i64) -> nix::Result<Option<Conflict>> {
    let mut lock = of_byte(byte, libc::F_WRLCK);
    fcntl(file, FcntlArg::F_OFD_GETLK(&mut lock))?;
    let free = libc::c_int::from(lock.l_type) == libc::F_UNLCK;
    Ok((!free).then_some(Conflict {
        byte,
        pid: u32::try_from(lock.l_pid).ok(),
    }))
}

/// A lock of one byte.
fn of_byte(byte: i64, kind: libc::c_int) -> libc::flock {
    // The constants are small numbers of another width than the field.
    libc::flock {
        l_type: kind as _,
        l_whence: libc::SEEK_SET as _,
        l_start: byte,
        l_len: 1,
        l_pid: 0,
    }
}

/// Somebody else's lock.
struct Conflict {
    byte: i64,
    /// Whose it is; the kernel does not tell it of locks of the same kind as ours.
    pid: Option<u32>,
}

impl Conflict {
    fn message(&self, file: &File, access: Access, label: &str) -> String {
        let does = match self.byte {
            byte if byte == USES + WRITE || byte == USES + RESIZE => "in use for writing by another program",
            byte if byte == FORBIDS + READ => "in use by another program that lets nobody else read it",
            _ => "in use by another program that lets nobody else write to it",
        };
        let who = match self.pid.filter(|&pid| pid > 0).or_else(|| search(file, self.byte)) {
            Some(pid) => {
                let name = fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default();
                format!(" (process {pid}, {})", printable(name.trim_end()))
            }
            None => String::new(),
        };
        let way_out = match access {
            Access::Read => "lock=off reads it all the same",
            Access::Write => "readonly=true may read it beside a reader, lock=off writes to it all the same",
        };
        format!("{label}: the file is {does}{who}; {way_out}")
    }
}

/// The process that has a lock on `byte` of `file`, as far as this user may see it and time allows.
///
/// It reads `fdinfo` and looks at no file of those processes: one of them may lie in the very mount that waits for us.
fn search(file: &File, byte: i64) -> Option<u32> {
    // As the kernel calls the file in its lists of locks, which need not be what stat() says (btrfs, overlayfs).
    let own_path = PathBuf::from(format!("/proc/{}/fdinfo/{}", std::process::id(), file.as_raw_fd()));
    let own = fs::read_to_string(&own_path).ok()?;
    let inode = listed(&own).next()?.inode;
    let holds = |path: &Path| {
        // a writer has what it looks for itself
        if path == own_path {
            return false;
        }
        let text = fs::read_to_string(path).unwrap_or_default();
        listed(&text).any(|lock| lock.inode == inode && lock.first <= byte && byte <= lock.last)
    };
    let until = Instant::now() + SEARCH;
    for process in fs::read_dir("/proc").ok()?.flatten() {
        let Some(pid) = process.file_name().to_str().and_then(|name| name.parse().ok()) else {
            continue;
        };
        for open in fs::read_dir(process.path().join("fdinfo"))
            .into_iter()
            .flatten()
            .flatten()
        {
            if Instant::now() > until {
                return None;
            }
            if holds(&open.path()) {
                return Some(pid);
            }
        }
    }
    None
}

/// A line about a lock in `/proc/PID/fdinfo/FD`.
struct Listed<'a> {
    /// Device and inode.
    inode: &'a str,
    first: i64,
    last: i64,
}

/// The locks in the text of such a file: `lock: 1: OFDLCK ADVISORY READ -1 fe:00:4711 100 101`, or `EOF` at the end.
fn listed(fdinfo: &str) -> impl Iterator<Item = Listed<'_>> {
    fdinfo.lines().filter_map(|line| {
        let words: Vec<_> = line.strip_prefix("lock:")?.split_whitespace().collect();
        let &[_, _, _, _, _, inode, first, last] = words.as_slice() else {
            return None;
        };
        Some(Listed {
            inode,
            first: first.parse().ok()?,
            last: last.parse().unwrap_or(i64::MAX),
        })
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A file that is open as often as it is asked for.
    fn opens<const N: usize>() -> [File; N] {
        let named = tempfile::NamedTempFile::new().unwrap();
        std::array::from_fn(|_| File::options().read(true).write(true).open(named.path()).unwrap())
    }

    /// Has a shared lock on one byte.
    fn hold(file: &File, byte: i64) {
        fcntl(file, FcntlArg::F_OFD_SETLK(&of_byte(byte, libc::F_RDLCK))).unwrap();
    }

    fn refused(file: &File, says: &str) {
        refused_to(Access::Read, file, &[says, "lock=off reads it all the same"]);
    }

    #[track_caller]
    fn refused_to(access: Access, file: &File, says: &[&str]) {
        let error = lock(file, access, "x.vmdk").unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Busy);
        let own = format!("(process {}, ", std::process::id());
        for says in says.iter().copied().chain(["x.vmdk: ", &own]) {
            assert!(error.to_string().contains(says), "`{error}` does not say `{says}`");
        }
    }

    /// The bytes that somebody else than `file` has locked.
    fn locked(file: &File) -> Vec<i64> {
        (0..300).filter(|&byte| look(file, byte).unwrap().is_some()).collect()
    }

    #[test]
    fn readers_share_and_hold_what_keeps_writers_out() {
        let [a, b, other] = opens();
        lock(&a, Access::Read, "a").unwrap();
        lock(&b, Access::Read, "b").unwrap();
        lock(&b, Access::Read, "b again").unwrap();
        assert_eq!(locked(&other), [100, 201, 203]);
        drop(a);
        assert_eq!(
            locked(&other),
            [100, 201, 203],
            "the close of one open took the lock of the other"
        );
        drop(b);
        assert!(locked(&other).is_empty());
    }

    #[test]
    fn a_writer_is_in_the_way_and_is_named() {
        for (byte, says) in [
            (101, "for writing"),
            (103, "for writing"),
            (200, "lets nobody else read it"),
        ] {
            let [other, reader] = opens();
            hold(&other, byte);
            refused(&reader, says);
            drop(other);
            lock(&reader, Access::Read, "x.vmdk").unwrap();
        }
    }

    #[test]
    fn a_writer_holds_what_keeps_readers_and_writers_out() {
        let [writer, reader, other] = opens();
        lock(&writer, Access::Write, "w").unwrap();
        lock(&writer, Access::Write, "w again").unwrap();
        assert_eq!(locked(&other), [100, 101, 103, 201, 203]);
        refused(&reader, "in use for writing by another program");
        let ways_out = [
            "lets nobody else write to it",
            "readonly=true",
            "lock=off writes to it all the same",
        ];
        refused_to(Access::Write, &other, &ways_out);
        drop((writer, reader, other));
        let [reader, writer] = opens();
        lock(&reader, Access::Read, "r").unwrap();
        refused_to(Access::Write, &writer, &ways_out);
        drop((reader, writer));
    }

    #[test]
    fn a_writer_that_was_refused_is_in_nobodys_way() {
        let named = tempfile::NamedTempFile::new().unwrap();
        let open = || File::options().read(true).write(true).open(named.path()).unwrap();
        let reader = open();
        lock(&reader, Access::Read, "r").unwrap();
        refused_to(Access::Write, &open(), &["lets nobody else write to it"]);
        lock(&open(), Access::Read, "another reader").unwrap();
        drop(reader);
        lock(&open(), Access::Write, "w").unwrap();
    }

    #[test]
    fn whoever_uses_or_forbids_writing_is_in_the_way_of_a_writer() {
        for byte in [101, 103, 200, 201, 203] {
            let [other, writer] = opens();
            hold(&other, byte);
            refused_to(Access::Write, &writer, &["in use"]);
            drop(other);
            lock(&writer, Access::Write, "x.vmdk").unwrap();
        }
        let [other, writer] = opens();
        for byte in [0, 99, 100, 102, 104, 202, 204] {
            hold(&other, byte);
        }
        lock(&writer, Access::Write, "x.vmdk").unwrap();
    }

    #[test]
    fn other_permissions_are_not_in_the_way() {
        let [other, reader] = opens();
        for byte in [0, 99, 100, 102, 104, 201, 202, 203, 204] {
            hold(&other, byte);
        }
        lock(&reader, Access::Read, "x.vmdk").unwrap();
    }

    #[test]
    fn an_exclusive_lock_is_in_the_way() {
        let [other, reader] = opens();
        fcntl(&other, FcntlArg::F_OFD_SETLK(&of_byte(201, libc::F_WRLCK))).unwrap();
        refused(&reader, "in use by another program that lets nobody else write to it");
    }

    #[test]
    fn lists_of_locks_are_understood() {
        let text = "pos:\t0\nflags:\t02\nlock:\t1: OFDLCK ADVISORY  READ -1 00:2a:57 100 101\n\
                    lock:\t2: FLOCK  ADVISORY  WRITE 12 00:2a:57 0 EOF\nlock:\tx\n";
        let seen: Vec<_> = listed(text).map(|l| (l.inode, l.first, l.last)).collect();
        assert_eq!(seen, [("00:2a:57", 100, 101), ("00:2a:57", 0, i64::MAX)]);
    }
}
