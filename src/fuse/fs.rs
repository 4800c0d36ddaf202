//! The file system: a directory with one raw file for each disk, or, over a plain file, that one raw file alone.
//!
//! It is thin. Inodes never change, so there is no inode table: the root is 1, disk `i` is `2 + i`; over a file the
//! root is the disk. `operations.rs` answers the kernel's requests. `disk_file.rs` decides how an open is served,
//! `kernel_view_node.rs` which of its two inodes the name of a disk with a kernel view leads to, and `write.rs` has
//! writes and flushes.
//!
//! FUSE_WRITEBACK_CACHE is never on: with it the kernel owns the size of the file, accepts writes beyond the end of the
//! disk, and only learns later that there is no space. FUSE_ATOMIC_O_TRUNC is not on either: an O_TRUNC then arrives as a
//! truncation of its own, which drops the kernel's pages (see `write.rs`).

mod operations;

use std::os::fd::OwnedFd;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use fuser::{Errno, FileAttr, FileType, INodeNo};

use crate::config::{DiskConfig, MountKind, MountOptions};
use crate::error::Result as CrateResult;
use crate::error_log::ErrorLog;
use crate::fuse::disk_file::DiskFile;
use crate::fuse::kernel_view_builder::{Builder, PlannedView};
use crate::fuse::kernel_view_node;
use crate::fuse::open_plan::Passthrough;
use crate::store::Permissions;
use crate::store::StoredFile;
use crate::volume::loop_budget::LoopBudget;
use crate::volume::worker_pool::WorkerPool;
use crate::volume::{ServingThreads, Volume};

/// Block size that `stat` and `statfs` report.
const BLOCK: u32 = 4096;

const NO_PASSTHROUGH: &str = "the kernel has no FUSE passthrough (Linux 6.9)";

/// For how long the kernel may use names and attributes without asking again. A change of time or allocation by another
/// process that writes to the image becomes visible this much later.
const TTL: Duration = Duration::from_secs(1);

const ROOT: INodeNo = INodeNo::ROOT;
const FIRST_DISK: u64 = 2;

/// The file system of a mount.
#[derive(Debug)]
pub struct DiskFs {
    mount_kind: MountKind,
    files: Arc<[Arc<DiskFile>]>,
    owner: (u32, u32),
    /// True if the user chose the group of the files (`gid=`).
    group_chosen: bool,
    umask: u16,
    mount_time: SystemTime,
    passthrough: Passthrough,
    views: Builder,
    error_log: Arc<ErrorLog>,
    loops: Arc<LoopBudget>,
    /// True if the root has the xattr that names the daemon.
    has_xattr: bool,
}

/// The disks of a mount. They outlive the session, so that they can be closed after it.
#[derive(Debug, Clone)]
pub struct Disks(Arc<[Arc<DiskFile>]>);

impl Disks {
    /// Flushes and closes every disk. An error does not keep the others from being closed.
    ///
    /// Errors: the first one; each is logged.
    pub fn close(&self) -> CrateResult<()> {
        let mut first = Ok(());
        for file in self.0.iter() {
            tracing::debug!("{}: {}", file.config.name.display(), file.volume().statistics());
        }
        for file in self.0.iter().filter(|file| file.writable) {
            if let Err(e) = file.volume().close() {
                let e = e.within(format!("{}: closing the disk", file.config.name.display()));
                tracing::error!("{e}");
                first = first.and(Err(e));
            }
        }
        first
    }

    /// Returns the number of opens of all disks.
    pub fn open_files(&self) -> usize {
        self.0.iter().map(|file| file.open_files()).sum()
    }

    /// Returns the files that the disks consist of.
    pub fn files(&self) -> Vec<Arc<dyn StoredFile>> {
        self.0.iter().flat_map(|file| file.volume().files().to_vec()).collect()
    }
}

/// Receives the FUSE device once the session has it.
#[derive(Debug)]
pub struct Requests(Arc<LoopBudget>);

impl Requests {
    /// Sets the device that requests come from: a duplicate of the session's descriptor.
    pub fn from(&self, device: OwnedFd) {
        self.0.set_device(device);
    }
}

impl DiskFs {
    /// Creates the file system of open disks, each with its configuration. `loops` is the number of event loops that
    /// will serve it.
    pub fn new(mount_kind: MountKind, disks: Vec<(DiskConfig, Volume)>, options: &MountOptions, loops: usize) -> Self {
        let pool = Arc::new(WorkerPool::default());
        let (loops, error_log) = (Arc::new(LoopBudget::new(loops)), Arc::<ErrorLog>::default());
        let files = disks.into_iter().map(|(config, volume)| {
            let threads = ServingThreads::of_mount(&loops, &pool);
            Arc::new(DiskFile::new(
                config,
                volume,
                mount_kind,
                threads,
                Arc::clone(&error_log),
            ))
        });
        let user = (nix::unistd::getuid().as_raw(), nix::unistd::getgid().as_raw());
        Self {
            mount_kind,
            files: files.collect(),
            owner: (options.uid.unwrap_or(user.0), options.gid.unwrap_or(user.1)),
            group_chosen: options.gid.is_some(),
            umask: options.umask.unwrap_or(0) as u16 & 0o777,
            mount_time: SystemTime::now(),
            passthrough: Err(NO_PASSTHROUGH),
            views: Builder::default(),
            error_log,
            loops,
            has_xattr: false,
        }
    }

