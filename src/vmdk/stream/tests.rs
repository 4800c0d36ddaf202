use std::fs;

use proptest::collection::vec;
use proptest::prelude::*;

use super::*;
use crate::config::{AdapterType, CreateType};
use crate::error::ErrorKind;
use crate::vmdk::create::{NewDisk, create_stream};
use crate::vmdk::hosted_layout::{ENTRIES, MAX_FILE_SECTORS};
use crate::vmdk::test_store::{TestStore, head, name};

/// Sectors of the window, and of the part that stays when it advances.
const WINDOW_SECTORS: u64 = WINDOW * GRAIN;
const KEPT_SECTORS: u64 = KEEP * GRAIN;

fn stream(store: &TestStore, sectors: u64) -> StreamDisk {
    let kind = CreateType::StreamOptimized;
    let disk = NewDisk {
        sectors,
        kind,
        adapter: AdapterType::LsiLogic,
        hardware_version: 4,
    };
    create_stream(store, &name("x.vmdk"), &disk).unwrap()
}

/// Sectors whose contents depend on their number. Half of each is hard to compress.
fn pattern(at: u64, sectors: u64) -> Vec<u8> {
    let sector = |number: u64| {
        let mut state = number.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
        (0..SECTOR).map(move |byte| {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            if byte < 256 {
                (state >> 56) as u8
            } else {
                number as u8 | 1
            }
        })
    };
    (at..at + sectors).flat_map(sector).collect()
}

fn read(disk: &dyn BlockRead, at: u64, sectors: u64) -> Vec<u8> {
    let mut bytes = vec![0xaa; (sectors * SECTOR) as usize];
    disk.read_at(Lba(at), &mut bytes).unwrap();
    bytes
}

/// Closes the stream and reads it with the engine: fails unless it holds `expected` from sector 0 on and zeroes after
/// that.
#[track_caller]
fn assert_closes_as(store: &TestStore, disk: &StreamDisk, expected: &[u8]) {
    disk.close().unwrap();
    let sectors = disk.geometry().sectors;
    let file = disk.file();
    assert_eq!(file.writer().unwrap().current_len().unwrap() % SECTOR, 0);
    // A copy is opened, as the stream itself is locked by its writer.
    let copy = store.path("copy.vmdk");
    fs::copy(store.path("x.vmdk"), &copy).unwrap();
    let opened = store.open_disk("copy.vmdk").unwrap();
    assert_eq!(opened.geometry().sectors, sectors);
    let report = opened.check();
    assert_eq!((report.error_count, report.leaks), (0, 0), "{:?}", report.errors);
    let there = expected.len() as u64 / SECTOR;
    assert!(read(&opened, 0, there) == expected, "the content differs");
    for at in [there, (there + sectors) / 2, sectors - 1] {
        if at >= there && at < sectors {
            assert_eq!(read(&opened, at, 1), [0; SECTOR as usize], "sector {at}");
        }
    }
    fs::remove_file(copy).unwrap();
}

#[test]
fn reads_return_what_was_written_before_and_after_the_close() {
    let store = TestStore::new();
    let sectors = 3 * WINDOW_SECTORS + 77;
    let disk = stream(&store, sectors);
    let expected = pattern(0, sectors);
    let mut at = 0;
    for len in [1, 7, 128, 500, 2048, 1, 2048].into_iter().cycle() {
        let len = len.min(sectors - at);
        disk.write_at(Lba(at), &pattern(at, len)).unwrap();
        at += len;
        assert_eq!(read(&disk, at - len, len), pattern(at - len, len));
        if at == sectors {
            break;
        }
    }
    assert!(read(&disk, 0, sectors) == expected, "read back before the close");
    assert_closes_as(&store, &disk, &expected);
    assert!(read(&disk, 0, sectors) == expected, "read back after the close");
}

#[test]
fn empty_and_tiny_streams_close() {
    for sectors in [1, 127, 128, 129, 1 << 22] {
        let store = TestStore::new();
        let disk = stream(&store, sectors);
        assert_eq!(disk.content_at(Lba(0)).unwrap(), (Content::Hole, sectors));
        assert_closes_as(&store, &disk, &[]);
        let store = TestStore::new();
        let disk = stream(&store, sectors);
        disk.write_at(Lba(0), &pattern(0, 1)).unwrap();
        assert_closes_as(&store, &disk, &pattern(0, 1));
    }
}

