//! Overlays: a disk with `cow=` holds what was written to it, its source is never touched, other programs read the chain,
//! and a commit may stop anywhere.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "helpers of tests, in which a panic is the verdict"
)]

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::thread;
use std::time::{Duration, SystemTime};

use fuse_tests::harness::{
    Scratch, assert_same, need, need_fuse, poll_until, program, qemu_img, raw_with_islands, sha256,
};
use fuse_tests::make::model::Random;
use fuse_tests::make::{self, SECTOR};
use fuse_tests::written::{Model, alone, data, read, writable};
use tempfile::tempdir;
use vmdkfuse::block::Lba;
use vmdkfuse::config::{DiskConfig, LocalConfig, Overlay, SourceConfig};
use vmdkfuse::error::{Error, ErrorKind, Result};
use vmdkfuse::image::{self, Commit, Image, Next, Step, describe_overlay, open_overlay, open_source};
use vmdkfuse::store::Access;
use vmdkfuse::vmdk::{self, VmdkDisk};

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

/// The disk in `base` with its overlay.
fn disk(base: &Path, cow: &Path) -> DiskConfig {
    let mut disk = DiskConfig::new("disk", SourceConfig::Local(LocalConfig::new(base)));
    disk.overlay = Some(Overlay::File(cow.to_path_buf()));
    disk
}

fn local(disk: &mut DiskConfig) -> &mut LocalConfig {
    let SourceConfig::Local(local) = &mut disk.source else { panic!("a disk in a file") };
    local
}

/// The overlay of a disk, without what is below.
fn delta(disk: &DiskConfig) -> Result<VmdkDisk> {
    let mut alike = disk.clone();
    alike.read_only = true;
    Ok(open_overlay(&alike, &open_source(disk)?, Access::Read)?.unwrap())
}

/// A place to write at: anywhere, but often where a grain, a table or the disk ends.
fn place(random: &mut Random, sectors: u64) -> (u64, u64) {
    const EDGES: [u64; 5] = [8, 16, 128, 8192, 65536];
    let mut at = random.below(sectors);
    match random.below(4) {
        0 | 1 => {
            let edge = EDGES[random.below(EDGES.len() as u64) as usize];
            at = (at / edge * edge + random.below(3)).saturating_sub(1).min(sectors - 1);
        }
        2 => at = sectors - 1 - random.below(sectors.min(40)),
        _ => {}
    }
    let len = if random.below(8) == 0 { 1 + random.below(300) } else { 1 + random.below(24) };
    (at, len.min(sectors - at))
}

/// Some writes, zeroes, reads and flushes.
fn exercise(image: &Image, model: &mut Model, random: &mut Random, steps: u64) {
    let disk = image.disk().as_ref();
    let writer = disk.writer().expect("a disk with an overlay can be written to");
    for step in 0..steps {
        let (at, sectors) = place(random, model.sectors());
        match random.below(8) {
            0..=3 => {
                let data = data(step, sectors);
                writer.write_at(Lba(at), &data).unwrap();
                model.write(at, &data);
            }
            4 => {
                writer.zero(Lba(at)..Lba(at + sectors), random.below(2) == 0).unwrap();
                model.write(at, &vec![0; (sectors * SECTOR) as usize]);
            }
            5 if step % 9 == 0 => writer.flush().unwrap(),
            _ => assert!(read(disk, at, sectors) == model.read(at, sectors), "step {step}: {at}, {sectors} sectors"),
        }
    }
}

/// Opens the disk for reading and compares it, and checks its overlay.
#[track_caller]
fn same(disk: &DiskConfig, model: &Model, what: &str) {
    let mut reading = disk.clone();
    reading.read_only = true;
    model.compare(image::open(&reading).unwrap_or_else(|e| panic!("{what}: {e}")).disk().as_ref(), what);
    let report = vmdk::check(&delta(disk).unwrap());
    assert_eq!(report.errors, Vec::<String>::new(), "{what}");
}

/// Name and content of all files of a folder, below folders too.
fn content(dir: &Path) -> BTreeMap<PathBuf, (u64, SystemTime, Option<String>)> {
    let mut found = BTreeMap::new();
    for entry in fs::read_dir(dir).unwrap().map(|e| e.unwrap().path()) {
        if entry.is_dir() {
            found.extend(content(&entry));
        } else {
            let meta = fs::symlink_metadata(&entry).unwrap();
            // files of which little is data have names of their own for it: mtime and length do
            let hash = (meta.len() < 256 << 20).then(|| sha256(&entry));
            found.insert(entry, (meta.len(), meta.modified().unwrap(), hash));
        }
    }
    found
}

