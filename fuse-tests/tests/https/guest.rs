//! guestfish on a disk in a datastore: it looks into the guest's file system without a download.

use std::fs::{self, File};
use std::path::Path;

use fuse_tests::harness::{Cmd, Scratch, guestfish, guestfs, need, need_qemu, qemu_img};

use crate::server::{Server, need_vsim};

const MIB: u64 = 1 << 20;
/// Size of the disk.
const DISK: u64 = 1 << 30;

/// Creates a flat disk in `dir` with a file system in a partition, of which 200 MiB are used.
fn test_linux(scratch: &Scratch, dir: &Path) {
    let etc = scratch.mkdir("tree/etc");
    fs::write(etc.join("hostname"), "testlinux\n").unwrap();
    let noise: Vec<u8> = (0..50u32 << 20)
        .flat_map(|n| n.wrapping_mul(2_654_435_761).to_le_bytes())
        .collect();
    fs::write(scratch.mkdir("tree/var").join("data"), noise).unwrap();
    let raw = scratch.path("linux.raw");
    File::create(&raw).unwrap().set_len(DISK).unwrap();
    let mkfs = Cmd::new("mkfs.ext4").args(["-q", "-F", "-E", "offset=1048576", "-d"]);
    let mkfs = mkfs.arg(scratch.path("tree")).arg(&raw);
    mkfs.arg(format!("{}M", DISK / MIB - 2)).run().ok();
    let sfdisk = format!("echo start=2048,type=83 | sfdisk -q '{}'", raw.display());
    Cmd::new("sh").args(["-c", &sfdisk]).run().ok();
    let disk = dir.join("TestLinux.vmdk");
    let flat = ["convert", "-f", "raw", "-O", "vmdk", "-o", "subformat=monolithicFlat"];
    qemu_img(
        flat.iter()
            .copied()
            .chain([raw.to_str().unwrap(), disk.to_str().unwrap()]),
    );
}

/// "`guestfish --ro` on a remote disk fetches a fraction of it"
#[test]
fn guestfish_on_a_remote_disk_fetches_a_fraction_of_it() {
    let tools = ["guestfish", "virt-filesystems", "mkfs.ext4", "sfdisk"];
    if !need_vsim() || !need_qemu() || !tools.iter().all(|tool| need(tool)) {
        return;
    }
    let scratch = Scratch::new();
    test_linux(&scratch, &scratch.mkdir("ds/TestLinux"));
    let server = Server::vsim(&scratch, &scratch.path("ds"), &["-name", "Storage1"]);
    let mount = scratch
        .mount()
        .args(server.login(&scratch))
        .arg("datacenter=DC0")
        .arg("file=[Storage1] TestLinux/TestLinux.vmdk")
        .start();
    let disk = mount.file("TestLinux.raw");
    // Today's name of virt-list-filesystems(1).
    let listed = guestfs(
        "virt-filesystems",
        &["--format=raw", "-a", disk.to_str().unwrap(), "--long"],
    );
    assert!(
        listed.stdout.contains("/dev/sda1") && listed.stdout.contains("ext4"),
        "{listed}"
    );
    let to_list = server.sent();
    let open = ["--ro", "--format=raw", "-a", disk.to_str().unwrap(), "run", ":"];
    let read = [
        "mount-ro",
        "/dev/sda1",
        "/",
        ":",
        "cat",
        "/etc/hostname",
        ":",
        "ls",
        "/var",
    ];
    let read = guestfish(&[&open[..], &read].concat());
    assert_eq!(read.stdout, "testlinux\n\ndata\n", "{read}");
    let sent = server.sent();
    eprintln!(
        "sent for virt-filesystems: {to_list} bytes; with the mount and a file: {sent} of {DISK}, {} requests",
        server.log().len()
    );
    assert!(sent < DISK / 20, "{sent} bytes were sent");
    mount.unmount();
}
