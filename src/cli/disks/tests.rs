use std::ffi::OsString;
use std::fs;
use std::os::unix::ffi::OsStrExt;
use std::path::PathBuf;

use super::super::keys;
use super::super::pair::{Origin, Pair};
use super::*;
use crate::config::{
    Degraded, Format, HttpsAddress, KernelView, LocalConfig, NbdAddress, NbdConfig, NbdTls, Overlay, PageCache,
    SourceConfig, SourceSettings, ViewConfig,
};

fn parse(words: &[&str]) -> Result<Vec<DiskConfig>, String> {
    parse_with(&[], words)
}

fn parse_with(options: &[(&str, &str)], words: &[&str]) -> Result<Vec<DiskConfig>, String> {
    let options = options.iter().map(|(key, value)| Pair {
        key: keys::find(key).unwrap(),
        value: value.into(),
        origin: Origin::Argument,
    });
    let words: Vec<OsString> = words.iter().map(OsString::from).collect();
    let subcommand = Subcommand::Mount { read_only: false };
    let args = DiskArgs::of_words(options.collect(), &words);
    let resolved = args
        .and_then(|args| resolve(args, subcommand))
        .map_err(|e| e.to_string())?;
    configs(resolved, None, subcommand).map_err(|e| e.to_string())
}

fn local(disk: &DiskConfig) -> &LocalConfig {
    disk.source.local().unwrap()
}

#[test]
fn bare_values_get_their_key() {
    for uri in [
        "nbd://h",
        "nbds://h/x",
        "nbd+unix:///x?socket=/s",
        "nbds+unix:///",
        "nbd+vsock://2",
        "NBD://h",
    ] {
        let disk = parse(&[uri]).unwrap().remove(0);
        assert!(
            matches!(&disk.source, SourceConfig::Nbd(n) if n.address == NbdAddress::Uri(uri.into())),
            "{uri}"
        );
    }
    for url in ["https://h/folder/x?dcPath=d", "http://h/x"] {
        let disk = parse(&[url]).unwrap().remove(0);
        assert!(
            matches!(&disk.source, SourceConfig::Https(h) if h.address == HttpsAddress::Url(url.into())),
            "{url}"
        );
    }
    for file in ["/x.vmdk", "/nbd://h", "/a=b"] {
        assert_eq!(local(&parse(&[file]).unwrap()[0]).path, PathBuf::from(file));
    }
    assert!(parse(&["nbd:h"]).unwrap_err().contains("needs two slashes"));
}

#[test]
fn every_setting_is_stored() {
    let disks = parse(&[
        "file=/a.vmdk",
        "name=n",
        "readonly=yes",
        "cache=none",
        "cache-size=1M",
        "readahead=2M",
        "backend=native",
        "format=raw",
        "allow-dir=/one",
        "allow-dir=/two",
        "degraded=cid",
        "degraded=short",
        "parent=/p.vmdk",
        "extents=self",
        "lock=off",
        "kernel-view=required",
        "view-size=4M",
        "view-dir=/v",
        "cow=/c.vmdk",
        "force=yes",
    ]);
    let expected = DiskConfig {
        name: "n".into(),
        read_only: true,
        cache: Some(PageCache::None),
        warnings: Vec::new(),
        cache_size: Some(1 << 20),
        readahead: Some(2 << 20),
        overlay: Some(Overlay::File("/c.vmdk".into())),
        map_limit: None,
        source: SourceConfig::Local(LocalConfig {
            path: "/a.vmdk".into(),
            member: None,
            found_in: None,
            format: Format::Raw,
            allow_dirs: vec!["/one".into(), "/two".into()],
            degraded: Degraded {
                cid: true,
                orphan: false,
                short: true,
            },
            parent: Some("/p.vmdk".into()),
            single_file: true,
            lock: false,
            force: true,
            create: None,
            view: ViewConfig {
                mode: KernelView::Required,
                size: 4 << 20,
                dir: Some("/v".into()),
            },
        }),
    };
    assert_eq!(disks, Ok(vec![expected]));
}

#[test]
fn a_common_key_applies_to_the_disks_that_it_fits() {
    let disks = parse(&["kernel-view=off", "connections=2", "/x", "nbd://h"]).unwrap();
    assert_eq!(local(&disks[0]).view.mode, KernelView::Off);
    assert!(
        matches!(&disks[1].source, SourceConfig::Nbd(server) if server.connections == Some(2)),
        "{disks:?}"
    );
}

