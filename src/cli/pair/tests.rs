use std::collections::HashSet;
use std::fmt::Write as _;
use std::fs;
use std::os::unix::fs::PermissionsExt;

use super::super::key::{Group, ValueKind};
use super::super::keys::{KEYS, ready};
use super::super::test_args::{config_of, mount_of};
use super::super::{argument, parse};
use crate::config::DiskConfig;

/// A key with a value that has an effect, a wrong value where there is one, and the words that the key needs beside it.
struct Sample(
    &'static str,
    &'static str,
    Option<&'static str>,
    &'static [&'static str],
);

const FILE: &[&str] = &["/a.vmdk"];
const NEW: &[&str] = &["/new.vmdk", "create=true", "create-size=1M"];
const NBD: &[&str] = &["nbd://h/x"];
const WEB: &[&str] = &["https://h/x.vmdk"];
const ESXI: &[&str] = &["[ds] a/x.vmdk", "server=h"];
const VDDK: &[&str] = &["/a.vmdk", "backend=vddk"];
const REMOTE: &[&str] = &[
    "[ds] a/x.vmdk",
    "backend=vddk",
    "server=h",
    "user=u",
    "password=p",
    "vm=moref=1",
];
const SHA1: &str = "00:11:22:33:44:55:66:77:88:99:aa:bb:cc:dd:ee:ff:00:11:22:33";

#[rustfmt::skip] // a table
static SAMPLES: &[Sample] = &[
    Sample("name", "a=b, c", Some("a/b"), FILE),
    Sample("readonly", "true", Some("maybe"), FILE),
    Sample("cache", "none", Some("often"), FILE),
    Sample("cache-size", "1M", Some("16777216T"), FILE),
    Sample("readahead", "2M", Some("1Q"), FILE),
    Sample("backend", "vddk", Some("magic"), FILE),
    Sample("cow", "/c, d.vmdk", Some(""), FILE),
    Sample("cache-dir", "/c", Some(""), WEB),
    Sample("cache-dir-size", "1G", Some("-1"), &["https://h/x.vmdk", "cache-dir=/c"]),
    Sample("timeout", "7", Some("1801"), NBD),
    Sample("retry", "3", Some("1000001"), NBD),
    Sample("file", "/a \"b\" 'c'=d,e.vmdk", Some(""), &[]),
    Sample("dir", "@/disks", Some(""), &[]),
    Sample("format", "raw", Some("qcow2"), FILE),
    Sample("allow-dir", "/d\\e", Some(""), FILE),
    Sample("extents", "self", Some("some"), FILE),
    Sample("degraded", "cid", Some("yes"), FILE),
    Sample("parent", "/p.vmdk", Some(""), FILE),
    Sample("member", "x.vmdk", Some(""), &["/a.ova", "format=vmdk"]),
    Sample("force", "true", Some("maybe"), FILE),
    Sample("lock", "off", Some("yes"), FILE),
    Sample("kernel-view", "off", Some("on"), FILE),
    Sample("view-size", "1M", Some("1.5M"), FILE),
    Sample("view-dir", "/v", Some(""), FILE),
    Sample("server", "h", Some("h/x"), &["[ds] a/x.vmdk"]),
    Sample("port", "444", Some("a b"), &["hostname=h"]),
    Sample("user", "u", Some(""), &["[ds] a/x.vmdk", "server=h", "password=p"]),
    Sample("password", "p,=\\q", Some(""), &["[ds] a/x.vmdk", "server=h", "user=u"]),
    Sample("cookie", "c=1", Some(""), ESXI),
    Sample("thumbprint", SHA1, Some("00:11"), ESXI),
    Sample("datacenter", "A/B", Some(""), ESXI),
    Sample("cainfo", "/ca", Some(""), ESXI),
    Sample("insecure", "true", Some("maybe"), ESXI),
    Sample("cookie-script", "echo a, b", Some(""), ESXI),
    Sample("cookie-script-renew", "5", Some("4294967296"), &["[ds] a/x.vmdk", "server=h", "cookie-script=x"]),
    Sample("credentials", "@/login", Some("/none"), ESXI),
    Sample("http-version", "2", Some("3"), ESXI),
    Sample("header", "X-A: b", Some("Range: hunter2"), ESXI),
    Sample("proxy", "http://u:p@h", Some("hunter2"), ESXI),
    Sample("resolve", "h:1.2.3.4", Some("h"), ESXI),
    Sample("url", "https://h/x.vmdk?a=b,c", Some("ftp://u:hunter2@h"), &[]),
    Sample("libdir", "/v", Some(""), VDDK),
    Sample("config", "/c", Some(""), VDDK),
    Sample("vm", "moref=2", Some(""), &["[ds] a/x.vmdk", "backend=vddk", "server=h", "user=u", "password=p"]),
    Sample("snapshot", "s", Some(""), REMOTE),
    Sample("transports", "file", Some(""), VDDK),
    Sample("nfchostport", "903", Some("65536"), REMOTE),
    Sample("single-link", "true", Some("maybe"), VDDK),
    Sample("unbuffered", "true", Some("maybe"), VDDK),
    Sample("compression", "zlib", Some("gzip"), REMOTE),
    Sample("vimapiver", "6", Some(""), VDDK),
    Sample("datastore", "moref=d", Some("d"), &["[ds] a/x.vmdk", "backend=vddk", "server=h", "user=u", "password=p"]),
    Sample("prepare-for-access", "true", Some("maybe"), REMOTE),
    Sample("create", "true", Some("maybe"), &["/new.vmdk", "create-size=1M"]),
    Sample("create-size", "1M", Some("513"), &["/new.vmdk", "create=true"]),
    Sample("create-type", "split-flat", Some("flat"), NEW),
    Sample("create-adapter-type", "ide", Some("nvme"), NEW),
    Sample("create-hwversion", "esx50", Some("2"), NEW),
    Sample("uri", "nbd://h/a,b?c=d", Some("nbd:h"), &[]),
    Sample("hostname", "h", Some("a b"), &[]),
    Sample("socket", "/s", Some(""), &[]),
    Sample("socket-fd", "9", Some("2"), &[]),
    Sample("vsock-cid", "3", Some("4294967296"), &[]),
    Sample("command", "nbdkit", Some(""), &[]),
    Sample("arg", "a=b, c\\", None, &["command=nbdkit"]),
    Sample("export", "e \"f\"", None, NBD),
    Sample("dynamic-export", "true", Some("maybe"), NBD),
    Sample("connections", "2", Some("17"), NBD),
    Sample("shared", "true", Some("maybe"), NBD),
    Sample("tls", "on", Some("maybe"), NBD),
    Sample("tls-certificates", "/c", Some(""), NBD),
    Sample("tls-verify", "false", Some("maybe"), NBD),
    Sample("tls-username", "u", Some(""), NBD),
    Sample("tls-psk", "/p", Some(""), NBD),
];

