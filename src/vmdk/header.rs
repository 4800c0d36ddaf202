//! Headers of the binary extent formats, and the checks that make them safe to use.
//!
//! ```text
//!   bytes ──zerocopy──► RawHosted · RawCowd · RawSeSparse     layout of the file, unchecked, private
//!                           │ parse: versions, flags, bounds
//!                           ▼
//!                       Hosted · Cowd · SeSparse              checked
//! ```
//! Each `parse` bounds all numbers that later become allocations or loop limits, and checks against the length of the
//! file what it can, so that the rest of the engine uses them without further checks. All integers are little-endian.
//!
//! Sources: VMware "Virtual Disk Format 5.0" for KDMV and COWD; files written by ESXi for seSparse.

use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use crate::block::{MAX_SECTORS, SECTOR};
use crate::error::{Error, Result};

/// First bytes of a hosted sparse extent.
pub(crate) const KDMV_MAGIC: &[u8; 4] = b"KDMV";
/// First bytes of a hosted sparse extent that its writer has not finished.
pub(crate) const KDMV_UNFINISHED: &[u8; 4] = b"kdmv";
/// First bytes of an ESX sparse extent.
pub(crate) const COWD_MAGIC: &[u8; 4] = b"COWD";
/// First bytes of a seSparse extent.
pub(crate) const SESPARSE_MAGIC: &[u8; 8] = &[0xbe, 0xba, 0xfe, 0xca, 0, 0, 0, 0];

/// Number of bytes at the start of a file that are enough to detect its format and parse its first header. COWD has the
/// longest one.
pub(crate) const HEAD_BYTES: usize = 2048;

/// Maximum number of directory entries, the same as in qemu: 2^25, a directory of 128 MiB.
pub(crate) const MAX_DIRECTORY_ENTRIES: u64 = 1 << 25;
/// Maximum size of a grain in sectors: 8 MiB, as several grains are in memory at once.
const MAX_GRAIN_SECTORS: u64 = 1 << 14;
/// Maximum size of an embedded descriptor in sectors: 10 MiB, the limit of VirtualBox. VMware writes 10 KiB.
const MAX_DESCRIPTOR_SECTORS: u64 = 20480;

const FLAG_NEWLINE: u32 = 1;
const FLAG_REDUNDANT: u32 = 1 << 1;
const FLAG_ZEROED_GRAINS: u32 = 1 << 2;
const FLAG_COMPRESSED: u32 = 1 << 16;
const FLAG_MARKERS: u32 = 1 << 17;
/// Incompatible flags that are unknown here. They are the high half of the flags: a reader that does not know one of
/// them would misread the extent.
const UNKNOWN_INCOMPATIBLE: u32 = !0xffff & !(FLAG_COMPRESSED | FLAG_MARKERS);

/// Value of `gdOffset` that means: the footer names the directory.
const GD_AT_END: u64 = u64::MAX;

#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct RawHosted {
    magic: [u8; 4],
    version: U32,
    flags: U32,
    capacity: U64,
    grain_size: U64,
    descriptor_offset: U64,
    descriptor_size: U64,
    gtes_per_gt: U32,
    rgd_offset: U64,
    gd_offset: U64,
    overhead: U64,
    unclean: u8,
    newline: [u8; 4],
    compression: U16,
    pad: [u8; 433],
}

#[derive(FromBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct RawCowd {
    magic: [u8; 4],
    version: U32,
    flags: U32,
    sectors: U32,
    grain_size: U32,
    gd_offset: U32,
    gd_entries: U32,
    free_sector: U32,
}

#[derive(FromBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct RawSeSparse {
    magic: U64,
    version: U64,
    capacity: U64,
    grain_size: U64,
    table_size: U64,
    flags: U64,
    reserved: [U64; 4],
    volatile_offset: U64,
    volatile_size: U64,
    journal_header_offset: U64,
    journal_header_size: U64,
    journal_offset: U64,
    journal_size: U64,
    directory_offset: U64,
    directory_size: U64,
    tables_offset: U64,
    tables_size: U64,
    bitmap_offset: U64,
    bitmap_size: U64,
    backmap_offset: U64,
    backmap_size: U64,
    grains_offset: U64,
    grains_size: U64,
}

#[derive(FromBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct RawSeVolatile {
    magic: U64,
    free_table: U64,
    next_transaction: U64,
    replay_journal: U64,
}

