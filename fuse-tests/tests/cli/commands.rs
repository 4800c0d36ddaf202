//! Command line: exit statuses, refused arguments, and the output of `--info`, `--map`, `--check` and `--dump`.

use std::fs;
use std::ops::Range;
use std::path::PathBuf;

use fuse_tests::harness::{Hosted, Scratch, need_fuse, need_qemu, qemu_data_ranges, qemu_img, raw_with_islands};
use serde_json::Value;

/// Creates a raw original of 8 MiB (`x.raw`) and an image of it with this subformat (`x.vmdk`).
fn image(scratch: &Scratch, subformat: &str) -> (PathBuf, PathBuf) {
    let (raw, vmdk) = (scratch.path("x.raw"), scratch.path("x.vmdk"));
    raw_with_islands(&raw, 8 << 20, 1);
    let option = format!("subformat={subformat}");
    let words = [
        "convert",
        "-f",
        "raw",
        "-O",
        "vmdk",
        "-o",
        &option,
        raw.to_str().unwrap(),
        vmdk.to_str().unwrap(),
    ];
    qemu_img(words);
    (raw, vmdk)
}

/// Returns the only element of an array; panics if there is not exactly one.
#[track_caller]
fn only_element(value: &Value) -> &Value {
    match value.as_array().map(Vec::as_slice) {
        Some([one]) => one,
        _ => panic!("not an array of one: {value}"),
    }
}

#[test]
fn help_and_version_exit_with_status_0() {
    let scratch = Scratch::new();
    for word in ["--help", "-h"] {
        let help = scratch.vmdkfuse().arg(word).run().ok();
        for part in [
            "MOUNTPOINT",
            "KEY=VALUE",
            "--info",
            "--map",
            "--check",
            "--dump",
            "--pidfile",
            "--config",
            "file=",
        ] {
            assert!(help.stdout.contains(part), "{word} does not show {part}: {help}");
        }
    }
    for word in ["--version", "-V"] {
        let version = scratch.vmdkfuse().arg(word).run().ok();
        assert!(version.stdout.starts_with("vmdkfuse "), "{version}");
    }
}

#[test]
fn help_shows_every_key_of_local_disks() {
    let help = Scratch::new().vmdkfuse().arg("--help").run().ok();
    for key in [
        "file",
        "name",
        "readonly",
        "cache",
        "cache-size",
        "readahead",
        "format",
        "allow-dir",
        "degraded",
    ] {
        assert!(
            help.stdout.contains(&format!("{key}=")),
            "--help does not show {key}=: {help}"
        );
    }
}

#[test]
fn dump_reports_the_version_and_the_back_ends() {
    let scratch = Scratch::new();
    let text = scratch.vmdkfuse().arg("--dump").run().ok();
    let version = text.stdout.lines().find_map(|line| line.strip_prefix("vmdkfuse="));
    let json = scratch.vmdkfuse().args(["--dump", "--json"]).run().ok().json();
    assert!(version.is_some_and(|version| !version.is_empty()), "{text}");
    assert_eq!(json["version"].as_str(), version, "{text}");
    assert!(
        json.to_string().contains("native"),
        "the built-in engine is not named: {json}"
    );
    let libnbd = text.stdout.lines().find_map(|line| line.strip_prefix("libnbd="));
    assert_eq!(json["libnbd"].as_str(), libnbd, "{text}");
    let writable: Vec<_> = json["writable"]
        .as_array()
        .unwrap()
        .iter()
        .filter_map(|w| w.as_str())
        .collect();
    assert_eq!(writable, ["raw", "FLAT", "VMFS", "SPARSE"]);
    let is_usable = json["backends"]
        .as_array()
        .is_some_and(|backends| backends.iter().any(|name| name == "nbd"));
    // A version such as "1.14.2" is reported if and only if the back end can be used.
    let is_version = libnbd.is_some_and(|version| version.split('.').all(|number| number.parse::<u32>().is_ok()));
    assert_eq!(is_version, is_usable, "{text}");
}