/// Folder with what the samples name, and the forms in which one is given.
struct Forms(tempfile::TempDir);

impl Forms {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        for folder in ["mnt", "disks"] {
            fs::create_dir(dir.path().join(folder)).unwrap();
        }
        fs::write(dir.path().join("disks/a.vmdk"), "# Disk DescriptorFile\n").unwrap();
        fs::write(dir.path().join("login"), "username=u\npassword=p\n").unwrap();
        fs::set_permissions(dir.path().join("login"), fs::Permissions::from_mode(0o600)).unwrap();
        Self(dir)
    }

    fn path(&self, name: &str) -> String {
        self.0.path().join(name).to_str().unwrap().to_owned()
    }

    /// Returns the disks of a command line, with the mount point at `@/mnt`.
    fn disks(&self, words: &[String]) -> Result<Vec<DiskConfig>, String> {
        let words = words.iter().map(|word| word.replace("@/mnt", &self.path("mnt")).into());
        config_of(parse(words)).map(|config| mount_of(config).disks)
    }

    fn words(&self, others: &[&str], word: &str) -> Result<Vec<DiskConfig>, String> {
        self.disks(&[&["vmdkfuse", "@/mnt"], others, &[word]].concat().map_owned())
    }

    fn option(&self, others: &[&str], word: &str) -> Result<Vec<DiskConfig>, String> {
        self.disks(
            &[&["vmdkfuse", "@/mnt", "-o", &escaped(word)], others]
                .concat()
                .map_owned(),
        )
    }

    /// Returns the disks of a line in fstab, without the warning about `user=`.
    fn fstab(&self, others: &[&str], word: &str) -> Result<Vec<DiskConfig>, String> {
        let options: Vec<String> = others[1..].iter().chain([&word]).map(|word| escaped(word)).collect();
        let mut disks = self.disks(&["mount.vmdkfuse", others[0], "@/mnt", "-o", &options.join(",")].map_owned())?;
        disks[0]
            .warnings
            .retain(|warning| !warning.starts_with("user= belongs"));
        Ok(disks)
    }

    fn toml(&self, others: &[&str], word: &str) -> Result<Vec<DiskConfig>, String> {
        let mut text = String::from("[[disk]]\n");
        for word in others.iter().chain([&word]) {
            let pair = argument::read(word.as_ref()).unwrap();
            let value = pair.value.to_str().unwrap();
            let is_literal = match pair.key.kind {
                ValueKind::Bool => matches!(value, "true" | "false"),
                ValueKind::Seconds | ValueKind::Count => true,
                _ => false,
            };
            let quoted = format!("\"{}\"", value.replace('\\', "\\\\").replace('"', "\\\""));
            _ = writeln!(text, "{} = {}", pair.key.name, if is_literal { value } else { &quoted });
        }
        fs::write(self.path("vms.toml"), text).unwrap();
        let disks = self.disks(&["vmdkfuse", "--config", &self.path("vms.toml"), "@/mnt"].map_owned());
        disks.map_err(|e| e.replace(&self.path("vms.toml"), "vms.toml"))
    }
}

