//! "The raw file behaves like a disk": guarantees to every reader of the raw file.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read};
use std::os::unix::fs::{FileExt, FileTypeExt, MetadataExt, OpenOptionsExt, PermissionsExt, symlink};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, SystemTime};

use fuse_tests::harness::{
    Aligned, Cmd, Mount, Scratch, assert_same, assert_same_at_random, data_ranges, map_bytes, need, need_fuse,
    need_qemu, poll_until, qemu_data_ranges, qemu_img, raw_with_islands, read_range, sha256,
};
use nix::libc;

/// Size of the disk in bytes; not a multiple of the grain size.
const SIZE: u64 = (20 << 20) + 512 * 77;

/// One original in three types of image; the mount shows them as `sparse.raw`, `stream.raw` and `flat.raw`.
struct Disks {
    mount: Mount,
    scratch: Scratch,
    raw: PathBuf,
}

/// Names in the mount of [`Disks`].
const NAMES: [&str; 3] = ["sparse.raw", "stream.raw", "flat.raw"];

/// Creates and mounts the images; returns `None` if the machine cannot.
fn disks(options: &[&str]) -> Option<Disks> {
    if !need_fuse() || !need_qemu() {
        return None;
    }
    let scratch = Scratch::new();
    let raw = scratch.path("original");
    raw_with_islands(&raw, SIZE, 11);
    for (name, subformat) in [
        ("sparse", "monolithicSparse"),
        ("stream", "streamOptimized"),
        ("flat", "monolithicFlat"),
    ] {
        let (out, option) = (scratch.path(format!("{name}.vmdk")), format!("subformat={subformat}"));
        qemu_img([
            "convert",
            "-f",
            "raw",
            "-O",
            "vmdk",
            "-o",
            &option,
            raw.to_str().unwrap(),
            out.to_str().unwrap(),
        ]);
    }
    // Mounted read-only, since the tests change the images underneath and qemu reads them at the same time.
    let start = options
        .iter()
        .fold(scratch.mount().arg("readonly=true"), |mount, option| mount.arg(option));
    let mount = start.file("sparse.vmdk").file("stream.vmdk").file("flat.vmdk").start();
    Some(Disks { mount, scratch, raw })
}

impl Disks {
    /// Returns the path of one of [`NAMES`].
    fn path(&self, name: &str) -> PathBuf {
        self.mount.file(name)
    }
}

/// Panics unless the call failed with `EROFS` or `EPERM`, as on a disk that cannot be changed.
#[track_caller]
fn refused<T>(what: &str, result: io::Result<T>) {
    match result.map_err(|e| (e.raw_os_error(), e)) {
        Ok(_) => panic!("{what} succeeded on a read-only mount"),
        Err((Some(libc::EROFS | libc::EPERM), _)) => {}
        Err((_, e)) => panic!("{what}: {e}"),
    }
}

#[test]
fn attributes_are_those_of_the_disk_and_its_image() {
    let Some(disks) = disks(&[]) else { return };
    for name in NAMES {
        let seen = fs::metadata(disks.path(name)).unwrap();
        let image = fs::metadata(disks.scratch.path(name.replace(".raw", ".vmdk"))).unwrap();
        assert!(seen.is_file() && !seen.file_type().is_block_device(), "{name}");
        assert_eq!(seen.len(), SIZE, "{name}");
        assert_eq!(
            (seen.uid(), seen.gid()),
            (image.uid(), image.gid()),
            "{name}: the owner is the mounting user"
        );
        assert_eq!(seen.mode() & 0o111, 0, "{name}: mode {:o}", seen.mode());
        assert_eq!(seen.mode() & 0o400, 0o400, "{name}: mode {:o}", seen.mode());
        assert_eq!(seen.nlink(), 1, "{name}");
        if name != "flat.raw" {
            assert_eq!(
                (seen.mtime(), seen.mtime_nsec()),
                (image.mtime(), image.mtime_nsec()),
                "{name}: mtime"
            );
        }
    }
    let dir = fs::metadata(disks.mount.point()).unwrap();
    assert!(dir.is_dir() && dir.mode() & 0o500 == 0o500, "mode {:o}", dir.mode());
}

