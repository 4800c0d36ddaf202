//! Descriptors as people and small tools write them: "An error is only what decides bytes".

use std::fs;
use std::path::Path;
use std::process::Command;

use fuse_tests::harness::{Scratch, assert_same, need, need_fuse};
use fuse_tests::make::Layer;
use fuse_tests::make::write::{self, Descriptor, Hosted};

/// Sectors of the disks here.
const SECTORS: u64 = 8192;
const HEAD: &str = "# Disk DescriptorFile\nversion=1\nCID=fffffffe\nparentCID=ffffffff\n";
const TYPE: &str = "createType=\"monolithicFlat\"\n";
const LINE: &str = "RW 8192 FLAT \"image.img\" 0\n";

/// Returns the disk of the tests.
fn disk() -> Layer {
    Layer::new(7, "disk", SECTORS, 128).fill((0..64).step_by(2))
}

/// Writes the disk as `image.img`.
fn image(scratch: &Scratch) {
    write::flat(&scratch.path("image.img"), &disk(), 0).unwrap();
}

/// Mounts a descriptor and compares the disk with `image.img`. Returns the messages of `--info`.
#[track_caller]
fn shows_image(scratch: &Scratch, name: &str, text: impl AsRef<[u8]>) -> String {
    let path = scratch.write(format!("{name}.vmdk"), text);
    let said = scratch.vmdkfuse().arg("--info").key("file", &path).run().ok().stdout;
    let mount = scratch.mount().arg("-r").file(path).start();
    assert_same(&mount.file(format!("{name}.raw")), &scratch.path("image.img"));
    mount.unmount();
    said
}

#[test]
fn labels_and_stray_lines_do_not_keep_a_disk_from_being_read() {
    if !need_fuse() {
        return;
    }
    let scratch = Scratch::new();
    image(&scratch);
    let head = |old: &str, new: &str| format!("{}{TYPE}{LINE}", HEAD.replace(old, new));
    for (name, text, warning) in [
        ("version", head("version=1", "version=4"), "version 4"),
        ("no-version", head("version=1\n", ""), "no version"),
        ("cid-prefix", head("CID=fffffffe", "CID=0xfffffffe"), "0xfffffffe"),
        ("cid-decimal", head("CID=fffffffe", "CID=3204984721"), "3204984721"),
        ("cid-opaque", head("CID=fffffffe", "CID=opaque"), "opaque"),
        (
            "cid-twice",
            format!("{HEAD}CID=12345678\n{TYPE}{LINE}"),
            "contradicts line 3",
        ),
        ("no-type", format!("{HEAD}{LINE}"), "no createType"),
        (
            "type",
            format!("{HEAD}createType=\"twoGbMaxExtentThin\"\n{LINE}"),
            "twoGbMaxExtentThin",
        ),
        (
            "stray",
            format!("{HEAD}{TYPE}{LINE}\nSnapshot of 2019-03-01\n"),
            "line 8",
        ),
        ("encoding", format!("{HEAD}encoding=\"IBM437\"\n{TYPE}{LINE}"), "IBM437"),
        (
            "no-prefix",
            format!("{HEAD}{TYPE}{LINE}geometry.heads = \"16\"\n"),
            "ddb.geometry.heads",
        ),
        ("no-quotes", format!("{HEAD}{TYPE}{}", LINE.replace('"', "")), "quotes"),
        ("single", format!("{HEAD}{TYPE}{}", LINE.replace('"', "'")), "quotes"),
        (
            "curly",
            format!("{HEAD}{TYPE}{}", LINE.replace('"', "\u{201d}")),
            "quotes",
        ),
    ] {
        let said = shows_image(&scratch, name, text);
        assert!(said.contains(warning), "{name}: {said}");
    }
    for (name, text) in [
        ("section", format!("[disk]\n{HEAD}{TYPE}{LINE}")),
        ("semicolon", format!("{HEAD}; RW 1 ZERO\n{TYPE}{LINE}")),
        ("cr", format!("{HEAD}{TYPE}{LINE}").replace('\n', "\r")),
        ("nbsp", format!("{HEAD}{TYPE}{}", LINE.replace("FLAT ", "FLAT\u{a0}"))),
    ] {
        shows_image(&scratch, name, text);
    }
    let utf16: Vec<u8> = format!("\u{feff}{HEAD}{TYPE}{LINE}")
        .encode_utf16()
        .flat_map(u16::to_le_bytes)
        .collect();
    assert!(shows_image(&scratch, "utf16", utf16).contains("UTF-16"));
}

