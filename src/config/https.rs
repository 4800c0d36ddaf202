//! Configuration of a disk on a web server: an ESXi or vCenter datastore, or any server with ranges.

use std::fmt;
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use super::local::Format;
use super::secret::{Secret, without_secrets};
use super::source_settings::{Locality, SourceSettings};
use super::view::ViewConfig;
use crate::vmdk::Degraded;

/// A disk on a web server.
#[derive(Debug, Clone, PartialEq)]
pub struct HttpsConfig {
    /// Address of the disk's file.
    pub address: HttpsAddress,
    /// The server, and how to log in and read there.
    pub server: HttpsServer,
    /// Folder that keeps fetched blocks across mounts, and the largest size of its files together.
    pub cache_dir: Option<(PathBuf, Option<u64>)>,
    /// Format of the image.
    pub format: Format,
    /// Defects of the chain that are accepted.
    pub degraded: Degraded,
    /// Disk of the package at that address.
    pub member: Option<String>,
    /// Address of the parent of the oldest link that is found.
    pub parent: Option<HttpsAddress>,
    /// Origin of the name of the disk's file.
    pub named: NamedBy,
}

/// Origin of the name of a disk on a web server.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum NamedBy {
    /// The user named the file, and the program chose a name for it in the mount.
    #[default]
    File,
    /// The user also chose the name in the mount, which only one disk can have.
    FileAndName,
    /// A search found the file: if it cannot be opened, it is left out.
    Search,
}

/// Login, trust and limits of a web server. Disks whose servers are equal share one login and its connections.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct HttpsServer {
    /// User name for the login.
    pub user: Option<String>,
    /// Password for the login.
    pub password: Option<Secret>,
    /// Session cookie to use in place of a login.
    pub cookie: Option<Secret>,
    /// Shell text that prints the cookie, and the time after which it is run again. `None`: when the cookie has expired.
    pub cookie_script: Option<(Secret, Option<Duration>)>,
    /// Certificates that are trusted.
    pub trust: Trust,
    /// Headers for every request to the server, each with its value, which may be a token.
    pub headers: Vec<(String, Secret)>,
    /// URL of a proxy, which may hold a password.
    pub proxy: Option<Secret>,
    /// Addresses to use in place of a lookup of these names.
    pub resolve: Vec<(String, IpAddr)>,
    /// Use HTTP/2 where the server has it; otherwise HTTP/1.1.
    pub http2: bool,
    /// Largest number of connections. `None`: the default number.
    pub connections: Option<usize>,
    /// Time after which a request fails. `None`: the default time, which is longer for a vCenter.
    pub timeout: Option<Duration>,
    /// Number of retries of a request. `None`: as many as `timeout` allows, and none for a server that cannot be reached
    /// at the start.
    pub retry: Option<u32>,
}

/// Address of a file on a web server.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum HttpsAddress {
    /// A file in a datastore.
    Datastore {
        /// Host name or IP address of the ESXi or vCenter.
        server: String,
        /// Port. `None`: 443.
        port: Option<u16>,
        /// Inventory path of the datacenter. `None`: the one of an ESXi.
        datacenter: Option<String>,
        /// Name of the datastore.
        datastore: String,
        /// Path in the datastore.
        path: String,
    },
    /// A URL without credentials.
    Url(String),
    /// The server itself, whose datacenters and datastores are to be listed. No disk has such an address.
    Server {
        /// Host name or IP address of the ESXi or vCenter.
        server: String,
        /// Port. `None`: 443.
        port: Option<u16>,
        /// Inventory path of the only datacenter to list. `None`: all of them.
        datacenter: Option<String>,
    },
}

/// Certificates that are trusted.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub enum Trust {
    /// Those that this machine trusts.
    #[default]
    System,
    /// Those of a PEM file.
    File(PathBuf),
    /// The server's certificate with this thumbprint.
    Pinned(Thumbprint),
    /// Any certificate.
    Any,
}

