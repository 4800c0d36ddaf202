//! Verification of the server's certificate, before any credential is sent.
//!
//! ```text
//!   thumbprint=  the certificate itself is pinned: its SHA-1 or SHA-256; names, dates and issuers do not matter
//!   cainfo=      the certificates of this file are the roots of trust
//!   insecure=    any certificate; the signature of the handshake is still checked
//!   otherwise    the roots of this machine
//! ```
//! The TLS library and the HTTP library report a refusal as a chain of general errors. [`Verifier`] therefore keeps its
//! own sentence about the last refusal, with the thumbprints that were seen, for the message to the user.

use std::fmt::Write as _;
use std::fs;
use std::io;
use std::net::{TcpStream, ToSocketAddrs};
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use ring::digest::{SHA1_FOR_LEGACY_USE_ONLY, SHA256, digest};
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::client::{WebPkiServerVerifier, verify_server_name};
use rustls::crypto::CryptoProvider;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use rustls::server::ParsedCertificate;
use rustls::{CipherSuite, ClientConfig, ClientConnection, DigitallySignedStruct, RootCertStore, SignatureScheme};

use crate::config::{Thumbprint, Trust};
use crate::error::{Error, ErrorKind, Result};
use crate::mutex::lock;

/// Longest time to connect for [`certificate_of`].
const CONNECT: Duration = Duration::from_secs(15);

/// Sentence about the last certificate that was refused.
pub(super) type Refusal = Arc<Mutex<Option<String>>>;

/// Creates the TLS configuration for one server, and the place where its refusals are noted.
///
/// Errors: the file of `cainfo=` cannot be read or has no certificate, this machine has no roots.
pub(super) fn client_config(trust: &Trust) -> Result<(ClientConfig, Refusal)> {
    let mut provider = rustls::crypto::ring::default_provider();
    // A server takes the client's first choice as a rule. AES-128 costs both ends a quarter less than AES-256.
    provider
        .cipher_suites
        .sort_by_key(|suite| suite.suite() != CipherSuite::TLS13_AES_128_GCM_SHA256);
    let provider = Arc::new(provider);
    let refusal = Refusal::default();
    let inner = match trust {
        Trust::Pinned(thumbprint) => Check::Pinned(thumbprint.clone()),
        Trust::Any => Check::Any,
        Trust::File(path) => {
            let (roots, certificates) = roots_of(path)?;
            Check::Roots(by_roots(roots, &provider)?, certificates)
        }
        Trust::System => Check::Roots(by_roots(system_roots()?, &provider)?, Vec::new()),
    };
    let verifier = Verifier {
        check: inner,
        provider: Arc::clone(&provider),
        refusal: Arc::clone(&refusal),
    };
    let versions = ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .map_err(tls_error)?;
    let mut config = versions
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(verifier))
        .with_no_client_auth();
    config.alpn_protocols = vec![b"http/1.1".to_vec()];
    Ok((config, refusal))
}

/// Returns the SHA-1 and the SHA-256 of the certificate that a server shows. Sends nothing but the start of a handshake.
///
/// Errors: the server cannot be reached within 15 seconds, or does not speak TLS.
pub fn certificate_of(server: &str, port: u16) -> Result<(Thumbprint, Thumbprint)> {
    let label = format!("{server}:{port}");
    let failed = |e: io::Error| Error::io(label.clone(), e);
    let name =
        ServerName::try_from(server.to_owned()).map_err(|e| Error::new(ErrorKind::Usage, format!("{label}: {e}")))?;
    let (config, _) = client_config(&Trust::Any)?;
    let mut session = ClientConnection::new(Arc::new(config), name).map_err(tls_error)?;
    let mut socket = connect(server, port).map_err(failed)?;
    let limit = Some(CONNECT);
    let limited = socket
        .set_read_timeout(limit)
        .and_then(|()| socket.set_write_timeout(limit));
    limited.map_err(failed)?;
    let deadline = Instant::now() + CONNECT;
    // The certificate comes in the middle of the handshake. Its end would need an answer of ours, and perhaps a certificate
    // that the server asks of this client.
    while session.is_handshaking() && session.peer_certificates().is_none() {
        if Instant::now() > deadline {
            return Err(failed(io::ErrorKind::TimedOut.into()));
        }
        session.complete_io(&mut socket).map_err(failed)?;
    }
    let certificate = session.peer_certificates().and_then(|chain| chain.first());
    let certificate = certificate.ok_or_else(|| Error::unsupported(format!("{label}: sent no certificate")))?;
    let seen = Seen::of(certificate);
    Ok((seen.sha1, seen.sha256))
}

/// Connects to the first address of a host that answers.
fn connect(server: &str, port: u16) -> io::Result<TcpStream> {
    let mut last = io::Error::from(io::ErrorKind::NotFound);
    for address in (server, port).to_socket_addrs()? {
        match TcpStream::connect_timeout(&address, CONNECT) {
            Ok(socket) => return Ok(socket),
            Err(e) => last = e,
        }
    }
    Err(last)
}

/// Verifier that notes why it refused a certificate.
#[derive(Debug)]
struct Verifier {
    check: Check,
    provider: Arc<CryptoProvider>,
    refusal: Refusal,
}

