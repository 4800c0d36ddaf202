//! TLS of a connection: when it must be encrypted, and by what the server proves its identity.
//!
//! libnbd before 1.22 accepts every certificate (the kind of CVE-2024-7383) unless two conditions hold: it has loaded
//! `ca-cert.pem` from a folder of certificates, and it knows the server's host name, which only a connection by TCP
//! gives it. Without that file it continues with the system's certificates, and verifies nothing. So this module never
//! relies on what libnbd finds:
//!
//! ```text
//!   pre-shared key        the key proves the identity of both sides; libnbd uses no certificate
//!   tls-verify=false      every certificate is accepted: the user has asked for it
//!   otherwise             a private folder with a copy of the CA certificates, made for each handshake:
//!                         those of `tls-certificates=`, of libnbd's own folders, or of the system
//! ```
//! A copy, because a file that is missing for a moment while it is replaced would switch the verification off.
//!
//! Where libnbd cannot verify (Unix socket, VSOCK, a socket that was passed), an encrypted connection is refused.
//! A connection that was encrypted once requires TLS from then on, so that no reconnect replaces it by a plain one.

use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{OpenOptionsExt, symlink};
use std::path::{Path, PathBuf};

use libnbd_sys as sys;

use super::ffi::{Handle, c_text};
use super::private_dir::PrivateDir;
use crate::config::{NbdConfig, NbdTls, SourceSettings};
use crate::error::{Error, ErrorKind, Result};
use crate::process;

/// Name under which libnbd searches a folder for the certificates that it trusts.
const CA: &str = "ca-cert.pem";

/// Name of the list of revoked certificates.
const REVOKED: &str = "ca-crl.pem";

/// Names of the client's own certificate and key.
const CLIENT: [&str; 2] = ["client-cert.pem", "client-key.pem"];

/// Size limit in bytes of a file of certificates. Bundles of a system have about 200 KiB.
const MAX_CERTIFICATES: u64 = 16 << 20;

/// First version of libnbd, major and minor number, that also verifies the certificate if it knows no host name.
const VERIFIES_WITHOUT_HOST: (u32, u32) = (1, 22);

/// Bundles of the CAs that a system trusts: Debian and Arch, Fedora and RHEL, older RHEL, SUSE, Alpine and BSD.
const BUNDLES: [&str; 8] = [
    "/etc/ssl/certs/ca-certificates.crt",
    "/etc/pki/ca-trust/extracted/pem/tls-ca-bundle.pem",
    "/etc/pki/tls/certs/ca-bundle.crt",
    "/etc/ssl/ca-bundle.pem",
    "/var/lib/ca-certificates/ca-bundle.pem",
    "/etc/pki/tls/cacert.pem",
    "/etc/ssl/cert.pem",
    "/usr/local/share/certs/ca-root-nss.crt",
];

/// Ways to go on if certificates cannot be verified.
const OTHER_WAYS: &str = "use a pre-shared key (tls-psk=), or accept any certificate (tls-verify=false)";

/// Sets the TLS options of a handle that is not connected yet. `required`: the connection must be encrypted, even if
/// `tls=on` allows a plain one.
///
/// Returns the folder of the CA certificates, if it is used. It must exist until the end of the handshake, and a URI
/// must not name another one.
pub(super) fn prepare(handle: &Handle, config: &NbdConfig, required: bool) -> Result<Option<PrivateDir>> {
    let required = required || config.tls == NbdTls::Require;
    let mode = match config.tls {
        NbdTls::Off => sys::LIBNBD_TLS_DISABLE,
        _ if required => sys::LIBNBD_TLS_REQUIRE,
        _ => sys::LIBNBD_TLS_ALLOW,
    };
    handle.set_tls(mode)?;
    if config.tls == NbdTls::Off {
        return Ok(None);
    }
    if let Some(name) = &config.tls_username {
        handle.set_tls_username(&c_text(name.as_bytes())?)?;
    }
    if let Some(file) = &config.tls_psk {
        handle.set_tls_psk(&c_text(file.as_os_str().as_bytes())?)?;
        return Ok(None);
    }
    handle.set_tls_verify(verifies(config))?;
    if !verifies(config) {
        if let Some(dir) = &config.tls_certificates {
            handle.set_tls_certificates(&c_text(dir.as_os_str().as_bytes())?)?;
        }
        return Ok(None);
    }
    // With `tls=on` it is not known yet whether the connection will be encrypted; `check` looks again afterwards.
    if required {
        check_verifiable(handle, config)?;
    }
    let trusted = trusted(config.tls_certificates.as_deref())?;
    handle.set_tls_certificates(&c_text(trusted.path().as_os_str().as_bytes())?)?;
    Ok(Some(trusted))
}

