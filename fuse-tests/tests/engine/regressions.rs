//! Regression tests of the engine as a library and of `--info`, `--map` and `--check`. Those that need a mount are in
//! `tests/mount/regressions.rs`.

use std::collections::HashSet;
use std::fmt;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::mpsc::channel;
use std::thread;
use std::time::Duration;

use fuse_tests::harness::{Cmd, Scratch, need, poll_until, program};
use fuse_tests::make::write::{self, Descriptor, F_NEWLINE, F_REDUNDANT, Header, Hosted, SeSparse};
use fuse_tests::make::{Content as _, Ctx, Layer, SECTOR};
use serde::de::{self, Deserialize, Deserializer, MapAccess, SeqAccess, Visitor};
use vmdkfuse::block::{Content, Lba};
use vmdkfuse::config::{DiskConfig, LocalConfig, SourceConfig};
use vmdkfuse::error::{ErrorKind, Result};
use vmdkfuse::vmdk::CheckReport;
use vmdkfuse::volume::{self, ReadBuffer, Seek, Volume};

/// Deadline far above the time of every test here, and far below that of the unbounded work in the original defects.
const DEADLINE: Duration = Duration::from_secs(30);

/// Byte offsets of fields in the hosted header.
const OVERHEAD: u64 = 64;
const RGD: u64 = 48;
const GD: u64 = 56;

/// Creates the folder of one image.
fn ctx(scratch: &Scratch, name: &str) -> Ctx {
    Ctx::new(&scratch.path(name), 3).unwrap()
}

/// Returns a read-only disk with default options.
fn config(path: &Path) -> DiskConfig {
    DiskConfig {
        read_only: true,
        ..DiskConfig::new("disk", SourceConfig::Local(LocalConfig::new(path)))
    }
}

fn open(path: &Path) -> Result<Volume> {
    volume::open(&config(path))
}

/// Returns the report of `--check`.
#[track_caller]
fn check_image(path: &Path) -> CheckReport {
    volume::open_source(&config(path)).unwrap().check()
}

fn read(image: &Volume, sector: u64, sectors: u64) -> Result<Vec<u8>> {
    let mut buffer = ReadBuffer::new();
    Ok(image
        .read(sector * SECTOR, (sectors * SECTOR) as usize, &mut buffer)?
        .to_vec())
}

/// Panics unless the whole disk reads the same as the model.
#[track_caller]
fn assert_reads_as(image: &Volume, model: &Layer) {
    const STEP: u64 = 1024;
    assert_eq!(image.len(), model.sectors() * SECTOR);
    for at in (0..model.sectors()).step_by(STEP as usize) {
        let n = STEP.min(model.sectors() - at);
        assert!(
            read(image, at, n).unwrap() == model.read(at, n),
            "wrong from sector {at} on"
        );
    }
}

/// Panics unless the open fails with `kind` and a message that contains each of `words`.
#[track_caller]
fn assert_refused(path: &Path, kind: ErrorKind, words: &[&str]) {
    let error = match open(path) {
        Ok(_) => panic!("{} opens", path.display()),
        Err(e) => e,
    };
    assert_eq!(error.kind(), kind, "{error}");
    words
        .iter()
        .for_each(|word| assert!(error.to_string().contains(word), "no {word:?} in: {error}"));
}

/// Returns the result of `work`, or panics after [`DEADLINE`].
#[track_caller]
fn in_time<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> T {
    let (sender, receiver) = channel();
    thread::spawn(move || sender.send(work()));
    receiver
        .recv_timeout(DEADLINE)
        .expect("not finished within the deadline")
}

