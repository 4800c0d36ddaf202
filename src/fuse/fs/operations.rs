//! The kernel's requests: each is dispatched to its disk. Every handler answers even if it panics (`catch_panic`).

use std::ffi::OsStr;
use std::path::Path;
use std::time::{Duration, SystemTime};

use fuser::{
    BsdFileFlags, Errno, FileAttr, FileHandle, Filesystem, FopenFlags, INodeNo, InitFlags, KernelConfig, LockOwner,
    OpenFlags, RenameFlags, ReplyAttr, ReplyCreate, ReplyData, ReplyDirectory, ReplyEmpty, ReplyEntry, ReplyLseek,
    ReplyOpen, ReplyStatfs, ReplyWrite, ReplyXattr, Request, TimeOrNow, WriteFlags,
};

use super::{DiskFs, NO_PASSTHROUGH, catch_panic};
use crate::fuse::attributes::SetRequest;
use crate::fuse::disk_file::is_aligned;
use crate::fuse::kernel_view_node;
use crate::fuse::stat::BLOCK;
use crate::fuse::tree::ROOT;
use crate::fuse::write::EmptyAnswer;
use crate::process::unmount::{DAEMON_XATTR, daemon_identity};
use crate::source::vddk;
use crate::volume::{FlushKind, MAX_READ, Seek};

/// Number of requests for read-ahead and asynchronous I/O that the kernel may have in flight, for all disks of the mount.
/// Well above what the readers of one disk ask for (a few windows of read-ahead each): those of a disk whose source is dead
/// hold theirs until the deadline, and the read-ahead of the other disks would wait for them. Each may be of 1 MiB.
const MAX_BACKGROUND: u16 = 256;

impl DiskFs {
    /// Answers a truncation; see `write.rs`.
    fn truncate(&self, ino: INodeNo, size: u64, reply: ReplyAttr) {
        let (file, attr) = match self.file(ino).and_then(|file| Ok((file, self.attr(ino)?))) {
            Ok(found) => found,
            // The directory itself.
            Err(_) => return reply.error(self.name_change_errno()),
        };
        file.truncate(
            size,
            Box::new(move |truncated| match truncated {
                // The kernel drops its pages from the size on that it is told, if that is another one than before. Without
                // a timeout it asks for the true size when it next needs one.
                Ok(()) => {
                    let now = SystemTime::now();
                    let (mtime, ctime) = (now, now);
                    let attr = FileAttr {
                        size,
                        mtime,
                        ctime,
                        ..attr
                    };
                    reply.attr(&Duration::ZERO, &attr);
                }
                Err(e) => reply.error(e),
            }),
        );
    }
}

impl Filesystem for DiskFs {
    fn init(&mut self, _req: &Request, config: &mut KernelConfig) -> std::io::Result<()> {
        // Every capability is optional: a kernel without it works too, only slower.
        if self.sequential_disk().is_none() {
            // With FUSE_ASYNC_DIO the kernel sends all parts of a direct write at once, and several loops may take them
            // in any order. A disk that must be written in order cannot allow that.
            let _ = config.add_capabilities(InitFlags::FUSE_ASYNC_DIO);
        }
        for capability in [
            InitFlags::FUSE_PARALLEL_DIROPS,
            InitFlags::FUSE_MAX_PAGES,
            InitFlags::FUSE_DIRECT_IO_ALLOW_MMAP,
        ] {
            let _ = config.add_capabilities(capability);
        }
        // Without it the kernel asks for an xattr at every write, until the first ENOSYS. With it, it trusts that this file
        // system keeps no setuid bit and no capability, and the root can have an xattr.
        self.has_xattr = config.add_capabilities(InitFlags::FUSE_HANDLE_KILLPRIV_V2).is_ok();
        let _ = config.set_max_write(MAX_READ as u32);
        let _ = config.set_max_background(MAX_BACKGROUND);
        // The kernel refuses more than it offers, and names its largest value.
        if let Err(most) = config.set_max_readahead(MAX_READ as u32) {
            let _ = config.set_max_readahead(most);
        }
        self.passthrough = if config.add_capabilities(InitFlags::FUSE_PASSTHROUGH).is_err() {
            Err(NO_PASSTHROUGH)
        } else {
            // The kernel limits how deep file systems are stacked. A backing file is one layer; the EROFS of a view,
            // with the extents below, is another.
            let view = self.tree.fixed_files().any(|file| file.view.is_wanted());
            let _ = config.set_max_stack_depth(if view { 2 } else { 1 });
            if nix::unistd::geteuid().is_root() {
                Ok(())
            } else {
                Err("FUSE passthrough needs root")
            }
        };
        // Only now is it known if the kernel accepts backing files.
        self.views.start(self.planned_views(), self.passthrough);
        Ok(())
    }

