//! Discovery of exports: `--list`, `--info`, and mounts of every export as a file.

use std::fs::{self, File};
use std::io::{BufRead, BufReader, Write};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::os::unix::net::UnixStream;
use std::process::Command;
use std::time::Duration;

use fuse_tests::harness::{Cmd, Scratch, need, need_fuse, poll_until, program, read_range};
use nix::sys::signal::Signal;

use crate::{Server, ready};

/// Deadline for what happens within seconds.
const IN_TIME: Duration = Duration::from_secs(60);

/// A server whose list of exports is the file `list`. Each export has the size that the file `size` names, and begins with its
/// name.
fn listing_server(scratch: &Scratch, exports: &[&str]) -> Server {
    set_list(scratch, exports);
    scratch.write("size", "1048576");
    let list = format!("list_exports=cat '{}'", scratch.path("list").display());
    let size = format!("get_size=cat '{}'", scratch.path("size").display());
    let words = [
        "eval",
        &list,
        "open=echo \"$3\"",
        &size,
        "pread=printf %s \"$2\" | dd bs=$3 count=1 conv=sync status=none",
    ];
    Server::nbdkit(scratch, &words)
}

/// Replaces the list of exports.
fn set_list(scratch: &Scratch, exports: &[&str]) {
    let mut text = String::from("NAMES\n");
    exports.iter().for_each(|export| text.extend([export, "\n"]));
    scratch.write("new-list", text);
    fs::rename(scratch.path("new-list"), scratch.path("list")).unwrap();
}

/// "An export that appears later is a file too, one that vanishes is none any more, and a program that has it open keeps it."
#[test]
fn exports_that_appear_or_vanish_after_the_mount_do_so_in_the_folder() {
    if !ready() {
        return;
    }
    let scratch = Scratch::new();
    let server = listing_server(&scratch, &["vm1"]);
    let mount = scratch.mount().arg(server.uri()).arg("dynamic-export=true").start();
    assert_eq!(mount.names(), ["vm1.raw"]);
    let first = File::open(mount.file("vm1.raw")).unwrap();
    set_list(&scratch, &["vm2", "vm1"]);
    // By its name alone, then in the list.
    assert!(poll_until(IN_TIME, || fs::metadata(mount.file("vm2.raw")).is_ok()));
    assert!(poll_until(IN_TIME, || mount.names() == ["vm1.raw", "vm2.raw"]));
    assert_eq!(read_range(&mount.file("vm2.raw"), 0, 3), b"vm2");
    set_list(&scratch, &["vm2"]);
    assert!(poll_until(IN_TIME, || fs::metadata(mount.file("vm1.raw")).is_err()));
    assert!(poll_until(IN_TIME, || mount.names() == ["vm2.raw"]));
    let mut start = [0; 3];
    first.read_exact_at(&mut start, 0).unwrap();
    assert_eq!((&start, first.metadata().unwrap().len()), (b"vm1", 1 << 20));
    set_list(&scratch, &["vm1", "vm2"]);
    assert!(poll_until(IN_TIME, || fs::metadata(mount.file("vm1.raw")).is_ok()));
    let again = fs::metadata(mount.file("vm1.raw")).unwrap().ino();
    assert_eq!(again, first.metadata().unwrap().ino(), "the same disk");
    drop(first);
    mount.unmount();
}

#[test]
fn a_file_name_stays_with_its_export_whatever_the_server_lists_afterwards() {
    if !ready() {
        return;
    }
    let scratch = Scratch::new();
    let server = listing_server(&scratch, &["a", "a.raw", "a", "a"]);
    let mount = scratch.mount().arg(server.uri()).arg("dynamic-export=true").start();
    assert_eq!(mount.names(), ["a.raw", "a~2.raw"], "each export once");
    set_list(&scratch, &["a.raw", "b", "a"]);
    assert!(poll_until(IN_TIME, || mount.names() == ["a.raw", "a~2.raw", "b.raw"]));
    assert_eq!(read_range(&mount.file("a.raw"), 0, 5), b"a\0\0\0\0");
    assert_eq!(read_range(&mount.file("a~2.raw"), 0, 5), b"a.raw");
    set_list(&scratch, &["a.raw"]);
    assert!(poll_until(IN_TIME, || mount.names() == ["a~2.raw"]));
    assert_eq!(read_range(&mount.file("a~2.raw"), 0, 5), b"a.raw");
    mount.unmount();
}

