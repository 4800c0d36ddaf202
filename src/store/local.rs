//! Local files, and the check of where a name inside an image leads.
//!
//! ```text
//!   name ──openat2 beneath the image's folder──▶ file of that folder          opened
//!             │ leads out of it (absolute, `..`, a symlink)
//!             ▼
//!          the path it leads to ── in an allowed folder? ──no──▶ refused, with the option that would allow it
//!             └──yes: openat2 again, beneath that folder
//! ```
//! Invariants:
//! - The kernel confines every lookup to a folder (`RESOLVE_BENEATH`), so another process cannot replace a component of
//!   the path between a check and the open. The path that [`leads_to`] computes is only a hint for the next lookup.
//! - A file is opened with `O_PATH` first, which neither blocks on a FIFO nor acts on a device. Its type is checked on
//!   that descriptor, and the same inode is then opened through `/proc/self/fd`.
//! - A file is locked before its attributes or content are read, and stays locked until it is closed.

use std::collections::VecDeque;
use std::ffi::OsString;
use std::fs::{self, File};
use std::io::{self, Seek, SeekFrom};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileExt, FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::{Component, Path, PathBuf};
use std::sync::Arc;

use nix::errno::Errno;
use nix::fcntl::{FallocateFlags, OFlag, OpenHow, ResolveFlag, fallocate, openat, openat2};
use nix::sys::stat::Mode;
use nix::unistd::{UnlinkatFlags, Whence, lseek, unlinkat};
use rustix::fs::{AtFlags, StatxFlags, statx};

use super::{
    Access, ExtentName, Identity, OpenPolicy, Store, StoredFile, StoredWrite, ofd_lock, printable, vmware_lock_file,
};
use crate::error::{Error, ErrorKind, Result};

/// Maximum number of folders in which one name is looked up, as each lookup can lead to another allowed folder.
const HOPS_MAX: usize = 8;
/// Maximum number of symlinks in a name, the same as the kernel's limit.
const SYMLINKS_MAX: usize = 40;
/// Maximum number of attempts of a lookup that a concurrent rename or a signal interrupts.
const LOOKUPS_MAX: usize = 64;

/// Store of the files in one folder and in the folders that the user allowed.
#[derive(Debug)]
pub struct LocalStore {
    folder: Folder,
    policy: Arc<OpenPolicy>,
}

impl LocalStore {
    /// Opens the store of folder `dir`. Names inside its files may also lead to the folders that `policy` allows.
    ///
    /// Errors: `NotFound`, `Unsupported` if `/proc` is not mounted, or the error of the operating system for `dir`.
    pub fn new(dir: &Path, policy: Arc<OpenPolicy>) -> Result<Self> {
        Ok(Self {
            folder: Folder::open(dir)?,
            policy,
        })
    }

    /// Opens the file at `path`, relative to the folder.
    fn open_path(&self, path: &Path, access: Access) -> Result<LocalFile> {
        let allowed = AllowedFolders {
            own: &self.folder,
            paths: &self.policy.allow,
        };
        // The folder of the present lookup; `None` is the image's own.
        let mut other: Option<Folder> = None;
        let mut rest = path.to_path_buf();
        for _ in 0..HOPS_MAX {
            let folder = other.as_ref().unwrap_or(&self.folder);
            if let Some(fd) = folder.beneath(&rest)? {
                let label = printable(folder.real.join(&rest));
                return self.admit(Found::new(fd, label)?, access, || {
                    Ok(other.is_some() || allowed.holds_own()?)
                });
            }
            let target = leads_to(&folder.real, &rest);
            (other, rest) = allowed.find(&target)?.ok_or_else(|| self.refusal(path, &target))?;
        }
        Err(self.refusal(path, &self.folder.real.join(rest)))
    }

