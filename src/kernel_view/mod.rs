//! A disk that the kernel reads by itself, although it is not one flat file.
//!
//! EROFS can describe a file whose chunks lie anywhere in other files, with holes between: that is what the tables of
//! a VMDK and of its parents say. So the disk is described once, in an *index*, which is mounted nowhere over the very
//! extents; the one file in it is the disk, and `fuse/` hands it to the kernel as a backing file.
//!
//! ```text
//!   the engine's runs ── index.rs ──► EROFS image in memory (format.rs, store.rs)
//!                                         │ fsopen, fsconfig, fsmount (sys.rs): source = the image, devices = the extents
//!                                         ▼
//!   reader ─► FUSE (passthrough) ─► file of the EROFS ─► pages of the VMDK's own extents
//! ```
//! It is only ever an offer: whatever is missing (privilege, kernel, budget), the disk is read the usual way, and the
//! error of [`build`] is the reason that is told. It is right only as long as nothing writes to the disk, which is for
//! `fuse/` to watch.

use std::fs::File;
use std::num::NonZeroU64;
use std::ops::ControlFlow;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use nix::fcntl::{OFlag, openat};
use nix::sys::stat::Mode;
use nix::sys::utsname::uname;

use crate::block::{BlockRead, RunFile, RunPlace, Runs, SECTOR};
use crate::config::{KernelView, ViewConfig};
use crate::error::{Error, ErrorKind, Result};
use index::{Builder, Index, RunTarget};
use store::{IndexBacking, Stored};
use sys::{Context, LockedMapping};

mod format;
mod index;
mod store;
mod sys;

/// The longest that the tables of a disk are walked. A terabyte takes a second; what takes so much longer is damaged,
/// or lies where speed is not to be had by this.
const WALK_TIME: Duration = Duration::from_secs(60);

/// Runs between two looks at the clock.
const LOOK_EVERY: u32 = 1 << 12;

/// The first kernel that mounts EROFS from a file; 6.12 itself and 6.12.1 crash over blocks of 512 bytes.
const KERNEL: (u32, u32, u32) = (6, 12, 2);

/// From `linux/mount.h`: read-only, no set-user-ID, no devices.
const MOUNT_ATTRIBUTES: u64 = 0x1 | 0x2 | 0x4;

/// A disk that the kernel can read by itself.
#[derive(Debug)]
pub struct View {
    file: File,
    bytes: u64,
    chunk: u64,
    home: String,
    _resident: Option<LockedMapping>,
}

impl View {
    /// The file whose bytes are the disk. It can't be opened with `O_DIRECT`.
    pub fn fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }

    /// Bytes of memory that its index takes.
    pub fn index_bytes(&self) -> u64 {
        self.bytes
    }
}

impl std::fmt::Display for View {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(
            f,
            "an index of {} KiB in {}, chunks of {} bytes",
            self.bytes.div_ceil(1024),
            self.home,
            self.chunk
        )
    }
}

/// Makes the view of a disk whose files do not change. `budget` bounds the bytes of its index; once `stop` is true it is given up.
///
/// Errors: why there is none, as a clause that follows a colon.
pub fn build(disk: &dyn BlockRead, config: &ViewConfig, budget: u64, stop: &AtomicBool) -> Result<View> {
    let runs = check(disk)?;
    privileged()?;
    let files = runs.files();
    let lens: Vec<u64> = files.iter().map(|f| f.len).collect();
    let mut builder = Builder::new(disk.geometry().sectors, &lens, budget)?;
    let mut watch = Watch::new(stop);
    let mut refused = Ok(());
    let walked = runs.walk(&mut |sectors: NonZeroU64, place| {
        let place = match place {
            RunPlace::Stored { file, sector } => RunTarget::Stored { device: file, sector },
            RunPlace::Zero => RunTarget::Zero,
        };
        refused = watch.look().and_then(|()| builder.add(sectors, place));
        if refused.is_ok() {
            ControlFlow::Continue(())
        } else {
            ControlFlow::Break(())
        }
    });
    refused.and(walked)?;
    mount(builder.finish()?, &files, config)
}

/// Who would read the files of a disk in a mount, as far as that is known without walking its tables: for people.
pub fn describe(disk: &dyn BlockRead, config: &ViewConfig, writable: bool) -> String {
    if config.mode == KernelView::Off {
        return "this program: kernel-view=off".to_owned();
    }
    if disk.backing_fd().is_some() {
        return match nix::unistd::geteuid().is_root() {
            true => "the kernel itself (FUSE passthrough, where it has that)".to_owned(),
            false => "this program: FUSE passthrough needs root".to_owned(),
        };
    }
    match check(disk).and_then(|_| privileged()) {
        Ok(()) if writable => "this program; read-only (-r), the kernel itself, by an index".to_owned(),
        Ok(()) => "the kernel itself, by an index of where the data lie".to_owned(),
        Err(why) => format!("this program: {why}"),
    }
}

/// Looks at what needs no I/O.
fn check(disk: &dyn BlockRead) -> Result<&dyn Runs> {
    if disk.writer().is_some() {
        return Err(Error::unsupported("the disk can be written to"));
    }
    let runs = disk.runs().ok_or_else(|| {
        Error::unsupported("its data are not stored as they are read (compressed, or below an overlay)")
    })?;
    for file in runs.files() {
        if file.fd.is_none() {
            return Err(Error::unsupported("an extent is no regular file of this machine"));
        }
    }
    Ok(runs)
}

