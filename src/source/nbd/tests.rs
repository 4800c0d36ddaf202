//! Tests of disks without a mount, against nbdkit as a captive server that ends with the disk.

mod lost;

use std::ffi::OsString;
use std::os::fd::AsFd;
use std::sync::mpsc;
use std::time::{Duration, Instant};

use super::NbdDisk;
use super::buffer_pool::Buffer;
use super::command::{Command, CommandKind};
use super::connect::Connector;
use super::connection::{Answer, Connection};
use super::poller::{PollUntil, Poller};
use nix::sys::eventfd::EventFd;

use crate::block::{BlockQueue, BlockRead, BlockWrite, CompletionPoller, Content, Lba, SECTOR, Stay};
use crate::config::{NbdAddress, NbdConfig};
use crate::error::ErrorKind;

/// Returns true if nbdkit is installed. Panics without it if `VMDKFUSE_REQUIRE=all`.
fn need_nbdkit() -> bool {
    let installed = std::process::Command::new("nbdkit")
        .arg("--version")
        .output()
        .is_ok_and(|o| o.status.success());
    let required = std::env::var("VMDKFUSE_REQUIRE").is_ok_and(|v| v == "all");
    assert!(
        installed || !required,
        "nbdkit is not installed and VMDKFUSE_REQUIRE=all"
    );
    if !installed {
        eprintln!("SKIPPED: nbdkit is not installed");
    }
    installed
}

/// Returns the configuration of a captive nbdkit with these arguments.
fn nbdkit(words: &[&str]) -> NbdConfig {
    let words = ["nbdkit", "-f", "--exit-with-parent"]
        .iter()
        .chain(words)
        .map(OsString::from)
        .collect();
    NbdConfig::new(NbdAddress::Command(words))
}

fn open(words: &[&str]) -> NbdDisk {
    NbdDisk::connect(&nbdkit(words), true).unwrap()
}

/// Returns the content of nbdkit's pattern plugin: each 8 bytes hold their own offset.
fn pattern(at: Lba, sectors: u64) -> Vec<u8> {
    let start = at.bytes();
    (start..start + sectors * SECTOR)
        .map(|b| (b & !7).to_be_bytes()[(b & 7) as usize])
        .collect()
}

/// Waits until `condition` returns true; panics after 60 s.
fn wait_until(condition: impl Fn() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(60);
    while !condition() {
        assert!(Instant::now() < deadline, "timed out");
        std::thread::yield_now();
    }
}

#[test]
fn reads_return_the_content_and_several_sockets_are_opened() {
    if !need_nbdkit() {
        return;
    }
    let disk = open(&["pattern", "64M"]);
    wait_until(|| disk.connections() == 4);
    let threads = (0..8u64).map(|i| {
        let disk = &disk;
        move || {
            let (mut at, mut buf) = (i * 97, vec![0; 64 * 512]);
            for _ in 0..50 {
                at = (at * 31 + 7) % (131_072 - 64);
                disk.read_at(Lba(at), &mut buf).unwrap();
                assert!(buf == pattern(Lba(at), 64), "sector {at}");
            }
        }
    });
    std::thread::scope(|scope| threads.for_each(|t| drop(scope.spawn(t))));
    assert_eq!(
        disk.read_at(Lba(131_072), &mut [0; 512]).unwrap_err().kind(),
        ErrorKind::OutOfRange
    );
}

/// Submits a read of the pattern and polls until `other` is readable. Returns the receiver of the result: true if the
/// content is right.
fn submit_read(disk: &NbdDisk, at: Lba, sectors: u64, other: &EventFd) -> mpsc::Receiver<bool> {
    let (sender, results) = mpsc::channel();
    let done = move |read: crate::error::Result<&[u8]>| {
        let _ = sender.send(read.is_ok_and(|bytes| bytes == pattern(at, sectors)));
    };
    disk.submit_read(at, sectors, Box::new(done));
    disk.poll_completions(Stay::Until(other.as_fd()));
    results
}

