//! Crash-state search over images that are being written. The method is described in `fuse_tests::crash`.

use std::sync::Arc;

use fuse_tests::crash::{
    Effort, Faults, Image, ImageKind, Mutation, Report, Run, SimStore, Step, random_steps, record, record_threads,
    search, shrink,
};
use fuse_tests::harness::need_qemu;
use vmdkfuse::block::{BlockRead, Lba};
use vmdkfuse::error::ErrorKind;
use vmdkfuse::store::Access;
use vmdkfuse::vmdk::{OpenOptions, VmdkDisk};

/// Returns the number of runs of each kind: 2, to keep the test short, or the value of `CRASH_RUNS`.
fn runs() -> u64 {
    std::env::var("CRASH_RUNS")
        .ok()
        .and_then(|text| text.parse().ok())
        .unwrap_or(2)
}

/// Returns the first seed: 1, or the value of `CRASH_SEED`.
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

/// Searches random runs on images of one kind; panics with the shortest run that violates.
fn search_runs(kind: ImageKind, faults: bool) -> Report {
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
        positions,
        states,
        exhaustive,
        qemu,
        nested,
        ..
    } = report;
    println!(
        "{kind:?}, faults {faults}: {states} states at {positions} positions, {exhaustive} of them exhaustive, \
         {qemu} checked by qemu-img, {nested} runs after a crash"
    );
    report
}

