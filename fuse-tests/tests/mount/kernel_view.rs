//! Kernel views: non-flat disks that the kernel reads without the daemon.
//!
//! Every way to open such a disk must read the same bytes. A buffered open is passed through to the view, the served
//! node answers `O_DIRECT`, and the name of the disk moves between the two nodes. A killed daemon must leave nothing
//! behind.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::fs::{DirEntryExt, FileExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, SystemTime};

use fuse_tests::harness::{
    Aligned, Cmd, GUEST_DEADLINE, Mount, MountCmd, NOBODY, Scratch, assert_same, assert_same_at_random, digest_range,
    each, map_bytes, need, need_fuse, need_kernel_view, need_qemu, poll_until, qemu_img, raw_with_islands, read_range,
    sha256, umount,
};
use fuse_tests::make::{SECTOR, Variant, valid};
use nix::libc;
use nix::sys::signal::Signal;
use rand::rngs::SmallRng;
use rand::seq::IndexedRandom;
use rand::{Rng, SeedableRng};

/// Seed of all random data and ranges.
const SEED: u64 = 11;

/// Deadline for an event. It only bounds a failure.
const DEADLINE: Duration = Duration::from_secs(60);

/// Size in bytes of the disk that most tests use.
const DISK_LEN: u64 = 48 << 20;

/// Log message of the daemon once the kernel reads a disk through a view.
const BY_KERNEL: &str = "read by the kernel itself";

/// Returns true if the machine can run these tests.
fn ready() -> bool {
    need_fuse() && need_kernel_view()
}

/// Creates a sparse image and its raw original; returns both paths, the original first.
fn sparse(scratch: &Scratch) -> (PathBuf, PathBuf) {
    let (raw, vmdk) = (scratch.path("disk.orig"), scratch.path("disk.vmdk"));
    raw_with_islands(&raw, DISK_LEN, SEED);
    qemu_img([
        "convert",
        "-f",
        "raw",
        "-O",
        "vmdk",
        raw.to_str().unwrap(),
        vmdk.to_str().unwrap(),
    ]);
    (raw, vmdk)
}

/// Mounts with `kernel-view=required`; the mount is not ready before its disks have views.
fn mount_required(command: MountCmd<'_>) -> Mount {
    let mount = command
        .arg("kernel-view=required")
        .arg("-r")
        .arg("-v")
        .foreground()
        .start();
    assert!(mount.output().1.contains(BY_KERNEL), "{:?}", mount.output());
    mount
}

/// Opens a file for reading with `O_DIRECT`.
fn open_direct(path: &Path) -> io::Result<File> {
    OpenOptions::new().read(true).custom_flags(libc::O_DIRECT).open(path)
}

/// Returns the number of read system calls of the daemon: at least one for each FUSE request that it has received.
fn read_calls(mount: &Mount) -> u64 {
    let io = fs::read_to_string(format!("/proc/{}/io", mount.pid())).unwrap();
    io.lines()
        .find_map(|line| line.strip_prefix("syscr: "))
        .unwrap()
        .trim()
        .parse()
        .unwrap()
}

/// Returns true if the daemon serves the reads of the file, which has [`DISK_LEN`] bytes. Opens and reads it once.
fn is_served(mount: &Mount, path: &Path) -> bool {
    let before = read_calls(mount);
    assert_eq!(fs::read(path).unwrap().len() as u64, DISK_LEN);
    // A request is for at most 1 MiB, and the page cache of a node that was just opened is empty: a served disk needs
    // at least one request for each MiB.
    read_calls(mount) - before >= DISK_LEN >> 20
}

/// Reads a range of a file that is open with `O_DIRECT`; panics unless it holds the expected bytes.
#[track_caller]
fn compare_direct(file: &File, offset: u64, expected: &[u8]) {
    let mut buf = Aligned::new(expected.len());
    file.read_exact_at(buf.bytes(), offset).unwrap();
    assert!(
        buf.bytes() == expected,
        "{} bytes at {offset} with O_DIRECT",
        expected.len()
    );
}

