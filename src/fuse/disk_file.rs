//! One disk among the files of a mount, and the one place that decides how an open of it is served.
//!
//! ```text
//!   open ─► permitted? ─► image files modified? ─► reopen the volume (never one that this process writes to)
//!     ├─ cache=none                     DIRECT       every request reaches the daemon
//!     ├─ one flat file, root, 6.9+      PASSTHROUGH  the kernel reads and writes the backing file itself
//!     ├─ O_DIRECT, or only for writing  DIRECT       no page would be read again
//!     └─ else                           CACHED       the kernel keeps pages of the daemon's answers
//! ```
//! A disk that is not one flat file may have a second inode, which the kernel reads without the daemon: see
//! `kernel_view_node.rs`.
//!
//! The kernel has an inode in one mode at a time, so PASSTHROUGH and CACHED exclude each other: the first open decides.
//! DIRECT goes with both.
//!
//! The kernel writes to a backing file without knowing where the disk ends. An open only for writing (`cp`, `dd`, the
//! `>` of a shell), which is how data beyond the end usually gets written, or for appending, is therefore PASSTHROUGH
//! with `FOPEN_DIRECT_IO`: its requests reach the daemon all the same. Any other write beyond the end is truncated by
//! the next flush, which reports it as an error.
//!
//! Lock order: `opens` before `volume`. Neither is held while an image is opened.

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError, RwLock};
use std::time::{Duration, Instant};

use fuser::{BackingId, Errno, FileHandle, FopenFlags, OpenAccMode, OpenFlags, ReplyData, ReplyLseek, ReplyOpen};

use crate::block::{ReadCompletion, SECTOR};
use crate::config::{DiskConfig, MountKind, PageCache};
use crate::error::{Error, ErrorKind, Result};
use crate::error_log::ErrorLog;
use crate::fuse::attributes::Attributes;
use crate::fuse::errno::errno;
use crate::fuse::kernel_view_node::KernelViewNode;
use crate::volume::{self, Request, Seek, SeekCompletion, ServingThreads, Volume};

/// `Ok` if the kernel accepts a backing file for FUSE passthrough, otherwise the reason why not.
pub(super) type Passthrough = Result<(), &'static str>;

