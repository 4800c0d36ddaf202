//! Addresses of files on a server, and the gate for the names that an image on a server contains.
//!
//! ```text
//!   https://HOST/folder/ dir/disk.vmdk ?dcPath=…&dsName=…      a datastore: one folder tree, chosen by the query
//!   https://HOST/images/ disk.vmdk                             any other server: the folder of the image
//!   └──── Site ────────┘ └─ path ────┘
//! ```
//! A path is percent-encoded once. A vCenter decodes dcPath and dsName *twice*, an ESXi once; which of both a server
//! does shows only by an error (404, or 500), so a datastore has both forms of its query, and the site remembers the one
//! that worked. A blank is always `%20`: a `+` would stay one in a path.
//!
//! The gate: a name inside an image is looked up beside the image, or in the same datastore if it has the form
//! `[datastore] dir/file` or `/vmfs/volumes/DATASTORE/dir/file`. It never leads to another server, another datastore, a
//! folder above (`..`), or a local file.

use std::os::unix::ffi::OsStrExt;
use std::path::{Component, Path};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

use reqwest::Url;

use crate::config::{HttpsAddress, HttpsConfig};
use crate::error::{Error, ErrorKind, Result};
use crate::mutex::lock;
use crate::store::{ExtentName, printable};

/// Folder of an ESXi's and a vCenter's datastores.
const FOLDER: &str = "/folder";

/// Datacenter that an ESXi has.
pub(super) const ESXI_DATACENTER: &str = "ha-datacenter";

/// The part of a server that the files of one image lie in.
#[derive(Debug)]
pub(super) struct Site {
    /// Scheme, host and port.
    pub(super) origin: Url,
    /// Forms of the query of all its files, the likeliest first; never empty.
    queries: Vec<Option<String>>,
    /// Index of the form that the server has answered with a file; `usize::MAX`: not known yet.
    answered: AtomicUsize,
    /// Name of the datastore; `None` for any other server.
    datastore: Option<String>,
    /// Path of the datastore's root, without a slash at its end.
    root: String,
}

/// Address of one file.
#[derive(Debug, Clone)]
pub(super) struct Address {
    pub(super) site: Arc<Site>,
    /// Percent-encoded path, from the server's root.
    path: String,
}

impl Site {
    /// Notes the form of the query that worked.
    pub(super) fn settle(&self, form: usize) {
        self.answered.store(form, Ordering::Relaxed);
    }

    /// Returns the indices of the forms to try: only the one that worked, once that is known.
    pub(super) fn forms(&self) -> std::ops::Range<usize> {
        match self.answered.load(Ordering::Relaxed) {
            usize::MAX => 0..self.queries.len(),
            known => known..known + 1,
        }
    }

    /// Returns true for a datastore of an ESXi or a vCenter.
    pub(super) fn is_datastore(&self) -> bool {
        self.datastore.is_some()
    }
}

/// Forms of queries that a server has answered with a file. Later files of the same datastore need not try them again.
#[derive(Debug, Default)]
pub(super) struct AnsweredForms(Mutex<Vec<(Vec<Option<String>>, usize)>>);

impl AnsweredForms {
    /// Tells the site its form, if another one with the same queries has found it.
    pub(super) fn recall(&self, site: &Site) {
        let known = lock(&self.0);
        if let Some((_, form)) = known.iter().find(|(queries, _)| *queries == site.queries) {
            site.settle(*form);
        }
    }

    /// Notes the form that worked.
    pub(super) fn note(&self, site: &Site, form: usize) {
        site.settle(form);
        let mut known = lock(&self.0);
        if site.queries.len() > 1 && !known.iter().any(|(queries, _)| *queries == site.queries) {
            known.push((site.queries.clone(), form));
        }
    }
}

impl Address {
    /// Returns the address of a configured disk.
    ///
    /// Errors: `Usage` if it is no valid address.
    pub(super) fn of(config: &HttpsConfig) -> Result<Self> {
        match &config.address {
            HttpsAddress::Datastore {
                server,
                port,
                datacenter,
                datastore,
                path,
            } => {
                let origin = origin_of(server, *port)?;
                let datacenter = datacenter.as_deref().unwrap_or(ESXI_DATACENTER);
                Ok(Self::in_datastore(origin, datacenter, datastore, path))
            }
            HttpsAddress::Server { server, port, .. } => Ok(Self::in_folder(origin_of(server, *port)?, None, None, "")),
            HttpsAddress::Url(url) => Self::of_url(url),
        }
    }

    fn in_datastore(origin: Url, datacenter: &str, datastore: &str, path: &str) -> Self {
        Self::in_folder(origin, Some(datacenter), Some(datastore), path)
    }

