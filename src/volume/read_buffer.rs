//! Read buffer of a thread, and shared zeroes for reads of holes.

use std::sync::LazyLock;

use crate::error::{Error, ErrorKind, Result};

/// Maximum bytes of one read: the largest request of the kernel.
pub const MAX_READ: usize = 1 << 20;

/// Alignment of buffers, the size of a page: aligned pages are copied faster to the kernel.
const ALIGN: usize = 4096;

/// Additional bytes for the rest of the granules at both ends of an unaligned read.
const SLACK: usize = 2 * ALIGN;

/// Zeroes for all threads, in pages that were written once. Pages that were never written all map the kernel's zero
/// page, from which it copies on a slow path (8 % of a read of holes).
static ZEROES: LazyLock<AlignedBytes> = LazyLock::new(|| {
    let mut buffer = AlignedBytes::new(MAX_READ);
    std::hint::black_box(buffer.0.as_mut_slice()).fill(1);
    std::hint::black_box(buffer.0.as_mut_slice()).fill(0);
    buffer
});

/// Bytes with a surplus of one page, so that the used part can start at a page.
#[derive(Debug, Default)]
struct AlignedBytes(Vec<u8>);

impl AlignedBytes {
    fn new(len: usize) -> Self {
        Self(vec![0; len + ALIGN])
    }

    /// Returns the position of the first page.
    fn skip(&self) -> usize {
        self.0.as_ptr().align_offset(ALIGN)
    }
}

/// Buffer of one thread, reused for each read.
#[derive(Debug, Default)]
pub struct ReadBuffer {
    buffer: AlignedBytes,
}

impl ReadBuffer {
    /// Creates an empty buffer. It allocates memory on first use.
    pub fn new() -> Self {
        Self::default()
    }

    /// Returns `len` bytes, aligned to a page, with unspecified content.
    ///
    /// Errors: `OutOfRange` for more than [`MAX_READ`] and the slack.
    pub(crate) fn bytes(&mut self, len: usize) -> Result<&mut [u8]> {
        if self.buffer.0.is_empty() {
            self.buffer = AlignedBytes::new(MAX_READ + SLACK);
        }
        let skip = self.buffer.skip();
        self.buffer.0.get_mut(skip..skip + len).ok_or_else(|| {
            let text = format!("a read of {len} bytes, expected at most {}", MAX_READ + SLACK);
            Error::new(ErrorKind::OutOfRange, text)
        })
    }

    /// Returns `len` zeroes, at most [`MAX_READ`].
    pub(crate) fn zeroes(len: usize) -> &'static [u8] {
        let skip = ZEROES.skip();
        ZEROES.0.get(skip..skip + len).unwrap_or_default()
    }
}