#[test]
fn every_kind_of_source_takes_writes_in_an_overlay_and_stays_as_it_is() {
    let _alone = alone();
    let dir = tempdir().unwrap();
    let mut seen = 0;
    for (variant, seed) in make::valid().iter().zip(1..) {
        let made = variant.make(dir.path(), seed).unwrap();
        let before = content(&dir.path().join(variant.name));
        let cow = dir.path().join(format!("{}.cow.vmdk", variant.name));
        let mut disk = disk(&made.open, &cow);
        local(&mut disk).allow_dirs = made.allow_dirs.clone();
        let sectors = made.sectors();
        let mut model = Model::new(sectors, move |at, n| made.read(at, n));
        let mut random = Random::new(seed);
        for round in 0..3 {
            let image = image::open(&disk).unwrap_or_else(|e| panic!("{}: {e}", variant.name));
            exercise(&image, &mut model, &mut random, 120);
            let writer = image.disk().writer().unwrap();
            // a process that ends badly leaves what was flushed
            if round == 1 {
                writer.flush().unwrap();
            } else {
                writer.close().unwrap();
            }
            drop(image);
            same(&disk, &model, &format!("{}, round {round}", variant.name));
        }
        assert_eq!(content(&dir.path().join(variant.name)), before, "{}: the source was changed", variant.name);
        fs::remove_dir_all(dir.path().join(variant.name)).unwrap();
        fs::remove_file(cow).unwrap();
        seen += 1;
    }
    assert!(seen >= 30, "only {seen} variants");
    assert!(fs::read_dir(dir.path()).unwrap().next().is_none(), "something is left beside the overlays");
}

#[test]
fn raw_images_of_any_length_take_writes_in_an_overlay() {
    let _alone = alone();
    let dir = tempdir().unwrap();
    for (len, seed) in
        [1, 511, 512, 513, 700, 8191, 8192, 8704, (4 << 20) + 77, (9 << 20) + 512 * 37].into_iter().zip(1..)
    {
        let [raw, cow] = ["base.img", "cow.vmdk"].map(|name| dir.path().join(name));
        raw_with_islands(&raw, len, seed);
        let before = fs::read(&raw).unwrap();
        let mut model = Model::of_file(&raw);
        let disk = disk(&raw, &cow);
        for round in 0..3 {
            let image = image::open(&disk).unwrap();
            exercise(&image, &mut model, &mut Random::new(seed * 10 + round), 150);
            image.disk().writer().unwrap().close().unwrap();
            drop(image);
            same(&disk, &model, &format!("{len} bytes, round {round}"));
        }
        assert!(fs::read(&raw).unwrap() == before, "{len} bytes: the source was changed");
        fs::remove_file(cow).unwrap();
    }
}

/// The kinds that qemu makes, and how.
const KINDS: [(&str, &str); 4] = [
    ("sparse", "subformat=monolithicSparse"),
    ("flat", "subformat=monolithicFlat"),
    ("split", "subformat=twoGbMaxExtentSparse"),
    ("stream", "subformat=streamOptimized"),
];

/// Makes each of [`KINDS`] of what is in `raw`, and a chain of two; their names.
fn qemu_images(dir: &Path, raw: &Path) -> Vec<PathBuf> {
    let mut made = Vec::new();
    for (name, options) in KINDS {
        let path = dir.join(format!("{name}.vmdk"));
        qemu_img(["convert", "-O", "vmdk", "-o", options, text(raw), text(&path)]);
        made.push(path);
    }
    let top = dir.join("top.vmdk");
    qemu_img(["convert", "-O", "vmdk", text(raw), text(&dir.join("bottom.vmdk"))]);
    qemu_img(["create", "-f", "vmdk", "-b", text(&dir.join("bottom.vmdk")), "-F", "vmdk", text(&top)]);
    made.push(top);
    made
}

/// What a commit can write to.
fn bases(dir: &Path, raw: &Path) -> Vec<PathBuf> {
    let mut made = qemu_images(dir, raw);
    made.retain(|base| !base.ends_with("stream.vmdk"));
    made.push(dir.join("plain.img"));
    fs::copy(raw, dir.join("plain.img")).unwrap();
    made
}

fn format(path: &Path) -> &'static str {
    if path.extension().is_some_and(|extension| extension == "vmdk") { "vmdk" } else { "raw" }
}

