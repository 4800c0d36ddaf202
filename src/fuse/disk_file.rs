//! One disk of a mount, and the one place that decides how an open of it is served.
//!
//! ```text
//!   open ─► may it? ─► files changed? ─► image opened anew (never one that we write to)
//!     ├─ cache=none                     DIRECT   every request reaches us
//!     ├─ one flat file, root, 6.9+      PASSED   the kernel reads and writes the file itself
//!     ├─ O_DIRECT, or only for writing  DIRECT   no page would be read again
//!     └─ else                           SERVED   the kernel keeps pages of what we answer
//! ```
//! A disk that is no flat file may have a second node, which the kernel reads by itself: `view.rs`.
//!
//! The kernel has an inode in one mode at a time, so PASSED and SERVED don't mix: whoever comes first decides. DIRECT
//! goes with both.
//!
//! The kernel writes to a backing file without asking where the disk ends. An open only for writing (`cp`, `dd`, a
//! shell's `>`), which is how more than a disk holds gets written, or for appending, is therefore PASSED but reaches
//! us all the same; any other write behind the end is cut off with the next flush, which says so.

use std::cell::RefCell;
use std::ffi::OsString;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Mutex, PoisonError, RwLock};
use std::time::{Duration, Instant};

use fuser::{BackingId, Errno, FileHandle, FopenFlags, OpenAccMode, OpenFlags, ReplyData, ReplyOpen};

use crate::block::{ReadCompletion, SECTOR};
use crate::config::{DiskConfig, MountKind, PageCache};
use crate::error::{Error, ErrorKind, Result};
use crate::error_log::ErrorLog;
use crate::fuse::attributes::Attributes;
use crate::fuse::errno::errno;
use crate::fuse::flush::Flushes;
use crate::fuse::kernel_view_node::KernelViewNode;
use crate::fuse::write::RequestContext;
use crate::volume::worker_pool::WorkerPool;
use crate::volume::{self, ReadBuffer, Volume};

thread_local! {
    static READ_BUFFER: RefCell<ReadBuffer> = RefCell::new(ReadBuffer::new());
}

/// Whether the kernel takes a file of ours to read and write by itself, or why not.
pub(super) type Passthrough = Result<(), &'static str>;

/// One disk of the mount.
#[derive(Debug)]
pub(super) struct DiskFile {
    pub(super) config: DiskConfig,
    pub(super) attributes: Attributes,
    pub(super) flushes: Arc<Flushes>,
    /// What may have to wait for a network.
    pub(super) pool: Arc<WorkerPool>,
    /// Which of the mount's disks it is.
    pub(super) index: usize,
    /// Whether it can be written to; that stays as it is.
    pub(super) writable: bool,
    /// Who opened it for writing just now, and may go on to cut it: that is what O_TRUNC looks like. 0: nobody.
    pub(super) opener: AtomicU32,
    /// Replaced when the files below have changed: their tables are to be read anew.
    /// Taken after `opens`, never before.
    volume: RwLock<Arc<Volume>>,
    opens: Mutex<OpenState>,
    /// Its second node, which the kernel reads by itself.
    pub(super) view: Arc<KernelViewNode>,
    said_served: AtomicBool,
}

impl DiskFile {
    /// An open disk.
    pub(super) fn new(index: usize, config: DiskConfig, volume: Volume, shape: MountKind) -> Self {
        let writable = volume.writable();
        Self {
            view: Arc::new(KernelViewNode::new(&config, &volume, shape)),
            // one that is opened anew is what it was
            config: DiskConfig {
                read_only: !writable,
                ..config
            },
            attributes: Attributes::default(),
            flushes: Arc::default(),
            pool: Arc::default(),
            index,
            writable,
            opener: AtomicU32::new(0),
            volume: RwLock::new(Arc::new(volume)),
            opens: Mutex::default(),
            said_served: AtomicBool::new(false),
        }
    }

