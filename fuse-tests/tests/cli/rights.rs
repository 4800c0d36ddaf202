//! Rights: modes that derive from the image, and the protection of the process itself.

use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt, chown};
use std::path::Path;
use std::time::Duration;

use fuse_tests::harness::{Cmd, NOBODY, STRANGER, Scratch, need_fuse, need_root, poll_until};

fn set_mode(path: &Path, mode: u32) {
    fs::set_permissions(path, fs::Permissions::from_mode(mode)).unwrap();
}

fn mode(path: &Path) -> u32 {
    fs::metadata(path).unwrap().mode() & 0o7777
}

/// "A disk's file has the mode of its image, without the write bits where the disk cannot be written to"
#[test]
fn a_disk_has_the_mode_of_its_image() {
    if !need_fuse() {
        return;
    }
    let scratch = Scratch::new();
    for (image_mode, written, read) in [
        (0o600, 0o600, 0o400),
        (0o640, 0o640, 0o440),
        (0o644, 0o644, 0o444),
        (0o664, 0o664, 0o444),
        (0o755, 0o644, 0o444),
    ] {
        let image = scratch.write("x.img", vec![7; 8192]);
        set_mode(&image, image_mode);
        let mount = scratch.mount().file(&image).start();
        assert_eq!(mode(&mount.file("x.raw")), written, "{image_mode:o}");
        mount.unmount();
        let mount = scratch.mount().arg("-r").file(&image).start();
        assert_eq!(mode(&mount.file("x.raw")), read, "{image_mode:o}, read-only");
        // A change of the image's mode shows.
        set_mode(&image, 0o600);
        let point = mount.point().to_owned();
        let shown = poll_until(Duration::from_secs(60), || mode(&point.join("x.raw")) == 0o400);
        assert!(shown, "{image_mode:o}: the change does not show");
        mount.unmount();
    }
    // The data's file decides, not the descriptor alone.
    let text = "# Disk DescriptorFile\nversion=1\nCID=1\nparentCID=ffffffff\ncreateType=\"monolithicFlat\"\nRW 16 FLAT \"x.img\" 0\n";
    let descriptor = scratch.write("d.vmdk", text);
    set_mode(&descriptor, 0o644);
    let mount = scratch.mount().file(&descriptor).start();
    assert_eq!(mode(&mount.file("d.raw")), 0o600);
    mount.unmount();
}

#[test]
fn other_users_cannot_read_a_private_image_through_allow_other() {
    if !need_fuse() || !need_root() {
        return;
    }
    let scratch = Scratch::new();
    scratch.open_to_all();
    let image = scratch.write("x.img", vec![7; 8192]);
    for (image_mode, readable) in [(0o600, false), (0o644, true)] {
        set_mode(&image, image_mode);
        let mount = scratch.mount().arg("-r").arg("-oallow_other").file(&image).start();
        let cat = Cmd::new("cat").arg(mount.file("x.raw")).user(Some(NOBODY)).run();
        assert_eq!(cat.ended.code == Some(0), readable, "{image_mode:o}: {cat}");
        mount.unmount();
    }
}

#[test]
fn a_new_overlay_has_mode_and_owner_of_its_base() {
    if !need_fuse() {
        return;
    }
    let scratch = Scratch::new();
    let image = scratch.write("x.img", vec![7; 8192]);
    for image_mode in [0o600, 0o640, 0o444] {
        set_mode(&image, image_mode);
        let owner = need_root().then_some((STRANGER.uid, STRANGER.gid));
        if let Some((uid, gid)) = owner {
            chown(&image, Some(uid), Some(gid)).unwrap();
        }
        scratch.mount().file(&image).arg("cow=delta.vmdk").start().unmount();
        let delta = scratch.path("delta.vmdk");
        assert_eq!(mode(&delta), image_mode | 0o200 | 0o400, "{image_mode:o}");
        let seen = fs::metadata(&delta).unwrap();
        assert!(owner.is_none_or(|owner| (seen.uid(), seen.gid()) == owner));
        fs::remove_file(delta).unwrap();
    }
}

#[test]
fn another_process_of_the_user_cannot_look_into_the_daemon() {
    if !need_fuse() || !need_root() {
        return;
    }
    let scratch = Scratch::of(NOBODY);
    scratch.open_to_all();
    scratch.write("x.img", vec![7; 8192]);
    let mount = scratch.mount().file("x.img").start();
    let look = |name: &str| {
        let path = format!("/proc/{}/{name}", mount.pid());
        Cmd::new("ls").arg("-l").arg(path).user(Some(NOBODY)).run()
    };
    assert_ne!(look("fd/").ended.code, Some(0), "another process lists the open files");
    let owner = fs::metadata(format!("/proc/{}/mem", mount.pid())).unwrap().uid();
    assert_eq!(owner, 0, "the process is dumpable");
    mount.unmount();
}
