//! Fetched blocks are not fetched again: `cache-dir=`, `--prefetch`.

use std::fs;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use fuse_tests::harness::{
    Cmd, MountCmd, Outcome, Scratch, assert_same, assert_same_at_random, need, need_fuse, need_qemu, need_root,
    poll_until, program, raw_with_islands, read_range,
};

use crate::datastore::chain;
use crate::server::{Fake, SOON, Server, need_nginx, send_right};

pub(crate) const MIB: u64 = 1 << 20;

pub(crate) struct Fixture {
    pub(crate) scratch: Scratch,
    pub(crate) server: Server,
    /// The file on the server.
    pub(crate) file: PathBuf,
}

impl Fixture {
    pub(crate) fn new(bytes: u64) -> Self {
        Self::with(bytes, "")
    }

    /// Creates a server with more lines in its configuration.
    fn with(bytes: u64, extra: &str) -> Self {
        let scratch = Scratch::new();
        let dir = scratch.mkdir("www");
        let file = dir.join("d.img");
        raw_with_islands(&file, bytes, 21);
        let server = Server::nginx(&scratch, &dir, &format!("keepalive_requests 100000; {extra}"));
        Self { scratch, server, file }
    }

    pub(crate) fn words(&self) -> Vec<String> {
        vec![
            self.server.url("d.img"),
            self.server.pin(),
            format!("cache-dir={}", self.cache().display()),
        ]
    }

    pub(crate) fn cache(&self) -> PathBuf {
        self.scratch.path("cache")
    }

    pub(crate) fn mount(&self) -> MountCmd<'_> {
        self.words().into_iter().fold(self.scratch.mount(), MountCmd::arg)
    }

    pub(crate) fn run(&self, action: &str, words: &[String]) -> fuse_tests::harness::Outcome {
        self.scratch.vmdkfuse().arg(action).args(words).run()
    }

    /// Returns what the folder holds.
    pub(crate) fn listed(&self) -> String {
        let of_folder = [format!("cache-dir={}", self.cache().display())];
        self.run("--list", &of_folder).ok().stdout
    }

    /// Returns the files of the cache that end with `ending`.
    pub(crate) fn cached(&self, ending: &str) -> Vec<PathBuf> {
        let files = fs::read_dir(self.cache()).unwrap().map(|entry| entry.unwrap().path());
        files
            .filter(|path| path.extension().is_some_and(|e| e == ending))
            .collect()
    }
}

#[test]
fn a_server_that_never_answers_for_the_headers_alone_is_read_all_the_same() {
    if !need_fuse() {
        return;
    }
    let scratch = Scratch::new();
    let content: Vec<u8> = (0..MIB).map(|n| (n / 4096) as u8).collect();
    let of_server = content.clone();
    let server = Fake::start(move |ask, stream| match ask.head.starts_with("HEAD ") {
        // Ends with the test.
        true => loop {
            std::thread::park();
        },
        false => send_right(ask, &of_server, stream),
    });
    let cache = format!("cache-dir={}", scratch.path("cache").display());
    for _ in 0..2 {
        let mount = scratch
            .mount()
            .arg(server.url("d.img"))
            .arg(&cache)
            .arg("timeout=600")
            .start();
        assert_eq!(read_range(&mount.file("d.raw"), 0, content.len()), content);
        mount.unmount();
    }
}

#[test]
fn a_server_that_refuses_requests_for_the_headers_alone_sends_a_byte_to_a_second_mount() {
    if !need_nginx() {
        return;
    }
    let f = Fixture::with(MIB, "if ($request_method = HEAD) { return 405; }");
    f.run("--prefetch", &f.words()).ok();
    let sent = f.server.sent();
    let mount = f.mount().start();
    assert_same(&mount.file("d.raw"), &f.file);
    mount.unmount();
    assert_eq!(f.server.sent(), sent + 1, "{:#?}", f.server.log());
}

#[test]
fn a_prefetch_of_an_empty_file_has_nothing_to_do() {
    if !need_nginx() {
        return;
    }
    let f = Fixture::new(MIB);
    fs::write(&f.file, "").unwrap();
    f.run("--prefetch", &f.words()).ok();
}

/// A file that could not be opened for want of descriptors was taken for a leftover.
#[test]
fn regression_a_check_with_few_descriptors_removes_no_cached_file() {
    if !need_nginx() || !need("prlimit") {
        return;
    }
    const FILES: usize = 40;
    let f = Fixture::new(MIB);
    let names: Vec<String> = (0..FILES).map(|n| format!("d{n}.img")).collect();
    for name in &names {
        fs::copy(&f.file, f.file.with_file_name(name)).unwrap();
    }
    let mut words = f.words().split_off(1);
    words.extend(names.iter().map(|name| f.server.url(name)));
    f.run("--prefetch", &words).ok();
    let of_folder = format!("cache-dir={}", f.cache().display());
    for action in ["--check", "--list"] {
        let limited = Cmd::new("prlimit").arg("--nofile=32:32").arg(program());
        let shown = limited.args([action, &of_folder]).run().ok().stdout;
        assert_eq!(shown.lines().count(), FILES, "{action}: {shown}");
    }
    assert_eq!(f.cached("map").len(), FILES);
}

