//! Files that another process truncates while they are open for writing: the lost grains must stay errors.

use std::fs::File;
use std::path::{Path, PathBuf};

use fuse_tests::make::SECTOR;
use fuse_tests::model::{alone, writable};
use tempfile::{TempDir, tempdir};
use vmdkfuse::block::{BlockRead, Lba};
use vmdkfuse::error::{Error, ErrorKind};
use vmdkfuse::vmdk::VmdkDisk;

use super::hosted::Hosted;
use super::read;

/// Sectors of a grain.
const GRAIN: u64 = 128;
/// Number of grains written before the flush.
const GRAINS: u64 = 4;

/// Creates a clean image whose last grain ends at the end of the file.
fn closed_image() -> (TempDir, PathBuf) {
    let dir = tempdir().unwrap();
    let path = dir.path().join("x.vmdk");
    Hosted {
        unclean: false,
        ..Hosted::default()
    }
    .make_base(&path, GRAIN);
    let disk = writable(&path).unwrap();
    let writer = disk.writer().unwrap();
    for grain in 0..GRAINS {
        writer
            .write_at(Lba(grain * GRAIN), &[0xaa; (GRAIN * SECTOR) as usize])
            .unwrap();
    }
    // The flush allocates the tables, so that the grain written next is the last in the file.
    writer.flush().unwrap();
    writer
        .write_at(Lba(GRAINS * GRAIN), &[0xaa; (GRAIN * SECTOR) as usize])
        .unwrap();
    writer.close().unwrap();
    (dir, path)
}

fn len(path: &Path) -> u64 {
    path.metadata().unwrap().len()
}

fn truncate(path: &Path, len: u64) {
    File::options().write(true).open(path).unwrap().set_len(len).unwrap();
}

/// Panics unless `e` names the file, its length and the expected length.
#[track_caller]
fn assert_truncated(e: &Error, path: &Path, has: u64, expected: u64) {
    let text = e.to_string();
    let fragment = format!("{}: has {has} bytes, expected {expected} or more", path.display());
    assert!(e.kind() == ErrorKind::Corrupt && text.contains(&fragment), "{text}");
}

/// Panics unless every later write, also to an intact range, and every flush fails and leaves the file unchanged.
#[track_caller]
fn assert_write_latch(disk: &VmdkDisk, path: &Path, expected: u64) {
    let has = len(path);
    let writer = disk.writer().unwrap();
    let last = GRAINS * GRAIN;
    assert_truncated(&writer.write_at(Lba(0), &[1; 512]).unwrap_err(), path, has, expected);
    assert_truncated(
        &writer.write_at(Lba(last + GRAIN - 1), &[1; 512]).unwrap_err(),
        path,
        has,
        expected,
    );
    assert_truncated(
        &writer.write_at(Lba(last + GRAIN), &[1; 512]).unwrap_err(),
        path,
        has,
        expected,
    );
    assert_truncated(&writer.zero(Lba(0)..Lba(8), true).unwrap_err(), path, has, expected);
    assert_truncated(&writer.flush().unwrap_err(), path, has, expected);
    assert_truncated(&writer.close().unwrap_err(), path, has, expected);
    assert_eq!(len(path), has);
    assert_eq!(read(disk, 0).unwrap(), [0xaa; 512]);
    assert!(read(disk, last + GRAIN - 1).is_err(), "a lost sector can be read");
}

#[test]
fn regression_a_write_in_place_does_not_extend_a_truncated_file() {
    let _alone = alone();
    for lost in [1, 512, 4096, GRAIN * SECTOR] {
        let (_dir, path) = closed_image();
        let disk = writable(&path).unwrap();
        let whole = len(&path);
        truncate(&path, whole - lost);
        // The write ends at the former end of the file: done in place it would hide the truncation.
        let e = disk
            .writer()
            .unwrap()
            .write_at(Lba((GRAINS + 1) * GRAIN - 8), &[1; 4096])
            .unwrap_err();
        assert_truncated(&e, &path, whole - lost, whole);
        assert_write_latch(&disk, &path, whole);
    }
}

