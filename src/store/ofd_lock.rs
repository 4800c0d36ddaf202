//! Image locks: OFD locks on the files of an image, compatible with those of qemu.
//!
//! ```text
//!   byte 100 + n   shared lock of a program that uses permission n
//!   byte 200 + n   shared lock of a program that denies permission n to all others
//!                  n: 0 consistent read, 1 write, 2 write of unchanged data, 3 resize
//!   a reader       takes 100, 201 and 203, then tests 200, 101 and 103
//! ```
//! The locked bytes need not exist in the file.
//!
//! All cooperating programs take only shared locks, so taking them always succeeds, and readers do not conflict with
//! each other. A program tests a byte by asking the kernel if an exclusive lock would be possible. Every program takes
//! its locks before it tests the others, so there is no race: if two start at the same time, at least one of them sees
//! the locks of the other.
//!
//! The locks belong to the open file description (`F_OFD_SETLK`). The last close releases them. Another open of the
//! same file in this process counts as a separate program, and closing it releases only its own locks. (With the older
//! `F_SETLK`, closing any descriptor of the file would release all locks of the process.)

use std::fs::File;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, fcntl};

use super::{Access, lock_holder, printable};
use crate::error::{Error, ErrorKind, Result};

/// First byte of the range of used permissions (qemu's `RAW_LOCK_PERM_BASE`).
const USES: i64 = 100;
/// First byte of the range of denied permissions (qemu's `RAW_LOCK_SHARED_BASE`).
const DENIES: i64 = 200;
/// Permissions: consistent reading, writing, resizing.
const READ: i64 = 0;
const WRITE: i64 = 1;
const RESIZE: i64 = 3;

/// Returns the bytes that a program with `access` locks.
fn bytes_to_lock(access: Access) -> &'static [i64] {
    match access {
        Access::Peek => &[],
        // A reader denies writing and resizing, and lets others read.
        Access::Read => &[USES + READ, DENIES + WRITE, DENIES + RESIZE],
        Access::Write => &[
            USES + READ,
            USES + WRITE,
            USES + RESIZE,
            DENIES + WRITE,
            DENIES + RESIZE,
        ],
    }
}

/// Returns the bytes that no other program may have locked.
fn bytes_to_test(access: Access) -> &'static [i64] {
    match access {
        Access::Peek => &[],
        Access::Read => &[DENIES + READ, USES + WRITE, USES + RESIZE],
        Access::Write => &[
            DENIES + READ,
            DENIES + WRITE,
            DENIES + RESIZE,
            USES + WRITE,
            USES + RESIZE,
        ],
    }
}

/// Locks `file` for `access` until it is closed. Does nothing if its file system does not support OFD locks.
///
/// Returns `Busy` if another program uses the file in a way that conflicts with `access`, or the error of the kernel.
///
/// A daemon whose mount has just been removed is waited for: umount(8) returns before its locks are gone.
pub(super) fn lock(file: &File, access: Access, label: &str) -> Result<()> {
    // Asked once: the search for the holder reads the open files of every process.
    let mut deadline = None;
    loop {
        let taken = take(file, access);
        if let Ok(Some(conflict)) = &taken
            && Instant::now() < *deadline.get_or_insert_with(|| Instant::now() + conflict.holder(file).patience())
        {
            // Released, so that another program which waits for the same daemon does not see the locks of this one.
            release(file, access);
            std::thread::sleep(ENDING_POLL);
            continue;
        }
        return locked(taken, file, access, label);
    }
}

/// Time between two attempts.
const ENDING_POLL: Duration = Duration::from_millis(20);

/// Releases the locks for `access`.
fn release(file: &File, access: Access) {
    for &byte in bytes_to_lock(access) {
        // Unlocking what is not locked is no error, and after any other one the close releases the lock.
        let _ = fcntl(file, FcntlArg::F_OFD_SETLK(&of_byte(byte, libc::F_UNLCK)));
    }
}