/// Checks a connected handle. Errors: it is not encrypted but must be, or the server's certificate was not verified.
pub(super) fn check(handle: &Handle, config: &NbdConfig, required: bool) -> Result<()> {
    if handle.is_encrypted() {
        // With `tls=on` it was not known before if there would be a certificate.
        return if verifies(config) {
            check_verifiable(handle, config)
        } else {
            Ok(())
        };
    }
    if required || config.tls == NbdTls::Require {
        let text = "the server does not encrypt this connection, but TLS is required";
        return Err(Error::new(ErrorKind::Os(libc::EPROTO), text));
    }
    Ok(())
}

/// Warns if the certificate of the server is not verified.
pub(super) fn warn_if_unverified(config: &NbdConfig) {
    if config.tls != NbdTls::Off && config.tls_psk.is_none() && config.tls_verify == Some(false) {
        tracing::warn!(
            "{}: tls-verify=false: any server that claims to be this one is accepted; give its CA by tls-certificates=",
            config.label()
        );
    }
}

/// Returns true if the server must prove its identity by a certificate.
fn verifies(config: &NbdConfig) -> bool {
    config.tls_psk.is_none() && config.tls_verify != Some(false)
}

/// Errors: this version of libnbd does not verify certificates on connections of this type.
fn check_verifiable(handle: &Handle, config: &NbdConfig) -> Result<()> {
    let version = handle.version();
    if config.names_host() || verifies_without_host(&version) {
        return Ok(());
    }
    let (major, minor) = VERIFIES_WITHOUT_HOST;
    Err(Error::unsupported(format!(
        "libnbd {version} verifies certificates only over TCP, this connection needs {major}.{minor} or later: connect \
         by hostname=, {OTHER_WAYS}"
    )))
}

fn verifies_without_host(version: &str) -> bool {
    let mut numbers = version.split('.').map_while(|n| n.parse::<u32>().ok());
    let major_minor = numbers.next().zip(numbers.next());
    major_minor.is_some_and(|version| version >= VERIFIES_WITHOUT_HOST)
}

/// Creates a folder with a copy of the certificates to trust: those in `dir`, or else of libnbd's own folders, or else
/// of the system.
fn trusted(dir: Option<&Path>) -> Result<PrivateDir> {
    let context = |e| Error::io("a private folder for CA certificates (TMPDIR chooses where)", e);
    let private = PrivateDir::new().map_err(context)?;
    let own = || own_folders().into_iter().find(|own| own.join(CA).exists());
    match dir.map(Path::to_owned).or_else(own) {
        Some(dir) => {
            copy(&dir.join(CA), &private.path().join(CA))
                .map_err(|e| Error::io(format!("tls-certificates={}: {CA}, the CA to trust", dir.display()), e))?;
            match copy(&dir.join(REVOKED), &private.path().join(REVOKED)) {
                Err(e) if e.kind() != io::ErrorKind::NotFound => {
                    return Err(Error::io(format!("tls-certificates={}: {REVOKED}", dir.display()), e));
                }
                _ => {}
            }
            // Links, so that the key is stored in one place only. libnbd ignores the two if they do not exist.
            for name in CLIENT {
                symlink(dir.join(name), private.path().join(name)).map_err(context)?;
            }
        }
        None => {
            let bundle = system_bundle()?;
            copy(&bundle, &private.path().join(CA))
                .map_err(|e| Error::io(format!("the system's CA certificates: {}", bundle.display()), e))?;
        }
    }
    Ok(private)
}

