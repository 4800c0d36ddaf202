//! "Works as root and as an ordinary user by fusermount3": users that may mount, and users that may read.

use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt, chown};
use std::path::Path;

use fuse_tests::harness::{
    Cmd, NOBODY, Outcome, STRANGER, Scratch, User, need, need_allow_other, need_fuse, need_qemu, need_root, program,
    qemu_img, sha256, unmount_as,
};
use nix::sys::signal::Signal;

/// Creates a raw image that every user may read; returns its SHA-256.
fn image(scratch: &Scratch) -> String {
    let bytes: Vec<u8> = (0..1_000_448u32).map(|i| (i / 3) as u8).collect();
    let path = scratch.write("disk.img", bytes);
    scratch.open_to_all();
    sha256(&path)
}

/// Runs sha256sum as `user`.
fn hash_as(user: User, path: &Path) -> Outcome {
    Cmd::new("sha256sum").arg(path).user(Some(user)).run()
}

/// Returns true if the machine can run these tests. They run programs as other users, for which they need root.
fn ready() -> bool {
    need_fuse() && need_root()
}

#[test]
fn an_ordinary_user_mounts_reads_and_unmounts() {
    if !ready() {
        return;
    }
    let scratch = Scratch::of(NOBODY);
    let hash = image(&scratch);
    for at in ["mnt", "dir/new-name", "covered"] {
        scratch.mkdir("dir");
        scratch.write("covered", "");
        let mut mount = scratch.mount().at(at).file("disk.img").start();
        let path = if at == "mnt" {
            mount.file("disk.raw")
        } else {
            scratch.path(at)
        };
        assert!(hash_as(NOBODY, &path).ok().stdout.starts_with(&hash), "{at}");
        let stat_output = Cmd::new("stat")
            .args(["-c", "%u %g %s"])
            .arg(&path)
            .user(Some(NOBODY))
            .run()
            .ok();
        assert_eq!(stat_output.stdout.trim(), "65534 65534 1000448", "{at}");
        unmount_as(&mount.entry().point, Some(NOBODY)).ok();
        assert!(!mount.is_mounted(), "{at}");
        let ended = mount.wait_end();
        assert_eq!(ended.code, Some(0), "{at}: {ended:?}");
    }
}

#[test]
fn an_ordinary_user_ends_the_daemon_by_a_signal() {
    if !ready() {
        return;
    }
    let scratch = Scratch::of(NOBODY);
    image(&scratch);
    let mut mount = scratch.mount().file("disk.img").start();
    Cmd::new("kill")
        .arg(mount.pid().to_string())
        .user(Some(NOBODY))
        .run()
        .ok();
    assert_eq!(mount.wait_end().code, Some(0));
    assert!(!mount.is_mounted());
}

#[test]
fn an_ordinary_user_can_use_auto_unmount() {
    if !ready() {
        return;
    }
    let scratch = Scratch::of(NOBODY);
    image(&scratch);
    let mut mount = scratch.mount().arg("-o").arg("auto_unmount").file("disk.img").start();
    mount.signal(nix::sys::signal::Signal::SIGKILL);
    mount.wait_end();
    mount.wait_unmounted();
}

#[test]
fn an_image_that_the_user_may_not_read_is_a_one_line_error() {
    if !ready() {
        return;
    }
    let scratch = Scratch::of(NOBODY);
    let secret = scratch.write("secret.img", vec![0; 512]);
    std::os::unix::fs::chown(&secret, Some(0), Some(0)).unwrap();
    fs::set_permissions(&secret, fs::Permissions::from_mode(0o600)).unwrap();
    scratch
        .mount()
        .file("secret.img")
        .refused(1)
        .one_error(1, &["secret.img", "permission denied"]);
}

#[test]
fn a_mount_point_of_another_user_is_refused() {
    if !ready() {
        return;
    }
    let scratch = Scratch::of(NOBODY);
    image(&scratch);
    let point = scratch.mkdir("roots");
    std::os::unix::fs::chown(&point, Some(0), Some(0)).unwrap();
    fs::set_permissions(&point, fs::Permissions::from_mode(0o755)).unwrap();
    scratch
        .mount()
        .at("roots")
        .file("disk.img")
        .refused(1)
        .error_names(&["roots"]);
}

