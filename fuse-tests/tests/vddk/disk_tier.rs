//! Blocks of snapshots that are kept across mounts (`cache-dir=`).

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use fuse_tests::harness::{Cmd, MountCmd, Outcome, Scratch, assert_same, poll_until};

use crate::remote::{DISK, expect, login, put, put_sparse, remote};
use crate::{SOON, Vddk, counted, noise, ready, write_at};

/// Bytes of the disk: many blocks, and a last one that is not whole.
const SIZE: usize = (6 << 20) + 1536;

/// A disk of the pretended server, and a folder for its blocks.
struct Tier {
    scratch: Scratch,
    vddk: Vddk,
    disk: PathBuf,
}

impl Tier {
    fn new() -> Self {
        let scratch = Scratch::new();
        let vddk = Vddk::new(&scratch, 8);
        expect(&vddk, &[]);
        let disk = put(&vddk, &noise(SIZE, 1));
        Self { scratch, vddk, disk }
    }

    fn folder(&self) -> String {
        format!("cache-dir={}", self.scratch.path("tier").display())
    }

    fn mount(&self, snapshot: &str, more: &[&str]) -> MountCmd<'_> {
        let mount = remote(&self.vddk, &self.scratch).arg(format!("snapshot={snapshot}"));
        more.iter().fold(mount.arg(self.folder()), |mount, key| mount.arg(key))
    }

    /// Compares the disk of a snapshot with `expected` through a mount. Returns the bytes that the library has read.
    #[track_caller]
    fn read_all(&self, snapshot: &str, expected: &Path) -> u64 {
        let mount = self.mount(snapshot, &["-r"]).start();
        assert_same(&mount.file("x.raw"), expected);
        let (_, bytes) = counted(&mount, "VixDiskLib_ReadAsync");
        mount.unmount();
        bytes
    }

    fn run(&self, action: &str, more: &[&str]) -> Outcome {
        let command: Cmd = self.vddk.command(&self.scratch).arg(action).arg(self.vddk.libdir());
        command.args(login()).arg(DISK).args(more).arg(self.folder()).run()
    }

    /// Returns the files of the folder with that ending.
    fn kept(&self, ending: &str) -> Vec<PathBuf> {
        let names = fs::read_dir(self.scratch.path("tier")).unwrap();
        let paths = names.map(|name| name.unwrap().path());
        paths
            .filter(|path| path.extension().is_some_and(|e| e == ending))
            .collect()
    }
}

/// "A second mount of the same snapshot reads nothing from the server."
#[test]
fn a_second_mount_of_a_snapshot_reads_nothing_from_the_server() {
    if !ready() {
        return;
    }
    let tier = Tier::new();
    assert!(tier.read_all("snapshot-21", &tier.disk) >= SIZE as u64);
    assert_eq!(tier.read_all("snapshot-21", &tier.disk), 0);
    // Another snapshot is another disk, and takes nothing from the first one.
    let before = tier.scratch.path("before");
    fs::copy(&tier.disk, &before).unwrap();
    write_at(&tier.disk, 3 << 20, &noise(100_000, 2));
    assert!(tier.read_all("snapshot-22", &tier.disk) >= SIZE as u64);
    assert_eq!(tier.read_all("snapshot-21", &before), 0);
    let listed = tier
        .vddk
        .command(&tier.scratch)
        .args(["--list", &tier.folder()])
        .run()
        .ok()
        .stdout;
    for snapshot in ["snapshot-21", "snapshot-22"] {
        assert!(
            listed.contains(&format!("esx.example: [ds] dir/x.vmdk of {snapshot}")),
            "{listed}"
        );
    }
}

#[test]
fn writes_go_to_an_overlay_and_never_to_the_kept_blocks() {
    if !ready() {
        return;
    }
    let tier = Tier::new();
    let mount = tier.mount("snapshot-21", &["cow=tmp"]).start();
    let file = File::options()
        .read(true)
        .write(true)
        .open(mount.file("x.raw"))
        .unwrap();
    file.write_all_at(&noise(70_001, 3), 1 << 20).unwrap();
    file.sync_all().unwrap();
    drop(file);
    mount.unmount();
    tier.read_all("snapshot-21", &tier.disk);
    assert_eq!(tier.read_all("snapshot-21", &tier.disk), 0);
}

#[test]
fn a_damaged_block_is_read_from_the_server_again() {
    if !ready() {
        return;
    }
    let tier = Tier::new();
    tier.read_all("snapshot-21", &tier.disk);
    let [data] = &tier.kept("data")[..] else {
        panic!("one data file")
    };
    write_at(data, 5 << 20, &noise(10, 4));
    let bytes = tier.read_all("snapshot-21", &tier.disk);
    assert!(bytes > 0 && bytes <= 1 << 20, "{bytes}");
}

#[test]
fn a_prefetch_reads_each_block_once_and_no_hole() {
    if !ready() {
        return;
    }
    let tier = Tier::new();
    let disk = put_sparse(&tier.vddk, 64 << 20);
    write_at(&disk, 8 << 20, &noise(4 << 20, 5));
    let snapshot = ["snapshot=snapshot-21"];
    tier.run("--prefetch", &snapshot).ok();
    // Blocks of a hole are read while the library has not said yet that it is one: more of them on a busy machine.
    let mut bytes = 0;
    let few = poll_until(SOON, || {
        bytes = tier.read_all("snapshot-21", &disk);
        bytes <= 4 << 20
    });
    assert!(few, "{bytes} bytes of holes were read");
    let allocated = fs::metadata(&tier.kept("data")[0]).map(|data| {
        use std::os::unix::fs::MetadataExt;
        data.blocks() * 512
    });
    assert!(allocated.unwrap() < 16 << 20, "holes take no room");
    tier.run("--prefetch", &snapshot).ok();
    let checked = tier
        .vddk
        .command(&tier.scratch)
        .args(["--check", &tier.folder()])
        .run()
        .ok()
        .stdout;
    assert!(checked.contains("[ds] dir/x.vmdk"), "{checked}");
}

#[test]
fn disks_that_may_change_between_mounts_are_not_kept() {
    if !ready() {
        return;
    }
    let tier = Tier::new();
    for more in [&["-r"][..], &["snapshot=snapshot-21"]] {
        let mount = more
            .iter()
            .fold(remote(&tier.vddk, &tier.scratch).arg(tier.folder()), |m, key| {
                m.arg(key)
            });
        let error = mount.refused(2).stderr;
        assert!(error.contains("cache-dir") && error.contains("snapshot"), "{error}");
    }
    assert!(!tier.scratch.path("tier").exists());
}
