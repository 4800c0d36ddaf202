//! Kernel view: lets the kernel read a disk itself, although the disk is not one flat file.
//!
//! EROFS can describe a file whose chunks lie anywhere in other files, with holes between them. The tables of a VMDK
//! and of its parents say just that. So the disk is described once, in an *index*: an EROFS image whose devices are the
//! VMDK's own extents. It is mounted without a mount point. The one file in it is the disk, and `fuse/` passes that
//! file to the kernel as a backing file.
//!
//! ```text
//!   the engine's runs ── index.rs ──► EROFS image in memory (format.rs, store.rs)
//!                                         │ fsopen, fsconfig, fsmount (sys.rs): source = the image, devices = the
//!                                         extents
//!                                         ▼
//!   reader ─► FUSE (passthrough) ─► file of the EROFS ─► pages of the VMDK's own extents
//! ```
//! A view is optional: if anything is missing (privilege, kernel, budget), the daemon serves the disk, and the error of
//! [`build`] is the reason that is logged. A view is correct only as long as nothing writes to the disk; `fuse/` has to
//! watch for that.

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
use store::{IndexBacking, StoredIndex};
use sys::{Context, LockedMapping};

mod format;
mod index;
mod memory;
mod store;
mod sys;

/// Longest time to walk the tables of a disk. A terabyte takes a second. Tables that take so much longer are damaged,
/// or on storage so slow that a view would not help.
const WALK_TIME: Duration = Duration::from_secs(60);

/// Number of runs between two checks of the clock.
const CLOCK_INTERVAL: u32 = 1 << 12;

/// First kernel that mounts EROFS from a file without crashing: 6.12 and 6.12.1 crash with blocks of 512 bytes.
const KERNEL: (u32, u32, u32) = (6, 12, 2);

/// From `linux/mount.h`: read-only, no set-user-ID, no devices.
const MOUNT_ATTRIBUTES: u64 = 0x1 | 0x2 | 0x4;

/// A mounted index, and the file in it that has the content of the disk.
#[derive(Debug)]
pub struct View {
    file: File,
    bytes: u64,
    chunk: u64,
    backing: String,
    _locked: Option<LockedMapping>,
}

impl View {
    /// Returns the file whose bytes are the disk. It cannot be opened with `O_DIRECT`.
    pub fn fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }

    /// Returns the bytes of memory that the index takes.
    pub(crate) fn index_bytes(&self) -> u64 {
        self.bytes
    }
}

impl std::fmt::Display for View {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(
            f,
            "an index of {} KiB in {}, chunks of {} bytes",
            self.bytes.div_ceil(1024),
            self.backing,
            self.chunk
        )
    }
}

/// Builds the view of a disk whose files do not change.
///
/// `budget` bounds the bytes of the index, and so does the available memory. Once `stop` is true, the build ends with an error.
///
/// Errors: the reason why there is no view, as a clause that follows a colon.
pub fn build(disk: &dyn BlockRead, config: &ViewConfig, budget: u64, stop: &AtomicBool) -> Result<View> {
    let runs = check(disk)?;
    privileged()?;
    let files = runs.files();
    let lens: Vec<u64> = files.iter().map(|f| f.len).collect();
    // Read at each build: what is available changes, and earlier views of this mount have taken their part.
    let budget = budget.min(memory::index_limit());
    let mut builder = Builder::new(disk.geometry().sectors, &lens, budget)?;
    let mut limit = WalkLimit::new(stop);
    let mut refused = Ok(());
    let walked = runs.walk(&mut |sectors: NonZeroU64, place| {
        let place = match place {
            RunPlace::Stored { file, sector } => RunTarget::Stored { device: file, sector },
            RunPlace::Zero => RunTarget::Zero,
        };
        // The walk itself knows no errors of its reader, so the first one is kept here.
        refused = limit.check().and_then(|()| builder.add(sectors, place));
        if refused.is_ok() {
            ControlFlow::Continue(())
        } else {
            ControlFlow::Break(())
        }
    });
    // In this order: a walk that was ended by `refused` reports no error of its own.
    refused.and(walked)?;
    mount(builder.finish()?, &files, config)
}

