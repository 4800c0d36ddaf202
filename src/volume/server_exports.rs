//! The exports of a server as disks of a mount, which are found when they are looked up (`dynamic-export=`).

use std::ffi::{OsStr, OsString};
use std::sync::Arc;

use super::Volume;
use super::open::volume_of;
use crate::config::DiskConfig;
use crate::error::Result;
use crate::source::{ExportCatalog, ExportServer, FoundExport};

/// The exports of one server.
#[derive(Debug)]
pub struct ServerExports {
    /// Configuration that each disk gets, with a name and an export of its own.
    config: DiskConfig,
    catalog: Arc<ExportCatalog>,
}

impl ServerExports {
    /// Connects to `server`, which is the source of `config`, and lists its exports.
    pub(super) fn connect(config: &DiskConfig, server: &dyn ExportServer) -> Result<Self> {
        Ok(Self {
            config: config.clone(),
            catalog: Arc::new(server.catalog()?),
        })
    }

    /// Returns the server, for messages.
    pub fn label(&self) -> String {
        self.config.source.label()
    }

    /// Returns the names of the exports that the server lists, each once. The same `Arc` as before means the same names.
    /// Waits a short while for an answer of the server, and then returns the last names.
    pub fn names(&self) -> Arc<[OsString]> {
        self.catalog.exports()
    }

    /// Returns true while the server does not answer, so that nothing is asked that is known.
    pub(crate) fn is_paused(&self) -> bool {
        self.catalog.is_paused()
    }

    /// Returns true if a disk can be written to, unless its export is read-only.
    pub fn is_writable(&self) -> bool {
        !self.config.read_only
    }

    /// Asks the server for an export; `None` if it has none of that name. `known`: its disk is there already, and is worth
    /// no long wait.
    pub(crate) fn find(&self, export: &OsStr, known: bool) -> Result<Option<FoundExport>> {
        self.catalog.find(export, known)
    }

    /// Returns the disk of an export and its configuration. It connects when it is first used.
    pub(crate) fn disk(&self, export: &OsStr, found: &FoundExport, file_name: &OsStr) -> Result<(DiskConfig, Volume)> {
        let open = self.catalog.open(export, found, self.is_writable())?;
        let config = DiskConfig {
            name: file_name.to_owned(),
            source: open.config,
            ..self.config.clone()
        };
        let volume = volume_of(&config, &*open.source)?;
        Ok((config, volume))
    }
}
