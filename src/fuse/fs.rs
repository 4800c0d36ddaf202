//! The file system: a directory with one raw file for each disk, or, over a plain file, that one raw file alone.
//!
//! It is thin. `tree.rs` knows which disk an inode is, `stat.rs` its attributes. `operations.rs` answers the kernel's
//! requests, `name_requests.rs` those about names, `open.rs` decides how an open is served, `kernel_view_node.rs` which of
//! its two inodes the name of a disk with a kernel view leads to, and `write.rs` has writes and flushes.
//!
//! FUSE_WRITEBACK_CACHE is never on: with it the kernel owns the size of the file, accepts writes beyond the end of the
//! disk, and only learns later that there is no space. FUSE_ATOMIC_O_TRUNC is not on either: an O_TRUNC then arrives as a
//! truncation of its own, which drops the kernel's pages (see `write.rs`).

mod operations;

use std::os::fd::OwnedFd;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use fuser::{Errno, FileAttr, INodeNo};

use crate::config::{DiskConfig, MountKind, MountOptions};
use crate::error::Result as CrateResult;
use crate::error_log::ErrorLog;
use crate::fuse::disk_file::{DiskFile, FileMaker};
use crate::fuse::export_names::{ExportNames, SharedNames};
use crate::fuse::kernel_view_builder::{Builder, PlannedView};
use crate::fuse::name_requests::NameRequests;
use crate::fuse::open_plan::Passthrough;
use crate::fuse::stat::StatRules;
use crate::fuse::tree::{Entry, Names, Tree};
use crate::store::StoredFile;
use crate::volume::loop_budget::LoopBudget;
use crate::volume::worker_pool::WorkerPool;
use crate::volume::{ServerExports, Volume};

/// Longest wait at the end for a thread that uses a disk. One that waits for a server that is gone takes longer.
const LAST_USERS: Duration = Duration::from_secs(3);

const NO_PASSTHROUGH: &str = "the kernel has no FUSE passthrough (Linux 6.9)";

/// The file system of a mount.
#[derive(Debug)]
pub struct DiskFs {
    mount_kind: MountKind,
    tree: Arc<Tree>,
    stat: Arc<StatRules>,
    names: NameRequests,
    passthrough: Passthrough,
    views: Builder,
    error_log: Arc<ErrorLog>,
    loops: Arc<LoopBudget>,
    /// True if the root has the xattr that names the daemon.
    has_xattr: bool,
}

/// The disks of a mount. They outlive the session, so that they can be closed after it.
#[derive(Debug)]
pub struct Disks(Arc<Tree>);

impl Disks {
    /// Flushes and closes every disk. An error does not keep the others from being closed. The session must have ended.
    ///
    /// Errors: the first one; each is logged.
    pub fn close(self) -> CrateResult<()> {
        let mut first = Ok(());
        let files = self.0.files();
        for file in &files {
            tracing::debug!("{}: {}", file.config.name.display(), file.volume().statistics());
        }
        // All of them, also after an error: the others must not stay unfinished because of one.
        for file in &files {
            first = first.and(file.close());
        }
        drop(files);
        if !self.wait_until_unused(LAST_USERS) {
            tracing::info!("a request or a count of a disk does not end: not waiting for it");
        }
        first
    }

    /// Waits until no other thread holds a disk. Returns false if one still does after `limit`.
    ///
    /// A thread of the pool answers a request, and drops its reference to the disk afterwards: an unmount may come between
    /// the two. The last reference ends the disk's server, logs out and unlocks. If a thread had it, the process could exit
    /// before that is done.
    fn wait_until_unused(&self, limit: Duration) -> bool {
        let until = Instant::now() + limit;
        let is_unused = || Arc::strong_count(&self.0) == 1 && self.0.files().iter().all(|file| file.is_unused());
        while !is_unused() {
            if Instant::now() >= until {
                return false;
            }
            thread::sleep(Duration::from_millis(1));
        }
        true
    }

    /// Returns the number of opens of all disks.
    pub(crate) fn open_files(&self) -> usize {
        self.0.files().iter().map(|file| file.open_files()).sum()
    }

