//! Defects that were found once on mounts: each keeps a test here. Those of the engine are in `regressions.rs`.

use std::fs::{self, File, FileTimes};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use fuse_tests::harness::{
    Cmd, Mount, STRANGER, Scratch, data_ranges, need, need_fuse, need_root, poll_until, read_range,
};
use fuse_tests::make::write::{self, Descriptor, Hosted, Stream};
use fuse_tests::make::{Content as _, Ctx, Layer, SECTOR};
use nix::libc;

/// Sectors of the disks here, and of their grains.
const DISK: u64 = 8192;
const GRAIN: u64 = 128;
/// Grains with something in them.
const GRAINS: [u64; 4] = [0, 1, 5, 63];

/// Where the kernel may say something a second later, and a little.
const SOON: Duration = Duration::from_secs(5);

/// A version of a disk: each has noise of its own in the same grains.
fn version(n: u64, sectors: u64) -> Layer {
    Layer::new(n, "disk", sectors, GRAIN).fill(GRAINS)
}

/// The kinds of images whose files are changed here.
const KINDS: [&str; 4] = ["sparse", "stream", "flat", "raw"];

/// Writes a version of a disk of some kind into a folder. The path is that of the file to open; the other is that of the file
/// with the content, which may be the same.
fn write_disk(dir: &Path, kind: &str, layer: &Layer) -> (PathBuf, PathBuf) {
    let (open, sectors) = (
        dir.join(if kind == "raw" { "disk.img" } else { "disk.vmdk" }),
        layer.sectors(),
    );
    let line = |word: &str, name: &str| format!("RW {sectors} {word} \"{name}\"");
    match kind {
        "sparse" => {
            let text = Descriptor::new("monolithicSparse", [line("SPARSE", "disk.vmdk")])
                .bytes()
                .unwrap();
            // the order of the grains in the file is the same for every version
            let options = Hosted {
                shuffle: false,
                ..Hosted::default()
            };
            write::hosted(&open, layer, Some(&text), &options).unwrap();
        }
        "stream" => {
            let text = Descriptor::new("streamOptimized", [line("SPARSE", "disk.vmdk")])
                .bytes()
                .unwrap();
            write::stream(&open, layer, &text, &Stream::default()).unwrap();
        }
        "flat" => {
            let text = Descriptor::new("monolithicFlat", [line("FLAT", "disk-flat.vmdk") + " 0"])
                .bytes()
                .unwrap();
            write::flat(&dir.join("disk-flat.vmdk"), layer, 0).unwrap();
            write::put(open.clone(), &text).unwrap();
            return (open, dir.join("disk-flat.vmdk"));
        }
        _ => write::flat(&open, layer, 0).unwrap(),
    }
    (open.clone(), open)
}

/// The whole disk.
fn whole(layer: &Layer) -> Vec<u8> {
    layer.read(0, layer.sectors())
}

/// Whether a read of an open file is one version or the other; a failed read panics.
#[track_caller]
fn assert_one_of(file: &File, versions: [&Layer; 2]) {
    for grain in GRAINS {
        let mut seen = vec![0; (GRAIN * SECTOR) as usize];
        file.read_exact_at(&mut seen, grain * GRAIN * SECTOR)
            .unwrap_or_else(|e| panic!("grain {grain}: {e}"));
        let known = versions.iter().any(|v| v.read(grain * GRAIN, GRAIN) == seen);
        assert!(
            known,
            "grain {grain} of an open file is neither the old nor the new one"
        );
    }
}

/// Mounts one disk as `disk`.
fn mount(scratch: &Scratch, open: &Path) -> Mount {
    scratch.mount().arg("readonly=true").file(open).arg("name=disk").start()
}

