use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex};
use std::thread;

use proptest::prelude::*;

use super::*;
use crate::block::{BlockRead, Content, Geometry, check_range};
use crate::volume::ReadBuffer;
use crate::write_latch::WriteLatch;

/// Disk in memory that counts its reads, and yields to other threads after each read: without the range lock bytes get
/// lost.
#[derive(Debug)]
struct Memory {
    geometry: Geometry,
    bytes: Mutex<Vec<u8>>,
    reads: AtomicUsize,
    latch: WriteLatch,
    /// Channels of a pause: the next read sends to the first, and waits for the second before it returns.
    pause: Mutex<Option<(Sender<()>, Receiver<()>)>>,
}

impl Memory {
    fn new(sectors: u64, granule: u64) -> Arc<Self> {
        let bytes = Mutex::new(vec![0; (sectors * SECTOR) as usize]);
        let (geometry, reads) = (
            Geometry {
                sectors,
                granule,
                preferred: granule,
            },
            AtomicUsize::new(0),
        );
        Arc::new(Self {
            geometry,
            bytes,
            reads,
            latch: WriteLatch::default(),
            pause: Mutex::default(),
        })
    }

    /// Returns the bytes of a request. Panics if it is not whole granules.
    fn byte_range(&self, at: Lba, bytes: usize) -> Range<usize> {
        let end = at.0 + check_range(&self.geometry, at, bytes).unwrap();
        assert!(at.0.is_multiple_of(self.geometry.granule), "{at}");
        assert!(
            end.is_multiple_of(self.geometry.granule) || end == self.geometry.sectors,
            "{at}, {bytes} bytes"
        );
        at.bytes() as usize..(end * SECTOR) as usize
    }
}

impl BlockRead for Memory {
    fn geometry(&self) -> Geometry {
        self.geometry
    }
    fn read_at(&self, at: Lba, buf: &mut [u8]) -> Result<()> {
        let range = self.byte_range(at, buf.len());
        buf.copy_from_slice(&self.bytes.lock().unwrap()[range]);
        self.reads.fetch_add(1, Ordering::Relaxed);
        match self.pause.lock().unwrap().take() {
            Some((paused, resume)) => {
                paused.send(()).unwrap();
                resume.recv().unwrap();
            }
            None => thread::yield_now(),
        }
        Ok(())
    }
    fn content_at(&self, at: Lba) -> Result<(Content, u64)> {
        let bytes = self.bytes.lock().unwrap();
        let sector = &bytes[at.bytes() as usize..][..SECTOR as usize];
        Ok((
            if sector.iter().all(|&b| b == 0) {
                Content::Hole
            } else {
                Content::Data
            },
            1,
        ))
    }
    fn is_zero(&self, _at: Lba, _sectors: u64) -> bool {
        false
    }
    fn writer(&self) -> Option<&dyn BlockWrite> {
        Some(self)
    }
}

impl BlockWrite for Memory {
    fn latch(&self) -> &WriteLatch {
        &self.latch
    }
    fn prepare_external_write(&self) -> Result<()> {
        Ok(())
    }
    fn write_at(&self, at: Lba, buf: &[u8]) -> Result<()> {
        let range = self.byte_range(at, buf.len());
        self.bytes.lock().unwrap()[range].copy_from_slice(buf);
        Ok(())
    }
    fn zero(&self, range: Range<Lba>, _unmap: bool) -> Result<()> {
        let bytes = ((range.end.0 - range.start.0) * SECTOR) as usize;
        let bytes = self.byte_range(range.start, bytes);
        self.bytes.lock().unwrap()[bytes].fill(0);
        Ok(())
    }
    fn add_room(&self, _range: Range<Lba>, _zero: bool, _needed: &mut RoomNeeded) -> Result<()> {
        Ok(())
    }

    fn allocate(&self, _range: Range<Lba>) -> Result<()> {
        Ok(())
    }

    fn slow_zeroing(&self, _range: Range<Lba>) -> Option<String> {
        None
    }
    fn flush(&self) -> Result<()> {
        Ok(())
    }
    fn close(&self) -> Result<()> {
        Ok(())
    }
}

fn volume(disk: &Arc<Memory>) -> Volume {
    Volume::new(Arc::clone(disk) as Arc<dyn BlockRead>, Vec::new())
}

/// Size of the disk: with granules of 8 and 16 sectors it ends inside of a granule.
const SECTORS: u64 = 37;

#[derive(Debug, Clone)]
enum Step {
    Write { offset: u64, len: usize, byte: u8 },
    Zero { offset: u64, len: u64 },
}

fn step() -> impl Strategy<Value = Step> {
    let end = SECTORS * SECTOR + 1500;
    // Half of the offsets lie near the border of a granule.
    let offset = prop_oneof![
        0..end,
        (0..end / 4096, 0..5u64).prop_map(|(g, d)| (g * 4096 + d).saturating_sub(2))
    ];
    prop_oneof![
        (offset.clone(), 1..9000usize, 1..=255u8).prop_map(|(offset, len, byte)| Step::Write { offset, len, byte }),
        (offset, 0..9000u64).prop_map(|(offset, len)| Step::Zero { offset, len }),
    ]
}

