//! Tests on real mounts. They need root and `/dev/fuse`, and print `SKIPPED` without them.
//!
//! These tests read from a mount that their own process serves, which only works because every request is answered (see
//! `probe.rs`). A fault that leaves a request unanswered would hang the test process for good.

use std::ffi::OsString;
use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use tempfile::TempDir;

use super::mount::{Mount, Unmounted};
use super::probe::probe_file;
use super::readahead::{self, Window};
use super::session::Running;
use super::target::Target;
use super::testfs::{DISK, Fault, TestFs, byte_at};
use crate::config::{DiskConfig, Format, LocalConfig, MountKind, MountOptions, PageCache, SourceConfig};
use crate::fuse::DiskFs;
use crate::mountinfo::{self, FSTYPE};
use crate::process::signals::wait;
use crate::test_disk::TestDisk;
use crate::volume::Volume;

const SIZE: u64 = 1 << 20;

/// A mount in a directory of its own, removed however the test ends.
struct Mounted {
    session: Option<Running>,
    mount: Mount,
    point: PathBuf,
    _dir: TempDir,
}

impl Mounted {
    /// Creates the mount. `None`, with a message, where this machine allows no mounts.
    fn new(is_file: bool, fault: Fault, options: &MountOptions) -> Option<Self> {
        if !nix::unistd::geteuid().is_root() || !Path::new("/dev/fuse").exists() {
            eprintln!("SKIPPED: real mounts need root and /dev/fuse");
            return None;
        }
        let dir = TempDir::with_prefix("vmdkfuse test \\").unwrap();
        let point = dir.path().join("the point");
        if is_file {
            fs::write(&point, "covered").unwrap();
        } else {
            fs::create_dir(&point).unwrap();
            fs::write(point.join("hidden"), "").unwrap();
        }
        let target = Target::resolve(&point, true).unwrap();
        assert_eq!(target.is_file, is_file);
        let (mount, device) = Mount::new(&target, options, "a, b\\c.vmdk").unwrap();
        let session = Running::start(
            TestFs {
                size: SIZE,
                is_file,
                fault,
            },
            device,
            options,
            2,
        )
        .unwrap();
        Some(Self {
            session: Some(session),
            mount,
            point,
            _dir: dir,
        })
    }

    fn disk(&self) -> PathBuf {
        if self.point.is_file() {
            self.point.clone()
        } else {
            self.point.join(DISK)
        }
    }

    /// Waits until the session has ended on its own, and returns its result.
    fn end(&mut self) -> crate::error::Result<()> {
        let session = self.session.take().unwrap();
        let soon = Instant::now() + Duration::from_secs(60);
        assert_eq!(
            wait([session.ended()], Some(soon)).unwrap(),
            [true],
            "the session still runs"
        );
        session.result()
    }

    fn entry(&self) -> Option<mountinfo::MountEntry> {
        mountinfo::at(&self.point).unwrap()
    }
}

/// Returns the settings of a raw disk that is only read, and of which the kernel keeps no pages.
fn uncached(name: impl Into<OsString>) -> DiskConfig {
    let local = LocalConfig {
        format: Format::Raw,
        ..LocalConfig::new("none")
    };
    DiskConfig {
        read_only: true,
        cache: Some(PageCache::None),
        ..DiskConfig::new(name, SourceConfig::Local(local))
    }
}

fn options() -> MountOptions {
    MountOptions {
        read_only: true,
        ..Default::default()
    }
}

fn check_whole_disk(path: &Path) {
    let data = fs::read(path).unwrap();
    assert_eq!(data.len() as u64, SIZE);
    assert!(data.iter().zip(0..).all(|(&b, offset)| b == byte_at(offset)));
}

#[test]
fn mount_of_a_folder_shows_its_type_and_source_and_ends_cleanly() {
    let Some(mut m) = Mounted::new(false, Fault::None, &options()) else {
        return;
    };
    let entry = m.entry().unwrap();
    assert_eq!(
        (entry.fstype.as_str(), entry.source.to_str()),
        (FSTYPE, Some("a, b\\c.vmdk"))
    );
    check_whole_disk(&m.disk());
    assert_eq!(m.mount.unmount().unwrap(), Unmounted::Clean);
    m.end().unwrap();
    assert_eq!(m.entry(), None);
    assert!(m.point.join("hidden").exists());
    assert_eq!(m.mount.unmount().unwrap(), Unmounted::Gone);
}

#[test]
fn mount_over_a_regular_file_covers_it() {
    let Some(mut m) = Mounted::new(true, Fault::None, &options()) else {
        return;
    };
    check_whole_disk(&m.disk());
    assert_eq!(m.mount.unmount().unwrap(), Unmounted::Clean);
    m.end().unwrap();
    assert_eq!(fs::read_to_string(&m.point).unwrap(), "covered");
}

