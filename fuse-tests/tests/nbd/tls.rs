//! TLS with certificates and with pre-shared keys.

use std::fs;
use std::path::{Path, PathBuf};

use fuse_tests::harness::{Cmd, Outcome, Scratch, free_port, need, poll_until, program, read_range};

use crate::{SOON, Server, can_read, ready};

/// Creates a certificate authority and a server certificate signed by it, both in `dir`.
fn certificates(dir: &Path) {
    let write = |name: &str, text: &str| fs::write(dir.join(name), text).unwrap();
    write("ca.info", "cn = Test\nca\ncert_signing_key\nexpiration_days = 2\n");
    write(
        "server.info",
        "cn = localhost\ndns_name = localhost\ntls_www_server\nexpiration_days = 2\n",
    );
    let certtool = |words: &[&str], out: &str| {
        Cmd::new("certtool")
            .args(words)
            .arg("--outfile")
            .arg(out)
            .dir(dir)
            .run()
            .ok();
    };
    let key = ["--generate-privkey", "--key-type=ecdsa"];
    certtool(&key, "ca-key.pem");
    let authority = [
        "--generate-self-signed",
        "--load-privkey",
        "ca-key.pem",
        "--template",
        "ca.info",
    ];
    certtool(&authority, "ca-cert.pem");
    certtool(&key, "server-key.pem");
    let issuer = [
        "--load-ca-certificate",
        "ca-cert.pem",
        "--load-ca-privkey",
        "ca-key.pem",
    ];
    let server = [
        "--generate-certificate",
        "--load-privkey",
        "server-key.pem",
        "--template",
        "server.info",
    ];
    certtool(&[&server[..], &issuer[..]].concat(), "server-cert.pem");
}

/// Returns a folder with certificates of two CAs in folders of their own: those of the server, and those of a stranger.
fn two_authorities() -> (Scratch, PathBuf, PathBuf) {
    let scratch = Scratch::new();
    let (good, bad) = (scratch.mkdir("good"), scratch.mkdir("bad"));
    certificates(&good);
    certificates(&bad);
    (scratch, good, bad)
}

#[test]
fn the_certificate_of_the_server_is_verified() {
    if !ready() || !need("certtool") {
        return;
    }
    let (scratch, good, bad) = two_authorities();
    let dir = format!("--tls-certificates={}", good.display());
    let port = free_port();
    let _server = Server::nbdkit_on(port, &["--tls=require", &dir, "pattern", "1M"]);
    assert!(poll_until(SOON, || std::net::TcpStream::connect(format!(
        "127.0.0.1:{port}"
    ))
    .is_ok()));
    let uri = format!("nbds://localhost:{port}");
    let with = |dir: &Path| {
        scratch
            .mount()
            .arg(&uri)
            .arg(format!("tls-certificates={}", dir.display()))
    };
    let mount = with(&good).start();
    assert_eq!(read_range(&mount.file("disk.raw"), 8, 8), 8u64.to_be_bytes());
    mount.unmount();
    with(&bad).refused(1).one_error(1, &["localhost", "certificate"]);
    with(&bad).arg("tls-verify=no").start().unmount();
    // The server requires TLS.
    scratch.mount().arg(format!("nbd://localhost:{port}")).refused(1);
}

#[test]
fn a_pre_shared_key_is_used_and_tls_require_refuses_a_server_without_tls() {
    if !ready() || !need("psktool") {
        return;
    }
    let scratch = Scratch::new();
    let keys = scratch.path("keys");
    let wrong = scratch.write("wrong", "alice:00112233445566778899aabbccddeeff\n");
    Cmd::new("psktool").args(["-u", "alice", "-p"]).arg(&keys).run().ok();
    let psk = format!("--tls-psk={}", keys.display());
    let server = Server::nbdkit(&scratch, &["--tls=require", &psk, "pattern", "1M"]);
    let log = scratch.path("log");
    let with = |keys: &Path| {
        let mount = scratch.mount().arg(format!("socket={}", server.socket.display()));
        let mount = mount
            .arg("tls=require")
            .arg("tls-username=alice")
            .arg(format!("tls-psk={}", keys.display()));
        mount.arg("-vvv").arg(format!("--log-file={}", log.display()))
    };
    let mount = with(&keys).start();
    assert_eq!(read_range(&mount.file("disk.raw"), 16, 8), 16u64.to_be_bytes());
    mount.unmount();
    with(&wrong).refused(1);
    let key = fs::read_to_string(&keys).unwrap();
    let secret = key.trim().rsplit(':').next().unwrap();
    assert!(
        !fs::read_to_string(&log).unwrap().contains(secret),
        "the key is in the log"
    );
    drop(server);
    let plain = Server::nbdkit(&scratch, &["pattern", "1M"]);
    scratch
        .mount()
        .arg(plain.uri())
        .arg("tls=require")
        .refused(1)
        .one_error(1, &["TLS"]);
    scratch.mount().arg(plain.uri()).arg("tls=on").start().unmount();
}

