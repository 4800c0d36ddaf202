//! Flushes and FUA: what was made durable is, also by a server that starts anew.

use std::fs;
use std::io::Read;
use std::path::Path;
use std::process::{Child, Command, Stdio};

use fuse_tests::harness::{Cmd, Scratch, poll_until, read_range, sha256};

use crate::{SOON, Server, noise, ready};

/// A process that has written to a file and holds it open. Not this one: each program that another test starts would close
/// the file once, and so flush it.
struct Writer(Child);

impl Writer {
    /// Starts it; `code` is Python that writes to `f`. It has been run when this returns.
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

    /// Has it flush the file, which must work, and end.
    fn fsync(mut self) {
        drop(self.0.stdin.take());
        assert!(self.0.wait().unwrap().success(), "fsync");
    }
}

impl Drop for Writer {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// What nbdkit's log filter has seen: writes, how many of them with FUA, and flushes.
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

/// `dd` of so many blocks to a file that is opened with O_DSYNC or O_SYNC.
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
    let code = format!(
        "d=open('{}','rb').read()\nfor at in range(0,len(d),65536): os.pwrite(f,d[at:at+65536],at)",
        data.display()
    );
    let writer = Writer::start(&code, &mount.file("disk.raw"));
    server.crash();
    // a machine that went down with what it had not written
    fs::write(&disk, vec![0; 4 << 20]).unwrap();
    let _server = Server::nbdkit(&scratch, &["file", &file]);
    writer.fsync();
    assert_eq!(sha256(&disk), sha256(&data));
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
        assert_eq!(
            logged(&log),
            (8, 8, 0),
            "{flag}: one write with FUA each, and nothing to flush at the close"
        );
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
    write_synced(&data, &mount.file("disk.raw"), "dsync", "4k", 8)
        .run()
        .ok();
    assert_eq!(logged(&log), (8, 0, 8), "a write and a flush each");
    assert_eq!(
        read_range(&mount.file("disk.raw"), 0, 32 << 10),
        fs::read(&data).unwrap()[..32 << 10]
    );
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
fn a_durable_write_over_an_unflushed_one_is_not_undone_by_a_restart() {
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
    // what was durable is there, the rest is not
    fs::write(
        &disk,
        [vec![0; 4096], vec![b'B'; 4096], vec![0; (1 << 20) - 8192]].concat(),
    )
    .unwrap();
    let _server = Server::nbdkit(&scratch, &["file", &file]);
    writer.fsync();
    assert!(read_range(&disk, 0, 8192) == [vec![b'A'; 4096], vec![b'B'; 4096]].concat());
}
