//! Random operations on a file of fixed size, each compared with a model in memory, as the program fsx does it.

use std::fs::{File, OpenOptions};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use fuse_tests::harness::{Aligned, Mapped};
use nix::fcntl::{FallocateFlags, fallocate};
use nix::libc;
use rand::rngs::SmallRng;
use rand::{Rng, RngCore, SeedableRng};

/// Largest number of bytes that one operation reads or writes.
const LONGEST: usize = 200_000;

/// Open handles of one file, one for each access path.
struct Handles {
    plain: File,
    direct: File,
    sync: File,
    only_write: File,
    mapped: Mapped,
}

impl Handles {
    fn open(path: &Path) -> Self {
        let with = |flags| {
            OpenOptions::new()
                .read(true)
                .write(true)
                .custom_flags(flags)
                .open(path)
                .unwrap()
        };
        let plain = with(0);
        Self {
            direct: with(libc::O_DIRECT),
            sync: with(libc::O_DSYNC),
            only_write: OpenOptions::new().write(true).open(path).unwrap(),
            mapped: Mapped::new(&plain),
            plain,
        }
    }
}

/// A file under test, and its expected content.
pub(crate) struct Exerciser<'a> {
    path: PathBuf,
    model: &'a mut Vec<u8>,
    random: SmallRng,
    handles: Handles,
    buffer: Aligned,
    done: usize,
}

impl<'a> Exerciser<'a> {
    /// Opens the file; `model` is its current content and is updated by the operations.
    pub(crate) fn new(path: PathBuf, model: &'a mut Vec<u8>, seed: u64) -> Self {
        let handles = Handles::open(&path);
        let random = SmallRng::seed_from_u64(seed);
        Self {
            path,
            model,
            random,
            handles,
            buffer: Aligned::new(LONGEST + 4096),
            done: 0,
        }
    }

    /// Runs this number of operations, then syncs the file; panics at the first wrong byte.
    #[track_caller]
    pub(crate) fn run(&mut self, operations: usize) {
        for _ in 0..operations {
            self.step();
            self.done += 1;
        }
        self.handles.plain.sync_all().unwrap();
    }

    /// Runs one random operation: 60 % change the file, 33 % read it, the others sync, set the same size, or reopen.
    #[track_caller]
    fn step(&mut self) {
        let (at, len) = self.range();
        match self.random.random_range(0..100) {
            0..15 => self.write(at, len, |handles, at, bytes| {
                handles.plain.write_all_at(bytes, at).unwrap();
            }),
            15..20 => self.write(at, len, |handles, at, bytes| {
                handles.sync.write_all_at(bytes, at).unwrap();
            }),
            20..27 => self.write(at, len, |handles, at, bytes| {
                handles.only_write.write_all_at(bytes, at).unwrap();
            }),
            27..37 => {
                let (at, len) = whole_pages(at, len, self.model.len());
                self.write(at, len, |handles, at, bytes| {
                    handles.direct.write_all_at(bytes, at).unwrap();
                });
            }
            37..47 => self.write(at, len, |handles, at, bytes| {
                handles.mapped.bytes()[at as usize..][..bytes.len()].copy_from_slice(bytes);
            }),
            47..54 => self.zero(at, len, FallocateFlags::FALLOC_FL_PUNCH_HOLE),
            54..60 => self.zero(at, len, FallocateFlags::FALLOC_FL_ZERO_RANGE),
            60..75 => self.read(at, len, |handles, at, bytes| {
                handles.plain.read_exact_at(bytes, at).unwrap();
            }),
            75..83 => {
                let (at, len) = whole_pages(at, len, self.model.len());
                self.read(at, len, |handles, at, bytes| {
                    handles.direct.read_exact_at(bytes, at).unwrap();
                });
            }
            83..93 => self.read(at, len, |handles, at, bytes| {
                bytes.copy_from_slice(&handles.mapped.bytes()[at as usize..][..bytes.len()]);
            }),
            93..96 => self.handles.plain.sync_data().unwrap(),
            96..98 => self.handles.mapped.sync().unwrap(),
            98 => self.handles.plain.set_len(self.model.len() as u64).unwrap(),
            _ => self.handles = Handles::open(&self.path),
        }
    }

    /// Returns a random range of the file: short or long, and often at the border of a sector, page or grain.
    fn range(&mut self) -> (usize, usize) {
        let end = self.model.len();
        let longest = [20, 600, 5000, 70_000, LONGEST][self.random.random_range(0..5)];
        let len = self.random.random_range(1..=longest);
        let anywhere = self.random.random_range(0..end);
        let at = match self.random.random_range(0..4) {
            0 => anywhere,
            1 => anywhere / 512 * 512,
            // Up to two bytes before or after the border of a page, which may also be that of a grain.
            2 => (anywhere / 4096 * 4096 + self.random.random_range(0..5)).saturating_sub(2),
            _ => anywhere / 65536 * 65536,
        };
        let at = at.min(end - 1);
        (at, len.min(end - at))
    }

    /// Writes random bytes, or in one of eight cases zeroes, to the file and the model.
    fn write(&mut self, at: usize, len: usize, how: impl FnOnce(&mut Handles, u64, &[u8])) {
        let bytes = &mut self.buffer.bytes()[..len];
        if self.random.random_range(0..8) == 0 {
            bytes.fill(0);
        } else {
            self.random.fill_bytes(bytes);
        }
        self.model[at..at + len].copy_from_slice(bytes);
        how(&mut self.handles, at as u64, bytes);
    }

    /// Zeroes a range of the file with fallocate, and of the model.
    fn zero(&mut self, at: usize, len: usize, how: FallocateFlags) {
        self.model[at..at + len].fill(0);
        let flags = how | FallocateFlags::FALLOC_FL_KEEP_SIZE;
        fallocate(&self.handles.plain, flags, at as i64, len as i64).unwrap();
    }

    /// Reads a range of the file; panics unless it equals the model.
    #[track_caller]
    fn read(&mut self, at: usize, len: usize, how: impl FnOnce(&mut Handles, u64, &mut [u8])) {
        let bytes = &mut self.buffer.bytes()[..len];
        how(&mut self.handles, at as u64, bytes);
        let wrong = bytes.iter().zip(&self.model[at..]).position(|(a, b)| a != b);
        let wrong_byte = wrong.map(|n| at + n);
        assert_eq!(
            wrong_byte,
            None,
            "{} has a wrong byte, in a read from byte {at} on after {} operations",
            self.path.display(),
            self.done
        );
    }
}

/// Extends a range to whole pages, but not beyond `end`: `O_DIRECT` needs multiples of 512 bytes.
fn whole_pages(at: usize, len: usize, end: usize) -> (usize, usize) {
    let at = at / 4096 * 4096;
    (at, len.next_multiple_of(4096).min(end - at))
}