/// Starts nbdkit on TCP with the certificates of `dir`, or without TLS, and waits until it accepts connections.
fn tcp_server(port: u16, certificates: Option<&Path>) -> Server {
    let tls = certificates.map(|dir| format!("--tls-certificates={}", dir.display()));
    let words: Vec<&str> = match &tls {
        Some(tls) => vec!["--tls=on", tls, "pattern", "1M"],
        None => vec!["pattern", "1M"],
    };
    let server = Server::nbdkit_on(port, &words);
    assert!(poll_until(SOON, || std::net::TcpStream::connect(("127.0.0.1", port)).is_ok()));
    server
}

/// Runs `--info` with that file as the system's CA certificates.
fn info(words: &[&str], bundle: &Path) -> Outcome {
    Cmd::new(program())
        .arg("--info")
        .args(words)
        .arg("timeout=30")
        .env("SSL_CERT_FILE", bundle.to_str().unwrap())
        .run()
}

/// README: "by a certificate of a CA in `tls-certificates=`, in libnbd's own folder […], or of the system".
#[test]
fn without_certificates_of_its_own_a_server_must_have_one_of_a_ca_of_the_system() {
    if !ready() || !need("certtool") {
        return;
    }
    let (scratch, good, bad) = two_authorities();
    let port = free_port();
    let _server = tcp_server(port, Some(&good));
    let (secure, plain) = (format!("nbds://localhost:{port}"), format!("nbd://localhost:{port}"));
    let ca = |dir: &Path| dir.join("ca-cert.pem");
    let output = info(&[&secure], &ca(&good)).ok();
    assert!(output.stdout.contains("with TLS"), "{}", output.stdout);
    let port_word = format!("port={port}");
    info(&["hostname=localhost", &port_word, "tls=require"], &ca(&good)).ok();
    for words in [
        &[secure.as_str()][..],
        &[&plain, "tls=on"],
        &["hostname=localhost", &port_word, "tls=require"],
        &[&format!("nbds://127.0.0.1:{port}")],
    ] {
        info(words, &ca(&bad)).one_error(1, &["certificate"]);
    }
    // The certificate is for another name.
    info(&[&format!("nbds://127.0.0.1:{port}")], &ca(&good)).one_error(1, &["certificate"]);
    info(&[&secure], &scratch.path("none")).one_error(1, &["CA certificates", "none"]);
    // A folder that the URI names, in place of the system's.
    let with = |dir: &Path| format!("{secure}/?tls-certificates={}", dir.display());
    info(&[&with(&good)], &ca(&bad)).ok();
    info(&[&with(&bad)], &ca(&good)).one_error(1, &["certificate"]);
    info(&[&with(&scratch.mkdir("empty"))], &ca(&good)).one_error(1, &["tls-certificates=", "ca-cert.pem"]);
    info(&[&secure, "tls-verify=no"], &ca(&bad)).ok();
}

#[test]
fn a_certificate_on_a_unix_socket_is_verified_or_the_connection_refused() {
    if !ready() || !need("certtool") || !need("psktool") {
        return;
    }
    let (scratch, good, bad) = two_authorities();
    let dir = format!("--tls-certificates={}", good.display());
    let server = Server::nbdkit(&scratch, &["--tls=require", &dir, "pattern", "1M"]);
    let uri = format!("nbds+unix:///?socket={}", server.socket.display());
    let socket = format!("socket={}", server.socket.display());
    let wrong = format!("tls-certificates={}", bad.display());
    for words in [
        &[uri.as_str()][..],
        &[&uri, &wrong],
        &[&socket, &wrong],
        &[&socket, "tls=on"],
    ] {
        info(words, &bad.join("ca-cert.pem")).one_error(1, &["certificate"]);
    }
    info(&[&uri, "tls-verify=no"], &bad.join("ca-cert.pem")).ok();
    // A server that has no key cannot replace it by a certificate.
    let keys = scratch.path("keys");
    Cmd::new("psktool").args(["-u", "alice", "-p"]).arg(&keys).run().ok();
    let psk = format!("tls-psk={}", keys.display());
    info(&[&uri, "tls-username=alice", &psk], &good.join("ca-cert.pem")).one_error(1, &["gnutls"]);
}

/// README: "With `tls=on` a connection that was encrypted is not replaced by a plain one."
#[test]
fn a_connection_that_was_encrypted_is_not_replaced_by_a_plain_one() {
    if !ready() || !need("certtool") {
        return;
    }
    let scratch = Scratch::new();
    let good = scratch.mkdir("good");
    certificates(&good);
    let port = free_port();
    let server = tcp_server(port, Some(&good));
    let mount = scratch
        .mount()
        .arg(format!("nbd://localhost:{port}"))
        .arg("tls=on")
        .arg("timeout=2")
        .env("SSL_CERT_FILE", good.join("ca-cert.pem").to_str().unwrap())
        .start();
    let disk = mount.file("disk.raw");
    // The time limit is short for a busy machine, too.
    assert!(poll_until(SOON, || can_read(&disk, SOON)));
    server.crash();
    let plain = tcp_server(port, None);
    assert!(!can_read(&disk, SOON), "a server without TLS was accepted");
    plain.crash();
    let _server = tcp_server(port, Some(&good));
    assert!(poll_until(SOON, || can_read(&disk, SOON)), "did not reconnect with TLS");
    mount.unmount();
}
