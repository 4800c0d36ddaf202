//! The file system: a directory with one raw file for each disk, or, over a plain file, that one raw file alone.
//!
//! It is thin. Inodes never change, so there is no table to keep: the root is 1, disk `i` is `2 + i`; over a file
//! the root is the disk. How an open is served is decided in one place, [`Node::open`].

use std::cell::RefCell;
use std::ffi::OsStr;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError, RwLock};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use fuser::{
    BackingId, Errno, FileAttr, FileHandle, FileType, Filesystem, FopenFlags, Generation, INodeNo, InitFlags,
    KernelConfig, LockOwner, OpenFlags, ReplyAttr, ReplyData, ReplyDirectory, ReplyEmpty, ReplyEntry, ReplyLseek,
    ReplyOpen, ReplyStatfs, Request,
};

use crate::config::{DiskConfig, MountKind, MountOptions, PageCache};
use crate::error::{Error, ErrorKind, Result};
use crate::fuse::errno::errno;
use crate::fuse::faults::Faults;
use crate::image::{self, Image, MAX_READ, Scratch, Seek};

/// How long the kernel may go on without asking again for names and attributes. What changes at all (time and
/// allocation of an image that is written by somebody else) may be seen this much later.
const TTL: Duration = Duration::from_secs(1);

/// Requests that the kernel may have under way for read-ahead and asynchronous I/O.
const MAX_BACKGROUND: u16 = 64;

/// Block size in `stat` and `statfs`.
const BLOCK: u32 = 4096;

const ROOT: INodeNo = INodeNo::ROOT;
const FIRST_DISK: u64 = 2;

thread_local! {
    static SCRATCH: RefCell<Scratch> = RefCell::new(Scratch::new());
}

/// The file system of a mount.
#[derive(Debug)]
pub struct DiskFs {
    shape: MountKind,
    nodes: Vec<Node>,
    owner: (u32, u32),
    umask: u16,
    mounted: SystemTime,
    /// Whether the kernel takes a file of ours for its reads.
    passthrough: bool,
    faults: Arc<Faults>,
}

/// One disk of the mount.
#[derive(Debug)]
struct Node {
    config: DiskConfig,
    /// Replaced when the files below have changed: their tables are to be read anew.
    image: RwLock<Arc<Image>>,
    opens: Mutex<Opens>,
    said_served: AtomicBool,
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

impl DiskFs {
    /// A file system of open disks, each with its configuration.
    pub fn new(shape: MountKind, disks: Vec<(DiskConfig, Image)>, options: &MountOptions) -> Self {
        let nodes = disks.into_iter().map(|(config, image)| Node {
            config,
            image: RwLock::new(Arc::new(image)),
            opens: Mutex::default(),
            said_served: AtomicBool::new(false),
        });
        let user = (nix::unistd::getuid().as_raw(), nix::unistd::getgid().as_raw());
        Self {
            shape,
            nodes: nodes.collect(),
            owner: (options.uid.unwrap_or(user.0), options.gid.unwrap_or(user.1)),
            umask: options.umask.unwrap_or(0) as u16 & 0o777,
            mounted: SystemTime::now(),
            passthrough: false,
            faults: Arc::default(),
        }
    }

    /// Where failed requests are noted.
    pub fn faults(&self) -> Arc<Faults> {
        Arc::clone(&self.faults)
    }

    fn node(&self, ino: INodeNo) -> Result<&Node, Errno> {
        let index = match (self.shape, ino) {
            (MountKind::File, ROOT) => Some(0),
            (MountKind::File, _) => None,
            (MountKind::Dir, INodeNo(n)) => n.checked_sub(FIRST_DISK),
        };
        let index = index.and_then(|i| usize::try_from(i).ok());
        index.and_then(|i| self.nodes.get(i)).ok_or(if ino == ROOT { Errno::EISDIR } else { Errno::ENOENT })
    }

    fn attr(&self, ino: INodeNo) -> Result<FileAttr, Errno> {
        match self.node(ino) {
            Ok(node) => Ok(self.file_attr(ino, node)),
            Err(_) if ino == ROOT => Ok(self.directory_attr()),
            Err(e) => Err(e),
        }
    }

    fn file_attr(&self, ino: INodeNo, node: &Node) -> FileAttr {
        let image = node.image();
        let time = time_of(image.mtime_ns());
        FileAttr {
            ino,
            size: image.len(),
            blocks: image.allocated().div_ceil(512),
            atime: time,
            mtime: time,
            ctime: time,
            crtime: time,
            kind: FileType::RegularFile,
            perm: 0o444 & !self.umask,
            nlink: 1,
            uid: self.owner.0,
            gid: self.owner.1,
            rdev: 0,
            blksize: BLOCK,
            flags: 0,
        }
    }

