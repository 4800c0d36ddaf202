//! Keys of NBD servers: address, export, connections and TLS, and the conflicts among them.
//!
//! The functions at the end parse one value each. [`NbdArgs::config`] checks the keys against each other, after the
//! common keys are merged into those of the disk.

use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::OsStrExt;
use std::path::PathBuf;
use std::time::Duration;

use super::UsageError;
use super::{scheme, values};
use crate::config::{NbdAddress, NbdConfig, NbdTls};
use crate::source::nbd_uri::{self, TlsParameters};

/// Upper limit of `connections=`. More connections gain nothing.
const MAX_CONNECTIONS: u32 = 16;

/// Upper limit of `timeout=` in seconds.
const MAX_TIMEOUT: u32 = 1800;

/// Upper limit of `retry=`.
const MAX_RETRY: u32 = 1_000_000;

/// Longest export name in bytes (NBD protocol, "String values").
const MAX_NAME: usize = 4096;

/// Keys of one NBD server, as given.
#[derive(Debug, Clone, Default)]
pub(super) struct NbdArgs {
    /// `hostname=`
    pub(super) hostname: Option<String>,
    /// `port=`
    pub(super) port: Option<String>,
    /// `socket=`
    pub(super) socket: Option<PathBuf>,
    /// `socket-fd=`
    pub(super) socket_fd: Option<i32>,
    /// `vsock-cid=`
    pub(super) vsock_cid: Option<u32>,
    /// `command=`
    pub(super) command: Option<OsString>,
    /// `arg=`
    pub(super) args: Vec<OsString>,
    /// `export=`
    pub(super) export: Option<OsString>,
    /// `dynamic-export=`
    pub(super) dynamic: Option<bool>,
    /// `connections=`
    pub(super) connections: Option<usize>,
    /// `shared=`
    pub(super) shared: Option<bool>,
    /// `tls=`
    pub(super) tls: Option<NbdTls>,
    /// `tls-certificates=`
    pub(super) tls_certificates: Option<PathBuf>,
    /// `tls-verify=`
    pub(super) tls_verify: Option<bool>,
    /// `tls-username=`
    pub(super) tls_username: Option<String>,
    /// `tls-psk=`
    pub(super) tls_psk: Option<PathBuf>,
    /// `timeout=`
    pub(super) timeout: Option<Duration>,
    /// `retry=`
    pub(super) retry: Option<u32>,
}

impl NbdArgs {
    /// Returns these keys, with the values of `common` for keys that are not set here.
    ///
    /// An address of this disk's own, which is also an `own_uri`, replaces the common one with all its keys, except that
    /// `port=` stays the default for addresses that have a port. `arg=` belongs to the `command=` that it is given with.
    pub(super) fn over(&self, common: &Self, own_uri: bool) -> Self {
        let nothing = Self::default();
        let replaced = own_uri || self.names_server();
        let address = if replaced { &nothing } else { common };
        let has_port = !replaced || self.hostname.is_some() || self.vsock_cid.is_some();
        Self {
            hostname: self.hostname.clone().or_else(|| address.hostname.clone()),
            port: self.port.clone().or_else(|| common.port.clone().filter(|_| has_port)),
            socket: self.socket.clone().or_else(|| address.socket.clone()),
            socket_fd: self.socket_fd.or(address.socket_fd),
            vsock_cid: self.vsock_cid.or(address.vsock_cid),
            command: self.command.clone().or_else(|| address.command.clone()),
            args: [&*address.args, &*self.args].concat(),
            export: self.export.clone().or_else(|| common.export.clone()),
            dynamic: self.dynamic.or(common.dynamic),
            connections: self.connections.or(common.connections),
            shared: self.shared.or(common.shared),
            tls: self.tls.or(common.tls),
            tls_certificates: self
                .tls_certificates
                .clone()
                .or_else(|| common.tls_certificates.clone()),
            tls_verify: self.tls_verify.or(common.tls_verify),
            tls_username: self.tls_username.clone().or_else(|| common.tls_username.clone()),
            tls_psk: self.tls_psk.clone().or_else(|| common.tls_psk.clone()),
            timeout: self.timeout.or(common.timeout),
            retry: self.retry.or(common.retry),
        }
    }

