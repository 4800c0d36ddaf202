//! Reads the image by the format's description alone, and compares it with the runs that it was built from.

use proptest::prelude::*;

use super::*;
use crate::error::ErrorKind;

/// A plain reader of the one file of an image: returns the location of each byte. It follows the description of the
/// format and shares no code with the writer.
struct Reader {
    image: Vec<u8>,
    /// Offset of the file's inode.
    file: usize,
    /// Bytes of a chunk.
    chunk: u64,
}

impl Reader {
    fn of(index: Index) -> Self {
        let mut image = vec![0xee; index.bytes() as usize];
        index
            .drain(|at, part| {
                image[at as usize..at as usize + part.len()].copy_from_slice(part);
                Ok(())
            })
            .unwrap();
        let mut reader = Self {
            image,
            file: 0,
            chunk: 0,
        };
        reader.file = reader.find();
        let target = reader.number(reader.file + 16, 4);
        assert_eq!(target & !0x3f, 0, "no further format bits");
        assert_ne!(target & 0x20, 0, "entries with devices");
        reader.chunk = (reader.block() as u64) << (target & 0x1f);
        reader
    }

    fn number(&self, at: usize, bytes: usize) -> u64 {
        self.image[at..at + bytes]
            .iter()
            .rev()
            .fold(0, |n, &b| n << 8 | u64::from(b))
    }

    fn block(&self) -> usize {
        1 << self.image[1024 + 12]
    }

    fn inode(&self, nid: u64) -> usize {
        self.number(1024 + 40, 4) as usize * self.block() + nid as usize * 32
    }

    /// Returns the inode of the name `disk` in the root directory.
    fn find(&self) -> usize {
        let root = self.inode(self.number(1024 + 14, 2));
        assert_eq!(self.number(root, 2), 1, "a long inode with plain data");
        let (at, len) = (
            self.number(root + 16, 4) as usize * self.block(),
            self.number(root + 8, 8) as usize,
        );
        let entries = self.number(at + 8, 2) as usize / 12;
        let name = |i: usize| {
            let start = self.number(at + i * 12 + 8, 2) as usize;
            let end = if i + 1 < entries {
                self.number(at + (i + 1) * 12 + 8, 2) as usize
            } else {
                len
            };
            &self.image[at + start..at + end]
        };
        let found = (0..entries).find(|&i| name(i) == b"disk").expect("a file of that name");
        assert!((1..entries).all(|i| name(i - 1) < name(i)), "names in byte order");
        self.inode(self.number(at + found * 12, 8))
    }

    /// Returns the size of the file in bytes.
    fn size(&self) -> u64 {
        self.number(self.file + 8, 8)
    }

    /// Returns the location of a byte of the disk: the device, from 0, and the byte in it. `None` for a hole.
    fn at(&self, byte: u64) -> Option<(usize, u64)> {
        assert_eq!(self.number(self.file, 2), 1 | 4 << 1, "a long inode in chunks");
        let entry = self.file + 64 + (byte / self.chunk) as usize * 8;
        let (device, block) = (self.number(entry + 2, 2), self.number(entry + 4, 4));
        if block == 0xffff_ffff {
            return None;
        }
        assert!(device >= 1 && device <= self.number(1024 + 86, 2), "device {device}");
        Some((device as usize - 1, block * self.block() as u64 + byte % self.chunk))
    }

    /// Returns the size of a device in bytes, in whole blocks.
    fn device(&self, number: usize) -> u64 {
        let slot = self.number(1024 + 88, 2) as usize * 128 + number * 128;
        self.number(slot + 64, 4) * self.block() as u64
    }
}

fn build(sectors: u64, devices: &[u64], budget: u64, runs: &[(u64, RunTarget)]) -> Result<Index> {
    let mut builder = Builder::new(sectors, devices, budget)?;
    for &(sectors, target) in runs {
        builder.add(NonZeroU64::new(sectors).unwrap(), target)?;
    }
    builder.finish()
}

fn stored(device: usize, sector: u64) -> RunTarget {
    RunTarget::Stored { device, sector }
}

const UNLIMITED: u64 = u64::MAX;

#[test]
fn superblock_has_the_fields_that_the_kernel_reads() {
    let r = Reader::of(build(8, &[1 << 20, 4096], UNLIMITED, &[(8, stored(0, 3))]).unwrap());
    assert_eq!(r.number(1024, 4), 0xe0f5_e1e2);
    assert_eq!(r.number(1024 + 80, 4), 0xc, "chunked file, device table");
    assert_eq!(r.number(1024 + 86, 2), 2, "devices");
    assert_eq!((r.device(0), r.device(1)), (1 << 20, 4096));
    assert_eq!(r.number(1024 + 36, 4) * 512, r.image.len() as u64, "blocks");
    assert_eq!(r.size(), 4096);
    assert_eq!(r.at(512), Some((0, 4 * 512)));
}