#[test]
fn uid_gid_and_umask_are_applied() {
    let Some(disks) = disks(&["-o", "uid=1234,gid=4321,umask=037"]) else {
        return;
    };
    for path in [disks.path("sparse.raw"), disks.mount.point().to_owned()] {
        let seen = fs::metadata(&path).unwrap();
        assert_eq!((seen.uid(), seen.gid()), (1234, 4321), "{}", path.display());
        assert_eq!(seen.mode() & 0o037, 0, "{}: mode {:o}", path.display(), seen.mode());
        assert_eq!(seen.mode() & 0o440, 0o440, "{}: mode {:o}", path.display(), seen.mode());
    }
}

/// "st_blocks = allocated"
#[test]
fn st_blocks_counts_allocated_bytes() {
    let Some(disks) = disks(&[]) else { return };
    let data: u64 = qemu_data_ranges(&disks.scratch.path("sparse.vmdk"), "vmdk")
        .iter()
        .map(|r| r.end - r.start)
        .sum();
    let seen = || fs::metadata(disks.path("sparse.raw")).unwrap().blocks() * 512;
    // Until all tables are counted the daemon reports an estimate, and the kernel caches the attributes for a moment.
    let counted = poll_until(Duration::from_secs(60), || seen() == data);
    assert!(counted, "sparse: {} bytes allocated, not {data}", seen());
    assert!(data < SIZE, "the image has no holes, so the test shows nothing");
    let stream = || fs::metadata(disks.path("stream.raw")).unwrap().blocks() * 512;
    let counted = poll_until(Duration::from_secs(60), || stream() < SIZE);
    assert!(counted && stream() > 0, "stream: {} bytes", stream());
}

#[test]
fn statfs_reports_a_full_file_system() {
    let Some(disks) = disks(&[]) else { return };
    let seen = nix::sys::statvfs::statvfs(disks.mount.point()).unwrap();
    let bytes = seen.blocks() * seen.fragment_size();
    assert!(bytes >= SIZE * 3, "{bytes} bytes in all");
    assert_eq!((seen.blocks_free(), seen.blocks_available()), (0, 0));
    assert!(seen.name_max() >= 255, "{}", seen.name_max());
    Cmd::new("df").arg(disks.mount.point()).run().ok();
}

#[test]
fn seek_hole_and_data_agree_with_qemu() {
    let Some(disks) = disks(&[]) else { return };
    for name in ["sparse", "stream"] {
        let expected = qemu_data_ranges(&disks.scratch.path(format!("{name}.vmdk")), "vmdk");
        assert_eq!(data_ranges(&disks.path(&format!("{name}.raw"))), expected, "{name}");
    }
    // The holes of a flat image are those that its file system reports; a hole must not contain data.
    let flat = data_ranges(&disks.path("flat.raw"));
    let original = fs::read(&disks.raw).unwrap();
    let mut at = 0;
    for (start, end) in flat.iter().map(|range| (range.start, range.end)).chain([(SIZE, SIZE)]) {
        let hole = &original[at as usize..start as usize];
        assert!(hole.iter().all(|byte| *byte == 0), "data in the hole {at}..{start}");
        at = end;
    }
}

/// "reading past the end gives 0 bytes"
#[test]
fn reads_at_the_end_are_short_and_reads_past_it_empty() {
    let Some(disks) = disks(&[]) else { return };
    for name in NAMES {
        let file = File::open(disks.path(name)).unwrap();
        let mut buf = [1; 8192];
        assert_eq!(file.read_at(&mut buf, SIZE - 100).unwrap(), 100, "{name}");
        assert_eq!(file.read_at(&mut buf, SIZE).unwrap(), 0, "{name}");
        assert_eq!(file.read_at(&mut buf, SIZE + 12345).unwrap(), 0, "{name}");
        assert_eq!(file.read_at(&mut buf, 1 << 62).unwrap(), 0, "{name}");
    }
}

#[test]
fn whole_files_are_correct_by_every_read_path() {
    let Some(disks) = disks(&[]) else { return };
    let expected = fs::read(&disks.raw).unwrap();
    for name in NAMES {
        let path = disks.path(name);
        assert_same(&path, &disks.raw);
        assert!(map_bytes(&path) == expected, "{name} by mmap");
        assert!(by_sendfile(&path) == expected, "{name} by sendfile");
        assert!(by_odd_reads(&path) == expected, "{name} by reads of 4099 bytes");
    }
}

