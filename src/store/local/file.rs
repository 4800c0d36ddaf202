//! An open local file: exact reads, writes, holes and zeroing.

use std::fs::{self, File};
use std::io::{self, Seek, SeekFrom};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileExt, FileTypeExt, MetadataExt};
use std::path::PathBuf;
use std::sync::Arc;

use nix::errno::Errno;
use nix::fcntl::{AtFlags, FallocateFlags, fallocate};
use nix::sys::stat::fstatat;
use nix::unistd::{Whence, lseek};
use rustix::fs::{StatxFlags, statx};

use super::folder::{Folder, is_hidden};
use super::found::identity;
use super::origin::Origin;
use super::{LocalStore, Owner, proc_path};
use crate::error::{Error, ErrorKind, Result};
use crate::store::{
    Access, Identity, OpenPolicy, Store, StoredFile, StoredWrite, ofd_lock, printable, vmware_lock_file,
};

/// Open local file.
#[derive(Debug)]
pub(in crate::store) struct LocalFile {
    file: File,
    /// Path under which the file was opened, escaped for messages.
    label: String,
    /// Path without symlinks at the time of the open.
    real: PathBuf,
    /// Length at the time of the open, in bytes. The size of a device never changes while it is open.
    len: u64,
    device: bool,
    writable: bool,
    /// True if the file had a name when it was opened.
    named: bool,
    opened: Identity,
    policy: Arc<OpenPolicy>,
    /// Only for a file that the user named.
    pub(super) origin: Option<Origin>,
    /// Owner of the image that the user named, if the names in this file are opened with the owner's rights.
    pub(super) owner: Option<Owner>,
}

impl LocalFile {
    /// Zeroes a range by writing zeroes, for file systems that support neither holes nor zeroed ranges. Zeroes only
    /// what is inside of the file: a write would extend one that another process has truncated.
    pub(super) fn write_zeroes(&self, offset: u64, len: u64) -> Result<()> {
        const STEP: u64 = 1 << 16;
        let zeroes = vec![0; len.min(STEP) as usize];
        let mut done = 0;
        while done < len {
            let inside = self.current_len()?.saturating_sub(offset + done);
            // The length is read before each step, as the file may be truncated while the zeroes are written.
            let part = (len - done).min(STEP).min(inside) as usize;
            if part == 0 {
                break;
            }
            self.write_all_at(offset + done, zeroes.get(..part).unwrap_or_default())?;
            done += part as u64;
        }
        Ok(())
    }

    /// Writes zeroes into the holes between two bytes, for file systems that cannot allocate.
    fn fill_holes(&self, from: u64, to: u64) -> Result<()> {
        let mut at = from;
        while at < to {
            let (stored, bytes) = self.data_at(at)?;
            let bytes = bytes.clamp(1, to - at);
            if !stored {
                self.write_zeroes(at, bytes)?;
            }
            at += bytes;
        }
        Ok(())
    }

    /// Wraps an open file, after locking it if `policy` requires that.
    ///
    /// Errors: `Busy` if another program holds a conflicting lock, or the error of the operating system.
    pub(in crate::store) fn new(
        mut file: File,
        label: String,
        real: PathBuf,
        policy: Arc<OpenPolicy>,
        access: Access,
    ) -> Result<Self> {
        let lock = policy.lock && access != Access::Peek;
        if lock {
            ofd_lock::lock(&file, access, &label)?;
        }
        // Read after the lock is taken: until then another program may have been writing to the file, and the identity
        // at open must describe the content that this process reads.
        let metadata = file.metadata().map_err(|e| Error::io(format!("{label}: fstat"), e))?;
        if lock && metadata.is_file() {
            vmware_lock_file::check(&real, metadata.ino(), access)?;
        }
        let device = metadata.file_type().is_block_device();
        let len = if device {
            file.seek(SeekFrom::End(0))
                .map_err(|e| Error::io(format!("{label}: size of the device"), e))?
        } else {
            metadata.len()
        };
        let opened = identity(&metadata, len);
        Ok(Self {
            file,
            label,
            real,
            len,
            device,
            writable: access == Access::Write,
            named: !device && metadata.nlink() > 0,
            opened,
            policy,
            origin: None,
            owner: None,
        })
    }