    fn directory_attr(&self) -> FileAttr {
        FileAttr {
            ino: ROOT,
            size: 0,
            blocks: 0,
            atime: self.mounted,
            mtime: self.mounted,
            ctime: self.mounted,
            crtime: self.mounted,
            kind: FileType::Directory,
            perm: 0o555 & !self.umask,
            nlink: 2,
            uid: self.owner.0,
            gid: self.owner.1,
            rdev: 0,
            blksize: BLOCK,
            flags: 0,
        }
    }
}

impl Node {
    fn image(&self) -> Arc<Image> {
        Arc::clone(&self.image.read().unwrap_or_else(PoisonError::into_inner))
    }

    /// Opens the disk anew if its files have changed.
    fn refresh(&self, opens: &mut Opens) -> Result<()> {
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
        *self.image.write().unwrap_or_else(PoisonError::into_inner) = Arc::new(new);
        opens.replaced = Some(Instant::now());
        Ok(())
    }

    /// Decides how an open is served: by the kernel from the backing file, from its pages, or by us alone.
    fn open(&self, passthrough: bool, faults: &Faults, reply: ReplyOpen) {
        let mut opens = self.opens.lock().unwrap_or_else(PoisonError::into_inner);
        if let Err(e) = self.refresh(&mut opens) {
            reply.error(errno(&e));
            return faults.note(e);
        }
        if self.config.cache == PageCache::None {
            return reply.opened(DIRECT, FopenFlags::FOPEN_DIRECT_IO);
        }
        match self.backing(&mut opens, passthrough, &reply) {
            Ok(()) => opens.pass(&self.image(), reply),
            Err(why) => {
                if !self.said_served.swap(true, Ordering::Relaxed) {
                    tracing::info!("{}: read by this process: {why}", self.config.name.display());
                }
                let settled = opens.replaced.is_none_or(|at| at.elapsed() > SETTLE);
                let keep = settled && self.image().shows_changes();
                opens.served += 1;
                reply.opened(SERVED, if keep { FopenFlags::FOPEN_KEEP_CACHE } else { FopenFlags::empty() });
            }
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

    fn release(&self, handle: FileHandle) {
        let mut opens = self.opens.lock().unwrap_or_else(PoisonError::into_inner);
        match handle {
            PASSED => {
                opens.passed = opens.passed.saturating_sub(1);
                if opens.passed == 0 {
                    opens.backing = None;
                }
            }
            SERVED => opens.served = opens.served.saturating_sub(1),
            _ => {}
        }
    }

    fn read(&self, offset: u64, size: u32, faults: &Faults, reply: ReplyData) {
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

/// Does what answers a request. A panic is an I/O error of this request (its reply, dropped, says so) and not the
/// end of the thread, behind which the kernel would wait for ever.
fn guarded(what: impl FnOnce()) {
    if catch_unwind(AssertUnwindSafe(what)).is_err() {
        tracing::error!("a request was given up after a panic");
    }
}

fn time_of(ns: i128) -> SystemTime {
    let magnitude = Duration::from_nanos(u64::try_from(ns.unsigned_abs()).unwrap_or(0));
    let time = if ns >= 0 { UNIX_EPOCH.checked_add(magnitude) } else { UNIX_EPOCH.checked_sub(magnitude) };
    time.unwrap_or(UNIX_EPOCH)
}

impl Filesystem for DiskFs {
    fn init(&mut self, _req: &Request, config: &mut KernelConfig) -> std::io::Result<()> {
        // each is wanted where the kernel has it, and done without where it doesn't
        for wanted in [
            InitFlags::FUSE_ASYNC_DIO,
            InitFlags::FUSE_PARALLEL_DIROPS,
            InitFlags::FUSE_MAX_PAGES,
            InitFlags::FUSE_DIRECT_IO_ALLOW_MMAP,
        ] {
            let _ = config.add_capabilities(wanted);
        }
        let _ = config.set_max_write(MAX_READ as u32);
        let _ = config.set_max_background(MAX_BACKGROUND);
        if let Err(most) = config.set_max_readahead(MAX_READ as u32) {
            let _ = config.set_max_readahead(most);
        }
        self.passthrough = config.add_capabilities(InitFlags::FUSE_PASSTHROUGH).is_ok();
        if self.passthrough {
            let _ = config.set_max_stack_depth(1);
        }
        Ok(())
    }

    fn lookup(&self, _req: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEntry) {
        guarded(|| {
            let found = self.nodes.iter().position(|n| self.shape == MountKind::Dir && name == n.config.name);
            match found {
                Some(i) if parent == ROOT => {
                    let ino = INodeNo(FIRST_DISK + i as u64);
                    match self.attr(ino) {
                        Ok(attr) => reply.entry(&TTL, &attr, Generation(0)),
                        Err(e) => reply.error(e),
                    }
                }
                _ => reply.error(Errno::ENOENT),
            }
        });
    }

    fn getattr(&self, _req: &Request, ino: INodeNo, _fh: Option<FileHandle>, reply: ReplyAttr) {
        guarded(|| match self.attr(ino) {
            Ok(attr) => reply.attr(&TTL, &attr),
            Err(e) => reply.error(e),
        });
    }

    fn open(&self, _req: &Request, ino: INodeNo, _flags: OpenFlags, reply: ReplyOpen) {
        guarded(|| match self.node(ino) {
            Ok(node) => node.open(self.passthrough, &self.faults, reply),
            Err(e) => reply.error(e),
        });
    }

    fn read(
        &self,
        _req: &Request,
        ino: INodeNo,
        _fh: FileHandle,
        offset: u64,
        size: u32,
        _flags: OpenFlags,
        _lock_owner: Option<LockOwner>,
        reply: ReplyData,
    ) {
        guarded(|| match self.node(ino) {
            Ok(node) => node.read(offset, size, &self.faults, reply),
            Err(e) => reply.error(e),
        });
    }

    fn flush(&self, _req: &Request, _ino: INodeNo, _fh: FileHandle, _lock_owner: LockOwner, reply: ReplyEmpty) {
        // nothing is ever dirty; the kernel does not ask again
        reply.error(Errno::ENOSYS);
    }

    fn release(
        &self,
        _req: &Request,
        ino: INodeNo,
        fh: FileHandle,
        _flags: OpenFlags,
        _lock_owner: Option<LockOwner>,
        _flush: bool,
        reply: ReplyEmpty,
    ) {
        guarded(|| {
            if let Ok(node) = self.node(ino) {
                node.release(fh);
            }
            reply.ok();
        });
    }

    fn lseek(&self, _req: &Request, ino: INodeNo, _fh: FileHandle, offset: i64, whence: i32, reply: ReplyLseek) {
        guarded(|| {
            let what = match whence {
                libc::SEEK_DATA => Seek::Data,
                libc::SEEK_HOLE => Seek::Hole,
                _ => return reply.error(Errno::EINVAL),
            };
            let Ok(from) = u64::try_from(offset) else { return reply.error(Errno::ENXIO) };
            match self.node(ino).map(|n| n.image().seek(from, what)) {
                Ok(Ok(Some(at))) => reply.offset(at as i64),
                Ok(Ok(None)) => reply.error(Errno::ENXIO),
                Ok(Err(e)) => {
                    reply.error(errno(&e));
                    self.faults.note(e.within(format!("looking for data or a hole from {offset} on")));
                }
                Err(e) => reply.error(e),
            }
        });
    }

    fn readdir(&self, _req: &Request, ino: INodeNo, _fh: FileHandle, offset: u64, mut reply: ReplyDirectory) {
        guarded(|| {
            if self.shape == MountKind::File || ino != ROOT {
                return reply.error(Errno::ENOTDIR);
            }
            let dots = [".", ".."].into_iter().map(|name| (ROOT, FileType::Directory, OsStr::new(name)));
            let files = self
                .nodes
                .iter()
                .enumerate()
                .map(|(i, n)| (INodeNo(FIRST_DISK + i as u64), FileType::RegularFile, n.config.name.as_os_str()));
            for (i, (ino, kind, name)) in dots.chain(files).enumerate().skip(offset as usize) {
                if reply.add(ino, i as u64 + 1, kind, name) {
                    break;
                }
            }
            reply.ok();
        });
    }

    fn statfs(&self, _req: &Request, _ino: INodeNo, reply: ReplyStatfs) {
        guarded(|| {
            let bytes = self.nodes.iter().map(|n| n.image().len()).fold(0u64, u64::saturating_add);
            let blocks = bytes.div_ceil(BLOCK.into());
            reply.statfs(blocks, 0, 0, self.nodes.len() as u64, 0, BLOCK, 255, BLOCK);
        });
    }
}
