//! Files that a name inside an image may open, and other programs that have the file open.

use std::fmt::Write as _;
use std::fs;
use std::os::unix::fs::{PermissionsExt, chown};
use std::path::Path;

use fuse_tests::harness::{STRANGER, Scratch, need_fuse, need_root, read_range};

/// Bytes of an extent file.
const LEN: usize = 1024;

/// Text of a descriptor with flat extents of one sector each.
fn descriptor<'a>(names: impl IntoIterator<Item = &'a str>) -> String {
    let mut text = "# Disk DescriptorFile\nversion=1\nCID=1\nparentCID=ffffffff\ncreateType=\"custom\"\n".to_owned();
    for name in names {
        writeln!(text, "RW 1 FLAT \"{name}\"").unwrap();
    }
    text
}

/// Creates a file that belongs to `owner`.
fn put(path: &Path, content: impl AsRef<[u8]>, owner: u32, mode: u32) {
    fs::write(path, content).unwrap();
    fs::set_permissions(path, fs::Permissions::from_mode(mode)).unwrap();
    chown(path, Some(owner), Some(owner)).unwrap();
}

/// "as root: a file that an image names and that the image's owner may not read"
#[test]
fn root_shows_only_what_the_owner_of_the_image_may_read() {
    if !need_fuse() || !need_root() {
        return;
    }
    let scratch = Scratch::new();
    scratch.open_to_all();
    put(&scratch.path("secret"), [7; LEN], 0, 0o600);
    put(&scratch.path("public"), [8; LEN], 0, 0o644);
    put(&scratch.path("own"), [9; LEN], STRANGER.uid, 0o600);
    for (name, answer) in [("secret", None), ("public", Some((8, false))), ("own", Some((9, true)))] {
        put(&scratch.path("disk.vmdk"), descriptor([name]), STRANGER.uid, 0o644);
        let Some((byte, writable)) = answer else {
            let parts = [name, "belongs to user 12345", "chown"];
            scratch.mount().file("disk.vmdk").refused(1).one_error(1, &parts);
            continue;
        };
        let mount = scratch.mount().file("disk.vmdk").start();
        let file = mount.file("disk.raw");
        assert_eq!(read_range(&file, 0, 512), [byte; 512]);
        let mode = fs::metadata(&file).unwrap().permissions().mode();
        assert_eq!(mode & 0o200 != 0, writable, "{name}: mode {mode:o}");
        mount.unmount();
    }
    // The image of root opens what root may open.
    put(&scratch.path("disk.vmdk"), descriptor(["secret"]), 0, 0o644);
    let mount = scratch.mount().file("disk.vmdk").start();
    assert_eq!(read_range(&mount.file("disk.raw"), 0, 512), [7; 512]);
    mount.unmount();
}

/// "to a hidden file or folder", "any extent or parent, with `extents=self`"
#[test]
fn hidden_files_and_other_files_are_refused_on_request() {
    if !need_fuse() {
        return;
    }
    let scratch = Scratch::new();
    let keys = scratch.mkdir(".keys");
    scratch.write(".keys/id", [7; LEN]);
    scratch.write("disk.vmdk", descriptor([".keys/id"]));
    let allow = format!("allow-dir={}", keys.display());
    scratch
        .mount()
        .file("disk.vmdk")
        .refused(1)
        .one_error(1, &["hidden", &allow]);
    scratch.mount().file("disk.vmdk").arg(&allow).start().unmount();
    let strict = || scratch.mount().file("disk.vmdk").arg(&allow).arg("extents=self");
    strict().refused(1).one_error(1, &[".keys/id", "extents=self"]);
}

/// Thousands of names of one file cost no more than one: each is opened and locked once.
#[test]
fn a_file_with_thousands_of_names_opens_within_the_time_of_one() {
    if !need_fuse() {
        return;
    }
    let scratch = Scratch::new();
    scratch.write("x", [7; LEN]);
    // Names of one length that differ in the places of their doubled slashes.
    let names: Vec<String> = (0..8000_u32)
        .map(|n| {
            (0..13)
                .map(|bit| if n >> bit & 1 == 1 { "./" } else { ".//" })
                .collect::<String>()
                + "x"
        })
        .collect();
    scratch.write("disk.vmdk", descriptor(names.iter().map(String::as_str)));
    let mount = scratch.mount().file("disk.vmdk").start();
    let open = fs::read_dir(format!("/proc/{}/fd", mount.pid())).unwrap().count();
    assert!(open < 200, "{open} open files for two");
    assert_eq!(read_range(&mount.file("disk.raw"), 7999 * 512, 512), [7; 512]);
    mount.unmount();
}

/// "the error names the program and its mount point"
#[test]
fn a_conflict_names_the_mount_point_of_the_holder() {
    if !need_fuse() {
        return;
    }
    let scratch = Scratch::new();
    scratch.write("x", [7; LEN]);
    scratch.write("disk.vmdk", descriptor(["x"]));
    scratch.mkdir("second");
    let mount = scratch.mount().file("disk.vmdk").start();
    let advice = format!("unmount {} first", mount.point().display());
    let second = scratch.mount().at("second").file("disk.vmdk");
    second
        .refused(1)
        .one_error(1, &["disk.vmdk", "in use for writing", &advice]);
    // The extent is not the source of the mount: the holder's open files tell its mount point.
    let second = scratch.mount().at("second").file("x");
    second.refused(1).one_error(1, &["x:", "in use for writing", &advice]);
    mount.unmount();
}