#[test]
fn usage_errors_exit_with_status_2() {
    let scratch = Scratch::new();
    let disk = scratch.write("disk.img", vec![0; 4096]);
    let file = format!("file={}", disk.display());
    scratch.mkdir("mnt");
    let invalid: [&[&str]; 12] = [
        &[],
        &["mnt"],
        &["--info"],
        &["--no-such-option", "mnt", &file],
        &["mnt", "filee=disk.img"],
        &["mnt", &file, "format=qcow2"],
        &["mnt", &file, "readonly=perhaps"],
        &["mnt", &file, "cache-size=12Q"],
        &["mnt", &file, "cache=sometimes"],
        &["mnt", &file, "name=a/b"],
        &["mnt", &file, "degraded=all"],
        &["--info", "--map", &file],
    ];
    for words in invalid {
        let outcome = scratch.vmdkfuse().args(words).run().expect_code(2);
        assert!(
            !outcome.stderr.trim().is_empty() && !outcome.stderr.contains("panicked"),
            "{outcome}"
        );
        scratch.assert_no_mounts();
    }
}

/// "An unknown key is an error that names the nearest known one."
#[test]
fn an_unknown_key_names_the_nearest_one() {
    let scratch = Scratch::new();
    scratch.write("disk.img", vec![0; 4096]);
    for (wrong, right) in [
        ("fiel=disk.img", "file"),
        ("nmae=x", "name"),
        ("read-only=true", "readonly"),
        ("alow-dir=/", "allow-dir"),
    ] {
        let outcome = scratch
            .vmdkfuse()
            .args(["--info", "file=disk.img", wrong])
            .run()
            .expect_code(2);
        let key = wrong.split('=').next().unwrap();
        outcome.error_names(&[key, right]);
    }
}

#[test]
fn keys_of_later_versions_are_not_in_this_build() {
    let scratch = Scratch::new();
    scratch.write("disk.img", vec![0; 4096]);
    for word in ["partitions=true", "descriptor=true"] {
        let outcome = scratch.vmdkfuse().args(["--info", "file=disk.img", word]).run();
        assert!(matches!(outcome.ended.code, Some(1 | 2)), "{outcome}");
        outcome.error_names(&["not in this build"]);
    }
}

#[test]
fn a_bare_value_is_a_file() {
    let scratch = Scratch::new();
    let disk = scratch.write("disk with blank.img", vec![7; 4096]);
    let info = scratch
        .vmdkfuse()
        .args(["--info", "--json"])
        .arg(&disk)
        .run()
        .ok()
        .json();
    assert_eq!(only_element(&info)["size"], 4096);
}

#[test]
fn a_missing_file_is_a_one_line_error_with_status_1() {
    let scratch = Scratch::new();
    for action in ["--info", "--map", "--check"] {
        scratch
            .vmdkfuse()
            .args([action, "file=gone.vmdk"])
            .run()
            .one_error(1, &["gone.vmdk", "no such file"]);
    }
}

#[test]
fn info_describes_every_subformat() {
    if !need_qemu() {
        return;
    }
    for (subformat, kind, extents) in [
        ("monolithicSparse", "SPARSE", 1),
        ("monolithicFlat", "FLAT", 1),
        ("twoGbMaxExtentSparse", "SPARSE", 1),
        ("twoGbMaxExtentFlat", "FLAT", 1),
        ("streamOptimized", "SPARSE", 1),
    ] {
        let scratch = Scratch::new();
        let (_, vmdk) = image(&scratch, subformat);
        let json = scratch
            .vmdkfuse()
            .args(["--info", "--json"])
            .key("file", &vmdk)
            .run()
            .ok()
            .json();
        let disk = only_element(&json);
        assert_eq!(disk["name"], "x.raw", "{subformat}: {json}");
        assert_eq!(
            disk["file"].as_str().unwrap(),
            vmdk.to_str().unwrap(),
            "{subformat}: {json}"
        );
        assert_eq!(disk["format"], "vmdk", "{subformat}: {json}");
        assert_eq!(disk["size"], 8 << 20, "{subformat}: {json}");
        assert_eq!(disk["create_type"], subformat, "{json}");
        let writable = subformat != "streamOptimized";
        assert_eq!(disk["writable"], writable, "{subformat}: {json}");
        assert_eq!(disk["reason"].is_string(), !writable, "{subformat}: {json}");
        assert_eq!(
            disk["extents"].as_array().unwrap().len(),
            extents,
            "{subformat}: {json}"
        );
        let extent = &disk["extents"][0];
        assert!(
            extent["kind"].as_str().unwrap().starts_with(kind),
            "{subformat}: {json}"
        );
        assert_eq!(extent["sectors"], (8 << 20) / 512, "{subformat}: {json}");
        assert!(
            extent["access"].is_string() && extent["file"].is_string(),
            "{subformat}: {json}"
        );
        let link = only_element(&disk["chain"]);
        assert!(
            link["cid"].is_string() && link["file"].as_str().unwrap().ends_with("x.vmdk"),
            "{subformat}: {json}"
        );
        let text = scratch.vmdkfuse().arg("--info").key("file", &vmdk).run().ok();
        for part in ["x.vmdk", "8388608", subformat] {
            assert!(text.stdout.contains(part), "--info does not show {part}: {text}");
        }
    }
}

