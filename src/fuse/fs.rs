//! The file system: a directory with one raw file for each disk, or, over a plain file, that one raw file alone.
//!
//! It is thin. Inodes never change, so there is no table to keep: the root is 1, disk `i` is `2 + i`; over a file
//! the root is the disk. How an open is served is decided in `node.rs`, which of its two
//! nodes a disk with a kernel view is just now in `view.rs`, what changes a disk is in `change.rs`.
//!
//! FUSE_WRITEBACK_CACHE is for a whole mount and excludes passthrough. With it the kernel takes writes behind the end of
//! a disk, too, and only learns later that there is no room; so it is on only where it was asked for.

use std::ffi::OsStr;
use std::os::fd::OwnedFd;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use fuser::{
    BsdFileFlags, Errno, FileAttr, FileHandle, FileType, Filesystem, INodeNo, InitFlags, KernelConfig, LockOwner,
    OpenFlags, RenameFlags, ReplyAttr, ReplyCreate, ReplyData, ReplyDirectory, ReplyEmpty, ReplyEntry, ReplyLseek,
    ReplyOpen, ReplyStatfs, ReplyWrite, Request, TimeOrNow, WriteFlags,
};

use crate::config::{DiskConfig, MountKind, MountOptions, PageCache};
use crate::error::Result as Done;
use crate::fuse::attr::Wish;
use crate::fuse::change::{Context, Failed};
use crate::fuse::errno::errno;
use crate::fuse::faults::Faults;
use crate::fuse::flush::Spare;
use crate::fuse::lane::Loops;
use crate::fuse::node::{Node, Passthrough, is_aligned};
use crate::fuse::view;
use crate::image::{Image, MAX_READ, Seek};

/// How long the kernel may go on without asking again for names and attributes. What changes at all (time and
/// allocation of an image that is written by somebody else) may be seen this much later.
const TTL: Duration = Duration::from_secs(1);

/// Requests that the kernel may have under way for read-ahead and asynchronous I/O.
const MAX_BACKGROUND: u16 = 64;

/// Block size in `stat` and `statfs`.
const BLOCK: u32 = 4096;

const NO_PASSTHROUGH: &str = "the kernel has no FUSE passthrough (Linux 6.9)";

const ROOT: INodeNo = INodeNo::ROOT;
const FIRST_DISK: u64 = 2;

/// The file system of a mount.
#[derive(Debug)]
pub struct DiskFs {
    shape: MountKind,
    nodes: Arc<[Node]>,
    owner: (u32, u32),
    umask: u16,
    mounted: SystemTime,
    passthrough: Passthrough,
    views: view::Builder,
    faults: Arc<Faults>,
    spare: Arc<Spare>,
    loops: Arc<Loops>,
}

/// The disks of a mount, for its end.
#[derive(Debug, Clone)]
pub struct Disks(Arc<[Node]>);

impl Disks {
    /// Makes everything durable that was written, and closes every disk. All are, whatever becomes of one; the first
    /// error, after each was logged.
    pub fn close(&self) -> Done<()> {
        let mut first = Ok(());
        for node in self.0.iter().filter(|node| node.writable) {
            if let Err(e) = node.image().close() {
                let e = e.within(format!("{}: not closed properly", node.config.name.display()));
                tracing::error!("{e}");
                first = first.and(Err(e));
            }
        }
        first
    }
}

/// What wants to know where requests come from.
#[derive(Debug)]
pub struct Requests(Arc<Loops>);

impl Requests {
    /// The kernel's device, a copy of that of the session.
    pub fn from(&self, device: OwnedFd) {
        self.0.begin(device);
    }
}

impl DiskFs {
    /// A file system of open disks, each with its configuration, which is to be served by so many event loops.
    pub fn new(shape: MountKind, disks: Vec<(DiskConfig, Image)>, options: &MountOptions, loops: usize) -> Self {
        let nodes = disks.into_iter().enumerate().map(|(i, (config, image))| Node::new(i, config, image, shape));
        let user = (nix::unistd::getuid().as_raw(), nix::unistd::getgid().as_raw());
        Self {
            shape,
            nodes: nodes.collect(),
            owner: (options.uid.unwrap_or(user.0), options.gid.unwrap_or(user.1)),
            umask: options.umask.unwrap_or(0) as u16 & 0o777,
            mounted: SystemTime::now(),
            passthrough: Err(NO_PASSTHROUGH),
            views: view::Builder::default(),
            faults: Arc::default(),
            spare: Arc::new(Spare::of(loops)),
            loops: Arc::new(Loops::new(loops)),
        }
    }

