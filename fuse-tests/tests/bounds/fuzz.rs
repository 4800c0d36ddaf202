//! Fuzzing on a stable toolchain: runs the entry points of the fuzzers on every small generated variant and on random
//! mutations of the variants.
//!
//! `VMDKFUSE_FUZZ_CASES` sets the number of mutations for each target, `VMDKFUSE_FUZZ_SECONDS` ends a target early, and
//! `VMDKFUSE_FUZZ_SEED` selects other mutations. An input that fails is written to a file, whose path is printed.

use std::fs;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use fuse_tests::fuzz;
use fuse_tests::harness::peak_memory;
use fuse_tests::make::model::Random;
use fuse_tests::make::write::{self, Descriptor, Hosted, Stream, se_entry};
use fuse_tests::make::{Layer, hostile, valid};

/// Default number of mutations for each target.
const CASES: usize = 4000;
/// Largest seed in bytes; larger files are not used, and mutations are truncated to it.
const SEED_MAX: u64 = 1 << 20;
/// Time after which an input counts as a hang; generous for a slow machine and a debug build.
const HANG: Duration = Duration::from_secs(60);
/// Limit on the peak memory of the process in bytes, the seeds included.
const MEMORY_MAX: u64 = 256 << 20;
/// Integers at the limits of fields and of checked arithmetic.
const BOUNDARY_VALUES: [u64; 22] = [
    0,
    1,
    2,
    7,
    8,
    127,
    128,
    512,
    4095,
    4096,
    65536,
    1 << 25,
    0x7fff_ffff,
    0x8000_0000,
    0xffff_fffe,
    0xffff_ffff,
    1 << 32,
    (1 << 54) - 1,
    1 << 54,
    1 << 60,
    i64::MAX as u64,
    u64::MAX,
];

/// Entry point of a fuzzer.
type Target = fn(&[u8]);

#[test]
fn descriptors_never_panic_nor_hang() -> Result<()> {
    run("descriptor", fuzz::descriptor, |data| {
        data.len() <= 64 << 10 && looks_like_text(data)
    })
}

#[test]
fn headers_never_panic_nor_hang() -> Result<()> {
    run("header", fuzz::header, |data| !looks_like_text(data))
}

#[test]
fn images_never_panic_nor_hang() -> Result<()> {
    run("image", fuzz::image, |_| true)
}

/// Runs `target` on all seeds that `fits` accepts, then on mutations of them.
fn run(name: &str, target: Target, fits: fn(&[u8]) -> bool) -> Result<()> {
    let seeds: Vec<Vec<u8>> = seeds()?.into_iter().filter(|data| fits(data)).collect();
    ensure!(!seeds.is_empty(), "no seeds for {name}");
    let mut slowest = Duration::ZERO;
    let mut run_one = |data: &[u8]| -> Result<()> {
        let start = Instant::now();
        let outcome = catch_unwind(AssertUnwindSafe(|| target(data)));
        let elapsed = start.elapsed();
        slowest = slowest.max(elapsed);
        if outcome.is_err() || elapsed > HANG {
            let path = keep(name, data)?;
            anyhow::bail!("{name} panicked or hung ({elapsed:?}); the input is {path}");
        }
        Ok(())
    };
    for seed in &seeds {
        run_one(seed)?;
    }
    let variable = |key: &str| std::env::var(key).ok().map(|v| v.parse::<u64>().context(v)).transpose();
    let cases = variable("VMDKFUSE_FUZZ_CASES")?.unwrap_or(CASES as u64);
    let limit = variable("VMDKFUSE_FUZZ_SECONDS")?.map_or(Duration::MAX, Duration::from_secs);
    let mut random = Random::new(variable("VMDKFUSE_FUZZ_SEED")?.unwrap_or(1));
    let start = Instant::now();
    let mut done = 0;
    while done < cases && start.elapsed() < limit {
        run_one(&mutate(&seeds, &mut random))?;
        done += 1;
    }
    let peak = peak_memory(std::process::id() as i32);
    println!(
        "{name}: {} seeds, {done} mutations, slowest {slowest:?}, peak {} MiB",
        seeds.len(),
        peak >> 20
    );
    ensure!(peak <= MEMORY_MAX, "{name}: the process used {} MiB", peak >> 20);
    Ok(())
}

