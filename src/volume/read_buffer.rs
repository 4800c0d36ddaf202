//! The buffer that a thread reads into, and zeroes that need none.

use std::sync::LazyLock;

use crate::error::{Error, ErrorKind, Result};

/// The most bytes of one read: what the kernel asks for at once, at most.
pub const MAX_READ: usize = 1 << 20;

/// Pages are copied faster to the kernel when they start where its own do.
const ALIGN: usize = 4096;

/// Room for the sectors that an unaligned read touches at both ends.
const SLACK: usize = 2 * ALIGN;

/// Zeroes for all threads. Real memory, touched once: pages that were never written are all the kernel's one page
/// of zeroes, which it copies from on a slow path (8 % of a read of holes).
static ZEROES: LazyLock<Room> = LazyLock::new(|| {
    let mut room = Room::new(MAX_READ);
    std::hint::black_box(room.0.as_mut_slice()).fill(1);
    std::hint::black_box(room.0.as_mut_slice()).fill(0);
    room
});

/// Bytes with enough of them to start at a page.
#[derive(Debug, Default)]
struct Room(Vec<u8>);

impl Room {
    fn new(len: usize) -> Self {
        Self(vec![0; len + ALIGN])
    }

    /// Where the first page starts.
    fn skip(&self) -> usize {
        self.0.as_ptr().align_offset(ALIGN)
    }
}

/// A buffer of one thread, kept from read to read.
#[derive(Debug, Default)]
pub struct ReadBuffer {
    room: Room,
}

impl ReadBuffer {
    /// An empty buffer; it takes memory when it is first used.
    pub fn new() -> Self {
        Self::default()
    }

    /// `len` bytes, aligned to a page, of any content.
    pub(crate) fn bytes(&mut self, len: usize) -> Result<&mut [u8]> {
        if self.room.0.is_empty() {
            self.room = Room::new(MAX_READ + SLACK);
        }
        let skip = self.room.skip();
        self.room
            .0
            .get_mut(skip..skip + len)
            .ok_or_else(|| Error::new(ErrorKind::OutOfRange, format!("a read of {len} bytes at once")))
    }

    /// `len` zeroes, at most [`MAX_READ`].
    pub(crate) fn zeroes(len: usize) -> &'static [u8] {
        let skip = ZEROES.skip();
        ZEROES.0.get(skip..skip + len).unwrap_or_default()
    }
}
