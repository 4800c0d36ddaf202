//! Tests of the generator itself, compared with qemu-img.

use std::collections::BTreeSet;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, bail, ensure};
use tempfile::tempdir;

use super::ctx::Made;
use super::model::{Content, SECTOR};
use super::write::{self, Descriptor, Hosted};
use super::{Expect, hostile, raw, valid};

/// Valid variants that qemu 10.0 is known to misread or refuse, and the reason.
const NOT_QEMU: &[(&str, &str)] = &[
    ("rgd_only_zero", "it never reads the redundant directory"),
    ("rgd_only_wild", "it never reads the redundant directory"),
    ("nominal_smaller", "it takes the size from the header"),
    ("stream_padded", "it takes the size from the header"),
    ("gte_1024", "it refuses tables of more than 512 entries"),
    ("stream_no_lba", "it expects bare zlib without a size"),
    ("split_zero", "it refuses the type custom"),
    ("custom_500", "it refuses the type custom"),
    ("chain_custom", "it refuses the type custom"),
    ("chain_win_relative", "it does not accept backslashes"),
    ("extent_words", "it refuses the type custom"),
    ("extent_default_offset", "it refuses the type custom"),
    ("alias_2gb", "it refuses the type 2GbMaxExtentFlat"),
    ("partitioned", "it refuses the type partitionedDevice"),
    (
        "split_unaligned",
        "it reads past the end of an extent that ends inside a grain",
    ),
    ("split_access", "it drops extents that are not RW"),
    ("crlf_descriptor", "it compares keywords exactly"),
    ("enc_windows1252", "it does not decode the text"),
    ("enc_shift_jis", "it does not decode the text"),
    ("enc_gbk", "it does not decode the text"),
    ("enc_big5", "it does not decode the text"),
    ("chain_winpath", "it takes the drive for a protocol"),
    ("chain_winpath_all", "it takes the drive for a protocol"),
    ("chain_esx_path", "it follows the path as it is"),
];

/// Prints that a test is skipped, or fails it if `VMDKFUSE_REQUIRE=all`.
fn skip(reason: &str) {
    assert!(
        std::env::var("VMDKFUSE_REQUIRE").as_deref() != Ok("all"),
        "VMDKFUSE_REQUIRE=all, but {reason}"
    );
    eprintln!("######## SKIPPED: {reason}");
}

#[test]
fn names_are_unique_and_valid_as_folder_names() {
    let names: Vec<&str> = valid()
        .iter()
        .map(|v| v.name)
        .chain(hostile().iter().map(|h| h.name))
        .collect();
    assert_eq!(names.iter().collect::<BTreeSet<_>>().len(), names.len());
    assert!(
        names
            .iter()
            .all(|name| name.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'_'))
    );
}

#[test]
fn every_valid_variant_is_reproducible() -> Result<()> {
    let (one, two) = (tempdir()?, tempdir()?);
    for variant in valid() {
        let made = variant.make(one.path(), 1)?;
        let again = variant.make(two.path(), 1)?;
        assert!(made.open.is_file(), "{}", variant.name);
        assert!(made.sectors() > 0, "{}", variant.name);
        assert_eq!(made.is_hashable(), made.probes.is_empty(), "{}", variant.name);
        let relative = made.open.strip_prefix(one.path())?;
        assert_eq!(again.open.strip_prefix(two.path())?, relative);
        assert_eq!(
            std::fs::read(&made.open)?,
            std::fs::read(&again.open)?,
            "{}",
            variant.name
        );
        let has_data = |range| made.disk.read_bytes(&range).iter().any(|b| *b != 0);
        assert!(has_data(0..made.sectors().min(8192) * SECTOR), "{}", variant.name);
    }
    Ok(())
}

#[test]
fn every_hostile_file_can_be_written() -> Result<()> {
    let dir = tempdir()?;
    for file in hostile() {
        let bad = file.make(dir.path(), 1)?;
        assert!(bad.open.is_file(), "{}", file.name);
        if let (Expect::Eio { damaged: Some(range) }, Some(content)) = (&file.expect, &bad.content) {
            assert!(
                range.start < range.end && range.end <= content.sectors() * SECTOR,
                "{}",
                file.name
            );
        }
    }
    Ok(())
}

#[test]
fn large_disks_take_little_space() -> Result<()> {
    use std::os::unix::fs::MetadataExt;
    let dir = tempdir()?;
    for variant in valid().iter().filter(|v| v.name.starts_with("big_")) {
        let made = variant.make(dir.path(), 1)?;
        assert!(
            std::fs::metadata(&made.open)?.blocks() * 512 < 2 << 20,
            "{}",
            variant.name
        );
    }
    Ok(())
}

