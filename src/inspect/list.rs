//! `--list`: lists the exports of NBD servers, and the datastores and folders of web servers.

use serde::Serialize;

use super::{line, print, server_text};
use crate::config::{Query, SourceConfig};
use crate::error::Result;
use crate::source::nbd;
use crate::store::https::{Browser, Datacenter, ListedName};

/// What one server offers. The names of the fields are those of the JSON output.
#[derive(Debug, Serialize)]
#[serde(untagged)]
enum Listing {
    Exports(nbd::ServerInfo),
    Inventory { server: String, datacenters: Vec<Listed> },
    Folder { folder: String, names: Vec<Listed> },
}

/// One thing that a web server offers.
#[derive(Debug, Serialize)]
struct Listed {
    name: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    datastores: Option<Vec<String>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    folder: Option<bool>,
}

impl From<Datacenter> for Listed {
    fn from(datacenter: Datacenter) -> Self {
        Self {
            name: datacenter.name,
            datastores: Some(datacenter.datastores),
            folder: None,
        }
    }
}

impl From<ListedName> for Listed {
    fn from(listed: ListedName) -> Self {
        Self {
            name: listed.name.to_string_lossy().into_owned(),
            datastores: None,
            folder: Some(listed.is_folder),
        }
    }
}

/// Prints what each server offers (`--list`): exports, datacenters with their datastores, or the names in a folder. Local
/// disks of the query are ignored.
///
/// Errors: the first server that cannot be reached ends the action.
pub fn list(query: &Query) -> Result<u8> {
    let servers = query.disks.iter().filter_map(|disk| match &disk.source {
        SourceConfig::Nbd(server) => Some(nbd::list(server).map(Listing::Exports)),
        SourceConfig::Https(https) => Some(Browser::new(https).and_then(|browser| web_listing(&browser))),
        SourceConfig::Local(_) | SourceConfig::Vddk(_) => None,
    });
    let servers = servers.collect::<Result<Vec<_>>>()?;
    print(query.json, &servers, |out| {
        servers.iter().for_each(|server| listing_text(server, out));
    })?;
    Ok(0)
}

fn web_listing(browser: &Browser) -> Result<Listing> {
    if browser.is_inventory() {
        return Ok(Listing::Inventory {
            server: browser.label(),
            datacenters: browser.datacenters()?.into_iter().map(Listed::from).collect(),
        });
    }
    Ok(Listing::Folder {
        folder: browser.label(),
        names: browser.names()?.into_iter().map(Listed::from).collect(),
    })
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
