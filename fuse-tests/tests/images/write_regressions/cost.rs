//! Small requests cost little space in the file and little memory.

use std::fs;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use fuse_tests::harness::peak_memory;
use fuse_tests::make::SECTOR;
use fuse_tests::model::{alone, writable};
use tempfile::tempdir;
use vmdkfuse::block::{BlockRead, Lba};

use super::hosted::{BASE, Hosted, descriptor, flat_base, put_u32};
use super::read;

/// Creates a child over a parent whose only allocated grain is the last of the disk.
fn chain(dir: &Path, capacity: u64, grain: u64) -> PathBuf {
    let plain = Hosted {
        capacity,
        grain,
        redundant: None,
        unclean: false,
        overhead: 16384,
        ..Hosted::default()
    };
    let parent = plain.make_base(&dir.join("base.vmdk"), 16384 + 2 * grain);
    let table = 16384;
    let grains = capacity / grain;
    put_u32(&parent, 30, (grains - 1) / 512, table);
    put_u32(&parent, table, (grains - 1) % 512, 16384 + grain);
    parent
        .write_all_at(&vec![0xaa; (grain * SECTOR) as usize], (16384 + grain) * SECTOR)
        .unwrap();
    let child = dir.join("child.vmdk");
    plain.make_child(&child, 16384);
    child
}

#[test]
fn regression_zeroes_take_no_space_over_zeroes_of_the_parent() {
    let _alone = alone();
    let dir = tempdir().unwrap();
    // 4 TiB, of which the parent holds the last 8 MiB.
    let capacity = 8u64 << 30;
    let child = chain(dir.path(), capacity, 16384);
    let disk = writable(&child).unwrap();
    assert_eq!(read(&disk, capacity - 1).unwrap(), [0xaa; 512]);
    disk.writer().unwrap().zero(Lba(0)..Lba(capacity), true).unwrap();
    assert_eq!(read(&disk, capacity - 1).unwrap(), [0; 512]);
    disk.writer().unwrap().close().unwrap();
    let len = fs::metadata(&child).unwrap().len();
    assert!(len < 1 << 30, "8 MiB of zeroes took {len} bytes of the file");
}

/// Returns the peak memory of the process in bytes since the last [`reset_peak`].
fn peak() -> u64 {
    peak_memory(std::process::id() as i32)
}

/// Resets the peak and returns the memory in use now. The kernel resets `VmHWM` when 5 is written to `clear_refs`.
fn reset_peak() -> u64 {
    fs::write("/proc/self/clear_refs", "5").unwrap();
    peak()
}

#[test]
fn regression_large_directories_of_several_extents_take_bounded_memory() {
    let _alone = alone();
    let dir = tempdir().unwrap();
    let tables = 1u64 << 25;
    let hosted = Hosted {
        capacity: tables * 128 * 8,
        grain: 8,
        entries: 128,
        descriptor: (0, 0),
        redundant: None,
        directory: 8,
        unclean: false,
        ..Hosted::default()
    };
    let lines: Vec<String> = (0..3)
        .map(|i| format!("RW {} SPARSE \"e{i}.vmdk\"", hosted.capacity))
        .collect();
    for i in 0..3 {
        hosted.make(&dir.path().join(format!("e{i}.vmdk")), "", 8 + tables * 4 / SECTOR);
    }
    let path = dir.path().join("x.vmdk");
    fs::write(&path, descriptor(BASE, None, "custom", &lines.join("\n"))).unwrap();
    let before = reset_peak();
    // A refusal is allowed too; only the memory is checked.
    let disk = writable(&path);
    let used = peak().saturating_sub(before);
    drop(disk);
    assert!(
        used < 400 << 20,
        "opening three small files took {used} bytes of memory"
    );
}

#[test]
fn regression_pending_updates_of_large_tables_take_bounded_memory() {
    let _alone = alone();
    let dir = tempdir().unwrap();
    let path = dir.path().join("x.vmdk");
    let coverage = 65536 * 8;
    let hosted = Hosted {
        capacity: 2048 * coverage,
        grain: 8,
        entries: 65536,
        redundant: None,
        directory: 21,
        unclean: false,
        ..Hosted::default()
    };
    hosted.make_base(&path, 128);
    let disk = writable(&path).unwrap();
    let before = reset_peak();
    for table in 0..2048 {
        disk.writer()
            .unwrap()
            .write_at(Lba(table * coverage), &[1; 4096])
            .unwrap();
    }
    let used = peak().saturating_sub(before);
    assert!(used < 128 << 20, "2048 small writes took {used} bytes of memory");
}

#[test]
fn regression_zeroes_over_a_large_range_take_bounded_memory() {
    let _alone = alone();
    let dir = tempdir().unwrap();
    let capacity = 1u64 << 26;
    let flat = flat_base(dir.path(), BASE, capacity);
    flat.write_all_at(&[0xaa; 512], (capacity - 1) * SECTOR).unwrap();
    for zeroed in [true, false] {
        let child = dir.path().join("child.vmdk");
        let directory = Hosted {
            capacity,
            grain: 8,
            redundant: None,
            directory: 32,
            ..Hosted::default()
        };
        let hosted = Hosted {
            unclean: false,
            overhead: 256,
            zeroed,
            ..directory
        };
        hosted.make_child(&child, 256);
        let disk = writable(&child).unwrap();
        let before = reset_peak();
        disk.writer().unwrap().zero(Lba(0)..Lba(capacity), true).unwrap();
        let used = peak().saturating_sub(before);
        assert_eq!(read(&disk, capacity - 1).unwrap(), [0; 512]);
        assert!(
            used < 48 << 20,
            "zeroes (entries of 1: {zeroed}) took {used} bytes of memory"
        );
    }
}
