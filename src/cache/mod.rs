//! What lies between a source and the bytes of its file.
//!
//! [`BlockCache`] keeps blocks that are dear to get (compressed grains) and gets the next ones ahead of time.
//! Plain local files go without it: the kernel has their pages already.

mod memory;
mod readahead;
mod single_flight;

pub use memory::{BlockCache, CacheOptions};