#[test]
fn regression_a_connection_is_idle_only_when_all_returned_commands_were_handled() {
    if !need_nbdkit() {
        return;
    }
    let config = nbdkit(&["memory", "1M"]);
    let connector = Connector::new(&config).unwrap();
    let deadline = Instant::now() + Duration::from_secs(60);
    let connection = Connection::new(1).unwrap();
    connection
        .add(connector.open(true, deadline, &|| false).unwrap().0)
        .unwrap();
    let command = Command::new(
        CommandKind::Flush,
        0,
        0,
        Buffer::default(),
        deadline,
        Box::new(|_, _| ()),
    );
    let (mut back, mut returned) = (Vec::new(), 0);
    connection.submit(command, &mut back);
    // With a lost connection the thread that waits until it is idle then replays the changes that it knows of. A
    // returned command that was not handled yet would be missing.
    let mut handle = |back: &mut Vec<Answer>| {
        assert!(
            back.is_empty() || !connection.is_idle(),
            "idle before the returned commands were handled"
        );
        let _guard = connection.completion_guard(back.len());
        returned += back.drain(..).count();
    };
    handle(&mut back);
    Poller::acquire(&connection)
        .unwrap()
        .poll_sockets(PollUntil::Idle, handle);
    assert!(returned == 1 && connection.is_idle());
}

/// Interval of the check that finds an answer for which no thread polls: `LAST_RESORT` of `session/serve.rs`.
const PERIODIC_CHECK: Duration = Duration::from_millis(500);

#[test]
fn regression_another_thread_polls_each_time_a_caller_leaves_its_command_in_flight() {
    if !need_nbdkit() {
        return;
    }
    let disk = open(&["pattern", "64M"]);
    let called = EventFd::from_value(1).unwrap();
    let mut late = 0;
    for i in 0..200 {
        let start = Instant::now();
        let results = submit_read(&disk, Lba(i * 8), 8, &called);
        assert!(results.recv_timeout(Duration::from_secs(60)).unwrap());
        late += usize::from(start.elapsed() >= PERIODIC_CHECK);
    }
    // Before the fix each read took that long, until a periodic check found the answer. On a busy machine a few do.
    assert!(late < 100, "no other thread polled for {late} reads");
}

#[test]
fn long_and_small_requests_share_the_sockets() {
    if !need_nbdkit() {
        return;
    }
    let disk = open(&["pattern", "64M"]);
    wait_until(|| disk.connections() == 4);
    let called = EventFd::from_value(0).unwrap();
    // The server counts as far until a small read was fast, which may take some of them on a busy machine.
    wait_until(|| {
        for len in [8, 2048] {
            let read = submit_read(&disk, Lba(0), len, &called);
            assert!(read.recv_timeout(Duration::from_secs(60)).unwrap());
        }
        disk.carried() > 0
    });
    let mut at = 1;
    for round in 0..100 {
        let lens = [8, 2048, 1, 300, 2048, 64, 777, 2048, 8, 16];
        let results: Vec<_> = lens
            .iter()
            .map(|len| {
                at = (at * 31 + 7) % (131_072 - 2048);
                submit_read(&disk, Lba(at), *len, &called)
            })
            .collect();
        for (result, len) in results.into_iter().zip(lens) {
            assert!(
                result.recv_timeout(Duration::from_secs(60)).unwrap(),
                "{len} sectors in round {round}"
            );
        }
    }
    assert!(disk.carried() > 100, "bulk threads did not carry the long requests");
}

#[test]
fn writes_begin_and_end_at_any_byte_if_the_server_allows_it() {
    if !need_nbdkit() {
        return;
    }
    let disk = open(&["memory", "8M"]);
    assert_eq!(disk.write_alignment(), 1);
    let mut expected = vec![0u8; 8 << 20];
    let mut read = [0; 8 * 512];
    disk.read_at(Lba(0), &mut read).unwrap();
    wait_until(|| disk.connections() == 4);
    for (i, (offset, len)) in [
        (3, 5),
        (1000, 700_001),
        (512 * 9 - 1, 2),
        (4_000_001, 1 << 20),
        ((8 << 20) - 1, 1),
    ]
    .into_iter()
    .enumerate()
    {
        let data: Vec<u8> = (0..len).map(|b| (b % 251) as u8 ^ i as u8).collect();
        let (sender, results) = mpsc::channel();
        disk.submit_write(
            offset as u64,
            &data,
            false,
            Box::new(move |result| sender.send(result).unwrap()),
        );
        disk.poll_completions(Stay::No);
        results.recv_timeout(Duration::from_secs(60)).unwrap().unwrap();
        expected[offset..offset + len].copy_from_slice(&data);
    }
    let mut back = vec![0; 8 << 20];
    disk.read_at(Lba(0), &mut back).unwrap();
    assert!(back == expected);
    let (sender, results) = mpsc::channel();
    disk.submit_write(
        (8 << 20) - 1,
        &[1, 2],
        false,
        Box::new(move |result| sender.send(result).unwrap()),
    );
    assert_eq!(results.recv().unwrap().unwrap_err().kind(), ErrorKind::OutOfRange);
}