#[test]
fn an_unfinished_stream_does_not_open_as_an_image() {
    let store = TestStore::new();
    let disk = stream(&store, 2 * WINDOW_SECTORS);
    let check = |when: &str| {
        assert_eq!(head(&store.path("x.vmdk"), 4), b"kdmv", "{when}");
        fs::copy(store.path("x.vmdk"), store.path("copy.vmdk")).unwrap();
        let error = store.open_disk("copy.vmdk").unwrap_err().to_string();
        assert!(error.contains("did not finish"), "{when}: {error}");
    };
    check("when it is new");
    disk.write_at(Lba(0), &pattern(0, WINDOW_SECTORS + 200)).unwrap();
    check("before a flush");
    let finish: [fn(&StreamDisk) -> Result<()>; 2] = [|disk| disk.flush(), |disk| disk.close()];
    for (n, finish) in finish.into_iter().enumerate() {
        finish(&disk).unwrap();
        assert_eq!(head(&store.path("x.vmdk"), 4), b"KDMV");
        disk.write_at(Lba(WINDOW_SECTORS + 200 + n as u64), &pattern(0, 1))
            .unwrap();
        check("when it is written to again");
    }
    drop(disk);
    check("when it was never closed");
}

#[test]
fn gaps_are_zeroes_and_take_no_space() {
    let store = TestStore::new();
    let sectors = 5 * GRAIN * ENTRIES;
    let disk = stream(&store, sectors);
    let islands = [
        (3, 5),
        (200, 1),
        (WINDOW_SECTORS + 1, 300),
        (3 * GRAIN * ENTRIES - 2, 4),
        (sectors - 1, 1),
    ];
    for (at, len) in islands {
        disk.write_at(Lba(at), &pattern(at, len)).unwrap();
    }
    let mut expected = vec![0; (sectors * SECTOR) as usize];
    for (at, len) in islands {
        expected[(at * SECTOR) as usize..][..(len * SECTOR) as usize].copy_from_slice(&pattern(at, len));
    }
    assert_eq!(disk.content_at(Lba(0)).unwrap(), (Content::Data, 128));
    assert_eq!(disk.content_at(Lba(1000)).unwrap().0, Content::Hole);
    assert_eq!(disk.content_at(Lba(WINDOW_SECTORS + 1)).unwrap().0, Content::Data);
    assert!(!disk.is_zero(Lba(sectors - 1), 1));
    assert_closes_as(&store, &disk, &expected);
    assert!(fs::metadata(store.path("x.vmdk")).unwrap().len() < 600_000);
}

#[test]
fn writes_before_the_window_are_refused() {
    let store = TestStore::new();
    let disk = stream(&store, 4 * WINDOW_SECTORS);
    disk.write_at(Lba(0), &pattern(0, WINDOW_SECTORS)).unwrap();
    // Everything in the window can still change.
    disk.write_at(Lba(0), &pattern(9, 1)).unwrap();
    disk.write_at(Lba(WINDOW_SECTORS), &pattern(WINDOW_SECTORS, 1)).unwrap();
    let first = WINDOW_SECTORS - KEPT_SECTORS;
    for at in [0, 1, first - 1] {
        let before = read(&disk, at, 1);
        let error = disk.write_at(Lba(at), &pattern(1, 1)).unwrap_err().to_string();
        assert!(
            error.contains(&format!(
                "a write at sector {at}, but the stream is compressed up to sector {first}"
            )),
            "{error}"
        );
        assert!(
            error.contains("x.vmdk") && error.contains("written once, in order"),
            "{error}"
        );
        assert_eq!(read(&disk, at, 1), before, "a refused write does not change the stream");
    }
    // Two requests arrive out of order.
    disk.write_at(
        Lba(WINDOW_SECTORS + KEPT_SECTORS),
        &pattern(WINDOW_SECTORS + KEPT_SECTORS, 10),
    )
    .unwrap();
    disk.write_at(Lba(WINDOW_SECTORS + 1), &pattern(WINDOW_SECTORS + 1, KEPT_SECTORS - 1))
        .unwrap();
    let mut expected = pattern(0, WINDOW_SECTORS + KEPT_SECTORS + 10);
    expected[..SECTOR as usize].copy_from_slice(&pattern(9, 1));
    assert_closes_as(&store, &disk, &expected);
    assert!(disk.sequential_write_only() && disk.writer().is_some());
}

