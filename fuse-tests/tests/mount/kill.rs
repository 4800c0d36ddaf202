//! Mounts that are killed while somebody writes to them: what was synced is there afterwards, and nothing is torn.

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

/// Sectors of each disk, no whole number of grains.
const SECTORS: u64 = (8 << 11) + 77;
/// Sectors of a slot, which has one writer only; not aligned to grains or pages.
const SLOT: u64 = 13;
const WRITERS: u64 = 3;
/// How often each disk is killed.
const ROUNDS: u64 = 4;

/// Kinds of images and how they are mounted; each has a parent of [`SECTORS`] where it says so.
const KINDS: [(&str, &[&str]); 6] = [
    ("subformat=monolithicSparse", &[]),
    ("subformat=monolithicSparse", &["cache=writeback"]),
    ("subformat=twoGbMaxExtentSparse", &["cache=none"]),
    ("subformat=monolithicFlat", &["cache=none"]),
    ("backing_fmt=vmdk,backing_file=base.vmdk", &[]),
    ("backing_fmt=vmdk,backing_file=base.vmdk", &["cache=none"]),
];

/// What may be in a slot.
#[derive(Debug, Clone, Copy, Default)]
struct Slot {
    /// The last value that an fsync was said to cover.
    synced: u64,
    /// The last value that was written, perhaps not to its end.
    last: u64,
}

/// Writes to its slots until the mount is gone, and knows what was synced.
struct Writer<'a> {
    file: File,
    slots: &'a mut [Slot],
    /// The sector of the first slot.
    first: u64,
    random: Random,
    syncs: &'a AtomicU64,
}

impl Writer<'_> {
    fn run(mut self) {
        loop {
            let mut written = Vec::new();
            for _ in 0..1 + self.random.below(6) {
                let number = self.random.below(self.slots.len() as u64);
                let slot = &mut self.slots[number as usize];
                slot.last += 1;
                let start = self.first + number * SLOT;
                let data: Vec<u8> = (start..start + SLOT).flat_map(|lba| fill(lba, slot.last)).collect();
                if self.file.write_all_at(&data, start * 512).is_err() {
                    return;
                }
                written.push((number as usize, slot.last));
            }
            if self.file.sync_data().is_err() {
                return;
            }
            for (number, value) in written {
                self.slots[number].synced = value;
            }
            self.syncs.fetch_add(1, Ordering::Relaxed);
        }
    }
}

/// Reads all slots of a file; each sector must hold a value from the last one that was synced to the last one written.
fn verify(path: &Path, slots: &mut [Slot], what: &str) {
    let file = File::open(path).unwrap();
    let mut data = vec![0; SLOT as usize * 512];
    for (number, slot) in (0u64..).zip(slots) {
        let start = number * SLOT;
        file.read_exact_at(&mut data, start * 512).unwrap();
        let mut seen = slot.last;
        for (sector, lba) in data.chunks_exact(512).zip(start..) {
            // value 0 of a delta is what its parent holds, which is zeroes as well
            let value = (slot.synced..=slot.last).find(|&value| sector == fill(lba, value));
            let Some(value) = value else {
                panic!("{what}: sector {lba} holds {}, expected {slot:?}", value_of(sector));
            };
            seen = seen.min(value);
        }
        // what was read once must not go back
        slot.synced = seen;
    }
}

/// "kill -9 of the daemon … at random moments, remount, verify what was fsynced"
#[test]
fn what_was_synced_survives_a_mount_that_is_killed_at_any_time() {
    if !need_fuse() || !need_qemu() {
        return;
    }
    for (number, (options, words)) in KINDS.into_iter().enumerate() {
        let scratch = Scratch::new();
        let size = (SECTORS * 512).to_string();
        for (name, options) in [("base.vmdk", "subformat=monolithicSparse"), ("disk.vmdk", options)] {
            let size = (!options.starts_with("backing")).then_some(size.as_str());
            let words = ["create", "-q", "-f", "vmdk", "-o", options, name]
                .into_iter()
                .chain(size);
            Cmd::new("qemu-img").args(words).dir(scratch.root()).run().ok();
        }
        let mut slots = vec![Slot::default(); (SECTORS / SLOT) as usize];
        let mut random = Random::new(number as u64);
        let mut syncs = 0;
        for round in 0..ROUNDS {
            let what = format!("{options} {words:?}, round {round}");
            syncs += killed(&scratch, words, &mut slots, &mut random);
            let check = scratch.vmdkfuse().arg("--check").key("file", "disk.vmdk").run();
            assert!(matches!(check.ended.code, Some(0 | 3)), "{what}: {check}");
            // as it is, by a reader
            let mount = mounted(&scratch, words, &["readonly=true"]);
            verify(&mount.file("disk.raw"), &mut slots, &what);
            mount.unmount();
            // and repaired
            let mount = mounted(&scratch, words, &[]);
            verify(&mount.file("disk.raw"), &mut slots, &format!("{what}, repaired"));
            mount.unmount();
            scratch.vmdkfuse().arg("--check").key("file", "disk.vmdk").run().ok();
            qemu_img([Path::new("check"), Path::new("-q"), &scratch.path("disk.vmdk")]);
        }
        println!("{options} {words:?}: killed {ROUNDS} times after {syncs} syncs");
    }
}

/// Mounts the disk of the folder.
fn mounted(scratch: &Scratch, words: &[&str], more: &[&str]) -> Mount {
    words
        .iter()
        .chain(more)
        .fold(scratch.mount().file("disk.vmdk"), |mount, word| mount.arg(word))
        .start()
}

/// Mounts the disk, writes to it from several threads, and kills the mount in the middle of that; the syncs that were done.
fn killed(scratch: &Scratch, words: &[&str], slots: &mut [Slot], random: &mut Random) -> u64 {
    let mut mount = mounted(scratch, words, &[]);
    let path = mount.file("disk.raw");
    let syncs = AtomicU64::new(0);
    let wanted = 1 + random.below(60);
    let per_writer = slots.len().div_ceil(WRITERS as usize);
    thread::scope(|scope| {
        for (writer, slots) in (0..).zip(slots.chunks_mut(per_writer)) {
            let file = OpenOptions::new().read(true).write(true).open(&path).unwrap();
            let (random, first) = (Random::new(random.next()), writer * per_writer as u64 * SLOT);
            let writer = Writer {
                file,
                slots,
                first,
                random,
                syncs: &syncs,
            };
            scope.spawn(move || writer.run());
        }
        poll_until(Duration::from_secs(20), || syncs.load(Ordering::Relaxed) >= wanted);
        mount.signal(Signal::SIGKILL);
    });
    assert_eq!(mount.wait_end().signal, Some(libc::SIGKILL));
    drop(mount);
    // the locks of a process last an instant longer than itself
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
    assert!(poll_until(Duration::from_secs(20), free), "still locked");
    let syncs = syncs.load(Ordering::Relaxed);
    assert!(syncs >= wanted, "{syncs} syncs of {wanted} in time");
    syncs
}
