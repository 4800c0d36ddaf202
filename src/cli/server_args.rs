//! Keys of every kind of server. Each back end decides which of them it takes.

use std::ffi::OsStr;
use std::time::Duration;

use super::outcome::UsageError;
use super::values;

/// Upper limit of `connections=`. More connections gain nothing.
const MAX_CONNECTIONS: u32 = 16;

/// Upper limit of `timeout=` in seconds.
const MAX_TIMEOUT: u32 = 1800;

/// Upper limit of `retry=`.
const MAX_RETRY: u32 = 1_000_000;

/// Keys of every kind of server.
#[derive(Debug, Clone, Default)]
pub(super) struct ServerArgs {
    /// `server=`
    pub(super) host: Option<String>,
    /// `port=`
    pub(super) port: Option<String>,
    /// `connections=`
    pub(super) connections: Option<usize>,
    /// `timeout=`
    pub(super) timeout: Option<Duration>,
    /// `retry=`
    pub(super) retry: Option<u32>,
}

impl ServerArgs {
    /// Returns the value of `port=` as a number. Fails if it is the name of a service.
    pub(super) fn port_number(&self) -> Result<Option<u16>, UsageError> {
        let Some(port) = &self.port else { return Ok(None) };
        let number = port.parse::<u16>().ok().filter(|number| *number != 0);
        let number =
            number.ok_or_else(|| UsageError::of("port", format_args!("{port}: the port of a server is a number")))?;
        Ok(Some(number))
    }
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