#[test]
fn settings_have_defaults() {
    let disks = parse(&["/a.vmdk"]).unwrap();
    assert_eq!(disks[0].name, "a.raw");
    assert_eq!((disks[0].read_only, disks[0].cache), (false, None));
    assert_eq!(
        (disks[0].cache_size, disks[0].readahead, &disks[0].overlay),
        (None, None, &None)
    );
    assert!(!local(&disks[0]).force && local(&disks[0]).create.is_none());
    assert_eq!(local(&disks[0]).format, Format::Auto);
    assert!(!local(&disks[0]).degraded.cid && local(&disks[0]).allow_dirs.is_empty());
    assert!(local(&disks[0]).lock);
    assert_eq!(local(&disks[0]).view, ViewConfig::default());
}

#[test]
fn a_second_source_starts_another_disk_and_common_keys_apply_to_all() {
    let disks = parse(&[
        "cache=none",
        "format=vmdk",
        "allow-dir=/all",
        "file=/a",
        "format=raw",
        "readonly=1",
        "file=/b",
        "allow-dir=/b-only",
        "/c",
    ])
    .unwrap();
    let formats: Vec<_> = disks.iter().map(|disk| local(disk).format).collect();
    assert_eq!(formats, [Format::Raw, Format::Vmdk, Format::Vmdk]);
    assert!(disks.iter().all(|disk| disk.cache == Some(PageCache::None)));
    assert_eq!(
        disks.iter().map(|disk| disk.read_only).collect::<Vec<_>>(),
        [true, false, false]
    );
    assert_eq!(local(&disks[0]).allow_dirs, [PathBuf::from("/all")]);
    assert_eq!(local(&disks[1]).allow_dirs, [PathBuf::from("/all"), "/b-only".into()]);
}

#[test]
fn keys_of_options_apply_to_all_disks_and_their_sources_are_disks() {
    let disks = parse_with(
        &[("cache", "none"), ("file", "/o")],
        &["readonly=yes", "/a", "cache=writethrough"],
    )
    .unwrap();
    assert_eq!(
        disks.iter().map(|disk| disk.name.clone()).collect::<Vec<_>>(),
        ["o.raw", "a.raw"]
    );
    assert_eq!(
        disks.iter().map(|disk| disk.cache).collect::<Vec<_>>(),
        [Some(PageCache::None), Some(PageCache::WriteThrough)]
    );
    assert!(disks.iter().all(|disk| disk.read_only));
}

#[test]
fn a_key_given_twice_is_refused() {
    for words in [
        &["/a", "cache=none", "cache=none"][..],
        &["cache=none", "cache=none", "/a"],
    ] {
        assert_eq!(parse(words).unwrap_err(), "cache= is given twice for the same disk");
    }
    assert!(parse(&["cache=none", "/a", "cache=none", "/b", "cache=none"]).is_ok());
    assert!(parse(&["allow-dir=/x", "allow-dir=/y", "/a"]).is_ok());
}

#[test]
fn an_unknown_key_suggests_a_key_and_the_form_of_a_file_name() {
    let error = parse(&["/a", "cashe=none"]).unwrap_err();
    assert!(
        error.starts_with("unknown key cashe=; did you mean cache=? "),
        "{error}"
    );
    assert!(error.contains("file=cashe="), "{error}");
    let error = parse(&["banana=secret"]).unwrap_err();
    assert!(
        error.contains("--help") && !error.contains("did you mean") && !error.contains("secret"),
        "{error}"
    );
    let disks = parse(&["file=cashe=none.vmdk"]).unwrap();
    assert!(local(&disks[0]).path.ends_with("cashe=none.vmdk"));
}

#[test]
fn keys_of_other_back_ends_are_refused_before_files_are_searched() {
    let error = parse(&["file=[ds1] dir/x*.vmdk", "cookie-script=x"]).unwrap_err();
    assert!(
        error.starts_with("cookie-script= is for disks on a web server"),
        "{error}"
    );
    let error = parse(&["password=hunter2", "/a/*"]).unwrap_err();
    assert!(error.starts_with("password= is for disks on a web server"), "{error}");
}

