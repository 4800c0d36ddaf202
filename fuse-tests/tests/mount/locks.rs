//! Image locks: combinations of mounts, readers and writers of qemu, and VMware that may use an image at the same time.

use std::fs::{self, File};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use fuse_tests::harness::{
    Cmd, LoopDevice, Scratch, need, need_fuse, need_qemu, need_root, poll_until, qemu_img, read_range, wait_end,
};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use vmdkfuse::error::ErrorKind;
use vmdkfuse::store::{Access, OpenPolicy, StoredFile, open_user_path};

/// Images: the file that is mounted, and the options of `qemu-img create` (none for a raw image).
const IMAGES: [(&str, &str); 5] = [
    ("sparse.vmdk", "subformat=monolithicSparse"),
    ("flat.vmdk", "subformat=monolithicFlat"),
    ("split.vmdk", "subformat=twoGbMaxExtentSparse"),
    ("top.vmdk", "backing_fmt=vmdk,backing_file=base.vmdk"),
    ("plain.img", ""),
];

/// Returns true if the machine can run these tests.
fn ready() -> bool {
    need_fuse() && need_qemu() && need("qemu-nbd")
}

/// Creates a folder with all [`IMAGES`], of 4 MiB each, and the parent `base.vmdk`.
fn images() -> Scratch {
    let scratch = Scratch::new();
    for (name, options) in [("base.vmdk", "subformat=monolithicSparse")].into_iter().chain(IMAGES) {
        let arguments = match options {
            "" => vec!["create", "-q", "-f", "raw", name, "4M"],
            _ => vec!["create", "-q", "-f", "vmdk", "-o", options, name, "4M"],
        };
        Cmd::new("qemu-img").args(arguments).dir(scratch.root()).run().ok();
    }
    scratch
}

/// Returns qemu's name of the format of a file, by its extension.
fn format_of(name: &Path) -> &'static str {
    if name.extension().is_some_and(|extension| extension == "vmdk") {
        "vmdk"
    } else {
        "raw"
    }
}

/// A qemu-nbd process that has an image open; killed on drop.
struct QemuNbd {
    pid: i32,
}

impl QemuNbd {
    /// Starts `qemu-nbd --fork`, which returns once it has opened and locked the image.
    #[track_caller]
    fn start(scratch: &Scratch, image: &Path, arguments: &[&str]) -> Self {
        let (socket, pidfile) = (scratch.path("nbd.socket"), scratch.path("nbd.pid"));
        let server = || {
            let server = Cmd::new("qemu-nbd")
                .args(["--fork", "--persistent"])
                .args(arguments)
                .dir(scratch.root());
            let server = server.arg("--socket").arg(&socket).arg("--pid-file").arg(&pidfile);
            server.arg(image).run()
        };
        // A lock of a daemon or server that has ended may last for a moment.
        let mut outcome = server();
        poll_until(Duration::from_secs(60), || {
            let locked = outcome.stderr.contains("lock");
            if locked {
                outcome = server();
            }
            !locked
        });
        outcome.ok();
        Self {
            pid: fs::read_to_string(pidfile).unwrap().trim().parse().unwrap(),
        }
    }

    /// Starts a server that opens the image for writing.
    #[track_caller]
    fn start_writing(scratch: &Scratch, image: impl AsRef<Path>) -> Self {
        let image = image.as_ref();
        Self::start(scratch, image, &["-f", format_of(image)])
    }
}

impl Drop for QemuNbd {
    fn drop(&mut self) {
        kill(Pid::from_raw(self.pid), Signal::SIGKILL).ok();
        wait_end(self.pid, Duration::from_secs(60)).expect("the end of qemu-nbd");
    }
}

/// Writes to the image with qemu-io; panics unless that succeeds, or fails because of a lock if not `allowed`.
///
/// A lock of this process that was released may last until another test's child has called exec, as in [`open_soon`].
#[track_caller]
fn qemu_write(scratch: &Scratch, image: &str, format: &str, allowed: bool) {
    let write = || {
        Cmd::new("qemu-io")
            .args(["-f", format, "-c", "write -P 7 0 64k", image])
            .dir(scratch.root())
            .run()
    };
    let mut outcome = write();
    if !allowed {
        outcome.expect_code(1).error_names(&["failed to get \"write\" lock"]);
        return;
    }
    poll_until(Duration::from_secs(60), || {
        let locked = outcome.stderr.contains("lock");
        if locked {
            outcome = write();
        }
        !locked
    });
    outcome.ok();
}

