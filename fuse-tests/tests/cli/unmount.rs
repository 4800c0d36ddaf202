//! `--unmount`: returns when the daemon has ended and its locks are gone; and the ends of mounts that are used elsewhere.

use std::fs::{self, OpenOptions};
use std::os::unix::fs::{FileExt, symlink};
use std::process::{Child, Command};
use std::time::Duration;

use fuse_tests::harness::{
    Cmd, Mount, NOBODY, Outcome, Scratch, User, need, need_fuse, need_root, poll_until, program, umount,
};
use nix::sys::signal::Signal;

/// Creates a sparse VMDK.
fn create(scratch: &Scratch) {
    let args = ["--create", "create-size=64M"];
    scratch
        .vmdkfuse()
        .args(args)
        .key("file", scratch.path("x.vmdk"))
        .run()
        .ok();
    scratch.give(&scratch.path("x.vmdk"));
}

fn unmount(mount: &Mount, user: Option<User>) -> Outcome {
    Cmd::new(program()).arg("--unmount").arg(mount.point()).user(user).run()
}

/// "`--unmount` returns when the daemon has ended and its locks are gone": qemu can write to the image, a pidfile is gone,
/// and what was written through a mapping that no flush covers is in it.
#[test]
fn unmount_returns_when_the_daemon_has_ended() {
    if !need_fuse() || !need("qemu-io") {
        return;
    }
    let scratch = Scratch::new();
    create(&scratch);
    for n in 0..10u8 {
        let mut mount = scratch.mount().file("x.vmdk").pidfile("pid").start();
        let file = OpenOptions::new().write(true).open(mount.file("x.raw")).unwrap();
        file.write_all_at(&vec![n + 1; 1 << 20], u64::from(n) << 20).unwrap();
        drop(file);
        unmount(&mount, None).ok();
        assert!(!scratch.path("pid").exists(), "the pidfile is there");
        let read = format!("read -P {} {}M 1M", n + 1, n);
        let image = scratch.path("x.vmdk");
        let qemu = Cmd::new("qemu-io")
            .args(["-f", "vmdk", "-c", &read, "-c", "flush"])
            .arg(image)
            .run()
            .ok();
        assert!(!qemu.stdout.contains("failed"), "{qemu}");
        assert_eq!(mount.wait_end().code, Some(0));
    }
}

/// "umount.vmdkfuse … the same as --unmount", for a user's mount by that user and by root.
#[test]
fn mounts_of_ordinary_users_are_unmounted_by_them_and_by_root() {
    if !need_fuse() || !need_root() {
        return;
    }
    let scratch = Scratch::of(NOBODY);
    create(&scratch);
    scratch.open_to_all();
    let helper = scratch.path("umount.vmdkfuse");
    symlink(program(), &helper).unwrap();
    for user in [Some(NOBODY), None] {
        let mut mount = scratch.mount().file("x.vmdk").pidfile("pid").start();
        Cmd::new(&helper)
            .arg(mount.point())
            .args(["-n", "-t", "fuse.vmdkfuse"])
            .user(user)
            .run()
            .ok();
        assert!(!mount.is_mounted() && !scratch.path("pid").exists());
        assert_eq!(mount.wait_end().code, Some(0));
    }
}

#[test]
fn what_cannot_be_unmounted_is_said() {
    if !need_fuse() {
        return;
    }
    let scratch = Scratch::new();
    scratch.mkdir("empty");
    let run = |point: &str| scratch.vmdkfuse().arg("--unmount").arg(scratch.path(point)).run();
    run("empty").one_error(1, &["nothing is mounted there"]);
    Cmd::new(program())
        .args(["--unmount", "/proc"])
        .run()
        .one_error(1, &["not fuse.vmdkfuse"]);
    create(&scratch);
    let mount = scratch.mount().file("x.vmdk").start();
    let file = fs::File::open(mount.file("x.raw")).unwrap();
    unmount(&mount, None).one_error(1, &["busy"]);
    drop(file);
    mount.unmount();
}