/// "Every valid read-only sample and variant read through the view (as root) equals its SHA-256"
#[test]
fn valid_variants_match_their_model_through_the_view() {
    if !ready() {
        return;
    }
    let scratch = Scratch::new();
    let through = AtomicUsize::new(0);
    let name = |v: &Variant| format!("{} ({})", v.name, v.note);
    each(valid(), name, |variant| {
        let made = variant.make(scratch.root(), SEED).unwrap();
        let mut command = scratch
            .mount()
            .at(format!("mnt-{}", variant.name))
            .file(&made.open)
            .arg("name=disk");
        scratch.mkdir(format!("mnt-{}", variant.name));
        for dir in &made.allow_dirs {
            command = command.arg(format!("allow-dir={}", dir.display()));
        }
        let mount = match command.arg("kernel-view=required").arg("-r").try_start() {
            Ok(mount) => mount,
            Err(outcome) => {
                // Compressed grains, a damaged table with a valid copy, a truncated file, or an index too large.
                let causes = ["not stored as they are read", "whole sectors", "view-size= allows"];
                assert!(causes.iter().any(|cause| outcome.stderr.contains(cause)), "{outcome}");
                outcome.one_error(1, &["disk: kernel-view=required"]);
                return;
            }
        };
        let path = mount.file("disk");
        // The buffered open reads through the view, the direct one through the served node.
        let (view, served) = (File::open(&path).unwrap(), open_direct(&path).unwrap());
        let size = made.disk.sectors() * SECTOR;
        let mut ranges = made.disk.random_ranges(SEED, 60, 1 << 16);
        if made.is_hashable() {
            ranges.extend((0..size).step_by(1 << 20).map(|at| at..size.min(at + (1 << 20))));
        }
        ranges.extend(made.probes.iter().cloned());
        for range in ranges {
            let expected = made.disk.read_bytes(&range);
            let mut seen = vec![0; expected.len()];
            view.read_exact_at(&mut seen, range.start)
                .unwrap_or_else(|e| panic!("{range:?}: {e}"));
            assert!(seen == expected, "{range:?} through the view");
            let (start, end) = (
                range.start / SECTOR * SECTOR,
                range.end.next_multiple_of(SECTOR).min(size),
            );
            compare_direct(&served, start, &made.disk.read_bytes(&(start..end)));
        }
        through.fetch_add(1, Ordering::Relaxed);
        drop((view, served));
        mount.unmount();
    });
    let through = through.into_inner();
    assert!(through >= 20, "the kernel read only {through} variants");
}

/// Environment variable of a child process of the next test. Its lines: number, path of the raw file, original.
const CHILD: &str = "VMDKFUSE_TEST_MIXED";

/// "through both nodes at once under mixed opens (two hundred random opens, O_DIRECT or not, mmap, from four processes,
/// no error)"
#[test]
fn mixed_opens_from_four_processes_all_read_right() {
    if let Ok(task) = std::env::var(CHILD) {
        return mixed_opens(&task);
    }
    if !ready() || !need_qemu() {
        return;
    }
    let scratch = Scratch::new();
    let (raw, _) = sparse(&scratch);
    // The view is not required, so it is built during the test: the name moves from the served node to the view node
    // while the children read.
    let mount = scratch.mount().file("disk.vmdk").arg("-r").start();
    let path = mount.file("disk.raw");
    let test = "kernel_view::mixed_opens_from_four_processes_all_read_right";
    let child = |number: u64| {
        let task = format!("{number}\n{}\n{}", path.display(), raw.display());
        let mut command = Command::new(std::env::current_exe().unwrap());
        command
            .args(["--exact", test, "--nocapture"])
            .env(CHILD, task)
            .spawn()
            .unwrap()
    };
    let children: Vec<_> = (0..4).map(child).collect();
    let failed = children
        .into_iter()
        .map(|mut c| c.wait().unwrap())
        .filter(|status| !status.success())
        .count();
    assert_eq!(failed, 0, "child processes read wrong bytes or failed");
    mount.unmount();
}

