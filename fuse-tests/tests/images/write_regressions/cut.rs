//! A file that somebody else cuts while it is written to: its grains are lost, and nothing may hide that.

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

/// Sectors of a grain, and how many grains are allocated.
const GRAIN: u64 = 128;
const GRAINS: u64 = 4;

/// An image whose last grain ends where its file does.
fn closed() -> (TempDir, PathBuf) {
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
    // the tables take room as well, so that the last grain is allocated behind them
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

fn cut(path: &Path, len: u64) {
    File::options().write(true).open(path).unwrap().set_len(len).unwrap();
}

/// Panics unless `e` tells what happened to the file.
#[track_caller]
fn tells(e: &Error, path: &Path, has: u64, expected: u64) {
    let text = e.to_string();
    let wanted = format!("{}: has {has} bytes, expected {expected} or more", path.display());
    assert!(e.kind() == ErrorKind::Corrupt && text.contains(&wanted), "{text}");
}

/// Panics unless nothing is written any more, also where the file is whole, and nothing said to be durable.
#[track_caller]
fn is_over(disk: &VmdkDisk, path: &Path, expected: u64) {
    let has = len(path);
    let writer = disk.writer().unwrap();
    let last = GRAINS * GRAIN;
    tells(&writer.write_at(Lba(0), &[1; 512]).unwrap_err(), path, has, expected);
    tells(
        &writer.write_at(Lba(last + GRAIN - 1), &[1; 512]).unwrap_err(),
        path,
        has,
        expected,
    );
    tells(
        &writer.write_at(Lba(last + GRAIN), &[1; 512]).unwrap_err(),
        path,
        has,
        expected,
    );
    tells(&writer.zero(Lba(0)..Lba(8), true).unwrap_err(), path, has, expected);
    tells(&writer.flush().unwrap_err(), path, has, expected);
    tells(&writer.close().unwrap_err(), path, has, expected);
    assert_eq!(len(path), has);
    assert_eq!(read(disk, 0).unwrap(), [0xaa; 512]);
    assert!(
        read(disk, last + GRAIN - 1).is_err(),
        "a sector that is lost can be read"
    );
}

#[test]
fn regression_a_write_in_place_makes_no_file_longer_that_was_cut() {
    let _alone = alone();
    for lost in [1, 512, 4096, GRAIN * SECTOR] {
        let (_dir, path) = closed();
        let disk = writable(&path).unwrap();
        let whole = len(&path);
        cut(&path, whole - lost);
        // up to the very end that the file had, so that it would look as long as before
        let e = disk
            .writer()
            .unwrap()
            .write_at(Lba((GRAINS + 1) * GRAIN - 8), &[1; 4096])
            .unwrap_err();
        tells(&e, &path, whole - lost, whole);
        is_over(&disk, &path, whole);
    }
}

#[test]
fn regression_zeroes_in_place_do_not_pass_over_a_cut() {
    let _alone = alone();
    for unmap in [false, true] {
        let (_dir, path) = closed();
        let disk = writable(&path).unwrap();
        let whole = len(&path);
        cut(&path, whole - 8192);
        let last = GRAINS * GRAIN;
        let e = disk
            .writer()
            .unwrap()
            .zero(Lba(last)..Lba(last + GRAIN), unmap)
            .unwrap_err();
        tells(&e, &path, whole - 8192, whole);
        is_over(&disk, &path, whole);
    }
}

#[test]
fn regression_what_was_cut_before_a_flush_is_not_durable() {
    let _alone = alone();
    let (_dir, path) = closed();
    let disk = writable(&path).unwrap();
    let whole = len(&path);
    disk.writer()
        .unwrap()
        .write_at(Lba(GRAINS * GRAIN), &[0xbb; 512])
        .unwrap();
    cut(&path, whole - 512);
    tells(&disk.writer().unwrap().flush().unwrap_err(), &path, whole - 512, whole);
    is_over(&disk, &path, whole);
}

#[test]
fn regression_a_sector_that_was_cut_in_the_middle_is_no_zeroes() {
    let _alone = alone();
    let (_dir, path) = closed();
    let disk = writable(&path).unwrap();
    // grows beyond what it was when it was opened
    let at = (GRAINS + 1) * GRAIN;
    disk.writer()
        .unwrap()
        .write_at(Lba(at), &[0xcc; (GRAIN * SECTOR) as usize])
        .unwrap();
    disk.writer().unwrap().close().unwrap();
    assert_eq!(read(&disk, at + GRAIN - 1).unwrap(), [0xcc; 512]);
    cut(&path, len(&path) - 100);
    assert_eq!(read(&disk, at + GRAIN - 2).unwrap(), [0xcc; 512]);
    assert!(
        read(&disk, at + GRAIN - 1).is_err(),
        "the lost bytes are shown as zeroes"
    );
}

#[test]
fn regression_a_flat_extent_that_was_cut_is_not_made_longer() {
    let _alone = alone();
    for how in ["write", "zero", "flush"] {
        let dir = tempdir().unwrap();
        let (path, flat) = (dir.path().join("x.vmdk"), dir.path().join("x-flat.vmdk"));
        let text = "# Disk DescriptorFile\nversion=1\nCID=fffffffe\nparentCID=ffffffff\ncreateType=\"monolithicFlat\"\n\
                    RW 4096 FLAT \"x-flat.vmdk\" 0\n";
        std::fs::write(&path, text).unwrap();
        std::fs::write(&flat, vec![0xaa; 4096 * 512]).unwrap();
        let disk = writable(&path).unwrap();
        let writer = disk.writer().unwrap();
        writer.write_at(Lba(0), &[0xbb; 512]).unwrap();
        cut(&flat, 4096 * 512 - 8192);
        let e = match how {
            "write" => writer.write_at(Lba(4095), &[1; 512]),
            "zero" => writer.zero(Lba(4088)..Lba(4096), false),
            _ => writer.flush(),
        };
        tells(&e.unwrap_err(), &flat, 4096 * 512 - 8192, 4096 * 512);
        assert!(read(&disk, 4088).is_err(), "a sector that is lost can be read");
        // for good, also where the file is whole
        tells(
            &writer.write_at(Lba(0), &[1; 512]).unwrap_err(),
            &flat,
            4096 * 512 - 8192,
            4096 * 512,
        );
        assert_eq!(len(&flat), 4096 * 512 - 8192, "{how}");
    }
}
