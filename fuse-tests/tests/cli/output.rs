//! Output to a terminal, a log, a pipe: hostile names, bounded lists, closed pipes; and the files that the daemon writes
//! for the administrator.

use std::ffi::OsStr;
use std::fs::{self, File};
use std::io::Read;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileExt, PermissionsExt, symlink};
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::time::Duration;

use fuse_tests::harness::{Cmd, Scratch, need_fuse, program};
use nix::sys::stat::Mode;

/// A name that sets a terminal's title, starts a line of its own and turns the direction of writing.
const HOSTILE: &[u8] = b"a\x1b]0;PWNED\x07\nb.raw: clean\n\xc2\x9b31m\xe2\x80\xae\xff.vmdk";

/// Creates a small disk with a hostile name.
fn hostile(scratch: &Scratch) -> PathBuf {
    let text = "# Disk DescriptorFile\nversion=1\nCID=1\nparentCID=ffffffff\ncreateType=\"custom\"\nRW 8 ZERO\n";
    scratch.write(OsStr::from_bytes(HOSTILE), text)
}

/// Panics if text holds what a terminal would obey, or a line that a name has faked.
#[track_caller]
fn assert_harmless(what: &str, text: &str) {
    let obeyed = |c: char| (c.is_control() && c != '\n') || c == '\u{202e}';
    assert!(!text.contains(obeyed), "{what}: {text:?}");
    assert!(!text.lines().any(|line| line.starts_with("b.raw")), "{what}: {text:?}");
}

#[test]
fn a_hostile_name_is_escaped_in_every_text() {
    let scratch = Scratch::new();
    let disk = hostile(&scratch);
    for action in ["--check", "--info", "--map"] {
        let text = scratch.vmdkfuse().arg(action).key("file", &disk).run().ok();
        assert_harmless(action, &text.stdout);
        assert!(text.stdout.contains("\\u{1b}]0;PWNED"), "{text}");
        let json = scratch
            .vmdkfuse()
            .args([action, "--json"])
            .key("file", &disk)
            .run()
            .ok();
        assert_harmless(action, &json.stdout);
        let name = json.json()[0]["name"].as_str().unwrap().to_owned();
        assert!(name.contains("\u{1b}]0;PWNED\u{7}\nb.raw: clean\n\u{9b}"), "{name:?}");
    }
    fs::write(&disk, "# Disk DescriptorFile\nRW x\n").unwrap();
    for words in [
        &["--info"][..],
        &["--check"],
        &["--map"],
        &["mnt", "name=x"],
        &["--commit", "cow=none"],
    ] {
        scratch.mkdir("mnt");
        let refused = scratch.vmdkfuse().args(words).key("file", &disk).run();
        assert_ne!((refused.ended.code, words), (Some(0), &["--info"][..]), "{refused}");
        assert_harmless(words[0], &refused.stderr);
        assert_harmless(words[0], &refused.stdout);
    }
    let missing = scratch
        .vmdkfuse()
        .arg("--info")
        .arg(OsStr::from_bytes(b"\x1b]2J\nx"))
        .run();
    assert_harmless("a usage error", &missing.one_error(1, &["\\u{1b}]2j\\nx"]).stderr);
}

#[test]
fn a_hostile_name_is_escaped_in_the_log() {
    if !need_fuse() {
        return;
    }
    for format in ["text", "json"] {
        let scratch = Scratch::new();
        let disk = hostile(&scratch);
        let log = scratch.path("log");
        let mount = scratch.mount().file(&disk).arg("-vv").arg("--log-format").arg(format);
        let mount = mount.arg("--log-file").arg(&log).start();
        let name = OsStr::from_bytes(&[&HOSTILE[..HOSTILE.len() - 5], b".raw"].concat()).to_owned();
        let mut byte = [0];
        let file = File::open(mount.file(&name)).unwrap();
        file.read_exact_at(&mut byte, 0).unwrap();
        drop(file);
        mount.unmount();
        let text = fs::read_to_string(&log).unwrap();
        assert!(text.contains("PWNED"), "the log names the disk: {text}");
        assert_harmless("the log", &text);
        for line in text.lines() {
            let whole = match format {
                "json" => serde_json::from_str::<serde_json::Value>(line).is_ok(),
                _ => line.starts_with("20"),
            };
            assert!(whole, "{line}");
        }
    }
}

#[test]
fn the_map_of_a_hostile_image_ends_at_its_limit() {
    let scratch = Scratch::new();
    let disk = scratch.path("bomb.vmdk");
    alternating(&disk, 100);
    let text = scratch.vmdkfuse().arg("--map").arg(&disk).run().ok();
    assert!(text.stdout.len() < 60_000_000, "{} bytes", text.stdout.len());
    let last = text.stdout.lines().last().unwrap();
    assert!(
        last.contains("cut off after 1000000 ranges") && last.contains("limit=0"),
        "{last}"
    );
    let json = scratch
        .vmdkfuse()
        .args(["--map", "--json", "limit=10"])
        .arg(&disk)
        .run()
        .ok()
        .json();
    assert_eq!(json[0]["map"].as_array().unwrap().len(), 10);
    assert_eq!(
        (&json[0]["complete"], json[0]["next"].as_u64()),
        (&false.into(), Some(5120))
    );
    scratch.mkdir("mnt");
    scratch
        .vmdkfuse()
        .args(["mnt", "limit=10"])
        .arg(&disk)
        .run()
        .one_error(2, &["limit=", "--map"]);
}

