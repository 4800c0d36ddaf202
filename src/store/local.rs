//! Files of this machine, and the second half of the name gate: where a name leads.
//!
//! ```text
//!   name ──openat2 beneath the image's folder──▶ file of that folder          opened
//!             │ leaves it (absolute, `..`, a symlink)
//!             ▼
//!          the place it leads to ── in an allowed folder? ──no──▶ refused, with the option that would allow it
//!             └──yes: the same again, beneath that folder
//! ```
//! The kernel itself keeps every resolution beneath a folder, so nobody can swap a component between a check and
//! the open. A file is opened as a mere path first, so that its kind is known before an open could block (a FIFO)
//! or do something (a device); the file that is read afterwards is that very one. It is locked before anything of it
//! is looked at, and as long as it is open.

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

/// How often a name may lead from one allowed folder to another.
const HOPS_MAX: usize = 8;
/// How many symlinks a name may have; the kernel's own bound.
const SYMLINKS_MAX: usize = 40;
/// How often a lookup is done again that a rename elsewhere disturbed.
const LOOKUPS_MAX: usize = 64;

/// The files of one folder, and of those that the user allowed besides.
#[derive(Debug)]
pub struct LocalStore {
    folder: Folder,
    policy: Arc<OpenPolicy>,
}

impl LocalStore {
    /// The files of folder `dir`; names inside them may lead into the folders that `policy` allows too.
    ///
    /// Errors: `NotFound` or what the system says of `dir`.
    pub fn new(dir: &Path, policy: Arc<OpenPolicy>) -> Result<Self> {
        Ok(Self {
            folder: Folder::open(dir)?,
            policy,
        })
    }

