//! Files with an unusual layout.

use std::os::unix::fs::FileExt;

use fuse_tests::make::SECTOR;
use fuse_tests::model::{alone, readable, writable};
use tempfile::tempdir;
use vmdkfuse::block::{BlockRead, Lba};

use super::hosted::{Hosted, put_u32};
use super::read;

#[test]
fn regression_a_partial_last_sector_is_read_while_the_file_is_writable() {
    let _alone = alone();
    let dir = tempdir().unwrap();
    let path = dir.path().join("x.vmdk");
    let hosted = Hosted {
        capacity: 100,
        redundant: None,
        unclean: false,
        ..Hosted::default()
    };
    let file = hosted.make_base(&path, 128 + 100);
    put_u32(&file, 30, 0, 31);
    put_u32(&file, 31, 0, 128);
    file.write_all_at(&[0xaa; 100], (128 + 99) * SECTOR).unwrap();
    file.set_len((128 + 99) * SECTOR + 100).unwrap();
    let mut expected = [0; 512];
    expected[..100].fill(0xaa);
    assert_eq!(read(&readable(&path), 99).unwrap(), expected);
    let disk = writable(&path).unwrap();
    assert_eq!(read(&disk, 99).unwrap(), expected);
}

#[test]
fn regression_overlapping_metadata_is_refused() {
    let _alone = alone();
    let dir = tempdir().unwrap();
    let path = dir.path().join("x.vmdk");
    // Each directory has two sectors; no table is allocated.
    let plain = Hosted {
        capacity: 200 * 512 * 128,
        unclean: false,
        ..Hosted::default()
    };
    let over_directory = Hosted {
        redundant: Some(31),
        ..plain
    };
    let over_descriptor = Hosted {
        redundant: None,
        directory: 15,
        ..plain
    };
    plain.make_base(&path, 128);
    writable(&path).map(drop).unwrap();
    for hosted in [over_directory, over_descriptor] {
        hosted.make_base(&path, 128);
        let opened = writable(&path);
        let Ok(disk) = opened else { continue };
        // An image that is accepted has to work. Report what the write damaged before the panic below.
        disk.writer().unwrap().write_at(Lba(0), &[0xaa; 512]).unwrap();
        disk.writer().unwrap().close().unwrap();
        drop(disk);
        let disk = readable(&path);
        assert_eq!(read(&disk, 0).unwrap(), [0xaa; 512]);
        for table in 1..200 {
            assert_eq!(
                read(&disk, table * 512 * 128).unwrap(),
                [0; 512],
                "the write changed table {table}"
            );
        }
        panic!("overlapping directories or descriptor were accepted");
    }
}
