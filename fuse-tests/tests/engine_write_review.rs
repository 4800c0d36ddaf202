//! Writing to images that are damaged, unusual or hostile: nothing that could be read before may be lost by it.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "helpers of tests, in which a panic is the verdict"
)]

use std::fs::{self, File};
use std::os::fd::BorrowedFd;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use fuse_tests::written::{alone, policy, readable, writable};
use tempfile::tempdir;
use vmdkfuse::block::{BlockRead, Lba};
use vmdkfuse::error::{ErrorKind, Result};
use vmdkfuse::store::{Access, Identity, OpenPolicy, Store, StoredFile, StoredWrite, open_user_path};
use vmdkfuse::vmdk::{OpenOptions, VmdkDisk};

const SECTOR: u64 = 512;

/// A hosted sparse file of which every number can be chosen.
#[derive(Clone, Copy)]
struct Hosted {
    capacity: u64,
    grain: u64,
    entries: u32,
    descriptor: (u64, u64),
    redundant: Option<u64>,
    directory: u64,
    overhead: u64,
    unclean: bool,
    zeroed: bool,
}

impl Default for Hosted {
    /// 128 MiB: two tables of 512 grains of 64 KiB… each, directories of one sector.
    fn default() -> Self {
        Self {
            capacity: 2 * 512 * 128,
            grain: 128,
            entries: 512,
            descriptor: (1, 20),
            redundant: Some(21),
            directory: 30,
            overhead: 128,
            unclean: true,
            zeroed: false,
        }
    }
}

impl Hosted {
    /// Writes header and, where it has room, descriptor; the file gets `sectors`.
    fn make(&self, path: &Path, text: &str, sectors: u64) -> File {
        let mut header = [0u8; 512];
        let mut put = |at: usize, bytes: &[u8]| header[at..at + bytes.len()].copy_from_slice(bytes);
        put(0, b"KDMV");
        put(4, &(if self.zeroed { 2u32 } else { 1 }).to_le_bytes());
        let flags = 1 | u32::from(self.redundant.is_some()) << 1 | u32::from(self.zeroed) << 2;
        put(8, &flags.to_le_bytes());
        put(12, &self.capacity.to_le_bytes());
        put(20, &self.grain.to_le_bytes());
        put(28, &self.descriptor.0.to_le_bytes());
        put(36, &self.descriptor.1.to_le_bytes());
        put(44, &self.entries.to_le_bytes());
        put(48, &self.redundant.unwrap_or(0).to_le_bytes());
        put(56, &self.directory.to_le_bytes());
        put(64, &self.overhead.to_le_bytes());
        put(72, &[u8::from(self.unclean)]);
        put(73, b"\n \r\n");
        let file = File::options().read(true).write(true).create(true).truncate(true).open(path).unwrap();
        file.set_len(sectors * SECTOR).unwrap();
        file.write_all_at(&header, 0).unwrap();
        if self.descriptor.0 != 0 {
            assert!(text.len() as u64 <= self.descriptor.1 * SECTOR);
            file.write_all_at(text.as_bytes(), self.descriptor.0 * SECTOR).unwrap();
        }
        file
    }

    fn text(&self) -> String {
        descriptor("12345678", "ffffffff", "", "monolithicSparse", &format!("RW {} SPARSE \"x.vmdk\"", self.capacity))
    }
}

fn descriptor(cid: &str, parent: &str, hint: &str, kind: &str, extents: &str) -> String {
    let hint = if hint.is_empty() { String::new() } else { format!("parentFileNameHint=\"{hint}\"\n") };
    format!(
        "# Disk DescriptorFile\nversion=1\nCID={cid}\nparentCID={parent}\ncreateType=\"{kind}\"\n{hint}{extents}\n\
         ddb.adapterType = \"ide\"\n"
    )
}

fn put_u32(file: &File, sector: u64, index: u64, value: u64) {
    file.write_all_at(&u32::try_from(value).unwrap().to_le_bytes(), sector * SECTOR + index * 4).unwrap();
}

fn read(disk: &VmdkDisk, at: u64) -> Result<[u8; 512]> {
    let mut sector = [0xee; 512];
    disk.read_at(Lba(at), &mut sector).map(|()| sector)
}

