//! One disk among the files of a mount: its content, its counts, its reads.
//!
//! `open.rs` has its opens, `write.rs` its writes. A disk that is not one flat file may have a second inode, which the
//! kernel reads without the daemon: see `kernel_view_node.rs`.
//!
//! Lock order: `opens` before `volume`. Neither is held while an image is opened.

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, RwLock};

use fuser::{Errno, FileHandle, OpenFlags, ReplyData, ReplyLseek};

use crate::block::{ReadCompletion, SECTOR};
use crate::config::{DiskConfig, MountKind};
use crate::error::{Error, ErrorKind, Result};
use crate::error_log::ErrorLog;
use crate::fuse::attributes::Attributes;
use crate::fuse::errno::errno;
use crate::fuse::kernel_view_node::KernelViewNode;
use crate::fuse::open_plan::OpenHandle;
use crate::fuse::open_state::OpenState;
use crate::mutex::{lock, read_lock, write_lock};
use crate::volume::loop_budget::LoopBudget;
use crate::volume::worker_pool::WorkerPool;
use crate::volume::{self, Request, Seek, SeekCompletion, ServingThreads, Volume};

/// One disk among the files of a mount.
#[derive(Debug)]
pub(super) struct DiskFile {
    pub(super) config: DiskConfig,
    pub(super) attributes: Attributes,
    /// Log of failed requests, shared by the mount.
    pub(super) error_log: Arc<ErrorLog>,
    /// Threads that serve the disk, whichever volume it has.
    threads: ServingThreads,
    /// True if the disk can be written to. Does not change while the mount exists.
    pub(super) writable: bool,
    /// Number of opens of both inodes.
    pub(super) open_files: AtomicUsize,
    /// Number of opens for reading and writing that are not PASSTHROUGH. The kernel may hold dirty pages of their
    /// mappings, of which it tells the daemon nothing.
    pub(super) dirtying_opens: AtomicUsize,
    /// Number of opens for writing that are PASSTHROUGH: the kernel writes without telling the daemon.
    pub(super) passthrough_writers: AtomicUsize,
    /// The disk's content. Replaced when the image files were modified, since their tables must be read again.
    ///
    /// Lock order: after `opens`, never before it.
    volume: RwLock<Arc<Volume>>,
    pub(super) opens: Mutex<OpenState>,
    /// The second inode, which the kernel reads without the daemon.
    pub(super) view: Arc<KernelViewNode>,
    /// False for a disk whose data is not to be counted before its first open: a listing of thousands of exports would connect
    /// to each.
    counts_data: AtomicBool,
    /// True once the log has the reason why this disk is not served by passthrough.
    pub(super) logged_served: AtomicBool,
}

/// Makes the disk files of a mount.
#[derive(Debug, Clone)]
pub(super) struct FileMaker {
    pub(super) mount_kind: MountKind,
    pub(super) loops: Arc<LoopBudget>,
    pub(super) pool: Arc<WorkerPool>,
    pub(super) error_log: Arc<ErrorLog>,
}

impl FileMaker {
    /// Creates the file of an open disk, which gets a share of the mount's threads.
    pub(super) fn make(&self, config: DiskConfig, volume: Volume) -> Arc<DiskFile> {
        let threads = ServingThreads::of_mount(&self.loops, &self.pool);
        let log = Arc::clone(&self.error_log);
        Arc::new(DiskFile::new(config, volume, self.mount_kind, threads, log))
    }
}

impl DiskFile {
    /// Creates the file of an open disk.
    pub(super) fn new(
        config: DiskConfig,
        volume: Volume,
        mount_kind: MountKind,
        threads: ServingThreads,
        error_log: Arc<ErrorLog>,
    ) -> Self {
        let writable = volume.writable();
        let volume = volume.served_by(threads.clone());
        Self {
            view: Arc::new(KernelViewNode::new(&config, &volume, mount_kind)),
            // A volume that is reopened later must not become writable when this one is not.
            config: DiskConfig {
                read_only: !writable,
                ..config
            },
            attributes: Attributes::default(),
            error_log,
            threads,
            writable,
            open_files: AtomicUsize::new(0),
            dirtying_opens: AtomicUsize::new(0),
            passthrough_writers: AtomicUsize::new(0),
            volume: RwLock::new(Arc::new(volume)),
            opens: Mutex::default(),
            counts_data: AtomicBool::new(true),
            logged_served: AtomicBool::new(false),
        }
    }

    /// Returns true if the disk accepts sequential writes only.
    pub(super) fn sequential_write_only(&self) -> bool {
        self.volume()
            .disk()
            .writer()
            .is_some_and(|disk| disk.sequential_write_only())
    }

    /// Returns the current volume.
    pub(super) fn volume(&self) -> Arc<Volume> {
        Arc::clone(&read_lock(&self.volume))
    }