#[test]
fn chunks_are_as_large_as_the_runs_allow() {
    let grains = |n: u64| (0..n).map(|i| (128, stored(0, (n - i) * 128))).collect::<Vec<_>>();
    let index = build(128 * 64, &[1 << 30], UNLIMITED, &grains(64)).unwrap();
    assert_eq!(index.chunk(), 65536);
    // Neighbours in the file are one run.
    let row: Vec<_> = (0..64).map(|i| (128, stored(0, 1000 + i * 128))).collect();
    assert_eq!(
        build(128 * 64, &[1 << 30], UNLIMITED, &row).unwrap().chunk(),
        128 * 64 * 512
    );
    // A disk of any size that is one hole.
    let hole = build(1 << 50, &[], UNLIMITED, &[(1 << 50, RunTarget::Zero)]).unwrap();
    assert_eq!(hole.chunk(), 1 << 40, "the largest chunk of the format");
    // One odd border at the end.
    let odd = build(
        1001,
        &[1 << 30],
        UNLIMITED,
        &[(1000, RunTarget::Zero), (1, stored(0, 5))],
    )
    .unwrap();
    assert_eq!(odd.chunk(), 8 * 512);
}

#[test]
fn an_index_beyond_its_budget_is_refused_before_it_takes_memory() {
    let runs = [(1, stored(0, 7)), ((1 << 40) - 1, RunTarget::Zero)];
    let e = build(1 << 40, &[1 << 20], 256 << 20, &runs).unwrap_err();
    assert_eq!(e.kind(), ErrorKind::Unsupported);
    assert!(e.to_string().contains("view-size= allows 262144 KiB"), "{e}");
    // 4096 entries, and less than four pages before them.
    let runs = [(1, stored(0, 7)), (4095, RunTarget::Zero)];
    assert!(build(4096, &[1 << 20], 48 << 10, &runs).unwrap().bytes() <= 48 << 10);
    assert!(build(4096, &[1 << 20], 32 << 10, &runs).is_err());
}

#[test]
fn a_run_outside_of_its_file_or_disk_is_refused() {
    for (bytes, runs, what) in [
        (4096, vec![(8, stored(0, 1))], "leave extent 0 of 8"),
        (4096, vec![(8, stored(0, u64::MAX))], "leave extent 0"),
        (4096, vec![(8, stored(1, 0))], "leave extent 1 of 0"),
        // A last sector that the file holds in part.
        (4095, vec![(8, stored(0, 0))], "leave extent 0 of 7 whole sectors"),
        (4096, vec![(9, RunTarget::Zero)], "leaves the disk"),
        (
            4096,
            vec![(4, RunTarget::Zero), (u64::MAX, RunTarget::Zero)],
            "leaves the disk",
        ),
        (4096, vec![(7, stored(0, 0))], "the runs end at sector 7"),
    ] {
        let e = build(8, &[bytes], UNLIMITED, &runs).unwrap_err();
        assert!(e.to_string().contains(what), "{e}");
    }
    assert!(build(8, &[4096], UNLIMITED, &[(8, stored(0, 0))]).is_ok());
}

#[test]
fn blocks_of_4_kib_reach_16_tib_where_everything_is_aligned_to_them() {
    let far = 1u64 << 33;
    let size = (far + 1032) * 512;
    let r = Reader::of(build(1024, &[size], UNLIMITED, &[(1024, stored(0, far))]).unwrap());
    assert_eq!(r.at(4096 + 7), Some((0, far * 512 + 4096 + 7)));
    for (sectors, at) in [(1024, far + 1), (1023, far), (1020, far)] {
        let e = build(sectors, &[size], UNLIMITED, &[(sectors, stored(0, at))]).unwrap_err();
        assert!(e.to_string().contains("larger than 2 TiB"), "{e}");
    }
    let beyond = 1u64 << 36;
    assert!(build(1024, &[beyond * 512], UNLIMITED, &[(1024, stored(0, beyond - 1024))]).is_err());
}

/// A disk of random runs over random files, in units of sectors.
fn runs() -> impl Strategy<Value = (Vec<u64>, Vec<(u64, RunTarget)>)> {
    let unit = prop_oneof![Just(1u64), Just(8), Just(128)];
    (proptest::collection::vec(1u64..4096, 1..5), unit).prop_flat_map(|(files, unit)| {
        let bytes: Vec<u64> = files.iter().map(|f| f * unit * 512 + f % 3).collect();
        let target =
            (0..files.len(), 0u64..4096, any::<bool>(), 1u64..40).prop_map(move |(device, at, zero, units)| {
                let units = units.min(files[device]);
                let sector = at % (files[device] - units + 1) * unit;
                (
                    units * unit,
                    if zero { RunTarget::Zero } else { stored(device, sector) },
                )
            });
        (Just(bytes), proptest::collection::vec(target, 1..60))
    })
}

