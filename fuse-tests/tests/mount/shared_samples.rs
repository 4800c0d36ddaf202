//! Samples from other sources, and variants of an independent generator, in a folder `shared` next to the checkout.
//!
//! The folder is not part of the project: without it these tests print a `SKIPPED` line and pass.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use fuse_tests::harness::{
    Answer, Cmd, Mount, Scratch, assert_same_at_random, check_runs, data_ranges, digest_grains, digest_range, each,
    need, need_fuse, need_kernel_view, need_qemu, open_hostile, open_read_only, qemu_img, sha256,
};
use nix::libc;
use serde::Deserialize;

/// Returns the path of `part` in the folder `shared`; prints a `SKIPPED` line if it does not exist.
fn shared(part: &str) -> Option<PathBuf> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../shared").join(part);
    if path.exists() {
        return Some(path.canonicalize().unwrap());
    }
    eprintln!("SKIPPED: shared/{part} does not exist next to the checkout");
    None
}

/// One sample, as the tables of the README of the samples describe it.
#[derive(Debug)]
struct Sample {
    path: PathBuf,
    /// Size of the disk in bytes; `None` if the image cannot be opened.
    size: Option<u64>,
    /// SHA-256 of the whole disk; `None` if the image must be refused.
    whole: Option<String>,
    /// Grain digest of a large disk.
    grains: Option<String>,
}

/// Returns the cells of each table row in the README.
fn rows(readme: &str) -> impl Iterator<Item = Vec<&str>> {
    let lines = readme
        .lines()
        .filter(|line| line.starts_with("| ") && line.contains('/'));
    lines.map(|line| line.trim_matches('|').split('|').map(str::trim).collect())
}

/// Returns the first word of 64 hexadecimal digits.
fn hash(cell: &str) -> Option<String> {
    let word = cell
        .split_whitespace()
        .find(|word| word.len() == 64 && word.bytes().all(|b| b.is_ascii_hexdigit()));
    word.map(str::to_owned)
}

/// Reads both tables: files (six columns, the last is the size of the disk), and hashes (three columns).
fn samples(dir: &Path) -> Vec<Sample> {
    let readme = fs::read_to_string(dir.join("README.md")).unwrap();
    let is_file = |cells: &Vec<&str>| cells.len() == 6;
    let mut found: Vec<Sample> = Vec::new();
    for cells in rows(&readme).filter(is_file) {
        let path = dir.join(cells[0].split_whitespace().next().unwrap());
        assert!(path.is_file(), "{} is in the table but does not exist", path.display());
        found.push(Sample {
            path,
            size: cells[5].parse().ok(),
            whole: None,
            grains: None,
        });
    }
    for cells in rows(&readme).filter(|cells| cells.len() == 3) {
        // Long names are truncated with an ellipsis.
        let start = cells[0].split_whitespace().next().unwrap().trim_end_matches('…');
        let fits = |sample: &&mut Sample| {
            sample
                .path
                .strip_prefix(dir)
                .unwrap()
                .to_str()
                .unwrap()
                .starts_with(start)
        };
        let sample = found
            .iter_mut()
            .find(fits)
            .unwrap_or_else(|| panic!("{start} has a hash but no row"));
        sample.whole = hash(cells[1]);
        sample.grains = cells[2].split_once("grain digest").and_then(|(_, rest)| hash(rest));
        assert!(sample.whole.is_some(), "no hash in {cells:?}");
    }
    assert!(
        found.len() >= 10 && found.iter().filter(|sample| sample.whole.is_some()).count() >= 10,
        "{found:?}"
    );
    found
}

/// Returns a short name for messages and mount points.
fn name(sample: &Sample) -> String {
    let parent = sample.path.parent().unwrap().file_name().unwrap().to_str().unwrap();
    format!("{parent}-{}", sample.path.file_name().unwrap().to_str().unwrap())
}

