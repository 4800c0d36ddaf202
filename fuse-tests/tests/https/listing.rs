//! `--list` of servers and folders, and patterns in datastores.

use std::fs;
use std::io::Write;
use std::path::Path;

use fuse_tests::harness::{
    Cmd, MountCmd, Outcome, Scratch, assert_same, need_fuse, need_qemu, qemu_img, raw_with_islands,
};

use crate::server::{Fake, Server, USER, need_nginx, need_vsim, password_file};

const MIB: u64 = 1 << 20;

fn list(scratch: &Scratch, words: &[String]) -> Outcome {
    scratch.vmdkfuse().arg("--list").args(words).run()
}

fn json(outcome: Outcome) -> serde_json::Value {
    serde_json::from_str(&outcome.ok().stdout).unwrap()
}

#[test]
fn a_server_lists_its_datacenters_and_datastores() {
    if !need_vsim() {
        return;
    }
    for (words, datacenter) in [
        (&["-name", "My DS+(1)"][..], "DC0"),
        (&["-name", "My DS+(1)", "-double"], "DC0"),
        (&["-name", "My DS+(1)", "-esx"], "ha-datacenter"),
    ] {
        let scratch = Scratch::new();
        let server = Server::vsim(&scratch, &scratch.mkdir("ds"), words);
        let login = server.login(&scratch);
        let text = list(&scratch, &login).ok().stdout;
        assert_eq!(
            text,
            format!(
                "https://127.0.0.1:{}/folder/:\n  datacenter={datacenter}\n    [My DS+(1)]\n",
                server.port
            )
        );
        let one = [
            login.as_slice(),
            &[format!("datacenter={datacenter}"), "--json".to_owned()],
        ]
        .concat();
        let listed = json(list(&scratch, &one));
        let expected = serde_json::json!([{ "name": datacenter, "datastores": ["My DS+(1)"] }]);
        assert_eq!(listed[0]["datacenters"], expected);
        let (logins, logouts) = (server.count(&["auth=true"]), server.count(&["LOGOUT ended=true"]));
        assert_eq!((logins, logouts), (2, 2), "{:#?}", server.log());
        let wrong = [login.as_slice(), &["datacenter=none".to_owned()]].concat();
        list(&scratch, &wrong).one_error(1, &["check that datacenter="]);
    }
}

#[test]
fn a_folder_of_a_datastore_is_listed() {
    if !need_vsim() {
        return;
    }
    for words in [&[][..], &["-esx"]] {
        let scratch = Scratch::new();
        let dir = scratch.mkdir("ds/vm a+b [1] ü");
        for name in ["x y.vmdk", "x+y-flat.vmdk", "a&b#c?d%41.vmdk", "new\nline", "<i>.img"] {
            fs::write(dir.join(name), "x").unwrap();
        }
        scratch.mkdir("ds/vm a+b [1] ü/sub");
        let server = Server::vsim(&scratch, &scratch.path("ds"), words);
        let mut login = server.login(&scratch);
        if words.is_empty() {
            login.push("datacenter=DC0".to_owned());
        }
        let folder = |text: &str| [login.as_slice(), &[format!("file={text}")]].concat();
        let expected = "[LocalDS_0] vm a+b [1] ü:\n  <i>.img\n  a&b#c?d%41.vmdk\n  new\\nline\n  sub/\n  x y.vmdk\n  \
                        x+y-flat.vmdk\n";
        for text in ["[LocalDS_0] vm a+b [1] ü/", "[LocalDS_0] vm a+b [1] ü"] {
            assert_eq!(list(&scratch, &folder(text)).ok().stdout, expected, "{words:?}");
        }
        let root = list(&scratch, &folder("[LocalDS_0]")).ok();
        assert!(root.stdout.contains("\n  vm a+b [1] ü/\n"), "{root}");
        let listed = json(list(
            &scratch,
            &[folder("[LocalDS_0] vm a+b [1] ü").as_slice(), &["--json".to_owned()]].concat(),
        ));
        assert_eq!(listed[0]["names"][2]["name"], "new\nline");
        assert_eq!(
            listed[0]["names"][3],
            serde_json::json!({ "name": "sub", "folder": true })
        );
        let file = list(&scratch, &folder("[LocalDS_0] vm a+b [1] ü/x y.vmdk"));
        file.one_error(1, &["[LocalDS_0] vm a+b [1] ü/x y.vmdk"]);
        list(&scratch, &folder("[LocalDS_0] none/")).one_error(1, &["[LocalDS_0] none", "no such file"]);
        let url = server.url(&format!(
            "folder/vm%20a+b%20[1]%20%C3%BC/?dcPath={}&dsName=LocalDS_0",
            if words.is_empty() { "DC0" } else { "ha-datacenter" }
        ));
        let words = [url, server.pin(), format!("user={USER}"), password_file(&scratch)];
        assert_eq!(list(&scratch, &words).ok().stdout.lines().count(), 7);
    }
}