#[test]
fn qemu_reads_the_chain_of_an_overlay_and_gets_the_same_bytes() {
    let _alone = alone();
    if !need("qemu-img") {
        return;
    }
    let dir = tempdir().unwrap();
    let [raw, expected, seen] = ["a.raw", "expected.raw", "seen.raw"].map(|name| dir.path().join(name));
    raw_with_islands(&raw, (20 << 20) + 512 * 5, 3);
    for (base, seed) in qemu_images(dir.path(), &raw).iter().zip(1..) {
        for cow in [dir.path().join("cow.vmdk"), tempdir().unwrap().keep().join("elsewhere.vmdk")] {
            let before = sha256(base);
            let disk = disk(base, &cow);
            let mut model = Model::of_file(&raw);
            let image = image::open(&disk).unwrap();
            exercise(&image, &mut model, &mut Random::new(seed), 300);
            image.disk().writer().unwrap().close().unwrap();
            drop(image);
            model.save(&expected);
            qemu_img(["compare", "-f", "vmdk", "-F", "raw", text(&cow), text(&expected)]);
            qemu_img(["convert", "-f", "vmdk", "-O", "raw", text(&cow), text(&seen)]);
            assert_same(&seen, &expected);
            qemu_img(["check", text(&cow)]);
            let chain = qemu_img(["info", "--backing-chain", "--output=json", text(&cow)]).json();
            assert!(chain.as_array().unwrap().len() >= 2, "{chain}");
            let hint = chain[0]["backing-filename"].as_str().unwrap();
            let near = cow.parent() == Some(dir.path());
            assert_eq!(hint, if near { base.file_name().unwrap().to_str().unwrap() } else { text(base) });
            // named as a disk of its own, its base is found by what it says
            let mut alone = DiskConfig::new("disk", SourceConfig::Local(LocalConfig::new(&cow)));
            local(&mut alone).allow_dirs = vec![dir.path().to_path_buf()];
            alone.read_only = true;
            model.compare(image::open(&alone).unwrap().disk().as_ref(), "the chain");
            assert_eq!(sha256(base), before);
            fs::remove_file(&cow).unwrap();
            if !near {
                fs::remove_dir(cow.parent().unwrap()).unwrap();
            }
        }
    }
}

#[test]
fn an_overlay_over_another_base_is_refused_and_both_are_named() {
    let _alone = alone();
    let dir = tempdir().unwrap();
    let at = |name: &str| dir.path().join(name);
    if !need("qemu-img") {
        return;
    }
    for (name, size) in [("a.vmdk", "4M"), ("b.vmdk", "4M"), ("large.vmdk", "5M")] {
        qemu_img(["create", "-f", "vmdk", text(&at(name)), size]);
    }
    for (name, len) in [("a.img", 4 << 20), ("b.img", 4 << 20), ("large.img", 5 << 20)] {
        fs::write(at(name), vec![7; len]).unwrap();
    }
    // qemu gives all disks random CIDs
    image::open(&disk(&at("a.vmdk"), &at("v.cow"))).unwrap();
    image::open(&disk(&at("a.img"), &at("r.cow"))).unwrap();
    let cases = [
        ("b.vmdk", "v.cow", ErrorKind::Corrupt, "has the CID"),
        ("large.vmdk", "v.cow", ErrorKind::Corrupt, "8192 sectors"),
        ("a.img", "v.cow", ErrorKind::Corrupt, "a disk with the CID"),
        ("b.img", "r.cow", ErrorKind::Corrupt, "8192 sectors of a.img"),
        ("large.img", "r.cow", ErrorKind::Corrupt, "10240 sectors"),
        ("a.vmdk", "r.cow", ErrorKind::Corrupt, "has the CID"),
        ("a.vmdk", "b.vmdk", ErrorKind::Usage, "is no overlay"),
    ];
    for (base, cow, kind, says) in cases {
        let before = fs::read(at(cow)).unwrap();
        for read_only in [false, true] {
            let mut disk = disk(&at(base), &at(cow));
            disk.read_only = read_only;
            let error = image::open(&disk).expect_err("another base");
            assert_eq!(error.kind(), kind, "{error}");
            for says in [text(&at(cow)), says] {
                assert!(error.to_string().contains(says), "`{error}` does not say {says}");
            }
            assert!(kind == ErrorKind::Usage || error.to_string().contains(text(&at(base))), "{error}");
        }
        assert!(fs::read(at(cow)).unwrap() == before, "{cow} over {base}: refused, but changed");
    }
    // `degraded=cid` accepts another state of the disk, but no other size
    for (base, cow, accepted) in [("b.vmdk", "v.cow", true), ("b.img", "r.cow", true), ("large.img", "r.cow", false)] {
        let mut disk = disk(&at(base), &at(cow));
        local(&mut disk).accept_cid_mismatch = true;
        assert_eq!(image::open(&disk).is_ok(), accepted, "{cow} over {base}");
    }
}

#[test]
fn a_raw_base_that_was_changed_is_refused_and_one_that_was_moved_along_is_not() {
    let _alone = alone();
    let dir = tempdir().unwrap();
    let [old, new] = ["old", "new"].map(|name| dir.path().join(name));
    fs::create_dir(&old).unwrap();
    fs::write(old.join("base.img"), [7; 9000]).unwrap();
    let image = image::open(&disk(&old.join("base.img"), &old.join("cow.vmdk"))).unwrap();
    image.disk().writer().unwrap().write_at(Lba(3), &[1; 512]).unwrap();
    image.disk().writer().unwrap().close().unwrap();
    drop(image);
    fs::rename(&old, &new).unwrap();
    let disk = disk(&new.join("base.img"), &new.join("cow.vmdk"));
    assert_eq!(read(image::open(&disk).unwrap().disk().as_ref(), 3, 1), [1; 512]);
    let base = File::options().write(true).open(new.join("base.img")).unwrap();
    base.set_modified(SystemTime::now() + Duration::from_secs(5)).unwrap();
    let error = image::open(&disk).unwrap_err();
    assert!(error.to_string().contains("was changed since") && error.to_string().contains("degraded=cid"), "{error}");
}