    /// Returns the address of the page that names the datastores of a datacenter, on the server of this address.
    pub(super) fn datastores_of(&self, datacenter: &str) -> Self {
        Self::in_folder(self.site.origin.clone(), Some(datacenter), None, "")
    }

    fn in_folder(origin: Url, datacenter: Option<&str>, datastore: Option<&str>, path: &str) -> Self {
        let once = |text: &str| percent_encode(text.as_bytes());
        let query = |encode: &dyn Fn(&str) -> String| {
            let pairs = [("dcPath", datacenter), ("dsName", datastore)];
            let pairs = pairs
                .iter()
                .filter_map(|(key, value)| Some(format!("{key}={}", encode((*value)?))));
            let query = pairs.collect::<Vec<_>>().join("&");
            (!query.is_empty()).then_some(query)
        };
        let mut queries = vec![query(&|text| once(&once(text))), query(&once)];
        queries.dedup();
        let site = Arc::new(Site {
            origin,
            queries,
            answered: AtomicUsize::new(usize::MAX),
            datastore: datastore.map(str::to_owned),
            root: FOLDER.to_owned(),
        });
        let path = format!("{FOLDER}/{}", encode_path(Path::new(path)));
        Self { site, path }
    }

    /// Returns the address of a URL, whose path and query are used as they are.
    fn of_url(url: &str) -> Result<Self> {
        let url = parse(url)?;
        let mut origin = url.clone();
        origin.set_path("/");
        origin.set_query(None);
        origin.set_fragment(None);
        // Credentials are handled as those of user= and password=; they must not show in messages.
        let cleared = origin.set_username("").is_ok() && origin.set_password(None).is_ok();
        if !cleared {
            return Err(Error::new(ErrorKind::Usage, "url=: has no host"));
        }
        let is_folder = url.path() == FOLDER || url.path().starts_with("/folder/");
        let datastore = query_value(&url, "dsName").filter(|_| is_folder);
        let root = if datastore.is_some() { FOLDER } else { "" };
        let site = Arc::new(Site {
            origin,
            queries: vec![url.query().map(str::to_owned)],
            answered: AtomicUsize::new(0),
            datastore,
            root: root.to_owned(),
        });
        Ok(Self {
            site,
            path: url.path().to_owned(),
        })
    }

    /// Returns the URL with a form of the query.
    pub(super) fn url(&self, form: usize) -> Url {
        let mut url = self.site.origin.clone();
        url.set_path(&self.path);
        url.set_query(self.site.queries.get(form).and_then(|query| query.as_deref()));
        url
    }

    /// Returns the name of the file, decoded.
    pub(super) fn name(&self) -> String {
        let last = self.path.rsplit('/').next().unwrap_or_default();
        String::from_utf8_lossy(&percent_decode(last)).into_owned()
    }

    /// Returns the address for messages: never with a query, which may hold a token.
    pub(super) fn label(&self) -> String {
        let decoded = |path: &str| String::from_utf8_lossy(&percent_decode(path)).into_owned();
        let text = match &self.site.datastore {
            Some(datastore) => {
                let path = self.path.strip_prefix(&self.site.root).unwrap_or(&self.path);
                format!("[{datastore}] {}", decoded(path.trim_start_matches('/')))
            }
            None => format!(
                "{}{}",
                self.site.origin.as_str().trim_end_matches('/'),
                decoded(&self.path)
            ),
        };
        printable(text)
    }

    /// Returns the address of a file or folder in the same datastore. Components such as `..` are left out.
    pub(super) fn in_same_datastore(&self, path: &Path) -> Self {
        self.at(format!("{}/{}", self.site.root, encode_path(path)))
    }

    /// Returns the addresses that this folder may have, with a slash at the end and without. A server that takes only one of
    /// them redirects to it, or finds no file at the other.
    pub(super) fn folder_forms(&self) -> [Self; 2] {
        let path = self.path.trim_end_matches('/');
        [self.at(format!("{path}/")), self.at(path.to_owned())]
    }

    /// Returns true for the page that names the datacenters or the datastores of a server.
    pub(super) fn is_inventory(&self) -> bool {
        self.site.datastore.is_none() && self.path.trim_end_matches('/') == FOLDER
    }