#[test]
fn zeroing_sectors_that_were_never_written_does_nothing() {
    let store = TestStore::new();
    let disk = stream(&store, 4 * WINDOW_SECTORS);
    // A copying tool may clear its whole target first.
    disk.zero(Lba(0)..Lba(4 * WINDOW_SECTORS), true).unwrap();
    disk.write_at(Lba(0), &pattern(0, WINDOW_SECTORS)).unwrap();
    disk.zero(Lba(WINDOW_SECTORS - 10)..Lba(WINDOW_SECTORS + 5), false)
        .unwrap();
    disk.write_at(Lba(WINDOW_SECTORS + 5), &pattern(WINDOW_SECTORS + 5, KEPT_SECTORS))
        .unwrap();
    let error = disk.zero(Lba(100)..Lba(300), true).unwrap_err().to_string();
    assert!(error.contains("zeroing at sector 100"), "{error}");
    disk.zero(Lba(100)..Lba(100), true).unwrap();
    assert!(disk.zero(Lba(0)..Lba(4 * WINDOW_SECTORS + 1), true).is_err());
    let mut expected = pattern(0, WINDOW_SECTORS + 5 + KEPT_SECTORS);
    expected[((WINDOW_SECTORS - 10) * SECTOR) as usize..((WINDOW_SECTORS + 5) * SECTOR) as usize].fill(0);
    assert_closes_as(&store, &disk, &expected);
    // A gap before the window can be zeroed again.
    let store = TestStore::new();
    let disk = stream(&store, 1 << 20);
    disk.write_at(Lba(1 << 19), &pattern(0, 1)).unwrap();
    disk.zero(Lba(0)..Lba(1 << 18), true).unwrap();
}

#[test]
fn a_closed_stream_can_be_written_and_closed_again() {
    let store = TestStore::new();
    let disk = stream(&store, 4 * WINDOW_SECTORS);
    let mut at = 0;
    for len in [10, 1, 127, WINDOW_SECTORS, 3, 2 * WINDOW_SECTORS] {
        disk.write_at(Lba(at), &pattern(at, len)).unwrap();
        at += len;
        assert_closes_as(&store, &disk, &pattern(0, at));
        disk.close().unwrap();
    }
    disk.zero(Lba(at - 1)..Lba(at), false).unwrap();
    let mut expected = pattern(0, at);
    expected[((at - 1) * SECTOR) as usize..].fill(0);
    assert_closes_as(&store, &disk, &expected);
}

#[test]
fn a_full_store_fails_the_write_and_nothing_is_lost() {
    let store = TestStore::new();
    let disk = stream(&store, 4 * WINDOW_SECTORS);
    disk.write_at(Lba(0), &pattern(0, WINDOW_SECTORS)).unwrap();
    store.allow(0);
    for _ in 0..3 {
        let error = disk
            .write_at(Lba(WINDOW_SECTORS), &pattern(WINDOW_SECTORS, 5))
            .unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Os(libc::ENOSPC), "{error}");
        assert!(disk.close().is_err());
    }
    assert_eq!(read(&disk, 0, WINDOW_SECTORS), pattern(0, WINDOW_SECTORS));
    // The steps of a close: grains, end, length.
    for steps in 0..3 {
        store.allow(steps);
        assert_eq!(disk.close().unwrap_err().kind(), ErrorKind::Os(libc::ENOSPC));
        assert_eq!(head(&store.path("x.vmdk"), 4), b"kdmv");
    }
    store.allow(u64::MAX);
    disk.write_at(Lba(WINDOW_SECTORS), &pattern(WINDOW_SECTORS, WINDOW_SECTORS))
        .unwrap();
    assert_closes_as(&store, &disk, &pattern(0, 2 * WINDOW_SECTORS));
}