#[test]
fn a_folder_of_any_web_server_is_listed_if_the_server_lists_it() {
    if !need_nginx() {
        return;
    }
    let scratch = Scratch::new();
    let dir = scratch.mkdir("www/disks");
    for n in 0..3000 {
        fs::write(dir.join(format!("d {n:04}.img")), "").unwrap();
    }
    let server = Server::nginx(&scratch, &scratch.path("www"), "location /disks/ { autoindex on; }");
    let listed = list(&scratch, &[server.url("disks/"), server.pin()]).ok();
    assert_eq!(listed.stdout.lines().count(), 3001);
    assert!(listed.stdout.ends_with("\n  d 2999.img\n"), "{listed}");
    list(&scratch, &[server.url(""), server.pin()]).one_error(1, &["403"]);
}

/// Creates a disk of three files, and its raw content beside them: `NAME.raw` in the scratch folder.
fn split_disk(scratch: &Scratch, dir: &Path, name: &str, seed: u64) {
    let raw = scratch.path(format!("{name}.raw"));
    raw_with_islands(&raw, 8 * MIB, seed);
    for (kind, suffix) in [("monolithicFlat", ""), ("twoGbMaxExtentSparse", " split")] {
        let disk = dir.join(format!("{name}{suffix}.vmdk"));
        let option = format!("subformat={kind}");
        let words = [
            "convert",
            "-O",
            "vmdk",
            "-o",
            &option,
            raw.to_str().unwrap(),
            disk.to_str().unwrap(),
        ];
        qemu_img(words);
    }
}

fn mount<'s>(scratch: &'s Scratch, login: &[String], words: &[&str]) -> MountCmd<'s> {
    let all = login.iter().map(String::as_str).chain(words.iter().copied());
    all.fold(scratch.mount(), |mount, word| mount.arg(word))
}

#[test]
fn a_pattern_in_a_datastore_gives_its_disks_without_their_extents() {
    if !need_vsim() || !need_qemu() {
        return;
    }
    for (datacenter, words) in [("DC0", &[][..]), ("ha-datacenter", &["-esx"])] {
        let scratch = Scratch::new();
        let (one, two) = (scratch.mkdir("ds/vm [1]"), scratch.mkdir("ds/vm 2"));
        split_disk(&scratch, &one, "a [1]", 31);
        split_disk(&scratch, &two, "b", 32);
        fs::write(two.join("b-ctk.vmdk"), "no disk").unwrap();
        fs::write(two.join(".hidden.vmdk"), "no disk").unwrap();
        fs::write(two.join("notes.txt"), "").unwrap();
        let server = Server::vsim(&scratch, &scratch.path("ds"), words);
        let login = [server.login(&scratch).as_slice(), &[format!("datacenter={datacenter}")]].concat();
        let mounted = mount(&scratch, &login, &["file=[LocalDS_0] vm*/*.vmdk"]).start();
        assert_eq!(
            mounted.names(),
            ["a [1] split.raw", "a [1].raw", "b split.raw", "b.raw"]
        );
        for (name, raw) in [
            ("a [1].raw", "a [1].raw"),
            ("a [1] split.raw", "a [1].raw"),
            ("b split.raw", "b.raw"),
        ] {
            assert_same(&mounted.file(name), &scratch.path(raw));
        }
        mounted.unmount();
        assert_eq!(server.count(&["auth=true"]), 1, "one login: {:#?}", server.log());
        assert_eq!(server.count(&["LOGOUT ended=true"]), 1);
        // A name with wildcards is a name first; a class alone is a pattern too.
        for (file, names) in [
            ("vm [1]/a [1].vmdk", &["a [1].raw"][..]),
            ("vm [1]/a*.vmdk", &["a [1] split.raw", "a [1].raw"]),
            ("vm [12]/[ab].vmdk", &["b.raw"]),
            ("vm 2/?.vmdk", &["b.raw"]),
        ] {
            let mounted = mount(&scratch, &login, &[&format!("file=[LocalDS_0] {file}")]).start();
            assert_eq!(mounted.names(), names, "{file}");
            mounted.unmount();
        }
        let one_name = mount(&scratch, &login, &["file=[LocalDS_0] vm 2/?.vmdk", "name=c.img"]).start();
        assert_eq!(one_name.names(), ["c.img"]);
        one_name.unmount();
        let info = Cmd::new(fuse_tests::harness::program())
            .args(["--info", "--json"])
            .args(&login);
        let info = json(info.arg("file=[LocalDS_0] vm*/* split.vmdk").run());
        assert_eq!(info.as_array().unwrap().len(), 2, "{info}");
    }
}