/// Writes a failed input to a file that is not removed; returns its path.
fn keep(name: &str, data: &[u8]) -> Result<String> {
    let (_, path) = tempfile::Builder::new()
        .prefix(&format!("vmdkfuse-fuzz-{name}-"))
        .tempfile()?
        .keep()?;
    fs::write(&path, data)?;
    Ok(path.display().to_string())
}

/// Returns true if the first 64 bytes are ASCII text.
fn looks_like_text(data: &[u8]) -> bool {
    !data.is_empty()
        && data
            .iter()
            .take(64)
            .all(|b| b.is_ascii_graphic() || b.is_ascii_whitespace())
}

/// Returns all small generated files, and hand-made ones that are smaller still.
///
/// The seeds and their order are the same in every run, so that `VMDKFUSE_FUZZ_SEED` determines the mutations.
fn seeds() -> Result<Vec<Vec<u8>>> {
    let dir = tempfile::tempdir()?;
    for variant in valid() {
        variant.make(dir.path(), 1)?;
    }
    for variant in hostile() {
        variant.make(dir.path(), 1)?;
    }
    let mut seeds = Vec::new();
    collect(dir.path(), &mut seeds)?;
    seeds.extend(small(&dir.path().join("small"))?);
    Ok(seeds)
}

/// Appends the files below `folder` that are small enough and not redundant, in the order of their names.
fn collect(folder: &Path, seeds: &mut Vec<Vec<u8>>) -> Result<()> {
    let mut entries = fs::read_dir(folder)?.collect::<std::io::Result<Vec<_>>>()?;
    entries.sort_by_key(fs::DirEntry::file_name);
    for entry in entries {
        let file_type = entry.file_type()?;
        if file_type.is_dir() {
            collect(&entry.path(), seeds)?;
        } else if file_type.is_file() && entry.metadata()?.len() <= SEED_MAX && !is_redundant(&entry.path()) {
            seeds.push(fs::read(entry.path())?);
        }
    }
    Ok(())
}

/// Returns true for the links of long chains and for raw data: they are all alike, and useless as seeds.
fn is_redundant(path: &Path) -> bool {
    let text = path.to_string_lossy();
    text.contains("parent_deep") || text.contains("-flat") || text.contains("-f0")
}

/// Creates images of a few KiB, in which a mutation is more likely to hit metadata.
fn small(dir: &Path) -> Result<Vec<Vec<u8>>> {
    fs::create_dir(dir)?;
    let path = dir.join("file");
    let mut all = Vec::new();
    let mut take = |path: &Path| -> Result<()> {
        all.push(fs::read(path)?);
        Ok(())
    };
    for (grain, ngte) in [(1, 128), (8, 512), (16, 128)] {
        let layer = Layer::new(1, "small", 8000, grain).fill([0, 1, 5]);
        let text = Descriptor::new("monolithicSparse", ["RW 8000 SPARSE \"disk.vmdk\""]).bytes()?;
        for base in [
            Hosted {
                ngte,
                ..Hosted::zeroed()
            },
            Hosted { ngte, ..Hosted::lazy() },
        ] {
            write::hosted(&path, &layer.clone().zero([7]), Some(&text), &base)?;
            take(&path)?;
        }
        for footer in [true, false] {
            let options = Stream {
                footer,
                ngte,
                desc_len: 2,
                ..Stream::default()
            };
            write::stream(&path, &layer, &text, &options)?;
            take(&path)?;
        }
        write::cowd(&path, &layer)?;
        take(&path)?;
    }
    all.push(sesparse());
    Ok(all)
}

