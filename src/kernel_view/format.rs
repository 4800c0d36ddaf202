//! The on-disk form of EROFS, as far as one file in chunks over other files needs it.
//!
//! ```text
//!   1024   superblock (128 bytes) ─ one slot a device (128 bytes each)
//!   next block   the root folder: ".", "..", "disk"
//!   next block   inodes: the root folder's, the disk's ─ directly behind it one entry (8 bytes) a chunk
//! ```
//! All numbers are little endian; addresses count blocks. The source is the kernel's documentation of EROFS
//! (`Documentation/filesystems/erofs.rst`) and the layout that it links to.

use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{Immutable, IntoBytes};

use crate::block::SECTOR;

/// The name of the one file.
pub(super) const FILE: &str = "disk";

/// The block address that means a hole.
pub(super) const HOLE: u32 = u32::MAX;

/// The largest chunk, as a power of two of blocks: five bits hold it.
pub(super) const MAX_CHUNK_BITS: u32 = 31;

/// The most devices: their number is 16 bits wide, and 0 is the index itself.
pub(super) const MAX_DEVICES: usize = u16::MAX as usize;

const SUPERBLOCK_AT: u64 = 1024;
const SLOT: u64 = 128;
const MAGIC: u32 = 0xe0f5_e1e2;
/// Incompatible features: files in chunks, a table of devices.
const FEATURES: u32 = 0x4 | 0x8;
/// Inode numbers count 32 bytes from the first block of inodes; 0 and 1 stay empty, some tools take 0 for none.
const NID: u64 = 32;
const ROOT_NID: u16 = 2;
const FILE_NID: u16 = 4;
const INODE: u64 = 64;
/// Inodes are of the long form; the data of the folder lie in whole blocks, those of the file in chunks.
const FORMAT_PLAIN: u16 = 1;
const FORMAT_CHUNKS: u16 = 1 | 4 << 1;
/// Chunk entries have a device.
const CHUNK_INDEXES: u32 = 0x20;

/// Blocks of the file system: a power of two of bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Block {
    /// 512 bytes: a grain may start at any sector of the first 2 TiB of its file.
    Sector,
    /// 4096 bytes: all grains start at multiples of it, in the first 16 TiB of their files.
    Page,
}

impl Block {
    /// log2 of its sectors.
    pub(super) fn sector_bits(self) -> u32 {
        match self {
            Self::Sector => 0,
            Self::Page => 3,
        }
    }

    /// Its bytes.
    pub(super) fn bytes(self) -> u64 {
        SECTOR << self.sector_bits()
    }
}

/// Where a chunk is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, IntoBytes, Immutable)]
#[repr(C)]
pub(super) struct Entry {
    high: U16,
    device: U16,
    block: U32,
}

impl Entry {
    /// Bytes of one.
    pub(super) const BYTES: u64 = size_of::<Self>() as u64;

    /// A chunk that reads as zeroes.
    pub(super) const fn hole() -> Self {
        Self {
            high: U16::ZERO,
            device: U16::ZERO,
            block: U32::new(HOLE),
        }
    }

    /// A chunk that starts at `block` of a device; devices count from 0 here.
    pub(super) const fn at(device: u16, block: u32) -> Self {
        Self {
            high: U16::ZERO,
            device: U16::new(device + 1),
            block: U32::new(block),
        }
    }

    /// The block that it starts at; `None`: a hole.
    pub(super) fn block(self) -> Option<u32> {
        Some(self.block.get()).filter(|&b| b != HOLE)
    }

    /// The same device at another block.
    pub(super) fn moved_to(self, block: u32) -> Self {
        Self {
            block: U32::new(block),
            ..self
        }
    }
}

/// All that stands before the entries.
pub(super) struct Head {
    /// Of the file system.
    pub(super) block: Block,
    /// Bytes of the disk.
    pub(super) bytes: u64,
    /// log2 of the blocks of a chunk.
    pub(super) chunk_bits: u32,
    /// Number of chunks.
    pub(super) chunks: u64,
    /// Sectors of each device.
    pub(super) devices: Vec<u64>,
}

#[derive(IntoBytes, Immutable)]
#[repr(C)]
struct Superblock {
    magic: U32,
    checksum: U32,
    compatible: U32,
    block_bits: u8,
    extension_slots: u8,
    root: U16,
    inodes: U64,
    build_time: U64,
    build_nanoseconds: U32,
    blocks: U32,
    meta_block: U32,
    xattr_block: U32,
    uuid: [u8; 16],
    volume: [u8; 16],
    incompatible: U32,
    algorithms: U16,
    devices: U16,
    device_slot: U16,
    directory_bits: u8,
    rest: [u8; 37],
}

#[derive(IntoBytes, Immutable)]
#[repr(C)]
struct Slot {
    tag: [u8; 64],
    blocks: U32,
    mapped: U32,
    rest: [u8; 56],
}

#[derive(IntoBytes, Immutable)]
#[repr(C)]
struct Inode {
    format: U16,
    xattrs: U16,
    mode: U16,
    high: U16,
    size: U64,
    place: U32,
    number: U32,
    uid: U32,
    gid: U32,
    mtime: U64,
    mtime_nanoseconds: U32,
    links: U32,
    rest: [u8; 16],
}