#[test]
fn an_export_with_another_size_is_another_disk_for_the_next_open() {
    if !ready() {
        return;
    }
    let scratch = Scratch::new();
    let server = listing_server(&scratch, &["vm"]);
    let mount = scratch.mount().arg(server.uri()).arg("dynamic-export=true").start();
    let path = mount.file("vm.raw");
    let old = File::open(&path).unwrap();
    let mut byte = [0];
    old.read_exact_at(&mut byte, 0).unwrap();
    scratch.write("size", "2097152");
    assert!(poll_until(IN_TIME, || fs::metadata(&path).unwrap().len() == 2 << 20));
    assert_eq!(old.metadata().unwrap().len(), 1 << 20);
    old.read_exact_at(&mut byte, (1 << 20) - 1).unwrap();
    let new = File::open(&path).unwrap();
    new.read_exact_at(&mut byte, (2 << 20) - 1).unwrap();
    drop((old, new));
    mount.unmount();
}

#[test]
fn a_server_without_an_export_yet_is_mounted_with_a_warning() {
    if !ready() {
        return;
    }
    let scratch = Scratch::new();
    let server = listing_server(&scratch, &[]);
    let log = scratch.path("log");
    let mount = scratch
        .mount()
        .arg(server.uri())
        .arg("dynamic-export=true")
        .arg(format!("--log-file={}", log.display()))
        .start();
    let log = fs::read_to_string(log).unwrap();
    assert!(log.contains("lists no export yet"), "{log}");
    assert!(mount.names().is_empty());
    set_list(&scratch, &["late"]);
    assert!(poll_until(IN_TIME, || mount.names() == ["late.raw"]));
    mount.unmount();
}

/// "One disk whose upstream is dead never stops other disks, getattr, readdir or unmount."
#[test]
fn a_server_that_hangs_stops_neither_reading_the_folder_nor_the_disks_beside_it() {
    if !ready() {
        return;
    }
    let scratch = Scratch::new();
    scratch.write("beside.img", vec![7; 1 << 20]);
    let server = listing_server(&scratch, &["vm1"]);
    let mount = scratch
        .mount()
        .file(scratch.path("beside.img"))
        .arg(server.uri())
        .arg("dynamic-export=true")
        .arg("timeout=60")
        .start();
    assert_eq!(read_range(&mount.file("vm1.raw"), 0, 3), b"vm1");
    server.signal(Signal::SIGSTOP);
    let started = std::time::Instant::now();
    for _ in 0..10 {
        assert_eq!(mount.names(), ["beside.raw", "vm1.raw"]);
        assert_eq!(fs::metadata(mount.file("vm1.raw")).unwrap().len(), 1 << 20);
        assert_eq!(read_range(&mount.file("beside.raw"), 1000, 3), [7; 3]);
    }
    // Far less than the time limit of one request, ten times over.
    assert!(started.elapsed() < IN_TIME, "{:?}", started.elapsed());
    server.signal(Signal::SIGCONT);
    mount.unmount();
}

#[test]
fn a_list_without_end_that_always_changes_costs_bounded_memory() {
    if !ready() || !need("awk") {
        return;
    }
    let scratch = Scratch::new();
    // Names of 200 bytes with control characters and slashes, none of them twice. nbdkit passes on 10,000 at most.
    let list = "list_exports=awk -v s=$(date +%N) 'BEGIN { print \"NAMES\"; for (i = 0; i < 9000; i++) \
                printf \"../%s\\033[2J-%d-%0190d\\n\", s, i, i }'";
    let words = [
        "eval",
        list,
        "open=echo \"$3\"",
        "get_size=echo 1048576",
        "pread=exit 1",
    ];
    let server = Server::nbdkit(&scratch, &words);
    let mount = scratch.mount().arg(server.uri()).arg("dynamic-export=true").start();
    let mut last = String::new();
    let mut peaks = Vec::new();
    for _ in 0..6 {
        let changed = poll_until(IN_TIME, || {
            let names = mount.names();
            assert!(
                names.len() <= 4096
                    && names
                        .iter()
                        .all(|name| !name.contains('\x1b') && name.starts_with("..%2F"))
            );
            let new = names.first().cloned().unwrap_or_default();
            std::mem::replace(&mut last, new.clone()) != new
        });
        assert!(changed);
        // Half of what was listed is gone by the time that it is looked up.
        let _ = fs::metadata(mount.file(&last));
        peaks.push(mount.peak_memory());
    }
    let (early, late) = (peaks[1], peaks[5]);
    assert!(late < early + (16 << 20), "memory grows with each list: {peaks:?}");
    mount.unmount();
}