/// Reads a file through sendfile(2), which the standard library uses to copy from a file to a socket.
fn by_sendfile(path: &Path) -> Vec<u8> {
    let (mut ours, mut theirs) = UnixStream::pair().unwrap();
    let reader = thread::spawn(move || {
        let mut seen = Vec::new();
        theirs.read_to_end(&mut seen).map(|_| seen)
    });
    io::copy(&mut File::open(path).unwrap(), &mut ours).unwrap();
    drop(ours);
    reader.join().unwrap().unwrap()
}

/// Reads a file sequentially in unaligned pieces of 4099 bytes.
fn by_odd_reads(path: &Path) -> Vec<u8> {
    let mut file = File::open(path).unwrap();
    let (mut seen, mut buf) = (Vec::new(), [0; 4099]);
    loop {
        match file.read(&mut buf).unwrap() {
            0 => return seen,
            n => seen.extend_from_slice(&buf[..n]),
        }
    }
}

#[test]
fn aligned_and_unaligned_direct_reads_are_correct() {
    let Some(disks) = disks(&[]) else { return };
    let expected = fs::read(&disks.raw).unwrap();
    for name in NAMES {
        let file = OpenOptions::new()
            .read(true)
            .custom_flags(libc::O_DIRECT)
            .open(disks.path(name))
            .unwrap();
        let mut buf = Aligned::new(1 << 20);
        for start in (0..SIZE).step_by(1 << 20) {
            let n = file.read_at(buf.bytes(), start).unwrap();
            let len = (SIZE - start).min(1 << 20) as usize;
            assert_eq!(n, len, "{name} at {start}");
            assert!(buf.bytes()[..n] == expected[start as usize..][..n], "{name} at {start}");
        }
        if name == "flat.raw" {
            // The kernel may read a flat file by passthrough; then the alignment rules of its file system apply.
            continue;
        }
        for (start, len) in [(1, 1), (511, 2), (513, 70_001), (65_535, 131_073), (SIZE - 3, 3)] {
            let bytes = &mut buf.bytes()[1..=len];
            assert_eq!(file.read_at(bytes, start).unwrap(), len, "{name} at {start}");
            assert!(
                bytes == &expected[start as usize..][..len],
                "{name}: {len} bytes at {start}"
            );
        }
    }
}

#[test]
fn eight_concurrent_readers_read_correctly() {
    let Some(disks) = disks(&["cache=none"]) else { return };
    thread::scope(|scope| {
        for reader in 0..8 {
            let disks = &disks;
            scope.spawn(move || {
                let name = NAMES[reader % NAMES.len()];
                assert_same_at_random(&disks.path(name), &disks.raw, reader as u64, 150);
            });
        }
    });
}

#[test]
fn random_reads_are_correct() {
    let Some(disks) = disks(&[]) else { return };
    for name in NAMES {
        assert_same_at_random(&disks.path(name), &disks.raw, 3, 400);
    }
}

/// "creating, renaming or removing files EPERM (EROFS on a read-only mount)"
#[test]
fn nothing_can_be_changed() {
    for options in [&[][..], &["-r"], &["-o", "ro"]] {
        let Some(disks) = disks(options) else { return };
        let (path, new) = (disks.path("sparse.raw"), disks.path("new"));
        let before = sha256(&disks.scratch.path("sparse.vmdk"));
        refused("opening for writing", OpenOptions::new().write(true).open(&path));
        refused(
            "opening for reading and writing",
            OpenOptions::new().read(true).write(true).open(&path),
        );
        refused("opening to append", OpenOptions::new().append(true).open(&path));
        refused("truncating at open", File::create(&path));
        refused("creating", File::create(&new));
        refused("creating a folder", fs::create_dir(&new));
        refused("creating a symbolic link", symlink("x", &new));
        refused("creating a hard link", fs::hard_link(&path, &new));
        refused(
            "creating a FIFO",
            nix::unistd::mkfifo(&new, nix::sys::stat::Mode::S_IRWXU).map_err(io::Error::from),
        );
        refused("renaming", fs::rename(&path, &new));
        refused("removing", fs::remove_file(&path));
        refused(
            "changing the mode",
            fs::set_permissions(&path, fs::Permissions::from_mode(0o777)),
        );
        refused("changing the owner", std::os::unix::fs::chown(&path, Some(1), Some(1)));
        refused("truncating", nix::unistd::truncate(&path, 0).map_err(io::Error::from));
        refused(
            "growing",
            nix::unistd::truncate(&path, SIZE as i64 + 512).map_err(io::Error::from),
        );
        assert_eq!(disks.mount.names(), ["flat.raw", "sparse.raw", "stream.raw"]);
        assert_eq!(sha256(&disks.scratch.path("sparse.vmdk")), before);
    }
}

