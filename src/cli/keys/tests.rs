use std::collections::HashSet;
use std::ffi::OsStr;

use super::super::settings::Settings;
use super::super::values::Value;
use super::*;

/// All documented keys, so that the table cannot lose one.
const CONTRACT: &str = "name readonly cow cache cache-size cache-dir cache-dir-size limit parent extents member username \
    credentials http-version header proxy resolve datastore prepare-for-access readahead timeout retry backend file server port user \
    password cookie thumbprint datacenter cainfo insecure cookie-script cookie-script-renew libdir config vm snapshot \
    transports nfchostport single-link unbuffered compression vimapiver create create-size create-type \
    create-adapter-type create-hwversion format allow-dir degraded force lock kernel-view view-size view-dir dir partitions \
    descriptor uri url hostname socket socket-fd vsock-cid vhost-cid command arg export dynamic-export connections \
    shared tls tls-certificates tls-verify tls-username tls-psk";

const READY: &str = "limit name readonly cache cache-size readahead backend file dir format allow-dir degraded parent member extents lock cow \
    force create create-size create-type create-adapter-type create-hwversion timeout retry port uri hostname socket \
    socket-fd vsock-cid command arg export dynamic-export connections shared tls tls-certificates tls-verify \
    tls-username tls-psk kernel-view view-size view-dir server user password cookie thumbprint datacenter cainfo \
    insecure url cookie-script-renew cookie-script http-version credentials header proxy resolve libdir config vm snapshot transports nfchostport single-link unbuffered \
    compression vimapiver datastore prepare-for-access cache-dir cache-dir-size";

#[test]
fn the_table_holds_every_documented_key() {
    let spellings: Vec<&str> = KEYS
        .iter()
        .flat_map(|key| std::iter::once(key.name).chain(key.aliases.iter().copied()))
        .collect();
    let unique: HashSet<&str> = spellings.iter().copied().collect();
    assert_eq!(unique.len(), spellings.len(), "a key is twice in the table");
    assert_eq!(unique, CONTRACT.split_whitespace().collect());
    let ready: HashSet<&str> = KEYS.iter().filter(|key| key.is_ready()).map(|key| key.name).collect();
    assert_eq!(ready, READY.split_whitespace().collect());
}

#[test]
fn keys_that_are_not_in_this_build_are_reported_before_their_value_is_checked() {
    for key in KEYS.iter().filter(|key| !key.is_ready()) {
        let error = key
            .apply(&mut Settings::default(), &Value::here(OsStr::new("?")))
            .unwrap_err()
            .to_string();
        assert_eq!(error, format!("{}= is not in this build yet", key.name));
    }
}

#[test]
fn values_are_checked_by_their_key() {
    for (name, value, good) in [
        ("readonly", "yes", true),
        ("readonly", "maybe", false),
        ("cache", "none", true),
        ("cache", "writethrough", true),
        ("cache", "writeback", true),
        ("cache", "None", false),
        ("cow", "tmp", true),
        ("cow", "x.vmdk", true),
        ("cow", "", false),
        ("force", "maybe", false),
        ("create", "1", true),
        ("create", "x.vmdk", false),
        ("create-size", "512", true),
        ("create-size", "0", false),
        ("create-size", "513", false),
        ("create-size", "8388608T", false),
        ("create-type", "split-flat", true),
        ("create-type", "splitflat", false),
        ("create-adapter-type", "legacyESX", true),
        ("create-adapter-type", "scsi-buslogic", true),
        ("create-adapter-type", "nvme", false),
        ("create-hwversion", "21", true),
        ("create-hwversion", "esx65", true),
        ("create-hwversion", "2", false),
        ("create-hwversion", "+4", false),
        ("create-hwversion", "esx", false),
        ("cache-size", "1G", true),
        ("cache-size", "1Q", false),
        ("readahead", "128K", true),
        ("readahead", "", false),
        ("backend", "native", true),
        ("backend", "vddk", true),
        ("compression", "skipz", true),
        ("compression", "gzip", false),
        ("nfchostport", "902", true),
        ("nfchostport", "0", false),
        ("datastore", "moref=datastore-1", true),
        ("datastore", "datastore-1", false),
        ("backend", "magic", false),
        ("format", "vmdk", true),
        ("format", "raw", true),
        ("format", "qcow2", false),
        ("degraded", "cid", true),
        ("degraded", "orphan", true),
        ("degraded", "short", true),
        ("degraded", "yes", false),
        ("lock", "on", true),
        ("lock", "off", true),
        ("lock", "yes", false),
        ("name", "x.raw", true),
        ("name", "a/b", false),
        ("file", "", false),
        ("dir", "", false),
        ("allow-dir", "", false),
    ] {
        let outcome = find(name)
            .unwrap()
            .apply(&mut Settings::default(), &Value::here(OsStr::new(value)));
        assert_eq!(outcome.is_ok(), good, "{name}={value}: {outcome:?}");
        if let Err(e) = outcome {
            assert!(e.to_string().starts_with(&format!("{name}={value}: ")), "{e}");
        }
    }
}

#[test]
fn nearest_suggests_only_similar_names() {
    for (typed, meant) in [
        ("cashe", "cache"),
        ("read-only", "readonly"),
        ("fiel", "file"),
        ("File", "file"),
        ("readahaed", "readahead"),
        ("allowdir", "allow-dir"),
        ("vhost-cidd", "vhost-cid"),
        ("pasword", "password"),
    ] {
        assert_eq!(nearest(typed), Some(meant), "{typed}");
    }
    for typed in ["x", "zz", "banana", "completely-else", ""] {
        assert_eq!(nearest(typed), None, "{typed}");
    }
}

#[test]
fn an_address_with_a_login_is_not_shown() {
    for (name, value) in [
        ("file", "ssh://u:hunter2@h/x"),
        ("uri", "nbd+ssh://u:hunter2@h/x"),
        ("hostname", "nbd://u:hunter2@h"),
        ("server", "https://u:hunter2@h"),
    ] {
        let error = find(name)
            .unwrap()
            .apply(&mut Settings::default(), &Value::here(OsStr::new(value)))
            .unwrap_err()
            .to_string();
        assert!(
            error.starts_with(&format!("{name}=: ")) && !error.contains("hunter2"),
            "{error}"
        );
    }
}
