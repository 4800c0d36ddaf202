//! "What a file is, its name or `format=` decides … Content can only make us refuse."

use std::fs;
use std::path::Path;

use fuse_tests::harness::{Scratch, need, need_fuse, need_qemu, qemu_img};

/// Sectors of the disks here.
const SECTORS: usize = 64;

/// Bytes that no signature matches.
fn plain() -> Vec<u8> {
    (0..SECTORS * 512).map(|i| (i / 512) as u8 | 1).collect()
}

/// A descriptor that names another file of the same folder.
fn descriptor() -> Vec<u8> {
    let text =
        "# Disk DescriptorFile\nversion=1\nCID=1\nparentCID=ffffffff\ncreateType=\"custom\"\nRW 64 FLAT \"other\"\n";
    text.as_bytes().to_vec()
}

/// `plain` with `signature` at `at`.
fn with(signature: &[u8], at: usize) -> Vec<u8> {
    let mut bytes = plain();
    bytes[at..at + signature.len()].copy_from_slice(signature);
    bytes
}

/// Returns the description of a file with `format=raw`.
fn info_as_raw(scratch: &Scratch, path: &Path) -> serde_json::Value {
    let info = scratch.vmdkfuse().args(["--info", "--json", "format=raw"]);
    info.key("file", path).run().ok().json()
}

#[test]
fn a_name_promises_a_raw_disk() {
    let scratch = Scratch::new();
    for name in [
        "a.raw",
        "a.img",
        "a.dd",
        "a.bin",
        "a.iso",
        "a.IMG",
        "a",
        ".hidden",
        "vm.2024.img",
    ] {
        scratch.write(name, plain());
        let info = scratch
            .vmdkfuse()
            .args(["--info", "--json"])
            .key("file", scratch.path(name))
            .run()
            .ok();
        assert_eq!(info.json()[0]["format"], "raw", "{name}");
    }
}

#[test]
fn a_suffix_that_promises_nothing_is_refused_unless_the_format_is_given() {
    let scratch = Scratch::new();
    for name in ["a.bak", "a.txt", "a.vhd", "a.qcow2", "a.2024", "a.vmdx", "a.img~"] {
        scratch.write(name, plain());
        let path = scratch.path(name);
        let refused = scratch.vmdkfuse().arg("--info").key("file", &path).run();
        refused.one_error(1, &[name, "say format=vmdk or format=raw"]);
        assert_eq!(info_as_raw(&scratch, &path)[0]["size"], SECTORS * 512, "{name}");
    }
}

#[test]
fn regression_a_guest_cannot_turn_its_raw_disk_into_a_vmdk() {
    let scratch = Scratch::new();
    scratch.write("other", plain());
    let envelope = {
        let mut header = b"KDMV\x01\0\0\0".to_vec();
        header.resize(512, 0);
        [header, descriptor()].concat()
    };
    for (name, bytes) in [
        ("text.img", descriptor()),
        ("envelope.raw", envelope),
        ("guest", descriptor()),
    ] {
        scratch.write(name, bytes);
        let path = scratch.path(name);
        for action in ["--info", "--map", "--check"] {
            let refused = scratch.vmdkfuse().arg(action).key("file", &path).run();
            refused.one_error(1, &[name, "holds a VMDK", "format=vmdk", "format=raw"]);
        }
        assert_eq!(info_as_raw(&scratch, &path)[0]["format"], "raw");
    }
}