#[test]
fn a_size_that_is_not_a_multiple_of_512_is_rounded_up_and_its_tail_reads_as_zeroes() {
    if !need_nbdkit() {
        return;
    }
    let disk = open(&["memory", "1000"]);
    assert_eq!(disk.geometry().sectors, 2);
    let mut sector = [7; 512];
    disk.read_at(Lba(1), &mut sector).unwrap();
    assert_eq!(sector, [0; 512]);
    sector[..488].fill(1);
    disk.write_at(Lba(1), &sector).unwrap();
    let mut back = [9; 512];
    disk.read_at(Lba(1), &mut back).unwrap();
    assert_eq!(back, sector);
    // Data beyond the export can't be stored, which must be an error.
    sector[488] = 1;
    assert_eq!(
        disk.write_at(Lba(1), &sector).unwrap_err().kind(),
        ErrorKind::Os(libc::ENOSPC)
    );
    disk.zero(Lba(0)..Lba(2), true).unwrap();
    disk.flush().unwrap();
    disk.read_at(Lba(1), &mut back).unwrap();
    assert_eq!(back, [0; 512]);
}

#[test]
fn requests_obey_the_block_sizes_of_the_server() {
    if !need_nbdkit() {
        return;
    }
    let policy = [
        "--filter=blocksize-policy",
        "memory",
        "16M",
        "blocksize-error-policy=error",
    ];
    let sizes = [
        "blocksize-minimum=4096",
        "blocksize-preferred=64K",
        "blocksize-maximum=128K",
    ];
    let disk = open(&[&policy[..], &sizes[..]].concat());
    assert_eq!(disk.geometry().granule, 8);
    // A longer write is split at the maximum; the server refuses a longer command.
    let data: Vec<u8> = (0..1u32 << 20).map(|i| (i / 1000) as u8).collect();
    disk.write_at(Lba(8), &data).unwrap();
    let mut back = vec![0; 1 << 20];
    disk.read_at(Lba(8), &mut back).unwrap();
    assert!(back == data);
    disk.zero(Lba(16)..Lba(24), false).unwrap();
    disk.read_at(Lba(8), &mut back).unwrap();
    assert!(back[..4096] == data[..4096] && back[4096..8192] == [0; 4096] && back[8192..] == data[8192..]);
}

#[test]
fn holes_are_reported_and_changes_take_effect_at_once() {
    if !need_nbdkit() {
        return;
    }
    let disk = open(&["memory", "1T"]);
    let all = disk.geometry().sectors;
    assert_eq!(disk.content_at(Lba(0)).unwrap().0, Content::Hole);
    assert!(disk.is_zero(Lba(0), 1 << 20), "the answer is not cached");
    disk.write_at(Lba(1 << 20), &[1; 512]).unwrap();
    assert!(!disk.is_zero(Lba(1 << 20), 1));
    let mut at = 0;
    let mut data = 0;
    while at < all {
        let (content, sectors) = disk.content_at(Lba(at)).unwrap();
        data += if content == Content::Data { sectors } else { 0 };
        at += sectors;
    }
    assert!((1..1024).contains(&data), "{data} sectors of data");
    disk.zero(Lba(0)..Lba(all), true).unwrap();
    assert!(disk.content_at(Lba(1 << 20)).unwrap().0.is_zero());
}

#[test]
fn zeroes_are_written_as_data_if_the_server_has_no_command_for_them_or_a_slow_one() {
    if !need_nbdkit() {
        return;
    }
    for words in [
        &["--filter=nozero", "memory", "8M"][..],
        &["--filter=nozero", "memory", "8M", "zeromode=notrim"],
    ] {
        let disk = open(words);
        disk.write_at(Lba(0), &vec![1; 8 << 20]).unwrap();
        for unmap in [true, false] {
            disk.zero(Lba(100)..Lba(9000), unmap).unwrap();
            let mut back = vec![1; 8 << 20];
            disk.read_at(Lba(0), &mut back).unwrap();
            let expected = |i: usize| u8::from(!(100 * 512..9000 * 512).contains(&i));
            assert!(back.iter().enumerate().all(|(i, b)| *b == expected(i)), "{words:?}");
        }
    }
}

#[test]
fn an_error_of_the_server_fails_only_that_request() {
    if !need_nbdkit() {
        return;
    }
    let disk = open(&[
        "--filter=error",
        "memory",
        "8M",
        "error-pread=ENOSPC",
        "error-pread-rate=100%",
    ]);
    assert_eq!(
        disk.read_at(Lba(0), &mut [0; 512]).unwrap_err().kind(),
        ErrorKind::Os(libc::ENOSPC)
    );
    disk.write_at(Lba(0), &[1; 512]).unwrap();
    disk.flush().unwrap();
}

