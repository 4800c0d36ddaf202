//! Every variant of the maker through a mount: valid ones read as their model, hostile ones do no harm.

use std::fs::{self, File};
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use fuse_tests::harness::{Answer, Scratch, each, need_fuse, open_hostile};
use fuse_tests::make::{Bad, Content, Expect, Hostile, Made, SECTOR, Variant, hostile, valid};
use nix::libc;

/// Seed of everything that the maker makes here.
const SEED: u64 = 7;

/// Disks of one mount: many, since a mount costs more than a disk.
const GROUP: usize = 12;

/// Bytes that are compared at once.
const CHUNK: u64 = 1 << 20;

/// Compares one range of a raw file with the model.
#[track_caller]
fn compare_range(file: &File, disk: &dyn Content, range: &Range<u64>) {
    let mut seen = vec![0; (range.end - range.start) as usize];
    file.read_exact_at(&mut seen, range.start)
        .unwrap_or_else(|e| panic!("bytes {range:?}: {e}"));
    let wanted = disk.read_bytes(range);
    if seen != wanted {
        let at = seen.iter().zip(&wanted).position(|(a, b)| a != b).unwrap_or(0);
        panic!(
            "wrong at byte {} ({:#04x}, not {:#04x}), reading {range:?}",
            range.start + at as u64,
            seen[at],
            wanted[at]
        );
    }
}

/// The kernel reads whole pages: what shares one with the damage cannot be read either.
const PAGE: u64 = 4096;

/// Compares a raw file with the model: all of it where it is small enough, and random ranges; but nothing of the pages
/// of `damaged`.
#[track_caller]
fn compare(path: &Path, disk: &dyn Content, whole: bool, damaged: Option<&Range<u64>>) {
    let file = File::open(path).unwrap();
    let size = disk.sectors() * SECTOR;
    assert_eq!(file.metadata().unwrap().len(), size, "size");
    let damaged = damaged.map(|bad| bad.start / PAGE * PAGE..bad.end.next_multiple_of(PAGE).min(size));
    let intact = |range: &Range<u64>| {
        damaged
            .as_ref()
            .is_none_or(|bad| range.end <= bad.start || bad.end <= range.start)
    };
    let mut ranges = disk.random_ranges(SEED, 150, 1 << 17);
    if whole {
        // Cut at the damage too, so that all but it is read.
        let mut cuts: Vec<u64> = (0..size).step_by(CHUNK as usize).chain([size]).collect();
        cuts.extend(
            damaged
                .iter()
                .flat_map(|bad| [bad.start, bad.end])
                .filter(|at| *at < size),
        );
        cuts.sort_unstable();
        ranges.extend(
            cuts.windows(2)
                .map(|pair| pair[0]..pair[1])
                .filter(|range| range.start < range.end),
        );
    }
    ranges
        .iter()
        .filter(|range| intact(range))
        .for_each(|range| compare_range(&file, disk, range));
}

/// Whether reading a range, piece by piece, fails with an I/O error somewhere. Any other error is a panic.
#[track_caller]
fn fails_with_eio(path: &Path, range: &Range<u64>) -> bool {
    let file = match File::open(path) {
        Ok(file) => file,
        Err(e) => return is_eio(&e),
    };
    let mut buf = vec![0; CHUNK as usize];
    let mut at = range.start;
    while at < range.end {
        let n = CHUNK.min(range.end - at) as usize;
        match file.read_at(&mut buf[..n], at) {
            // A read that ends early goes on at the damage.
            Ok(0) => return false,
            Ok(n) => at += n as u64,
            Err(e) => return is_eio(&e),
        }
    }
    false
}

/// Whether it is `EIO`; anything else is a panic.
#[track_caller]
fn is_eio(error: &io::Error) -> bool {
    assert_eq!(error.raw_os_error(), Some(libc::EIO), "{error}");
    true
}

#[test]
fn valid_variants_read_as_their_model() {
    if !need_fuse() {
        return;
    }
    let scratch = Scratch::new();
    let made: Vec<(&Variant, Made)> = valid()
        .iter()
        .map(|variant| (variant, variant.make(scratch.root(), SEED).unwrap()))
        .collect();
    let groups: Vec<_> = made.chunks(GROUP).enumerate().collect();
    let name = |(_, group): &(usize, &[(&Variant, Made)])| {
        group
            .iter()
            .map(|(variant, _)| variant.name)
            .collect::<Vec<_>>()
            .join(", ")
    };
    each(&groups, name, |(number, group)| {
        let point = format!("mnt{number}");
        scratch.mkdir(&point);
        // what the kernel reads by itself is for another test
        let mut command = scratch.mount().at(&point).arg("-r").arg("kernel-view=off");
        for (variant, made) in *group {
            command = command.file(&made.open).arg(format!("name={}", variant.name));
            for dir in &made.allow_dirs {
                command = command.arg(format!("allow-dir={}", dir.display()));
            }
        }
        let mount = command.start();
        let compare_one = |(variant, made): &(&Variant, Made)| {
            let path = mount.file(variant.name);
            compare(&path, &*made.disk, made.is_hashable(), None);
            let file = File::open(&path).unwrap();
            made.probes
                .iter()
                .for_each(|probe| compare_range(&file, &*made.disk, probe));
        };
        each(
            group,
            |(variant, _)| format!("{} ({})", variant.name, variant.note),
            compare_one,
        );
        mount.unmount();
    });
}

