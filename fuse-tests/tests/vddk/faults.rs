//! A library that crashes, hangs, loses its server or returns errors.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::time::{Duration, Instant};

use fuse_tests::harness::{Cmd, Scratch, assert_same, need, poll_until, read_range};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::local::children;
use crate::remote::{expect, put, remote};
use crate::{SOON, Vddk, noise, ready};

#[test]
fn crashes_under_load_lose_nothing() {
    if !ready() || !need("fio") {
        return;
    }
    for transport in ["file", "nbd"] {
        let scratch = Scratch::new();
        let vddk = Vddk::new(&scratch, 8);
        let knobs = [
            &format!("transport={transport}"),
            "volatile=1",
            "order=reverse",
            "latency=200",
        ];
        vddk.set(
            &[
                &knobs[..],
                &["crash=WriteAsync:700:always", "crash=ReadAsync:2500:always"],
            ]
            .concat(),
        );
        scratch.write("x.vmdk", vec![0; 32 << 20]);
        let mount = vddk.mount(&scratch).file("x.vmdk").start();
        let words = [
            "--name=v",
            "--rw=randwrite",
            "--bssplit=4k/60:64k/30:1m/10",
            "--size=32M",
            "--direct=1",
        ];
        let verify = [
            "--iodepth=16",
            "--fsync=64",
            "--verify=crc32c",
            "--verify_fatal=1",
            "--verify_state_save=0",
        ];
        Cmd::new("fio")
            .args(words)
            .arg("--ioengine=libaio")
            .args(verify)
            .arg(format!("--filename={}", mount.file("x.raw").display()))
            .deadline(Duration::from_secs(300))
            .run()
            .ok();
        let seen = fs::read(mount.file("x.raw")).unwrap();
        mount.unmount();
        assert!(
            fs::read(scratch.path("x.vmdk")).unwrap() == seen,
            "the disk differs from what was read"
        );
        let hosts = vddk.calls_of("InitEx").len();
        assert!(hosts >= 2, "{hosts} hosts: the library has not crashed");
    }
}

#[test]
fn writes_before_a_crash_are_repeated_on_the_next_host() {
    if !ready() {
        return;
    }
    let scratch = Scratch::new();
    let vddk = Vddk::new(&scratch, 8);
    vddk.set(&["volatile=1", "crash=Flush:1"]);
    let disk = scratch.write("x.vmdk", vec![0; 4 << 20]);
    let mount = vddk.mount(&scratch).file("x.vmdk").start();
    let file = File::options().write(true).open(mount.file("x.raw")).unwrap();
    let bytes = noise(3 << 20, 1);
    file.write_all_at(&bytes, 12345).unwrap();
    file.sync_all().unwrap();
    assert_eq!(read_range(&disk, 12345, 3 << 20), bytes, "fsync has returned");
    drop(file);
    mount.unmount();
    assert_eq!(vddk.calls_of("InitEx").len(), 2);
}

#[test]
fn a_crash_leaves_other_disks_alone() {
    if !ready() {
        return;
    }
    let scratch = Scratch::new();
    let vddk = Vddk::new(&scratch, 8);
    vddk.set(&["crash=ReadAsync:3"]);
    let a = scratch.write("a.vmdk", noise(8 << 20, 1));
    let b = scratch.write("b.vmdk", noise(8 << 20, 2));
    let mount = vddk.mount(&scratch).file("a.vmdk").file("b.vmdk").start();
    // The first of the two processes that comes to its third read crashes.
    assert_same(&mount.file("a.raw"), &a);
    assert_same(&mount.file("b.raw"), &b);
    mount.unmount();
    assert_eq!(
        vddk.calls_of("InitEx").len(),
        3,
        "one host was replaced, the other was not"
    );
}

#[test]
fn a_hung_library_is_replaced_after_the_timeout() {
    if !ready() {
        return;
    }
    let scratch = Scratch::new();
    let vddk = Vddk::new(&scratch, 8);
    vddk.set(&["hang=ReadAsync:2"]);
    let disk = scratch.write("x.vmdk", noise(8 << 20, 1));
    let other = scratch.write("y.vmdk", noise(1 << 20, 2));
    let mount = vddk
        .mount(&scratch)
        .arg("timeout=4")
        .file("x.vmdk")
        .file("y.vmdk")
        .start();
    let shown = mount.file("x.raw");
    let read = || Cmd::new("cat").arg(&shown).run().ended.code == Some(0);
    let _ = read();
    assert_same(&mount.file("y.raw"), &other);
    assert!(poll_until(SOON, read), "the disk does not recover");
    assert_same(&shown, &disk);
    mount.unmount();
}

