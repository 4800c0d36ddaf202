//! Format of the map of a cached file: a header, then an entry of 8 bytes for each block.
//!
//! ```text
//!   byte 0      magic, checksum, the key in JSON, zeroes up to 3584
//!   byte 3584   completion record (completion.rs): zeroes, or the state of the data file when all of its blocks were there
//!   byte 4096   entry of block 0: 0 (absent), or two checksums of the block; the lowest bit tells that it is durable
//! ```
//! An entry is checked against the block at every read, so a block is served only if entry and data belong together,
//! whatever a crash or a disk has done to either. An entry that is not durable yet is valid until the machine is booted
//! anew: the boot's identity is part of its checksum.

use ring::digest::{SHA256, digest};
use serde::{Deserialize, Serialize};

/// Bytes before the first entry.
pub(super) const HEADER: u64 = 4096;
/// Position of the completion record.
pub(super) const COMPLETION: u64 = 3584;
/// Bytes of an entry.
pub(super) const ENTRY: u64 = 8;
/// Largest number of blocks of a file: 128 TiB in blocks of 32 KiB. Bounds the work for a length that a server says.
pub(super) const MAX_BLOCKS: u64 = 1 << 32;

const MAGIC: &[u8] = b"vmdkfuse cache 2\n";

/// File of a server, and the version of its content.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct FileKey {
    /// Address for messages, without a query.
    pub label: String,
    /// SHA-256 of the whole address, which may hold a token.
    pub address: String,
    /// Length in bytes.
    pub len: u64,
    /// Size of a block in bytes.
    pub block: u64,
    /// ETag of the server.
    pub etag: Option<String>,
    /// Last-Modified of the server.
    pub modified: Option<String>,
}

impl FileKey {
    /// Returns the name of the address in the folder, without an extension.
    pub(super) fn stem(&self) -> &str {
        self.address.get(..32).unwrap_or(&self.address)
    }

    /// Returns the number of blocks.
    pub(super) fn blocks(&self) -> u64 {
        self.len.div_ceil(self.block.max(1))
    }

    /// Returns the length of a block: less than usual at the end of the file, 0 behind it.
    pub(super) fn block_len(&self, number: u64) -> usize {
        let start = number.saturating_mul(self.block);
        self.block.min(self.len.saturating_sub(start)) as usize
    }
}

/// Returns the SHA-256 of an address as hexadecimal digits.
pub fn address_hash(address: &str) -> String {
    let sum = digest(&SHA256, address.as_bytes());
    sum.as_ref().iter().map(|byte| format!("{byte:02x}")).collect()
}

/// Returns the header for a key, or `None` if the key is too long for it.
pub(super) fn encode_header(key: &FileKey) -> Option<Vec<u8>> {
    let json = serde_json::to_vec(key).ok()?;
    let mut header = MAGIC.to_vec();
    header.extend_from_slice(&libdeflater::crc32(&json).to_le_bytes());
    header.extend_from_slice(&(json.len() as u32).to_le_bytes());
    header.extend_from_slice(&json);
    let fits = header.len() as u64 <= COMPLETION;
    header.resize(HEADER as usize, 0);
    fits.then_some(header)
}

/// Returns the key of a header, or `None` if it is damaged or none.
pub(super) fn decode_header(header: &[u8]) -> Option<FileKey> {
    let rest = header.get(..COMPLETION as usize)?.strip_prefix(MAGIC)?;
    let (crc, rest) = rest.split_first_chunk()?;
    let (len, rest) = rest.split_first_chunk()?;
    let json = rest.get(..u32::from_le_bytes(*len) as usize)?;
    if libdeflater::crc32(json) != u32::from_le_bytes(*crc) {
        return None;
    }
    let key: FileKey = serde_json::from_slice(json).ok()?;
    let is_name = key.address.len() == 64 && key.address.bytes().all(|b| b.is_ascii_hexdigit());
    let is_size = key.block.is_power_of_two() && (512..=16 << 20).contains(&key.block) && key.len <= i64::MAX as u64;
    (is_name && is_size).then_some(key)
}

/// Durability of an entry's block.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Durability {
    /// The data survives a crash of the machine.
    Durable,
    /// The data is in the page cache of the boot with this identity.
    InBoot(u64),
}

/// Checksums of a block's data, computed once for all of its entries.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Checksum(u64);

impl Checksum {
    /// Computes the checksums of the data of a block.
    pub(super) fn of(data: &[u8]) -> Self {
        Self(u64::from(libdeflater::crc32(data)) << 32 | u64::from(libdeflater::adler32(data)))
    }

    /// Returns the entry of block `number` for the data.
    pub(super) fn entry(self, number: u64, durability: Durability) -> u64 {
        let (salt, bit) = match durability {
            Durability::Durable => (0, 1),
            Durability::InBoot(boot) => (boot, 0),
        };
        // A block in the place of another one, or of another boot, is no match either.
        ((self.0 ^ spread(number ^ spread(salt))) & !1) | bit
    }
}

/// Spreads a number over all bits (the finalizer of SplitMix64), so that neighbours differ in half of them.
fn spread(number: u64) -> u64 {
    let number = (number ^ number >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let number = (number ^ number >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
    number ^ number >> 31
}

/// Returns the checksums of the data if `entry` is that of the data.
pub(super) fn matching(entry: u64, number: u64, data: &[u8], boot: u64) -> Option<Checksum> {
    let durability = match entry & 1 {
        1 => Durability::Durable,
        _ => Durability::InBoot(boot),
    };
    let sum = Checksum::of(data);
    (entry != 0 && entry == sum.entry(number, durability)).then_some(sum)
}

#[cfg(test)]
mod tests {
    use super::*;

    pub(super) fn key() -> FileKey {
        FileKey {
            label: "https://h/x".to_owned(),
            address: address_hash("https://h/x?token"),
            len: 100_000,
            block: 32 << 10,
            etag: Some("\"1\"".to_owned()),
            modified: None,
        }
    }

    #[test]
    fn a_header_holds_its_key_and_notices_each_damaged_byte() {
        let key = key();
        let header = encode_header(&key).unwrap();
        assert_eq!(decode_header(&header), Some(key.clone()));
        assert!(!String::from_utf8_lossy(&header).contains("token"));
        let used = MAGIC.len() + 8 + serde_json::to_vec(&key).unwrap().len();
        for at in 0..used {
            let mut damaged = header.clone();
            damaged[at] ^= 4;
            assert_ne!(decode_header(&damaged), Some(key.clone()), "{at}");
        }
        let long = FileKey {
            label: "x".repeat(5000),
            ..key
        };
        assert_eq!(encode_header(&long), None);
    }

    #[test]
    fn an_entry_fits_its_block_number_and_boot_only() {
        let data = vec![7; 4096];
        let sum = Checksum::of(&data);
        let durable = sum.entry(3, Durability::Durable);
        let in_boot = sum.entry(3, Durability::InBoot(9));
        let matches = |entry, number, data: &[u8], boot| matching(entry, number, data, boot) == Some(sum);
        assert!(matches(durable, 3, &data, 1) && matches(in_boot, 3, &data, 9));
        assert!(!matches(in_boot, 3, &data, 8) && !matches(durable, 4, &data, 1));
        let mut other = data.clone();
        other[100] ^= 1;
        assert!(!matches(durable, 3, &other, 1) && !matches(0, 3, &data, 1));
    }
}
