//! Files whose parts lie where nobody would put them.

use std::os::unix::fs::FileExt;

use fuse_tests::make::SECTOR;
use fuse_tests::model::{alone, readable, writable};
use tempfile::tempdir;
use vmdkfuse::block::{BlockRead, Lba};

use super::hosted::{Hosted, put_u32};
use super::read;

#[test]
fn regression_the_last_sector_of_a_file_of_odd_length_is_read_while_it_is_writable() {
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
fn regression_metadata_that_lie_over_each_other_are_not_written_to() {
    let _alone = alone();
    let dir = tempdir().unwrap();
    let path = dir.path().join("x.vmdk");
    // two sectors of directory each, no table yet
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
        // it was taken: then it has to work
        disk.writer().unwrap().write_at(Lba(0), &[0xaa; 512]).unwrap();
        disk.writer().unwrap().close().unwrap();
        drop(disk);
        let disk = readable(&path);
        assert_eq!(read(&disk, 0).unwrap(), [0xaa; 512]);
        for table in 1..200 {
            assert_eq!(
                read(&disk, table * 512 * 128).unwrap(),
                [0; 512],
                "a write shows in table {table}"
            );
        }
        panic!("directories or a descriptor that lie over each other were accepted");
    }
}
