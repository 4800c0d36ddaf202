//! `--create` and `create=true`: new disks read the same in qemu and in this engine, their descriptors are right, and
//! no other file is touched.

use std::fs::{self, File};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};

use fuse_tests::harness::{
    Cmd, NOBODY, Scratch, data_ranges, need, need_fuse, need_root, program, qemu_data_ranges, qemu_img,
    raw_with_islands, read_range,
};
use fuse_tests::model::{alone, policy, readable};
use vmdkfuse::block::{BlockRead, Lba};
use vmdkfuse::store::{ExtentName, LocalStore};
use vmdkfuse::vmdk::{self, DeltaParent, NewDelta};

/// Each value of `create-type=` with the createType that qemu reports.
const KINDS: [(&str, &str); 7] = [
    ("monolithic-sparse", "monolithicSparse"),
    ("monolithic-flat", "monolithicFlat"),
    ("split-sparse", "twoGbMaxExtentSparse"),
    ("split-flat", "twoGbMaxExtentFlat"),
    ("vmfs-flat", "vmfs"),
    ("vmfs-thin", "vmfs"),
    ("stream-optimized", "streamOptimized"),
];

/// Creates a disk with `--create`, which must print nothing.
#[track_caller]
fn create(scratch: &Scratch, file: &str, size: u64, kind: &str) -> PathBuf {
    let size = format!("create-size={size}");
    let outcome = scratch
        .vmdkfuse()
        .args(["--create", file, &size])
        .key("create-type", kind)
        .run()
        .ok();
    assert_eq!(
        (outcome.stdout.as_str(), outcome.stderr.as_str()),
        ("", ""),
        "--create printed something"
    );
    scratch.path(file)
}

/// Returns the names in the folder, sorted.
fn names(dir: &Path) -> Vec<String> {
    let mut names: Vec<_> = fs::read_dir(dir)
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    names
}

/// Returns the store of the scratch folder.
pub(crate) fn store(scratch: &Scratch) -> LocalStore {
    LocalStore::new(scratch.root(), policy(&[])).unwrap()
}

#[test]
fn every_kind_is_empty_in_qemu_and_in_this_engine() {
    let _alone = alone();
    if !need("qemu-img") {
        return;
    }
    let sizes = [
        512,
        64 << 10,
        (64 << 10) + 512,
        (33 << 20) + 1536,
        (2047 << 20) + 512,
        3 << 40,
    ];
    for (kind, create_type) in KINDS {
        for size in sizes {
            let too_large = kind.ends_with("-flat") && size > 64 << 20;
            // 3 TiB in split extents of 2 GB are 1537 files, which test no more than two files do.
            let pieces = kind.starts_with("split") && size > 1 << 40;
            if too_large || pieces {
                continue;
            }
            let scratch = Scratch::new();
            let path = create(&scratch, "x.vmdk", size, kind);
            let info = qemu_img(["info", "--output=json", path.to_str().unwrap()]).json();
            assert_eq!(info["virtual-size"], size, "{kind} {size}");
            assert_eq!(info["format-specific"]["data"]["create-type"], create_type, "{kind}");
            let own_info = scratch
                .vmdkfuse()
                .args(["--info", "--json"])
                .arg(&path)
                .run()
                .ok()
                .json();
            assert_eq!(own_info[0]["size"], size, "{kind} {size}");
            // Checking all tables of a large disk takes long in a debug build.
            if size < 1 << 40 || kind == "stream-optimized" {
                scratch.vmdkfuse().arg("--check").arg(&path).run().ok();
            }
            // qemu-img does not support checks of flat images; it then exits with 63.
            let checked = Cmd::new("qemu-img").args(["check", "-q"]).arg(&path).run();
            assert!(matches!(checked.ended.code, Some(0 | 63)), "{kind} {size}: {checked}");
            // The map of 3 TiB takes half a minute.
            if size < 1 << 40 && (kind.ends_with("sparse") || kind == "stream-optimized") {
                assert_eq!(qemu_data_ranges(&path, "vmdk"), [], "{kind} {size}");
            }
            // Larger disks differ only in the number of tables or extents.
            if size <= 1 << 31 && (size < 1 << 30 || kind == "split-sparse") {
                let raw = scratch.path("x.raw");
                qemu_img([
                    "convert",
                    "-f",
                    "vmdk",
                    "-O",
                    "raw",
                    path.to_str().unwrap(),
                    raw.to_str().unwrap(),
                ]);
                assert_eq!(fs::metadata(&raw).unwrap().len(), size, "{kind} {size}");
                for range in data_ranges(&raw) {
                    let bytes = read_range(&raw, range.start, (range.end - range.start) as usize);
                    assert!(bytes.iter().all(|byte| *byte == 0), "{kind} {size}: not all zeroes");
                }
            }
        }
    }
}

