//! The file system: a directory with one raw file for each disk, or, over a plain file, that one raw file alone.
//!
//! It is thin. Inodes never change, so there is no table to keep: the root is 1, disk `i` is `2 + i`; over a file
//! the root is the disk. The kernel's requests are answered in `answers.rs`. How an open is served is decided in
//! `file.rs`, which of its two nodes a disk with a kernel view is just now in `view.rs`, what changes a disk is in
//! `change.rs`.
//!
//! FUSE_WRITEBACK_CACHE is for a whole mount and excludes passthrough. With it the kernel takes writes behind the end of
//! a disk, too, and only learns later that there is no room; so it is on only where it was asked for.

mod operations;

use std::os::fd::OwnedFd;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use fuser::{Errno, FileAttr, FileType, INodeNo};

use crate::config::{DiskConfig, MountKind, MountOptions, PageCache};
use crate::error::Result as Done;
use crate::error_log::ErrorLog;
use crate::fuse::disk_file::{DiskFile, Passthrough};
use crate::fuse::kernel_view_node;
use crate::fuse::loop_budget::LoopBudget;
use crate::fuse::write::RequestContext;
use crate::volume::Volume;

/// Block size in `stat` and `statfs`.
const BLOCK: u32 = 4096;

const NO_PASSTHROUGH: &str = "the kernel has no FUSE passthrough (Linux 6.9)";

const ROOT: INodeNo = INodeNo::ROOT;
const FIRST_DISK: u64 = 2;

/// The file system of a mount.
#[derive(Debug)]
pub struct DiskFs {
    shape: MountKind,
    files: Arc<[DiskFile]>,
    owner: (u32, u32),
    umask: u16,
    mounted: SystemTime,
    passthrough: Passthrough,
    views: kernel_view_node::Builder,
    error_log: Arc<ErrorLog>,
    loops: Arc<LoopBudget>,
}

/// The disks of a mount, for its end.
#[derive(Debug, Clone)]
pub struct Disks(Arc<[DiskFile]>);

impl Disks {
    /// Makes everything durable that was written, and closes every disk. All are, whatever becomes of one; the first
    /// error, after each was logged.
    pub fn close(&self) -> Done<()> {
        let mut first = Ok(());
        for file in self.0.iter().filter(|file| file.writable) {
            if let Err(e) = file.volume().close() {
                let e = e.within(format!("{}: not closed properly", file.config.name.display()));
                tracing::error!("{e}");
                first = first.and(Err(e));
            }
        }
        first
    }
}

/// What wants to know where requests come from.
#[derive(Debug)]
pub struct Requests(Arc<LoopBudget>);

impl Requests {
    /// The kernel's device, a copy of that of the session.
    pub fn from(&self, device: OwnedFd) {
        self.0.begin(device);
    }
}

impl DiskFs {
    /// A file system of open disks, each with its configuration, which is to be served by so many event loops.
    pub fn new(shape: MountKind, disks: Vec<(DiskConfig, Volume)>, options: &MountOptions, loops: usize) -> Self {
        let files = disks
            .into_iter()
            .enumerate()
            .map(|(i, (config, volume))| DiskFile::new(i, config, volume, shape));
        let user = (nix::unistd::getuid().as_raw(), nix::unistd::getgid().as_raw());
        Self {
            shape,
            files: files.collect(),
            owner: (options.uid.unwrap_or(user.0), options.gid.unwrap_or(user.1)),
            umask: options.umask.unwrap_or(0) as u16 & 0o777,
            mounted: SystemTime::now(),
            passthrough: Err(NO_PASSTHROUGH),
            views: kernel_view_node::Builder::default(),
            error_log: Arc::default(),
            loops: Arc::new(LoopBudget::new(loops)),
        }
    }

    /// Makes the kernel views that are required; the others come behind the mount. Errors: why a disk can't have one.
    pub fn make_required_views(&mut self) -> Done<()> {
        let disks = self.views_wanted();
        self.views.required(&disks, self.shape)
    }

    fn views_wanted(&self) -> Vec<kernel_view_node::Wanted> {
        self.files.iter().map(|n| (Arc::clone(&n.view), n.volume())).collect()
    }

    /// Where failed requests are noted.
    pub fn error_log(&self) -> Arc<ErrorLog> {
        Arc::clone(&self.error_log)
    }

    /// To be told where requests come from.
    pub fn requests(&self) -> Requests {
        Requests(Arc::clone(&self.loops))
    }