/// An unclean image with a grain in either table, the second one's at the end of the file.
fn two_tables(path: &Path) -> File {
    let hosted = Hosted::default();
    let file = hosted.make(path, &hosted.text(), 128 * 4);
    for (directory, tables) in [(21, [22, 26]), (30, [31, 35])] {
        for (i, table) in (0..).zip(tables) {
            put_u32(&file, directory, i, table);
            put_u32(&file, table, 5, 128 * (2 + i));
        }
    }
    for (i, fill) in [(2, 0xaa), (3, 0xbb)] {
        file.write_all_at(&vec![fill; 128 * 512], i * 128 * SECTOR).unwrap();
    }
    file
}

/// Sector of the disk that the second table's grain holds.
const IN_SECOND: u64 = (512 + 5) * 128;

/// One bad directory entry: the other copy still leads to the table. Whether or not it is opened for writing, what could
/// be read before can be read afterwards.
fn one_directory_entry_is_bad(directory: u64) {
    let dir = tempdir().unwrap();
    let path = dir.path().join("x.vmdk");
    let file = two_tables(&path);
    put_u32(&file, directory, 1, 0x00ff_ffff);
    let before = file.metadata().unwrap().len();
    assert_eq!(read(&readable(&path), IN_SECOND).unwrap(), [0xbb; 512]);
    if let Err(e) = writable(&path).map(drop) {
        assert_eq!(e.kind(), ErrorKind::Corrupt, "{e}");
    }
    assert_eq!(file.metadata().unwrap().len(), before, "the end of the file was cut off");
    assert_eq!(read(&readable(&path), IN_SECOND).unwrap(), [0xbb; 512]);
}

#[test]
fn regression_repair_keeps_the_grains_of_a_table_that_the_primary_directory_lost() {
    let _alone = alone();
    one_directory_entry_is_bad(30);
}

#[test]
fn regression_repair_keeps_the_grains_of_a_table_that_the_redundant_directory_lost() {
    let _alone = alone();
    one_directory_entry_is_bad(21);
}

#[test]
fn regression_repair_keeps_directories_and_descriptor_behind_the_grains() {
    let _alone = alone();
    for descriptor_last in [false, true] {
        let dir = tempdir().unwrap();
        let path = dir.path().join("x.vmdk");
        let mut hosted = Hosted { redundant: None, overhead: 128, ..Hosted::default() };
        if descriptor_last {
            hosted.descriptor = (400, 20);
        } else {
            hosted.directory = 400;
        }
        let file = hosted.make(&path, &hosted.text(), 512);
        put_u32(&file, hosted.directory, 0, 31);
        put_u32(&file, 31, 5, 256);
        file.write_all_at(&[0xaa; 512], 256 * SECTOR).unwrap();
        assert_eq!(read(&readable(&path), 5 * 128).unwrap(), [0xaa; 512]);
        writable(&path).map(drop).ok();
        assert!(file.metadata().unwrap().len() >= 420 * SECTOR, "directory or descriptor was cut off");
        assert_eq!(read(&readable(&path), 5 * 128).unwrap(), [0xaa; 512]);
    }
}

/// A file that counts what is read of it and written to it.
#[derive(Debug)]
struct Counting {
    file: Arc<dyn StoredFile>,
    moved: AtomicU64,
}

/// More than this nobody needs for the small files here.
const MOST: u64 = 1 << 30;

impl Counting {
    fn count(&self, bytes: usize) {
        let moved = self.moved.fetch_add(bytes as u64, Ordering::Relaxed);
        assert!(moved < MOST, "more than {MOST} bytes were read and written");
    }

    fn inner(&self) -> &dyn StoredWrite {
        self.file.writer().unwrap()
    }
}

impl StoredFile for Counting {
    fn len(&self) -> u64 {
        self.file.len()
    }
    fn writer(&self) -> Option<&dyn StoredWrite> {
        Some(self)
    }
    fn read_exact_at(&self, offset: u64, buf: &mut [u8]) -> Result<()> {
        self.count(buf.len());
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
    fn fd(&self) -> Option<BorrowedFd<'_>> {
        self.file.fd()
    }
}

