//! Block cache with single-flight fetches and read-ahead.
//!
//! ```text
//!   BlockCache     a disk (sectors) ─────┐
//!   AdaptiveBlocks: a stored file on ────┴─► CachedBlocks ─► Fetch: a run of neighbouring blocks
//!     a server (bytes)                        │      └─ BlockMemory: shared by all files of a disk
//!                                             └──────── FetchPool: threads that fetch, shared as well
//! ```
//! [`BlockCache`] keeps blocks of expensive sources (compressed grains) in memory and prefetches the next ones for
//! sequential readers. Files on a server have the same cache below the engine. Plain local files have none: the kernel
//! has their pages in its page cache already.
//!
//! `without_waiting` lets an event loop answer what is in memory: a read that would have to wait fails with
//! [`ErrorKind::WouldBlock`], and the caller gives it to a thread that may wait.

use std::cell::Cell;
use std::fmt;
use std::ops::Range;
use std::sync::Arc;
use std::time::Duration;

use crate::error::{Error, ErrorKind, Result};

mod adaptive;
mod block_memory;
mod blocks;
pub mod disk_tier;
mod file_blocks;
mod memory;
mod pool;
mod readahead;
mod single_flight;
mod writes;

pub use adaptive::AdaptiveBlocks;
pub use block_memory::BlockMemory;
pub use blocks::CachedBlocks;
pub use memory::{BlockCache, CacheOptions};
pub use pool::FetchPool;

/// Bytes of a block. Not `Arc<[u8]>`: the conversion from the vector that was read into would copy the bytes.
pub type Block = Arc<Vec<u8>>;

/// Origin of the blocks of a cache.
pub trait Fetch: fmt::Debug + Send + Sync {
    /// Returns the length in bytes.
    fn len(&self) -> u64;

    /// Returns true if there are no bytes.
    fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Returns the size of a block in bytes. The last block may be smaller.
    fn block(&self) -> u64;

    /// Returns the largest number of neighbouring blocks of one fetch.
    fn max_run(&self) -> u64;

    /// Returns the largest number of neighbouring blocks of one fetch ahead of a reader. A fetch from far away should be long:
    /// between the end of one and the first byte of the next lies a round trip, in which its connection carries nothing.
    fn max_run_ahead(&self) -> u64 {
        self.max_run()
    }

    /// Returns the longest time that a reader waits for the fetch of another thread.
    fn deadline(&self) -> Duration;

    /// Returns true if memory alone shows that the range reads as zeroes. Does no I/O.
    fn is_zero(&self, _range: Range<u64>) -> bool {
        false
    }

    /// Fetches neighbouring blocks, at most [`max_run`](Self::max_run). Passes each to `each` in order, as soon as it is
    /// complete.
    ///
    /// Errors: those of I/O. The blocks that were passed before are valid all the same.
    fn fetch(&self, blocks: Range<u64>, each: &mut (dyn FnMut(Block) + Send)) -> Result<()>;

    /// Ends the fetches in flight with an error: no reader is left.
    fn close(&self) {}
}

thread_local! {
    static MAY_WAIT: Cell<bool> = const { Cell::new(true) };
}

/// Runs `read` so that no cache or server below is waited for: what is not in memory fails with [`ErrorKind::WouldBlock`].
pub(crate) fn without_waiting<T>(read: impl FnOnce() -> T) -> T {
    /// Restores the permission, also if `read` panics.
    struct Restore(bool);
    impl Drop for Restore {
        fn drop(&mut self) {
            MAY_WAIT.set(self.0);
        }
    }
    let _restore = Restore(MAY_WAIT.replace(false));
    read()
}

/// Returns true if the calling thread may wait for a fetch.
pub(crate) fn may_wait() -> bool {
    MAY_WAIT.get()
}

/// Returns the error of a read that would have to wait.
pub(crate) fn would_block() -> Error {
    Error::new(ErrorKind::WouldBlock, "the blocks are not in memory")
}