    /// Opens a file that a name inside an image leads to, if its type is allowed. A block device is allowed only if
    /// `devices` returns true.
    fn admit(&self, found: Found, access: Access, devices: impl FnOnce() -> Result<bool>) -> Result<LocalFile> {
        let refuse = |reason: String| {
            let context = format!("{}: a name inside an image leads to a {reason}", found.label);
            Err(Error::new(ErrorKind::Policy, context))
        };
        match found.file_type() {
            FileType::Regular => found.reopen(Arc::clone(&self.policy), access),
            FileType::Device if devices()? => found.reopen(Arc::clone(&self.policy), access),
            FileType::Device => {
                let folder = printable(found.real.parent().unwrap_or(&found.real));
                refuse(format!("block device; allow-dir={folder} would allow it"))
            }
            FileType::Other(name) => refuse(format!("{name}, expected a regular file")),
        }
    }

    /// Returns the path of a file in the folder itself, and its label.
    ///
    /// Errors: `Policy` if the name has more than one component or is `.` or `..`.
    fn in_folder<'n>(&self, name: &'n ExtentName) -> Result<(&'n Path, String)> {
        let path = name.as_path();
        let label = printable(self.folder.real.join(path));
        if path.components().count() != 1 || path.file_name() != Some(path.as_os_str()) {
            let context = format!("{label}: a new file can only be created in the folder of its image");
            return Err(Error::new(ErrorKind::Policy, context));
        }
        Ok((path, label))
    }

    /// Returns the error for a name that leads out of the allowed folders, to `target`.
    fn refusal(&self, name: &Path, target: &Path) -> Error {
        let folder = target.parent().unwrap_or(target);
        Error::new(
            ErrorKind::Policy,
            format!(
                "the image names `{}`, which leads to {}, outside of its folder {}; allow-dir={} would allow it",
                printable(name),
                printable(target),
                printable(&self.folder.real),
                printable(folder)
            ),
        )
    }
}

impl Store for LocalStore {
    fn open(&self, name: &ExtentName, access: Access) -> Result<Arc<dyn StoredFile>> {
        let opened = match (self.open_path(name.as_path(), access), name.raw_path()) {
            (Err(missing), Some(raw)) if missing.kind() == ErrorKind::NotFound => match self.open_path(raw, access) {
                Err(e) if e.kind() == ErrorKind::NotFound => Err(missing),
                other => other,
            },
            (other, _) => other,
        };
        Ok(Arc::new(opened?))
    }

    fn create(&self, name: &ExtentName) -> Result<Arc<dyn StoredFile>> {
        let (path, label) = self.in_folder(name)?;
        let flags = OFlag::O_RDWR | OFlag::O_CREAT | OFlag::O_EXCL | OFlag::O_CLOEXEC | OFlag::O_NOFOLLOW;
        let created = openat(&self.folder.fd, path, flags, Mode::from_bits_truncate(0o666));
        let fd = created.map_err(|e| Error::io(format!("{label}: creating the file"), e.into()))?;
        let real = self.folder.real.join(path);
        let file = LocalFile::new(fd.into(), label, real, Arc::clone(&self.policy), Access::Write);
        if file.is_err() {
            // The lock was refused. O_EXCL guarantees that the name was free, so removing it restores the folder.
            unlinkat(&self.folder.fd, path, UnlinkatFlags::NoRemoveDir).ok();
        }
        Ok(Arc::new(file?))
    }

    fn remove(&self, name: &ExtentName, identity: &Identity) -> Result<()> {
        let (path, label) = self.in_folder(name)?;
        let context = || format!("{label}: removing the file");
        let found = nix::sys::stat::fstatat(&self.folder.fd, path, nix::fcntl::AtFlags::AT_SYMLINK_NOFOLLOW);
        let found = found.map_err(|e| Error::io(context(), e.into()))?;
        if (found.st_dev, found.st_ino) != identity.file {
            return Err(Error::new(
                ErrorKind::NotFound,
                format!("{}: another file has this name now", context()),
            ));
        }
        unlinkat(&self.folder.fd, path, UnlinkatFlags::NoRemoveDir).map_err(|e| Error::io(context(), e.into()))
    }