#[test]
fn mount_that_is_busy_is_detached_and_its_session_ends_with_the_last_user() {
    let Some(mut m) = Mounted::new(false, Fault::None, &options()) else {
        return;
    };
    let file = File::open(m.disk()).unwrap();
    assert_eq!(m.mount.unmount().unwrap(), Unmounted::Detached);
    assert_eq!(m.entry(), None);
    let mut byte = [0];
    file.read_exact_at(&mut byte, 512 * 5).unwrap();
    assert_eq!(byte, [5]);
    assert_eq!(
        wait([m.session.as_ref().unwrap().ended()], Some(Instant::now())).unwrap(),
        [false]
    );
    drop(file);
    m.end().unwrap();
}

#[test]
fn mount_through_the_helper_shows_the_same_type_and_source() {
    let Some(mut m) = Mounted::new(false, Fault::None, &options()) else {
        return;
    };
    m.mount.unmount().unwrap();
    m.end().unwrap();
    let device =
        super::fusermount::mount(&Target::resolve(&m.point, true).unwrap(), &options(), "a, b\\c.vmdk").unwrap();
    let fs = TestFs {
        size: SIZE,
        is_file: false,
        fault: Fault::None,
    };
    m.session = Some(Running::start(fs, device, &options(), 2).unwrap());
    let entry = m.entry().unwrap();
    assert_eq!(
        (entry.fstype.as_str(), entry.source.to_str()),
        (FSTYPE, Some("a, b\\c.vmdk"))
    );
    check_whole_disk(&m.disk());
    super::fusermount::unmount(&m.point, false).unwrap();
    m.end().unwrap();
    assert_eq!(m.entry(), None);
}

#[test]
fn mount_that_is_taken_is_refused_with_the_command() {
    let Some(m) = Mounted::new(false, Fault::None, &options()) else {
        return;
    };
    let e = Target::resolve(&m.point, true).unwrap_err().to_string();
    assert!(
        e.contains("is a vmdkfuse mount already; unmount it first: umount '"),
        "{e}"
    );
}

#[test]
fn mount_that_is_stale_is_refused_with_the_command_that_clears_it() {
    let Some(mut m) = Mounted::new(false, Fault::None, &options()) else {
        return;
    };
    let minor = m.mount.device().minor;
    let abort = format!("/sys/fs/fuse/connections/{minor}/abort");
    // The kernel now has cached attributes, which must not make the mount look alive.
    fs::metadata(&m.point).unwrap();
    if fs::write(&abort, "1").is_err() {
        eprintln!("SKIPPED: no {abort}");
        return;
    }
    m.end().unwrap();
    for path in [m.point.clone(), m.point.join("new.raw")] {
        let e = Target::resolve(&path, true).unwrap_err().to_string();
        let clear = format!("clear it with: umount '{}'", m.point.display());
        assert!(e.contains("process is gone") && e.ends_with(&clear), "{e}");
    }
    assert!(m.mount.clear_dead().unwrap());
    assert_eq!(m.entry(), None);
}

#[test]
fn mount_of_another_process_at_the_same_point_is_left_alone() {
    let Some(mut m) = Mounted::new(false, Fault::None, &options()) else {
        return;
    };
    nix::mount::umount(&m.point).unwrap();
    m.end().unwrap();
    let target = Target::resolve(&m.point, true).unwrap();
    let (mut other, device) = Mount::new(&target, &options(), "other").unwrap();
    let fs = TestFs {
        size: SIZE,
        is_file: false,
        fault: Fault::None,
    };
    let session = Running::start(fs, device, &options(), 2).unwrap();
    // The kernel may have given the new mount the ID and device of ours.
    assert!(!m.mount.clear_dead().unwrap());
    assert_eq!(m.mount.unmount().unwrap(), Unmounted::Gone);
    assert_eq!(m.entry().unwrap().source, "other");
    other.unmount().unwrap();
    drop(session);
}

#[test]
fn mount_read_ahead_is_raised_and_never_lowered() {
    let Some(m) = Mounted::new(false, Fault::None, &options()) else {
        return;
    };
    let device = m.mount.device();
    if !Path::new(&format!("/sys/class/bdi/{device}")).exists() {
        eprintln!("SKIPPED: no /sys/class/bdi/{device}");
        return;
    }
    assert_eq!(readahead::set(device, Window::AtLeast(2048)).unwrap(), 2048);
    assert_eq!(readahead::set(device, Window::AtLeast(1024)).unwrap(), 2048);
    assert_eq!(readahead::set(device, Window::Exactly(64)).unwrap(), 64);
}

