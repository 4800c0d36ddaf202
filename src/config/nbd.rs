//! Configuration of an export of an NBD server.

use std::ffi::OsString;
use std::path::PathBuf;
use std::time::Duration;

use super::secret::without_secrets;
use super::source_settings::{Locality, SourceSettings};

/// Export of an NBD server.
#[derive(Debug, Clone, PartialEq)]
pub struct NbdConfig {
    /// Address of the server.
    pub address: NbdAddress,
    /// Name of the export. `None`: the name in the URI, or else the export with the empty name.
    pub export: Option<OsString>,
    /// True if every export of the server becomes a disk.
    pub dynamic: bool,
    /// Largest number of connections if the server supports several. `None`: the default number.
    pub connections: Option<usize>,
    /// Encryption of the connections.
    pub tls: NbdTls,
    /// Folder of the certificates, also that of a URI. `None`: libnbd's own folder if it exists, or else the CAs of the
    /// system.
    pub tls_certificates: Option<PathBuf>,
    /// True if the server's certificate is verified, which is also the default.
    pub tls_verify: Option<bool>,
    /// User name of a pre-shared key.
    pub tls_username: Option<String>,
    /// File of pre-shared keys.
    pub tls_psk: Option<PathBuf>,
    /// Time after which a request fails. `None`: the default time.
    pub timeout: Option<Duration>,
    /// True if an overlay over the export is accepted although the export is in another state than it was.
    pub accept_cid_mismatch: bool,
    /// Number of retries of a failed connection attempt. `None`: no retry at the start; afterwards reconnects until the
    /// requests that wait have timed out.
    pub retry: Option<u32>,
}

impl NbdConfig {
    /// Creates the configuration of an export with all settings at their defaults.
    pub fn new(address: NbdAddress) -> Self {
        Self {
            address,
            export: None,
            dynamic: false,
            connections: None,
            tls: NbdTls::Off,
            tls_certificates: None,
            tls_verify: None,
            tls_username: None,
            tls_psk: None,
            timeout: None,
            accept_cid_mismatch: false,
            retry: None,
        }
    }

    /// Returns true if the server may be on another machine.
    pub(crate) fn is_far(&self) -> bool {
        match &self.address {
            NbdAddress::Tcp { .. } => true,
            // Only these transports are known to be local: `nbd+ssh`, for example, would not be.
            NbdAddress::Uri(_) => !matches!(self.transport(), Some("unix" | "vsock")),
            _ => false,
        }
    }

    /// Returns true if the address holds the host name of the server.
    pub(crate) fn names_host(&self) -> bool {
        match &self.address {
            NbdAddress::Tcp { .. } => true,
            NbdAddress::Uri(_) => self.transport().is_none(),
            _ => false,
        }
    }

    /// Returns the transport that the scheme of a URI names after a `+`. `None`: TCP, or the address is not a URI.
    fn transport(&self) -> Option<&str> {
        let NbdAddress::Uri(uri) = &self.address else {
            return None;
        };
        let scheme = uri.split(':').next().unwrap_or_default();
        scheme.split_once('+').map(|(_, transport)| transport)
    }

    /// Returns the whole address of the export: what an overlay over it stores. No secrets: the words of a command, one
    /// of which may be a password, are hashed.
    pub fn identity(&self) -> String {
        match &self.address {
            // The number differs with each mount.
            NbdAddress::Fd(_) => self.label_at("NBD server on a passed socket".to_owned()),
            NbdAddress::Command(words) => {
                let mut all = ring::digest::Context::new(&ring::digest::SHA256);
                for word in words {
                    all.update(&(word.len() as u64).to_le_bytes());
                    all.update(word.as_encoded_bytes());
                }
                let sum: String = all
                    .finish()
                    .as_ref()
                    .iter()
                    .take(8)
                    .map(|b| format!("{b:02x}"))
                    .collect();
                let program = self.address_label();
                self.label_at(format!(
                    "{program} with {} arguments ({sum})",
                    words.len().saturating_sub(1)
                ))
            }
            _ => self.label(),
        }
    }

    /// Returns the server for messages, without the password of a URI.
    fn address_label(&self) -> String {
        match &self.address {
            NbdAddress::Uri(uri) => without_secrets(uri),
            NbdAddress::Tcp { host, port: None } => format!("NBD server {host}"),
            NbdAddress::Tcp { host, port: Some(port) } => format!("NBD server {host}:{port}"),
            NbdAddress::Unix(path) => format!("NBD server {}", path.display()),
            NbdAddress::Fd(number) => format!("NBD server on descriptor {number}"),
            NbdAddress::Vsock { cid, port: None } => format!("NBD server vsock:{cid}"),
            NbdAddress::Vsock { cid, port: Some(port) } => format!("NBD server vsock:{cid}:{port}"),
            NbdAddress::Own(name) => name.clone(),
            NbdAddress::Command(arguments) => {
                format!(
                    "NBD server {}",
                    arguments
                        .first()
                        .map(|program| program.display().to_string())
                        .unwrap_or_default()
                )
            }
        }
    }

    /// Returns `address` and the export.
    fn label_at(&self, address: String) -> String {
        match &self.export {
            Some(name) if !name.is_empty() => {
                format!("{address}, export {}", name.display().to_string().escape_debug())
            }
            _ => address,
        }
    }
}

impl SourceSettings for NbdConfig {
    /// Returns the server and export, without the password of a URI.
    fn label(&self) -> String {
        self.label_at(self.address_label())
    }

    fn locality(&self) -> Locality {
        match self.is_far() {
            true => Locality::OtherMachine,
            false => Locality::OtherProcess,
        }
    }

    fn accepts_cid_mismatch(&self) -> bool {
        self.accept_cid_mismatch
    }

    fn socket_fd(&self) -> Option<i32> {
        match self.address {
            NbdAddress::Fd(number) => Some(number),
            _ => None,
        }
    }

    fn is_server(&self) -> bool {
        true
    }

    fn is_dynamic(&self) -> bool {
        self.dynamic
    }
}

/// Address of an NBD server.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum NbdAddress {
    /// An NBD URI, which also selects the transport and may name the export.
    Uri(String),
    /// A server that listens on TCP.
    Tcp {
        /// Host name or IP address.
        host: String,
        /// Port number or service name. `None`: the default port of NBD.
        port: Option<String>,
    },
    /// The absolute path of a Unix socket.
    Unix(PathBuf),
    /// The descriptor of a connected socket that the caller passed to this process.
    Fd(i32),
    /// An AF_VSOCK socket, between a virtual machine and its host.
    Vsock {
        /// Context ID of the machine.
        cid: u32,
        /// Port number. `None`: the default port of NBD.
        port: Option<u32>,
    },
    /// A program and its arguments, which the daemon starts as a captive server. It receives its socket by systemd
    /// socket activation.
    Command(Vec<OsString>),
    /// A process of this program that serves one disk. The text is the disk's name for messages.
    Own(String),
}

/// Encryption of NBD connections.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum NbdTls {
    /// Never encrypted.
    #[default]
    Off,
    /// Encrypted if the server offers TLS.
    On,
    /// Always encrypted: a server without TLS is an error.
    Require,
}