#[test]
fn samples_match_their_hash_or_are_refused() {
    let Some(dir) = shared("samples") else { return };
    if !need_fuse() {
        return;
    }
    let scratch = Scratch::new();
    each(&samples(&dir), name, |sample| match &sample.whole {
        Some(whole) => read_sample(&scratch, sample, whole),
        None => {
            let answer = open_hostile(&scratch, &name(sample), &sample.path, &[]);
            answer.refused("the table has no hash for this sample");
        }
    });
}

/// Mounts a valid sample; compares it with its hash, and with qemu-img's conversion at random ranges.
fn read_sample(scratch: &Scratch, sample: &Sample, whole: &str) {
    let point = format!("mnt-{}", name(sample));
    scratch.mkdir(&point);
    let mount = scratch
        .mount()
        .at(&point)
        .file(&sample.path)
        // A sample may have the name of a raw disk, and only a name or `format=` decides.
        .arg("format=vmdk")
        .arg("name=disk")
        .arg("-r")
        .start();
    let path = mount.file("disk");
    assert_eq!(Some(fs::metadata(&path).unwrap().len()), sample.size, "size");
    match &sample.grains {
        Some(grains) => assert_eq!(&digest_grains(&path), grains, "grain digest"),
        None => assert_eq!(sha256(&path), whole, "SHA-256"),
    }
    if need_qemu() {
        let raw = scratch.path(format!("{}.raw", name(sample)));
        qemu_img([
            "convert",
            "-f",
            "vmdk",
            "-O",
            "raw",
            sample.path.to_str().unwrap(),
            raw.to_str().unwrap(),
        ]);
        assert_same_at_random(&path, &raw, 5, 300);
    }
    mount.unmount();
}

/// Smallest number of samples and of variants that the kernel must read: at least this many are not compressed.
const MIN_VIEWS: usize = 5;

/// Mounts an image read-only with `kernel-view=required`; returns `None` if it cannot have a view (compressed grains).
fn mount_view(scratch: &Scratch, name: &str, image: &Path, allow: &[PathBuf]) -> Option<Mount> {
    let point = format!("view-{name}");
    scratch.mkdir(&point);
    let mut command = scratch
        .mount()
        .at(&point)
        .file(image)
        .arg("format=vmdk")
        .arg("name=disk")
        .arg("-r")
        .arg("kernel-view=required");
    for dir in allow {
        command = command.arg(format!("allow-dir={}", dir.display()));
    }
    match command.try_start() {
        Ok(mount) => Some(mount),
        Err(outcome) => {
            let causes = ["not stored as they are read", "whole sectors", "view-size= allows"];
            assert!(causes.iter().any(|cause| outcome.stderr.contains(cause)), "{outcome}");
            None
        }
    }
}

#[test]
fn samples_match_their_hash_through_kernel_views() {
    let Some(dir) = shared("samples") else { return };
    if !need_fuse() || !need_kernel_view() {
        return;
    }
    let (scratch, seen) = (Scratch::new(), AtomicUsize::new(0));
    let good: Vec<_> = samples(&dir)
        .into_iter()
        .filter(|sample| sample.whole.is_some())
        .collect();
    each(&good, name, |sample| {
        let Some(mount) = mount_view(&scratch, &name(sample), &sample.path, &[]) else {
            return;
        };
        let path = mount.file("disk");
        match &sample.grains {
            Some(grains) => assert_eq!(&digest_grains(&path), grains, "grain digest"),
            None => assert_eq!(Some(sha256(&path)), sample.whole, "SHA-256"),
        }
        seen.fetch_add(1, Ordering::Relaxed);
        mount.unmount();
    });
    assert!(
        seen.into_inner() >= MIN_VIEWS,
        "the kernel read fewer than {MIN_VIEWS} disks"
    );
}

