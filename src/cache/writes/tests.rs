use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::Duration;

use proptest::prelude::*;

use crate::block::{BlockRead, BlockWrite, Content, Geometry, Lba, SECTOR, SharedContent, check_range};
use crate::cache::{BlockCache, CacheOptions};
use crate::error::{Error, ErrorKind, Result};
use crate::store::RoomNeeded;
use crate::volume::{ReadBuffer, Volume};
use crate::write_latch::WriteLatch;

/// Sectors of a block of the cache, and of the disk, which ends inside of a block.
const BLOCK: u64 = 4;
const SECTORS: u64 = 45;

/// Channels that tell another thread that a call has begun, and that let the call go on.
type Pause = Mutex<Option<(Sender<()>, Receiver<()>)>>;

/// Disk in memory whose calls can be counted, paused and made to fail.
#[derive(Debug, Default)]
struct Memory {
    bytes: Mutex<Vec<u8>>,
    granule: u64,
    reads: AtomicUsize,
    epoch: AtomicU64,
    /// The next write changes a part of its range, and fails.
    fails: AtomicBool,
    /// The next read, once it has the bytes.
    read_pause: Pause,
    /// The next write, before it changes anything.
    write_pause: Pause,
    latch: WriteLatch,
}

fn pause(pause: &Pause) {
    let pause = pause.lock().unwrap().take();
    if let Some((paused, resume)) = pause {
        paused.send(()).unwrap();
        resume.recv().unwrap();
    }
}

/// Sets a pause. Returns what tells that it is reached, and what ends it.
fn set_pause(pause: &Pause) -> (Receiver<()>, Sender<()>) {
    let ((paused, reached), (resume, resumed)) = (channel(), channel());
    *pause.lock().unwrap() = Some((paused, resumed));
    (reached, resume)
}

impl Memory {
    fn new(granule: u64) -> Arc<Self> {
        let bytes = (0..SECTORS * SECTOR).map(|at| (at / SECTOR) as u8);
        Arc::new(Self {
            bytes: Mutex::new(bytes.collect()),
            granule,
            ..Self::default()
        })
    }

    /// Writes as another client does.
    fn write_elsewhere(&self, sector: u64, byte: u8) {
        self.bytes.lock().unwrap()[(sector * SECTOR) as usize..][..SECTOR as usize].fill(byte);
    }

    fn reads(&self) -> usize {
        self.reads.swap(0, Ordering::SeqCst)
    }
}

impl BlockRead for Memory {
    fn geometry(&self) -> Geometry {
        Geometry {
            sectors: SECTORS,
            granule: self.granule,
            preferred: self.granule,
        }
    }

    fn read_at(&self, at: Lba, buf: &mut [u8]) -> Result<()> {
        check_range(&self.geometry(), at, buf.len()).unwrap();
        self.reads.fetch_add(1, Ordering::SeqCst);
        buf.copy_from_slice(&self.bytes.lock().unwrap()[at.bytes() as usize..][..buf.len()]);
        pause(&self.read_pause);
        Ok(())
    }

    fn content_at(&self, at: Lba) -> Result<(Content, u64)> {
        Ok((Content::Data, SECTORS - at.0))
    }

    fn is_zero(&self, _at: Lba, _sectors: u64) -> bool {
        false
    }

    fn writer(&self) -> Option<&dyn BlockWrite> {
        Some(self)
    }

    fn shared_content(&self) -> Option<&dyn SharedContent> {
        Some(self)
    }
}

impl SharedContent for Memory {
    fn epoch(&self) -> u64 {
        self.epoch.load(Ordering::SeqCst)
    }

    fn forget_content(&self) {}
}

impl BlockWrite for Memory {
    fn latch(&self) -> &WriteLatch {
        &self.latch
    }

    fn prepare_external_write(&self) -> Result<()> {
        Ok(())
    }

    fn write_at(&self, at: Lba, buf: &[u8]) -> Result<()> {
        pause(&self.write_pause);
        let fails = self.fails.swap(false, Ordering::SeqCst);
        let done = if fails { buf.len() / 2 } else { buf.len() };
        self.bytes.lock().unwrap()[at.bytes() as usize..][..done].copy_from_slice(&buf[..done]);
        match fails {
            true => Err(Error::new(ErrorKind::Os(libc::EIO), "broken")),
            false => Ok(()),
        }
    }