/// Runs one child process: fifty opens, of which up to six are open at a time, each compared at random ranges.
fn mixed_opens(task: &str) {
    let mut lines = task.lines();
    let mut next = || lines.next().unwrap();
    let (number, path, raw) = (
        next().parse::<u64>().unwrap(),
        PathBuf::from(next()),
        PathBuf::from(next()),
    );
    let expected = fs::read(raw).unwrap();
    let mut rng = SmallRng::seed_from_u64(SEED + number);
    let mut open: Vec<(File, bool)> = Vec::new();
    for round in 0..50 {
        let direct = rng.random_bool(0.4);
        let file = if direct { open_direct(&path) } else { File::open(&path) };
        open.push((
            file.unwrap_or_else(|e| panic!("open {round}, direct: {direct}: {e}")),
            direct,
        ));
        if rng.random_bool(0.1) {
            assert!(map_bytes(&path) == expected, "mapping {round}");
        }
        for _ in 0..4 {
            let (file, direct) = open.choose(&mut rng).unwrap();
            let offset = rng.random_range(0..DISK_LEN / 4096 - 64) * 4096;
            let range = offset as usize..offset as usize + 4096 * rng.random_range(1..64);
            if *direct {
                compare_direct(file, offset, &expected[range]);
            } else {
                let mut seen = vec![0; range.len()];
                file.read_exact_at(&mut seen, offset).unwrap();
                assert!(seen == expected[range.clone()], "{range:?}");
            }
        }
        if open.len() > 5 {
            open.swap_remove(rng.random_range(0..open.len()));
        }
    }
}

#[test]
fn the_name_returns_to_the_view_after_the_last_direct_open() {
    if !ready() || !need_qemu() {
        return;
    }
    let scratch = Scratch::new();
    let (raw, _) = sparse(&scratch);
    let mount = mount_required(scratch.mount().file("disk.vmdk"));
    let path = mount.file("disk.raw");
    assert!(!is_served(&mount, &path), "the daemon serves the first open");
    let number = fs::metadata(&path).unwrap().ino();
    let view = File::open(&path).unwrap();
    let direct = open_direct(&path).unwrap();
    for file in [&view, &direct] {
        assert_eq!(
            file.metadata().unwrap().ino(),
            number,
            "the two nodes of a disk have different inode numbers"
        );
    }
    assert_eq!(fs::metadata(&path).unwrap().ino(), number);
    let listed = fs::read_dir(mount.point())
        .unwrap()
        .map(|entry| entry.unwrap().ino())
        .collect::<Vec<_>>();
    assert_eq!(listed, [number]);
    assert!(
        is_served(&mount, &path),
        "the name is the view node although a direct open exists"
    );
    compare_direct(&direct, 8192, &read_range(&raw, 8192, 65536));
    assert_same(&path, &raw);
    drop(direct);
    assert!(
        poll_until(DEADLINE, || !is_served(&mount, &path)),
        "the name did not return to the view"
    );
    assert_same(&path, &raw);
    drop(view);
    mount.unmount();
}

/// "the mount is ready at once while the index is built behind it"
#[test]
fn a_mount_moves_to_the_view_on_its_own() {
    if !ready() || !need_qemu() {
        return;
    }
    let scratch = Scratch::new();
    let (raw, _) = sparse(&scratch);
    let mount = scratch
        .mount()
        .file("disk.vmdk")
        .arg("-r")
        .arg("-v")
        .foreground()
        .start();
    let path = mount.file("disk.raw");
    let early = File::open(&path).unwrap();
    assert!(
        poll_until(DEADLINE, || mount.output().1.contains(BY_KERNEL)),
        "{:?}",
        mount.output()
    );
    assert!(!is_served(&mount, &path));
    for file in [early, File::open(&path).unwrap()] {
        let mut seen = vec![0; DISK_LEN as usize];
        file.read_exact_at(&mut seen, 0).unwrap();
        assert!(seen == fs::read(&raw).unwrap());
    }
    assert_same_at_random(&path, &raw, SEED, 200);
    assert!(map_bytes(&path) == fs::read(&raw).unwrap());
    mount.unmount();
}

