//! The program with overlays: mounts, `--info`, `--map`, `--check` and `--commit`.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::Path;

use fuse_tests::harness::{Cmd, Scratch, assert_same, need_fuse, sha256};
use fuse_tests::make::model::Random;
use fuse_tests::model::alone;
use vmdkfuse::block::Lba;
use vmdkfuse::volume::{self};

use super::folder::Folder;
use super::pair::disk;
use super::text;

/// Returns a command that runs an action of the program on a disk with an overlay.
fn action(scratch: &Scratch, option: &str, base: &Path, cow: &Path) -> Cmd {
    scratch.vmdkfuse().arg(option).key("cow", cow).key("file", base)
}

#[test]
fn a_temporary_overlay_leaves_no_file_after_unmount_or_kill() {
    let _alone = alone();
    if !need_fuse() {
        return;
    }
    let scratch = Scratch::new();
    let base = scratch.write("base.img", vec![7; 1 << 20]);
    let tmp = scratch.mkdir("tmp");
    let names = || fs::read_dir(&tmp).unwrap().count();
    // A relative TMPDIR starts at the folder in which the program was started.
    let relative = Path::new("tmp").to_path_buf();
    for (kill, folder) in [(false, &tmp), (true, &relative)] {
        let mut mount = scratch
            .mount()
            .env("TMPDIR", text(folder))
            .arg("cow=tmp")
            .file(&base)
            .foreground()
            .start();
        assert_eq!(names(), 0, "the overlay has a name in TMPDIR");
        let deleted = format!("{}/#", text(&tmp));
        let open = fs::read_dir(format!("/proc/{}/fd", mount.pid())).unwrap();
        let links = open.flatten().filter_map(|fd| fs::read_link(fd.path()).ok());
        assert!(
            links.into_iter().any(|link| text(&link).starts_with(&deleted)),
            "no overlay is open"
        );
        if kill {
            mount.signal(nix::sys::signal::Signal::SIGKILL);
            mount.wait_end();
        } else {
            mount.unmount();
        }
        assert_eq!(names(), 0);
    }
    assert!(fs::read(&base).unwrap() == vec![7; 1 << 20]);
}

/// Writes random lengths at random byte offsets to a mounted file and to the model file.
fn write_through(file: &File, model: &File, random: &mut Random, len: u64) {
    for step in 0..200 {
        let at = random.below(len);
        let count = (1 + random.below(if step % 10 == 0 { 200_000 } else { 6_000 })).min(len - at);
        let data: Vec<u8> = (0..count).map(|i| (i / 100 + step) as u8).collect();
        for file in [file, model] {
            file.write_all_at(&data, at).unwrap();
        }
        if step % 50 == 0 {
            file.sync_all().unwrap();
        }
    }
}

/// Mounts a disk twice and writes the same data to it and to the file `expected`.
fn mount_and_write(folder: &Folder, base: &Path, expected: &Path, seed: u64) {
    let mut random = Random::new(seed);
    let len = fs::metadata(expected).unwrap().len();
    for _ in 0..2 {
        let cow = format!("cow={}", text(&folder.cow));
        let mount = folder.scratch.mount().arg(cow).arg("name=disk").file(base).start();
        let disk = mount.file("disk");
        let [file, model] = [&disk, expected].map(|path| File::options().write(true).open(path).unwrap());
        write_through(&file, &model, &mut random, len);
        drop(file);
        assert_same(&disk, expected);
        mount.unmount();
    }
}

#[test]
fn a_mounted_overlay_is_written_and_committed() {
    let _alone = alone();
    if !need_fuse() {
        return;
    }
    let Some(folder) = Folder::new((6 << 20) + 512 * 5) else {
        return;
    };
    let expected = folder.scratch.path("expected.raw");
    let mut all = folder.bases();
    all.push(folder.scratch.path("stream.vmdk"));
    for (base, seed) in all.iter().zip(1..) {
        let before = sha256(base);
        fs::copy(&folder.raw, &expected).unwrap();
        mount_and_write(&folder, base, &expected, seed);
        assert_eq!(sha256(base), before, "{}: the source was changed", base.display());
        let act = |option: &str| action(&folder.scratch, option, base, &folder.cow);
        act("--check").run().ok();
        let info = act("--info").arg("--json").run().ok().json();
        assert!(info[0]["overlay"]["changed"].as_u64().unwrap() > 0, "{info}");
        assert_eq!(info[0]["writable"], true, "{info}");
        if base.ends_with("stream.vmdk") {
            act("--commit").run().expect_code(1).error_names(&["streamOptimized"]);
            continue;
        }
        let done = act("--commit").run().ok();
        assert!(done.stdout.contains("is no longer needed"), "{}", done.stdout);
        let mount = folder
            .scratch
            .mount()
            .arg("name=disk")
            .arg("readonly=true")
            .file(base)
            .start();
        assert_same(&mount.file("disk"), &expected);
        mount.unmount();
        fs::remove_file(&folder.cow).unwrap();
    }
}

#[test]
fn the_map_of_an_overlay_lists_the_changed_ranges() {
    let _alone = alone();
    let scratch = Scratch::new();
    let base = scratch.write("base.img", vec![7; 1 << 20]);
    let cow = scratch.path("cow.vmdk");
    let image = volume::open(&disk(&base, &cow)).unwrap();
    let writer = image.disk().writer().unwrap();
    writer.write_at(Lba(17), &[1; 512]).unwrap();
    writer.zero(Lba(160)..Lba(192), true).unwrap();
    writer.close().unwrap();
    drop(image);
    let map = action(&scratch, "--map", &base, &cow).arg("--json").run().ok().json();
    let expected = serde_json::json!([
        { "start": 8192, "length": 8192, "content": "data" },
        { "start": 81920, "length": 16384, "content": "zero" },
    ]);
    assert_eq!(map[0]["map"], expected, "{map}");
}
