//! NBD servers as a back end.

use super::catalog::ExportCatalog;
use super::export_source::source_of;
use super::{NbdDisk, discover};
use crate::config::NbdConfig;
use crate::error::Result;
use crate::source::{Backend, CacheSizes, ExportServer, Listing, ServerInfo, Source};

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