#[test]
fn info_lists_the_links_of_a_chain() {
    if !need_qemu() {
        return;
    }
    let scratch = Scratch::new();
    let (_, base) = image(&scratch, "monolithicSparse");
    let top = scratch.path("top.vmdk");
    let words = [
        "create",
        "-f",
        "vmdk",
        "-F",
        "vmdk",
        "-b",
        base.to_str().unwrap(),
        top.to_str().unwrap(),
    ];
    qemu_img(words);
    let json = scratch
        .vmdkfuse()
        .args(["--info", "--json"])
        .key("file", &top)
        .key("allow-dir", scratch.root())
        .run()
        .ok()
        .json();
    let chain = only_element(&json)["chain"].as_array().unwrap().clone();
    assert_eq!(chain.len(), 2, "{json}");
    assert_eq!(chain[0]["parent_cid"], chain[1]["cid"], "{json}");
    assert!(chain[1]["file"].as_str().unwrap().ends_with("x.vmdk"), "{json}");
}

#[test]
fn info_of_a_raw_image_and_of_several_disks() {
    let scratch = Scratch::new();
    scratch.write("a.img", vec![1; 5 * 512]);
    scratch.write("b.img", vec![2; 9 * 512]);
    let json = scratch
        .vmdkfuse()
        .args(["--info", "--json", "file=a.img", "file=b.img"])
        .run()
        .ok()
        .json();
    let disks = json.as_array().unwrap();
    assert_eq!(disks.len(), 2, "{json}");
    for (disk, (name, size)) in disks.iter().zip([("a.raw", 5 * 512), ("b.raw", 9 * 512)]) {
        assert_eq!(
            (&disk["name"], &disk["format"], &disk["size"]),
            (&name.into(), &"raw".into(), &size.into()),
            "{json}"
        );
    }
}

#[test]
fn map_covers_the_disk_and_agrees_with_qemu() {
    if !need_qemu() {
        return;
    }
    for subformat in ["monolithicSparse", "streamOptimized", "twoGbMaxExtentSparse"] {
        let scratch = Scratch::new();
        let (_, vmdk) = image(&scratch, subformat);
        let json = scratch
            .vmdkfuse()
            .args(["--map", "--json"])
            .key("file", &vmdk)
            .run()
            .ok()
            .json();
        let disk = only_element(&json);
        assert_eq!(disk["name"], "x.raw", "{json}");
        let (mut at, mut data) = (0, Vec::<Range<u64>>::new());
        for entry in disk["map"].as_array().unwrap() {
            let (start, length) = (entry["start"].as_u64().unwrap(), entry["length"].as_u64().unwrap());
            assert_eq!(start, at, "{subformat}: a gap or an overlap at {entry}");
            at = start + length;
            match entry["content"].as_str().unwrap() {
                "data" => data.push(start..at),
                "zero" | "hole" => {}
                other => panic!("unknown content {other}"),
            }
        }
        assert_eq!(at, 8 << 20, "{subformat}: the map does not cover the disk");
        assert_eq!(data, qemu_data_ranges(&vmdk, "vmdk"), "{subformat}");
        let text = scratch.vmdkfuse().arg("--map").key("file", &vmdk).run().ok();
        assert!(text.stdout.contains("data") && text.stdout.contains("hole"), "{text}");
    }
}

