//! Ends of a mount: every orderly end keeps the written data, and an error of a late write is reported.

use std::fs::{self, OpenOptions};
use std::io::Write;
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;
use std::time::Duration;

use fuse_tests::harness::{Cmd, Mapped, Scratch, need, need_root, poll_until, unmount};
use nix::errno::Errno;
use nix::libc;
use nix::sys::signal::Signal;

use crate::writing::kinds::{self, Disk, for_each_kind};
use crate::writing::open;

/// "unmount with dirty pages"
#[test]
fn an_unmount_keeps_dirty_pages() {
    for_each_kind(|mut disk| {
        let mount = disk.mount();
        let file = open(&mount.file("disk"));
        let mut mapped = Mapped::new(&file);
        for (n, byte) in mapped.bytes().iter_mut().enumerate().step_by(5000) {
            *byte = n as u8;
        }
        file.write_all_at(&[9; 70_000], 1_000_001).unwrap();
        drop((mapped, file));
        mount.unmount();
        (0..disk.bytes.len())
            .step_by(5000)
            .for_each(|n| disk.bytes[n] = n as u8);
        disk.bytes[1_000_001..][..70_000].fill(9);
        disk.check();
    });
}

/// A detached mount is served until the last close, and data that is written until then is kept.
#[test]
fn a_signal_under_load_loses_nothing_that_was_written() {
    for_each_kind(|mut disk| {
        let log = disk.scratch.path("log");
        let mut mount = disk.mount_with(&["-v", "--log-file", log.to_str().unwrap()]);
        let file = open(&mount.file("disk"));
        let written = AtomicU64::new(0);
        // Every write has another sector, spread over the whole disk.
        let offset_of = |n: u64| (n * 7919 * 512) % (kinds::SIZE / 512 * 512);
        thread::scope(|scope| {
            let load = scope.spawn(|| {
                // The signal arrives during these writes; the mount is busy, so all of them are served.
                for n in 0..3000u64 {
                    file.write_all_at(&[n as u8; 512], offset_of(n)).unwrap();
                    written.store(n + 1, Ordering::Relaxed);
                }
                file.sync_all().unwrap();
            });
            assert!(poll_until(Duration::from_secs(60), || written.load(Ordering::Relaxed) >= 500));
            mount.signal(Signal::SIGTERM);
            mount.wait_unmounted();
            load.join().unwrap();
        });
        assert!(mount.is_running(), "the daemon ended although the file is still open");
        file.write_all_at(&[0xaa; 512], 512).unwrap();
        drop(file);
        assert_eq!(mount.wait_end().code, Some(0), "{}", fs::read_to_string(log).unwrap());
        for n in 0..3000 {
            disk.bytes[offset_of(n) as usize..][..512].fill(n as u8);
        }
        disk.bytes[512..1024].fill(0xaa);
        disk.check();
    });
}

/// "the second signal still flushes": the daemon does not wait for the last close, but keeps the data it has received.
#[test]
fn a_second_signal_ends_the_daemon_and_keeps_written_data() {
    for_each_kind(|mut disk| {
        let mut mount = disk.mount();
        let file = open(&mount.file("disk"));
        file.write_all_at(&[5; 300_000], 4096).unwrap();
        // Data in the page cache that the kernel has not sent yet would be lost with the mount.
        file.sync_all().unwrap();
        mount.signal(Signal::SIGTERM);
        mount.wait_unmounted();
        mount.signal(Signal::SIGTERM);
        assert_eq!(mount.wait_end().code, Some(1));
        drop(file);
        wait_unlocked(&disk);
        disk.bytes[4096..][..300_000].fill(5);
        disk.check();
    });
}

/// Waits until no lock of a daemon that has ended is left: the kernel releases the locks of a killed process, and those of a
/// file that it served by passthrough, a moment after the process's end is reported.
fn wait_unlocked(disk: &Disk) {
    let is_unlocked = || {
        let info = disk.scratch.vmdkfuse().arg("--info").key("file", disk.image()).run();
        info.ended.code == Some(0)
    };
    assert!(poll_until(Duration::from_secs(60), is_unlocked), "still locked");
}

/// "fsync/FUSE_FLUSH/O_SYNC/unmount mean durable in the image": a killed daemon loses no data that was
/// written before a close or an fsync.
#[test]
fn closed_or_synced_data_survives_a_killed_daemon() {
    for_each_kind(|mut disk| {
        let mut mount = disk.mount();
        let path = mount.file("disk");
        OpenOptions::new()
            .write(true)
            .open(&path)
            .unwrap()
            .write_all_at(&[1; 100_000], 1)
            .unwrap();
        disk.bytes[1..100_001].fill(1);
        let file = open(&path);
        file.write_all_at(&[2; 100_000], 2_000_000).unwrap();
        file.sync_data().unwrap();
        disk.bytes[2_000_000..2_100_000].fill(2);
        let sync = OpenOptions::new().write(true).open(&path).unwrap();
        drop(sync);
        let mut mapped = Mapped::new(&file);
        mapped.bytes()[5_000_000..5_000_100].fill(3);
        mapped.sync().unwrap();
        disk.bytes[5_000_000..5_000_100].fill(3);
        mount.signal(Signal::SIGKILL);
        assert_eq!(mount.wait_end().signal, Some(libc::SIGKILL));
        drop((mapped, file));
        drop(mount);
        wait_unlocked(&disk);
        // A writable open recovers the image, which was not closed.
        disk.mount().unmount();
        disk.check();
    });
}