/// Describes, for people, which program would read the disk in a mount, as far as that is known without walking its
/// tables.
pub fn describe(disk: &dyn BlockRead, config: &ViewConfig, writable: bool) -> String {
    if config.mode == KernelView::Off {
        return "this program: kernel-view=off".to_owned();
    }
    // Asked before the view: one flat file needs no index.
    if disk.backing_fd().is_some() {
        return match nix::unistd::geteuid().is_root() {
            true => "the kernel itself (FUSE passthrough, if the kernel has it)".to_owned(),
            false => "this program: FUSE passthrough needs root".to_owned(),
        };
    }
    match check(disk).and_then(|_| privileged()) {
        Ok(()) if writable => "this program; read-only (-r), the kernel itself, by an index".to_owned(),
        Ok(()) => "the kernel itself, by an index of its extents".to_owned(),
        Err(why) => format!("this program: {why}"),
    }
}

/// Checks the conditions that need no I/O, and returns the disk's runs.
fn check(disk: &dyn BlockRead) -> Result<&dyn Runs> {
    if disk.writer().is_some() {
        return Err(Error::unsupported("the disk can be written to"));
    }
    let runs = disk.runs().ok_or_else(|| Error::unsupported(disk.why_no_runs()))?;
    for file in runs.files() {
        if file.fd.is_none() {
            return Err(Error::unsupported("an extent is not a regular file on this machine"));
        }
    }
    Ok(runs)
}

/// Checks that this process may create such a mount, and that the kernel supports EROFS.
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
    // Opening a context needs the privilege and loads the module, and it mounts nothing yet. Dropping it undoes it.
    match Context::open(c"erofs") {
        Ok(_) => Ok(()),
        Err(e) => Err(match e.raw_os_error() {
            Some(libc::EPERM) => Error::unsupported("it needs root (CAP_SYS_ADMIN)"),
            Some(libc::ENODEV) => Error::unsupported("the kernel has no EROFS"),
            _ => Error::io("fsopen of EROFS", e),
        }),
    }
}

/// Parses the numbers of a kernel release such as `6.12.48+deb13-amd64`. A missing number is 0.
fn version(release: &str) -> (u32, u32, u32) {
    let mut numbers = release
        .split(|c: char| !c.is_ascii_digit())
        .map(|n| n.parse().unwrap_or(0));
    let mut next = || numbers.next().unwrap_or(0);
    (next(), next(), next())
}

/// Checks at intervals if a walk has to end.
struct WalkLimit<'a> {
    stop: &'a AtomicBool,
    begun: Instant,
    calls_left: u32,
}

impl<'a> WalkLimit<'a> {
    fn new(stop: &'a AtomicBool) -> Self {
        Self {
            stop,
            begun: Instant::now(),
            calls_left: 0,
        }
    }