#[test]
fn a_failed_flush_is_reported_and_the_writes_are_replayed() {
    if !need_nbdkit() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let (file, failing) = (dir.path().join("disk"), dir.path().join("failing"));
    std::fs::File::create(&file).unwrap().set_len(1 << 20).unwrap();
    std::fs::write(&failing, "").unwrap();
    let (f, failing_now) = (file.display(), failing.display());
    let words = [
        "eval".to_owned(),
        "get_size=echo 1M".to_owned(),
        "can_write=exit 0".to_owned(),
        "can_flush=exit 0".to_owned(),
        format!("pread=dd if={f} iflag=skip_bytes,count_bytes skip=$4 count=$3"),
        format!("pwrite=dd of={f} conv=notrunc oflag=seek_bytes seek=$4"),
        format!("flush=if [ -e {failing_now} ]; then echo EIO lost >&2; exit 1; fi"),
    ];
    let disk = open(&words.each_ref().map(String::as_str));
    disk.write_at(Lba(3), &[5; 512]).unwrap();
    assert_eq!(disk.flush().unwrap_err().kind(), ErrorKind::Os(libc::EIO));
    // Simulates a server that loses the data that it could not write.
    std::fs::File::options()
        .write(true)
        .open(&file)
        .unwrap()
        .set_len(0)
        .unwrap();
    std::fs::File::options()
        .write(true)
        .open(&file)
        .unwrap()
        .set_len(1 << 20)
        .unwrap();
    assert!(disk.flush().is_err());
    std::fs::remove_file(&failing).unwrap();
    disk.flush().unwrap();
    assert_eq!(std::fs::read(&file).unwrap()[3 * 512..4 * 512], [5; 512]);
}

#[test]
fn an_unanswered_request_fails_at_its_deadline_and_the_disk_recovers() {
    if !need_nbdkit() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let gate = dir.path().join("gate");
    std::fs::write(&gate, "").unwrap();
    // Reads hang while the file exists.
    let script = format!(
        "pread=while [ -e {} ]; do sleep 0.05; done; dd if=/dev/zero bs=$3 count=1",
        gate.display()
    );
    let mut config = nbdkit(&["eval", "get_size=echo 1M", &script]);
    config.timeout = Some(Duration::from_secs(4));
    let disk = NbdDisk::connect(&config, false).unwrap();
    let e = disk.read_at(Lba(0), &mut [0; 512]).unwrap_err();
    assert_eq!(e.kind(), ErrorKind::Os(libc::EIO));
    assert!(e.to_string().contains("no answer within 4 s"), "{e}");
    std::fs::remove_file(&gate).unwrap();
    wait_until(|| disk.read_at(Lba(0), &mut [0; 512]).is_ok());
}

#[test]
fn a_disk_that_was_opened_read_only_or_whose_export_is_has_no_writer() {
    if !need_nbdkit() {
        return;
    }
    let disk = NbdDisk::connect(&nbdkit(&["memory", "1M"]), false).unwrap();
    assert!(disk.writer().is_none());
    assert_eq!(
        disk.write_at(Lba(0), &[0; 512]).unwrap_err().kind(),
        ErrorKind::ReadOnly
    );
    let disk = open(&["-r", "memory", "1M"]);
    assert!(disk.is_read_only() && disk.writer().is_none());
}

#[test]
fn a_full_replay_log_is_flushed_while_writes_continue() {
    if !need_nbdkit() {
        return;
    }
    let disk = open(&["--filter=stats", "memory", "512M", "statsfile=/dev/null"]);
    let data = vec![3; 1 << 20];
    for i in 0..300 {
        disk.write_at(Lba(i * 2048), &data).unwrap();
    }
    disk.flush().unwrap();
    let mut back = vec![0; 1 << 20];
    disk.read_at(Lba(299 * 2048), &mut back).unwrap();
    assert!(back == data);
}

#[test]
fn a_vsock_port_without_a_server_is_an_error() {
    let mut config = NbdConfig::new(NbdAddress::Vsock { cid: 1, port: Some(1) });
    config.timeout = Some(Duration::from_secs(1));
    let e = NbdDisk::connect(&config, false).unwrap_err().to_string();
    assert!(e.starts_with("NBD server vsock:1:1: "), "{e}");
}