impl StoredWrite for Counting {
    fn write_all_at(&self, offset: u64, buf: &[u8]) -> Result<()> {
        self.count(buf.len());
        self.inner().write_all_at(offset, buf)
    }
    fn len_now(&self) -> Result<u64> {
        self.inner().len_now()
    }
    fn set_len(&self, len: u64) -> Result<()> {
        self.inner().set_len(len)
    }
    fn zero(&self, offset: u64, len: u64, unmap: bool) -> Result<()> {
        self.inner().zero(offset, len, unmap)
    }
    fn sync(&self) -> Result<()> {
        Ok(())
    }
}

/// An unclean image of 3 MiB, all of whose directory entries name one table of 256 KiB.
fn one_table_for_all(path: &Path, primary_too: bool) {
    const TABLES: u64 = 16 << 10;
    let directory_sectors = TABLES * 4 / SECTOR;
    let hosted = Hosted {
        capacity: TABLES * 65536 * 8,
        grain: 8,
        entries: 65536,
        directory: 21 + directory_sectors,
        overhead: 512,
        ..Hosted::default()
    };
    let table = 21 + 2 * directory_sectors;
    let file = hosted.make(path, &hosted.text(), 6 << 11);
    let entries: Vec<u8> = (0..TABLES).flat_map(|_| u32::try_from(table).unwrap().to_le_bytes()).collect();
    file.write_all_at(&entries, 21 * SECTOR).unwrap();
    if primary_too {
        file.write_all_at(&entries, (21 + directory_sectors) * SECTOR).unwrap();
    }
}

/// The work of a repair is bounded by the file, not by what its directory claims.
fn repair_is_bounded(primary_too: bool) {
    let dir = tempdir().unwrap();
    let path = dir.path().join("x.vmdk");
    one_table_for_all(&path, primary_too);
    let before = fs::metadata(&path).unwrap().len();
    let file = open_user_path(&path, policy(&[]), Access::Write).unwrap();
    let file = Arc::new(Counting { file, moved: AtomicU64::new(0) });
    let error = VmdkDisk::open_writable(file, OpenOptions::default()).map(drop).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Corrupt, "{error}");
    assert!(fs::metadata(&path).unwrap().len() <= 2 * before, "a refused image grew");
}

#[test]
fn regression_repair_of_one_table_for_the_whole_directory_is_bounded() {
    let _alone = alone();
    repair_is_bounded(true);
}

#[test]
fn regression_repair_does_not_copy_one_table_for_the_whole_directory() {
    let _alone = alone();
    repair_is_bounded(false);
}

#[test]
fn regression_the_last_sector_of_a_file_of_odd_length_is_read_while_it_is_writable() {
    let _alone = alone();
    let dir = tempdir().unwrap();
    let path = dir.path().join("x.vmdk");
    let hosted = Hosted { capacity: 100, redundant: None, unclean: false, ..Hosted::default() };
    let file = hosted.make(&path, &hosted.text(), 128 + 100);
    put_u32(&file, 30, 0, 31);
    put_u32(&file, 31, 0, 128);
    file.write_all_at(&[0xaa; 100], (128 + 99) * SECTOR).unwrap();
    file.set_len((128 + 99) * SECTOR + 100).unwrap();
    let mut expected = [0; 512];
    expected[..100].fill(0xaa);
    assert_eq!(read(&readable(&path), 99).unwrap(), expected);
    let disk = writable(&path).unwrap();
    assert_eq!(read(&disk, 99).unwrap(), expected);
}

#[test]
fn regression_metadata_that_lie_over_each_other_are_not_written_to() {
    let _alone = alone();
    let dir = tempdir().unwrap();
    let path = dir.path().join("x.vmdk");
    // two sectors of directory each, no table yet
    let plain = Hosted { capacity: 200 * 512 * 128, unclean: false, ..Hosted::default() };
    let over_directory = Hosted { redundant: Some(31), ..plain };
    let over_descriptor = Hosted { redundant: None, directory: 15, ..plain };
    plain.make(&path, &plain.text(), 128);
    writable(&path).map(drop).unwrap();
    for hosted in [over_directory, over_descriptor] {
        hosted.make(&path, &hosted.text(), 128);
        let opened = writable(&path);
        let Ok(disk) = opened else { continue };
        // it was taken: then it has to work
        disk.writer().unwrap().write_at(Lba(0), &[0xaa; 512]).unwrap();
        disk.writer().unwrap().close().unwrap();
        drop(disk);
        let disk = readable(&path);
        assert_eq!(read(&disk, 0).unwrap(), [0xaa; 512]);
        for table in 1..200 {
            assert_eq!(read(&disk, table * 512 * 128).unwrap(), [0; 512], "a write shows in table {table}");
        }
        panic!("directories or a descriptor that lie over each other were accepted");
    }
}

