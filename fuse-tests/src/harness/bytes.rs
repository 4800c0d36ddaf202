//! What is compared: whole files, random ranges, data and holes.

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

/// Bytes that are compared at once.
const CHUNK: usize = 1 << 20;

/// Block of a grain digest.
const DIGEST_BLOCK: u64 = 65536;

/// The SHA-256 of a whole file, read by coreutils.
#[track_caller]
pub fn sha256(path: &Path) -> String {
    let outcome = Cmd::new("sha256sum")
        .arg("-b")
        .arg("--")
        .arg(path)
        .deadline(Duration::from_secs(180))
        .run()
        .ok();
    // A name with a backslash is escaped, and the line then starts with one.
    outcome
        .stdout
        .trim_start_matches('\\')
        .split(' ')
        .next()
        .unwrap_or_default()
        .to_owned()
}

/// The SHA-256 of some bytes.
pub fn digest(bytes: &[u8]) -> String {
    Sha256::digest(bytes).iter().map(|byte| format!("{byte:02x}")).collect()
}

/// The SHA-256 of one range of a file.
#[track_caller]
pub fn digest_range(path: &Path, offset: u64, len: u64) -> String {
    digest(&read_range(path, offset, usize::try_from(len).expect("a length")))
}

/// SHA-256 over number (64 bits, little endian) and bytes of every 64 KiB block that is not all zero.
///
/// Only what the file calls data is read, so that a disk of many GiB takes a moment.
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

/// One range of a file, all of it.
#[track_caller]
pub fn read_range(path: &Path, offset: u64, len: usize) -> Vec<u8> {
    let mut buf = vec![0; len];
    read_exact(&open(path), path, offset, &mut buf);
    buf
}

/// Panics at the first byte in which two files differ, or if one is longer.
#[track_caller]
pub fn assert_same(seen: &Path, wanted: &Path) {
    let (a, b) = (open(seen), open(wanted));
    let len = length(&a);
    assert_eq!(len, length(&b), "sizes of {} and {}", seen.display(), wanted.display());
    let (mut x, mut y) = (vec![0; CHUNK], vec![0; CHUNK]);
    for offset in (0..len).step_by(CHUNK) {
        let n = CHUNK.min(usize::try_from(len - offset).unwrap_or(CHUNK));
        read_exact(&a, seen, offset, &mut x[..n]);
        read_exact(&b, wanted, offset, &mut y[..n]);
        assert_equal(seen, offset, &x[..n], &y[..n]);
    }
}

/// Compares `count` ranges of odd offsets and lengths, the ends of the file among them.
#[track_caller]
pub fn assert_same_at_random(seen: &Path, wanted: &Path, seed: u64, count: usize) {
    let (a, b) = (open(seen), open(wanted));
    let len = length(&b);
    let mut rng = SmallRng::seed_from_u64(seed);
    let (mut x, mut y) = (vec![0; 1 << 18], vec![0; 1 << 18]);
    for round in 0..count {
        // Small and large ones alike; every eighth ends at the end of the file, or runs past it.
        let limit = 1usize << rng.random_range(1..=18);
        let want = rng.random_range(1..=limit);
        let start = if round % 8 == 0 {
            len.saturating_sub(want as u64 / 2)
        } else {
            rng.random_range(0..len.max(1))
        };
        let seen_len = read_some(&a, seen, start, &mut x[..want]);
        let wanted_len = read_some(&b, wanted, start, &mut y[..want]);
        assert_eq!(
            seen_len,
            wanted_len,
            "bytes read from {} at {start} (of {want})",
            seen.display()
        );
        assert_equal(seen, start, &x[..seen_len], &y[..wanted_len]);
    }
}

/// The ranges that `SEEK_DATA` and `SEEK_HOLE` call data, joined where they touch.
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

/// A buffer whose start is aligned to a page, as `O_DIRECT` wants it.
#[derive(Debug)]
pub struct Aligned {
    bytes: Vec<u8>,
    skip: usize,
    len: usize,
}

impl Aligned {
    /// Zeroes.
    pub fn new(len: usize) -> Self {
        let bytes = vec![0; len + 4096];
        let skip = bytes.as_ptr().align_offset(4096);
        Self { bytes, skip, len }
    }

    /// The bytes.
    pub fn bytes(&mut self) -> &mut [u8] {
        &mut self.bytes[self.skip..self.skip + self.len]
    }
}

