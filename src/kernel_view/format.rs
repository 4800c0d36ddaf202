//! On-disk format of EROFS, as far as one file in chunks over other files needs it.
//!
//! ```text
//!   1024   superblock (128 bytes) ─ one slot per device (128 bytes each)
//!   next block   the root directory: ".", "..", "disk"
//!   next block   inodes: the root directory's, the disk's ─ directly after it one entry (8 bytes) per chunk
//! ```
//! All numbers are little endian; addresses count blocks. The source is the kernel's documentation of EROFS
//! (`Documentation/filesystems/erofs.rst`) and the layout that it links to.
//!
//! Only code that writes the format is here: the kernel reads it. `index.rs` checks block addresses, the size of a
//! chunk and the number of devices against the bounds below.

use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{Immutable, IntoBytes};

use crate::block::SECTOR;

/// Name of the only file.
pub(super) const FILE: &str = "disk";

/// Block address that marks a hole.
pub(super) const HOLE: u32 = u32::MAX;

/// Largest chunk, as a power of two of blocks: the format has five bits for it.
pub(super) const MAX_CHUNK_BITS: u32 = 31;

/// Largest number of devices: the format has 16 bits for their number, and 0 is the index itself.
pub(super) const MAX_DEVICES: usize = u16::MAX as usize;

const SUPERBLOCK_AT: u64 = 1024;
/// Bytes of the superblock, and of each device slot after it.
const SLOT_BYTES: u64 = 128;
const MAGIC: u32 = 0xe0f5_e1e2;
/// Incompatible features: chunked files (0x4), device table (0x8).
const FEATURES: u32 = 0x4 | 0x8;
/// Bytes that an inode number counts, from the first block of inodes. 0 and 1 stay unused: some tools take 0 for none.
const NID_BYTES: u64 = 32;
const ROOT_NID: u16 = 2;
const FILE_NID: u16 = 4;
const INODE_BYTES: u64 = 64;
/// Format of an inode: bit 0 set for the extended form, then the data layout: 0 for plain blocks, 4 for chunks.
const FORMAT_PLAIN: u16 = 1;
const FORMAT_CHUNKS: u16 = 1 | 4 << 1;
/// Bit of the chunk format: chunk entries have a device.
const CHUNK_INDEXES: u32 = 0x20;

/// Block size of the file system.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Block {
    /// 512 bytes: a chunk may start at any sector in the first 2 TiB of its file.
    Sector,
    /// 4096 bytes: every chunk starts at a multiple of it, in the first 16 TiB of its file.
    Page,
}

impl Block {
    /// Returns log2 of the sectors of a block.
    pub(super) fn sector_bits(self) -> u32 {
        match self {
            Self::Sector => 0,
            Self::Page => 3,
        }
    }

    /// Returns the bytes of a block.
    pub(super) fn bytes(self) -> u64 {
        SECTOR << self.sector_bits()
    }
}

/// Location of a chunk, as in the image.
#[derive(Debug, Clone, Copy, PartialEq, Eq, IntoBytes, Immutable)]
#[repr(C)]
pub(super) struct ChunkEntry {
    high: U16,
    device: U16,
    block: U32,
}

impl ChunkEntry {
    /// Bytes of one entry.
    pub(super) const BYTES: u64 = size_of::<Self>() as u64;

    /// Creates the entry of a chunk that reads as zeroes.
    pub(super) const fn hole() -> Self {
        Self {
            high: U16::ZERO,
            device: U16::ZERO,
            block: U32::new(HOLE),
        }
    }

    /// Creates the entry of a chunk that starts at `block` of a device. Devices count from 0 here, from 1 in the image.
    pub(super) const fn at(device: u16, block: u32) -> Self {
        Self {
            high: U16::ZERO,
            device: U16::new(device + 1),
            block: U32::new(block),
        }
    }

    /// Returns the first block of the chunk; `None` for a hole.
    pub(super) fn block(self) -> Option<u32> {
        Some(self.block.get()).filter(|&b| b != HOLE)
    }

    /// Returns an entry of the same device at another block.
    pub(super) fn moved_to(self, block: u32) -> Self {
        Self {
            block: U32::new(block),
            ..self
        }
    }
}

/// Everything before the chunk entries.
pub(super) struct ImageHead {
    /// Block size of the file system.
    pub(super) block: Block,
    /// Size of the disk in bytes.
    pub(super) bytes: u64,
    /// log2 of the blocks of a chunk.
    pub(super) chunk_bits: u32,
    /// Number of chunks.
    pub(super) chunks: u64,
    /// Size of each device in sectors.
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
struct DeviceSlot {
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
    data: U32,
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
struct DirEntry {
    nid: U64,
    at: U16,
    kind: u8,
    rest: u8,
}

const _: () = assert!(size_of::<Superblock>() as u64 == SLOT_BYTES && size_of::<DeviceSlot>() as u64 == SLOT_BYTES);
const _: () = assert!(size_of::<Inode>() as u64 == INODE_BYTES);

/// Returns the offset of the chunk entries in the image, in bytes.
pub(super) fn chunk_entries_at(block: Block, devices: usize) -> u64 {
    inodes_at(block, devices) + u64::from(FILE_NID) * NID_BYTES + INODE_BYTES
}

fn directory_at(block: Block, devices: usize) -> u64 {
    (SUPERBLOCK_AT + SLOT_BYTES + devices as u64 * SLOT_BYTES).next_multiple_of(block.bytes())
}

fn inodes_at(block: Block, devices: usize) -> u64 {
    directory_at(block, devices) + block.bytes()
}

impl ImageHead {
    /// Returns the size of the whole image in bytes, a multiple of the block size.
    pub(super) fn image_bytes(&self) -> u64 {
        let end = chunk_entries_at(self.block, self.devices.len()) + self.chunks * ChunkEntry::BYTES;
        end.next_multiple_of(self.block.bytes())
    }