    /// Makes the file the one that its image means by all names of this inode.
    pub(super) fn share(self, access: Access) -> Result<Arc<Self>> {
        let policy = Arc::clone(&self.policy);
        policy.remember(self, access)
    }

    /// Returns the present attributes.
    fn metadata(&self) -> Result<fs::Metadata> {
        self.file
            .metadata()
            .map_err(|e| Error::io("fstat", e).in_file(&self.label))
    }
}

impl StoredFile for LocalFile {
    fn len(&self) -> u64 {
        self.len
    }

    fn writer(&self) -> Option<&dyn StoredWrite> {
        self.writable.then_some(self as &dyn StoredWrite)
    }

    fn read_exact_at(&self, offset: u64, buf: &mut [u8]) -> Result<()> {
        let len = buf.len();
        let context = || format!("read of {len} bytes at byte {offset}");
        if offset.checked_add(len as u64).is_none_or(|end| end > i64::MAX as u64) {
            let refusal = Error::new(ErrorKind::OutOfRange, format!("{}: no file is that long", context()));
            return Err(refusal.in_file(&self.label));
        }
        let mut done = 0;
        while done < len {
            let at = offset + done as u64;
            match self.file.read_at(&mut buf[done..], at) {
                Ok(0) => {
                    let text = format!("{}: the file ends at byte {at}", context());
                    return Err(Error::corrupt(text).at_byte(at).in_file(&self.label));
                }
                Ok(read) => done += read,
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => return Err(Error::io(context(), e).at_byte(at).in_file(&self.label)),
            }
        }
        Ok(())
    }

    fn identity(&self) -> Result<Identity> {
        Ok(identity(&self.metadata()?, self.len))
    }

    fn identity_at_open(&self) -> Identity {
        self.opened
    }

    fn detects_modification(&self) -> bool {
        !self.device
    }

    fn is_device(&self) -> bool {
        self.device
    }

    fn allocated(&self) -> Result<u64> {
        if self.device {
            return Ok(self.len);
        }
        // st_blocks counts 512 bytes whatever the file system's block size is.
        Ok(self.metadata()?.blocks().saturating_mul(512))
    }

    fn data_at(&self, offset: u64) -> Result<(bool, u64)> {
        // A file that is open for writing may have grown since the open, so its end is not known here.
        let end = if self.writable && !self.device {
            i64::MAX as u64
        } else {
            self.len
        };
        let left = end.saturating_sub(offset).max(1);
        let from = i64::try_from(offset).unwrap_or(i64::MAX);
        // lseek moves the file position. That is harmless with several threads, because all reads and writes here pass
        // their own offset. SEEK_DATA returns `from` itself exactly if the byte there is stored.
        let (stored, next) = match lseek(&self.file, from, Whence::SeekData) {
            Ok(data) if data == from => (true, lseek(&self.file, from, Whence::SeekHole)),
            other => (false, other),
        };
        match next {
            Ok(next) => Ok((
                stored,
                u64::try_from(next).unwrap_or(0).saturating_sub(offset).clamp(1, left),
            )),
            // No data from here to the end of the file, or `from` is beyond the end. The two differ in the distance to
            // the end.
            Err(Errno::ENXIO) => {
                let end = u64::try_from(lseek(&self.file, 0, Whence::SeekEnd).unwrap_or(0)).unwrap_or(0);
                match end.saturating_sub(offset) {
                    // The file was truncated after the open, so the range is not known to be zero: a reader must get
                    // the error of the read instead of a hole.
                    0 => Ok((true, left)),
                    hole => Ok((false, hole.min(left))),
                }
            }
            // Devices and some file systems do not support SEEK_DATA.
            Err(Errno::EINVAL | Errno::EOPNOTSUPP) => Ok((true, left)),
            Err(e) => Err(Error::io(format!("lseek from byte {offset}"), e.into()).in_file(&self.label)),
        }
    }

    fn label(&self) -> &str {
        &self.label
    }

    fn own_name(&self) -> String {
        self.real.file_name().map(printable).unwrap_or_default()
    }