    fn sync(&self) -> Result<()> {
        let context = || format!("folder {}: fsync", printable(&self.folder.real));
        let folder = File::open(proc_path(&self.folder.fd)).map_err(|e| Error::io(context(), e))?;
        match folder.sync_all() {
            // Some file systems do not support fsync on a folder.
            Err(e) if e.raw_os_error() == Some(libc::EINVAL) => Ok(()),
            done => done.map_err(|e| Error::io(context(), e)),
        }
    }

    fn names(&self, most: usize) -> Result<Vec<ExtentName>> {
        let context = || format!("folder {}", printable(&self.folder.real));
        let entries = fs::read_dir(proc_path(&self.folder.fd)).map_err(|e| Error::io(context(), e))?;
        let mut names = Vec::new();
        for entry in entries {
            if names.len() >= most {
                break;
            }
            let entry = entry.map_err(|e| Error::io(context(), e))?;
            // A name that `ExtentName` refuses cannot occur inside an image, so it belongs to no file of an image.
            if !entry.file_type().is_ok_and(|kind| kind.is_dir()) {
                names.extend(ExtentName::new(entry.file_name().as_bytes()).ok());
            }
        }
        Ok(names)
    }
}

/// Opens a file that the user named: a regular file or a block device. Symlinks are followed. Never blocks on a FIFO.
///
/// Names inside the file are relative to the folder of the symlink's target, and may also lead to the folders that
/// `policy` allows.
///
/// Errors: `NotFound`, `Usage` for any other type of file, `Busy` if another program uses the file in a way that
/// conflicts with `access`, `ReadOnly` if its permissions or its file system do not allow writing, or the error of the
/// operating system.
pub fn open_user_path(path: &Path, policy: Arc<OpenPolicy>, access: Access) -> Result<Arc<dyn StoredFile>> {
    let label = printable(path);
    let opened = fs::OpenOptions::new().read(true).custom_flags(libc::O_PATH).open(path);
    let found = Found::new(opened.map_err(|e| Error::io(label.clone(), e))?.into(), label)?;
    if let FileType::Other(name) = found.file_type() {
        return Err(Error::new(
            ErrorKind::Usage,
            format!(
                "{}: it is a {name}, expected a regular file or a block device",
                found.label
            ),
        ));
    }
    let origin = Origin::of(&found);
    let mut file = found.reopen(policy, access)?;
    file.origin = origin;
    Ok(Arc::new(file))
}

/// The place of a file that the user named: where it is looked for after another process has replaced it.
#[derive(Debug, Clone)]
struct Origin {
    /// Held since the first open, so that a directory of the path that another user replaces does not redirect the lookup.
    folder: Arc<Folder>,
    name: OsString,
    /// User ID of the file's owner.
    owner: u32,
}

impl Origin {
    /// Returns the place of a regular file; `None` for a device, and for a file whose folder is not there any more.
    fn of(found: &Found) -> Option<Self> {
        let name = found.real.file_name().filter(|_| found.metadata.is_file())?;
        let folder = Folder::open_unlinked(found.real.parent()?).ok()?;
        Some(Self {
            folder: Arc::new(folder),
            name: name.to_owned(),
            owner: found.metadata.uid(),
        })
    }

    /// Opens the file that has the name now. Follows no symbolic link: the file and its folder may belong to a user with
    /// fewer rights than this process.
    fn open(&self, label: &str, policy: Arc<OpenPolicy>) -> Result<LocalFile> {
        let refuse = |reason: String| Err(Error::new(ErrorKind::Policy, format!("{label}: {reason}")));
        let flags = OFlag::O_PATH | OFlag::O_CLOEXEC;
        let resolve = ResolveFlag::RESOLVE_BENEATH | ResolveFlag::RESOLVE_NO_SYMLINKS | ResolveFlag::RESOLVE_NO_XDEV;
        let fd = match lookup(&self.folder.fd, Path::new(&self.name), flags, resolve) {
            Err(Errno::ELOOP | Errno::EXDEV) => {
                return refuse(
                    "the image was replaced by a link, which is not followed; unmount, then mount again".into(),
                );
            }
            found => found.map_err(|e| lookup_error(label.to_owned(), e))?,
        };
        let found = Found::new(fd, label.to_owned())?;
        if let FileType::Device | FileType::Other(_) = found.file_type() {
            return refuse("the image was replaced by something that is no regular file".into());
        }
        if found.metadata.uid() != self.owner {
            let (now, before) = (found.metadata.uid(), self.owner);
            return refuse(format!(
                "the image was replaced by a file of another user ({now}, before {before}); unmount, then mount again"
            ));
        }
        let mut file = found.reopen(policy, Access::Read)?;
        file.origin = Some(self.clone());
        Ok(file)
    }
}

