//! Tests of unflushed writes and queued commands when flushes fail, connections break or servers return errors.

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

use nix::sys::eventfd::{EfdFlags, EventFd};

use super::{PERIODIC_CHECK, nbdkit, need_nbdkit, open, submit_read, wait_until};
use crate::block::{BlockQueue, BlockRead, BlockWrite, CompletionPoller, Lba, Stay};
use crate::config::{NbdAddress, NbdConfig};
use crate::error::{ErrorKind, Result};
use crate::source::nbd::NbdDisk;
use crate::source::nbd::buffer_pool::Buffer;
use crate::source::nbd::command::{Command, CommandKind};
use crate::source::nbd::connect::Connector;
use crate::source::nbd::connection::Connection;
use crate::source::nbd::poller::{PollUntil, Poller};
use crate::source::nbd::unflushed::HARD_LIMIT;

/// Server whose operations (`pread`, `pwrite`, `flush`) are shell commands controlled by files: an operation creates
/// `began-…`, waits while `hold-…` exists, takes 2 s longer while `slow-…` exists, and fails while `fail-…` exists.
struct Scripted {
    dir: tempfile::TempDir,
    timeout: Duration,
}

impl Scripted {
    fn new(timeout: Duration) -> Self {
        let scripted = Self {
            dir: tempfile::tempdir().unwrap(),
            timeout,
        };
        scripted.forget();
        scripted
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn set(&self, name: &str) {
        std::fs::write(self.path(name), "").unwrap();
    }

    fn clear(&self, name: &str) {
        std::fs::remove_file(self.path(name)).unwrap();
    }

    fn has(&self, name: &str) -> bool {
        self.path(name).exists()
    }

    /// Clears the disk of the server, as if it had lost everything that was never flushed.
    fn forget(&self) {
        std::fs::write(self.path("disk"), vec![0; 1 << 20]).unwrap();
    }

    fn stored(&self, at: usize) -> [u8; 512] {
        std::fs::read(self.path("disk")).unwrap()[at..at + 512]
            .try_into()
            .unwrap()
    }

    /// Returns the number of connections that the server has accepted.
    fn connections(&self) -> usize {
        std::fs::read_to_string(self.path("opened"))
            .unwrap_or_default()
            .lines()
            .count()
    }

    /// Returns the configuration of an export of that size. `pwrite`: shell command for the written data.
    fn config(&self, size: &str, pwrite: &str) -> NbdConfig {
        let dir = self.dir.path().display();
        let controlled = |operation: &str, then: &str| {
            format!(
                "{operation}=cd {dir}; : >began-{operation}; while [ -e hold-{operation} ]; do sleep 0.02; done; \
                 if [ -e slow-{operation} ]; then sleep 2; fi; \
                 if [ -e fail-{operation} ]; then echo EIO meant >&2; exit 1; fi; {then}"
            )
        };
        let words = [
            "eval".to_owned(),
            "thread_model=echo parallel".to_owned(),
            format!("open=echo x >>{dir}/opened"),
            format!("get_size=echo {size}"),
            "can_write=exit 0".to_owned(),
            "can_flush=exit 0".to_owned(),
            controlled(
                "pread",
                "dd if=disk iflag=skip_bytes,count_bytes skip=$4 count=$3 status=none",
            ),
            controlled("pwrite", pwrite),
            controlled("flush", ""),
        ];
        let mut config = nbdkit(&words.each_ref().map(String::as_str));
        config.timeout = Some(self.timeout);
        config
    }

    fn open(&self) -> NbdDisk {
        let config = self.config("1M", "dd of=disk conv=notrunc oflag=seek_bytes seek=$4 status=none");
        NbdDisk::connect(&config, true).unwrap()
    }

    /// Opens a disk, writes to it, and lets a flush fail, which ends the connection. The writes await their replay.
    fn open_unflushed(&self, writes: &[(u64, [u8; 512])]) -> NbdDisk {
        let disk = self.open();
        for (at, bytes) in writes {
            disk.write_at(Lba(*at), bytes).unwrap();
        }
        self.set("fail-flush");
        assert_eq!(disk.flush().unwrap_err().kind(), ErrorKind::Os(libc::EIO));
        self.clear("fail-flush");
        for began in ["began-pwrite", "began-flush"] {
            self.clear(began);
        }
        disk
    }
}

#[test]
fn regression_a_flush_that_waits_for_the_connection_reports_a_failed_replay() {
    if !need_nbdkit() {
        return;
    }
    let server = Scripted::new(Duration::from_secs(20));
    let disk = server.open_unflushed(&[(3, [5; 512])]);
    server.forget();
    server.set("fail-pwrite");
    assert!(disk.flush().is_err(), "a lost write was not reported");
    assert!(disk.flush().is_err(), "the second flush reported it as durable");
}

#[test]
fn regression_a_flush_waits_for_the_replay() {
    if !need_nbdkit() {
        return;
    }
    let server = Scripted::new(Duration::from_secs(20));
    let disk = server.open_unflushed(&[(3, [5; 512])]);
    server.forget();
    server.set("hold-pwrite");
    thread::scope(|scope| {
        // Reconnects, and so starts the replay.
        scope.spawn(|| disk.read_at(Lba(0), &mut [0; 512]).unwrap());
        wait_until(|| server.has("began-pwrite"));
        let flush = scope.spawn(|| {
            disk.flush().unwrap();
            server.stored(3 * 512)
        });
        // The flush must not end while the replayed write hangs.
        let until = Instant::now() + Duration::from_millis(200);
        while Instant::now() < until && !flush.is_finished() {
            thread::yield_now();
        }
        server.clear("hold-pwrite");
        assert!(flush.join().unwrap() == [5; 512], "flushed before the replay");
    });
    assert!(server.has("began-flush"));
}

/// Bytes of a write that fills the replay log.
const WRITE: usize = 16 << 20;
/// Number of these writes that the log takes while no flush ends. The next one waits for space.
const WRITES: u64 = (HARD_LIMIT / WRITE) as u64;

/// Opens a disk, fills its replay log, and submits one more write. A flush hangs that covers only a small part of the log.
///
/// Returns the disk, a function that submits the write of that number, and the receiver of the results. The log takes
/// [`WRITES`] of them. They are large, because the server starts a shell for each.
fn open_with_full_log(server: &Scripted) -> (Arc<NbdDisk>, impl Fn(u64), mpsc::Receiver<bool>) {
    let disk = Arc::new(NbdDisk::connect(&server.config("1G", "cat >/dev/null"), true).unwrap());
    server.set("hold-flush");
    let (sender, results) = mpsc::channel();
    let write = {
        let disk = Arc::clone(&disk);
        move |at: u64| {
            let sender = sender.clone();
            let done = move |result: Result<()>| {
                let _ = sender.send(result.is_ok());
            };
            disk.submit_write(at * WRITE as u64, &vec![1; WRITE], false, Box::new(done));
            disk.poll_completions(Stay::No);
        }
    };
    (0..WRITES).for_each(&write);
    for i in 0..WRITES {
        assert!(results.recv_timeout(Duration::from_secs(60)).unwrap(), "write {i}");
    }
    write(WRITES);
    (disk, write, results)
}

#[test]
fn regression_writes_that_wait_for_space_in_the_replay_log_are_sent_after_the_flush() {
    if !need_nbdkit() {
        return;
    }
    let server = Scripted::new(Duration::from_secs(60));
    let (disk, _, results) = open_with_full_log(&server);
    assert!(
        results.recv_timeout(Duration::from_millis(300)).is_err(),
        "the write was not held back"
    );
    server.clear("hold-flush");
    assert!(
        results.recv_timeout(Duration::from_secs(60)).unwrap(),
        "the write was not sent after the flush"
    );
    disk.flush().unwrap();
}

#[test]
fn regression_writes_that_wait_for_space_fail_if_the_flush_hangs_and_do_not_block_later_writes() {
    if !need_nbdkit() {
        return;
    }
    let server = Scripted::new(Duration::from_secs(20));
    let (_disk, write, results) = open_with_full_log(&server);
    assert!(
        results.recv_timeout(Duration::from_secs(90)).is_ok(),
        "the write did not time out"
    );
    server.clear("hold-flush");
    // A command has a second only while the server counts as unreachable, and a busy machine may need longer.
    let freed = (1..60).any(|n| {
        write(WRITES + n);
        results.recv_timeout(Duration::from_secs(60)) == Ok(true)
    });
    assert!(freed, "no flush freed space");
}

#[test]
fn regression_a_command_that_times_out_during_a_long_replay_does_not_end_the_new_connection() {
    if !need_nbdkit() {
        return;
    }
    // Longer than one write of the replay takes on a busy machine, and shorter than three of them.
    let server = Scripted::new(Duration::from_secs(5));
    // The writes overlap, so they are replayed one after the other.
    let disk = server.open_unflushed(&[(3, [5; 512]), (3, [6; 512]), (3, [7; 512])]);
    server.forget();
    server.set("slow-pwrite");
    server.set("slow-pread");
    assert!(
        disk.read_at(Lba(0), &mut [0; 512]).is_err(),
        "the replay takes longer than the deadline of the read"
    );
    // Each of these reads waits for the connection for a second. The answer takes longer, but that of one of them is the
    // first of the new connection.
    wait_until(|| disk.read_at(Lba(0), &mut [0; 512]).is_ok());
    disk.flush().unwrap();
    assert!(server.stored(3 * 512) == [7; 512]);
    assert_eq!(
        server.connections(),
        2,
        "the new connection was retired for a command that was overdue before it was up"
    );
}

#[test]
fn regression_a_hung_read_fails_at_its_deadline_while_a_loop_continues_with_other_reads() {
    if !need_nbdkit() {
        return;
    }
    let hold = tempfile::NamedTempFile::new().unwrap();
    let script = format!(
        "pread=while [ $4 -ge 524288 ] && [ -e {} ]; do sleep 0.05; done; dd if=/dev/zero bs=$3 count=1 status=none",
        hold.path().display()
    );
    let mut config = nbdkit(&["eval", "get_size=echo 1M", "thread_model=echo parallel", &script]);
    config.timeout = Some(Duration::from_secs(4));
    let disk = NbdDisk::connect(&config, false).unwrap();
    let called = EventFd::from_flags(EfdFlags::EFD_NONBLOCK).unwrap();
    let over = AtomicBool::new(false);
    let ended = thread::scope(|scope| {
        scope.spawn(|| {
            while !over.load(Ordering::SeqCst) {
                called.write(1).unwrap();
                thread::sleep(Duration::from_millis(5));
            }
        });
        let (sender, results) = mpsc::channel();
        let done = move |read: Result<&[u8]>| sender.send(read.is_ok()).unwrap();
        disk.submit_read(Lba(1024), 1, Box::new(done));
        let until = Instant::now() + Duration::from_secs(60);
        let mut ended = None;
        while ended.is_none() && Instant::now() < until {
            drop(submit_read(&disk, Lba(0), 1, &called));
            let _ = called.read();
            ended = results.try_recv().ok();
        }
        over.store(true, Ordering::SeqCst);
        ended
    });
    hold.close().unwrap();
    assert_eq!(ended, Some(false), "the read did not time out");
}

#[test]
fn regression_another_thread_polls_for_a_command_whose_poller_was_asked_to_yield() {
    if !need_nbdkit() {
        return;
    }
    let script = "pread=[ $4 -lt 524288 ] || sleep 0.03; dd if=/dev/zero bs=$3 count=1 status=none";
    let disk = open(&["eval", "get_size=echo 1M", "thread_model=echo parallel", script]);
    let never = EventFd::new().unwrap();
    let mut late = 0;
    for _ in 0..100 {
        let start = Instant::now();
        let (sender, slow) = mpsc::channel();
        disk.submit_read(Lba(1024), 1, Box::new(move |read| sender.send(read.is_ok()).unwrap()));
        // The poller thread polls for this read. The caller that submits the next one asks it to yield.
        disk.poll_completions(Stay::No);
        thread::sleep(Duration::from_millis(1));
        let fast = submit_read(&disk, Lba(0), 1, &never);
        assert!(slow.recv_timeout(Duration::from_secs(60)).unwrap());
        fast.recv_timeout(Duration::from_secs(60)).unwrap();
        late += usize::from(start.elapsed() >= PERIODIC_CHECK);
    }
    // Before the fix each read took that long, until a periodic check found the answer. On a busy machine a few do.
    assert!(late < 50, "no other thread polled for {late} reads");
}

#[test]
fn regression_a_command_that_the_library_refuses_is_not_a_lost_connection() {
    if !need_nbdkit() {
        return;
    }
    let connector = Connector::new(&nbdkit(&["-r", "memory", "1M"])).unwrap();
    let deadline = Instant::now() + Duration::from_secs(60);
    let connection = Connection::new(1).unwrap();
    connection
        .add(connector.open(true, deadline, &|| false).unwrap().0)
        .unwrap();
    let submit = |kind| {
        let mut back = Vec::new();
        connection.submit(
            Command::new(kind, 0, 512, Buffer::default(), deadline, Box::new(|_, _| ())),
            &mut back,
        );
        if back.is_empty() {
            Poller::acquire(&connection)
                .unwrap()
                .poll_sockets(PollUntil::Idle, |returned| back.append(returned));
        }
        drop(connection.completion_guard(back.len()));
        back.pop().unwrap().1
    };
    assert_eq!(submit(CommandKind::Trim), Some(libc::EINVAL), "the export is read-only");
    assert_eq!(submit(CommandKind::Status), None);
    connection.fail();
    assert_eq!(submit(CommandKind::Status), Some(libc::ENOTCONN));
}

#[test]
fn regression_the_end_of_an_export_that_is_not_a_multiple_of_its_block_size_can_be_read() {
    if !need_nbdkit() {
        return;
    }
    let mut config = nbdkit(&[
        "--filter=blocksize-policy",
        "pattern",
        "10000",
        "blocksize-minimum=4096",
    ]);
    config.timeout = Some(Duration::from_secs(20));
    let disk = NbdDisk::connect(&config, false).unwrap();
    let mut tail = [0xee; 4 * 512];
    disk.read_at(Lba(16), &mut tail).unwrap();
    assert_eq!(tail[..8], 8192u64.to_be_bytes());
    assert_eq!(tail[10_000 - 8192 - 8..10_000 - 8192], 9992u64.to_be_bytes());
    assert!(tail[10_000 - 8192..].iter().all(|b| *b == 0));
}

#[test]
fn regression_a_completion_that_panics_does_not_affect_other_requests() {
    if !need_nbdkit() {
        return;
    }
    let disk = open(&["memory", "1M"]);
    for _ in 0..3 {
        disk.submit_read(Lba(0), 1, Box::new(|_| panic!("intended panic")));
        disk.write_at(Lba(1), &[3; 512]).unwrap();
        disk.flush().unwrap();
    }
    let mut back = [0; 512];
    disk.read_at(Lba(1), &mut back).unwrap();
    assert!(back == [3; 512]);
}

/// Starts a server of the oldest protocol variant, with an export of 1 MiB, that calls `at_command` with the first
/// command of a connection and then closes it. Returns its configuration and the number of accepted connections.
fn oldest_variant(at_command: fn(TcpStream, [u8; 28])) -> (NbdConfig, Arc<AtomicUsize>) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    let accepted = Arc::new(AtomicUsize::new(0));
    let count = Arc::clone(&accepted);
    thread::spawn(move || {
        for stream in listener.incoming().map_while(std::result::Result::ok) {
            count.fetch_add(1, Ordering::SeqCst);
            thread::spawn(move || {
                let mut stream = stream;
                let size = (1u64 << 20).to_be_bytes();
                // Flags: NBD_FLAG_HAS_FLAGS only.
                let hello = [
                    &b"NBDMAGIC\x00\x00\x42\x02\x81\x86\x12\x53"[..],
                    &size,
                    &[0, 0, 0, 1],
                    &[0; 124],
                ]
                .concat();
                let mut command = [0; 28];
                if stream.write_all(&hello).is_ok() && stream.read_exact(&mut command).is_ok() {
                    at_command(stream, command);
                }
            });
        }
    });
    let mut config = NbdConfig::new(NbdAddress::Tcp {
        host: "127.0.0.1".into(),
        port: Some(port.to_string()),
    });
    config.timeout = Some(Duration::from_secs(2));
    (config, accepted)
}