    /// Opens the file that is called `path` from the folder.
    fn open_path(&self, path: &Path, access: Access) -> Result<LocalFile> {
        let allowed = Allowed {
            own: &self.folder,
            paths: &self.policy.allow,
        };
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
            let place = leads_to(&folder.real, &rest);
            (other, rest) = allowed.find(&place)?.ok_or_else(|| self.refusal(path, &place))?;
        }
        Err(self.refusal(path, &self.folder.real.join(rest)))
    }

    /// Lets a file in that a name inside of an image led to, if its kind is right; a device only if `devices`.
    fn admit(&self, found: Found, access: Access, devices: impl FnOnce() -> Result<bool>) -> Result<LocalFile> {
        let refuse = |why: String| {
            let context = format!("{}: a name inside an image leads to a {why}", found.label);
            Err(Error::new(ErrorKind::Policy, context))
        };
        match found.kind() {
            Kind::Regular => found.reopen(Arc::clone(&self.policy), access),
            Kind::Device if devices()? => found.reopen(Arc::clone(&self.policy), access),
            Kind::Device => {
                let folder = printable(found.real.parent().unwrap_or(&found.real));
                refuse(format!("block device; allow-dir={folder} would allow it"))
            }
            Kind::Other(what) => refuse(format!("{what}, expected a plain file")),
        }
    }

    /// The name of a file of the folder itself, and its label.
    fn plain<'n>(&self, name: &'n ExtentName) -> Result<(&'n Path, String)> {
        let path = name.as_path();
        let label = printable(self.folder.real.join(path));
        if path.components().count() != 1 || path.file_name() != Some(path.as_os_str()) {
            let context = format!("{label}: a new file is made only in the folder of its image");
            return Err(Error::new(ErrorKind::Policy, context));
        }
        Ok((path, label))
    }

    /// The error for a name that leads out.
    fn refusal(&self, name: &Path, place: &Path) -> Error {
        let folder = place.parent().unwrap_or(place);
        Error::new(
            ErrorKind::Policy,
            format!(
                "the image names `{}`, which leads to {}, outside of its folder {}; allow-dir={} would allow it",
                printable(name),
                printable(place),
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
        let (path, label) = self.plain(name)?;
        let flags = OFlag::O_RDWR | OFlag::O_CREAT | OFlag::O_EXCL | OFlag::O_CLOEXEC | OFlag::O_NOFOLLOW;
        let made = openat(&self.folder.fd, path, flags, Mode::from_bits_truncate(0o666));
        let fd = made.map_err(|e| Error::io(format!("{label}: making the file"), e.into()))?;
        let real = self.folder.real.join(path);
        let file = LocalFile::new(fd.into(), label, real, Arc::clone(&self.policy), Access::Write);
        if file.is_err() {
            // it was refused, and the name was free before
            unlinkat(&self.folder.fd, path, UnlinkatFlags::NoRemoveDir).ok();
        }
        Ok(Arc::new(file?))
    }

    fn remove(&self, name: &ExtentName, identity: &Identity) -> Result<()> {
        let (path, label) = self.plain(name)?;
        let context = || format!("{label}: removing the file");
        let there = nix::sys::stat::fstatat(&self.folder.fd, path, nix::fcntl::AtFlags::AT_SYMLINK_NOFOLLOW);
        let there = there.map_err(|e| Error::io(context(), e.into()))?;
        if (there.st_dev, there.st_ino) != identity.file {
            return Err(Error::new(
                ErrorKind::NotFound,
                format!("{}: another file has its name now", context()),
            ));
        }
        unlinkat(&self.folder.fd, path, UnlinkatFlags::NoRemoveDir).map_err(|e| Error::io(context(), e.into()))
    }

    fn sync(&self) -> Result<()> {
        let context = || format!("folder {}: fsync", printable(&self.folder.real));
        let folder = File::open(proc_path(&self.folder.fd)).map_err(|e| Error::io(context(), e))?;
        match folder.sync_all() {
            // some file systems have nothing to sync of a folder
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
            // what can't be named inside of an image is no file of one
            if !entry.file_type().is_ok_and(|kind| kind.is_dir()) {
                names.extend(ExtentName::new(entry.file_name().as_bytes()).ok());
            }
        }
        Ok(names)
    }
}

/// Opens the file that the user named himself: a regular file or a block device, symlinks followed. Names inside it
/// count from the folder of the real file and may lead into the folders that `policy` allows too.
///
/// Errors: `NotFound`, `Usage` for any other kind of file, `Busy` if somebody writes to it, or what the system says.
/// Never blocks on a FIFO. For writing, `ReadOnly` where its permissions or its file system don't allow it.
pub fn open_user_path(path: &Path, policy: Arc<OpenPolicy>, access: Access) -> Result<Arc<dyn StoredFile>> {
    let label = printable(path);
    let opened = fs::OpenOptions::new().read(true).custom_flags(libc::O_PATH).open(path);
    let found = Found::new(opened.map_err(|e| Error::io(label.clone(), e))?.into(), label)?;
    if let Kind::Other(what) = found.kind() {
        return Err(Error::new(
            ErrorKind::Usage,
            format!(
                "{}: it is a {what}, expected a regular file or a block device",
                found.label
            ),
        ));
    }
    Ok(Arc::new(found.reopen(policy, access)?))
}

/// An open file of this machine.
#[derive(Debug)]
pub(super) struct LocalFile {
    file: File,
    /// The path it was found by.
    label: String,
    /// The path without symlinks that it had when it was opened.
    real: PathBuf,
    len: u64,
    device: bool,
    writable: bool,
    opened: Identity,
    policy: Arc<OpenPolicy>,
}

impl LocalFile {
    /// Zeroes by writing them.
    fn write_zeroes(&self, offset: u64, len: u64) -> Result<()> {
        const STEP: u64 = 1 << 16;
        let zeroes = vec![0; len.min(STEP) as usize];
        let mut done = 0;
        while done < len {
            let part = (len - done).min(STEP) as usize;
            self.write_all_at(offset + done, zeroes.get(..part).unwrap_or_default())?;
            done += part as u64;
        }
        Ok(())
    }

    /// An open file; locks it if `policy` says so.
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
        // after the lock: a writer may have ended just now
        let metadata = file.metadata().map_err(|e| Error::io(format!("{label}: fstat"), e))?;
        if policy.lock && metadata.is_file() {
            vmware_lock_file::look(&real, metadata.ino(), access)?;
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
        })
    }

    /// Its attributes now.
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
        let wanted = buf.len();
        let context = || format!("{}: read of {wanted} bytes at byte {offset}", self.label);
        if offset
            .checked_add(wanted as u64)
            .is_none_or(|end| end > i64::MAX as u64)
        {
            return Err(Error::new(
                ErrorKind::OutOfRange,
                format!("{}: no file is that long", context()),
            ));
        }
        let mut done = 0;
        while done < wanted {
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

    fn allocated(&self) -> Result<u64> {
        if self.device {
            return Ok(self.len);
        }
        // st_blocks counts 512 bytes whatever the file system's block size is.
        Ok(self.metadata()?.blocks().saturating_mul(512))
    }

    fn data_at(&self, offset: u64) -> Result<(bool, u64)> {
        // what is written to may have grown
        let end = if self.writable && !self.device {
            i64::MAX as u64
        } else {
            self.len
        };
        let left = end.saturating_sub(offset).max(1);
        let from = i64::try_from(offset).unwrap_or(i64::MAX);
        // The file's own position is moved by this; nobody reads at it.
        let (stored, next) = match lseek(&self.file, from, Whence::SeekData) {
            Ok(data) if data == from => (true, lseek(&self.file, from, Whence::SeekHole)),
            other => (false, other),
        };
        match next {
            Ok(next) => Ok((
                stored,
                u64::try_from(next).unwrap_or(0).saturating_sub(offset).clamp(1, left),
            )),
            // no data from here on
            Err(Errno::ENXIO) => {
                let end = u64::try_from(lseek(&self.file, 0, Whence::SeekEnd).unwrap_or(0)).unwrap_or(0);
                match end.saturating_sub(offset) {
                    // behind the end of a file that was cut nothing is known to be zeroes: reading it is what tells
                    0 => Ok((true, left)),
                    hole => Ok((false, hole.min(left))),
                }
            }
            // devices and some file systems can't tell
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
        let gone = |why: &str| {
            let real = printable(&self.real);
            Error::new(
                ErrorKind::NotFound,
                format!("{}: the folder of {real} cannot be found: {why}", self.label),
            )
        };
        let (Some(dir), Some(name)) = (self.real.parent(), self.real.file_name()) else {
            return Err(gone("the file has no path"));
        };
        // The path was read from the kernel and had no symlink in it; one that stands there now is somebody's trap.
        let folder = Folder::open_unlinked(dir)?;
        let there = nix::sys::stat::fstatat(&folder.fd, name, nix::fcntl::AtFlags::AT_SYMLINK_NOFOLLOW);
        let now = self.metadata()?;
        match there {
            Ok(there) if (there.st_dev, there.st_ino) == (now.dev(), now.ino()) => Ok(Arc::new(LocalStore {
                folder,
                policy: Arc::clone(&self.policy),
            })),
            _ => Err(gone("the file was moved or deleted")),
        }
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
                // a device ends
                io::ErrorKind::WriteZero => Error::new(ErrorKind::Os(libc::ENOSPC), context),
                _ => Error::io(context, e),
            }
        })
    }

    fn current_len(&self) -> Result<u64> {
        if self.device {
            return Ok(self.len);
        }
        // Asked for each write, so what the kernel knows has to do: by fstat, NFS first sends all that was written to the
        // server, as it tells the time of the last change too.
        let flags = AtFlags::EMPTY_PATH | AtFlags::STATX_DONT_SYNC;
        match statx(&self.file, c"", flags, StatxFlags::SIZE) {
            Ok(known) => Ok(known.stx_size),
            // a sandbox may not know the call
            Err(_) => Ok(self.metadata()?.len()),
        }
    }

    fn set_len(&self, len: u64) -> Result<()> {
        if self.device && len <= self.len {
            return Ok(());
        }
        self.file
            .set_len(len)
            .map_err(|e| Error::io(format!("{}: set its length to {len} bytes", self.label), e))
    }

    fn zero(&self, offset: u64, len: u64, unmap: bool) -> Result<()> {
        let context = || format!("{}: {len} zeroes at byte {offset}", self.label);
        if len == 0 {
            return Ok(());
        }
        let (Ok(from), Ok(bytes)) = (i64::try_from(offset), i64::try_from(len)) else {
            return Err(Error::new(ErrorKind::OutOfRange, context()));
        };
        let how = if unmap {
            FallocateFlags::FALLOC_FL_PUNCH_HOLE
        } else {
            FallocateFlags::FALLOC_FL_ZERO_RANGE
        };
        let done = loop {
            match fallocate(&self.file, how | FallocateFlags::FALLOC_FL_KEEP_SIZE, from, bytes) {
                Err(Errno::EINTR) => {}
                done => break done,
            }
        };
        match done {
            Ok(()) => Ok(()),
            // tmpfs has holes but no ranges of zeroes, others have neither
            Err(Errno::EOPNOTSUPP | Errno::ENOSYS | Errno::EINVAL | Errno::ENODEV) => self.write_zeroes(offset, len),
            Err(e) => Err(Error::io(context(), e.into())),
        }
    }

    fn sync(&self) -> Result<()> {
        self.file
            .sync_data()
            .map_err(|e| Error::io(format!("{}: fdatasync", self.label), e))
    }
}

