//! Attributes of a disk file that can be set. They last as long as the mount.
//!
//! Programs that copy (`cp -p`, rsync) set mode, owner and times afterwards, and report a failed copy if that is
//! refused. An image cannot store any of them, so they are kept in memory. The kernel decides which process may set
//! them, where users other than the owner of the mount have access.
//!
//! Order of the two members: a write only sets the flag, which costs no lock. The next access to the attributes takes
//! the lock and turns the flag into a time.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard};
use std::time::SystemTime;

use fuser::{FileAttr, TimeOrNow};

use crate::mutex::lock;

/// Attributes that were set, and the time of the last write through the daemon.
#[derive(Debug, Default)]
pub(super) struct Attributes {
    set: Mutex<SetAttributes>,
    /// The content was changed since the attributes were last accessed.
    changed: AtomicBool,
}

#[derive(Debug, Default)]
struct SetAttributes {
    mode: Option<u16>,
    uid: Option<u32>,
    gid: Option<u32>,
    atime: Option<SystemTime>,
    mtime: Option<SetTime>,
    /// Time at which the attributes were first accessed after a change, which stands for that of the change.
    changed: Option<SystemTime>,
}

/// Modification time that was set.
#[derive(Debug, Clone, Copy)]
struct SetTime {
    time: SystemTime,
    /// The image's own time when it was set, if the kernel may write to the image without the daemon: it then ends as
    /// soon as the image's time moves.
    image: Option<SystemTime>,
}

impl SetTime {
    /// Returns the time unless the kernel has written since it was set.
    fn current(self, image: SystemTime) -> Option<SystemTime> {
        self.image.is_none_or(|then| then == image).then_some(self.time)
    }
}

/// The attributes of a setattr request.
#[derive(Debug, Default)]
pub(super) struct SetRequest {
    pub(super) mode: Option<u32>,
    pub(super) uid: Option<u32>,
    pub(super) gid: Option<u32>,
    pub(super) atime: Option<TimeOrNow>,
    pub(super) mtime: Option<TimeOrNow>,
}

impl Attributes {
    /// Records a change of the content, which ends a modification time that was set before. One atomic store.
    pub(super) fn changed(&self) {
        self.changed.store(true, Ordering::Release);
    }

    /// Records that the kernel may change the content without the daemon: from now on the image's own time counts.
    pub(super) fn passed(&self) {
        self.current().mtime = None;
    }

    /// Sets the attributes that the request names. `image` is the image's own time, if the kernel may write to the image
    /// without the daemon.
    pub(super) fn set(&self, request: &SetRequest, image: Option<SystemTime>) {
        let mut set = self.current();
        // Setuid, setgid and sticky mean nothing on a disk.
        set.mode = request.mode.map(|mode| (mode & 0o777) as u16).or(set.mode);
        set.uid = request.uid.or(set.uid);
        set.gid = request.gid.or(set.gid);
        set.atime = request.atime.map(time).or(set.atime);
        let mtime = request.mtime.map(time).map(|time| SetTime { time, image });
        set.mtime = mtime.or(set.mtime);
    }

    /// Returns `attr` with the attributes that were set, and with modification and change times not before the last
    /// known change.
    pub(super) fn apply(&self, attr: FileAttr) -> FileAttr {
        let set = self.current();
        let mtime = set
            .mtime
            .and_then(|mtime| mtime.current(attr.mtime))
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

    /// Locks the attributes after applying a recorded change of the content.
    fn current(&self) -> MutexGuard<'_, SetAttributes> {
        let mut set = lock(&self.set);
        // Under the lock, so that a change never ends a time that was set after it.
        if self.changed.swap(false, Ordering::AcqRel) {
            set.mtime = None;
            set.changed = Some(SystemTime::now());
        }
        set
    }
}

fn time(value: TimeOrNow) -> SystemTime {
    match value {
        TimeOrNow::SpecificTime(time) => time,
        TimeOrNow::Now => SystemTime::now(),
    }
}