    /// Returns the given keys that are the server's address.
    fn address_keys(&self) -> Vec<&'static str> {
        let given = [
            ("hostname", self.hostname.is_some()),
            ("socket", self.socket.is_some()),
            ("socket-fd", self.socket_fd.is_some()),
            ("vsock-cid", self.vsock_cid.is_some()),
            ("command", self.command.is_some()),
        ];
        given
            .into_iter()
            .filter(|(_, given)| *given)
            .map(|(key, _)| key)
            .collect()
    }

    /// Returns true if a key other than `uri=` gives the address of a server.
    pub(super) fn names_server(&self) -> bool {
        !self.address_keys().is_empty()
    }

    /// Returns the configuration of the server. `uri` is the value of `uri=`, if given.
    ///
    /// Fails if keys conflict, or if there is no address.
    pub(super) fn config(self, uri: Option<String>) -> Result<NbdConfig, UsageError> {
        let error = |reason: String| Err(UsageError::new(reason));
        let mut address_keys = self.address_keys();
        if uri.is_some() {
            address_keys.insert(0, "uri");
        }
        if let [first, second, ..] = address_keys[..] {
            return error(format!(
                "{first}= and {second}= are both addresses of the NBD server: give one of them"
            ));
        }
        if !self.args.is_empty() && self.command.is_none() {
            return error("arg= needs command=".into());
        }
        if self.port.is_some() && self.hostname.is_none() && self.vsock_cid.is_none() {
            return error("port= needs hostname= or vsock-cid=".into());
        }
        if self.dynamic == Some(true) && self.export.is_some() {
            return error("dynamic-export=true shows every export, but export= names one".into());
        }
        let single = self.shared == Some(true) || self.socket_fd.is_some();
        if single && self.connections.is_some_and(|n| n > 1) {
            let key = if self.shared == Some(true) {
                "shared=true"
            } else {
                "socket-fd="
            };
            return error(format!("{key} means one connection, but connections= is larger"));
        }
        if self.dynamic == Some(true) && self.socket_fd.is_some() {
            return error(
                "dynamic-export=true needs a connection for each export, but socket-fd= is one connection".into(),
            );
        }
        let by_uri = uri.as_deref().map(nbd_uri::tls_parameters).unwrap_or_default();
        let tls = self.tls_mode(uri.as_deref(), &by_uri)?;
        let connections = if single { Some(1) } else { self.connections };
        Ok(NbdConfig {
            tls,
            connections,
            dynamic: self.dynamic.unwrap_or_default(),
            export: self.export.clone(),
            tls_certificates: self.tls_certificates.clone().or(by_uri.certificates),
            tls_verify: self.tls_verify.or(by_uri.verify),
            tls_username: self.tls_username.clone(),
            tls_psk: self.tls_psk.clone().or(by_uri.psk),
            timeout: self.timeout,
            accept_cid_mismatch: false,
            retry: self.retry,
            address: self.address(uri)?,
        })
    }

    /// Returns if connections are encrypted. Credentials imply `tls=require`, by a key or by a parameter of the URI, and
    /// so does the scheme of a URI: `nbds`, `nbds+unix` or `nbds+vsock`.
    ///
    /// Fails if `tls=off` contradicts them.
    fn tls_mode(&self, uri: Option<&str>, by_uri: &TlsParameters) -> Result<NbdTls, UsageError> {
        let details = [
            (
                "tls-certificates",
                self.tls_certificates.is_some() || by_uri.certificates.is_some(),
            ),
            ("tls-verify", self.tls_verify.is_some() || by_uri.verify.is_some()),
            ("tls-username", self.tls_username.is_some()),
            ("tls-psk", self.tls_psk.is_some() || by_uri.psk.is_some()),
        ];
        let detail = details.into_iter().find(|(_, given)| *given).map(|(key, _)| key);
        if let (Some(key), Some(NbdTls::Off)) = (detail, self.tls) {
            return Err(UsageError::new(format!(
                "{key}= configures TLS, but tls=off disables it"
            )));
        }
        let secure = uri.is_some_and(|uri| uri.get(..4).is_some_and(|s| s.eq_ignore_ascii_case("nbds")));
        if secure && self.tls == Some(NbdTls::Off) {
            return Err(UsageError::new("the URI requires TLS, but tls=off disables it"));
        }
        Ok(if secure || detail.is_some() {
            NbdTls::Require
        } else {
            self.tls.unwrap_or_default()
        })
    }

    /// Returns the address of the server. At most one address key is given; the caller has checked that.
    fn address(self, uri: Option<String>) -> Result<NbdAddress, UsageError> {
        if let Some(uri) = uri {
            return Ok(NbdAddress::Uri(uri));
        }
        if let Some(host) = self.hostname {
            return Ok(NbdAddress::Tcp { host, port: self.port });
        }
        if let Some(cid) = self.vsock_cid {
            let port = self.port.map(|port| {
                let number = port
                    .parse::<u32>()
                    .ok()
                    .filter(|_| port.bytes().all(|b| b.is_ascii_digit()));
                number.ok_or_else(|| UsageError::new(format!("port={port}: a VSOCK port is a number of 32 bits")))
            });
            return Ok(NbdAddress::Vsock {
                cid,
                port: port.transpose()?,
            });
        }
        if let Some(path) = self.socket {
            return Ok(NbdAddress::Unix(path));
        }
        if let Some(number) = self.socket_fd {
            return Ok(NbdAddress::Fd(number));
        }
        match self.command {
            Some(command) => Ok(NbdAddress::Command(std::iter::once(command).chain(self.args).collect())),
            None => Err(UsageError::new(
                "no NBD server is given: add uri=, hostname=, socket= or command=",
            )),
        }
    }
}

