//! Keys of NBD servers: address, export, connections and TLS, and the conflicts among them.
//!
//! The functions at the end parse one value each. [`NbdArgs::config`] checks the keys against each other, those of
//! the disk over the common ones.

use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::OsStrExt;
use std::path::PathBuf;

use super::outcome::UsageError;
use super::scheme;
use super::server_args::ServerArgs;
use super::values::{self, FileName, Value};
use crate::config::{NbdAddress, NbdConfig, NbdTls};
use crate::source::nbd_uri::{self, TlsParameters};

/// Longest export name in bytes (NBD protocol, "String values").
const MAX_NAME: usize = 4096;

/// Keys of one NBD server, as given.
#[derive(Debug, Clone, Default)]
pub(super) struct NbdArgs {
    /// `hostname=`, `socket=`, `socket-fd=`, `vsock-cid=` and `command=`, each with its key
    pub(super) addresses: Vec<(&'static str, NbdAddress)>,
    /// `arg=`
    pub(super) args: Vec<OsString>,
    /// `export=`: to VDDK a pattern that may be a path.
    pub(super) export: Option<FileName>,
    /// `dynamic-export=`
    pub(super) dynamic: bool,
    /// `shared=`
    pub(super) shared: bool,
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
}

impl NbdArgs {
    /// Adds the address that a key gives.
    pub(super) fn address(&mut self, key: &'static str, address: NbdAddress) -> Result<(), String> {
        self.addresses.push((key, address));
        Ok(())
    }

    /// Returns true if a key other than `uri=` gives the address of a server.
    pub(super) fn names_server(&self) -> bool {
        !self.addresses.is_empty()
    }

    /// Returns the configuration of the server. `uri` is the value of `uri=`, if given.
    ///
    /// Fails if keys conflict, or if there is no address.
    pub(super) fn config(
        &self,
        uri: Option<String>,
        server: &ServerArgs,
        accept_cid_mismatch: bool,
    ) -> Result<NbdConfig, UsageError> {
        let by_uri = uri.as_deref().map(nbd_uri::tls_parameters).unwrap_or_default();
        let tls = self.tls_mode(uri.as_deref(), &by_uri)?;
        let address = self.one_address(uri, server.port.as_deref())?;
        if self.dynamic && self.export.is_some() {
            return Err(UsageError::of(
                "dynamic-export",
                "true shows every export, but export= names one",
            ));
        }
        let is_socket = matches!(address, NbdAddress::Fd(_));
        if (self.shared || is_socket) && server.connections.is_some_and(|n| n > 1) {
            let (key, value) = if self.shared {
                ("shared", "true")
            } else {
                ("socket-fd", "")
            };
            let rest = format_args!("{value} means one connection, but connections= is larger");
            return Err(UsageError::of(key, rest));
        }
        if self.dynamic && is_socket {
            return Err(UsageError::of(
                "dynamic-export",
                "true needs a connection for each export, but socket-fd= is one connection",
            ));
        }
        Ok(NbdConfig {
            address,
            export: self.export.as_ref().map(|export| export.text.clone()),
            dynamic: self.dynamic,
            connections: if self.shared || is_socket {
                Some(1)
            } else {
                server.connections
            },
            tls,
            tls_certificates: self.tls_certificates.clone().or(by_uri.certificates),
            tls_verify: self.tls_verify.or(by_uri.verify),
            tls_username: self.tls_username.clone(),
            tls_psk: self.tls_psk.clone().or(by_uri.psk),
            timeout: server.timeout,
            accept_cid_mismatch,
            retry: server.retry,
        })
    }

    /// Returns the address of the server. Fails if there is none, or more than one, or if a key does not fit it.
    fn one_address(&self, uri: Option<String>, port: Option<&str>) -> Result<NbdAddress, UsageError> {
        let by_uri = uri.map(|uri| ("uri", NbdAddress::Uri(uri)));
        let mut addresses = by_uri.into_iter().chain(self.addresses.iter().cloned());
        let Some((key, mut address)) = addresses.next() else {
            return Err(UsageError::new(
                "no NBD server is given: add uri=, hostname=, socket= or command=",
            ));
        };
        if let Some((other, _)) = addresses.next() {
            let rest = format_args!(" and {other}= are both addresses of the NBD server: give one of them");
            return Err(UsageError::of(key, rest));
        }
        match (&mut address, port) {
            (NbdAddress::Command(words), None) => words.extend(self.args.iter().cloned()),
            _ if !self.args.is_empty() => return Err(UsageError::of("arg", " needs command=")),
            (NbdAddress::Tcp { port, .. }, given) => {
                let is_number = |text: &str| text.bytes().all(|b| b.is_ascii_digit());
                if let Some(given) = given.filter(|text| is_number(text) && !matches!(text.parse::<u16>(), Ok(1..))) {
                    let rest = format_args!("{given}: a port is a number from 1 to 65535, or the name of a service");
                    return Err(UsageError::of("port", rest));
                }
                *port = given.map(str::to_owned);
            }
            (NbdAddress::Vsock { port, .. }, Some(given)) => {
                let number = values::decimal(given);
                *port = Some(number.ok_or_else(|| {
                    UsageError::of("port", format_args!("{given}: a VSOCK port is a number of 32 bits"))
                })?);
            }
            (_, Some(_)) => return Err(UsageError::of("port", " needs hostname= or vsock-cid=")),
            (_, None) => {}
        }
        Ok(address)
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
            return Err(UsageError::of(key, " configures TLS, but tls=off disables it"));
        }
        let secure = uri.is_some_and(|uri| uri.get(..4).is_some_and(|s| s.eq_ignore_ascii_case("nbds")));
        if secure && self.tls == Some(NbdTls::Off) {
            return Err(UsageError::new("the URI requires TLS, but tls=off disables it").about("tls"));
        }
        Ok(if secure || detail.is_some() {
            NbdTls::Require
        } else {
            self.tls.unwrap_or_default()
        })
    }
}

