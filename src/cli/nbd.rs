//! The keys of NBD servers: where they are, which export, how to connect; and which of them go together.

use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::OsStrExt;
use std::path::PathBuf;
use std::time::Duration;

use super::UsageError;
use super::values;
use crate::config::{NbdAddress, NbdConfig, NbdTls};

/// The most connections to a server; more gain nothing.
const MAX_CONNECTIONS: u32 = 16;

/// Seconds of the longest `timeout=`.
const MAX_TIMEOUT: u32 = 1800;

/// The most attempts of `retry=`.
const MAX_RETRY: u32 = 1_000_000;

/// Bytes of an export's name (NBD protocol, "String values").
const MAX_NAME: usize = 4096;

/// What was said about an NBD server.
#[derive(Debug, Clone, Default)]
pub(super) struct Server {
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

impl Server {
    /// These words, with `common` where they are silent. Arguments go with their command.
    pub(super) fn over(&self, common: &Self) -> Self {
        let args = if self.command.is_some() {
            self.args.clone()
        } else {
            [&*common.args, &*self.args].concat()
        };
        Self {
            hostname: self.hostname.clone().or_else(|| common.hostname.clone()),
            port: self.port.clone().or_else(|| common.port.clone()),
            socket: self.socket.clone().or_else(|| common.socket.clone()),
            socket_fd: self.socket_fd.or(common.socket_fd),
            vsock_cid: self.vsock_cid.or(common.vsock_cid),
            command: self.command.clone().or_else(|| common.command.clone()),
            args,
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

    /// The keys that name a place, of those that were given.
    fn places(&self) -> Vec<&'static str> {
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

    /// Whether a server is named, without a URI.
    pub(super) fn is_named(&self) -> bool {
        !self.places().is_empty()
    }

    /// All that is to be known about the server; `uri`: what `uri=` says.
    ///
    /// Errors: keys that don't go together.
    pub(super) fn config(self, uri: Option<String>) -> Result<NbdConfig, UsageError> {
        let error = |reason: String| Err(UsageError::new(reason));
        let mut places = self.places();
        if uri.is_some() {
            places.insert(0, "uri");
        }
        if let [first, second, ..] = places[..] {
            return error(format!("{first}= and {second}= both say where the NBD server is"));
        }
        if !self.args.is_empty() && self.command.is_none() {
            return error("arg= is an argument for command=, which is not given".into());
        }
        if self.port.is_some() && self.hostname.is_none() && self.vsock_cid.is_none() {
            return error("port= goes with hostname= or vsock-cid=".into());
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
            return error(format!("{key} means one connection, but connections= says otherwise"));
        }
        if self.dynamic == Some(true) && self.socket_fd.is_some() {
            return error("dynamic-export=true needs a connection for each export, but socket-fd= is one".into());
        }
        let details = [
            ("tls-certificates", self.tls_certificates.is_some()),
            ("tls-verify", self.tls_verify.is_some()),
            ("tls-username", self.tls_username.is_some()),
            ("tls-psk", self.tls_psk.is_some()),
        ];
        let detail = details.into_iter().find(|(_, given)| *given).map(|(key, _)| key);
        if let (Some(key), Some(NbdTls::Off)) = (detail, self.tls) {
            return error(format!("{key}= says how to encrypt, but tls=off says otherwise"));
        }
        // A URI says by its scheme whether to encrypt.
        let secure = uri
            .as_ref()
            .is_some_and(|uri| uri.get(..4).is_some_and(|s| s.eq_ignore_ascii_case("nbds")));
        if secure && self.tls == Some(NbdTls::Off) {
            return error("the URI asks for TLS, but tls=off says otherwise".into());
        }
        let by_key = if detail.is_some() { NbdTls::Require } else { NbdTls::Off };
        let tls = if secure {
            NbdTls::Require
        } else {
            self.tls.unwrap_or(by_key)
        };
        let connections = if single { Some(1) } else { self.connections };
        Ok(NbdConfig {
            tls,
            connections,
            dynamic: self.dynamic.unwrap_or_default(),
            export: self.export.clone(),
            tls_certificates: self.tls_certificates.clone(),
            tls_verify: self.tls_verify,
            tls_username: self.tls_username.clone(),
            tls_psk: self.tls_psk.clone(),
            timeout: self.timeout,
            retry: self.retry,
            address: self.address(uri)?,
        })
    }

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
                "no NBD server is named: add uri=, hostname=, socket= or command=",
            )),
        }
    }
}