/// Position of the grain directory of a hosted extent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum DirectoryAt {
    /// The directory starts at this sector of the file.
    Sector(u64),
    /// The footer at the end of the file names the sector.
    Footer,
}

/// Offset of the in-use mark in the header of a hosted extent: the byte is 1 while the file is open for writing.
pub(crate) const UNCLEAN_AT: u64 = 72;

/// Offset of the version and of the flags after it in the header of a hosted extent.
pub(crate) const VERSION_AT: u64 = 4;

/// Returns version and flags of a hosted header, 8 bytes, with zeroed grains enabled.
pub(crate) fn with_zeroed_grains([_, _, _, _, flags @ ..]: [u8; 8]) -> [u8; 8] {
    let flags = u32::from_le_bytes(flags) | FLAG_ZEROED_GRAINS;
    // The version comes first in the file, so it is the lower half. 2 is the first version that defines entries of 1.
    (u64::from(flags) << 32 | 2).to_le_bytes()
}

/// Checked header or footer of a hosted sparse extent.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Hosted {
    pub(crate) version: u32,
    /// Sectors of the extent; 0 if the file only holds a descriptor.
    pub(crate) capacity: u64,
    /// Sectors of a grain, a power of two.
    pub(crate) grain: u64,
    /// First sector and number of sectors of the embedded descriptor.
    pub(crate) descriptor: Option<(u64, u64)>,
    /// Entries of a grain table, a power of two.
    pub(crate) entries_per_table: u64,
    pub(crate) redundant: Option<u64>,
    pub(crate) directory: DirectoryAt,
    /// Sectors of metadata at the start of the file; advisory.
    pub(crate) overhead: u64,
    pub(crate) unclean: bool,
    /// True if a grain table entry of 1 means a zero grain.
    pub(crate) zeroed_grains: bool,
    pub(crate) compressed: bool,
    /// True if each compressed grain starts with its LBA (a marker).
    pub(crate) markers: bool,
}

/// Position of a hosted header in its file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Role {
    /// The first sector of the file.
    Header,
    /// The copy near the end of a stream.
    Footer,
}

impl Hosted {
    /// Parses the 512 bytes of a header or footer. `file_len` is the length of the whole file in bytes.
    ///
    /// Errors: `Corrupt` or `Unsupported`, naming the field by its byte; the caller adds the file.
    pub(crate) fn parse(bytes: &[u8], file_len: u64, role: Role) -> Result<Self> {
        let part = if role == Role::Header { "header" } else { "footer" };
        let (raw, _) = RawHosted::ref_from_prefix(bytes)
            .ok()
            .ok_or_else(|| Error::corrupt(format!("{part}: {} bytes, expected 512", bytes.len())))?;
        if &raw.magic != KDMV_MAGIC {
            return Err(Error::corrupt(format!("{part}: no KDMV magic (byte 0)")));
        }
        // First of all: version and flags decide what the other fields mean.
        let flags = check_hosted_flags(raw, part)?;
        let mut header = Self {
            version: raw.version.get(),
            capacity: raw.capacity.get(),
            grain: raw.grain_size.get(),
            descriptor: None,
            entries_per_table: raw.gtes_per_gt.get().into(),
            redundant: None,
            directory: match raw.gd_offset.get() {
                // Only the first header of a stream may have it; the footer is checked for that by `StreamTail::parse`.
                GD_AT_END => DirectoryAt::Footer,
                sector => DirectoryAt::Sector(sector),
            },
            overhead: raw.overhead.get(),
            unclean: raw.unclean != 0,
            zeroed_grains: flags & FLAG_ZEROED_GRAINS != 0,
            compressed: flags & FLAG_COMPRESSED != 0,
            markers: flags & FLAG_MARKERS != 0,
        };
        let file_sectors = file_len.div_ceil(SECTOR);
        // A footer repeats these fields of the first header, which alone counts.
        if raw.descriptor_offset.get() != 0 && role == Role::Header {
            header.descriptor = Some(check_descriptor(
                raw.descriptor_offset.get(),
                raw.descriptor_size.get(),
                file_sectors,
            )?);
        }
        // An extent of capacity 0 is a container for a descriptor: its other fields are not used.
        if header.capacity == 0 && header.descriptor.is_some() {
            return Ok(header);
        }
        header.check_geometry(part)?;
        // A writer allocates behind the overhead. One beyond the end of the file would make the first write extend the
        // file by whatever the number says.
        if role == Role::Header && header.overhead > file_sectors {
            return Err(Error::corrupt(format!(
                "header: {} sectors of metadata (overHead, byte 64), but the file has {file_sectors}",
                header.overhead
            )));
        }
        // Without the flag `rgdOffset` has no meaning, whatever number is in it.
        if flags & FLAG_REDUNDANT != 0 {
            header.redundant = Some(raw.rgd_offset.get());
        }
        Ok(header)
    }

