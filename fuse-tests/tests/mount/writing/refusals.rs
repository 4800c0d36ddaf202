//! Refused operations: writes beyond the end, other sizes, other names, writes without permission.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt, PermissionsExt, symlink};

use fuse_tests::harness::{Cmd, NOBODY, Scratch, need_fuse, need_root, unmount};
use nix::errno::Errno;
use nix::fcntl::{FallocateFlags, fallocate};
use nix::libc;
use nix::unistd::truncate;

use crate::writing::kinds::{self, Disk, SIZE, for_each_kind};
use crate::writing::open;

/// Returns the errno of a failed call; panics if the call succeeded.
#[track_caller]
fn errno<T>(what: &str, result: io::Result<T>) -> i32 {
    match result {
        Ok(_) => panic!("{what} succeeded"),
        Err(e) => e.raw_os_error().unwrap_or_else(|| panic!("{what}: {e}")),
    }
}

/// "writing past it ENOSPC"; the part of a write before the end is written.
#[test]
fn writes_past_the_end_are_enospc() {
    for_each_kind(|mut disk| {
        let mount = disk.mount();
        let path = mount.file("disk");
        // A write-only open, as by cp, dd and a shell. With O_APPEND every write is past the end.
        let mut appending = OpenOptions::new().append(true).open(&path).unwrap();
        assert_eq!(errno("appending", appending.write(b"x")), libc::ENOSPC);
        let file = OpenOptions::new().write(true).open(&path).unwrap();
        assert_eq!(file.write_at(&[3; 1000], SIZE - 300).unwrap(), 300);
        disk.bytes[SIZE as usize - 300..].fill(3);
        assert_eq!(errno("writing at the end", file.write_at(b"x", SIZE)), libc::ENOSPC);
        assert_eq!(
            errno("writing far beyond the end", file.write_at(b"x", 1 << 50)),
            libc::ENOSPC
        );
        file.sync_all().unwrap();
        drop((appending, file));
        // For an open that can read, the kernel may handle the write on its own, without knowing the end of the disk.
        // The error is reported by fsync at the latest.
        let file = open(&path);
        let written = file.write_at(&[4; 1000], SIZE - 200);
        let synced = file.sync_all();
        match written {
            Ok(200) => synced.unwrap(),
            Ok(1000) => assert_eq!(errno("fsync after a write beyond the end", synced), libc::ENOSPC),
            other => panic!("{}: {other:?}", disk.kind.name),
        }
        disk.bytes[SIZE as usize - 200..].fill(4);
        drop(file);
        assert_eq!(fs::metadata(&path).unwrap().len(), SIZE);
        disk.holds(&path);
        mount.unmount();
        disk.check();
    });
}

/// "An error that no program has heard is reported by the fsync of each open for writing, once."
#[test]
fn regression_each_open_reports_what_was_lost_past_the_end() {
    for_each_kind(|disk| {
        let mount = disk.mount();
        let path = mount.file("disk");
        let opens = [open(&path), open(&path)];
        // The kernel accepts it where it writes to the image itself.
        if let Ok(1000) = opens[0].write_at(&[4; 1000], SIZE - 200) {
            for file in &opens {
                assert_eq!(errno("fsync", file.sync_all()), libc::ENOSPC, "{}", disk.kind.name);
            }
        }
        for file in &opens {
            file.sync_all().unwrap();
        }
        drop(opens);
        mount.unmount();
    });
}

/// "growing it EFBIG", and the operations that would move bytes are refused.
#[test]
fn the_size_is_fixed() {
    for_each_kind(|disk| {
        let mount = disk.mount();
        let path = mount.file("disk");
        let file = open(&path);
        for size in [SIZE + 1, 1 << 40] {
            assert_eq!(errno("ftruncate", file.set_len(size)), libc::EFBIG, "{size}");
            assert_eq!(truncate(&path, size as i64), Err(Errno::EFBIG), "{size}");
        }
        file.set_len(SIZE).unwrap();
        truncate(&path, SIZE as i64).unwrap();
        for (flags, at, len, expected) in [
            (FallocateFlags::empty(), 0, SIZE + 1, Errno::ENOSPC),
            (FallocateFlags::FALLOC_FL_KEEP_SIZE, SIZE, 4096, Errno::ENOSPC),
            (FallocateFlags::FALLOC_FL_ZERO_RANGE, SIZE - 512, 4096, Errno::ENOSPC),
            (FallocateFlags::FALLOC_FL_COLLAPSE_RANGE, 0, 4096, Errno::EOPNOTSUPP),
            (FallocateFlags::FALLOC_FL_INSERT_RANGE, 0, 4096, Errno::EOPNOTSUPP),
        ] {
            assert_eq!(
                fallocate(&file, flags, at as i64, len as i64),
                Err(expected),
                "{flags:?}"
            );
        }
        drop(file);
        assert_eq!(fs::metadata(&path).unwrap().len(), SIZE);
        disk.holds(&path);
        mount.unmount();
        disk.check();
    });
}