#[test]
fn valid_variants_of_the_second_generator_through_kernel_views() {
    let scratch = Scratch::new();
    let Some(entries) = make(&scratch, "valid") else { return };
    if !need_kernel_view() {
        return;
    }
    let seen = AtomicUsize::new(0);
    each(&entries, title, |entry| {
        let made = scratch.path("made");
        let allow = [made.join(&entry.name)];
        let Some(mount) = mount_view(&scratch, &entry.name, &made.join(&entry.open), &allow) else {
            return;
        };
        read_entry(&mount, "disk", entry);
        seen.fetch_add(1, Ordering::Relaxed);
        mount.unmount();
    });
    assert!(
        seen.into_inner() >= MIN_VIEWS,
        "the kernel read fewer than {MIN_VIEWS} disks"
    );
}

#[test]
fn hostile_variants_of_the_second_generator_have_no_run_outside_of_their_files() {
    let scratch = Scratch::new();
    let Some(entries) = make(&scratch, "hostile") else {
        return;
    };
    each(&entries, title, |entry| {
        if let Ok(image) = open_read_only(&scratch.path("made").join(&entry.open), &[]) {
            check_runs(&image);
        }
    });
}

/// Repeats qemu's own test of this image: 100 sectors, each filled with one digit.
#[test]
fn the_sample_of_qemu_has_its_pattern() {
    let Some(sample) = shared("samples/qemu/iotest-version3.vmdk") else {
        return;
    };
    if !need_fuse() {
        return;
    }
    let scratch = Scratch::new();
    let mount = scratch.mount().file(&sample).arg("name=disk").start();
    let file = File::open(mount.file("disk")).unwrap();
    for i in 0..100u64 {
        let mut sector = [0; 512];
        file.read_exact_at(&mut sector, i * 10 * 65536 + i * 512).unwrap();
        assert_eq!(sector, [0x30 + (i % 10) as u8; 512], "sector {i} of the pattern");
    }
    drop(file);
    mount.unmount();
}

#[test]
fn info_of_every_sample_is_json_or_a_one_line_error() {
    let Some(dir) = shared("samples") else { return };
    let scratch = Scratch::new();
    each(&samples(&dir), name, |sample| {
        let outcome = scratch
            .vmdkfuse()
            .args(["--info", "--json"])
            .key("file", &sample.path)
            .arg("format=vmdk")
            .run();
        if sample.whole.is_none() {
            outcome.one_error(1, &[]);
            return;
        }
        let json = outcome.ok().json();
        assert_eq!(json[0]["size"].as_u64(), sample.size, "{json}");
        assert_eq!(json[0]["format"], "vmdk", "{json}");
    });
}

/// One variant in the manifest of the second generator.
#[derive(Debug, Deserialize)]
struct ManifestEntry {
    name: String,
    set: String,
    open: String,
    note: String,
    size: Option<u64>,
    sha256: Option<String>,
    expect: Option<String>,
    #[serde(default)]
    probes: Vec<(u64, u64, String)>,
}

/// Generates all variants of one set below the test's folder; returns `None` if the machine cannot.
fn make(scratch: &Scratch, set: &str) -> Option<Vec<ManifestEntry>> {
    let script = shared("mkvmdk.py")?;
    if !need("python3") || !need_fuse() {
        return None;
    }
    let made = scratch.path("made");
    let cmd = Cmd::new("python3")
        .arg(&script)
        .args(["--set", set, "--out"])
        .arg(&made);
    cmd.deadline(Duration::from_secs(120)).run().ok();
    let manifest: Vec<ManifestEntry> =
        serde_json::from_str(&fs::read_to_string(made.join("manifest.json")).unwrap()).unwrap();
    assert!(
        manifest.len() > 30 && manifest.iter().all(|entry| entry.set == set),
        "{} entries",
        manifest.len()
    );
    Some(manifest)
}

/// Returns the name of a variant and the note about its peculiarity.
fn title(entry: &ManifestEntry) -> String {
    format!("{} ({})", entry.name, entry.note)
}

