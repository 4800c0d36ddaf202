//! Lines of fstab through the real mount(8) and umount(8).

use fuse_tests::harness::{Cmd, Scratch, need, need_fuse, need_root, program};

/// "`mount /mnt/disk`, with a line in fstab": sources, helpers, exit statuses, users, and nothing left behind.
#[test]
fn lines_of_fstab_are_mounted_and_unmounted_by_mount_and_umount() {
    if !need_fuse() || !need_root() || !need("findmnt") || !need("qemu-io") || !need("nbdkit") {
        return;
    }
    let scratch = Scratch::new();
    scratch.open_to_all();
    Cmd::in_namespace()
        .args(["sh", "-c"])
        .arg(concat!(include_str!("install.sh"), include_str!("fstab.sh")))
        .arg("fstab.sh")
        .arg(scratch.root())
        .arg(program())
        .run()
        .ok();
}