#[test]
fn an_unknown_cid_stays_and_a_known_one_changes_when_the_disk_is_written() {
    if !need_fuse() {
        return;
    }
    let scratch = Scratch::new();
    image(&scratch);
    for (name, before) in [
        ("opaque", "CID=opaque"),
        ("decimal", "CID=3204984721"),
        ("prefix", "CID=0xfffffff0"),
    ] {
        let text = format!("{}{TYPE}{LINE}", HEAD.replace("CID=fffffffe", before));
        let path = scratch.write(format!("{name}.vmdk"), &text);
        let mount = scratch.mount().file(&path).start();
        let raw = fs::OpenOptions::new()
            .write(true)
            .open(mount.file(format!("{name}.raw")))
            .unwrap();
        std::os::unix::fs::FileExt::write_all_at(&raw, &[7; 512], 0).unwrap();
        drop(raw);
        mount.unmount();
        let after = fs::read_to_string(&path).unwrap();
        assert_eq!(after.len(), text.len(), "{name}");
        assert_eq!(after == text, name == "opaque", "{after}");
        assert!(after.starts_with("# Disk DescriptorFile\nversion=1\nCID="), "{after}");
        // Read again: the new digits are a CID.
        scratch.vmdkfuse().arg("--check").key("file", &path).run().ok();
    }
}

#[test]
fn a_foreign_file_is_no_corrupt_disk() {
    let scratch = Scratch::new();
    for (name, bytes) in [
        ("x.vmdk", &b"\x81\x17 ciphertext"[..]),
        ("x-flat.vmdk", &[7; 1024]),
        ("x-ctk.vmdk", &[9; 1024]),
    ] {
        let path = scratch.write(name, bytes);
        scratch
            .vmdkfuse()
            .arg("--check")
            .key("file", path)
            .run()
            .one_error(1, &[name]);
    }
    let unknown = scratch.write("u.vmdk", format!("{HEAD}{TYPE}RW 8 QCOW \"x\"\n"));
    scratch
        .vmdkfuse()
        .arg("--check")
        .key("file", unknown)
        .run()
        .one_error(1, &["QCOW"]);
    for (name, bytes) in [("empty.vmdk", vec![]), ("zero.vmdk", vec![0; 512])] {
        let path = scratch.write(name, bytes);
        scratch.vmdkfuse().arg("--check").key("file", path).run().expect_code(4);
    }
    let damaged = scratch.write("d.vmdk", format!("{HEAD}{TYPE}RW x FLAT \"x\"\n"));
    scratch
        .vmdkfuse()
        .arg("--check")
        .key("file", damaged)
        .run()
        .expect_code(4);
}

#[test]
fn a_copied_rdm_file_is_a_disk_and_a_pointer_is_refused() {
    if !need_fuse() {
        return;
    }
    let scratch = Scratch::new();
    image(&scratch);
    let text = |name: &str, kind: &str| format!("{HEAD}createType=\"vmfsRawDeviceMap\"\nRW 8192 {kind} \"{name}\"\n");
    for kind in ["VMFSRDM", "VMFSRAW"] {
        shows_image(&scratch, kind, text("image.img", kind));
    }
    scratch.write("stub", "");
    fs::File::create(scratch.path("holes"))
        .unwrap()
        .set_len(SECTORS * 512)
        .unwrap();
    for name in ["stub", "holes", "missing"] {
        let path = scratch.write("pointer.vmdk", text(name, "VMFSRDM"));
        let refused = scratch.vmdkfuse().arg("--info").key("file", path).run();
        refused.one_error(1, &["RDM", "LUN"]);
    }
}