/// Parses the value of `uri=`. Checks the scheme only; libnbd parses the rest.
pub(super) fn uri(value: &Value<'_>) -> Result<String, String> {
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
    let dir = value.path_of(OsStr::new("."))?;
    Ok(nbd_uri::with_absolute_paths(text, &dir))
}

/// Parses the value of `socket-fd=`. 0 to 2 are refused: they are the standard streams.
pub(super) fn socket_fd(value: &OsStr) -> Result<i32, String> {
    values::number(value, 3, i32::MAX as u32).map(|n| n as i32)
}

/// Parses the value of `vsock-cid=`.
pub(super) fn vsock_cid(value: &OsStr) -> Result<u32, String> {
    values::number(value, 0, u32::MAX)
}

/// Parses the value of `arg=`. It may be empty.
pub(super) fn word(value: &OsStr) -> Result<OsString, String> {
    if value.as_bytes().contains(&0) {
        Err("the value cannot contain a NUL byte".into())
    } else {
        Ok(value.to_owned())
    }
}

/// Parses the value of `command=`.
pub(super) fn command(value: &OsStr) -> Result<OsString, String> {
    match value.is_empty() {
        true => Err("a program is missing".into()),
        false => word(value),
    }
}

/// Parses the value of `export=`. It may be empty: that is the default export.
pub(super) fn export(value: &Value<'_>) -> Result<FileName, String> {
    if value.len() > MAX_NAME {
        return Err(format!("an export name can have at most {MAX_NAME} bytes"));
    }
    word(value)?;
    Ok(FileName::of(value, value.path().unwrap_or_default()))
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
    use super::super::test_args::{action, disks};
    use super::*;
    use crate::config::SourceConfig;

    fn servers(words: &[&str]) -> Vec<NbdConfig> {
        let disks = disks(&[&["src"], words].concat()).into_iter();
        let servers = disks.map(|disk| match disk.source {
            SourceConfig::Nbd(nbd) => nbd,
            other => panic!("{other:?}"),
        });
        servers.collect()
    }

    #[test]
    fn an_own_address_replaces_the_common_one() {
        let tcp = |host: &str, port: Option<&str>| NbdAddress::Tcp {
            host: host.into(),
            port: port.map(str::to_owned),
        };
        let addresses = |words: &[&str]| {
            servers(words)
                .into_iter()
                .map(|server| server.address)
                .collect::<Vec<_>>()
        };
        let found = addresses(&["hostname=h", "port=1", "nbd://a"]);
        assert_eq!(found, [NbdAddress::Uri("nbd://a".into())]);
        assert_eq!(addresses(&["hostname=h", "port=1"]), [tcp("h", Some("1"))]);
        let error = action(&["src", "hostname=h", "nbd://b", "port=1"]).unwrap_err();
        assert!(error.starts_with("port= needs hostname="), "{error}");
    }

    #[test]
    fn impossible_hosts_ports_and_programs_are_refused_at_the_start() {
        for (words, message) in [
            (
                &["hostname=h", "port=65536"][..],
                "port=65536: a port is a number from 1 to 65535",
            ),
            (&["hostname=h", "port=0"], "port=0: a port is a number"),
            (&["hostname=h:10809"], "hostname=h:10809: give the port with port="),
            (&["command="], "command=: a program is missing"),
        ] {
            let error = action(&[&["src"], words].concat()).unwrap_err();
            assert!(error.starts_with(message), "{words:?}: {error}");
        }
        assert_eq!(servers(&["hostname=::1", "port=65535"]).len(), 1);
    }

    #[test]
    fn credentials_imply_tls_by_a_key_or_in_the_uri() {
        let tls = |words: &[&str]| servers(words)[0].tls;
        assert_eq!(tls(&["nbd://h", "tls=on"]), NbdTls::On);
        assert_eq!(tls(&["nbd://h", "tls=on", "tls-psk=/k"]), NbdTls::Require);
        assert_eq!(tls(&["nbd://h?tls-certificates=/c", "tls=on"]), NbdTls::Require);
        assert_eq!(tls(&["nbd://h?tls-psk-file=/k"]), NbdTls::Require);
        assert_eq!(tls(&["nbds://h"]), NbdTls::Require);
        assert_eq!(tls(&["nbd://h"]), NbdTls::Off);
        let psk = servers(&["nbds://h?tls-psk-file=/k"]).remove(0).tls_psk;
        assert_eq!(psk.as_deref(), Some(std::path::Path::new("/k")));
    }
}