#[test]
fn an_overlay_has_one_user_and_a_reader_makes_none() {
    let _alone = alone();
    let dir = tempdir().unwrap();
    let [base, cow] = ["base.img", "cow.vmdk"].map(|name| dir.path().join(name));
    fs::write(&base, [7; 9000]).unwrap();
    let disk = disk(&base, &cow);
    let mut reading = disk.clone();
    reading.read_only = true;
    assert_eq!(image::open(&reading).unwrap_err().kind(), ErrorKind::NotFound);
    assert!(!cow.exists());
    let first = image::open(&disk).unwrap();
    let error = image::open(&disk).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Busy);
    assert!(error.to_string().contains(text(&cow)), "{error}");
    assert_eq!(image::open(&reading).unwrap_err().kind(), ErrorKind::Busy);
    drop(first);
    image::open(&disk).unwrap();
    let mut itself = disk;
    itself.overlay = Some(Overlay::File(base.clone()));
    assert!(image::open(&itself).is_err());
    local(&mut itself).lock = false;
    let error = image::open(&itself).unwrap_err();
    assert!(error.to_string().contains("is a file of the disk itself"), "{error}");
    assert!(fs::read(&base).unwrap() == [7; 9000]);
}

#[test]
fn a_base_with_an_overlay_beside_it_is_not_written_to_without_force() {
    let _alone = alone();
    let dir = tempdir().unwrap();
    if !need("qemu-img") {
        return;
    }
    let [base, cow] = ["base.vmdk", "cow.vmdk"].map(|name| dir.path().join(name));
    qemu_img(["create", "-f", "vmdk", text(&base), "4M"]);
    drop(image::open(&disk(&base, &cow)).unwrap());
    let other = dir.path().join("other.vmdk");
    drop(image::open(&disk(&base, &other)).unwrap());
    // of two overlays only one can be merged
    let mut disk = disk(&base, &cow);
    let error = Commit::open(&disk).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Policy);
    assert!(error.to_string().contains("other.vmdk") && error.to_string().contains("force=true"), "{error}");
    local(&mut disk).force = true;
    Commit::open(&disk).unwrap();
    fs::remove_file(&other).unwrap();
    local(&mut disk).force = false;
    Commit::open(&disk).unwrap();
}

#[test]
fn a_temporary_overlay_leaves_no_file_however_it_ends() {
    let _alone = alone();
    if !need_fuse() {
        return;
    }
    let scratch = Scratch::new();
    let base = scratch.write("base.img", vec![7; 1 << 20]);
    let tmp = scratch.mkdir("tmp");
    let names = || fs::read_dir(&tmp).unwrap().count();
    for kill in [false, true] {
        let mut mount = scratch.mount().env("TMPDIR", text(&tmp)).arg("cow=tmp").file(&base).foreground().start();
        assert_eq!(names(), 0, "the overlay has a name");
        let deleted = format!("{}/#", text(&tmp));
        let open = fs::read_dir(format!("/proc/{}/fd", mount.pid())).unwrap();
        let links = open.flatten().filter_map(|fd| fs::read_link(fd.path()).ok());
        assert!(links.into_iter().any(|link| text(&link).starts_with(&deleted)), "no overlay is open");
        if kill {
            mount.signal(nix::sys::signal::Signal::SIGKILL);
            mount.wait_end();
        } else {
            mount.unmount();
        }
        assert_eq!(names(), 0);
    }
    assert!(fs::read(&base).unwrap() == vec![7; 1 << 20]);
}

/// A base and an overlay over it with `steps` of changes; what both show.
fn changed(base: &Path, cow: &Path, raw: &Path, seed: u64, steps: u64) -> (DiskConfig, Model) {
    let disk = disk(base, cow);
    let mut model = Model::of_file(raw);
    let image = image::open(&disk).unwrap();
    exercise(&image, &mut model, &mut Random::new(seed), steps);
    image.disk().writer().unwrap().close().unwrap();
    (disk, model)
}

fn go_on(_: Step) -> Result<Next> {
    Ok(Next::GoOn)
}

