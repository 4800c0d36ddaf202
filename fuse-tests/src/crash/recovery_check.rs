//! Check of one crash state: opens it before, during and after a recovery, with this engine and with qemu-img.

use std::fs;

use vmdkfuse::block::{BlockRead, Lba};
use vmdkfuse::store::Access;
use vmdkfuse::vmdk::{OpenOptions, VmdkDisk};

use super::bytes::Bytes;
use super::images::Image;
use super::oracle::Oracle;
use super::replay::Crash;
use super::run::open_writable;
use super::store::SimStore;
use crate::harness::Cmd;

/// Checks a crash state as it is, while it is open for writing, and after a close. `start` is the oracle of the
/// content before the run.
pub(super) fn check_crash(
    image: &Image,
    crash: &Crash,
    oracle: &Oracle,
    start: &Oracle,
    qemu: bool,
) -> Result<(), String> {
    let store = SimStore::new(&crash.files);
    {
        let disk = open(&store, image.top)?;
        let unfinished = check_tables(&disk, false)?;
        oracle.verify(&disk)?;
        same_cid_same_content(image, crash, start, &disk)?;
        if qemu {
            // qemu reads the primary tables only: where an entry is in the redundant table alone, it reads the old
            // value and this engine the new one.
            check_with_qemu(image, &crash.files, &disk, !unfinished).map_err(|e| format!("before a repair: {e}"))?;
        }
    }
    {
        let disk = open_writable(&store, image.top).map_err(|e| format!("opening it for writing: {}", e.1))?;
        oracle.verify(&disk).map_err(|e| format!("opened for writing: {e}"))?;
        let writer = disk.writer().ok_or("it has no writer")?;
        writer.close().map_err(|e| format!("closing it: {e}"))?;
    }
    let disk = open(&store, image.top).map_err(|e| format!("after a repair: {e}"))?;
    check_tables(&disk, true).map_err(|e| format!("after a repair: {e}"))?;
    oracle.verify(&disk).map_err(|e| format!("after a repair: {e}"))?;
    let recovered = store.files();
    for parent in &image.parents {
        let bytes = |files: &[(String, Bytes)]| files.iter().find(|(name, _)| name == parent).cloned();
        if bytes(&recovered) != bytes(&image.files) {
            return Err(format!("the parent {parent} was written to"));
        }
    }
    if qemu {
        check_with_qemu(image, &recovered, &disk, true).map_err(|e| format!("after a repair: {e}"))?;
    }
    Ok(())
}

/// Fails if the tables are not sound; leaked grains are allowed. Returns true if an entry is in only one of the
/// two tables, which is an error once the disk was closed.
fn check_tables(disk: &VmdkDisk, closed: bool) -> Result<bool, String> {
    let report = disk.check();
    if let Some(error) = report.errors.first() {
        return Err(format!("--check: {error}"));
    }
    if closed && report.unfinished > 0 {
        return Err(format!("--check: {} entries are in one table only", report.unfinished));
    }
    match disk.unclean_files().next() {
        Some(file) if closed => Err(format!("{file} is marked as in use, but was closed")),
        _ => Ok(report.unfinished > 0),
    }
}

/// Fails if the content changed while the CID did not: a child or an overlay that remembers the CID relies on it.
fn same_cid_same_content(image: &Image, crash: &Crash, start: &Oracle, disk: &VmdkDisk) -> Result<(), String> {
    let cid = |files: &[(String, Bytes)]| {
        let (_, bytes) = files.iter().find(|(name, _)| name == image.top).expect("the file");
        let mut head = vec![0; bytes.len().min(8192) as usize];
        assert!(bytes.read(0, &mut head));
        let text = String::from_utf8_lossy(&head).into_owned();
        text.lines()
            .find_map(|line| line.strip_prefix("CID=").map(str::to_owned))
            .expect("a CID")
    };
    if cid(&crash.files) != cid(&image.files) {
        return Ok(());
    }
    start
        .verify(disk)
        .map_err(|e| format!("the content has changed, the CID has not: {e}"))
}

/// Runs `qemu-img check`, and with `same` also compares what qemu-img reads with what `disk` reads.
fn check_with_qemu(image: &Image, files: &[(String, Bytes)], disk: &VmdkDisk, same: bool) -> Result<(), String> {
    let dir = tempfile::tempdir().expect("a folder");
    for (name, bytes) in files {
        fs::write(dir.path().join(name), bytes.to_vec()).expect("a file");
    }
    let mut raw = vec![0; disk.geometry().bytes() as usize];
    disk.read_at(Lba(0), &mut raw).map_err(|e| e.to_string())?;
    fs::write(dir.path().join("expected.raw"), raw).expect("a file");
    let check = &["check", "-q", "-f", "vmdk", image.top][..];
    let compare = &["compare", "-q", "-f", "raw", "-F", "vmdk", "expected.raw", image.top];
    for args in [Some(check), same.then_some(compare)].into_iter().flatten() {
        let outcome = Cmd::new("qemu-img").args(args).dir(dir.path()).run();
        if outcome.ended.code != Some(0) {
            return Err(outcome.to_string());
        }
    }
    Ok(())
}

/// Opens the disk called `name` in the store for reading.
pub(super) fn open(store: &SimStore, name: &str) -> Result<VmdkDisk, String> {
    let file = store.file(name, Access::Read).map_err(|e| e.to_string())?;
    VmdkDisk::open(file, OpenOptions::default()).map_err(|e| format!("opening the crash state: {e}"))
}