trait MapOwned {
    fn map_owned(&self) -> Vec<String>;
}

impl MapOwned for [&str] {
    fn map_owned(&self) -> Vec<String> {
        self.iter().map(|&word| word.to_owned()).collect()
    }
}

/// Escapes a word for a list of `-o`.
fn escaped(word: &str) -> String {
    word.replace('\\', "\\\\").replace(',', "\\,")
}

#[test]
fn every_key_is_the_same_as_a_word_as_an_option_and_in_a_file() {
    let forms = Forms::new();
    for Sample(name, value, _, others) in SAMPLES {
        let word = format!("{name}={}", value.replace("@/", &forms.path("")));
        let disks = forms.words(others, &word).unwrap_or_else(|e| panic!("{word}: {e}"));
        assert_eq!(forms.option(others, &word).as_ref(), Ok(&disks), "-o {word}");
        assert_eq!(forms.toml(others, &word).as_ref(), Ok(&disks), "{word} in a file");
        if others
            .first()
            .is_some_and(|other| argument::split_key(other.as_ref()).is_none())
        {
            assert_eq!(forms.fstab(others, &word).as_ref(), Ok(&disks), "{word} in fstab");
        }
        let key = KEYS.iter().find(|key| key.name == *name).unwrap();
        for alias in key.aliases {
            let word = word.replacen(name, alias, 1);
            assert_eq!(forms.words(others, &word).as_ref(), Ok(&disks), "{word}");
        }
        let without = forms.words(&others[..others.len().saturating_sub(1)], others.last().unwrap_or(&""));
        assert!(*name == "vimapiver" || without != Ok(disks), "{word} has no effect");
    }
}

#[test]
fn a_wrong_value_names_the_word_or_the_line() {
    let forms = Forms::new();
    for Sample(name, _, wrong, others) in SAMPLES {
        let Some(wrong) = wrong else { continue };
        let word = format!("{name}={wrong}");
        let line = format!("vms.toml:{}: {name}", others.len() + 2);
        for (form, error, start) in [
            ("a word", forms.words(others, &word), format!("{name}=")),
            ("-o", forms.option(others, &word), format!("{name}=")),
            ("a file", forms.toml(others, &word), line),
        ] {
            let error = error.unwrap_err();
            assert!(error.starts_with(&start), "{word} as {form}: {error}");
            assert!(!error.contains("hunter2") && !error.contains('\n'), "{error}");
        }
    }
}

#[test]
fn every_key_has_a_sample() {
    let sampled: HashSet<&str> = SAMPLES.iter().map(|sample| sample.0).collect();
    let all = Group::ALL.into_iter().flat_map(ready).map(|key| key.name);
    // `limit=` is for --map alone.
    assert_eq!(sampled, all.filter(|name| *name != "limit").collect());
}