/// One disk among the files of a mount.
#[derive(Debug)]
pub(super) struct DiskFile {
    pub(super) config: DiskConfig,
    pub(super) attributes: Attributes,
    /// Log of failed requests, shared by the mount.
    error_log: Arc<ErrorLog>,
    /// Threads that serve the disk, whichever volume it has.
    threads: ServingThreads,
    /// True if the disk can be written to. Does not change while the mount exists.
    pub(super) writable: bool,
    /// Number of opens of both inodes.
    open_files: AtomicUsize,
    /// Number of opens for reading and writing that are not PASSTHROUGH. The kernel may hold dirty pages of their
    /// mappings, of which it tells the daemon nothing.
    dirtying_opens: AtomicUsize,
    /// Number of opens for writing that are PASSTHROUGH: the kernel writes without telling the daemon.
    passthrough_writers: AtomicUsize,
    /// The disk's content. Replaced when the image files were modified, since their tables must be read again.
    ///
    /// Lock order: after `opens`, never before it.
    volume: RwLock<Arc<Volume>>,
    opens: Mutex<OpenState>,
    /// The second inode, which the kernel reads without the daemon.
    pub(super) view: Arc<KernelViewNode>,
    /// True once the log has the reason why this disk is not served by passthrough.
    logged_served: AtomicBool,
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
        Arc::clone(&self.volume.read().unwrap_or_else(PoisonError::into_inner))
    }

    /// Reopens the volume if the image files were modified.
    ///
    /// Errors: the image cannot be opened any more, or its size changed, which the kernel could not follow.
    fn refresh(&self) -> Result<()> {
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
        let mut opens = self.opens.lock().unwrap_or_else(PoisonError::into_inner);
        let mut volume = self.volume.write().unwrap_or_else(PoisonError::into_inner);
        if Arc::ptr_eq(&volume, &old) {
            *volume = Arc::new(new);
            opens.replaced = Some(Instant::now());
        }
        Ok(())
    }

    /// Answers an open. Decides whether the kernel serves it from the backing file or from its pages, or the daemon
    /// does.
    pub(super) fn open(&self, passthrough: Passthrough, flags: OpenFlags, pid: u32, reply: ReplyOpen) {
        let error_log = &self.error_log;
        let writes = flags.acc_mode() != OpenAccMode::O_RDONLY;
        if writes && !self.writable {
            return reply.error(Errno::EROFS);
        }
        if let Err(e) = self.refresh() {
            reply.error(errno(&e));
            return error_log.note(e);
        }
        if !self.detects_modification() {
            // This open must see the writes of other clients, also where the export was known to hold zeroes.
            self.volume().forget_content();
        }
        // A read-only open leaves nothing to flush when it is closed, which saves the kernel a request.
        let no_flush = if writes {
            FopenFlags::empty()
        } else {
            FopenFlags::FOPEN_NOFLUSH
        };
        let parallel = if self.sequential_write_only() {
            no_flush
        } else {
            no_flush | FopenFlags::FOPEN_PARALLEL_DIRECT_WRITES
        };
        let direct = parallel | FopenFlags::FOPEN_DIRECT_IO;
        let streaming = writes && (flags.acc_mode() == OpenAccMode::O_WRONLY || flags.0 & libc::O_APPEND != 0);
        // A mapping needs an open that can read. Counted before the reply, after which pages may become dirty.
        let dirties = flags.acc_mode() == OpenAccMode::O_RDWR;
        let serve = |mode| {
            self.open_files.fetch_add(1, Ordering::AcqRel);
            if dirties {
                self.dirtying_opens.fetch_add(1, Ordering::AcqRel);
            }
            handle(mode, writes, dirties)
        };
        if self.config.cache == Some(PageCache::None) {
            return reply.opened(serve(DIRECT), direct);
        }
        // Runs before `opens` is locked, as it writes to the image files. The order matters: the kernel may write to
        // the backing file as soon as the open is answered.
        let volume = self.volume();
        if writes
            && passthrough.is_ok()
            && volume.disk().backing_fd().is_some()
            && let Err(e) = volume.prepare_external_write()
        {
            reply.error(errno(&e));
            return error_log.note(e);
        }
        // Locked until the reply is sent: two opens that decide at once could otherwise give the inode two modes.
        let mut opens = self.opens.lock().unwrap_or_else(PoisonError::into_inner);
        match self.acquire_backing(&mut opens, passthrough, &reply) {
            Ok(()) => {
                self.open_files.fetch_add(1, Ordering::AcqRel);
                if writes {
                    // From here on the kernel changes the file without a request that would tell the daemon.
                    opens.pages_are_stale = true;
                    self.attributes.passed();
                    self.passthrough_writers.fetch_add(1, Ordering::AcqRel);
                }
                opens.reply_passthrough(
                    &self.volume(),
                    handle(PASSTHROUGH, writes, false),
                    if streaming { direct } else { no_flush },
                    reply,
                );
            }
            Err(why) if self.view.refuses(&why, error_log) => reply.error(Errno::EIO),
            Err(_) if self.view.is_wanted() && flags.0 & libc::O_DIRECT != 0 => {
                self.view.disk_inode_opened(true, pid);
                reply.opened(serve(DIRECT_BESIDE_VIEW), direct);
            }
            Err(why) => {
                self.view.disk_inode_opened(false, pid);
                if !self.view.is_wanted() && !self.logged_served.swap(true, Ordering::Relaxed) {
                    tracing::info!("{}: served by this process: {why}", self.config.name.display());
                }
                // Pages of a streaming write would be written through at once and gain nothing.
                if flags.0 & libc::O_DIRECT != 0 || streaming {
                    return reply.opened(serve(DIRECT), direct);
                }
                // Without FOPEN_KEEP_CACHE the kernel drops its pages of the inode at this open, which is the only way
                // to get rid of pages from before an unnoticed modification.
                let keep = opens.may_keep_pages() && self.detects_modification();
                opens.cached_opens += 1;
                let keep = if keep {
                    FopenFlags::FOPEN_KEEP_CACHE
                } else {
                    FopenFlags::empty()
                };
                reply.opened(serve(CACHED), no_flush | keep);
            }
        }
    }

    /// Answers an open of the kernel view's inode.
    pub(super) fn open_view(&self, flags: OpenFlags, pid: u32, reply: ReplyOpen) {
        let error_log = &self.error_log;
        if let Err(e) = self.refresh() {
            reply.error(errno(&e));
            return error_log.note(e);
        }
        // Counted before the reply, after which the end of the open may arrive at any time.
        self.open_files.fetch_add(1, Ordering::AcqRel);
        let direct = flags.0 & libc::O_DIRECT != 0;
        let opened = self.view.open(&self.volume(), direct, pid, reply);
        if !matches!(opened, Ok(true)) {
            self.open_files.fetch_sub(1, Ordering::AcqRel);
        }
        if let Err(e) = opened {
            error_log.note(e);
        }
    }

    /// Returns true if a modification of the content by another process would be noticed, or is excluded by a lock.
    fn detects_modification(&self) -> bool {
        let locked = self.config.source.local().is_some_and(|local| local.lock);
        self.volume().detects_modification() && self.config.source.local().is_some() && (locked || !self.writable)
    }

    /// Provides the backing file for one more passthrough open, or returns the reason why there is none.
    fn acquire_backing(
        &self,
        opens: &mut OpenState,
        passthrough: Passthrough,
        reply: &ReplyOpen,
    ) -> Result<(), String> {
        if opens.backing.is_some() {
            return Ok(());
        }
        // The kernel answers EIO to a passthrough open of an inode that has cached opens.
        if opens.cached_opens > 0 {
            return Err("it is open with cached pages, which excludes passthrough".to_owned());
        }
        let volume = self.volume();
        let fd = volume
            .disk()
            .backing_fd()
            .ok_or_else(|| match volume.may_become_local() {
                true => "its cache is not complete".to_owned(),
                false => "it is not one flat file from its first to its last byte".to_owned(),
            })?;
        if self.view.is_off() {
            return Err("kernel-view=off".to_owned());
        }
        passthrough?;
        let id = reply.open_backing(fd).map_err(|e| match e.raw_os_error() {
            Some(libc::EPERM) => "FUSE passthrough needs root".to_owned(),
            _ => format!("FUSE passthrough was refused: {e}"),
        })?;
        tracing::info!(
            "{}: served by the kernel itself (FUSE passthrough)",
            self.config.name.display()
        );
        opens.backing = Some((id, Arc::clone(&volume)));
        Ok(())
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

    /// Returns the number of opens.
    pub(super) fn open_files(&self) -> usize {
        self.open_files.load(Ordering::Acquire)
    }

    /// Ends an open of the kernel view's inode.
    pub(super) fn release_view(&self, handle: FileHandle) {
        self.open_files.fetch_sub(1, Ordering::AcqRel);
        self.view.release(handle);
    }

    /// Ends an open.
    pub(super) fn release(&self, handle: FileHandle) {
        self.open_files.fetch_sub(1, Ordering::AcqRel);
        if handle.0 & DIRTIES != 0 {
            self.dirtying_opens.fetch_sub(1, Ordering::AcqRel);
        }
        if mode(handle) == PASSTHROUGH && writes(handle) {
            // Counted anew from here on.
            self.volume().forget_content();
            self.passthrough_writers.fetch_sub(1, Ordering::AcqRel);
        }
        let mut opens = self.opens.lock().unwrap_or_else(PoisonError::into_inner);
        match mode(handle) {
            PASSTHROUGH => {
                opens.passthrough_opens = opens.passthrough_opens.saturating_sub(1);
                // Dropping the backing ID lets the next open start in the other mode.
                if opens.passthrough_opens == 0 {
                    opens.backing = None;
                }
            }
            CACHED => opens.cached_opens = opens.cached_opens.saturating_sub(1),
            DIRECT_BESIDE_VIEW => self.view.direct_open_ended(),
            _ => {}
        }
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

/// The current opens, and how they are served.
///
/// The kernel has an inode in one mode at a time: either with pages of its own, or with a backing file that is the same
/// for all opens. It answers EIO to an open that does not fit.
#[derive(Debug, Default)]
struct OpenState {
    /// The file that the kernel reads itself, and the volume that it belongs to. Dropped with the last passthrough
    /// open.
    backing: Option<(BackingId, Arc<Volume>)>,
    /// Number of opens that use `backing`.
    passthrough_opens: u64,
    /// Number of opens with cached pages.
    cached_opens: u64,
    /// When the volume was last replaced, or its cached pages became stale.
    replaced: Option<Instant>,
    /// The kernel may have written to the backing file, which does not update the cached pages of the inode.
    pages_are_stale: bool,
}

/// For how long after a change of the image no open may keep the kernel's pages: another open that saw the old pages
/// may still be about to drop them.
const DROP_PAGES_FOR: Duration = Duration::from_secs(1);

impl OpenState {
    /// Answers an open with the backing file.
    ///
    /// The kernel must be given the same backing file while there are opens of it. Where that file belongs to a volume
    /// that has been replaced since, `FOPEN_DIRECT_IO` sends the requests to the daemon all the same.
    fn reply_passthrough(&mut self, volume: &Arc<Volume>, handle: FileHandle, flags: FopenFlags, reply: ReplyOpen) {
        let Some((id, of)) = &self.backing else {
            return reply.error(Errno::EIO);
        };
        // A cached file in which damage was found has none: the daemon compares its blocks with their checksums.
        let is_sound = volume.disk().backing_fd().is_some();
        let direct = if is_sound && same_file(of, volume) {
            FopenFlags::empty()
        } else {
            FopenFlags::FOPEN_DIRECT_IO
        };
        self.passthrough_opens += 1;
        reply.opened_passthrough(handle, flags | direct, id);
    }

    /// Returns true if an open with cached pages may use the pages that the kernel has.
    fn may_keep_pages(&mut self) -> bool {
        if std::mem::take(&mut self.pages_are_stale) {
            self.replaced = Some(Instant::now());
        }
        self.replaced.is_none_or(|at| at.elapsed() > DROP_PAGES_FOR)
    }
}

/// Returns true if both volumes have the same backing file, by device and inode.
fn same_file(a: &Arc<Volume>, b: &Arc<Volume>) -> bool {
    let file = |volume: &Arc<Volume>| {
        let stat = nix::sys::stat::fstat(volume.disk().backing_fd()?).ok()?;
        Some((stat.st_dev, stat.st_ino))
    };
    Arc::ptr_eq(a, b) || (file(a).is_some() && file(a) == file(b))
}

/// Mode of an open that the kernel serves from the backing file.
const PASSTHROUGH: u64 = 1;
/// Mode of an open that the daemon serves through the kernel's pages.
const CACHED: u64 = 0;
/// Mode of an open that the daemon serves without pages.
const DIRECT: u64 = 2;
/// `DIRECT`, for a disk that may have a kernel view: while such an open exists the name does not lead to the view.
const DIRECT_BESIDE_VIEW: u64 = 3;
/// Bit that is set in the handle of an open that may write.
const WRITES: u64 = 4;

/// Bit that is set in the handle of an open that is counted in `dirtying_opens`.
const DIRTIES: u64 = 8;

/// Encodes mode and access of an open as its file handle.
fn handle(mode: u64, writes: bool, dirties: bool) -> FileHandle {
    let writes = if writes { WRITES } else { 0 };
    FileHandle(mode | writes | if dirties { DIRTIES } else { 0 })
}

/// Returns the mode of an open.
fn mode(handle: FileHandle) -> u64 {
    handle.0 & !(WRITES | DIRTIES)
}

/// Returns true if the open may write.
pub(super) fn writes(handle: FileHandle) -> bool {
    handle.0 & WRITES != 0
}

/// Returns true unless the open is for writing with O_DIRECT and the request is not whole sectors, as on a block
/// device.
///
/// Programs find the alignment rule of a file by trying. Some (qemu) take a file without such a rule for one of whole
/// pages, and would write the last page beyond the end of the disk.
pub(super) fn is_aligned(handle: FileHandle, flags: OpenFlags, offset: u64, len: usize) -> bool {
    !writes(handle) || flags.0 & libc::O_DIRECT == 0 || (offset | len as u64).is_multiple_of(SECTOR)
}
