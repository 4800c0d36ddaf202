//! Durability: flushes and FUA, also over restarts of the server.

use std::fs;
use std::io::Read;
use std::path::Path;
use std::process::{Child, Command, Stdio};

use fuse_tests::harness::{Cmd, Scratch, poll_until, read_range, sha256};

use crate::{SOON, Server, noise, ready};

/// Process that has written to a file and holds it open. The test itself must not hold it: each program that another
/// test starts inherits the descriptor until exec, and closing that copy would flush the file.
struct Writer(Child);

impl Writer {
    /// Starts the process and waits until it has run `code`, which is Python that writes to the descriptor `f`.
    fn start(code: &str, file: &Path) -> Self {
        let code = format!(
            "import os,sys; f=os.open(sys.argv[1],os.O_WRONLY)\n{code}\nprint('written',flush=True); sys.stdin.readline(); \
             os.fsync(f)"
        );
        let mut python = Command::new("python3");
        python
            .args(["-c", &code])
            .arg(file)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped());
        let mut writer = Self(python.spawn().unwrap());
        writer.0.stdout.as_mut().unwrap().read_exact(&mut [0; 7]).unwrap();
        writer
    }

    /// Lets the process flush the file, which must succeed, and waits until it has exited.
    fn fsync(self) {
        assert!(self.fsync_result(), "fsync");
    }

    /// Lets the process flush the file, and waits until it has exited. Returns true if the flush succeeded.
    fn fsync_result(mut self) -> bool {
        drop(self.0.stdin.take());
        self.0.wait().unwrap().success()
    }
}

impl Drop for Writer {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Returns the numbers of writes, of writes with FUA, and of flushes in the log of nbdkit's log filter.
fn logged(log: &Path) -> (usize, usize, usize) {
    let text = fs::read_to_string(log).unwrap_or_default();
    let writes = text.lines().filter(|line| line.contains(" Write id="));
    let durable = writes.clone().filter(|line| line.contains("fua=1"));
    (
        writes.count(),
        durable.count(),
        text.lines().filter(|line| line.contains(" Flush id=")).count(),
    )
}

/// Returns a `dd` command that copies `count` blocks to a file that it opens with O_DSYNC or O_SYNC.
fn write_synced(from: &Path, to: &Path, flag: &str, block: &str, count: usize) -> Cmd {
    let (input, output) = (format!("if={}", from.display()), format!("of={}", to.display()));
    let words = [format!("bs={block}"), format!("count={count}"), format!("oflag={flag}")];
    Cmd::new("dd")
        .args([&input, &output])
        .args(&words)
        .args(["conv=notrunc", "status=none"])
        .deadline(SOON)
}

#[test]
fn unflushed_writes_are_replayed_to_a_restarted_server_that_lost_them() {
    if !ready() {
        return;
    }
    let scratch = Scratch::new();
    let disk = scratch.write("disk", vec![0; 4 << 20]);
    let file = format!("file={}", disk.display());
    let server = Server::nbdkit(&scratch, &["file", &file]);
    let mount = scratch.mount().arg(server.uri()).arg("cache=none").start();
    let data = scratch.write("data", noise(4 << 20, 11));
    let code = format!(
        "d=open('{}','rb').read()\nfor at in range(0,len(d),65536): os.pwrite(f,d[at:at+65536],at)",
        data.display()
    );
    let writer = Writer::start(&code, &mount.file("disk.raw"));
    server.crash();
    // Simulates a machine that went down before it had written anything to its disk.
    fs::write(&disk, vec![0; 4 << 20]).unwrap();
    let _server = Server::nbdkit(&scratch, &["file", &file]);
    writer.fsync();
    assert_eq!(sha256(&disk), sha256(&data));
}

#[test]
fn unflushed_writes_are_not_replayed_into_another_disk() {
    if !ready() {
        return;
    }
    let scratch = Scratch::new();
    let (disk, other) = (
        scratch.write("disk", noise(4 << 20, 17)),
        scratch.write("other", noise(4 << 20, 19)),
    );
    let log = scratch.path("log");
    let server = Server::nbdkit(&scratch, &["file", &format!("file={}", disk.display())]);
    let mount = scratch
        .mount()
        .arg(server.uri())
        .arg("cache=none")
        .arg("timeout=15")
        .arg(format!("--log-file={}", log.display()))
        .start();
    let writer = Writer::start("os.pwrite(f,b'w'*65536,1<<19)", &mount.file("disk.raw"));
    server.crash();
    // The same address, the same size, another disk.
    let _server = Server::nbdkit(&scratch, &["file", &format!("file={}", other.display())]);
    assert!(!writer.fsync_result(), "the writes are lost, so fsync must fail");
    assert_eq!(
        fs::read(&other).unwrap(),
        noise(4 << 20, 19),
        "the other disk was written to"
    );
    let text = fs::read_to_string(&log).unwrap();
    assert!(text.contains("another disk"), "{text}");
}

#[test]
fn a_synchronous_write_is_one_command_with_fua_if_the_server_has_it_or_else_is_followed_by_a_flush() {
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
        assert_eq!(
            logged(&log),
            (8, 8, 0),
            "{flag}: one write with FUA for each block, and nothing to flush on close"
        );
        // A write of several commands is followed by one flush instead: the server would sync for each FUA command.
        write_synced(&data, &mount.file("disk.raw"), flag, "1M", 1).run().ok();
        let (writes, durable, flushes) = logged(&log);
        assert!(writes > 9 && flushes >= 1, "{flag}: {:?}", (writes, durable, flushes));
        assert_eq!(durable, 8, "{flag}");
        mount.unmount();
    }
    // The fua filter removes FUA from the abilities of the server.
    let server = Server::nbdkit(&scratch, &["--filter=log", "--filter=fua", "memory", "8M", &logfile]);
    let mount = scratch.mount().arg(server.uri()).start();
    write_synced(&data, &mount.file("disk.raw"), "dsync", "4k", 8)
        .run()
        .ok();
    assert_eq!(logged(&log), (8, 0, 8), "one write and one flush for each block");
    assert_eq!(
        read_range(&mount.file("disk.raw"), 0, 32 << 10),
        fs::read(&data).unwrap()[..32 << 10]
    );
}

