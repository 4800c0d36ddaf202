//! The attributes of a disk that can be set: they last as long as the mount.
//!
//! Programs that copy set mode, owner and times afterwards (`cp -p`, rsync), and take a refusal for a failed copy. None
//! of them has a place in an image, so they are kept here. Whether somebody may set them the kernel decides, where
//! others than the owner of the mount may look in.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::SystemTime;

use fuser::{FileAttr, TimeOrNow};

/// What was set, and when the content was changed by us.
#[derive(Debug, Default)]
pub(super) struct Attributes {
    set: Mutex<Set>,
    /// Content was changed since somebody looked.
    changed: AtomicBool,
}

#[derive(Debug, Default)]
struct Set {
    mode: Option<u16>,
    uid: Option<u32>,
    gid: Option<u32>,
    atime: Option<SystemTime>,
    mtime: Option<SystemTime>,
    /// When somebody looked first after a change.
    changed: Option<SystemTime>,
}

/// A wish to set some of them.
#[derive(Debug, Default)]
pub(super) struct Wish {
    pub(super) mode: Option<u32>,
    pub(super) uid: Option<u32>,
    pub(super) gid: Option<u32>,
    pub(super) atime: Option<TimeOrNow>,
    pub(super) mtime: Option<TimeOrNow>,
}

impl Attributes {
    /// Notes a change of the content: a time that was set before holds no longer. Costs next to nothing.
    pub(super) fn changed(&self) {
        self.changed.store(true, Ordering::Release);
    }

    /// Notes that the content may be changed without us: its own time is the right one from now on.
    pub(super) fn passed(&self) {
        self.settled().mtime = None;
    }

    /// Sets what is wished for.
    pub(super) fn set(&self, wish: &Wish) {
        let mut set = self.settled();
        // setuid and the like mean nothing on a disk
        set.mode = wish.mode.map(|mode| (mode & 0o777) as u16).or(set.mode);
        set.uid = wish.uid.or(set.uid);
        set.gid = wish.gid.or(set.gid);
        set.atime = wish.atime.map(time).or(set.atime);
        set.mtime = wish.mtime.map(time).or(set.mtime);
    }

    /// `attr` with what was set, and with a time of change not before the last one that is known of.
    pub(super) fn apply(&self, attr: FileAttr) -> FileAttr {
        let set = self.settled();
        let mtime = set
            .mtime
            .unwrap_or_else(|| attr.mtime.max(set.changed.unwrap_or(attr.mtime)));
        FileAttr {
            mtime,
            ctime: attr.ctime.max(set.changed.unwrap_or(attr.ctime)),
            atime: set.atime.unwrap_or(mtime),
            perm: set.mode.unwrap_or(attr.perm),
            uid: set.uid.unwrap_or(attr.uid),
            gid: set.gid.unwrap_or(attr.gid),
            ..attr
        }
    }

    /// What was set, without what a change has ended.
    fn settled(&self) -> MutexGuard<'_, Set> {
        let mut set = self.set.lock().unwrap_or_else(PoisonError::into_inner);
        if self.changed.swap(false, Ordering::AcqRel) {
            set.mtime = None;
            set.changed = Some(SystemTime::now());
        }
        set
    }
}

fn time(wish: TimeOrNow) -> SystemTime {
    match wish {
        TimeOrNow::SpecificTime(time) => time,
        TimeOrNow::Now => SystemTime::now(),
    }
}
