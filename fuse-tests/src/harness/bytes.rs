//! Comparison of files: whole files, random ranges, data and holes, digests, memory mappings.

use std::fs::File;
use std::num::NonZeroUsize;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::ptr::NonNull;
use std::time::Duration;

use nix::errno::Errno;
use nix::libc::c_void;
use nix::sys::mman::{MapFlags, MsFlags, ProtFlags, mmap, msync, munmap};
use nix::unistd::{Whence, lseek};
use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};
use sha2::{Digest, Sha256};

use super::cmd::Cmd;

/// Bytes that are read and compared at a time.
const CHUNK: usize = 1 << 20;

/// Bytes of a block of [`digest_grains`]: the usual grain size.
const DIGEST_BLOCK: u64 = 65536;

/// Returns the SHA-256 of a whole file in hexadecimal, computed by `sha256sum`.
#[track_caller]
pub fn sha256(path: &Path) -> String {
    let outcome = Cmd::new("sha256sum")
        .arg("-b")
        .arg("--")
        .arg(path)
        .deadline(Duration::from_secs(180))
        .run()
        .ok();
    // If the name contains a backslash, sha256sum escapes it and starts the line with a backslash.
    outcome
        .stdout
        .trim_start_matches('\\')
        .split(' ')
        .next()
        .unwrap_or_default()
        .to_owned()
}

/// Returns the SHA-256 of `bytes` in hexadecimal.
pub fn digest(bytes: &[u8]) -> String {
    Sha256::digest(bytes).iter().map(|byte| format!("{byte:02x}")).collect()
}

/// Returns the SHA-256 of `len` bytes of a file from byte `offset` on, in hexadecimal.
#[track_caller]
pub fn digest_range(path: &Path, offset: u64, len: u64) -> String {
    digest(&read_range(path, offset, usize::try_from(len).expect("a length")))
}

/// Returns the SHA-256 over number (64 bits, little endian) and bytes of every 64 KiB block that is not all zero.
///
/// Only ranges that `SEEK_DATA` reports as data are read, so that a sparse disk of many GiB is digested quickly.
#[track_caller]
pub fn digest_grains(path: &Path) -> String {
    let file = open(path);
    let zeroes = vec![0; DIGEST_BLOCK as usize];
    let mut block = zeroes.clone();
    let mut hash = Sha256::new();
    let mut next = 0;
    for range in data_ranges(path) {
        let first = (range.start / DIGEST_BLOCK).max(next);
        next = range.end.div_ceil(DIGEST_BLOCK);
        for number in first..next {
            read_exact(&file, path, number * DIGEST_BLOCK, &mut block);
            if block != zeroes {
                hash.update(number.to_le_bytes());
                hash.update(&block);
            }
        }
    }
    hash.finalize().iter().map(|byte| format!("{byte:02x}")).collect()
}

/// Reads `len` bytes of a file from byte `offset` on; panics if the file is shorter.
#[track_caller]
pub fn read_range(path: &Path, offset: u64, len: usize) -> Vec<u8> {
    let mut buf = vec![0; len];
    read_exact(&open(path), path, offset, &mut buf);
    buf
}

/// Panics at the first byte in which two files differ, or if their lengths differ.
#[track_caller]
pub fn assert_same(actual: &Path, expected: &Path) {
    let (a, b) = (open(actual), open(expected));
    let len = length(&a);
    assert_eq!(
        len,
        length(&b),
        "sizes of {} and {}",
        actual.display(),
        expected.display()
    );
    let (mut x, mut y) = (vec![0; CHUNK], vec![0; CHUNK]);
    for offset in (0..len).step_by(CHUNK) {
        let n = CHUNK.min(usize::try_from(len - offset).unwrap_or(CHUNK));
        read_exact(&a, actual, offset, &mut x[..n]);
        read_exact(&b, expected, offset, &mut y[..n]);
        assert_equal(actual, offset, &x[..n], &y[..n]);
    }
}

/// Compares `count` random, unaligned ranges of two files; panics at the first difference.
///
/// Every eighth range extends beyond the end of the file, so that short reads are compared as well.
#[track_caller]
pub fn assert_same_at_random(actual: &Path, expected: &Path, seed: u64, count: usize) {
    let (a, b) = (open(actual), open(expected));
    let len = length(&b);
    let mut rng = SmallRng::seed_from_u64(seed);
    let (mut x, mut y) = (vec![0; 1 << 18], vec![0; 1 << 18]);
    for round in 0..count {
        // The length is uniform in its logarithm, so that small and large ranges are equally frequent.
        let limit = 1usize << rng.random_range(1..=18);
        let requested = rng.random_range(1..=limit);
        let start = if round % 8 == 0 {
            len.saturating_sub(requested as u64 / 2)
        } else {
            rng.random_range(0..len.max(1))
        };
        let actual_len = read_some(&a, actual, start, &mut x[..requested]);
        let expected_len = read_some(&b, expected, start, &mut y[..requested]);
        assert_eq!(
            actual_len,
            expected_len,
            "bytes read from {} at {start} (of {requested})",
            actual.display()
        );
        assert_equal(actual, start, &x[..actual_len], &y[..expected_len]);
    }
}