    /// Returns an error if the walk was stopped or takes too long. Reads the clock only every [`CLOCK_INTERVAL`] calls.
    fn check(&mut self) -> Result<()> {
        if let Some(left) = self.calls_left.checked_sub(1) {
            self.calls_left = left;
            return Ok(());
        }
        // Some 20 million grains a second pass here (`extent_walk.rs`), too many to read the clock for each.
        self.calls_left = CLOCK_INTERVAL;
        if self.stop.load(Ordering::Relaxed) {
            return Err(Error::new(ErrorKind::Os(libc::EINTR), "the mount ended first"));
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

/// Stores the index where the kernel can read it, and mounts it.
fn mount(index: Index, files: &[RunFile<'_>], config: &ViewConfig) -> Result<View> {
    let (bytes, chunk) = (index.bytes(), index.chunk());
    // Only now, as the probe mounts and writes files, which is in vain for a disk without an index.
    let (backing, file) = choose_backing(config)?;
    let stored = StoredIndex::write(&backing, file, index)?;
    let opened = mount_index(stored.fd(), files)?;
    Ok(View {
        file: opened.into(),
        bytes,
        chunk,
        backing: backing.name(),
        _locked: stored.into_locked_mapping(),
    })
}

/// Returns the first backing that the kernel reads an index from, and an empty file in it.
///
/// Each backing is probed with a tiny index, which costs little and saves writing a large one in vain.
fn choose_backing(config: &ViewConfig) -> Result<(IndexBacking, File)> {
    let mut reasons = Vec::new();
    for backing in store::backings(config.dir.as_deref()) {
        match probe_backing(&backing) {
            Ok(file) => return Ok((backing, file)),
            Err(e) => reasons.push(e.to_string()),
        }
    }
    Err(Error::unsupported(reasons.join("; ")))
}

/// Checks a backing with an index of one sector, and returns an empty file in it.
///
/// The extent of the probe is shorter than its index says, and the kernel has to report that as an error on read. Some
/// kernels (6.12 and later, until the fix) return zeroes instead. Such a kernel would do the same when the read of an
/// extent is interrupted by the exit of its reader, and then serve those zeroes from the page cache to every other
/// reader.
fn probe_backing(backing: &IndexBacking) -> Result<File> {
    let extent = backing.file()?;
    extent
        // Half a sector: the index says one, so that the read below must fail.
        .set_len(SECTOR / 2)
        .map_err(|e| Error::io(format!("an extent in {}", backing.name()), e))?;
    let mut builder = Builder::new(1, &[SECTOR], u64::MAX)?;
    builder.add(NonZeroU64::MIN, RunTarget::Stored { device: 0, sector: 0 })?;
    let stored = StoredIndex::write(backing, backing.file()?, builder.finish()?)?;
    let extents = [RunFile {
        len: SECTOR,
        fd: Some(extent.as_fd()),
    }];
    let disk = mount_index(stored.fd(), &extents).map_err(|e| e.within(format!("an index in {}", backing.name())))?;
    let mut sector = [0; SECTOR as usize];
    match File::from(disk).read_exact_at(&mut sector, 0) {
        Err(_) => backing.file(),
        Ok(()) => Err(Error::unsupported(
            "the kernel returns zeroes for a failed read (a bug of Linux 6.12 and later that newer kernels have fixed)",
        )),
    }
}

/// Mounts the image in `index` over `files` without a mount point, and opens the disk in it.
fn mount_index(index: BorrowedFd<'_>, files: &[RunFile<'_>]) -> Result<OwnedFd> {
    let erofs = Context::open(c"erofs").map_err(|e| Error::io("fsopen of EROFS", e))?;
    let mount_error = |e: std::io::Error, erofs: &Context| match (e.raw_os_error(), erofs.message()) {
        (Some(libc::ENOTBLK), _) => {
            Error::unsupported("the kernel does not mount EROFS from such a file (Linux 6.12, not from tmpfs)")
        }
        (_, Some(text)) => Error::io(format!("mounting its index: {text}"), e),
        (_, None) => Error::io("mounting its index", e),
    };
    let configure = || {
        erofs.set_file(c"source", index)?;
        files
            .iter()
            // All of them have one: `check` has refused extents without. Their order is that of the numbers in the
            // index.
            .filter_map(|f| f.fd)
            .try_for_each(|fd| erofs.set_file(c"device", fd))?;
        erofs.set_flag(c"ro")
    };
    configure().map_err(|e| mount_error(e, &erofs))?;
    // No path leads to this mount. It lives as long as the file in it, or the FUSE passthrough of that file, is open.
    let root = erofs.mount(MOUNT_ATTRIBUTES).map_err(|e| mount_error(e, &erofs))?;
    openat(&root, format::FILE, OFlag::O_RDONLY | OFlag::O_CLOEXEC, Mode::empty())
        .map_err(|e| Error::io("opening the disk in its index", e.into()))
}

#[cfg(test)]
mod tests;
