//! Recovery of unclean images: it keeps all readable data, and its work is bounded by the size of the file.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::Path;

use fuse_tests::make::SECTOR;
use fuse_tests::model::{alone, readable, writable};
use tempfile::tempdir;
use vmdkfuse::block::{BlockRead, Lba};
use vmdkfuse::error::ErrorKind;
use vmdkfuse::vmdk::{OpenOptions, VmdkDisk};

use super::faulty_file::FaultyFile;
use super::hosted::{BASE, Hosted, descriptor, put_u32};
use super::read;

/// Creates an unclean image with one grain in each of its two tables; the grain of the second table ends the file.
fn two_tables(path: &Path) -> File {
    let file = Hosted::default().make_base(path, 128 * 4);
    for (directory, tables) in [(21, [22, 26]), (30, [31, 35])] {
        for (i, table) in (0..).zip(tables) {
            put_u32(&file, directory, i, table);
            put_u32(&file, table, 5, 128 * (2 + i));
        }
    }
    for (i, fill) in [(2, 0xaa), (3, 0xbb)] {
        file.write_all_at(&vec![fill; 128 * 512], i * 128 * SECTOR).unwrap();
    }
    file
}

/// First sector of the disk in the grain of the second table.
const IN_SECOND: u64 = (512 + 5) * 128;

/// Damages one directory entry, whose table the other directory still names. The open for writing may fail, but the
/// grain must stay readable and the file must keep its length.
fn check_bad_directory_entry(directory: u64) {
    let dir = tempdir().unwrap();
    let path = dir.path().join("x.vmdk");
    let file = two_tables(&path);
    put_u32(&file, directory, 1, 0x00ff_ffff);
    let before = file.metadata().unwrap().len();
    assert_eq!(read(&readable(&path), IN_SECOND).unwrap(), [0xbb; 512]);
    if let Err(e) = writable(&path).map(drop) {
        assert_eq!(e.kind(), ErrorKind::Corrupt, "{e}");
    }
    assert_eq!(file.metadata().unwrap().len(), before, "the file was truncated");
    assert_eq!(read(&readable(&path), IN_SECOND).unwrap(), [0xbb; 512]);
}

#[test]
fn regression_repair_keeps_the_grains_of_a_table_that_the_primary_directory_lost() {
    let _alone = alone();
    check_bad_directory_entry(30);
}

#[test]
fn regression_repair_keeps_the_grains_of_a_table_that_the_redundant_directory_lost() {
    let _alone = alone();
    check_bad_directory_entry(21);
}

#[test]
fn regression_repair_keeps_directories_and_descriptor_after_the_grains() {
    let _alone = alone();
    for descriptor_last in [false, true] {
        let dir = tempdir().unwrap();
        let path = dir.path().join("x.vmdk");
        let mut hosted = Hosted {
            redundant: None,
            overhead: 128,
            ..Hosted::default()
        };
        if descriptor_last {
            hosted.descriptor = (400, 20);
        } else {
            hosted.directory = 400;
        }
        let file = hosted.make_base(&path, 512);
        put_u32(&file, hosted.directory, 0, 31);
        put_u32(&file, 31, 5, 256);
        file.write_all_at(&[0xaa; 512], 256 * SECTOR).unwrap();
        assert_eq!(read(&readable(&path), 5 * 128).unwrap(), [0xaa; 512]);
        writable(&path).map(drop).ok();
        assert!(
            file.metadata().unwrap().len() >= 420 * SECTOR,
            "the file was truncated before the end of the directory or descriptor"
        );
        assert_eq!(read(&readable(&path), 5 * 128).unwrap(), [0xaa; 512]);
    }
}

/// Creates an unclean image of 3 MiB in which all directory entries name the same table of 256 KiB.
fn one_table_for_all(path: &Path, primary_too: bool) {
    const TABLES: u64 = 16 << 10;
    let directory_sectors = TABLES * 4 / SECTOR;
    let hosted = Hosted {
        capacity: TABLES * 65536 * 8,
        grain: 8,
        entries: 65536,
        directory: 21 + directory_sectors,
        overhead: 512,
        ..Hosted::default()
    };
    let table = 21 + 2 * directory_sectors;
    let file = hosted.make_base(path, 6 << 11);
    let entries: Vec<u8> = (0..TABLES)
        .flat_map(|_| u32::try_from(table).unwrap().to_le_bytes())
        .collect();
    file.write_all_at(&entries, 21 * SECTOR).unwrap();
    if primary_too {
        file.write_all_at(&entries, (21 + directory_sectors) * SECTOR).unwrap();
    }
}

/// Checks that the work of a recovery is bounded by the file, not by the claims of its directory.
fn check_repair_is_bounded(primary_too: bool) {
    let dir = tempdir().unwrap();
    let path = dir.path().join("x.vmdk");
    one_table_for_all(&path, primary_too);
    let before = fs::metadata(&path).unwrap().len();
    let error = VmdkDisk::open_writable(FaultyFile::open(&path, 1), OpenOptions::default())
        .map(drop)
        .unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Corrupt, "{error}");
    assert!(fs::metadata(&path).unwrap().len() <= 2 * before, "a refused image grew");
}

#[test]
fn regression_repair_of_one_table_for_the_whole_directory_is_bounded() {
    let _alone = alone();
    check_repair_is_bounded(true);
}

#[test]
fn regression_repair_does_not_copy_one_table_for_the_whole_directory() {
    let _alone = alone();
    check_repair_is_bounded(false);
}

#[test]
fn regression_read_only_extents_are_not_repaired() {
    let _alone = alone();
    let dir = tempdir().unwrap();
    let plain = Hosted {
        descriptor: (0, 0),
        ..Hosted::default()
    };
    Hosted {
        unclean: false,
        ..plain
    }
    .make(&dir.path().join("a.vmdk"), "", 128);
    plain.make(&dir.path().join("b.vmdk"), "", 256);
    let lines = format!("RW {0} SPARSE \"a.vmdk\"\nRDONLY {0} SPARSE \"b.vmdk\"", plain.capacity);
    let path = dir.path().join("x.vmdk");
    fs::write(&path, descriptor(BASE, None, "custom", &lines)).unwrap();
    let before = fs::read(dir.path().join("b.vmdk")).unwrap();
    let disk = writable(&path).unwrap();
    disk.writer().unwrap().write_at(Lba(0), &[0xaa; 512]).unwrap();
    disk.writer().unwrap().close().unwrap();
    assert_eq!(fs::read(dir.path().join("b.vmdk")).unwrap(), before);
}