    /// Returns the address of a file that this one names.
    ///
    /// Errors: `Policy` if the name leads out of the image's folder or datastore.
    pub(super) fn named(&self, name: &ExtentName) -> Result<Self> {
        let refuse = |why: &str| {
            Err(Error::new(
                ErrorKind::Policy,
                format!("the name {name} {why}: names inside an image on a server lead to files beside it only"),
            ))
        };
        let bytes = name.as_bytes();
        if let Some((datastore, path)) = datastore_path(bytes) {
            let Some(own) = &self.site.datastore else {
                return refuse("is that of a file in a datastore");
            };
            // A datastore has a UUID as a second name, which a server does not translate here. The CID of a parent that
            // was found this way is checked by the engine.
            if datastore != own.as_bytes() && !is_uuid(datastore) {
                return refuse(&format!("leads out of the datastore {}", printable(own)));
            }
            let path = Path::new(std::ffi::OsStr::from_bytes(path));
            return match is_inside(path) {
                true => Ok(self.at(format!("{}/{}", self.site.root, encode_path(path)))),
                false => refuse("leads to another folder by .."),
            };
        }
        let path = name.as_path();
        if path.is_absolute() {
            return refuse("is an absolute path");
        }
        if !is_inside(path) {
            return refuse("leads to another folder by ..");
        }
        let folder = self.path.rsplit_once('/').map_or("", |(folder, _)| folder);
        Ok(self.at(format!("{folder}/{}", encode_path(path))))
    }

    fn at(&self, path: String) -> Self {
        Self {
            site: Arc::clone(&self.site),
            path,
        }
    }
}

/// Returns the root of a server. An IPv6 address stands in brackets in a URL.
fn origin_of(server: &str, port: Option<u16>) -> Result<Url> {
    let host = if server.contains(':') && !server.starts_with('[') {
        format!("[{server}]")
    } else {
        server.to_owned()
    };
    let port = port.map_or_else(String::new, |port| format!(":{port}"));
    parse(&format!("https://{host}{port}/"))
}

/// Returns true if both addresses have the same scheme, host and port.
pub(super) fn same_origin(a: &Url, b: &Url) -> bool {
    a.scheme() == b.scheme() && a.host_str() == b.host_str() && a.port_or_known_default() == b.port_or_known_default()
}

/// Returns a value of a query. It may be encoded once or twice; the names themselves have no percent signs as a rule.
pub(super) fn query_value(url: &Url, key: &str) -> Option<String> {
    let (_, value) = url.query_pairs().find(|(name, _)| name == key)?;
    Some(String::from_utf8_lossy(&percent_decode(&value)).into_owned())
}

fn parse(text: &str) -> Result<Url> {
    // The text may hold a password, so the message does not.
    Url::parse(text).map_err(|e| Error::new(ErrorKind::Usage, format!("the address is not valid: {e}")))
}

/// Splits `[datastore] path` and `/vmfs/volumes/datastore/path`.
fn datastore_path(name: &[u8]) -> Option<(&[u8], &[u8])> {
    if let Some(rest) = name.strip_prefix(b"/vmfs/volumes/") {
        let slash = rest.iter().position(|b| *b == b'/')?;
        return Some((&rest[..slash], &rest[slash + 1..]));
    }
    split_datastore(name)
}

/// Splits `[datastore] path` into the datastore and the path. The blank is optional.
pub fn split_datastore(text: &[u8]) -> Option<(&[u8], &[u8])> {
    let rest = text.strip_prefix(b"[")?;
    let end = rest.iter().position(|b| *b == b']')?;
    let path = rest[end + 1..].trim_ascii_start();
    let path = path.strip_prefix(b"/").unwrap_or(path);
    (end > 0 && !path.is_empty()).then_some((&rest[..end], path))
}

/// Returns true for the second name of a VMFS datastore, such as `5f3a1b2c-0d1e2f3a-4b5c-001122334455`, and of an NFS one.
fn is_uuid(name: &[u8]) -> bool {
    name.len() >= 17 && name.iter().all(|b| b.is_ascii_hexdigit() || *b == b'-') && name.contains(&b'-')
}

fn is_inside(path: &Path) -> bool {
    path.components()
        .all(|part| matches!(part, Component::Normal(_) | Component::CurDir))
}

/// Percent-encodes each component of a relative path.
fn encode_path(path: &Path) -> String {
    let parts = path.components().filter_map(|part| match part {
        Component::Normal(part) => Some(percent_encode(part.as_bytes())),
        _ => None,
    });
    parts.collect::<Vec<_>>().join("/")
}

/// Percent-encodes all bytes but the unreserved ones of RFC 3986.
fn percent_encode(bytes: &[u8]) -> String {
    let mut out = String::new();
    for byte in bytes {
        if byte.is_ascii_alphanumeric() || b"-._~".contains(byte) {
            out.push(char::from(*byte));
        } else {
            out.push_str(&format!("%{byte:02X}"));
        }
    }
    out
}