    fn zero(&self, range: std::ops::Range<Lba>, _unmap: bool) -> Result<()> {
        self.bytes.lock().unwrap()[range.start.bytes() as usize..range.end.bytes() as usize].fill(0);
        Ok(())
    }

    fn slow_zeroing(&self, _range: std::ops::Range<Lba>) -> Option<String> {
        None
    }

    fn add_room(&self, _range: std::ops::Range<Lba>, _zero: bool, _needed: &mut RoomNeeded) -> Result<()> {
        Ok(())
    }

    fn allocate(&self, _range: std::ops::Range<Lba>) -> Result<()> {
        Ok(())
    }

    fn flush(&self) -> Result<()> {
        Ok(())
    }

    fn close(&self) -> Result<()> {
        Ok(())
    }
}

/// Returns a cache over the disk, which holds `blocks` blocks.
fn cache(disk: &Arc<Memory>, blocks: u64) -> Arc<BlockCache> {
    let options = CacheOptions {
        size: blocks * BLOCK * SECTOR,
        readahead: 2 * BLOCK * SECTOR,
        workers: 2,
        block: BLOCK,
        max_run: 3,
        deadline: Duration::from_secs(60),
        drop_at_open: true,
    };
    Arc::new(BlockCache::new(Arc::clone(disk) as _, options, None).unwrap())
}

/// Returns the first byte of a sector.
fn read(cache: &BlockCache, sector: u64) -> u8 {
    let mut buf = [0; SECTOR as usize];
    cache.read_at(Lba(sector), &mut buf).unwrap();
    buf[0]
}

#[derive(Debug, Clone)]
enum Step {
    Write {
        offset: u64,
        len: usize,
        byte: u8,
        fails: bool,
    },
    Zero {
        offset: u64,
        len: u64,
    },
    Read {
        offset: u64,
        len: usize,
    },
    Elsewhere {
        sector: u64,
        byte: u8,
        reconnects: bool,
    },
}

fn step() -> impl Strategy<Value = Step> {
    let offset = 0..SECTORS * SECTOR;
    prop_oneof![
        (offset.clone(), 1..5000usize, any::<u8>(), prop::bool::weighted(0.1)).prop_map(
            |(offset, len, byte, fails)| Step::Write {
                offset,
                len,
                byte,
                fails
            }
        ),
        (offset.clone(), 1..5000u64).prop_map(|(offset, len)| Step::Zero { offset, len }),
        (offset, 1..5000usize).prop_map(|(offset, len)| Step::Read { offset, len }),
        (0..SECTORS, any::<u8>(), any::<bool>()).prop_map(|(sector, byte, reconnects)| Step::Elsewhere {
            sector,
            byte,
            reconnects
        }),
    ]
}

proptest! {
    #[test]
    fn reads_after_writes_return_what_the_disk_has_at_every_alignment(
        granule in prop_oneof![Just(1u64), Just(2), Just(4)],
        blocks in 4..16u64,
        steps in prop::collection::vec(step(), 1..60),
    ) {
        let disk = Memory::new(granule);
        let volume = Volume::new(cache(&disk, blocks), Vec::new());
        let mut buffer = ReadBuffer::new();
        for step in steps {
            match step {
                Step::Write { offset, len, byte, fails } => {
                    disk.fails.store(fails, Ordering::SeqCst);
                    let bytes: Vec<u8> = (0..len).map(|i| byte.wrapping_add(i as u8)).collect();
                    prop_assert_eq!(volume.write(offset, &bytes).is_err(), fails);
                }
                Step::Zero { offset, len } => volume.zero_range(offset, len, true).unwrap(),
                Step::Read { offset, len } => {
                    let read = volume.read(offset, len, &mut buffer).unwrap();
                    let model = disk.bytes.lock().unwrap();
                    prop_assert!(read == &model[offset as usize..(offset as usize + len).min(model.len())]);
                }
                Step::Elsewhere { sector, byte, reconnects } => {
                    disk.write_elsewhere(sector, byte);
                    match reconnects {
                        true => drop(disk.epoch.fetch_add(1, Ordering::SeqCst)),
                        false => volume.forget_content(),
                    }
                }
            }
        }
        let whole = volume.read(0, (SECTORS * SECTOR) as usize, &mut buffer).unwrap();
        prop_assert!(whole == &**disk.bytes.lock().unwrap());
    }
}