#[derive(Debug)]
enum Check {
    Pinned(Thumbprint),
    /// By issuers. A certificate of the user's own file is trusted itself, too: a self-signed one is its own issuer.
    Roots(Arc<WebPkiServerVerifier>, Vec<CertificateDer<'static>>),
    Any,
}

impl Verifier {
    fn refuse(&self, sentence: String) -> rustls::Error {
        *lock(&self.refusal) = Some(sentence.clone());
        rustls::Error::General(sentence)
    }
}

impl ServerCertVerifier for Verifier {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        server_name: &ServerName<'_>,
        ocsp_response: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        let seen = Seen::of(end_entity);
        match &self.check {
            Check::Any => Ok(ServerCertVerified::assertion()),
            Check::Pinned(expected) if seen.is(expected) => Ok(ServerCertVerified::assertion()),
            Check::Pinned(expected) => Err(self.refuse(format!(
                "the server's certificate has another thumbprint than thumbprint={expected}: its SHA-1 is {}, its \
                 SHA-256 is {}; if the server's certificate was replaced, give the new thumbprint",
                seen.sha1, seen.sha256
            ))),
            // The library refuses a server's self-signed certificate also where it is a root, so one of the user's own file is
            // compared as a whole. Its name still counts: the file may have the certificates of several servers.
            Check::Roots(_, given) if given.contains(end_entity) => ParsedCertificate::try_from(end_entity)
                .and_then(|certificate| verify_server_name(&certificate, server_name))
                .map(|()| ServerCertVerified::assertion())
                .map_err(|e| self.refuse(format!("the server's certificate is not for this name ({e})"))),
            Check::Roots(roots, _) => roots
                .verify_server_cert(end_entity, intermediates, server_name, ocsp_response, now)
                .map_err(|e| {
                    self.refuse(format!(
                        "the server's certificate is not trusted ({e}); if it is the right server, add \
                         thumbprint={}, or cainfo=FILE with its issuer (SHA-256 {})",
                        seen.sha1, seen.sha256
                    ))
                }),
        }
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        rustls::crypto::verify_tls12_signature(message, cert, dss, &self.provider.signature_verification_algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        rustls::crypto::verify_tls13_signature(message, cert, dss, &self.provider.signature_verification_algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.provider.signature_verification_algorithms.supported_schemes()
    }
}

/// Thumbprints of a certificate that a server sent.
struct Seen {
    sha1: Thumbprint,
    sha256: Thumbprint,
}

impl Seen {
    fn of(certificate: &CertificateDer<'_>) -> Self {
        let sum = |algorithm| Thumbprint(digest(algorithm, certificate).as_ref().to_vec());
        Self {
            sha1: sum(&SHA1_FOR_LEGACY_USE_ONLY),
            sha256: sum(&SHA256),
        }
    }

    fn is(&self, expected: &Thumbprint) -> bool {
        self.sha1 == *expected || self.sha256 == *expected
    }
}

fn by_roots(roots: RootCertStore, provider: &Arc<CryptoProvider>) -> Result<Arc<WebPkiServerVerifier>> {
    WebPkiServerVerifier::builder_with_provider(Arc::new(roots), Arc::clone(provider))
        .build()
        .map_err(|e| Error::new(ErrorKind::Usage, format!("trusted certificates: {e}")))
}

fn roots_of(path: &Path) -> Result<(RootCertStore, Vec<CertificateDer<'static>>)> {
    let label = format!("cainfo={}", path.display());
    let pem = fs::read(path).map_err(|e| Error::io(label.clone(), e))?;
    let (mut roots, mut certificates) = (RootCertStore::empty(), Vec::new());
    for certificate in CertificateDer::pem_slice_iter(&pem) {
        let certificate = certificate.map_err(|e| Error::new(ErrorKind::Usage, format!("{label}: {e}")))?;
        certificates.push(certificate.clone());
        let added = roots.add(certificate);
        added.map_err(|e| Error::new(ErrorKind::Usage, format!("{label}: {e}")))?;
    }
    if roots.is_empty() {
        return Err(Error::new(
            ErrorKind::Usage,
            format!("{label}: has no certificate in PEM form"),
        ));
    }
    Ok((roots, certificates))
}

fn system_roots() -> Result<RootCertStore> {
    let mut roots = RootCertStore::empty();
    // Old or odd certificates among hundreds of a machine are no reason to trust none of them.
    roots.add_parsable_certificates(rustls_native_certs::load_native_certs().certs);
    if roots.is_empty() {
        return Err(Error::new(
            ErrorKind::Usage,
            "this machine has no trusted certificates: install ca-certificates, or give thumbprint= or cainfo=",
        ));
    }
    Ok(roots)
}

#[expect(clippy::needless_pass_by_value, reason = "the signature that map_err takes")]
fn tls_error(e: rustls::Error) -> Error {
    Error::new(ErrorKind::Unsupported, format!("TLS: {e}"))
}

/// Returns an error and its causes as one text. A cause that the text before it ends with is left out.
pub(super) fn with_causes(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(e) = cause {
        let part = e.to_string();
        if !text.ends_with(&part) {
            let _ = write!(text, ": {part}");
        }
        cause = e.source();
    }
    text
}