/// Decodes percent-encoded text. A percent sign without two hexadecimal digits stays as it is.
pub fn percent_decode(text: &str) -> Vec<u8> {
    let mut out = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let Some((first, after)) = rest.split_first() {
        let hex = after.get(..2).filter(|_| *first == b'%');
        let byte = hex
            .filter(|hex| hex.iter().all(u8::is_ascii_hexdigit))
            .and_then(|hex| u8::from_str_radix(std::str::from_utf8(hex).ok()?, 16).ok());
        match byte {
            Some(byte) => {
                out.push(byte);
                rest = &after[2..];
            }
            None => {
                out.push(*first);
                rest = after;
            }
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    fn datastore(path: &str) -> Address {
        let origin = Url::parse("https://esx/").unwrap();
        Address::in_datastore(origin, "Folder/My DC", "ds (1)", path)
    }

    fn named(address: &Address, name: &str) -> Result<String> {
        address
            .named(&ExtentName::new(name).unwrap())
            .map(|address| address.url(0).to_string())
    }

    #[test]
    fn a_path_is_encoded_once_and_the_query_twice_then_once() {
        let address = datastore("a b/c+d [1] ü.vmdk");
        let path = "https://esx/folder/a%20b/c%2Bd%20%5B1%5D%20%C3%BC.vmdk";
        assert_eq!(
            address.url(0).as_str(),
            format!("{path}?dcPath=Folder%252FMy%2520DC&dsName=ds%2520%25281%2529")
        );
        assert_eq!(
            address.url(1).as_str(),
            format!("{path}?dcPath=Folder%2FMy%20DC&dsName=ds%20%281%29")
        );
        assert_eq!(address.site.forms(), 0..2);
        address.site.settle(1);
        assert_eq!(address.site.forms(), 1..2);
        assert_eq!(address.label(), "[ds (1)] a b/c+d [1] ü.vmdk");
    }

    #[test]
    fn one_form_is_enough_where_both_are_the_same() {
        let address = Address::in_datastore(Url::parse("https://esx/").unwrap(), ESXI_DATACENTER, "ds1", "x.vmdk");
        assert_eq!(address.site.forms(), 0..1);
    }

    #[test]
    fn names_lead_to_files_of_the_same_datastore_only() {
        let address = datastore("vm/x.vmdk");
        let query = "?dcPath=Folder%252FMy%2520DC&dsName=ds%2520%25281%2529";
        for (name, path) in [
            ("x-flat.vmdk", "vm/x-flat.vmdk"),
            ("sub/./y.vmdk", "vm/sub/y.vmdk"),
            ("[ds (1)] base/b.vmdk", "base/b.vmdk"),
            ("[ds (1)]/base/b.vmdk", "base/b.vmdk"),
            ("/vmfs/volumes/ds (1)/base/b.vmdk", "base/b.vmdk"),
            (
                "/vmfs/volumes/5f3a1b2c-0d1e2f3a-4b5c-001122334455/base/b.vmdk",
                "base/b.vmdk",
            ),
            ("https://evil/x", "vm/https%3A/evil/x"),
            ("a?b#c", "vm/a%3Fb%23c"),
        ] {
            let url = named(&address, name).unwrap();
            assert_eq!(url, format!("https://esx/folder/{path}{query}"), "{name}");
        }
        for name in [
            "/etc/passwd",
            "../x",
            "a/../../x",
            "[other] x.vmdk",
            "/vmfs/volumes/other/x",
            "[ds (1)] ../x",
        ] {
            assert_eq!(named(&address, name).unwrap_err().kind(), ErrorKind::Policy, "{name}");
        }
    }

    #[test]
    fn a_url_keeps_its_path_and_query_and_loses_its_credentials() {
        let address = Address::of_url("https://u:p@h:8443/a%20b/x.vmdk?token=1").unwrap();
        assert_eq!(address.url(0).as_str(), "https://h:8443/a%20b/x.vmdk?token=1");
        assert_eq!(address.label(), "https://h:8443/a b/x.vmdk");
        assert_eq!(address.name(), "x.vmdk");
        assert_eq!(
            named(&address, "y z.vmdk").unwrap(),
            "https://h:8443/a%20b/y%20z.vmdk?token=1"
        );
        for name in ["[ds] x", "/vmfs/volumes/ds/x", "/x", "../x"] {
            assert_eq!(named(&address, name).unwrap_err().kind(), ErrorKind::Policy, "{name}");
        }
        let pasted = Address::of_url("https://h/folder/v/v-flat.vmdk?dcPath=a%2520b&dsName=my%2520ds").unwrap();
        assert_eq!(pasted.label(), "[my ds] v/v-flat.vmdk");
        let url = named(&pasted, "[my ds] b/b.vmdk").unwrap();
        assert_eq!(url, "https://h/folder/b/b.vmdk?dcPath=a%2520b&dsName=my%2520ds");
    }
}