/// "verify a VMDK's tables and chain; exit 0 clean, 3 leaks only, 4 corrupt"
#[test]
fn check_distinguishes_clean_leaks_and_corrupt() {
    if !need_qemu() {
        return;
    }
    let scratch = Scratch::new();
    let (_, vmdk) = image(&scratch, "monolithicSparse");
    let check = |json: bool| {
        let cmd = scratch.vmdkfuse().arg("--check").key("file", &vmdk);
        if json { cmd.arg("--json").run() } else { cmd.run() }
    };
    check(false).ok();
    let clean = check(true).ok().json();
    assert_eq!(
        (only_element(&clean)["status"].as_str(), &only_element(&clean)["leaks"]),
        (Some("clean"), &0.into()),
        "{clean}"
    );

    // An entry that is set to zero leaks its grain; an entry beyond the end of the file is corrupt.
    let mut image = Hosted::read(&vmdk);
    let grain = image.first_stored();
    let old_entry = image.set_entry(grain, 0);
    image.write(&vmdk);
    let leaks = check(true).expect_code(3).json();
    assert_eq!(only_element(&leaks)["status"], "leaks", "{leaks}");
    assert!(only_element(&leaks)["leaks"].as_u64().unwrap() >= 1, "{leaks}");
    check(false).expect_code(3);

    image.set_entry(grain, old_entry + 0x7000_0000);
    image.write(&vmdk);
    let corrupt = check(true).expect_code(4).json();
    assert_eq!(only_element(&corrupt)["status"], "corrupt", "{corrupt}");
    assert!(
        !only_element(&corrupt)["errors"].as_array().unwrap().is_empty(),
        "{corrupt}"
    );
    let text = check(false).expect_code(4);
    assert!(
        text.stdout.contains("x.vmdk") || text.stderr.contains("x.vmdk"),
        "{text}"
    );
}

#[test]
fn the_worst_disk_decides_the_exit_status_of_a_check() {
    if !need_qemu() {
        return;
    }
    let scratch = Scratch::new();
    let (_, vmdk) = image(&scratch, "monolithicSparse");
    let bad = scratch.path("bad.vmdk");
    fs::copy(&vmdk, &bad).unwrap();
    let mut damaged = Hosted::read(&bad);
    let grain = damaged.first_stored();
    damaged.set_entry(grain, 0x7000_0000);
    damaged.write(&bad);
    let words = ["--check", "--json"];
    let json = scratch
        .vmdkfuse()
        .args(words)
        .key("file", &bad)
        .key("file", &vmdk)
        .run()
        .expect_code(4)
        .json();
    let statuses: Vec<_> = json
        .as_array()
        .unwrap()
        .iter()
        .map(|disk| disk["status"].as_str().unwrap())
        .collect();
    assert_eq!(statuses, ["corrupt", "clean"], "{json}");
}

/// "`x-*`, `_netdev`, `noauto`, `nofail`, `user`, `defaults` and the like are accepted and ignored"
#[test]
fn mount_options_of_fstab_are_accepted() {
    if !need_fuse() {
        return;
    }
    let scratch = Scratch::new();
    let disk = scratch.write("disk.vmdk", vec![9; 1024]);
    let options = "ro,noauto,nofail,_netdev,defaults,user,x-systemd.automount,fsname=my-disk,format=raw,name=d.bin";
    let mount = scratch.mount().arg("-o").arg(options).file(&disk).start();
    assert_eq!(mount.names(), ["d.bin"]);
    assert_eq!(mount.entry().source, "my-disk");
    assert!(
        mount.entry().options.split(',').any(|option| option == "ro"),
        "{:?}",
        mount.entry()
    );
    assert_eq!(fs::read(mount.file("d.bin")).unwrap(), vec![9; 1024]);
    mount.unmount();
}

#[test]
fn an_unknown_mount_option_is_refused() {
    let scratch = Scratch::new();
    let disk = scratch.write("disk.img", vec![9; 1024]);
    scratch
        .mount()
        .arg("-o")
        .arg("alow_other")
        .file(&disk)
        .refused(2)
        .error_names(&["alow_other"]);
}
