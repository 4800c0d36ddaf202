//! Who may have an image open at the same time: this program's mounts, readers and writers of qemu, VMware.

use std::fs::{self, File};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use fuse_tests::harness::{
    Cmd, Scratch, need, need_fuse, need_qemu, need_root, poll_until, qemu_img, read_range, wait_end,
};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use vmdkfuse::error::ErrorKind;
use vmdkfuse::store::{Access, OpenPolicy, StoredFile, open_user_path};

/// Each kind of image, and the file of it that is asked for.
const IMAGES: [(&str, &str); 5] = [
    ("sparse.vmdk", "subformat=monolithicSparse"),
    ("flat.vmdk", "subformat=monolithicFlat"),
    ("split.vmdk", "subformat=twoGbMaxExtentSparse"),
    ("top.vmdk", "backing_fmt=vmdk,backing_file=base.vmdk"),
    ("plain.img", ""),
];

fn ready() -> bool {
    need_fuse() && need_qemu() && need("qemu-nbd")
}

/// A folder with all of [`IMAGES`], of 4 MiB each, and the parent of one.
fn images() -> Scratch {
    let scratch = Scratch::new();
    for (name, options) in [("base.vmdk", "subformat=monolithicSparse")].into_iter().chain(IMAGES) {
        let words = match options {
            "" => vec!["create", "-q", "-f", "raw", name, "4M"],
            _ => vec!["create", "-q", "-f", "vmdk", "-o", options, name, "4M"],
        };
        Cmd::new("qemu-img").args(words).dir(scratch.root()).run().ok();
    }
    scratch
}

fn format_of(name: &Path) -> &'static str {
    if name.extension().is_some_and(|extension| extension == "vmdk") {
        "vmdk"
    } else {
        "raw"
    }
}

/// A server of qemu that has an image open, until it is dropped.
struct Server {
    pid: i32,
}

impl Server {
    /// `qemu-nbd`, which returns once it has opened the image.
    #[track_caller]
    fn start(scratch: &Scratch, image: &Path, words: &[&str]) -> Self {
        let (socket, pidfile) = (scratch.path("nbd.socket"), scratch.path("nbd.pid"));
        let server = Cmd::new("qemu-nbd")
            .args(["--fork", "--persistent"])
            .args(words)
            .dir(scratch.root());
        server
            .arg("--socket")
            .arg(&socket)
            .arg("--pid-file")
            .arg(&pidfile)
            .arg(image)
            .run()
            .ok();
        Self {
            pid: fs::read_to_string(pidfile).unwrap().trim().parse().unwrap(),
        }
    }

    /// One that writes.
    #[track_caller]
    fn writes(scratch: &Scratch, image: impl AsRef<Path>) -> Self {
        let image = image.as_ref();
        Self::start(scratch, image, &["-f", format_of(image)])
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        kill(Pid::from_raw(self.pid), Signal::SIGKILL).ok();
        wait_end(self.pid, Duration::from_secs(20)).expect("the end of qemu-nbd");
    }
}

/// qemu writes to the image, or says that somebody has locked it.
#[track_caller]
fn write(scratch: &Scratch, image: &str, format: &str, allowed: bool) {
    let outcome = Cmd::new("qemu-io")
        .args(["-f", format, "-c", "write -P 7 0 64k", image])
        .dir(scratch.root())
        .run();
    if allowed {
        outcome.ok();
    } else {
        outcome.expect_code(1).error_names(&["failed to get \"write\" lock"]);
    }
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
        write(&scratch, name, format, false);
        match name {
            "flat.vmdk" => write(&scratch, "flat-flat.vmdk", "raw", false),
            "split.vmdk" => write(&scratch, "split-s001.vmdk", "raw", false),
            "top.vmdk" => write(&scratch, "base.vmdk", "vmdk", false),
            _ => {}
        }
        mount.unmount();
        let mount = scratch.mount().file(name).arg("name=disk").arg("lock=off").start();
        write(&scratch, name, format, true);
        mount.unmount();
        write(&scratch, name, format, true);
    }
}

/// "an image that qemu writes to is not mounted", "`lock=off` reads it all the same"
#[test]
fn a_writer_of_qemu_keeps_mounts_out() {
    if !ready() {
        return;
    }
    let scratch = images();
    for (name, _) in IMAGES {
        let server = Server::writes(&scratch, name);
        let who = format!("process {}, qemu-nbd", server.pid);
        let says = [name, "in use for writing by another program", &who, "lock=off"];
        scratch.mount().file(name).refused(1).one_error(1, &says);
        scratch
            .vmdkfuse()
            .arg("--info")
            .key("file", name)
            .run()
            .one_error(1, &says);
        scratch
            .vmdkfuse()
            .args(["--info", "lock=off"])
            .key("file", name)
            .run()
            .ok();
        scratch.mount().file(name).arg("lock=off").start().unmount();
        drop(server);
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
        let _server = Server::start(&scratch, Path::new(file), &["-f", "raw"]);
        scratch
            .mount()
            .file(name)
            .refused(1)
            .one_error(1, &[file, "in use for writing"]);
    }
}