/// Returns the ranges that `SEEK_DATA` and `SEEK_HOLE` report as data, in bytes and in ascending order.
#[track_caller]
pub fn data_ranges(path: &Path) -> Vec<Range<u64>> {
    let file = open(path);
    let len = length(&file);
    let seek = |at: u64, whence| lseek(&file, i64::try_from(at).expect("an offset"), whence);
    let mut found = Vec::new();
    let mut at = 0;
    while at < len {
        let start = match seek(at, Whence::SeekData) {
            Ok(start) => start as u64,
            Err(Errno::ENXIO) => break,
            Err(e) => panic!("{}: SEEK_DATA from {at}: {e}", path.display()),
        };
        let end =
            seek(start, Whence::SeekHole).unwrap_or_else(|e| panic!("{}: SEEK_HOLE from {start}: {e}", path.display()));
        let end = end as u64;
        assert!(
            start >= at && end > start && end <= len,
            "{}: data {start}..{end} from {at}",
            path.display()
        );
        found.push(start..end);
        at = end;
    }
    found
}

/// A buffer whose start is aligned to a page, as `O_DIRECT` requires.
#[derive(Debug)]
pub struct Aligned {
    bytes: Vec<u8>,
    skip: usize,
    len: usize,
}

impl Aligned {
    /// Creates a buffer of `len` zeroes.
    pub fn new(len: usize) -> Self {
        let bytes = vec![0; len + 4096];
        let skip = bytes.as_ptr().align_offset(4096);
        Self { bytes, skip, len }
    }

    /// Returns the bytes of the buffer.
    pub fn bytes(&mut self) -> &mut [u8] {
        &mut self.bytes[self.skip..self.skip + self.len]
    }
}

/// Returns the number of bytes of a file that the kernel has in its page cache after one more open of it.
#[track_caller]
#[allow(unsafe_code, reason = "the kernel tells this of a mapping alone")]
pub fn cached_bytes(path: &Path) -> u64 {
    const PAGE: usize = 4096;
    let file = open(path);
    let len = NonZeroUsize::new(usize::try_from(length(&file)).expect("a size")).expect("a file with something in it");
    let mut pages = vec![0u8; len.get().div_ceil(PAGE)];
    // SAFETY: a new private mapping at an address of the kernel's choice, whose bytes are never read, and which is unmapped
    // before the function returns. The vector has a byte for each of its pages.
    unsafe {
        let at = mmap(None, len, ProtFlags::PROT_READ, MapFlags::MAP_PRIVATE, &file, 0).expect("mmap");
        let known = nix::libc::mincore(at.as_ptr(), len.get(), pages.as_mut_ptr());
        munmap(at, len.get()).expect("munmap");
        assert_eq!(known, 0, "mincore: {}", Errno::last());
    }
    let cached = pages.iter().filter(|page| **page & 1 == 1).count() * PAGE;
    cached as u64
}

/// Reads the whole file through a private memory mapping.
#[allow(unsafe_code, reason = "mapping a file is what is tested")]
#[track_caller]
pub fn map_bytes(path: &Path) -> Vec<u8> {
    let file = open(path);
    let len = NonZeroUsize::new(usize::try_from(length(&file)).expect("a size")).expect("a file with something in it");
    // SAFETY: a new private mapping at an address of the kernel's choice, read once while the file (whose size is
    // fixed) is open and mounted, and unmapped before the function returns; no reference into it remains.
    unsafe {
        let at = mmap(None, len, ProtFlags::PROT_READ, MapFlags::MAP_PRIVATE, &file, 0).expect("mmap");
        let bytes = std::slice::from_raw_parts(at.cast::<u8>().as_ptr(), len.get()).to_vec();
        munmap(at, len.get()).expect("munmap");
        bytes
    }
}

/// Shared, writable memory mapping of a whole file; unmapped on drop.
#[derive(Debug)]
pub struct Mapped {
    at: NonNull<c_void>,
    len: usize,
}

#[allow(unsafe_code, reason = "mapping a file is what is tested")]
impl Mapped {
    /// Maps a file that is open for reading and writing and whose size is fixed.
    #[track_caller]
    pub fn new(file: &File) -> Self {
        let len =
            NonZeroUsize::new(usize::try_from(length(file)).expect("a size")).expect("a file with something in it");
        let both = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
        // SAFETY: a new mapping at an address of the kernel's choice; only this value knows the address.
        let at = unsafe { mmap(None, len, both, MapFlags::MAP_SHARED, file, 0) }.expect("mmap");
        Self { at, len: len.get() }
    }

    /// The bytes of the file.
    pub fn bytes(&mut self) -> &mut [u8] {
        // SAFETY: the mapping is `len` bytes long and lasts as long as this value, which the slice borrows. The tests
        // ensure that nothing else writes to the file while they hold the slice.
        unsafe { std::slice::from_raw_parts_mut(self.at.cast::<u8>().as_ptr(), self.len) }
    }

