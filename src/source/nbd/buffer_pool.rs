//! Pool of command buffers: reused, because fresh memory costs a page fault for each page.
//!
//! Buffers are aligned to pages, which the kernel copies faster. A pool belongs to one disk: the bytes that an earlier
//! command left in a buffer never belong to another disk.
//!
//! [`Shared`] lets several commands fill parts of one buffer. They write through a raw pointer, without a lock, from
//! inside of libnbd. The parts cannot overlap and the buffer cannot be read too early, by construction: only
//! [`Shared::split`] makes parts, each begins where the one before it ends, none can be cloned, and
//! [`Shared::into_buffer`] fails as long as a part exists. The [`Command`](super::command::Command) of a part owns it
//! until libnbd has returned the command.
//!
//! Locks: one mutex for each size class. They are held for a push or a pop only, and a thread that holds one acquires no
//! other lock.

#![allow(unsafe_code)] // Several commands of a C library write to one buffer.

use std::ptr::NonNull;
use std::sync::{Arc, Mutex};

use zerocopy::{FromBytes, FromZeros, Immutable, IntoBytes, KnownLayout};

use super::unflushed::SOFT_LIMIT;
use crate::mutex::lock;

/// Size of a page in bytes.
const PAGE: usize = 4096;

/// Size classes: the size of a buffer in pages, and the maximum number of unused buffers kept.
///
/// 1 page serves single sectors up to pages. 2 to 16 pages serve blocks of file systems and databases, in steps of two:
/// a write keeps its buffer until it is flushed, and none wastes more than half of it. 32 pages are the kernel's usual
/// read-ahead. 64 pages are a piece of a long write, as many as are written between two background flushes. The last
/// class is the kernel's largest request with a granule at each end.
const SIZE_CLASSES: [(usize, usize); 8] = [
    (1, 256),
    (2, 128),
    (4, 64),
    (8, 64),
    (16, 64),
    (32, 64),
    (64, SOFT_LIMIT / (64 * PAGE)),
    (256 + 32, 24),
];

#[derive(Clone, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C, align(4096))]
struct Page([u8; PAGE]);

/// Page-aligned buffer of whole pages. Its content is undefined: zeroes, or bytes of an earlier command.
#[derive(Default)]
pub(super) struct Buffer(Vec<Page>);

impl Buffer {
    /// Returns the bytes of the buffer.
    pub(super) fn bytes(&mut self) -> &mut [u8] {
        self.0.as_mut_slice().as_mut_bytes()
    }

    /// Returns the size in bytes, a multiple of the page size.
    pub(super) fn len(&self) -> usize {
        self.0.len() * PAGE
    }
}

/// Buffer that several commands fill, each its own part of it.
pub(super) struct Shared {
    /// First byte of `buffer`. While parts exist, the buffer is accessed only through this pointer.
    first: NonNull<u8>,
    /// Owns the memory. Moving it does not move the pages, so `first` stays valid until they are freed.
    buffer: Buffer,
}

// SAFETY: `first` points to the memory of `buffer`, which may be sent to any thread. No method reads or writes through
// `first`; each `Part` uses it for a range of its own.
unsafe impl Send for Shared {}
// SAFETY: as above.
unsafe impl Sync for Shared {}

impl Shared {
    /// Splits a buffer into parts of these lengths, one after the other. Returns the owner of the memory too.
    ///
    /// A part ends at the end of the buffer.
    pub(super) fn split(mut buffer: Buffer, lens: impl Iterator<Item = usize>) -> (Arc<Self>, Vec<CommandBuffer>) {
        let bytes = buffer.bytes();
        let (first, total) = (NonNull::from(&mut *bytes).cast(), bytes.len());
        let shared = Arc::new(Self { first, buffer });
        let mut next = 0usize;
        let part = |len: usize| {
            let start = next;
            next = start.saturating_add(len).min(total);
            CommandBuffer::Part(Part {
                of: Arc::clone(&shared),
                start,
                len: next - start,
            })
        };
        let parts = lens.map(part).collect();
        (shared, parts)
    }

    /// Takes the buffer out. Returns `None` while a part of it exists.
    pub(super) fn into_buffer(self: Arc<Self>) -> Option<Buffer> {
        Arc::into_inner(self).map(|shared| shared.buffer)
    }
}