#[test]
fn a_stream_that_has_reached_its_limit_can_be_closed_with_all_that_was_accepted() {
    let store = TestStore::new();
    let disk = stream(&store, 4 * WINDOW_SECTORS);
    disk.write_at(Lba(0), &pattern(0, WINDOW_SECTORS)).unwrap();
    // As if other grains, which the file has as a hole, had been written before.
    disk.state().written.end = MAX_FILE_SECTORS - TAIL;
    let file = std::fs::File::options().write(true).open(store.path("x.vmdk")).unwrap();
    file.set_len((MAX_FILE_SECTORS - TAIL) * SECTOR).unwrap();
    let refused = disk.write_at(Lba(WINDOW_SECTORS), &pattern(WINDOW_SECTORS, 5));
    assert_eq!(refused.unwrap_err().kind(), ErrorKind::Os(libc::ENOSPC));
    disk.close().unwrap();
    drop(disk);
    let opened = store.open_disk("x.vmdk").unwrap();
    assert!(read(&opened, 0, WINDOW_SECTORS) == pattern(0, WINDOW_SECTORS));
}

#[test]
fn a_failed_sync_is_final() {
    // The failing sync is that of the content, or of the magic.
    let finish: [fn(&StreamDisk) -> Result<()>; 2] = [|disk| disk.flush(), |disk| disk.close()];
    for (steps, finish) in finish.into_iter().flat_map(|finish| [(3, finish), (5, finish)]) {
        let store = TestStore::new();
        let disk = stream(&store, WINDOW_SECTORS);
        disk.write_at(Lba(0), &pattern(0, 300)).unwrap();
        store.allow(steps);
        let failed = finish(&disk);
        assert_eq!(failed.unwrap_err().kind(), ErrorKind::Os(libc::ENOSPC));
        store.allow(u64::MAX);
        for again in [disk.flush(), disk.close(), disk.write_at(Lba(300), &pattern(300, 1))] {
            let error = again.unwrap_err().to_string();
            assert!(
                error.contains("the stream cannot be finished: nothing is durable any more"),
                "{error}"
            );
        }
        assert_eq!(read(&disk, 0, 300), pattern(0, 300));
    }
}

/// Another process truncates the file; what follows must not put zeroes in place of the lost grains.
#[test]
fn regression_a_stream_that_another_process_truncated_is_not_continued() {
    let actions: [fn(&StreamDisk) -> Result<()>; 3] = [
        |disk| disk.close(),
        |disk| disk.write_at(Lba(2 * WINDOW_SECTORS), &pattern(2 * WINDOW_SECTORS, 1)),
        // Opens a closed stream again.
        |disk| disk.prepare_external_write(),
    ];
    for (closed, action) in [false, false, true].into_iter().zip(actions) {
        let store = TestStore::new();
        let disk = stream(&store, 4 * WINDOW_SECTORS);
        disk.write_at(Lba(0), &pattern(0, 2 * WINDOW_SECTORS)).unwrap();
        if closed {
            disk.close().unwrap();
        }
        let file = fs::OpenOptions::new().write(true).open(store.path("x.vmdk")).unwrap();
        file.set_len(GRAIN_BYTES as u64 * 2).unwrap();
        let refused = action(&disk).unwrap_err();
        assert_eq!(refused.kind(), ErrorKind::Corrupt, "{refused}");
        for again in [
            disk.flush(),
            disk.close(),
            disk.write_at(Lba(2 * WINDOW_SECTORS), &[1; 512]),
        ] {
            assert_eq!(again.unwrap_err().kind(), ErrorKind::Corrupt);
        }
        assert_eq!(file.metadata().unwrap().len(), GRAIN_BYTES as u64 * 2);
    }
}

