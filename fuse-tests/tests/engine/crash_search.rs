//! What crashes may leave of an image that is written to, searched through; see `fuse_tests::crash`.

use std::sync::Arc;

use fuse_tests::crash::{
    Effort, Faults, Image, Kind, Mutation, Report, Run, SimStore, Step, random_steps, record, record_threads, search,
    shrink,
};
use fuse_tests::harness::need_qemu;
use vmdkfuse::block::{BlockRead, Lba};
use vmdkfuse::error::ErrorKind;
use vmdkfuse::store::Access;
use vmdkfuse::vmdk::{OpenOptions, VmdkDisk};

/// Runs of each kind: few, as everybody waits for them; `CRASH_RUNS` says another number.
fn runs() -> u64 {
    std::env::var("CRASH_RUNS")
        .ok()
        .and_then(|text| text.parse().ok())
        .unwrap_or(2)
}

/// Where the seeds start; `CRASH_SEED` says another place.
fn first_seed() -> u64 {
    std::env::var("CRASH_SEED")
        .ok()
        .and_then(|text| text.parse().ok())
        .unwrap_or(1)
}

fn effort(seed: u64) -> Effort {
    let qemu = if need_qemu() { 400 } else { 0 };
    Effort {
        random: 6,
        exhaustive: 3,
        qemu,
        nested: 100,
        seed,
    }
}

/// Searches random runs of a kind; panics with the shortest run that breaks it.
fn all_hold(kind: Kind, faults: bool) -> Report {
    let image = kind.image();
    let mut report = Report::default();
    for seed in first_seed()..first_seed() + runs() {
        let steps = random_steps(&image, seed, 14, faults);
        let run = record(&image, &steps, 1);
        report.add(search(&run, effort(seed)));
        if let Some(violation) = &report.violation {
            let shortest = shrink(&image, &steps, effort(seed), None);
            panic!("{kind:?}, seed {seed}: {}", shortest.as_ref().unwrap_or(violation));
        }
    }
    let Report {
        places,
        states,
        exhaustive,
        qemu,
        nested,
        ..
    } = report;
    println!(
        "{kind:?}, faults {faults}: {states} states at {places} places, {exhaustive} of them exhaustive, {qemu} shown to \
         qemu-img, {nested} runs after a crash"
    );
    report
}