    /// Reopens the volume if the image files were modified.
    ///
    /// Errors: the image cannot be opened any more, or its size changed, which the kernel could not follow.
    pub(super) fn refresh(&self) -> Result<()> {
        let old = self.volume();
        if old.is_unchanged() {
            return Ok(());
        }
        tracing::info!(
            "{}: the image was modified by another process: reopening it",
            self.config.name.display()
        );
        // No lock is held here: an open of one disk must not wait for the image files of another open. Where several
        // opens find the modification at once, the first volume that gets installed stays.
        let new = volume::reopen(&self.config, &old)?.served_by(self.threads.clone());
        if new.len() != old.len() {
            return Err(Error::new(
                ErrorKind::Corrupt,
                format!(
                    "{}: the size changed from {} to {} bytes; unmount, then mount again",
                    self.config.name.display(),
                    old.len(),
                    new.len()
                ),
            ));
        }
        // Both changes under the lock of `opens`: an open that sees the new volume also sees that it replaced another
        // one.
        let mut opens = lock(&self.opens);
        let mut volume = write_lock(&self.volume);
        if Arc::ptr_eq(&volume, &old) {
            *volume = Arc::new(new);
            opens.volume_replaced();
        }
        Ok(())
    }

    /// Returns true if a modification of the content by another process would be noticed, or is excluded by a lock.
    pub(super) fn detects_modification(&self) -> bool {
        // The files of a volume that is written to are not compared with what they were at the open.
        let excludes_writers = || self.config.source.settings().excludes_writers();
        self.volume().detects_modification() && (!self.writable || excludes_writers())
    }

    /// Sets if the data is counted for `st_blocks`, which may connect to a server.
    pub(super) fn set_counts_data(&self, counts: bool) {
        self.counts_data.store(counts, Ordering::Relaxed);
    }

    /// Returns true if the kernel may hold data of the disk that the daemon has not been told of.
    fn may_have_dirty_pages(&self) -> bool {
        self.dirtying_opens.load(Ordering::Acquire) > 0
    }

    /// Returns the number of bytes that are data: the whole disk where that is not known exactly. A number that is too
    /// small makes programs skip data.
    pub(super) fn allocated(&self) -> u64 {
        let volume = self.volume();
        let unseen = self.may_have_dirty_pages() || self.passthrough_writers.load(Ordering::Acquire) > 0;
        if !self.counts_data.load(Ordering::Relaxed) {
            return volume.len();
        }
        let counted = volume.allocated().filter(|_| !unseen);
        counted.unwrap_or(volume.len())
    }

    /// Answers a search for data or a hole. While pages may be dirty everything is data: a copy that skipped their holes
    /// would lose what a read shows.
    pub(super) fn seek(self: &Arc<Self>, offset: u64, target: Seek, reply: ReplyLseek) {
        let volume = self.volume();
        let file = Arc::clone(self);
        let done: SeekCompletion = Box::new(move |found| match found {
            Ok(Some(at)) => reply.offset(at as i64),
            Ok(None) => reply.error(Errno::ENXIO),
            Err(e) => {
                reply.error(errno(&e));
                file.note(e, || format!("seeking data or a hole from {offset}"));
            }
        });
        if !self.may_have_dirty_pages() {
            return volume.submit(Request::Seek { offset, target, done });
        }
        let at = if target == Seek::Data { offset } else { volume.len() };
        done(Ok((offset < volume.len()).then_some(at)));
    }

    /// Flushes and closes the disk, if it can be written to. Errors are logged, too.
    pub(super) fn close(&self) -> Result<()> {
        if !self.writable {
            return Ok(());
        }
        self.volume().close().map_err(|e| {
            let e = e.within(format!("{}: closing the disk", self.config.name.display()));
            tracing::error!("{e}");
            e
        })
    }

    /// Returns true if no thread that has answered a request of the disk still holds it, nor one that counts its data.
    pub(super) fn is_unused(&self) -> bool {
        let opens = lock(&self.opens);
        let volume = read_lock(&self.volume);
        let kept = usize::from(opens.keeps(&volume)) + usize::from(self.view.keeps(&volume));
        volume.is_unused(1 + kept)
    }

    /// Returns the number of opens.
    pub(super) fn open_files(&self) -> usize {
        self.open_files.load(Ordering::Acquire)
    }

    /// Answers a read.
    pub(super) fn read(
        self: &Arc<Self>,
        handle: FileHandle,
        offset: u64,
        size: u32,
        flags: OpenFlags,
        reply: ReplyData,
    ) {
        if !is_aligned(handle, flags, offset, size as usize) {
            return reply.error(Errno::EINVAL);
        }
        let file = Arc::clone(self);
        let done: ReadCompletion = Box::new(move |read| match read {
            Ok(bytes) => reply.data(bytes),
            Err(e) => {
                reply.error(errno(&e));
                file.note(e, || format!("{size} bytes at {offset}"));
            }
        });
        let len = size as usize;
        self.volume().submit(Request::Read { offset, len, done });
    }

    /// Logs the failure of a request, which `what` names.
    pub(super) fn note(&self, e: Error, what: impl FnOnce() -> String) {
        self.error_log
            .note(e.within(format!("{}: {}", self.config.name.display(), what())));
    }
}

/// Returns true unless the open is for writing with O_DIRECT and the request is not whole sectors, as on a block
/// device.
///
/// Programs find the alignment rule of a file by trying. Some (qemu) take a file without such a rule for one of whole
/// pages, and would write the last page beyond the end of the disk.
pub(super) fn is_aligned(handle: FileHandle, flags: OpenFlags, offset: u64, len: usize) -> bool {
    !OpenHandle::from(handle).writes || flags.0 & libc::O_DIRECT == 0 || (offset | len as u64).is_multiple_of(SECTOR)
}
