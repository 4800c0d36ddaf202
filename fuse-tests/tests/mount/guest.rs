//! File systems inside a disk: read by the kernel through a loop device, read and written by guestfish.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use fuse_tests::harness::{
    Cmd, Mount, Scratch, guestfish, mounts_below, need, need_fuse, need_qemu, need_root, poll_until, qemu_img, sha256,
    skip, umount,
};

/// Content of the file `/etc/greeting` in the guest's file system.
const GREETING: &str = "Hello from inside of the disk.\n";

/// Creates `guest.vmdk`, an ext4 file system with two files, and mounts it; returns `None` if the machine cannot.
fn guest(scratch: &Scratch, subformat: &str) -> Option<Mount> {
    if !need_fuse() || !need_qemu() || !need("mkfs.ext4") {
        return None;
    }
    let tree = scratch.mkdir("tree/etc");
    fs::write(tree.join("greeting"), GREETING).unwrap();
    fs::write(tree.join("noise"), noise()).unwrap();
    let (raw, vmdk) = (scratch.path("guest.orig"), scratch.path("guest.vmdk"));
    let root = scratch.path("tree");
    Cmd::new("mkfs.ext4")
        .args(["-q", "-F", "-L", "guest", "-d"])
        .arg(&root)
        .arg(&raw)
        .arg("32M")
        .run()
        .ok();
    let option = format!("subformat={subformat}");
    let arguments = [
        "convert",
        "-f",
        "raw",
        "-O",
        "vmdk",
        "-o",
        &option,
        raw.to_str().unwrap(),
        vmdk.to_str().unwrap(),
    ];
    qemu_img(arguments);
    Some(scratch.mount().file(vmdk).start())
}

/// Returns 5 MiB of data without two equal sectors.
fn noise() -> Vec<u8> {
    (0..5u32 << 18)
        .flat_map(|i| i.wrapping_mul(2_654_435_761).to_le_bytes())
        .collect()
}

/// Lists the loop devices that are attached to this file.
fn loop_devices(file: &Path) -> String {
    Cmd::new("losetup").arg("-j").arg(file).run().ok().stdout
}

#[test]
fn the_kernel_mounts_the_file_system() {
    if !need_root() || !need("losetup") {
        return;
    }
    for subformat in ["monolithicSparse", "streamOptimized", "monolithicFlat"] {
        let scratch = Scratch::new();
        let Some(mount) = guest(&scratch, subformat) else {
            return;
        };
        let disk = mount.file("guest.raw");
        let inside = scratch.mkdir("inside");
        let outcome = Cmd::new("mount")
            .args(["-t", "ext4", "-o", "loop,ro"])
            .arg(&disk)
            .arg(&inside)
            .run();
        if outcome.ended.code != Some(0) && !Path::new("/dev/loop-control").exists() {
            skip("no loop devices: /dev/loop-control does not exist");
            return;
        }
        outcome.ok();
        compare_tree(&inside);
        umount(&inside);
        assert!(mounts_below(&inside).is_empty());
        assert!(
            poll_until(Duration::from_secs(60), || loop_devices(&disk).is_empty()),
            "a loop device is still attached: {}",
            loop_devices(&disk)
        );
        mount.unmount();
    }
}

/// Panics unless the files have their original content.
fn compare_tree(root: &Path) {
    assert_eq!(fs::read_to_string(root.join("etc/greeting")).unwrap(), GREETING);
    assert!(
        fs::read(root.join("etc/noise")).unwrap() == noise(),
        "{}",
        sha256(&root.join("etc/noise"))
    );
}

#[test]
fn guestfish_reads_the_file_system() {
    if !need("guestfish") {
        return;
    }
    let scratch = Scratch::new();
    let Some(mount) = guest(&scratch, "streamOptimized") else {
        return;
    };
    let disk: PathBuf = mount.file("guest.raw");
    let arguments = [
        "--ro",
        "--format=raw",
        "-a",
        disk.to_str().unwrap(),
        "run",
        ":",
        "list-filesystems",
        ":",
    ];
    let commands = [
        "mount-ro",
        "/dev/sda",
        "/",
        ":",
        "ls",
        "/etc",
        ":",
        "cat",
        "/etc/greeting",
    ];
    let seen = guestfish(&[&arguments[..], &commands].concat());
    assert!(seen.stdout.contains("/dev/sda: ext4"), "{seen}");
    assert!(
        seen.stdout.contains("noise\n") && seen.stdout.contains(GREETING),
        "{seen}"
    );
    mount.unmount();
}

/// "guestfish writes a file into an image, qemu-img check and a second guestfish read agree"
#[test]
fn guestfish_writes_a_file_that_qemu_reads_from_the_image() {
    if !need("guestfish") {
        return;
    }
    let scratch = Scratch::new();
    let Some(mount) = guest(&scratch, "monolithicSparse") else {
        return;
    };
    let disk: PathBuf = mount.file("guest.raw");
    let arguments = [
        "--rw",
        "--format=raw",
        "-a",
        disk.to_str().unwrap(),
        "run",
        ":",
        "mount",
        "/dev/sda",
        "/",
        ":",
    ];
    guestfish(&[&arguments[..], &["write", "/etc/written", "by a guest"]].concat());
    mount.unmount();
    let image = scratch.path("guest.vmdk");
    qemu_img(["check", image.to_str().unwrap()]);
    let arguments = [
        "--ro",
        "--format=vmdk",
        "-a",
        image.to_str().unwrap(),
        "run",
        ":",
        "mount-ro",
        "/dev/sda",
        "/",
        ":",
    ];
    let seen = guestfish(&[&arguments[..], &["cat", "/etc/written", ":", "cat", "/etc/greeting"]].concat());
    assert!(
        seen.stdout.contains("by a guest") && seen.stdout.contains(GREETING),
        "{seen}"
    );
}
