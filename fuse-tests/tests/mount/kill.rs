//! Daemons that are killed during writes: synced data survives, and no sector is torn.
//!
//! Each disk is divided into regions that have one writer each. A write fills a region with a value that is one larger
//! than before; after an fsync the writer records the value as synced. The daemon is killed at a random moment. Every
//! sector must then hold a value between the last synced and the last written one.

use std::fs::{File, OpenOptions};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;
use std::time::Duration;

use fuse_tests::crash::{fill, value_of};
use fuse_tests::harness::{Cmd, Mount, Scratch, need_fuse, need_qemu, poll_until, qemu_img};
use fuse_tests::make::model::Random;
use nix::libc;
use nix::sys::signal::Signal;

/// Sectors of each disk; not a multiple of the grain size.
const SECTORS: u64 = (8 << 11) + 77;
/// Sectors of a region, which only one thread writes to; not aligned to grains or pages.
const REGION_SECTORS: u64 = 13;
/// Writer threads of each disk.
const WRITERS: u64 = 3;
/// Number of times that the daemon of each disk is killed.
const ROUNDS: u64 = 4;

/// Options of `qemu-img create`, and arguments of the mount. `base.vmdk` is an empty parent of [`SECTORS`].
const IMAGES: [(&str, &[&str]); 5] = [
    ("subformat=monolithicSparse", &[]),
    ("subformat=twoGbMaxExtentSparse", &["cache=none"]),
    ("subformat=monolithicFlat", &["cache=none"]),
    ("backing_fmt=vmdk,backing_file=base.vmdk", &[]),
    ("backing_fmt=vmdk,backing_file=base.vmdk", &["cache=none"]),
];

/// Values that the sectors of a region may hold.
#[derive(Debug, Clone, Copy, Default)]
struct Region {
    /// Last value that was written before a successful fsync.
    synced: u64,
    /// Last value whose write was started, and perhaps not completed.
    last: u64,
}

/// A thread that writes to its regions until the mount fails, and records the synced values.
struct Writer<'a> {
    file: File,
    regions: &'a mut [Region],
    /// First sector of the first region.
    first: u64,
    random: Random,
    syncs: &'a AtomicU64,
}

impl Writer<'_> {
    /// Writes up to six regions, then syncs the file, until one of them fails.
    fn run(mut self) {
        loop {
            let mut written = Vec::new();
            for _ in 0..1 + self.random.below(6) {
                let number = self.random.below(self.regions.len() as u64);
                let region = &mut self.regions[number as usize];
                region.last += 1;
                let start = self.first + number * REGION_SECTORS;
                let data: Vec<u8> = (start..start + REGION_SECTORS)
                    .flat_map(|lba| fill(lba, region.last))
                    .collect();
                if self.file.write_all_at(&data, start * 512).is_err() {
                    return;
                }
                written.push((number as usize, region.last));
            }
            if self.file.sync_data().is_err() {
                return;
            }
            for (number, value) in written {
                self.regions[number].synced = value;
            }
            self.syncs.fetch_add(1, Ordering::Relaxed);
        }
    }
}

/// Reads all regions; panics unless each sector holds a value between the last synced and the last written one.
fn verify(path: &Path, regions: &mut [Region], context: &str) {
    let file = File::open(path).unwrap();
    let mut data = vec![0; REGION_SECTORS as usize * 512];
    for (number, region) in (0u64..).zip(regions) {
        let start = number * REGION_SECTORS;
        file.read_exact_at(&mut data, start * 512).unwrap();
        let mut lowest = region.last;
        for (sector, lba) in data.chunks_exact(512).zip(start..) {
            // Value 0 is zeroes: a region that was never written, also in a delta, whose parent is empty.
            let value = (region.synced..=region.last).find(|&value| sector == fill(lba, value));
            let Some(value) = value else {
                panic!(
                    "{context}: sector {lba} holds {}, expected {region:?}",
                    value_of(sector)
                );
            };
            lowest = lowest.min(value);
        }
        // The disk was repaired or read now, so a later reader must not find an older value.
        region.synced = lowest;
    }
}

