//! Overlays over every kind of source: the overlay keeps the writes, the source is unchanged, and qemu reads the chain.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use fuse_tests::harness::{assert_same, qemu_img, raw_with_islands, sha256};
use fuse_tests::make;
use fuse_tests::make::model::Random;
use fuse_tests::model::{Model, alone};
use tempfile::tempdir;
use vmdkfuse::config::{DiskConfig, LocalConfig, SourceConfig};
use vmdkfuse::volume::{self};

use super::folder::Folder;
use super::pair::{Pair, close, disk, local};
use super::text;

/// Returns path, length, modification time and hash of all files below a folder.
fn content(dir: &Path) -> BTreeMap<PathBuf, (u64, SystemTime, Option<String>)> {
    let mut found = BTreeMap::new();
    for entry in fs::read_dir(dir).unwrap().map(|e| e.unwrap().path()) {
        if entry.is_dir() {
            found.extend(content(&entry));
        } else {
            let meta = fs::symlink_metadata(&entry).unwrap();
            // Hashing a large sparse file takes too long; its mtime and length show a change too.
            let hash = (meta.len() < 256 << 20).then(|| sha256(&entry));
            found.insert(entry, (meta.len(), meta.modified().unwrap(), hash));
        }
    }
    found
}

#[test]
fn an_overlay_takes_writes_over_every_source_and_leaves_it_unchanged() {
    let _alone = alone();
    let dir = tempdir().unwrap();
    let mut seen = 0;
    for (variant, seed) in make::valid().iter().zip(1..) {
        let made = variant.make(dir.path(), seed).unwrap();
        let before = content(&dir.path().join(variant.name));
        let cow = dir.path().join(format!("{}.cow.vmdk", variant.name));
        let mut disk = disk(&made.open, &cow);
        local(&mut disk).allow_dirs = made.allow_dirs.clone();
        let model = Model::new(made.sectors(), move |at, n| made.read(at, n));
        let mut pair = Pair { disk, model };
        let mut random = Random::new(seed);
        for round in 0..3 {
            let image = pair.open();
            pair.exercise(&image, &mut random, 120);
            // A process that ends without a close keeps what it flushed.
            if round == 1 {
                image.disk().writer().unwrap().flush().unwrap();
                drop(image);
            } else {
                close(image);
            }
            pair.same(&format!("{}, round {round}", variant.name));
        }
        assert_eq!(
            content(&dir.path().join(variant.name)),
            before,
            "{}: the source was changed",
            variant.name
        );
        fs::remove_dir_all(dir.path().join(variant.name)).unwrap();
        fs::remove_file(cow).unwrap();
        seen += 1;
    }
    assert!(seen >= 30, "only {seen} variants");
    assert!(
        fs::read_dir(dir.path()).unwrap().next().is_none(),
        "the test left files beside the overlays"
    );
}

#[test]
fn an_overlay_takes_writes_over_raw_images_of_any_length() {
    let _alone = alone();
    let dir = tempdir().unwrap();
    for (len, seed) in [
        1,
        511,
        512,
        513,
        700,
        8191,
        8192,
        8704,
        (4 << 20) + 77,
        (9 << 20) + 512 * 37,
    ]
    .into_iter()
    .zip(1..)
    {
        let [raw, cow] = ["base.img", "cow.vmdk"].map(|name| dir.path().join(name));
        raw_with_islands(&raw, len, seed);
        let before = fs::read(&raw).unwrap();
        let mut pair = Pair {
            disk: disk(&raw, &cow),
            model: Model::of_file(&raw),
        };
        for round in 0..3 {
            pair.change(&mut Random::new(seed * 10 + round), 150);
            pair.same(&format!("{len} bytes, round {round}"));
        }
        assert!(fs::read(&raw).unwrap() == before, "{len} bytes: the source was changed");
        fs::remove_file(cow).unwrap();
    }
}

/// Checks that qemu and this engine read the chain when they open the overlay alone, whose descriptor names the base.
fn check_chain(folder: &Folder, base: &Path, cow: &Path, pair: &Pair) {
    let [expected, seen] = ["expected.raw", "seen.raw"].map(|name| folder.scratch.path(name));
    pair.model.save(&expected);
    qemu_img(["compare", "-f", "vmdk", "-F", "raw", text(cow), text(&expected)]);
    qemu_img(["convert", "-f", "vmdk", "-O", "raw", text(cow), text(&seen)]);
    assert_same(&seen, &expected);
    qemu_img(["check", text(cow)]);
    let chain = qemu_img(["info", "--backing-chain", "--output=json", text(cow)]).json();
    assert!(chain.as_array().unwrap().len() >= 2, "{chain}");
    let hint = chain[0]["backing-filename"].as_str().unwrap();
    let same_folder = cow.parent() == base.parent();
    assert_eq!(
        hint,
        if same_folder {
            base.file_name().unwrap().to_str().unwrap()
        } else {
            text(base)
        }
    );
    let mut alone = DiskConfig::new("disk", SourceConfig::Local(LocalConfig::new(cow)));
    local(&mut alone).allow_dirs = vec![folder.scratch.root().to_path_buf()];
    alone.read_only = true;
    pair.model
        .compare(volume::open(&alone).unwrap().disk().as_ref(), "the chain");
}

#[test]
fn qemu_reads_the_same_bytes_through_an_overlay() {
    let _alone = alone();
    let Some(folder) = Folder::new((20 << 20) + 512 * 5) else {
        return;
    };
    let elsewhere = tempdir().unwrap();
    for (base, seed) in folder.vmdks().iter().zip(1..) {
        for cow in [&folder.cow, &elsewhere.path().join("elsewhere.vmdk")] {
            let before = sha256(base);
            let pair = Pair::changed(base, cow, &folder.raw, seed, 300);
            check_chain(&folder, base, cow, &pair);
            assert_eq!(sha256(base), before);
            fs::remove_file(cow).unwrap();
        }
    }
}

/// "`cow=` over a base without a valid CID does not invent one"
#[test]
fn an_overlay_over_a_vmdk_without_a_cid_remembers_none() {
    let _alone = alone();
    let Some(folder) = Folder::new(4 << 20) else {
        return;
    };
    let base = folder.scratch.path("no-cid.vmdk");
    qemu_img(["convert", "-O", "vmdk", text(&folder.raw), text(&base)]);
    let mut bytes = fs::read(&base).unwrap();
    let at = bytes.windows(5).position(|w| w == b"\nCID=").unwrap() + 1;
    bytes[at] = b'#';
    fs::write(&base, &bytes).unwrap();
    let pair = Pair::changed(&base, &folder.cow, &folder.raw, 3, 100);
    let cow = fs::read(&folder.cow).unwrap();
    assert!(cow.windows(18).any(|w| w == b"parentCID=00000000"));
    pair.same("after another open");
    let mut alone = DiskConfig::new("disk", SourceConfig::Local(LocalConfig::new(&folder.cow)));
    alone.read_only = true;
    pair.model
        .compare(volume::open(&alone).unwrap().disk().as_ref(), "the chain");
}