/// Allocated and missing tables alternate over more than one chunk (4096 entries) of the directory.
#[test]
fn regression_alternating_tables_read_correctly_at_every_border() {
    const TABLE: u64 = 128;
    const TABLES: u64 = 4200;
    let scratch = Scratch::new();
    let c = ctx(&scratch, "alternating");
    // The first and the last grain of every odd table. Three missing tables in a row lie at the border of the chunk.
    let present = |table: u64| table % 2 == 1 && table != 4095;
    let grains = (0..TABLES)
        .filter(|t| present(*t))
        .flat_map(|t| [t * TABLE, (t + 1) * TABLE - 1]);
    let layer = c
        .layer("disk", TABLES * TABLE - 5, 1)
        .fill(grains.filter(|g| *g < TABLES * TABLE - 5));
    let options = Hosted {
        ngte: TABLE as u32,
        ..Hosted::lazy()
    };
    let (path, _) = c.sparse("disk.vmdk", &layer, &options, |text| text).unwrap();
    let image = open(&path).unwrap();
    for border in (TABLE..layer.sectors() - 2).step_by(TABLE as usize) {
        let (from, n) = (border - 2, 4.min(layer.sectors() - border + 2));
        assert!(
            read(&image, from, n).unwrap() == layer.read(from, n),
            "wrong around sector {border}"
        );
    }
    assert!(read(&image, 4093 * TABLE, 5 * TABLE).unwrap() == layer.read(4093 * TABLE, 5 * TABLE));
    let mut at = 0;
    while at < layer.sectors() {
        let (content, sectors) = image.disk().content_at(Lba(at)).unwrap();
        let expected = |sector: u64| {
            if layer.grains().contains_key(&sector) {
                Content::Data
            } else {
                Content::Hole
            }
        };
        assert!(
            sectors >= 1 && at + sectors <= layer.sectors(),
            "{sectors} sectors from {at} on"
        );
        assert!(
            (at..at + sectors).all(|s| expected(s) == content),
            "{content:?} from {at} on, {sectors} sectors"
        );
        at += sectors;
    }
}

/// Writes an image whose 2^18 directory entries name the same table of 65536 entries, with grains of one sector: 8 TiB
/// in a file of 1.3 MiB. With `redundant`, the 2^18 entries of the redundant directory name a second table.
fn shared_table(path: &Path, redundant: bool, entry: EntryFn) {
    const ENTRIES: u64 = 1 << 18;
    const NGTE: u32 = 1 << 16;
    const COPY: u64 = (ENTRIES + NGTE as u64) * 4 / SECTOR;
    let copies = 1 + u64::from(redundant);
    let (gd, grain) = (64, 64 + copies * COPY);
    let capacity = ENTRIES * u64::from(NGTE);
    let line = format!("RW {capacity} SPARSE \"{}\"", path.file_name().unwrap().display());
    let header = Header {
        version: 1,
        flags: if redundant { F_NEWLINE | F_REDUNDANT } else { F_NEWLINE },
        capacity,
        grain: 1,
        desc_at: 1,
        desc_len: 20,
        ngte: NGTE,
        rgd: if redundant { gd + COPY } else { 0 },
        gd,
        overhead: grain,
        unclean: false,
        compression: 0,
    };
    let mut bytes = header.bytes().to_vec();
    bytes.extend(Descriptor::new("monolithicSparse", [line]).bytes().unwrap());
    bytes.resize((gd * SECTOR) as usize, 0);
    for copy in 0..copies {
        let table = gd + copy * COPY + ENTRIES * 4 / SECTOR;
        bytes.extend((table as u32).to_le_bytes().repeat(ENTRIES as usize));
        bytes.extend((0..NGTE).flat_map(|i| entry(i, grain as u32).to_le_bytes()));
    }
    bytes.extend([0x5a; SECTOR as usize]);
    fs::write(path, bytes).unwrap();
}

/// Returns the entry at an index of a table; the second argument is the sector of the only grain.
type EntryFn = fn(u32, u32) -> u32;

/// Contents of the one table of [`shared_table`]: empty, the same grain in every entry, the grain in every second
/// entry.
const SHARED: [(&str, EntryFn); 3] = [
    ("empty", |_, _| 0),
    ("full", |_, grain| grain),
    ("alternating", |i, grain| if i % 2 == 0 { grain } else { 0 }),
];

