//! "MOUNTPOINT: an existing directory (files appear in it); a name that does not exist in an existing directory (that
//! name is the file's); an existing regular file (the mount covers it)", several disks in one mount, and mounts that
//! fail.

use std::fs;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::Path;

use fuse_tests::harness::{Cmd, Scratch, need_fuse, need_qemu, qemu_img, unmount};

/// Returns 8 KiB of content that differs for each `seed`.
fn disk(seed: u8) -> Vec<u8> {
    (0..8192u32).map(|i| (i / 7) as u8 ^ seed).collect()
}

#[test]
fn a_directory_shows_one_file() {
    if !need_fuse() {
        return;
    }
    let scratch = Scratch::new();
    scratch.write("Fedora.img", disk(1));
    let mount = scratch.mount().file("Fedora.img").start();
    assert_eq!(mount.names(), ["Fedora.raw"]);
    assert_eq!(mount.entry().fs_type, "fuse.vmdkfuse");
    assert_eq!(fs::read(mount.file("Fedora.raw")).unwrap(), disk(1));
    mount.unmount();
    assert_eq!(fs::read_dir(scratch.path("mnt")).unwrap().count(), 0);
    scratch.assert_no_mounts();
}

#[test]
fn a_relative_directory_with_a_slash_works_from_any_folder() {
    if !need_fuse() {
        return;
    }
    let scratch = Scratch::new();
    scratch.write("a.img", disk(1));
    scratch.mkdir("sub/mnt");
    let cmd = scratch
        .vmdkfuse()
        .dir(scratch.path("sub"))
        .args(["--pidfile", "pid", "mnt/", "file=../a.img"]);
    cmd.run().ok();
    // The daemon changes its working directory to `/`, so every path must have been made absolute before.
    assert_eq!(fs::read(scratch.path("sub/mnt/a.raw")).unwrap(), disk(1));
    let pid: i32 = fs::read_to_string(scratch.path("sub/pid"))
        .unwrap()
        .trim()
        .parse()
        .unwrap();
    unmount(&scratch.path("sub/mnt"));
    let ended = fuse_tests::harness::wait_end(pid, std::time::Duration::from_secs(60)).expect("the end of the daemon");
    assert_eq!(ended.code, Some(0));
}

#[test]
fn a_new_name_in_a_directory_is_the_file() {
    if !need_fuse() {
        return;
    }
    let scratch = Scratch::new();
    scratch.write("a.img", disk(2));
    scratch.mkdir("dir");
    let mount = scratch.mount().at("dir/system.bin").file("a.img").start();
    let path = scratch.path("dir/system.bin");
    assert!(fs::metadata(&path).unwrap().is_file());
    assert_eq!(fs::read(&path).unwrap(), disk(2));
    mount.unmount();
    assert_eq!(
        fs::read_dir(scratch.path("dir")).unwrap().count(),
        0,
        "the name still exists"
    );
}

#[test]
fn a_name_in_a_missing_directory_is_refused() {
    let scratch = Scratch::new();
    scratch.write("a.img", disk(2));
    scratch
        .mount()
        .at("nowhere/mnt")
        .file("a.img")
        .refused(2)
        .one_error(2, &["nowhere"]);
}

/// "vmdkfuse [OPTIONS] --config FILE.toml MOUNTPOINT: mount what the file describes"
#[test]
fn a_config_file_describes_two_disks() {
    if !need_fuse() || !need_qemu() {
        return;
    }
    let scratch = Scratch::new();
    scratch.mkdir("vms");
    scratch.mkdir("mnt");
    let raw = scratch.write("vms/data.img", disk(5));
    scratch.write("system.img", disk(6));
    let (system, vmdk) = (scratch.path("system.img"), scratch.path("vms/system.vmdk"));
    qemu_img([
        "convert",
        "-O",
        "vmdk",
        system.to_str().unwrap(),
        vmdk.to_str().unwrap(),
    ]);
    let text = "cache-size = \"1M\"\n[mount]\noptions = \"umask=077,fsname=described\"\nthreads = 2\npidfile = \"pid\"\n\
        [[disk]]\nfile = \"system.vmdk\"\n[[disk]]\nfile = \"*.img\"\nname = \"data, 2=x\"\n";
    scratch.write("vms/two.toml", text);
    // The working directory is not the folder of the config file, so its relative paths work only if they are
    // resolved from there.
    scratch
        .vmdkfuse()
        .dir(scratch.root())
        .args(["-o", "umask=027", "--config", "vms/two.toml", "mnt"])
        .run()
        .ok();
    let point = scratch.path("mnt");
    let entries = fuse_tests::harness::mounts_below(scratch.root());
    let read = |name: &str| fs::read(point.join(name));
    let (first, second) = (read("system.raw"), read("data, 2=x"));
    let mode = fs::metadata(point.join("system.raw")).map(|meta| meta.permissions().mode() & 0o777);
    let pid: i32 = fs::read_to_string(scratch.path("vms/pid"))
        .unwrap()
        .trim()
        .parse()
        .unwrap();
    unmount(&point);
    let ended = fuse_tests::harness::wait_end(pid, std::time::Duration::from_secs(60)).expect("the end of the daemon");
    assert_eq!(ended.code, Some(0));
    assert_eq!((first.unwrap(), second.unwrap()), (disk(6), disk(5)));
    assert_eq!(
        mode.unwrap(),
        0o640,
        "the umask of the command line overrides that of the config file"
    );
    assert!(
        entries
            .iter()
            .any(|entry| entry.point == point && entry.source == "described"),
        "{entries:?}"
    );
    assert_eq!(fs::read(raw).unwrap(), disk(5));
}