    /// Makes the kernel views that are required; the others come behind the mount. Errors: why a disk can't have one.
    pub fn make_required_views(&mut self) -> Done<()> {
        let disks = self.views_wanted();
        self.views.required(&disks, self.shape)
    }

    fn views_wanted(&self) -> Vec<view::Wanted> {
        self.nodes.iter().map(|n| (Arc::clone(&n.view), n.image())).collect()
    }

    /// Where failed requests are noted.
    pub fn faults(&self) -> Arc<Faults> {
        Arc::clone(&self.faults)
    }

    /// To be told where requests come from.
    pub fn requests(&self) -> Requests {
        Requests(Arc::clone(&self.loops))
    }

    /// The disks, which outlive the session.
    pub fn disks(&self) -> Disks {
        Disks(Arc::clone(&self.nodes))
    }

    /// Whether any disk can be written to.
    pub fn is_writable(&self) -> bool {
        self.nodes.iter().any(|node| node.writable)
    }

    /// Whether the kernel is to keep what is written for a while: some disk asks for it, and none that the kernel would
    /// have to keep writes of forbids it.
    fn wants_writeback(&self) -> bool {
        let asks = |cache| self.nodes.iter().any(|node| node.writable && node.config.cache == Some(cache));
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
    fn stream(&self) -> Option<&Node> {
        self.nodes.iter().find(|node| node.in_order())
    }

    fn context(&self) -> Context<'_> {
        Context { faults: &self.faults, spare: &self.spare, loops: &self.loops, nodes: &self.nodes }
    }

    /// Answers a request that may have to wait for the disk: here, or where that is behind a network, by its own threads.
    fn may_wait(&self, ino: INodeNo, answer: Waiting) {
        // Without a node the answer is dropped, which is an I/O error: the kernel knows no such inode.
        let Ok(node) = self.node(ino) else { return };
        if !node.image().is_remote() {
            return guarded(|| answer(node, &self.faults));
        }
        let (later, index) = (self.context().later(), node.index);
        node.lane.run(Box::new(move || {
            if let Some(node) = later.node(index) {
                answer(node, later.context().faults);
            }
        }));
    }

    /// What cannot be done to names: they are fixed.
    fn fixed(&self) -> Errno {
        if self.is_writable() { Errno::EPERM } else { Errno::EROFS }
    }

    fn node(&self, ino: INodeNo) -> Result<&Node, Errno> {
        let index = match (self.shape, view::disk_of(ino)) {
            (MountKind::File, ROOT) => Some(0),
            (MountKind::File, _) => None,
            (MountKind::Dir, INodeNo(n)) => n.checked_sub(FIRST_DISK),
        };
        let index = index.and_then(|i| usize::try_from(i).ok());
        index.and_then(|i| self.nodes.get(i)).ok_or(if ino == ROOT { Errno::EISDIR } else { Errno::ENOENT })
    }

    fn attr(&self, ino: INodeNo) -> Result<FileAttr, Errno> {
        match self.node(ino) {
            Ok(node) => Ok(self.file_attr(view::disk_of(ino), node)),
            Err(_) if ino == ROOT => Ok(self.directory_attr()),
            Err(e) => Err(e),
        }
    }

    fn file_attr(&self, ino: INodeNo, node: &Node) -> FileAttr {
        let image = node.image();
        let perm = if node.writable { 0o644 } else { 0o444 };
        // what has no files does not tell its age
        let time = Some(image.mtime_ns()).filter(|ns| *ns != 0).map_or(self.mounted, time_of);
        node.attributes.apply(FileAttr {
            size: image.len(),
            blocks: image.allocated().div_ceil(512),
            ..self.plain_attr(ino, FileType::RegularFile, perm, time)
        })
    }