/// Creates a sparse raw image that is larger than its file system, and mounts it with these arguments.
///
/// The file system has 8 MiB, of which the file `ballast` takes 4 MiB.
fn on_a_small_file_system(arguments: &[&str]) -> (Scratch, fuse_tests::harness::Mount) {
    let scratch = Scratch::new();
    scratch.mkdir("small");
    Cmd::new("mount")
        .args(["-t", "tmpfs", "-o", "size=8m", "tmpfs"])
        .arg(scratch.path("small"))
        .run()
        .ok();
    let image = scratch.write("small/disk.img", "");
    fs::OpenOptions::new()
        .write(true)
        .open(image)
        .unwrap()
        .set_len(32 << 20)
        .unwrap();
    scratch.write("small/ballast", vec![1; 4 << 20]);
    let start = scratch.mount().file("small/disk.img").arg("name=disk");
    let mount = arguments.iter().fold(start, |start, word| start.arg(word)).start();
    (scratch, mount)
}

/// "Disk full of the host: ENOSPC to the writer, … later writes work again after space is freed"
#[test]
fn a_full_host_is_enospc_until_space_is_freed() {
    if !kinds::ready() || !need_root() {
        return;
    }
    for arguments in [&[] as &[&str], &["cache=none"]] {
        let (scratch, mount) = on_a_small_file_system(arguments);
        let mut file = OpenOptions::new().write(true).open(mount.file("disk")).unwrap();
        let mut written = 0;
        let refused = loop {
            match file.write(&[7; 65536]) {
                Ok(n) => written += n,
                Err(e) => break e,
            }
        };
        assert_eq!(refused.raw_os_error(), Some(libc::ENOSPC), "{refused}");
        assert!(
            (1 << 20..5 << 20).contains(&written),
            "{written} bytes were written before ENOSPC"
        );
        fs::remove_file(scratch.path("small/ballast")).unwrap();
        file.write_all(&[8; 65536]).unwrap();
        file.sync_all().unwrap();
        drop(file);
        mount.unmount();
        let bytes = fs::read(scratch.path("small/disk.img")).unwrap();
        assert!(bytes[..written].iter().all(|&b| b == 7) && bytes[written..written + 65536].iter().all(|&b| b == 8));
        assert!(bytes[written + 65536..].iter().all(|&b| b == 0));
    }
}

/// "An image that was deleted or replaced while it is mounted: the next fsync and close say so"
#[test]
fn fsync_says_that_the_image_was_deleted_or_replaced() {
    if !kinds::ready() {
        return;
    }
    for kind in ["monolithic-sparse", "split-sparse", "monolithic-flat"] {
        for (what, hard_link) in [
            ("deleted", false),
            ("replaced", false),
            ("replaced", true),
            ("renamed", false),
        ] {
            let scratch = Scratch::new();
            let log = scratch.path("log");
            for name in ["x.vmdk", "new.vmdk"] {
                let kind = format!("create-type={kind}");
                scratch
                    .vmdkfuse()
                    .args(["--create", name, "create-size=4M", &kind])
                    .run()
                    .ok();
            }
            let file = match kind {
                "monolithic-sparse" => "x.vmdk",
                "split-sparse" => "x-s001.vmdk",
                _ => "x-flat.vmdk",
            };
            let (path, other) = (scratch.path(file), scratch.path(file.replace('x', "new")));
            let mount = scratch.mount().file("x.vmdk").arg("--log-file").arg(&log).start();
            if hard_link {
                fs::hard_link(&path, scratch.path("link")).unwrap();
            }
            match what {
                "deleted" => fs::remove_file(&path).unwrap(),
                "replaced" => fs::rename(&other, &path).unwrap(),
                _ => fs::rename(&path, scratch.path("moved")).unwrap(),
            }
            let file = OpenOptions::new().write(true).open(mount.file("x.raw")).unwrap();
            file.write_all_at(&[5; 4096], 0).unwrap();
            let synced = file.sync_all();
            // The data of a file that was only renamed are there.
            assert_eq!(synced.is_ok(), what == "renamed", "{kind} {what}: {synced:?}");
            if what == "renamed" {
                continue;
            }
            // The log comes after the answer.
            let said = || fs::read_to_string(&log).unwrap_or_default();
            let logged = poll_until(Duration::from_secs(60), || said().contains("deleted or replaced"));
            assert!(logged, "{kind} {what}: {}", said());
        }
    }
}

