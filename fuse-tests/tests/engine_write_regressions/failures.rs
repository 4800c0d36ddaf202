//! Calls of the file that fail, in whole or after a part was done, lose nothing.

use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use fuse_tests::make::SECTOR;
use fuse_tests::written::{self, alone, policy, readable};
use tempfile::tempdir;
use vmdkfuse::block::{BlockRead, Lba};
use vmdkfuse::error::{Error, ErrorKind, Result};
use vmdkfuse::store::{Access, Identity, Store, StoredFile, StoredWrite, open_user_path};
use vmdkfuse::vmdk::{self, OpenOptions, VmdkDisk};

use super::draw;
use super::hosted::{BASE, Hosted, flat_base};

/// A file of which some calls fail, in whole or after a part was done.
#[derive(Debug)]
struct Failing {
    file: Arc<dyn StoredFile>,
    random: Mutex<u64>,
    /// One of so many calls fails; 0: none.
    one_in: AtomicU64,
}

impl Failing {
    fn draw(&self) -> u64 {
        draw(&mut self.random.lock().unwrap())
    }
    fn fails(&self) -> bool {
        match self.one_in.load(Ordering::Relaxed) {
            0 => false,
            n => self.draw().is_multiple_of(n),
        }
    }
    fn error(&self) -> Error {
        Error::new(ErrorKind::Os(libc::ENOSPC), "full")
    }
    fn inner(&self) -> &dyn StoredWrite {
        self.file.writer().unwrap()
    }
}

impl StoredFile for Failing {
    fn len(&self) -> u64 {
        self.file.len()
    }
    fn writer(&self) -> Option<&dyn StoredWrite> {
        Some(self)
    }
    fn read_exact_at(&self, offset: u64, buf: &mut [u8]) -> Result<()> {
        self.file.read_exact_at(offset, buf)
    }
    fn identity(&self) -> Result<Identity> {
        self.file.identity()
    }
    fn identity_at_open(&self) -> Identity {
        self.file.identity_at_open()
    }
    fn shows_changes(&self) -> bool {
        true
    }
    fn allocated(&self) -> Result<u64> {
        self.file.allocated()
    }
    fn data_at(&self, offset: u64) -> Result<(bool, u64)> {
        self.file.data_at(offset)
    }
    fn label(&self) -> &str {
        self.file.label()
    }
    fn siblings(&self) -> Result<Arc<dyn Store>> {
        self.file.siblings()
    }
}

impl StoredWrite for Failing {
    fn write_all_at(&self, offset: u64, buf: &[u8]) -> Result<()> {
        if self.fails() {
            let part = (self.draw() % (buf.len() as u64 + 1)) as usize / 512 * 512;
            self.inner().write_all_at(offset, &buf[..part])?;
            return Err(self.error());
        }
        self.inner().write_all_at(offset, buf)
    }
    fn len_now(&self) -> Result<u64> {
        self.inner().len_now()
    }
    fn set_len(&self, len: u64) -> Result<()> {
        if self.fails() { Err(self.error()) } else { self.inner().set_len(len) }
    }
    fn zero(&self, offset: u64, len: u64, unmap: bool) -> Result<()> {
        if self.fails() { Err(self.error()) } else { self.inner().zero(offset, len, unmap) }
    }
    fn sync(&self) -> Result<()> {
        Ok(())
    }
}

/// Small tables over a parent with data in every other grain.
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
    let small = Hosted { capacity, grain: 8, entries: 128, redundant, overhead: 33, ..Hosted::default() };
    Hosted { unclean: false, zeroed, ..small }.make_child(&child, 33);
    (child, capacity)
}

/// Writes or makes zeroes by chance; whether it failed. Then each sector is old or new, and `model` is told which.
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
    let seen = written::read(disk, at, sectors);
    for ((new, old), now) in data.chunks(512).zip(model[bytes.clone()].chunks(512)).zip(seen.chunks(512)) {
        assert!(now == new || (done.is_err() && now == old), "step {step}: {done:?}");
    }
    model[bytes].copy_from_slice(&seen);
    done.is_err()
}

/// Goes on for a while on a file of which some calls fail, and ends well.
fn write_while_it_fails(child: &Path, model: &mut [u8], seed: u64, close: bool) {
    let file = open_user_path(child, policy(&[]), Access::Write).unwrap();
    let file = Arc::new(Failing { file, random: Mutex::new(seed), one_in: 0.into() });
    let disk = VmdkDisk::open_writable(Arc::clone(&file) as _, OpenOptions::default()).unwrap();
    let writer = disk.writer().unwrap();
    let mut failed = 0;
    for number in 0..300u64 {
        file.one_in.store([0, 3, 12, 60][(number / 50 % 4) as usize], Ordering::Relaxed);
        failed += u64::from(step(&disk, model, file.draw(), number));
        if number % 37 == 0 {
            failed += u64::from(writer.flush().is_err());
        }
        if number % 111 == 0 {
            failed += u64::from(writer.close().is_err());
        }
    }
    assert!(failed > 5);
    file.one_in.store(0, Ordering::Relaxed);
    if close {
        writer.close().unwrap();
    } else {
        writer.flush().unwrap();
    }
}

#[test]
fn what_fails_now_and_then_loses_nothing() {
    let _alone = alone();
    for seed in 1..=6u64 {
        let dir = tempdir().unwrap();
        let (child, capacity) = small_chain(dir.path(), seed % 2 == 0, seed % 3 != 0);
        let mut model = written::read(&readable(&child), 0, capacity);
        for round in 0..3 {
            println!("seed {seed}, round {round}");
            write_while_it_fails(&child, &mut model, seed * 1000 + round + 7, round == 1);
            let disk = readable(&child);
            let report = vmdk::check(&disk);
            assert_eq!(report.errors, Vec::<String>::new(), "seed {seed}");
            let seen = written::read(&disk, 0, capacity);
            let first = seen.chunks(512).zip(model.chunks(512)).position(|(a, b)| a != b);
            assert_eq!(first, None, "seed {seed}, round {round}");
        }
    }
}