#[test]
fn an_invalid_config_file_is_refused_with_its_line() {
    let scratch = Scratch::new();
    scratch.write("a.img", disk(1));
    scratch.write("wrong.toml", "[[disk]]\nfile = \"a.img\"\ncashe = \"none\"\n");
    scratch
        .mount()
        .arg("--config")
        .arg(scratch.path("wrong.toml"))
        .refused(2)
        .one_error(2, &["wrong.toml:3", "cache"]);
    scratch.write("right.toml", "[[disk]]\nfile = \"a.img\"\n");
    let both = scratch
        .mount()
        .arg("--config")
        .arg(scratch.path("right.toml"))
        .file("a.img");
    both.refused(2).one_error(2, &["--config"]);
}

#[test]
fn an_existing_file_is_covered() {
    if !need_fuse() {
        return;
    }
    let scratch = Scratch::new();
    scratch.write("a.img", disk(3));
    let covered = scratch.write("covered", "what was here before");
    let refused = scratch.mount().at("covered").file("a.img").refused(1);
    refused.one_error(
        1,
        &["covered", "20 bytes", "the mount point comes first", "-o nonempty"],
    );
    let mount = scratch
        .mount()
        .at("covered")
        .arg("-o")
        .arg("nonempty")
        .file("a.img")
        .start();
    assert_eq!(mount.entry().point, covered);
    assert_eq!(fs::metadata(&covered).unwrap().len(), 8192);
    assert_eq!(fs::read(&covered).unwrap(), disk(3));
    mount.unmount();
    assert_eq!(fs::read(&covered).unwrap(), b"what was here before");
}

/// Mounts with `options` at `at`, which has to be refused with `words`, and leaves no mount.
#[track_caller]
fn refused_at(scratch: &Scratch, at: &str, options: &[&str], words: &[&str]) {
    let mut mount = scratch.mount().at(at);
    for option in options {
        mount = mount.arg(option);
    }
    mount.file("vms/a.img").refused_with_any(&[1, 2]).error_names(words);
    scratch.assert_no_mounts();
}

/// "`/` and a directory that holds an image of the mount are refused", "a source of the mount is never covered"
#[test]
fn regression_a_mount_never_hides_its_own_source() {
    if !need_fuse() {
        return;
    }
    let scratch = Scratch::new();
    scratch.mkdir("vms/empty");
    scratch.write("vms/a.img", disk(4));
    let nonempty = ["-o", "nonempty"];
    refused_at(&scratch, "vms", &[], &["not empty", "-o nonempty"]);
    refused_at(&scratch, "vms", &nonempty, &["would hide", "a.img"]);
    refused_at(&scratch, "vms/new.raw", &nonempty, &["would hide", "a.img"]);
    refused_at(&scratch, "vms/a.img", &nonempty, &["would hide", "a.img"]);
    refused_at(&scratch, "/", &nonempty, &["root directory"]);
    refused_at(&scratch, "/new.raw", &nonempty, &["root directory"]);
    assert_eq!(fs::read(scratch.path("vms/a.img")).unwrap(), disk(4));
    let mount = scratch.mount().at("vms/empty").file("vms/a.img").start();
    assert_eq!(fs::read(mount.file("a.raw")).unwrap(), disk(4));
    mount.unmount();
}

/// "a name that does not exist in an existing directory (that name is the file's; it must hold a `/`, …)"
#[test]
fn regression_a_mistyped_mount_point_is_no_new_file() {
    let scratch = Scratch::new();
    scratch.write("a.img", disk(4));
    let refused = scratch.vmdkfuse().args(["mtn", "file=a.img"]).run();
    refused.one_error(2, &["mtn", "./mtn"]);
    scratch.assert_no_mounts();
}

