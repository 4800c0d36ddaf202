//! Programs that write disks: cp, dd, qemu-img, and the kernel with a file system on a loop device.

use std::fs;
use std::path::Path;
use std::time::Duration;

use fuse_tests::harness::{Cmd, need, need_root, raw_with_islands, skip, umount};

use crate::writing::kinds::{SIZE, for_each_kind};

/// "so `cp image mnt/disk.raw` works", which opens with O_TRUNC; also with `-p`, which sets owner, mode and times.
#[test]
fn cp_and_dd_write_a_disk() {
    for_each_kind(|mut disk| {
        let mount = disk.mount();
        let (other, path) = (disk.scratch.path("other"), mount.file("disk"));
        raw_with_islands(&other, SIZE, 6);
        disk.bytes = fs::read(&other).unwrap();
        Cmd::new("cp")
            .args(["--sparse=never", "-p"])
            .arg(&other)
            .arg(&path)
            .run()
            .ok();
        disk.holds(&path);
        let part = &mut disk.bytes[3 * 65_536..5 * 65_536];
        part.fill(0);
        let arguments = [
            "if=/dev/zero",
            "bs=64k",
            "count=2",
            "seek=3",
            "conv=notrunc,fsync",
            "status=none",
        ];
        Cmd::new("dd").args(arguments).key("of", &path).run().ok();
        disk.holds(&path);
        mount.unmount();
        disk.check();
    });
}

/// "`qemu-img convert -n` into `mnt/disk.raw`", in its cache modes
#[test]
fn qemu_img_converts_into_a_disk() {
    for_each_kind(|mut disk| {
        let mount = disk.mount();
        let path = mount.file("disk");
        for (seed, cache) in [(6, "writeback"), (7, "none"), (8, "directsync")] {
            let other = disk.scratch.path("other");
            raw_with_islands(&other, SIZE, seed);
            disk.bytes = fs::read(&other).unwrap();
            let arguments = ["convert", "-n", "-t", cache, "-f", "raw", "-O", "raw"];
            Cmd::new("qemu-img").args(arguments).arg(&other).arg(&path).run().ok();
            disk.holds(&path);
        }
        mount.unmount();
        disk.check();
    });
}

/// "ext4 on a loop device on the raw file: mkfs, copy a tree, umount, fsck, compare"
#[test]
fn a_file_system_on_the_disk_is_sound() {
    if !need_root() || !need("mkfs.ext4") || !need("fstrim") {
        return;
    }
    let tree = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests");
    for_each_kind(|mut disk| {
        let mount = disk.mount();
        let path = mount.file("disk");
        Cmd::new("mkfs.ext4").args(["-q", "-F"]).arg(&path).run().ok();
        let inside = disk.scratch.mkdir("inside");
        let outcome = Cmd::new("mount")
            .args(["-t", "ext4", "-o", "loop"])
            .arg(&path)
            .arg(&inside)
            .run();
        if outcome.ended.code != Some(0) && !Path::new("/dev/loop-control").exists() {
            skip("no loop devices: /dev/loop-control does not exist");
            return;
        }
        outcome.ok();
        Cmd::new("cp").arg("-a").arg(&tree).arg(inside.join("tree")).run().ok();
        Cmd::new("cp").arg("-a").arg(&tree).arg(inside.join("gone")).run().ok();
        fs::remove_dir_all(inside.join("gone")).unwrap();
        Cmd::new("fstrim").arg(&inside).run().ok();
        umount(&inside);
        // The kernel detaches the loop device a moment after the unmount.
        let detached = || {
            !Cmd::new("losetup")
                .arg("-j")
                .arg(&path)
                .run()
                .stdout
                .contains("/dev/loop")
        };
        assert!(
            fuse_tests::harness::poll_until(Duration::from_secs(60), detached),
            "the loop device is still attached"
        );
        Cmd::new("e2fsck").arg("-fn").arg(&path).run().ok();
        disk.bytes = fs::read(&path).unwrap();
        mount.unmount();
        disk.check();

        let mount = disk.mount_with(&["readonly=true"]);
        Cmd::new("mount")
            .args(["-t", "ext4", "-o", "loop,ro"])
            .arg(mount.file("disk"))
            .arg(&inside)
            .run()
            .ok();
        Cmd::new("diff")
            .arg("-r")
            .arg(&tree)
            .arg(inside.join("tree"))
            .run()
            .ok();
        umount(&inside);
        mount.unmount();
    });
}
