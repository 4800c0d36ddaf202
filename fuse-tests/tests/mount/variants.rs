//! Every generated variant through a mount: valid ones equal their model, hostile ones do no harm.

use std::fs::{self, File};
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use fuse_tests::harness::{Answer, Scratch, each, need_fuse, open_hostile};
use fuse_tests::make::{Bad, Content, Expect, Hostile, Made, SECTOR, Variant, hostile, valid};
use nix::libc;

/// Seed of all generated variants.
const SEED: u64 = 7;

/// Disks in one mount. A mount is more expensive than a disk, so several disks share one.
const GROUP: usize = 12;

/// Bytes that are read and compared at a time.
const CHUNK: u64 = 1 << 20;

/// Panics unless one range of a raw file equals the model.
#[track_caller]
fn compare_range(file: &File, disk: &dyn Content, range: &Range<u64>) {
    let mut seen = vec![0; (range.end - range.start) as usize];
    file.read_exact_at(&mut seen, range.start)
        .unwrap_or_else(|e| panic!("bytes {range:?}: {e}"));
    let expected = disk.read_bytes(range);
    if seen != expected {
        let at = seen.iter().zip(&expected).position(|(a, b)| a != b).unwrap_or(0);
        panic!(
            "wrong at byte {} ({:#04x}, not {:#04x}), reading {range:?}",
            range.start + at as u64,
            seen[at],
            expected[at]
        );
    }
}

/// Page size in bytes. The kernel reads whole pages, so bytes in the same page as the damage cannot be read either.
const PAGE: u64 = 4096;

/// Compares random ranges of a raw file with the model, and the whole file if `whole` is set.
///
/// Pages that intersect `damaged` are left out.
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
        // The ranges also end at the damage, so that all bytes around it are read.
        let mut borders: Vec<u64> = (0..size).step_by(CHUNK as usize).chain([size]).collect();
        borders.extend(
            damaged
                .iter()
                .flat_map(|bad| [bad.start, bad.end])
                .filter(|at| *at < size),
        );
        borders.sort_unstable();
        ranges.extend(
            borders
                .windows(2)
                .map(|pair| pair[0]..pair[1])
                .filter(|range| range.start < range.end),
        );
    }
    ranges
        .iter()
        .filter(|range| intact(range))
        .for_each(|range| compare_range(&file, disk, range));
}

/// Returns true if opening the file or reading a part of the range fails with `EIO`; panics at any other error.
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
            // A short read ends before the damage; the next read starts there.
            Ok(0) => return false,
            Ok(n) => at += n as u64,
            Err(e) => return is_eio(&e),
        }
    }
    false
}

/// Returns true if the error is `EIO`; panics otherwise.
#[track_caller]
fn is_eio(error: &io::Error) -> bool {
    assert_eq!(error.raw_os_error(), Some(libc::EIO), "{error}");
    true
}

#[test]
fn valid_variants_match_their_model() {
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
        // The daemon serves all reads here; `kernel_view.rs` tests the kernel view.
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

/// Each disk has a mount of its own, so that the peak memory of opening and reading it can be measured.
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

/// `--check` finds no corruption in a valid image, except if only the redundant directory is readable (`rgd_only`).
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
            let expected: &[i32] = if variant.name.starts_with("rgd_only") {
                &[4]
            } else {
                &[0, 3]
            };
            assert!(
                outcome.ended.code.is_some_and(|code| expected.contains(&code)),
                "{outcome}"
            );
        },
    );
}

/// Opens one hostile image and compares the result with its expectation.
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
                    "the damage at {range:?} was read without an error"
                );
            }
            compare_if_mounted(&answer, content.as_deref(), damaged.as_ref());
        }
    }
}

/// Opens the image with the folders allowed that it refers to; panics if it is still refused.
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

/// If the image was mounted, panics unless the raw file equals the model outside of the damage.
#[track_caller]
fn compare_if_mounted(answer: &Answer, content: Option<&dyn Content>, damaged: Option<&Range<u64>>) {
    if let (Answer::Mounted(_, path), Some(disk)) = (answer, content) {
        compare(path, disk, disk.sectors() * SECTOR <= 1 << 30, damaged);
    }
}

#[test]
fn hostile_images_do_no_harm() {
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

/// `--info` and `--check` survive hostile images as well.
#[test]
fn hostile_images_are_inspected_without_harm() {
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
            // Remove the image at once: some take tens of MiB.
            fs::remove_dir_all(scratch.path(entry.name)).unwrap();
        },
    );
}
