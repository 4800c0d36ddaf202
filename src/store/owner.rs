//! The rights of an image's owner, for one thread and one scope.
//!
//! A name inside an image was chosen by its author, not by the user of this program. A privileged process that opened
//! such names with its own rights would give the author every file that it can read itself. So these names are looked up
//! and opened with the rights of the image's owner: fsuid, fsgid and supplementary groups, without the capabilities that
//! override file permissions. The kernel keeps all of them for each thread.

use std::fs;
use std::sync::Arc;

use nix::unistd::{Gid, Uid, User, geteuid, getgrouplist, setfsgid, setfsuid};
use rustix::thread::{CapabilitySet, CapabilitySets, capabilities, set_capabilities, set_thread_groups};

use crate::error::{Error, ErrorKind, Result};

/// Capabilities that override file permissions.
const FILE_CAPABILITIES: CapabilitySet = CapabilitySet::DAC_OVERRIDE
    .union(CapabilitySet::DAC_READ_SEARCH)
    .union(CapabilitySet::FOWNER)
    .union(CapabilitySet::CHOWN)
    .union(CapabilitySet::FSETID)
    .union(CapabilitySet::MKNOD)
    .union(CapabilitySet::LINUX_IMMUTABLE)
    .union(CapabilitySet::MAC_OVERRIDE);

/// Owner of an image that has fewer rights than this process.
#[derive(Debug, Clone)]
pub(super) struct Owner {
    uid: Uid,
    gid: Gid,
    groups: Arc<[Gid]>,
}

impl Owner {
    /// Returns the owner of a file if this process has more rights: it is root, or has a capability that overrides file
    /// permissions, and the owner is not root.
    ///
    /// In a user namespace the files of users outside of it belong to the overflow ID. Towards those files the
    /// capabilities count for nothing, so this process has the rights of the ordinary user who made the namespace.
    pub(super) fn of(uid: u32, gid: u32) -> Option<Self> {
        let held = capabilities(None).map_or(CapabilitySet::empty(), |sets| sets.effective);
        let privileged = geteuid().is_root() || held.intersects(FILE_CAPABILITIES);
        // An image of root names what root may read anyway, and without privileges the owner's rights cannot be taken.
        if uid == 0 || !privileged || !is_mapped_here(uid) {
            return None;
        }
        let uid = Uid::from_raw(uid);
        // A user whom the user data base does not know has only the group of the file.
        let known = User::from_uid(uid).ok().flatten().and_then(|user| {
            let name = std::ffi::CString::new(user.name).ok()?;
            Some((user.gid, getgrouplist(&name, user.gid).ok()?))
        });
        let (gid, groups) = known.unwrap_or((Gid::from_raw(gid), Vec::new()));
        Some(Self {
            uid,
            gid,
            groups: groups.into(),
        })
    }

    /// Returns the owner's user ID.
    pub(super) fn uid(&self) -> u32 {
        self.uid.as_raw()
    }

    /// Runs `work` with the owner's rights to files. Only this thread has them; it must not start another thread, which
    /// would keep them.
    ///
    /// Errors: `Policy` if the thread cannot take the owner's rights (no CAP_SETUID or CAP_SETGID, an ID that the user
    /// namespace does not map).
    pub(super) fn act<T>(&self, work: impl FnOnce() -> T) -> Result<T> {
        // Read first, as only complete rights can be given back.
        let before = Rights::present().map_err(|e| self.refused("reading the rights of this thread", e))?;
        self.take(&before)?;
        let answer = work();
        drop(before);
        Ok(answer)
    }

    /// Takes the owner's rights. `before` gives them back when it is dropped, also after an error.
    fn take(&self, before: &Rights) -> Result<()> {
        if before.groups != *self.groups {
            set_groups(&self.groups).map_err(|e| self.refused("setgroups", e))?;
        }
        setfsgid(self.gid);
        setfsuid(self.uid);
        // Both calls return the previous ID, also if they fail, so the result shows only in the present IDs.
        if present_ids() != (self.uid, self.gid) {
            return Err(self.refused("setfsuid", rustix::io::Errno::PERM));
        }
        // The kernel removes these capabilities if the fsuid changes from 0, but not from another user.
        let sets = CapabilitySets {
            effective: before.capabilities.effective.difference(FILE_CAPABILITIES),
            ..before.capabilities
        };
        set_capabilities(None, sets).map_err(|e| self.refused("capset", e))
    }

    fn refused(&self, call: &str, errno: rustix::io::Errno) -> Error {
        Error::new(
            ErrorKind::Policy,
            format!(
                "the image belongs to user {}, and this process cannot take that user's rights to open the files that it \
                 names ({call}: {errno}); mount it as that user",
                self.uid
            ),
        )
    }
}

/// Returns whether the user namespace of this process has a user `uid`.
fn is_mapped_here(uid: u32) -> bool {
    // Without the map the owner counts as one whose rights have to be taken.
    fs::read_to_string("/proc/self/uid_map").map_or(true, |map| is_mapped(uid, &map))
}

/// Returns whether a user namespace with this `uid_map` has a user `uid`. Each line has the first ID inside, the first
/// outside, and their number.
fn is_mapped(uid: u32, map: &str) -> bool {
    map.lines().any(|line| {
        let numbers: Vec<u64> = line.split_whitespace().filter_map(|word| word.parse().ok()).collect();
        matches!(numbers[..], [first, _, count] if (first..first.saturating_add(count)).contains(&u64::from(uid)))
    })
}

/// Rights of this thread, which are given back on drop, also after a panic.
struct Rights {
    ids: (Uid, Gid),
    groups: Vec<Gid>,
    capabilities: CapabilitySets,
}

