//! Requirements of tests on the machine, and the path of the program under test.
//!
//! If a requirement is missing, the test prints a `SKIPPED` line and returns. If `VMDKFUSE_REQUIRE=all` is set, as in
//! continuous integration, the test fails instead, so that a successful run there has run every test.

use std::env;
use std::ffi::OsStr;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;
use std::time::Duration;

use super::cmd::Cmd;

/// Returns the path of the program under test.
///
/// This is `VMDKFUSE_BIN`, else the newer one of `release/vmdkfuse` and `debug/vmdkfuse` in the target directory that
/// this test was built in. The program must have been built before (`make test` does that).
pub fn program() -> PathBuf {
    if let Some(path) = env::var_os("VMDKFUSE_BIN") {
        let path = PathBuf::from(path);
        assert!(
            path.is_file(),
            "VMDKFUSE_BIN names {}, which is not a file",
            path.display()
        );
        return path;
    }
    let target = target_dir();
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

/// Returns the path of libvmware-bdwrapper: `BDWRAPPER_LIB`, else what cargo builds now.
///
/// It cannot be a dependency of the tests: a test would call the library's functions in place of those of C. And cargo
/// builds a library of its type neither for tests of another crate nor for those of its own.
pub fn preload_library() -> PathBuf {
    static LIBRARY: OnceLock<PathBuf> = OnceLock::new();
    let library = || built_library("BDWRAPPER_LIB", "vmware-bdwrapper", "libvmware_bdwrapper.so");
    LIBRARY.get_or_init(library).clone()
}

/// Returns the path of the stand-in for VMware's VDDK: `FAKE_VDDK_LIB`, else what cargo builds now.
pub fn fake_vddk_library() -> PathBuf {
    static LIBRARY: OnceLock<PathBuf> = OnceLock::new();
    let library = || built_library("FAKE_VDDK_LIB", "fake-vddk", "libvixDiskLib.so");
    LIBRARY.get_or_init(library).clone()
}

/// Returns the path in the environment variable `variable`, or else builds `package`, whose library is `file`.
fn built_library(variable: &str, package: &str, file: &str) -> PathBuf {
    /// A build takes seconds, but other builds in the same folder come first.
    const DEADLINE: Duration = Duration::from_secs(600);
    let path = env::var_os(variable).map_or_else(
        || {
            let target = target_dir();
            Cmd::new(env::var_os("CARGO").unwrap_or_else(|| "cargo".into()))
                .args([
                    "build",
                    "--quiet",
                    "--locked",
                    "--release",
                    "--package",
                    package,
                    "--target-dir",
                ])
                .arg(&target)
                .dir(env!("CARGO_MANIFEST_DIR"))
                .deadline(DEADLINE)
                .run()
                .ok();
            target.join("release").join(file)
        },
        PathBuf::from,
    );
    assert!(path.is_file(), "{} is not a file", path.display());
    path
}

/// Returns the target directory that this test was built in.
fn target_dir() -> PathBuf {
    // The test itself is target/<profile>/deps/<test>-<hash>.
    let test = env::current_exe().expect("the path of this test");
    test.ancestors()
        .nth(3)
        .expect("a test program is three levels below the target directory")
        .to_path_buf()
}

/// Returns true if the program `tool` is installed; otherwise skips or fails the test.
pub fn need(tool: &str) -> bool {
    find(tool).is_some() || skip(&format!("{tool} is not installed"))
}

/// Returns true if qemu-img and qemu-io are installed; otherwise skips or fails the test.
pub fn need_qemu() -> bool {
    need("qemu-img") && need("qemu-io")
}

/// Returns true if FUSE file systems can be mounted; otherwise skips or fails the test.
pub fn need_fuse() -> bool {
    need("fusermount3") && (Path::new("/dev/fuse").exists() || skip("/dev/fuse does not exist"))
}

/// Returns true if the test runs as root; otherwise skips or fails the test.
pub fn need_root() -> bool {
    is_root() || skip("not root")
}

/// Returns true if the test runs as root; never skips it.
pub fn is_root() -> bool {
    nix::unistd::geteuid().is_root()
}

/// Returns true if kernel views work here: root, Linux 6.12.2 or newer, EROFS. Otherwise skips or fails the test.
pub fn need_kernel_view() -> bool {
    const KERNEL: [u32; 3] = [6, 12, 2];
    let release = fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    let numbers: Vec<u32> = release
        .split(|c: char| !c.is_ascii_digit())
        .flat_map(str::parse)
        .take(3)
        .collect();
    let listed = || fs::read_to_string("/proc/filesystems").is_ok_and(|text| text.contains("\terofs\n"));
    // The kernel would load the module at the first mount; until then /proc/filesystems does not list it.
    let has_erofs =
        || listed() || (find("modprobe").is_some() && Cmd::new("modprobe").arg("erofs").run().ended.code == Some(0));
    need_root()
        && (numbers.as_slice() >= KERNEL.as_slice()
            || skip(&format!("Linux {} cannot mount EROFS from files", release.trim())))
        && (has_erofs() || skip("the kernel does not support EROFS"))
}

/// Returns true if `user_allow_other` in fuse.conf, which lets every user mount with `allow_other`, is `expected`.
pub fn need_allow_other(expected: bool) -> bool {
    let text = fs::read_to_string("/etc/fuse.conf").unwrap_or_default();
    let allowed = text.lines().any(|line| line.trim() == "user_allow_other");
    // Both settings are valid, so this never skips the test: it only selects the part of the test that applies.
    allowed == expected
}

/// Reports that a test is skipped, and returns false. Panics if `VMDKFUSE_REQUIRE=all` is set.
pub fn skip(reason: &str) -> bool {
    let all = env::var("VMDKFUSE_REQUIRE").is_ok_and(|value| value == "all");
    let test = std::thread::current().name().unwrap_or("a test").to_owned();
    assert!(!all, "{test} cannot run and VMDKFUSE_REQUIRE=all: {reason}");
    eprintln!("SKIPPED: {test}: {reason}");
    false
}

/// Returns the full path of a program, looked up in `PATH`, `/usr/sbin` and `/sbin`.
fn find(tool: &str) -> Option<PathBuf> {
    let path = env::var_os("PATH").unwrap_or_default();
    let dirs = env::split_paths(&path)
        .chain(["/usr/sbin", "/sbin"].map(PathBuf::from))
        .collect::<Vec<_>>();
    dirs.into_iter()
        .map(|dir| dir.join(OsStr::new(tool)))
        .find(|path| path.is_file())
}