#[test]
fn a_second_mount_costs_no_byte_of_the_disk() {
    if !need_nginx() {
        return;
    }
    let f = Fixture::new(24 * MIB);
    let mount = f.mount().start();
    assert_same(&mount.file("d.raw"), &f.file);
    mount.unmount();
    let sent = f.server.sent();
    assert!((24 * MIB..25 * MIB).contains(&sent), "{sent}");
    let mount = f.mount().start();
    assert_same(&mount.file("d.raw"), &f.file);
    assert_same_at_random(&mount.file("d.raw"), &f.file, 4, 200);
    mount.unmount();
    assert_eq!(f.server.sent(), sent, "{:#?}", f.server.log());
    let listed = f.listed();
    assert!(listed.contains("d.img") && listed.contains("complete"), "{listed}");
}

#[test]
fn a_changed_file_is_fetched_anew() {
    if !need_nginx() {
        return;
    }
    let f = Fixture::new(4 * MIB);
    let mount = f.mount().start();
    assert_same(&mount.file("d.raw"), &f.file);
    mount.unmount();
    raw_with_islands(&f.file, 4 * MIB, 22);
    let later = std::time::SystemTime::now() + std::time::Duration::from_secs(10);
    fs::File::options()
        .write(true)
        .open(&f.file)
        .unwrap()
        .set_modified(later)
        .unwrap();
    let mount = f.mount().start();
    assert_same(&mount.file("d.raw"), &f.file);
    mount.unmount();
}

#[test]
fn a_new_snapshot_leaves_the_blocks_of_its_base() {
    if !need_nginx() || !need_qemu() {
        return;
    }
    let f = Fixture::new(MIB);
    let (dir, expected) = (f.file.parent().unwrap(), f.scratch.path("expected.raw"));
    chain(&f.scratch, dir, &expected);
    let read_all = |name: &str| {
        let words = [vec![f.server.url(name)], f.words()[1..].to_vec()].concat();
        let mount = words.into_iter().fold(f.scratch.mount(), MountCmd::arg).start();
        let file = mount.file(name.replace("%20", " ").replace(".vmdk", ".raw"));
        let content = fs::read(file).unwrap();
        mount.unmount();
        content
    };
    read_all("snap%201.vmdk");
    let before = f.server.sent();
    assert!(before > 12 * MIB, "{before}");
    let newest = read_all("snap%20[2].vmdk");
    assert_eq!(newest, fs::read(&expected).unwrap());
    // The descriptors name the snapshots below; of the base's 24 MiB no byte is sent again.
    let snapshot = fs::metadata(dir.join("snap [2].vmdk")).unwrap().len();
    let sent = f.server.sent() - before;
    assert!(sent <= snapshot + MIB / 8, "{sent} bytes for a snapshot of {snapshot}");
}

#[test]
fn a_damaged_cache_is_noticed_and_gives_the_right_bytes() {
    if !need_nginx() {
        return;
    }
    let f = Fixture::new(8 * MIB);
    let words = f.words();
    f.run("--prefetch", &words).ok();
    let of_folder = [words[2].clone()];
    f.run("--check", &of_folder).ok();
    let damages: [fn(&Path); 3] = [
        |data| {
            let file = fs::File::options().write(true).open(data).unwrap();
            (0..40).for_each(|n| file.write_all_at(b"damage", n * 200_003).unwrap());
        },
        |data| {
            fs::File::options()
                .write(true)
                .open(data)
                .unwrap()
                .set_len(3 * MIB + 5)
                .unwrap();
        },
        |data| fs::write(data.with_extension("map"), "a foreign file").unwrap(),
    ];
    for (number, damage) in damages.iter().enumerate() {
        damage(&f.cached("data")[0]);
        if number == 0 {
            f.run("--check", &of_folder).expect_code(4);
        }
        let mount = f.mount().start();
        assert_same(&mount.file("d.raw"), &f.file);
        mount.unmount();
    }
    f.run("--check", &of_folder).ok();
}