/// "creating, renaming or removing files EPERM (EROFS on a read-only mount)"
#[test]
fn names_are_fixed() {
    if !kinds::ready() {
        return;
    }
    let disk = Disk::new(kinds::KINDS[0]);
    for (arguments, expected) in [(&[] as &[&str], libc::EPERM), (&["readonly=true"], libc::EROFS)] {
        let mount = disk.mount_with(arguments);
        let (path, new) = (mount.file("disk"), mount.file("new"));
        assert_eq!(errno("create", File::create(&new)), expected);
        assert_eq!(errno("mkdir", fs::create_dir(&new)), expected);
        assert_eq!(errno("symlink", symlink("x", &new)), expected);
        assert_eq!(errno("link", fs::hard_link(&path, &new)), expected);
        assert_eq!(errno("rename", fs::rename(&path, &new)), expected);
        assert_eq!(errno("unlink", fs::remove_file(&path)), expected);
        assert_eq!(mount.names(), ["disk"]);
        mount.unmount();
    }
    disk.check();
}

/// Mounts an image in the foreground, calls `inspect` with the raw file, and unmounts; returns the standard error.
fn warnings_of_mount(scratch: &Scratch, image: &str, inspect: impl FnOnce(&std::path::Path)) -> String {
    let mut mount = scratch.mount().file(image).arg("name=disk").foreground().start();
    inspect(&mount.file("disk"));
    unmount(mount.point());
    assert_eq!(mount.wait_end().code, Some(0));
    let stderr = mount.output().1;
    let messages = stderr.lines().filter(|line| !line.contains("ready: "));
    messages.collect::<Vec<_>>().join("\n")
}

/// Panics unless the disk can be opened for reading and not for writing.
fn assert_read_only(disk: &std::path::Path) {
    assert_eq!(fs::metadata(disk).unwrap().mode() & 0o777, 0o444);
    File::open(disk).unwrap();
    for flags in [0, libc::O_TRUNC] {
        let open = OpenOptions::new().write(true).custom_flags(flags).open(disk);
        assert_eq!(errno("open for writing", open), libc::EROFS);
    }
}

/// "permission denied or read-only file system → opened read-only with one warning at mount that says why"
#[test]
fn an_image_on_a_read_only_file_system_is_read_only_with_one_warning() {
    if !kinds::ready() || !need_root() {
        return;
    }
    let disk = Disk::new(kinds::KINDS[0]);
    let scratch = Scratch::new();
    scratch.mkdir("ro");
    Cmd::new("mount")
        .arg("--bind")
        .arg(disk.scratch.root())
        .arg(scratch.path("ro"))
        .run()
        .ok();
    Cmd::new("mount")
        .args(["-o", "remount,bind,ro"])
        .arg(scratch.path("ro"))
        .run()
        .ok();
    let warning = warnings_of_mount(&scratch, "ro/disk.img", |disk| {
        assert_eq!(errno("create", File::create(disk.with_file_name("new"))), libc::EROFS);
        assert_read_only(disk);
    });
    assert_eq!(warning.lines().count(), 1, "{warning}");
    assert!(
        warning.contains("warning: disk: read-only") && warning.contains("Read-only file system"),
        "{warning}"
    );
    let info = scratch
        .vmdkfuse()
        .args(["--info", "--json"])
        .key("file", scratch.path("ro/disk.img"))
        .run()
        .ok()
        .json();
    assert_eq!(info[0]["writable"], false);
    assert!(
        info[0]["reason"].as_str().unwrap().contains("Read-only file system"),
        "{info}"
    );
}