#[test]
fn missing_names_are_not_found() {
    let Some(disks) = disks(&[]) else { return };
    let long = "x".repeat(255);
    for name in ["nothing", "sparse", "sparse.raw.x", "SPARSE.RAW", &long] {
        assert_eq!(
            fs::metadata(disks.path(name)).unwrap_err().kind(),
            io::ErrorKind::NotFound,
            "{name}"
        );
    }
    let below = fs::metadata(disks.path("sparse.raw/x")).unwrap_err();
    assert_eq!(below.raw_os_error(), Some(libc::ENOTDIR));
}

/// Writes into a file and sets its mtime two seconds into the future, as a later writer would.
fn change(path: &Path, offset: u64, bytes: &[u8]) {
    let file = OpenOptions::new().write(true).open(path).unwrap();
    file.write_all_at(bytes, offset).unwrap();
    let later = file.metadata().unwrap().modified().unwrap().max(SystemTime::now()) + Duration::from_secs(2);
    file.set_modified(later).unwrap();
}

/// "Kernel cache kept across opens while the image has not changed underneath": when it has, a new open sees it.
#[test]
fn a_new_open_sees_changes_of_the_image() {
    let Some(disks) = disks(&[]) else { return };
    let marker = *b"changed underneath";
    let original = fs::read(&disks.raw).unwrap();
    for (name, file) in [("flat.raw", "flat-flat.vmdk"), ("sparse.raw", "sparse.vmdk")] {
        let path = disks.path(name);
        for _ in 0..2 {
            assert!(fs::read(&path).unwrap() == original, "{name}");
        }
        // The first sectors are data; their bytes locate them in the image file.
        let image = disks.scratch.path(file);
        let stored = fs::read(&image).unwrap();
        let at = stored
            .windows(64)
            .position(|window| window == &original[..64])
            .expect("the first sector in the image");
        change(&image, at as u64, &marker);
        assert_eq!(read_range(&path, 0, marker.len()), marker, "{name} after the change");
        assert_eq!(
            read_range(&path, 64, 448),
            original[64..512],
            "{name} beside the change"
        );
    }
}

/// Returns the bytes of the file in the page cache. `fincore` opens the file itself, as any later reader would.
fn cached_bytes(path: &Path) -> u64 {
    let out = Cmd::new("fincore")
        .args(["--bytes", "--noheadings", "--output", "RES"])
        .arg(path)
        .run()
        .ok();
    out.stdout.trim().parse().expect("a number of bytes")
}

#[test]
fn the_page_cache_survives_opens_until_the_image_changes() {
    if !need("fincore") {
        return;
    }
    // Pages that the kernel reads through a kernel view are cached elsewhere.
    let Some(disks) = disks(&["kernel-view=off"]) else {
        return;
    };
    for (name, file) in [("sparse.raw", "sparse.vmdk"), ("stream.raw", "stream.vmdk")] {
        let path = disks.path(name);
        fs::read(&path).unwrap();
        assert!(
            cached_bytes(&path) > SIZE / 2,
            "{name} was read and closed, but its pages are not cached"
        );
        assert!(
            cached_bytes(&path) > SIZE / 2,
            "{name} was opened again, and its pages were dropped"
        );
        OpenOptions::new()
            .append(true)
            .open(disks.scratch.path(file))
            .unwrap()
            .set_modified(SystemTime::now())
            .unwrap();
        assert_eq!(
            cached_bytes(&path),
            0,
            "the image of {name} changed, but its pages are still cached"
        );
    }
}

#[test]
fn cache_none_reads_the_image_every_time() {
    let Some(disks) = disks(&["cache=none"]) else { return };
    let marker = *b"changed underneath";
    let file = File::open(disks.path("flat.raw")).unwrap();
    let mut seen = [0; 18];
    file.read_exact_at(&mut seen, 4096).unwrap();
    assert_ne!(seen, marker);
    change(&disks.scratch.path("flat-flat.vmdk"), 4096, &marker);
    file.read_exact_at(&mut seen, 4096).unwrap();
    assert_eq!(seen, marker);
}

