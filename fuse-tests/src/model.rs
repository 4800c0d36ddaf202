//! Disks that a test writes to through the library: functions that open them, and a model of their expected content.
//!
//! ```text
//!   alone              runs one test of a test program at a time
//!   open, writable …   open a VMDK as the daemon does, with locks
//!   Model              the original content of a disk and the sectors written since; every reader is compared with it
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

/// Held by the test that runs alone.
static ALONE: Mutex<()> = Mutex::new(());

/// Blocks the other callers in this test program until the returned guard is dropped.
///
/// A child process inherits all open files of this process, and with them their locks, between fork and exec: a test
/// that checks locks must not run while another test starts a program. A test that measures the memory of this process
/// must not run while another test allocates.
pub fn alone() -> MutexGuard<'static, ()> {
    ALONE.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Returns a policy that takes image locks and lets names in an image lead into the folders `allow` as well as its own.
pub fn policy(allow: &[PathBuf]) -> Arc<OpenPolicy> {
    Arc::new(OpenPolicy::new(allow.to_vec(), true))
}

/// Opens the VMDK at `path` with [`policy`].
pub fn open(path: &Path, allow: &[PathBuf], access: Access, options: OpenOptions) -> Result<VmdkDisk> {
    let file = open_user_path(path, policy(allow), access)?;
    match access {
        Access::Read | Access::Peek => VmdkDisk::open(file, options),
        Access::Write => VmdkDisk::open_writable(file, options),
    }
}

/// Opens a VMDK for writing; fails if the format or a lock does not allow it.
pub fn writable(path: &Path) -> Result<VmdkDisk> {
    open(path, &[], Access::Write, OpenOptions::default())
}

/// Opens a VMDK for reading; panics if that fails.
#[track_caller]
pub fn readable(path: &Path) -> VmdkDisk {
    open(path, &[], Access::Read, OpenOptions::default()).unwrap()
}

/// Reads `sectors` sectors from sector `at` on; panics if that fails.
#[track_caller]
pub fn read(disk: &dyn BlockRead, at: u64, sectors: u64) -> Vec<u8> {
    // Not zeroes: a reader that skips a part of the buffer must not seem to have read zeroes.
    let mut actual = vec![0xee; (sectors * SECTOR) as usize];
    disk.read_at(Lba(at), &mut actual).unwrap();
    actual
}

/// Returns test data in which each sector differs from its neighbours and from the same sector of adjacent steps.
pub fn data(step: u64, sectors: u64) -> Vec<u8> {
    (0..sectors * SECTOR)
        .map(|i| (i / SECTOR * 7 + step * 13 + 1) as u8)
        .collect()
}

/// Expected content of a disk: its original content, overlaid with the sectors written since.
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
    /// Creates a model of a disk whose original content is `base(first sector, number of sectors)`.
    pub fn new(sectors: u64, base: impl Fn(u64, u64) -> Vec<u8> + 'static) -> Self {
        Self {
            base: Box::new(base),
            written: BTreeMap::new(),
            sectors,
        }
    }

    /// Creates a model of the raw file at `path`. A partial last sector is padded with zeroes.
    pub fn of_file(path: &Path) -> Self {
        let mut bytes = fs::read(path).unwrap();
        bytes.resize(bytes.len().next_multiple_of(SECTOR as usize), 0);
        let sectors = bytes.len() as u64 / SECTOR;
        Self::new(sectors, move |at, n| {
            bytes[(at * SECTOR) as usize..((at + n) * SECTOR) as usize].to_vec()
        })
    }

    /// Returns the size of the disk in sectors.
    pub fn sectors(&self) -> u64 {
        self.sectors
    }

    /// Returns the expected bytes of `sectors` sectors from sector `at` on.
    pub fn read(&self, at: u64, sectors: u64) -> Vec<u8> {
        let mut bytes = (self.base)(at, sectors);
        for (&sector, data) in self.written.range(at..at + sectors) {
            let from = ((sector - at) * SECTOR) as usize;
            bytes[from..from + SECTOR as usize].copy_from_slice(data);
        }
        bytes
    }

    /// Records a write of whole sectors from sector `at` on.
    pub fn write(&mut self, at: u64, bytes: &[u8]) {
        for (sector, data) in (at..).zip(bytes.chunks_exact(SECTOR as usize)) {
            self.written.insert(sector, data.try_into().unwrap());
        }
    }

    /// Writes the whole expected content to a file.
    pub fn save(&self, path: &Path) {
        fs::write(path, self.read(0, self.sectors)).unwrap();
    }

    /// Panics unless `disk` holds the expected bytes in every sector that was written and around it.
    #[track_caller]
    pub fn compare(&self, disk: &dyn BlockRead, what: &str) {
        for Range { start, end } in self.touched() {
            let (actual, expected) = (read(disk, start, end - start), self.read(start, end - start));
            let pairs = actual
                .chunks_exact(SECTOR as usize)
                .zip(expected.chunks_exact(SECTOR as usize));
            for (sector, (actual, expected)) in (start..end).zip(pairs) {
                assert!(actual == expected, "{what}: sector {sector}");
            }
        }
    }

    /// Returns the sectors that [`compare`](Self::compare) reads, as disjoint ranges in ascending order.
    fn touched(&self) -> Vec<Range<u64>> {
        // More than a grain of the usual size (128 sectors) on each side.
        const MARGIN: u64 = 140;
        let mut ranges: Vec<Range<u64>> = Vec::new();
        for sector in self.written.keys() {
            let (start, end) = (sector.saturating_sub(MARGIN), (sector + MARGIN).min(self.sectors));
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

    /// Creates a disk of 1000 sectors of which two were written, and its model.
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
    fn a_disk_with_the_written_data_passes() {
        let (_dir, path, model) = written();
        model.compare(open_read_only(&path, &[]).unwrap().disk().as_ref(), "a disk");
        assert_eq!(model.touched(), [160..440, 560..840]);
    }

    #[test]
    #[should_panic(expected = "a disk: sector 600")]
    fn a_wrong_byte_next_to_written_data_is_found() {
        let (_dir, path, model) = written();
        let mut bytes = fs::read(&path).unwrap();
        bytes[600 * SECTOR as usize + 511] ^= 1;
        fs::write(&path, bytes).unwrap();
        model.compare(open_read_only(&path, &[]).unwrap().disk().as_ref(), "a disk");
    }
}