#[test]
fn qemu_img_reads_the_content_of_the_model() -> Result<()> {
    if !has_qemu_img() {
        return Ok(());
    }
    let dir = tempdir()?;
    let mut failures = Vec::new();
    for variant in valid() {
        let made = variant.make(dir.path(), 1)?;
        let result = qemu_agrees(&made, dir.path());
        let known = NOT_QEMU.iter().find(|(name, _)| *name == variant.name);
        match (result, known) {
            // A newer version may support it.
            (Ok(()), Some((_, why))) => eprintln!("{}: qemu-img reads it, although {why}", variant.name),
            (Err(e), None) => failures.push(format!("{}: {e:#}", variant.name)),
            (Ok(()), None) | (Err(_), Some(_)) => {}
        }
        std::fs::remove_dir_all(dir.path().join(variant.name))?;
    }
    assert!(failures.is_empty(), "{}", failures.join("\n"));
    Ok(())
}

#[test]
fn qemu_img_reads_the_content_of_harmless_hostile_files() -> Result<()> {
    // It takes the entry 1 of a COWD for a sector number, follows a hint although there is no parent, and insists on a
    // type that it knows.
    const NOT: [&str; 5] = [
        "cowd_gte_one",
        "parent_hint_without_cid",
        "rdm_named",
        "no_create_type",
        "create_type_unknown",
    ];
    if !has_qemu_img() {
        return Ok(());
    }
    let dir = tempdir()?;
    let mut compared = 0;
    for file in hostile()
        .iter()
        .filter(|file| file.expect == Expect::Warn && !NOT.contains(&file.name))
    {
        let bad = file.make(dir.path(), 1)?;
        if let Some(content) = bad.content {
            qemu_agrees(&Made::new(bad.open, content), dir.path()).context(file.name)?;
            compared += 1;
        }
    }
    assert!(compared >= 7, "only {compared}");
    Ok(())
}

#[test]
fn an_ext4_image_becomes_a_vmdk() -> Result<()> {
    if raw::mkfs_ext4().is_none() {
        skip("mkfs.ext4 is not installed");
        return Ok(());
    }
    let dir = tempdir()?;
    let (files, image, disk) = (
        dir.path().join("files"),
        dir.path().join("fs.img"),
        dir.path().join("fs.vmdk"),
    );
    raw::sample_files(&files, 1)?;
    raw::ext4(&image, 8 << 20, &files)?;
    let layer = raw::layer_of(&image, 128)?;
    assert_eq!(layer.read(0, layer.sectors()), std::fs::read(&image)?);
    assert_eq!(layer.read_bytes(&(1080..1082)), [0x53, 0xef], "no ext4 superblock");
    let text = Descriptor::new("monolithicSparse", ["RW 16384 SPARSE \"fs.vmdk\""]).bytes()?;
    write::hosted(&disk, &layer, Some(&text), &Hosted::default())?;
    if !has_qemu_img() {
        return Ok(());
    }
    qemu_agrees(&Made::new(disk, std::sync::Arc::new(layer)), dir.path())
}

/// Returns true if qemu-img can be run; otherwise skips the test.
fn has_qemu_img() -> bool {
    let found = Command::new("qemu-img").arg("--version").output().is_ok();
    if !found {
        skip("qemu-img is not installed");
    }
    found
}

/// Fails unless qemu-img reads the same content as the model, of the whole disk or at its probes.
fn qemu_agrees(made: &Made, dir: &Path) -> Result<()> {
    let format = if made.open.extension().is_some_and(|e| e == "vmdk") {
        "vmdk"
    } else {
        "raw"
    };
    let out = dir.join("out.raw");
    if made.probes.is_empty() {
        qemu_img(
            Command::new("qemu-img")
                .args(["convert", "-f", format, "-O", "raw"])
                .arg(&made.open)
                .arg(&out),
        )?;
        return same(made, 0, made.sectors(), &out);
    }
    for range in &made.probes {
        let (first, count) = (range.start / SECTOR, (range.end - range.start) / SECTOR);
        let mut command = Command::new("qemu-img");
        command.args(["dd", "-f", format, "-O", "raw", "bs=512"]);
        // `count` includes the skipped blocks.
        command.args([format!("skip={first}"), format!("count={}", first + count)]);
        command
            .arg(format!("if={}", made.open.display()))
            .arg(format!("of={}", out.display()));
        qemu_img(&mut command)?;
        same(made, first, count, &out)?;
    }
    Ok(())
}

fn qemu_img(command: &mut Command) -> Result<()> {
    let output = command.output()?;
    if !output.status.success() {
        bail!("qemu-img: {}", String::from_utf8_lossy(&output.stderr).trim());
    }
    Ok(())
}

/// Compares a raw file with a range of a disk.
fn same(made: &Made, first: u64, sectors: u64, file: &Path) -> Result<()> {
    const STEP: u64 = 2048;
    let out = File::open(file).context("qemu-img wrote no file")?;
    ensure!(
        out.metadata()?.len() == sectors * SECTOR,
        "{} bytes",
        out.metadata()?.len()
    );
    let mut buffer = vec![0; (STEP * SECTOR) as usize];
    for at in (0..sectors).step_by(STEP as usize) {
        let n = STEP.min(sectors - at);
        let part = &mut buffer[..(n * SECTOR) as usize];
        out.read_exact_at(part, at * SECTOR)?;
        ensure!(
            *part == made.read(first + at, n),
            "differs within {n} sectors from {}",
            first + at
        );
    }
    Ok(())
}
