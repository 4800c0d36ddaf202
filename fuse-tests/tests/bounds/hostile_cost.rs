//! Cost of a small hostile file. Each of these files once took minutes or gigabytes, or was read as wrong data.

use std::ops::Range;
use std::sync::Arc;

use fuse_tests::make::write::{F_COMPRESSED, F_MARKERS, F_NEWLINE, Header, raw_grain, se_entry};
use fuse_tests::memory::MemoryStore;
use vmdkfuse::block::{BlockRead, Content, Lba};
use vmdkfuse::vmdk::{CheckReport, OpenOptions, VmdkDisk};
use vmdkfuse::volume::{Seek, Volume};

/// A file under construction, addressed by sectors.
struct SectorFile(Vec<u8>);

impl SectorFile {
    fn new(sectors: u64) -> Self {
        Self(vec![0; sectors as usize * 512])
    }

    fn put(&mut self, sector: u64, bytes: &[u8]) {
        let at = sector as usize * 512;
        self.0[at..at + bytes.len()].copy_from_slice(bytes);
    }

    fn put_words(&mut self, sector: u64, words: impl IntoIterator<Item = u32>) {
        let bytes: Vec<u8> = words.into_iter().flat_map(u32::to_le_bytes).collect();
        self.put(sector, &bytes);
    }

    fn put_longs(&mut self, sector: u64, longs: impl IntoIterator<Item = u64>) {
        let bytes: Vec<u8> = longs.into_iter().flat_map(u64::to_le_bytes).collect();
        self.put(sector, &bytes);
    }
}

/// Returns the header of a hosted extent whose grain directory is at sector 2.
fn header(capacity: u64, grain: u64, ngte: u32) -> Header {
    Header {
        version: 1,
        flags: F_NEWLINE,
        capacity,
        grain,
        desc_at: 0,
        desc_len: 0,
        ngte,
        rgd: 0,
        gd: 2,
        overhead: 2,
        unclean: false,
        compression: 0,
    }
}

/// Opens a disk of one extent of this type, size and content.
fn disk(kind: &str, sectors: u64, file: &SectorFile) -> Arc<VmdkDisk> {
    let text = format!("version=1\nCID=1\nparentCID=ffffffff\ncreateType=\"custom\"\nRW {sectors} {kind} \"extent\"\n");
    let store = MemoryStore::new([("disk.vmdk", text.into_bytes()), ("extent", file.0.clone())]);
    let file = Arc::new(store.file(b"disk.vmdk").unwrap());
    Arc::new(VmdkDisk::open(file, OpenOptions::default()).unwrap())
}

fn check(disk: &VmdkDisk) -> CheckReport {
    disk.check()
}

/// Returns an extent of less than 1 MiB: a directory of 130,000 entries that all name one table, whose 65,536 entries
/// all name one grain.
fn one_table(flags: u32) -> SectorFile {
    const TABLES: u32 = 130_000;
    let gd: Range<u64> = 2..2 + (u64::from(TABLES) * 4).div_ceil(512);
    let (table, grain) = (gd.end, gd.end + 512);
    let mut file = SectorFile::new(grain + 1);
    let header = Header {
        flags,
        ..header(u64::from(TABLES) << 16, 1, 1 << 16)
    };
    file.put(
        0,
        &Header {
            compression: u16::from(flags & F_COMPRESSED != 0),
            ..header
        }
        .bytes(),
    );
    file.put_words(gd.start, std::iter::repeat_n(table as u32, TABLES as usize));
    file.put_words(table, std::iter::repeat_n(grain as u32, 1 << 16));
    file.put(grain, &raw_grain(0, 100, &[1; 100]));
    file
}

#[test]
fn regression_a_check_walks_a_shared_table_once() {
    let report = check(&disk("SPARSE", 1 << 32, &one_table(F_NEWLINE)));
    assert_eq!(report.grains, 1 << 16);
    assert!(report.error_count >= 129_999, "{} errors", report.error_count);
    assert_eq!(report.errors.len(), 100);
}

#[test]
fn regression_a_check_inflates_a_shared_grain_once() {
    let report = check(&disk(
        "SPARSE",
        1 << 32,
        &one_table(F_NEWLINE | F_COMPRESSED | F_MARKERS),
    ));
    let inflated = report.errors.iter().filter(|e| e.contains("compressed grain")).count();
    assert_eq!(inflated, 1, "{:?}", report.errors.first());
}

