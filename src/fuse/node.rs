//! One disk of a mount, and the one place that decides how an open of it is served.
//!
//! ```text
//!   open ─► files changed? ─► image opened anew
//!     ├─ cache=none                     DIRECT   every read reaches us
//!     ├─ one flat file, root, 6.9+      PASSED   the kernel reads the file itself
//!     └─ else                           SERVED   the kernel keeps pages of what we answer
//! ```
//! A disk that is no flat file may have a second node, which the kernel reads by itself: `view.rs`.
//!
//! The kernel has an inode in one mode at a time, so PASSED and SERVED don't mix: whoever comes first decides.

use std::cell::RefCell;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError, RwLock};
use std::time::{Duration, Instant};

use fuser::{BackingId, Errno, FileHandle, FopenFlags, ReplyData, ReplyOpen};

use crate::config::{DiskConfig, MountKind, PageCache};
use crate::error::{Error, ErrorKind, Result};
use crate::fuse::errno::errno;
use crate::fuse::faults::Faults;
use crate::fuse::view::Switch;
use crate::image::{self, Image, Scratch};

thread_local! {
    static SCRATCH: RefCell<Scratch> = RefCell::new(Scratch::new());
}

/// One disk of the mount.
#[derive(Debug)]
pub(super) struct Node {
    pub(super) config: DiskConfig,
    /// Replaced when the files below have changed: their tables are to be read anew.
    /// Taken after `opens`, never before.
    image: RwLock<Arc<Image>>,
    opens: Mutex<Opens>,
    /// Its second node, which the kernel reads by itself.
    pub(super) view: Arc<Switch>,
    said_served: AtomicBool,
}

impl Node {
    /// An open disk.
    pub(super) fn new(config: DiskConfig, image: Image, shape: MountKind) -> Self {
        Self {
            view: Arc::new(Switch::new(&config, &image, shape)),
            config,
            image: RwLock::new(Arc::new(image)),
            opens: Mutex::default(),
            said_served: AtomicBool::new(false),
        }
    }

    /// The disk as it is now.
    pub(super) fn image(&self) -> Arc<Image> {
        Arc::clone(&self.image.read().unwrap_or_else(PoisonError::into_inner))
    }

    /// Opens the disk anew if its files have changed.
    ///
    /// No lock is held meanwhile, so that opens of one disk never wait for the files of it. Of several that find the
    /// change at once, the first one's image stays.
    fn refresh(&self) -> Result<()> {
        let old = self.image();
        if old.is_unchanged() {
            return Ok(());
        }
        tracing::info!("{}: the image was changed underneath, it is opened anew", self.config.name.display());
        let new = image::open(&self.config)?;
        if new.len() != old.len() {
            return Err(Error::new(
                ErrorKind::Corrupt,
                format!("{}: its size changed from {} to {} bytes", self.config.name.display(), old.len(), new.len()),
            ));
        }
        // under the lock of the opens: who sees the new image knows that there was another
        let mut opens = self.opens.lock().unwrap_or_else(PoisonError::into_inner);
        let mut image = self.image.write().unwrap_or_else(PoisonError::into_inner);
        if Arc::ptr_eq(&image, &old) {
            *image = Arc::new(new);
            opens.replaced = Some(Instant::now());
        }
        Ok(())
    }

    /// Decides how an open is served: by the kernel from the backing file, from its pages, or by us alone.
    pub(super) fn open(&self, passthrough: bool, direct: bool, pid: u32, faults: &Faults, reply: ReplyOpen) {
        if let Err(e) = self.refresh() {
            reply.error(errno(&e));
            return faults.note(e);
        }
        let mut opens = self.opens.lock().unwrap_or_else(PoisonError::into_inner);
        if self.config.cache == Some(PageCache::None) {
            return reply.opened(DIRECT, FopenFlags::FOPEN_DIRECT_IO);
        }
        match self.backing(&mut opens, passthrough, &reply) {
            Ok(()) => opens.pass(&self.image(), reply),
            Err(why) if self.view.refuses(&why, faults) => reply.error(Errno::EIO),
            Err(_) if direct && self.view.is_wanted() => {
                self.view.served(true, pid);
                reply.opened(VIEWLESS, FopenFlags::FOPEN_DIRECT_IO);
            }
            Err(why) => {
                self.view.served(false, pid);
                if !self.view.is_wanted() && !self.said_served.swap(true, Ordering::Relaxed) {
                    tracing::info!("{}: read by this process: {why}", self.config.name.display());
                }
                let settled = opens.replaced.is_none_or(|at| at.elapsed() > SETTLE);
                let keep = settled && self.image().shows_changes();
                opens.served += 1;
                reply.opened(SERVED, if keep { FopenFlags::FOPEN_KEEP_CACHE } else { FopenFlags::empty() });
            }
        }
    }