/// Returns a seSparse file without the wide gaps that ESXi leaves: two headers, directory, one table, two grains.
fn sesparse() -> Vec<u8> {
    const DIRECTORY: u64 = 2;
    const TABLE: u64 = 3;
    const GRAINS: u64 = TABLE + 64;
    let mut file = vec![0; (GRAINS as usize + 16) * 512];
    let mut put = |at: u64, values: &[u64]| {
        for (value, at) in values.iter().zip((at as usize..).step_by(8)) {
            file[at..at + 8].copy_from_slice(&value.to_le_bytes());
        }
    };
    // The constant header: magic number, version, capacity, grain size and table size, then the offset and the length
    // of each region, in sectors.
    put(
        0,
        &[
            0xcafe_babe,
            0x2_0000_0001,
            8000,
            8,
            64,
            0,
            0,
            0,
            0,
            0,
            1,
            1,
            2,
            0,
            2,
            0,
            DIRECTORY,
            1,
            TABLE,
            64,
        ],
    );
    put(160, &[GRAINS, 0, GRAINS, 0, GRAINS, 8000]);
    put(512, &[0xcafe_cafe, 1, 1, 0]);
    put(DIRECTORY * 512, &[1 << 60]);
    put(
        TABLE * 512,
        &[se_entry(3, 0), se_entry(2, 0), se_entry(1, 5), 0, se_entry(3, 1)],
    );
    put(GRAINS * 512, &[7; 1024]);
    file
}

/// Returns a random seed with one to five random changes.
fn mutate(seeds: &[Vec<u8>], random: &mut Random) -> Vec<u8> {
    let pick = |random: &mut Random| &seeds[random.below(seeds.len() as u64) as usize];
    let mut data = pick(random).clone();
    for _ in 0..=random.below(4) {
        match random.below(10) {
            0 => {
                let keep = random.below(data.len() as u64 + 1);
                data.truncate(keep as usize);
            }
            1 => {
                let other = pick(random);
                let at = random_index(data.len(), random);
                data.truncate(at);
                data.extend_from_slice(&other[at.min(other.len())..]);
            }
            _ if data.is_empty() => data.push(0),
            2 => {
                let at = random_index(data.len(), random);
                data[at] ^= 1 << random.below(8);
            }
            3 => {
                let at = random_index(data.len(), random);
                data[at] = [0, 1, 0x7f, 0x80, 0xff, b'"', b'\n', b'\\', b' ', b'9'][random.below(10) as usize];
            }
            4 => repeat_entry(&mut data, random),
            _ => overwrite_integer(&mut data, random),
        }
    }
    data.truncate(SEED_MAX as usize);
    data
}

/// Returns the index of a byte to change: half of the time in the first 80 bytes (the header), else anywhere.
fn random_index(len: usize, random: &mut Random) -> usize {
    let limit = if random.below(2) == 0 { len.min(80) } else { len };
    random.below(limit.max(1) as u64) as usize
}

/// Overwrites an integer with a boundary value, a small value, or a neighbour of the old value.
///
/// A third of the integers are the first ones of a sector, where the tables begin.
fn overwrite_integer(data: &mut [u8], random: &mut Random) {
    let width = if random.below(2) == 0 { 4 } else { 8 };
    let at = match random.below(3) {
        0 => random.below(28) as usize * 4,
        1 => random.below(data.len() as u64 / 512 + 1) as usize * 512 + random.below(8) as usize * 4,
        _ => random_index(data.len(), random),
    };
    let Some(old) = data.get_mut(at..at + width) else {
        return;
    };
    let mut word = [0; 8];
    word[..width].copy_from_slice(old);
    let new = match random.below(4) {
        0 => u64::from_le_bytes(word).wrapping_add(1),
        1 => u64::from_le_bytes(word).wrapping_sub(1),
        2 => random.below(4096),
        _ => BOUNDARY_VALUES[random.below(BOUNDARY_VALUES.len() as u64) as usize],
    };
    old.copy_from_slice(&new.to_le_bytes()[..width]);
}

/// Repeats the first entry of a sector over the following bytes, so that many table entries name the same location.
fn repeat_entry(data: &mut [u8], random: &mut Random) {
    let start = random.below(data.len() as u64 / 512 + 1) as usize * 512;
    let Some(rest) = data.get_mut(start..).filter(|rest| rest.len() >= 8) else {
        return;
    };
    let width = if random.below(2) == 0 { 4 } else { 8 };
    let mut entry = [0; 8];
    entry.copy_from_slice(&rest[..8]);
    let count = random.below(1 << 14) as usize * width;
    for to in rest.chunks_exact_mut(width).take(count / width) {
        to.copy_from_slice(&entry[..width]);
    }
}