#[test]
fn a_write_updates_cached_blocks_and_fetches_none() {
    let disk = Memory::new(1);
    let cache = cache(&disk, 16);
    assert_eq!(read(&cache, 5), 5);
    disk.reads();
    cache.write_at(Lba(6), &[9; 3 * SECTOR as usize]).unwrap();
    assert_eq!(disk.reads(), 0);
    assert_eq!([5, 6, 7].map(|sector| read(&cache, sector)), [5, 9, 9]);
    assert_eq!(disk.reads(), 0, "the block was updated");
    assert_eq!(read(&cache, 8), 9);
}

#[test]
fn a_failed_write_drops_its_blocks() {
    let disk = Memory::new(1);
    let cache = cache(&disk, 16);
    assert_eq!([4, 5].map(|sector| read(&cache, sector)), [4, 5]);
    disk.fails.store(true, Ordering::SeqCst);
    cache.write_at(Lba(4), &[9; 2 * SECTOR as usize]).unwrap_err();
    disk.reads();
    assert_eq!([4, 5].map(|sector| read(&cache, sector)), [9, 5]);
    assert!(disk.reads() > 0);
}

#[test]
fn a_reconnect_drops_all_blocks_and_an_open_too() {
    let disk = Memory::new(1);
    let cache = cache(&disk, 16);
    assert_eq!(read(&cache, 5), 5);
    disk.write_elsewhere(5, 77);
    assert_eq!(read(&cache, 5), 5, "cached");
    disk.epoch.fetch_add(1, Ordering::SeqCst);
    assert_eq!(read(&cache, 5), 77);
    disk.write_elsewhere(5, 78);
    cache.shared_content().unwrap().forget_content();
    assert_eq!(read(&cache, 5), 78);
}

/// A fetch that read its block before a change does not cache it afterwards.
#[test]
fn a_fetch_that_began_before_a_change_is_not_cached() {
    let changes: [fn(&Memory, &BlockCache); 4] = [
        |_, cache| cache.write_at(Lba(5), &[9; SECTOR as usize]).unwrap(),
        |_, cache| {
            cache.zero(Lba(5)..Lba(6), true).unwrap();
            cache.write_at(Lba(5), &[9; SECTOR as usize]).unwrap();
        },
        |disk, cache| {
            disk.write_elsewhere(5, 9);
            cache.shared_content().unwrap().forget_content();
        },
        |disk, cache| {
            disk.write_elsewhere(5, 9);
            disk.epoch.fetch_add(1, Ordering::SeqCst);
            read(cache, 40);
        },
    ];
    for change in changes {
        let disk = Memory::new(1);
        let cache = cache(&disk, 16);
        let (reached, resume) = set_pause(&disk.read_pause);
        thread::scope(|scope| {
            let reader = scope.spawn(|| read(&cache, 5));
            reached.recv().unwrap();
            change(&disk, &cache);
            // A reader that begins now does not join the old fetch.
            assert_eq!(read(&cache, 5), 9);
            resume.send(()).unwrap();
            assert_eq!(reader.join().unwrap(), 5, "began before the change");
        });
        assert_eq!(read(&cache, 5), 9);
    }
}

/// The disk executes the first write last; the cache must not keep the second one.
#[test]
fn writes_that_overlap_in_time_drop_their_blocks() {
    let disk = Memory::new(1);
    let cache = cache(&disk, 16);
    assert_eq!(read(&cache, 5), 5);
    let (reached, resume) = set_pause(&disk.write_pause);
    thread::scope(|scope| {
        let first = scope.spawn(|| cache.write_at(Lba(5), &[1; SECTOR as usize]));
        reached.recv().unwrap();
        cache.write_at(Lba(5), &[2; SECTOR as usize]).unwrap();
        resume.send(()).unwrap();
        first.join().unwrap().unwrap();
    });
    assert_eq!(read(&cache, 5), 1);
}
