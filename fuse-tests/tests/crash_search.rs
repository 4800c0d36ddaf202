//! What crashes may leave of an image that is written to, searched through; see `fuse_tests::crash`.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a failed step of a test is a panic that names it"
)]

use fuse_tests::crash::{Effort, Kind, Report, random_steps, record, search, shrink};
use fuse_tests::harness::need_qemu;

/// Runs of each kind; `CRASH_RUNS` says how many.
fn runs() -> u64 {
    std::env::var("CRASH_RUNS").ok().and_then(|text| text.parse().ok()).unwrap_or(6)
}

/// Where the seeds start; `CRASH_SEED` says another place.
fn first_seed() -> u64 {
    std::env::var("CRASH_SEED").ok().and_then(|text| text.parse().ok()).unwrap_or(1)
}

fn effort(seed: u64) -> Effort {
    let qemu = if need_qemu() { 400 } else { 0 };
    Effort { random: 12, exhaustive: 4, qemu, nested: 60, seed }
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
    let Report { places, states, exhaustive, qemu, nested, .. } = report;
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
            $(#[test] fn $name() { assert!(all_hold(Kind::$kind, false).states > 1000); })*
        }
        mod and_where_the_host_fails {
            use super::*;
            $(#[test] fn $name() { assert!(all_hold(Kind::$kind, true).states > 1000); })*
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
