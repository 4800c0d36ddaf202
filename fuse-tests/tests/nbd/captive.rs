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