/// Everything that must hold after a whole commit.
#[track_caller]
fn merged(disk: &DiskConfig, model: &Model, what: &str) {
    same(disk, model, &format!("{what}: both"));
    assert!(!describe_overlay(&delta(disk).unwrap()).unwrap().unfinished_commit, "{what}: the mark is still there");
    let mut alone = disk.clone();
    (alone.overlay, alone.read_only) = (None, true);
    model.compare(image::open(&alone).unwrap().disk().as_ref(), &format!("{what}: the base alone"));
}

#[test]
fn a_commit_merges_into_every_kind_of_base() {
    let _alone = alone();
    if !need("qemu-img") {
        return;
    }
    let dir = tempdir().unwrap();
    let [raw, expected, cow] = ["a.raw", "expected.raw", "cow.vmdk"].map(|name| dir.path().join(name));
    raw_with_islands(&raw, (12 << 20) + 512 * 5, 3);
    for (base, seed) in bases(dir.path(), &raw).iter().zip(1..) {
        let (disk, model) = changed(base, &cow, &raw, seed, 400);
        let bottom = sha256(&dir.path().join("bottom.vmdk"));
        let commit = Commit::open(&disk).unwrap();
        assert!(commit.total() > 0);
        assert!(commit.run(&mut go_on).unwrap());
        drop(commit);
        merged(&disk, &model, text(base));
        model.save(&expected);
        qemu_img(["compare", "-f", format(base), "-F", "raw", text(base), text(&expected)]);
        if format(base) == "vmdk" {
            qemu_img(["compare", "-f", "vmdk", "-F", "raw", text(&cow), text(&expected)]);
            if !base.ends_with("flat.vmdk") {
                qemu_img(["check", text(base)]);
            }
        }
        assert_eq!(sha256(&dir.path().join("bottom.vmdk")), bottom, "a parent was changed");
        fs::remove_file(&cow).unwrap();
    }
}

#[test]
fn a_commit_to_a_stream_is_refused_and_changes_nothing() {
    let _alone = alone();
    if !need("qemu-img") {
        return;
    }
    let dir = tempdir().unwrap();
    let [raw, cow, base] = ["a.raw", "cow.vmdk", "stream.vmdk"].map(|name| dir.path().join(name));
    raw_with_islands(&raw, 2 << 20, 3);
    qemu_img(["convert", "-O", "vmdk", "-o", "subformat=streamOptimized", text(&raw), text(&base)]);
    let (disk, model) = changed(&base, &cow, &raw, 1, 50);
    let before = (sha256(&base), sha256(&cow));
    let error = Commit::open(&disk).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::ReadOnly);
    assert!(error.to_string().contains("can't be merged into its base"), "{error}");
    assert!(error.to_string().contains("streamOptimized"), "{error}");
    assert_eq!((sha256(&base), sha256(&cow)), before);
    same(&disk, &model, "after the refusal");
}

#[test]
fn a_commit_to_a_raw_image_of_any_length() {
    let _alone = alone();
    let dir = tempdir().unwrap();
    let [base, cow, keep] = ["base.img", "cow.vmdk", "keep.raw"].map(|name| dir.path().join(name));
    for (len, seed) in [1, 512, 700, 8191, 8704, (1 << 20) + 77].into_iter().zip(1..) {
        raw_with_islands(&keep, len, seed);
        fs::copy(&keep, &base).unwrap();
        let (disk, model) = changed(&base, &cow, &keep, seed, 60);
        assert!(Commit::open(&disk).unwrap().run(&mut go_on).unwrap());
        merged(&disk, &model, &format!("{len} bytes"));
        fs::remove_file(&cow).unwrap();
    }
}

#[test]
fn an_overlay_goes_on_after_a_commit() {
    let _alone = alone();
    let dir = tempdir().unwrap();
    if !need("qemu-img") {
        return;
    }
    let [raw, base, cow] = ["a.raw", "base.vmdk", "cow.vmdk"].map(|name| dir.path().join(name));
    raw_with_islands(&raw, 4 << 20, 3);
    qemu_img(["convert", "-O", "vmdk", text(&raw), text(&base)]);
    let (disk, mut model) = changed(&base, &cow, &raw, 1, 50);
    for round in 0..4 {
        assert!(Commit::open(&disk).unwrap().run(&mut go_on).unwrap());
        merged(&disk, &model, &format!("round {round}"));
        let image = image::open(&disk).unwrap();
        exercise(&image, &mut model, &mut Random::new(round), 50);
        image.disk().writer().unwrap().close().unwrap();
    }
}

