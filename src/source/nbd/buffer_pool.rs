//! Buffers of commands, kept from one command to the next: fresh memory costs a page fault for each page.
//!
//! They start at pages, which the kernel copies faster, and belong to one disk: what an earlier command left in one is
//! never another disk's.

#![allow(unsafe_code)] // Several commands of a C library write to one buffer.

use std::ptr::NonNull;
use std::sync::{Arc, Mutex, PoisonError};

use super::replay_log::SOFT;
use zerocopy::{FromBytes, FromZeros, Immutable, IntoBytes, KnownLayout};

/// Bytes of a page.
const PAGE: usize = 4096;

/// The sizes that are kept, in pages, and how many of each: single sectors up to pages; blocks of file systems and
/// databases, none in a buffer of more than twice its size, which a write keeps until it is flushed; the kernel's usual
/// read-ahead; a piece of a long write, as many as are written from one flush to the next; the kernel's largest request
/// with a granule at each end.
const KEPT: [(usize, usize); 8] = [
    (1, 256),
    (2, 128),
    (4, 64),
    (8, 64),
    (16, 64),
    (32, 64),
    (64, SOFT / (64 * PAGE)),
    (256 + 32, 24),
];

#[derive(Clone, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C, align(4096))]
struct Page([u8; PAGE]);

/// Whole pages.
#[derive(Default)]
pub(super) struct Buffer(Vec<Page>);

impl Buffer {
    /// Its bytes.
    pub(super) fn bytes(&mut self) -> &mut [u8] {
        self.0.as_mut_slice().as_mut_bytes()
    }

    /// How many there are.
    pub(super) fn len(&self) -> usize {
        self.0.len() * PAGE
    }
}

/// A buffer that several commands fill, each its own part of it.
pub(super) struct Shared {
    /// Its first byte. The buffer is not touched otherwise as long as commands may be under way.
    first: NonNull<u8>,
    len: usize,
    buffer: Mutex<Buffer>,
}

// SAFETY: the memory belongs to `buffer`, which may go to any thread; who writes to it by `first` keeps to its part.
unsafe impl Send for Shared {}
// SAFETY: as above.
unsafe impl Sync for Shared {}

impl Shared {
    /// To be filled in parts.
    pub(super) fn new(mut buffer: Buffer) -> Arc<Self> {
        let bytes = buffer.bytes();
        let (first, len) = (NonNull::from(&mut *bytes).cast(), bytes.len());
        Arc::new(Self {
            first,
            len,
            buffer: Mutex::new(buffer),
        })
    }

    /// The buffer again, once all commands have ended.
    pub(super) fn take(&self) -> Buffer {
        std::mem::take(&mut *self.buffer.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

/// Where a command reads to, or writes from.
pub(super) enum CommandBuffer {
    /// A buffer of its own.
    Own(Buffer),
    /// A part of one, which no other command has: from `start` on.
    Part {
        /// The buffer.
        of: Arc<Shared>,
        /// Its byte that the part starts at.
        start: usize,
    },
}

impl CommandBuffer {
    /// The first byte, and how many there are.
    pub(super) fn bytes(&mut self) -> (*mut u8, usize) {
        match self {
            Self::Own(buffer) => (buffer.bytes().as_mut_ptr(), buffer.len()),
            Self::Part { of, start } => {
                let start = (*start).min(of.len);
                // SAFETY: the place is within the memory of the buffer, or its end.
                (unsafe { of.first.add(start) }.as_ptr(), of.len - start)
            }
        }
    }

    /// Takes a buffer of its own out; of a shared one nothing.
    pub(super) fn take(&mut self) -> Buffer {
        match self {
            Self::Own(buffer) => std::mem::take(buffer),
            Self::Part { .. } => Buffer::default(),
        }
    }
}

impl From<Buffer> for CommandBuffer {
    fn from(buffer: Buffer) -> Self {
        Self::Own(buffer)
    }
}

/// Buffers that nobody uses.
#[derive(Default)]
pub(super) struct BufferPool([Mutex<Vec<Buffer>>; KEPT.len()]);

impl BufferPool {
    /// A buffer of at least `len` bytes. What it holds is not said. `None`: there is no memory.
    pub(super) fn take(&self, len: usize) -> Option<Buffer> {
        let pages = len.div_ceil(PAGE);
        let class = KEPT.iter().position(|(size, _)| *size >= pages);
        let kept = class.and_then(|c| self.0[c].lock().unwrap_or_else(PoisonError::into_inner).pop());
        kept.or_else(|| {
            Page::new_vec_zeroed(class.map_or(pages, |c| KEPT[c].0))
                .ok()
                .map(Buffer)
        })
    }

    /// Takes a buffer back.
    pub(super) fn give(&self, buffer: Buffer) {
        if let Some(class) = KEPT.iter().position(|(size, _)| *size == buffer.0.len()) {
            let mut kept = self.0[class].lock().unwrap_or_else(PoisonError::into_inner);
            if kept.len() < KEPT[class].1 {
                kept.push(buffer);
            }
        }
    }
}

impl std::fmt::Debug for BufferPool {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Pool")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buffers_start_at_pages_are_long_enough_and_come_back() {
        let pool = BufferPool::default();
        for len in [
            1,
            512,
            4096,
            4097,
            131_072,
            131_073,
            1 << 20,
            (1 << 20) + 131_072,
            3 << 20,
        ] {
            let mut buffer = pool.take(len).unwrap();
            assert!(buffer.len() >= len);
            let place = buffer.bytes().as_ptr();
            assert_eq!(place.align_offset(PAGE), 0);
            buffer.bytes()[0] = 7;
            pool.give(buffer);
            if len < 2 << 20 {
                assert_eq!(pool.take(len).unwrap().bytes()[0], 7, "{len}");
            }
        }
    }

    #[test]
    fn only_so_many_are_kept() {
        let pool = BufferPool::default();
        let many: Vec<Buffer> = (0..300).map(|_| pool.take(1).unwrap()).collect();
        many.into_iter().for_each(|b| pool.give(b));
        assert_eq!(pool.0[0].lock().unwrap().len(), KEPT[0].1);
    }
}