#[test]
fn a_lost_server_is_a_reconnect() {
    if !ready() {
        return;
    }
    let scratch = Scratch::new();
    let vddk = Vddk::new(&scratch, 8);
    let disk = put(&vddk, &noise(8 << 20, 1));
    expect(
        &vddk,
        &["fail-once=ReadAsync:4:14011", "fail-once=WriteAsync:2:36", "volatile=1"],
    );
    let log = scratch.path("log");
    let mount = remote(&vddk, &scratch)
        .arg(format!("--log-file={}", log.display()))
        .start();
    let shown = mount.file("x.raw");
    assert_same(&shown, &disk);
    let file = File::options().write(true).open(&shown).unwrap();
    for at in [5u64, 1 << 20, 3 << 20] {
        file.write_all_at(&noise(70_000, at), at).unwrap();
    }
    file.sync_all().unwrap();
    drop(file);
    for at in [5u64, 1 << 20, 3 << 20] {
        assert_eq!(read_range(&disk, at, 70_000), noise(70_000, at));
    }
    mount.unmount();
    assert!(vddk.calls_of("InitEx").len() >= 2);
    let log = fs::read_to_string(log).unwrap();
    assert!(log.contains("VDDK error 14011") && log.contains("reconnected"), "{log}");
}

#[test]
fn an_error_of_one_request_is_an_error_of_its_range() {
    if !ready() {
        return;
    }
    let scratch = Scratch::new();
    let vddk = Vddk::new(&scratch, 8);
    let log = scratch.path("log");
    vddk.set(&[
        "fail=ReadAsync:10:1:7",
        "fail-once=Flush:1:8",
        "error-line=ERROR forged\u{1b}[2J",
    ]);
    let disk = scratch.write("x.vmdk", noise(8 << 20, 1));
    let mount = vddk
        .mount(&scratch)
        .file("x.vmdk")
        .arg(format!("--log-file={}", log.display()))
        .start();
    let shown = mount.file("x.raw");
    let read = || {
        Cmd::new("dd")
            .arg(format!("if={}", shown.display()))
            .args(["of=/dev/null", "bs=64k", "iflag=direct"])
            .run()
    };
    assert_eq!(read().ended.code, Some(1));
    assert_eq!(read().ended.code, Some(0));
    let file = File::options().write(true).open(&shown).unwrap();
    file.write_all_at(b"x", 0).unwrap();
    assert_eq!(
        file.sync_all().unwrap_err().raw_os_error(),
        Some(28),
        "ENOSPC of the library"
    );
    drop(file);
    assert_eq!(read_range(&disk, 1, 100), noise(8 << 20, 1)[1..101]);
    mount.unmount();
    let log = fs::read_to_string(log).unwrap();
    assert!(
        log.contains("fake error text 7\\nERROR forged\\x1b[2J (VDDK error 7)"),
        "a line break in a text of the library starts no line of its own: {log}"
    );
    assert_eq!(
        vddk.calls_of("InitEx").len(),
        2,
        "after a refused flush the disk is opened again"
    );
}

#[test]
fn no_request_reaches_a_disk_that_is_being_closed() {
    if !ready() || !need("fio") {
        return;
    }
    for transport in ["nbd", "file"] {
        let scratch = Scratch::new();
        let vddk = Vddk::new(&scratch, 8);
        let transport = format!("transport={transport}");
        // A new request takes the place of each that is answered, until the host says that it ends.
        vddk.set(&[&transport, "latency=1000", "fail-once=ReadAsync:400:14011"]);
        scratch.write("x.vmdk", noise(32 << 20, 1));
        let mount = vddk.mount(&scratch).file("x.vmdk").arg("-r").start();
        let words = ["--name=v", "--rw=randread", "--bs=16k", "--size=32M", "--direct=1"];
        Cmd::new("fio")
            .args(words)
            .args(["--ioengine=libaio", "--iodepth=96", "--norandommap"])
            .arg(format!("--filename={}", mount.file("x.raw").display()))
            .run()
            .ok();
        mount.unmount();
        assert_eq!(
            vddk.calls_of("Close").len(),
            2,
            "each host closes its disk: {:?}",
            vddk.calls()
        );
        assert_eq!(vddk.calls_of("Exit").len(), 2, "{:?}", vddk.calls());
    }
}