/// SHA-1 or SHA-256 of a certificate.
#[derive(Clone, PartialEq, Eq)]
pub struct Thumbprint(pub Vec<u8>);

impl Thumbprint {
    /// Parses hexadecimal digits with or without colons: 20 bytes (SHA-1) or 32 bytes (SHA-256).
    pub fn parse(text: &str) -> Option<Self> {
        let digits: Vec<u8> = text.bytes().filter(|b| !matches!(b, b':' | b' ' | b'-')).collect();
        let pair = |pair: &[u8]| {
            let text = std::str::from_utf8(pair)
                .ok()
                .filter(|_| pair.iter().all(u8::is_ascii_hexdigit));
            u8::from_str_radix(text?, 16).ok()
        };
        let bytes: Option<Vec<u8>> = digits.chunks(2).map(pair).collect();
        bytes
            .filter(|bytes| digits.len().is_multiple_of(2) && matches!(bytes.len(), 20 | 32))
            .map(Self)
    }
}

impl fmt::Display for Thumbprint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (i, byte) in self.0.iter().enumerate() {
            let colon = if i == 0 { "" } else { ":" };
            write!(f, "{colon}{byte:02X}")?;
        }
        Ok(())
    }
}

impl fmt::Debug for Thumbprint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{self}")
    }
}

impl SourceSettings for HttpsConfig {
    /// Returns the file without credentials, and without a query, which may hold a token.
    fn label(&self) -> String {
        match &self.address {
            HttpsAddress::Datastore { datastore, path, .. } => format!("[{datastore}] {path}"),
            HttpsAddress::Server { server, .. } => server.clone(),
            HttpsAddress::Url(url) => {
                let url = without_secrets(url);
                url.split(['?', '#']).next().unwrap_or_default().to_owned()
            }
        }
    }

    fn locality(&self) -> Locality {
        Locality::OtherMachine
    }

    fn accepts_loss(&self) -> bool {
        self.degraded.orphan || self.degraded.short
    }

    fn accepts_cid_mismatch(&self) -> bool {
        self.degraded.cid
    }

    fn reads_ahead(&self) -> bool {
        true
    }

    fn cache_dir(&self) -> Option<&Path> {
        self.cache_dir.as_ref().map(|(dir, _)| dir.as_path())
    }

    fn was_found(&self) -> bool {
        self.named == NamedBy::Search
    }

    /// The kernel can read the files once they are complete in the disk cache.
    fn kernel_view(&self) -> Option<ViewConfig> {
        self.cache_dir.as_ref().map(|_| ViewConfig::default())
    }

    /// Returns true: every answer is compared with the version at the open.
    fn excludes_writers(&self) -> bool {
        true
    }

    fn is_server(&self) -> bool {
        true
    }

    fn warns_of_connection(&self) -> bool {
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn thumbprints_have_20_or_32_bytes_with_or_without_colons() {
        let sha1 = "00:11:22:33:44:55:66:77:88:99:AA:BB:CC:DD:EE:FF:00:11:22:33";
        let parsed = Thumbprint::parse(&sha1.to_lowercase().replace(':', "")).unwrap();
        assert_eq!(parsed.to_string(), sha1);
        assert_eq!(Thumbprint::parse(sha1), Some(parsed));
        assert!(Thumbprint::parse(&"ab".repeat(32)).is_some());
        for bad in ["", "00", "zz", &"ab".repeat(21), &"a".repeat(41), &"+a".repeat(20)] {
            assert_eq!(Thumbprint::parse(bad), None, "{bad}");
        }
    }

    #[test]
    fn secrets_do_not_show_in_debug_output() {
        let server = HttpsServer {
            password: Some(Secret::new("hunter2")),
            cookie: Some(Secret::new("hunter2")),
            ..HttpsServer::default()
        };
        assert!(!format!("{server:?}").contains("hunter2"));
    }
}