#[test]
fn keys_after_a_pattern_apply_to_each_match_but_a_name_to_one_only() {
    let dir = tempfile::tempdir().unwrap();
    let pattern = format!("file={}/*.img", dir.path().display());
    fs::write(dir.path().join("a.img"), "").unwrap();
    assert_eq!(parse(&[&pattern, "name=one"]).unwrap()[0].name, "one");
    fs::write(dir.path().join("b.img"), "").unwrap();
    let disks = parse(&[&pattern, "cache=none"]).unwrap();
    assert_eq!(
        disks.iter().map(|disk| disk.name.clone()).collect::<Vec<_>>(),
        ["a.raw", "b.raw"]
    );
    assert!(disks.iter().all(|disk| disk.cache == Some(PageCache::None)));
    let error = parse(&[&pattern, "name=one"]).unwrap_err();
    assert_eq!(
        error,
        "name=one would apply to 2 disks, but a file name is for one disk: give it after that disk"
    );
}

#[test]
fn a_common_name_needs_a_single_disk() {
    assert_eq!(parse(&["name=n", "/a"]).unwrap()[0].name, "n");
    assert_eq!(parse_with(&[("name", "n")], &["/a"]).unwrap()[0].name, "n");
    assert!(parse(&["name=n", "/a", "/b"]).unwrap_err().contains("2 disks"));
}

#[test]
fn a_folder_gives_a_disk_for_each_image() {
    let dir = tempfile::tempdir().unwrap();
    for name in ["b.vmdk", "a.vmdk"] {
        fs::write(dir.path().join(name), "# Disk DescriptorFile\n").unwrap();
    }
    let word = format!("dir={}", dir.path().display());
    let disks = parse(&[&word, "readonly=yes", "/c"]).unwrap();
    assert_eq!(
        disks.iter().map(|disk| disk.name.clone()).collect::<Vec<_>>(),
        ["a.raw", "b.raw", "c.raw"]
    );
    assert_eq!(
        disks.iter().map(|disk| disk.read_only).collect::<Vec<_>>(),
        [true, true, false]
    );
    assert!(parse(&[&word, "name=n"]).is_err());
}

#[test]
fn no_disk_is_an_error() {
    assert_eq!(
        parse(&[]).unwrap_err(),
        "no disk is given: add file=PATH, or uri= of an NBD server"
    );
    assert_eq!(
        parse(&["cache=none"]).unwrap_err(),
        "no disk is given: add file=PATH, or uri= of an NBD server"
    );
    assert_eq!(parse(&[""]).unwrap_err(), "file=: a path is missing");
}

fn server(words: &[&str]) -> Result<NbdConfig, String> {
    match parse(words)?.remove(0).source {
        SourceConfig::Nbd(server) => Ok(server),
        other => panic!("no server: {other:?}"),
    }
}

#[test]
fn every_form_of_server_address_is_parsed() {
    let of = |words: &[&str]| server(words).unwrap().address;
    let tcp = |host: &str, port: Option<&str>| NbdAddress::Tcp {
        host: host.into(),
        port: port.map(str::to_owned),
    };
    assert_eq!(of(&["hostname=h"]), tcp("h", None));
    assert_eq!(of(&["port=nbd", "hostname=::1"]), tcp("::1", Some("nbd")));
    assert_eq!(of(&["socket=/s", "export=a"]), NbdAddress::Unix("/s".into()));
    assert_eq!(of(&["socket-fd=7"]), NbdAddress::Fd(7));
    assert_eq!(of(&["vsock-cid=2"]), NbdAddress::Vsock { cid: 2, port: None });
    assert_eq!(
        of(&["vhost-cid=4294967295", "port=99"]),
        NbdAddress::Vsock {
            cid: u32::MAX,
            port: Some(99)
        }
    );
    let words = ["nbdkit", "memory", "", "1G"].map(OsString::from).to_vec();
    assert_eq!(
        of(&["arg=memory", "command=nbdkit", "arg=", "arg=1G"]),
        NbdAddress::Command(words)
    );
    assert_eq!(of(&["nbd+vsock://2:1/x"]), NbdAddress::Uri("nbd+vsock://2:1/x".into()));
}