/// Mount flags reach the kernel.
#[test]
fn regression_mount_flags_hold() {
    if !need_fuse() {
        return;
    }
    let scratch = Scratch::new();
    scratch.write("a.img", disk(4));
    let mount = scratch
        .mount()
        .arg("-o")
        .arg("noexec,sync,noatime,nodiratime,dirsync")
        .file("a.img")
        .start();
    let table = fs::read_to_string("/proc/mounts").unwrap();
    let point = mount.point().to_str().unwrap();
    let line = table
        .lines()
        .find(|line| line.split(' ').nth(1) == Some(point))
        .unwrap();
    let flags: Vec<&str> = line.split(' ').nth(3).unwrap().split(',').collect();
    for flag in ["noexec", "sync", "noatime", "nodiratime", "dirsync", "nosuid", "nodev"] {
        assert!(flags.contains(&flag), "{flag} in {flags:?}");
    }
    mount.unmount();
    scratch
        .mount()
        .arg("-o")
        .arg("context=system_u:object_r:no_such_t:s0")
        .file("a.img")
        .refused(1);
}

#[test]
fn several_disks_appear_under_their_names() {
    if !need_fuse() {
        return;
    }
    let scratch = Scratch::new();
    for (name, seed) in [("a.img", 1), ("b.img", 2), ("c.disk.img", 3)] {
        scratch.write(name, disk(seed));
    }
    let mount = scratch
        .mount()
        .file("a.img")
        .arg("name=first")
        .file("b.img")
        .file("c.disk.img")
        .start();
    assert_eq!(mount.names(), ["b.raw", "c.disk.raw", "first"]);
    for (name, seed) in [("first", 1), ("b.raw", 2), ("c.disk.raw", 3)] {
        assert_eq!(fs::read(mount.file(name)).unwrap(), disk(seed), "{name}");
    }
    mount.unmount();
}

/// "keys before the first one hold for all"
#[test]
fn keys_before_the_first_file_apply_to_all_disks() {
    if !need_fuse() {
        return;
    }
    let scratch = Scratch::new();
    scratch.write("a.vmdk", disk(1));
    scratch.write("b.vmdk", disk(2));
    let mount = scratch.mount().arg("format=raw").file("a.vmdk").file("b.vmdk").start();
    assert_eq!(fs::read(mount.file("a.raw")).unwrap(), disk(1));
    assert_eq!(fs::read(mount.file("b.raw")).unwrap(), disk(2));
    drop(mount);
    // After a `file=` the key applies to that disk only, so the first file is opened as a VMDK, which it is not.
    scratch
        .mount()
        .file("a.vmdk")
        .file("b.vmdk")
        .arg("format=raw")
        .refused(1)
        .one_error(1, &["a.vmdk"]);
}

#[test]
fn a_glob_mounts_every_matching_file() {
    if !need_fuse() {
        return;
    }
    let scratch = Scratch::new();
    for (name, seed) in [("vm-1.img", 1), ("vm-2.img", 2), ("other.img", 3)] {
        scratch.write(name, disk(seed));
    }
    let mount = scratch.mount().file("vm-*.img").start();
    assert_eq!(mount.names(), ["vm-1.raw", "vm-2.raw"]);
    assert_eq!(fs::read(mount.file("vm-2.raw")).unwrap(), disk(2));
    mount.unmount();
    scratch
        .mount()
        .file("none-*.img")
        .refused(2)
        .one_error(2, &["none-*.img"]);
}

/// "`dir=DIR` (all disks of a folder)": descriptors and files with one inside, but not their extents.
#[test]
fn dir_shows_every_disk_of_a_folder() {
    if !need_fuse() || !need_qemu() {
        return;
    }
    let scratch = Scratch::new();
    scratch.mkdir("vm");
    scratch.write("a.img", disk(1));
    let raw = scratch.path("a.img");
    for (name, subformat) in [
        ("one", "monolithicSparse"),
        ("two", "monolithicFlat"),
        ("three", "streamOptimized"),
    ] {
        let (out, option) = (
            scratch.path(format!("vm/{name}.vmdk")),
            format!("subformat={subformat}"),
        );
        let words = [
            "convert",
            "-f",
            "raw",
            "-O",
            "vmdk",
            "-o",
            &option,
            raw.to_str().unwrap(),
            out.to_str().unwrap(),
        ];
        qemu_img(words);
    }
    let mount = scratch
        .mount()
        .arg(format!("dir={}", scratch.path("vm").display()))
        .start();
    assert_eq!(mount.names(), ["one.raw", "three.raw", "two.raw"]);
    for name in mount.names() {
        assert_eq!(fs::read(mount.file(&name)).unwrap(), disk(1), "{name}");
    }
    mount.unmount();
}

