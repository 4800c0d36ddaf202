//! `--fingerprint`: shows the thumbprints of a server's certificate.

use serde::Serialize;

use super::{line, print};
use crate::error::Result;
use crate::store::https::certificate_of;

/// Prints the SHA-1 and the SHA-256 of the certificate that a server shows (`--fingerprint`). Nothing but the start of a
/// TLS handshake is sent.
///
/// Errors: the server cannot be reached, or does not speak TLS.
pub fn fingerprint(server: &str, port: u16, json: bool) -> Result<u8> {
    // Not verified: the user compares the thumbprint, which is the whole purpose.
    let (sha1, sha256) = certificate_of(server, port)?;
    let seen = Thumbprints {
        server,
        port,
        sha1: sha1.to_string(),
        sha256: sha256.to_string(),
    };
    print(json, &seen, |out| {
        line!(out, "sha1={}", seen.sha1);
        line!(out, "sha256={}", seen.sha256);
    })?;
    Ok(0)
}

/// Result of `--fingerprint`.
#[derive(Debug, Serialize)]
struct Thumbprints<'a> {
    server: &'a str,
    port: u16,
    sha1: String,
    sha256: String,
}