    fn lookup(&self, _req: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEntry) {
        catch_panic(|| {
            self.names.lookup(parent, name, reply);
        });
    }

    fn forget(&self, _req: &Request, ino: INodeNo, lookups: u64) {
        catch_panic(|| self.names.forget(ino, lookups));
    }

    fn getattr(&self, _req: &Request, ino: INodeNo, _fh: Option<FileHandle>, reply: ReplyAttr) {
        catch_panic(|| match self.attr(ino) {
            Ok(attr) => reply.attr(&self.stat.ttl(&attr), &attr),
            Err(e) => reply.error(e),
        });
    }

    fn open(&self, req: &Request, ino: INodeNo, flags: OpenFlags, reply: ReplyOpen) {
        catch_panic(|| match self.file(ino) {
            Ok(file) if kernel_view_node::is_view_inode(ino) => {
                file.open_view(flags, req.pid(), reply);
            }
            Ok(file) => {
                self.build_view_of_cached(&file);
                file.open(self.passthrough, flags, req.pid(), reply);
            }
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
        catch_panic(|| match self.file(ino) {
            Ok(file) => file.read(fh, offset, size, flags, reply),
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
        catch_panic(|| match self.file(ino) {
            Ok(_) if !is_aligned(fh, flags, offset, data.len()) => reply.error(Errno::EINVAL),
            Ok(file) => file.write(offset, data, write_flags, flags, reply),
            Err(e) => reply.error(e),
        });
    }

    fn getxattr(&self, _req: &Request, ino: INodeNo, name: &OsStr, size: u32, reply: ReplyXattr) {
        catch_panic(|| {
            if !self.has_xattr {
                return reply.error(Errno::ENOSYS);
            }
            let value = match name.to_str().filter(|_| ino == ROOT) {
                Some(DAEMON_XATTR) => daemon_identity(),
                Some(vddk::STATISTICS_XATTR) => vddk::report(),
                _ => None,
            };
            match value {
                None => reply.error(Errno::NO_XATTR),
                Some(value) if size == 0 => reply.size(value.len() as u32),
                Some(value) if value.len() > size as usize => reply.error(Errno::ERANGE),
                Some(value) => reply.data(value.as_bytes()),
            }
        });
    }

    fn listxattr(&self, _req: &Request, _ino: INodeNo, size: u32, reply: ReplyXattr) {
        // The xattr of the root is not listed: programs that copy would copy it.
        if size == 0 { reply.size(0) } else { reply.data(&[]) }
    }

    fn flush(&self, _req: &Request, ino: INodeNo, fh: FileHandle, _lock_owner: LockOwner, reply: ReplyEmpty) {
        catch_panic(|| match self.file(ino) {
            // Nothing is ever dirty. After ENOSYS the kernel sends no further flush.
            Ok(_) if !self.is_writable() => reply.error(Errno::ENOSYS),
            Ok(file) => file.flush(fh, reply),
            Err(e) => reply.error(e),
        });
    }

    fn fsync(&self, _req: &Request, ino: INodeNo, fh: FileHandle, _datasync: bool, reply: ReplyEmpty) {
        catch_panic(|| match self.file(ino) {
            Ok(file) => file.sync(fh, FlushKind::Durable, reply),
            Err(e) => reply.error(e),
        });
    }

    fn fsyncdir(&self, _req: &Request, _ino: INodeNo, _fh: FileHandle, _datasync: bool, reply: ReplyEmpty) {
        // Names do not change, so there is nothing to make durable.
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
        catch_panic(|| {
            let answer: EmptyAnswer = Box::new(move |done| match done {
                Ok(()) => reply.ok(),
                Err(e) => reply.error(e),
            });
            match self.file(ino) {
                Ok(file) => file.fallocate(offset, length, mode, answer),
                Err(e) => answer(Err(e)),
            }
        });
    }

    fn setattr(
        &self,
        _req: &Request,
        ino: INodeNo,
        mode: Option<u32>,
        uid: Option<u32>,
        gid: Option<u32>,
        size: Option<u64>,
        atime: Option<TimeOrNow>,
        mtime: Option<TimeOrNow>,
        _ctime: Option<SystemTime>,
        _fh: Option<FileHandle>,
        _crtime: Option<SystemTime>,
        _chgtime: Option<SystemTime>,
        _bkuptime: Option<SystemTime>,
        _flags: Option<BsdFileFlags>,
        reply: ReplyAttr,
    ) {
        catch_panic(|| {
            if let Some(size) = size {
                return self.truncate(ino, size, reply);
            }
            let set = self.file(ino).and_then(|file| {
                let request = SetRequest {
                    mode,
                    uid,
                    gid,
                    atime,
                    mtime,
                };
                let volume = file.volume();
                let image = volume.has_external_writes().then(|| self.stat.image_time(&volume));
                file.attributes.set(&request, image);
                self.attr(ino)
            });
            match set {
                Ok(attr) => reply.attr(&self.stat.ttl(&attr), &attr),
                // The directory itself: its attributes are fixed.
                Err(e) if e == Errno::EISDIR => reply.error(self.name_change_errno()),
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
        catch_panic(|| {
            match self.file(ino) {
                Ok(file) if kernel_view_node::is_view_inode(ino) => file.release_view(fh),
                Ok(file) => {
                    file.release(fh);
                    file.finish(fh);
                }
                Err(_) => {}
            }
            reply.ok();
        });
    }

    fn lseek(&self, _req: &Request, ino: INodeNo, _fh: FileHandle, offset: i64, whence: i32, reply: ReplyLseek) {
        catch_panic(|| {
            let what = match whence {
                libc::SEEK_DATA => Seek::Data,
                libc::SEEK_HOLE => Seek::Hole,
                _ => return reply.error(Errno::EINVAL),
            };
            let Ok(from) = u64::try_from(offset) else {
                return reply.error(Errno::ENXIO);
            };
            match self.file(ino) {
                Ok(file) => file.seek(from, what, reply),
                Err(e) => reply.error(e),
            }
        });
    }

    fn opendir(&self, _req: &Request, _ino: INodeNo, _flags: OpenFlags, reply: ReplyOpen) {
        reply.opened(self.tree.open_directory(), FopenFlags::empty());
    }

    fn readdir(&self, _req: &Request, ino: INodeNo, fh: FileHandle, offset: u64, reply: ReplyDirectory) {
        catch_panic(|| self.names.readdir(ino, fh, offset, reply));
    }

    fn releasedir(&self, _req: &Request, _ino: INodeNo, fh: FileHandle, _flags: OpenFlags, reply: ReplyEmpty) {
        self.tree.close_directory(fh);
        reply.ok();
    }

    fn statfs(&self, _req: &Request, _ino: INodeNo, reply: ReplyStatfs) {
        catch_panic(|| {
            let files = self.tree.files();
            let bytes = files
                .iter()
                .map(|file| file.volume().len())
                .fold(0u64, u64::saturating_add);
            let blocks = bytes.div_ceil(BLOCK.into());
            reply.statfs(blocks, 0, 0, files.len() as u64, 0, BLOCK, 255, BLOCK);
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
        reply.error(self.name_change_errno());
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
        reply.error(self.name_change_errno());
    }

    fn mkdir(&self, _req: &Request, _parent: INodeNo, _name: &OsStr, _mode: u32, _umask: u32, reply: ReplyEntry) {
        reply.error(self.name_change_errno());
    }

    fn symlink(&self, _req: &Request, _parent: INodeNo, _name: &OsStr, _target: &Path, reply: ReplyEntry) {
        reply.error(self.name_change_errno());
    }

    fn link(&self, _req: &Request, _ino: INodeNo, _parent: INodeNo, _name: &OsStr, reply: ReplyEntry) {
        reply.error(self.name_change_errno());
    }

    fn unlink(&self, _req: &Request, _parent: INodeNo, _name: &OsStr, reply: ReplyEmpty) {
        reply.error(self.name_change_errno());
    }

    fn rmdir(&self, _req: &Request, _parent: INodeNo, _name: &OsStr, reply: ReplyEmpty) {
        reply.error(self.name_change_errno());
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
        reply.error(self.name_change_errno());
    }
}
