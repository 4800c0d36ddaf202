//! A file system of one disk, for tests of the mount: the root is a folder with `disk.raw`, or the disk itself.

use std::ffi::OsStr;
use std::time::{Duration, SystemTime};

use fuser::{
    Errno, FileAttr, FileHandle, FileType, Filesystem, FopenFlags, Generation, INodeNo, LockOwner, OpenFlags,
    ReplyAttr, ReplyData, ReplyEntry, ReplyOpen, Request,
};

/// What goes wrong on purpose.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Fault {
    /// Nothing.
    None,
    /// EIO for every read that touches the first 64 KiB.
    Start,
    /// EIO for every read.
    All,
}

/// The file system; byte `n` of its disk is `n / 512 % 251`.
#[derive(Debug)]
pub(crate) struct TestFs {
    /// Bytes of the disk.
    pub(crate) size: u64,
    /// Whether the root is the disk.
    pub(crate) is_file: bool,
    /// What goes wrong.
    pub(crate) fault: Fault,
}

/// The name of the disk in a folder.
pub(crate) const DISK: &str = "disk.raw";

/// The byte at `offset` of the disk.
pub(crate) fn byte_at(offset: u64) -> u8 {
    (offset / 512 % 251) as u8
}

/// How far [`Fault`] tells the start from the rest.
const START: u64 = 64 << 10;

const ROOT: u64 = 1;
const FILE: u64 = 2;
const TTL: Duration = Duration::from_secs(1);

impl TestFs {
    fn attr(&self, ino: u64) -> FileAttr {
        let folder = ino == ROOT && !self.is_file;
        let time = SystemTime::UNIX_EPOCH;
        FileAttr {
            ino: INodeNo(ino),
            size: if folder { 0 } else { self.size },
            blocks: 0,
            atime: time,
            mtime: time,
            ctime: time,
            crtime: time,
            kind: if folder {
                FileType::Directory
            } else {
                FileType::RegularFile
            },
            perm: if folder { 0o755 } else { 0o644 },
            nlink: 1,
            uid: nix::unistd::getuid().as_raw(),
            gid: nix::unistd::getgid().as_raw(),
            rdev: 0,
            blksize: 4096,
            flags: 0,
        }
    }
}

impl Filesystem for TestFs {
    fn lookup(&self, _: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEntry) {
        if parent.0 == ROOT && name == DISK && !self.is_file {
            reply.entry(&TTL, &self.attr(FILE), Generation(0));
        } else {
            reply.error(Errno::ENOENT);
        }
    }

    fn getattr(&self, _: &Request, ino: INodeNo, _: Option<FileHandle>, reply: ReplyAttr) {
        reply.attr(&TTL, &self.attr(ino.0));
    }

    fn open(&self, _: &Request, _: INodeNo, _: OpenFlags, reply: ReplyOpen) {
        reply.opened(FileHandle(0), FopenFlags::empty());
    }

    fn read(
        &self,
        _: &Request,
        _: INodeNo,
        _: FileHandle,
        offset: u64,
        size: u32,
        _: OpenFlags,
        _: Option<LockOwner>,
        reply: ReplyData,
    ) {
        match self.fault {
            Fault::Start if offset < START => return reply.error(Errno::EIO),
            Fault::All => return reply.error(Errno::EIO),
            _ => {}
        }
        let end = self.size.min(offset + u64::from(size));
        let data: Vec<u8> = (offset..end).map(byte_at).collect();
        reply.data(&data);
    }
}