/// "a changed image drops the view and says so"
#[test]
fn a_changed_image_is_served_again_with_its_new_bytes() {
    if !ready() || !need_qemu() {
        return;
    }
    let scratch = Scratch::new();
    let (raw, vmdk) = sparse(&scratch);
    let mount = mount_required(scratch.mount().file("disk.vmdk"));
    let path = mount.file("disk.raw");
    assert!(!is_served(&mount, &path));
    let old = File::open(&path).unwrap();
    // Locate the first sector of the disk in the image by its bytes.
    let (mut bytes, first) = (fs::read(&vmdk).unwrap(), read_range(&raw, 0, 512));
    let at = bytes.windows(512).position(|sector| sector == first).unwrap();
    bytes[at..at + 512].fill(0x5a);
    File::options()
        .write(true)
        .open(&vmdk)
        .unwrap()
        .write_all_at(&bytes[at..at + 512], at as u64)
        .unwrap();
    assert_eq!(read_range(&path, 0, 512), [0x5a; 512]);
    assert!(
        mount.output().1.contains("the kernel view is dropped"),
        "{:?}",
        mount.output()
    );
    assert!(is_served(&mount, &path));
    let mut rest = vec![0; DISK_LEN as usize - 4096];
    old.read_exact_at(&mut rest, 4096).unwrap();
    assert!(
        rest == fs::read(&raw).unwrap()[4096..],
        "an open from before the change reads wrong bytes"
    );
    compare_direct(&open_direct(&path).unwrap(), 0, &[0x5a; 512]);
    drop(old);
    mount.unmount();

    // A new mtime alone counts as a change.
    let mount = mount_required(scratch.mount().file("disk.vmdk"));
    File::options()
        .write(true)
        .open(&vmdk)
        .unwrap()
        .set_modified(SystemTime::UNIX_EPOCH)
        .unwrap();
    assert!(is_served(&mount, &mount.file("disk.raw")));
    mount.unmount();
}

/// A bind mount pins one node of the disk: its opens cannot be redirected to the other node.
#[test]
fn opens_through_a_bind_mount_are_correct_or_refused() {
    if !ready() || !need_qemu() || !need("mount") {
        return;
    }
    let scratch = Scratch::new();
    let (raw, _) = sparse(&scratch);
    let mount = mount_required(scratch.mount().file("disk.vmdk"));
    let bound = scratch.write("bound", "");
    Cmd::new("mount")
        .arg("--bind")
        .arg(mount.file("disk.raw"))
        .arg(&bound)
        .run()
        .ok();
    assert_same(&bound, &raw);
    // The daemon refuses the open until it has received RELEASE of the buffered one: the kernel sends that after close(2).
    let mut direct = None;
    assert!(poll_until(DEADLINE, || {
        direct = open_direct(&bound).ok();
        direct.is_some()
    }));
    let direct = direct.unwrap();
    compare_direct(&direct, 4096, &read_range(&raw, 4096, 8192));
    drop(direct);
    let buffered = File::open(&bound).unwrap();
    assert_eq!(
        open_direct(&bound).unwrap_err().raw_os_error(),
        Some(libc::EINVAL),
        "expected EINVAL, as from a file system without O_DIRECT"
    );
    compare_direct(
        &open_direct(&mount.file("disk.raw")).unwrap(),
        0,
        &read_range(&raw, 0, 4096),
    );
    drop(buffered);
    umount(&bound);
    mount.unmount();
}