/// Returns the result of [`lock`] for that of [`take`].
fn locked(taken: nix::Result<Option<Conflict>>, file: &File, access: Access, label: &str) -> Result<()> {
    match taken {
        Ok(None) => Ok(()),
        Ok(Some(conflict)) => Err(Error::new(ErrorKind::Busy, conflict.message(file, access, label))),
        // Some network and FUSE file systems have no such locks. To refuse an image for that would make it unusable
        // there.
        Err(e @ (Errno::EINVAL | Errno::ENOLCK | Errno::EOPNOTSUPP | Errno::ENOSYS)) => {
            tracing::debug!("{label}: not locked: its file system does not support OFD locks: {e}");
            Ok(())
        }
        Err(e) => Err(Error::io(format!("{label}: lock"), e.into())),
    }
}

/// Takes the locks for `access` and tests those of other programs. Returns the first conflicting lock.
///
/// After a conflict the locks that were taken stay until `file` is closed, so the caller must close it.
fn take(file: &File, access: Access) -> nix::Result<Option<Conflict>> {
    for &byte in bytes_to_lock(access) {
        match fcntl(file, FcntlArg::F_OFD_SETLK(&of_byte(byte, libc::F_RDLCK))) {
            Ok(_) => {}
            // Another program holds an exclusive lock, which qemu never takes.
            Err(Errno::EAGAIN | Errno::EACCES) => {
                return Ok(conflict_on(file, byte)?.or(Some(Conflict { byte, pid: None })));
            }
            Err(e) => return Err(e),
        }
    }
    // Only after all locks are taken: the other order would leave a gap in which two programs miss each other.
    for &byte in bytes_to_test(access) {
        if let Some(conflict) = conflict_on(file, byte)? {
            return Ok(Some(conflict));
        }
    }
    Ok(None)
}

/// Returns the lock that another open file description holds on `byte`, if any.
fn conflict_on(file: &File, byte: i64) -> nix::Result<Option<Conflict>> {
    // An exclusive lock would conflict with every lock of others, shared ones included, so the kernel reports any.
    let mut lock = of_byte(byte, libc::F_WRLCK);
    fcntl(file, FcntlArg::F_OFD_GETLK(&mut lock))?;
    let free = libc::c_int::from(lock.l_type) == libc::F_UNLCK;
    Ok((!free).then_some(Conflict {
        byte,
        // -1 for an OFD lock, which no single process owns.
        pid: u32::try_from(lock.l_pid).ok(),
    }))
}

/// Returns a lock request of one byte.
fn of_byte(byte: i64, lock_type: libc::c_int) -> libc::flock {
    // The constants are small, but their integer type differs from that of the fields.
    libc::flock {
        l_type: lock_type as _,
        l_whence: libc::SEEK_SET as _,
        l_start: byte,
        l_len: 1,
        l_pid: 0,
    }
}

/// Conflicting lock of another open file description.
struct Conflict {
    byte: i64,
    /// Process that holds the lock. The kernel reports it for the older POSIX locks, but not for OFD locks.
    pid: Option<u32>,
}

impl Conflict {
    fn holder(&self, file: &File) -> lock_holder::Holder {
        lock_holder::find(file, self.byte, self.pid.filter(|&pid| pid > 0))
    }

    /// Returns the message for the user: the conflict, the process that causes it, and a way out.
    fn message(&self, file: &File, access: Access, label: &str) -> String {
        let conflict = match self.byte {
            byte if byte == USES + WRITE || byte == USES + RESIZE => "in use for writing by another program",
            byte if byte == DENIES + READ => "in use by another program that allows no other reader",
            _ => "in use by another program that allows no other writer",
        };
        let holder = self.holder(file);
        let advice = match (&holder.mount_point, access) {
            (Some(point), _) => format!("unmount {} first", printable(point)),
            (None, Access::Read | Access::Peek) => "end that program first".to_owned(),
            (None, Access::Write) => {
                "end that program first, or read the file with readonly=true if the other program only reads".to_owned()
            }
        };
        format!("{label}: the file is {conflict}{holder}; {advice}")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Opens one temporary file `N` times.
    fn opens<const N: usize>() -> [File; N] {
        let named = tempfile::NamedTempFile::new().unwrap();
        std::array::from_fn(|_| File::options().read(true).write(true).open(named.path()).unwrap())
    }

    /// Takes a shared lock on one byte.
    fn hold(file: &File, byte: i64) {
        fcntl(file, FcntlArg::F_OFD_SETLK(&of_byte(byte, libc::F_RDLCK))).unwrap();
    }

    fn refused(file: &File, fragment: &str) {
        refused_to(Access::Read, file, &[fragment, "; end that program first"]);
    }

    #[track_caller]
    fn refused_to(access: Access, file: &File, fragments: &[&str]) {
        let error = lock(file, access, "x.vmdk").unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Busy);
        let own = format!("(process {}, ", std::process::id());
        for fragment in fragments.iter().copied().chain(["x.vmdk: ", &own]) {
            assert!(
                error.to_string().contains(fragment),
                "`{error}` does not contain `{fragment}`"
            );
        }
        assert!(!error.to_string().contains("lock=off"), "an unsafe advice: {error}");
    }

