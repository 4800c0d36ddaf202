//! Replies of the NBD server of a host.
//!
//! A reply is written in one piece under the lock of its connection, by whichever thread has the result. A client that
//! reads no replies stops its own connection.

use std::io::{self, IoSlice, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex};

use super::extents::{Content, Extent};
use crate::mutex::lock;

/// Identifier of the context `base:allocation` on every connection.
pub(super) const CONTEXT_ID: u32 = 1;

const SIMPLE_MAGIC: u32 = 0x6744_6698;
const CHUNK_MAGIC: u32 = 0x668e_33ef;

/// Chunks of a structured reply.
mod chunk {
    pub(super) const DONE: u16 = 1;
    pub(super) const OFFSET_DATA: u16 = 1;
    pub(super) const BLOCK_STATUS: u16 = 5;
    pub(super) const ERROR: u16 = (1 << 15) + 1;
}

/// States of `base:allocation`.
mod state {
    pub(super) const HOLE: u32 = 1;
    pub(super) const ZERO: u32 = 2;
}

/// The client of a connection.
pub(super) struct Client {
    stream: UnixStream,
    /// Held while a reply is written.
    writing: Mutex<()>,
}

/// Receiver of the result of one request.
pub(super) struct Reply {
    pub(super) client: Arc<Client>,
    /// True if it is a structured reply.
    pub(super) structured: bool,
    /// Number of the request, chosen by the client.
    pub(super) cookie: u64,
    /// Start of the range in bytes.
    pub(super) offset: u64,
}

impl Reply {
    /// Answers a request that has succeeded and returns nothing.
    pub(super) fn done(self) {
        self.simple(0, &[]);
    }

    /// Answers a read.
    pub(super) fn data(self, data: &[u8]) {
        if !self.structured {
            return self.simple(0, data);
        }
        self.chunk(chunk::OFFSET_DATA, &self.offset.to_be_bytes(), data);
    }

    /// Answers a request that has failed.
    pub(super) fn error(self, errno: u32) {
        if !self.structured {
            return self.simple(errno, &[]);
        }
        let [a, b, c, d] = errno.to_be_bytes();
        self.chunk(chunk::ERROR, &[a, b, c, d, 0, 0], &[]);
    }

    /// Answers a request for block status.
    pub(super) fn extents(self, extents: &[Extent]) {
        let mut text = CONTEXT_ID.to_be_bytes().to_vec();
        for extent in extents {
            let flags = match extent.content {
                Content::Data => 0,
                Content::Zero => state::HOLE | state::ZERO,
            };
            // An extent lies within a request, whose length has 32 bits.
            text.extend(u32::try_from(extent.len).unwrap_or(u32::MAX).to_be_bytes());
            text.extend(flags.to_be_bytes());
        }
        self.chunk(chunk::BLOCK_STATUS, &text, &[]);
    }

    /// Leaves a request without an answer: the host ends, and the parent repeats it.
    pub(super) fn abandon(self) {}

    fn simple(&self, errno: u32, data: &[u8]) {
        let mut head = [0; 16];
        head[..4].copy_from_slice(&SIMPLE_MAGIC.to_be_bytes());
        head[4..8].copy_from_slice(&errno.to_be_bytes());
        head[8..].copy_from_slice(&self.cookie.to_be_bytes());
        self.client.send(&head, data);
    }

    /// Sends a structured reply of one chunk.
    fn chunk(&self, kind: u16, start: &[u8], data: &[u8]) {
        let len = u32::try_from(start.len() + data.len()).unwrap_or(u32::MAX);
        let mut head = Vec::with_capacity(20 + start.len());
        head.extend(CHUNK_MAGIC.to_be_bytes());
        head.extend(chunk::DONE.to_be_bytes());
        head.extend(kind.to_be_bytes());
        head.extend(self.cookie.to_be_bytes());
        head.extend(len.to_be_bytes());
        head.extend(start);
        self.client.send(&head, data);
    }
}

impl Client {
    /// Creates the client at the other end of a stream.
    pub(super) fn new(stream: UnixStream) -> Self {
        Self {
            stream,
            writing: Mutex::default(),
        }
    }

    /// Ends the connection. Its stream lives on in the replies that were not sent yet.
    pub(super) fn shut_down(&self) {
        let _ = self.stream.shutdown(Shutdown::Both);
    }

    /// Sends a reply. Closes the connection if that fails: the parent sees it and repeats the request.
    fn send(&self, head: &[u8], data: &[u8]) {
        // A reply in two pieces would be torn apart by one of another thread.
        let _writing = lock(&self.writing);
        let mut slices = [IoSlice::new(head), IoSlice::new(data)];
        let mut left = slices.as_mut_slice();
        while left.iter().any(|slice| !slice.is_empty()) {
            match (&self.stream).write_vectored(left) {
                Ok(n @ 1..) => IoSlice::advance_slices(&mut left, n),
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                _ => {
                    return self.shut_down();
                }
            }
        }
    }
}