/// "kill -9 of the daemon while the view is read leaves no mount, loop device or file"
#[test]
fn a_killed_daemon_leaves_nothing_behind() {
    if !ready() || !need_qemu() || !need("losetup") {
        return;
    }
    let scratch = Scratch::new();
    let (raw, _) = sparse(&scratch);
    // Services of this machine may have such mounts of their own.
    let views = || {
        let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap();
        let is_view = |line: &&str| line.contains(" - erofs ") || line.contains(" - ramfs ");
        mounts.lines().filter(is_view).map(str::to_owned).collect::<Vec<_>>()
    };
    let before = views();
    for dir in [None, Some(scratch.mkdir("index"))] {
        let mut command = scratch.mount().file("disk.vmdk").arg("-o").arg("auto_unmount");
        if let Some(dir) = &dir {
            command = command.arg(format!("view-dir={}", dir.display()));
        }
        let mount = mount_required(command);
        let file = File::open(mount.file("disk.raw")).unwrap();
        let mut half = vec![0; DISK_LEN as usize / 2];
        file.read_exact_at(&mut half, 0).unwrap();
        mount.signal(Signal::SIGKILL);
        mount.wait_unmounted();
        // The kernel still reads the open file through the view.
        file.read_exact_at(&mut half, DISK_LEN / 2).unwrap();
        assert!(half == fs::read(&raw).unwrap()[DISK_LEN as usize / 2..]);
        drop(file);
        assert_eq!(views(), before);
        let loops = Cmd::new("losetup").arg("-a").run().ok().stdout;
        assert!(!loops.contains(scratch.root().to_str().unwrap()), "{loops}");
        if let Some(dir) = dir {
            assert_eq!(fs::read_dir(dir).unwrap().count(), 0);
        }
        drop(mount);
    }
}

/// "unprivileged and kernel-view=off runs take the served path"
#[test]
fn without_root_or_with_off_the_disk_is_served() {
    if !ready() || !need_qemu() {
        return;
    }
    let scratch = Scratch::new();
    let (raw, vmdk) = sparse(&scratch);
    let flat = scratch.path("flat.vmdk");
    let arguments = ["convert", "-f", "raw", "-O", "vmdk", "-o", "subformat=monolithicFlat"];
    qemu_img(
        arguments
            .into_iter()
            .chain([raw.to_str().unwrap(), flat.to_str().unwrap()]),
    );
    for image in ["disk.vmdk", "flat.vmdk"] {
        let mount = scratch
            .mount()
            .file(image)
            .arg("kernel-view=off")
            .arg("-r")
            .foreground()
            .start();
        let path = mount.file(image.replace("vmdk", "raw"));
        assert!(is_served(&mount, &path), "{image}");
        assert_same(&path, &raw);
        mount.unmount();
    }
    let nobody = Scratch::of(NOBODY);
    fs::copy(&vmdk, nobody.path("disk.vmdk")).unwrap();
    nobody.open_to_all();
    nobody.give(Path::new("disk.vmdk"));
    let mount = nobody
        .mount()
        .file("disk.vmdk")
        .arg("-r")
        .arg("-v")
        .foreground()
        .start();
    let hash = Cmd::new("sha256sum")
        .arg(mount.file("disk.raw"))
        .user(Some(NOBODY))
        .run()
        .ok()
        .stdout;
    assert!(hash.starts_with(&sha256(&raw)), "{hash}");
    let logged = || mount.output().1.contains("no kernel view: FUSE passthrough needs root");
    assert!(poll_until(DEADLINE, logged), "{:?}", mount.output());
    mount.unmount();
    let refused = nobody
        .mount()
        .file("disk.vmdk")
        .arg("-r")
        .arg("kernel-view=required")
        .refused(1);
    refused.one_error(1, &["disk.raw: kernel-view=required", "needs root"]);
}

