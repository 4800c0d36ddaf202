//! Disks of real servers, without a mount: nbdkit by a command that ends with the disk.

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
use super::poller::PollUntil;
use nix::sys::eventfd::EventFd;

use crate::block::{BlockQueue, BlockRead, BlockWrite, Content, Lba, SECTOR, Stay};
use crate::config::{NbdAddress, NbdConfig};
use crate::error::ErrorKind;

/// Whether nbdkit is there; where everything is required its absence is a failure.
fn need_nbdkit() -> bool {
    let there = std::process::Command::new("nbdkit")
        .arg("--version")
        .output()
        .is_ok_and(|o| o.status.success());
    let all = std::env::var("VMDKFUSE_REQUIRE").is_ok_and(|v| v == "all");
    assert!(there || !all, "nbdkit is not installed and VMDKFUSE_REQUIRE=all");
    if !there {
        eprintln!("SKIPPED: nbdkit is not installed");
    }
    there
}

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

fn pattern(at: Lba, sectors: u64) -> Vec<u8> {
    let start = at.bytes();
    (start..start + sectors * SECTOR)
        .map(|b| (b & !7).to_be_bytes()[(b & 7) as usize])
        .collect()
}

fn wait_until(what: impl Fn() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(20);
    while !what() {
        assert!(Instant::now() < deadline, "it did not happen");
        std::thread::yield_now();
    }
}

#[test]
fn reads_are_exact_and_several_connections_come_up() {
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

/// Begins a read, and serves until `other` is readable. Where the result comes.
fn begin(disk: &NbdDisk, at: Lba, sectors: u64, other: &EventFd) -> mpsc::Receiver<bool> {
    let (tell, on_completions) = mpsc::channel();
    let done = move |read: crate::error::Result<&[u8]>| {
        let _ = tell.send(read.is_ok_and(|bytes| bytes == pattern(at, sectors)));
    };
    disk.submit_read(at, sectors, Box::new(done));
    disk.poll_completions(Stay::Until(other.as_fd()));
    on_completions
}

#[test]
fn regression_a_generation_is_idle_only_when_what_came_back_was_dealt_with() {
    if !need_nbdkit() {
        return;
    }
    let config = nbdkit(&["memory", "1M"]);
    let connector = Connector::new(&config).unwrap();
    let deadline = Instant::now() + Duration::from_secs(20);
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
    let (mut back, mut came) = (Vec::new(), 0);
    connection.submit(command, &mut back);
    // As a connection that is lost: who waits for its end sends all changes again that he knows of.
    let mut deal = |back: &mut Vec<Answer>| {
        assert!(
            back.is_empty() || !connection.is_idle(),
            "what came back is not known yet"
        );
        let _settling = connection.completion_guard(back.len());
        came += back.drain(..).count();
    };
    deal(&mut back);
    connection.poller().unwrap().poll_sockets(PollUntil::Idle, deal);
    assert!(came == 1 && connection.is_idle());
}

#[test]
fn regression_who_is_called_away_from_a_command_is_stood_in_for_each_time() {
    if !need_nbdkit() {
        return;
    }
    let disk = open(&["pattern", "64M"]);
    let called = EventFd::from_value(1).unwrap();
    let begun = Instant::now();
    for i in 0..200 {
        let on_completions = begin(&disk, Lba(i * 8), 8, &called);
        assert!(on_completions.recv_timeout(Duration::from_secs(20)).unwrap());
    }
    // Each took half a second: then somebody looks in any case.
    assert!(begun.elapsed() < Duration::from_secs(60), "nobody stood in");
}

#[test]
fn long_requests_and_small_ones_share_the_connections() {
    if !need_nbdkit() {
        return;
    }
    let disk = open(&["pattern", "64M"]);
    wait_until(|| disk.connections() == 4);
    let called = EventFd::from_value(0).unwrap();
    let mut at = 1;
    for round in 0..100 {
        // At first the server is not known to be near; a small read tells.
        let lens = [8, 2048, 1, 300, 2048, 64, 777, 2048, 8, 16];
        let on_completions: Vec<_> = lens
            .iter()
            .map(|len| {
                at = (at * 31 + 7) % (131_072 - 2048);
                begin(&disk, Lba(at), *len, &called)
            })
            .collect();
        for (on_completions, len) in on_completions.into_iter().zip(lens) {
            assert!(
                on_completions.recv_timeout(Duration::from_secs(20)).unwrap(),
                "{len} sectors in round {round}"
            );
        }
    }
    assert!(disk.carried() > 100, "long requests were not carried");
}

#[test]
fn writes_begin_and_end_at_any_byte_where_the_server_takes_that() {
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
        let (tell, on_completions) = mpsc::channel();
        disk.submit_write(
            offset as u64,
            &data,
            false,
            Box::new(move |result| tell.send(result).unwrap()),
        );
        disk.poll_completions(Stay::No);
        on_completions.recv_timeout(Duration::from_secs(20)).unwrap().unwrap();
        expected[offset..offset + len].copy_from_slice(&data);
    }
    let mut back = vec![0; 8 << 20];
    disk.read_at(Lba(0), &mut back).unwrap();
    assert!(back == expected);
    let (tell, on_completions) = mpsc::channel();
    disk.submit_write(
        (8 << 20) - 1,
        &[1, 2],
        false,
        Box::new(move |result| tell.send(result).unwrap()),
    );
    assert_eq!(
        on_completions.recv().unwrap().unwrap_err().kind(),
        ErrorKind::OutOfRange
    );
}