/// Whether this process may make such a mount, and the kernel knows the file system.
fn privileged() -> Result<()> {
    let release = uname()
        .map_err(|e| Error::io("uname", e.into()))?
        .release()
        .to_string_lossy()
        .into_owned();
    if version(&release) < KERNEL {
        let (major, minor, patch) = KERNEL;
        return Err(Error::unsupported(format!(
            "it needs Linux {major}.{minor}.{patch}, this is {release}"
        )));
    }
    match Context::open(c"erofs") {
        Ok(_) => Ok(()),
        Err(e) => Err(match e.raw_os_error() {
            Some(libc::EPERM) => Error::unsupported("it needs root (CAP_SYS_ADMIN)"),
            Some(libc::ENODEV) => Error::unsupported("the kernel has no EROFS"),
            _ => Error::io("fsopen of EROFS", e),
        }),
    }
}

/// The numbers of a release, `6.12.48+deb13-amd64` for example; 0 where there are none.
fn version(release: &str) -> (u32, u32, u32) {
    let mut numbers = release
        .split(|c: char| !c.is_ascii_digit())
        .map(|n| n.parse().unwrap_or(0));
    let mut next = || numbers.next().unwrap_or(0);
    (next(), next(), next())
}

/// Looks now and then whether a walk has to end.
struct Watch<'a> {
    stop: &'a AtomicBool,
    begun: Instant,
    left: u32,
}

impl<'a> Watch<'a> {
    fn new(stop: &'a AtomicBool) -> Self {
        Self {
            stop,
            begun: Instant::now(),
            left: 0,
        }
    }

    fn look(&mut self) -> Result<()> {
        if let Some(left) = self.left.checked_sub(1) {
            self.left = left;
            return Ok(());
        }
        self.left = LOOK_EVERY;
        if self.stop.load(Ordering::Relaxed) {
            return Err(Error::new(ErrorKind::Os(libc::EINTR), "it was not wanted any more"));
        }
        if self.begun.elapsed() > WALK_TIME {
            return Err(Error::unsupported(format!(
                "its tables took more than {} s to read",
                WALK_TIME.as_secs()
            )));
        }
        Ok(())
    }
}

/// Puts the index where the kernel takes it, and mounts it.
fn mount(index: Index, files: &[RunFile<'_>], config: &ViewConfig) -> Result<View> {
    let (bytes, chunk) = (index.bytes(), index.chunk());
    let (home, file) = settle(config)?;
    let stored = Stored::write(&home, file, index)?;
    let opened = mount_index(stored.fd(), files)?;
    Ok(View {
        file: opened.into(),
        bytes,
        chunk,
        home: home.name(),
        _resident: stored.into_resident(),
    })
}

/// The first place that the kernel reads an index from, and an empty file there. A tiny one is tried first, which costs
/// little and spares the large one where it would be in vain.
fn settle(config: &ViewConfig) -> Result<(IndexBacking, File)> {
    let mut why = Vec::new();
    for home in store::homes(config.dir.as_deref()) {
        match try_home(&home) {
            Ok(file) => return Ok((home, file)),
            Err(e) => why.push(e.to_string()),
        }
    }
    Err(Error::unsupported(why.join("; ")))
}

/// Mounts a disk of one sector from `home`, and reads it, where its extent is shorter than was said. The kernel has to
/// tell that as an error. One that makes zeroes of it (6.12 and later, until it was repaired) would do the same where a
/// read of an extent is cut short by the end of its reader, and show them to all others.
fn try_home(home: &IndexBacking) -> Result<File> {
    let extent = home.file()?;
    extent
        .set_len(SECTOR / 2)
        .map_err(|e| Error::io(format!("an extent in {}", home.name()), e))?;
    let mut builder = Builder::new(1, &[SECTOR], u64::MAX)?;
    builder.add(NonZeroU64::MIN, RunTarget::Stored { device: 0, sector: 0 })?;
    let stored = Stored::write(home, home.file()?, builder.finish()?)?;
    let extents = [RunFile {
        len: SECTOR,
        fd: Some(extent.as_fd()),
    }];
    let disk = mount_index(stored.fd(), &extents).map_err(|e| e.within(format!("an index in {}", home.name())))?;
    let mut sector = [0; SECTOR as usize];
    match File::from(disk).read_exact_at(&mut sector, 0) {
        Err(_) => home.file(),
        Ok(()) => Err(Error::unsupported(
            "the kernel makes zeroes of what it could not read; a newer one does not",
        )),
    }
}

/// Mounts the image in `index` over `files`, nowhere, and opens the disk in it.
fn mount_index(index: BorrowedFd<'_>, files: &[RunFile<'_>]) -> Result<OwnedFd> {
    let erofs = Context::open(c"erofs").map_err(|e| Error::io("fsopen of EROFS", e))?;
    let said = |e: std::io::Error, erofs: &Context| match (e.raw_os_error(), erofs.complaint()) {
        (Some(libc::ENOTBLK), _) => {
            Error::unsupported("the kernel does not mount EROFS from such a file (Linux 6.12, not from tmpfs)")
        }
        (_, Some(text)) => Error::io(format!("mounting its index: {text}"), e),
        (_, None) => Error::io("mounting its index", e),
    };
    let set = || {
        erofs.set_file(c"source", index)?;
        files
            .iter()
            .filter_map(|f| f.fd)
            .try_for_each(|fd| erofs.set_file(c"device", fd))?;
        erofs.set_flag(c"ro")
    };
    set().map_err(|e| said(e, &erofs))?;
    let root = erofs.mount(MOUNT_ATTRIBUTES).map_err(|e| said(e, &erofs))?;
    openat(&root, format::FILE, OFlag::O_RDONLY | OFlag::O_CLOEXEC, Mode::empty())
        .map_err(|e| Error::io("opening the disk in its index", e.into()))
}

#[cfg(test)]
mod tests;