/// "mount.vmdkfuse SOURCE MOUNTPOINT [-sfnv] [-o OPTS]: what mount(8) runs"
#[test]
fn the_mount_helper_mounts() {
    if !need_fuse() {
        return;
    }
    let scratch = Scratch::new();
    scratch.write("a.img", disk(9));
    let helper = scratch.path("mount.vmdkfuse");
    symlink(fuse_tests::harness::program(), &helper).unwrap();
    let point = scratch.mkdir("mnt");
    let words = ["-n", "-o", "ro,noauto,x-systemd.automount,name=disk.bin"];
    Cmd::new(&helper)
        .arg(scratch.path("a.img"))
        .arg(&point)
        .args(words)
        .dir(scratch.root())
        .run()
        .ok();
    assert_eq!(fs::read(point.join("disk.bin")).unwrap(), disk(9));
    unmount(&point);
    scratch.assert_no_mounts();
}

/// The name of an existing file is never taken for a glob, whatever characters it contains.
#[test]
fn a_file_whose_name_looks_like_a_glob_is_that_file() {
    if !need_fuse() {
        return;
    }
    let scratch = Scratch::new();
    scratch.write("vm[1].img", disk(5));
    scratch.write("vm1.img", disk(6));
    let mount = scratch.mount().file("vm[1].img").start();
    assert_eq!(mount.names(), ["vm[1].raw"]);
    assert_eq!(fs::read(mount.file("vm[1].raw")).unwrap(), disk(5));
    mount.unmount();
}

#[test]
fn two_disks_with_the_same_name_are_a_usage_error() {
    let scratch = Scratch::new();
    scratch.mkdir("x");
    scratch.write("a.img", disk(1));
    scratch.write("x/a.img", disk(2));
    scratch
        .mount()
        .file("a.img")
        .file("x/a.img")
        .refused(2)
        .error_names(&["a.raw", "name="]);
}

#[test]
fn several_disks_need_a_directory() {
    let scratch = Scratch::new();
    scratch.write("a.img", disk(1));
    scratch.write("b.img", disk(2));
    scratch.write("covered", "x");
    for at in ["covered", "new-name"] {
        let outcome = scratch
            .mount()
            .at(at)
            .file("a.img")
            .file("b.img")
            .refused_with_any(&[1, 2]);
        assert!(!outcome.stderr.is_empty(), "{outcome}");
    }
}

#[test]
fn a_failed_mount_leaves_nothing_behind() {
    let scratch = Scratch::new();
    scratch.write("good.img", disk(1));
    scratch.write("text.vmdk", "this is no image at all");
    scratch.write("empty.vmdk", "");
    scratch.mkdir("folder.vmdk");
    scratch.mkdir("dir");
    scratch
        .mount()
        .file("gone.vmdk")
        .refused(1)
        .one_error(1, &["gone.vmdk"]);
    scratch
        .mount()
        .file("good.img")
        .file("gone.vmdk")
        .refused(1)
        .one_error(1, &["gone.vmdk"]);
    for name in ["text.vmdk", "empty.vmdk", "folder.vmdk"] {
        scratch.mount().file(name).refused(1).one_error(1, &[name]);
        scratch
            .mount()
            .at("dir/new-name")
            .file(name)
            .refused(1)
            .one_error(1, &[name]);
    }
    scratch
        .mount()
        .foreground()
        .file("gone.vmdk")
        .refused(1)
        .one_error(1, &["gone.vmdk"]);
}

#[test]
fn the_error_of_a_missing_parent_names_its_file() {
    if !need_qemu() {
        return;
    }
    let scratch = Scratch::new();
    let at = |name: &str| scratch.path(name).to_str().unwrap().to_owned();
    qemu_img(["create", "-f", "vmdk", &at("base.vmdk"), "4M"]);
    // Run in the folder, so that the hint is relative, as VMware writes it.
    Cmd::new("qemu-img")
        .args(["create", "-f", "vmdk", "-F", "vmdk", "-b", "base.vmdk", "top.vmdk"])
        .dir(scratch.root())
        .run()
        .ok();
    fs::remove_file(at("base.vmdk")).unwrap();
    scratch.mount().file("top.vmdk").refused(1).one_error(1, &["base.vmdk"]);
}