/// Open local file.
#[derive(Debug)]
pub(super) struct LocalFile {
    file: File,
    /// Path under which the file was opened, escaped for messages.
    label: String,
    /// Path without symlinks at the time of the open.
    real: PathBuf,
    /// Length at the time of the open, in bytes. The size of a device never changes while it is open.
    len: u64,
    device: bool,
    writable: bool,
    opened: Identity,
    policy: Arc<OpenPolicy>,
    /// Only for a file that the user named.
    origin: Option<Origin>,
}

impl LocalFile {
    /// Zeroes a range by writing zeroes, for file systems that support neither holes nor zeroed ranges. Zeroes only
    /// what is inside of the file: a write would extend one that another process has truncated.
    fn write_zeroes(&self, offset: u64, len: u64) -> Result<()> {
        const STEP: u64 = 1 << 16;
        let zeroes = vec![0; len.min(STEP) as usize];
        let mut done = 0;
        while done < len {
            let inside = self.current_len()?.saturating_sub(offset + done);
            let part = (len - done).min(STEP).min(inside) as usize;
            if part == 0 {
                break;
            }
            self.write_all_at(offset + done, zeroes.get(..part).unwrap_or_default())?;
            done += part as u64;
        }
        Ok(())
    }

    /// Wraps an open file, after locking it if `policy` requires that.
    ///
    /// Errors: `Busy` if another program holds a conflicting lock, or the error of the operating system.
    pub(super) fn new(
        mut file: File,
        label: String,
        real: PathBuf,
        policy: Arc<OpenPolicy>,
        access: Access,
    ) -> Result<Self> {
        if policy.lock {
            ofd_lock::lock(&file, access, &label)?;
        }
        // Read after the lock is taken: until then another program may have been writing to the file, and the identity
        // at open must describe the content that this process reads.
        let metadata = file.metadata().map_err(|e| Error::io(format!("{label}: fstat"), e))?;
        if policy.lock && metadata.is_file() {
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
            opened,
            policy,
            origin: None,
        })
    }

    /// Returns the present attributes.
    fn metadata(&self) -> Result<fs::Metadata> {
        self.file
            .metadata()
            .map_err(|e| Error::io(format!("{}: fstat", self.label), e))
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
        let context = || format!("{}: read of {len} bytes at byte {offset}", self.label);
        if offset.checked_add(len as u64).is_none_or(|end| end > i64::MAX as u64) {
            return Err(Error::new(
                ErrorKind::OutOfRange,
                format!("{}: no file is that long", context()),
            ));
        }
        let mut done = 0;
        while done < len {
            let at = offset + done as u64;
            match self.file.read_at(&mut buf[done..], at) {
                Ok(0) => return Err(Error::corrupt(format!("{}: the file ends at byte {at}", context()))),
                Ok(read) => done += read,
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => return Err(Error::io(context(), e)),
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
            Err(e) => Err(Error::io(format!("{}: lseek from byte {offset}", self.label), e.into())),
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
        let found = nix::sys::stat::fstatat(&folder.fd, name, nix::fcntl::AtFlags::AT_SYMLINK_NOFOLLOW);
        let now = self.metadata()?;
        match found {
            Ok(found) if (found.st_dev, found.st_ino) == (now.dev(), now.ino()) => Ok(Arc::new(LocalStore {
                folder,
                policy: Arc::clone(&self.policy),
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
        Ok(Arc::new(origin.open(&self.label, Arc::clone(&self.policy))?))
    }

    fn fd(&self) -> Option<BorrowedFd<'_>> {
        Some(self.file.as_fd())
    }
}

impl StoredWrite for LocalFile {
    fn write_all_at(&self, offset: u64, buf: &[u8]) -> Result<()> {
        self.file.write_all_at(buf, offset).map_err(|e| {
            let context = format!("{}: write of {} bytes at byte {offset}", self.label, buf.len());
            match e.kind() {
                // The write reached the end of a device.
                io::ErrorKind::WriteZero => Error::new(ErrorKind::Os(libc::ENOSPC), context),
                _ => Error::io(context, e),
            }
        })
    }

    fn current_len(&self) -> Result<u64> {
        if self.device {
            return Ok(self.len);
        }
        // Callers need the length for every write, so the kernel's cached value is used. fstat on NFS would first flush
        // all dirty pages to the server, because it also returns the time of the last change.
        let flags = AtFlags::EMPTY_PATH | AtFlags::STATX_DONT_SYNC;
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
            .map_err(|e| Error::io(format!("{}: setting the length to {len} bytes", self.label), e))
    }

    fn zero(&self, offset: u64, len: u64, unmap: bool) -> Result<()> {
        let context = || format!("{}: zeroing {len} bytes at byte {offset}", self.label);
        if len == 0 {
            return Ok(());
        }
        let (Ok(from), Ok(bytes)) = (i64::try_from(offset), i64::try_from(len)) else {
            return Err(Error::new(ErrorKind::OutOfRange, context()));
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
            .map_err(|e| Error::io(format!("{}: fdatasync", self.label), e))
    }
}

/// Open folder, beneath which names are looked up. The descriptor keeps it valid if the folder is renamed.
#[derive(Debug)]
struct Folder {
    fd: OwnedFd,
    /// Path without symlinks at the time of the open.
    real: PathBuf,
}

impl Folder {
    /// Opens a folder by a path of the user, following symlinks.
    fn open(path: &Path) -> Result<Self> {
        let opened = fs::OpenOptions::new()
            .read(true)
            .custom_flags(libc::O_PATH | libc::O_DIRECTORY)
            .open(path)
            .map_err(|e| Error::io(format!("folder {}", printable(path)), e))?;
        Self::of(opened.into())
    }

    /// Opens a folder by a path that must not contain a symlink.
    fn open_unlinked(path: &Path) -> Result<Self> {
        let flags = OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
        let opened = lookup(nix::fcntl::AT_FDCWD, path, flags, ResolveFlag::RESOLVE_NO_SYMLINKS);
        Self::of(opened.map_err(|e| lookup_error(format!("folder {}", printable(path)), e))?)
    }

    fn of(fd: OwnedFd) -> Result<Self> {
        let real = real_path(&fd)?;
        Ok(Self { fd, real })
    }

    /// Looks up `name` without leaving the folder. Returns `None` if the name leads out of it.
    fn beneath(&self, name: &Path) -> Result<Option<OwnedFd>> {
        let flags = OFlag::O_PATH | OFlag::O_CLOEXEC;
        let resolve = ResolveFlag::RESOLVE_BENEATH | ResolveFlag::RESOLVE_NO_MAGICLINKS;
        match lookup(&self.fd, name, flags, resolve) {
            Ok(fd) => Ok(Some(fd)),
            Err(Errno::EXDEV) => Ok(None),
            // A component of the path is not a folder, so the file does not exist either.
            Err(Errno::ENOTDIR) => Err(lookup_error(printable(self.real.join(name)), Errno::ENOENT)),
            Err(Errno::ELOOP) => Err(Error::new(
                ErrorKind::Policy,
                format!(
                    "{}: the name leads through too many links or through a link of /proc",
                    printable(self.real.join(name))
                ),
            )),
            Err(e) => Err(lookup_error(printable(self.real.join(name)), e)),
        }
    }
}

/// Folders that a name may lead to.
struct AllowedFolders<'a> {
    /// Folder of the image.
    own: &'a Folder,
    /// Folders of the option `allow-dir`.
    paths: &'a [PathBuf],
}

impl AllowedFolders<'_> {
    /// Returns the allowed folder that contains `target`, and the path of `target` relative to it. The folder is `None`
    /// for the image's own folder. The whole result is `None` if no allowed folder contains `target`.
    fn find(&self, target: &Path) -> Result<Option<(Option<Folder>, PathBuf)>> {
        if let Ok(rest) = target.strip_prefix(&self.own.real) {
            return Ok(Some((None, or_dot(rest))));
        }
        for path in self.paths {
            let folder = Folder::open(path).map_err(|e| e.within("allow-dir"))?;
            // `target` is computed partly from text, so it may start with the folder's path as the user wrote it,
            // instead of the resolved path.
            let as_written = std::path::absolute(path).unwrap_or_else(|_| path.clone());
            let rest = target
                .strip_prefix(&folder.real)
                .or_else(|_| target.strip_prefix(as_written))
                .map(or_dot);
            if let Ok(rest) = rest {
                return Ok(Some((Some(folder), rest)));
            }
        }
        Ok(None)
    }

    /// Returns true if the user allowed the image's own folder or a folder above it.
    fn holds_own(&self) -> Result<bool> {
        for path in self.paths {
            let folder = Folder::open(path).map_err(|e| e.within("allow-dir"))?;
            if self.own.real.starts_with(&folder.real) {
                return Ok(true);
            }
        }
        Ok(false)
    }
}

/// File that was looked up but not opened: `fd` is an `O_PATH` descriptor.
struct Found {
    fd: OwnedFd,
    label: String,
    real: PathBuf,
    metadata: fs::Metadata,
}

/// Type of a file.
enum FileType {
    Regular,
    /// Block device.
    Device,
    /// Any other type, with its name for messages.
    Other(&'static str),
}

impl Found {
    fn new(fd: OwnedFd, label: String) -> Result<Self> {
        let real = real_path(&fd)?;
        let file = File::from(fd);
        let metadata = file.metadata().map_err(|e| Error::io(format!("{label}: fstat"), e))?;
        Ok(Self {
            fd: file.into(),
            label,
            real,
            metadata,
        })
    }

    fn file_type(&self) -> FileType {
        let file_type = self.metadata.file_type();
        if file_type.is_file() {
            FileType::Regular
        } else if file_type.is_block_device() {
            FileType::Device
        } else if file_type.is_fifo() {
            FileType::Other("FIFO")
        } else if file_type.is_char_device() {
            FileType::Other("character device")
        } else if file_type.is_dir() {
            FileType::Other("directory")
        } else {
            FileType::Other("socket or file of another type")
        }
    }

    /// Opens the file for `access`, and locks it if `policy` requires that.
    fn reopen(self, policy: Arc<OpenPolicy>, access: Access) -> Result<LocalFile> {
        let Self { fd, label, real, .. } = self;
        let file = match access {
            Access::Read => {
                File::open(proc_path(&fd)).map_err(|e| Error::io(format!("{label}: open for reading"), e))?
            }
            Access::Write => {
                let opened = fs::OpenOptions::new().read(true).write(true).open(proc_path(&fd));
                opened.map_err(|e| refused_for_writing(&label, e))?
            }
        };
        LocalFile::new(file, label, real, policy, access)
    }
}

/// Returns the error of an open for writing: `ReadOnly` if permissions or the file system do not allow it.
fn refused_for_writing(label: &str, e: io::Error) -> Error {
    let context = format!("{label}: open for writing");
    match e.raw_os_error() {
        Some(libc::EACCES | libc::EPERM | libc::EROFS) => Error::new(ErrorKind::ReadOnly, format!("{context}: {e}")),
        _ => Error::io(context, e),
    }
}

/// Returns the identity from attributes. `device_len` is the length of a block device, which its attributes do not
/// contain.
fn identity(now: &fs::Metadata, device_len: u64) -> Identity {
    let device = now.file_type().is_block_device();
    Identity {
        // Several nodes may stand for one device, so a device is identified by its number instead of its node.
        file: if device {
            (u64::MAX, now.rdev())
        } else {
            (now.dev(), now.ino())
        },
        len: if device { device_len } else { now.len() },
        mtime_ns: i128::from(now.mtime()) * 1_000_000_000 + i128::from(now.mtime_nsec()),
        ctime_ns: i128::from(now.ctime()) * 1_000_000_000 + i128::from(now.ctime_nsec()),
    }
}

/// Calls `openat2`, and retries if a concurrent rename or a signal interrupts it.
///
/// The kernel returns EAGAIN if a rename or mount anywhere on the system could have moved a component out of `dir`
/// during a `RESOLVE_BENEATH` lookup with `..` in it.
fn lookup(dir: impl AsFd, path: &Path, flags: OFlag, resolve: ResolveFlag) -> std::result::Result<OwnedFd, Errno> {
    for _ in 1..LOOKUPS_MAX {
        match openat2(&dir, path, OpenHow::new().flags(flags).resolve(resolve)) {
            Err(Errno::EAGAIN | Errno::EINTR) => {}
            done => return done,
        }
    }
    openat2(&dir, path, OpenHow::new().flags(flags).resolve(resolve))
}

/// Returns the error of a failed lookup. ENOSYS means that the kernel is too old for `openat2`.
fn lookup_error(context: String, errno: Errno) -> Error {
    if errno == Errno::ENOSYS {
        return Error::unsupported(format!(
            "{context}: the kernel has no system call openat2; Linux 5.6 or later is required"
        ));
    }
    Error::io(context, io::Error::from(errno))
}

/// Returns the magic link in `/proc` that opens the same inode as `fd` again, whatever its path is by then.
pub(crate) fn proc_path(fd: impl AsFd) -> PathBuf {
    PathBuf::from(format!("/proc/self/fd/{}", fd.as_fd().as_raw_fd()))
}

/// Returns the path of an open file as the kernel reports it: absolute and without symlinks.
pub(crate) fn real_path(fd: impl AsFd) -> Result<PathBuf> {
    let link = proc_path(fd);
    fs::read_link(&link).map_err(|e| {
        let context = format!("{} (is /proc mounted?)", link.display());
        Error::new(ErrorKind::Unsupported, format!("{context}: {e}"))
    })
}

/// Returns the path that `name` leads to from `folder`. Reads symlinks only inside `folder`; outside, it processes the
/// components as text.
///
/// The result is not safe against concurrent changes and grants nothing: it only selects the folder of the next lookup.
fn leads_to(folder: &Path, name: &Path) -> PathBuf {
    let components = |path: &Path| {
        path.components()
            .map(|c| c.as_os_str().to_owned())
            .collect::<VecDeque<OsString>>()
    };
    let mut todo = components(name);
    let mut at = folder.to_path_buf();
    let mut symlinks = 0;
    while let Some(component) = todo.pop_front() {
        match Path::new(&component).components().next() {
            Some(Component::ParentDir) => {
                at.pop();
            }
            Some(Component::RootDir) => at = PathBuf::from("/"),
            Some(Component::CurDir) => {}
            _ => at.push(&component),
        }
        // A symlink outside the folder is not read: nothing there may have an effect before its folder is allowed.
        if symlinks < SYMLINKS_MAX
            && at != folder
            && at.starts_with(folder)
            && let Ok(target) = fs::read_link(&at)
        {
            symlinks += 1;
            at.pop();
            let mut first = components(&target);
            first.append(&mut todo);
            todo = first;
        }
    }
    at
}

/// Returns a path relative to a folder, with `.` for the folder itself.
fn or_dot(rest: &Path) -> PathBuf {
    if rest.as_os_str().is_empty() {
        PathBuf::from(".")
    } else {
        rest.to_path_buf()
    }
}

#[cfg(test)]
mod tests;