#[test]
fn regression_a_fresh_base_is_protected_whatever_link_it_is_opened_by() {
    let _alone = alone();
    let dir = tempdir().unwrap();
    let folder = dir.path().join("vm");
    fs::create_dir(&folder).unwrap();
    let base = folder.join("base.vmdk");
    fs::write(folder.join("base-flat.vmdk"), vec![0; 1 << 20]).unwrap();
    let extent = "RW 2048 FLAT \"base-flat.vmdk\" 0";
    fs::write(&base, descriptor("fffffffe", "ffffffff", "", "monolithicFlat", extent)).unwrap();
    let hosted = Hosted { capacity: 2048, redundant: None, unclean: false, ..Hosted::default() };
    let text = descriptor("fffffffe", "fffffffe", "base.vmdk", "monolithicSparse", "RW 2048 SPARSE \"c.vmdk\"");
    hosted.make(&folder.join("base-000001.vmdk"), &text, 128);
    assert_eq!(writable(&base).map(drop).unwrap_err().kind(), ErrorKind::Policy);
    let link = dir.path().join("disk.vmdk");
    std::os::unix::fs::symlink(&base, &link).unwrap();
    let error = writable(&link).map(drop).expect_err("the base of a snapshot was opened for writing");
    assert_eq!(error.kind(), ErrorKind::Policy);
}

/// A child over a parent with one grain, at the end of both.
fn chain(dir: &Path, capacity: u64, grain: u64) -> PathBuf {
    let plain = Hosted { capacity, grain, redundant: None, unclean: false, overhead: 16384, ..Hosted::default() };
    let parent = plain.make(&dir.join("base.vmdk"), &plain.text(), 16384 + 2 * grain);
    let table = 16384;
    let grains = capacity / grain;
    put_u32(&parent, 30, (grains - 1) / 512, table);
    put_u32(&parent, table, (grains - 1) % 512, 16384 + grain);
    parent.write_all_at(&vec![0xaa; (grain * SECTOR) as usize], (16384 + grain) * SECTOR).unwrap();
    let child = dir.join("child.vmdk");
    let line = format!("RW {capacity} SPARSE \"child.vmdk\"");
    plain.make(&child, &descriptor("00000001", "12345678", "base.vmdk", "monolithicSparse", &line), 16384);
    child
}

#[test]
fn regression_zeroes_take_no_room_where_the_parent_has_zeroes() {
    let _alone = alone();
    let dir = tempdir().unwrap();
    // 4 TiB, of which the parent has the last 8 MiB
    let capacity = 8u64 << 30;
    let child = chain(dir.path(), capacity, 16384);
    let disk = writable(&child).unwrap();
    assert_eq!(read(&disk, capacity - 1).unwrap(), [0xaa; 512]);
    disk.writer().unwrap().zero(Lba(0)..Lba(capacity), true).unwrap();
    assert_eq!(read(&disk, capacity - 1).unwrap(), [0; 512]);
    disk.writer().unwrap().close().unwrap();
    let len = fs::metadata(&child).unwrap().len();
    assert!(len < 1 << 30, "8 MiB of zeroes took {len} bytes of the file");
}

#[test]
fn regression_extents_that_are_only_read_are_not_repaired() {
    let _alone = alone();
    let dir = tempdir().unwrap();
    let plain = Hosted { descriptor: (0, 0), ..Hosted::default() };
    Hosted { unclean: false, ..plain }.make(&dir.path().join("a.vmdk"), "", 128);
    plain.make(&dir.path().join("b.vmdk"), "", 256);
    let lines = format!("RW {0} SPARSE \"a.vmdk\"\nRDONLY {0} SPARSE \"b.vmdk\"", plain.capacity);
    let path = dir.path().join("x.vmdk");
    fs::write(&path, descriptor("12345678", "ffffffff", "", "custom", &lines)).unwrap();
    let before = fs::read(dir.path().join("b.vmdk")).unwrap();
    let disk = writable(&path).unwrap();
    disk.writer().unwrap().write_at(Lba(0), &[0xaa; 512]).unwrap();
    disk.writer().unwrap().close().unwrap();
    assert_eq!(fs::read(dir.path().join("b.vmdk")).unwrap(), before);
}