#[test]
fn an_image_that_the_user_may_only_read_is_read_only_with_one_warning() {
    if !need_fuse() || !need_root() {
        return;
    }
    let scratch = Scratch::of(NOBODY);
    let image = scratch.write("disk.img", [1; 8192]);
    scratch.open_to_all();
    std::os::unix::fs::chown(&image, Some(0), Some(0)).unwrap();
    fs::set_permissions(&image, PermissionsExt::from_mode(0o444)).unwrap();
    // Without `allow_other` only the mounting user has access, not even root, so a command runs as that user.
    let warning = warnings_of_mount(&scratch, "disk.img", |disk| {
        let write = Cmd::new("dd")
            .args(["if=/dev/zero", "bs=512", "count=1", "conv=notrunc"])
            .key("of", disk);
        write.user(Some(NOBODY)).run().expect_read_only_error();
    });
    assert_eq!(warning.lines().count(), 1, "{warning}");
    assert!(
        warning.contains("warning: disk: read-only") && warning.contains("Permission denied"),
        "{warning}"
    );
    assert_eq!(fs::read(&image).unwrap(), [1; 8192]);
    let info = scratch
        .vmdkfuse()
        .args(["--info", "--json"])
        .key("file", &image)
        .run()
        .ok()
        .json();
    assert_eq!(info[0]["writable"], false);
}

/// Assertion about the output of dd.
trait DdOutcome {
    /// Panics unless dd failed because its output is on a read-only file system.
    fn expect_read_only_error(self);
}

impl DdOutcome for fuse_tests::harness::Outcome {
    #[track_caller]
    fn expect_read_only_error(self) {
        self.expect_code(1).error_names(&["read-only file system"]);
    }
}

/// "streamOptimized … are read-only: EROFS at open, and the message at mount says that `cow=` makes them writable"
#[test]
fn read_only_formats_give_a_warning() {
    if !kinds::ready() {
        return;
    }
    let disk = Disk::new(kinds::KINDS[0]);
    let arguments = [
        "convert",
        "-O",
        "vmdk",
        "-o",
        "subformat=streamOptimized",
        "disk.img",
        "stream.vmdk",
    ];
    Cmd::new("qemu-img").args(arguments).dir(disk.scratch.root()).run().ok();
    let warning = warnings_of_mount(&disk.scratch, "stream.vmdk", |seen| {
        assert_read_only(seen);
        // The image has a shared lock, as of any reader, so it can be mounted a second time.
        disk.scratch.mkdir("second");
        disk.scratch.mount().at("second").file("stream.vmdk").start().unmount();
    });
    assert_eq!(warning.lines().count(), 1, "{warning}");
    assert!(
        warning.contains("streamOptimized") && warning.contains("cow="),
        "{warning}"
    );
}

/// `--info` says "writable or why not, and must not lock for writing or change anything".
#[test]
fn info_reports_writability_without_a_change() {
    for_each_kind(|disk| {
        let before = fs::metadata(disk.image()).unwrap();
        let info = || {
            disk.scratch
                .vmdkfuse()
                .args(["--info", "--json"])
                .key("file", disk.image())
                .run()
                .ok()
                .json()
        };
        assert_eq!(info()[0]["writable"], true, "{}", disk.kind.name);
        let reader = disk.mount_with(&["readonly=true"]);
        assert_eq!(info()[0]["writable"], true, "beside a reader");
        reader.unmount();
        let after = fs::metadata(disk.image()).unwrap();
        assert_eq!(
            (before.mtime_nsec(), before.ctime_nsec()),
            (after.mtime_nsec(), after.ctime_nsec())
        );
        let read_only = disk
            .scratch
            .vmdkfuse()
            .args(["--info", "--json"])
            .key("file", disk.image())
            .arg("readonly=true");
        assert_eq!(read_only.run().ok().json()[0]["writable"], false);
    });
}

/// "two mounts of one image" where one writes
#[test]
fn a_second_mount_of_an_image_that_is_written_is_refused() {
    for_each_kind(|disk| {
        let name = disk.image().file_name().unwrap().to_string_lossy().into_owned();
        let second = |arguments: &[&str]| {
            disk.scratch.mkdir("second");
            arguments
                .iter()
                .fold(disk.scratch.mount().at("second").file(&name), |start, word| {
                    start.arg(word)
                })
        };
        let mount = disk.mount();
        for arguments in [&[] as &[&str], &["readonly=true"]] {
            second(arguments)
                .refused(1)
                .one_error(1, &[&name, "in use for writing"]);
        }
        mount.unmount();
        let reader = disk.mount_with(&["readonly=true"]);
        second(&[]).refused(1).one_error(1, &[&name, "in use"]);
        second(&["readonly=true"]).start().unmount();
        reader.unmount();
        disk.check();
    });
}