    /// Flushes the mapping with `msync(MS_SYNC)`; returns once all writes through it are durable.
    pub fn sync(&self) -> nix::Result<()> {
        // SAFETY: the range is the mapping itself.
        unsafe { msync(self.at, self.len, MsFlags::MS_SYNC) }
    }
}

impl Drop for Mapped {
    #[allow(unsafe_code, reason = "mapping a file is what is tested")]
    fn drop(&mut self) {
        // SAFETY: no reference into the mapping is left: each one borrows this value.
        unsafe { munmap(self.at, self.len) }.ok();
    }
}

/// Opens a file for reading; panics with its path if that fails.
#[track_caller]
fn open(path: &Path) -> File {
    File::open(path).unwrap_or_else(|e| panic!("{}: {e}", path.display()))
}

/// Returns the length of a file in bytes.
#[track_caller]
fn length(file: &File) -> u64 {
    file.metadata().expect("its size").len()
}

/// Fills `buf` from byte `offset` on; panics if the file is shorter.
#[track_caller]
fn read_exact(file: &File, path: &Path, offset: u64, buf: &mut [u8]) {
    let len = buf.len();
    file.read_exact_at(buf, offset)
        .unwrap_or_else(|e| panic!("{}: {len} bytes at {offset}: {e}", path.display()));
}

/// Reads from byte `offset` on until `buf` is full or the file ends; returns the number of bytes read.
#[track_caller]
fn read_some(file: &File, path: &Path, offset: u64, buf: &mut [u8]) -> usize {
    let mut got = 0;
    while got < buf.len() {
        match file.read_at(&mut buf[got..], offset + got as u64) {
            Ok(0) => break,
            Ok(n) => got += n,
            Err(e) => panic!("{}: {} bytes at {offset}: {e}", path.display(), buf.len()),
        }
    }
    got
}

/// Panics at the first byte that differs; `offset` is the position of both slices in the file.
#[track_caller]
fn assert_equal(path: &Path, offset: u64, actual: &[u8], expected: &[u8]) {
    if actual != expected {
        let at = actual.iter().zip(expected).position(|(a, b)| a != b).unwrap_or(0);
        let (a, b) = (actual[at], expected[at]);
        panic!(
            "{} is wrong at byte {}: {a:#04x}, not {b:#04x}",
            path.display(),
            offset + at as u64
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Creates a file of 300 KiB of which the middle 100 KiB are a hole, if the file system supports holes.
    fn file() -> tempfile::NamedTempFile {
        let file = tempfile::NamedTempFile::new().unwrap();
        file.as_file().set_len(300 << 10).unwrap();
        file.as_file().write_all_at(&[1; 100 << 10], 0).unwrap();
        file.as_file().write_all_at(&[2; 100 << 10], 200 << 10).unwrap();
        file
    }

    #[test]
    fn every_way_to_read_gives_the_same_bytes() {
        let file = file();
        let all = std::fs::read(file.path()).unwrap();
        assert!(map_bytes(file.path()) == all);
        assert_eq!(sha256(file.path()), digest(&all));
        assert_eq!(digest_range(file.path(), 7, 200_000), digest(&all[7..200_007]));
        let data: u64 = data_ranges(file.path())
            .iter()
            .map(|range| range.end - range.start)
            .sum();
        assert!((200 << 10..=300 << 10).contains(&data), "{data} bytes of data");
    }

    #[test]
    fn a_grain_digest_skips_zeroes() {
        let file = tempfile::NamedTempFile::new().unwrap();
        file.as_file().set_len(3 * DIGEST_BLOCK).unwrap();
        file.as_file().write_all_at(&[9], 2 * DIGEST_BLOCK + 5).unwrap();
        let mut expected = 2u64.to_le_bytes().to_vec();
        expected.resize(8 + DIGEST_BLOCK as usize, 0);
        expected[8 + 5] = 9;
        assert_eq!(digest_grains(file.path()), digest(&expected));
    }

    #[test]
    #[should_panic(expected = "is wrong at byte 250000: 0x02, not 0x03")]
    fn one_wrong_byte_is_found() {
        let (actual, expected) = (file(), file());
        expected.as_file().write_all_at(&[3], 250_000).unwrap();
        assert_same(actual.path(), expected.path());
    }

    #[test]
    #[should_panic(expected = "bytes read from")]
    fn a_file_that_ends_too_early_is_found_at_random() {
        let (actual, expected) = (file(), file());
        actual.as_file().set_len((300 << 10) - 1).unwrap();
        assert_same_at_random(actual.path(), expected.path(), 1, 100);
    }

    #[test]
    fn aligned_memory_is_aligned() {
        let mut buf = Aligned::new(5000);
        assert_eq!((buf.bytes().len(), buf.bytes().as_ptr().align_offset(4096)), (5000, 0));
    }
}