/// Part of a shared buffer. No other part has bytes in common with it.
pub(super) struct Part {
    of: Arc<Shared>,
    /// Offset in the buffer in bytes; `start + len` is within the buffer.
    start: usize,
    len: usize,
}

/// Memory that a command reads to or writes from.
pub(super) enum CommandBuffer {
    /// A buffer that belongs to this command alone.
    Own(Buffer),
    /// A part of a shared buffer.
    Part(Part),
}

impl CommandBuffer {
    /// Returns a pointer to the first byte, and the number of bytes.
    pub(super) fn bytes(&mut self) -> (*mut u8, usize) {
        match self {
            Self::Own(buffer) => (buffer.bytes().as_mut_ptr(), buffer.len()),
            Self::Part(Part { of, start, len }) => {
                // SAFETY: `split` made sure that `start` is within the memory of the buffer or at its end.
                (unsafe { of.first.add(*start) }.as_ptr(), *len)
            }
        }
    }

    /// Takes the command's own buffer out. Returns an empty one if the buffer is shared.
    pub(super) fn take(&mut self) -> Buffer {
        match self {
            Self::Own(buffer) => std::mem::take(buffer),
            Self::Part(_) => Buffer::default(),
        }
    }
}

impl From<Buffer> for CommandBuffer {
    fn from(buffer: Buffer) -> Self {
        Self::Own(buffer)
    }
}

/// Unused buffers of one disk, by size class.
#[derive(Default)]
pub(super) struct BufferPool([Mutex<Vec<Buffer>>; SIZE_CLASSES.len()]);

impl BufferPool {
    /// Returns a buffer of at least `len` bytes, whose content is undefined. Returns `None` if there is no memory.
    ///
    /// A buffer larger than the largest size class is allocated for this call, and not kept by [`Self::give`].
    pub(super) fn take(&self, len: usize) -> Option<Buffer> {
        let pages = len.div_ceil(PAGE);
        let class = SIZE_CLASSES.iter().position(|(size, _)| *size >= pages);
        let kept = class.and_then(|c| lock(&self.0[c]).pop());
        kept.or_else(|| {
            Page::new_vec_zeroed(class.map_or(pages, |c| SIZE_CLASSES[c].0))
                .ok()
                .map(Buffer)
        })
    }

    /// Returns a buffer to the pool, or frees it if the pool has enough of its size.
    pub(super) fn give(&self, buffer: Buffer) {
        if let Some(class) = SIZE_CLASSES.iter().position(|(size, _)| *size == buffer.0.len()) {
            let mut kept = lock(&self.0[class]);
            if kept.len() < SIZE_CLASSES[class].1 {
                kept.push(buffer);
            }
        }
    }
}

impl std::fmt::Debug for BufferPool {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("BufferPool")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buffers_are_page_aligned_long_enough_and_reused() {
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
            let start = buffer.bytes().as_ptr();
            assert_eq!(start.align_offset(PAGE), 0);
            buffer.bytes()[0] = 7;
            pool.give(buffer);
            if len < 2 << 20 {
                assert_eq!(pool.take(len).unwrap().bytes()[0], 7, "{len}");
            }
        }
    }

    #[test]
    fn the_number_of_unused_buffers_is_limited() {
        let pool = BufferPool::default();
        let many: Vec<Buffer> = (0..300).map(|_| pool.take(1).unwrap()).collect();
        many.into_iter().for_each(|b| pool.give(b));
        assert_eq!(pool.0[0].lock().unwrap().len(), SIZE_CLASSES[0].1);
    }

    #[test]
    fn the_parts_of_a_buffer_do_not_overlap_and_end_with_it() {
        let buffer = BufferPool::default().take(2 * PAGE).unwrap();
        let (shared, mut parts) = Shared::split(buffer, [1000, PAGE, 0, 3 * PAGE, 7].into_iter());
        let mut end = None;
        for (part, len) in parts.iter_mut().zip([1000, PAGE, 0, PAGE - 1000, 0]) {
            let (start, count) = part.bytes();
            assert_eq!(count, len);
            assert!(end.is_none_or(|end| end == start));
            end = Some(start.wrapping_add(count));
        }
        let last = parts.pop();
        drop(parts);
        assert!(Arc::clone(&shared).into_buffer().is_none(), "other owners exist");
        drop(last);
        assert_eq!(shared.into_buffer().unwrap().len(), 2 * PAGE);
    }
}