/// Each by itself, so that what opening and reading it takes is seen.
#[test]
fn huge_disks_stay_small_in_memory() {
    if !need_fuse() {
        return;
    }
    let scratch = Scratch::new();
    for variant in valid() {
        let made = variant.make(scratch.root(), SEED).unwrap();
        if made.is_hashable() {
            continue;
        }
        let mount = scratch.mount().file(&made.open).arg("name=disk").start();
        compare(&mount.file("disk"), &*made.disk, false, None);
        let peak = mount.peak_memory();
        assert!(peak <= 64 << 20, "{}: {peak} bytes in memory", variant.name);
        mount.unmount();
    }
}

/// `--check` finds nothing wrong in a valid image, but for those that can be read only by their redundant directory.
#[test]
fn valid_variants_are_not_corrupt() {
    let scratch = Scratch::new();
    each(
        valid(),
        |variant| variant.name.to_owned(),
        |variant| {
            let made = variant.make(scratch.root(), SEED).unwrap();
            let allow: Vec<_> = made
                .allow_dirs
                .iter()
                .map(|dir| format!("allow-dir={}", dir.display()))
                .collect();
            let outcome = scratch
                .vmdkfuse()
                .args(["--check", "--json"])
                .key("file", &made.open)
                .args(allow)
                .run();
            let wanted: &[i32] = if variant.name.starts_with("rgd_only") {
                &[4]
            } else {
                &[0, 3]
            };
            assert!(
                outcome.ended.code.is_some_and(|code| wanted.contains(&code)),
                "{outcome}"
            );
        },
    );
}

/// What must become of one hostile file.
fn try_hostile(scratch: &Scratch, entry: &Hostile) {
    let Bad {
        open,
        allow_dirs,
        content,
    } = entry.make(scratch.root(), SEED).unwrap();
    let answer = open_hostile(scratch, entry.name, &open, &[]);
    match &entry.expect {
        Expect::Reject => drop(answer.refused(entry.note)),
        Expect::Policy => {
            answer.refused(entry.note);
            lift_policy(scratch, entry, &open, &allow_dirs, content.as_deref());
        }
        Expect::Warn => compare_if_mounted(&answer, content.as_deref(), None),
        Expect::Eio { damaged } => {
            if let (Answer::Mounted(_, path), Some(range)) = (&answer, damaged) {
                assert!(
                    fails_with_eio(path, range),
                    "the damage at {range:?} reads as if it were good"
                );
            }
            compare_if_mounted(&answer, content.as_deref(), damaged.as_ref());
        }
    }
}

/// With the folders allowed that it wants, it opens.
#[track_caller]
fn lift_policy(scratch: &Scratch, entry: &Hostile, open: &Path, allow_dirs: &[PathBuf], content: Option<&dyn Content>) {
    if allow_dirs.is_empty() {
        return;
    }
    let answer = open_hostile(scratch, &format!("{}-allowed", entry.name), open, allow_dirs);
    if let Answer::Refused(outcome) = &answer {
        panic!("refused although its folders are allowed: {outcome}");
    }
    compare_if_mounted(&answer, content, None);
}

/// What is shown must be right.
#[track_caller]
fn compare_if_mounted(answer: &Answer, content: Option<&dyn Content>, damaged: Option<&Range<u64>>) {
    if let (Answer::Mounted(_, path), Some(disk)) = (answer, content) {
        compare(path, disk, disk.sectors() * SECTOR <= 1 << 30, damaged);
    }
}

#[test]
fn hostile_files_do_no_harm() {
    if !need_fuse() {
        return;
    }
    let scratch = Scratch::new();
    each(
        hostile(),
        |entry| format!("{} ({})", entry.name, entry.note),
        |entry| try_hostile(&scratch, entry),
    );
    scratch.assert_no_mounts();
}

/// The actions that only look must survive them too.
#[test]
fn hostile_files_are_looked_at_without_harm() {
    let scratch = Scratch::new();
    each(
        hostile(),
        |entry| format!("{} ({})", entry.name, entry.note),
        |entry| {
            let bad = entry.make(scratch.root(), SEED).unwrap();
            for action in ["--info", "--check"] {
                let outcome = scratch
                    .vmdkfuse()
                    .args([action, "--json"])
                    .key("file", &bad.open)
                    .memory(128 << 20)
                    .run();
                assert!(matches!(outcome.ended.code, Some(0 | 1 | 3 | 4)), "{outcome}");
                if outcome.ended.code == Some(1) {
                    outcome.one_error(1, &[]);
                }
            }
            // Some take tens of MiB.
            fs::remove_dir_all(scratch.path(entry.name)).unwrap();
        },
    );
}
