//! In the place of NBD servers where this build has none (`--no-default-features`): all that is asked for is refused.

use std::ffi::OsString;

use crate::block::{BlockRead, Content, Geometry, Lba};
use crate::config::NbdConfig;
use crate::error::{Error, Result};
pub use crate::source::server_info::{ExportInfo, ServerInfo};

/// A disk that there is none of.
#[derive(Debug)]
pub enum NbdDisk {}

fn absent<T>(config: &NbdConfig) -> Result<T> {
    Err(Error::unsupported(format!(
        "{}: NBD is not built in (the feature `nbd` was left out)",
        config.label()
    )))
}

impl NbdDisk {
    /// Refuses.
    pub fn connect(config: &NbdConfig, _writable: bool) -> Result<Self> {
        absent(config)
    }

    /// Not to be asked.
    pub fn is_read_only(&self) -> bool {
        match *self {}
    }
}

impl BlockRead for NbdDisk {
    fn geometry(&self) -> Geometry {
        match *self {}
    }

    fn read_at(&self, _at: Lba, _buf: &mut [u8]) -> Result<()> {
        match *self {}
    }

    fn content_at(&self, _at: Lba) -> Result<(Content, u64)> {
        match *self {}
    }

    fn is_zero(&self, _at: Lba, _sectors: u64) -> bool {
        match *self {}
    }
}

/// There is none.
pub fn version() -> Result<Option<String>> {
    Ok(None)
}

/// Refuses.
pub fn list(config: &NbdConfig) -> Result<ServerInfo> {
    absent(config)
}

/// Refuses.
pub fn info(config: &NbdConfig) -> Result<ServerInfo> {
    absent(config)
}

/// Refuses.
pub fn exports(config: &NbdConfig, _writable: bool) -> Result<Vec<(OsString, NbdDisk)>> {
    absent(config)
}