    fn directory_attr(&self) -> FileAttr {
        // who makes a file in it shall hear from us that this can't be
        let perm = if self.is_writable() { 0o755 } else { 0o555 };
        FileAttr { nlink: 2, ..self.plain_attr(ROOT, FileType::Directory, perm, self.mounted) }
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
type Waiting = Box<dyn FnOnce(&Node, &Faults) + Send>;

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
        if self.stream().is_none() {
            // with it the parts of one direct write are sent all at once, and several loops may take them in any order
            let _ = config.add_capabilities(InitFlags::FUSE_ASYNC_DIO);
        }
        for wanted in [InitFlags::FUSE_PARALLEL_DIROPS, InitFlags::FUSE_MAX_PAGES, InitFlags::FUSE_DIRECT_IO_ALLOW_MMAP]
        {
            let _ = config.add_capabilities(wanted);
        }
        let _ = config.set_max_write(MAX_READ as u32);
        let _ = config.set_max_background(MAX_BACKGROUND);
        if let Err(most) = config.set_max_readahead(MAX_READ as u32) {
            let _ = config.set_max_readahead(most);
        }
        self.passthrough = if self.wants_writeback() {
            let _ = config.add_capabilities(InitFlags::FUSE_WRITEBACK_CACHE);
            Err("a disk of the mount has cache=writeback, which excludes FUSE passthrough")
        } else if config.add_capabilities(InitFlags::FUSE_PASSTHROUGH).is_err() {
            Err(NO_PASSTHROUGH)
        } else {
            // a view counts as one layer below us
            let view = self.nodes.iter().any(|n| n.view.is_wanted());
            let _ = config.set_max_stack_depth(if view { 2 } else { 1 });
            if nix::unistd::geteuid().is_root() { Ok(()) } else { Err("FUSE passthrough needs root") }
        };
        self.views.start(self.views_wanted(), self.passthrough);
        Ok(())
    }

