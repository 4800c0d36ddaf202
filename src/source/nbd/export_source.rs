//! Source of one export of a server.

use std::path::PathBuf;
use std::sync::Arc;

use super::NbdDisk;
use super::disk::{longest_answer, timeout};
use super::served_disk::{FETCHES, ServedDisk};
use crate::block::BlockRead;
use crate::cache::CacheOptions;
use crate::config::{NbdConfig, SourceSettings};
use crate::source::{Source, SourceIdentity};

/// Block of a cache over an export, in sectors: 64 KiB. A command for one costs little more than one for a page.
const CACHE_BLOCK: u64 = 128;

/// Blocks of one fetch: 1 MiB, the largest request of the kernel.
const CACHE_RUN: u64 = 16;

/// Default of `readahead=` for a cache, in bytes.
const CACHE_READAHEAD: u64 = 8 << 20;

/// Returns the source of an export. It has a cache where the user asks for one: by default the kernel's pages are the cache.
pub(super) fn source_of(config: &NbdConfig, disk: NbdDisk) -> Box<dyn Source> {
    let cache = CacheOptions {
        size: 0,
        readahead: CACHE_READAHEAD,
        workers: FETCHES,
        block: CACHE_BLOCK.next_multiple_of(disk.geometry().granule),
        max_run: CACHE_RUN,
        deadline: longest_answer(timeout(config)),
        drop_at_open: true,
    };
    Box::new(ServedDisk {
        disk: Arc::new(disk),
        format: "nbd",
        locality: config.locality(),
        identity: SourceIdentity {
            label: config.label(),
            address: PathBuf::from(config.identity()),
            cid: None,
        },
        cache,
        is_cached_by_default: false,
        kept: None,
    })
}
