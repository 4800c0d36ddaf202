//! Sparse byte content of a file, cheap to clone.

use std::collections::BTreeMap;
use std::sync::Arc;

/// Bytes of a page, the unit of allocation.
pub const PAGE: u64 = 4096;

type Page = [u8; PAGE as usize];

/// Content of a file. Pages that were never written are holes and read as zeroes. Clones share their pages
/// copy-on-write, so that a search can keep thousands of states.
#[derive(Debug, Clone, Default)]
pub struct Bytes {
    len: u64,
    pages: BTreeMap<u64, Arc<Page>>,
}

impl Bytes {
    /// Returns the length in bytes.
    pub fn len(&self) -> u64 {
        self.len
    }

    /// Returns true if the length is 0.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Returns the allocated size in bytes, a multiple of [`PAGE`].
    pub fn allocated(&self) -> u64 {
        self.pages.len() as u64 * PAGE
    }

    /// Returns true if the byte at `offset` lies in an allocated page, false if in a hole.
    pub fn is_stored(&self, offset: u64) -> bool {
        self.pages.contains_key(&(offset / PAGE))
    }

    /// Returns the number of bytes from `offset` for which [`is_stored`](Self::is_stored) stays the same.
    pub fn same_until(&self, offset: u64) -> u64 {
        let page = offset / PAGE;
        let next = match self.is_stored(offset) {
            true => (page + 1..).find(|page| !self.pages.contains_key(page)),
            false => self.pages.range(page..).next().map(|(page, _)| *page),
        };
        next.map_or(self.len, |next| self.len.min(next * PAGE))
            .saturating_sub(offset)
    }

    /// Returns the bytes of pages that a write of this range would allocate.
    pub fn bytes_to_allocate(&self, offset: u64, len: u64) -> u64 {
        if len == 0 {
            return 0;
        }
        let touched = offset / PAGE..=(offset + len - 1) / PAGE;
        touched.filter(|page| !self.pages.contains_key(page)).count() as u64 * PAGE
    }

    /// Fills `buf` from `offset`. Returns false, and leaves `buf` as it is, if the file ends before.
    #[must_use]
    pub fn read(&self, offset: u64, buf: &mut [u8]) -> bool {
        if offset.checked_add(buf.len() as u64).is_none_or(|end| end > self.len) {
            return false;
        }
        each_page(offset, buf.len(), |page, inside, part| match self.pages.get(&page) {
            Some(bytes) => buf[part].copy_from_slice(&bytes[inside]),
            None => buf[part].fill(0),
        });
        true
    }

    /// Writes `data` at `offset`, and extends the content if necessary.
    pub fn write(&mut self, offset: u64, data: &[u8]) {
        each_page(offset, data.len(), |page, inside, part| {
            let bytes = self.pages.entry(page).or_insert_with(|| Arc::new([0; PAGE as usize]));
            Arc::make_mut(bytes)[inside].copy_from_slice(&data[part]);
        });
        self.len = self.len.max(offset + data.len() as u64);
    }

    /// Zeroes a range, up to the end of the file; with `unmap`, whole pages of it become holes.
    pub fn zero(&mut self, offset: u64, len: u64, unmap: bool) {
        let end = offset.saturating_add(len).min(self.len);
        let Some(bytes) = end.checked_sub(offset).filter(|&bytes| bytes > 0) else {
            return;
        };
        each_page(offset, bytes as usize, |page, inside, _| {
            let to_its_end = inside.len() as u64 == PAGE || end == self.len && end <= (page + 1) * PAGE;
            let whole = inside.start == 0 && to_its_end;
            if unmap && whole {
                self.pages.remove(&page);
            } else if let Some(bytes) = self.pages.get_mut(&page) {
                Arc::make_mut(bytes)[inside].fill(0);
            }
        });
    }

    /// Truncates the content, or extends it with a hole.
    pub fn set_len(&mut self, len: u64) {
        if len < self.len {
            self.zero(len, self.len - len, true);
            self.pages.split_off(&len.div_ceil(PAGE));
        }
        self.len = len;
    }

    /// Returns a copy of all bytes.
    pub fn to_vec(&self) -> Vec<u8> {
        let mut all = vec![0; self.len as usize];
        assert!(self.read(0, &mut all), "all that is there can be read");
        all
    }
}

impl From<&[u8]> for Bytes {
    fn from(all: &[u8]) -> Self {
        let mut bytes = Self::default();
        for (page, data) in all
            .chunks(PAGE as usize)
            .enumerate()
            .filter(|(_, data)| data.iter().any(|&b| b != 0))
        {
            bytes.write(page as u64 * PAGE, data);
        }
        bytes.set_len(all.len() as u64);
        bytes
    }
}

impl PartialEq for Bytes {
    fn eq(&self, other: &Self) -> bool {
        let zeroes: Arc<Page> = Arc::new([0; PAGE as usize]);
        let covers = |a: &Self, b: &Self| {
            a.pages.iter().all(|(page, data)| {
                let same = b.pages.get(page).unwrap_or(&zeroes);
                Arc::ptr_eq(data, same) || data == same
            })
        };
        self.len == other.len && covers(self, other) && covers(other, self)
    }
}

/// Splits a range at page boundaries and calls `part` with the page, the range inside it, and the range of the buffer.
fn each_page(offset: u64, len: usize, mut part: impl FnMut(u64, std::ops::Range<usize>, std::ops::Range<usize>)) {
    let mut done = 0;
    while done < len {
        let at = offset + done as u64;
        let start = (at % PAGE) as usize;
        let count = (PAGE as usize - start).min(len - done);
        part(at / PAGE, start..start + count, done..done + count);
        done += count;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::make::model::Random;

    #[test]
    fn behaves_like_a_vector() {
        let mut random = Random::new(7);
        let (mut bytes, mut model) = (Bytes::default(), Vec::<u8>::new());
        for round in 0..2000u64 {
            let (at, len) = (random.below(40_000), 1 + random.below(9000));
            match random.below(6) {
                0..=2 => {
                    bytes.write(at, &vec![round as u8 | 1; len as usize]);
                    model.resize(model.len().max((at + len) as usize), 0);
                    model[at as usize..(at + len) as usize].fill(round as u8 | 1);
                }
                3 => {
                    bytes.set_len(at);
                    model.resize(at as usize, 0);
                }
                unmap => {
                    bytes.zero(at, len, unmap == 4);
                    let end = model.len().min((at + len) as usize);
                    model.get_mut(at as usize..end).unwrap_or_default().fill(0);
                }
            }
            assert!(bytes.to_vec() == model, "round {round}");
            assert!(bytes == Bytes::from(model.as_slice()));
        }
    }

    #[test]
    fn allocation_is_counted_in_pages_and_returned() {
        let mut bytes = Bytes::default();
        bytes.set_len(1 << 20);
        assert_eq!((bytes.allocated(), bytes.bytes_to_allocate(4000, 200)), (0, 2 * PAGE));
        bytes.write(4000, &[1; 200]);
        assert_eq!(
            (bytes.allocated(), bytes.bytes_to_allocate(0, 3 * PAGE)),
            (2 * PAGE, PAGE)
        );
        bytes.zero(0, 5000, false);
        assert_eq!(bytes.allocated(), 2 * PAGE);
        bytes.zero(0, 5000, true);
        assert_eq!(bytes.allocated(), PAGE);
        bytes.set_len(4096);
        assert_eq!(bytes.allocated(), 0);
    }
}
