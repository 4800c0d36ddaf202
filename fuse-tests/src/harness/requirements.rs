//! What a test needs from the machine, and the program under test.
//!
//! A missing tool skips the test with a line that cannot be overlooked; where `VMDKFUSE_REQUIRE=all` is set (as in
//! continuous integration) it fails instead, so that a green run there has run everything.

use std::env;
use std::ffi::OsStr;
use std::fs;
use std::path::{Path, PathBuf};

use super::cmd::Cmd;

/// The program under test: `VMDKFUSE_BIN`, else the newer one of `release/vmdkfuse` and `debug/vmdkfuse` in the target
/// directory that this test was built in. Building it is the caller's work (`make test` does it).
pub fn program() -> PathBuf {
    if let Some(path) = env::var_os("VMDKFUSE_BIN") {
        let path = PathBuf::from(path);
        assert!(
            path.is_file(),
            "VMDKFUSE_BIN names {}, which is no file",
            path.display()
        );
        return path;
    }
    // target/<profile>/deps/<test>-<hash>
    let test = env::current_exe().expect("the path of this test");
    let target = test
        .ancestors()
        .nth(3)
        .expect("a test lies three folders below the target directory")
        .to_path_buf();
    let built = ["release", "debug"].map(|profile| target.join(profile).join("vmdkfuse"));
    let newest = built
        .iter()
        .filter_map(|path| Some((fs::metadata(path).ok()?.modified().ok()?, path)))
        .max();
    match newest {
        Some((_, path)) => path.clone(),
        None => panic!(
            "no vmdkfuse in {}: run `cargo build` first, or set VMDKFUSE_BIN",
            target.display()
        ),
    }
}

/// Whether the program `tool` is there; if not, see the module.
pub fn need(tool: &str) -> bool {
    find(tool).is_some() || skip(&format!("{tool} is not installed"))
}

/// qemu-img and qemu-io, which belong together.
pub fn need_qemu() -> bool {
    need("qemu-img") && need("qemu-io")
}

/// Whether FUSE file systems can be mounted here.
pub fn need_fuse() -> bool {
    need("fusermount3") && (Path::new("/dev/fuse").exists() || skip("there is no /dev/fuse"))
}

/// Whether this is root.
pub fn need_root() -> bool {
    is_root() || skip("not root")
}

/// Whether this is root, asked without skipping anything.
pub fn is_root() -> bool {
    nix::unistd::geteuid().is_root()
}

/// Whether the kernel can read disks by itself that are no flat files: root, Linux 6.12.2, EROFS.
pub fn need_kernel_view() -> bool {
    const KERNEL: [u32; 3] = [6, 12, 2];
    let release = fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    let numbers: Vec<u32> = release
        .split(|c: char| !c.is_ascii_digit())
        .flat_map(str::parse)
        .take(3)
        .collect();
    let listed = || fs::read_to_string("/proc/filesystems").is_ok_and(|text| text.contains("\terofs\n"));
    // a module is loaded by the first mount
    let has_erofs =
        || listed() || (find("modprobe").is_some() && Cmd::new("modprobe").arg("erofs").run().ended.code == Some(0));
    need_root()
        && (numbers.as_slice() >= KERNEL.as_slice()
            || skip(&format!("Linux {} mounts no EROFS from files", release.trim())))
        && (has_erofs() || skip("the kernel has no EROFS"))
}

/// Whether every user may say `allow_other` here: `user_allow_other` in fuse.conf.
pub fn need_allow_other(wanted: bool) -> bool {
    let text = fs::read_to_string("/etc/fuse.conf").unwrap_or_default();
    let allowed = text.lines().any(|line| line.trim() == "user_allow_other");
    // Either state is a proper one, so this never fails: it only tells which half of a test applies.
    allowed == wanted
}

/// Says loudly that a test did not run, and answers false; a failure where everything is required.
pub fn skip(reason: &str) -> bool {
    let all = env::var("VMDKFUSE_REQUIRE").is_ok_and(|value| value == "all");
    let test = std::thread::current().name().unwrap_or("a test").to_owned();
    assert!(!all, "{test} cannot run and VMDKFUSE_REQUIRE=all: {reason}");
    eprintln!("SKIPPED: {test}: {reason}");
    false
}

/// The full path of a program, looked for where login shells and root look.
fn find(tool: &str) -> Option<PathBuf> {
    let path = env::var_os("PATH").unwrap_or_default();
    let dirs = env::split_paths(&path)
        .chain(["/usr/sbin", "/sbin"].map(PathBuf::from))
        .collect::<Vec<_>>();
    dirs.into_iter()
        .map(|dir| dir.join(OsStr::new(tool)))
        .find(|path| path.is_file())
}
