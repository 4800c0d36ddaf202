//! In-place changes of the descriptor: the CID, and values that keep their length.
//!
//! A child remembers the CID that its parent had when the child was created, so a write to the parent must change it.
//!
//! The new CID has the same number of digits. So no other byte of the descriptor moves, and the file keeps its name,
//! owner and locks. A crash leaves the old digits, the new ones, or a mixture of both. A mixture is as good as a new
//! CID: children refuse it, and the content has not changed yet.

use std::collections::hash_map::RandomState;
use std::hash::{BuildHasher, Hasher};
use std::ops::Range;
use std::sync::Arc;

use crate::error::{Error, ErrorKind, Result};
use crate::store::{StoredFile, writer};
use crate::vmdk::chain::Link;
use crate::vmdk::descriptor;
use crate::write_latch::WriteLatch;

/// CIDs with a meaning of their own: that of a new disk, and "no CID".
const RESERVED: [u32; 2] = [0xffff_fffe, 0xffff_ffff];

/// Writer of one descriptor.
#[derive(Debug)]
pub(super) struct DescriptorWriter {
    file: Arc<dyn StoredFile>,
    /// Bytes of the file that hold the text.
    text: Range<u64>,
    /// Bytes of the file that hold the digits: of each `CID=` line, and the last ones of a `ddb.longContentID` that
    /// ends with the same digits.
    digits: Vec<Range<u64>>,
}

impl DescriptorWriter {
    /// Reads the descriptor of `link` and finds the digits. A descriptor may have none.
    pub(super) fn new(link: &Link) -> Result<Self> {
        let text = read(&*link.file, &link.text)?;
        let spans = descriptor::cid_digits(&text);
        if spans.is_empty() && link.descriptor.cid.is_some() {
            let label = link.file.label();
            return Err(Error::new(
                ErrorKind::ReadOnly,
                format!("{label}: the CID in a descriptor in UTF-16 can't be changed; save the descriptor in UTF-8"),
            ));
        }
        let digits = spans
            .into_iter()
            .map(|s| link.text.start + s.start as u64..link.text.start + s.end as u64);
        let this = Self {
            file: Arc::clone(&link.file),
            text: link.text.clone(),
            digits: digits.collect(),
        };
        // A descriptor without a free CID is refused here rather than at the first write.
        this.draw_cid()?;
        Ok(this)
    }

    /// Returns a random CID that differs from the current ones and has as many digits, or `None` if there is no CID.
    ///
    /// Errors: `ReadOnly` if the `CID=` lines of the descriptor hold all CIDs of so few digits.
    pub(super) fn draw_cid(&self) -> Result<Option<u32>> {
        let old: Vec<_> = self
            .digits
            .iter()
            .map(|range| read(&*self.file, range))
            .collect::<Result<_>>()?;
        // A CID with fewer digits fits all places; `write_cid` pads it with zeroes.
        let Some(width) = old.iter().map(Vec::len).min() else {
            return Ok(None);
        };
        let old: Vec<_> = old.iter().filter_map(|digits| descriptor::cid_number(digits)).collect();
        let none_left = || {
            let label = self.file.label();
            let text = format!(
                "{label}: its CID= lines hold every CID of {width} digits, so that none is left for new content; keep one \
                 line with 8 digits; cow=FILE writes to an overlay instead"
            );
            Error::new(ErrorKind::ReadOnly, text)
        };
        random_cid(width, &old).map(Some).ok_or_else(none_left)
    }

    /// Writes a CID from [`draw_cid`](Self::draw_cid) to all its places, durably.
    pub(super) fn write_cid(&self, cid: u32, latch: &WriteLatch) -> Result<()> {
        let writer = writer(&*self.file)?;
        for range in &self.digits {
            let len = (range.end - range.start) as usize;
            writer.write_all_at(range.start, padded(cid, len).as_bytes())?;
        }
        latch
            .sync(&*self.file)
            .map_err(|e| e.within(format!("{}: new CID", self.file.label())))
    }

    /// Replaces the value of a setting by one of the same length, durably.
    ///
    /// Errors: `Unsupported` if the setting does not exist or has another length.
    pub(super) fn replace(&self, key: &str, value: &str, latch: &WriteLatch) -> Result<()> {
        // Read again: earlier replacements have changed the text since the image was opened.
        let text = read(&*self.file, &self.text)?;
        let spans = descriptor::value_spans(&text, key);
        if spans.is_empty() || spans.iter().any(|span| span.len() != value.len()) {
            let (file, len) = (self.file.label(), value.len());
            return Err(Error::unsupported(format!(
                "{file}: its descriptor has no value of {len} bytes for {key}"
            )));
        }
        let writer = writer(&*self.file)?;
        for span in spans {
            writer.write_all_at(self.text.start + span.start as u64, value.as_bytes())?;
        }
        latch
            .sync(&*self.file)
            .map_err(|e| e.within(format!("{}: {key}", self.file.label())))
    }
}

