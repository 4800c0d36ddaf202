//! Local disks through the library: data, flushes, the order of the calls.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;

use fuse_tests::harness::{Cmd, Scratch, assert_same, is_running, need, poll_until};

use crate::{SOON, Vddk, noise, ready, statistics, write_at};

#[test]
fn a_disk_is_read_and_written_at_any_byte_and_durable_after_fsync() {
    if !ready() {
        return;
    }
    for (version, knob) in [
        (6, "transport=file"),
        (8, "transport=nbd"),
        (7, "callback=early"),
        (10, "order=reverse"),
    ] {
        let scratch = Scratch::new();
        let vddk = Vddk::new(&scratch, version);
        vddk.set(&[knob, "latency=100", &format!("version={version}")]);
        let disk = scratch.write("x.vmdk", noise(9 << 20, 1));
        let mirror = scratch.write("mirror", noise(9 << 20, 1));
        let mount = vddk.mount(&scratch).file("x.vmdk").start();
        assert_eq!(mount.names(), ["x.raw"]);
        let shown = mount.file("x.raw");
        assert_same(&shown, &mirror);
        let file = File::options().write(true).open(&shown).unwrap();
        for (at, len) in [
            (0u64, 1usize),
            (511, 2),
            (1_000_003, 70_001),
            (3 << 20, 5 << 20),
            ((9 << 20) - 5, 5),
        ] {
            let bytes = noise(len, at);
            file.write_all_at(&bytes, at).unwrap();
            write_at(&mirror, at, &bytes);
        }
        file.sync_all().unwrap();
        assert!(!vddk.calls_of("Flush").is_empty());
        assert_same(&disk, &mirror);
        drop(file);
        assert_same(&shown, &mirror);
        mount.unmount();
        assert_same(&disk, &mirror);
        let calls = vddk.calls();
        let order = |name: &str| calls.iter().position(|line| line.starts_with(name)).unwrap();
        assert!(
            order("InitEx") < order("ConnectEx") && order("ConnectEx") < order("Open"),
            "{calls:?}"
        );
        assert!(
            order("Close") < order("Disconnect") && order("Disconnect") < order("Exit"),
            "{calls:?}"
        );
        let expected = format!("Open path={} flags=0", disk.display());
        assert_eq!(vddk.calls_of("Open"), [expected]);
    }
}

#[test]
fn keys_of_local_disks_reach_the_library() {
    if !ready() {
        return;
    }
    let scratch = Scratch::new();
    let vddk = Vddk::new(&scratch, 8);
    scratch.write("x.vmdk", noise(1 << 20, 1));
    let keys = [
        "single-link=true",
        "unbuffered=true",
        "transports=file:nbd",
        "readonly=true",
        "vimapiver=6.0",
    ];
    let mount = keys
        .iter()
        .fold(vddk.mount(&scratch).file("x.vmdk"), |mount, key| mount.arg(key))
        .start();
    assert!(fs::metadata(mount.file("x.raw")).unwrap().permissions().readonly());
    mount.unmount();
    assert_eq!(
        vddk.calls_of("Open")[0].rsplit(' ').next(),
        Some("flags=7"),
        "{:?}",
        vddk.calls()
    );
    let connect = &vddk.calls_of("ConnectEx")[0];
    assert!(
        connect.contains("server=NULL") && connect.contains("transports=file:nbd"),
        "{connect}"
    );
    assert!(connect.contains("read_only=1"), "{connect}");
    let init = &vddk.calls_of("InitEx")[0];
    for part in [
        format!("InitEx 6.5 libdir={} ", vddk.libdir.display()),
        "tmpDirectory=\"/".into(),
        "vixDiskLib.nfcAio.Session.BufSizeIn64KB=16".into(),
        "vixDiskLib.nfcAio.Session.BufCount=4".into(),
    ] {
        assert!(init.contains(&part), "{init}");
    }
    let private = init.split("config=").nth(1).unwrap().split(' ').next().unwrap();
    assert!(
        !std::path::Path::new(private).exists(),
        "the private file is left: {private}"
    );
    let own = scratch.write("own.conf", "mine=1\n");
    let mount = vddk
        .mount(&scratch)
        .file("x.vmdk")
        .arg(format!("config={}", own.display()))
        .start();
    mount.unmount();
    let init = &vddk.calls_of("InitEx")[1];
    assert!(
        init.contains(&format!("config={} settings=mine=1", own.display())),
        "{init}"
    );
    assert!(vddk.calls_of("ConnectEx")[1].contains("transports=file:nbdssl:nbd"));
}

