//! The CID: which state of a disk its children were made from.
//!
//! It is changed in place, by the same number of digits, so that no other byte of the descriptor moves, the file keeps
//! its name, owner and locks, and a crash leaves the old digits, the new ones or a mixture: a mixture is a new CID too.

use std::collections::hash_map::RandomState;
use std::hash::{BuildHasher, Hasher};
use std::ops::Range;
use std::sync::Arc;

use crate::error::Result;
use crate::store::StoredFile;
use crate::vmdk::descriptor;
use crate::vmdk::open::Link;
use crate::vmdk::write::failure::Failure;
use crate::vmdk::write::grains::writer;

/// CIDs with a meaning of their own: of a fresh disk, and none.
const RESERVED: [u32; 2] = [0xffff_fffe, 0xffff_ffff];

/// Changes the CID of one descriptor.
#[derive(Debug)]
pub(super) struct DescriptorWriter {
    file: Arc<dyn StoredFile>,
    /// Bytes of the file that hold the digits: of each `CID=` line, and the end of a `ddb.longContentID` that ends
    /// like it.
    digits: Vec<Range<u64>>,
}

impl DescriptorWriter {
    /// Finds the digits. A descriptor without a CID has nothing to change.
    pub(super) fn new(link: &Link) -> Result<Self> {
        let mut text = vec![0; (link.text.end - link.text.start) as usize];
        link.file.read_exact_at(link.text.start, &mut text)?;
        let spans = descriptor::cid_digits(&text);
        let digits = spans.into_iter().map(|s| link.text.start + s.start as u64..link.text.start + s.end as u64);
        Ok(Self { file: Arc::clone(&link.file), digits: digits.collect() })
    }

    /// Writes a new, random CID, durably.
    pub(super) fn change_cid(&self, failure: &Failure) -> Result<()> {
        if self.digits.is_empty() {
            return Ok(());
        }
        let mut old = Vec::new();
        for range in &self.digits {
            let mut digits = vec![0; (range.end - range.start) as usize];
            self.file.read_exact_at(range.start, &mut digits)?;
            old.push(digits);
        }
        let width = old.iter().map(Vec::len).min().unwrap_or(0);
        let new = random_digits(width, &old);
        let writer = writer(&*self.file)?;
        for range in &self.digits {
            let len = (range.end - range.start) as usize;
            let digits = format!("{:0>len$}", String::from_utf8_lossy(&new));
            writer.write_all_at(range.start, digits.as_bytes())?;
        }
        failure.sync(&*self.file).map_err(|e| e.within(format!("{}: new CID", self.file.label())))
    }
}

/// Hexadecimal digits that are none of `not` and no reserved CID.
fn random_digits(width: usize, not: &[Vec<u8>]) -> Vec<u8> {
    loop {
        let random = RandomState::new().build_hasher().finish() as u32;
        let bits = 4 * width.clamp(1, 8) as u32;
        let cid = if bits >= 32 { random } else { random & ((1 << bits) - 1) };
        let digits = format!("{cid:0width$x}").into_bytes();
        // a leading zero is no reason to write fewer digits, and one digit alone may have to repeat
        if !RESERVED.contains(&cid) && !not.iter().any(|old| old.eq_ignore_ascii_case(&digits)) {
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