#[test]
fn regression_check_of_a_shared_table_ends() {
    let scratch = Scratch::new();
    for (name, entry) in SHARED {
        let path = scratch.path(format!("{name}.vmdk"));
        shared_table(&path, false, entry);
        let report = in_time(move || check_image(&path));
        assert!(
            report.error_count >= (1 << 18) - 1,
            "{name}: {} errors",
            report.error_count
        );
        assert!(report.errors.len() <= 100, "{name}: {} messages", report.errors.len());
        assert!(
            report.errors.iter().any(|e| e.contains("overlaps")),
            "{name}: {:?}",
            report.errors.first()
        );
        assert!(report.grains <= 1 << 16, "{name}: {} grains checked", report.grains);
    }
    let path = scratch.path("alternating.vmdk");
    let outcome = scratch
        .vmdkfuse()
        .arg("--check")
        .key("file", path)
        .memory(256 << 20)
        .deadline(DEADLINE)
        .run();
    outcome.expect_code(4);
}

/// The two copies of a table are compared once, regardless of the number of entries that name them.
#[test]
fn regression_check_of_shared_redundant_tables_ends() {
    let scratch = Scratch::new();
    let path = scratch.path("redundant.vmdk");
    shared_table(&path, true, SHARED[2].1);
    let report = in_time(move || check_image(&path));
    assert!(
        report.error_count >= 2 * ((1 << 18) - 1),
        "{} errors",
        report.error_count
    );
}

/// 64 links with 2^25 missing tables each: a seek is bounded, although walking all their directories takes a minute.
#[test]
fn regression_seek_data_in_huge_directories_ends() {
    const LINKS: u32 = 64;
    let scratch = Scratch::new();
    let c = ctx(&scratch, "huge");
    let layer = c.layer("disk", 1 << 32, 1);
    let options = Hosted {
        ngte: 128,
        redundant: false,
        flags: F_NEWLINE,
        ..Hosted::lazy()
    };
    for n in 0..LINKS {
        let child = |text: Descriptor| text.child(n, n - 1, format!("disk{}.vmdk", n - 1));
        let edit = |text: Descriptor| if n == 0 { text.cid(0) } else { child(text) };
        c.sparse(&format!("disk{n}.vmdk"), &layer, &options, edit).unwrap();
    }
    let image = open(&c.at(&format!("disk{}.vmdk", LINKS - 1))).unwrap();
    in_time(move || {
        // Either result is right: no data, or a position at which the bounded search stopped.
        image.seek(0, Seek::Data).unwrap();
        assert_eq!(image.seek(0, Seek::Hole).unwrap(), Some(0));
    });
}

#[test]
fn regression_seek_data_in_a_shared_table_ends() {
    let scratch = Scratch::new();
    for (name, entry) in SHARED {
        let path = scratch.path(format!("{name}.vmdk"));
        shared_table(&path, false, entry);
        let image = open(&path).unwrap();
        let end = image.len();
        let (data, hole) = in_time(move || {
            (
                image.seek(0, Seek::Data).unwrap().unwrap(),
                image.seek(0, Seek::Hole).unwrap().unwrap(),
            )
        });
        match name {
            // The search may stop early and report data at the position where it stopped, but a hole at 0.
            "empty" => assert_eq!((data < end, hole), (true, 0)),
            "full" => assert_eq!((data, hole), (0, end)),
            _ => assert_eq!((data, hole), (0, SECTOR)),
        }
    }
}

/// The map has 2^33 ranges: the program prints them as it finds them, and exits when the reader closes the pipe.
#[test]
fn regression_map_streams_and_ends_with_its_reader() {
    if !need("bash") || !need("prlimit") {
        return;
    }
    let scratch = Scratch::new();
    let path = scratch.path("alternating.vmdk");
    shared_table(&path, false, SHARED[2].1);
    for json in ["", "--json"] {
        let script = format!(
            "prlimit --data={} \"$0\" --map {json} \"file=$1\" | head -3; echo ${{PIPESTATUS[0]}}",
            256 << 20
        );
        let outcome = Cmd::new("bash")
            .args(["-c", &script])
            .arg(program())
            .arg(&path)
            .deadline(DEADLINE)
            .run()
            .ok()
            .error_names(&[]);
        let lines: Vec<&str> = outcome.stdout.lines().collect();
        let status: i32 = lines.last().unwrap().parse().unwrap();
        assert_eq!(lines.len(), 4, "{outcome}");
        assert!([0, 1, 128 + 13].contains(&status), "{outcome}");
    }
}

