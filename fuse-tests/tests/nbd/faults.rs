//! Servers that restart, hang, are gone, violate the protocol, return errors or are slow.

use std::fs;
use std::io::{Read, Write};
use std::net::TcpListener;
use std::os::unix::fs::FileExt as _;
use std::process::Command;
use std::thread;
use std::time::Duration;

use fuse_tests::harness::{Cmd, Scratch, assert_same, need, need_fuse, poll_until, read_range, sha256};
use nix::fcntl::{PosixFadviseAdvice, posix_fadvise};
use nix::sys::signal::Signal;

use crate::{SOON, Server, can_read, noise, ready};

#[test]
fn restarts_of_the_server_under_load_lose_nothing() {
    if !ready() || !need("fio") {
        return;
    }
    let scratch = Scratch::new();
    let disk = scratch.write("disk", vec![0; 64 << 20]);
    let file = format!("file={}", disk.display());
    let mut server = Server::nbdkit(&scratch, &["file", &file]);
    let mount = scratch.mount().arg(server.uri()).start();
    let mounted = mount.file("disk.raw");
    let fio = std::thread::spawn(move || {
        // Small requests share sockets; bulk threads carry the large ones.
        let split = "--bssplit=8k/60:64k/20:256k/10:1m/10";
        let words = [
            "--name=v",
            "--rw=randwrite",
            split,
            "--size=64M",
            "--direct=1",
            "--ioengine=libaio",
        ];
        let verify = [
            "--iodepth=16",
            "--fsync=64",
            "--verify=crc32c",
            "--verify_fatal=1",
            "--verify_state_save=0",
            "--rate=,20M",
        ];
        let name = format!("--filename={}", mounted.display());
        Cmd::new("fio")
            .args(words)
            .args(verify)
            .arg(name)
            .deadline(Duration::from_secs(300))
            .run()
    });
    let mut restarts = 0;
    // Not without end: where a server takes longer to start than it then runs, little progress is made.
    while !fio.is_finished() && restarts < 10 {
        // The interval is unrelated to the load, so a restart hits any moment of it.
        std::thread::sleep(Duration::from_millis(700));
        server.crash();
        server = Server::nbdkit(&scratch, &["file", &file]);
        restarts += 1;
    }
    fio.join().unwrap().ok();
    assert!(restarts >= 2, "{restarts} restarts");
    let copy = sha256(&mount.file("disk.raw"));
    mount.unmount();
    assert_eq!(copy, sha256(&disk));
}

/// Readers of a live disk are served beside those of a dead one, also where all of them go through the page cache: the
/// kernel counts their read-ahead together.
#[test]
fn read_ahead_of_a_dead_disk_does_not_stop_that_of_a_live_one() {
    if !ready() {
        return;
    }
    let scratch = Scratch::new();
    let content = noise(8 << 20, 41);
    let image = scratch.write("live.img", &content);
    let dead = Server::nbdkit(&scratch, &["memory", "256M"]);
    let uri = dead.uri();
    let live = scratch.path("live.sock");
    let mut command = Command::new("nbdkit");
    command.args(["-f", "-U"]).arg(&live).arg("file").arg(&image);
    let _live = Server::start(command, live.clone());
    let mount = scratch
        .mount()
        .arg(format!("uri={uri}"))
        .arg("name=dead")
        .arg("timeout=200")
        .arg(format!("uri=nbd+unix:///?socket={}", live.display()))
        .arg("name=live")
        .start();
    dead.signal(Signal::SIGSTOP);
    let file = fs::File::open(mount.file("dead")).unwrap();
    // More than one disk's readers ever ask for at a time.
    for at in 0..120 {
        posix_fadvise(&file, at << 20, 1 << 20, PosixFadviseAdvice::POSIX_FADV_WILLNEED).unwrap();
    }
    let copy = Cmd::new("cp")
        .arg(mount.file("live"))
        .arg(scratch.path("copy"))
        .deadline(Duration::from_secs(60))
        .run();
    dead.signal(Signal::SIGCONT);
    copy.ok();
    assert!(fs::read(scratch.path("copy")).unwrap() == content);
}

