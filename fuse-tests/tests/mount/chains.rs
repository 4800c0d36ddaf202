//! Chains of other writers: parents that are named by a UUID, bases that are protected from any child, and sizes that
//! contradict each other.

use std::fs;
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use fuse_tests::harness::{Scratch, digest, digest_range, need_fuse};
use fuse_tests::make::write::{self, Descriptor, Hosted};
use fuse_tests::make::{Content as _, Layer};
use nix::fcntl::{FallocateFlags, fallocate};

/// Sectors of the disks here.
const SECTORS: u64 = 8192;
/// UUIDs of the base, of its content, and of another content.
const BASE: &str = "b0a1c2d3-0001-4a4a-8b8b-000000000001";
const CONTENT: &str = "b0a1c2d3-0002-4a4a-8b8b-000000000002";
const OTHER: &str = "b0a1c2d3-0003-4a4a-8b8b-000000000003";
const NIL: &str = "00000000-0000-0000-0000-000000000000";

fn base_layer() -> Layer {
    Layer::new(7, "base", SECTORS, 128).fill([0, 1, 2, 3, 10, 63])
}

/// Returns the descriptor of VirtualBox for an image, its content, its parent and the parent's content.
fn vbox(image: &str, content: &str, parent: &str, parent_content: &str) -> Vec<u8> {
    format!(
        "# Disk DescriptorFile\nversion=1\nCID=a4f3c211\nparentCID=ffffffff\ncreateType=\"monolithicSparse\"\n\
         RW {SECTORS} SPARSE \"x.vmdk\"\nddb.uuid.image=\"{image}\"\nddb.uuid.parent=\"{parent}\"\n\
         ddb.uuid.modification=\"{content}\"\nddb.uuid.parentmodification=\"{parent_content}\"\n"
    )
    .into_bytes()
}

/// Writes a base of VirtualBox and its child, whose UUID of the base's content is `expects`. Returns the child's disk.
fn snapshot(base: &Path, child: &Path, expects: &str) -> Layer {
    let layer = base_layer();
    write::hosted(base, &layer, Some(&vbox(BASE, CONTENT, NIL, NIL)), &Hosted::default()).unwrap();
    let own = Layer::new(8, "child", SECTORS, 128).over(Arc::new(layer)).fill([1, 20]);
    let text = vbox("c1d2e3f4-0003-4a4a-8b8b-000000000003", NIL, BASE, expects);
    write::hosted(child, &own, Some(&text), &Hosted::default()).unwrap();
    own
}

/// Mounts an image read-only and compares it with `disk`.
#[track_caller]
fn shows(scratch: &Scratch, image: &Path, keys: &[&str], disk: &Layer) {
    let mut command = scratch.mount().arg("-r").file(image).arg("name=disk");
    for key in keys {
        command = command.arg(key);
    }
    let mount = command.start();
    let path = mount.file("disk");
    let len = disk.sectors() * 512;
    assert_eq!(fs::metadata(&path).unwrap().len(), len);
    assert_eq!(digest_range(&path, 0, len), digest(&disk.read(0, disk.sectors())));
    mount.unmount();
}

#[test]
fn a_child_of_virtualbox_finds_its_parent_by_its_uuid() {
    if !need_fuse() {
        return;
    }
    let scratch = Scratch::new();
    scratch.mkdir("Snapshots");
    for (base, child) in [
        ("a.vmdk", "b.vmdk"),
        ("odd name", "{c1d2e3f4}.vmdk"),
        ("base.vmdk", "Snapshots/{1}.vmdk"),
    ] {
        let (base, child) = (scratch.path(base), scratch.path(child));
        let disk = snapshot(&base, &child, CONTENT);
        shows(&scratch, &child, &[], &disk);
        snapshot(&base, &child, NIL);
        shows(&scratch, &child, &[], &disk);
        fs::remove_file(base).unwrap();
        fs::remove_file(child).unwrap();
    }
}