    fn siblings(&self) -> Result<Arc<dyn Store>> {
        let gone = |reason: &str| {
            let real = printable(&self.real);
            Error::new(
                ErrorKind::NotFound,
                format!("{}: the folder of {real} cannot be found: {reason}", self.label),
            )
        };
        let (Some(dir), Some(name)) = (self.real.parent(), self.real.file_name()) else {
            return Err(gone("the file has no path"));
        };
        // The kernel reported this path without symlinks. A symlink in it now was put there after the open, possibly to
        // redirect the lookup, so it is refused. The name must still lead to the open file itself.
        let folder = Folder::open_unlinked(dir)?;
        let found = fstatat(&folder.fd, name, AtFlags::AT_SYMLINK_NOFOLLOW);
        let now = self.metadata()?;
        match found {
            Ok(found) if (found.st_dev, found.st_ino) == (now.dev(), now.ino()) => Ok(Arc::new(LocalStore {
                folder,
                policy: Arc::clone(&self.policy),
                owner: self.owner.clone(),
                hidden: is_hidden(name),
            })),
            _ => Err(gone("the file was moved or deleted")),
        }
    }

    fn reopen(&self) -> Result<Arc<dyn StoredFile>> {
        let none = || {
            Error::unsupported(format!(
                "{}: cannot be opened again; unmount, then mount again",
                self.label
            ))
        };
        let origin = self.origin.as_ref().ok_or_else(none)?;
        let (found, file) = origin.open(&self.label, self.owner.as_ref())?;
        let mut file = Self::new(file, found.label, found.real, self.policy.renewed(), Access::Read)?;
        file.origin = Some(origin.clone());
        file.owner.clone_from(&self.owner);
        Ok(Arc::new(file))
    }

    fn check_named(&self) -> Result<()> {
        let gone = || {
            let text = format!(
                "{}: was deleted or replaced while it is mounted: what is written is lost at the unmount; copy the disk out \
                 of the mount to keep it",
                self.label
            );
            Err(Error::new(ErrorKind::Os(libc::ESTALE), text))
        };
        if !self.named {
            return Ok(());
        }
        let now = self.metadata()?;
        if now.nlink() == 0 {
            return gone();
        }
        // A hard link keeps the file, but not under the name that its user knows. The kernel follows a rename, and appends
        // this word to a name that was removed; a name may end with it too.
        let Ok(name) = fs::read_link(proc_path(&self.file)) else {
            return Ok(());
        };
        let removed = name.as_os_str().as_bytes().ends_with(b" (deleted)");
        let is_own = || {
            let found = fs::symlink_metadata(&name);
            found.is_ok_and(|found| (found.dev(), found.ino()) == (now.dev(), now.ino()))
        };
        if removed && !is_own() { gone() } else { Ok(()) }
    }

    fn fd(&self) -> Option<BorrowedFd<'_>> {
        Some(self.file.as_fd())
    }
}

impl StoredWrite for LocalFile {
    fn write_all_at(&self, offset: u64, buf: &[u8]) -> Result<()> {
        self.file.write_all_at(buf, offset).map_err(|e| {
            let context = format!("write of {} bytes at byte {offset}", buf.len());
            let failed = match e.kind() {
                // The write reached the end of a device.
                io::ErrorKind::WriteZero => Error::new(ErrorKind::Os(libc::ENOSPC), context),
                _ => Error::io(context, e),
            };
            failed.at_byte(offset).in_file(&self.label)
        })
    }

    fn current_len(&self) -> Result<u64> {
        if self.device {
            return Ok(self.len);
        }
        // Callers need the length for every write, so the kernel's cached value is used. fstat on NFS would first flush
        // all dirty pages to the server, because it also returns the time of the last change.
        let flags = rustix::fs::AtFlags::EMPTY_PATH | rustix::fs::AtFlags::STATX_DONT_SYNC;
        match statx(&self.file, c"", flags, StatxFlags::SIZE) {
            Ok(known) => Ok(known.stx_size),
            // A seccomp sandbox may refuse statx.
            Err(_) => Ok(self.metadata()?.len()),
        }
    }