/// Creates a sparse VMDK of `tables` × 65536 grains of one sector. All directory entries name the same table, in which
/// every second grain is allocated.
fn alternating(path: &std::path::Path, tables: u64) {
    let (entries, directory) = (65536, 8);
    let table = directory + (tables * 4).div_ceil(512);
    let data = table + entries * 4 / 512;
    let sectors = entries * tables;
    let mut header = vec![0; 512];
    let mut put = |at: usize, bytes: &[u8]| header[at..at + bytes.len()].copy_from_slice(bytes);
    put(0, b"KDMV\x01\0\0\0\x01\0\0\0");
    for (at, value) in [
        (12, sectors),
        (20, 1),
        (28, 1),
        (36, 2),
        (48, 0),
        (56, directory),
        (64, data),
    ] {
        put(at, &value.to_le_bytes());
    }
    put(44, &(entries as u32).to_le_bytes());
    put(73, b"\n \r\n");
    let text = format!(
        "# Disk DescriptorFile\nversion=1\nCID=1\nparentCID=ffffffff\ncreateType=\"monolithicSparse\"\nRW {sectors} SPARSE \"x\"\n"
    );
    let file = File::create(path).unwrap();
    let at = |sector: u64, bytes: &[u8]| file.write_all_at(bytes, sector * 512).unwrap();
    at(0, &header);
    at(1, text.as_bytes());
    at(directory, &(table as u32).to_le_bytes().repeat(tables as usize));
    let pair = [0u32.to_le_bytes(), (data as u32).to_le_bytes()].concat();
    at(table, &pair.repeat(entries as usize / 2));
    at(data, &[b'x'; 512]);
}

#[test]
fn a_closed_pipe_ends_every_list_silently() {
    let scratch = Scratch::new();
    let disk = scratch.path("bomb.vmdk");
    alternating(&disk, 100);
    for words in [
        &["--map"][..],
        &["--map", "--json"],
        &["--map", "limit=0"],
        &["--info"],
        &["--check"],
        &["--dump"],
        &["--help"],
    ] {
        let mut command = Command::new(program());
        command.args(words).current_dir(scratch.root());
        if !matches!(words[0], "--dump" | "--help") {
            command.arg(&disk);
        }
        let mut child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        drop(child.stdout.take());
        let mut stderr = String::new();
        child.stderr.take().unwrap().read_to_string(&mut stderr).unwrap();
        let code = child.wait().unwrap().code();
        // The image has overlapping grains, so the check has findings.
        let expected = if words[0] == "--check" { 4 } else { 0 };
        assert_eq!((code, stderr.as_str()), (Some(expected), ""), "{words:?}");
    }
}

#[test]
fn a_fifo_in_the_place_of_the_pidfile_does_not_hang_the_end_of_the_daemon() {
    if !need_fuse() {
        return;
    }
    let scratch = Scratch::new();
    scratch.write("x.img", vec![0; 4096]);
    let mount = scratch.mount().file("x.img").pidfile("pid").start();
    assert_eq!(
        fs::metadata(scratch.path("pid")).unwrap().permissions().mode() & 0o133,
        0
    );
    fs::remove_file(scratch.path("pid")).unwrap();
    nix::unistd::mkfifo(&scratch.path("pid"), Mode::S_IRWXU).unwrap();
    mount.unmount();
    assert!(scratch.path("pid").exists(), "the daemon removed what it did not write");
    let refused = scratch
        .mount()
        .file("x.img")
        .pidfile("pid")
        .without_pidfile()
        .arg("-P")
        .arg("pid")
        .refused(1);
    refused.one_error(1, &["pidfile", "not a regular file"]);
}

#[test]
fn links_in_the_place_of_pidfile_and_log_are_refused() {
    let scratch = Scratch::new();
    scratch.write("x.img", vec![0; 4096]);
    let victim = scratch.write("victim", "kept");
    symlink(&victim, scratch.path("link")).unwrap();
    scratch.mkdir("mnt");
    let log = scratch.vmdkfuse().args(["--log-file", "link", "mnt", "x.img"]).run();
    log.one_error(1, &["log file", "symbolic link"]);
    let fifo = scratch.path("fifo");
    nix::unistd::mkfifo(&fifo, Mode::S_IRWXU).unwrap();
    let log = Cmd::new(program())
        .dir(scratch.root())
        .deadline(Duration::from_secs(60));
    log.args(["--log-file", "fifo", "mnt", "x.img"])
        .run()
        .one_error(1, &["log file", "not a regular file"]);
    if need_fuse() {
        let pidfile = scratch.vmdkfuse().args(["-P", "link", "mnt", "x.img"]).run();
        pidfile.one_error(1, &["pidfile", "symbolic link"]);
        scratch.assert_no_mounts();
    }
    assert_eq!(fs::read_to_string(victim).unwrap(), "kept");
}