#[test]
fn a_size_that_is_no_multiple_of_512_is_rounded_up_and_its_tail_is_zero() {
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
    // bytes that the export does not have can't be kept, and that is not hidden
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
fn block_sizes_of_the_server_are_kept_to() {
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
    // the longest goes in parts of the maximum; one beyond it would be refused
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
fn holes_are_told_and_changes_are_seen_at_once() {
    if !need_nbdkit() {
        return;
    }
    let disk = open(&["memory", "1T"]);
    let all = disk.geometry().sectors;
    assert_eq!(disk.content_at(Lba(0)).unwrap().0, Content::Hole);
    assert!(disk.is_zero(Lba(0), 1 << 20), "the answer is kept");
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
fn a_server_without_zeroes_or_with_slow_ones_is_given_zeroes_all_the_same() {
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
fn an_error_of_the_server_is_that_requests_alone() {
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
fn a_failed_flush_is_told_and_the_writes_are_sent_again() {
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
    // what a server does that lost what it could not write
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
fn a_request_that_is_not_answered_ends_at_its_deadline_and_the_disk_lives_on() {
    if !need_nbdkit() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let gate = dir.path().join("gate");
    std::fs::write(&gate, "").unwrap();
    // reads wait while the file is there
    let script = format!(
        "pread=while [ -e {} ]; do sleep 0.05; done; dd if=/dev/zero bs=$3 count=1",
        gate.display()
    );
    let mut config = nbdkit(&["eval", "get_size=echo 1M", &script]);
    config.timeout = Some(Duration::from_secs(1));
    let disk = NbdDisk::connect(&config, false).unwrap();
    let e = disk.read_at(Lba(0), &mut [0; 512]).unwrap_err();
    assert_eq!(e.kind(), ErrorKind::Os(libc::EIO));
    assert!(e.to_string().contains("no answer within 1 s"), "{e}");
    std::fs::remove_file(&gate).unwrap();
    wait_until(|| disk.read_at(Lba(0), &mut [0; 512]).is_ok());
}

#[test]
fn writes_need_a_disk_that_was_opened_for_them() {
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
fn more_than_the_journal_holds_is_flushed_on_the_way() {
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
fn a_vsock_that_nobody_serves_is_an_error_and_not_a_wait() {
    let mut config = NbdConfig::new(NbdAddress::Vsock { cid: 1, port: Some(1) });
    config.timeout = Some(Duration::from_secs(1));
    let e = NbdDisk::connect(&config, false).unwrap_err().to_string();
    assert!(e.starts_with("NBD server vsock:1:1: "), "{e}");
}