#[test]
fn regression_an_image_that_is_replaced_by_a_rename_is_seen() {
    if !need_fuse() {
        return;
    }
    for kind in KINDS {
        let scratch = Scratch::new();
        let (images, next) = (scratch.mkdir("images"), scratch.mkdir("next"));
        let (old, new) = (version(1, DISK), version(2, DISK));
        let (open, content) = write_disk(&images, kind, &old);
        let mount = mount(&scratch, &open);
        let path = mount.file("disk");
        assert!(fs::read(&path).unwrap() == whole(&old), "{kind}");
        let held = File::open(&path).unwrap();
        let (_, other) = write_disk(&next, kind, &new);
        fs::rename(other, content).unwrap();
        assert!(
            fs::read(&path).unwrap() == whole(&new),
            "{kind}: a new open does not see the new image"
        );
        assert_one_of(&held, [&old, &new]);
        drop(held);
        assert!(fs::read(&path).unwrap() == whole(&new), "{kind}");
        mount.unmount();
    }
}

/// The bytes are others, the length and the time of the last change are not.
#[test]
fn regression_a_change_with_a_restored_time_is_seen() {
    if !need_fuse() {
        return;
    }
    for kind in ["sparse", "flat", "raw"] {
        let scratch = Scratch::new();
        let images = scratch.mkdir("images");
        let (old, new) = (version(1, DISK), version(2, DISK));
        let (open, content) = write_disk(&images, kind, &old);
        let past = SystemTime::now() - Duration::from_secs(3600);
        let set_back = || {
            File::options()
                .write(true)
                .open(&content)
                .unwrap()
                .set_times(FileTimes::new().set_modified(past))
        };
        set_back().unwrap();
        let mount = mount(&scratch, &open);
        let path = mount.file("disk");
        assert!(fs::read(&path).unwrap() == whole(&old), "{kind}");
        let held = File::open(&path).unwrap();
        let (before, ino) = (
            fs::metadata(&content).unwrap().len(),
            fs::metadata(&content).unwrap().ino(),
        );
        write_disk(&scratch.mkdir("next"), kind, &new);
        let bytes = fs::read(scratch.path("next").join(content.file_name().unwrap())).unwrap();
        write::poke(&content, 0, &bytes).unwrap();
        set_back().unwrap();
        let after = fs::metadata(&content).unwrap();
        assert_eq!(
            (after.len(), after.ino(), after.modified().unwrap()),
            (before, ino, past),
            "the test is wrong"
        );
        assert!(
            fs::read(&path).unwrap() == whole(&new),
            "{kind}: a new open does not see the new bytes"
        );
        assert_one_of(&held, [&old, &new]);
        drop(held);
        mount.unmount();
    }
}

#[test]
fn regression_an_image_of_another_size_is_refused_while_the_mount_lives() {
    if !need_fuse() {
        return;
    }
    for kind in KINDS {
        let scratch = Scratch::new();
        let images = scratch.mkdir("images");
        let (old, new) = (version(1, DISK), version(2, 2 * DISK));
        let (open, _) = write_disk(&images, kind, &old);
        let mount = mount(&scratch, &open);
        let path = mount.file("disk");
        let held = File::open(&path).unwrap();
        for file in ["disk.vmdk", "disk-flat.vmdk", "disk.img"] {
            let file = images.join(file);
            fs::remove_file(file).ok();
        }
        write_disk(&images, kind, &new);
        let error = File::open(&path).map(|_| ()).unwrap_err();
        assert_eq!(error.raw_os_error(), Some(libc::EIO), "{kind}: {error}");
        assert!(mount.is_running() && mount.is_mounted(), "{kind}");
        assert_eq!(
            fs::metadata(&path).unwrap().len(),
            DISK * SECTOR,
            "{kind}: the size of the disk"
        );
        assert_one_of(&held, [&old, &new]);
        write_disk(&images, kind, &old);
        assert!(
            fs::read(&path).unwrap() == whole(&old),
            "{kind}: the old size opens again"
        );
        drop(held);
        mount.unmount();
    }
}

/// Writes `text` over a descriptor in place: the file stays the same, so does its length.
fn rewrite(path: &Path, text: &Descriptor) {
    let mut bytes = text.bytes().unwrap();
    let len = write::length(path).unwrap() as usize;
    assert!(bytes.len() <= len, "{} bytes for {len}", bytes.len());
    bytes.resize(len, b'\n');
    write::poke(path, 0, &bytes).unwrap();
}