#[test]
fn regression_a_child_is_found_in_a_folder_of_many_files() {
    let _alone = alone();
    let dir = tempdir().unwrap();
    for i in 0..5000 {
        fs::write(dir.path().join(format!("f{i}.vmdk")), b"").unwrap();
    }
    let base = dir.path().join("base.vmdk");
    fs::write(dir.path().join("base-flat.vmdk"), vec![0; 1 << 20]).unwrap();
    let extent = "RW 2048 FLAT \"base-flat.vmdk\" 0";
    fs::write(&base, descriptor("12345678", "ffffffff", "", "monolithicFlat", extent)).unwrap();
    let last = fs::read_dir(dir.path()).unwrap().flatten().map(|e| e.path());
    let last = last.filter(|p| !p.ends_with("base.vmdk") && !p.ends_with("base-flat.vmdk")).last().unwrap();
    let hosted = Hosted { capacity: 2048, redundant: None, unclean: false, ..Hosted::default() };
    let text = descriptor("00000001", "12345678", "base.vmdk", "monolithicSparse", "RW 2048 SPARSE \"c.vmdk\"");
    hosted.make(&last, &text, 128);
    let error = writable(&base).map(drop).expect_err("the base of a snapshot was opened for writing");
    assert_eq!(error.kind(), ErrorKind::Policy);
}

/// The most memory, in bytes, that the process had since the last [`forget_peak`].
fn peak() -> u64 {
    let status = fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find_map(|l| l.strip_prefix("VmHWM:")).unwrap();
    line.trim().trim_end_matches(" kB").parse::<u64>().unwrap() << 10
}

/// Begins to count anew; what the process has now.
fn forget_peak() -> u64 {
    fs::write("/proc/self/clear_refs", "5").unwrap();
    peak()
}

#[test]
fn regression_large_directories_of_several_extents_take_bounded_memory() {
    let _alone = alone();
    let dir = tempdir().unwrap();
    let tables = 1u64 << 25;
    let hosted = Hosted {
        capacity: tables * 128 * 8,
        grain: 8,
        entries: 128,
        descriptor: (0, 0),
        redundant: None,
        directory: 8,
        unclean: false,
        ..Hosted::default()
    };
    let lines: Vec<String> = (0..3).map(|i| format!("RW {} SPARSE \"e{i}.vmdk\"", hosted.capacity)).collect();
    for i in 0..3 {
        hosted.make(&dir.path().join(format!("e{i}.vmdk")), "", 8 + tables * 4 / SECTOR);
    }
    let path = dir.path().join("x.vmdk");
    fs::write(&path, descriptor("12345678", "ffffffff", "", "custom", &lines.join("\n"))).unwrap();
    let before = forget_peak();
    // it may be refused
    let disk = writable(&path);
    let taken = peak() - before;
    drop(disk);
    assert!(taken < 400 << 20, "opening three small files took {taken} bytes of memory");
}

#[test]
fn regression_tables_of_many_entries_wait_in_bounded_memory() {
    let _alone = alone();
    let dir = tempdir().unwrap();
    let path = dir.path().join("x.vmdk");
    let coverage = 65536 * 8;
    let hosted = Hosted {
        capacity: 2048 * coverage,
        grain: 8,
        entries: 65536,
        redundant: None,
        directory: 21,
        unclean: false,
        ..Hosted::default()
    };
    hosted.make(&path, &hosted.text(), 128);
    let disk = writable(&path).unwrap();
    let before = forget_peak();
    for table in 0..2048 {
        disk.writer().unwrap().write_at(Lba(table * coverage), &[1; 4096]).unwrap();
    }
    let taken = peak() - before;
    assert!(taken < 128 << 20, "2048 small writes took {taken} bytes of memory");
}

