//! Walks over the runs of a disk: where its content is in the files of its image. A kernel view is made of them.

use std::fs::{self, File};
use std::ops::ControlFlow;
use std::os::unix::fs::FileExt;

use fuse_tests::harness::{Scratch, check_runs, each, open_read_only};
use fuse_tests::make::{SECTOR, Variant, hostile, valid};
use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};
use vmdkfuse::block::RunPlace;

/// Seed of all random data and ranges.
const SEED: u64 = 11;

/// "hostile images never yield an index that points outside the extents": a walk never reports a run that leaves its
/// file, so the second check, when the index is built, never sees one.
#[test]
fn hostile_images_never_have_runs_outside_of_their_files() {
    let scratch = Scratch::new();
    let name = |h: &fuse_tests::make::Hostile| format!("{} ({})", h.name, h.note);
    each(hostile(), name, |entry| {
        let bad = entry.make(scratch.root(), SEED).unwrap();
        if let Ok(image) = open_read_only(&bad.open, &[]) {
            check_runs(&image);
        }
        fs::remove_dir_all(scratch.path(entry.name)).unwrap();
    });
}

/// A walk over the runs of a disk agrees with its content, for every type of image.
#[test]
fn the_runs_of_a_walk_hold_the_content_of_the_disk() {
    let scratch = Scratch::new();
    let name = |v: &Variant| format!("{} ({})", v.name, v.note);
    each(valid(), name, |variant| {
        let made = variant.make(scratch.root(), SEED).unwrap();
        let image = open_read_only(&made.open, &made.allow_dirs).unwrap();
        check_runs(&image);
        let Some(runs) = image.disk().runs() else { return };
        let files = runs.files();
        let mut at = 0;
        let mut rng = SmallRng::seed_from_u64(SEED);
        let walked = runs.walk(&mut |sectors, place| {
            let from = at + rng.random_range(0..sectors.get());
            at += sectors.get();
            let len = 8.min(at - from) * SECTOR;
            let mut seen = vec![0; len as usize];
            if let RunPlace::Stored { file, sector } = place {
                let fd = files[file].fd.unwrap().try_clone_to_owned().unwrap();
                let start = (sector + from - (at - sectors.get())) * SECTOR;
                // The file may end inside its last sector; the rest of that sector reads as zeroes.
                let inside = (files[file].len - start).min(len) as usize;
                File::from(fd).read_exact_at(&mut seen[..inside], start).unwrap();
            }
            let expected = made.disk.read_bytes(&(from * SECTOR..from * SECTOR + len));
            assert!(seen == expected, "{} sectors from {from}", len / SECTOR);
            if at < 1 << 28 {
                ControlFlow::Continue(())
            } else {
                ControlFlow::Break(())
            }
        });
        walked.unwrap_or_else(|e| panic!("{e}"));
        fs::remove_dir_all(scratch.path(variant.name)).unwrap();
    });
}
