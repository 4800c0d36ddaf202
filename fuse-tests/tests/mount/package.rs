//! OVA packages: their disks as files, without unpacking.

use std::fs;
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};

use fuse_tests::harness::{
    Cmd, Scratch, assert_same, assert_same_at_random, need_fuse, need_qemu, qemu_img, raw_with_islands, sha256,
};

use fuse_tests::make::Layer;
use fuse_tests::make::write::{self, Hosted};

const SIZE: u64 = 16 << 20;

/// Makes a package of two disks with a description and digests, as exporters do. Returns it and the raw originals.
fn package(scratch: &Scratch) -> (PathBuf, [PathBuf; 2]) {
    let dir = scratch.mkdir("parts");
    let raws = ["one", "two"].map(|name| scratch.path(format!("{name}.raw")));
    let mut digests = String::new();
    for (seed, (raw, name)) in (5..).zip(raws.iter().zip(["vm-disk1.vmdk", "vm-disk2.vmdk"])) {
        raw_with_islands(raw, SIZE, seed);
        let out = dir.join(name);
        let option = "subformat=streamOptimized";
        qemu_img([
            "convert",
            "-O",
            "vmdk",
            "-o",
            option,
            raw.to_str().unwrap(),
            out.to_str().unwrap(),
        ]);
        digests += &format!("SHA256({name})= {}\n", sha256(&out));
    }
    let ovf = r#"<Envelope xmlns:ovf="http://schemas.dmtf.org/ovf/envelope/1"><References>
        <File ovf:href="vm-disk1.vmdk" ovf:id="a"/><File ovf:href="vm-disk2.vmdk" ovf:id="b"/></References>
        <DiskSection><Disk ovf:fileRef="a"/><Disk ovf:fileRef="b"/></DiskSection></Envelope>"#;
    fs::write(dir.join("vm.ovf"), ovf).unwrap();
    fs::write(dir.join("vm.mf"), digests).unwrap();
    (
        pack(scratch, &dir, &["vm.ovf", "vm.mf", "vm-disk1.vmdk", "vm-disk2.vmdk"]),
        raws,
    )
}

fn pack(scratch: &Scratch, dir: &Path, members: &[&str]) -> PathBuf {
    let ova = scratch.path("vm.ova");
    Cmd::new("tar")
        .args(["--format=ustar", "-cf"])
        .arg(&ova)
        .arg("-C")
        .arg(dir)
        .args(members)
        .run()
        .ok();
    ova
}

/// "`file=vm.ova` gives each VMDK in it as a file"
#[test]
fn each_disk_of_a_package_is_a_file() {
    if !need_fuse() || !need_qemu() {
        return;
    }
    let scratch = Scratch::new();
    let (ova, raws) = package(&scratch);
    let mount = scratch.mount().file(&ova).start();
    assert_eq!(mount.names(), ["vm-disk1.raw", "vm-disk2.raw"]);
    for (name, raw) in ["vm-disk1.raw", "vm-disk2.raw"].iter().zip(&raws) {
        assert_same(&mount.file(name), raw);
        assert_same_at_random(&mount.file(name), raw, 3, 50);
    }
    mount.unmount();
    // One disk, with its own name, and with an overlay for writes.
    let cow = format!("cow={}", scratch.path("changes.cow").display());
    let one = || {
        scratch
            .mount()
            .file(&ova)
            .arg("member=vm-disk2.vmdk")
            .arg("name=disk")
            .arg(&cow)
    };
    let mount = one().start();
    let mut expected = fs::read(&raws[1]).unwrap();
    let file = fs::File::options().write(true).open(mount.file("disk")).unwrap();
    file.write_all_at(&[0x77; 5000], 70_000).unwrap();
    drop(file);
    mount.unmount();
    expected[70_000..75_000].fill(0x77);
    let mount = one().start();
    assert!(fs::read(mount.file("disk")).unwrap() == expected);
    mount.unmount();
}

#[test]
fn check_compares_the_digests_of_a_package() {
    if !need_fuse() || !need_qemu() {
        return;
    }
    let scratch = Scratch::new();
    let (ova, _) = package(&scratch);
    let check = || scratch.vmdkfuse().arg("--check").key("file", &ova).run();
    let clean = check().ok();
    assert!(clean.stdout.matches("clean").count() == 2, "{clean}");
    // A byte that no reader of the disk sees: in the space after the embedded descriptor.
    let disk = scratch.path("parts/vm-disk2.vmdk");
    let mut bytes = fs::read(&disk).unwrap();
    bytes[512 + 19 * 512] ^= 1;
    fs::write(&disk, &bytes).unwrap();
    pack(
        &scratch,
        &scratch.path("parts"),
        &["vm.ovf", "vm.mf", "vm-disk1.vmdk", "vm-disk2.vmdk"],
    );
    let damaged = check().expect_code(4);
    assert!(
        damaged
            .stdout
            .contains("vm-disk2.vmdk): differs from its digest in vm.mf"),
        "{damaged}"
    );
    assert_eq!(damaged.stdout.matches("clean").count(), 1, "{damaged}");
}

/// Members of one package are different files, also where their lengths are equal.
#[test]
fn regression_extents_of_equal_length_in_a_package_are_not_taken_for_one() {
    if !need_fuse() {
        return;
    }
    let scratch = Scratch::new();
    let dir = scratch.mkdir("parts");
    for (seed, name) in [(1, "s001.vmdk"), (2, "s002.vmdk")] {
        let layer = Layer::new(seed, name, 8192, 128).fill([0, 5]);
        write::hosted(&dir.join(name), &layer, None, &Hosted::default()).unwrap();
    }
    let text = "# Disk DescriptorFile\nversion=1\nCID=12345678\nparentCID=ffffffff\ncreateType=\"twoGbMaxExtentSparse\"\n\
                RW 8192 SPARSE \"s001.vmdk\"\nRW 8192 SPARSE \"s002.vmdk\"\n";
    fs::write(dir.join("disk.vmdk"), text).unwrap();
    let ova = pack(&scratch, &dir, &["disk.vmdk", "s001.vmdk", "s002.vmdk"]);
    let check = scratch
        .vmdkfuse()
        .arg("--check")
        .key("file", &ova)
        .arg("member=disk.vmdk")
        .run();
    assert!(check.ok().stdout.contains("clean (4 grains checked)"));
}

#[test]
fn a_disk_that_cannot_be_read_in_its_package_is_refused_with_the_way_on() {
    if !need_fuse() || !need_qemu() {
        return;
    }
    let scratch = Scratch::new();
    let (ova, _) = package(&scratch);
    let missing = scratch.mount().file(&ova).arg("member=vm-disk3.vmdk").refused(1);
    missing.one_error(1, &["has no disk vm-disk3.vmdk", "vm-disk1.vmdk, vm-disk2.vmdk"]);
    let dir = scratch.path("parts");
    Cmd::new("gzip").arg(dir.join("vm-disk1.vmdk")).run().ok();
    let ova = pack(&scratch, &dir, &["vm-disk1.vmdk.gz"]);
    scratch
        .mount()
        .file(&ova)
        .refused(1)
        .one_error(1, &["compressed by gzip", "tar -xOf", "| gunzip > vm-disk1.vmdk"]);
    fs::write(&ova, [0x5a; 10_000]).unwrap();
    let outcome = scratch.mount().file(&ova).refused_with_any(&[1, 2]);
    assert!(
        outcome.stderr.contains("is no OVA package (a tar archive)"),
        "{outcome}"
    );
}