    /// Returns the number of grain tables that the capacity needs.
    pub(crate) fn tables(&self) -> u64 {
        self.capacity.div_ceil(self.grain * self.entries_per_table)
    }

    /// Encodes the header as the sector that [`Self::parse`] decodes. `magic` is [`KDMV_MAGIC`], or [`KDMV_UNFINISHED`]
    /// until the file is complete.
    pub(crate) fn to_bytes(&self, magic: &[u8; 4]) -> Vec<u8> {
        let bit = |set: bool, bit: u32| if set { bit } else { 0 };
        let (descriptor_offset, descriptor_size) = self.descriptor.unwrap_or((0, 0));
        let raw = RawHosted {
            magic: *magic,
            version: self.version.into(),
            flags: (FLAG_NEWLINE
                | bit(self.redundant.is_some(), FLAG_REDUNDANT)
                | bit(self.zeroed_grains, FLAG_ZEROED_GRAINS)
                | bit(self.compressed, FLAG_COMPRESSED)
                | bit(self.markers, FLAG_MARKERS))
            .into(),
            capacity: self.capacity.into(),
            grain_size: self.grain.into(),
            descriptor_offset: descriptor_offset.into(),
            descriptor_size: descriptor_size.into(),
            gtes_per_gt: (self.entries_per_table as u32).into(),
            rgd_offset: self.redundant.unwrap_or(0).into(),
            gd_offset: match self.directory {
                DirectoryAt::Sector(sector) => sector,
                DirectoryAt::Footer => GD_AT_END,
            }
            .into(),
            overhead: self.overhead.into(),
            unclean: self.unclean.into(),
            // Every conversion of line ends changes one of these bytes, so that a transfer in text mode is found.
            newline: *b"\n \r\n",
            compression: u16::from(self.compressed).into(),
            pad: [0; 433],
        };
        raw.as_bytes().to_vec()
    }

    fn check_geometry(&self, part: &str) -> Result<()> {
        check_grain(self.grain, part)?;
        let n = self.entries_per_table;
        // VMware writes 512. The bounds are tables of one sector, and of 256 KiB, as many tables are in memory at once.
        if !n.is_power_of_two() || !(128..=1 << 16).contains(&n) {
            return Err(Error::corrupt(format!(
                "{part}: numGTEsPerGT (byte 44) is {n}, expected a power of two from 128 to 65536"
            )));
        }
        check_capacity(self.capacity, part)?;
        let tables = self.tables();
        if tables > MAX_DIRECTORY_ENTRIES {
            return Err(Error::corrupt(format!(
                "{part}: a capacity of {} sectors needs a grain directory of {tables} entries, more than {MAX_DIRECTORY_ENTRIES}",
                self.capacity
            )));
        }
        Ok(())
    }
}

/// Checks the version, the flags, the newline bytes and the compression, on which the meaning of the other fields
/// depends. Returns the flags.
fn check_hosted_flags(raw: &RawHosted, part: &str) -> Result<u32> {
    let (version, flags) = (raw.version.get(), raw.flags.get());
    // 1 is the version of the specification, 2 adds zeroed grains, and 3 is that of streams and of disks with changed
    // block tracking.
    if !(1..=3).contains(&version) {
        return Err(Error::unsupported(format!(
            "{part}: version {version} (byte 4), expected 1 to 3"
        )));
    }
    if flags & UNKNOWN_INCOMPATIBLE != 0 {
        return Err(Error::unsupported(format!(
            "{part}: unknown incompatible flags {:#x} (byte 8)",
            flags & UNKNOWN_INCOMPATIBLE
        )));
    }
    if flags & FLAG_NEWLINE != 0 && &raw.newline != b"\n \r\n" {
        return Err(Error::corrupt(format!(
            "{part}: the newline bytes (byte 73) are {:02x?}, expected 0a 20 0d 0a: a transfer in text mode changed the file; copy it again in binary mode",
            raw.newline
        )));
    }
    // A marker stands before compressed data. A plain grain has no room for one, so its data would be read shifted.
    if flags & FLAG_MARKERS != 0 && flags & FLAG_COMPRESSED == 0 {
        return Err(Error::corrupt(format!(
            "{part}: flags {flags:#x} (byte 8) have markers without compression"
        )));
    }
    let compression = raw.compression.get();
    if flags & FLAG_COMPRESSED != 0 && compression != 1 {
        return Err(Error::unsupported(format!(
            "{part}: compression algorithm {compression} (byte 77), expected 1 (deflate)"
        )));
    }
    Ok(flags)
}