#[test]
fn writes_of_qemu_to_a_new_disk_are_read_back() {
    let _alone = alone();
    if !need("qemu-img") {
        return;
    }
    let scratch = Scratch::new();
    let size = (2047 << 20) + (5 << 20) + 512;
    let raw = scratch.path("raw");
    raw_with_islands(&raw, 40 << 20, 7);
    // Islands also at the boundary between two split extents.
    let islands = fs::read(&raw).unwrap();
    let file = File::options()
        .read(true)
        .write(true)
        .truncate(true)
        .open(&raw)
        .unwrap();
    file.set_len(size).unwrap();
    file.write_all_at(&islands[..8 << 20], 0).unwrap();
    file.write_all_at(&islands[8 << 20..12 << 20], (2047 << 20) - (1 << 20))
        .unwrap();
    file.write_all_at(&islands[..512], size - 512).unwrap();
    for kind in ["monolithic-sparse", "split-sparse", "split-flat"] {
        let path = create(&scratch, &format!("{kind}.vmdk"), size, kind);
        let (from, to) = (raw.to_str().unwrap(), path.to_str().unwrap());
        qemu_img(["convert", "-n", "-f", "raw", "-O", "vmdk", from, to]);
        let disk = readable(&path);
        assert_same_bytes(&disk, &file, kind);
        drop(disk);
        scratch.vmdkfuse().arg("--check").arg(&path).run().ok();
    }
}

/// Panics unless a disk has the content of a raw file.
#[track_caller]
pub(crate) fn assert_same_bytes(disk: &dyn BlockRead, raw: &File, what: &str) {
    const STEP: u64 = 2048;
    let sectors = disk.geometry().sectors;
    assert_eq!(sectors * 512, raw.metadata().unwrap().len(), "{what}");
    let (mut found, mut expected) = (Vec::new(), Vec::new());
    for at in (0..sectors).step_by(STEP as usize) {
        let len = (STEP.min(sectors - at) * 512) as usize;
        found.resize(len, 0);
        expected.resize(len, 0);
        disk.read_at(Lba(at), &mut found).unwrap();
        raw.read_exact_at(&mut expected, at * 512).unwrap();
        assert!(
            found == expected,
            "{what}: the content differs in the MiB from sector {at} on"
        );
    }
}

#[test]
fn adapter_and_version_are_in_the_descriptor() {
    let _alone = alone();
    let scratch = Scratch::new();
    let args = ["--create", "x.vmdk", "create-size=1G", "create-type=vmfs-thin"];
    scratch
        .vmdkfuse()
        .args(args)
        .args(["create-adapter-type=pvscsi", "create-hwversion=esx65"])
        .run()
        .ok();
    let text = fs::read_to_string(scratch.path("x.vmdk")).unwrap();
    for line in [
        "ddb.adapterType = \"pvscsi\"",
        "ddb.virtualHWVersion = \"13\"",
        "ddb.geometry.cylinders = \"512\"",
        "ddb.geometry.heads = \"128\"",
        "ddb.geometry.sectors = \"32\"",
        "ddb.thinProvisioned = \"1\"",
        "RW 2097152 VMFS \"x-flat.vmdk\"",
    ] {
        assert!(text.lines().any(|l| l == line), "{line} is not in:\n{text}");
    }
}