/// Where a commit is cut off: at the n-th step that `at` says yes to.
type Cut = (&'static str, fn(Step) -> bool, usize);

const CUTS: [Cut; 9] = [
    ("marked", |s| s == Step::Marked, 1),
    ("told", |s| s == Step::Told, 1),
    ("begun", |s| s == Step::Begun, 1),
    ("first range", |s| matches!(s, Step::Copied(_)), 1),
    ("second range", |s| matches!(s, Step::Copied(_)), 2),
    ("tenth range", |s| matches!(s, Step::Copied(_)), 10),
    ("hundredth range", |s| matches!(s, Step::Copied(_)), 100),
    ("last range", |s| matches!(s, Step::Copied(_)), usize::MAX),
    ("closed", |s| s == Step::Closed, 1),
];

/// Runs a commit until the cut. Crashed: with an error, which ends everything as it is; else it is asked to stop.
fn cut_off(disk: &DiskConfig, (_, at, nth): Cut, crash: bool) -> Result<bool> {
    let commit = Commit::open(disk)?;
    let total = commit.total();
    let (mut seen, mut stop) = (0, false);
    commit.run(&mut |step| {
        seen += usize::from(at(step));
        let last = nth == usize::MAX && step == Step::Copied(total);
        stop |= at(step) && seen == nth || last;
        match (stop, crash) {
            (true, true) => Err(Error::corrupt("cut off")),
            (true, false) => Ok(Next::Stop),
            (false, _) => Ok(Next::GoOn),
        }
    })
}

#[test]
fn a_commit_that_is_cut_off_anywhere_is_completed_by_the_next() {
    let _alone = alone();
    if !need("qemu-img") {
        return;
    }
    let dir = tempdir().unwrap();
    let [raw, cow] = ["a.raw", "cow.vmdk"].map(|name| dir.path().join(name));
    raw_with_islands(&raw, (3 << 20) + 512 * 5, 3);
    for base in &bases(dir.path(), &raw) {
        let keep = tempdir().unwrap();
        copy_all(dir.path(), keep.path());
        for (cut, seed) in CUTS.into_iter().zip(1..) {
            for crash in [true, false] {
                let what = format!("{}, {}, crash {crash}", base.display(), cut.0);
                copy_all(keep.path(), dir.path());
                let (disk, mut model) = changed(base, &cow, &raw, seed, 300);
                let done = cut_off(&disk, cut, crash);
                let has_cid = format(base) == "vmdk";
                match (crash, cut.0) {
                    (_, "told" | "begun") if !has_cid => assert!(done.unwrap(), "{what}"),
                    (true, _) => assert_eq!(done.unwrap_err().to_string(), "cut off", "{what}"),
                    (false, "closed") => assert!(done.unwrap(), "{what}"),
                    (false, _) => assert!(!done.unwrap(), "{what}"),
                }
                same(&disk, &model, &what);
                // the pair may be used further, and cut off again
                let image = image::open(&disk).unwrap();
                exercise(&image, &mut model, &mut Random::new(seed + 100), 40);
                image.disk().writer().unwrap().close().unwrap();
                drop(image);
                let _ = cut_off(&disk, CUTS[seed as usize % CUTS.len()], true);
                same(&disk, &model, &format!("{what}, twice"));
                assert!(Commit::open(&disk).unwrap().run(&mut go_on).unwrap());
                merged(&disk, &model, &what);
                fs::remove_file(&cow).unwrap();
            }
        }
    }
}

/// Copies the files of one folder over those of another.
fn copy_all(from: &Path, to: &Path) {
    for entry in fs::read_dir(from).unwrap().flatten() {
        fs::copy(entry.path(), to.join(entry.file_name())).unwrap();
    }
}

/// The value of a setting in a file that holds a descriptor, and where it is.
fn setting(path: &Path, key: &str) -> (u64, String) {
    let bytes = fs::read(path).unwrap();
    let key = format!("\n{key}");
    let at = bytes.windows(key.len()).position(|w| w == key.as_bytes()).unwrap() + key.len();
    let text: String = bytes[at..at + 8].iter().map(|&b| char::from(b)).collect();
    (at as u64, text)
}

#[test]
fn a_cid_of_which_a_power_cut_left_a_mixture_is_accepted_while_a_commit_is_unfinished() {
    let _alone = alone();
    if !need("qemu-img") {
        return;
    }
    let dir = tempdir().unwrap();
    let [raw, base, cow] = ["a.raw", "base.vmdk", "cow.vmdk"].map(|name| dir.path().join(name));
    raw_with_islands(&raw, 2 << 20, 3);
    qemu_img(["convert", "-O", "vmdk", text(&raw), text(&base)]);
    let (disk, model) = changed(&base, &cow, &raw, 1, 60);
    cut_off(&disk, CUTS[1], true).unwrap_err();
    let ((at, old), (_, new)) = (setting(&base, "CID="), setting(&cow, "parentCID="));
    assert_ne!(old, new);
    let write = |cid: &str| File::options().write(true).open(&base).unwrap().write_all_at(cid.as_bytes(), at).unwrap();
    for cut in 0..=8 {
        write(&format!("{}{}", &new[..cut], &old[cut..]));
        same(&disk, &model, &format!("{cut} digits"));
    }
    let other = if old.starts_with('0') || new.starts_with('0') { "1" } else { "0" };
    let other = if old.starts_with(other) || new.starts_with(other) { "2" } else { other };
    write(&format!("{other}{}", &old[1..]));
    assert_eq!(image::open(&disk).unwrap_err().kind(), ErrorKind::Corrupt);
    write(&format!("{}{}", &new[..4], &old[4..]));
    assert!(Commit::open(&disk).unwrap().run(&mut go_on).unwrap());
    merged(&disk, &model, "a mixture");
}

#[test]
fn a_base_whose_commit_is_unfinished_is_protected_under_both_cids() {
    let _alone = alone();
    if !need("qemu-img") {
        return;
    }
    let dir = tempdir().unwrap();
    let [raw, base, cow] = ["a.raw", "base.vmdk", "cow.vmdk"].map(|name| dir.path().join(name));
    raw_with_islands(&raw, 2 << 20, 3);
    for cut in CUTS.iter().take(4) {
        qemu_img(["convert", "-O", "vmdk", text(&raw), text(&base)]);
        let (disk, _) = changed(&base, &cow, &raw, 1, 60);
        cut_off(&disk, *cut, true).unwrap_err();
        let error = writable(&base).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Policy, "{}: {error}", cut.0);
        fs::remove_file(&cow).unwrap();
    }
}

