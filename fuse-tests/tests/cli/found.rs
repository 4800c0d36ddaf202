//! Disks that `dir=` and patterns find: broken ones are skipped, extents are no disks.

use std::fs;

use fuse_tests::harness::{Scratch, need_fuse};

const TEXT: &str = "# Disk DescriptorFile\nversion=1\nCID=1\nparentCID=ffffffff\ncreateType=\"custom\"\n";

/// "A disk that `dir=` or a pattern finds and that cannot be opened is skipped with a warning"
#[test]
fn a_broken_disk_that_was_found_is_skipped_with_a_warning() {
    if !need_fuse() {
        return;
    }
    let scratch = Scratch::new();
    scratch.mkdir("vms");
    scratch.write("vms/good.vmdk", format!("{TEXT}RW 8 ZERO\n"));
    scratch.write("vms/bad.vmdk", format!("{TEXT}RW 8 FLAT \"missing.img\" 0\n"));
    scratch.mkdir("mnt");
    for source in ["dir=vms", "file=vms/*.vmdk"] {
        let mut mount = scratch.mount().foreground().arg(source).start();
        assert_eq!(mount.names(), ["good.raw"], "{source}");
        let (_, stderr) = mount.output();
        assert!(
            stderr.contains("warning: skipped: ") && stderr.contains("missing.img"),
            "{stderr}"
        );
        mount.signal(nix::sys::signal::Signal::SIGTERM);
        assert_eq!(mount.wait_end().code, Some(0));
    }
    let named = ["file=vms/good.vmdk", "file=vms/bad.vmdk"];
    let refused = scratch.mount().arg(named[0]).arg(named[1]).refused(1);
    refused.one_error(1, &["missing.img"]);
    fs::remove_file(scratch.path("vms/good.vmdk")).unwrap();
    scratch
        .mount()
        .arg("dir=vms")
        .refused(1)
        .one_error(1, &["bad.vmdk", "missing.img"]);
}

#[test]
fn an_extent_with_a_descriptor_in_it_is_not_mounted_as_a_disk() {
    if !need_fuse() {
        return;
    }
    let scratch = Scratch::new();
    scratch.mkdir("vms");
    scratch.write("vms/disk.vmdk", format!("{TEXT}RW 8 FLAT \"disk-flat.vmdk\" 0\n"));
    // A guest may write this to the start of its disk.
    let mut guest = format!("{TEXT}RW 8 FLAT \"secret\" 0\n").into_bytes();
    guest.resize(4096, b'\n');
    scratch.write("vms/disk-flat.vmdk", guest);
    scratch.write("vms/secret", vec![b's'; 4096]);
    for source in ["dir=vms", "file=vms/*.vmdk"] {
        let mount = scratch.mount().arg(source).start();
        assert_eq!(mount.names(), ["disk.raw"], "{source}");
        mount.unmount();
    }
}
