//! TLS with certificates and with pre-shared keys.

use std::fs;
use std::path::Path;

use fuse_tests::harness::{Cmd, Scratch, need, poll_until, read_range};

use crate::{SOON, Server, free_port, ready};

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

#[test]
fn the_certificate_of_the_server_is_verified() {
    if !ready() || !need("certtool") {
        return;
    }
    let scratch = Scratch::new();
    let (good, bad) = (scratch.mkdir("good"), scratch.mkdir("bad"));
    certificates(&good);
    certificates(&bad);
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