/// `vmdkfuse --commit`, killed after some time unless it has ended; whether it had, well.
fn commit_for(base: &Path, cow: &Path, time: Option<Duration>) -> bool {
    let mut file = std::ffi::OsString::from("file=");
    file.push(base);
    let mut overlay = std::ffi::OsString::from("cow=");
    overlay.push(cow);
    let mut child = Command::new(program())
        .args(["--commit".into(), overlay, file])
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    if let Some(time) = time {
        thread::sleep(time);
        child.kill().unwrap();
    }
    let mut status = None;
    if !poll_until(Duration::from_secs(60), || {
        status = child.try_wait().unwrap();
        status.is_some()
    }) {
        child.kill().unwrap();
        child.wait().unwrap();
        panic!("the commit does not end");
    }
    status.unwrap().success()
}

#[test]
fn a_commit_that_is_killed_at_any_moment_is_completed_by_the_next() {
    let _alone = alone();
    if !need("qemu-img") {
        return;
    }
    let dir = tempdir().unwrap();
    let [raw, cow] = ["a.raw", "cow.vmdk"].map(|name| dir.path().join(name));
    raw_with_islands(&raw, 24 << 20, 3);
    let mut random = Random::new(11);
    let mut killed = 0;
    for base in &bases(dir.path(), &raw) {
        let (disk, mut model) = changed(base, &cow, &raw, 5, 100);
        let image = image::open(&disk).unwrap();
        let data: Vec<u8> = (0..8 << 20).map(|i: u32| (i >> 9) as u8 | 1).collect();
        image.disk().writer().unwrap().write_at(Lba(11), &data).unwrap();
        model.write(11, &data);
        image.disk().writer().unwrap().close().unwrap();
        drop(image);
        // micros that a whole commit may take, found out on the way
        let mut limit = 40_000;
        for _ in 0..12 {
            let ended = commit_for(base, &cow, Some(Duration::from_micros(random.below(limit))));
            killed += u32::from(!ended);
            limit = if ended { limit * 2 / 3 } else { limit * 4 / 3 };
            same(&disk, &model, &format!("{} after a kill", base.display()));
        }
        assert!(commit_for(base, &cow, None));
        merged(&disk, &model, text(base));
        fs::remove_file(&cow).unwrap();
    }
    assert!(killed >= 4, "only {killed} commits were killed before their end");
}

/// Random writes of any length at any byte through a mount, into `model` as well.
fn write_through(file: &File, model: &File, random: &mut Random, len: u64) {
    for step in 0..200 {
        let at = random.below(len);
        let count = (1 + random.below(if step % 10 == 0 { 200_000 } else { 6_000 })).min(len - at);
        let data: Vec<u8> = (0..count).map(|i| (i / 100 + step) as u8).collect();
        for file in [file, model] {
            file.write_all_at(&data, at).unwrap();
        }
        if step % 50 == 0 {
            file.sync_all().unwrap();
        }
    }
}