#[test]
fn regression_containers_and_other_formats_are_never_disks() {
    let cases: &[(&str, Vec<u8>, &str)] = &[
        ("a.vmdk.gz", with(b"\x1f\x8b\x08", 0), "gunzip -k"),
        ("b.img", with(b"\x1f\x8b\x08", 0), "gunzip -k"),
        ("c.vmdk", with(b"\xfd7zXZ\0", 0), "unxz -k"),
        ("d.vmdk.zst", with(b"\x28\xb5\x2f\xfd", 0), "unzstd"),
        ("e.raw.bz2", with(b"BZh91AY&SY", 0), "bunzip2 -k"),
        ("f.vmdk", with(b"PK\x03\x04", 0), "unzip"),
        ("g.7z", with(b"7z\xbc\xaf\x27\x1c", 0), "7z x"),
        ("i.vmdk", with(b"ustar", 257), "tar xf"),
        ("j.qcow2", with(b"QFI\xfb", 0), "command=qemu-nbd"),
        ("k.img", with(b"QFI\xfb", 0), "command=qemu-nbd"),
        ("l.vdi", with(b"\x7f\x10\xda\xbe", 0x40), "command=qemu-nbd"),
        ("m.vhd", with(b"conectix", SECTORS * 512 - 512), "command=qemu-nbd"),
        ("n.vhdx", with(b"vhdxfile", 0), "command=qemu-nbd"),
        ("o.E01", with(b"EVF\x09\x0d\x0a\xff\0", 0), "ewfmount"),
        ("p.aff", with(b"AFF10\x0d\x0a\0", 0), "AFF"),
        (
            "q.vmx",
            b".encoding = \"UTF-8\"\nconfig.version = \"8\"\n".to_vec(),
            "VMX",
        ),
        ("r.ovf", b"<?xml version=\"1.0\"?>\n<Envelope/>\n".to_vec(), "OVF"),
        ("s.vmdk", b"<!DOCTYPE html>\n<html>login</html>".to_vec(), "web page"),
        ("t.vmdk.001", plain(), "cat"),
        ("u.img.aa", plain(), "cat"),
    ];
    let scratch = Scratch::new();
    for (name, bytes, way_on) in cases {
        let path = scratch.write(name, bytes);
        for action in ["--info", "--check"] {
            scratch
                .vmdkfuse()
                .arg(action)
                .key("file", &path)
                .run()
                .one_error(1, &[name, way_on]);
        }
        assert_eq!(&fs::read(&path).unwrap(), bytes, "{name} was changed");
    }
}

#[test]
fn a_name_that_promises_a_vmdk_is_held_to_it() {
    let scratch = Scratch::new();
    for (name, words) in [
        (
            "a.vmdk",
            ["expected the header or the descriptor of a VMDK", "format=raw"],
        ),
        ("b-flat.vmdk", ["name b.vmdk", "format=raw"]),
        ("c-rdm.vmdk", ["name c.vmdk", "format=raw"]),
    ] {
        let path = scratch.write(name, plain());
        let refused = scratch.vmdkfuse().arg("--info").key("file", &path).run();
        refused.one_error(1, &[name, words[0], words[1]]);
        assert_eq!(info_as_raw(&scratch, &path)[0]["format"], "raw", "{name}");
    }
    let other = scratch.write("other", plain());
    let text = scratch.write("d.vmdk.bak", descriptor());
    let info = scratch
        .vmdkfuse()
        .args(["--info", "--json"])
        .key("file", &text)
        .run()
        .ok();
    assert_eq!(info.json()[0]["format"], "vmdk");
    drop(other);
}

#[test]
fn images_of_qemu_in_other_formats_are_refused_with_the_command_that_serves_them() {
    if !need_qemu() || !need("qemu-nbd") || !need_fuse() {
        return;
    }
    let scratch = Scratch::new();
    for (format, name) in [
        ("qcow2", "x.qcow2"),
        ("vdi", "x.vdi"),
        ("vhdx", "x.vhdx"),
        ("vpc", "x.vhd"),
        ("qed", "x.qed"),
    ] {
        let path = scratch.path(name);
        qemu_img(["create", "-q", "-f", format, path.to_str().unwrap(), "4M"]).ok();
        scratch
            .vmdkfuse()
            .arg("--info")
            .key("file", &path)
            .run()
            .one_error(1, &[name, "qemu-nbd", format]);
    }
    // The command of the message works as it stands there.
    let path = scratch.path("x.qcow2");
    let served = scratch
        .vmdkfuse()
        .args(["--info", "--json", "command=qemu-nbd", "arg=-f", "arg=qcow2"])
        .arg(format!("arg={}", path.display()))
        .run()
        .ok();
    assert!(served.stdout.contains("4194304"), "{served:?}");
}