#[test]
fn regression_a_check_walks_a_shared_sesparse_table_once() {
    const TABLES: u64 = 10_000;
    let gd = 2..2 + (TABLES * 8).div_ceil(512);
    let (table, grains) = (gd.end, gd.end + 64);
    let mut file = SectorFile::new(grains + 8);
    let regions = [
        1,
        1,
        2,
        0,
        2,
        0,
        gd.start,
        gd.end - gd.start,
        table,
        64,
        grains,
        0,
        grains,
        0,
        grains,
        8,
    ];
    let constant = [0xcafe_babe, 0x2_0000_0001, TABLES << 15, 8, 64, 0, 0, 0, 0, 0];
    file.put_longs(0, constant.into_iter().chain(regions));
    file.put_longs(1, [0xcafe_cafe, 1, 1, 0]);
    file.put_longs(gd.start, std::iter::repeat_n(1 << 60, TABLES as usize));
    file.put_longs(table, std::iter::repeat_n(se_entry(3, 0), 4096));
    let report = check(&disk("SESPARSE", TABLES << 15, &file));
    assert_eq!(report.grains, 4096);
    assert_eq!(report.error_count, 4095 + TABLES - 1);
}

#[test]
fn regression_an_entry_of_1_without_the_flag_is_not_a_zeroed_grain() {
    let mut file = SectorFile::new(100);
    file.put(0, &header(1024, 8, 128).bytes());
    file.put_words(2, [3]);
    file.put_words(3, [1, 16]);
    let disk = disk("SPARSE", 1024, &file);
    let mut sector = [7; 512];
    let error = disk.read_at(Lba(0), &mut sector).unwrap_err();
    assert!(error.to_string().contains("entry 0 of grain table 0"), "{error}");
    assert_eq!(disk.content_at(Lba(0)).unwrap().0, Content::Data);
    assert_eq!(check(&disk).error_count, 1);
}

#[test]
fn regression_a_seek_over_a_shared_table_ends() {
    let disk = disk("SPARSE", 1 << 32, &one_table(F_NEWLINE));
    let image = Volume::new(disk as Arc<dyn BlockRead>, Vec::new());
    // All of the disk is data. The seek may return the end, or give up at an earlier offset to bound its cost.
    let found = image.seek(0, Seek::Hole).unwrap().unwrap();
    assert!((1..=image.len()).contains(&found), "{found}");
    assert_eq!(image.seek(0, Seek::Data).unwrap(), Some(0));
}

#[test]
fn regression_a_deep_chain_of_short_runs_is_read_in_one_pass() {
    const LINKS: u32 = 64;
    const SECTORS: u64 = 2048;
    let empty = {
        let mut file = SectorFile::new(100);
        file.put(0, &header(SECTORS, 1, 4096).bytes());
        file.put_words(2, [3]);
        file.0
    };
    let mut base = SectorFile::new(100 + SECTORS);
    base.put(0, &header(SECTORS, 1, 4096).bytes());
    base.put_words(2, [3]);
    base.put_words(3, (0..SECTORS as u32).map(|n| if n % 2 == 0 { 100 + n } else { 0 }));
    base.0[100 * 512..].fill(7);
    let mut files = vec![("empty".to_owned(), empty), ("base".to_owned(), base.0)];
    for n in 0..LINKS {
        let (parent, extent) = if n == 0 {
            ("parentCID=ffffffff".to_owned(), "base")
        } else {
            (
                format!("parentCID={n:08x}\nparentFileNameHint=\"{}.vmdk\"", n - 1),
                "empty",
            )
        };
        let cid = n + 1;
        let text =
            format!("version=1\nCID={cid:08x}\n{parent}\ncreateType=\"custom\"\nRW {SECTORS} SPARSE \"{extent}\"\n");
        files.push((format!("{n}.vmdk"), text.into_bytes()));
    }
    let store = MemoryStore::new(files);
    let file = Arc::new(store.file(b"63.vmdk").unwrap());
    let disk = VmdkDisk::open(file, OpenOptions::default()).unwrap();
    let mut all = vec![1; SECTORS as usize * 512];
    disk.read_at(Lba(0), &mut all).unwrap();
    for (n, sector) in all.chunks(512).enumerate() {
        assert!(
            sector.iter().all(|b| *b == if n % 2 == 0 { 7 } else { 0 }),
            "sector {n}"
        );
    }
}
