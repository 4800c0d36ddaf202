//! Disks of VMware's library as sources.

use std::path::PathBuf;
use std::sync::Arc;

use super::abi::CHUNK_SECTORS;
use super::process::{self, TIMEOUT};
use crate::block::BlockRead;
use crate::cache::CacheOptions;
use crate::config::{SourceSettings, VddkConfig};
use crate::error::Result;
use crate::source::nbd::{FETCHES, GRACE, ServedDisk};
use crate::source::{Backend, CacheSizes, Source, SourceIdentity};

/// Default size of the cache for a disk on a server, and its read-ahead, in bytes.
const CACHE: u64 = 64 << 20;
const READAHEAD: u64 = 16 << 20;

impl Backend for VddkConfig {
    fn open(&self, _asked: CacheSizes) -> Result<Box<dyn Source>> {
        source_of(self, false)
    }

    fn open_for_writing(&self, _asked: CacheSizes) -> Result<(Box<dyn Source>, Option<String>)> {
        Ok((source_of(self, true)?, None))
    }

    /// Creates the disk: the library does so when it opens it.
    fn create(&self) -> Result<()> {
        process::connect(self, true).map(drop)
    }
}

/// Returns the source of a disk. One on a server has a cache, a local one where the user asks for it.
fn source_of(config: &VddkConfig, writable: bool) -> Result<Box<dyn Source>> {
    let disk = process::connect(config, writable)?;
    let cache = CacheOptions {
        size: CACHE,
        readahead: READAHEAD,
        workers: FETCHES,
        block: CHUNK_SECTORS.next_multiple_of(disk.geometry().granule),
        max_run: 1,
        deadline: config.timeout.unwrap_or(TIMEOUT) + GRACE,
        // A disk that is open for writing is locked; one that is only read is a snapshot, or belongs to a machine that is
        // powered off.
        drop_at_open: false,
    };
    let label = config.label();
    Ok(Box::new(ServedDisk {
        disk: Arc::new(disk),
        format: "vddk",
        locality: config.locality(),
        identity: SourceIdentity {
            address: PathBuf::from(&label),
            label,
            cid: None,
        },
        cache,
        is_cached_by_default: config.remote.is_some(),
    }))
}
