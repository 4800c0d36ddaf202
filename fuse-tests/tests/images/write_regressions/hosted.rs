//! Hosted sparse images built field by field.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::Path;

use fuse_tests::make::SECTOR;
use fuse_tests::make::write::{F_NEWLINE, F_REDUNDANT, F_ZEROED, Header};

/// A hosted sparse file with a free choice of each header field. Positions and sizes are in sectors.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Hosted {
    pub(crate) capacity: u64,
    pub(crate) grain: u64,
    pub(crate) entries: u32,
    /// First sector and number of sectors; sector 0: no embedded descriptor.
    pub(crate) descriptor: (u64, u64),
    pub(crate) redundant: Option<u64>,
    pub(crate) directory: u64,
    pub(crate) overhead: u64,
    pub(crate) unclean: bool,
    /// A grain entry of 1 means a zeroed grain.
    pub(crate) zeroed: bool,
}

impl Default for Hosted {
    /// 64 MiB: two tables of 512 grains of 64 KiB each, directories of one sector.
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
    /// Returns the header with the chosen fields.
    fn header(&self) -> Header {
        let redundant = if self.redundant.is_some() { F_REDUNDANT } else { 0 };
        let zeroed = if self.zeroed { F_ZEROED } else { 0 };
        Header {
            version: if self.zeroed { 2 } else { 1 },
            flags: F_NEWLINE | redundant | zeroed,
            capacity: self.capacity,
            grain: self.grain,
            desc_at: self.descriptor.0,
            desc_len: self.descriptor.1,
            ngte: self.entries,
            rgd: self.redundant.unwrap_or(0),
            gd: self.directory,
            overhead: self.overhead,
            unclean: self.unclean,
            compression: 0,
        }
    }

    /// Creates a file of `sectors` with the header and, unless `descriptor` is (0, 0), the descriptor `text`.
    pub(crate) fn make(&self, path: &Path, text: &str, sectors: u64) -> File {
        let file = File::options()
            .read(true)
            .write(true)
            .create(true)
            .truncate(true)
            .open(path)
            .unwrap();
        file.set_len(sectors * SECTOR).unwrap();
        file.write_all_at(&self.header().bytes(), 0).unwrap();
        if self.descriptor.0 != 0 {
            assert!(text.len() as u64 <= self.descriptor.1 * SECTOR);
            file.write_all_at(text.as_bytes(), self.descriptor.0 * SECTOR).unwrap();
        }
        file
    }

    /// Creates a disk without a parent by [`make`](Self::make).
    pub(crate) fn make_base(&self, path: &Path, sectors: u64) -> File {
        let extent = format!("RW {} SPARSE \"x.vmdk\"", self.capacity);
        self.make(path, &descriptor(BASE, None, "monolithicSparse", &extent), sectors)
    }

    /// Creates a child of `base.vmdk` by [`make`](Self::make).
    pub(crate) fn make_child(&self, path: &Path, sectors: u64) -> File {
        let extent = format!("RW {} SPARSE \"child.vmdk\"", self.capacity);
        self.make(
            path,
            &descriptor("00000001", Some(BASE), "monolithicSparse", &extent),
            sectors,
        )
    }
}

/// CID of the base.
pub(crate) const BASE: &str = "12345678";

/// Returns a descriptor; with `parent` it is a child of `base.vmdk`, which has that CID.
pub(crate) fn descriptor(cid: &str, parent: Option<&str>, kind: &str, extents: &str) -> String {
    let hint = if parent.is_some() {
        "parentFileNameHint=\"base.vmdk\"\n"
    } else {
        ""
    };
    let parent = parent.unwrap_or("ffffffff");
    format!(
        "# Disk DescriptorFile\nversion=1\nCID={cid}\nparentCID={parent}\ncreateType=\"{kind}\"\n{hint}{extents}\n\
         ddb.adapterType = \"ide\"\n"
    )
}

/// Creates `base.vmdk` with one flat extent full of zeroes, and returns the file of that extent.
pub(crate) fn flat_base(dir: &Path, cid: &str, capacity: u64) -> File {
    let extent = format!("RW {capacity} FLAT \"base-flat.vmdk\" 0");
    fs::write(dir.join("base.vmdk"), descriptor(cid, None, "monolithicFlat", &extent)).unwrap();
    let flat = File::create(dir.join("base-flat.vmdk")).unwrap();
    flat.set_len(capacity * SECTOR).unwrap();
    flat
}

/// Writes entry `index` of the directory or table at `sector`.
pub(crate) fn put_u32(file: &File, sector: u64, index: u64, value: u64) {
    file.write_all_at(
        &u32::try_from(value).unwrap().to_le_bytes(),
        sector * SECTOR + index * 4,
    )
    .unwrap();
}
