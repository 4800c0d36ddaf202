//! What is read and written is what the server has.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::os::unix::fs::MetadataExt;
use std::process::Command;
use std::time::Duration;

use fuse_tests::harness::{Cmd, Scratch, assert_same, data_ranges, need, need_qemu, poll_until, read_range};
use nix::sys::signal::Signal;

use crate::{SOON, Server, free_port, noise, put, ready};

#[test]
fn what_is_written_through_the_mount_is_on_the_server_after_fsync() {
    if !ready() || !need("nbdcopy") {
        return;
    }
    let scratch = Scratch::new();
    let server = Server::nbdkit(&scratch, &["memory", "32M"]);
    let image = scratch.write("image", noise(32 << 20, 1));
    let mount = scratch.mount().arg(server.uri()).start();
    assert_eq!(mount.names(), ["disk.raw"]);
    put(&image, &mount.file("disk.raw"));
    let copy = scratch.path("copy");
    Cmd::new("nbdcopy").arg(server.uri()).arg(&copy).run().ok();
    assert_same(&copy, &image);
    assert_same(&mount.file("disk.raw"), &image);
    // parts of sectors, and both ends
    let file = File::options().write(true).open(mount.file("disk.raw")).unwrap();
    for (at, len) in [(0u64, 1usize), (511, 2), (1_000_003, 70_001), ((32 << 20) - 5, 5)] {
        let bytes = noise(len, at);
        file.write_all_at(&bytes, at).unwrap();
        File::options()
            .write(true)
            .open(&image)
            .unwrap()
            .write_all_at(&bytes, at)
            .unwrap();
    }
    file.sync_all().unwrap();
    drop(file);
    mount.unmount();
    Cmd::new("nbdcopy").arg(server.uri()).arg(&copy).run().ok();
    assert_same(&copy, &image);
}

#[test]
fn the_servers_own_verification_of_random_data_finds_no_error() {
    if !ready() {
        return;
    }
    let scratch = Scratch::new();
    // what is written to this plugin must be what it gave, or the write fails
    let server = Server::nbdkit(&scratch, &["sparse-random", "256M", "seed=7", "percent=30"]);
    let mount = scratch.mount().arg(server.uri()).start();
    let (disk, copy) = (mount.file("disk.raw"), scratch.path("copy"));
    Cmd::new("cp").arg("--sparse=always").args([&disk, &copy]).run().ok();
    put(&copy, &disk);
    let mut wrong = noise(4096, 3);
    wrong[0] = 1;
    let file = File::options().write(true).open(&disk).unwrap();
    let failed = file.write_all_at(&wrong, 0).and_then(|()| file.sync_all());
    assert!(failed.is_err(), "the plugin verifies nothing");
}

#[test]
fn a_copy_of_a_mostly_empty_export_moves_only_its_data() {
    if !ready() || !need_qemu() || !need("nbdcopy") {
        return;
    }
    let scratch = Scratch::new();
    let stats = scratch.path("stats");
    let stats_word = format!("statsfile={}", stats.display());
    let server = Server::nbdkit(&scratch, &["--filter=stats", "memory", "1T", &stats_word]);
    let mount = scratch.mount().arg(server.uri()).arg("cache=none").start();
    let disk = mount.file("disk.raw");
    let file = File::options().write(true).open(&disk).unwrap();
    let islands = [0u64, 5 << 30, (700 << 30) + 4096, (1 << 40) - (1 << 20)];
    for at in islands {
        file.write_all_at(&noise(1 << 20, at), at).unwrap();
    }
    file.sync_all().unwrap();
    drop(file);
    let found = data_ranges(&disk);
    assert!(
        found.iter().map(|r| r.end - r.start).sum::<u64>() < 8 << 20,
        "{found:?}"
    );
    let copy = scratch.path("copy");
    let words = ["convert", "-f", "raw", "-O", "raw"];
    Cmd::new("qemu-img")
        .args(words)
        .args([&disk, &copy])
        .deadline(Duration::from_secs(120))
        .run()
        .ok();
    for at in islands {
        assert_eq!(read_range(&copy, at, 1 << 20), noise(1 << 20, at), "{at}");
    }
    assert!(fs::metadata(&copy).unwrap().blocks() * 512 < 16 << 20);
    mount.unmount();
    server.signal(Signal::SIGTERM);
    let read = |text: &str| {
        // read: 26 ops, 0.001 s, 6.4 MiB, …
        text.lines().find(|l| l.starts_with("read:")).map(str::to_owned)
    };
    assert!(poll_until(SOON, || fs::read_to_string(&stats).is_ok_and(|t| read(&t).is_some())));
    let line = read(&fs::read_to_string(&stats).unwrap()).unwrap();
    let bytes = line.split(", ").nth(2).unwrap_or_default();
    assert!(bytes.ends_with(" MiB") || bytes.ends_with(" KiB"), "{line}");
}