fn check_descriptor(offset: u64, size: u64, file_sectors: u64) -> Result<(u64, u64)> {
    // `open.rs` multiplies both by 512 and allocates `size` sectors, so both are bounded here.
    let inside = offset.checked_add(size).is_some_and(|end| end <= file_sectors);
    if size == 0 || size > MAX_DESCRIPTOR_SECTORS || !inside {
        return Err(Error::corrupt(format!(
            "header: a descriptor of {size} sectors at sector {offset} (byte 28), expected 1 to {MAX_DESCRIPTOR_SECTORS} sectors within the file's {file_sectors}"
        )));
    }
    Ok((offset, size))
}

fn check_grain(grain: u64, part: &str) -> Result<()> {
    if grain.is_power_of_two() && grain <= MAX_GRAIN_SECTORS {
        return Ok(());
    }
    Err(Error::corrupt(format!(
        "{part}: a grain of {grain} sectors, expected a power of two of at most {MAX_GRAIN_SECTORS}"
    )))
}

fn check_capacity(capacity: u64, part: &str) -> Result<()> {
    if capacity == 0 || capacity > MAX_SECTORS {
        return Err(Error::corrupt(format!(
            "{part}: a capacity of {capacity} sectors, expected 1 to {MAX_SECTORS}"
        )));
    }
    Ok(())
}

/// Checked header of an ESX sparse (COWD) extent.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Cowd {
    pub(crate) capacity: u64,
    /// Sectors of a grain, a power of two.
    pub(crate) grain: u64,
    /// Sector of the grain directory.
    pub(crate) directory: u64,
    pub(crate) unclean: bool,
}

impl Cowd {
    /// Entries of a grain table; the format has no field for it.
    pub(crate) const ENTRIES_PER_TABLE: u64 = 4096;
    /// Maximum number of directory entries: no capacity needs more, so a larger number is damage.
    const MAX_ENTRIES: u64 = 1 << 20;
    /// Offset of the in-use mark, 4 bytes.
    const UNCLEAN_AT: usize = 1648;

    /// Parses the first 2048 bytes of the file.
    ///
    /// Errors: `Corrupt` or `Unsupported`, naming the field by its byte; the caller adds the file.
    pub(crate) fn parse(bytes: &[u8]) -> Result<Self> {
        let (raw, _) = RawCowd::ref_from_prefix(bytes)
            .ok()
            .filter(|_| bytes.len() >= HEAD_BYTES)
            .ok_or_else(|| Error::corrupt(format!("COWD header: {} bytes, expected {HEAD_BYTES}", bytes.len())))?;
        if &raw.magic != COWD_MAGIC {
            return Err(Error::corrupt("COWD header: no COWD magic"));
        }
        if raw.version.get() != 1 {
            return Err(Error::unsupported(format!(
                "COWD header: version {} (byte 4), expected 1",
                raw.version
            )));
        }
        let (capacity, grain) = (u64::from(raw.sectors.get()), u64::from(raw.grain_size.get()));
        check_grain(grain, "COWD header (byte 16)")?;
        check_capacity(capacity, "COWD header (byte 12)")?;
        let need = capacity.div_ceil(grain * Self::ENTRIES_PER_TABLE);
        let entries = u64::from(raw.gd_entries.get());
        // A directory that is larger than needed is accepted: only its first `need` entries are read.
        if entries < need || entries > Self::MAX_ENTRIES {
            return Err(Error::corrupt(format!(
                "COWD header: {entries} directory entries (byte 24), expected {need} for {capacity} sectors"
            )));
        }
        let unclean = bytes
            .get(Self::UNCLEAN_AT..Self::UNCLEAN_AT + 4)
            .is_some_and(|b| b != [0; 4]);
        Ok(Self {
            capacity,
            grain,
            directory: raw.gd_offset.get().into(),
            unclean,
        })
    }