    /// Returns the files that the disks consist of.
    pub fn files(&self) -> Vec<Arc<dyn StoredFile>> {
        self.0
            .files()
            .iter()
            .flat_map(|file| file.volume().files().to_vec())
            .collect()
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
    /// Creates the file system of open disks, each with its configuration, and of the exports of servers. `loops` is the
    /// number of event loops that will serve it.
    pub fn new(
        mount_kind: MountKind,
        disks: Vec<(DiskConfig, Volume)>,
        exports: Vec<ServerExports>,
        options: &MountOptions,
        loops: usize,
    ) -> Self {
        let (pool, loops) = (Arc::<WorkerPool>::default(), Arc::new(LoopBudget::new(loops)));
        let error_log = Arc::<ErrorLog>::default();
        let maker = FileMaker {
            mount_kind,
            loops: Arc::clone(&loops),
            pool: Arc::clone(&pool),
            error_log: Arc::clone(&error_log),
        };
        let files: Vec<_> = disks
            .into_iter()
            .map(|(config, volume)| maker.make(config, volume))
            .collect();
        let is_writable = files.iter().any(|file| file.writable) || exports.iter().any(ServerExports::is_writable);
        let shared = Arc::new(SharedNames::new(
            files.iter().map(|file| file.config.name.clone()).collect(),
        ));
        let more = exports
            .into_iter()
            .map(|exports| Box::new(ExportNames::new(exports, maker.clone(), Arc::clone(&shared))) as Box<dyn Names>);
        let stat = Arc::new(StatRules::new(options, is_writable));
        let tree = Arc::new(Tree::new(mount_kind, files, more.collect()));
        Self {
            mount_kind,
            names: NameRequests {
                tree: Arc::clone(&tree),
                stat: Arc::clone(&stat),
                error_log: Arc::clone(&error_log),
                threads: Arc::new(pool.add_disk()),
            },
            tree,
            stat,
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
        self.tree
            .fixed_files()
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
        Disks(Arc::clone(&self.tree))
    }

    /// Returns true if any disk can be written to.
    pub fn is_writable(&self) -> bool {
        self.stat.is_writable()
    }

    /// Returns a disk that must be written in order, if there is one.
    fn sequential_disk(&self) -> Option<&Arc<DiskFile>> {
        self.tree.fixed_files().find(|file| file.sequential_write_only())
    }

    /// Returns the errno for a change of names or of the directory, which are fixed.
    fn name_change_errno(&self) -> Errno {
        if self.is_writable() { Errno::EPERM } else { Errno::EROFS }
    }

    fn file(&self, ino: INodeNo) -> Result<Arc<DiskFile>, Errno> {
        match self.tree.entry(ino) {
            Some(Entry::File(_, file)) => Ok(file),
            Some(Entry::Directory(..)) => Err(Errno::EISDIR),
            None => Err(Errno::ENOENT),
        }
    }

    fn attr(&self, ino: INodeNo) -> Result<FileAttr, Errno> {
        match self.tree.entry(ino) {
            Some(Entry::File(ino, file)) => Ok(self.stat.file(ino, &file)),
            Some(Entry::Directory(ino, _)) => Ok(self.stat.directory(ino)),
            None => Err(Errno::ENOENT),
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

#[cfg(test)]
mod tests {
    use std::sync::mpsc::channel;

    use super::*;
    use crate::fuse::testfs::disk_file;
    use crate::test_disk::TestDisk;

    #[test]
    fn the_end_of_a_mount_waits_for_a_thread_that_still_holds_a_disk() {
        let file = disk_file("x", TestDisk::new(8));
        let used = file.volume();
        let disks = Disks(Arc::new(Tree::new(MountKind::Dir, vec![file], Vec::new())));
        assert!(!disks.wait_until_unused(Duration::ZERO));
        let (ended, end) = channel();
        thread::spawn(move || ended.send(disks.wait_until_unused(Duration::from_secs(3600))));
        assert!(end.recv_timeout(Duration::from_millis(50)).is_err());
        drop(used);
        assert!(end.recv_timeout(Duration::from_secs(60)).unwrap());
    }
}