/// The whole file through a mapping of it.
#[allow(unsafe_code, reason = "mapping a file is what is tested")]
#[track_caller]
pub fn map_bytes(path: &Path) -> Vec<u8> {
    let file = open(path);
    let len = NonZeroUsize::new(usize::try_from(length(&file)).expect("a size")).expect("a file with something in it");
    // SAFETY: a new private mapping at an address of the kernel's choice, read once while the file (whose size is
    // fixed) is open and mounted, and given back before anybody can see its address.
    unsafe {
        let at = mmap(None, len, ProtFlags::PROT_READ, MapFlags::MAP_PRIVATE, &file, 0).expect("mmap");
        let bytes = std::slice::from_raw_parts(at.cast::<u8>().as_ptr(), len.get()).to_vec();
        munmap(at, len.get()).expect("munmap");
        bytes
    }
}

/// A whole file through a shared mapping of it, to read and to write; unmapped when it is dropped.
#[derive(Debug)]
pub struct Mapped {
    at: NonNull<c_void>,
    len: usize,
}

#[allow(unsafe_code, reason = "mapping a file is what is tested")]
impl Mapped {
    /// Maps a file that is open for both, and whose size is fixed.
    #[track_caller]
    pub fn new(file: &File) -> Self {
        let len =
            NonZeroUsize::new(usize::try_from(length(file)).expect("a size")).expect("a file with something in it");
        let both = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
        // SAFETY: a new mapping at an address of the kernel's choice; nobody knows it but this value.
        let at = unsafe { mmap(None, len, both, MapFlags::MAP_SHARED, file, 0) }.expect("mmap");
        Self { at, len: len.get() }
    }

    /// The bytes of the file.
    pub fn bytes(&mut self) -> &mut [u8] {
        // SAFETY: the mapping is that long and lasts as long as this value; that others may write to the file at the
        // same time is the tests' to exclude.
        unsafe { std::slice::from_raw_parts_mut(self.at.cast::<u8>().as_ptr(), self.len) }
    }

    /// Waits until what was written is durable.
    pub fn sync(&self) -> nix::Result<()> {
        // SAFETY: the range is the mapping itself.
        unsafe { msync(self.at, self.len, MsFlags::MS_SYNC) }
    }
}

impl Drop for Mapped {
    #[allow(unsafe_code, reason = "mapping a file is what is tested")]
    fn drop(&mut self) {
        // SAFETY: nobody has a reference into the mapping any more: each borrows this value.
        unsafe { munmap(self.at, self.len) }.ok();
    }
}

/// Opens for reading, or panics with the path.
#[track_caller]
fn open(path: &Path) -> File {
    File::open(path).unwrap_or_else(|e| panic!("{}: {e}", path.display()))
}

/// Its length.
#[track_caller]
fn length(file: &File) -> u64 {
    file.metadata().expect("its size").len()
}

/// Fills `buf` or panics.
#[track_caller]
fn read_exact(file: &File, path: &Path, offset: u64, buf: &mut [u8]) {
    let len = buf.len();
    file.read_exact_at(buf, offset)
        .unwrap_or_else(|e| panic!("{}: {len} bytes at {offset}: {e}", path.display()));
}

/// As much as there is.
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

/// Panics at the first byte that differs.
#[track_caller]
fn assert_equal(path: &Path, offset: u64, seen: &[u8], wanted: &[u8]) {
    if seen != wanted {
        let at = seen.iter().zip(wanted).position(|(a, b)| a != b).unwrap_or(0);
        let (a, b) = (seen[at], wanted[at]);
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

    /// 300 KiB of which the second 100 KiB are a hole, where the file system has holes.
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
    fn a_grain_digest_leaves_out_zeroes() {
        let file = tempfile::NamedTempFile::new().unwrap();
        file.as_file().set_len(3 * DIGEST_BLOCK).unwrap();
        file.as_file().write_all_at(&[9], 2 * DIGEST_BLOCK + 5).unwrap();
        let mut wanted = 2u64.to_le_bytes().to_vec();
        wanted.resize(8 + DIGEST_BLOCK as usize, 0);
        wanted[8 + 5] = 9;
        assert_eq!(digest_grains(file.path()), digest(&wanted));
    }

    #[test]
    #[should_panic(expected = "is wrong at byte 250000: 0x02, not 0x03")]
    fn one_wrong_byte_is_found() {
        let (seen, wanted) = (file(), file());
        wanted.as_file().write_all_at(&[3], 250_000).unwrap();
        assert_same(seen.path(), wanted.path());
    }

    #[test]
    #[should_panic(expected = "bytes read from")]
    fn a_file_that_ends_too_early_is_found_at_random() {
        let (seen, wanted) = (file(), file());
        seen.as_file().set_len((300 << 10) - 1).unwrap();
        assert_same_at_random(seen.path(), wanted.path(), 1, 100);
    }

    #[test]
    fn aligned_memory_is_aligned() {
        let mut buf = Aligned::new(5000);
        assert_eq!((buf.bytes().len(), buf.bytes().as_ptr().align_offset(4096)), (5000, 0));
    }
}
