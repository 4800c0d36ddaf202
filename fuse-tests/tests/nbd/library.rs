//! libnbd is loaded at run time: a machine without it, or with an older one, refuses NBD disks and nothing else.

use std::path::Path;

use fuse_tests::harness::{Cmd, Scratch, need, need_fuse, need_root, program};

/// Hides libnbd.so.0 from a mount namespace, and runs the rest of the script there: an overlay deletes it from its folder.
const WITHOUT_LIBNBD: &str = r#"
vmdkfuse=$1 scratch=$2
folder=$(dirname "$(cc -print-file-name=libnbd.so.0)")
mount -t tmpfs none "$scratch/hidden"
mkdir "$scratch/hidden/upper" "$scratch/hidden/work"
mknod "$scratch/hidden/upper/libnbd.so.0" c 0 0
mount -t overlay overlay -o "lowerdir=$folder,upperdir=$scratch/hidden/upper,workdir=$scratch/hidden/work" "$folder"
"#;

/// Runs `script` in a mount namespace without libnbd, with `$vmdkfuse` and `$scratch`.
fn without_libnbd(scratch: &Scratch, script: &str) -> Cmd {
    scratch.mkdir("hidden");
    Cmd::in_namespace()
        .args(["sh", "-euc", &format!("{WITHOUT_LIBNBD}{script}"), "sh"])
        .arg(program())
        .arg(scratch.root())
}

/// README: "Where it is not installed, NBD disks alone are refused, with the package to install."
#[test]
fn without_libnbd_local_disks_are_mounted_and_nbd_disks_are_refused() {
    if !need_root() || !need_fuse() || !need("cc") {
        return;
    }
    let scratch = Scratch::new();
    scratch.write("disk.img", vec![7; 8192]);
    scratch.mkdir("mnt");
    let script = r#"
        "$vmdkfuse" "$scratch/mnt" "file=$scratch/disk.img"
        cmp "$scratch/disk.img" "$scratch/mnt/disk.raw"
        "$vmdkfuse" --unmount "$scratch/mnt"
        "$vmdkfuse" --dump"#;
    let dump = without_libnbd(&scratch, script).run().ok().stdout;
    assert!(dump.lines().any(|line| line == "backends=native,https"), "{dump}");
    assert!(
        dump.contains("\nlibnbd_error=") && !dump.contains("\nlibnbd="),
        "{dump}"
    );

    for address in ["uri=nbd://127.0.0.1:1", "socket=/nowhere", "command=true"] {
        let mount = format!(r#""$vmdkfuse" "$scratch/mnt" {address}"#);
        without_libnbd(&scratch, &mount)
            .run()
            .one_error(1, &["libnbd.so.0", "libnbd0", "1.14"]);
    }
}

#[test]
fn an_older_libnbd_is_refused_with_the_function_that_it_lacks() {
    if !need("cc") {
        return;
    }
    let scratch = Scratch::new();
    let source = scratch.write("older.c", "void *nbd_create(void) { return 0; }\n");
    let library = scratch.path("libnbd.so.0");
    Cmd::new("cc")
        .args(["-shared", "-fPIC", "-o"])
        .arg(&library)
        .arg(&source)
        .run()
        .ok();
    let folder = library.parent().and_then(Path::to_str).unwrap();
    let list = Cmd::new(program()).args(["--list", "uri=nbd://127.0.0.1:1"]);
    list.env("LD_LIBRARY_PATH", folder)
        .run()
        .one_error(1, &["libnbd.so.0 has no function nbd_close, ", "1.14"]);
}