#[test]
fn several_disks_are_created_in_order_up_to_the_first_failure() {
    let _alone = alone();
    let scratch = Scratch::new();
    scratch.write("b-flat.vmdk", "mine");
    let args = [
        "--create",
        "create-size=1M",
        "a.vmdk",
        "b.vmdk",
        "create-type=monolithic-flat",
        "c.vmdk",
    ];
    scratch
        .vmdkfuse()
        .args(args)
        .run()
        .one_error(1, &["b.vmdk: can't be created", "never takes the place", "b-flat.vmdk"]);
    assert_eq!(names(scratch.root()), ["a.vmdk", "b-flat.vmdk"]);
    assert_eq!(fs::read(scratch.path("b-flat.vmdk")).unwrap(), b"mine");
}

#[test]
fn an_existing_file_is_an_error_and_is_kept() {
    let _alone = alone();
    let scratch = Scratch::new();
    let mnt = scratch.mkdir("mnt");
    let path = scratch.write("x.vmdk", "mine");
    std::os::unix::fs::symlink("nowhere", scratch.path("link.vmdk")).unwrap();
    for (kind, _) in KINDS {
        for name in ["x.vmdk", "link.vmdk"] {
            let args = ["create-size=1M", &format!("create-type={kind}")].map(str::to_owned);
            let fragments = [name, "can't be created", "File exists"];
            scratch
                .vmdkfuse()
                .args(["--create", name])
                .args(&args)
                .run()
                .one_error(1, &fragments);
            let mount = scratch
                .vmdkfuse()
                .arg(&mnt)
                .args([name, "create=true"])
                .args(&args)
                .run();
            mount.expect_code(1).error_names(&fragments);
        }
    }
    scratch.assert_no_mounts();
    assert_eq!(fs::read(&path).unwrap(), b"mine");
    assert_eq!(names(scratch.root()), ["link.vmdk", "mnt", "x.vmdk"]);
}

#[test]
fn a_full_file_system_leaves_no_partial_files() {
    let _alone = alone();
    if !need_root() || !need("mount") {
        return;
    }
    let scratch = Scratch::new();
    let small = scratch.mkdir("small");
    // The scratch folder unmounts everything below it when it is dropped.
    Cmd::new("mount")
        .args(["-t", "tmpfs", "-o", "size=64k", "none"])
        .arg(&small)
        .run()
        .ok();
    for (kind, size) in [
        ("vmfs-flat", "1M"),
        ("monolithic-flat", "1M"),
        ("split-flat", "1M"),
        ("monolithic-sparse", "3T"),
        ("stream-optimized", "1G"),
    ] {
        // The remaining space is less than the metadata of the image.
        let ballast = if kind.ends_with("flat") { 0 } else { 60 << 10 };
        fs::write(small.join("ballast"), vec![1; ballast]).unwrap();
        let args = [
            "--create",
            "small/x.vmdk",
            &format!("create-size={size}"),
            &format!("create-type={kind}"),
        ];
        scratch
            .vmdkfuse()
            .args(args)
            .run()
            .one_error(1, &["x.vmdk", "No space left"]);
        assert_eq!(names(&small), ["ballast"], "{kind}");
        fs::remove_file(small.join("ballast")).unwrap();
    }
}

#[test]
fn a_limit_of_file_sizes_is_an_error_and_leaves_no_partial_files() {
    let _alone = alone();
    if !need("prlimit") {
        return;
    }
    let scratch = Scratch::new();
    let limited = Cmd::new("prlimit")
        .args(["--fsize=65536"])
        .arg(program())
        .args(["--create", "x.vmdk", "create-size=1M", "create-type=monolithic-flat"])
        .dir(scratch.root());
    limited.run().one_error(1, &["x-flat.vmdk", "File too large"]);
    assert_eq!(names(scratch.root()), [""; 0]);
}

