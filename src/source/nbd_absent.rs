//! Stand-in for the NBD client in a build without it (`--no-default-features`): every request fails with `Unsupported`.

use std::ffi::OsString;

use crate::block::{BlockRead, Content, Geometry, Lba};
use crate::config::NbdConfig;
use crate::error::{Error, Result};
pub use crate::source::server_info::{ExportInfo, ServerInfo};

/// Disk of an NBD server. The type has no values in this build.
#[derive(Debug)]
pub enum NbdDisk {}

fn absent<T>(config: &NbdConfig) -> Result<T> {
    Err(Error::unsupported(format!(
        "{}: this program was built without NBD (enable the feature `nbd`)",
        config.label()
    )))
}

impl NbdDisk {
    /// Fails: this build has no NBD client.
    pub fn connect(config: &NbdConfig, _writable: bool) -> Result<Self> {
        absent(config)
    }

    /// Never called: there is no disk to call it on.
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

/// Returns `None`: this build has no libnbd.
pub fn version() -> Result<Option<String>> {
    Ok(None)
}

/// Fails: this build has no NBD client.
pub fn list(config: &NbdConfig) -> Result<ServerInfo> {
    absent(config)
}

/// Fails: this build has no NBD client.
pub fn info(config: &NbdConfig) -> Result<ServerInfo> {
    absent(config)
}

/// Fails: this build has no NBD client.
pub fn exports(config: &NbdConfig, _writable: bool) -> Result<Vec<(OsString, NbdDisk)>> {
    absent(config)
}