#[test]
fn regression_a_child_without_the_parent_that_its_uuid_names_is_refused() {
    if !need_fuse() {
        return;
    }
    let scratch = Scratch::new();
    let (base, child) = (scratch.path("base.vmdk"), scratch.path("child.vmdk"));
    let disk = snapshot(&base, &child, OTHER);
    let refused = |words: &[&str]| {
        let info = scratch.vmdkfuse().arg("--info").key("file", &child).run();
        info.one_error(1, words);
    };
    refused(&["base.vmdk", "changed after the snapshot", "degraded=cid"]);
    shows(&scratch, &child, &["degraded=cid"], &disk);
    snapshot(&base, &child, CONTENT);
    fs::copy(&base, scratch.path("copy.vmdk")).unwrap();
    refused(&["copy.vmdk", "base.vmdk", "ddb.uuid.parent"]);
    fs::remove_file(scratch.path("copy.vmdk")).unwrap();
    fs::remove_file(&base).unwrap();
    refused(&["child.vmdk", "ddb.uuid.parent", BASE]);
}

#[test]
fn a_base_is_protected_from_any_child_whatever_its_name_and_way_of_naming() {
    if !need_fuse() {
        return;
    }
    let scratch = Scratch::new();
    scratch.mkdir("Snapshots");
    let base = scratch.path("base.vmdk");
    let by_cid = |child: &Path| {
        let text = "# Disk DescriptorFile\nversion=1\nCID=2\nparentCID=a4f3c211\nparentFileNameHint=\"other.vmdk\"\n\
                    createType=\"monolithicSparse\"\nRW 8192 SPARSE \"c\"\n";
        let own = Layer::new(8, "child", SECTORS, 128);
        write::hosted(child, &own, Some(text.as_bytes()), &Hosted::default()).unwrap();
    };
    let writable = |keys: &[&str]| {
        let mut command = scratch.mount().file(&base);
        for key in keys {
            command = command.arg(key);
        }
        command
    };
    snapshot(&base, &scratch.path("child"), CONTENT);
    fs::remove_file(scratch.path("child")).unwrap();
    writable(&[]).start().unmount();
    for name in ["child", "c.img", "c.vmdk.bak", "Snapshots/{1}.vmdk", "Snapshots/c"] {
        let child = scratch.path(name);
        for by_uuid in [false, true] {
            if by_uuid {
                snapshot(&base, &child, CONTENT);
            } else {
                by_cid(&child);
            }
            let refused = writable(&[]).refused(1);
            refused.error_names(&[name, "is a snapshot based on it", "force=true"]);
            fs::remove_file(&child).unwrap();
        }
    }
    by_cid(&scratch.path("child"));
    writable(&["force=true"]).start().unmount();
}

/// Writes a descriptor with this extent line, over a parent with this CID and name.
fn text(path: PathBuf, line: &str, cid: &str, parent: Option<(&str, &str)>) -> PathBuf {
    let (parent_cid, hint) = parent.map_or(("ffffffff", String::new()), |(cid, name)| {
        (cid, format!("parentFileNameHint=\"{name}\"\n"))
    });
    let text = format!(
        "# Disk DescriptorFile\nversion=1\nCID={cid}\nparentCID={parent_cid}\n{hint}createType=\"custom\"\n{line}\n"
    );
    write::put(path, text.as_bytes()).unwrap()
}