#[test]
fn every_setting_of_a_server_is_stored() {
    let all = server(&[
        "nbds://h/a",
        "export=b",
        "connections=2",
        "tls-certificates=/c",
        "tls-verify=no",
        "tls-username=u",
        "tls-psk=/p",
        "timeout=7",
        "retry=3",
    ]);
    let expected = NbdConfig {
        export: Some("b".into()),
        connections: Some(2),
        tls: NbdTls::Require,
        tls_certificates: Some("/c".into()),
        tls_verify: Some(false),
        tls_username: Some("u".into()),
        tls_psk: Some("/p".into()),
        timeout: Some(std::time::Duration::from_secs(7)),
        retry: Some(3),
        ..NbdConfig::new(NbdAddress::Uri("nbds://h/a".into()))
    };
    assert_eq!(all, Ok(expected));
    assert_eq!(server(&["nbd://h", "shared=1"]).unwrap().connections, Some(1));
    assert_eq!(server(&["nbd://h"]).unwrap().tls, NbdTls::Off);
    assert_eq!(server(&["nbd://h", "tls=on"]).unwrap().tls, NbdTls::On);
    assert_eq!(server(&["nbd://h", "tls-psk=/p"]).unwrap().tls, NbdTls::Require);
    assert!(server(&["nbd://h", "dynamic-export=1"]).unwrap().dynamic);
}

#[test]
fn conflicting_keys_of_servers_are_refused() {
    for (words, message) in [
        (&["nbd://h", "socket=/s"][..], "uri= and socket= are both addresses"),
        (
            &["hostname=h", "command=c"],
            "hostname= and command= are both addresses",
        ),
        (&["socket=/s", "port=1"], "port= needs hostname="),
        (&["nbd://h", "arg=x"], "arg= needs command="),
        (&["vsock-cid=2", "port=nbd"], "port=nbd: a VSOCK port is a number"),
        (&["nbd://h", "dynamic-export=1", "export=a"], "but export= names one"),
        (&["nbd://h", "dynamic-export=1", "name=a"], "one name"),
        (&["nbd://h", "dynamic-export=1", "cow=/a"], "cow="),
        (
            &["nbd://h", "shared=1", "connections=2"],
            "shared=true means one connection",
        ),
        (&["socket-fd=7", "connections=2"], "socket-fd= means one connection"),
        (&["nbds://h", "tls=off"], "the URI requires TLS"),
        (&["nbd://h", "tls=off", "tls-psk=/p"], "tls-psk= configures TLS"),
        (&["nbd://h", "allow-dir=/a"], "allow-dir= is for local files"),
        (&["nbd://h", "degraded=cid"], "degraded= is for local files"),
        (&["nbd://h", "force=yes"], "force= is for local files"),
        (&["nbd://h", "format=raw"], "format= is for local files"),
        (&["nbd://h", "create=1"], "create= is for local files"),
        (&["nbd://h", "kernel-view=required"], "kernel-view= is for local files"),
        (&["nbd://h", "kernel-view=off"], "kernel-view= is for local files"),
        (&["nbd://h", "view-size=1M"], "view-size= is for local files"),
        (&["nbd://h", "view-dir=/v"], "view-dir= is for local files"),
        // A common key must fit one of the disks.
        (&["lock=off", "nbd://h"], "lock= is for local files"),
        (&["kernel-view=auto", "nbd://h"], "kernel-view= is for local files"),
        (&["nbd://h", "backend=native"], "backend=native reads files"),
        (&["/x", "backend=nbd"], "backend=nbd needs a server"),
        (&["/x", "socket=/s"], "socket= is for NBD servers"),
        (&["/x", "tls=on"], "tls= is for NBD servers"),
        (&["/x", "export=a"], "export= is for NBD servers"),
        (&["nbd://h", "create-size=1M"], "create-size= is for local files"),
        (
            &["create-hwversion=4", "nbd://h"],
            "create-hwversion= is for local files",
        ),
        (&["uri=http://h"], "the scheme http: is not supported"),
        (&["uri=nbd:h:10809"], "needs two slashes"),
        (&["uri=h:10809"], "must start with nbd://"),
        (&["ssh://h/x"], "the scheme ssh: is not supported"),
        (&["nbd+ssh://h/x"], "ssh -L"),
        (&["file=nbd:h:10809"], "needs two slashes"),
        (&["nbd://h?tls-psk-file=/k", "tls=off"], "tls-psk= configures TLS"),
        (&["uri="], "a value is missing"),
        (&["socket-fd=2"], "must be a number from 3 to"),
        (&["nbd://h", "connections=0"], "must be a number from 1 to 16"),
        (&["nbd://h", "timeout=0"], "must be a number from 1 to 1800"),
        (&["hostname=a b"], "must be a host name or an address alone"),
        (&["nbd://h", "tls=maybe"], "must be off or on or require"),
    ] {
        let error = parse(words).unwrap_err();
        assert!(error.contains(message), "{words:?}: {error}");
    }
}