/// A program that closes its files at once does not make the unmount fail.
#[test]
fn a_mount_that_is_busy_for_a_moment_is_unmounted() {
    if !need_fuse() {
        return;
    }
    let scratch = Scratch::new();
    create(&scratch);
    let mut mount = scratch.mount().file("x.vmdk").start();
    let file = fs::File::open(mount.file("x.raw")).unwrap();
    let closer = std::thread::spawn(move || {
        std::thread::sleep(Duration::from_millis(200));
        drop(file);
    });
    unmount(&mount, None).ok();
    closer.join().unwrap();
    assert_eq!(mount.wait_end().code, Some(0));
}

/// Process in a mount namespace of its own, which keeps a copy of every mount. Killed on drop.
struct OtherNamespace(Child);

impl OtherNamespace {
    fn new(scratch: &Scratch, command: &str) -> Self {
        let script = format!("touch ready; {command}");
        let mut unshare = Command::new("unshare");
        let child = unshare
            .args(["-m", "--propagation", "private", "sh", "-c", &script])
            .current_dir(scratch.root());
        let this = Self(child.spawn().unwrap());
        assert!(poll_until(Duration::from_secs(60), || scratch.path("ready").exists()));
        this
    }
}

impl Drop for OtherNamespace {
    fn drop(&mut self) {
        self.0.kill().unwrap();
        self.0.wait().unwrap();
    }
}

/// "one SIGTERM ends a daemon whose mount lives on in another mount namespace when no file is open, and it says who holds
/// it"; a file that is open there is served until it is closed.
#[test]
fn a_mount_that_lives_on_in_another_namespace_ends_with_one_signal() {
    if !need_fuse() || !need_root() {
        return;
    }
    for (command, signals) in [("exec sleep 300", true), ("exec sleep 300", false)] {
        let scratch = Scratch::new();
        create(&scratch);
        let log = scratch.path("log");
        let mut mount = scratch.mount().file("x.vmdk").arg("--log-file").arg(&log).start();
        let _other = OtherNamespace::new(&scratch, command);
        if signals {
            Cmd::new("umount").arg(mount.point()).run().ok();
            mount.signal(Signal::SIGTERM);
        } else {
            unmount(&mount, None).ok();
        }
        assert_eq!(mount.wait_end().code, Some(0));
        let log = fs::read_to_string(log).unwrap();
        assert!(log.contains("held by the mount namespace of process"), "{log}");
    }
    let scratch = Scratch::new();
    create(&scratch);
    let mut mount = scratch.mount().file("x.vmdk").start();
    let raw = mount.file("x.raw");
    let other = OtherNamespace::new(&scratch, &format!("exec sleep 300 <{}", raw.display()));
    let opened = || {
        fs::read_dir(format!("/proc/{}/fd", other.0.id()))
            .is_ok_and(|mut fds| fds.any(|fd| fs::read_link(fd.unwrap().path()).is_ok_and(|path| path == raw)))
    };
    assert!(poll_until(Duration::from_secs(60), opened));
    Cmd::new("umount").arg(mount.point()).run().ok();
    mount.signal(Signal::SIGTERM);
    assert!(mount.is_running());
    drop(other);
    assert_eq!(mount.wait_end().code, Some(0));
}

/// "a lock whose holder is a vmdkfuse that is ending is waited for": mounted again straight after umount(8).
#[test]
fn an_image_can_be_mounted_again_straight_after_umount() {
    if !need_fuse() || !need_root() {
        return;
    }
    let scratch = Scratch::new();
    create(&scratch);
    for n in 0..10u8 {
        let mut mount = scratch.mount().file("x.vmdk").start();
        let file = OpenOptions::new().write(true).open(mount.file("x.raw")).unwrap();
        file.write_all_at(&vec![n; 4 << 20], u64::from(n) << 20).unwrap();
        drop(file);
        umount(mount.point());
        scratch.mount().at("mnt").file("x.vmdk").start().unmount();
        assert_eq!(mount.wait_end().code, Some(0));
    }
}
