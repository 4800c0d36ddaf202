//! Fetched blocks are not fetched again: `cache-dir=`, `--prefetch`.

use std::fs;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use fuse_tests::harness::{
    MountCmd, Scratch, assert_same, assert_same_at_random, poll_until, program, raw_with_islands, read_range,
};

use crate::server::{SOON, Server, need_nginx};

const MIB: u64 = 1 << 20;

struct Fixture {
    scratch: Scratch,
    server: Server,
    /// The file on the server.
    file: PathBuf,
}

impl Fixture {
    fn new(bytes: u64) -> Self {
        let scratch = Scratch::new();
        let dir = scratch.mkdir("www");
        let file = dir.join("d.img");
        raw_with_islands(&file, bytes, 21);
        let server = Server::nginx(&scratch, &dir, "keepalive_requests 100000;");
        Self { scratch, server, file }
    }

    fn words(&self) -> Vec<String> {
        vec![
            self.server.url("d.img"),
            self.server.pin(),
            format!("cache-dir={}", self.cache().display()),
        ]
    }

    fn cache(&self) -> PathBuf {
        self.scratch.path("cache")
    }

    fn mount(&self) -> MountCmd<'_> {
        self.words().into_iter().fold(self.scratch.mount(), MountCmd::arg)
    }

    fn run(&self, action: &str, words: &[String]) -> fuse_tests::harness::Outcome {
        self.scratch.vmdkfuse().arg(action).args(words).run()
    }

    /// Returns the files of the cache that end with `ending`.
    fn cached(&self, ending: &str) -> Vec<PathBuf> {
        let files = fs::read_dir(self.cache()).unwrap().map(|entry| entry.unwrap().path());
        files
            .filter(|path| path.extension().is_some_and(|e| e == ending))
            .collect()
    }
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
    let listed = f
        .run("--list", &[format!("cache-dir={}", f.cache().display())])
        .ok()
        .stdout;
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
    let f = Fixture::new(size);
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
    assert!(sent <= size + size / 50, "{sent} of {size}");
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