proptest! {
    /// Every sector is where its run puts it, and no address leaves its file.
    #[test]
    fn every_sector_is_where_its_run_puts_it((files, runs) in runs(), truncated in 0u64..8) {
        // A last grain that the end of the disk truncates.
        let mut runs = runs;
        if let Some(last) = runs.last_mut() {
            last.0 -= truncated.min(last.0 - 1);
        }
        let sectors = runs.iter().map(|r| r.0).sum();
        let r = Reader::of(build(sectors, &files, UNLIMITED, &runs).unwrap());
        prop_assert_eq!(r.size(), sectors * 512);
        let mut at = 0;
        for (len, target) in runs {
            for i in 0..len {
                let expected = match target {
                    RunTarget::Zero => None,
                    RunTarget::Stored { device, sector } => Some((device, (sector + i) * 512)),
                };
                prop_assert_eq!(r.at((at + i) * 512), expected);
                if let Some((device, byte)) = expected {
                    prop_assert!(byte < files[device]);
                    prop_assert!(byte + 512 <= r.device(device));
                }
            }
            at += len;
        }
    }

    /// For any runs, valid or not, an index has no address outside of its files.
    #[test]
    fn arbitrary_runs_never_give_an_address_outside_of_a_file(
        files in proptest::collection::vec(0u64..1 << 24, 0..4),
        runs in proptest::collection::vec((1u64..600, 0usize..5, 0u64..50_000, any::<bool>()), 1..40),
    ) {
        let runs: Vec<_> = runs
            .into_iter()
            .map(|(len, device, sector, zero)| (len, if zero { RunTarget::Zero } else { stored(device, sector) }))
            .collect();
        let sectors = runs.iter().map(|r| r.0).sum();
        if let Ok(index) = build(sectors, &files, 1 << 20, &runs) {
            prop_assert!(index.bytes() <= 1 << 20);
            let r = Reader::of(index);
            for sector in 0..sectors {
                if let Some((device, byte)) = r.at(sector * 512) {
                    prop_assert!(byte < files[device], "{} of {}", byte, files[device]);
                }
            }
        }
    }
}

/// The EROFS tools find the image valid, and extract the disk from it. Those of Debian 12 know blocks of 4 KiB only.
#[test]
fn fsck_erofs_and_dump_erofs_agree() {
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name);
    let device = |seed: u32| (0..96 << 10).map(|i: u32| (i / 7 * seed) as u8).collect::<Vec<u8>>();
    let devices = [device(3), device(5)];
    for (i, bytes) in devices.iter().enumerate() {
        std::fs::write(path(&format!("device{i}")), bytes).unwrap();
    }
    let runs = [
        (16, stored(1, 8)),
        (8, RunTarget::Zero),
        (40, stored(0, 64)),
        (8, stored(1, 0)),
    ];
    let index = build(72, &devices.each_ref().map(|d| d.len() as u64), UNLIMITED, &runs).unwrap();
    std::fs::write(path("image"), Reader::of(index).image).unwrap();
    let run = |tool: &str, words: &[String]| {
        let mut command = std::process::Command::new(tool);
        for i in 0..devices.len() {
            command.arg(format!("--device={}", path(&format!("device{i}")).display()));
        }
        match command.args(words).arg(path("image")).output() {
            Ok(done) => {
                let text = String::from_utf8_lossy(&[done.stdout, done.stderr].concat()).into_owned();
                assert!(done.status.success(), "{tool}: {text}");
                Some(text)
            }
            Err(e) => {
                let required = std::env::var("VMDKFUSE_REQUIRE").is_ok_and(|value| value == "all");
                assert!(!required, "{tool}: {e}");
                eprintln!("SKIPPED: {tool}: {e}");
                None
            }
        }
    };
    let to = format!("--extract={}", path("out").display());
    let Some(_) = run("fsck.erofs", &[to, "--no-preserve".to_owned()]) else {
        return;
    };
    let part = |device: usize, from: usize, n: usize| devices[device][from * 512..(from + n) * 512].to_vec();
    // Version 1.5 extracts the stored chunks one after the other, without the holes.
    let expected = |hole: usize| [part(1, 8, 16), vec![0; hole * 512], part(0, 64, 40), part(1, 0, 8)].concat();
    let extracted = std::fs::read(path("out/disk")).unwrap();
    assert!(
        extracted == expected(8) || extracted == expected(0),
        "fsck.erofs extracted {} bytes that differ",
        extracted.len()
    );
    let text = run("dump.erofs", &["-e".to_owned(), "--path=/disk".to_owned()]).unwrap();
    assert!(text.contains("36864"), "{text}");
}