#[test]
fn a_range_outside_of_the_disk_is_refused() {
    let store = TestStore::new();
    let disk = stream(&store, 100);
    for (at, bytes) in [(100, 512), (99, 1024), (u64::MAX, 512), (0, 100)] {
        assert_eq!(
            disk.write_at(Lba(at), &vec![1; bytes]).unwrap_err().kind(),
            ErrorKind::OutOfRange
        );
        assert_eq!(
            disk.read_at(Lba(at), &mut vec![1; bytes]).unwrap_err().kind(),
            ErrorKind::OutOfRange
        );
    }
    assert_closes_as(&store, &disk, &[]);
}

#[test]
fn a_damaged_grain_is_an_error() {
    let store = TestStore::new();
    let disk = stream(&store, 2 * WINDOW_SECTORS);
    disk.write_at(Lba(0), &pattern(0, 2 * WINDOW_SECTORS)).unwrap();
    let path = store.path("x.vmdk");
    let mut bytes = fs::read(&path).unwrap();
    bytes[128 * 512 + 5000..128 * 512 + 5010].fill(0x55);
    fs::write(&path, bytes).unwrap();
    let error = disk.read_at(Lba(0), &mut [0; 512]).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Corrupt, "{error}");
    assert_eq!(read(&disk, 200, 1), pattern(200, 1), "other grains are still readable");
}

#[derive(Debug, Clone)]
enum Op {
    /// Continues after the last write, possibly after a gap.
    Write {
        gap: u64,
        sectors: u64,
    },
    /// Rewrites sectors that are still in the window.
    Rewrite {
        back: u64,
        sectors: u64,
    },
    Zero {
        at: u64,
        sectors: u64,
    },
    Read {
        at: u64,
        sectors: u64,
    },
    Close,
}

fn op() -> impl Strategy<Value = Op> {
    let gap = prop_oneof![4 => Just(0), 1 => 1..300u64, 1 => 1..20_000u64];
    let len = prop_oneof![1..20u64, 1..3000u64];
    prop_oneof![
        8 => (gap, len.clone()).prop_map(|(gap, sectors)| Op::Write { gap, sectors }),
        2 => (1..KEPT_SECTORS, 1..300u64).prop_map(|(back, sectors)| Op::Rewrite { back, sectors }),
        1 => (0..60_000u64, 1..5000u64).prop_map(|(at, sectors)| Op::Zero { at, sectors }),
        2 => (0..60_000u64, len).prop_map(|(at, sectors)| Op::Read { at, sectors }),
        1 => Just(Op::Close),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    #[test]
    fn random_operations_match_a_plain_disk_or_are_refused(ops in vec(op(), 1..40), sectors in 10_000..60_001u64) {
        let store = TestStore::new();
        let disk = stream(&store, sectors);
        let mut model = vec![0; (sectors * SECTOR) as usize];
        let mut next = 0;
        let bytes = |at: u64, len: u64| (at * SECTOR) as usize..((at + len) * SECTOR) as usize;
        for (number, op) in (1..).zip(ops) {
            let (at, len) = match op {
                Op::Write { gap, sectors } => (next + gap, sectors),
                Op::Rewrite { back, sectors } => (u64::saturating_sub(next, back), sectors),
                Op::Zero { at, sectors } | Op::Read { at, sectors } => (at, sectors),
                Op::Close => (0, 1),
            };
            let at = at.min(sectors - 1);
            let len = len.min(sectors - at);
            match op {
                Op::Write { .. } | Op::Rewrite { .. } => {
                    let data = pattern(at + number * 7, len);
                    disk.write_at(Lba(at), &data).unwrap();
                    model[bytes(at, len)].copy_from_slice(&data);
                    next = next.max(at + len);
                }
                Op::Zero { .. } => {
                    // Zeroing a compressed grain is refused, and then must not change anything.
                    if disk.zero(Lba(at)..Lba(at + len), false).is_ok() {
                        model[bytes(at, len)].fill(0);
                    }
                }
                Op::Read { .. } => prop_assert!(read(&disk, at, len) == model[bytes(at, len)]),
                Op::Close => disk.close().unwrap(),
            }
        }
        prop_assert!(read(&disk, 0, sectors) == model);
        assert_closes_as(&store, &disk, &model);
    }
}
