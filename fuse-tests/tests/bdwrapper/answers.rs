//! The answers to disk ioctls, checked by a program in C for several sizes, on files and on loop devices.

use std::path::Path;

use fuse_tests::harness::{LoopDevice, Scratch};

use crate::fixture::{Listed, compile, ready, sparse, wrapped};

/// The serial number that follows from a listed name: its FNV-1a hash.
fn serial(name: &str) -> String {
    let hash = name.bytes().fold(0xcbf2_9ce4_8422_2325_u64, |hash, byte| {
        (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3)
    });
    format!("{hash:016X}")
}

/// Checks every answer for a disk of this size under an IDE name and under a SCSI name.
#[track_caller]
fn check(scratch: &Scratch, program: &Path, target: &Path, sectors: u64, access: &str) {
    for (name, bus) in [("/dev/hdx", "ide"), ("/dev/sd/vm/disk one", "scsi")] {
        let disk = Listed {
            name,
            target: target.to_owned(),
        };
        let outcome = wrapped(scratch, &[disk], 0)
            .arg(program)
            .args([name, bus, &sectors.to_string(), access, &serial(name)])
            .run()
            .ok();
        assert_eq!(outcome.stderr, "", "{outcome}");
    }
}

#[test]
fn answers_are_consistent_for_files_of_every_size() {
    if !ready() {
        return;
    }
    let scratch = Scratch::new();
    let program = compile(&scratch, "answers", &[]);
    // Below a cylinder; a part of a sector; 8 GiB and one more; above the 28 bits of old IDE; above 2 TiB.
    for bytes in [
        512,
        63 * 512 + 7,
        100 << 20,
        8 << 30,
        (8 << 30) + 512,
        200 << 30,
        (3 << 40) + 512,
    ] {
        let file = sparse(&scratch, "disk.raw", bytes);
        check(&scratch, &program, &file, bytes / 512, "rw");
    }
}

#[test]
fn answers_are_consistent_for_block_devices() {
    if !ready() {
        return;
    }
    let scratch = Scratch::new();
    let program = compile(&scratch, "answers", &[]);
    for bytes in [1 << 20, (9 << 30) + 512, 3 << 40] {
        let device = LoopDevice::attach(&sparse(&scratch, "disk.raw", bytes));
        check(&scratch, &program, device.path(), bytes / 512, "rw");
    }
}

#[test]
fn a_disk_that_cannot_be_written_to_is_read_only_everywhere() {
    if !ready() {
        return;
    }
    let scratch = Scratch::new();
    let program = compile(&scratch, "answers", &[]);
    scratch.write("image.raw", vec![0; 1 << 20]);
    let mount = scratch.mount().arg("-r").file("image.raw").start();
    check(&scratch, &program, &mount.file("image.raw"), 2048, "ro");
    mount.unmount();
}
