//! Parts of an NBD URI: the parameters that configure TLS, and the files that it names.
//!
//! libnbd parses a URI itself. What is decided here has to hold also where libnbd reads a URI differently, so the
//! decisions are passed to libnbd as options, or as a further parameter at the end: the last one has priority.

use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};

/// Parameters of a URI that configure TLS.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct TlsParameters {
    /// `tls-certificates=`
    pub certificates: Option<PathBuf>,
    /// `tls-psk-file=`
    pub psk: Option<PathBuf>,
    /// `tls-verify-peer=`
    pub verify: Option<bool>,
}

/// Returns the parameters of `uri` that configure TLS.
pub(crate) fn tls_parameters(uri: &str) -> TlsParameters {
    let mut found = TlsParameters::default();
    let (_, query, _) = split(uri);
    for parameter in query.unwrap_or_default().split(['&', ';']) {
        let (name, value) = parameter.split_once('=').unwrap_or((parameter, ""));
        let path = || Some(PathBuf::from(std::ffi::OsString::from_vec(percent_decode(value))));
        match percent_decode(name).as_slice() {
            b"tls-certificates" => found.certificates = path(),
            b"tls-psk-file" => found.psk = path(),
            b"tls-verify-peer" => found.verify = Some(!matches!(value, "0" | "false" | "no" | "off")),
            _ => {}
        }
    }
    found
}

/// Returns `uri` with a further parameter, whose value is a path, after those that it has.
pub(crate) fn with_parameter(uri: &str, name: &str, path: &Path) -> String {
    let (address, query, fragment) = split(uri);
    let query = query.unwrap_or_default();
    // libnbd separates by `;` only where no `&` follows.
    let separator = match query {
        "" => "",
        query if query.contains(';') && !query.contains('&') => ";",
        _ => "&",
    };
    let fragment = fragment.map_or_else(String::new, |fragment| format!("#{fragment}"));
    format!("{address}?{query}{separator}{name}={}{fragment}", percent_encode(path))
}

/// Makes the files that a URI names absolute, from `dir` on: the daemon changes to `/`, and reconnects later.
pub(crate) fn with_absolute_paths(uri: &str, dir: &Path) -> String {
    const FILES: [&str; 3] = ["socket", "tls-certificates", "tls-psk-file"];
    let (address, Some(query), fragment) = split(uri) else {
        return uri.to_owned();
    };
    let parameter = |text: &str| match text.split_once('=') {
        Some((name, value)) if FILES.contains(&name) && is_relative(value) => {
            format!("{name}={}/{value}", percent_encode(dir))
        }
        _ => text.to_owned(),
    };
    let query = query.split('&').map(parameter).collect::<Vec<_>>().join("&");
    let fragment = fragment.map_or_else(String::new, |fragment| format!("#{fragment}"));
    format!("{address}?{query}{fragment}")
}

/// Splits a URI into what precedes its parameters, the parameters, and the fragment.
fn split(uri: &str) -> (&str, Option<&str>, Option<&str>) {
    let (rest, fragment) = uri
        // The fragment first: a `?` in it starts no parameters.
        .split_once('#')
        .map_or((uri, None), |(rest, fragment)| (rest, Some(fragment)));
    let (address, query) = rest
        .split_once('?')
        .map_or((rest, None), |(address, query)| (address, Some(query)));
    (address, query, fragment)
}

/// Returns true if a path in a URI is relative; a slash may be percent-encoded.
fn is_relative(path: &str) -> bool {
    !path.is_empty() && !path.starts_with('/') && !path.get(..3).is_some_and(|head| head.eq_ignore_ascii_case("%2f"))
}

/// Decodes `%XX`. A `%` without two digits stands for itself.
pub fn percent_decode(text: &str) -> Vec<u8> {
    let mut bytes = Vec::new();
    let mut left = text.as_bytes();
    while let Some((first, rest)) = left.split_first() {
        let hex = rest
            .get(..2)
            .filter(|hex| *first == b'%' && hex.iter().all(u8::is_ascii_hexdigit))
            .and_then(|hex| std::str::from_utf8(hex).ok());
        match hex.and_then(|hex| u8::from_str_radix(hex, 16).ok()) {
            Some(byte) => {
                bytes.push(byte);
                left = &rest[2..];
            }
            None => {
                bytes.push(*first);
                left = rest;
            }
        }
    }
    bytes
}

/// Encodes a path for a URI: everything but unreserved characters and slashes.
fn percent_encode(path: &Path) -> String {
    let encode = |byte: &u8| match byte {
        b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'-' | b'.' | b'_' | b'~' | b'/' => char::from(*byte).to_string(),
        byte => format!("%{byte:02X}"),
    };
    path.as_os_str().as_bytes().iter().map(encode).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_in_a_uri_become_absolute_and_all_else_stays() {
        let absolute = |uri: &str| with_absolute_paths(uri, Path::new("/srv/a b"));
        assert_eq!(
            absolute("nbd+unix:///vm?socket=s%20k&tls-psk-file=keys#x"),
            "nbd+unix:///vm?socket=/srv/a%20b/s%20k&tls-psk-file=/srv/a%20b/keys#x"
        );
        for uri in [
            "nbd://host/export",
            "nbd+unix:///?socket=/run/s",
            "nbd+unix:///?socket=%2Frun%2Fs",
            "nbds://h/?tls-certificates=/etc/pki&x=y",
        ] {
            assert_eq!(absolute(uri), uri);
        }
    }

    #[test]
    fn tls_parameters_are_found_in_every_spelling() {
        let found = tls_parameters("nbds://h/e?a=b&tls-certific%61tes=/a%20b;tls-psk-file=/k&tls-verify-peer=false#x");
        assert_eq!(
            found,
            TlsParameters {
                certificates: Some("/a b".into()),
                psk: Some("/k".into()),
                verify: Some(false),
            }
        );
        assert_eq!(tls_parameters("nbds://h/tls-psk-file=/k"), TlsParameters::default());
    }

    #[test]
    fn a_further_parameter_comes_last() {
        let further = |uri| with_parameter(uri, "p", Path::new("/a b"));
        assert_eq!(further("nbds://h"), "nbds://h?p=/a%20b");
        assert_eq!(further("nbds://h/e?#f"), "nbds://h/e?p=/a%20b#f");
        assert_eq!(further("nbds://h/?p=/x#f"), "nbds://h/?p=/x&p=/a%20b#f");
        assert_eq!(further("nbds://h/?a=b;c=d"), "nbds://h/?a=b;c=d;p=/a%20b");
    }
}
