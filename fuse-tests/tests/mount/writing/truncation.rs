//! Truncation: everything from the new size on reads as zeroes, and the size stays.

use std::fs::{self, File, OpenOptions};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::thread;

use fuse_tests::harness::{Cmd, Mapped, need, raw_with_islands};
use nix::unistd::truncate;

use crate::writing::kinds::{Disk, KINDS, SIZE, for_each_kind};
use crate::writing::open;

/// Panics unless the disk of the mount has its full size and holds `disk.bytes`, by each way to read it.
#[track_caller]
fn holds(disk: &Disk, path: &Path) {
    assert_eq!(fs::metadata(path).unwrap().len(), SIZE);
    disk.holds(path);
    let mut mapped = Mapped::new(&open(path));
    assert!(*mapped.bytes() == disk.bytes[..], "{}: mapped", disk.kind.name);
}

/// "truncating to N bytes (O_TRUNC: 0) makes everything from N on read as zeroes, and the size stays": for a reader that
/// has the pages, and over dirty pages of a mapping.
#[test]
fn everything_from_the_new_size_on_reads_as_zeroes() {
    for_each_kind(|mut disk| {
        let mount = disk.mount();
        let path = mount.file("disk");
        let file = open(&path);
        for (n, size) in [SIZE - 1, SIZE / 2 + 77, 5 << 20, 4096, 1, 0].into_iter().enumerate() {
            let reader = File::open(&path).unwrap();
            // The kernel has every page, and a mapping has made some of them dirty on both sides of the new size.
            disk.holds(&path);
            let mut mapped = Mapped::new(&file);
            for at in (0..SIZE as usize).step_by(900_000) {
                mapped.bytes()[at..at + 3000].fill(n as u8 + 1);
                disk.bytes[at..at + 3000].fill(n as u8 + 1);
            }
            match n % 2 {
                0 => file.set_len(size).unwrap(),
                _ => truncate(&path, size as i64).unwrap(),
            }
            disk.bytes[size as usize..].fill(0);
            // Until the kernel asks for the size again a mapping ends at the new one, as that of any truncated file.
            assert_eq!(fs::metadata(&path).unwrap().len(), SIZE);
            let mut seen = vec![1; SIZE as usize];
            reader.read_exact_at(&mut seen, 0).unwrap();
            assert!(
                seen == disk.bytes,
                "{}: read after truncation to {size}",
                disk.kind.name
            );
            assert!(*mapped.bytes() == disk.bytes[..], "{}: mapped, {size}", disk.kind.name);
            drop(mapped);
            holds(&disk, &path);
            file.write_all_at(&[0x77; 70_000], size.min(SIZE - 70_000)).unwrap();
            disk.bytes[size.min(SIZE - 70_000) as usize..][..70_000].fill(0x77);
        }
        drop(file);
        mount.unmount();
        disk.check();
    });
}

/// "O_TRUNC" on every kind of open, with what is written after it.
#[test]
fn an_open_with_o_trunc_leaves_zeroes_around_what_is_written() {
    for_each_kind(|mut disk| {
        let mount = disk.mount();
        let path = mount.file("disk");
        for options in [
            OpenOptions::new().write(true).truncate(true),
            OpenOptions::new().read(true).write(true).truncate(true),
            OpenOptions::new().write(true).create(true).truncate(true),
        ] {
            disk.holds(&path);
            let file = options.open(&path).unwrap();
            file.write_all_at(b"new", 1_000_000).unwrap();
            disk.bytes.fill(0);
            disk.bytes[1_000_000..][..3].copy_from_slice(b"new");
            holds(&disk, &path);
        }
        mount.unmount();
        disk.check();
    });
}

/// Opens with O_TRUNC beside others that open, read and truncate all succeed.
#[test]
fn opens_with_o_trunc_beside_other_opens_succeed() {
    let disk = Disk::new(KINDS[4]);
    if !crate::writing::kinds::ready() {
        return;
    }
    let mount = disk.mount();
    let path = &mount.file("disk");
    thread::scope(|scope| {
        for n in 0..4 {
            scope.spawn(move || {
                for _ in 0..200 {
                    let truncates = n < 2;
                    let mut options = OpenOptions::new();
                    let options = options.read(!truncates).write(truncates).truncate(truncates);
                    options.open(path).unwrap();
                }
            });
        }
    });
    assert_eq!(fs::metadata(path).unwrap().len(), SIZE);
    mount.unmount();
}

/// "so `cp image mnt/disk.raw`, `cp --sparse=always`, `tar -S` and `dd` are right": over a disk full of other data, with a
/// source that has holes, also at its end, and is as long as the disk or shorter.
#[test]
fn programs_that_copy_sparse_files_replace_the_old_data() {
    if !need("rsync") || !need("tar") {
        return;
    }
    let copy: [&[&str]; 6] = [
        &["cp", "in/disk"],
        &["cp", "--sparse=always", "in/disk"],
        &["dd", "bs=64k", "status=none", "if=in/disk"],
        &["dd", "bs=64k", "status=none", "conv=sparse", "if=in/disk"],
        &["rsync", "--inplace", "--ignore-times", "in/disk"],
        &["tar", "-x", "--overwrite", "-f", "in.tar", "-C"],
    ];
    for_each_kind(|mut disk| {
        let mount = disk.mount();
        let path = mount.file("disk");
        disk.scratch.mkdir("in");
        let source = disk.scratch.path("in/disk");
        for (seed, len) in [(11, SIZE), (12, 3 << 20)] {
            raw_with_islands(&source, len - 70_000, seed);
            OpenOptions::new()
                .write(true)
                .open(&source)
                .unwrap()
                .set_len(len)
                .unwrap();
            let tar = ["-c", "-S", "-f", "in.tar", "-C", "in", "disk"];
            Cmd::new("tar").args(tar).dir(disk.scratch.root()).run().ok();
            let mut expected = fs::read(&source).unwrap();
            expected.resize(SIZE as usize, 0);
            for words in copy {
                open(&path).write_all_at(&vec![0xee; SIZE as usize], 0).unwrap();
                let command = Cmd::new(words[0]).args(&words[1..]).dir(disk.scratch.root());
                let command = match words[0] {
                    "dd" => command.key("of", &path),
                    "tar" => command.arg(mount.point()),
                    _ => command.arg(&path),
                };
                command.run().ok();
                disk.bytes.clone_from(&expected);
                holds(&disk, &path);
            }
        }
        mount.unmount();
        disk.check();
    });
}