#[test]
fn regression_zeroes_over_a_large_range_take_bounded_memory() {
    let _alone = alone();
    let dir = tempdir().unwrap();
    let capacity = 1u64 << 26;
    let flat = File::create(dir.path().join("base-flat.vmdk")).unwrap();
    flat.set_len(capacity * SECTOR).unwrap();
    flat.write_all_at(&[0xaa; 512], (capacity - 1) * SECTOR).unwrap();
    let line = format!("RW {capacity} FLAT \"base-flat.vmdk\" 0");
    let text = descriptor("12345678", "ffffffff", "", "monolithicFlat", &line);
    fs::write(dir.path().join("base.vmdk"), text).unwrap();
    for zeroed in [true, false] {
        let child = dir.path().join("child.vmdk");
        let directory = Hosted { capacity, grain: 8, redundant: None, directory: 32, ..Hosted::default() };
        let hosted = Hosted { unclean: false, overhead: 256, zeroed, ..directory };
        let line = format!("RW {capacity} SPARSE \"child.vmdk\"");
        let text = descriptor("00000001", "12345678", "base.vmdk", "monolithicSparse", &line);
        hosted.make(&child, &text, 256);
        let disk = writable(&child).unwrap();
        let before = forget_peak();
        disk.writer().unwrap().zero(Lba(0)..Lba(capacity), true).unwrap();
        let taken = peak() - before;
        assert_eq!(read(&disk, capacity - 1).unwrap(), [0; 512]);
        assert!(taken < 48 << 20, "zeroes (entries of 1: {zeroed}) took {taken} bytes of memory");
    }
}

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
        let mut state = self.random.lock().unwrap();
        *state ^= *state << 13;
        *state ^= *state >> 7;
        *state ^= *state << 17;
        *state
    }
    fn fails(&self) -> bool {
        match self.one_in.load(Ordering::Relaxed) {
            0 => false,
            n => self.draw().is_multiple_of(n),
        }
    }
    fn error(&self) -> vmdkfuse::error::Error {
        vmdkfuse::error::Error::new(ErrorKind::Os(libc::ENOSPC), "full")
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
    fs::write(dir.join("base-flat.vmdk"), base).unwrap();
    let line = format!("RW {capacity} FLAT \"base-flat.vmdk\" 0");
    fs::write(dir.join("base.vmdk"), descriptor("12345678", "ffffffff", "", "monolithicFlat", &line)).unwrap();
    let child = dir.join("child.vmdk");
    let line = format!("RW {capacity} SPARSE \"child.vmdk\"");
    let text = descriptor("00000001", "12345678", "base.vmdk", "monolithicSparse", &line);
    let redundant = redundant.then_some(21);
    let hosted = Hosted {
        capacity,
        grain: 8,
        entries: 128,
        redundant,
        overhead: 33,
        unclean: false,
        zeroed,
        ..Hosted::default()
    };
    hosted.make(&child, &text, 33);
    (child, capacity)
}

#[test]
fn what_fails_now_and_then_loses_nothing() {
    let _alone = alone();
    for seed in 1..=6u64 {
        let dir = tempdir().unwrap();
        let (child, capacity) = small_chain(dir.path(), seed % 2 == 0, seed % 3 != 0);
        let mut model = vec![0; (capacity * SECTOR) as usize];
        readable(&child).read_at(Lba(0), &mut model).unwrap();
        for round in 0..3 {
            let file = open_user_path(&child, policy(&[]), Access::Write).unwrap();
            let random = Mutex::new(seed * 1000 + round + 7);
            let file = Arc::new(Failing { file, random, one_in: 0.into() });
            let disk = VmdkDisk::open_writable(Arc::clone(&file) as _, OpenOptions::default()).unwrap();
            let writer = disk.writer().unwrap();
            let mut failed = 0;
            for step in 0..300u64 {
                file.one_in.store([0, 3, 12, 60][(step / 50 % 4) as usize], Ordering::Relaxed);
                let draw = file.draw();
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
                let mut seen = vec![0xee; bytes.len()];
                disk.read_at(Lba(at), &mut seen).unwrap();
                for ((new, old), now) in data.chunks(512).zip(model[bytes.clone()].chunks(512)).zip(seen.chunks(512)) {
                    assert!(now == new || (done.is_err() && now == old), "seed {seed}, step {step}: {done:?}");
                }
                failed += u64::from(done.is_err());
                model[bytes].copy_from_slice(&seen);
                if step % 37 == 0 {
                    failed += u64::from(writer.flush().is_err());
                }
                if step % 111 == 0 {
                    failed += u64::from(writer.close().is_err());
                }
            }
            assert!(failed > 5);
            file.one_in.store(0, Ordering::Relaxed);
            if round == 1 {
                writer.close().unwrap();
            } else {
                writer.flush().unwrap();
            }
            drop(disk);
            drop(file);
            let disk = readable(&child);
            let report = vmdkfuse::vmdk::check(&disk);
            assert_eq!(report.errors, Vec::<String>::new(), "seed {seed}");
            let mut seen = vec![0xee; model.len()];
            disk.read_at(Lba(0), &mut seen).unwrap();
            let first = seen.chunks(512).zip(model.chunks(512)).position(|(a, b)| a != b);
            assert_eq!(first, None, "seed {seed}, round {round}");
        }
    }
}