    /// Whether it has to be written in order.
    pub(super) fn in_order(&self) -> bool {
        self.volume()
            .disk()
            .writer()
            .is_some_and(|disk| disk.sequential_write_only())
    }

    /// The disk as it is now.
    pub(super) fn volume(&self) -> Arc<Volume> {
        Arc::clone(&self.volume.read().unwrap_or_else(PoisonError::into_inner))
    }

    /// Opens the disk anew if its files have changed.
    ///
    /// No lock is held meanwhile, so that opens of one disk never wait for the files of it. Of several that find the
    /// change at once, the first one's image stays.
    fn refresh(&self) -> Result<()> {
        let old = self.volume();
        if old.is_unchanged() {
            return Ok(());
        }
        tracing::info!(
            "{}: the image was changed underneath, it is opened anew",
            self.config.name.display()
        );
        let new = volume::open(&self.config)?;
        if new.len() != old.len() {
            return Err(Error::new(
                ErrorKind::Corrupt,
                format!(
                    "{}: its size changed from {} to {} bytes",
                    self.config.name.display(),
                    old.len(),
                    new.len()
                ),
            ));
        }
        // under the lock of the opens: who sees the new image knows that there was another
        let mut opens = self.opens.lock().unwrap_or_else(PoisonError::into_inner);
        let mut volume = self.volume.write().unwrap_or_else(PoisonError::into_inner);
        if Arc::ptr_eq(&volume, &old) {
            *volume = Arc::new(new);
            opens.replaced = Some(Instant::now());
        }
        Ok(())
    }

    /// Decides how an open is served: by the kernel from the backing file, from its pages, or by us alone.
    pub(super) fn open(
        &self,
        passthrough: Passthrough,
        flags: OpenFlags,
        pid: u32,
        error_log: &ErrorLog,
        reply: ReplyOpen,
    ) {
        let writes = flags.acc_mode() != OpenAccMode::O_RDONLY;
        if writes && !self.writable {
            return reply.error(Errno::EROFS);
        }
        if let Err(e) = self.refresh() {
            reply.error(errno(&e));
            return error_log.note(e);
        }
        self.opener.store(if writes { pid } else { 0 }, Ordering::Release);
        // an open for reading leaves nothing to be made durable when it is closed
        let quiet = if writes {
            FopenFlags::empty()
        } else {
            FopenFlags::FOPEN_NOFLUSH
        };
        let parallel = if self.in_order() {
            quiet
        } else {
            quiet | FopenFlags::FOPEN_PARALLEL_DIRECT_WRITES
        };
        let direct = parallel | FopenFlags::FOPEN_DIRECT_IO;
        let streams = writes && (flags.acc_mode() == OpenAccMode::O_WRONLY || flags.0 & libc::O_APPEND != 0);
        if self.config.cache == Some(PageCache::None) {
            return reply.opened(handle(DIRECT, writes), direct);
        }
        // before the lock, as it writes to files; done by whoever finds no backing file there, and then free
        let volume = self.volume();
        if writes
            && passthrough.is_ok()
            && volume.disk().backing_fd().is_some()
            && let Err(e) = volume.prepare_external_write()
        {
            reply.error(errno(&e));
            return error_log.note(e);
        }
        let mut opens = self.opens.lock().unwrap_or_else(PoisonError::into_inner);
        match self.backing(&mut opens, passthrough, &reply) {
            Ok(()) => {
                if writes {
                    opens.pages_are_old = true;
                    self.attributes.passed();
                }
                opens.pass(
                    &self.volume(),
                    handle(PASSED, writes),
                    if streams { direct } else { quiet },
                    reply,
                );
            }
            Err(why) if self.view.refuses(&why, error_log) => reply.error(Errno::EIO),
            Err(_) if self.view.is_wanted() && flags.0 & libc::O_DIRECT != 0 => {
                self.view.served(true, pid);
                reply.opened(handle(VIEWLESS, writes), direct);
            }
            Err(why) => {
                self.view.served(false, pid);
                if !self.view.is_wanted() && !self.said_served.swap(true, Ordering::Relaxed) {
                    tracing::info!("{}: served by this process: {why}", self.config.name.display());
                }
                // what is only written is written through anyhow, and gains nothing by pages
                let late = self.config.cache == Some(PageCache::WriteBack);
                if flags.0 & libc::O_DIRECT != 0 || (streams && !late) {
                    return reply.opened(handle(DIRECT, writes), direct);
                }
                let keep = opens.keeps_pages() && self.detects_modification();
                opens.served += 1;
                let keep = if keep {
                    FopenFlags::FOPEN_KEEP_CACHE
                } else {
                    FopenFlags::empty()
                };
                reply.opened(handle(SERVED, writes), quiet | keep);
            }
        }
    }