#[test]
fn a_library_that_calls_back_too_often_does_no_harm() {
    if !ready() {
        return;
    }
    for callback in ["twice", "error"] {
        let scratch = Scratch::new();
        let vddk = Vddk::new(&scratch, 8);
        vddk.set(&[&format!("callback={callback}")]);
        let disk = scratch.write("x.vmdk", noise(8 << 20, 1));
        let mount = vddk.mount(&scratch).file("x.vmdk").start();
        let shown = mount.file("x.raw");
        assert_same(&shown, &disk);
        let file = File::options().write(true).open(&shown).unwrap();
        file.write_all_at(&noise(1 << 20, 2), 777).unwrap();
        file.sync_all().unwrap();
        drop(file);
        assert_eq!(read_range(&disk, 777, 1 << 20), noise(1 << 20, 2));
        mount.unmount();
        assert_eq!(vddk.calls_of("InitEx").len(), 1, "callback={callback}: a host has died");
    }
}

/// "14014/14015 (host going into maintenance) back off longer"
#[test]
fn a_server_in_maintenance_is_tried_again_after_a_longer_pause() {
    if !ready() {
        return;
    }
    let scratch = Scratch::new();
    let vddk = Vddk::new(&scratch, 8);
    let disk = put(&vddk, &noise(1 << 20, 1));
    expect(&vddk, &["fail-once=Open:1:14015", "fail-once=ReadAsync:2:14014"]);
    let log = scratch.path("log");
    let mount = remote(&vddk, &scratch)
        .arg("cache=none")
        .arg("-v")
        .arg(format!("--log-file={}", log.display()))
        .start();
    assert_eq!(vddk.calls_of("Open").len(), 2);
    // The second read loses the server: the next host waits before it opens the disk.
    assert_same(&mount.file("x.raw"), &disk);
    mount.unmount();
    assert_eq!(vddk.calls_of("Open").len(), 3, "{:?}", vddk.calls());
    let log = fs::read_to_string(log).unwrap();
    for words in [
        "(VDDK error 14015); the host is going into maintenance or shuts down: trying again in 5 s",
        "(VDDK error 14014); the host is going into maintenance or shuts down: opening the disk again",
    ] {
        assert!(log.contains(words), "{words}: {log}");
    }
    // A part of the pause has passed when the next host is started: as a rule, a few milliseconds.
    let pause = log
        .split("opening the disk in ")
        .nth(1)
        .unwrap_or_else(|| panic!("no pause: {log}"));
    let pause: f32 = pause.split(' ').next().unwrap().parse().unwrap();
    assert!(pause > 0.0 && pause <= 5.0, "{pause}");
}

#[test]
fn a_server_that_stays_in_maintenance_is_not_asked_again_by_each_new_host() {
    if !ready() {
        return;
    }
    let scratch = Scratch::new();
    let vddk = Vddk::new(&scratch, 8);
    put(&vddk, &noise(1 << 20, 1));
    expect(&vddk, &[]);
    let mount = remote(&vddk, &scratch).arg("cache=none").arg("timeout=3").start();
    expect(&vddk, &["fail=Open:1:99:14014"]);
    let started = Instant::now();
    kill(Pid::from_raw(children(mount.pid())[0]), Signal::SIGKILL).unwrap();
    // Ends after the timeout, in which a host without a pause would try it about ten times.
    assert!(fs::read(mount.file("x.raw")).is_err());
    let opens = vddk.calls_of("Open").len() as u64;
    // One before, one at once, and one after each pause of five seconds.
    let most = 2 + started.elapsed().as_secs() / 5;
    assert!((2..=most).contains(&opens), "{opens} of {most}: {:?}", vddk.calls());
    mount.unmount();
}
