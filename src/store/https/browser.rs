//! Folders of a server, by the pages on which it lists them.
//!
//! A browser keeps the client of its server, so that disks which are opened while it exists share its login and its
//! connections.

use std::path::Path;
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, Mutex};

use reqwest::Url;

use super::address::Address;
use super::client::{Ask, Client, Want, may_be_wrong_form, of_forms};
use super::listing::{self, ListedName};
use crate::config::{HttpsAddress, HttpsConfig};
use crate::error::{Error, ErrorKind, Result};

/// Folders of a server.
#[derive(Debug)]
pub struct Browser {
    client: Arc<Client>,
    /// Address of the configured file, folder or server.
    address: Address,
    /// The only datacenter to list.
    datacenter: Option<String>,
}

/// Datacenter of a server.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Datacenter {
    /// Inventory path, as `datacenter=` takes it.
    pub name: String,
    /// Names of its datastores, sorted.
    pub datastores: Vec<String>,
}

impl Browser {
    /// Creates the browser of a configured server. Sends nothing yet.
    ///
    /// Errors: `Usage` if the address is not valid, those of reading the trusted certificates.
    pub fn new(config: &HttpsConfig) -> Result<Self> {
        let address = Address::of(config)?;
        let client = Client::of(config, &address.site.origin)?;
        let datacenter = match &config.address {
            HttpsAddress::Server { datacenter, .. } => datacenter.clone(),
            HttpsAddress::Datastore { .. } | HttpsAddress::Url(_) => None,
        };
        Ok(Self {
            client,
            address,
            datacenter,
        })
    }

    /// Returns the address of the configured file or folder, for messages.
    pub fn label(&self) -> String {
        self.address.label()
    }

    /// Returns true if the configured address is that of a server's datacenters or datastores.
    pub(crate) fn is_inventory(&self) -> bool {
        self.address.is_inventory()
    }

    /// Returns the datacenters of the server with their datastores, sorted.
    ///
    /// Errors: those of the server; it lists none.
    pub fn datacenters(&self) -> Result<Vec<Datacenter>> {
        let names = match &self.datacenter {
            Some(name) => vec![name.clone()],
            None => {
                let (url, page) = self.page(&self.address)?;
                listing::query_values(&page, &url, "dcPath")
            }
        };
        if names.is_empty() {
            let text = "lists no datacenters: is it an ESXi or a vCenter? Give datacenter= if it is";
            return Err(Error::new(ErrorKind::NotFound, text).within(self.label()));
        }
        let datastores = |name: String| {
            let (url, page) = self.page(&self.address.datastores_of(&name))?;
            let datastores = listing::query_values(&page, &url, "dsName");
            Ok(Datacenter { name, datastores })
        };
        names.into_iter().map(datastores).collect()
    }

    /// Returns the files and folders in the configured folder, sorted by name.
    ///
    /// Errors: those of the server; `Unsupported` if it is a file.
    pub fn names(&self) -> Result<Vec<ListedName>> {
        self.names_at(&self.address)
    }

    /// Returns the files and folders in a folder of the same datastore, sorted by name.
    ///
    /// Errors: those of the server; `NotFound`; `Unsupported` if it is a file.
    pub(crate) fn names_in(&self, folder: &Path) -> Result<Vec<ListedName>> {
        self.names_at(&self.address.in_same_datastore(folder))
    }

    fn names_at(&self, folder: &Address) -> Result<Vec<ListedName>> {
        let (url, page) = self.page(folder)?;
        listing::names(&page, &url).map_err(|e| e.within(folder.label()))
    }

    /// Returns the first bytes of a file in the same datastore, at most `most` of them.
    ///
    /// Errors: those of the server; `NotFound`.
    pub(crate) fn read_start(&self, path: &Path, most: u64) -> Result<Vec<u8>> {
        let file = self.address.in_same_datastore(path);
        self.ask(&file, Want::Bytes, most).map(|(_, bytes)| bytes)
    }

    /// Returns the page of a folder, and its address.
    fn page(&self, folder: &Address) -> Result<(Url, Vec<u8>)> {
        let [first, second] = folder.folder_forms();
        match self.ask(&first, Want::Page, 0) {
            Err(e) if e.kind() == ErrorKind::NotFound => self.ask(&second, Want::Page, 0).or(Err(e)),
            page => page,
        }
    }

    /// Asks for a page, or for the start of a file, in each form of its address until one is known.
    fn ask(&self, address: &Address, want: Want, most: u64) -> Result<(Url, Vec<u8>)> {
        self.client.forms.recall(&address.site);
        let mut failed: Option<Error> = None;
        for form in address.site.forms() {
            let (moved, closing) = (Mutex::default(), AtomicBool::new(false));
            let ask = Ask {
                address,
                form,
                moved: &moved,
                range: 0..most,
                want,
                known: None,
                closing: &closing,
            };
            let mut bytes = Vec::new();
            match self.client.read(&ask, &mut |piece| bytes.extend_from_slice(piece)) {
                Ok(_) => {
                    self.client.forms.note(&address.site, form);
                    return Ok((address.url(form), bytes));
                }
                Err(e) if may_be_wrong_form(&e) => failed = of_forms(failed, e),
                Err(e) => return Err(e.within(address.label())),
            }
        }
        let failed = failed.unwrap_or_else(|| Error::unsupported("has no address"));
        Err(failed.within(address.label()))
    }
}