/// An overlay is read by the event loops; what it has not must not make them wait for the server below.
#[test]
fn regression_a_dead_server_below_an_overlay_does_not_stop_other_disks() {
    if !ready() {
        return;
    }
    let scratch = Scratch::new();
    let content = noise(8 << 20, 43);
    let image = scratch.write("live.img", &content);
    let dead = Server::nbdkit(&scratch, &["memory", "64M"]);
    let mount = scratch
        .mount()
        .arg("cache=none")
        .arg(dead.uri())
        .arg("name=dead")
        .arg("timeout=200")
        .arg(format!("cow={}", scratch.path("o.vmdk").display()))
        .arg(format!("file={}", image.display()))
        .arg("name=live")
        .start();
    dead.signal(Signal::SIGSTOP);
    // More readers than the mount has event loops.
    let readers: Vec<_> = (1..9)
        .map(|at| {
            let path = mount.file("dead");
            thread::spawn(move || {
                let file = fs::File::open(path).unwrap();
                file.read_exact_at(&mut [0; 4096], at << 22).is_ok()
            })
        })
        .collect();
    let waiting = || {
        let tasks = fs::read_dir("/proc/self/task").unwrap().flatten();
        let functions = tasks.filter_map(|task| fs::read_to_string(task.path().join("wchan")).ok());
        functions.filter(|function| function == "request_wait_answer").count()
    };
    assert!(
        poll_until(SOON, || waiting() >= readers.len()),
        "no request is waited for"
    );
    let copy = Cmd::new("cp")
        .arg(mount.file("live"))
        .arg(scratch.path("copy"))
        .deadline(Duration::from_secs(60))
        .run();
    let waited = readers.iter().all(|reader| !reader.is_finished());
    dead.signal(Signal::SIGCONT);
    copy.ok();
    assert!(waited, "the server was not dead");
    assert!(fs::read(scratch.path("copy")).unwrap() == content);
    assert!(readers.into_iter().all(|reader| reader.join().unwrap()));
}

#[test]
fn a_hung_server_blocks_only_its_own_data_and_recovers() {
    if !ready() {
        return;
    }
    let scratch = Scratch::new();
    let other = scratch.write("other.img", noise(1 << 20, 2));
    // One thread: nbdkit 1.32 aborts (assertion in raw_send_socket) if two threads answer on a broken connection.
    let server = Server::nbdkit(&scratch, &["--threads=1", "memory", "8M"]);
    let mount = scratch
        .mount()
        .arg(server.uri())
        .arg("timeout=2")
        .file("other.img")
        .arg("cache=none")
        .start();
    let disk = mount.file("disk.raw");
    server.signal(Signal::SIGSTOP);
    // More readers and seekers than the mount has event loops.
    let hung: Vec<_> = (0..12)
        .map(|i| {
            let disk = disk.clone();
            std::thread::spawn(move || {
                if i % 3 == 0 {
                    let code = "import os,sys; f=os.open(sys.argv[1],0); os.lseek(f,0,os.SEEK_HOLE)";
                    Cmd::new("python3").args(["-c", code]).arg(&disk).run();
                    return;
                }
                assert!(!can_read(&disk, SOON), "a read succeeded without a server");
            })
        })
        .collect();
    for _ in 0..20 {
        assert_eq!(mount.names(), ["disk.raw", "other.raw"]);
        assert_eq!(fs::metadata(&disk).unwrap().len(), 8 << 20);
        assert_same(&mount.file("other.raw"), &other);
    }
    hung.into_iter().for_each(|t| t.join().unwrap());
    server.signal(Signal::SIGCONT);
    assert!(poll_until(SOON, || can_read(&disk, SOON)), "the disk does not recover");
    server.signal(Signal::SIGSTOP);
    let reader = std::thread::spawn(move || can_read(&disk, SOON));
    mount.signal(Signal::SIGTERM);
    mount.wait_unmounted();
    reader.join().unwrap();
    server.signal(Signal::SIGCONT);
}

#[test]
fn reads_fail_after_the_deadline_if_the_server_is_gone_and_at_once_if_its_size_has_changed() {
    if !ready() {
        return;
    }
    let scratch = Scratch::new();
    let server = Server::nbdkit(&scratch, &["memory", "8M"]);
    let log = scratch.path("log");
    let mount = scratch
        .mount()
        .arg(server.uri())
        .arg("timeout=3")
        .arg(format!("--log-file={}", log.display()))
        .start();
    let disk = mount.file("disk.raw");
    server.crash();
    assert!(!can_read(&disk, SOON));
    let larger = Server::nbdkit(&scratch, &["memory", "9M"]);
    assert!(!can_read(&disk, SOON));
    let logged = || fs::read_to_string(&log).unwrap();
    assert!(poll_until(SOON, || {
        can_read(&disk, SOON);
        logged().contains("its size was 8388608 bytes and is 9437184 now")
    }));
    assert_eq!(fs::metadata(&disk).unwrap().len(), 8 << 20);
    larger.crash();
    let _same = Server::nbdkit(&scratch, &["memory", "8M"]);
    assert!(poll_until(SOON, || can_read(&disk, SOON)), "{}", logged());
}