/// "CID mismatch (error that names both, `degraded=cid` accepts it)"
#[test]
fn a_changed_parent_is_refused_without_degraded_cid() {
    if !need_qemu() || !need_fuse() {
        return;
    }
    let scratch = Scratch::new();
    let run = |tool: &str, words: &[&str]| Cmd::new(tool).args(words).dir(scratch.root()).run().ok();
    run("qemu-img", &["create", "-f", "vmdk", "base.vmdk", "4M"]);
    run(
        "qemu-img",
        &["create", "-f", "vmdk", "-F", "vmdk", "-b", "base.vmdk", "top.vmdk"],
    );
    let cid = |name: &str| {
        let json = scratch
            .vmdkfuse()
            .args(["--info", "--json"])
            .key("file", scratch.path(name))
            .run()
            .ok()
            .json();
        json[0]["chain"][0].clone()
    };
    let recorded = cid("top.vmdk")["parent_cid"].as_str().unwrap().to_owned();
    // qemu-io gives the base a new CID at its first write.
    run("qemu-io", &["-f", "vmdk", "-c", "write -P 0x55 0 64k", "base.vmdk"]);
    let current = cid("base.vmdk")["cid"].as_str().unwrap().to_owned();
    assert_ne!(current, recorded);
    scratch
        .mount()
        .file("top.vmdk")
        .refused(1)
        .one_error(1, &[&recorded, &current]);
    let mount = scratch.mount().file("top.vmdk").arg("degraded=cid").start();
    assert_eq!(
        fuse_tests::harness::read_range(&mount.file("top.raw"), 100, 1000),
        vec![0x55; 1000]
    );
    mount.unmount();
}

/// Names in an image may only lead into its own folder; `allow-dir=` allows a further one.
#[test]
fn an_extent_in_another_folder_needs_allow_dir() {
    if !need_fuse() {
        return;
    }
    let scratch = Scratch::new();
    for folder in ["images", "store"] {
        scratch.mkdir(folder);
    }
    scratch.write("store/data.bin", disk(7));
    let extents = |name: &str| {
        format!(
            "# Disk DescriptorFile\nversion=1\nCID=12345678\nparentCID=ffffffff\ncreateType=\"monolithicFlat\"\n\nRW 16 FLAT \"{name}\" 0\n"
        )
    };
    let full = scratch.path("store/data.bin");
    scratch.write("images/absolute.vmdk", extents(full.to_str().unwrap()));
    scratch.write("images/dotdot.vmdk", extents("../store/data.bin"));
    symlink(&full, scratch.path("images/link.bin")).unwrap();
    scratch.write("images/link.vmdk", extents("link.bin"));
    for name in ["absolute", "dotdot", "link"] {
        let file = Path::new("images").join(format!("{name}.vmdk"));
        scratch
            .mount()
            .file(&file)
            .refused(1)
            .one_error(1, &[name, "allow-dir"]);
        let allowed = format!("allow-dir={}", scratch.path("store").display());
        let mount = scratch.mount().file(&file).arg(allowed).start();
        assert_eq!(fs::read(mount.file(format!("{name}.raw"))).unwrap(), disk(7), "{name}");
        mount.unmount();
    }
    // Allowing an unrelated folder does not help.
    let elsewhere = format!("allow-dir={}", scratch.mkdir("other").display());
    scratch
        .mount()
        .file("images/absolute.vmdk")
        .arg(elsewhere)
        .refused(1)
        .one_error(1, &["allow-dir"]);
}

/// "What a file is, its name or `format=` decides"
#[test]
fn the_format_is_never_detected_by_content() {
    if !need_fuse() || !need_qemu() {
        return;
    }
    let scratch = Scratch::new();
    scratch.write("a.img", disk(8));
    let (raw, vmdk) = (scratch.path("a.img"), scratch.path("hidden.bin"));
    qemu_img(["convert", "-O", "vmdk", raw.to_str().unwrap(), vmdk.to_str().unwrap()]);
    let refused = scratch.mount().file("hidden.bin").refused(1);
    refused.one_error(1, &["hidden.bin", "holds a VMDK", "format=vmdk"]);
    let mount = scratch.mount().file("hidden.bin").arg("format=vmdk").start();
    assert_eq!(fs::read(mount.file("hidden.raw")).unwrap(), disk(8));
    mount.unmount();
    let mount = scratch.mount().file("hidden.bin").arg("format=raw").start();
    assert_eq!(fs::read(mount.file("hidden.raw")).unwrap(), fs::read(&vmdk).unwrap());
    mount.unmount();
    scratch
        .mount()
        .file("a.img")
        .arg("format=vmdk")
        .refused(1)
        .one_error(1, &["a.img"]);
}