#[test]
fn a_folder_that_is_missing_or_not_writable_is_an_error() {
    let _alone = alone();
    let scratch = Scratch::new();
    let create = |scratch: &Scratch, file: &str| scratch.vmdkfuse().args(["--create", file, "create-size=1M"]).run();
    create(&scratch, "none/x.vmdk").one_error(1, &["none", "No such file"]);
    scratch.mkdir("dir");
    create(&scratch, "dir/..").one_error(1, &["can't be the name of a new file"]);
    if need_root() {
        let scratch = Scratch::of(NOBODY);
        fs::create_dir(scratch.path("roots")).unwrap();
        create(&scratch, "roots/x.vmdk").one_error(1, &["x.vmdk", "Permission denied"]);
        create(&scratch, "mine.vmdk").ok();
        assert_eq!(fs::metadata(scratch.path("mine.vmdk")).unwrap().uid(), NOBODY.uid);
    }
}

#[test]
fn a_new_disk_is_mounted() {
    let _alone = alone();
    if !need_fuse() {
        return;
    }
    let scratch = Scratch::new();
    for (kind, _) in KINDS.iter().filter(|(kind, _)| *kind != "stream-optimized") {
        let file = format!("file={kind}.vmdk");
        let args = [
            file,
            "create=true".to_owned(),
            "create-size=5M".to_owned(),
            format!("create-type={kind}"),
        ];
        let mount = args
            .into_iter()
            .fold(scratch.mount(), |mount, word| mount.arg(word))
            .start();
        let raw = mount.file(format!("{kind}.raw"));
        let bytes = fs::read(&raw).unwrap();
        assert!(bytes.len() == 5 << 20 && bytes.iter().all(|byte| *byte == 0), "{kind}");
        mount.unmount();
        scratch
            .vmdkfuse()
            .arg("--check")
            .arg(scratch.path(format!("{kind}.vmdk")))
            .run()
            .ok();
    }
}

#[test]
fn qemu_follows_a_new_delta_to_its_parent() {
    let _alone = alone();
    if !need("qemu-img") {
        return;
    }
    let scratch = Scratch::new();
    let raw = scratch.path("raw");
    raw_with_islands(&raw, (20 << 20) + 1536, 3);
    let base = scratch.path("base.vmdk");
    qemu_img([
        "convert",
        "-f",
        "raw",
        "-O",
        "vmdk",
        raw.to_str().unwrap(),
        base.to_str().unwrap(),
    ]);
    let info = qemu_img(["info", "--output=json", base.to_str().unwrap()]).json();
    let cid = info["format-specific"]["data"]["cid"].as_u64().unwrap() as u32;
    for zeroed_grains in [false, true] {
        let name = format!("delta-{zeroed_grains}.vmdk");
        let delta = NewDelta {
            sectors: ((20 << 20) + 1536) / 512,
            grain: 16,
            zeroed_grains,
            parent: Some(DeltaParent {
                cid,
                hint: "base.vmdk".to_owned(),
            }),
            ddb: vec![("vmdkfuse.state".to_owned(), "0000".to_owned())],
        };
        vmdk::create_delta(&store(&scratch), &ExtentName::new(&name).unwrap(), &delta).unwrap();
        let path = scratch.path(&name);
        let info = qemu_img(["info", "--output=json", path.to_str().unwrap()]).json();
        assert_eq!(info["backing-filename"], "base.vmdk", "{info}");
        assert_eq!(info["format-specific"]["data"]["parent-cid"], cid, "{info}");
        qemu_img(["check", "-q", path.to_str().unwrap()]);
        scratch.vmdkfuse().arg("--check").arg(&path).run().ok();
        // qemu-io writes, qemu-img and this engine read.
        let write = [
            "-f",
            "vmdk",
            "-c",
            "write -P 0xa5 12345344 70000",
            path.to_str().unwrap(),
        ];
        Cmd::new("qemu-io").args(write).run().ok();
        let back = scratch.path("back");
        qemu_img([
            "convert",
            "-f",
            "vmdk",
            "-O",
            "raw",
            path.to_str().unwrap(),
            back.to_str().unwrap(),
        ]);
        let mut expected = fs::read(&raw).unwrap();
        expected[12_345_344..12_415_344].fill(0xa5);
        assert!(
            fs::read(&back).unwrap() == expected,
            "zeroed_grains={zeroed_grains}: qemu reads other data"
        );
        let disk = readable(&path);
        assert_same_bytes(&disk, &File::open(&back).unwrap(), "this engine");
    }
}