#[test]
fn a_pattern_that_cannot_be_mounted_is_explained() {
    if !need_vsim() {
        return;
    }
    let scratch = Scratch::new();
    for vm in ["a", "b"] {
        fs::write(scratch.mkdir(format!("ds/{vm}")).join("x-flat.vmdk"), vec![1; 4096]).unwrap();
    }
    let server = Server::vsim(&scratch, &scratch.path("ds"), &[]);
    let login = [server.login(&scratch).as_slice(), &["datacenter=DC0".to_owned()]].concat();
    let refused = |words: &[&str], expected: &[&str]| {
        mount(&scratch, &login, words).refused(1).one_error(1, expected);
    };
    refused(
        &["file=[LocalDS_0] a/*.img"],
        &["[LocalDS_0] a/*.img", "no file matches"],
    );
    refused(&["file=[LocalDS_0] none/*.vmdk"], &["no file matches", "no such file"]);
    refused(&["file=[LocalDS_0] a/[.vmdk"], &["attern"]);
    refused(
        &["file=[LocalDS_0] */*.vmdk"],
        &["both have the file name x-flat.raw", "use name="],
    );
    refused(
        &["file=[LocalDS_0] */*.vmdk", "name=x"],
        &["the name x would apply to 2 disks"],
    );
    let wrong = [&login[..4], &["password=wrong".to_owned(), login[5].clone()]].concat();
    let outcome = mount(&scratch, &wrong, &["file=[LocalDS_0] a/*.vmdk"]).refused(1);
    outcome.error_names(&["refused the login"]);
}

/// "A link counts only where it leads to a file or a folder directly in the folder that was asked for."
#[test]
fn hostile_listings_are_bounded_and_lead_nowhere_else() {
    if !need_fuse() {
        return;
    }
    let scratch = Scratch::new();
    let server = Fake::start(|ask, stream| {
        let head = "HTTP/1.1 200 OK\r\nContent-Type: text/html\r\nConnection: close\r\n\r\n<html>";
        let _ = stream.write_all(head.as_bytes());
        let page = match &*ask.path {
            "/links/" => "<a href=\"http://127.0.0.2/links/a\"><a href=\"../b\"><a href=\"..%2Fc\"><a href=\"/etc/d\">\
                          <a href=\"e%1B[31m\"><a href=\"f%0Ag\"><a href=\"h%FF\"><a href=\"i\">"
                .to_owned(),
            "/many/" => (0..100_001).map(|n| format!("<a href={n}>")).collect(),
            _ => {
                let filler = "x".repeat(1 << 20);
                while stream.write_all(filler.as_bytes()).is_ok() {}
                return;
            }
        };
        let _ = stream.write_all(page.as_bytes());
    });
    let listed = list(&scratch, &[server.url("links/")]).ok();
    let names: Vec<&str> = listed.stdout.lines().skip(1).collect();
    assert_eq!(names, ["  e\\u{1b}[31m", "  f\\ng", "  h\u{fffd}", "  i"]);
    list(&scratch, &[server.url("many/")]).one_error(1, &["more than 100000 files"]);
    list(&scratch, &[server.url("endless/")]).one_error(1, &["the listing is longer than 16 MiB"]);
}
