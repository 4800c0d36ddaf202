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
use crate::store::{StoredFile, WriteLatch, writer};
use crate::vmdk::chain::Link;
use crate::vmdk::descriptor;

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
        Ok(Self {
            file: Arc::clone(&link.file),
            text: link.text.clone(),
            digits: digits.collect(),
        })
    }

    /// Returns a random CID that differs from the current one and has as many digits, or `None` if there is no CID.
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
        let new = random_digits(width, &old);
        Ok(u32::from_str_radix(&String::from_utf8_lossy(&new), 16).ok())
    }

    /// Writes a CID from [`draw_cid`](Self::draw_cid) to all its places, durably.
    pub(super) fn write_cid(&self, cid: u32, latch: &WriteLatch) -> Result<()> {
        let writer = writer(&*self.file)?;
        for range in &self.digits {
            let len = (range.end - range.start) as usize;
            writer.write_all_at(range.start, format!("{cid:0len$x}").as_bytes())?;
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

/// Returns `width` random hexadecimal digits that differ from all of `old` and are no reserved CID.
fn random_digits(width: usize, old: &[Vec<u8>]) -> Vec<u8> {
    loop {
        // Unique, not secret: the seed of the standard library's hash maps is random enough.
        let random = RandomState::new().build_hasher().finish() as u32;
        let bits = 4 * width.clamp(1, 8) as u32;
        let cid = if bits >= 32 { random } else { random & ((1 << bits) - 1) };
        let digits = format!("{cid:0width$x}").into_bytes();
        // Compared as text: with few digits a repetition is likely, and a CID in upper case is the same CID.
        if !RESERVED.contains(&cid) && !old.iter().any(|old| old.eq_ignore_ascii_case(&digits)) {
            return digits;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_new_cid_has_as_many_digits_and_differs() {
        for width in 1..=8 {
            let old = vec![b'0'; width];
            for _ in 0..200 {
                let new = random_digits(width, std::slice::from_ref(&old));
                assert_eq!(new.len(), width);
                assert_ne!(new, old);
                assert!(new.iter().all(u8::is_ascii_hexdigit));
            }
        }
    }
}
