//! Captive servers: the mount starts and ends them.

use std::fs;
use std::os::unix::fs::MetadataExt;

use fuse_tests::harness::{Cmd, Scratch, assert_same, is_running, need, need_qemu, poll_until, read_range, wait_end};
use nix::sys::signal::Signal;

use crate::{SOON, children, noise, put, ready};

#[test]
fn a_qcow2_is_edited_through_a_captive_server_that_ends_with_the_mount() {
    if !ready() || !need_qemu() || !need("qemu-nbd") {
        return;
    }
    let scratch = Scratch::new();
    let image = scratch.path("x.qcow2");
    Cmd::new("qemu-img")
        .args(["create", "-q", "-f", "qcow2"])
        .arg(&image)
        .arg("64M")
        .run()
        .ok();
    let data = scratch.write("data", noise(3 << 20, 5));
    let words = ["command=qemu-nbd", "arg=-f", "arg=qcow2"];
    let mut start = scratch.mount();
    for word in words {
        start = start.arg(word);
    }
    let mount = start.arg(format!("arg={}", image.display())).start();
    put(&data, &mount.file("disk.raw"));
    let server = children(mount.pid()).pop().expect("a server");
    mount.unmount();
    assert!(poll_until(SOON, || !is_running(server)), "the server still runs");
    Cmd::new("qemu-img").args(["check", "-q"]).arg(&image).run().ok();
    let raw = scratch.path("raw");
    Cmd::new("qemu-img")
        .args(["convert", "-f", "qcow2", "-O", "raw"])
        .args([&image, &raw])
        .run()
        .ok();
    assert_eq!(read_range(&raw, 0, 3 << 20), fs::read(&data).unwrap());
}

/// Returns the value of a field of `/proc/PID/status`.
fn status(pid: i32, field: &str) -> String {
    let text = fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let line = text.lines().find_map(|line| line.strip_prefix(field));
    line.unwrap().trim_start_matches(':').trim().to_owned()
}

/// Returns the kernel's flags of a process.
fn flags(pid: i32) -> u32 {
    let text = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap();
    let after = text.rsplit_once(") ").unwrap().1;
    after.split(' ').nth(6).unwrap().parse().unwrap()
}

#[test]
fn the_daemon_ignores_sigxfsz_and_is_an_io_flusher_and_its_server_is_neither() {
    // From include/linux/sched.h.
    const PF_MEMALLOC_NOIO: u32 = 0x0008_0000;
    if !ready() {
        return;
    }
    let scratch = Scratch::new();
    let mount = scratch
        .mount()
        .arg("command=nbdkit")
        .arg("arg=memory")
        .arg("arg=1M")
        .start();
    let server = children(mount.pid()).pop().expect("a server");
    let ignores =
        |pid| u64::from_str_radix(&status(pid, "SigIgn"), 16).unwrap() & (1 << (Signal::SIGXFSZ as u32 - 1)) != 0;
    assert!(ignores(mount.pid()) && !ignores(server));
    assert_eq!(status(server, "SigBlk"), "0000000000000000");
    const CAP_SYS_RESOURCE: u32 = 24;
    let capabilities = u64::from_str_radix(&status(mount.pid(), "CapEff"), 16).unwrap();
    let permitted = capabilities & (1 << CAP_SYS_RESOURCE) != 0;
    for task in fs::read_dir(format!("/proc/{}/task", mount.pid())).unwrap() {
        let task: i32 = task.unwrap().file_name().to_str().unwrap().parse().unwrap();
        assert_eq!(
            flags(task) & PF_MEMALLOC_NOIO != 0,
            permitted,
            "{}",
            status(task, "Name")
        );
    }
    assert_eq!(flags(server) & PF_MEMALLOC_NOIO, 0);
}

#[test]
fn a_captive_server_ends_when_the_mount_is_killed() {
    if !ready() {
        return;
    }
    let scratch = Scratch::new();
    let mut mount = scratch
        .mount()
        .arg("command=nbdkit")
        .arg("arg=memory")
        .arg("arg=1M")
        .start();
    let server = children(mount.pid()).pop().expect("a server");
    assert!(is_running(server));
    mount.signal(Signal::SIGKILL);
    mount.wait_end();
    assert!(wait_end(server, SOON).is_some(), "the server still runs");
}

#[test]
fn a_compressed_image_is_read_through_a_captive_server() {
    if !ready() || !need("xz") {
        return;
    }
    let scratch = Scratch::new();
    let image = scratch.write("x.img", noise(6 << 20, 9));
    Cmd::new("xz")
        .args(["-k", "-0", "--block-size=1MiB"])
        .arg(&image)
        .run()
        .ok();
    let file = format!("arg={}", scratch.path("x.img.xz").display());
    let words = ["command=nbdkit", "arg=-r", "arg=--filter=xz", "arg=file"];
    let start = words.iter().fold(scratch.mount(), |mount, word| mount.arg(word));
    let mount = start.arg(file).start();
    assert_same(&mount.file("disk.raw"), &image);
    assert_eq!(
        fs::metadata(mount.file("disk.raw")).unwrap().mode() & 0o222,
        0,
        "a read-only export"
    );
}