#[test]
fn regression_zeroes_in_place_detect_a_truncated_file() {
    let _alone = alone();
    for unmap in [false, true] {
        let (_dir, path) = closed_image();
        let disk = writable(&path).unwrap();
        let whole = len(&path);
        truncate(&path, whole - 8192);
        let last = GRAINS * GRAIN;
        let e = disk
            .writer()
            .unwrap()
            .zero(Lba(last)..Lba(last + GRAIN), unmap)
            .unwrap_err();
        assert_truncated(&e, &path, whole - 8192, whole);
        assert_write_latch(&disk, &path, whole);
    }
}

#[test]
fn regression_a_flush_fails_after_a_truncation() {
    let _alone = alone();
    let (_dir, path) = closed_image();
    let disk = writable(&path).unwrap();
    let whole = len(&path);
    disk.writer()
        .unwrap()
        .write_at(Lba(GRAINS * GRAIN), &[0xbb; 512])
        .unwrap();
    truncate(&path, whole - 512);
    assert_truncated(&disk.writer().unwrap().flush().unwrap_err(), &path, whole - 512, whole);
    assert_write_latch(&disk, &path, whole);
}

#[test]
fn regression_a_truncated_sector_does_not_read_as_zeroes() {
    let _alone = alone();
    let (_dir, path) = closed_image();
    let disk = writable(&path).unwrap();
    // This grain lies beyond the end that the file had at the open.
    let at = (GRAINS + 1) * GRAIN;
    disk.writer()
        .unwrap()
        .write_at(Lba(at), &[0xcc; (GRAIN * SECTOR) as usize])
        .unwrap();
    disk.writer().unwrap().close().unwrap();
    assert_eq!(read(&disk, at + GRAIN - 1).unwrap(), [0xcc; 512]);
    truncate(&path, len(&path) - 100);
    assert_eq!(read(&disk, at + GRAIN - 2).unwrap(), [0xcc; 512]);
    assert!(read(&disk, at + GRAIN - 1).is_err(), "the lost bytes read as zeroes");
}

#[test]
fn regression_a_truncated_flat_extent_is_not_extended() {
    let _alone = alone();
    for operation in ["write", "zero", "flush"] {
        let dir = tempdir().unwrap();
        let (path, flat) = (dir.path().join("x.vmdk"), dir.path().join("x-flat.vmdk"));
        let text = "# Disk DescriptorFile\nversion=1\nCID=fffffffe\nparentCID=ffffffff\ncreateType=\"monolithicFlat\"\n\
                    RW 4096 FLAT \"x-flat.vmdk\" 0\n";
        std::fs::write(&path, text).unwrap();
        std::fs::write(&flat, vec![0xaa; 4096 * 512]).unwrap();
        let disk = writable(&path).unwrap();
        let writer = disk.writer().unwrap();
        writer.write_at(Lba(0), &[0xbb; 512]).unwrap();
        truncate(&flat, 4096 * 512 - 8192);
        let e = match operation {
            "write" => writer.write_at(Lba(4095), &[1; 512]),
            "zero" => writer.zero(Lba(4088)..Lba(4096), false),
            _ => writer.flush(),
        };
        assert_truncated(&e.unwrap_err(), &flat, 4096 * 512 - 8192, 4096 * 512);
        assert!(read(&disk, 4088).is_err(), "a lost sector can be read");
        // The write latch is permanent, also for intact ranges.
        assert_truncated(
            &writer.write_at(Lba(0), &[1; 512]).unwrap_err(),
            &flat,
            4096 * 512 - 8192,
            4096 * 512,
        );
        assert_eq!(len(&flat), 4096 * 512 - 8192, "{operation}");
    }
}