    /// Returns the bytes that are locked by other opens than `file`.
    fn locked(file: &File) -> Vec<i64> {
        (0..300)
            .filter(|&byte| conflict_on(file, byte).unwrap().is_some())
            .collect()
    }

    #[test]
    fn readers_share_and_their_locks_exclude_writers() {
        let [a, b, other] = opens();
        lock(&a, Access::Read, "a").unwrap();
        lock(&b, Access::Read, "b").unwrap();
        lock(&b, Access::Read, "b again").unwrap();
        assert_eq!(locked(&other), [100, 201, 203]);
        drop(a);
        assert_eq!(
            locked(&other),
            [100, 201, 203],
            "closing one open released the lock of the other"
        );
        drop(b);
        assert!(locked(&other).is_empty());
    }

    #[test]
    fn a_writer_excludes_readers_and_the_error_names_it() {
        for (byte, fragment) in [
            (101, "for writing"),
            (103, "for writing"),
            (200, "allows no other reader"),
        ] {
            let [other, reader] = opens();
            hold(&other, byte);
            refused(&reader, fragment);
            drop(other);
            lock(&reader, Access::Read, "x.vmdk").unwrap();
        }
    }

    #[test]
    fn the_locks_of_a_writer_exclude_readers_and_writers() {
        let [writer, reader, other] = opens();
        lock(&writer, Access::Write, "w").unwrap();
        lock(&writer, Access::Write, "w again").unwrap();
        assert_eq!(locked(&other), [100, 101, 103, 201, 203]);
        refused(&reader, "in use for writing by another program");
        let advice = ["allows no other writer", "end that program first", "readonly=true"];
        refused_to(Access::Write, &other, &advice);
        drop((writer, reader, other));
        let [reader, writer] = opens();
        lock(&reader, Access::Read, "r").unwrap();
        refused_to(Access::Write, &writer, &advice);
        drop((reader, writer));
    }

    #[test]
    fn a_writer_that_was_refused_leaves_no_locks() {
        let named = tempfile::NamedTempFile::new().unwrap();
        let open = || File::options().read(true).write(true).open(named.path()).unwrap();
        let reader = open();
        lock(&reader, Access::Read, "r").unwrap();
        refused_to(Access::Write, &open(), &["allows no other writer"]);
        lock(&open(), Access::Read, "another reader").unwrap();
        drop(reader);
        lock(&open(), Access::Write, "w").unwrap();
    }

    #[test]
    fn a_program_that_uses_or_denies_writing_excludes_a_writer() {
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
    fn other_permissions_do_not_conflict() {
        let [other, reader] = opens();
        for byte in [0, 99, 100, 102, 104, 201, 202, 203, 204] {
            hold(&other, byte);
        }
        lock(&reader, Access::Read, "x.vmdk").unwrap();
    }

    #[test]
    fn an_exclusive_lock_conflicts() {
        let [other, reader] = opens();
        fcntl(&other, FcntlArg::F_OFD_SETLK(&of_byte(201, libc::F_WRLCK))).unwrap();
        refused(&reader, "in use by another program that allows no other writer");
    }
}
