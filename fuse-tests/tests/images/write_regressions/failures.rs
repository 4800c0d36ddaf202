//! Writes to the file that fail completely or after a part lose no data.

use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use fuse_tests::make::SECTOR;
use fuse_tests::model::{self, alone, readable};
use tempfile::tempdir;
use vmdkfuse::block::{BlockRead, Lba};
use vmdkfuse::vmdk::{OpenOptions, VmdkDisk};

use super::faulty_file::FaultyFile;
use super::hosted::{BASE, Hosted, flat_base};

/// Creates a child with small tables over a parent with data in every second grain. Returns path and capacity.
fn small_chain(dir: &Path, zeroed: bool, redundant: bool) -> (PathBuf, u64) {
    let capacity = 60 * 128 * 8 - 3;
    let mut base = vec![0u8; (capacity * SECTOR) as usize];
    for (i, sector) in base.chunks_exact_mut(512).enumerate() {
        if i / 8 % 2 == 0 {
            sector.fill((i % 251) as u8 + 1);
        }
    }
    flat_base(dir, BASE, capacity).write_all_at(&base, 0).unwrap();
    let child = dir.join("child.vmdk");
    let redundant = redundant.then_some(21);
    let small = Hosted {
        capacity,
        grain: 8,
        entries: 128,
        redundant,
        overhead: 33,
        ..Hosted::default()
    };
    Hosted {
        unclean: false,
        zeroed,
        ..small
    }
    .make_child(&child, 33);
    (child, capacity)
}

/// Writes data or zeroes at random and returns true if that failed. Checks that each sector is old or new, and copies
/// the sectors to `model`.
fn step(disk: &VmdkDisk, model: &mut [u8], draw: u64, step: u64) -> bool {
    let capacity = model.len() as u64 / SECTOR;
    let writer = disk.writer().unwrap();
    let at = draw % capacity;
    let sectors = (1 + draw / capacity % [3, 20, 300][(step % 3) as usize]).min(capacity - at);
    let bytes = (at * SECTOR) as usize..((at + sectors) * SECTOR) as usize;
    let data: Vec<u8> = match draw % 5 {
        0 => vec![0; bytes.len()],
        _ => (0..bytes.len()).map(|i| (i / 512) as u8 ^ step as u8 | 1).collect(),
    };
    let done = match draw % 5 {
        0 => writer.zero(Lba(at)..Lba(at + sectors), draw.is_multiple_of(2)),
        _ => writer.write_at(Lba(at), &data),
    };
    let seen = model::read(disk, at, sectors);
    for ((new, old), now) in data
        .chunks(512)
        .zip(model[bytes.clone()].chunks(512))
        .zip(seen.chunks(512))
    {
        assert!(now == new || (done.is_err() && now == old), "step {step}: {done:?}");
    }
    model[bytes].copy_from_slice(&seen);
    done.is_err()
}

/// Applies 300 random operations to a file that fails at random, then flushes or closes without failures.
fn write_with_failures(child: &Path, model: &mut [u8], seed: u64, close: bool) {
    let file = FaultyFile::open(child, seed);
    let disk = VmdkDisk::open_writable(Arc::clone(&file) as _, OpenOptions::default()).unwrap();
    let writer = disk.writer().unwrap();
    let mut failed = 0;
    for number in 0..300u64 {
        file.fail_one_in([0, 3, 12, 60][(number / 50 % 4) as usize]);
        failed += u64::from(step(&disk, model, file.draw(), number));
        if number % 37 == 0 {
            failed += u64::from(writer.flush().is_err());
        }
        if number % 111 == 0 {
            failed += u64::from(writer.close().is_err());
        }
    }
    assert!(failed > 5);
    file.fail_one_in(0);
    if close {
        writer.close().unwrap();
    } else {
        writer.flush().unwrap();
    }
}

#[test]
fn occasional_write_failures_lose_no_data() {
    let _alone = alone();
    for seed in 1..=6u64 {
        let dir = tempdir().unwrap();
        let (child, capacity) = small_chain(dir.path(), seed % 2 == 0, seed % 3 != 0);
        let mut model = model::read(&readable(&child), 0, capacity);
        for round in 0..3 {
            println!("seed {seed}, round {round}");
            write_with_failures(&child, &mut model, seed * 1000 + round + 7, round == 1);
            let disk = readable(&child);
            let report = disk.check();
            assert_eq!(report.errors, Vec::<String>::new(), "seed {seed}");
            let seen = model::read(&disk, 0, capacity);
            let first = seen.chunks(512).zip(model.chunks(512)).position(|(a, b)| a != b);
            assert_eq!(first, None, "seed {seed}, round {round}");
        }
    }
}