#[test]
fn parallel_writers_flushes_zeroes_and_closes_lose_nothing() {
    let _alone = alone();
    const THREADS: u64 = 4;
    for seed in 1..=2u64 {
        let dir = tempdir().unwrap();
        let path = dir.path().join("x.vmdk");
        // few tables are kept in memory, as each is large
        let coverage = 65536 * 8;
        let capacity = 400 * coverage;
        let plain = Hosted { capacity, grain: 8, entries: 65536, unclean: false, ..Hosted::default() };
        let hosted = Hosted { redundant: Some(21), directory: 25, zeroed: seed % 2 == 0, ..plain };
        hosted.make(&path, &hosted.text(), 128);
        let disk = writable(&path).unwrap();
        let disk = &disk;
        // sectors that were written, by the one thread that may write them: sector number modulo THREADS
        let models: Vec<std::collections::BTreeMap<u64, u8>> = std::thread::scope(|scope| {
            let threads: Vec<_> = (0..THREADS)
                .map(|me| {
                    scope.spawn(move || {
                        let writer = disk.writer().unwrap();
                        let mut model = std::collections::BTreeMap::new();
                        let mut state = seed * 7919 + me + 1;
                        for step in 0..800u64 {
                            state ^= state << 13;
                            state ^= state >> 7;
                            state ^= state << 17;
                            // few grains of many tables, so that they meet
                            let table = if step % 4 == 0 { state / 64 % 3 } else { state / 64 % 400 };
                            let at = table * coverage + state % 5 * 8 + (state / 5 % 2) * THREADS + me;
                            let fill = (step % 255) as u8 + 1;
                            match state % 16 {
                                0 => {
                                    writer.zero(Lba(at)..Lba(at + 1), state % 32 == 0).unwrap();
                                    model.insert(at, 0);
                                }
                                1 => {
                                    let seen = read(disk, at).unwrap();
                                    assert_eq!(seen, [model.get(&at).copied().unwrap_or(0); 512], "sector {at}");
                                }
                                2 if step % 8 == 0 => writer.flush().unwrap(),
                                3 if step % 128 == 0 => writer.close().unwrap(),
                                _ => {
                                    writer.write_at(Lba(at), &[fill; 512]).unwrap();
                                    model.insert(at, fill);
                                }
                            }
                        }
                        model
                    })
                })
                .collect();
            threads.into_iter().map(|t| t.join().unwrap()).collect()
        });
        disk.writer().unwrap().flush().unwrap();
        let compare = |disk: &VmdkDisk| {
            for (at, fill) in models.iter().flatten() {
                assert_eq!(read(disk, *at).unwrap(), [*fill; 512], "seed {seed}, sector {at}");
            }
        };
        compare(disk);
        disk.writer().unwrap().close().unwrap();
        // a second look, through the locks of the first
        let policy = Arc::new(OpenPolicy { allow: Vec::new(), lock: false });
        let again = open_user_path(&path, policy, Access::Read).unwrap();
        let again = VmdkDisk::open(again, OpenOptions::default()).unwrap();
        compare(&again);
        assert_eq!(vmdkfuse::vmdk::check(&again).errors, Vec::<String>::new());
    }
}