/// A folder beneath which names are looked up.
#[derive(Debug)]
struct Folder {
    fd: OwnedFd,
    /// Its path without symlinks.
    real: PathBuf,
}

impl Folder {
    /// Opens a folder by a path that the user said.
    fn open(path: &Path) -> Result<Self> {
        let opened = fs::OpenOptions::new()
            .read(true)
            .custom_flags(libc::O_PATH | libc::O_DIRECTORY)
            .open(path)
            .map_err(|e| Error::io(format!("folder {}", printable(path)), e))?;
        Self::of(opened.into())
    }

    /// Opens a folder by a path in which no symlink may be.
    fn open_unlinked(path: &Path) -> Result<Self> {
        let flags = OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
        let opened = lookup(nix::fcntl::AT_FDCWD, path, flags, ResolveFlag::RESOLVE_NO_SYMLINKS);
        Self::of(opened.map_err(|e| system(format!("folder {}", printable(path)), e))?)
    }

    fn of(fd: OwnedFd) -> Result<Self> {
        let real = real_path(&fd)?;
        Ok(Self { fd, real })
    }

    /// Finds what is called `name` without ever leaving the folder; `None` if the name leads out of it.
    fn beneath(&self, name: &Path) -> Result<Option<OwnedFd>> {
        let flags = OFlag::O_PATH | OFlag::O_CLOEXEC;
        let resolve = ResolveFlag::RESOLVE_BENEATH | ResolveFlag::RESOLVE_NO_MAGICLINKS;
        match lookup(&self.fd, name, flags, resolve) {
            Ok(fd) => Ok(Some(fd)),
            Err(Errno::EXDEV) => Ok(None),
            // A component that is no folder: there is no such file either.
            Err(Errno::ENOTDIR) => Err(system(printable(self.real.join(name)), Errno::ENOENT)),
            Err(Errno::ELOOP) => Err(Error::new(
                ErrorKind::Policy,
                format!(
                    "{}: the name runs through too many links, or one of /proc",
                    printable(self.real.join(name))
                ),
            )),
            Err(e) => Err(system(printable(self.real.join(name)), e)),
        }
    }
}