    /// Builds the required kernel views before the mount is ready; the others are built once it serves requests.
    ///
    /// Errors: the reason why a disk that must have a view has none.
    pub fn make_required_views(&mut self) -> CrateResult<()> {
        let disks = self.planned_views();
        self.views.required(&disks, self.mount_kind)
    }

    fn planned_views(&self) -> Vec<PlannedView> {
        self.files
            .iter()
            .map(|file| (Arc::clone(&file.view), file.volume()))
            .collect()
    }

    /// Starts to build the view of a disk on a server once the disk cache has all of its files. Opens that come after the
    /// view is ready use it.
    fn build_view_of_cached(&self, file: &DiskFile) {
        let volume = file.volume();
        if file.view.becomes_buildable(&volume) {
            self.views
                .start(vec![(Arc::clone(&file.view), volume)], self.passthrough);
        }
    }

    /// Returns the log of failed requests.
    pub fn error_log(&self) -> Arc<ErrorLog> {
        Arc::clone(&self.error_log)
    }

    /// Returns the receiver of the FUSE device.
    pub fn requests(&self) -> Requests {
        Requests(Arc::clone(&self.loops))
    }

    /// Returns the disks, which outlive the session.
    pub fn disks(&self) -> Disks {
        Disks(Arc::clone(&self.files))
    }

    /// Returns true if any disk can be written to.
    pub fn is_writable(&self) -> bool {
        self.files.iter().any(|file| file.writable)
    }

    /// Returns a disk that must be written in order, if there is one.
    fn sequential_disk(&self) -> Option<&Arc<DiskFile>> {
        self.files.iter().find(|file| file.sequential_write_only())
    }

    /// Returns the errno for a change of names or of the directory, which are fixed.
    fn name_change_errno(&self) -> Errno {
        if self.is_writable() { Errno::EPERM } else { Errno::EROFS }
    }

    fn file(&self, ino: INodeNo) -> Result<&Arc<DiskFile>, Errno> {
        let index = match (self.mount_kind, kernel_view_node::disk_inode_of(ino)) {
            (MountKind::File, ROOT) => Some(0),
            (MountKind::File, _) => None,
            (MountKind::Dir, INodeNo(n)) => n.checked_sub(FIRST_DISK),
        };
        let index = index.and_then(|i| usize::try_from(i).ok());
        index
            .and_then(|i| self.files.get(i))
            .ok_or(if ino == ROOT { Errno::EISDIR } else { Errno::ENOENT })
    }

    fn attr(&self, ino: INodeNo) -> Result<FileAttr, Errno> {
        match self.file(ino) {
            Ok(file) => Ok(self.file_attr(kernel_view_node::disk_inode_of(ino), file)),
            Err(_) if ino == ROOT => Ok(self.directory_attr()),
            Err(e) => Err(e),
        }
    }

    fn file_attr(&self, ino: INodeNo, file: &DiskFile) -> FileAttr {
        let volume = file.volume();
        let perm = self.file_mode(&volume) & if file.writable { 0o777 } else { 0o555 };
        let time = self.image_time(&volume);
        file.attributes.apply(FileAttr {
            size: volume.len(),
            blocks: file.allocated().div_ceil(512),
            ..self.plain_attr(ino, FileType::RegularFile, perm, time)
        })
    }

    /// Returns the time of the last change of the image, or that of the mount if its source reports none.
    fn image_time(&self, volume: &Volume) -> SystemTime {
        Some(volume.mtime_ns())
            .filter(|ns| *ns != 0)
            .map_or(self.mount_time, time_of)
    }

    /// Returns the time for which the kernel may use attributes of a disk. None where the number of blocks of a writable
    /// disk is less than its size: a page that becomes dirty in that time would not count.
    fn attr_ttl(&self, attr: &FileAttr) -> Duration {
        let fixed = !self.is_writable() || attr.blocks >= attr.size / 512;
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

    fn directory_attr(&self) -> FileAttr {
        // A writable directory lets the kernel forward a creation, so that the daemon can answer it with EPERM.
        let perm = if self.is_writable() { 0o755 } else { 0o555 };
        FileAttr {
            nlink: 2,
            ..self.plain_attr(ROOT, FileType::Directory, perm, self.mount_time)
        }
    }

    fn plain_attr(&self, ino: INodeNo, kind: FileType, perm: u16, time: SystemTime) -> FileAttr {
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

/// Runs the handler of a request and catches its panic.
///
/// The dropped reply answers EIO. Without this the panic would end the event loop's thread, and the kernel would wait
/// forever for the requests that the loop had taken.
fn catch_panic(handler: impl FnOnce()) {
    if catch_unwind(AssertUnwindSafe(handler)).is_err() {
        tracing::error!("request handler panicked; the request is answered with EIO");
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
