//! Writes of the engine compared with a plain model. Every valid variant and every image of qemu-img either is
//! read-only, or keeps all writes, is clean after the close, and reads the same for qemu.

use std::fs;
use std::ops::Range;
use std::path::{Path, PathBuf};

use fuse_tests::harness::{need, qemu_img, raw_with_islands};
use fuse_tests::make::model::Random;
use fuse_tests::make::{self, SECTOR};
use fuse_tests::model::{self, Model, alone, read};
use tempfile::tempdir;
use vmdkfuse::block::{BlockRead, Lba};
use vmdkfuse::error::ErrorKind;
use vmdkfuse::store::Access;
use vmdkfuse::vmdk::{OpenOptions, VmdkDisk};

/// Opens a VMDK, also if it has children.
fn open(path: &Path, allow: &[PathBuf], access: Access) -> vmdkfuse::error::Result<VmdkDisk> {
    model::open(
        path,
        allow,
        access,
        OpenOptions {
            force: true,
            ..OpenOptions::default()
        },
    )
}

/// Returns a random range, often near the end of a grain, a table, an extent or the disk.
fn random_range(random: &mut Random, sectors: u64) -> Range<u64> {
    const EDGES: [u64; 6] = [8, 16, 128, 65536, 4_192_256, 4_194_304];
    let mut at = random.below(sectors);
    if random.below(2) == 0 {
        let edge = EDGES[random.below(EDGES.len() as u64) as usize];
        at = (at / edge * edge + random.below(3)).saturating_sub(1).min(sectors - 1);
    } else if random.below(4) == 0 {
        at = sectors - 1 - random.below(sectors.min(200));
    }
    let len = match random.below(8) {
        0 => 1,
        1 => 1 + random.below(600),
        _ => 1 + random.below(16),
    };
    at..(at + len).min(sectors)
}

/// Updates the model after a write. If an extent of the disk is read-only the write may fail; then each sector is old
/// or new.
fn update_model(
    disk: &VmdkDisk,
    model: &mut Model,
    range: &Range<u64>,
    data: &[u8],
    done: vmdkfuse::error::Result<()>,
) {
    let Err(e) = done else {
        return model.write(range.start, data);
    };
    assert_eq!(e.kind(), ErrorKind::ReadOnly, "{e}");
    let sectors = range.end - range.start;
    let (old, seen) = (model.read(range.start, sectors), read(disk, range.start, sectors));
    for (i, sector) in seen.chunks_exact(SECTOR as usize).enumerate() {
        let at = i * SECTOR as usize..(i + 1) * SECTOR as usize;
        assert!(
            *sector == old[at.clone()] || *sector == data[at],
            "sector {} is neither old nor new",
            range.start + i as u64
        );
    }
    model.write(range.start, &seen);
}

/// Applies random writes, zeroes, flushes, closes and reads to the disk and to the model.
fn exercise(disk: &VmdkDisk, model: &mut Model, random: &mut Random, steps: u64) {
    let writer = disk.writer().expect("a disk opened for writing has a writer");
    for step in 0..steps {
        let range = random_range(random, model.sectors());
        let sectors = range.end - range.start;
        match random.below(10) {
            0..=5 => {
                let data = model::data(step, sectors);
                update_model(disk, model, &range, &data, writer.write_at(Lba(range.start), &data));
            }
            6 => {
                let done = writer.zero(Lba(range.start)..Lba(range.end), random.below(2) == 0);
                update_model(disk, model, &range, &vec![0; (sectors * SECTOR) as usize], done);
            }
            7 if step % 5 == 0 => writer.flush().unwrap(),
            8 if step % 40 == 0 => writer.close().unwrap(),
            _ => {
                let expected = model.read(range.start, sectors);
                assert!(read(disk, range.start, sectors) == expected, "step {step}: {range:?}");
            }
        }
    }
}

/// Writes in three rounds, and reopens and checks the disk after each. Returns false if it is read-only.
fn run(path: &Path, allow: &[PathBuf], model: &mut Model, seed: u64, steps: u64) -> bool {
    let mut random = Random::new(seed);
    for round in 0..3 {
        match open(path, allow, Access::Write) {
            Ok(disk) => {
                exercise(&disk, model, &mut random, steps);
                disk.writer().unwrap().close().unwrap();
            }
            // The format is read-only, or its tables contradict each other, which only readers tolerate.
            Err(e) if matches!(e.kind(), ErrorKind::ReadOnly | ErrorKind::Corrupt) && round == 0 => return false,
            Err(e) => panic!("{}: {e}", path.display()),
        }
        let disk = open(path, allow, Access::Read).unwrap();
        model.compare(&disk, &format!("{}, round {round}", path.display()));
        let report = disk.check();
        assert_eq!(report.errors, Vec::<String>::new(), "{}", path.display());
        assert_eq!(report.unfinished, 0);
        assert!(
            disk.unclean_files().next().is_none(),
            "{}: closed, but marked as in use",
            path.display()
        );
    }
    true
}

