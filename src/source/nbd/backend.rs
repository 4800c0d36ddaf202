//! Exports of NBD servers as sources.

use std::path::PathBuf;
use std::sync::Arc;

use super::catalog::ExportCatalog;
use super::disk::{GRACE, timeout};
use super::{NbdDisk, discover};
use crate::block::BlockRead;
use crate::cache::CacheOptions;
use crate::config::{Locality, NbdConfig, SourceSettings};
use crate::error::{Error, Result};
use crate::source::{
    Backend, CacheSizes, ExportServer, Listing, ServerInfo, Source, SourceDescription, SourceIdentity,
};
use crate::store::StoredFile;

/// Block of a cache over an export, in sectors: 64 KiB. A command for one costs little more than one for a page.
const CACHE_BLOCK: u64 = 128;

/// Blocks of one fetch: 1 MiB, the largest request of the kernel.
const CACHE_RUN: u64 = 16;

/// Fetches in flight for a cache. They wait for the server, not for a processor.
const CACHE_FETCHES: usize = 16;

/// Default of `readahead=` for a cache, in bytes.
const CACHE_READAHEAD: u64 = 8 << 20;

/// An open export.
#[derive(Debug)]
struct NbdSource {
    disk: Arc<NbdDisk>,
    config: NbdConfig,
}

impl Source for NbdSource {
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
            format: "nbd",
            vmdk: None,
        }
    }

    fn write_refusal(&self) -> Option<Error> {
        None
    }

    fn identity(&self) -> Result<SourceIdentity> {
        Ok(SourceIdentity {
            label: self.config.label(),
            address: PathBuf::from(self.config.identity()),
            cid: None,
        })
    }

    /// Returns the cache that the user asks for. By default the kernel's pages are the cache.
    fn cache(&self, asked: CacheSizes) -> Option<CacheOptions> {
        Some(CacheOptions {
            size: asked.size?,
            readahead: asked.readahead.unwrap_or(CACHE_READAHEAD),
            workers: CACHE_FETCHES,
            block: CACHE_BLOCK.next_multiple_of(self.disk.geometry().granule),
            max_run: CACHE_RUN,
            deadline: timeout(&self.config) + GRACE,
            drop_at_open: true,
        })
    }
}

impl Backend for NbdConfig {
    fn open(&self, _asked: CacheSizes) -> Result<Box<dyn Source>> {
        Ok(source_of(self, NbdDisk::connect(self, false)?))
    }

    fn open_for_writing(&self, _asked: CacheSizes) -> Result<(Box<dyn Source>, Option<String>)> {
        let disk = NbdDisk::connect(self, true)?;
        let why = disk
            .is_read_only()
            .then(|| "the server offers the export read-only".to_owned());
        Ok((source_of(self, disk), why))
    }

    fn list(&self) -> Option<Result<Listing>> {
        Some(discover::list(self).map(Listing::Exports))
    }

    fn server(&self) -> Option<&dyn ExportServer> {
        Some(self)
    }
}

impl ExportServer for NbdConfig {
    fn list(&self) -> Result<ServerInfo> {
        discover::list(self)
    }

    fn info(&self) -> Result<ServerInfo> {
        discover::info(self)
    }

    fn catalog(&self) -> Result<ExportCatalog> {
        ExportCatalog::connect(self)
    }
}

/// Returns the source of an export.
pub(super) fn source_of(config: &NbdConfig, disk: NbdDisk) -> Box<dyn Source> {
    Box::new(NbdSource {
        disk: Arc::new(disk),
        config: config.clone(),
    })
}