#[test]
fn cp_and_dd_copy_the_disk() {
    let Some(disks) = disks(&[]) else { return };
    let copy = disks.scratch.path("copy");
    for name in NAMES {
        let path = disks.path(name);
        for sparse in ["auto", "always", "never"] {
            Cmd::new("cp")
                .arg(format!("--sparse={sparse}"))
                .arg(&path)
                .arg(&copy)
                .run()
                .ok();
            assert_same(&copy, &disks.raw);
        }
        let dd = |words: &[&str]| {
            Cmd::new("dd")
                .key("if", &path)
                .key("of", &copy)
                .arg("status=none")
                .args(words)
                .run()
                .ok()
        };
        for words in [&["bs=1M"][..], &["bs=4k", "iflag=direct"], &["bs=65537"]] {
            if name == "flat.raw" && words.contains(&"iflag=direct") {
                continue;
            }
            dd(words);
            assert_same(&copy, &disks.raw);
        }
        fs::remove_file(&copy).unwrap();
        dd(&["bs=512", "skip=777", "count=3"]);
        assert_eq!(
            fs::read(&copy).unwrap(),
            read_range(&disks.raw, 777 * 512, 3 * 512),
            "{name}"
        );
        fs::remove_file(&copy).unwrap();
    }
}

/// cp finds holes with SEEK_DATA: the copy allocates hardly more than the data.
#[test]
fn cp_keeps_the_holes() {
    let Some(disks) = disks(&[]) else { return };
    let copy = disks.scratch.path("copy");
    let path = disks.path("sparse.raw");
    Cmd::new("cp").arg(&path).arg(&copy).run().ok();
    let data: u64 = data_ranges(&path).iter().map(|range| range.end - range.start).sum();
    // The file system may round each island up to whole blocks.
    let bound = data + 65536 * data_ranges(&path).len() as u64;
    let taken = fs::metadata(&copy).unwrap().blocks() * 512;
    assert!(taken <= bound, "the copy takes {taken} bytes for {data} bytes of data");
}

#[test]
fn qemu_reads_the_raw_file() {
    let Some(disks) = disks(&[]) else { return };
    let raw = disks.raw.to_str().unwrap();
    let copy = disks.scratch.path("copy");
    for name in NAMES {
        let path = disks.path(name);
        let path = path.to_str().unwrap();
        let image = disks.scratch.path(name.replace(".raw", ".vmdk"));
        let compared = qemu_img(["compare", "-f", "raw", "-F", "vmdk", path, image.to_str().unwrap()]);
        assert!(compared.stdout.contains("identical"), "{compared}");
        qemu_img(["compare", "-f", "raw", "-F", "raw", path, raw]);
        qemu_img(["convert", "-f", "raw", "-O", "raw", path, copy.to_str().unwrap()]);
        assert_same(&copy, &disks.raw);
        if name != "flat.raw" {
            assert_eq!(
                qemu_data_ranges(Path::new(path), "raw"),
                qemu_data_ranges(&image, "vmdk"),
                "{name}"
            );
        }
    }
}

/// A damaged grain causes an I/O error in its own range only.
#[test]
fn a_damaged_grain_is_an_io_error_in_its_range_only() {
    let Some(disks) = disks(&[]) else { return };
    let (good, bad) = (disks.scratch.path("sparse.vmdk"), disks.scratch.path("bad.vmdk"));
    let mut image = fuse_tests::harness::Hosted::read(&good);
    let grain = image.first_stored();
    image.set_entry(grain, 0x7000_0000);
    image.write(&bad);
    let mount = disks.scratch.mount().at("mnt2").arg("readonly=true").file(&bad);
    disks.scratch.mkdir("mnt2");
    let mount = mount.start();
    let file = File::open(mount.file("bad.raw")).unwrap();
    let mut buf = [0; 512];
    let at = grain as u64 * 65536;
    for offset in [at, at + 65536 - 512] {
        assert_eq!(
            file.read_at(&mut buf, offset).unwrap_err().raw_os_error(),
            Some(libc::EIO),
            "at {offset}"
        );
    }
    let last = SIZE - 512;
    file.read_exact_at(&mut buf, last).unwrap();
    assert_eq!(buf.to_vec(), read_range(&disks.raw, last, 512));
    drop(file);
    mount.unmount();
}
