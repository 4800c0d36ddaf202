//! A `/dev` of the test's own, programs in C, and commands under the library.

use std::fs;
use std::path::{Path, PathBuf};

use fuse_tests::harness::{Cmd, Scratch, need, need_root, preload_library};

/// Replaces `/dev` in this mount namespace by a tmpfs with the usual nodes, the loop devices, and the links
/// `NAME=TARGET`; then runs the command.
const SCRIPT: &str = r#"
set -eu
dev=$1 links=$2
shift 2
mount -t tmpfs -o mode=755 none "$dev"
for node in null zero full random urandom loop-control /dev/loop*; do
  [ ! -e "/dev/${node#/dev/}" ] || cp -a "/dev/${node#/dev/}" "$dev"
done
ln -s /proc/self/fd "$dev/fd"
while IFS='=' read -r name target; do
  mkdir -p "$dev$(dirname "${name#/dev}")"
  ln -s "$target" "$dev${name#/dev}"
done <"$links"
mount --bind "$dev" /dev
exec env "$@"
"#;

/// One listed disk: its name, and what the name leads to.
#[derive(Debug, Clone)]
pub(crate) struct Listed {
    pub(crate) name: &'static str,
    pub(crate) target: PathBuf,
}

/// Returns true if these tests can run.
pub(crate) fn ready() -> bool {
    need_root() && need("unshare") && need("losetup") && need("cc")
}

/// Compiles a program in C that lies beside this file. It is linked with `libraries`.
#[track_caller]
pub(crate) fn compile(scratch: &Scratch, name: &str, libraries: &[&str]) -> PathBuf {
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join(format!("tests/bdwrapper/{name}.c"));
    let program = scratch.path(name);
    Cmd::new("cc")
        .args([
            "-std=gnu11",
            "-O1",
            "-Wall",
            "-Wextra",
            "-Wno-nonnull",
            "-pthread",
            "-o",
        ])
        .arg(&program)
        .arg(source)
        .args(libraries)
        .run()
        .ok();
    program
}

/// Returns a command that runs under the library, in a namespace whose `/dev` has these disks, all of them listed.
#[track_caller]
pub(crate) fn wrapped(scratch: &Scratch, disks: &[Listed], level: i32) -> Cmd {
    let list: Vec<&str> = disks.iter().map(|disk| disk.name).collect();
    in_namespace(scratch, disks)
        .arg(format!("LD_PRELOAD={}", preload_library().display()))
        .arg(format!("VMWARE_BDWRAPPER_DEVICES={}", list.join(":")))
        .arg(format!("VMWARE_BDWRAPPER_LOG_LEVEL={level}"))
}

/// Returns a command that runs in such a namespace without the library.
#[track_caller]
pub(crate) fn in_namespace(scratch: &Scratch, disks: &[Listed]) -> Cmd {
    let links: String = disks
        .iter()
        .map(|disk| format!("{}={}\n", disk.name, disk.target.display()))
        .collect();
    let links = scratch.write("links", links);
    let dev = scratch.mkdir("dev");
    Cmd::new("unshare")
        .args(["--mount", "--propagation", "private", "sh", "-c", SCRIPT, "sh"])
        .arg(dev)
        .arg(links)
}

/// Creates a file of this size without data.
#[track_caller]
pub(crate) fn sparse(scratch: &Scratch, name: &str, bytes: u64) -> PathBuf {
    let path = scratch.write(name, "");
    fs::OpenOptions::new()
        .write(true)
        .open(&path)
        .and_then(|file| file.set_len(bytes))
        .expect("a sparse file");
    path
}
