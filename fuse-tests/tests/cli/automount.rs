//! A real automount(8): it mounts at the first access, in its own process group, and unmounts what is idle.

use fuse_tests::harness::{Cmd, Scratch, need, need_fuse, need_root, program};

/// "Works behind automount(8)"
#[test]
fn automount_mounts_at_the_first_access_and_unmounts_an_idle_disk() {
    if !need_fuse() || !need_root() || !need("automount") {
        return;
    }
    let scratch = Scratch::new();
    let bytes: Vec<u8> = (0..1_u32 << 18).flat_map(u32::to_le_bytes).collect();
    scratch.write("a.img", bytes);
    Cmd::in_namespace()
        .args(["setsid", "-w", "sh", "-c"])
        .arg(include_str!("automount.sh"))
        .arg("automount.sh")
        .arg(scratch.root())
        .arg(program())
        .arg(concat!(
            env!("CARGO_MANIFEST_DIR"),
            "/../contrib/examples/auto.vmdkfuse"
        ))
        .run()
        .ok();
}