#[test]
fn required_is_an_error_if_the_kernel_cannot_read_the_disk() {
    if !ready() || !need_qemu() {
        return;
    }
    let scratch = Scratch::new();
    let (raw, _) = sparse(&scratch);
    let stream = scratch.path("stream.vmdk");
    let arguments = ["convert", "-f", "raw", "-O", "vmdk", "-o", "subformat=streamOptimized"];
    qemu_img(
        arguments
            .into_iter()
            .chain([raw.to_str().unwrap(), stream.to_str().unwrap()]),
    );
    scratch.write("covered", "");
    let with_view = |image: &str| scratch.mount().file(image).arg("-r").arg("kernel-view=required");
    for (command, word) in [
        (with_view("stream.vmdk"), "not stored as they are read"),
        (with_view("disk.vmdk").arg("view-size=4K"), "view-size= allows 4 KiB"),
        (with_view("disk.vmdk").arg("view-dir=/dev/shm"), "/dev/shm"),
        (with_view("disk.vmdk").arg("cache=none"), "cache=none"),
        (with_view("disk.vmdk").at("covered"), "mount on a directory"),
        (
            scratch.mount().file("disk.vmdk").arg("kernel-view=required"),
            "read-only (-r)",
        ),
    ] {
        command.refused(1).one_error(1, &["kernel-view=required", word]);
    }
    // A single flat file needs no view: the kernel reads it by passthrough.
    let mount = scratch
        .mount()
        .file("disk.orig")
        .arg("format=raw")
        .arg("name=flat")
        .arg("-r")
        .arg("kernel-view=required")
        .start();
    assert!(!is_served(&mount, &mount.file("flat")));
    mount.unmount();
    // Without `mount_required`, a mount over a file is served by the daemon.
    let mount = scratch.mount().at("covered").file("disk.vmdk").arg("-r").start();
    assert_same(mount.point(), &raw);
    mount.unmount();
}

/// "`--info` and the log tell which way a disk is read"
#[test]
fn info_reports_the_reader_of_a_disk() {
    if !ready() || !need_qemu() {
        return;
    }
    let scratch = Scratch::new();
    let (raw, _) = sparse(&scratch);
    let read_by = |arguments: &[&str]| {
        let json = scratch
            .vmdkfuse()
            .args(["--info", "--json"])
            .args(arguments)
            .run()
            .ok()
            .json();
        json[0]["read_by"].as_str().unwrap().to_owned()
    };
    assert!(read_by(&["disk.vmdk", "readonly=true"]).starts_with("the kernel itself, by an index"));
    assert!(read_by(&["disk.vmdk"]).starts_with("this program; read-only (-r), the kernel"));
    assert!(read_by(&["disk.vmdk", "kernel-view=off"]).ends_with("kernel-view=off"));
    assert!(read_by(&[raw.to_str().unwrap(), "format=raw"]).contains("FUSE passthrough"));
    let text = scratch.vmdkfuse().args(["--info", "disk.vmdk"]).run().ok().stdout;
    assert!(text.contains("\n  read by   this program"), "{text}");
}

#[test]
fn several_disks_of_a_mount_share_the_view_size() {
    if !ready() || !need_qemu() {
        return;
    }
    let scratch = Scratch::new();
    let (raw, vmdk) = sparse(&scratch);
    fs::copy(&vmdk, scratch.path("two.vmdk")).unwrap();
    // An index takes 8 KiB for the 768 chunks of a disk, and less than 8 KiB besides: 24 KiB are enough for one only.
    let command = scratch
        .mount()
        .arg("view-size=24K")
        .file("disk.vmdk")
        .file("two.vmdk")
        .arg("-r")
        .arg("-v")
        .foreground();
    let mount = command.start();
    let decided = || {
        mount
            .output()
            .1
            .lines()
            .filter(|l| l.contains(BY_KERNEL) || l.contains("no kernel view"))
            .count()
    };
    assert!(poll_until(DEADLINE, || decided() == 2), "{:?}", mount.output());
    assert!(
        mount.output().1.contains("disk.raw: read by the kernel itself"),
        "{:?}",
        mount.output()
    );
    assert!(
        mount.output().1.contains("two.raw: no kernel view"),
        "{:?}",
        mount.output()
    );
    for name in ["disk.raw", "two.raw"] {
        assert_same(&mount.file(name), &raw);
    }
    mount.unmount();
}