    fn lookup(&self, _req: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEntry) {
        guarded(|| {
            let found = self.nodes.iter().position(|n| self.shape == MountKind::Dir && name == n.config.name);
            match found {
                Some(i) if parent == ROOT => {
                    let ino = INodeNo(FIRST_DISK + i as u64);
                    match (self.node(ino), self.attr(ino)) {
                        (Ok(node), Ok(attr)) => node.view.entry(&attr, &TTL, reply),
                        (Err(e), _) | (_, Err(e)) => reply.error(e),
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

    fn open(&self, req: &Request, ino: INodeNo, flags: OpenFlags, reply: ReplyOpen) {
        guarded(|| match self.node(ino) {
            Ok(node) if view::is_view(ino) => node.open_view(flags, req.pid(), &self.faults, reply),
            Ok(node) => node.open(self.passthrough, flags, req.pid(), &self.faults, reply),
            Err(e) => reply.error(e),
        });
    }

    fn read(
        &self,
        _req: &Request,
        ino: INodeNo,
        fh: FileHandle,
        offset: u64,
        size: u32,
        flags: OpenFlags,
        _lock_owner: Option<LockOwner>,
        reply: ReplyData,
    ) {
        guarded(|| match self.node(ino) {
            Ok(node) => node.read(fh, offset, size, flags, self.context(), reply),
            Err(e) => reply.error(e),
        });
    }

    fn write(
        &self,
        _req: &Request,
        ino: INodeNo,
        fh: FileHandle,
        offset: u64,
        data: &[u8],
        write_flags: WriteFlags,
        flags: OpenFlags,
        _lock_owner: Option<LockOwner>,
        reply: ReplyWrite,
    ) {
        guarded(|| match self.node(ino) {
            Ok(_) if !is_aligned(fh, flags, offset, data.len()) => reply.error(Errno::EINVAL),
            Ok(node) => node.write(offset, data, write_flags, flags, self.context(), reply),
            Err(e) => reply.error(e),
        });
    }

    fn flush(&self, _req: &Request, ino: INodeNo, fh: FileHandle, _lock_owner: LockOwner, reply: ReplyEmpty) {
        guarded(|| match self.node(ino) {
            // nothing is ever dirty; the kernel does not ask again
            Ok(_) if !self.is_writable() => reply.error(Errno::ENOSYS),
            Ok(node) => node.flush(fh, self.context(), reply),
            Err(e) => reply.error(e),
        });
    }

    fn fsync(&self, _req: &Request, ino: INodeNo, _fh: FileHandle, _datasync: bool, reply: ReplyEmpty) {
        guarded(|| match self.node(ino) {
            Ok(node) => node.sync(self.context(), reply),
            Err(e) => reply.error(e),
        });
    }

    fn fsyncdir(&self, _req: &Request, _ino: INodeNo, _fh: FileHandle, _datasync: bool, reply: ReplyEmpty) {
        // names don't change
        reply.ok();
    }

    fn fallocate(
        &self,
        _req: &Request,
        ino: INodeNo,
        _fh: FileHandle,
        offset: u64,
        length: u64,
        mode: i32,
        reply: ReplyEmpty,
    ) {
        let answer = move |node: &Node, faults: &Faults| match node.fallocate(offset, length, mode) {
            Ok(()) => reply.ok(),
            Err(Failed::Image(e)) => {
                reply.error(errno(&e));
                faults.note(e.within(format!("zeroes for {length} bytes at {offset}")));
            }
            Err(Failed::Refused(e)) => reply.error(e),
        };
        self.may_wait(ino, Box::new(answer));
    }

    fn setattr(
        &self,
        req: &Request,
        ino: INodeNo,
        mode: Option<u32>,
        uid: Option<u32>,
        gid: Option<u32>,
        size: Option<u64>,
        atime: Option<TimeOrNow>,
        mtime: Option<TimeOrNow>,
        _ctime: Option<SystemTime>,
        fh: Option<FileHandle>,
        _crtime: Option<SystemTime>,
        _chgtime: Option<SystemTime>,
        _bkuptime: Option<SystemTime>,
        _flags: Option<BsdFileFlags>,
        reply: ReplyAttr,
    ) {
        guarded(|| {
            let set = self.node(ino).and_then(|node| {
                match size {
                    Some(size) => node.cut(size, fh, req.pid())?,
                    None => node.attributes.set(&Wish { mode, uid, gid, atime, mtime }),
                }
                self.attr(ino)
            });
            match set {
                Ok(attr) => reply.attr(&TTL, &attr),
                // the folder itself
                Err(e) if e == Errno::EISDIR => reply.error(self.fixed()),
                Err(e) => reply.error(e),
            }
        });
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
            match self.node(ino) {
                Ok(node) if view::is_view(ino) => node.view.release(fh),
                Ok(node) => node.release(fh),
                Err(_) => {}
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
            let answer = move |node: &Node, faults: &Faults| match node.image().seek(from, what) {
                Ok(Some(at)) => reply.offset(at as i64),
                Ok(None) => reply.error(Errno::ENXIO),
                Err(e) => {
                    reply.error(errno(&e));
                    faults.note(e.within(format!("looking for data or a hole from {offset} on")));
                }
            };
            self.may_wait(ino, Box::new(answer));
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

    fn create(
        &self,
        _req: &Request,
        _parent: INodeNo,
        _name: &OsStr,
        _mode: u32,
        _umask: u32,
        _flags: i32,
        reply: ReplyCreate,
    ) {
        reply.error(self.fixed());
    }

    fn mknod(
        &self,
        _req: &Request,
        _parent: INodeNo,
        _name: &OsStr,
        _mode: u32,
        _umask: u32,
        _rdev: u32,
        reply: ReplyEntry,
    ) {
        reply.error(self.fixed());
    }

    fn mkdir(&self, _req: &Request, _parent: INodeNo, _name: &OsStr, _mode: u32, _umask: u32, reply: ReplyEntry) {
        reply.error(self.fixed());
    }

    fn symlink(&self, _req: &Request, _parent: INodeNo, _name: &OsStr, _target: &Path, reply: ReplyEntry) {
        reply.error(self.fixed());
    }

    fn link(&self, _req: &Request, _ino: INodeNo, _parent: INodeNo, _name: &OsStr, reply: ReplyEntry) {
        reply.error(self.fixed());
    }

    fn unlink(&self, _req: &Request, _parent: INodeNo, _name: &OsStr, reply: ReplyEmpty) {
        reply.error(self.fixed());
    }

    fn rmdir(&self, _req: &Request, _parent: INodeNo, _name: &OsStr, reply: ReplyEmpty) {
        reply.error(self.fixed());
    }

    fn rename(
        &self,
        _req: &Request,
        _parent: INodeNo,
        _name: &OsStr,
        _new_parent: INodeNo,
        _new_name: &OsStr,
        _flags: RenameFlags,
        reply: ReplyEmpty,
    ) {
        reply.error(self.fixed());
    }
}