/// "kill -9 of the daemon … at random moments, remount, verify what was fsynced"
#[test]
fn synced_data_survives_a_kill_at_any_time() {
    if !need_fuse() || !need_qemu() {
        return;
    }
    for (number, (options, arguments)) in IMAGES.into_iter().enumerate() {
        let scratch = Scratch::new();
        let size = (SECTORS * 512).to_string();
        for (name, options) in [("base.vmdk", "subformat=monolithicSparse"), ("disk.vmdk", options)] {
            let size = (!options.starts_with("backing")).then_some(size.as_str());
            let arguments = ["create", "-q", "-f", "vmdk", "-o", options, name]
                .into_iter()
                .chain(size);
            Cmd::new("qemu-img").args(arguments).dir(scratch.root()).run().ok();
        }
        let mut regions = vec![Region::default(); (SECTORS / REGION_SECTORS) as usize];
        let mut random = Random::new(number as u64);
        let mut syncs = 0;
        for round in 0..ROUNDS {
            let context = format!("{options} {arguments:?}, round {round}");
            syncs += write_and_kill(&scratch, arguments, &mut regions, &mut random);
            let check = scratch.vmdkfuse().arg("--check").key("file", "disk.vmdk").run();
            assert!(matches!(check.ended.code, Some(0 | 3)), "{context}: {check}");
            // Read-only: the image is read as the killed daemon left it.
            let mount = mount_disk(&scratch, arguments, &["readonly=true"]);
            verify(&mount.file("disk.raw"), &mut regions, &context);
            mount.unmount();
            // Writable: the image is recovered first.
            let mount = mount_disk(&scratch, arguments, &[]);
            verify(&mount.file("disk.raw"), &mut regions, &format!("{context}, repaired"));
            mount.unmount();
            // A grain whose entry was not written yet when the daemon was killed remains as a leak where a later grain's
            // entry was: recovery truncates the tail of the file only.
            let check = scratch.vmdkfuse().arg("--check").key("file", "disk.vmdk").run();
            let only_leaks = check.ended.code == Some(3) && check.stdout.contains("leaked grains, nothing else");
            assert!(only_leaks || check.ended.code == Some(0), "{context}: {check}");
            qemu_img([Path::new("check"), Path::new("-q"), &scratch.path("disk.vmdk")]);
        }
        println!("{options} {arguments:?}: killed {ROUNDS} times after {syncs} syncs");
    }
}

/// Mounts `disk.vmdk` of the folder with these arguments.
fn mount_disk(scratch: &Scratch, arguments: &[&str], more: &[&str]) -> Mount {
    arguments
        .iter()
        .chain(more)
        .fold(scratch.mount().file("disk.vmdk"), |mount, word| mount.arg(word))
        .start()
}

/// Mounts the disk, writes to it from several threads, and kills the daemon meanwhile; returns the number of syncs.
fn write_and_kill(scratch: &Scratch, arguments: &[&str], regions: &mut [Region], random: &mut Random) -> u64 {
    let mut mount = mount_disk(scratch, arguments, &[]);
    let path = mount.file("disk.raw");
    let syncs = AtomicU64::new(0);
    let expected = 1 + random.below(60);
    let per_writer = regions.len().div_ceil(WRITERS as usize);
    thread::scope(|scope| {
        for (writer, regions) in (0..).zip(regions.chunks_mut(per_writer)) {
            let file = OpenOptions::new().read(true).write(true).open(&path).unwrap();
            let (random, first) = (Random::new(random.next()), writer * per_writer as u64 * REGION_SECTORS);
            let writer = Writer {
                file,
                regions,
                first,
                random,
                syncs: &syncs,
            };
            scope.spawn(move || writer.run());
        }
        poll_until(Duration::from_secs(60), || syncs.load(Ordering::Relaxed) >= expected);
        mount.signal(Signal::SIGKILL);
    });
    assert_eq!(mount.wait_end().signal, Some(libc::SIGKILL));
    drop(mount);
    // The kernel releases the locks of a killed process a moment after its end is reported.
    let free = || {
        scratch
            .vmdkfuse()
            .arg("--info")
            .key("file", "disk.vmdk")
            .run()
            .ended
            .code
            == Some(0)
    };
    assert!(poll_until(Duration::from_secs(60), free), "still locked");
    let syncs = syncs.load(Ordering::Relaxed);
    assert!(
        syncs >= expected,
        "only {syncs} of {expected} syncs before the deadline"
    );
    syncs
}