#[test]
fn invalid_answers_during_the_handshake_are_errors() {
    if !need_fuse() {
        return;
    }
    let scratch = Scratch::new();
    let greeting = b"NBDMAGICIHAVEOPT\x00\x03";
    // A size that no file can have, in the oldest protocol variant.
    let invalid_size = [&b"NBDMAGIC\x00\x00\x42\x02\x81\x86\x12\x53"[..], &[0xff; 8], &[0; 128]].concat();
    for answer in [
        noise(4096, 1),
        [&greeting[..], &noise(4096, 2)].concat(),
        invalid_size,
        Vec::new(),
    ] {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        let server = std::thread::spawn(move || {
            let (mut stream, _) = listener.accept().unwrap();
            let _ = stream.write_all(&answer);
            let _ = stream.shutdown(std::net::Shutdown::Write);
            let _ = stream.read_to_end(&mut Vec::new());
        });
        let start = scratch
            .mount()
            .arg("hostname=127.0.0.1")
            .arg(format!("port={port}"))
            .arg("timeout=5");
        start.refused(1).one_error(1, &["127.0.0.1"]);
        server.join().unwrap();
    }
}

#[test]
fn a_slow_server_works_and_its_errors_are_temporary() {
    if !ready() {
        return;
    }
    let scratch = Scratch::new();
    let errors = scratch.path("errors");
    let word = format!("error-pread-file={}", errors.display());
    let filters = [
        "--filter=delay",
        "--filter=rate",
        "--filter=error",
        "pattern",
        "4M",
        "rdelay=5ms",
        "rate=400M",
    ];
    let fails = ["error-pread-rate=100%", "error-pread=EIO", &word];
    let server = Server::nbdkit(&scratch, &[&filters[..], &fails[..]].concat());
    let mount = scratch.mount().arg(server.uri()).start();
    let disk = mount.file("disk.raw");
    assert_eq!(read_range(&disk, 1 << 20, 8), (1u64 << 20).to_be_bytes());
    fs::write(&errors, "").unwrap();
    assert!(!can_read(&disk, SOON));
    fs::remove_file(&errors).unwrap();
    assert!(can_read(&disk, SOON));
}

#[test]
fn a_reader_of_a_server_that_is_gone_waits_for_the_timeout_once() {
    if !ready() {
        return;
    }
    let scratch = Scratch::new();
    let server = Server::nbdkit(&scratch, &["pattern", "64M"]);
    let mount = scratch.mount().arg(server.uri()).arg("timeout=15").start();
    let disk = mount.file("disk.raw");
    server.crash();
    // The kernel reads the page again after its failed read-ahead: twice the timeout would be 30 seconds. The reader itself
    // takes a second more than once the timeout, and a busy machine takes its time.
    let within = |limit: &str| Cmd::new("timeout").args([limit, "cat"]).arg(&disk).run().ended.code;
    assert_eq!(within("29"), Some(1), "the reader waited for the timeout twice");
    let _server = Server::nbdkit(&scratch, &["pattern", "64M"]);
    assert!(poll_until(SOON, || can_read(&disk, SOON)), "did not reconnect");
    mount.unmount();
}

#[test]
fn regression_a_slow_server_that_comes_back_after_an_outage_keeps_its_connection() {
    if !ready() {
        return;
    }
    let scratch = Scratch::new();
    let server = Server::nbdkit(&scratch, &["pattern", "4M"]);
    let log = scratch.path("log");
    let mount = scratch
        .mount()
        .arg(server.uri())
        .arg("timeout=5")
        .arg(format!("--log-file={}", log.display()))
        .start();
    let disk = mount.file("disk.raw");
    let logged = || fs::read_to_string(&log).unwrap();
    server.crash();
    assert!(!can_read(&disk, SOON));
    // From now on a read waits for the connection for a second. One waits when the server comes back.
    let reader = std::thread::spawn(move || poll_until(SOON, || can_read(&disk, SOON)));
    let waits_again = || logged().matches("no answer within").count() >= 3;
    assert!(poll_until(SOON, waits_again), "{}", logged());
    let _slow = Server::nbdkit(&scratch, &["--filter=delay", "pattern", "4M", "rdelay=2"]);
    assert!(reader.join().unwrap(), "{}", logged());
    assert_eq!(logged().matches(": reconnected").count(), 1, "{}", logged());
    mount.unmount();
}