/// A grain entry of 1 means a zeroed grain only with flag bit 2. Without the flag it is an error, even if sector 1 is
/// free.
#[test]
fn regression_entry_1_is_no_grain() {
    let scratch = Scratch::new();
    let c = ctx(&scratch, "one");
    let layer = c.layer("disk", 4096, 8).fill([0, 1, 9]);
    // Reserves 8 sectors for a descriptor and removes it from the header, so that sector 1 is free.
    let options = Hosted {
        desc_len: 8,
        ..Hosted::default()
    };
    let extent = c.at("disk-s001.vmdk");
    let at = write::hosted(&extent, &layer, Some(&[b'x'; 4096]), &options).unwrap();
    assert!(at.rgd >= 9 && at.gd >= 9);
    write::poke(&extent, 28, &[0; 16]).unwrap();
    let text = Descriptor::new("twoGbMaxExtentSparse", ["RW 4096 SPARSE \"disk-s001.vmdk\""]);
    let path = c.text("disk.vmdk", &text).unwrap();
    assert_reads_as(&open(&path).unwrap(), &layer);
    for table in [at.tables[&0], at.rtables[&0]] {
        write::poke(&extent, table * SECTOR, &1u32.to_le_bytes()).unwrap();
    }
    let image = open(&path).unwrap();
    assert_eq!(read(&image, 0, 8).unwrap_err().kind(), ErrorKind::Corrupt);
    assert_eq!(read(&image, 8, 8).unwrap(), layer.read(8, 8));
    assert!(check_image(&path).error_count > 0);
}

#[test]
fn regression_a_primary_directory_outside_of_the_file_is_replaced() {
    let scratch = Scratch::new();
    for (name, sector) in [("past", 1u64 << 30), ("wraps", 1 << 55), ("header", 0)] {
        let good = ctx(&scratch, name).simple().unwrap();
        write::poke(&good.path, GD, &sector.to_le_bytes()).unwrap();
        assert_reads_as(&open(&good.path).unwrap(), &good.layer);
        assert!(check_image(&good.path).error_count > 0, "{name}");
    }
}

#[test]
fn regression_a_redundant_directory_outside_of_the_file_is_not_needed() {
    let scratch = Scratch::new();
    let good = ctx(&scratch, "rgd").simple().unwrap();
    assert_eq!(check_image(&good.path).error_count, 0);
    write::poke(&good.path, RGD, &(1u64 << 30).to_le_bytes()).unwrap();
    assert_reads_as(&open(&good.path).unwrap(), &good.layer);
    let report = check_image(&good.path);
    assert!(
        report.errors.iter().any(|e| e.contains("redundant")),
        "{:?}",
        report.errors
    );
}

/// The file ends inside of a primary directory or table: the first sector exists, but not all bytes.
#[test]
fn regression_truncated_primary_tables_are_replaced() {
    let scratch = Scratch::new();
    for name in ["directory", "table", "past"] {
        let good = ctx(&scratch, name).simple().unwrap();
        let end = write::length(&good.path).unwrap() / SECTOR;
        match name {
            "directory" => {
                write::poke(&good.path, end * SECTOR, &[1, 0]).unwrap();
                write::poke(&good.path, GD, &end.to_le_bytes()).unwrap();
            }
            "table" => {
                write::poke(&good.path, end * SECTOR, &[0xff; 4 * SECTOR as usize - 100]).unwrap();
                write::poke(&good.path, good.at.gd * SECTOR, &(end as u32).to_le_bytes()).unwrap();
            }
            _ => write::poke(&good.path, good.at.gd * SECTOR, &(end as u32 - 1).to_le_bytes()).unwrap(),
        }
        assert_reads_as(&open(&good.path).unwrap(), &good.layer);
        assert!(check_image(&good.path).error_count > 0, "{name}");
    }
}