/// The folders that a name may lead into.
struct Allowed<'a> {
    /// The image's own.
    own: &'a Folder,
    /// Those that the user said.
    paths: &'a [PathBuf],
}

impl Allowed<'_> {
    /// The folder that holds `place`, and the way to it from there. `None` for the folder: the image's own.
    fn find(&self, place: &Path) -> Result<Option<(Option<Folder>, PathBuf)>> {
        if let Ok(rest) = place.strip_prefix(&self.own.real) {
            return Ok(Some((None, or_dot(rest))));
        }
        for path in self.paths {
            let folder = Folder::open(path).map_err(|e| e.within("allow-dir"))?;
            let said = std::path::absolute(path).unwrap_or_else(|_| path.clone());
            let rest = place
                .strip_prefix(&folder.real)
                .or_else(|_| place.strip_prefix(said))
                .map(or_dot);
            if let Ok(rest) = rest {
                return Ok(Some((Some(folder), rest)));
            }
        }
        Ok(None)
    }

    /// Whether the image's own folder lies in one that the user allowed.
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

/// A file that was found and whose kind is known, but that nobody opened yet.
struct Found {
    fd: OwnedFd,
    label: String,
    real: PathBuf,
    metadata: fs::Metadata,
}

/// The kinds of files, as far as it matters.
enum Kind {
    Regular,
    Device,
    /// What it is called.
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

