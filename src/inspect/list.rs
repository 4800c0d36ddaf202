//! `--list`: lists the exports of NBD servers, and the datastores and folders of web servers.

use super::{line, print, server_text};
use crate::config::Query;
use crate::error::Result;
use crate::source::Listing;
use crate::volume;

/// Prints what each server offers (`--list`): exports, datacenters with their datastores, or the names in a folder. Other
/// disks of the query are ignored.
///
/// Errors: the first server that cannot be reached ends the action.
pub fn list(query: &Query) -> Result<u8> {
    let servers = query.disks.iter().filter_map(|disk| volume::list(&disk.source));
    let servers = servers.collect::<Result<Vec<_>>>()?;
    print(query.json, &servers, |out| {
        servers.iter().for_each(|server| listing_text(server, out));
    })?;
    Ok(0)
}

fn listing_text(listing: &Listing, out: &mut String) {
    match listing {
        Listing::Exports(server) => server_text(server, out),
        Listing::Inventory { server, datacenters } => {
            line!(out, "{server}:");
            for datacenter in datacenters {
                line!(out, "  datacenter={}", datacenter.name);
                for datastore in datacenter.datastores.iter().flatten() {
                    line!(out, "    [{datastore}]");
                }
            }
        }
        Listing::Folder { folder, names } => {
            line!(out, "{folder}:");
            for listed in names {
                let slash = if listed.folder == Some(true) { "/" } else { "" };
                line!(out, "  {}{slash}", listed.name);
            }
        }
    }
}