/// "while an image is mounted, qemu refuses to write to it, its extents and its parents"
#[test]
fn a_mount_keeps_writers_of_qemu_out() {
    if !ready() {
        return;
    }
    let scratch = images();
    for (name, _) in IMAGES {
        let format = format_of(Path::new(name));
        let mount = scratch.mount().file(name).arg("name=disk").start();
        qemu_write(&scratch, name, format, false);
        match name {
            "flat.vmdk" => qemu_write(&scratch, "flat-flat.vmdk", "raw", false),
            "split.vmdk" => qemu_write(&scratch, "split-s001.vmdk", "raw", false),
            "top.vmdk" => qemu_write(&scratch, "base.vmdk", "vmdk", false),
            _ => {}
        }
        mount.unmount();
        let mount = scratch.mount().file(name).arg("name=disk").arg("lock=off").start();
        qemu_write(&scratch, name, format, true);
        mount.unmount();
        qemu_write(&scratch, name, format, true);
    }
}

/// "an image that qemu writes to is not mounted"
#[test]
fn a_writer_of_qemu_keeps_mounts_out() {
    if !ready() {
        return;
    }
    let scratch = images();
    for (name, _) in IMAGES {
        let server = QemuNbd::start_writing(&scratch, name);
        let holder = format!("process {}, qemu-nbd", server.pid);
        let parts = [
            name,
            "in use for writing by another program",
            &holder,
            "; end that program first",
        ];
        scratch.mount().file(name).refused(1).one_error(1, &parts);
        scratch
            .vmdkfuse()
            .arg("--info")
            .key("file", name)
            .run()
            .one_error(1, &parts);
        scratch
            .vmdkfuse()
            .args(["--info", "lock=off"])
            .key("file", name)
            .run()
            .ok();
        scratch.mount().file(name).arg("lock=off").start().unmount();
        drop(server);
        // The kernel releases the locks of a killed process a moment after its end is reported.
        let info = || scratch.vmdkfuse().arg("--info").key("file", name).run();
        assert!(poll_until(Duration::from_secs(60), || info().ended.code == Some(0)));
        scratch.mount().file(name).start().unmount();
    }
}

#[test]
fn a_writer_of_one_file_of_an_image_keeps_mounts_out() {
    if !ready() {
        return;
    }
    let scratch = images();
    for (name, file) in [
        ("flat.vmdk", "flat-flat.vmdk"),
        ("split.vmdk", "split-s001.vmdk"),
        ("top.vmdk", "base.vmdk"),
    ] {
        let _server = QemuNbd::start(&scratch, Path::new(file), &["-f", "raw"]);
        scratch
            .mount()
            .file(name)
            .refused(1)
            .one_error(1, &[file, "in use for writing"]);
    }
}

#[test]
fn readers_share_an_image() {
    if !ready() {
        return;
    }
    let scratch = images();
    for (name, _) in IMAGES {
        let format = format_of(Path::new(name));
        let server = QemuNbd::start(&scratch, Path::new(name), &["--read-only", "-f", format]);
        // Each of two mounts shows the same image twice.
        let two = |at: &str| {
            scratch
                .mount()
                .at(at)
                .arg("readonly=true")
                .file(name)
                .arg("name=a")
                .file(name)
                .arg("name=b")
        };
        scratch.mkdir("other");
        let (one, other) = (two("mnt").start(), two("other").start());
        let image = scratch.path(name);
        let raw = one.file("a");
        qemu_img([
            "compare",
            "-f",
            "raw",
            "-F",
            format,
            raw.to_str().unwrap(),
            image.to_str().unwrap(),
        ]);
        Cmd::new("qemu-io")
            .args(["-r", "-f", format, "-c", "read 0 4k"])
            .arg(&image)
            .run()
            .ok();
        one.unmount();
        other.unmount();
        drop(server);
    }
    // A writer of a delta opens its parent for reading only, so other readers of the parent are allowed.
    let _server = QemuNbd::start_writing(&scratch, "top.vmdk");
    scratch.mount().arg("readonly=true").file("base.vmdk").start().unmount();
}

#[test]
fn a_reopened_image_stays_locked() {
    if !ready() {
        return;
    }
    let scratch = images();
    let mount = scratch.mount().arg("readonly=true").file("plain.img").start();
    let file = File::options().write(true).open(scratch.path("plain.img")).unwrap();
    for byte in [1, 2] {
        file.write_all_at(&[byte; 512], 0).unwrap();
        file.set_modified(std::time::SystemTime::UNIX_EPOCH + Duration::from_secs(u64::from(byte)))
            .unwrap();
        assert_eq!(read_range(&mount.file("plain.raw"), 0, 512), [byte; 512]);
        qemu_write(&scratch, "plain.img", "raw", false);
    }
    mount.unmount();
}

/// Opens a file as the daemon does.
fn open(path: &Path, access: Access, lock: bool) -> vmdkfuse::error::Result<Arc<dyn StoredFile>> {
    open_user_path(path, Arc::new(OpenPolicy::new(Vec::new(), lock)), access)
}