#[test]
fn valid_variants_of_the_second_generator() {
    let scratch = Scratch::new();
    let Some(entries) = make(&scratch, "valid") else { return };
    let groups: Vec<_> = entries.chunks(12).enumerate().collect();
    each(
        &groups,
        |(number, _)| format!("group {number}"),
        |(number, group)| {
            let point = format!("mnt{number}");
            scratch.mkdir(&point);
            let mut command = scratch.mount().at(&point).arg("-r");
            for entry in *group {
                let own = scratch.path("made").join(&entry.name);
                command = command.file(scratch.path("made").join(&entry.open));
                command = command
                    .arg(format!("name={}", entry.name))
                    .arg(format!("allow-dir={}", own.display()));
            }
            let mount = command.start();
            each(group, title, |entry| read_entry(&mount, &entry.name, entry));
            mount.unmount();
        },
    );
}

/// Compares a mounted valid variant with the size, hash and probes in the manifest.
fn read_entry(mount: &Mount, name: &str, entry: &ManifestEntry) {
    let path = mount.file(name);
    assert_eq!(fs::metadata(&path).unwrap().len(), entry.size.unwrap(), "size");
    let hash = entry.sha256.as_deref().unwrap();
    if hash != "skip" {
        assert_eq!(sha256(&path), hash, "SHA-256");
    }
    for (offset, len, expected) in &entry.probes {
        assert_eq!(&digest_range(&path, *offset, *len), expected, "{len} bytes at {offset}");
    }
    assert!(
        hash != "skip" || !entry.probes.is_empty(),
        "the manifest has neither a hash nor probes"
    );
}

#[test]
fn hostile_variants_of_the_second_generator() {
    let scratch = Scratch::new();
    let Some(entries) = make(&scratch, "hostile") else {
        return;
    };
    each(&entries, title, |entry| {
        let answer = open_hostile(&scratch, &entry.name, &scratch.path("made").join(&entry.open), &[]);
        // The type is a label, which decides no byte: it is read with a warning.
        let is_label = ["no_create_type", "create_type_unknown"].contains(&entry.name.as_str());
        match entry
            .expect
            .as_deref()
            .map(|expect| if is_label { "warn" } else { expect })
        {
            Some("reject" | "policy") => drop(answer.refused(&entry.note)),
            Some("eio") => {
                if let Answer::Mounted(mount, path) = &answer {
                    assert!(meets_eio(path), "the damaged range was read without an error");
                    assert!(
                        mount.peak_memory() <= 128 << 20,
                        "{} bytes in memory",
                        mount.peak_memory()
                    );
                }
            }
            Some("warn") => {
                if let Answer::Mounted(_, path) = &answer {
                    meets_eio(path);
                }
            }
            other => panic!("unknown expectation {other:?}"),
        }
    });
}

/// Reads the first 8 MiB and the start of the first 64 data ranges; returns true if a read fails with `EIO`.
///
/// Panics at any other error.
fn meets_eio(path: &Path) -> bool {
    let file = File::open(path).unwrap();
    let size = file.metadata().unwrap().len();
    let is_bad = |at: u64, len: u64| {
        let mut buf = vec![0; len as usize];
        match file.read_exact_at(&mut buf, at) {
            Err(e) if e.kind() != io::ErrorKind::UnexpectedEof => {
                assert_eq!(e.raw_os_error(), Some(libc::EIO), "{len} bytes at {at}: {e}");
                true
            }
            _ => false,
        }
    };
    let first = (0..size.min(8 << 20))
        .step_by(65536)
        .any(|at| is_bad(at, 65536.min(size - at)));
    // A damaged table may make SEEK_DATA fail, which panics: the start of the disk is read first, and fails before.
    first
        || data_ranges(path)
            .iter()
            .take(64)
            .any(|range| is_bad(range.start, (range.end - range.start).min(1 << 20)))
}
