//! Threads that write, zero, flush and close concurrently lose no data of each other.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::thread;

use fuse_tests::make::model::Random;
use fuse_tests::model::{alone, writable};
use tempfile::tempdir;
use vmdkfuse::block::{BlockRead, Lba};
use vmdkfuse::store::{Access, OpenPolicy, open_user_path};
use vmdkfuse::vmdk::{OpenOptions, VmdkDisk};

use super::hosted::Hosted;
use super::read;

const THREADS: u64 = 4;

/// Sectors covered by a table. Tables are this large so that only few of them fit into the table cache.
const COVERAGE: u64 = 65536 * 8;

/// Applies random operations to the sectors of one thread, those whose number modulo [`THREADS`] is `me`. Returns the
/// expected content of each sector that it wrote.
fn write_own_sectors(disk: &VmdkDisk, me: u64, seed: u64) -> BTreeMap<u64, u8> {
    let writer = disk.writer().unwrap();
    let mut model = BTreeMap::new();
    let mut random = Random::new(seed * 7919 + me);
    for step in 0..800u64 {
        let state = random.next();
        // Few grains of many tables, so that the threads write to the same grains and evict tables of each other.
        let table = if step % 4 == 0 {
            state / 64 % 3
        } else {
            state / 64 % 400
        };
        let at = table * COVERAGE + state % 5 * 8 + (state / 5 % 2) * THREADS + me;
        let fill = (step % 255) as u8 + 1;
        match state % 16 {
            0 => {
                writer.zero(Lba(at)..Lba(at + 1), state.is_multiple_of(32)).unwrap();
                model.insert(at, 0);
            }
            1 => {
                let seen = read(disk, at).unwrap();
                assert_eq!(seen, [model.get(&at).copied().unwrap_or(0); 512], "sector {at}");
            }
            2 if step % 8 == 0 => writer.flush().unwrap(),
            3 if step % 128 == 0 => writer.close().unwrap(),
            _ => {
                writer.write_at(Lba(at), &[fill; 512]).unwrap();
                model.insert(at, fill);
            }
        }
    }
    model
}

#[test]
fn parallel_writes_zeroes_flushes_and_closes_lose_no_data() {
    let _alone = alone();
    for seed in 1..=2u64 {
        let dir = tempdir().unwrap();
        let path = dir.path().join("x.vmdk");
        let plain = Hosted {
            capacity: 400 * COVERAGE,
            grain: 8,
            entries: 65536,
            unclean: false,
            ..Hosted::default()
        };
        let hosted = Hosted {
            redundant: Some(21),
            directory: 25,
            zeroed: seed % 2 == 0,
            ..plain
        };
        hosted.make_base(&path, 128);
        let disk = writable(&path).unwrap();
        let models: Vec<BTreeMap<u64, u8>> = thread::scope(|scope| {
            let disk = &disk;
            let threads: Vec<_> = (0..THREADS)
                .map(|me| scope.spawn(move || write_own_sectors(disk, me, seed)))
                .collect();
            threads.into_iter().map(|t| t.join().unwrap()).collect()
        });
        disk.writer().unwrap().flush().unwrap();
        let compare = |disk: &VmdkDisk| {
            for (at, fill) in models.iter().flatten() {
                assert_eq!(read(disk, *at).unwrap(), [*fill; 512], "seed {seed}, sector {at}");
            }
        };
        compare(&disk);
        disk.writer().unwrap().close().unwrap();
        // Opened a second time without locks, as the first open still holds them.
        let policy = Arc::new(OpenPolicy::new(Vec::new(), false));
        let again = open_user_path(&path, policy, Access::Read).unwrap();
        let again = VmdkDisk::open(again, OpenOptions::default()).unwrap();
        compare(&again);
        assert_eq!(again.check().errors, Vec::<String>::new());
    }
}
