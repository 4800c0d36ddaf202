//! The kernel's requests, each answered by the disk that it is about.

use std::ffi::OsStr;
use std::path::Path;
use std::time::{Duration, SystemTime};

use fuser::{
    BsdFileFlags, Errno, FileHandle, FileType, Filesystem, INodeNo, InitFlags, KernelConfig, LockOwner, OpenFlags,
    RenameFlags, ReplyAttr, ReplyCreate, ReplyData, ReplyDirectory, ReplyEmpty, ReplyEntry, ReplyLseek, ReplyOpen,
    ReplyStatfs, ReplyWrite, Request, TimeOrNow, WriteFlags,
};

use super::{BLOCK, DiskFs, FIRST_DISK, NO_PASSTHROUGH, ROOT, guarded};
use crate::config::MountKind;
use crate::error_log::ErrorLog;
use crate::fuse::attributes::Wish;
use crate::fuse::disk_file::{DiskFile, is_aligned};
use crate::fuse::errno::errno;
use crate::fuse::kernel_view_node;
use crate::fuse::write::Failed;
use crate::volume::{MAX_READ, Seek};

/// How long the kernel may go on without asking again for names and attributes. What changes at all (time and
/// allocation of an image that is written by somebody else) may be seen this much later.
const TTL: Duration = Duration::from_secs(1);

/// Requests that the kernel may have under way for read-ahead and asynchronous I/O.
const MAX_BACKGROUND: u16 = 64;

impl Filesystem for DiskFs {
    fn init(&mut self, _req: &Request, config: &mut KernelConfig) -> std::io::Result<()> {
        // each is wanted where the kernel has it, and done without where it doesn't
        if self.stream().is_none() {
            // with it the parts of one direct write are sent all at once, and several loops may take them in any order
            let _ = config.add_capabilities(InitFlags::FUSE_ASYNC_DIO);
        }
        for wanted in [
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
        self.passthrough = if self.wants_writeback() {
            let _ = config.add_capabilities(InitFlags::FUSE_WRITEBACK_CACHE);
            Err("a disk of the mount has cache=writeback, which excludes FUSE passthrough")
        } else if config.add_capabilities(InitFlags::FUSE_PASSTHROUGH).is_err() {
            Err(NO_PASSTHROUGH)
        } else {
            // a view counts as one layer below us
            let view = self.files.iter().any(|n| n.view.is_wanted());
            let _ = config.set_max_stack_depth(if view { 2 } else { 1 });
            if nix::unistd::geteuid().is_root() {
                Ok(())
            } else {
                Err("FUSE passthrough needs root")
            }
        };
        self.views.start(self.views_wanted(), self.passthrough);
        Ok(())
    }

    fn lookup(&self, _req: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEntry) {
        guarded(|| {
            let found = self
                .files
                .iter()
                .position(|n| self.shape == MountKind::Dir && name == n.config.name);
            match found {
                Some(i) if parent == ROOT => {
                    let ino = INodeNo(FIRST_DISK + i as u64);
                    match (self.file(ino), self.attr(ino)) {
                        (Ok(file), Ok(attr)) => file.view.entry(&attr, &TTL, reply),
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
        guarded(|| match self.file(ino) {
            Ok(file) if kernel_view_node::is_view(ino) => file.open_view(flags, req.pid(), &self.error_log, reply),
            Ok(file) => file.open(self.passthrough, flags, req.pid(), &self.error_log, reply),
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
        guarded(|| match self.file(ino) {
            Ok(file) => file.read(fh, offset, size, flags, self.context(), reply),
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
        guarded(|| match self.file(ino) {
            Ok(_) if !is_aligned(fh, flags, offset, data.len()) => reply.error(Errno::EINVAL),
            Ok(file) => file.write(offset, data, write_flags, flags, self.context(), reply),
            Err(e) => reply.error(e),
        });
    }

    fn flush(&self, _req: &Request, ino: INodeNo, fh: FileHandle, _lock_owner: LockOwner, reply: ReplyEmpty) {
        guarded(|| match self.file(ino) {
            // nothing is ever dirty; the kernel does not ask again
            Ok(_) if !self.is_writable() => reply.error(Errno::ENOSYS),
            Ok(file) => file.flush(fh, self.context(), reply),
            Err(e) => reply.error(e),
        });
    }

    fn fsync(&self, _req: &Request, ino: INodeNo, _fh: FileHandle, _datasync: bool, reply: ReplyEmpty) {
        guarded(|| match self.file(ino) {
            Ok(file) => file.sync(self.context(), reply),
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
        let answer = move |file: &DiskFile, error_log: &ErrorLog| match file.fallocate(offset, length, mode) {
            Ok(()) => reply.ok(),
            Err(Failed::Volume(e)) => {
                reply.error(errno(&e));
                let name = file.config.name.display();
                error_log.note(e.within(format!("{name}: zeroes for {length} bytes at {offset}")));
            }
            Err(Failed::Refused(e)) => reply.error(e),
        };
        self.run_blocking(ino, Box::new(answer));
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
            let set = self.file(ino).and_then(|file| {
                match size {
                    Some(size) => file.truncate(size, fh, req.pid())?,
                    None => file.attributes.set(&Wish {
                        mode,
                        uid,
                        gid,
                        atime,
                        mtime,
                    }),
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
            match self.file(ino) {
                Ok(file) if kernel_view_node::is_view(ino) => file.view.release(fh),
                Ok(file) => file.release(fh),
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
            let Ok(from) = u64::try_from(offset) else {
                return reply.error(Errno::ENXIO);
            };
            let answer = move |file: &DiskFile, error_log: &ErrorLog| match file.volume().seek(from, what) {
                Ok(Some(at)) => reply.offset(at as i64),
                Ok(None) => reply.error(Errno::ENXIO),
                Err(e) => {
                    reply.error(errno(&e));
                    let name = file.config.name.display();
                    error_log.note(e.within(format!("{name}: looking for data or a hole from {offset} on")));
                }
            };
            self.run_blocking(ino, Box::new(answer));
        });
    }

    fn readdir(&self, _req: &Request, ino: INodeNo, _fh: FileHandle, offset: u64, mut reply: ReplyDirectory) {
        guarded(|| {
            if self.shape == MountKind::File || ino != ROOT {
                return reply.error(Errno::ENOTDIR);
            }
            let dots = [".", ".."]
                .into_iter()
                .map(|name| (ROOT, FileType::Directory, OsStr::new(name)));
            let files = self.files.iter().enumerate().map(|(i, n)| {
                (
                    INodeNo(FIRST_DISK + i as u64),
                    FileType::RegularFile,
                    n.config.name.as_os_str(),
                )
            });
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
            let bytes = self
                .files
                .iter()
                .map(|n| n.volume().len())
                .fold(0u64, u64::saturating_add);
            let blocks = bytes.div_ceil(BLOCK.into());
            reply.statfs(blocks, 0, 0, self.files.len() as u64, 0, BLOCK, 255, BLOCK);
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
