//! Data that is read and written through the mount is the data of the server.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::os::unix::fs::MetadataExt;
use std::process::Command;
use std::time::Duration;

use fuse_tests::harness::{Cmd, Scratch, assert_same, data_ranges, free_port, need, need_qemu, poll_until, read_range};
use nix::libc;

use crate::{SOON, Server, noise, put, ready};

#[test]
fn data_written_through_the_mount_is_on_the_server_after_fsync() {
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
    // Parts of sectors, and both ends of the disk.
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
fn writes_pass_the_verification_of_the_sparse_random_plugin() {
    if !ready() {
        return;
    }
    let scratch = Scratch::new();
    // This plugin fails a write of other data than it returns for a read.
    let server = Server::nbdkit(&scratch, &["sparse-random", "256M", "seed=7", "percent=30"]);
    let mount = scratch.mount().arg(server.uri()).start();
    let (disk, copy) = (mount.file("disk.raw"), scratch.path("copy"));
    Cmd::new("cp").arg("--sparse=always").args([&disk, &copy]).run().ok();
    put(&copy, &disk);
    let mut wrong = noise(4096, 3);
    wrong[0] = 1;
    let file = File::options().write(true).open(&disk).unwrap();
    let failed = file.write_all_at(&wrong, 0).and_then(|()| file.sync_all());
    assert!(failed.is_err(), "the plugin does not verify writes");
}

#[test]
fn a_copy_of_a_sparse_export_transfers_only_its_data() {
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
    server.shut_down();
    let text = fs::read_to_string(&stats).unwrap();
    // Example: read: 26 ops, 0.001 s, 6.4 MiB, …
    let line = text.lines().find(|line| line.starts_with("read:")).unwrap();
    let bytes = line.split(", ").nth(2).unwrap_or_default();
    assert!(bytes.ends_with(" MiB") || bytes.ends_with(" KiB"), "{line}");
}

#[test]
fn punched_holes_are_discarded_by_the_server() {
    if !ready() {
        return;
    }
    let scratch = Scratch::new();
    let disk = scratch.write("disk", noise(16 << 20, 15));
    let server = Server::nbdkit(&scratch, &["file", &format!("file={}", disk.display())]);
    let mount = scratch.mount().arg(server.uri()).arg("cache=none").start();
    let mounted = mount.file("disk.raw");
    let fallocate = |mode: &str, from: u64, len: u64| {
        let (from, len) = (format!("-o{from}"), format!("-l{len}"));
        Cmd::new("fallocate").args([mode, &from, &len]).arg(&mounted).run().ok();
    };
    assert_eq!(data_ranges(&mounted).first(), Some(&(0..16 << 20)));
    fallocate("--punch-hole", 4 << 20, 8 << 20);
    fallocate("--zero-range", 1 << 20, 1 << 20);
    // Starts and ends within blocks of the file system.
    fallocate("--punch-hole", 700, 9000);
    File::open(&mounted).unwrap().sync_all().unwrap();
    let mut expected = noise(16 << 20, 15);
    for range in [4 << 20..12 << 20, 1 << 20..2 << 20, 700..9700] {
        expected[range].fill(0);
    }
    let expected = scratch.write("expected", expected);
    assert_same(&mounted, &expected);
    assert_same(&disk, &expected);
    for path in [&mounted, &disk] {
        assert!(
            !data_ranges(path).iter().any(|r| r.start < 12 << 20 && r.end > 4 << 20),
            "{:?}",
            data_ranges(path)
        );
        // The mount counts the blocks in the background.
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
    // `-d` serves only the first client, so the test must not connect to check that the server is up.
    let _server = Server::spawn(command);
    let start = scratch
        .mount()
        .arg("hostname=127.0.0.1")
        .arg(format!("port={port}"))
        .arg("export=vm");
    let mount = start.arg("retry=20").start();
    let mounted = mount.file("vm.raw");
    assert_same(&mounted, &disk);
    let data = scratch.write("data", noise(2 << 20, 6));
    put(&data, &mounted);
    assert_eq!(read_range(&disk, 0, 2 << 20), fs::read(&data).unwrap());
}

#[test]
fn writes_to_a_read_only_export_go_to_an_overlay() {
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

/// "Where zeroes can only be written, truncating is EOPNOTSUPP, and the log gives the reason."
#[test]
fn truncating_without_cheap_zeroes_is_eopnotsupp_and_the_log_says_why() {
    if !ready() {
        return;
    }
    let scratch = Scratch::new();
    let server = Server::nbdkit(&scratch, &["--filter=nozero", "memory", "8M"]);
    let log = scratch.path("log");
    let mount = scratch.mount().arg(server.uri()).arg("--log-file").arg(&log).start();
    let file = fs::OpenOptions::new().write(true).open(mount.file("disk.raw")).unwrap();
    file.write_all_at(&[7; 4096], 4096).unwrap();
    let refused = file.set_len(0).unwrap_err();
    assert_eq!(refused.raw_os_error(), Some(libc::EOPNOTSUPP), "{refused}");
    assert_eq!(read_range(&mount.file("disk.raw"), 4096, 4096), [7; 4096]);
    let logged = || fs::read_to_string(&log).unwrap_or_default();
    let said = poll_until(SOON, || logged().contains("has no command that writes zeroes"));
    assert!(said, "{}", logged());
}

/// "What another client of an NBD export has written is seen at the next open … and with a cache of blocks"
#[test]
fn a_cache_of_blocks_shows_own_writes_and_at_the_next_open_those_of_others() {
    if !ready() {
        return;
    }
    let scratch = Scratch::new();
    let server = Server::nbdkit(&scratch, &["memory", "8M"]);
    let image = scratch.write("image", noise(8 << 20, 23));
    let mount = scratch
        .mount()
        .arg(server.uri())
        .arg("cache-size=4M")
        .arg("cache=none")
        .start();
    let disk = mount.file("disk.raw");
    put(&image, &disk);
    let model = File::options().write(true).open(&image).unwrap();
    let file = File::options().read(true).write(true).open(&disk).unwrap();
    // Parts of sectors and of blocks, and both ends of the disk, each over blocks that are cached.
    for (at, len) in [
        (0u64, 1usize),
        (511, 2),
        (65_535, 2),
        (1_000_003, 70_001),
        ((8 << 20) - 5, 5),
    ] {
        let mut bytes = vec![0; len];
        file.read_exact_at(&mut bytes, at).unwrap();
        let new = noise(len, at + 1);
        file.write_all_at(&new, at).unwrap();
        model.write_all_at(&new, at).unwrap();
        file.read_exact_at(&mut bytes, at).unwrap();
        assert!(bytes == new, "{len} bytes at {at}");
    }
    drop(file);
    assert_same(&disk, &image);
    let others = scratch.write("others", noise(1 << 20, 29));
    scratch.mkdir("other");
    let other = scratch.mount().at("other").arg(server.uri()).start();
    put(&others, &other.file("disk.raw"));
    assert_eq!(read_range(&disk, 0, 1 << 20), noise(1 << 20, 29));
}

/// "each open of the file and each reconnect empty it"
#[test]
fn a_reconnect_empties_the_cache_of_blocks() {
    if !ready() {
        return;
    }
    let scratch = Scratch::new();
    let disk = scratch.write("disk", noise(4 << 20, 31));
    let words = ["file", &format!("file={}", disk.display())];
    let server = Server::nbdkit(&scratch, &words);
    let mount = scratch
        .mount()
        .arg(server.uri())
        .arg("cache-size=2M")
        .arg("readahead=0")
        .arg("cache=none")
        .start();
    let file = File::open(mount.file("disk.raw")).unwrap();
    let mut page = [0; 4096];
    file.read_exact_at(&mut page, 0).unwrap();
    server.crash();
    // Another client writes while the server is away.
    let changed = noise(4096, 37);
    File::options()
        .write(true)
        .open(&disk)
        .unwrap()
        .write_all_at(&changed, 0)
        .unwrap();
    let _server = Server::nbdkit(&scratch, &words);
    // A block that is not cached: the request for it needs a connection.
    file.read_exact_at(&mut page, 3 << 20).unwrap();
    file.read_exact_at(&mut page, 0).unwrap();
    assert!(page[..] == changed[..]);
}

/// "`cache-size=` keeps blocks of the export in memory, also for programs that bypass the page cache"
#[test]
fn a_cache_of_blocks_spares_the_server_repeated_reads() {
    if !ready() {
        return;
    }
    let scratch = Scratch::new();
    let stats = scratch.path("stats");
    let stats_word = format!("statsfile={}", stats.display());
    let server = Server::nbdkit(&scratch, &["--filter=stats", "pattern", "8M", &stats_word]);
    let mount = scratch
        .mount()
        .arg(server.uri())
        .arg("cache-size=4M")
        .arg("cache=none")
        .start();
    let file = File::open(mount.file("disk.raw")).unwrap();
    let mut page = [0; 4096];
    (0..2000).for_each(|_| file.read_exact_at(&mut page, 2 << 20).unwrap());
    drop(file);
    mount.unmount();
    server.shut_down();
    let text = fs::read_to_string(&stats).unwrap();
    let line = text.lines().find(|line| line.starts_with("read:")).unwrap();
    let count: u64 = line.split_whitespace().nth(1).unwrap().parse().unwrap();
    assert!(count < 1000, "{count} reads reached the server");
}

/// "What another client of an NBD export has written is seen at the next open, also where block status said zeroes."
#[test]
fn writes_of_another_client_are_seen_at_the_next_open() {
    if !ready() {
        return;
    }
    let scratch = Scratch::new();
    let server = Server::nbdkit(&scratch, &["memory", "8M"]);
    let mount = scratch.mount().arg(server.uri()).start();
    let file = mount.file("disk.raw");
    assert!(read_range(&file, 0, 8 << 20).iter().all(|byte| *byte == 0));
    let data = scratch.write("data", noise(1 << 20, 23));
    scratch.mkdir("other");
    let other = scratch.mount().at("other").arg(server.uri()).start();
    put(&data, &other.file("disk.raw"));
    assert_eq!(read_range(&file, 0, 1 << 20), noise(1 << 20, 23));
}