/// Root may not look into the mount of another user, also not into a dead one.
#[test]
fn root_is_told_of_the_dead_mount_of_another_user_and_how_to_clear_it() {
    if !ready() {
        return;
    }
    let scratch = Scratch::of(NOBODY);
    image(&scratch);
    let mut mount = scratch.mount().file("disk.img").start();
    mount.signal(Signal::SIGKILL);
    mount.wait_end();
    let point = mount.point().to_owned();
    let clear = format!("umount {}", point.display());
    let second = Cmd::new(program()).arg(&point).arg(scratch.path("disk.img")).run();
    second.one_error(2, &["another user", &clear]);
    Cmd::new("umount").arg(&point).run().ok();
    drop(mount);
    let again = scratch.mount().file("disk.img").start();
    again.unmount();
}

/// "`allow_other` refused by fuse.conf gives the reason"
#[test]
fn allow_other_of_an_ordinary_user_depends_on_fuse_conf() {
    if !ready() {
        return;
    }
    let scratch = Scratch::of(NOBODY);
    let hash = image(&scratch);
    for option in ["allow_other", "allow_root"] {
        let command = scratch.mount().arg("-o").arg(option).file("disk.img");
        if need_allow_other(false) {
            command.refused(1).error_names(&["user_allow_other", "fuse.conf"]);
        } else {
            let mount = command.start();
            let reader = if option == "allow_other" {
                STRANGER
            } else {
                User { uid: 0, gid: 0 }
            };
            assert!(hash_as(reader, &mount.file("disk.raw")).ok().stdout.starts_with(&hash));
            mount.unmount();
        }
    }
}

#[test]
fn other_users_cannot_read_a_mount_without_allow_other() {
    if !ready() {
        return;
    }
    let scratch = Scratch::new();
    let hash = image(&scratch);
    let mount = scratch.mount().file("disk.img").start();
    hash_as(NOBODY, &mount.file("disk.raw")).error_names(&["permission denied"]);
    mount.unmount();
    let mount = scratch.mount().arg("-o").arg("allow_other").file("disk.img").start();
    assert!(hash_as(NOBODY, &mount.file("disk.raw")).ok().stdout.starts_with(&hash));
    mount.unmount();
}

#[test]
fn default_permissions_enforces_owner_and_umask() {
    if !ready() {
        return;
    }
    let scratch = Scratch::new();
    let hash = image(&scratch);
    let options = "allow_other,default_permissions,uid=12345,gid=12345,umask=077";
    let mount = scratch.mount().arg("-o").arg(options).file("disk.img").start();
    let path = mount.file("disk.raw");
    let seen = fs::metadata(&path).unwrap();
    assert_eq!(
        (seen.uid(), seen.gid(), seen.mode() & 0o077),
        (12345, 12345, 0),
        "mode {:o}",
        seen.mode()
    );
    assert!(hash_as(STRANGER, &path).ok().stdout.starts_with(&hash));
    hash_as(NOBODY, &path).error_names(&["permission denied"]);
    mount.unmount();
}

/// "In a rootless container": root of a user namespace mounts an image whose owner the namespace does not know.
#[test]
fn root_of_a_user_namespace_mounts_an_image_of_a_user_outside() {
    if !ready() || !need("unshare") || !need_qemu() {
        return;
    }
    let scratch = Scratch::of(NOBODY);
    let hash = image(&scratch);
    scratch.mkdir("mnt");
    qemu_img([
        Path::new("convert"),
        Path::new("-Ovmdk"),
        Path::new("-osubformat=monolithicFlat"),
        &scratch.path("disk.img"),
        &scratch.path("flat.vmdk"),
    ]);
    for name in ["flat.vmdk", "flat-flat.vmdk"] {
        chown(scratch.path(name), Some(STRANGER.uid), Some(STRANGER.gid)).unwrap();
        fs::set_permissions(scratch.path(name), fs::Permissions::from_mode(0o666)).unwrap();
    }
    // The daemon ends with the namespace's last process, so it stays in the foreground of this shell.
    let script = "./vmdkfuse -f mnt flat.vmdk name=d & until grep -q \"$PWD/mnt fuse.vmdkfuse\" /proc/self/mounts; do kill -0 $! || exit 9; \
                  done; sha256sum mnt/d; umount mnt; wait $!";
    let outcome = Cmd::new("unshare")
        .args(["--map-root-user", "--mount", "sh", "-c", script])
        .dir(scratch.root())
        .user(Some(NOBODY))
        .run();
    assert!(outcome.ok().stdout.starts_with(&hash));
}