#[test]
fn regression_a_wrong_size_of_an_extent_shows_no_zeroes() {
    if !need_fuse() {
        return;
    }
    let scratch = Scratch::new();
    let base = Arc::new(Layer::new(7, "base", SECTORS, 128).fill(0..64));
    write::flat(&scratch.path("flat"), &base, 0).unwrap();
    let middle = Layer::new(8, "middle", SECTORS, 1)
        .over(Arc::clone(&base) as _)
        .write(5, 2)
        .write(8000, 2);
    let middle = Arc::new(middle);
    let newest = Layer::new(9, "newest", SECTORS, 1)
        .over(Arc::clone(&middle) as _)
        .write(7, 2)
        .write(6000, 2);
    write::cowd(&scratch.path("middle"), &middle).unwrap();
    write::cowd(&scratch.path("newest"), &newest).unwrap();
    text(scratch.path("base.vmdk"), "RW 8192 VMFS \"flat\"", "1", None);
    let top = text(
        scratch.path("top.vmdk"),
        "RW 8192 VMFSSPARSE \"newest\"",
        "3",
        Some(("2", "m.vmdk")),
    );
    for wrong in [1, 4096, 8191] {
        text(
            scratch.path("m.vmdk"),
            &format!("RW {wrong} VMFSSPARSE \"middle\""),
            "2",
            Some(("1", "base.vmdk")),
        );
        shows(&scratch, &top, &[], &newest);
    }
    let line = "RW 16384 VMFSSPARSE \"middle\"";
    let long = text(scratch.path("m.vmdk"), line, "2", Some(("1", "base.vmdk")));
    let info = |path: &Path| scratch.vmdkfuse().arg("--info").key("file", path).run();
    info(&long).one_error(1, &["line 7", "16384", "8192", "write 8192"]);
    // The second extent would move, so the size of the first one has to be right.
    let split = "RW 4096 VMFSSPARSE \"middle\"\nRW 4096 ZERO";
    let split = text(scratch.path("m.vmdk"), split, "2", Some(("1", "base.vmdk")));
    info(&split).one_error(1, &["line 7", "4096", "8192", "write 8192"]);
    // A flat file has no header: its length shows that the line is wrong.
    text(
        scratch.path("m.vmdk"),
        "RW 8192 VMFSSPARSE \"middle\"",
        "2",
        Some(("1", "base.vmdk")),
    );
    text(scratch.path("base.vmdk"), "RW 4096 VMFS \"flat\"", "1", None);
    info(&top).one_error(1, &["base.vmdk", "4096", "8192", "zeroes"]);
}

#[test]
fn the_size_of_each_link_and_odd_sizes_are_shown() {
    let scratch = Scratch::new();
    let base = Layer::new(7, "base", 2 * SECTORS, 128).fill(0..128);
    write::flat(&scratch.path("flat"), &base, 0).unwrap();
    write::cowd(&scratch.path("delta"), &Layer::new(8, "delta", SECTORS, 1)).unwrap();
    text(scratch.path("base.vmdk"), "RW 16384 VMFS \"flat\"", "1", None);
    let child = text(
        scratch.path("child.vmdk"),
        "RW 8192 VMFSSPARSE \"delta\"",
        "2",
        Some(("1", "base.vmdk")),
    );
    let cut = text(scratch.path("cut.vmdk"), "RW 8192 VMFS \"flat\"", "1", None);
    for action in ["--info", "--check"] {
        let said = scratch.vmdkfuse().arg(action).key("file", &child).run().ok().stdout;
        assert!(
            said.contains("has 8192 sectors, and its parent") && said.contains("16384"),
            "{said}"
        );
        let said = scratch.vmdkfuse().arg(action).key("file", &cut).run().ok().stdout;
        assert!(
            said.contains("the first 8192 sectors") && said.contains("16384"),
            "{said}"
        );
    }
    let info = scratch.vmdkfuse().arg("--info").key("file", &child).run().ok().stdout;
    assert!(
        info.contains("8192 sectors, CID") && info.contains("16384 sectors, CID"),
        "{info}"
    );
    // VirtualBox rounds the capacity of a header up to a whole grain.
    let layer = Layer::new(7, "odd", 1024, 128).fill([0]);
    let line = "RW 1000 SPARSE \"odd.vmdk\"".to_owned();
    let bytes = Descriptor::new("monolithicSparse", [line]).bytes().unwrap();
    write::hosted(&scratch.path("odd.vmdk"), &layer, Some(&bytes), &Hosted::default()).unwrap();
    let info = scratch
        .vmdkfuse()
        .args(["--info", "--json"])
        .key("file", scratch.path("odd.vmdk"))
        .run()
        .ok();
    assert_eq!(
        (info.json()[0]["size"].as_u64(), info.json()[0]["warnings"].as_array()),
        (Some(512_000), None)
    );
}

