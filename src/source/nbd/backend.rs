//! Exports of NBD servers as sources.

use std::path::PathBuf;
use std::sync::Arc;

use super::catalog::ExportCatalog;
use super::disk::{GRACE, timeout};
use super::served_disk::{FETCHES, ServedDisk};
use super::{NbdDisk, discover};
use crate::block::BlockRead;
use crate::cache::CacheOptions;
use crate::config::{NbdConfig, SourceSettings};
use crate::error::Result;
use crate::source::{Backend, CacheSizes, ExportServer, Listing, ServerInfo, Source, SourceIdentity};

/// Block of a cache over an export, in sectors: 64 KiB. A command for one costs little more than one for a page.
const CACHE_BLOCK: u64 = 128;

/// Blocks of one fetch: 1 MiB, the largest request of the kernel.
const CACHE_RUN: u64 = 16;

/// Default of `readahead=` for a cache, in bytes.
const CACHE_READAHEAD: u64 = 8 << 20;

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

/// Returns the source of an export. It has a cache where the user asks for one: by default the kernel's pages are the cache.
pub(super) fn source_of(config: &NbdConfig, disk: NbdDisk) -> Box<dyn Source> {
    let cache = CacheOptions {
        size: 0,
        readahead: CACHE_READAHEAD,
        workers: FETCHES,
        block: CACHE_BLOCK.next_multiple_of(disk.geometry().granule),
        max_run: CACHE_RUN,
        deadline: timeout(config) + GRACE,
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
    })
}