/// The value of `uri=`.
pub(super) fn uri(value: &OsStr) -> Result<String, String> {
    const SCHEMES: [&str; 6] = ["nbd:", "nbds:", "nbd+unix:", "nbds+unix:", "nbd+vsock:", "nbds+vsock:"];
    let text = values::text(value)?;
    let known = |scheme: &str| {
        text.get(..scheme.len())
            .is_some_and(|head| head.eq_ignore_ascii_case(scheme))
    };
    if !SCHEMES.iter().any(|scheme| known(scheme)) {
        return Err("must start with nbd://, nbds://, nbd+unix://, nbds+unix:// or nbd+vsock://".into());
    }
    if text.contains('\0') {
        return Err("a URI cannot hold a NUL byte".into());
    }
    Ok(text.to_owned())
}

/// The value of `hostname=`.
pub(super) fn hostname(value: &OsStr) -> Result<String, String> {
    let text = values::text(value)?;
    if text.contains(|c: char| c.is_whitespace() || c.is_control()) {
        return Err("a host name holds no blanks".into());
    }
    Ok(text.to_owned())
}

/// The value of `port=`: a number, or the name of a service.
pub(super) fn port(value: &OsStr) -> Result<String, String> {
    let text = values::text(value)?;
    let named = text
        .bytes()
        .all(|b| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_' | b'.'));
    if !named {
        return Err("must be a number, or the name of a service in /etc/services".into());
    }
    Ok(text.to_owned())
}

/// A number that is at most `most`, and at least `least`.
pub(super) fn number(value: &OsStr, least: u32, most: u32) -> Result<u32, String> {
    let text = values::text(value)?;
    let number = text
        .parse::<u32>()
        .ok()
        .filter(|n| text.bytes().all(|b| b.is_ascii_digit()) && (least..=most).contains(n));
    number.ok_or_else(|| format!("must be a number from {least} to {most}"))
}

/// The value of `socket-fd=`.
pub(super) fn socket_fd(value: &OsStr) -> Result<i32, String> {
    number(value, 3, i32::MAX as u32).map(|n| n as i32)
}

/// The value of `vsock-cid=`.
pub(super) fn vsock_cid(value: &OsStr) -> Result<u32, String> {
    number(value, 0, u32::MAX)
}

/// The value of `command=` and of `arg=`, which may be empty.
pub(super) fn word(value: &OsStr) -> Result<OsString, String> {
    if value.as_bytes().contains(&0) {
        Err("it cannot hold a NUL byte".into())
    } else {
        Ok(value.to_owned())
    }
}

/// The value of `export=`, which may be empty.
pub(super) fn export(value: &OsStr) -> Result<OsString, String> {
    if value.len() > MAX_NAME {
        return Err(format!("an export's name has at most {MAX_NAME} bytes"));
    }
    word(value)
}

/// The value of `connections=`.
pub(super) fn connections(value: &OsStr) -> Result<usize, String> {
    number(value, 1, MAX_CONNECTIONS).map(|n| n as usize)
}

/// The value of `timeout=`.
pub(super) fn timeout(value: &OsStr) -> Result<Duration, String> {
    number(value, 1, MAX_TIMEOUT).map(|n| Duration::from_secs(n.into()))
}

/// The value of `retry=`.
pub(super) fn retry(value: &OsStr) -> Result<u32, String> {
    number(value, 0, MAX_RETRY)
}

/// The value of `tls=`.
pub(super) fn tls(value: &OsStr) -> NbdTls {
    match value.as_bytes() {
        b"on" => NbdTls::On,
        b"require" => NbdTls::Require,
        _ => NbdTls::Off,
    }
}
