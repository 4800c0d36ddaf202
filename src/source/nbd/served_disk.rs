//! Disks that are reached over NBD as sources: exports of servers, and disks of processes that this program starts.

use std::sync::Arc;

use super::NbdDisk;
use crate::block::BlockRead;
use crate::cache::CacheOptions;
use crate::cache::disk_tier::KeptFile;
use crate::config::Locality;
use crate::error::{Error, Result};
use crate::source::{CacheSizes, Source, SourceDescription, SourceIdentity};
use crate::store::StoredFile;

/// Fetches in flight for a cache over such a disk. They wait for the server, not for a processor.
pub(in crate::source) const FETCHES: usize = 16;

/// An open disk behind the protocol.
#[derive(Debug)]
pub(in crate::source) struct ServedDisk {
    pub(in crate::source) disk: Arc<NbdDisk>,
    /// Name of its kind for `--info`.
    pub(in crate::source) format: &'static str,
    pub(in crate::source) locality: Locality,
    pub(in crate::source) identity: SourceIdentity,
    /// Cache for the disk. Sizes that the user asks for take the place of those in it.
    pub(in crate::source) cache: CacheOptions,
    /// True if the disk has the cache also where the user does not ask for it.
    pub(in crate::source) is_cached_by_default: bool,
    /// File in the disk tier that keeps the blocks of the cache, or why it has none.
    pub(in crate::source) kept: Option<Result<KeptFile>>,
}

impl Source for ServedDisk {
    fn disk(&self) -> Arc<dyn BlockRead> {
        Arc::clone(&self.disk) as Arc<dyn BlockRead>
    }

    fn files(&self) -> Vec<Arc<dyn StoredFile>> {
        Vec::new()
    }

    fn locality(&self) -> Locality {
        self.locality
    }

    fn describe(&self) -> SourceDescription {
        SourceDescription {
            format: self.format,
            vmdk: None,
        }
    }

    fn write_refusal(&self) -> Option<Error> {
        None
    }

    fn identity(&self) -> Result<SourceIdentity> {
        Ok(self.identity.clone())
    }

    fn cache(&self, asked: CacheSizes) -> Option<CacheOptions> {
        let default = self.is_cached_by_default.then_some(self.cache.size);
        Some(CacheOptions {
            size: asked.size.or(default)?,
            readahead: asked.readahead.unwrap_or(self.cache.readahead),
            ..self.cache
        })
    }

    fn kept(&self) -> Option<Result<KeptFile>> {
        self.kept.clone()
    }
}
