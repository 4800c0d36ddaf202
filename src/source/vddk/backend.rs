//! Disks of VMware's library as sources.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use super::abi::CHUNK_SECTORS;
use super::process::{self, TIMEOUT};
use crate::block::BlockRead;
use crate::cache::CacheOptions;
use crate::config::{Locality, SourceSettings, VddkConfig};
use crate::error::{Error, Result};
use crate::source::nbd::NbdDisk;
use crate::source::{Backend, CacheSizes, Source, SourceDescription, SourceIdentity};
use crate::store::StoredFile;

/// Default size of the cache for a disk on a server, and its read-ahead, in bytes: those of HTTPS.
const CACHE: u64 = 64 << 20;
const READAHEAD: u64 = 16 << 20;

/// Fetches in flight for a cache. They wait for the server, not for a processor.
const FETCHES: usize = 16;

/// Time after the deadline of a request within which its result must have reached the waiting thread.
const GRACE: Duration = Duration::from_secs(10);

/// An open disk of the library.
#[derive(Debug)]
struct VddkSource {
    disk: Arc<NbdDisk>,
    config: VddkConfig,
}

impl Source for VddkSource {
    fn disk(&self) -> Arc<dyn BlockRead> {
        Arc::clone(&self.disk) as Arc<dyn BlockRead>
    }

    fn files(&self) -> Vec<Arc<dyn StoredFile>> {
        Vec::new()
    }

    fn locality(&self) -> Locality {
        self.config.locality()
    }

    fn describe(&self) -> SourceDescription {
        SourceDescription {
            format: "vddk",
            vmdk: None,
        }
    }

    fn write_refusal(&self) -> Option<Error> {
        None
    }

    fn identity(&self) -> Result<SourceIdentity> {
        let label = self.config.label();
        Ok(SourceIdentity {
            address: PathBuf::from(&label),
            label,
            cid: None,
        })
    }

    /// Returns a cache for a disk on a server, and for a local one where the user asks for it.
    fn cache(&self, asked: CacheSizes) -> Option<CacheOptions> {
        let default = self.config.remote.as_ref().map(|_| CACHE);
        Some(CacheOptions {
            size: asked.size.or(default)?,
            readahead: asked.readahead.unwrap_or(READAHEAD),
            workers: FETCHES,
            block: CHUNK_SECTORS.next_multiple_of(self.disk.geometry().granule),
            max_run: 1,
            deadline: self.config.timeout.unwrap_or(TIMEOUT) + GRACE,
            // A disk that is open for writing is locked; one that is only read is a snapshot, or belongs to a machine that is
            // powered off.
            drop_at_open: false,
        })
    }
}

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

fn source_of(config: &VddkConfig, writable: bool) -> Result<Box<dyn Source>> {
    Ok(Box::new(VddkSource {
        disk: Arc::new(process::connect(config, writable)?),
        config: config.clone(),
    }))
}