macro_rules! each_kind {
    ($($name:ident $kind:ident,)*) => {
        mod every_sector_is_old_or_new_and_flushed_ones_new {
            use super::*;
            $(#[test] fn $name() { assert!(all_hold(Kind::$kind, false).states > 300); })*
        }
        mod and_where_the_host_fails {
            use super::*;
            $(#[test] fn $name() { assert!(all_hold(Kind::$kind, true).states > 300); })*
        }
        #[test]
        fn no_kind_is_left_out() {
            assert_eq!(Kind::ALL.to_vec(), [$(Kind::$kind),*]);
        }
    };
}

each_kind! {
    sparse Sparse,
    one_table OneTable,
    lazy Lazy,
    lazy_one_table LazyOneTable,
    zeroed Zeroed,
    large_grains LargeGrains,
    split_sparse SplitSparse,
    flat Flat,
    split_flat SplitFlat,
    delta Delta,
    chain Chain,
    unclean Unclean,
}

/// Does the steps, and finds that every crash of them is all right.
#[track_caller]
fn holds(image: &Image, steps: &[Step]) -> Run {
    let run = record(image, steps, 1);
    let effort = Effort {
        random: 2,
        exhaustive: 2,
        qemu: 0,
        nested: 0,
        seed: 5,
    };
    if let Some(violation) = search(&run, effort).violation {
        panic!("{violation}");
    }
    run
}

/// Only these faults.
fn fail(faults: Faults) -> Step {
    Step::Fail(faults)
}

/// Kinds that differ where the host fails.
const FEW: [Kind; 6] = [
    Kind::Sparse,
    Kind::LazyOneTable,
    Kind::Zeroed,
    Kind::SplitSparse,
    Kind::SplitFlat,
    Kind::Delta,
];

const FULL: ErrorKind = ErrorKind::Os(libc::ENOSPC);
const EIO: ErrorKind = ErrorKind::Os(libc::EIO);

#[test]
fn threads_that_write_and_flush_at_once() {
    for kind in [Kind::Sparse, Kind::Lazy, Kind::Delta, Kind::SplitSparse] {
        let image = kind.image();
        let mut report = Report::default();
        for seed in first_seed()..first_seed() + runs().div_ceil(3) {
            let run = record_threads(&image, seed * 100, 4, 8);
            report.add(search(
                &run,
                Effort {
                    nested: 0,
                    ..effort(seed)
                },
            ));
            if let Some(violation) = &report.violation {
                panic!("{kind:?}, seed {seed}: {violation}");
            }
        }
        println!(
            "{kind:?}, four threads: {} states at {} places",
            report.states, report.places
        );
    }
}

/// "The search must be able to fail: with the order broken on purpose … it finds the violation"
mod a_store_that_breaks_the_order_is_found_out {
    use super::*;

    fn found(mutation: Mutation, says: &[&str]) {
        let image = Kind::Delta.image();
        // grains of the parent alone, in tables that are there already
        let steps = [
            Step::Write(17, 3),
            Step::Write(2200, 9),
            Step::Flush,
            Step::Write(33, 1),
            Step::Close,
        ];
        holds(&image, &steps);
        let effort = Effort {
            random: 40,
            exhaustive: 8,
            qemu: 0,
            nested: 0,
            seed: 5,
        };
        let violation = shrink(&image, &steps, effort, Some(mutation));
        let violation = violation
            .unwrap_or_else(|| panic!("{mutation:?} was not found"))
            .to_string();
        println!("{mutation:?}: {violation}");
        assert!(
            says.iter().any(|says| violation.contains(says)),
            "none of {says:?} is in {violation}"
        );
    }

    #[test]
    fn entry_before_data() {
        found(Mutation::EntryBeforeData, &["holds zeroes", "--check"]);
    }

    #[test]
    fn no_sync_between_data_and_entry() {
        found(Mutation::NoSyncBetween, &["holds zeroes", "--check"]);
    }

    #[test]
    fn no_sync_after_the_entry() {
        found(Mutation::NoSyncAfter, &["and may hold value"]);
    }

    #[test]
    fn only_the_primary_table() {
        found(Mutation::OnlyPrimary, &["differs from its redundant copy"]);
    }

    #[test]
    fn only_the_redundant_table() {
        found(
            Mutation::OnlyRedundant,
            &["differs from its redundant copy", "and may hold value"],
        );
    }

    #[test]
    fn no_mark_of_use() {
        found(Mutation::NoMark, &["differs from its redundant copy"]);
    }

    #[test]
    fn no_new_cid() {
        found(Mutation::NoNewCid, &["the CID has not"]);
    }
}

/// A flush covers what a process wrote that ended without, as long as it is seen.
#[test]
fn regression_the_first_flush_after_an_open_is_durable() {
    for kind in [Kind::Flat, Kind::SplitFlat, Kind::Sparse, Kind::SplitSparse] {
        let image = kind.image();
        for end in [Step::Flush, Step::Close] {
            holds(&image, &[Step::Write(0, 3), Step::Kill, end]);
        }
    }
}

/// "EIO on sync (every later flush must fail: nothing may be claimed durable that may not be)"
#[test]
fn after_a_sync_that_failed_nothing_is_said_to_be_durable() {
    for kind in FEW {
        let image = kind.image();
        // the sync of the CID, of the mark, of data, of entries, of the end
        for nth in 1..=6 {
            let steps = [
                Step::Write(0, 3),
                fail(Faults {
                    sync: Some(nth),
                    ..Faults::default()
                }),
                Step::Write(9, 2),
                Step::Write(40, 2),
                Step::Flush,
                Step::Write(1, 1),
                Step::Flush,
                Step::Close,
                Step::Flush,
            ];
            let run = holds(&image, &steps);
            let failed = run.outcomes.iter().position(|outcome| *outcome == Err(EIO));
            if let Some(first) = failed {
                let later = run.outcomes[first..].iter().filter(|outcome| outcome.is_ok()).count();
                assert_eq!(later, 0, "{kind:?}, sync {nth}: {:?}", run.outcomes);
            }
            assert!(failed.is_some() || nth > 1, "{kind:?}: no sync at all");
        }
    }
}

/// A sync of the mark of use tells of data, too.
#[test]
fn regression_a_sync_that_failed_before_a_flush_is_final() {
    let image = Kind::Sparse.image();
    let steps = [
        Step::Write(0, 3),
        fail(Faults {
            sync: Some(1),
            ..Faults::default()
        }),
        // allocates, which marks the image
        Step::Write(9, 2),
        Step::Flush,
    ];
    let run = holds(&image, &steps);
    assert_eq!(run.outcomes, [Ok(()), Ok(()), Err(EIO), Err(EIO)]);
}

/// A table that a directory may name already is not written again before the data of its new entries are durable.
#[test]
fn regression_a_flush_that_failed_halfway_is_done_again_in_order() {
    for kind in [Kind::Lazy, Kind::Delta, Kind::LazyOneTable] {
        let image = kind.image();
        let mut failed = 0;
        for nth in 1..=8 {
            let steps = [
                Step::Write(1027, 1),
                fail(Faults {
                    change: Some(nth),
                    ..Faults::default()
                }),
                Step::Flush,
                fail(Faults::default()),
                Step::Write(1045, 2),
                Step::Flush,
                Step::Write(1100, 8),
                Step::Close,
            ];
            let run = holds(&image, &steps);
            failed += u32::from(run.outcomes[2] == Err(EIO));
            assert_eq!(run.outcomes[4..], [Ok(()); 4], "{kind:?}, change {nth}");
        }
        assert!(failed > 1, "{kind:?}: the flush failed {failed} times only");
    }
}

/// "ENOSPC to the writer, image consistent, later writes work again after space is freed"
#[test]
fn a_full_disk_of_the_host_is_told_and_got_over() {
    for kind in FEW {
        let image = kind.image();
        let mut told = [0; 2];
        for pages in [0, 1, 2, 3, 5, 7, 9] {
            let steps = [
                Step::Write(9, 2),
                Step::Flush,
                fail(Faults {
                    room: Some(pages * 4096),
                    ..Faults::default()
                }),
                Step::Write(33, 12),
                Step::Write(1027, 1),
                Step::Flush,
                // room again
                fail(Faults::default()),
                Step::Write(33, 12),
                Step::Write(image.values.len() as u64 - 5, 5),
                Step::Flush,
                Step::Zero(33, 4, true),
                Step::Reopen,
            ];
            let steps = steps.into_iter().filter(|step| match step {
                Step::Write(first, sectors) => first + sectors <= image.values.len() as u64,
                _ => true,
            });
            let run = holds(&image, &steps.collect::<Vec<_>>());
            for (step, outcome) in run.steps.iter().zip(&run.outcomes) {
                assert!(
                    matches!(outcome, Ok(()) | Err(FULL)),
                    "{kind:?}, {pages} pages: {step:?} {outcome:?}"
                );
                told[usize::from(matches!(step, Step::Flush))] += u32::from(outcome.is_err());
            }
            assert_eq!(
                run.outcomes[run.outcomes.len() - 5..],
                [Ok(()); 5],
                "{kind:?}, {pages} pages"
            );
        }
        let flat = matches!(kind, Kind::Flat | Kind::SplitFlat);
        // flat files have all their room
        assert_eq!(told[0] > 0, !flat, "{kind:?}");
        println!("{kind:?}: {} writes and {} flushes were told", told[0], told[1]);
    }
}

/// Errors of single writes are told, and the image stays sound.
#[test]
fn an_error_of_the_host_is_told_and_got_over() {
    for kind in FEW {
        let image = kind.image();
        for nth in [1, 2, 3, 4, 5, 7, 9, 11, 14] {
            let steps = [
                fail(Faults {
                    change: Some(nth),
                    ..Faults::default()
                }),
                Step::Write(9, 2),
                Step::Write(33, 12),
                Step::Flush,
                Step::Zero(0, 8, true),
                Step::Close,
                fail(Faults::default()),
                Step::Write(33, 12),
                Step::Flush,
                Step::Close,
            ];
            let run = holds(&image, &steps);
            assert!(
                run.outcomes.iter().all(|outcome| matches!(outcome, Ok(()) | Err(EIO))),
                "{:?}",
                run.outcomes
            );
            assert_eq!(run.outcomes[6..], [Ok(()); 4], "{kind:?}, change {nth}");
        }
    }
}

fn open_writable(store: &SimStore, name: &str) -> vmdkfuse::error::Result<Arc<VmdkDisk>> {
    VmdkDisk::open_writable(store.file(name, Access::Write)?, OpenOptions::default()).map(Arc::new)
}

/// "file truncated underneath"
#[test]
fn a_file_that_was_cut_is_an_error_and_is_not_made_worse() {
    let image = Kind::Sparse.image();
    let store = SimStore::new(&image.files);
    let disk = open_writable(&store, image.top).unwrap();
    let writer = disk.writer().unwrap();
    let all = |disk: &VmdkDisk| {
        let mut sector = [0; 512];
        (0..image.values.len() as u64)
            .filter(|&lba| disk.read_at(Lba(lba), &mut sector).is_err())
            .count()
    };
    writer.write_at(Lba(9), &[7; 1024]).unwrap();
    writer.flush().unwrap();
    store.cut(image.top, image.files[0].1.len() / 4 * 3);
    let lost = all(&disk);
    assert!(lost > 0, "nothing was lost");
    // new grains go where nothing was, and old ones don't come back as zeroes without a word
    assert_eq!(
        writer.write_at(Lba(1600), &[8; 512]).unwrap_err().kind(),
        ErrorKind::Corrupt
    );
    assert_eq!(writer.close().unwrap_err().kind(), ErrorKind::Corrupt);
    drop(disk);
    match open_writable(&store, image.top) {
        Err(e) => assert_eq!(e.kind(), ErrorKind::Corrupt, "{e}"),
        Ok(disk) => panic!(
            "a damaged image was opened for writing: {} of {lost} sectors are lost",
            all(&disk)
        ),
    }
}