/// Parses the value of `uri=`. Checks the scheme only; libnbd parses the rest.
pub(super) fn uri(value: &OsStr) -> Result<String, String> {
    let text = values::text(value)?;
    if !scheme::is_one_of(&scheme::NBD, value) {
        return Err(scheme::of(value).map_or_else(
            || format!("must start with {}", scheme::NBD.join(", ")),
            scheme::refusal,
        ));
    }
    if text.contains('\0') {
        return Err("a URI cannot contain a NUL byte".into());
    }
    let dir = std::env::current_dir().map_err(|e| format!("the working directory: {e}"))?;
    Ok(nbd_uri::with_absolute_paths(text, &dir))
}

/// Parses the value of `hostname=`.
pub(super) fn hostname(value: &OsStr) -> Result<String, String> {
    let text = values::text(value)?;
    if text.contains(|c: char| c.is_whitespace() || c.is_control()) {
        return Err("a host name cannot contain spaces or control characters".into());
    }
    Ok(text.to_owned())
}

/// Parses the value of `port=`: a number, or the name of a service, which is looked up when the connection is made.
pub(super) fn port(value: &OsStr) -> Result<String, String> {
    let text = values::text(value)?;
    let is_name = text
        .bytes()
        .all(|b| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_' | b'.'));
    if !is_name {
        return Err("must be a number or the name of a service in /etc/services".into());
    }
    Ok(text.to_owned())
}

/// Parses the value of `socket-fd=`. 0 to 2 are refused: they are the standard streams.
pub(super) fn socket_fd(value: &OsStr) -> Result<i32, String> {
    values::number(value, 3, i32::MAX as u32).map(|n| n as i32)
}

/// Parses the value of `vsock-cid=`.
pub(super) fn vsock_cid(value: &OsStr) -> Result<u32, String> {
    values::number(value, 0, u32::MAX)
}

/// Parses the value of `command=` or `arg=`. It may be empty.
pub(super) fn word(value: &OsStr) -> Result<OsString, String> {
    if value.as_bytes().contains(&0) {
        Err("the value cannot contain a NUL byte".into())
    } else {
        Ok(value.to_owned())
    }
}

/// Parses the value of `export=`. It may be empty: that is the default export.
pub(super) fn export(value: &OsStr) -> Result<OsString, String> {
    if value.len() > MAX_NAME {
        return Err(format!("an export name can have at most {MAX_NAME} bytes"));
    }
    word(value)
}

/// Parses the value of `connections=`.
pub(super) fn connections(value: &OsStr) -> Result<usize, String> {
    values::number(value, 1, MAX_CONNECTIONS).map(|n| n as usize)
}

/// Parses the value of `timeout=`, in whole seconds.
pub(super) fn timeout(value: &OsStr) -> Result<Duration, String> {
    values::number(value, 1, MAX_TIMEOUT).map(|n| Duration::from_secs(n.into()))
}

/// Parses the value of `retry=`.
pub(super) fn retry(value: &OsStr) -> Result<u32, String> {
    values::number(value, 0, MAX_RETRY)
}

/// Converts the value of `tls=`. The table of keys refuses other words before it calls this.
pub(super) fn tls(value: &OsStr) -> NbdTls {
    match value.as_bytes() {
        b"on" => NbdTls::On,
        b"require" => NbdTls::Require,
        _ => NbdTls::Off,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn host(port: Option<&str>) -> NbdArgs {
        NbdArgs {
            hostname: Some("h".into()),
            port: port.map(str::to_owned),
            args: vec!["a".into()],
            ..Default::default()
        }
    }

    #[test]
    fn an_own_address_replaces_the_common_one() {
        let socket = NbdArgs {
            socket: Some("/s".into()),
            ..Default::default()
        };
        let merged = socket.over(&host(Some("1")), false);
        assert_eq!((merged.hostname, merged.port, merged.args.len()), (None, None, 0));
        let merged = NbdArgs::default().over(&host(Some("1")), true);
        assert_eq!((merged.hostname, merged.port), (None, None));
        let merged = host(None).over(&host(Some("1")), false);
        assert_eq!((merged.port.as_deref(), merged.args.len()), (Some("1"), 1));
        let merged = NbdArgs::default().over(&host(Some("1")), false);
        assert_eq!(merged.hostname.as_deref(), Some("h"));
    }

    #[test]
    fn credentials_imply_tls_by_a_key_or_in_the_uri() {
        let tls = |args: NbdArgs, uri: &str| args.config(Some(uri.to_owned())).unwrap().tls;
        let on = NbdArgs {
            tls: Some(NbdTls::On),
            ..Default::default()
        };
        let psk = NbdArgs {
            tls_psk: Some("/k".into()),
            ..on.clone()
        };
        assert_eq!(tls(on.clone(), "nbd://h"), NbdTls::On);
        assert_eq!(tls(psk, "nbd://h"), NbdTls::Require);
        assert_eq!(tls(on, "nbd://h?tls-certificates=/c"), NbdTls::Require);
        assert_eq!(tls(NbdArgs::default(), "nbd://h?tls-psk-file=/k"), NbdTls::Require);
        assert_eq!(tls(NbdArgs::default(), "nbds://h"), NbdTls::Require);
        assert_eq!(tls(NbdArgs::default(), "nbd://h"), NbdTls::Off);
        let config = NbdArgs::default().config(Some("nbds://h?tls-psk-file=/k".into()));
        assert_eq!(config.unwrap().tls_psk.as_deref(), Some(std::path::Path::new("/k")));
    }
}