    /// The same for the node that the kernel reads by itself.
    pub(super) fn open_view(&self, direct: bool, pid: u32, faults: &Faults, reply: ReplyOpen) {
        if let Err(e) = self.refresh() {
            reply.error(errno(&e));
            return faults.note(e);
        }
        if let Err(e) = self.view.open(&self.image(), direct, pid, reply) {
            faults.note(e);
        }
    }

    /// Has the backing file there for one more open, or says why there is none.
    fn backing(&self, opens: &mut Opens, passthrough: bool, reply: &ReplyOpen) -> Result<(), String> {
        if opens.backing.is_some() {
            return Ok(());
        }
        if opens.served > 0 {
            return Err("it is open in the other mode".to_owned());
        }
        let image = self.image();
        let fd = image.disk().backing_fd().ok_or("it is not one flat file from its first to its last byte")?;
        if self.view.is_off() {
            return Err("kernel-view=off".to_owned());
        }
        if !passthrough {
            return Err("the kernel has no FUSE passthrough (Linux 6.9)".to_owned());
        }
        let id = reply.open_backing(fd).map_err(|e| match e.raw_os_error() {
            Some(libc::EPERM) => "FUSE passthrough needs root".to_owned(),
            _ => format!("FUSE passthrough was refused: {e}"),
        })?;
        tracing::info!("{}: read by the kernel itself (FUSE passthrough)", self.config.name.display());
        opens.backing = Some((id, Arc::clone(&image)));
        Ok(())
    }

    /// Ends an open.
    pub(super) fn release(&self, handle: FileHandle) {
        let mut opens = self.opens.lock().unwrap_or_else(PoisonError::into_inner);
        match handle {
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
    pub(super) fn read(&self, offset: u64, size: u32, faults: &Faults, reply: ReplyData) {
        SCRATCH.with_borrow_mut(|scratch| {
            let image = self.image();
            match image.read(offset, size as usize, scratch) {
                Ok(bytes) => reply.data(bytes),
                Err(e) => {
                    reply.error(errno(&e));
                    faults.note(e.within(format!("{}: {size} bytes at {offset}", self.config.name.display())));
                }
            }
        });
    }
}

/// How the opens that there are now are served. The kernel has an inode in one mode at a time, either with pages of its
/// own or with a backing file, which must be the same for all opens; an open that doesn't fit it answers EIO.
#[derive(Debug, Default)]
struct Opens {
    /// The file that the kernel reads itself, and the image that it is of.
    backing: Option<(BackingId, Arc<Image>)>,
    /// Opens that use it.
    passed: u64,
    /// Opens with pages.
    served: u64,
    /// When the image was last replaced.
    replaced: Option<Instant>,
}

/// How long after a change of the image no open may keep the kernel's pages: another open may still be about to drop
/// them.
const SETTLE: Duration = Duration::from_secs(1);

impl Opens {
    /// Answers with the backing file. Where it is of an image that has been replaced since, the kernel is told to ask us
    /// all the same: it must be given the backing file while there are opens of it, but need not use it.
    fn pass(&mut self, image: &Arc<Image>, reply: ReplyOpen) {
        let Some((id, of)) = &self.backing else { return reply.error(Errno::EIO) };
        let flags = if same_file(of, image) { FopenFlags::empty() } else { FopenFlags::FOPEN_DIRECT_IO };
        self.passed += 1;
        reply.opened_passthrough(PASSED, flags, id);
    }
}

/// Whether the kernel reads the same file for both.
fn same_file(a: &Arc<Image>, b: &Arc<Image>) -> bool {
    let file = |image: &Arc<Image>| {
        let stat = nix::sys::stat::fstat(image.disk().backing_fd()?).ok()?;
        Some((stat.st_dev, stat.st_ino))
    };
    Arc::ptr_eq(a, b) || (file(a).is_some() && file(a) == file(b))
}

/// Handles of opens that the kernel serves from the backing file.
const PASSED: FileHandle = FileHandle(1);
/// Handles of opens with pages, which we serve.
const SERVED: FileHandle = FileHandle(0);
/// Handles of opens without pages, which we serve.
const DIRECT: FileHandle = FileHandle(2);
/// The same of a disk that the kernel reads by itself where it can: they keep its name from that.
const VIEWLESS: FileHandle = FileHandle(3);