/// A folder with two flat files and one sparse one, all of one size, and a descriptor that names the one that is wanted.
struct Switch {
    scratch: Scratch,
    flats: [Layer; 2],
    sparse: Layer,
    descriptor: PathBuf,
}

impl Switch {
    fn new() -> Self {
        let scratch = Scratch::new();
        let c = Ctx::new(&scratch.path("images"), 1).unwrap();
        let (flats, sparse) = ([version(1, DISK), version(2, DISK)], version(3, DISK));
        write::flat(&c.at("one.bin"), &flats[0], 0).unwrap();
        write::flat(&c.at("two.bin"), &flats[1], 0).unwrap();
        write::hosted(&c.at("sparse.bin"), &sparse, None, &Hosted::default()).unwrap();
        let descriptor = write::put(c.at("disk.vmdk"), &[b'\n'; 1024]).unwrap();
        Self {
            scratch,
            flats,
            sparse,
            descriptor,
        }
    }

    /// Lets the descriptor name a file.
    fn to(&self, name: &str) {
        let extent = if name == "sparse.bin" {
            "SPARSE \"sparse.bin\""
        } else {
            &format!("FLAT \"{name}\" 0")
        };
        rewrite(
            &self.descriptor,
            &Descriptor::new("custom", [format!("RW {DISK} {extent}")]),
        );
    }
}

/// Opens of a disk are served in one mode at a time; what the image becomes meanwhile must not disturb them.
#[test]
fn regression_a_flat_disk_that_becomes_another_one_while_it_is_open() {
    if !need_fuse() {
        return;
    }
    let s = Switch::new();
    for next in ["two.bin", "sparse.bin"] {
        s.to("one.bin");
        let mount = mount(&s.scratch, &s.descriptor);
        let path = mount.file("disk");
        let [one, two] = &s.flats;
        let new = if next == "two.bin" { two } else { &s.sparse };
        let held = File::open(&path).unwrap();
        assert_one_of(&held, [one, one]);
        s.to(next);
        for round in 0..3 {
            let second = File::open(&path).unwrap_or_else(|e| panic!("{next}: open {round}: {e}"));
            assert_one_of(&second, [new, new]);
            assert_one_of(&held, [one, new]);
            assert!(fs::read(&path).unwrap() == whole(new), "{next}");
        }
        drop(held);
        assert!(
            fs::read(&path).unwrap() == whole(new),
            "{next}: when nobody holds the old one"
        );
        mount.unmount();
    }
}

#[test]
fn regression_a_sparse_disk_that_becomes_a_flat_one_while_it_is_open() {
    if !need_fuse() {
        return;
    }
    let s = Switch::new();
    s.to("sparse.bin");
    let mount = mount(&s.scratch, &s.descriptor);
    let path = mount.file("disk");
    assert!(fs::read(&path).unwrap() == whole(&s.sparse));
    let held = File::open(&path).unwrap();
    for (next, new) in [("one.bin", &s.flats[0]), ("two.bin", &s.flats[1])] {
        s.to(next);
        let second = File::open(&path).unwrap_or_else(|e| panic!("{next}: {e}"));
        assert_one_of(&second, [new, new]);
        assert!(fs::read(&path).unwrap() == whole(new), "{next}");
        held.read_at(&mut [0; 4096], 0).unwrap();
    }
    drop(held);
    assert!(fs::read(&path).unwrap() == whole(&s.flats[1]));
    mount.unmount();
}