#[test]
fn an_unanswered_fua_write_is_sent_again_with_fua() {
    if !ready() {
        return;
    }
    let scratch = Scratch::new();
    let disk = scratch.write("disk", vec![0; 1 << 20]);
    let (first, second) = (scratch.path("first"), scratch.path("second"));
    let file = format!("file={}", disk.display());
    let log = |path: &Path| format!("logfile={}", path.display());
    // This server receives the write and never answers it.
    let slow = [
        "--filter=log",
        "--filter=delay",
        "file",
        &file,
        &log(&first),
        "wdelay=1000",
    ];
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
fn replay_does_not_overwrite_a_fua_write_over_an_unflushed_write() {
    if !ready() {
        return;
    }
    let scratch = Scratch::new();
    let disk = scratch.write("disk", vec![0; 1 << 20]);
    let file = format!("file={}", disk.display());
    let server = Server::nbdkit(&scratch, &["file", &file]);
    let mount = scratch.mount().arg(server.uri()).arg("cache=none").start();
    let code = "d=os.open(sys.argv[1],os.O_WRONLY|os.O_DSYNC)\nos.pwrite(f,b'A'*8192,0); os.pwrite(d,b'B'*4096,4096)";
    let writer = Writer::start(code, &mount.file("disk.raw"));
    server.crash();
    // Simulates a server that lost everything except the durable write.
    fs::write(
        &disk,
        [vec![0; 4096], vec![b'B'; 4096], vec![0; (1 << 20) - 8192]].concat(),
    )
    .unwrap();
    let _server = Server::nbdkit(&scratch, &["file", &file]);
    writer.fsync();
    assert!(read_range(&disk, 0, 8192) == [vec![b'A'; 4096], vec![b'B'; 4096]].concat());
}