/// Opens a file that no other process has locked for long; panics if it is still locked after the deadline.
///
/// A child process that another test starts inherits the open files of this process, and with them their locks, until
/// its exec, so the first attempts may fail.
fn open_soon(path: &Path, access: Access) -> Arc<dyn StoredFile> {
    let mut opened = None;
    poll_until(Duration::from_secs(60), || {
        opened = Some(open(path, access, true));
        opened.as_ref().is_some_and(Result::is_ok)
    });
    opened.unwrap().unwrap()
}

/// "Two writers, or a writer beside a reader of ours or of qemu, are refused"
#[test]
fn a_writer_of_ours_keeps_readers_and_writers_of_qemu_out() {
    if !need_qemu() {
        return;
    }
    let scratch = images();
    for name in ["sparse.vmdk", "flat-flat.vmdk", "plain.img"] {
        let format = if name == "sparse.vmdk" { "vmdk" } else { "raw" };
        let read = || {
            Cmd::new("qemu-io")
                .args(["-r", "-f", format, "-c", "read 0 4k", name])
                .dir(scratch.root())
                .run()
        };
        let writer = open_soon(&scratch.path(name), Access::Write);
        qemu_write(&scratch, name, format, false);
        match format {
            "vmdk" => drop(read().expect_code(1).error_names(&["failed to get", "lock"])),
            // qemu-io opens a raw file in a mode that is shared with writers, so our lock does not keep it out.
            _ => drop(read().ok()),
        }
        drop(writer);
        let reader = open_soon(&scratch.path(name), Access::Read);
        qemu_write(&scratch, name, format, false);
        read().ok();
        drop(reader);
        let unlocked = open(&scratch.path(name), Access::Write, false).unwrap();
        qemu_write(&scratch, name, format, true);
        drop(unlocked);
    }
}

/// "messages say who holds it where that can be known"
#[test]
fn any_user_of_an_image_keeps_our_writers_out_and_is_named() {
    if !need_qemu() || !need("qemu-nbd") {
        return;
    }
    let scratch = images();
    for (arguments, cause) in [
        (&["-f", "raw"][..], "allows no other writer"),
        (&["-f", "raw", "--read-only"], "allows no other writer"),
    ] {
        for name in ["sparse.vmdk", "plain.img"] {
            let path = scratch.path(name);
            let server = QemuNbd::start(&scratch, Path::new(name), arguments);
            let error = open(&path, Access::Write, true).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Busy, "{error}");
            let holder = format!("process {}, qemu-nbd", server.pid);
            for part in [cause, &holder, name, "readonly=true", "; end that program first"] {
                assert!(error.to_string().contains(part), "`{error}` does not contain `{part}`");
            }
            open(&path, Access::Write, false).unwrap();
            drop(server);
            open_soon(&path, Access::Write);
        }
    }
}

#[test]
fn a_block_device_is_locked_as_well() {
    if !ready() || !need_root() {
        return;
    }
    let scratch = images();
    let device = LoopDevice::attach(&scratch.path("plain.img"));
    let path = device.path().to_str().unwrap();
    let mount = scratch.mount().file(path).start();
    qemu_write(&scratch, path, "raw", false);
    mount.unmount();
    let _server = QemuNbd::start_writing(&scratch, path);
    scratch
        .mount()
        .file(path)
        .refused(1)
        .one_error(1, &[path, "in use for writing", "qemu-nbd"]);
}

/// "VMware's `.lck` files … only cause a warning"
#[test]
fn vmware_lock_files_cause_a_warning() {
    if !ready() {
        return;
    }
    let scratch = images();
    scratch.mkdir("flat.vmdk.lck");
    scratch.write("flat.vmdk.lck/M12345.lck", "anna 4711-99(vmware-vmx) 0 X\0lc=1");
    let inode = fs::metadata(scratch.path("flat-flat.vmdk")).unwrap().ino();
    let esx_lock = format!(".lck-{:016x}", inode.swap_bytes());
    scratch.write(&esx_lock, [&[0; 20][..], b"esx7.example.com\0"].concat());
    let mount_log = |name: &str, more: &str| {
        let mount = scratch
            .mount()
            .arg("readonly=true")
            .file("flat.vmdk")
            .arg("--log-file")
            .arg(name)
            .arg(more)
            .start();
        // Rewriting the descriptor changes its identity, so the next read reopens the image.
        fs::write(scratch.path("flat.vmdk"), fs::read(scratch.path("flat.vmdk")).unwrap()).unwrap();
        read_range(&mount.file("flat.raw"), 0, 512);
        mount.unmount();
        fs::read_to_string(scratch.path(name)).unwrap()
    };
    let text = mount_log("log", "lock=on");
    for part in [
        "M12345.lck exists (machine anna, process 4711-99(vmware-vmx))",
        " (host esx7.example.com)",
        &esx_lock,
    ] {
        assert_eq!(text.matches(part).count(), 1, "{part}: {text}");
    }
    assert!(!mount_log("quiet", "lock=off").contains(".lck"));
}