#[test]
fn regression_reconnects_back_off_if_the_server_closes_the_connection_at_each_command() {
    let (config, accepted) = oldest_variant(|_, _| ());
    let disk = NbdDisk::connect(&config, false).unwrap();
    assert!(disk.read_at(Lba(0), &mut [0; 512]).is_err());
    let calls = accepted.load(Ordering::SeqCst);
    assert!((2..20).contains(&calls), "{calls} connections in two seconds");
}

#[test]
fn regression_reconnects_back_off_if_the_server_answers_each_command_with_eshutdown() {
    let (config, accepted) = oldest_variant(|mut stream, command| {
        let reply = [
            &[0x67, 0x44, 0x66, 0x98, 0, 0, 0, libc::ESHUTDOWN as u8],
            &command[8..16],
        ]
        .concat();
        let _ = stream.write_all(&reply);
    });
    let disk = NbdDisk::connect(&config, false).unwrap();
    assert!(disk.read_at(Lba(0), &mut [0; 512]).is_err());
    let calls = accepted.load(Ordering::SeqCst);
    assert!((2..20).contains(&calls), "{calls} connections in two seconds");
}

/// Starts a server of the current protocol variant with structured replies, whose answers to reads lack the second
/// half. `twice`: it sends the first half a second time instead.
fn half_answering(twice: bool) -> NbdConfig {
    const OPTION_REPLY: &[u8] = &0x0003_e889_0455_65a9u64.to_be_bytes();
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    let serve = move |mut stream: TcpStream| -> std::io::Result<()> {
        stream.write_all(b"NBDMAGICIHAVEOPT\x00\x03")?;
        stream.read_exact(&mut [0; 4])?;
        loop {
            let mut head = [0; 16];
            stream.read_exact(&mut head)?;
            let option = &head[8..12];
            let len = u32::from_be_bytes(head[12..].try_into().unwrap());
            stream.read_exact(&mut vec![0; len as usize])?;
            let mut reply = |kind: u32, data: &[u8]| {
                let len = data.len() as u32;
                stream.write_all(&[OPTION_REPLY, option, &kind.to_be_bytes(), &len.to_be_bytes(), data].concat())
            };
            match option[3] {
                // NBD_OPT_GO: NBD_REP_INFO with an export of 1 MiB, then NBD_REP_ACK.
                7 => {
                    reply(3, &[&[0, 0][..], &(1u64 << 20).to_be_bytes(), &[0, 1]].concat())?;
                    reply(1, &[])?;
                    break;
                }
                // NBD_OPT_STRUCTURED_REPLY: NBD_REP_ACK. Everything else: NBD_REP_ERR_UNSUP.
                8 => reply(1, &[])?,
                _ => reply(0x8000_0001, &[])?,
            }
        }
        loop {
            let mut command = [0; 28];
            stream.read_exact(&mut command)?;
            let len = u32::from_be_bytes(command[24..].try_into().unwrap()) / 2;
            for last in if twice { &[0, 1][..] } else { &[1] } {
                let head = [0x66, 0x8e, 0x33, 0xef, 0, *last, 0, 1];
                let head = [&head[..], &command[8..16], &(len + 8).to_be_bytes()].concat();
                stream.write_all(&[&head[..], &command[16..24], &vec![0x77; len as usize]].concat())?;
            }
        }
    };
    thread::spawn(move || {
        for stream in listener.incoming().map_while(std::result::Result::ok) {
            thread::spawn(move || drop(serve(stream)));
        }
    });
    let mut config = NbdConfig::new(NbdAddress::Tcp {
        host: "127.0.0.1".into(),
        port: Some(port.to_string()),
    });
    config.timeout = Some(Duration::from_secs(2));
    config
}

#[test]
fn regression_an_incomplete_answer_to_a_read_is_an_error() {
    for twice in [false, true] {
        let disk = NbdDisk::connect(&half_answering(twice), false).unwrap();
        let e = disk.read_at(Lba(0), &mut [0; 1024]).unwrap_err();
        assert_eq!(e.kind(), ErrorKind::Os(libc::EPROTO), "{e}");
    }
}