macro_rules! each_kind {
    ($($name:ident $kind:ident,)*) => {
        mod every_sector_is_old_or_new_and_flushed_ones_new {
            use super::*;
            $(#[test] fn $name() { assert!(search_runs(ImageKind::$kind, false).states > 300); })*
        }
        mod every_sector_is_old_or_new_although_the_host_fails {
            use super::*;
            $(#[test] fn $name() { assert!(search_runs(ImageKind::$kind, true).states > 300); })*
        }
        #[test]
        fn no_kind_is_left_out() {
            assert_eq!(ImageKind::ALL.to_vec(), [$(ImageKind::$kind),*]);
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

/// Records the steps, and panics if any of their crash states violates.
#[track_caller]
fn assert_holds(image: &Image, steps: &[Step]) -> Run {
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

/// Injects these faults and no others.
fn fail(faults: Faults) -> Step {
    Step::Fail(faults)
}

/// Kinds that react differently to failures of the host.
const FEW: [ImageKind; 6] = [
    ImageKind::Sparse,
    ImageKind::LazyOneTable,
    ImageKind::Zeroed,
    ImageKind::SplitSparse,
    ImageKind::SplitFlat,
    ImageKind::Delta,
];

const FULL: ErrorKind = ErrorKind::Os(libc::ENOSPC);
const EIO: ErrorKind = ErrorKind::Os(libc::EIO);

#[test]
fn threads_that_write_and_flush_at_once() {
    for kind in [
        ImageKind::Sparse,
        ImageKind::Lazy,
        ImageKind::Delta,
        ImageKind::SplitSparse,
    ] {
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
            "{kind:?}, four threads: {} states at {} positions",
            report.states, report.positions
        );
    }
}

/// "The search must be able to fail: with the order broken on purpose … it finds the violation"
mod a_store_that_breaks_the_order_is_detected {
    use super::*;

    fn assert_found(mutation: Mutation, messages: &[&str]) {
        let image = ImageKind::Delta.image();
        // Writes to grains that only the parent has, in tables that are already allocated.
        let steps = [
            Step::Write(17, 3),
            Step::Write(2200, 9),
            Step::Flush,
            Step::Write(33, 1),
            Step::Close,
        ];
        assert_holds(&image, &steps);
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
            messages.iter().any(|message| violation.contains(message)),
            "none of {messages:?} is in {violation}"
        );
    }

    #[test]
    fn entry_before_data() {
        assert_found(Mutation::EntryBeforeData, &["holds zeroes", "--check"]);
    }

    #[test]
    fn no_sync_between_data_and_entry() {
        assert_found(Mutation::NoSyncBetween, &["holds zeroes", "--check"]);
    }

    #[test]
    fn no_sync_after_the_entry() {
        assert_found(Mutation::NoSyncAfter, &["and may hold value"]);
    }

    #[test]
    fn only_the_primary_table() {
        assert_found(Mutation::OnlyPrimary, &["differs from its redundant copy"]);
    }

    #[test]
    fn only_the_redundant_table() {
        assert_found(
            Mutation::OnlyRedundant,
            &["differs from its redundant copy", "and may hold value"],
        );
    }

    #[test]
    fn no_unclean_flag() {
        assert_found(Mutation::NoUncleanFlag, &["differs from its redundant copy"]);
    }

    #[test]
    fn no_new_cid() {
        assert_found(Mutation::NoNewCid, &["the CID has not"]);
    }
}

/// The first flush after an open also covers what an earlier process wrote without a flush, once it was observed.
#[test]
fn regression_the_first_flush_after_an_open_is_durable() {
    for kind in [
        ImageKind::Flat,
        ImageKind::SplitFlat,
        ImageKind::Sparse,
        ImageKind::SplitSparse,
    ] {
        let image = kind.image();
        for end in [Step::Flush, Step::Close] {
            assert_holds(&image, &[Step::Write(0, 3), Step::Kill, end]);
        }
    }
}

/// "EIO on sync (every later flush must fail: nothing may be claimed durable that may not be)"
#[test]
fn no_flush_succeeds_after_a_failed_sync() {
    for kind in FEW {
        let image = kind.image();
        // The syncs of the CID, of the in-use mark, of data, of table entries, and of the close.
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
            let run = assert_holds(&image, &steps);
            let failed = run.outcomes.iter().position(|outcome| *outcome == Err(EIO));
            if let Some(first) = failed {
                let later = run.outcomes[first..].iter().filter(|outcome| outcome.is_ok()).count();
                assert_eq!(later, 0, "{kind:?}, sync {nth}: {:?}", run.outcomes);
            }
            assert!(failed.is_some() || nth > 1, "{kind:?}: no sync at all");
        }
    }
}

/// The sync of the in-use mark also reports lost data, so its failure sets the write latch.
#[test]
fn regression_a_failed_sync_before_a_flush_is_final() {
    let image = ImageKind::Sparse.image();
    let steps = [
        Step::Write(0, 3),
        fail(Faults {
            sync: Some(1),
            ..Faults::default()
        }),
        // Allocates a grain, which marks the image as in use.
        Step::Write(9, 2),
        Step::Flush,
    ];
    let run = assert_holds(&image, &steps);
    assert_eq!(run.outcomes, [Ok(()), Ok(()), Err(EIO), Err(EIO)]);
}

/// A table that a directory entry may already name is not rewritten before the data of its new entries is durable.
#[test]
fn regression_a_half_failed_flush_is_retried_in_order() {
    for kind in [ImageKind::Lazy, ImageKind::Delta, ImageKind::LazyOneTable] {
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
            let run = assert_holds(&image, &steps);
            failed += u32::from(run.outcomes[2] == Err(EIO));
            assert_eq!(run.outcomes[4..], [Ok(()); 4], "{kind:?}, change {nth}");
        }
        assert!(failed > 1, "{kind:?}: the flush failed {failed} times only");
    }
}

/// "ENOSPC to the writer, image consistent, later writes work again after space is freed"
#[test]
fn a_full_host_disk_is_reported_and_recovered_from() {
    for kind in FEW {
        let image = kind.image();
        let mut errors = [0; 2];
        for pages in [0, 1, 2, 3, 5, 7, 9] {
            let steps = [
                Step::Write(9, 2),
                Step::Flush,
                fail(Faults {
                    free_bytes: Some(pages * 4096),
                    ..Faults::default()
                }),
                Step::Write(33, 12),
                Step::Write(1027, 1),
                Step::Flush,
                // Free space again.
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
            let run = assert_holds(&image, &steps.collect::<Vec<_>>());
            for (step, outcome) in run.steps.iter().zip(&run.outcomes) {
                assert!(
                    matches!(outcome, Ok(()) | Err(FULL)),
                    "{kind:?}, {pages} pages: {step:?} {outcome:?}"
                );
                errors[usize::from(matches!(step, Step::Flush))] += u32::from(outcome.is_err());
            }
            assert_eq!(
                run.outcomes[run.outcomes.len() - 5..],
                [Ok(()); 5],
                "{kind:?}, {pages} pages"
            );
        }
        let flat = matches!(kind, ImageKind::Flat | ImageKind::SplitFlat);
        // Flat files are fully allocated, so that no write to them can run out of space.
        assert_eq!(errors[0] > 0, !flat, "{kind:?}");
        println!(
            "{kind:?}: {} writes and {} flushes reported ENOSPC",
            errors[0], errors[1]
        );
    }
}

/// Errors of single writes are reported, and the image stays sound.
#[test]
fn a_host_error_is_reported_and_recovered_from() {
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
            let run = assert_holds(&image, &steps);
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
fn a_truncated_file_is_an_error_and_is_not_damaged_further() {
    let image = ImageKind::Sparse.image();
    let store = SimStore::new(&image.files);
    let disk = open_writable(&store, image.top).unwrap();
    let writer = disk.writer().unwrap();
    let unreadable = |disk: &VmdkDisk| {
        let mut sector = [0; 512];
        (0..image.values.len() as u64)
            .filter(|&lba| disk.read_at(Lba(lba), &mut sector).is_err())
            .count()
    };
    writer.write_at(Lba(9), &[7; 1024]).unwrap();
    writer.flush().unwrap();
    store.truncate(image.top, image.files[0].1.len() / 4 * 3);
    let lost = unreadable(&disk);
    assert!(lost > 0, "nothing was lost");
    // A new grain must not extend the file over the lost range: lost grains would then silently read as zeroes.
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
            unreadable(&disk)
        ),
    }
}