proptest! {
    #[test]
    fn bytes_are_written_as_to_a_file_of_fixed_size(
        granule in prop_oneof![Just(1u64), Just(8), Just(16)],
        steps in prop::collection::vec(step(), 1..40),
    ) {
        let disk = Memory::new(SECTORS, granule);
        let volume = volume(&disk);
        let mut model = vec![0; (SECTORS * SECTOR) as usize];
        for step in steps {
            match step {
                Step::Write { offset, len, byte } => {
                    let bytes: Vec<u8> = (0..len).map(|i| byte.wrapping_add(i as u8)).collect();
                    let inside = model.len().saturating_sub(offset as usize).min(len);
                    match volume.write(offset, &bytes) {
                        Ok(written) => {
                            prop_assert_eq!(written, inside);
                            model[offset as usize..][..inside].copy_from_slice(&bytes[..inside]);
                        }
                        Err(e) => prop_assert!(inside == 0 && e.kind() == ErrorKind::Os(libc::ENOSPC), "{}", e),
                    }
                }
                Step::Zero { offset, len } => {
                    volume.zero_range(offset, len, true).unwrap();
                    let end = (offset + len).min(model.len() as u64);
                    if offset < end {
                        model[offset as usize..end as usize].fill(0);
                    }
                }
            }
            prop_assert!(*disk.bytes.lock().unwrap() == model);
        }
        let mut read_buffer = ReadBuffer::new();
        prop_assert!(volume.read(0, model.len(), &mut read_buffer).unwrap() == model);
    }
}

/// "so that parallel neighbours never lose each other's bytes"
#[test]
fn parallel_writers_of_neighbouring_bytes_lose_none() {
    const THREADS: usize = 4;
    const ROUNDS: usize = 300;
    for granule in [1, 8] {
        let disk = Memory::new(32, granule);
        let volume = volume(&disk);
        let len = volume.len() as usize;
        // Each thread has every fourth piece of 100 bytes. Few pieces end at the border of a granule.
        let pieces = |thread: usize| (0..len / 100).filter(move |n| n % THREADS == thread).map(|n| n * 100);
        thread::scope(|scope| {
            for thread in 0..THREADS {
                let volume = &volume;
                scope.spawn(move || {
                    for round in 0..ROUNDS {
                        let byte = (round * THREADS + thread) as u8;
                        for at in pieces(thread) {
                            assert_eq!(volume.write(at as u64, &[byte; 100]).unwrap(), 100);
                        }
                    }
                });
            }
        });
        let seen = disk.bytes.lock().unwrap();
        for thread in 0..THREADS {
            let byte = ((ROUNDS - 1) * THREADS + thread) as u8;
            for at in pieces(thread) {
                assert!(
                    seen[at..at + 100].iter().all(|&b| b == byte),
                    "bytes from {at} on, granule {granule}"
                );
            }
        }
    }
}

/// A write of a whole granule during a read-modify-write of the same granule is not lost.
#[test]
fn a_write_during_a_read_modify_write_is_not_lost() {
    let disk = Memory::new(8, 8);
    let volume = volume(&disk);
    let ((pause, paused), (resume, resumed)) = (channel(), channel());
    *disk.pause.lock().unwrap() = Some((pause, resumed));
    thread::scope(|scope| {
        let volume = &volume;
        scope.spawn(move || volume.write(1, &[0xee]).unwrap());
        paused.recv().unwrap();
        let whole = scope.spawn(move || volume.write(0, &[7; 4096]).unwrap());
        while !whole.is_finished() && volume.ranges.waiting() == 0 {
            thread::yield_now();
        }
        resume.send(()).unwrap();
    });
    assert_eq!(*disk.bytes.lock().unwrap(), [7; 4096]);
}

/// "whole-sector writes take no extra read"
#[test]
fn whole_granules_are_written_without_a_read_and_partial_ones_with_one_each() {
    for granule in [1, 8] {
        let disk = Memory::new(64, granule);
        let volume = volume(&disk);
        let reads = || disk.reads.swap(0, Ordering::Relaxed);
        let bytes = granule * SECTOR;
        volume.write(bytes, &vec![1; 3 * bytes as usize]).unwrap();
        volume.zero_range(bytes, bytes, false).unwrap();
        assert_eq!(reads(), 0);
        volume.write(bytes + 1, &vec![2; 2 * bytes as usize]).unwrap();
        assert_eq!(reads(), 2);
        volume.write(bytes - 1, &[3]).unwrap();
        assert_eq!(reads(), 1);
    }
}

#[test]
fn the_count_of_data_follows_writes() {
    let disk = Memory::new(16, 1);
    let volume = volume(&disk);
    let becomes = |bytes: u64| {
        let until = std::time::Instant::now() + std::time::Duration::from_secs(60);
        while volume.allocated() != Some(bytes) {
            assert!(
                std::time::Instant::now() < until,
                "{:?} bytes are data",
                volume.allocated()
            );
            thread::yield_now();
        }
    };
    volume.write(0, &[1; 1024]).unwrap();
    becomes(1024);
    volume.write(2048, &[1; 512]).unwrap();
    becomes(1536);
    volume.zero_range(0, 1024, true).unwrap();
    becomes(512);
}