#[test]
fn devices_of_other_systems_get_a_sentence() {
    let scratch = Scratch::new();
    for (name, words) in [
        (r"\\.\PhysicalDrive3", "Windows device"),
        (r"\\.\Harddisk0Partition6", "Windows device"),
        (r"\\?\Volume{1}", "Windows device"),
        ("/dev/disk0s4", "macOS device"),
        ("vsan://0bd7", "vSAN"),
        ("vvol://vmware/00", "VVol"),
    ] {
        let path = scratch.write("x.vmdk", format!("{HEAD}{TYPE}RW 8192 FLAT \"{name}\"\n"));
        let refused = scratch.vmdkfuse().arg("--info").key("file", path).run();
        refused.one_error(1, &["line 6", words, "beside the descriptor"]);
    }
}

/// Runs the command of a message in the folder of the test, with `fill` replaced in it.
fn run_advice(scratch: &Scratch, message: &str, fill: &[(&str, &str)]) {
    let mut command = message[message.find("printf").unwrap()..].trim().to_owned();
    for (old, new) in fill {
        command = command.replace(old, new);
    }
    let status = Command::new("sh")
        .arg("-c")
        .arg(&command)
        .current_dir(scratch.root())
        .status()
        .unwrap();
    assert!(status.success(), "{command}");
}

#[test]
fn an_extent_named_by_mistake_says_which_descriptor_to_write() {
    if !need("sh") || !need_fuse() {
        return;
    }
    let scratch = Scratch::new();
    image(&scratch);
    let layer = disk();
    let refused = |path: &Path| {
        scratch
            .vmdkfuse()
            .arg("--info")
            .key("file", path)
            .run()
            .expect_code(1)
            .stderr
    };
    let shows = |name: &str| {
        let mount = scratch
            .mount()
            .arg("-r")
            .file(scratch.path(format!("{name}.vmdk")))
            .start();
        assert_same(&mount.file(format!("{name}.raw")), &scratch.path("image.img"));
        mount.unmount();
    };
    write::flat(&scratch.path("it's-flat.vmdk"), &layer, 0).unwrap();
    run_advice(&scratch, &refused(&scratch.path("it's-flat.vmdk")), &[]);
    shows("it's");
    let again = refused(&scratch.path("it's-flat.vmdk"));
    assert!(
        again.contains("it'\\''s-new.vmdk"),
        "a descriptor that exists is not replaced: {again}"
    );
    write::hosted(&scratch.path("xp-s001.vmdk"), &layer, None, &Hosted::default()).unwrap();
    run_advice(&scratch, &refused(&scratch.path("xp-s001.vmdk")), &[]);
    shows("xp");
    // A delta needs its parent.
    let base = Descriptor::new("vmfs", ["RW 8192 VMFS \"image.img\"".to_owned()])
        .bytes()
        .unwrap();
    scratch.write("base.vmdk", base);
    write::cowd(
        &scratch.path("vm-000001-delta.vmdk"),
        &Layer::new(8, "delta", SECTORS, 1),
    )
    .unwrap();
    let cid = scratch
        .vmdkfuse()
        .args(["--info", "--json"])
        .key("file", scratch.path("base.vmdk"))
        .run()
        .ok();
    let cid = cid.json()[0]["chain"][0]["cid"].as_str().unwrap().to_owned();
    let message = refused(&scratch.path("vm-000001-delta.vmdk"));
    run_advice(
        &scratch,
        &message,
        &[("CID-OF-THE-PARENT", &cid), ("PARENT.vmdk", "base.vmdk")],
    );
    shows("vm-000001");
}

#[test]
fn a_file_that_is_missing_or_short_says_how_to_get_on() {
    let scratch = Scratch::new();
    image(&scratch);
    let line = |line: &str| scratch.write("x.vmdk", format!("{HEAD}{TYPE}{line}\n"));
    let info = |path: &Path| scratch.vmdkfuse().arg("--info").key("file", path).run();
    info(&line("RW 8192 FLAT \"gone.img\" 0")).one_error(1, &["gone.img", "copy gone.img beside the descriptor"]);
    info(&line("RW 81920 FLAT \"image.img\" 0")).one_error(1, &["4194304", "41943040", "write 8192 instead of 81920"]);
}
