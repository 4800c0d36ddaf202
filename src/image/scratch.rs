//! The buffer that a thread reads into, and zeroes that need none.

use crate::error::{Error, ErrorKind, Result};

/// The most bytes of one read: what the kernel asks for at once, at most.
pub const MAX_READ: usize = 1 << 20;

/// Pages are copied faster to the kernel when they start where its own do.
const ALIGN: usize = 4096;

/// Room for the sectors that an unaligned read touches at both ends.
const SLACK: usize = 2 * ALIGN;

/// Never written, so it takes no memory: the kernel maps its one page of zeroes here.
static ZEROES: [u8; MAX_READ] = [0; MAX_READ];

/// A buffer of one thread, kept from read to read.
#[derive(Debug, Default)]
pub struct Scratch {
    room: Vec<u8>,
}

impl Scratch {
    /// An empty buffer; it takes memory when it is first used.
    pub fn new() -> Self {
        Self::default()
    }

    /// `len` bytes, aligned to a page, of any content.
    pub(crate) fn bytes(&mut self, len: usize) -> Result<&mut [u8]> {
        if self.room.is_empty() {
            self.room = vec![0; MAX_READ + SLACK + ALIGN];
        }
        let skip = self.room.as_ptr().align_offset(ALIGN);
        self.room
            .get_mut(skip..skip + len)
            .ok_or_else(|| Error::new(ErrorKind::OutOfRange, format!("a read of {len} bytes at once")))
    }

    /// `len` zeroes, at most [`MAX_READ`].
    pub(crate) fn zeroes(len: usize) -> &'static [u8] {
        ZEROES.get(..len).unwrap_or(&ZEROES)
    }
}
