//! A file that is complete in `cache-dir=` is a local file: the kernel reads it itself.

use std::fs::{self, File};
use std::os::unix::fs::{FileExt, PermissionsExt};
use std::path::{Path, PathBuf};

use fuse_tests::harness::{
    Cmd, Mount, assert_same, assert_same_at_random, need_kernel_view, need_qemu, need_root, poll_until, qemu_img,
    read_range,
};

use crate::disk_tier::{Fixture, MIB};
use crate::server::{SOON, need_nginx};

const LEN: u64 = 24 * MIB;
/// Log messages of the daemon once the kernel reads a disk itself.
const PASSED: &str = "served by the kernel itself";
const VIEWED: &str = "read by the kernel itself";

fn ready() -> bool {
    need_nginx() && need_kernel_view()
}

fn mounted(f: &Fixture) -> Mount {
    f.mount().arg("-v").foreground().start()
}

/// Returns true if the daemon serves the reads of the file. Opens and reads it once.
fn is_served(mount: &Mount, path: &Path) -> bool {
    let reads = || {
        let io = fs::read_to_string(format!("/proc/{}/io", mount.pid())).unwrap();
        let line = io.lines().find_map(|line| line.strip_prefix("syscr: "));
        line.unwrap().trim().parse::<u64>().unwrap()
    };
    let before = reads();
    let len = fs::read(path).unwrap().len() as u64;
    // A request is for at most 1 MiB.
    reads() - before >= len / MIB
}

/// Opens the file, and returns true if the kernel has ever got a backing file for it.
fn is_passed(mount: &Mount, path: &Path) -> bool {
    drop(File::open(path).unwrap());
    mount.output().1.contains(PASSED)
}

#[test]
fn a_complete_raw_disk_is_passed_through_at_the_first_open() {
    if !ready() {
        return;
    }
    let f = Fixture::new(LEN);
    f.run("--prefetch", &f.words()).ok();
    let sent = f.server.sent();
    let info = f.run("--info", &f.words()).ok().stdout;
    assert!(info.contains("the kernel itself"), "{info}");
    let mount = mounted(&f);
    let file = mount.file("d.raw");
    assert!(!is_served(&mount, &file));
    assert!(mount.output().1.contains(PASSED), "{}", mount.output().1);
    assert_same(&file, &f.file);
    // The mode of the cache's own files says nothing about the disk.
    assert_eq!(fs::metadata(&file).unwrap().permissions().mode() & 0o777, 0o444);
    mount.unmount();
    assert_eq!(f.server.sent(), sent);
}

#[test]
fn a_disk_that_reads_complete_is_passed_through_while_it_is_mounted() {
    if !ready() {
        return;
    }
    let f = Fixture::new(LEN);
    let mount = mounted(&f);
    let file = mount.file("d.raw");
    let early = File::open(&file).unwrap();
    assert!(is_served(&mount, &file));
    assert!(poll_until(SOON, || f.listed().contains("complete")));
    // A handle from before keeps the daemon, and so does every open beside it. What was read before is in the kernel's pages.
    assert!(!is_served(&mount, &file));
    assert!(!mount.output().1.contains(PASSED), "{}", mount.output().1);
    let mut bytes = vec![0; 4096];
    early.read_exact_at(&mut bytes, 7 * MIB).unwrap();
    assert_eq!(bytes, read_range(&f.file, 7 * MIB, 4096));
    drop(early);
    // The kernel tells the daemon of a close some time after it.
    assert!(poll_until(SOON, || is_passed(&mount, &file)));
    assert!(!is_served(&mount, &file));
    assert_same(&file, &f.file);
    mount.unmount();
}

#[test]
fn a_prefetch_of_another_process_lets_the_next_open_pass_through() {
    if !ready() {
        return;
    }
    let f = Fixture::new(LEN);
    let mount = mounted(&f);
    let file = mount.file("d.raw");
    assert_eq!(read_range(&file, 5 * MIB, 4096), read_range(&f.file, 5 * MIB, 4096));
    f.run("--prefetch", &f.words()).ok();
    let sent = f.server.sent();
    assert!(poll_until(SOON, || is_passed(&mount, &file)));
    assert_same(&file, &f.file);
    mount.unmount();
    assert_eq!(f.server.sent(), sent);
}

#[test]
fn a_cache_on_a_read_only_file_system_is_read() {
    if !ready() || !need_root() {
        return;
    }
    let f = Fixture::new(LEN);
    f.run("--prefetch", &f.words()).ok();
    let bound = f.scratch.mkdir("read-only");
    let bind = Cmd::new("mount").arg("--bind").arg(f.cache()).arg(&bound).run();
    bind.ok();
    let remounted = Cmd::new("mount").args(["-o", "remount,bind,ro"]).arg(&bound).run();
    remounted.ok();
    let folder = format!("cache-dir={}", bound.display());
    let mut words = f.words();
    words[2] = folder.clone();
    let sent = f.server.sent();
    f.run("--prefetch", &words).ok();
    for (damaged, status) in [(false, 0), (true, 4)] {
        if damaged {
            let data = File::options().write(true).open(&f.cached("data")[0]).unwrap();
            data.write_all_at(b"damage", 5 * MIB).unwrap();
        }
        let listed = f.run("--list", std::slice::from_ref(&folder)).ok().stdout;
        assert_eq!(listed.contains("complete"), !damaged, "{listed}");
        f.run("--check", std::slice::from_ref(&folder)).expect_code(status);
        let mount = words.iter().fold(f.scratch.mount(), |mount, word| mount.arg(word));
        let mount = mount.arg("-v").foreground().start();
        let file = mount.file("d.raw");
        assert_eq!(is_passed(&mount, &file), !damaged);
        assert_same(&file, &f.file);
        mount.unmount();
    }
    // What is damaged is fetched, and cannot be kept.
    let fetched = f.server.sent() - sent;
    assert!((1..4 * MIB).contains(&fetched), "{fetched}");
    assert!(f.run("--prefetch", &words).stderr.contains("Read-only file system"));
}

