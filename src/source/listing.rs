//! Lists of what servers offer, for `--list`.

use serde::Serialize;

use super::ServerInfo;
use crate::store::https::{Datacenter, ListedName};

/// Offer of one server. The names of the fields are those of the JSON output.
#[derive(Debug, Serialize)]
#[serde(untagged)]
pub enum Listing {
    /// Exports of an NBD server.
    Exports(ServerInfo),
    /// Datacenters of an ESXi or a vCenter.
    Inventory {
        /// Name of the server.
        server: String,
        /// The datacenters.
        datacenters: Vec<Listed>,
    },
    /// Names in a folder.
    Folder {
        /// Name of the folder.
        folder: String,
        /// The names.
        names: Vec<Listed>,
    },
}

/// One thing that a web server offers.
#[derive(Debug, Serialize)]
pub struct Listed {
    /// Its name.
    pub name: String,
    /// Datastores of a datacenter.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub datastores: Option<Vec<String>>,
    /// True for a folder in a folder.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub folder: Option<bool>,
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