#[test]
fn readers_go_together() {
    if !ready() {
        return;
    }
    let scratch = images();
    for (name, _) in IMAGES {
        let format = format_of(Path::new(name));
        let server = Server::start(&scratch, Path::new(name), &["--read-only", "-f", format]);
        // the same image twice in one mount, and in two mounts
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
    // A writer of a snapshot only reads its parent.
    let _server = Server::writes(&scratch, "top.vmdk");
    scratch.mount().arg("readonly=true").file("base.vmdk").start().unmount();
}

#[test]
fn an_image_that_is_opened_anew_stays_locked() {
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
        write(&scratch, "plain.img", "raw", false);
    }
    mount.unmount();
}

/// Opens a file as the engine does.
fn open(path: &Path, access: Access, lock: bool) -> vmdkfuse::error::Result<Arc<dyn StoredFile>> {
    open_user_path(
        path,
        Arc::new(OpenPolicy {
            allow: Vec::new(),
            lock,
        }),
        access,
    )
}

/// Opens a file that nobody else has locked. A program that another test starts has, until it is executed, all open files
/// of this process and with them their locks, so it may take a moment.
fn open_soon(path: &Path, access: Access) -> Arc<dyn StoredFile> {
    let mut opened = None;
    poll_until(Duration::from_secs(20), || {
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
        write(&scratch, name, format, false);
        match format {
            "vmdk" => drop(read().expect_code(1).error_names(&["failed to get", "lock"])),
            // qemu-io says of a raw file that it shares it with writers, and goes along with those of qemu as well
            _ => drop(read().ok()),
        }
        drop(writer);
        let reader = open_soon(&scratch.path(name), Access::Read);
        write(&scratch, name, format, false);
        read().ok();
        drop(reader);
        let unlocked = open(&scratch.path(name), Access::Write, false).unwrap();
        write(&scratch, name, format, true);
        drop(unlocked);
    }
}

/// "messages say who holds it where that can be known"
#[test]
fn whoever_uses_an_image_keeps_our_writers_out_and_is_named() {
    if !need_qemu() || !need("qemu-nbd") {
        return;
    }
    let scratch = images();
    for (words, says) in [
        (&["-f", "raw"][..], "lets nobody else write to it"),
        (&["-f", "raw", "--read-only"], "lets nobody else write to it"),
    ] {
        for name in ["sparse.vmdk", "plain.img"] {
            let path = scratch.path(name);
            let server = Server::start(&scratch, Path::new(name), words);
            let error = open(&path, Access::Write, true).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Busy, "{error}");
            let who = format!("process {}, qemu-nbd", server.pid);
            for says in [says, &who, name, "readonly=true", "lock=off"] {
                assert!(error.to_string().contains(says), "`{error}` does not say `{says}`");
            }
            open(&path, Access::Write, false).unwrap();
            drop(server);
            open_soon(&path, Access::Write);
        }
    }
}

/// A loop device, detached at the end.
struct Loop(PathBuf);

impl Drop for Loop {
    fn drop(&mut self) {
        Cmd::new("losetup").arg("--detach").arg(&self.0).run();
    }
}

#[test]
fn a_block_device_is_locked_as_well() {
    if !ready() || !need_root() {
        return;
    }
    let scratch = images();
    let device = Cmd::new("losetup")
        .args(["--find", "--show"])
        .arg(scratch.path("plain.img"))
        .run()
        .ok();
    let device = Loop(PathBuf::from(device.stdout.trim()));
    let path = device.0.to_str().unwrap();
    let mount = scratch.mount().file(path).start();
    write(&scratch, path, "raw", false);
    mount.unmount();
    let _server = Server::writes(&scratch, path);
    scratch
        .mount()
        .file(path)
        .refused(1)
        .one_error(1, &[path, "in use for writing", "qemu-nbd"]);
}

/// "VMware's `.lck` marks … only give a warning"
#[test]
fn marks_of_vmware_are_warned_of() {
    if !ready() {
        return;
    }
    let scratch = images();
    scratch.mkdir("flat.vmdk.lck");
    scratch.write("flat.vmdk.lck/M12345.lck", "anna 4711-99(vmware-vmx) 0 X\0lc=1");
    let inode = fs::metadata(scratch.path("flat-flat.vmdk")).unwrap().ino();
    let esx = format!(".lck-{:016x}", inode.swap_bytes());
    scratch.write(&esx, [&[0; 20][..], b"esx7.example.com\0"].concat());
    let log = |name: &str, more: &str| {
        let mount = scratch
            .mount()
            .arg("readonly=true")
            .file("flat.vmdk")
            .arg("--log-file")
            .arg(name)
            .arg(more)
            .start();
        // changed, so that it is opened anew
        fs::write(scratch.path("flat.vmdk"), fs::read(scratch.path("flat.vmdk")).unwrap()).unwrap();
        read_range(&mount.file("flat.raw"), 0, 512);
        mount.unmount();
        fs::read_to_string(scratch.path(name)).unwrap()
    };
    let text = log("log", "lock=on");
    for says in [
        "M12345.lck is there, of machine anna, process 4711-99(vmware-vmx)",
        ", of host esx7.example.com",
        &esx,
    ] {
        assert_eq!(text.matches(says).count(), 1, "{says}: {text}");
    }
    assert!(!log("quiet", "lock=off").contains(".lck"));
}
