//! Raw originals, images made of them by qemu-img, and deliberate damage to the tables of an image.

use std::ffi::OsStr;
use std::fs::{self, File};
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::time::Duration;

use rand::rngs::SmallRng;
use rand::{Rng, RngCore, SeedableRng};

use super::cmd::{Cmd, Outcome};

/// Runs qemu-img; panics unless it succeeds.
#[track_caller]
pub fn qemu_img(args: impl IntoIterator<Item = impl AsRef<OsStr>>) -> Outcome {
    Cmd::new("qemu-img")
        .args(args)
        .deadline(Duration::from_secs(120))
        .run()
        .ok()
}

/// Creates a raw file of `len` bytes with islands of random and compressible data; the rest is a hole.
#[track_caller]
pub fn raw_with_islands(path: &Path, len: u64, seed: u64) {
    File::create(path)
        .and_then(|file| file.set_len(len))
        .expect("a raw file");
    fill_islands(path, seed);
}

/// Writes about one island for each MiB into a file, at unaligned offsets and of up to 200 KB each.
///
/// The first island is at the start of the file and the second at its end. Every fourth island compresses well (one
/// repeated letter); the others are random bytes.
#[track_caller]
pub fn fill_islands(path: &Path, seed: u64) {
    let file = File::options().write(true).open(path).expect("opening the raw file");
    let len = file.metadata().expect("its size").len();
    let mut rng = SmallRng::seed_from_u64(seed);
    let mut noise = vec![0; 200_000];
    for island in 0..len / (1 << 20) + 2 {
        let size = rng
            .random_range(1..=noise.len())
            .min(usize::try_from(len).unwrap_or(usize::MAX));
        let start = match island {
            0 => 0,
            1 => len - size as u64,
            _ => rng.random_range(0..=len - size as u64),
        };
        let bytes = &mut noise[..size];
        match island % 4 {
            3 => bytes.fill(b'a' + (island % 26) as u8),
            _ => rng.fill_bytes(bytes),
        }
        file.write_all_at(bytes, start).expect("writing an island");
    }
}

/// Returns the ranges that `qemu-img map` reports as data, in bytes; adjacent ranges are merged.
#[track_caller]
pub fn qemu_data_ranges(path: &Path, format: &str) -> Vec<Range<u64>> {
    let args = [
        OsStr::new("map"),
        OsStr::new("--output=json"),
        OsStr::new("-f"),
        OsStr::new(format),
        path.as_os_str(),
    ];
    let map = qemu_img(args).json();
    let mut ranges: Vec<Range<u64>> = Vec::new();
    for entry in map.as_array().expect("an array") {
        if entry["data"] != true {
            continue;
        }
        let start = entry["start"].as_u64().expect("a start");
        let end = start + entry["length"].as_u64().expect("a length");
        match ranges.last_mut() {
            Some(last) if last.end == start => last.end = end,
            _ => ranges.push(start..end),
        }
    }
    ranges
}

/// The bytes of a monolithic sparse file, for reading and damaging its grain tables.
///
/// All fields are little endian; offsets in the file are in sectors of 512 bytes.
#[derive(Debug)]
pub struct Hosted {
    bytes: Vec<u8>,
}

impl Hosted {
    /// Reads a file that qemu-img created; panics if it is not a hosted sparse extent.
    #[track_caller]
    pub fn read(path: &Path) -> Self {
        let bytes = fs::read(path).expect("the image");
        assert_eq!(&bytes[..4], b"KDMV", "{} is no hosted sparse file", path.display());
        Self { bytes }
    }

    /// Replaces the entry of grain `number` in the grain table and its redundant copy; returns the old entry.
    pub fn set_entry(&mut self, number: usize, value: u32) -> u32 {
        // The header names the redundant directory (rgdOffset, byte 48) and the directory (gdOffset, byte 56). Each
        // directory entry names a grain table of 512 entries.
        let offsets = [48, 56].map(|field| {
            let directory = self.u64_at(field) as usize * 512;
            self.u32_at(directory + number / 512 * 4) as usize * 512 + number % 512 * 4
        });
        let old = self.u32_at(offsets[1]);
        for offset in offsets {
            self.bytes[offset..offset + 4].copy_from_slice(&value.to_le_bytes());
        }
        old
    }

    /// Returns the number of the first stored grain; panics if the first grain table has none.
    pub fn first_stored(&self) -> usize {
        let directory = self.u64_at(56) as usize * 512;
        let table = self.u32_at(directory) as usize * 512;
        // Entry 0 is an unallocated grain, entry 1 a zeroed one; any larger value is the sector of a stored grain.
        (0..512)
            .find(|number| self.u32_at(table + number * 4) > 1)
            .expect("a stored grain")
    }

    /// Writes the bytes to a file.
    #[track_caller]
    pub fn write(&self, path: &Path) {
        fs::write(path, &self.bytes).expect("the damaged image");
    }

    /// Returns the 64-bit field at byte `at`.
    fn u64_at(&self, at: usize) -> u64 {
        u64::from_le_bytes(self.bytes[at..at + 8].try_into().expect("eight bytes"))
    }

    /// Returns the 32-bit field at byte `at`.
    fn u32_at(&self, at: usize) -> u32 {
        u32::from_le_bytes(self.bytes[at..at + 4].try_into().expect("four bytes"))
    }
}