    /// The disks, which outlive the session.
    pub fn disks(&self) -> Disks {
        Disks(Arc::clone(&self.files))
    }

    /// Whether any disk can be written to.
    pub fn is_writable(&self) -> bool {
        self.files.iter().any(|file| file.writable)
    }

    /// Whether the kernel is to keep what is written for a while: some disk asks for it, and none that the kernel would
    /// have to keep writes of forbids it.
    fn wants_writeback(&self) -> bool {
        let asks = |cache| {
            self.files
                .iter()
                .any(|file| file.writable && file.config.cache == Some(cache))
        };
        if asks(PageCache::WriteBack) && asks(PageCache::WriteThrough) {
            tracing::warn!(
                "cache=writeback holds for a whole mount, and another disk has cache=writethrough: so have all"
            );
            return false;
        }
        if let Some(stream) = self.stream().filter(|_| asks(PageCache::WriteBack)) {
            let name = stream.config.name.display();
            tracing::warn!(
                "cache=writeback holds for a whole mount, and {name} has to be written in order: so it is off"
            );
            return false;
        }
        asks(PageCache::WriteBack)
    }

    /// A disk that has to be written in order.
    fn stream(&self) -> Option<&DiskFile> {
        self.files.iter().find(|file| file.in_order())
    }

    fn context(&self) -> RequestContext<'_> {
        RequestContext {
            error_log: &self.error_log,
            loops: &self.loops,
            files: &self.files,
        }
    }

    /// Answers a request that may have to wait for the disk: here, or where that is behind a network, by its own threads.
    fn run_blocking(&self, ino: INodeNo, answer: Waiting) {
        // Without a node the answer is dropped, which is an I/O error: the kernel knows no such inode.
        let Ok(file) = self.file(ino) else { return };
        if !file.volume().is_remote() {
            return guarded(|| answer(file, &self.error_log));
        }
        let (later, index) = (self.context().later(), file.index);
        file.pool.run(Box::new(move || {
            if let Some(file) = later.file(index) {
                answer(file, later.context().error_log);
            }
        }));
    }

    /// What cannot be done to names: they are fixed.
    fn fixed(&self) -> Errno {
        if self.is_writable() { Errno::EPERM } else { Errno::EROFS }
    }

    fn file(&self, ino: INodeNo) -> Result<&DiskFile, Errno> {
        let index = match (self.shape, kernel_view_node::disk_of(ino)) {
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
            Ok(file) => Ok(self.file_attr(kernel_view_node::disk_of(ino), file)),
            Err(_) if ino == ROOT => Ok(self.directory_attr()),
            Err(e) => Err(e),
        }
    }

    fn file_attr(&self, ino: INodeNo, file: &DiskFile) -> FileAttr {
        let volume = file.volume();
        let perm = if file.writable { 0o644 } else { 0o444 };
        // what has no files does not tell its age
        let time = Some(volume.mtime_ns())
            .filter(|ns| *ns != 0)
            .map_or(self.mounted, time_of);
        file.attributes.apply(FileAttr {
            size: volume.len(),
            blocks: volume.allocated().div_ceil(512),
            ..self.plain_attr(ino, FileType::RegularFile, perm, time)
        })
    }

    fn directory_attr(&self) -> FileAttr {
        // who makes a file in it shall hear from us that this can't be
        let perm = if self.is_writable() { 0o755 } else { 0o555 };
        FileAttr {
            nlink: 2,
            ..self.plain_attr(ROOT, FileType::Directory, perm, self.mounted)
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

/// The answer to a request that may have to wait for its disk.
type Waiting = Box<dyn FnOnce(&DiskFile, &ErrorLog) + Send>;

/// Does what answers a request. A panic is an I/O error of this request (its reply, dropped, says so) and not the
/// end of the thread, behind which the kernel would wait for ever.
fn guarded(what: impl FnOnce()) {
    if catch_unwind(AssertUnwindSafe(what)).is_err() {
        tracing::error!("a request was given up after a panic");
    }
}

fn time_of(ns: i128) -> SystemTime {
    let magnitude = Duration::from_nanos(u64::try_from(ns.unsigned_abs()).unwrap_or(0));
    let time = if ns >= 0 {
        UNIX_EPOCH.checked_add(magnitude)
    } else {
        UNIX_EPOCH.checked_sub(magnitude)
    };
    time.unwrap_or(UNIX_EPOCH)
}