    fn set_len(&self, len: u64) -> Result<()> {
        if self.device && len <= self.len {
            return Ok(());
        }
        self.file
            .set_len(len)
            .map_err(|e| Error::io(format!("setting the length to {len} bytes"), e).in_file(&self.label))
    }

    fn zero(&self, offset: u64, len: u64, unmap: bool) -> Result<()> {
        let context = || format!("zeroing {len} bytes at byte {offset}");
        if len == 0 {
            return Ok(());
        }
        let (Ok(from), Ok(bytes)) = (i64::try_from(offset), i64::try_from(len)) else {
            return Err(Error::new(ErrorKind::OutOfRange, context()).in_file(&self.label));
        };
        let mode = if unmap {
            FallocateFlags::FALLOC_FL_PUNCH_HOLE
        } else {
            FallocateFlags::FALLOC_FL_ZERO_RANGE
        };
        // KEEP_SIZE: zeroing must not extend the file, also if it was truncated meanwhile.
        let done = loop {
            match fallocate(&self.file, mode | FallocateFlags::FALLOC_FL_KEEP_SIZE, from, bytes) {
                Err(Errno::EINTR) => {}
                done => break done,
            }
        };
        match done {
            Ok(()) => Ok(()),
            // tmpfs supports holes but no ZERO_RANGE, other file systems support neither.
            Err(Errno::EOPNOTSUPP | Errno::ENOSYS | Errno::EINVAL | Errno::ENODEV) => self.write_zeroes(offset, len),
            Err(e) => Err(Error::io(context(), e.into()).at_byte(offset).in_file(&self.label)),
        }
    }

    fn allocate(&self, offset: u64, len: u64) -> Result<()> {
        let context = || format!("{}: allocating {len} bytes at byte {offset}", self.label);
        if self.device || len == 0 {
            return Ok(());
        }
        let (Ok(from), Ok(bytes)) = (i64::try_from(offset), i64::try_from(len)) else {
            return Err(Error::new(ErrorKind::OutOfRange, context()));
        };
        // KEEP_SIZE: as `zero`.
        let done = loop {
            match fallocate(&self.file, FallocateFlags::FALLOC_FL_KEEP_SIZE, from, bytes) {
                Err(Errno::EINTR) => {}
                done => break done,
            }
        };
        match done {
            Ok(()) => Ok(()),
            Err(Errno::EOPNOTSUPP | Errno::ENOSYS | Errno::ENODEV) => self.fill_holes(offset, offset + len),
            Err(e) => Err(Error::io(context(), e.into())),
        }
    }

    fn slow_zeroing(&self) -> Option<String> {
        let slow = |why: &str| Some(format!("{}: {why}", self.label));
        if self.device {
            let file = self.opened.file.1;
            let folder = format!("/sys/dev/block/{}:{}", libc::major(file), libc::minor(file));
            // A partition uses the queue of its disk, the folder above.
            let limits = ["queue", "../queue"].map(|queue| format!("{folder}/{queue}/write_zeroes_max_bytes"));
            let limit = limits.into_iter().find_map(|path| fs::read_to_string(path).ok());
            return match limit.is_some_and(|bytes| bytes.trim() == "0") {
                true => slow("the device has no command that writes zeroes"),
                false => None,
            };
        }
        // Asks the file system by punching a hole where the file has no bytes, which changes nothing: so far behind the
        // end that no concurrent write extends the file to there.
        const BEYOND: u64 = 1 << 40;
        let at = self.current_len().ok()?.saturating_add(BEYOND);
        let punch = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
        match fallocate(&self.file, punch, i64::try_from(at).ok()?, 1) {
            // EFBIG: more than a file there can have, as on FAT, which has no holes.
            Err(Errno::EOPNOTSUPP | Errno::ENOSYS | Errno::ENODEV | Errno::EFBIG) => {
                slow("its file system cannot punch holes")
            }
            _ => None,
        }
    }

    fn sync(&self) -> Result<()> {
        self.file
            .sync_data()
            .map_err(|e| Error::io("fdatasync", e).in_file(&self.label))
    }
}
