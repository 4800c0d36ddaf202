//! The bytes of a file, cheap to copy, with holes.

use std::collections::BTreeMap;
use std::sync::Arc;

/// Bytes of a page, the unit in which room is taken.
pub const PAGE: u64 = 4096;

type Page = [u8; PAGE as usize];

/// What a file holds. Pages that nothing was written to are holes and read as zeroes; copies share their pages.
#[derive(Debug, Clone, Default)]
pub struct Bytes {
    len: u64,
    pages: BTreeMap<u64, Arc<Page>>,
}

impl Bytes {
    /// Its length.
    pub fn len(&self) -> u64 {
        self.len
    }

    /// Whether there is no byte.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Bytes of its pages.
    pub fn allocated(&self) -> u64 {
        self.pages.len() as u64 * PAGE
    }

    /// Whether the byte at `offset` is in a page.
    pub fn is_stored(&self, offset: u64) -> bool {
        self.pages.contains_key(&(offset / PAGE))
    }

    /// For how many bytes from `offset` on that holds, at most to the end.
    pub fn same_until(&self, offset: u64) -> u64 {
        let page = offset / PAGE;
        let next = match self.is_stored(offset) {
            true => (page + 1..).find(|page| !self.pages.contains_key(page)),
            false => self.pages.range(page..).next().map(|(page, _)| *page),
        };
        next.map_or(self.len, |next| self.len.min(next * PAGE))
            .saturating_sub(offset)
    }

    /// Bytes of pages that a write would take.
    pub fn room_for(&self, offset: u64, len: u64) -> u64 {
        if len == 0 {
            return 0;
        }
        let touched = offset / PAGE..=(offset + len - 1) / PAGE;
        touched.filter(|page| !self.pages.contains_key(page)).count() as u64 * PAGE
    }

    /// Fills `buf` from `offset`; `false`: the file ends before.
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

    /// Writes, and grows where it ended before.
    pub fn write(&mut self, offset: u64, data: &[u8]) {
        each_page(offset, data.len(), |page, inside, part| {
            let bytes = self.pages.entry(page).or_insert_with(|| Arc::new([0; PAGE as usize]));
            Arc::make_mut(bytes)[inside].copy_from_slice(&data[part]);
        });
        self.len = self.len.max(offset + data.len() as u64);
    }

    /// Makes a range zeroes, whole pages of it holes if `unmap`. What lies past the end stays there.
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

    /// Cuts it, or makes it longer with holes.
    pub fn set_len(&mut self, len: u64) {
        if len < self.len {
            self.zero(len, self.len - len, true);
            self.pages.split_off(&len.div_ceil(PAGE));
        }
        self.len = len;
    }

    /// All of it.
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

/// Cuts a range into its parts of pages: the page, the range inside of it, the range of the buffer.
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
    fn it_is_like_a_vector() {
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
    fn room_is_counted_by_pages_and_comes_back() {
        let mut bytes = Bytes::default();
        bytes.set_len(1 << 20);
        assert_eq!((bytes.allocated(), bytes.room_for(4000, 200)), (0, 2 * PAGE));
        bytes.write(4000, &[1; 200]);
        assert_eq!((bytes.allocated(), bytes.room_for(0, 3 * PAGE)), (2 * PAGE, PAGE));
        bytes.zero(0, 5000, false);
        assert_eq!(bytes.allocated(), 2 * PAGE);
        bytes.zero(0, 5000, true);
        assert_eq!(bytes.allocated(), PAGE);
        bytes.set_len(4096);
        assert_eq!(bytes.allocated(), 0);
    }
}
