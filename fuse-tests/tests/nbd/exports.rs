//! Discovery of exports: `--list`, `--info`, and mounts of every export as a file.

use std::fs;

use fuse_tests::harness::{Cmd, Scratch, need, program, read_range};

use crate::{Server, ready};

#[test]
fn every_export_is_a_file_and_no_name_escapes_the_mount_point() {
    if !ready() {
        return;
    }
    let scratch = Scratch::new();
    let list = "list_exports=echo NAMES; echo ../../etc/passwd; echo a/b; echo a%2Fb; echo vm1; echo vm1.raw; echo ..";
    let words = [
        "eval",
        list,
        "open=echo \"$3\"",
        "get_size=echo 1048576",
        "pread=printf %s \"$2\" | dd bs=$3 count=1 conv=sync status=none",
    ];
    let server = Server::nbdkit(&scratch, &words);
    let mount = scratch.mount().arg(server.uri()).arg("dynamic-export=true").start();
    let names = [
        "..%2F..%2Fetc%2Fpasswd.raw",
        "...raw",
        "a%252Fb.raw",
        "a%2Fb.raw",
        "vm1.raw",
        "vm1~2.raw",
    ];
    assert_eq!(mount.names(), names);
    for (name, export) in [
        ("a%2Fb.raw", "a/b"),
        ("vm1.raw", "vm1"),
        ("vm1~2.raw", "vm1.raw"),
        ("...raw", ".."),
    ] {
        assert_eq!(fs::metadata(mount.file(name)).unwrap().len(), 1 << 20);
        let read = read_range(&mount.file(name), 0, export.len());
        assert_eq!(String::from_utf8_lossy(&read), export, "{name}");
    }
    let listed = scratch
        .vmdkfuse()
        .args(["--list", "--json"])
        .arg(server.uri())
        .run()
        .ok()
        .json();
    let exports: Vec<_> = listed[0]["exports"]
        .as_array()
        .unwrap()
        .iter()
        .map(|e| e["export"].clone())
        .collect();
    assert_eq!(exports, ["../../etc/passwd", "a/b", "a%2Fb", "vm1", "vm1.raw", ".."]);
    assert_eq!(listed[0]["exports"][3]["size"], 1 << 20);
}

#[test]
fn info_reports_the_same_as_nbdinfo() {
    if !ready() || !need("nbdinfo") {
        return;
    }
    let scratch = Scratch::new();
    let sizes = [
        "blocksize-minimum=4096",
        "blocksize-preferred=64K",
        "blocksize-maximum=1M",
    ];
    let server = Server::nbdkit(
        &scratch,
        &[&["--filter=blocksize-policy", "memory", "5M"][..], &sizes].concat(),
    );
    let ours = scratch
        .vmdkfuse()
        .args(["--info", "--json"])
        .arg(server.uri())
        .run()
        .ok()
        .json();
    let theirs = Cmd::new("nbdinfo").arg("--json").arg(server.uri()).run().ok().json();
    let (export, expected) = (&ours[0]["exports"][0], &theirs["exports"][0]);
    assert_eq!(export["size"], expected["export-size"]);
    assert_eq!(export["contexts"], expected["contexts"]);
    let sizes = ["block_size_minimum", "block_size_preferred", "block_size_maximum"].map(|k| expected[k].clone());
    assert_eq!(export["block_sizes"], serde_json::Value::from(sizes.to_vec()));
    for flag in export["flags"].as_array().unwrap() {
        assert_eq!(flag[1], expected[flag[0].as_str().unwrap()], "{flag}");
    }
    assert_eq!(ours[0]["protocol"], theirs["protocol"]);
    let text = scratch.vmdkfuse().arg("--info").arg(server.uri()).run().ok().stdout;
    assert!(
        text.contains("size             5242880 bytes") && text.contains("can_multi_conn   yes"),
        "{text}"
    );
}

#[test]
fn info_describes_an_overlay_over_an_export() {
    if !ready() {
        return;
    }
    let scratch = Scratch::new();
    let server = Server::nbdkit(&scratch, &["pattern", "5M"]);
    let cow = format!("cow={}", scratch.path("cow.vmdk").display());
    let info = || {
        scratch
            .vmdkfuse()
            .args(["--info", "--json"])
            .arg(server.uri())
            .arg(&cow)
            .run()
    };
    assert_eq!(info().ended.code, Some(1), "the overlay does not exist yet");
    scratch.mount().arg(server.uri()).arg(&cow).start().unmount();
    let described = info().ok().json();
    assert_eq!(described[0]["size"], 5 << 20, "{described}");
    assert!(described[0]["overlay"].is_object(), "{described}");
}

#[test]
fn the_one_export_of_an_oldest_style_server_is_listed() {
    if !ready() {
        return;
    }
    let scratch = Scratch::new();
    let server = Server::nbdkit(&scratch, &["--oldstyle", "pattern", "1M"]);
    let list = Cmd::new(program()).arg("--list").arg(server.uri()).run().ok();
    assert!(list.stdout.contains("1048576"), "{}", list.stdout);
    let mount = scratch.mount().arg(server.uri()).arg("dynamic-export=true").start();
    assert_eq!(mount.names(), ["disk.raw"]);
    mount.unmount();
}

#[test]
fn an_export_that_ends_within_a_block_causes_a_warning() {
    if !ready() {
        return;
    }
    let scratch = Scratch::new();
    let blocks = [
        "--filter=blocksize-policy",
        "memory",
        "1049088",
        "blocksize-minimum=4096",
    ];
    let server = Server::nbdkit(&scratch, &blocks);
    let log = scratch.path("log");
    let mount = scratch
        .mount()
        .arg(server.uri())
        .arg(format!("--log-file={}", log.display()))
        .start();
    mount.unmount();
    let log = fs::read_to_string(log).unwrap();
    assert!(log.contains("no multiple of its block size"), "{log}");
}