#[test]
fn regression_metadata_longer_than_the_file_is_refused() {
    let scratch = Scratch::new();
    for overhead in [1u64 << 20, u64::MAX] {
        let good = ctx(&scratch, &format!("overhead-{overhead}")).simple().unwrap();
        write::poke(&good.path, OVERHEAD, &overhead.to_le_bytes()).unwrap();
        assert_refused(&good.path, ErrorKind::Corrupt, &["overHead", "disk.vmdk"]);
    }
}

#[test]
fn regression_a_volatile_header_elsewhere_is_refused() {
    let scratch = Scratch::new();
    let c = ctx(&scratch, "sesparse");
    let layer = c.layer("disk", 4096, 8).fill([0, 7]);
    let extent = c.at("disk-sesparse.vmdk");
    write::sesparse(&extent, &layer, &SeSparse::default()).unwrap();
    let path = c
        .text(
            "disk.vmdk",
            &Descriptor::new("seSparse", ["RW 4096 SESPARSE \"disk-sesparse.vmdk\""]),
        )
        .unwrap();
    assert_reads_as(&open(&path).unwrap(), &layer);
    write::poke(&extent, 80, &2u64.to_le_bytes()).unwrap();
    assert_refused(&path, ErrorKind::Unsupported, &["volatile", "sesparse.vmdk"]);
}

/// The limit on the number of extents applies to the whole chain, not to each link.
#[test]
fn regression_the_extents_of_a_chain_are_bounded() {
    let scratch = Scratch::new();
    for (name, extents, opens) in [("few", 1_000, true), ("many", 40_000, false)] {
        let c = ctx(&scratch, name);
        let lines = || vec!["RW 1 ZERO"; extents];
        c.text("base.vmdk", &Descriptor::new("custom", lines()).cid(7)).unwrap();
        let top = c
            .text("top.vmdk", &Descriptor::new("custom", lines()).child(8, 7, "base.vmdk"))
            .unwrap();
        if opens {
            assert_eq!(open(&top).unwrap().len(), extents as u64 * SECTOR);
        } else {
            in_time(move || assert_refused(&top, ErrorKind::Corrupt, &["extents"]));
        }
    }
}

/// The data of a disk are counted exactly, and no number is given before they are.
#[test]
fn the_data_of_a_disk_are_counted() {
    let scratch = Scratch::new();
    let good = ctx(&scratch, "room")
        .simple_of(1 << 20, 128, &[0, 1, 2, 900], &Hosted::default())
        .unwrap();
    let volume = open(&good.path).unwrap();
    let counted = || volume.allocated().is_some();
    assert!(poll_until(Duration::from_secs(60), counted), "not counted");
    assert_eq!(volume.allocated(), Some(4 * 128 * 512));
}

/// Creates an image in which both copies of the directory entry of `table` are damaged.
fn bad_entry(c: &Ctx, grains: &[u64], table: u64) -> (PathBuf, Layer) {
    let layer = c.layer("disk", 10 * 512 * 8, 8).fill(grains.iter().copied());
    let (path, at) = c.sparse("disk.vmdk", &layer, &Hosted::lazy(), |text| text).unwrap();
    for directory in [at.gd, at.rgd] {
        write::poke(&path, directory * SECTOR + table * 4, &0x00ff_ffffu32.to_le_bytes()).unwrap();
    }
    (path, layer)
}