    /// The same for the node that the kernel reads by itself.
    pub(super) fn open_view(&self, flags: OpenFlags, pid: u32, error_log: &ErrorLog, reply: ReplyOpen) {
        if let Err(e) = self.refresh() {
            reply.error(errno(&e));
            return error_log.note(e);
        }
        if let Err(e) = self
            .view
            .open(&self.volume(), flags.0 & libc::O_DIRECT != 0, pid, reply)
        {
            error_log.note(e);
        }
    }

    /// Whether a change of the content by somebody else would be noticed, or can't be.
    fn detects_modification(&self) -> bool {
        let locked = self.config.source.local().is_some_and(|local| local.lock);
        self.volume().detects_modification() && self.config.source.local().is_some() && (locked || !self.writable)
    }

    /// Has the backing file there for one more open, or says why there is none.
    fn backing(&self, opens: &mut OpenState, passthrough: Passthrough, reply: &ReplyOpen) -> Result<(), String> {
        if opens.backing.is_some() {
            return Ok(());
        }
        if opens.served > 0 {
            return Err("it is open in the other mode".to_owned());
        }
        let volume = self.volume();
        let fd = volume
            .disk()
            .backing_fd()
            .ok_or("it is not one flat file from its first to its last byte")?;
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

    /// Ends an open.
    pub(super) fn release(&self, handle: FileHandle) {
        let mut opens = self.opens.lock().unwrap_or_else(PoisonError::into_inner);
        match mode(handle) {
            PASSED => {
                opens.passed = opens.passed.saturating_sub(1);
                if opens.passed == 0 {
                    opens.backing = None;
                }
            }
            SERVED => opens.served = opens.served.saturating_sub(1),
            VIEWLESS => self.view.direct_ended(),
            _ => {}
        }
    }

    /// Answers a read.
    pub(super) fn read(
        &self,
        handle: FileHandle,
        offset: u64,
        size: u32,
        flags: OpenFlags,
        context: RequestContext<'_>,
        reply: ReplyData,
    ) {
        if !is_aligned(handle, flags, offset, size as usize) {
            return reply.error(Errno::EINVAL);
        }
        let volume = self.volume();
        if !volume.is_remote() {
            return self.read_now(offset, size, context.error_log, reply);
        }
        let (later, index) = (context.later(), self.index);
        let Some(queue) = volume.queue() else {
            return self.pool.run(Box::new(move || {
                if let Some(file) = later.file(index) {
                    file.read_now(offset, size, later.context().error_log, reply);
                }
            }));
        };
        let done: ReadCompletion = Box::new(move |read| match read {
            Ok(bytes) => reply.data(bytes),
            Err(e) => {
                reply.error(errno(&e));
                let name = later
                    .file(index)
                    .map_or_else(OsString::new, |file| file.config.name.clone());
                later
                    .context()
                    .error_log
                    .note(e.within(format!("{}: {size} bytes at {offset}", name.display())));
            }
        });
        volume.submit_read(queue, offset, size as usize, done);
        context.poll_completions(queue);
    }

    fn read_now(&self, offset: u64, size: u32, error_log: &ErrorLog, reply: ReplyData) {
        READ_BUFFER.with_borrow_mut(|read_buffer| {
            let volume = self.volume();
            match volume.read(offset, size as usize, read_buffer) {
                Ok(bytes) => reply.data(bytes),
                Err(e) => {
                    reply.error(errno(&e));
                    error_log.note(e.within(format!("{}: {size} bytes at {offset}", self.config.name.display())));
                }
            }
        });
    }
}

/// How the opens that there are now are served. The kernel has an inode in one mode at a time, either with pages of its
/// own or with a backing file, which must be the same for all opens; an open that doesn't fit it answers EIO.
#[derive(Debug, Default)]
struct OpenState {
    /// The file that the kernel reads itself, and the image that it is of.
    backing: Option<(BackingId, Arc<Volume>)>,
    /// Opens that use it.
    passed: u64,
    /// Opens with pages.
    served: u64,
    /// When the image was last replaced, or its pages became old.
    replaced: Option<Instant>,
    /// The kernel may have written to the backing file, and knows nothing of that in the pages of the inode.
    pages_are_old: bool,
}

/// How long after a change of the image no open may keep the kernel's pages: another open may still be about to drop
/// them.
const SETTLE: Duration = Duration::from_secs(1);

impl OpenState {
    /// Answers with the backing file. Where it is of an image that has been replaced since, the kernel is told to ask us
    /// all the same: it must be given the backing file while there are opens of it, but need not use it.
    fn pass(&mut self, volume: &Arc<Volume>, handle: FileHandle, flags: FopenFlags, reply: ReplyOpen) {
        let Some((id, of)) = &self.backing else {
            return reply.error(Errno::EIO);
        };
        let ask = if same_file(of, volume) {
            FopenFlags::empty()
        } else {
            FopenFlags::FOPEN_DIRECT_IO
        };
        self.passed += 1;
        reply.opened_passthrough(handle, flags | ask, id);
    }