#[test]
fn timeout_and_retry_are_accepted_for_every_source() {
    for words in [
        &["timeout=3", "/x", "nbd://h"][..],
        &["/x", "timeout=3", "retry=2", "nbd://h"],
    ] {
        assert!(parse(words).is_ok(), "{words:?}");
    }
}

#[test]
fn the_file_of_an_export_has_its_name() {
    for (words, name) in [
        (&["nbd://h"][..], "disk.raw"),
        (&["nbd://h/vm1"], "vm1.raw"),
        (&["nbd+unix:///a%2Fb?socket=/s/x"], "a%2Fb.raw"),
        (&["nbd+unix:///?socket=/s/x"], "disk.raw"),
        (&["nbd://h/a", "export=../b"], "..%2Fb.raw"),
        (&["hostname=h", "export=v"], "v.raw"),
        (&["hostname=h", "name=n"], "n"),
    ] {
        assert_eq!(parse(words).unwrap()[0].name, name, "{words:?}");
    }
}

#[test]
fn two_servers_are_two_disks_and_labels_hide_secrets() {
    let disks = parse(&["timeout=9", "nbd://a/x", "retry=1", "nbd://b/y"]).unwrap();
    assert_eq!(disks.len(), 2);
    let label = server(&["nbd://user:hunter2@h/x"]).unwrap().label();
    assert_eq!(label, "nbd://user@h/x");
}

#[test]
fn names_in_a_mount_are_unique_and_valid() {
    assert!(check_names(&parse(&["/a/x.vmdk", "/b/y.vmdk"]).unwrap()).is_ok());
    let error = check_names(&parse(&["/a/x.vmdk", "/b/x.img"]).unwrap())
        .unwrap_err()
        .to_string();
    assert_eq!(
        error,
        "/a/x.vmdk and /b/x.img would both have the file name x.raw: use name= for one of them"
    );
    assert!(check_names(&parse(&["/a/x.vmdk", "/b/x.img", "name=z"]).unwrap()).is_ok());
    let long = format!("/{}", "x".repeat(255));
    let error = check_names(&parse(&[&long]).unwrap()).unwrap_err().to_string();
    assert!(error.contains("255 bytes; use name="), "{error}");
}

#[test]
fn paths_need_not_be_utf8() {
    let mut word = OsString::from("file=");
    word.push(OsStr::from_bytes(b"/\xff.vmdk"));
    for word in [word, OsStr::from_bytes(b"/\xff.vmdk").to_owned()] {
        let disk = configs(
            resolve(DiskArgs::of_words(Vec::new(), &[word]).unwrap(), Subcommand::Query).unwrap(),
            None,
            Subcommand::Query,
        )
        .unwrap()
        .remove(0);
        assert_eq!(disk.name, OsStr::from_bytes(b"\xff.raw"));
        assert_eq!(local(&disk).path.as_os_str(), OsStr::from_bytes(b"/\xff.vmdk"));
    }
}

#[test]
fn the_searched_folder_is_found_once_for_all_matches_of_a_pattern() {
    let dir = tempfile::tempdir().unwrap();
    for name in ["a.vmdk", "b.vmdk"] {
        fs::write(dir.path().join(name), "").unwrap();
    }
    let pattern = dir.path().join("*.vmdk");
    let subcommand = Subcommand::Mount { read_only: false };
    let args = DiskArgs::of_words(Vec::new(), &[pattern.clone().into()]).unwrap();
    let resolved = resolve(args, subcommand).unwrap();
    // After the search, a file of the pattern's own name appears: the path is no pattern any more.
    fs::write(pattern, "").unwrap();
    let disks = configs(resolved, None, subcommand).unwrap();
    assert_eq!(disks.len(), 2);
    for disk in &disks {
        assert_eq!(local(disk).found_in.as_deref(), Some(dir.path()));
    }
}