    fn kind(&self) -> Kind {
        let kind = self.metadata.file_type();
        if kind.is_file() {
            Kind::Regular
        } else if kind.is_block_device() {
            Kind::Device
        } else if kind.is_fifo() {
            Kind::Other("FIFO")
        } else if kind.is_char_device() {
            Kind::Other("character device")
        } else if kind.is_dir() {
            Kind::Other("directory")
        } else {
            Kind::Other("socket or file of another kind")
        }
    }

    /// Opens it, and locks it if `policy` says so.
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

/// Why a file was not opened for writing.
fn refused_for_writing(label: &str, e: io::Error) -> Error {
    let context = format!("{label}: open for writing");
    match e.raw_os_error() {
        Some(libc::EACCES | libc::EPERM | libc::EROFS) => Error::new(ErrorKind::ReadOnly, format!("{context}: {e}")),
        _ => Error::io(context, e),
    }
}

/// The identity that attributes tell; a device has none of the length that it was opened with.
fn identity(now: &fs::Metadata, device_len: u64) -> Identity {
    let device = now.file_type().is_block_device();
    Identity {
        // several nodes may stand for one device, so a device is known by its number, not by its node
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

/// `openat2`, done again when a rename elsewhere disturbed it.
fn lookup(dir: impl AsFd, path: &Path, flags: OFlag, resolve: ResolveFlag) -> std::result::Result<OwnedFd, Errno> {
    for _ in 1..LOOKUPS_MAX {
        match openat2(&dir, path, OpenHow::new().flags(flags).resolve(resolve)) {
            Err(Errno::EAGAIN | Errno::EINTR) => {}
            done => return done,
        }
    }
    openat2(&dir, path, OpenHow::new().flags(flags).resolve(resolve))
}

/// What the kernel answered to a lookup.
fn system(context: String, errno: Errno) -> Error {
    if errno == Errno::ENOSYS {
        return Error::unsupported(format!(
            "{context}: no system call openat2; Linux 5.6 or later is needed"
        ));
    }
    Error::io(context, io::Error::from(errno))
}

/// The link of /proc through which the kernel opens the very file of `fd` again.
fn proc_path(fd: &OwnedFd) -> PathBuf {
    PathBuf::from(format!("/proc/self/fd/{}", fd.as_raw_fd()))
}

/// The path of an open file as the kernel sees it: absolute and without symlinks.
fn real_path(fd: &OwnedFd) -> Result<PathBuf> {
    let link = proc_path(fd);
    fs::read_link(&link).map_err(|e| {
        let context = format!("{} (is /proc mounted?)", link.display());
        Error::new(ErrorKind::Unsupported, format!("{context}: {e}"))
    })
}

/// Where `name` leads, from `folder` on: reads symlinks only inside of `folder`, and goes by the text outside. It
/// decides nothing by itself; what it says is opened beneath a folder again.
fn leads_to(folder: &Path, name: &Path) -> PathBuf {
    let steps = |path: &Path| {
        path.components()
            .map(|c| c.as_os_str().to_owned())
            .collect::<VecDeque<OsString>>()
    };
    let mut todo = steps(name);
    let mut at = folder.to_path_buf();
    let mut symlinks = 0;
    while let Some(step) = todo.pop_front() {
        match Path::new(&step).components().next() {
            Some(Component::ParentDir) => {
                at.pop();
            }
            Some(Component::RootDir) => at = PathBuf::from("/"),
            Some(Component::CurDir) => {}
            _ => at.push(&step),
        }
        if symlinks < SYMLINKS_MAX
            && at != folder
            && at.starts_with(folder)
            && let Ok(target) = fs::read_link(&at)
        {
            symlinks += 1;
            at.pop();
            let mut first = steps(&target);
            first.append(&mut todo);
            todo = first;
        }
    }
    at
}

/// A way from a folder; the folder itself is `.`.
fn or_dot(rest: &Path) -> PathBuf {
    if rest.as_os_str().is_empty() {
        PathBuf::from(".")
    } else {
        rest.to_path_buf()
    }
}

#[cfg(test)]
mod tests;