#[test]
fn a_prefetch_that_was_killed_goes_on_where_it_was_and_twice_is_free() {
    if !need_nginx() {
        return;
    }
    let size = 512 * MIB;
    // Three seconds at least, with eight connections: it is killed in the middle also where this thread has to wait.
    let f = Fixture::with(size, "limit_rate 20m;");
    let mut killed = Command::new(program())
        .arg("--prefetch")
        .args(f.words())
        .stdout(Stdio::null())
        .spawn()
        .unwrap();
    assert!(poll_until(SOON, || f.server.sent() > size / 4));
    killed.kill().unwrap();
    killed.wait().unwrap();
    assert!(f.server.sent() < size, "it was killed in the middle");
    f.run("--prefetch", &f.words()).ok();
    let sent = f.server.sent();
    // What was in flight comes once more: the read-ahead of 40 MiB at most. A start from the beginning would cost a quarter.
    assert!(sent <= size + 48 * MIB, "{sent} of {size}");
    f.run("--prefetch", &f.words()).ok();
    assert_eq!(f.server.sent(), sent);
    let mount = f.mount().start();
    assert_same_at_random(&mount.file("d.raw"), &f.file, 4, 300);
    mount.unmount();
    assert_eq!(f.server.sent(), sent);
}

#[test]
fn two_processes_share_what_either_fetches() {
    if !need_nginx() {
        return;
    }
    let size = 64 * MIB;
    let f = Fixture::new(size);
    f.scratch.mkdir("second");
    let (one, two) = (f.mount().start(), f.mount().at("second").start());
    std::thread::scope(|scope| {
        for mount in [&one, &two] {
            scope.spawn(|| assert_same(&mount.file("d.raw"), &f.file));
        }
    });
    let sent = f.server.sent();
    assert!(sent <= size + size / 20, "{sent} of {size}");
    assert_eq!(
        read_range(&one.file("d.raw"), 0, 4096),
        read_range(&two.file("d.raw"), 0, 4096)
    );
    one.unmount();
    two.unmount();
    f.run("--check", &[f.words()[2].clone()]).ok();
}