#[test]
fn regression_damage_while_a_disk_is_fetched_is_never_shown() {
    if !ready() {
        return;
    }
    let f = Fixture::new(LEN);
    let mount = f.mount().args(["-v", "-o", "readahead=0"]).foreground().start();
    let file = mount.file("d.raw");
    const BLOCK: u64 = 32 << 10;
    read_range(&file, 5 * MIB, BLOCK as usize);
    // Another program writes to a block that the daemon has kept, before the daemon fetches the others.
    let data = File::options().write(true).open(&f.cached("data")[0]).unwrap();
    data.write_all_at(b"damage", 5 * MIB + 100).unwrap();
    read_range(&file, 0, 5 << 20);
    read_range(&file, 6 * MIB, (LEN - 6 * MIB) as usize);
    read_range(&file, 5 * MIB + BLOCK, (MIB - BLOCK) as usize);
    let is_found = || mount.output().1.contains("damaged") || f.listed().contains("complete");
    assert!(poll_until(SOON, is_found));
    mount.unmount();
    let mount = mounted(&f);
    assert_same(&mount.file("d.raw"), &f.file);
    mount.unmount();
}

/// Puts a sparse VMDK on the server; returns its words and its name in a mount.
fn sparse(f: &Fixture) -> (Vec<String>, PathBuf) {
    let vmdk = f.file.with_file_name("s.vmdk");
    let (raw, out) = (f.file.to_str().unwrap(), vmdk.to_str().unwrap());
    qemu_img(["convert", "-f", "raw", "-O", "vmdk", raw, out]);
    let mut words = f.words();
    words[0] = f.server.url("s.vmdk");
    (words, "s.raw".into())
}

#[test]
fn a_complete_vmdk_has_a_kernel_view_at_the_mount_and_one_that_becomes_complete_later() {
    if !ready() || !need_qemu() {
        return;
    }
    let f = Fixture::new(LEN);
    let (words, name) = sparse(&f);
    let start = || {
        let command = words.iter().fold(f.scratch.mount(), |command, word| command.arg(word));
        command.arg("-v").foreground().start()
    };
    let mount = start();
    let file = mount.file(&name);
    let early = File::open(&file).unwrap();
    assert!(is_served(&mount, &file));
    f.run("--prefetch", &words).ok();
    assert!(poll_until(SOON, || !is_served(&mount, &file)));
    assert!(mount.output().1.contains(VIEWED), "{}", mount.output().1);
    assert_same(&file, &f.file);
    assert_same_at_random(&file, &f.file, 5, 100);
    let mut bytes = vec![0; 4096];
    early.read_exact_at(&mut bytes, 9 * MIB).unwrap();
    assert_eq!(bytes, read_range(&f.file, 9 * MIB, 4096), "a handle from before");
    drop(early);
    mount.unmount();
    let sent = f.server.sent();
    let mount = start();
    let file = mount.file(&name);
    assert!(poll_until(SOON, || mount.output().1.contains(VIEWED)));
    assert!(!is_served(&mount, &file));
    assert_same(&file, &f.file);
    mount.unmount();
    assert_eq!(f.server.sent(), sent);
}

#[test]
fn damage_ends_the_passing_through_and_is_never_shown() {
    if !ready() || !need_qemu() {
        return;
    }
    let f = Fixture::new(LEN);
    let (of_vmdk, vmdk) = sparse(&f);
    for (words, name) in [(f.words(), PathBuf::from("d.raw")), (of_vmdk, vmdk)] {
        f.run("--prefetch", &words).ok();
        let command = words.iter().fold(f.scratch.mount(), |command, word| command.arg(word));
        let mount = command.arg("-v").foreground().start();
        let file = mount.file(&name);
        assert!(poll_until(SOON, || !is_served(&mount, &file)));
        let data = f.cached("data").into_iter();
        let data = data.max_by_key(|path| path.with_extension("map").metadata().unwrap().modified().unwrap());
        let data = fs::File::options().write(true).open(data.unwrap()).unwrap();
        (0..20).for_each(|n| data.write_all_at(b"damage", n * 1_000_003).unwrap());
        assert_same(&file, &f.file);
        mount.unmount();
        f.run("--prefetch", &words).ok();
        fs::remove_dir_all(f.cache()).unwrap();
    }
}

#[test]
fn a_file_that_the_kernel_reads_is_not_evicted() {
    if !ready() {
        return;
    }
    let f = Fixture::new(LEN);
    f.run("--prefetch", &f.words()).ok();
    let mount = mounted(&f);
    let file = mount.file("d.raw");
    let open = File::open(&file).unwrap();
    let of_folder = [f.words()[2].clone(), "cache-dir-size=1M".to_owned()];
    f.run("--check", &of_folder).ok();
    assert_eq!(f.cached("data").len(), 1);
    assert_same(&file, &f.file);
    drop(open);
    mount.unmount();
    let checked = f.run("--check", &of_folder).ok().stdout;
    assert!(checked.contains("removed"), "{checked}");
    assert!(f.cached("data").is_empty() && f.cached("map").is_empty());
}
