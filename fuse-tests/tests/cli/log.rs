//! Where messages go: the system log in the background, standard error in the foreground.

use std::time::Duration;

use fuse_tests::harness::{Cmd, Scratch, need, need_fuse, need_root, poll_until, program};

/// "A background mount without `--log-file` logs to the system log"
#[test]
fn a_background_mount_logs_to_the_system_log() {
    if !need_fuse() || !need_root() || !need("python3") {
        return;
    }
    let scratch = Scratch::new();
    scratch.write("a.img", vec![7; 1 << 20]);
    let outcome = Cmd::in_namespace()
        .args(["sh", "-c"])
        .arg(include_str!("syslog.sh"))
        .arg("syslog.sh")
        .arg(scratch.root())
        .arg(program())
        .run()
        .ok();
    let unmounted = outcome.stdout.lines().last().unwrap_or_default();
    assert!(
        unmounted.starts_with("<30>vmdkfuse[") && unmounted.ends_with("]: unmounted"),
        "{outcome}"
    );
}

/// "`-f` says when the mount is ready"
#[test]
fn a_foreground_mount_says_when_it_is_ready() {
    if !need_fuse() {
        return;
    }
    let scratch = Scratch::new();
    scratch.write("a.img", vec![7; 1 << 20]);
    let mount = scratch.mount().file("a.img").foreground().start();
    let ready = format!("ready: {} (Ctrl-C unmounts)", mount.point().display());
    assert!(
        poll_until(Duration::from_secs(60), || mount.output().1.contains(&ready)),
        "{:?}",
        mount.output()
    );
    mount.unmount();
}
