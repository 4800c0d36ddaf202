//! Exports of real NBD servers as files: nbdkit, qemu-nbd and nbd-server, whole, restarted, hung, gone and lying.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a failed step of a test is a panic that names it"
)]

use std::fs::{self, File};
use std::io::{Read, Write};
use std::net::TcpListener;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use fuse_tests::harness::{
    Cmd, Scratch, assert_same, data_ranges, is_running, need, need_fuse, need_qemu, poll_until, read_range, sha256,
    wait_end,
};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

const SOON: Duration = Duration::from_secs(30);

/// A server that listens on a Unix socket; it ends with the test.
struct Server {
    child: Child,
    socket: PathBuf,
}

impl Server {
    /// Starts nbdkit on the socket `s` of the test's folder.
    fn nbdkit(scratch: &Scratch, words: &[&str]) -> Self {
        let socket = scratch.path("s");
        let mut command = Command::new("nbdkit");
        command.args(["-f", "-U"]).arg(&socket).args(words);
        Self::start(command, socket)
    }

    fn start(mut command: Command, socket: PathBuf) -> Self {
        let _ = fs::remove_file(&socket);
        // In a process group of its own: the system ends one that is stopped in a group that others leave.
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).process_group(0);
        let child = command.spawn().expect("starting a server");
        let mut server = Self { child, socket };
        let up = poll_until(SOON, || UnixStream::connect(&server.socket).is_ok());
        assert!(up, "the server did not come up: {:?}", server.child.try_wait());
        server
    }

    fn uri(&self) -> String {
        format!("nbd+unix:///?socket={}", self.socket.display())
    }

    fn signal(&self, signal: Signal) {
        kill(Pid::from_raw(self.child.id() as i32), signal).unwrap();
    }

    /// Ends it as a crash does.
    fn crash(mut self) {
        self.end();
    }

    fn end(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.end();
    }
}

/// A process that ends with the test.
struct Reaped(Child);