/// Sends a command to the monitor of a qemu program, and waits for its answer.
fn qmp(monitor: &mut BufReader<UnixStream>, command: &str) {
    monitor.get_mut().write_all(command.as_bytes()).unwrap();
    let mut line = String::new();
    while !line.contains("\"return\"") {
        line.clear();
        assert!(monitor.read_line(&mut line).unwrap() > 0, "the monitor has ended");
        assert!(!line.contains("\"error\""), "{command}: {line}");
    }
}

#[test]
fn an_export_that_qemu_adds_or_deletes_is_shown_and_written() {
    if !need_fuse() || !need("qemu-storage-daemon") {
        return;
    }
    let scratch = Scratch::new();
    let disks = ["one", "two"];
    for disk in disks {
        scratch.write(format!("{disk}.img"), vec![0; 1 << 20]);
    }
    let mut command = Command::new("qemu-storage-daemon");
    let socket = scratch.path("s");
    let monitor = scratch.path("qmp");
    let server = format!("addr.type=unix,addr.path={},max-connections=0", socket.display());
    let chardev = format!("socket,path={},server=on,wait=off,id=monitor", monitor.display());
    command.args([
        "--nbd-server",
        &server,
        "--chardev",
        &chardev,
        "--monitor",
        "chardev=monitor",
    ]);
    for disk in disks {
        let path = scratch.path(format!("{disk}.img"));
        command.args([
            "--blockdev",
            &format!("file,node-name={disk},filename={}", path.display()),
        ]);
    }
    let server = Server::start(command, socket);
    assert!(poll_until(IN_TIME, || UnixStream::connect(&monitor).is_ok()));
    let mut monitor = BufReader::new(UnixStream::connect(&monitor).unwrap());
    qmp(&mut monitor, r#"{"execute":"qmp_capabilities"}"#);
    let add = |disk: &str| {
        format!(
            r#"{{"execute":"block-export-add","arguments":{{"type":"nbd","id":"{disk}","node-name":"{disk}","writable":true}}}}"#
        )
    };
    qmp(&mut monitor, &add("one"));
    let mount = scratch.mount().arg(server.uri()).arg("dynamic-export=true").start();
    assert_eq!(mount.names(), ["one.raw"]);
    qmp(&mut monitor, &add("two"));
    assert!(poll_until(IN_TIME, || mount.names() == ["one.raw", "two.raw"]));
    let two = File::options().write(true).open(mount.file("two.raw")).unwrap();
    two.write_all_at(&[9; 4096], 8192).unwrap();
    two.sync_all().unwrap();
    drop(two);
    assert_eq!(fs::read(scratch.path("two.img")).unwrap()[8192..12288], [9; 4096]);
    qmp(
        &mut monitor,
        r#"{"execute":"block-export-del","arguments":{"id":"one"}}"#,
    );
    assert!(poll_until(IN_TIME, || mount.names() == ["two.raw"]));
    assert!(poll_until(IN_TIME, || fs::metadata(mount.file("one.raw")).is_err()));
    mount.unmount();
}

#[test]
fn every_export_is_a_file_and_no_name_escapes_the_mount_point() {
    if !ready() {
        return;
    }
    let scratch = Scratch::new();
    let list = "list_exports=echo NAMES; echo ../../etc/passwd; echo a/b; echo a%2Fb; echo vm1; echo vm1.raw; echo ..";
    let words = [
        "eval",
        list,
        "open=echo \"$3\"",
        "get_size=echo 1048576",
        "pread=printf %s \"$2\" | dd bs=$3 count=1 conv=sync status=none",
    ];
    let server = Server::nbdkit(&scratch, &words);
    let mount = scratch.mount().arg(server.uri()).arg("dynamic-export=true").start();
    let names = [
        "..%2F..%2Fetc%2Fpasswd.raw",
        "...raw",
        "a%252Fb.raw",
        "a%2Fb.raw",
        "vm1.raw",
        "vm1~2.raw",
    ];
    assert_eq!(mount.names(), names);
    for (name, export) in [
        ("a%2Fb.raw", "a/b"),
        ("vm1.raw", "vm1"),
        ("vm1~2.raw", "vm1.raw"),
        ("...raw", ".."),
    ] {
        assert_eq!(fs::metadata(mount.file(name)).unwrap().len(), 1 << 20);
        let read = read_range(&mount.file(name), 0, export.len());
        assert_eq!(String::from_utf8_lossy(&read), export, "{name}");
    }
    let listed = scratch
        .vmdkfuse()
        .args(["--list", "--json"])
        .arg(server.uri())
        .run()
        .ok()
        .json();
    let exports: Vec<_> = listed[0]["exports"]
        .as_array()
        .unwrap()
        .iter()
        .map(|e| e["export"].clone())
        .collect();
    assert_eq!(exports, ["../../etc/passwd", "a/b", "a%2Fb", "vm1", "vm1.raw", ".."]);
    assert_eq!(listed[0]["exports"][3]["size"], 1 << 20);
}

#[test]
fn info_reports_the_same_as_nbdinfo() {
    if !ready() || !need("nbdinfo") {
        return;
    }
    let scratch = Scratch::new();
    let sizes = [
        "blocksize-minimum=4096",
        "blocksize-preferred=64K",
        "blocksize-maximum=1M",
    ];
    let server = Server::nbdkit(
        &scratch,
        &[&["--filter=blocksize-policy", "memory", "5M"][..], &sizes].concat(),
    );
    let ours = scratch
        .vmdkfuse()
        .args(["--info", "--json"])
        .arg(server.uri())
        .run()
        .ok()
        .json();
    let theirs = Cmd::new("nbdinfo").arg("--json").arg(server.uri()).run().ok().json();
    let (export, expected) = (&ours[0]["exports"][0], &theirs["exports"][0]);
    assert_eq!(export["size"], expected["export-size"]);
    assert_eq!(export["contexts"], expected["contexts"]);
    let sizes = ["block_size_minimum", "block_size_preferred", "block_size_maximum"].map(|k| expected[k].clone());
    assert_eq!(export["block_sizes"], serde_json::Value::from(sizes.to_vec()));
    for flag in export["flags"].as_array().unwrap() {
        assert_eq!(flag[1], expected[flag[0].as_str().unwrap()], "{flag}");
    }
    assert_eq!(ours[0]["protocol"], theirs["protocol"]);
    let text = scratch.vmdkfuse().arg("--info").arg(server.uri()).run().ok().stdout;
    assert!(
        text.contains("size             5242880 bytes") && text.contains("can_multi_conn   yes"),
        "{text}"
    );
}

#[test]
fn info_describes_an_overlay_over_an_export() {
    if !ready() {
        return;
    }
    let scratch = Scratch::new();
    let server = Server::nbdkit(&scratch, &["pattern", "5M"]);
    let cow = format!("cow={}", scratch.path("cow.vmdk").display());
    let info = || {
        scratch
            .vmdkfuse()
            .args(["--info", "--json"])
            .arg(server.uri())
            .arg(&cow)
            .run()
    };
    assert_eq!(info().ended.code, Some(1), "the overlay does not exist yet");
    scratch.mount().arg(server.uri()).arg(&cow).start().unmount();
    let described = info().ok().json();
    assert_eq!(described[0]["size"], 5 << 20, "{described}");
    assert!(described[0]["overlay"].is_object(), "{described}");
}

#[test]
fn the_one_export_of_an_oldest_style_server_is_listed() {
    if !ready() {
        return;
    }
    let scratch = Scratch::new();
    let server = Server::nbdkit(&scratch, &["--oldstyle", "pattern", "1M"]);
    let list = Cmd::new(program()).arg("--list").arg(server.uri()).run().ok();
    assert!(list.stdout.contains("1048576"), "{}", list.stdout);
    let mount = scratch.mount().arg(server.uri()).arg("dynamic-export=true").start();
    assert_eq!(mount.names(), ["disk.raw"]);
    mount.unmount();
}

#[test]
fn an_export_that_ends_within_a_block_causes_a_warning() {
    if !ready() {
        return;
    }
    let scratch = Scratch::new();
    let blocks = [
        "--filter=blocksize-policy",
        "memory",
        "1049088",
        "blocksize-minimum=4096",
    ];
    let server = Server::nbdkit(&scratch, &blocks);
    let log = scratch.path("log");
    let mount = scratch
        .mount()
        .arg(server.uri())
        .arg(format!("--log-file={}", log.display()))
        .start();
    mount.unmount();
    let log = fs::read_to_string(log).unwrap();
    assert!(log.contains("no multiple of its block size"), "{log}");
}