#[derive(IntoBytes, Immutable)]
#[repr(C)]
struct Name {
    nid: U64,
    at: U16,
    kind: u8,
    rest: u8,
}

const _: () = assert!(size_of::<Superblock>() as u64 == SLOT && size_of::<Slot>() as u64 == SLOT);
const _: () = assert!(size_of::<Inode>() as u64 == INODE);

/// Where the entries start, in bytes of the image, with so many devices.
pub(super) fn entries_at(block: Block, devices: usize) -> u64 {
    meta_at(block, devices) + u64::from(FILE_NID) * NID + INODE
}

fn folder_at(block: Block, devices: usize) -> u64 {
    (SUPERBLOCK_AT + SLOT + devices as u64 * SLOT).next_multiple_of(block.bytes())
}

fn meta_at(block: Block, devices: usize) -> u64 {
    folder_at(block, devices) + block.bytes()
}

impl Head {
    /// Bytes of the whole image, in whole blocks.
    pub(super) fn image_bytes(&self) -> u64 {
        let end = entries_at(self.block, self.devices.len()) + self.chunks * Entry::BYTES;
        end.next_multiple_of(self.block.bytes())
    }

    /// The bytes before the entries.
    pub(super) fn to_bytes(&self) -> Vec<u8> {
        let count = self.devices.len();
        let mut out = vec![0; SUPERBLOCK_AT as usize];
        out.extend_from_slice(self.superblock().as_bytes());
        for sectors in &self.devices {
            let blocks = sectors.div_ceil(1 << self.block.sector_bits());
            let slot = Slot {
                tag: [0; 64],
                blocks: U32::new(blocks as u32),
                mapped: U32::ZERO,
                rest: [0; 56],
            };
            out.extend_from_slice(slot.as_bytes());
        }
        out.resize(folder_at(self.block, count) as usize, 0);
        let names = names();
        out.extend_from_slice(&names);
        out.resize(
            meta_at(self.block, count) as usize + usize::from(ROOT_NID) * NID as usize,
            0,
        );
        let folder_block = (folder_at(self.block, count) / self.block.bytes()) as u32;
        out.extend_from_slice(inode(FORMAT_PLAIN, 0o040_555, names.len() as u64, folder_block, ROOT_NID).as_bytes());
        let chunks = self.chunk_bits | CHUNK_INDEXES;
        out.extend_from_slice(inode(FORMAT_CHUNKS, 0o100_444, self.bytes, chunks, FILE_NID).as_bytes());
        out
    }

    fn superblock(&self) -> Superblock {
        let count = self.devices.len();
        Superblock {
            magic: U32::new(MAGIC),
            checksum: U32::ZERO,
            compatible: U32::ZERO,
            block_bits: self.block.bytes().trailing_zeros() as u8,
            extension_slots: 0,
            root: U16::new(ROOT_NID),
            inodes: U64::new(2),
            build_time: U64::ZERO,
            build_nanoseconds: U32::ZERO,
            blocks: U32::new((self.image_bytes() / self.block.bytes()) as u32),
            meta_block: U32::new((meta_at(self.block, count) / self.block.bytes()) as u32),
            xattr_block: U32::ZERO,
            uuid: [0; 16],
            volume: [0; 16],
            incompatible: U32::new(FEATURES),
            algorithms: U16::ZERO,
            devices: U16::new(count as u16),
            device_slot: U16::new(((SUPERBLOCK_AT + SLOT) / SLOT) as u16),
            directory_bits: 0,
            rest: [0; 37],
        }
    }
}

fn inode(format: u16, mode: u16, size: u64, place: u32, number: u16) -> Inode {
    Inode {
        format: U16::new(format),
        xattrs: U16::ZERO,
        mode: U16::new(mode),
        high: U16::ZERO,
        size: U64::new(size),
        place: U32::new(place),
        number: U32::new(number.into()),
        uid: U32::ZERO,
        gid: U32::ZERO,
        mtime: U64::ZERO,
        mtime_nanoseconds: U32::ZERO,
        links: U32::new(if mode & 0o040_000 != 0 { 2 } else { 1 }),
        rest: [0; 16],
    }
}

/// The block of the root folder: entries in byte order of their names, then the names.
fn names() -> Vec<u8> {
    const KIND_FILE: u8 = 1;
    const KIND_FOLDER: u8 = 2;
    let entries = [
        (".", ROOT_NID, KIND_FOLDER),
        ("..", ROOT_NID, KIND_FOLDER),
        (FILE, FILE_NID, KIND_FILE),
    ];
    let mut at = entries.len() * size_of::<Name>();
    let (mut out, mut text) = (Vec::new(), Vec::new());
    for (name, nid, kind) in entries {
        let entry = Name {
            nid: U64::new(nid.into()),
            at: U16::new(at as u16),
            kind,
            rest: 0,
        };
        out.extend_from_slice(entry.as_bytes());
        text.extend_from_slice(name.as_bytes());
        at += name.len();
    }
    out.extend(text);
    out
}