#[test]
fn an_overlay_has_version_1_of_the_format_until_it_needs_a_zeroed_grain() {
    if !need_fuse() {
        return;
    }
    let scratch = Scratch::new();
    let base = Layer::new(7, "base", SECTORS, 128).fill(0..64);
    write::flat(&scratch.path("flat"), &base, 0).unwrap();
    let disk = text(scratch.path("base.vmdk"), "RW 8192 VMFS \"flat\"", "1", None);
    let overlay = scratch.path("overlay.vmdk");
    let cow = format!("cow={}", overlay.display());
    let mut expected = base.read(0, SECTORS);
    let version_and_flags = || {
        let head = fs::read(&overlay).unwrap();
        (head[4], head[8])
    };
    let mut change = |punch: bool| {
        let mount = scratch.mount().file(&disk).arg(&cow).start();
        let path = mount.file("base.raw");
        let file = fs::OpenOptions::new().write(true).open(&path).unwrap();
        if punch {
            let mode = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
            fallocate(&file, mode, 1 << 20, 1 << 20).unwrap();
            expected[1 << 20..2 << 20].fill(0);
        } else {
            file.write_all_at(&[7; 512], 4096).unwrap();
            expected[4096..4608].fill(7);
        }
        file.sync_all().unwrap();
        drop(file);
        mount.unmount();
        let mount = scratch.mount().arg("-r").file(&disk).arg(&cow).start();
        assert_eq!(
            digest_range(&mount.file("base.raw"), 0, SECTORS * 512),
            digest(&expected)
        );
        mount.unmount();
    };
    change(false);
    assert_eq!(version_and_flags(), (1, 3));
    change(true);
    assert_eq!(version_and_flags(), (2, 7));
    scratch
        .vmdkfuse()
        .arg("--check")
        .key("file", &disk)
        .arg(&cow)
        .run()
        .ok();
}

#[test]
fn a_stream_has_a_descriptor_of_one_sector() {
    let scratch = Scratch::new();
    let stream = scratch.path("a stream with a name that is long.vmdk");
    let create = scratch
        .vmdkfuse()
        .args(["--create", "create-type=stream-optimized", "create-size=1T"]);
    create.key("file", &stream).run().ok();
    let head = fs::read(&stream).unwrap();
    assert!(head[512..1024].ends_with(&[0]) && head[1024..2048].iter().all(|b| *b == 0));
    assert!(String::from_utf8_lossy(&head[512..1024]).contains("\"generated-stream.vmdk\""));
}

/// "names of another machine: beside the descriptor, in a sibling folder, in an allowed folder"
#[test]
fn files_named_by_paths_of_other_systems_are_found() {
    if !need_fuse() {
        return;
    }
    let scratch = Scratch::new();
    for dir in ["vm", "vm/data", "base", "store"] {
        scratch.mkdir(dir);
    }
    let layer = base_layer();
    let store = format!("allow-dir={}", scratch.path("store").display());
    let base = format!("allow-dir={}", scratch.path("base").display());
    for (line, place, allow) in [
        (r"D:\VMs\XP\sda.dd", "vm/sda.dd", None),
        ("/vmfs/volumes/5c7d/XP/sda.dd", "vm/sda.dd", None),
        ("/Users/anna/XP/sda.dd", "vm/sda.dd", None),
        (r"data\sda.dd", "vm/data/sda.dd", None),
        (r"\\host\base\sda.dd", "base/sda.dd", Some(&base)),
        ("../gone/sda.dd", "vm/sda.dd", None),
        ("../gone/sda.dd", "store/sda.dd", Some(&store)),
    ] {
        write::flat(&scratch.path(place), &layer, 0).unwrap();
        let extent = format!("RW {SECTORS} FLAT \"{line}\" 0");
        let image = text(scratch.path("vm/x.vmdk"), &extent, "00000001", None);
        shows(
            &scratch,
            &image,
            &allow.map(String::as_str).into_iter().collect::<Vec<_>>(),
            &layer,
        );
        fs::remove_file(scratch.path(place)).unwrap();
        // Nothing is there: no folder of the image's would help.
        let outcome = scratch.mount().file(&image).refused(1);
        assert!(!outcome.stderr.contains("allow-dir=/"), "{line}: {outcome}");
        outcome.one_error(1, &["sda.dd", "the folder that holds it with allow-dir="]);
    }
}