    /// Returns the bytes of the image before the chunk entries.
    pub(super) fn to_bytes(&self) -> Vec<u8> {
        let count = self.devices.len();
        let mut out = vec![0; SUPERBLOCK_AT as usize];
        out.extend_from_slice(self.superblock().as_bytes());
        for sectors in &self.devices {
            // For a reader of the table alone: chunks name their device, and then the kernel does not compare with this
            // number. So a file above 16 TiB, whose number does not fit, does no harm.
            let blocks = sectors.div_ceil(1 << self.block.sector_bits());
            let slot = DeviceSlot {
                tag: [0; 64],
                blocks: U32::new(blocks as u32),
                mapped: U32::ZERO,
                rest: [0; 56],
            };
            out.extend_from_slice(slot.as_bytes());
        }
        out.resize(directory_at(self.block, count) as usize, 0);
        let names = root_directory();
        out.extend_from_slice(&names);
        out.resize(
            inodes_at(self.block, count) as usize + usize::from(ROOT_NID) * NID_BYTES as usize,
            0,
        );
        let directory_block = (directory_at(self.block, count) / self.block.bytes()) as u32;
        // `data` is the block address of a plain inode, and for chunks their format.
        out.extend_from_slice(inode(FORMAT_PLAIN, 0o040_555, names.len() as u64, directory_block, ROOT_NID).as_bytes());
        let chunks = self.chunk_bits | CHUNK_INDEXES;
        out.extend_from_slice(inode(FORMAT_CHUNKS, 0o100_444, self.bytes, chunks, FILE_NID).as_bytes());
        out
    }

    fn superblock(&self) -> Superblock {
        let count = self.devices.len();
        Superblock {
            magic: U32::new(MAGIC),
            // Zero, as the feature bit of checksums is not set in `compatible`: the kernel then does not verify it.
            checksum: U32::ZERO,
            compatible: U32::ZERO,
            block_bits: self.block.bytes().trailing_zeros() as u8,
            extension_slots: 0,
            root: U16::new(ROOT_NID),
            inodes: U64::new(2),
            build_time: U64::ZERO,
            build_nanoseconds: U32::ZERO,
            blocks: U32::new((self.image_bytes() / self.block.bytes()) as u32),
            meta_block: U32::new((inodes_at(self.block, count) / self.block.bytes()) as u32),
            xattr_block: U32::ZERO,
            uuid: [0; 16],
            volume: [0; 16],
            incompatible: U32::new(FEATURES),
            algorithms: U16::ZERO,
            devices: U16::new(count as u16),
            // Counts in units of a slot: the table starts right behind the superblock.
            device_slot: U16::new(((SUPERBLOCK_AT + SLOT_BYTES) / SLOT_BYTES) as u16),
            // A directory block is one block of the file system.
            directory_bits: 0,
            rest: [0; 37],
        }
    }
}

fn inode(format: u16, mode: u16, size: u64, data: u32, number: u16) -> Inode {
    Inode {
        format: U16::new(format),
        xattrs: U16::ZERO,
        mode: U16::new(mode),
        high: U16::ZERO,
        size: U64::new(size),
        data: U32::new(data),
        number: U32::new(number.into()),
        uid: U32::ZERO,
        gid: U32::ZERO,
        mtime: U64::ZERO,
        mtime_nanoseconds: U32::ZERO,
        // A directory has its name and its own ".".
        links: U32::new(if mode & 0o040_000 != 0 { 2 } else { 1 }),
        rest: [0; 16],
    }
}

/// Returns the block of the root directory: entries in byte order of their names, then the names.
fn root_directory() -> Vec<u8> {
    // The kernel's numbers of file types (FT_REG_FILE, FT_DIR), not those of `st_mode`.
    const KIND_FILE: u8 = 1;
    const KIND_DIRECTORY: u8 = 2;
    let entries = [
        (".", ROOT_NID, KIND_DIRECTORY),
        ("..", ROOT_NID, KIND_DIRECTORY),
        // In byte order, as the kernel searches names by bisection: "." before ".." before "disk".
        (FILE, FILE_NID, KIND_FILE),
    ];
    let mut at = entries.len() * size_of::<DirEntry>();
    let (mut out, mut text) = (Vec::new(), Vec::new());
    for (name, nid, kind) in entries {
        let entry = DirEntry {
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