#[test]
fn folders_that_others_may_use_and_disks_elsewhere_are_refused() {
    if !need_nginx() {
        return;
    }
    let f = Fixture::new(MIB);
    f.scratch.mkdir("cache");
    fs::set_permissions(f.cache(), std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
    f.mount().refused(1).error_names(&["cache-dir=", "chmod 700"]);
    let local = f.scratch.mount().arg(&f.file).arg(&f.words()[2]).refused(2);
    local.error_names(&["cache-dir=", "web servers"]);
    let no_folder = f.run("--prefetch", &f.words()[..2]);
    assert!(no_folder.stderr.contains("needs cache-dir="), "{}", no_folder.stderr);
}

#[test]
fn a_prefetch_that_keeps_nothing_fails_and_says_why() {
    if !need_nginx() || !need_root() {
        return;
    }
    let f = Fixture::new(8 * MIB);
    let with = |word: &str| [f.words(), vec![word.to_owned()]].concat();
    let limited = f.run("--prefetch", &with("cache-dir-size=1M"));
    limited.one_error(1, &["d.img", "cache-dir-size=1048576", "raise it"]);
    // A mount only keeps less.
    let mount = f.mount().arg("cache-dir-size=1M").start();
    assert_same(&mount.file("d.raw"), &f.file);
    mount.unmount();
    fs::remove_dir_all(f.cache()).unwrap();
    f.scratch.mkdir("cache");
    Cmd::new("mount")
        .args(["-t", "tmpfs", "-o", "size=2m,mode=700", "none"])
        .arg(f.cache())
        .run()
        .ok();
    f.run("--prefetch", &f.words())
        .one_error(1, &["d.img", "cache-dir=", "No space left"]);
    let mount = f.mount().start();
    assert_same(&mount.file("d.raw"), &f.file);
    mount.unmount();
    let unversioned = Fixture::with(MIB, "etag off; add_header Last-Modified \"\";");
    let refused = unversioned.run("--prefetch", &unversioned.words());
    refused.one_error(1, &["d.img", "neither ETag nor Last-Modified"]);
}

/// Runs the program, and returns the bytes of all its reads.
fn bytes_read(words: &[String]) -> u64 {
    let mut child = Command::new(program())
        .arg("--prefetch")
        .args(words)
        .stdout(Stdio::null())
        .spawn()
        .unwrap();
    let pid = nix::unistd::Pid::from_raw(child.id() as i32);
    // Its counters can be read until it is waited for.
    let flags = nix::sys::wait::WaitPidFlag::WEXITED | nix::sys::wait::WaitPidFlag::WNOWAIT;
    nix::sys::wait::waitid(nix::sys::wait::Id::Pid(pid), flags).unwrap();
    let io = fs::read_to_string(format!("/proc/{pid}/io")).unwrap();
    assert!(child.wait().unwrap().success());
    let line = io.lines().find_map(|line| line.strip_prefix("rchar: "));
    line.unwrap().parse().unwrap()
}

#[test]
fn a_prefetch_of_complete_files_reads_none_of_them() {
    if !need_nginx() {
        return;
    }
    let f = Fixture::new(16 * MIB);
    f.run("--prefetch", &f.words()).ok();
    let again = bytes_read(&f.words());
    assert!(again < 4 * MIB, "{again}");
}

#[test]
fn opening_a_disk_writes_nothing_that_is_there() {
    if !need_nginx() {
        return;
    }
    // A server that answers no HEAD is asked for the first blocks at each open.
    let f = Fixture::with(4 * MIB, "if ($request_method = HEAD) { return 405; }");
    f.run("--prefetch", &f.words()).ok();
    let state = || {
        let state = fs::metadata(&f.cached("data")[0]).unwrap();
        (state.mtime(), state.mtime_nsec(), state.ctime(), state.ctime_nsec())
    };
    let before = state();
    f.mount().start().unmount();
    assert_eq!(state(), before);
    assert!(f.listed().contains("complete"), "{}", f.listed());
}

#[test]
fn check_removes_leftovers_and_what_exceeds_the_size() {
    if !need_nginx() {
        return;
    }
    let f = Fixture::new(4 * MIB);
    f.run("--prefetch", &f.words()).ok();
    let of_folder = f.words()[2].clone();
    let half = f.cache().join(format!("{}.data", "0123456789abcdef".repeat(2)));
    fs::write(&half, "of a crash").unwrap();
    let checked = f.run("--check", std::slice::from_ref(&of_folder)).ok().stdout;
    assert!(
        checked.contains("128 blocks, 0 damaged") && checked.contains("leftovers removed: 1"),
        "{checked}"
    );
    assert!(!half.exists() && f.listed().contains("complete"));
    let limited = [of_folder, "cache-dir-size=1M".to_owned()];
    f.run("--list", &limited)
        .error_names(&["cache-dir-size= is for --check"]);
    let checked = f.run("--check", &limited).ok().stdout;
    assert!(checked.contains("removed"), "{checked}");
    assert!(f.cached("data").is_empty() && f.cached("map").is_empty());
}

#[test]
fn a_prefetch_shows_its_progress_on_a_terminal() {
    if !need_nginx() || !need("script") {
        return;
    }
    let f = Fixture::new(16 * MIB);
    // Some MiB, but not all: how far the read-ahead comes is left to chance.
    let mount = f.mount().arg("readahead=0").start();
    read_range(&mount.file("d.raw"), 0, 3 << 20);
    mount.unmount();
    let shown = prefetch_on_a_terminal(&f.words()).ok().stdout;
    let last = shown.rsplit('\r').find(|line| line.contains('%')).unwrap();
    assert!(
        last.contains("] 100 %, 16 of 16 MiB, ") && last.contains("MiB/s, 0 s left"),
        "{shown}"
    );
    assert!(last.contains("MiB were there)"), "{shown}");
}

#[test]
fn regression_an_error_after_progress_on_a_terminal_starts_a_line() {
    if !need_nginx() || !need("script") {
        return;
    }
    let f = Fixture::new(16 * MIB);
    let words = [f.words(), vec!["cache-dir-size=8M".to_owned()]].concat();
    let shown = prefetch_on_a_terminal(&words).expect_code(1).stdout;
    assert!(shown.contains(" of 16 MiB"), "no progress was shown: {shown}");
    assert!(shown.contains("\nvmdkfuse: "), "{shown:?}");
}

#[test]
fn a_long_prefetch_shows_its_progress_in_a_log() {
    if !need_nginx() {
        return;
    }
    // 14 s at least: eight connections of 120 KiB a second, and one second's worth at once.
    let f = Fixture::with(16 * MIB, "limit_rate 120k;");
    let outcome = f.run("--prefetch", &f.words()).ok();
    let lines: Vec<&str> = outcome.stderr.lines().collect();
    assert!(!lines.is_empty() && lines.len() <= 100, "{outcome}");
    let is_progress = |line: &&str| line.contains(" %, ") && line.contains(" of 16 MiB, ") && line.ends_with(" left");
    assert!(lines.iter().all(is_progress), "{outcome}");
}

/// Runs `--prefetch` with a terminal as its standard output and standard error. All output is on standard output.
fn prefetch_on_a_terminal(words: &[String]) -> Outcome {
    let shell_words = words.iter().map(|word| format!("'{word}'")).collect::<Vec<_>>();
    let command = format!("{} --prefetch {}", program().display(), shell_words.join(" "));
    Cmd::new("script").args(["-qec", &command, "/dev/null"]).run()
}