/// "fallocate takes the room: ENOSPC where there is none, and writes to what it took do not fail for lack of room"
#[test]
fn fallocate_takes_room_or_is_enospc() {
    if !kinds::ready() || !need_root() {
        return;
    }
    let (scratch, raw) = on_a_small_file_system(&[]);
    scratch
        .vmdkfuse()
        .args(["--create", "small/sparse.vmdk", "create-size=32M"])
        .run()
        .ok();
    scratch.mkdir("sparse");
    let sparse = scratch
        .mount()
        .at("sparse")
        .file("small/sparse.vmdk")
        .arg("name=disk")
        .start();
    for mount in [&raw, &sparse] {
        let disk = mount.file("disk");
        let allocate = |len: &str| Cmd::new("fallocate").args(["-l", len]).arg(&disk).run();
        allocate("32M").error_names(&["No space left"]);
        allocate("1M").ok();
        // All of the rest is taken by another file.
        let mut ballast = fs::File::create(scratch.path("small/rest")).unwrap();
        while ballast.write_all(&[1; 4096]).is_ok() {}
        let file = OpenOptions::new().write(true).open(&disk).unwrap();
        file.write_all_at(&[5; 1 << 20], 0).unwrap();
        file.sync_all().unwrap();
        drop(file);
        fs::remove_file(scratch.path("small/rest")).unwrap();
    }
    raw.unmount();
    sparse.unmount();
}

/// A limit of file sizes (`ulimit -f`) of the daemon is EFBIG for the writer: SIGXFSZ does not end the daemon.
#[test]
fn a_limit_of_file_sizes_is_efbig() {
    if !kinds::ready() || !need("prlimit") {
        return;
    }
    // A sparse image, which grows.
    let disk = kinds::Disk::new(kinds::KINDS[4]);
    let mount = disk.mount();
    let limit = fs::metadata(disk.image()).unwrap().len() + 65_536;
    let pid = mount.pid().to_string();
    let fsize = format!("--fsize={limit}:");
    Cmd::new("prlimit").args(["--pid", &pid, &fsize]).run().ok();
    let file = OpenOptions::new().write(true).open(mount.file("disk")).unwrap();
    let refused = file.write_all_at(&vec![7; kinds::SIZE as usize], 0).unwrap_err();
    assert_eq!(refused.raw_os_error(), Some(libc::EFBIG), "{refused}");
    Cmd::new("prlimit")
        .args(["--pid", &pid, "--fsize=unlimited:"])
        .run()
        .ok();
    let mut disk = disk;
    file.write_all_at(&vec![8; kinds::SIZE as usize], 0).unwrap();
    disk.bytes.fill(8);
    drop(file);
    mount.unmount();
    disk.check();
}

/// "errors of late writes must reach fsync/close"
#[test]
fn fsync_reports_an_error_of_a_late_write() {
    if !kinds::ready() || !need_root() {
        return;
    }
    let (_scratch, mount) = on_a_small_file_system(&["kernel-view=off"]);
    let file = open(&mount.file("disk"));
    let mut mapped = Mapped::new(&file);
    mapped.bytes()[..16 << 20].fill(7);
    assert!(matches!(mapped.sync(), Err(Errno::ENOSPC | Errno::EIO)));
    drop((mapped, file));
    mount.unmount();
}

/// "image deleted or truncated underneath"
#[test]
fn a_truncated_image_is_not_written_past_its_end() {
    if !kinds::ready() {
        return;
    }
    let disk = kinds::Disk::new(kinds::KINDS[1]);
    let mut mount = disk.mount();
    let file = open(&mount.file("disk"));
    OpenOptions::new()
        .write(true)
        .open(disk.image())
        .unwrap()
        .set_len(1 << 20)
        .unwrap();
    assert_eq!(
        file.write_at(&[1; 4096], 2 << 20).unwrap_err().raw_os_error(),
        Some(libc::EIO)
    );
    assert_eq!(fs::metadata(disk.image()).unwrap().len(), 1 << 20);
    // The write latch is set: nothing is reported as durable any more.
    assert_eq!(file.sync_all().unwrap_err().raw_os_error(), Some(libc::EIO));
    drop(file);
    unmount(mount.point());
    assert_eq!(mount.wait_end().code, Some(1));
}

/// A deleted image stays readable and writable while it is mounted, as any open file; but nothing of it is durable.
#[test]
fn a_deleted_image_is_served_until_the_unmount() {
    if !kinds::ready() {
        return;
    }
    let disk = kinds::Disk::new(kinds::KINDS[0]);
    let mut mount = disk.mount();
    fs::remove_file(disk.image()).unwrap();
    let file = open(&mount.file("disk"));
    file.write_all_at(&[1; 4096], 0).unwrap();
    assert_eq!(file.sync_all().unwrap_err().raw_os_error(), Some(libc::EIO));
    let mut seen = [0; 4096];
    file.read_exact_at(&mut seen, 0).unwrap();
    assert_eq!(seen, [1; 4096]);
    drop(file);
    unmount(mount.point());
    assert_eq!(mount.wait_end().code, Some(1), "the unmount says so too");
}