#[test]
fn mount_outlives_requests_that_panic_with_an_i_o_error() {
    let Some(mut m) = Mounted::new(false, Fault::None, &options()) else {
        return;
    };
    m.mount.unmount().unwrap();
    m.end().unwrap();
    let config = uncached(DISK);
    let disk = TestDisk::new(256).reading(|at, buf| {
        assert!(at.0 < 128, "panic on purpose");
        buf.fill(7);
        Ok(())
    });
    let volume = Volume::new(Arc::new(disk), Vec::new());
    let fs = DiskFs::new(MountKind::Dir, vec![(config, volume)], Vec::new(), &options(), 2);
    let target = Target::resolve(&m.point, true).unwrap();
    let (mount, device) = Mount::new(&target, &options(), "panics").unwrap();
    m.mount = mount;
    m.session = Some(Running::start(fs, device, &options(), 2).unwrap());
    let file = File::open(m.disk()).unwrap();
    let mut sector = [0; 512];
    // More often than there are loops, so that a lost loop would show.
    for _ in 0..64 {
        assert_eq!(
            file.read_exact_at(&mut sector, 65536).unwrap_err().raw_os_error(),
            Some(libc::EIO)
        );
        file.read_exact_at(&mut sector, 512).unwrap();
        assert_eq!(sector, [7; 512]);
    }
    drop(file);
    m.mount.unmount().unwrap();
    m.end().unwrap();
}

#[test]
fn mount_shows_directories_for_names_with_slashes_and_reads_long_ones_to_the_end() {
    let Some(mut m) = Mounted::new(false, Fault::None, &options()) else {
        return;
    };
    m.mount.unmount().unwrap();
    m.end().unwrap();
    let disk = |name: String| {
        let config = uncached(name);
        let zeroes = TestDisk::new(256).reading(|_, buf| {
            buf.fill(0);
            Ok(())
        });
        (config, Volume::new(Arc::new(zeroes), Vec::new()))
    };
    // More than one answer to readdir holds.
    let names = (0..2000).map(|i| format!("store/vm {}/disk with a long name {i}.raw", i % 2));
    let fs = DiskFs::new(MountKind::Dir, names.map(disk).collect(), Vec::new(), &options(), 2);
    let target = Target::resolve(&m.point, true).unwrap();
    let (mount, device) = Mount::new(&target, &options(), "directories").unwrap();
    m.mount = mount;
    m.session = Some(Running::start(fs, device, &options(), 2).unwrap());
    let count = |path: &str| fs::read_dir(m.point.join(path)).unwrap().count();
    assert_eq!((count(""), count("store"), count("store/vm 1")), (1, 2, 1000));
    let inside = m.point.join("store/vm 1/disk with a long name 7.raw");
    assert_eq!(fs::read(&inside).unwrap().len(), 256 * 512);
    let up = fs::canonicalize(m.point.join("store/vm 1/../vm 0")).unwrap();
    assert!(fs::metadata(&up).unwrap().is_dir());
    assert!(fs::metadata(m.point.join("store/vm 1/none.raw")).is_err());
    m.mount.unmount().unwrap();
    m.end().unwrap();
}

#[test]
fn mount_probe_accepts_a_damaged_start_with_a_warning_and_nothing_less() {
    for (fault, start) in [
        (Fault::None, None),
        (Fault::Start, Some("the start of the disk cannot be read")),
    ] {
        let Some(m) = Mounted::new(false, fault, &options()) else {
            return;
        };
        let warning = probe_file(&m.disk()).unwrap();
        assert_eq!(warning.is_some(), start.is_some());
        assert!(warning.is_none_or(|w| w.contains(DISK) && w.contains(start.unwrap())));
    }
    let Some(m) = Mounted::new(false, Fault::All, &options()) else {
        return;
    };
    let e = probe_file(&m.disk()).unwrap_err().to_string();
    assert!(e.contains(DISK) && e.contains("first read through the mount"), "{e}");
}

#[test]
fn mount_points_that_cannot_be_used() {
    let dir = TempDir::new().unwrap();
    let dir = fs::canonicalize(dir.path()).map(|p| (p, dir)).unwrap();
    let (root, _guard) = dir;
    fs::write(root.join("file"), "").unwrap();
    assert!(Target::resolve(&root.join("file"), false).unwrap().is_file);
    fs::create_dir(root.join("full")).unwrap();
    fs::write(root.join("full/note"), "x").unwrap();
    for name in ["full", "full/note"] {
        let e = Target::resolve(&root.join(name), false).unwrap_err().to_string();
        assert!(e.contains("-o nonempty"), "{name}: {e}");
        assert!(Target::resolve(&root.join(name), true).is_ok(), "{name}");
    }
    let e = Target::resolve(Path::new("/"), true).unwrap_err().to_string();
    assert!(e.contains("the root directory"), "{e}");
    std::os::unix::fs::symlink("nowhere", root.join("dangling")).unwrap();
    nix::unistd::mkfifo(&root.join("fifo"), nix::sys::stat::Mode::S_IRWXU).unwrap();
    for name in ["no/new.raw", "new/", "dangling", "file/new.raw", "fifo"] {
        let e = Target::resolve(&root.join(name), false).unwrap_err().to_string();
        assert!(e.starts_with(root.to_str().unwrap()), "{name}: {e}");
    }
    assert!(
        Target::resolve(Path::new("/dev/null"), false)
            .unwrap_err()
            .to_string()
            .contains("is a device")
    );
}