/// Returns the folders in which libnbd searches certificates itself, in its order.
fn own_folders() -> Vec<PathBuf> {
    match std::env::var_os("HOME").filter(|_| !nix::unistd::geteuid().is_root()) {
        Some(home) => [".pki/libnbd", ".config/pki/libnbd"]
            .map(|name| Path::new(&home).join(name))
            .to_vec(),
        None => vec![PathBuf::from("/etc/pki/libnbd")],
    }
}

/// Returns the file of the CA certificates that the system trusts: `SSL_CERT_FILE`, or the first of [`BUNDLES`].
fn system_bundle() -> Result<PathBuf> {
    if let Some(file) = std::env::var_os("SSL_CERT_FILE").filter(|file| !file.is_empty()) {
        return Ok(process::start_dir().join(file));
    }
    let found = BUNDLES.iter().map(PathBuf::from).find(|bundle| bundle.exists());
    found.ok_or_else(|| {
        Error::new(
            ErrorKind::NotFound,
            format!(
                "no CA certificates of the system found (searched {}): install the package ca-certificates, name the \
                 folder of the server's CA (tls-certificates=), {OTHER_WAYS}",
                BUNDLES.join(", ")
            ),
        )
    })
}

/// Copies a file of certificates to a new file that only this user can read.
fn copy(from: &Path, to: &Path) -> io::Result<()> {
    let mut bytes = Vec::new();
    // One byte more than the limit, so that a longer file is told apart from one of exactly that size.
    File::open(from)?.take(MAX_CERTIFICATES + 1).read_to_end(&mut bytes)?;
    if bytes.len() as u64 > MAX_CERTIFICATES {
        return Err(io::Error::from_raw_os_error(libc::EFBIG));
    }
    fs::OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(to)?
        .write_all(&bytes)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::NbdAddress;

    #[test]
    fn only_later_versions_verify_without_a_host_name() {
        for (version, verifies) in [
            ("1.14.2", false),
            ("1.21.9", false),
            ("1.22.0", true),
            ("1.22", true),
            ("2.0.0", true),
            ("", false),
            ("1", false),
            ("x.99", false),
        ] {
            assert_eq!(verifies_without_host(version), verifies, "{version}");
        }
    }

    #[test]
    fn the_trusted_certificates_are_copied_to_a_private_folder_that_is_removed() {
        use std::os::unix::fs::PermissionsExt;
        let dir = PrivateDir::new().unwrap();
        fs::write(dir.path().join(CA), "the CA").unwrap();
        let trusted = trusted(Some(dir.path())).unwrap();
        let path = trusted.path().to_owned();
        assert_eq!(fs::read(path.join(CA)).unwrap(), b"the CA");
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o700);
        assert!(!path.join(REVOKED).exists());
        assert_eq!(fs::read_link(path.join(CLIENT[1])).unwrap(), dir.path().join(CLIENT[1]));
        drop(trusted);
        assert!(!path.exists());
    }

    #[test]
    fn a_folder_without_a_ca_is_an_error() {
        let dir = PrivateDir::new().unwrap();
        let message = trusted(Some(dir.path())).unwrap_err().to_string();
        assert!(
            message.contains("tls-certificates=") && message.contains(CA),
            "{message}"
        );
    }

    #[test]
    fn a_unix_socket_is_refused_before_anything_is_sent_if_its_server_cannot_be_verified() {
        let handle = Handle::new().unwrap();
        let config = NbdConfig {
            tls: NbdTls::Require,
            ..NbdConfig::new(NbdAddress::Unix("/nowhere".into()))
        };
        if verifies_without_host(&handle.version()) {
            return;
        }
        let message = prepare(&handle, &config, false).unwrap_err().to_string();
        assert!(
            message.contains("only over TCP") && message.contains("tls-psk="),
            "{message}"
        );
    }
}