#[test]
fn a_disk_is_created_by_the_library() {
    if !ready() {
        return;
    }
    let scratch = Scratch::new();
    let vddk = Vddk::new(&scratch, 8);
    let keys = [
        "create=true",
        "create-size=8M",
        "create-type=vmfs-thin",
        "create-adapter-type=ide",
        "create-hwversion=esx65",
    ];
    let mount = keys
        .iter()
        .fold(vddk.mount(&scratch).file("new.vmdk"), |mount, key| mount.arg(key))
        .start();
    assert_eq!(fs::metadata(mount.file("new.raw")).unwrap().len(), 8 << 20);
    write_at(&mount.file("new.raw"), 5, b"data");
    mount.unmount();
    let file = scratch.path("new.vmdk");
    let expected = format!(
        "Create path={} type=7 adapter=1 hwversion=13 sectors=16384",
        file.display()
    );
    assert_eq!(vddk.calls_of("Create"), [expected]);
    assert_eq!(fs::read(&file).unwrap()[5..9], *b"data");
    let again = keys
        .iter()
        .fold(vddk.mount(&scratch).file("new.vmdk"), |mount, key| mount.arg(key));
    again
        .refused(1)
        .one_error(1, &["new.vmdk", "VixDiskLib_Create", "error 12"]);
    let command = vddk
        .command(&scratch)
        .arg("--create")
        .arg(vddk.libdir())
        .arg("create-size=1M");
    command.key("file", scratch.path("plain.vmdk")).run().ok();
    assert_eq!(fs::metadata(scratch.path("plain.vmdk")).unwrap().len(), 1 << 20);
}

#[test]
fn the_hosts_end_with_the_mount() {
    if !ready() || !need("fusermount3") {
        return;
    }
    let scratch = Scratch::new();
    let vddk = Vddk::new(&scratch, 8);
    scratch.write("a.vmdk", noise(1 << 20, 1));
    scratch.write("b.vmdk", noise(1 << 20, 2));
    let mut mount = vddk.mount(&scratch).file("a.vmdk").file("b.vmdk").start();
    let daemon = mount.pid();
    let hosts = children(daemon);
    assert_eq!(hosts.len(), 2, "a host for each disk");
    mount.signal(nix::sys::signal::Signal::SIGKILL);
    mount.wait_end();
    assert!(
        poll_until(SOON, || hosts.iter().all(|pid| !is_running(*pid))),
        "a host outlives its daemon"
    );
    assert_eq!(vddk.calls_of("Exit").len(), 2, "{:?}", vddk.calls());
    drop(mount);
    let outcome = Cmd::new("ls").arg(std::env::temp_dir()).run().ok();
    let folder = format!("vmdkfuse-{daemon}-");
    assert!(!outcome.stdout.contains(&folder), "{}", outcome.stdout);
}

/// Returns the child processes of `pid`.
pub(crate) fn children(pid: i32) -> Vec<i32> {
    let tasks = fs::read_dir(format!("/proc/{pid}/task")).unwrap();
    let of_task = |task: fs::DirEntry| fs::read_to_string(task.path().join("children")).unwrap_or_default();
    let text: String = tasks.flatten().map(of_task).collect();
    text.split_whitespace().map(|n| n.parse().unwrap()).collect()
}

#[test]
fn calls_of_the_library_are_counted_in_an_xattr_of_the_root_and_in_the_log() {
    if !ready() || !need("python3") {
        return;
    }
    let scratch = Scratch::new();
    let vddk = Vddk::new(&scratch, 8);
    vddk.set(&["crash=ReadAsync:5"]);
    let disk = scratch.write("x.vmdk", noise(8 << 20, 1));
    let log = scratch.path("log");
    let log_file = format!("--log-file={}", log.display());
    let mount = vddk.mount(&scratch).file("x.vmdk").arg("-v").arg(log_file).start();
    assert_same(&mount.file("x.raw"), &disk);
    let text = statistics(&mount);
    let mut lines = text.lines();
    assert_eq!(lines.next(), Some(disk.to_str().unwrap()));
    let line = |name: &str| text.lines().find(|line| line.starts_with(name)).unwrap().to_owned();
    assert!(
        line("VixDiskLib_InitEx").starts_with("VixDiskLib_InitEx calls 2 "),
        "also after a crash: {text}"
    );
    let read = line("VixDiskLib_ReadAsync");
    let bytes: u64 = read.split(' ').nth(4).unwrap().parse().unwrap();
    // Calls that the crash cut short are not counted.
    assert!(bytes >= 4 << 20 && read.contains(" microseconds "), "{read}");
    mount.unmount();
    let log = fs::read_to_string(log).unwrap();
    assert!(log.contains("VixDiskLib_Close calls 1 bytes 0 microseconds "), "{log}");
}
