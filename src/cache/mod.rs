//! Block cache with single-flight fetches and read-ahead, between a source and its volume.
//!
//! [`BlockCache`] keeps blocks of expensive sources (compressed grains) in memory and prefetches the next ones for
//! sequential readers. Plain local files have no cache: the kernel has their pages in its page cache already.

mod memory;
mod readahead;
mod single_flight;

pub use memory::{BlockCache, CacheOptions};