    /// Whether an open with pages may find those that there are.
    fn keeps_pages(&mut self) -> bool {
        if std::mem::take(&mut self.pages_are_old) {
            self.replaced = Some(Instant::now());
        }
        self.replaced.is_none_or(|at| at.elapsed() > SETTLE)
    }
}

/// Whether the kernel reads the same file for both.
fn same_file(a: &Arc<Volume>, b: &Arc<Volume>) -> bool {
    let file = |volume: &Arc<Volume>| {
        let stat = nix::sys::stat::fstat(volume.disk().backing_fd()?).ok()?;
        Some((stat.st_dev, stat.st_ino))
    };
    Arc::ptr_eq(a, b) || (file(a).is_some() && file(a) == file(b))
}

/// Opens that the kernel serves from the backing file.
const PASSED: u64 = 1;
/// Opens with pages, which we serve.
const SERVED: u64 = 0;
/// Opens without pages, which we serve.
const DIRECT: u64 = 2;
/// The same of a disk that the kernel reads by itself where it can: they keep its name from that.
const VIEWLESS: u64 = 3;
/// Added where an open may write.
const WRITES: u64 = 4;

/// The handle of an open.
fn handle(mode: u64, writes: bool) -> FileHandle {
    FileHandle(if writes { mode | WRITES } else { mode })
}

/// How an open is served.
fn mode(handle: FileHandle) -> u64 {
    handle.0 & !WRITES
}

/// Whether an open may write.
pub(super) fn writes(handle: FileHandle) -> bool {
    handle.0 & WRITES != 0
}

/// Whether a request is one that an open for writing with O_DIRECT takes: whole sectors, as of a disk. Programs find out
/// what they have to keep to by trying, and some (qemu) take a file with no such rule for one of whole pages, and write
/// the last ones of those behind the end of the disk.
pub(super) fn is_aligned(handle: FileHandle, flags: OpenFlags, offset: u64, len: usize) -> bool {
    !writes(handle) || flags.0 & libc::O_DIRECT == 0 || (offset | len as u64).is_multiple_of(SECTOR)
}
