//! Attributes of directories and disks, as `stat` shows them, and for how long the kernel may use them.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use fuser::{FileAttr, FileType, INodeNo};

use crate::config::MountOptions;
use crate::fuse::disk_file::DiskFile;
use crate::store::Permissions;
use crate::volume::Volume;

/// Block size that `stat` and `statfs` report.
pub(super) const BLOCK: u32 = 4096;

/// For how long the kernel may use names and attributes without asking again. A change of time or allocation by another
/// process that writes to the image becomes visible this much later.
pub(super) const TTL: Duration = Duration::from_secs(1);

/// Facts that the attributes of all files of a mount depend on.
#[derive(Debug)]
pub(super) struct StatRules {
    owner: (u32, u32),
    /// True if the user chose the group of the files (`gid=`).
    group_chosen: bool,
    umask: u16,
    mount_time: SystemTime,
    /// True if any disk can be written to.
    is_writable: bool,
}

impl StatRules {
    /// Creates the rules of a mount that begins now.
    pub(super) fn new(options: &MountOptions, is_writable: bool) -> Self {
        let user = (nix::unistd::getuid().as_raw(), nix::unistd::getgid().as_raw());
        Self {
            owner: (options.uid.unwrap_or(user.0), options.gid.unwrap_or(user.1)),
            group_chosen: options.gid.is_some(),
            umask: options.umask.unwrap_or(0) as u16 & 0o777,
            mount_time: SystemTime::now(),
            is_writable,
        }
    }

    /// Returns true if any disk of the mount can be written to.
    pub(super) fn is_writable(&self) -> bool {
        self.is_writable
    }

    /// Returns the attributes of a disk.
    pub(super) fn file(&self, ino: INodeNo, file: &DiskFile) -> FileAttr {
        let volume = file.volume();
        let perm = self.file_mode(&volume) & if file.writable { 0o777 } else { 0o555 };
        let time = self.image_time(&volume);
        file.attributes.apply(FileAttr {
            size: volume.len(),
            blocks: file.allocated().div_ceil(512),
            ..self.plain(ino, FileType::RegularFile, perm, time)
        })
    }

    /// Returns the attributes of a directory.
    pub(super) fn directory(&self, ino: INodeNo) -> FileAttr {
        // A writable directory lets the kernel forward a creation, so that the daemon can answer it with EPERM.
        let perm = if self.is_writable { 0o755 } else { 0o555 };
        FileAttr {
            nlink: 2,
            ..self.plain(ino, FileType::Directory, perm, self.mount_time)
        }
    }

    /// Returns the time of the last change of the image, or that of the mount if its source reports none.
    pub(super) fn image_time(&self, volume: &Volume) -> SystemTime {
        Some(volume.mtime_ns())
            .filter(|ns| *ns != 0)
            .map_or(self.mount_time, time_of)
    }

    /// Returns the time for which the kernel may use attributes of a disk. None where the number of blocks of a writable
    /// disk is less than its size: a page that becomes dirty in that time would not count.
    pub(super) fn ttl(&self, attr: &FileAttr) -> Duration {
        let fixed = !self.is_writable || attr.blocks >= attr.size / 512;
        if fixed { TTL } else { Duration::ZERO }
    }

    /// Returns the mode of a disk: other users than the owner of the mount get at most the access that they have to the
    /// image. A disk on a server has no mode.
    fn file_mode(&self, volume: &Volume) -> u16 {
        let Some(image) = Permissions::of(volume.files()) else {
            return 0o644;
        };
        // `gid=` gives the disk to that group on purpose, so its members count as the group of the image.
        let group = if self.group_chosen { image.gid } else { self.owner.1 };
        image.mode_for_group(group) as u16
    }

    fn plain(&self, ino: INodeNo, kind: FileType, perm: u16, time: SystemTime) -> FileAttr {
        FileAttr {
            ino,
            size: 0,
            blocks: 0,
            atime: time,
            mtime: time,
            ctime: time,
            crtime: time,
            kind,
            perm: perm & !self.umask,
            nlink: 1,
            uid: self.owner.0,
            gid: self.owner.1,
            rdev: 0,
            blksize: BLOCK,
            flags: 0,
        }
    }
}

/// Returns the time `ns` nanoseconds after (or, if negative, before) the epoch; the epoch itself if it is out of range.
fn time_of(ns: i128) -> SystemTime {
    let magnitude = Duration::from_nanos(u64::try_from(ns.unsigned_abs()).unwrap_or(0));
    let time = if ns >= 0 {
        UNIX_EPOCH.checked_add(magnitude)
    } else {
        UNIX_EPOCH.checked_sub(magnitude)
    };
    time.unwrap_or(UNIX_EPOCH)
}