/// Where others may look in, owner and mode hold for them without a further option.
#[test]
fn regression_umask_holds_for_others() {
    if !need_fuse() || !need_root() {
        return;
    }
    let scratch = Scratch::new();
    scratch.open_to_all();
    let (open, _) = write_disk(&scratch.mkdir("images"), "raw", &version(1, DISK));
    for (option, allowed) in [
        ("allow_other,umask=077", false),
        ("allow_other,umask=022", true),
        ("allow_other", true),
    ] {
        let mount = scratch.mount().arg("-o").arg(option).file(&open).start();
        let outcome = Cmd::new("cat").arg(mount.file("disk.raw")).user(Some(STRANGER)).run();
        if allowed {
            outcome.ok();
        } else {
            outcome.expect_code(1).error_names(&["permission denied"]);
        }
        mount.unmount();
    }
}

/// A cache holds what was asked for or a few blocks, not some dozens of blocks however large they are.
///
/// The event loops and the stacks of all threads take 50 MiB of what is allowed here.
#[test]
fn regression_a_small_cache_stays_small() {
    if !need_fuse() || !need("prlimit") {
        return;
    }
    for (grain, blocks, memory) in [(128, 300, 64 << 20), (2048, 96, 96 << 20)] {
        let scratch = Scratch::new();
        let c = Ctx::new(&scratch.path("images"), 1).unwrap();
        let block = |n: u64| format!("{n:>16}").repeat((grain * SECTOR / 16) as usize).into_bytes();
        let empty = c.layer("disk", blocks * grain - 77, grain);
        let layer = (0..blocks)
            .filter(|n| n % 10 != 3)
            .fold(empty, |layer, n| layer.with_grain(n, block(n)));
        let made = c.stream_of(layer, "disk.vmdk", &Stream::default()).unwrap();
        let mount = scratch
            .mount()
            .arg("cache-size=1M")
            .memory(memory)
            .file(&made.path)
            .arg("name=disk")
            .start();
        let file = File::open(mount.file("disk")).unwrap();
        for n in [0..blocks, 0..blocks].into_iter().flatten() {
            let sectors = grain.min(made.layer.sectors() - n * grain);
            let mut seen = vec![0; (sectors * SECTOR) as usize];
            file.read_exact_at(&mut seen, n * grain * SECTOR)
                .unwrap_or_else(|e| panic!("block {n} of {grain}: {e}"));
            assert!(seen == made.layer.read(n * grain, sectors), "block {n} of {grain}");
        }
        drop(file);
        mount.unmount();
    }
}

#[test]
fn regression_the_time_of_the_image_is_followed() {
    if !need_fuse() {
        return;
    }
    for kind in KINDS {
        let scratch = Scratch::new();
        let (open, content) = write_disk(&scratch.mkdir("images"), kind, &version(1, DISK));
        let mount = mount(&scratch, &open);
        let path = mount.file("disk");
        fs::metadata(&path).unwrap();
        let times = [
            SystemTime::now() + Duration::from_secs(7200),
            SystemTime::now() + Duration::from_secs(3600),
        ];
        for time in times {
            let times = FileTimes::new().set_modified(time);
            File::options()
                .write(true)
                .open(&content)
                .unwrap()
                .set_times(times)
                .unwrap();
            let seen = || fs::metadata(&path).unwrap().modified().unwrap();
            assert!(
                poll_until(SOON, || seen() == time),
                "{kind}: {:?}, not {time:?}",
                seen()
            );
        }
        mount.unmount();
    }
}

/// A bad directory entry for a table far from the start, in both copies.
#[test]
fn regression_data_before_a_damaged_directory_entry_are_found() {
    if !need_fuse() {
        return;
    }
    const TABLE: u64 = 512 * 8;
    let scratch = Scratch::new();
    let c = Ctx::new(&scratch.path("images"), 1).unwrap();
    let made = c.simple_of(10 * TABLE, 8, &[2 * 512 + 8], &Hosted::lazy()).unwrap();
    for directory in [made.at.gd, made.at.rgd] {
        write::poke(&made.path, directory * SECTOR + 7 * 4, &0x00ff_ffffu32.to_le_bytes()).unwrap();
    }
    let mount = mount(&scratch, &made.path);
    let path = mount.file("disk");
    let bytes = |sectors: std::ops::Range<u64>| sectors.start * SECTOR..sectors.end * SECTOR;
    assert_eq!(
        data_ranges(&path),
        [bytes(2 * TABLE + 64..2 * TABLE + 72), bytes(7 * TABLE..8 * TABLE)]
    );
    let error = File::open(&path)
        .unwrap()
        .read_at(&mut [0; 4096], 7 * TABLE * SECTOR)
        .unwrap_err();
    assert_eq!(error.raw_os_error(), Some(libc::EIO), "{error}");
    assert!(read_range(&path, 0, (7 * TABLE * SECTOR) as usize) == made.layer.read(0, 7 * TABLE));
    assert!(read_range(&path, 8 * TABLE * SECTOR, 4096) == [0; 4096]);
    mount.unmount();
}