    /// Returns the number of grain tables that the capacity needs.
    pub(crate) fn tables(&self) -> u64 {
        self.capacity.div_ceil(self.grain * Self::ENTRIES_PER_TABLE)
    }
}

/// Checked header of a seSparse extent. Offsets and sizes are in sectors of the file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct SeSparse {
    pub(crate) capacity: u64,
    pub(crate) directory: u64,
    pub(crate) tables_offset: u64,
    pub(crate) tables_size: u64,
    pub(crate) grains_offset: u64,
}

impl SeSparse {
    /// Sectors of a grain: 4 KiB, the only size that ESXi writes.
    pub(crate) const GRAIN: u64 = 8;
    /// Sectors of a grain table.
    pub(crate) const TABLE_SECTORS: u64 = 64;
    /// Entries of a grain table: 64 sectors of u64.
    pub(crate) const ENTRIES_PER_TABLE: u64 = 4096;
    const VERSION: u64 = 0x0000_0002_0000_0001;
    const VOLATILE_MAGIC: u64 = 0xcafe_cafe;

    /// Parses the constant header (sector 0) and the volatile header (sector 1) in `bytes`. `file_len` is the length of
    /// the whole file in bytes.
    ///
    /// Errors: `Corrupt` or `Unsupported`, naming the field by its byte; the caller adds the file.
    pub(crate) fn parse(bytes: &[u8], file_len: u64) -> Result<Self> {
        let short = || Error::corrupt(format!("seSparse header: {} bytes, expected 1024", bytes.len()));
        let (raw, _) = RawSeSparse::ref_from_prefix(bytes).ok().ok_or_else(short)?;
        let second = bytes.get(SECTOR as usize..).ok_or_else(short)?;
        let (volatile, _) = RawSeVolatile::ref_from_prefix(second).ok().ok_or_else(short)?;
        // Compared as one number: the major version is the upper half, the minor one the lower.
        if raw.version.get() != Self::VERSION {
            return Err(Error::unsupported(format!(
                "seSparse header: version {:#x} (byte 8), expected 2.1",
                raw.version
            )));
        }
        // No flag is documented, and one could change what the entries mean.
        if raw.flags.get() != 0 {
            return Err(Error::unsupported(format!(
                "seSparse header: unknown flags {:#x} (byte 40)",
                raw.flags
            )));
        }
        if raw.grain_size.get() != Self::GRAIN || raw.table_size.get() != Self::TABLE_SECTORS {
            return Err(Error::unsupported(format!(
                "seSparse header: grains of {} and tables of {} sectors (bytes 24, 32), expected {} and {}",
                raw.grain_size,
                raw.table_size,
                Self::GRAIN,
                Self::TABLE_SECTORS
            )));
        }
        // The volatile header was taken from sector 1, so it must lie there.
        if (raw.volatile_offset.get(), raw.volatile_size.get()) != (1, 1) {
            return Err(Error::unsupported(format!(
                "seSparse header: a volatile header of {} sectors at sector {} (byte 80), expected 1 at 1",
                raw.volatile_size, raw.volatile_offset
            )));
        }
        Self::check_volatile(volatile)?;
        check_capacity(raw.capacity.get(), "seSparse header (byte 16)")?;
        Self::check_regions(raw, file_len)
    }

    fn check_volatile(volatile: &RawSeVolatile) -> Result<()> {
        if volatile.magic.get() != Self::VOLATILE_MAGIC {
            return Err(Error::corrupt(format!(
                "seSparse volatile header: magic {:#x} (byte 512), expected 0xcafecafe",
                volatile.magic
            )));
        }
        if volatile.replay_journal.get() != 0 {
            return Err(Error::unsupported(
                "seSparse volatile header: the journal is dirty (byte 536), and only ESXi can replay it: open and close the disk there",
            ));
        }
        Ok(())
    }