#[test]
fn regression_holes_before_a_damaged_directory_entry_are_found() {
    const TABLE: u64 = 512 * 8;
    let scratch = Scratch::new();
    let damage = 7 * TABLE..8 * TABLE;
    for (name, grains, first) in [
        ("data", vec![3 * 512 + 5], (3 * 512 + 5) * 8),
        ("holes", vec![], damage.start),
    ] {
        let (path, layer) = bad_entry(&ctx(&scratch, name), &grains, 7);
        let image = open(&path).unwrap();
        assert_eq!(image.seek(0, Seek::Data).unwrap(), Some(first * SECTOR), "{name}");
        assert_eq!(image.seek(0, Seek::Hole).unwrap(), Some(0), "{name}");
        assert_eq!(
            image.seek(damage.start * SECTOR, Seek::Hole).unwrap(),
            Some(damage.end * SECTOR),
            "{name}"
        );
        for at in [damage.start, damage.end - 1] {
            assert_eq!(read(&image, at, 1).unwrap_err().kind(), ErrorKind::Corrupt, "{name}");
        }
        for at in [0, first & !7, damage.start - 1, damage.end]
            .into_iter()
            .filter(|at| !damage.contains(at))
        {
            assert_eq!(read(&image, at, 1).unwrap(), layer.read(at, 1), "{name}");
        }
        let map = scratch
            .vmdkfuse()
            .args(["--map", "--json"])
            .key("file", &path)
            .run()
            .ok()
            .json();
        let last = map[0]["map"]
            .as_array()
            .unwrap()
            .iter()
            .rfind(|s| s["content"] == "data")
            .unwrap()
            .clone();
        assert_eq!(
            (last["start"].as_u64(), last["length"].as_u64()),
            (Some(damage.start * SECTOR), Some(TABLE * SECTOR))
        );
        scratch.vmdkfuse().arg("--map").key("file", &path).run().ok();
    }
}

/// JSON in which no object has a duplicate key.
struct Unique;

impl<'de> Deserialize<'de> for Unique {
    fn deserialize<D: Deserializer<'de>>(from: D) -> std::result::Result<Self, D::Error> {
        struct UniqueVisitor;
        impl<'de> Visitor<'de> for UniqueVisitor {
            type Value = Unique;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("JSON")
            }
            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> std::result::Result<Unique, A::Error> {
                let mut seen = HashSet::new();
                while let Some((key, Unique)) = map.next_entry::<String, Unique>()? {
                    if !seen.insert(key.clone()) {
                        return Err(de::Error::custom(format!("duplicate key {key:?}")));
                    }
                }
                Ok(Unique)
            }
            fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> std::result::Result<Unique, A::Error> {
                while seq.next_element::<Unique>()?.is_some() {}
                Ok(Unique)
            }
            fn visit_unit<E>(self) -> std::result::Result<Unique, E> {
                Ok(Unique)
            }
            fn visit_bool<E>(self, _: bool) -> std::result::Result<Unique, E> {
                Ok(Unique)
            }
            fn visit_u64<E>(self, _: u64) -> std::result::Result<Unique, E> {
                Ok(Unique)
            }
            fn visit_str<E>(self, _: &str) -> std::result::Result<Unique, E> {
                Ok(Unique)
            }
        }
        from.deserialize_any(UniqueVisitor)
    }
}

#[test]
fn regression_json_output_has_no_duplicate_keys() {
    assert!(serde_json::from_str::<Unique>("[{\"a\": 1, \"b\": {\"a\": null}, \"a\": true}]").is_err());
    let scratch = Scratch::new();
    let c = ctx(&scratch, "info");
    c.base(4096).unwrap();
    c.flat_base("flat", 4096).unwrap();
    let sparse = c.simple().unwrap().path;
    let raw = scratch.write("disk.img", [1; 512]);
    for path in [c.at("base.vmdk"), c.at("flat.vmdk"), sparse, raw] {
        for action in ["--info", "--map", "--check"] {
            let outcome = scratch
                .vmdkfuse()
                .args([action, "--json"])
                .key("file", &path)
                .run()
                .ok();
            serde_json::from_str::<Unique>(&outcome.stdout).unwrap_or_else(|e| panic!("{e}: {outcome}"));
        }
    }
}
