//! What a crash has left of a disk: whether it is still that disk, before, during and after a repair, for us and for qemu.

use std::fs;

use vmdkfuse::block::{BlockRead, Lba};
use vmdkfuse::store::Access;
use vmdkfuse::vmdk::{OpenOptions, VmdkDisk, check};

use super::bytes::Bytes;
use super::images::Image;
use super::oracle::Oracle;
use super::replay::Crash;
use super::run::open_writable;
use super::store::SimStore;
use crate::harness::Cmd;

/// Judges what a crash has left: as it is, while it is opened for writing, and after that.
/// `start` knows what was there before the run.
pub(super) fn judge_crash(
    image: &Image,
    crash: &Crash,
    oracle: &Oracle,
    start: &Oracle,
    qemu: bool,
) -> Result<(), String> {
    let store = SimStore::new(&crash.files);
    {
        let disk = open(&store, image.top)?;
        let unfinished = sound(&disk, false)?;
        oracle.verify(&disk)?;
        same_cid_same_content(image, crash, start, &disk)?;
        if qemu {
            // qemu knows the primary tables only: old where we say new
            show_qemu(image, &crash.files, &disk, !unfinished).map_err(|e| format!("before a repair: {e}"))?;
        }
    }
    {
        let disk = open_writable(&store, image.top).map_err(|e| format!("opening it for writing: {}", e.1))?;
        oracle.verify(&disk).map_err(|e| format!("opened for writing: {e}"))?;
        let writer = disk.writer().ok_or("it has no writer")?;
        writer.close().map_err(|e| format!("closing it: {e}"))?;
    }
    let disk = open(&store, image.top).map_err(|e| format!("after a repair: {e}"))?;
    sound(&disk, true).map_err(|e| format!("after a repair: {e}"))?;
    oracle.verify(&disk).map_err(|e| format!("after a repair: {e}"))?;
    let left = store.files();
    for parent in &image.parents {
        let bytes = |files: &[(String, Bytes)]| files.iter().find(|(name, _)| name == parent).cloned();
        if bytes(&left) != bytes(&image.files) {
            return Err(format!("the parent {parent} was written to"));
        }
    }
    if qemu {
        show_qemu(image, &left, &disk, true).map_err(|e| format!("after a repair: {e}"))?;
    }
    Ok(())
}

/// Errors where the tables are not sound; leaked grains are no fault. Whether there are entries in one table only, which
/// must not be once it was closed.
fn sound(disk: &VmdkDisk, closed: bool) -> Result<bool, String> {
    let report = check(disk);
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

/// Who remembers the CID of the start must find the content of the start.
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

/// qemu-img finds no fault, and (`same`) reads the same.
fn show_qemu(image: &Image, files: &[(String, Bytes)], disk: &VmdkDisk, same: bool) -> Result<(), String> {
    let dir = tempfile::tempdir().expect("a folder");
    for (name, bytes) in files {
        fs::write(dir.path().join(name), bytes.to_vec()).expect("a file");
    }
    let mut raw = vec![0; disk.geometry().bytes() as usize];
    disk.read_at(Lba(0), &mut raw).map_err(|e| e.to_string())?;
    fs::write(dir.path().join("expected.raw"), raw).expect("a file");
    let check = &["check", "-q", "-f", "vmdk", image.top][..];
    let compare = &["compare", "-q", "-f", "raw", "-F", "vmdk", "expected.raw", image.top];
    for words in [Some(check), same.then_some(compare)].into_iter().flatten() {
        let outcome = Cmd::new("qemu-img").args(words).dir(dir.path()).run();
        if outcome.ended.code != Some(0) {
            return Err(outcome.to_string());
        }
    }
    Ok(())
}

/// Opens a disk of the store for reading.
pub(super) fn open(store: &SimStore, name: &str) -> Result<VmdkDisk, String> {
    let file = store.file(name, Access::Read).map_err(|e| e.to_string())?;
    VmdkDisk::open(file, OpenOptions::default()).map_err(|e| format!("opening what is left: {e}"))
}