    fn check_regions(raw: &RawSeSparse, file_len: u64) -> Result<Self> {
        let file_sectors = file_len / SECTOR;
        let capacity = raw.capacity.get();
        let tables = capacity.div_ceil(Self::GRAIN * Self::ENTRIES_PER_TABLE);
        if tables > MAX_DIRECTORY_ENTRIES {
            return Err(Error::corrupt(format!(
                "seSparse header: a capacity of {capacity} sectors (byte 16) needs {tables} grain tables, more than {MAX_DIRECTORY_ENTRIES}"
            )));
        }
        // The directory has entries of 8 bytes. The product overflows only in a damaged header.
        let entries = raw.directory_size.get().checked_mul(SECTOR / 8);
        let (gd, gd_size) = (raw.directory_offset.get(), raw.directory_size.get());
        let (gt, gt_size) = (raw.tables_offset.get(), raw.tables_size.get());
        for (what, at, size) in [("grain directory", gd, gd_size), ("grain tables", gt, gt_size)] {
            // Sectors 0 and 1 hold the headers.
            if at < 2 || at.checked_add(size).is_none_or(|end| end > file_sectors) {
                return Err(Error::corrupt(format!(
                    "seSparse header: {what}: {size} sectors at sector {at}, but the file has {file_sectors}"
                )));
            }
        }
        if entries.is_none_or(|entries| entries < tables) {
            return Err(Error::corrupt(format!(
                "seSparse header: a directory of {gd_size} sectors (byte 136) is too small for {tables} grain tables"
            )));
        }
        let grains_offset = raw.grains_offset.get();
        // The end of the file is allowed: a delta that was never written to has no grains.
        if grains_offset < 2 || grains_offset > file_sectors {
            return Err(Error::corrupt(format!(
                "seSparse header: grains start at sector {grains_offset} (byte 192), but the file has {file_sectors}"
            )));
        }
        Ok(Self {
            capacity,
            directory: gd,
            tables_offset: gt,
            tables_size: gt_size,
            grains_offset,
        })
    }
}

/// Last three sectors of a stream, which hold its footer.
pub(crate) struct StreamTail;

impl StreamTail {
    /// Bytes of the tail: footer marker, footer, end-of-stream marker.
    pub(crate) const BYTES: u64 = 3 * SECTOR;

    /// Returns the offset of the tail in a file of `file_len` bytes. The length is rounded down to sectors, as some
    /// writers produce files with an odd length.
    ///
    /// Errors: `Corrupt` if the file is too short.
    pub(crate) fn offset(file_len: u64) -> Result<u64> {
        (file_len / SECTOR * SECTOR).checked_sub(Self::BYTES).ok_or_else(|| {
            Error::corrupt(format!(
                "a stream of {file_len} bytes is too short for a footer, expected at least {}",
                Self::BYTES
            ))
        })
    }

    /// Parses the footer in the bytes of the tail, and checks it against the first header.
    ///
    /// Errors: `Corrupt` if the markers around the footer are missing, or if it contradicts the first header.
    pub(crate) fn parse(tail: &[u8], file_len: u64, first: &Hosted) -> Result<Hosted> {
        let marker = |at: usize| -> Option<(u64, u32, u32)> {
            let b = tail.get(at..at + 16)?;
            let (value, rest) = U64::read_from_prefix(b).ok()?;
            let (size, rest) = U32::read_from_prefix(rest).ok()?;
            let (kind, _) = U32::read_from_prefix(rest).ok()?;
            Some((value.get(), size.get(), kind.get()))
        };
        // A marker is a value (u64), a size (u32) and a type (u32): type 3 precedes the footer, type 0 ends the stream.
        let footer_ok = matches!(marker(0), Some((_, 0, 3)));
        let end_ok = matches!(marker(1024), Some((_, 0, 0)));
        if !footer_ok || !end_ok {
            return Err(Error::corrupt(
                "the header refers to a footer for the directory, but the file does not end with one: the stream is truncated; copy or download it again",
            ));
        }
        let bytes = tail.get(512..1024).unwrap_or_default();
        let footer = Hosted::parse(bytes, file_len, Role::Footer)?;
        if footer.directory == DirectoryAt::Footer {
            return Err(Error::corrupt(
                "footer: gdOffset (byte 56) is GD_AT_END, which is only valid in the first header",
            ));
        }
        // The tables that the footer names are read by its geometry. One that differs from the first header belongs to
        // another stream, or is damaged.
        let same = |h: &Hosted| (h.grain, h.entries_per_table, h.compressed, h.markers);
        if same(&footer) != same(first) {
            return Err(Error::corrupt(
                "footer: grain size, table size or compression differ from the first header",
            ));
        }
        // The directory of the footer counts, but only the first header names the descriptor.
        Ok(Hosted {
            descriptor: first.descriptor,
            ..footer
        })
    }
}