#[test]
fn what_is_punched_out_of_an_export_is_no_longer_stored_by_its_server() {
    if !ready() {
        return;
    }
    let scratch = Scratch::new();
    let disk = scratch.write("disk", noise(16 << 20, 15));
    let server = Server::nbdkit(&scratch, &["file", &format!("file={}", disk.display())]);
    let mount = scratch.mount().arg(server.uri()).arg("cache=none").start();
    let seen = mount.file("disk.raw");
    let change = |how: &str, from: u64, len: u64| {
        let (from, len) = (format!("-o{from}"), format!("-l{len}"));
        Cmd::new("fallocate").args([how, &from, &len]).arg(&seen).run().ok();
    };
    assert_eq!(data_ranges(&seen).first(), Some(&(0..16 << 20)));
    change("--punch-hole", 4 << 20, 8 << 20);
    change("--zero-range", 1 << 20, 1 << 20);
    // parts of blocks of the file's own
    change("--punch-hole", 700, 9000);
    File::open(&seen).unwrap().sync_all().unwrap();
    let mut wanted = noise(16 << 20, 15);
    for range in [4 << 20..12 << 20, 1 << 20..2 << 20, 700..9700] {
        wanted[range].fill(0);
    }
    let wanted = scratch.write("wanted", wanted);
    assert_same(&seen, &wanted);
    assert_same(&disk, &wanted);
    for path in [&seen, &disk] {
        assert!(
            !data_ranges(path).iter().any(|r| r.start < 12 << 20 && r.end > 4 << 20),
            "{:?}",
            data_ranges(path)
        );
        // the mount counts in the background
        let stored = || fs::metadata(path).unwrap().blocks() * 512;
        assert!(
            poll_until(SOON, || (6 << 20..9 << 20).contains(&stored())),
            "{} bytes of {}",
            stored(),
            path.display()
        );
    }
}

#[test]
fn nbd_server_is_read_and_written() {
    if !ready() || !need("nbd-server") {
        return;
    }
    let scratch = Scratch::new();
    let disk = scratch.write("disk", noise(8 << 20, 4));
    let port = free_port();
    let config = format!(
        "[generic]\nlistenaddr = 127.0.0.1\nport = {port}\nallowlist = true\n[vm]\nexportname = {}\nflush = true\n\
         fua = true\ntrim = false\n",
        disk.display()
    );
    let config = scratch.write("config", config);
    let mut command = Command::new("nbd-server");
    command
        .arg("-d")
        .arg("-C")
        .arg(config)
        .env("PATH", "/usr/sbin:/sbin:/usr/bin:/bin");
    // it serves the first client only, so nobody else may look whether it is up
    let _server = Server::unseen(command);
    let start = scratch
        .mount()
        .arg("hostname=127.0.0.1")
        .arg(format!("port={port}"))
        .arg("export=vm");
    let mount = start.arg("retry=20").start();
    let seen = mount.file("vm.raw");
    assert_same(&seen, &disk);
    let data = scratch.write("data", noise(2 << 20, 6));
    put(&data, &seen);
    assert_eq!(read_range(&disk, 0, 2 << 20), fs::read(&data).unwrap());
}

#[test]
fn an_overlay_takes_the_writes_of_an_export() {
    if !ready() {
        return;
    }
    let scratch = Scratch::new();
    let server = Server::nbdkit(&scratch, &["-r", "pattern", "8M"]);
    let (data, cow) = (scratch.write("data", noise(1 << 20, 8)), scratch.path("cow.vmdk"));
    let start = || scratch.mount().arg(server.uri()).arg(format!("cow={}", cow.display()));
    let mount = start().start();
    put(&data, &mount.file("disk.raw"));
    mount.unmount();
    let mount = start().start();
    assert_eq!(
        read_range(&mount.file("disk.raw"), 0, 1 << 20),
        fs::read(&data).unwrap()
    );
    assert_eq!(
        read_range(&mount.file("disk.raw"), 4 << 20, 8),
        (4u64 << 20).to_be_bytes()
    );
}