#[test]
fn a_mounted_disk_with_an_overlay_is_written_to_and_merged() {
    let _alone = alone();
    if !need_fuse() || !need("qemu-img") {
        return;
    }
    let scratch = Scratch::new();
    let [raw, cow, expected] = ["a.raw", "cow.vmdk", "expected.raw"].map(|name| scratch.path(name));
    let len = (6 << 20) + 512 * 5;
    raw_with_islands(&raw, len, 3);
    let mut all = bases(scratch.root(), &raw);
    all.push(scratch.path("stream.vmdk"));
    for (base, seed) in all.iter().zip(1..) {
        let before = sha256(base);
        fs::copy(&raw, &expected).unwrap();
        let mut random = Random::new(seed);
        for _ in 0..2 {
            let mount = scratch.mount().arg(format!("cow={}", text(&cow))).arg("name=disk").file(base).start();
            let [file, model] = [&mount.file("disk"), &expected].map(|path| File::options().write(true).open(path));
            let (file, model) = (file.unwrap(), model.unwrap());
            write_through(&file, &model, &mut random, len);
            drop(file);
            assert_same(&mount.file("disk"), &expected);
            mount.unmount();
        }
        assert_eq!(sha256(base), before, "{}: the source was changed", base.display());
        let words = |action: &str| {
            let cmd = scratch.vmdkfuse().arg(action).arg(format!("cow={}", text(&cow)));
            cmd.arg(format!("file={}", text(base)))
        };
        words("--check").run().ok();
        let info = words("--info").arg("--json").run().ok().json();
        assert!(info[0]["overlay"]["changed"].as_u64().unwrap() > 0, "{info}");
        assert_eq!(info[0]["writable"], true, "{info}");
        if base.ends_with("stream.vmdk") {
            words("--commit").run().expect_code(1).error_names(&["streamOptimized"]);
            continue;
        }
        let done = words("--commit").run().ok();
        assert!(done.stdout.contains("may be removed"), "{}", done.stdout);
        let mount = scratch.mount().arg("name=disk").arg("readonly=true").file(base).start();
        assert_same(&mount.file("disk"), &expected);
        mount.unmount();
        fs::remove_file(&cow).unwrap();
    }
}

#[test]
fn the_map_of_an_overlay_lists_what_it_changed() {
    let _alone = alone();
    let scratch = Scratch::new();
    let base = scratch.write("base.img", vec![7; 1 << 20]);
    let cow = scratch.path("cow.vmdk");
    let image = image::open(&disk(&base, &cow)).unwrap();
    let writer = image.disk().writer().unwrap();
    writer.write_at(Lba(17), &[1; 512]).unwrap();
    writer.zero(Lba(160)..Lba(192), true).unwrap();
    writer.close().unwrap();
    drop(image);
    let cmd = scratch.vmdkfuse().args(["--map", "--json"]).arg(format!("cow={}", text(&cow)));
    let map = cmd.arg(format!("file={}", text(&base))).run().ok().json();
    let wanted = serde_json::json!([
        { "start": 8192, "length": 8192, "content": "data" },
        { "start": 81920, "length": 16384, "content": "zero" },
    ]);
    assert_eq!(map[0]["map"], wanted, "{map}");
}

#[test]
fn a_commit_that_is_asked_to_end_stops_between_two_ranges() {
    let _alone = alone();
    let scratch = Scratch::new();
    let [base, cow] = ["base.img", "cow.vmdk"].map(|name| scratch.path(name));
    File::create(&base).unwrap().set_len(256 << 20).unwrap();
    let disk = disk(&base, &cow);
    let image = image::open(&disk).unwrap();
    let data: Vec<u8> = (0..1 << 20).map(|i: u32| (i >> 9) as u8 | 1).collect();
    for mib in 0..256 {
        image.disk().writer().unwrap().write_at(Lba(mib << 11), &data).unwrap();
    }
    image.disk().writer().unwrap().close().unwrap();
    drop(image);
    let child = Command::new(program())
        .args(["--commit".to_owned(), format!("cow={}", text(&cow)), format!("file={}", text(&base))])
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    // it waits for the signal as soon as it does not let it end it any more
    let status = format!("/proc/{}/status", child.id());
    let blocks = || {
        let text = fs::read_to_string(&status).unwrap_or_default();
        let mask = text.lines().find_map(|line| line.strip_prefix("SigBlk:")).unwrap_or("0").trim().to_owned();
        u64::from_str_radix(&mask, 16).unwrap_or(0) & (1 << (libc::SIGTERM - 1)) != 0
    };
    let blocked = poll_until(Duration::from_secs(20), blocks);
    let pid = nix::unistd::Pid::from_raw(i32::try_from(child.id()).unwrap());
    nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGTERM).unwrap();
    let output = child.wait_with_output().unwrap();
    assert!(blocked, "the signal was never blocked");
    let says = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(1), "{says}");
    for part in ["SIGTERM", "of 256 MiB", "is not merged whole", "--commit again completes it"] {
        assert!(says.contains(part), "`{says}` does not say {part}");
    }
    let mut read_only = disk.clone();
    read_only.read_only = true;
    let image = image::open(&read_only).unwrap();
    for mib in [0, 100, 255] {
        assert!(read(image.disk().as_ref(), mib << 11, 2048) == data);
    }
    drop(image);
    assert!(Commit::open(&disk).unwrap().run(&mut go_on).unwrap());
    let bytes = fs::read(&base).unwrap();
    assert!(bytes.chunks_exact(1 << 20).all(|mib| mib == data));
}