/// Reads a range of a file.
fn read(file: &dyn StoredFile, range: &Range<u64>) -> Result<Vec<u8>> {
    let mut bytes = vec![0; (range.end - range.start) as usize];
    file.read_exact_at(range.start, &mut bytes)?;
    Ok(bytes)
}

/// Returns a random CID of at most `width` digits that is none of `old` and not reserved; `None` if there is no other.
fn random_cid(width: usize, old: &[u32]) -> Option<u32> {
    // Unique, not secret: the seed of the standard library's hash maps is random enough.
    let start = RandomState::new().build_hasher().finish() as u32;
    let mask = u32::MAX >> (32 - 4 * width.clamp(1, 8) as u32);
    // Counted up from a random start: drawing again until one is free would not end for a descriptor of 16 lines with one
    // digit each. Of one candidate more than there are taken ones, at least one is free.
    let candidates = (old.len() + RESERVED.len()).min(mask as usize) as u32;
    (0..=candidates)
        .map(|step| start.wrapping_add(step) & mask)
        .find(|cid| !RESERVED.contains(cid) && !old.contains(cid))
}

/// Returns a CID as `width` hexadecimal digits.
fn padded(cid: u32, width: usize) -> String {
    // Not by a width in the format string, which panics above 65535: a hostile CID may have a megabyte of zeroes.
    let digits = format!("{cid:x}");
    "0".repeat(width.saturating_sub(digits.len())) + &digits
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::block::{BlockWrite, Lba};
    use crate::store::{Access, Store};
    use crate::vmdk::test_store::{TestStore, name};
    use crate::vmdk::{OpenOptions, VmdkDisk};

    #[test]
    fn odd_cids_are_replaced_or_refused_at_the_open() {
        let store = TestStore::new();
        std::fs::write(store.path("d-flat.vmdk"), [0; 4096]).unwrap();
        let open = |cids: &str| {
            let text = format!(
                "# Disk DescriptorFile\nversion=1\n{cids}parentCID=ffffffff\ncreateType=\"monolithicFlat\"\n\
                 RW 8 FLAT \"d-flat.vmdk\" 0\n"
            );
            std::fs::write(store.path("d.vmdk"), text).unwrap();
            VmdkDisk::open_writable(store.open(&name("d.vmdk"), Access::Write)?, OpenOptions::default())
        };
        let all: String = (0..16).map(|cid| format!("CID={cid:x}\n")).collect();
        let refused = open(&all).unwrap_err();
        assert_eq!(refused.kind(), ErrorKind::ReadOnly, "{refused}");
        for cids in [format!("CID={}\n", padded(1, 70_000)), all[..15 * 6].to_owned()] {
            let disk = open(&cids).unwrap();
            disk.write_at(Lba(0), &[1; 512]).unwrap();
            disk.close().unwrap();
            drop(disk);
            let cid = store.open_disk("d.vmdk").unwrap().descriptor().unwrap().cid;
            assert!(cid.is_some_and(|cid| cid != 0 && cid != 1), "{cid:?}");
        }
    }

    #[test]
    fn a_new_cid_has_as_many_digits_and_differs() {
        for width in 1..=8 {
            for _ in 0..200 {
                let new = random_cid(width, &[0]).unwrap();
                assert_ne!(new, 0);
                assert_eq!(padded(new, width).len(), width);
                assert!(!RESERVED.contains(&new));
            }
        }
    }

    #[test]
    fn the_last_free_cid_is_found_and_a_full_descriptor_has_none() {
        let all: Vec<u32> = (0..256).collect();
        assert_eq!(random_cid(2, &all), None);
        assert_eq!(random_cid(1, &all[..16]), None);
        for free in 0..16 {
            let old: Vec<u32> = (0..16).filter(|cid| *cid != free).collect();
            assert_eq!(random_cid(1, &old), Some(free));
        }
    }

    #[test]
    fn a_cid_of_a_megabyte_of_zeroes_is_replaced_by_one_of_the_same_length() {
        let text = padded(0x12ab, 1 << 20);
        assert_eq!(text.len(), 1 << 20);
        assert!(text.starts_with("0000") && text.ends_with("00012ab"));
    }
}