impl Drop for Reaped {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn ready() -> bool {
    need_fuse() && need("nbdkit")
}

/// Bytes that differ everywhere.
fn noise(len: usize, seed: u64) -> Vec<u8> {
    let mut state = seed | 1;
    let mut bytes = Vec::with_capacity(len);
    while bytes.len() < len {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        bytes.extend(state.to_be_bytes());
    }
    bytes.truncate(len);
    bytes
}

/// Writes a file as `dd` does, and makes it durable.
fn put(from: &Path, to: &Path) {
    let (input, output) = (format!("if={}", from.display()), format!("of={}", to.display()));
    Cmd::new("dd").args([&input, &output]).args(["bs=1M", "conv=notrunc,fsync", "status=none"]).run().ok();
}

/// What `cmd` says when it reads a file; whether it could.
fn can_read(path: &Path, deadline: Duration) -> bool {
    let input = format!("if={}", path.display());
    let words = ["of=/dev/null", "bs=4k", "count=1", "iflag=direct", "status=none"];
    Cmd::new("dd").arg(input).args(words).deadline(deadline).run().ended.code == Some(0)
}

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
        File::options().write(true).open(&image).unwrap().write_all_at(&bytes, at).unwrap();
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
    assert!(found.iter().map(|r| r.end - r.start).sum::<u64>() < 8 << 20, "{found:?}");
    let copy = scratch.path("copy");
    let words = ["convert", "-f", "raw", "-O", "raw"];
    Cmd::new("qemu-img").args(words).args([&disk, &copy]).deadline(Duration::from_secs(120)).run().ok();
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
fn a_qcow2_is_edited_by_a_server_that_ends_with_the_mount() {
    if !ready() || !need_qemu() || !need("qemu-nbd") {
        return;
    }
    let scratch = Scratch::new();
    let image = scratch.path("x.qcow2");
    Cmd::new("qemu-img").args(["create", "-q", "-f", "qcow2"]).arg(&image).arg("64M").run().ok();
    let data = scratch.write("data", noise(3 << 20, 5));
    let words = ["command=qemu-nbd", "arg=-f", "arg=qcow2"];
    let mut start = scratch.mount();
    for word in words {
        start = start.arg(word);
    }
    let mount = start.arg(format!("arg={}", image.display())).start();
    put(&data, &mount.file("disk.raw"));
    let server = children(mount.pid()).pop().expect("a server");
    mount.unmount();
    assert!(poll_until(SOON, || !is_running(server)), "the server lives on");
    Cmd::new("qemu-img").args(["check", "-q"]).arg(&image).run().ok();
    let raw = scratch.path("raw");
    Cmd::new("qemu-img").args(["convert", "-f", "qcow2", "-O", "raw"]).args([&image, &raw]).run().ok();
    assert_eq!(read_range(&raw, 0, 3 << 20), fs::read(&data).unwrap());
}

#[test]
fn a_server_of_ours_ends_also_when_the_mount_is_killed() {
    if !ready() {
        return;
    }
    let scratch = Scratch::new();
    let mut mount = scratch.mount().arg("command=nbdkit").arg("arg=memory").arg("arg=1M").start();
    let server = children(mount.pid()).pop().expect("a server");
    assert!(is_running(server));
    mount.signal(Signal::SIGKILL);
    mount.wait_end();
    assert!(wait_end(server, SOON).is_some(), "the server lives on");
}

/// The processes that `pid` has started.
fn children(pid: i32) -> Vec<i32> {
    let text = fs::read_to_string(format!("/proc/{pid}/task/{pid}/children")).unwrap();
    text.split_whitespace().map(|n| n.parse().unwrap()).collect()
}

#[test]
fn a_compressed_image_is_read_by_a_captive_filter() {
    if !ready() || !need("xz") {
        return;
    }
    let scratch = Scratch::new();
    let image = scratch.write("x.img", noise(6 << 20, 9));
    Cmd::new("xz").args(["-k", "-0", "--block-size=1MiB"]).arg(&image).run().ok();
    let file = format!("arg={}", scratch.path("x.img.xz").display());
    let words = ["command=nbdkit", "arg=-r", "arg=--filter=xz", "arg=file"];
    let start = words.iter().fold(scratch.mount(), |mount, word| mount.arg(word));
    let mount = start.arg(file).start();
    assert_same(&mount.file("disk.raw"), &image);
    assert_eq!(fs::metadata(mount.file("disk.raw")).unwrap().mode() & 0o222, 0, "a read-only export");
}

#[test]
fn a_server_that_forgets_what_it_did_not_flush_is_given_it_again() {
    if !ready() {
        return;
    }
    let scratch = Scratch::new();
    let disk = scratch.write("disk", vec![0; 4 << 20]);
    let file = format!("file={}", disk.display());
    let server = Server::nbdkit(&scratch, &["file", &file]);
    let mount = scratch.mount().arg(server.uri()).arg("cache=none").start();
    let data = scratch.write("wanted", noise(4 << 20, 11));
    // Not by this process: each program that another test starts would close the file once, and so flush it.
    let code = "import os,sys; f=os.open(sys.argv[1],os.O_WRONLY); d=open(sys.argv[2],'rb').read()\nfor at in range(0,len(d),65536): \
                os.pwrite(f,d[at:at+65536],at)\nprint('written',flush=True); sys.stdin.readline(); os.fsync(f)";
    let mut python = Command::new("python3");
    python.args(["-c", code]).arg(mount.file("disk.raw")).arg(&data).stdin(Stdio::piped()).stdout(Stdio::piped());
    let mut writer = Reaped(python.spawn().unwrap());
    let mut said = [0; 7];
    writer.0.stdout.as_mut().unwrap().read_exact(&mut said).unwrap();
    server.crash();
    // a machine that went down with what it had not written
    fs::write(&disk, vec![0; 4 << 20]).unwrap();
    let _server = Server::nbdkit(&scratch, &["file", &file]);
    drop(writer.0.stdin.take());
    assert!(writer.0.wait().unwrap().success(), "fsync");
    assert_eq!(sha256(&disk), sha256(&data));
}

/// What nbdkit's log filter has seen: writes, how many of them with FUA, and flushes.
fn logged(log: &Path) -> (usize, usize, usize) {
    let text = fs::read_to_string(log).unwrap_or_default();
    let writes = text.lines().filter(|line| line.contains(" Write id="));
    let durable = writes.clone().filter(|line| line.contains("fua=1"));
    (writes.count(), durable.count(), text.lines().filter(|line| line.contains(" Flush id=")).count())
}

/// `dd` of so many blocks to a file that is opened with O_DSYNC or O_SYNC.
fn write_synced(from: &Path, to: &Path, flag: &str, block: &str, count: usize) -> Cmd {
    let (input, output) = (format!("if={}", from.display()), format!("of={}", to.display()));
    let words = [format!("bs={block}"), format!("count={count}"), format!("oflag={flag}")];
    Cmd::new("dd").args([&input, &output]).args(&words).args(["conv=notrunc", "status=none"]).deadline(SOON)
}

#[test]
fn a_synchronous_write_is_one_command_where_the_server_offers_fua_and_is_flushed_where_not() {
    if !ready() {
        return;
    }
    let scratch = Scratch::new();
    let (log, data) = (scratch.path("log"), scratch.write("data", noise(1 << 20, 13)));
    let logfile = format!("logfile={}", log.display());
    for flag in ["dsync", "sync", "dsync,direct"] {
        let server = Server::nbdkit(&scratch, &["--filter=log", "memory", "8M", &logfile]);
        let mount = scratch.mount().arg(server.uri()).start();
        write_synced(&data, &mount.file("disk.raw"), flag, "4k", 8).run().ok();
        assert_eq!(logged(&log), (8, 8, 0), "{flag}: one write with FUA each, and nothing to flush at the close");
        // of several commands each would be made durable by itself
        write_synced(&data, &mount.file("disk.raw"), flag, "1M", 1).run().ok();
        let (writes, durable, flushes) = logged(&log);
        assert!(writes > 9 && flushes >= 1, "{flag}: {:?}", (writes, durable, flushes));
        assert_eq!(durable, 8, "{flag}");
        mount.unmount();
    }
    // the filter takes FUA away
    let server = Server::nbdkit(&scratch, &["--filter=log", "--filter=fua", "memory", "8M", &logfile]);
    let mount = scratch.mount().arg(server.uri()).start();
    write_synced(&data, &mount.file("disk.raw"), "dsync", "4k", 8).run().ok();
    assert_eq!(logged(&log), (8, 0, 8), "a write and a flush each");
    assert_eq!(read_range(&mount.file("disk.raw"), 0, 32 << 10), fs::read(&data).unwrap()[..32 << 10]);
}

#[test]
fn a_durable_write_that_was_not_answered_is_sent_again_as_one() {
    if !ready() {
        return;
    }
    let scratch = Scratch::new();
    let disk = scratch.write("disk", vec![0; 1 << 20]);
    let (first, second) = (scratch.path("first"), scratch.path("second"));
    let file = format!("file={}", disk.display());
    let log = |path: &Path| format!("logfile={}", path.display());
    // a server that has the write, and never answers it
    let slow = ["--filter=log", "--filter=delay", "file", &file, &log(&first), "wdelay=1000"];
    let server = Server::nbdkit(&scratch, &slow);
    let mount = scratch.mount().arg(server.uri()).start();
    let data = scratch.write("data", noise(4096, 14));
    let writer = write_synced(&data, &mount.file("disk.raw"), "dsync", "4k", 1);
    let writer = std::thread::spawn(move || writer.run());
    assert!(poll_until(SOON, || logged(&first) == (1, 1, 0)), "{:?}", logged(&first));
    server.crash();
    let _server = Server::nbdkit(&scratch, &["--filter=log", "file", &file, &log(&second)]);
    writer.join().unwrap().ok();
    assert_eq!(logged(&second), (1, 1, 0));
    assert_eq!(read_range(&disk, 0, 4096), fs::read(&data).unwrap());
}

#[test]
fn a_durable_write_over_an_unflushed_one_is_not_undone_by_a_restart() {
    if !ready() {
        return;
    }
    let scratch = Scratch::new();
    let disk = scratch.write("disk", vec![0; 1 << 20]);
    let file = format!("file={}", disk.display());
    let server = Server::nbdkit(&scratch, &["file", &file]);
    let mount = scratch.mount().arg(server.uri()).arg("cache=none").start();
    // in a process of its own, as above
    let code = "import os,sys; f=os.open(sys.argv[1],os.O_WRONLY); d=os.open(sys.argv[1],os.O_WRONLY|os.O_DSYNC)\n\
                os.pwrite(f,b'A'*8192,0); os.pwrite(d,b'B'*4096,4096)\n\
                print('written',flush=True); sys.stdin.readline(); os.fsync(f)";
    let mut python = Command::new("python3");
    python.args(["-c", code]).arg(mount.file("disk.raw")).stdin(Stdio::piped()).stdout(Stdio::piped());
    let mut writer = Reaped(python.spawn().unwrap());
    let mut said = [0; 7];
    writer.0.stdout.as_mut().unwrap().read_exact(&mut said).unwrap();
    server.crash();
    // what was durable is there, the rest is not
    fs::write(&disk, [vec![0; 4096], vec![b'B'; 4096], vec![0; (1 << 20) - 8192]].concat()).unwrap();
    let _server = Server::nbdkit(&scratch, &["file", &file]);
    drop(writer.0.stdin.take());
    assert!(writer.0.wait().unwrap().success(), "fsync");
    assert!(read_range(&disk, 0, 8192) == [vec![b'A'; 4096], vec![b'B'; 4096]].concat());
}

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
    let seen = mount.file("disk.raw");
    let fio = std::thread::spawn(move || {
        // small ones on a connection for all, long ones each with a connection for itself
        let split = "--bssplit=8k/60:64k/20:256k/10:1m/10";
        let words = ["--name=v", "--rw=randwrite", split, "--size=64M", "--direct=1", "--ioengine=libaio"];
        let verify = [
            "--iodepth=16",
            "--fsync=64",
            "--verify=crc32c",
            "--verify_fatal=1",
            "--verify_state_save=0",
            "--rate=,20M",
        ];
        let name = format!("--filename={}", seen.display());
        Cmd::new("fio").args(words).args(verify).arg(name).deadline(Duration::from_secs(120)).run()
    });
    let mut restarts = 0;
    while !fio.is_finished() {
        // at any moment of the load
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

#[test]
fn a_hung_server_blocks_nothing_but_its_own_data_and_comes_back() {
    if !ready() {
        return;
    }
    let scratch = Scratch::new();
    let other = scratch.write("other.img", noise(1 << 20, 2));
    // One thread: nbdkit 1.32 ends itself (an assertion in raw_send_socket) where two answer on a connection that is lost.
    let server = Server::nbdkit(&scratch, &["--threads=1", "memory", "8M"]);
    let mount = scratch.mount().arg(server.uri()).arg("timeout=2").file("other.img").arg("cache=none").start();
    let disk = mount.file("disk.raw");
    server.signal(Signal::SIGSTOP);
    // more readers and seekers than there are loops
    let hung: Vec<_> = (0..12)
        .map(|i| {
            let disk = disk.clone();
            std::thread::spawn(move || {
                if i % 3 == 0 {
                    let code = "import os,sys; f=os.open(sys.argv[1],0); os.lseek(f,0,os.SEEK_HOLE)";
                    Cmd::new("python3").args(["-c", code]).arg(&disk).run();
                    return;
                }
                assert!(!can_read(&disk, SOON), "a read without a server");
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
    assert!(poll_until(SOON, || can_read(&disk, SOON)), "it does not recover");
    server.signal(Signal::SIGSTOP);
    let reader = std::thread::spawn(move || can_read(&disk, SOON));
    mount.signal(Signal::SIGTERM);
    mount.wait_unmounted();
    reader.join().unwrap();
    server.signal(Signal::SIGCONT);
}

#[test]
fn a_server_that_is_gone_is_an_error_after_the_deadline_and_another_size_at_once() {
    if !ready() {
        return;
    }
    let scratch = Scratch::new();
    let server = Server::nbdkit(&scratch, &["memory", "8M"]);
    let log = scratch.path("log");
    let mount = scratch.mount().arg(server.uri()).arg("timeout=1").arg(format!("--log-file={}", log.display())).start();
    let disk = mount.file("disk.raw");
    server.crash();
    assert!(!can_read(&disk, SOON));
    let larger = Server::nbdkit(&scratch, &["memory", "9M"]);
    assert!(!can_read(&disk, SOON));
    let said = || fs::read_to_string(&log).unwrap();
    assert!(poll_until(SOON, || {
        can_read(&disk, SOON);
        said().contains("its size was 8388608 bytes and is 9437184 now")
    }));
    assert_eq!(fs::metadata(&disk).unwrap().len(), 8 << 20);
    larger.crash();
    let _same = Server::nbdkit(&scratch, &["memory", "8M"]);
    assert!(poll_until(SOON, || can_read(&disk, SOON)), "{}", said());
}

#[test]
fn a_mount_waits_for_its_server_as_often_as_retry_says() {
    if !ready() {
        return;
    }
    let scratch = Scratch::new();
    let uri = format!("nbd+unix:///?socket={}", scratch.path("s").display());
    scratch.mount().arg(&uri).refused(1).one_error(1, &["connect", "s"]);
    // a server that comes up late
    let script = format!("sleep 0.5; exec nbdkit -f -U {} memory 1M", scratch.path("s").display());
    let child = Command::new("sh").args(["-c", &script]).stdin(Stdio::null()).spawn().unwrap();
    let _server = Server { child, socket: scratch.path("s") };
    let mount = scratch.mount().arg(&uri).arg("retry=100").start();
    assert!(can_read(&mount.file("disk.raw"), SOON));
}

#[test]
fn garbage_and_lies_in_place_of_an_answer_are_errors() {
    if !need_fuse() {
        return;
    }
    let scratch = Scratch::new();
    let greeting = b"NBDMAGICIHAVEOPT\x00\x03";
    // a size that no file can have, told in the oldest variant of the protocol
    let lie = [&b"NBDMAGIC\x00\x00\x42\x02\x81\x86\x12\x53"[..], &[0xff; 8], &[0; 128]].concat();
    for answer in [noise(4096, 1), [&greeting[..], &noise(4096, 2)].concat(), lie, Vec::new()] {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        let liar = std::thread::spawn(move || {
            let (mut stream, _) = listener.accept().unwrap();
            let _ = stream.write_all(&answer);
            let _ = stream.shutdown(std::net::Shutdown::Write);
            let _ = stream.read_to_end(&mut Vec::new());
        });
        let start = scratch.mount().arg("hostname=127.0.0.1").arg(format!("port={port}")).arg("timeout=5");
        start.refused(1).one_error(1, &["127.0.0.1"]);
        liar.join().unwrap();
    }
}

#[test]
fn every_export_is_a_file_and_no_name_leaves_the_folder() {
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
    let names = ["..%2F..%2Fetc%2Fpasswd.raw", "...raw", "a%252Fb.raw", "a%2Fb.raw", "vm1.raw", "vm1~2.raw"];
    assert_eq!(mount.names(), names);
    for (name, export) in [("a%2Fb.raw", "a/b"), ("vm1.raw", "vm1"), ("vm1~2.raw", "vm1.raw"), ("...raw", "..")] {
        assert_eq!(fs::metadata(mount.file(name)).unwrap().len(), 1 << 20);
        let read = read_range(&mount.file(name), 0, export.len());
        assert_eq!(String::from_utf8_lossy(&read), export, "{name}");
    }
    let listed = scratch.vmdkfuse().args(["--list", "--json"]).arg(server.uri()).run().ok().json();
    let exports: Vec<_> = listed[0]["exports"].as_array().unwrap().iter().map(|e| e["export"].clone()).collect();
    assert_eq!(exports, ["../../etc/passwd", "a/b", "a%2Fb", "vm1", "vm1.raw", ".."]);
    assert_eq!(listed[0]["exports"][3]["size"], 1 << 20);
}

#[test]
fn info_tells_what_nbdinfo_does() {
    if !ready() || !need("nbdinfo") {
        return;
    }
    let scratch = Scratch::new();
    let sizes = ["blocksize-minimum=4096", "blocksize-preferred=64K", "blocksize-maximum=1M"];
    let server = Server::nbdkit(&scratch, &[&["--filter=blocksize-policy", "memory", "5M"][..], &sizes].concat());
    let ours = scratch.vmdkfuse().args(["--info", "--json"]).arg(server.uri()).run().ok().json();
    let theirs = Cmd::new("nbdinfo").arg("--json").arg(server.uri()).run().ok().json();
    let (export, wanted) = (&ours[0]["exports"][0], &theirs["exports"][0]);
    assert_eq!(export["size"], wanted["export-size"]);
    assert_eq!(export["contexts"], wanted["contexts"]);
    let sizes = ["block_size_minimum", "block_size_preferred", "block_size_maximum"].map(|k| wanted[k].clone());
    assert_eq!(export["block_sizes"], serde_json::Value::from(sizes.to_vec()));
    for flag in export["flags"].as_array().unwrap() {
        assert_eq!(flag[1], wanted[flag[0].as_str().unwrap()], "{flag}");
    }
    assert_eq!(ours[0]["protocol"], theirs["protocol"]);
    let text = scratch.vmdkfuse().arg("--info").arg(server.uri()).run().ok().stdout;
    assert!(text.contains("size             5242880 bytes") && text.contains("can_multi_conn   yes"), "{text}");
}

/// Makes an authority in `dir`, and certificates by it in the same folder.
fn certificates(dir: &Path) {
    let write = |name: &str, text: &str| fs::write(dir.join(name), text).unwrap();
    write("ca.info", "cn = Test\nca\ncert_signing_key\nexpiration_days = 2\n");
    write("server.info", "cn = localhost\ndns_name = localhost\ntls_www_server\nexpiration_days = 2\n");
    let certtool = |words: &[&str], out: &str| {
        Cmd::new("certtool").args(words).arg("--outfile").arg(out).dir(dir).run().ok();
    };
    let key = ["--generate-privkey", "--key-type=ecdsa"];
    certtool(&key, "ca-key.pem");
    let authority = ["--generate-self-signed", "--load-privkey", "ca-key.pem", "--template", "ca.info"];
    certtool(&authority, "ca-cert.pem");
    certtool(&key, "server-key.pem");
    let by = ["--load-ca-certificate", "ca-cert.pem", "--load-ca-privkey", "ca-key.pem"];
    let server = ["--generate-certificate", "--load-privkey", "server-key.pem", "--template", "server.info"];
    certtool(&[&server[..], &by[..]].concat(), "server-cert.pem");
}

#[test]
fn tls_by_certificates_is_verified() {
    if !ready() || !need("certtool") {
        return;
    }
    let scratch = Scratch::new();
    let (good, bad) = (scratch.mkdir("good"), scratch.mkdir("bad"));
    certificates(&good);
    certificates(&bad);
    let dir = format!("--tls-certificates={}", good.display());
    let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port().to_string();
    let mut command = Command::new("nbdkit");
    command.args(["-f", "--exit-with-parent", "-i", "127.0.0.1", "-p", &port, "--tls=require", &dir, "pattern", "1M"]);
    command.stdin(Stdio::null()).stderr(Stdio::null());
    let child = command.spawn().unwrap();
    let _server = Server { child, socket: PathBuf::new() };
    assert!(poll_until(SOON, || std::net::TcpStream::connect(format!("127.0.0.1:{port}")).is_ok()));
    let uri = format!("nbds://localhost:{port}");
    let with = |dir: &Path| scratch.mount().arg(&uri).arg(format!("tls-certificates={}", dir.display()));
    let mount = with(&good).start();
    assert_eq!(read_range(&mount.file("disk.raw"), 8, 8), 8u64.to_be_bytes());
    mount.unmount();
    with(&bad).refused(1).one_error(1, &["localhost", "certificate"]);
    with(&bad).arg("tls-verify=no").start().unmount();
    // the server demands it
    scratch.mount().arg(format!("nbd://localhost:{port}")).refused(1);
}

#[test]
fn tls_by_a_shared_key_and_a_server_without_tls_is_refused() {
    if !ready() || !need("psktool") {
        return;
    }
    let scratch = Scratch::new();
    let keys = scratch.path("keys");
    let wrong = scratch.write("wrong", "alice:00112233445566778899aabbccddeeff\n");
    Cmd::new("psktool").args(["-u", "alice", "-p"]).arg(&keys).run().ok();
    let psk = format!("--tls-psk={}", keys.display());
    let server = Server::nbdkit(&scratch, &["--tls=require", &psk, "pattern", "1M"]);
    let log = scratch.path("log");
    let with = |keys: &Path| {
        let mount = scratch.mount().arg(format!("socket={}", server.socket.display()));
        let mount = mount.arg("tls=require").arg("tls-username=alice").arg(format!("tls-psk={}", keys.display()));
        mount.arg("-vvv").arg(format!("--log-file={}", log.display()))
    };
    let mount = with(&keys).start();
    assert_eq!(read_range(&mount.file("disk.raw"), 16, 8), 16u64.to_be_bytes());
    mount.unmount();
    with(&wrong).refused(1);
    let key = fs::read_to_string(&keys).unwrap();
    let secret = key.trim().rsplit(':').next().unwrap();
    assert!(!fs::read_to_string(&log).unwrap().contains(secret), "the key is in the log");
    drop(server);
    let plain = Server::nbdkit(&scratch, &["pattern", "1M"]);
    scratch.mount().arg(plain.uri()).arg("tls=require").refused(1).one_error(1, &["TLS"]);
    scratch.mount().arg(plain.uri()).arg("tls=on").start().unmount();
}

#[test]
fn nbd_server_is_read_and_written() {
    if !ready() || !need("nbd-server") {
        return;
    }
    let scratch = Scratch::new();
    let disk = scratch.write("disk", noise(8 << 20, 4));
    let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let config = format!(
        "[generic]\nlistenaddr = 127.0.0.1\nport = {port}\nallowlist = true\n[vm]\nexportname = {}\nflush = true\n\
         fua = true\ntrim = false\n",
        disk.display()
    );
    let config = scratch.write("config", config);
    let mut command = Command::new("nbd-server");
    command.arg("-d").arg("-C").arg(config).env("PATH", "/usr/sbin:/sbin:/usr/bin:/bin");
    let child = command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
    let _server = Server { child, socket: PathBuf::new() };
    // it serves the first client only, so nobody else may look whether it is up
    let start = scratch.mount().arg("hostname=127.0.0.1").arg(format!("port={port}")).arg("export=vm");
    let mount = start.arg("retry=20").start();
    let seen = mount.file("vm.raw");
    assert_same(&seen, &disk);
    let data = scratch.write("data", noise(2 << 20, 6));
    put(&data, &seen);
    assert_eq!(read_range(&disk, 0, 2 << 20), fs::read(&data).unwrap());
}

#[test]
fn a_socket_that_is_handed_over_is_used() {
    if !ready() {
        return;
    }
    let scratch = Scratch::new();
    let server = Server::nbdkit(&scratch, &["pattern", "1M"]);
    let code = "import os,socket,sys\ns=socket.socket(socket.AF_UNIX)\ns.connect(sys.argv[1])\nos.dup2(s.fileno(),9)\n\
                os.execv(sys.argv[2],sys.argv[2:])";
    let program = fuse_tests::harness::program();
    let socket = &server.socket;
    let shown = Cmd::new("python3").args(["-c", code]).arg(socket).arg(&program).args(["--info", "socket-fd=9"]).run();
    assert!(shown.ok().stdout.contains("size             1048576 bytes"));
    let refused = scratch.mount().arg("socket-fd=9").refused(1);
    refused.one_error(1, &["socket-fd=9"]);
}

#[test]
fn a_config_file_names_servers_by_socket_port_and_command_and_a_socket_that_is_handed_over() {
    if !ready() {
        return;
    }
    let scratch = Scratch::new();
    let server = Server::nbdkit(&scratch, &["pattern", "1M"]);
    let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let mut command = Command::new("nbdkit");
    command.args(["-f", "--exit-with-parent", "-i", "127.0.0.1", "-p", &port.to_string(), "memory", "2M"]);
    let child = command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
    let _other = Server { child, socket: PathBuf::new() };
    // paths count from the folder of the file
    let text = format!(
        "retry = 50\n[[disk]]\nname = \"socket\"\nsocket = \"s\"\n[[disk]]\nhostname = \"127.0.0.1\"\nport = {port}\n\
         name = \"port\"\n[[disk]]\ncommand = \"nbdkit\"\narg = [\"memory\", \"3M\"]\nname = \"command\"\n"
    );
    let mount = scratch.mount().arg("--config").arg(scratch.write("vms.toml", text)).start();
    assert_eq!(mount.names(), ["command", "port", "socket"]);
    for (name, size) in [("socket", 1u64), ("port", 2), ("command", 3)] {
        assert_eq!(fs::metadata(mount.file(name)).unwrap().len(), size << 20, "{name}");
    }
    assert_eq!(read_range(&mount.file("socket"), 4096, 8), 4096u64.to_be_bytes());
    let data = scratch.write("data", noise(1 << 20, 12));
    for name in ["port", "command"] {
        put(&data, &mount.file(name));
        assert_eq!(read_range(&mount.file(name), 0, 1 << 20), fs::read(&data).unwrap(), "{name}");
    }
    let captive = children(mount.pid()).pop().expect("a server");
    mount.unmount();
    assert!(poll_until(SOON, || !is_running(captive)), "the server lives on");
    // a descriptor that only the file names is not closed at the start
    let code = "import os,socket,sys\ns=socket.socket(socket.AF_UNIX)\ns.connect(sys.argv[1])\nos.dup2(s.fileno(),9)\n\
                os.execv(sys.argv[2],sys.argv[2:])";
    let config = scratch.write("fd.toml", "[[disk]]\nsocket-fd = 9\nname = \"fd\"\n");
    let mnt = scratch.mkdir("handed");
    let words = Cmd::new("python3").args(["-c", code]).arg(&server.socket).arg(fuse_tests::harness::program());
    words.arg("--config").arg(config).arg(&mnt).run().ok();
    let read = read_range(&mnt.join("fd"), 8, 8);
    Cmd::new("fusermount3").arg("-u").arg(&mnt).run().ok();
    assert_eq!(read, 8u64.to_be_bytes());
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
    assert_eq!(read_range(&mount.file("disk.raw"), 0, 1 << 20), fs::read(&data).unwrap());
    assert_eq!(read_range(&mount.file("disk.raw"), 4 << 20, 8), (4u64 << 20).to_be_bytes());
}

#[test]
fn slow_servers_and_their_errors_are_borne() {
    if !ready() {
        return;
    }
    let scratch = Scratch::new();
    let errors = scratch.path("errors");
    let word = format!("error-pread-file={}", errors.display());
    let filters = ["--filter=delay", "--filter=rate", "--filter=error", "pattern", "4M", "rdelay=5ms", "rate=400M"];
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
