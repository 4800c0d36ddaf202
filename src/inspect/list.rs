//! `--list`: lists the exports of NBD servers.

use super::{print, server_text};
use crate::config::{Query, SourceConfig};
use crate::error::Result;
use crate::source::nbd;

/// Prints the exports of each NBD server (`--list`). Local disks of the query are ignored.
///
/// Errors: the first server that cannot be reached ends the action.
pub fn list(query: &Query) -> Result<u8> {
    let servers = query.disks.iter().filter_map(|disk| match &disk.source {
        SourceConfig::Nbd(server) => Some(nbd::list(server)),
        SourceConfig::Local(_) | SourceConfig::Https(_) | SourceConfig::Vddk(_) => None,
    });
    let servers = servers.collect::<Result<Vec<_>>>()?;
    print(query.json, &servers, |out| {
        servers.iter().for_each(|s| server_text(s, out));
    })?;
    Ok(0)
}
