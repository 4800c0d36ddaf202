//! Commands while the library has them.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

use crate::mutex::lock;
use crate::source::nbd::command::Command;

/// Maximum number of extents that are accepted from one answer to block status; also of out-of-order chunks of a read.
pub(super) const MAX_EXTENTS: usize = 1 << 16;

/// Error of a command that the library returned without completing it: the library refused it, or the connection has
/// ended. No `errno` is negative.
pub(in crate::source::nbd) const UNSENT: i32 = -1;

/// Commands that the library has returned, each with its error: an `errno` or [`UNSENT`].
#[derive(Debug, Default)]
pub(in crate::source::nbd) struct CompletionQueue {
    list: Mutex<Vec<(Box<Command>, Option<i32>)>>,
    len: AtomicUsize,
}

impl CompletionQueue {
    pub(super) fn push(&self, command: Box<Command>, error: Option<i32>) {
        let mut list = lock(&self.list);
        list.push((command, error));
        self.len.store(list.len(), Ordering::Release);
    }

    /// Moves all commands to the end of `out`.
    pub(in crate::source::nbd) fn take(&self, out: &mut Vec<(Box<Command>, Option<i32>)>) {
        // Called after each send and each poll event, so an empty queue must not cost a lock.
        if self.len.load(Ordering::Acquire) > 0 {
            let mut list = lock(&self.list);
            out.append(&mut list);
            self.len.store(0, Ordering::Release);
        }
    }
}

/// Owner of a command while the library has it, and the queue that the command is returned to.
#[derive(Debug)]
pub(super) struct Ticket {
    pub(super) command: Option<Box<Command>>,
    /// Received parts of the answer, for a read with structured replies.
    pub(super) chunks: Option<Chunks>,
    pub(super) completions: Arc<CompletionQueue>,
}

/// Parts of the answer to a read. libnbd checks that each chunk lies within the request, but not that the chunks cover
/// it, so a server could leave a part of the buffer with old data.
#[derive(Debug)]
pub(super) struct Chunks {
    /// All bytes before this offset were received.
    next: u64,
    end: u64,
    /// Begin and end of the parts that were received out of order.
    out_of_order: Vec<(u64, u64)>,
}

impl Chunks {
    /// Creates the record for a read of that range, with no part received yet.
    pub(super) fn new(offset: u64, len: u64) -> Self {
        Self {
            next: offset,
            end: offset + len,
            out_of_order: Vec::new(),
        }
    }

    pub(super) fn add(&mut self, offset: u64, count: u64) {
        if offset == self.next {
            self.next += count;
        } else if self.out_of_order.len() < MAX_EXTENTS {
            // A part that is dropped because the list is full makes the read fail, which is safe.
            self.out_of_order.push((offset, offset + count));
        }
    }

    /// Returns true if each byte was received, and received once.
    pub(super) fn are_complete(&mut self) -> bool {
        self.out_of_order.sort_unstable();
        for (start, end) in self.out_of_order.drain(..) {
            if start != self.next {
                return false;
            }
            self.next = end;
        }
        self.next == self.end
    }
}

impl Ticket {
    /// Moves the command to the queue. Does nothing if that was done before.
    pub(super) fn retire(&mut self, error: Option<i32>) {
        if let Some(command) = self.command.take() {
            self.completions.push(command, error);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn chunks_in_any_order_are_complete_if_each_byte_was_received_once() {
        let complete = |parts: &[(u64, u64)]| {
            let mut chunks = Chunks::new(100, 50);
            parts.iter().for_each(|(offset, count)| chunks.add(*offset, *count));
            chunks.are_complete()
        };
        assert!(complete(&[(100, 50)]) && complete(&[(100, 20), (120, 30)]));
        assert!(complete(&[(120, 10), (130, 20), (100, 20)]));
        for wrong in [
            &[(100, 49)][..],
            &[(100, 25), (100, 25)],
            &[(110, 40)],
            &[(100, 30), (120, 20)],
            &[],
        ] {
            assert!(!complete(wrong), "{wrong:?}");
        }
    }
}