#[test]
fn every_valid_variant_keeps_all_writes_or_is_read_only() {
    let _alone = alone();
    let dir = tempdir().unwrap();
    let (mut written, mut refused) = (Vec::new(), Vec::new());
    for (variant, seed) in make::valid().iter().zip(1..) {
        let made = variant.make(dir.path(), seed).unwrap();
        let (path, allow, sectors) = (made.open.clone(), made.allow_dirs.clone(), made.sectors());
        let mut model = Model::new(sectors, move |at, n| made.read(at, n));
        let before: Vec<_> = fs::read_dir(path.parent().unwrap())
            .unwrap()
            .flatten()
            .map(|e| e.path())
            .collect();
        let keep: Vec<_> = before
            .iter()
            .map(|p| fs::metadata(p).unwrap().modified().unwrap())
            .collect();
        if run(&path, &allow, &mut model, seed, 150) {
            written.push(variant.name);
        } else {
            let now: Vec<_> = before
                .iter()
                .map(|p| fs::metadata(p).unwrap().modified().unwrap())
                .collect();
            assert_eq!(now, keep, "{}: refused, but changed", variant.name);
            refused.push(variant.name);
        }
        fs::remove_dir_all(dir.path().join(variant.name)).unwrap();
    }
    println!("written: {written:?}\nread-only: {refused:?}");
    assert!(written.len() >= 20, "only {written:?} can be written to");
    for name in [
        "stream_footer",
        "stream_no_footer",
        "cowd_delta",
        "sesparse_delta",
        "version3_cbt",
        "rgd_only_zero",
    ] {
        assert!(refused.contains(&name), "{name} must be read-only: {refused:?}");
    }
}

/// Subformats and options of qemu-img.
const KINDS: [&str; 5] = [
    "monolithicSparse",
    "monolithicFlat",
    "twoGbMaxExtentSparse",
    "twoGbMaxExtentFlat",
    "zeroed_grain",
];

#[test]
fn qemu_reads_the_writes_to_its_images() {
    let _alone = alone();
    if !need("qemu-img") {
        return;
    }
    let dir = tempdir().unwrap();
    let (raw, expected) = (dir.path().join("a.raw"), dir.path().join("expected.raw"));
    raw_with_islands(&raw, (40 << 20) + 512 * 37, 7);
    for (kind, seed) in KINDS.iter().zip(1..) {
        let path = dir.path().join(format!("{kind}.vmdk"));
        let options = match *kind {
            "zeroed_grain" => "zeroed_grain=on".to_owned(),
            kind => format!("subformat={kind}"),
        };
        let args = [
            "convert",
            "-O",
            "vmdk",
            "-o",
            &options,
            raw.to_str().unwrap(),
            path.to_str().unwrap(),
        ];
        qemu_img(args);
        for over_a_parent in [false, true] {
            let child = dir.path().join(format!("{kind}-000001.vmdk"));
            let (open, base) = if over_a_parent {
                (&child, &expected)
            } else {
                (&path, &raw)
            };
            if over_a_parent {
                let [parent, child] = [&path, &child].map(|p| p.to_str().unwrap());
                qemu_img(["create", "-f", "vmdk", "-b", parent, "-F", "vmdk", child]);
            }
            let keep = over_a_parent.then(|| fs::read(&path).unwrap());
            let mut model = Model::of_file(base);
            assert!(run(open, &[], &mut model, seed, 400), "{kind} can be written to");
            model.save(&expected);
            let [seen, expected] = [open, &expected].map(|p| p.to_str().unwrap());
            qemu_img(["compare", "-f", "vmdk", "-F", "raw", seen, expected]);
            qemu_img(["check", seen]);
            assert!(
                keep.is_none_or(|keep| keep == fs::read(&path).unwrap()),
                "{kind}: the parent was changed"
            );
        }
    }
}

#[test]
fn a_base_with_children_is_not_written_to_without_force() {
    let _alone = alone();
    if !need("qemu-img") {
        return;
    }
    let dir = tempdir().unwrap();
    let [base, child] = ["base.vmdk", "base-000001.vmdk"].map(|n| dir.path().join(n).to_str().unwrap().to_owned());
    qemu_img(["create", "-f", "vmdk", &base, "4M"]);
    let options = |force| OpenOptions {
        force,
        ..OpenOptions::default()
    };
    let writable = |force| model::open(Path::new(&base), &[], Access::Write, options(force)).map(drop);
    writable(false).unwrap();
    qemu_img(["create", "-f", "vmdk", "-b", &base, "-F", "vmdk", &child]);
    let error = writable(false).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Policy);
    for fragment in ["base-000001.vmdk", "force=true", "cow=FILE", "readonly=true"] {
        assert!(
            error.to_string().contains(fragment),
            "`{error}` does not contain {fragment}"
        );
    }
    writable(true).unwrap();
}

/// Returns the CID of a descriptor or of a file with an embedded descriptor.
fn cid(path: &Path) -> String {
    let bytes = fs::read(path).unwrap();
    let text = String::from_utf8_lossy(&bytes).into_owned();
    text.lines()
        .find_map(|line| line.strip_prefix("CID="))
        .unwrap()
        .trim()
        .to_owned()
}

#[test]
fn the_cid_changes_with_the_first_write_and_not_before() {
    let _alone = alone();
    let dir = tempdir().unwrap();
    for kind in ["monolithicSparse", "monolithicFlat"] {
        let path = dir.path().join(format!("{kind}.vmdk"));
        if !need("qemu-img") {
            return;
        }
        qemu_img([
            "create",
            "-f",
            "vmdk",
            "-o",
            &format!("subformat={kind}"),
            path.to_str().unwrap(),
            "4M",
        ]);
        let before = (cid(&path), fs::read(&path).unwrap());
        let disk = open(&path, &[], Access::Write).unwrap();
        let writer = disk.writer().unwrap();
        writer.flush().unwrap();
        writer.close().unwrap();
        assert!(
            before == (cid(&path), fs::read(&path).unwrap()),
            "{kind}: changed without a write"
        );
        writer.write_at(Lba(3), &[1; 512]).unwrap();
        let after = cid(&path);
        assert_ne!(after, before.0);
        assert_eq!(
            after.len(),
            before.0.len(),
            "the length of the CID changed, which moves the text after it"
        );
        writer.write_at(Lba(9), &[2; 512]).unwrap();
        assert_eq!(cid(&path), after, "the CID changed a second time");
        writer.close().unwrap();
    }
}