/// "or prints one clear error and returns 1"
#[test]
fn regression_a_disk_of_which_nothing_can_be_read_is_one_error() {
    if !need_fuse() {
        return;
    }
    let scratch = Scratch::new();
    let directory = Ctx::new(&scratch.path("directory"), 1).unwrap().simple().unwrap();
    for at in [directory.at.gd, directory.at.rgd] {
        write::poke(&directory.path, at * SECTOR, &0x00ff_ffffu32.to_le_bytes()).unwrap();
    }
    let table = Ctx::new(&scratch.path("table"), 1).unwrap().simple().unwrap();
    damage_table(&table.path, [table.at.tables[&0], table.at.rtables[&0]], 0..64);
    for (path, cause) in [
        (&directory.path, "grain directory entry 0"),
        (&table.path, "of grain table 0"),
    ] {
        for arg in ["-v", "-f"] {
            let outcome = scratch
                .mount()
                .arg("readonly=true")
                .arg("name=disk")
                .file(path)
                .refused(1);
            outcome.one_error(1, &[cause, "disk.vmdk", "byte"]);
            let outcome = scratch
                .mount()
                .arg("readonly=true")
                .arg(arg)
                .arg("name=disk")
                .file(path)
                .refused(1);
            let errors = outcome.stderr.lines().filter(|l| l.contains(cause)).count();
            assert_eq!(errors, 1, "{arg}: {outcome}");
        }
    }
    scratch.assert_no_mounts();
}

/// Lets entries of both copies of a table point past the end of the file.
fn damage_table(path: &Path, copies: [u64; 2], entries: std::ops::Range<u64>) {
    for at in copies {
        let bad = 0x7fff_ff80u32
            .to_le_bytes()
            .repeat((entries.end - entries.start) as usize);
        write::poke(path, at * SECTOR + entries.start * 4, &bad).unwrap();
    }
}

#[test]
fn regression_the_log_of_a_damaged_disk_is_short() {
    if !need_fuse() {
        return;
    }
    let scratch = Scratch::new();
    let c = Ctx::new(&scratch.path("images"), 1).unwrap();
    let made = c.simple_of(512 * 8, 8, &[0, 1, 2], &Hosted::default()).unwrap();
    damage_table(&made.path, [made.at.tables[&0], made.at.rtables[&0]], 2..512);
    let log = scratch.path("log");
    let mount = scratch
        .mount()
        .arg("readonly=true")
        .arg("--log-file")
        .arg(&log)
        .arg("cache=none")
        .arg("name=disk")
        .file(&made.path)
        .start();
    let path = mount.file("disk");
    let dd = Cmd::new("dd").args(["bs=4096", "conv=noerror,sync", "of=/dev/null"]);
    let outcome = dd.arg(format!("if={}", path.display())).run();
    assert!(
        outcome.stderr.contains("2+510 records in"),
        "not all the damage was read: {outcome}"
    );
    assert!(read_range(&path, 0, 4096) == made.layer.read(0, 8));
    mount.unmount();
    let text = fs::read_to_string(&log).unwrap();
    let lines = text.lines().count();
    assert!((2..=25).contains(&lines), "{lines} lines:\n{text}");
    assert!(text.contains("of grain table 0"), "{text}");
}