/// "qemu with cache=none and guestfish beside a running cp"
#[test]
fn qemu_without_cache_and_guestfish_read_beside_a_copy() {
    if !ready() || !need_qemu() || !need("guestfish") || !need("mkfs.ext4") {
        return;
    }
    let scratch = Scratch::new();
    let (raw, vmdk) = (scratch.path("guest.orig"), scratch.path("guest.vmdk"));
    let tree = scratch.mkdir("tree");
    fs::write(tree.join("greeting"), "Hello from inside of the disk.\n").unwrap();
    Cmd::new("mkfs.ext4")
        .args(["-q", "-F", "-d"])
        .arg(&tree)
        .arg(&raw)
        .arg("64M")
        .run()
        .ok();
    qemu_img([
        "convert",
        "-f",
        "raw",
        "-O",
        "vmdk",
        raw.to_str().unwrap(),
        vmdk.to_str().unwrap(),
    ]);
    let mount = mount_required(scratch.mount().file("guest.vmdk"));
    let disk = mount.file("guest.raw");
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let copies = scope.spawn(|| {
            let mut copies = 0;
            while !stop.load(Ordering::Relaxed) || copies == 0 {
                Cmd::new("cp").arg(&disk).arg(scratch.path("copy")).run().ok();
                assert_same(&scratch.path("copy"), &raw);
                copies += 1;
            }
        });
        let arguments = [
            "compare",
            "-T",
            "none",
            "-f",
            "raw",
            "-F",
            "raw",
            disk.to_str().unwrap(),
            raw.to_str().unwrap(),
        ];
        for _ in 0..5 {
            qemu_img(arguments);
        }
        let fish = Cmd::new("guestfish").args(["--ro", "--format=raw", "-a"]).arg(&disk);
        let fish = fish
            .env("LIBGUESTFS_BACKEND", "direct")
            .env("LIBGUESTFS_BACKEND_SETTINGS", "force_tcg");
        let arguments = ["run", ":", "mount-ro", "/dev/sda", "/", ":", "cat", "/greeting"];
        let seen = fish.args(arguments).deadline(GUEST_DEADLINE).run();
        stop.store(true, Ordering::Relaxed);
        copies.join().unwrap();
        assert!(seen.ok().stdout.contains("Hello from inside of the disk."));
    });
    mount.unmount();
}

#[test]
fn a_chain_of_deltas_is_one_view() {
    if !ready() || !need_qemu() {
        return;
    }
    let scratch = Scratch::new();
    let (raw, vmdk) = sparse(&scratch);
    // qemu-img creates the deltas; qemu-io writes the same data into each delta and into the raw original.
    let mut parent = vmdk;
    for number in 1..=3u64 {
        let delta = scratch.path(format!("delta{number}.vmdk"));
        let backing = parent.to_str().unwrap();
        qemu_img([
            "create",
            "-f",
            "vmdk",
            "-F",
            "vmdk",
            "-b",
            backing,
            delta.to_str().unwrap(),
        ]);
        for (path, format) in [(&delta, "vmdk"), (&raw, "raw")] {
            for write in 0..6u64 {
                let at = (number * 7 + write * 13) % 47 * (1 << 20) + number * 4096;
                let command = format!(
                    "write -P {} {at} {}",
                    16 * number + write,
                    512 * (number + 40 * write + 1)
                );
                Cmd::new("qemu-io")
                    .args(["-f", format, "-c", &command])
                    .arg(path)
                    .run()
                    .ok();
            }
        }
        parent = delta;
    }
    let mount = mount_required(scratch.mount().file(&parent).arg("name=disk"));
    let path = mount.file("disk");
    assert!(!is_served(&mount, &path));
    assert_same(&path, &raw);
    let direct = open_direct(&path).unwrap();
    for at in (0..DISK_LEN).step_by(1 << 20) {
        compare_direct(&direct, at, &read_range(&raw, at, 1 << 20));
    }
    assert_eq!(digest_range(&path, 0, DISK_LEN), sha256(&raw));
    drop(direct);
    mount.unmount();
}
