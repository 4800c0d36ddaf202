//! Disks that a test writes to by the library: how they are opened, and what they must hold.
//!
//! ```text
//!   alone              one test of a program at a time
//!   open, writable …   a VMDK as the engine opens it, with locks
//!   Model              what a disk held, and the sectors written since: what every reader is compared with
//! ```
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a failed step of a test is a panic that names it; this module is only ever part of tests"
)]

use std::collections::BTreeMap;
use std::fmt;
use std::fs;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use vmdkfuse::block::{BlockRead, Lba};
use vmdkfuse::error::Result;
use vmdkfuse::store::{Access, OpenPolicy, open_user_path};
use vmdkfuse::vmdk::{OpenOptions, VmdkDisk};

use crate::make::SECTOR;

static ALONE: Mutex<()> = Mutex::new(());

/// Keeps the other tests of this program that call it waiting for as long as the answer lives.
///
/// A program that one of them starts has, until it is executed, all open files of this process, and with them their
/// locks; and the memory that one takes can be told only while no other takes some.
pub fn alone() -> MutexGuard<'static, ()> {
    ALONE.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Locks, and lets names in an image lead into the folders `allow` besides its own.
pub fn policy(allow: &[PathBuf]) -> Arc<OpenPolicy> {
    Arc::new(OpenPolicy {
        allow: allow.to_vec(),
        lock: true,
    })
}

/// Opens the VMDK at `path` by [`policy`].
pub fn open(path: &Path, allow: &[PathBuf], access: Access, options: OpenOptions) -> Result<VmdkDisk> {
    let file = open_user_path(path, policy(allow), access)?;
    match access {
        Access::Read => VmdkDisk::open(file, options),
        Access::Write => VmdkDisk::open_writable(file, options),
    }
}

/// Opens a VMDK for writing, if its rules let it.
pub fn writable(path: &Path) -> Result<VmdkDisk> {
    open(path, &[], Access::Write, OpenOptions::default())
}

/// Opens a VMDK for reading.
#[track_caller]
pub fn readable(path: &Path) -> VmdkDisk {
    open(path, &[], Access::Read, OpenOptions::default()).unwrap()
}

/// What a disk shows.
#[track_caller]
pub fn read(disk: &dyn BlockRead, at: u64, sectors: u64) -> Vec<u8> {
    // not what a reader that leaves a part out would seem to have read
    let mut seen = vec![0xee; (sectors * SECTOR) as usize];
    disk.read_at(Lba(at), &mut seen).unwrap();
    seen
}

/// Sectors that differ from their neighbours, and from those of the steps before and after.
pub fn data(step: u64, sectors: u64) -> Vec<u8> {
    (0..sectors * SECTOR)
        .map(|i| (i / SECTOR * 7 + step * 13 + 1) as u8)
        .collect()
}

/// What a disk must hold: what it held, and sectors written since.
pub struct Model {
    base: Box<dyn Fn(u64, u64) -> Vec<u8>>,
    written: BTreeMap<u64, [u8; SECTOR as usize]>,
    sectors: u64,
}

impl fmt::Debug for Model {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let written = self.written.len();
        f.debug_struct("Model")
            .field("sectors", &self.sectors)
            .field("written", &written)
            .finish_non_exhaustive()
    }
}

impl Model {
    /// Over what `base` answers for a first sector and a number of sectors.
    pub fn new(sectors: u64, base: impl Fn(u64, u64) -> Vec<u8> + 'static) -> Self {
        Self {
            base: Box::new(base),
            written: BTreeMap::new(),
            sectors,
        }
    }

    /// Over the bytes of a file, of which the last sector may be a part.
    pub fn of_file(path: &Path) -> Self {
        let mut bytes = fs::read(path).unwrap();
        bytes.resize(bytes.len().next_multiple_of(SECTOR as usize), 0);
        let sectors = bytes.len() as u64 / SECTOR;
        Self::new(sectors, move |at, n| {
            bytes[(at * SECTOR) as usize..((at + n) * SECTOR) as usize].to_vec()
        })
    }

    /// Sectors of the disk.
    pub fn sectors(&self) -> u64 {
        self.sectors
    }

    /// What `sectors` hold from `at` on.
    pub fn read(&self, at: u64, sectors: u64) -> Vec<u8> {
        let mut bytes = (self.base)(at, sectors);
        for (&sector, data) in self.written.range(at..at + sectors) {
            let from = ((sector - at) * SECTOR) as usize;
            bytes[from..from + SECTOR as usize].copy_from_slice(data);
        }
        bytes
    }

    /// Notes whole sectors that were written from `at` on.
    pub fn write(&mut self, at: u64, bytes: &[u8]) {
        for (sector, data) in (at..).zip(bytes.chunks_exact(SECTOR as usize)) {
            self.written.insert(sector, data.try_into().unwrap());
        }
    }

    /// Writes all of it to a file.
    pub fn save(&self, path: &Path) {
        fs::write(path, self.read(0, self.sectors)).unwrap();
    }

    /// Panics unless `disk` shows every sector that was written and what lies around it.
    #[track_caller]
    pub fn compare(&self, disk: &dyn BlockRead, what: &str) {
        for Range { start, end } in self.touched() {
            let (seen, wanted) = (read(disk, start, end - start), self.read(start, end - start));
            let pairs = seen
                .chunks_exact(SECTOR as usize)
                .zip(wanted.chunks_exact(SECTOR as usize));
            for (sector, (seen, wanted)) in (start..end).zip(pairs) {
                assert!(seen == wanted, "{what}: sector {sector}");
            }
        }
    }

    /// What [`compare`](Self::compare) looks at, as ranges that lie apart.
    fn touched(&self) -> Vec<Range<u64>> {
        // more than a grain of the usual size before and behind
        const AROUND: u64 = 140;
        let mut ranges: Vec<Range<u64>> = Vec::new();
        for sector in self.written.keys() {
            let (start, end) = (sector.saturating_sub(AROUND), (sector + AROUND).min(self.sectors));
            match ranges.last_mut() {
                Some(last) if start <= last.end => last.end = end,
                _ => ranges.push(start..end),
            }
        }
        ranges
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::harness::open_read_only;

    /// A disk of 1000 sectors, and what it holds once two of them were written.
    fn written() -> (tempfile::TempDir, PathBuf, Model) {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("disk.img");
        fs::write(&path, data(1, 1000)).unwrap();
        let mut model = Model::of_file(&path);
        model.write(300, &data(2, 1));
        model.write(700, &data(3, 1));
        model.save(&path);
        (dir, path, model)
    }

    #[test]
    fn a_disk_that_holds_what_was_written_is_the_same() {
        let (_dir, path, model) = written();
        model.compare(open_read_only(&path, &[]).unwrap().disk().as_ref(), "a disk");
        assert_eq!(model.touched(), [160..440, 560..840]);
    }

    #[test]
    #[should_panic(expected = "a disk: sector 600")]
    fn a_wrong_byte_beside_what_was_written_is_found() {
        let (_dir, path, model) = written();
        let mut bytes = fs::read(&path).unwrap();
        bytes[600 * SECTOR as usize + 511] ^= 1;
        fs::write(&path, bytes).unwrap();
        model.compare(open_read_only(&path, &[]).unwrap().disk().as_ref(), "a disk");
    }
}
