//! A file system with one disk, for tests of the mount: the root is a directory with `disk.raw`, or the disk itself.

use std::ffi::OsStr;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use fuser::{
    Errno, FileAttr, FileHandle, FileType, Filesystem, FopenFlags, Generation, INodeNo, LockOwner, OpenFlags,
    ReplyAttr, ReplyData, ReplyEntry, ReplyOpen, Request,
};

use super::disk_file::{DiskFile, FileMaker};
use crate::config::{DiskConfig, LocalConfig, MountKind, SourceConfig};
use crate::test_disk::TestDisk;
use crate::volume::Volume;
use crate::volume::loop_budget::LoopBudget;

/// Fault that the file system injects.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Fault {
    /// No fault.
    None,
    /// EIO for every read that touches the first 64 KiB.
    Start,
    /// EIO for every read.
    All,
}

/// The file system. Byte `n` of its disk is `n / 512 % 251`.
#[derive(Debug)]
pub(crate) struct TestFs {
    /// Size of the disk in bytes.
    pub(crate) size: u64,
    /// True if the root is the disk.
    pub(crate) is_file: bool,
    /// Injected fault.
    pub(crate) fault: Fault,
}

/// Returns the file of a disk in a directory.
pub(super) fn disk_file(name: &str, disk: TestDisk) -> Arc<DiskFile> {
    let maker = FileMaker {
        mount_kind: MountKind::Dir,
        loops: Arc::new(LoopBudget::new(1)),
        pool: Arc::default(),
        error_log: Arc::default(),
    };
    let config = DiskConfig::new(name, SourceConfig::Local(LocalConfig::new("/x")));
    maker.make(config, Volume::new(Arc::new(disk), Vec::new()))
}

/// Name of the disk in the directory.
pub(crate) const DISK: &str = "disk.raw";

/// Returns the byte at `offset` of the disk.
pub(crate) fn byte_at(offset: u64) -> u8 {
    (offset / 512 % 251) as u8
}

/// Size of the range that [`Fault::Start`] damages.
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