impl Rights {
    fn present() -> rustix::io::Result<Self> {
        let groups = nix::unistd::getgroups().map_err(|e| rustix::io::Errno::from_raw_os_error(e as i32))?;
        Ok(Self {
            ids: present_ids(),
            groups,
            capabilities: capabilities(None)?,
        })
    }
}

impl Drop for Rights {
    fn drop(&mut self) {
        setfsuid(self.ids.0);
        setfsgid(self.ids.1);
        let restored = set_capabilities(None, self.capabilities).and_then(|()| set_groups(&self.groups));
        // None of these calls asks for more than the thread had before. If one fails nevertheless, the thread has fewer
        // rights than before, never more.
        if let Err(e) = restored {
            tracing::error!("a thread did not get its rights back: {e}");
        }
    }
}

/// Returns the present fsuid and fsgid of this thread: a call with an ID that no user has changes nothing.
fn present_ids() -> (Uid, Gid) {
    (setfsuid(Uid::from_raw(u32::MAX)), setfsgid(Gid::from_raw(u32::MAX)))
}

/// Sets the supplementary groups of this thread. The C library's `setgroups` would change every thread of the process.
fn set_groups(groups: &[Gid]) -> rustix::io::Result<()> {
    let raw: Vec<_> = groups
        .iter()
        .map(|gid| rustix::fs::Gid::from_raw(gid.as_raw()))
        .collect();
    match set_thread_groups(&raw) {
        // A thread without CAP_SETGID can neither change its groups nor have changed them.
        Err(rustix::io::Errno::PERM) if nix::unistd::getgroups().is_ok_and(|now| now == groups) => Ok(()),
        done => done,
    }
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::io;
    use std::os::unix::fs::PermissionsExt;
    use std::path::PathBuf;

    use super::*;

    /// User that no user data base knows.
    const STRANGER: u32 = 54321;

    fn secret() -> (tempfile::TempDir, PathBuf) {
        let dir = tempfile::tempdir().unwrap();
        fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o755)).unwrap();
        let secret = dir.path().join("secret");
        fs::write(&secret, "x").unwrap();
        fs::set_permissions(&secret, fs::Permissions::from_mode(0o600)).unwrap();
        (dir, secret)
    }

    /// Runs a test in a thread of its own, so that a failure leaves no thread of the test runner with other rights.
    fn as_root(test: impl FnOnce() + Send + 'static) {
        if geteuid().is_root() {
            std::thread::spawn(test).join().unwrap();
        }
    }

    #[test]
    fn users_outside_of_a_user_namespace_are_not_mapped() {
        let whole = "         0          0 4294967295\n";
        assert!(is_mapped(0, whole) && is_mapped(65534, whole));
        let own = "         0       1000          1\n";
        assert!(is_mapped(0, own) && !is_mapped(65534, own) && !is_mapped(1000, own));
        let container = "0 1000 1\n1 100000 65535\n";
        assert!(is_mapped(65534, container) && is_mapped(65535, container) && !is_mapped(65536, container));
        assert!(!is_mapped(5, "") && !is_mapped(5, "0 18446744073709551615"));
    }

    #[test]
    fn the_owner_of_an_image_cannot_read_the_files_of_root() {
        as_root(|| {
            let (_dir, secret) = secret();
            let owner = Owner::of(STRANGER, STRANGER).unwrap();
            let before = (
                present_ids(),
                nix::unistd::getgroups().unwrap(),
                capabilities(None).unwrap(),
            );
            let opened = owner.act(|| File::open(&secret)).unwrap();
            assert_eq!(opened.unwrap_err().kind(), io::ErrorKind::PermissionDenied);
            let after = (
                present_ids(),
                nix::unistd::getgroups().unwrap(),
                capabilities(None).unwrap(),
            );
            assert_eq!(before, after);
            File::open(&secret).unwrap();
        });
    }

    #[test]
    fn other_threads_keep_their_rights() {
        as_root(|| {
            let (_dir, secret) = secret();
            let (ask, asked) = std::sync::mpsc::channel::<()>();
            let (tell, told) = std::sync::mpsc::channel();
            let other = std::thread::spawn(move || {
                asked.recv().unwrap();
                tell.send(File::open(&secret).is_ok()).unwrap();
            });
            let owner = Owner::of(STRANGER, STRANGER).unwrap();
            let answer = owner.act(|| {
                ask.send(()).unwrap();
                told.recv().unwrap()
            });
            assert!(answer.unwrap());
            other.join().unwrap();
        });
    }

    #[test]
    fn a_panic_gives_the_rights_back() {
        as_root(|| {
            let owner = Owner::of(STRANGER, STRANGER).unwrap();
            let before = present_ids();
            let panicked = std::panic::catch_unwind(|| owner.act(|| panic!("on purpose")));
            assert!(panicked.is_err());
            assert_eq!(present_ids(), before);
        });
    }

    #[test]
    fn a_user_with_a_capability_loses_it_for_names_inside_of_images() {
        as_root(|| {
            let (_dir, secret) = secret();
            let sets = CapabilitySets {
                inheritable: CapabilitySet::empty(),
                ..capabilities(None).unwrap()
            };
            setfsuid(Uid::from_raw(STRANGER));
            set_capabilities(None, sets).unwrap();
            File::open(&secret).unwrap();
            let owner = Owner::of(STRANGER, STRANGER).unwrap();
            assert!(owner.act(|| File::open(&secret)).unwrap().is_err());
            File::open(&secret).unwrap();
        });
    }

    #[test]
    fn the_files_of_root_need_no_other_rights() {
        assert!(Owner::of(0, 0).is_none());
    }
}
