//! Disks of a pretended server: parameters, extents, errors with their hints.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::time::Instant;

use fuse_tests::harness::{Cmd, MountCmd, Scratch, assert_same, data_ranges, poll_until, read_range};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::local::children;
use crate::{SOON, Vddk, counted, noise, ready, write_at};

pub(crate) const THUMBPRINT: &str = "00:11:22:33:44:55:66:77:88:99:aa:bb:cc:dd:ee:ff:00:11:22:33";

/// Name of the disk on the server.
pub(crate) const DISK: &str = "file=[ds] dir/x.vmdk";

/// Puts a disk on the pretended server.
pub(crate) fn put(vddk: &Vddk, bytes: &[u8]) -> std::path::PathBuf {
    let path = vddk.folder.join("ds/dir/x.vmdk");
    fs::create_dir_all(path.parent().unwrap()).unwrap();
    fs::write(&path, bytes).unwrap();
    path
}

/// Puts a disk of `len` bytes into the pretended server, of which no chunk is allocated. Returns its path.
pub(crate) fn put_sparse(vddk: &Vddk, len: u64) -> std::path::PathBuf {
    let disk = put(vddk, &[]);
    File::options().write(true).open(&disk).unwrap().set_len(len).unwrap();
    disk
}

/// Returns the keys that a remote disk needs at least.
pub(crate) fn login() -> [String; 5] {
    let thumbprint = format!("thumbprint={THUMBPRINT}");
    [
        "server=esx.example",
        "user=me",
        "password=hunter2",
        "vm=moref=vm-16",
        &thumbprint,
    ]
    .map(str::to_owned)
}

/// Sets what the pretended server expects, and more knobs.
pub(crate) fn expect(vddk: &Vddk, more: &[&str]) {
    let thumbprint = format!("thumbprint={THUMBPRINT}");
    let server = [
        "server=esx.example",
        "user=me",
        "password=hunter2",
        "vm=moref=vm-16",
        &thumbprint,
    ];
    vddk.set(&[&server, more].concat());
}

pub(crate) fn remote<'s>(vddk: &Vddk, scratch: &'s Scratch) -> MountCmd<'s> {
    let mount = login().iter().fold(vddk.mount(scratch), |mount, key| mount.arg(key));
    mount.arg(DISK)
}

#[test]
fn every_parameter_is_seen_by_the_library_as_given() {
    if !ready() {
        return;
    }
    let scratch = Scratch::new();
    let vddk = Vddk::new(&scratch, 8);
    expect(&vddk, &["cookie=session-cookie"]);
    let disk = put(&vddk, &noise(3 << 20, 1));
    let keys = [
        "port=4443",
        "nfchostport=9020",
        "cookie=session-cookie",
        "snapshot=snapshot-21",
        "transports=nbd:nbdssl",
        "compression=skipz",
        "unbuffered=yes",
        "vimapiver=8",
        "prepare-for-access=true",
        "-r",
    ];
    let mount = keys
        .iter()
        .fold(remote(&vddk, &scratch), |mount, key| mount.arg(key))
        .start();
    assert_eq!(mount.names(), ["x.raw"]);
    assert_same(&mount.file("x.raw"), &disk);
    mount.unmount();
    let params = format!(
        "server=esx.example vm=moref=vm-16 thumbprint={THUMBPRINT} cred=2:session-cookie:me:hunter2 port=4443 nfc=9020 \
         spec=0:NULL:NULL"
    );
    assert_eq!(
        vddk.calls_of("PrepareForAccess"),
        [format!("PrepareForAccess {params} identity=vmdkfuse")]
    );
    let connect = format!("ConnectEx {params} read_only=1 snapshot=snapshot-21 transports=nbd:nbdssl");
    assert_eq!(vddk.calls_of("ConnectEx"), [connect]);
    assert_eq!(vddk.calls_of("Open"), ["Open path=[ds] dir/x.vmdk flags=69"]);
    let calls = vddk.calls();
    let order = |name: &str| calls.iter().position(|line| line.starts_with(name)).unwrap();
    assert!(order("PrepareForAccess") < order("ConnectEx"), "{calls:?}");
    assert!(
        order("Close") < order("Disconnect") && order("Disconnect") < order("EndAccess"),
        "{calls:?}"
    );
    assert!(order("EndAccess") < order("Exit"), "{calls:?}");
}

#[test]
fn user_and_password_are_a_login_without_a_cookie_and_a_datastore_is_an_owner() {
    if !ready() {
        return;
    }
    let scratch = Scratch::new();
    let vddk = Vddk::new(&scratch, 9);
    expect(&vddk, &[]);
    let disk = put(&vddk, &noise(1 << 20, 1));
    let mount = remote(&vddk, &scratch).start();
    assert_same(&mount.file("x.raw"), &disk);
    mount.unmount();
    let call = &vddk.calls_of("ConnectEx")[0];
    assert!(
        call.contains("cred=1:me:hunter2 port=0 nfc=0 spec=0") && call.contains("read_only=0"),
        "{call}"
    );
    assert!(call.contains("snapshot=NULL transports=file:nbdssl:nbd"), "{call}");
    assert!(vddk.calls_of("PrepareForAccess").is_empty());
    let keys = [
        "server=esx.example",
        "user=me",
        "password=hunter2",
        "datastore=moref=datastore-7",
    ];
    let thumbprint = format!("thumbprint={THUMBPRINT}");
    let mount = keys.iter().fold(vddk.mount(&scratch), |mount, key| mount.arg(key));
    mount.arg(&thumbprint).arg(DISK).start().unmount();
    let call = &vddk.calls_of("ConnectEx")[1];
    assert!(
        call.contains("vm=NULL") && call.contains("spec=2:datastore-7:dir "),
        "{call}"
    );
}

#[test]
fn holes_are_those_of_the_library_except_where_the_mount_has_written() {
    if !ready() {
        return;
    }
    let scratch = Scratch::new();
    let vddk = Vddk::new(&scratch, 8);
    expect(&vddk, &[]);
    let disk = put(&vddk, &[]);
    // Two queries, and a part of a chunk at the end.
    let size = (3u64 << 30) + 512;
    File::options().write(true).open(&disk).unwrap().set_len(size).unwrap();
    write_at(&disk, 1 << 20, &noise(1 << 20, 1));
    write_at(&disk, 5 << 29, &noise(65536, 2));
    let mount = remote(&vddk, &scratch).arg("cache=none").start();
    let shown = mount.file("x.raw");
    let tail = size - size % 65536;
    let expected = [1 << 20..2 << 20, 5 << 29..(5 << 29) + 65536, tail..size];
    assert_eq!(data_ranges(&shown), expected);
    let file = File::options().write(true).open(&shown).unwrap();
    file.write_all_at(b"new", (1 << 30) + 7).unwrap();
    file.sync_all().unwrap();
    drop(file);
    assert_eq!(read_range(&shown, (1 << 30) + 7, 3), b"new");
    let written = (1 << 30)..(1 << 30) + 65536;
    assert_eq!(
        data_ranges(&shown),
        [1 << 20..2 << 20, written, 5 << 29..(5 << 29) + 65536, tail..size]
    );
    assert_eq!(
        read_range(&shown, (1 << 20) + 5, 1000),
        read_range(&disk, (1 << 20) + 5, 1000)
    );
    mount.unmount();
    let queries = vddk.calls_of("QueryAllocatedBlocks");
    assert_eq!(
        queries[0], "QueryAllocatedBlocks start=0 sectors=128 chunk=128",
        "it is tried out once"
    );
}

#[test]
fn without_extents_everything_is_data() {
    if !ready() {
        return;
    }
    let scratch = Scratch::new();
    let vddk = Vddk::new(&scratch, 8);
    expect(&vddk, &["fail=QueryAllocatedBlocks:1:9:6"]);
    put_sparse(&vddk, 8 << 20);
    let mount = remote(&vddk, &scratch).start();
    let whole = 0..8 << 20;
    assert_eq!(data_ranges(&mount.file("x.raw")), std::slice::from_ref(&whole));
    mount.unmount();
    assert_eq!(
        vddk.calls_of("QueryAllocatedBlocks").len(),
        1,
        "the library is asked once"
    );
}

/// The daemon ends after the disk, whatever thread uses it last.
#[test]
fn the_disk_is_closed_when_the_mount_has_ended_also_while_its_data_is_counted() {
    if !ready() {
        return;
    }
    let scratch = Scratch::new();
    let vddk = Vddk::new(&scratch, 8);
    expect(&vddk, &["query-latency=300000"]);
    put_sparse(&vddk, 8 << 30);
    let mount = remote(&vddk, &scratch).arg("-r").start();
    // Starts a count, which asks the library several times.
    fs::metadata(mount.file("x.raw")).unwrap();
    mount.unmount();
    for call in ["Close", "Disconnect", "Exit"] {
        assert_eq!(vddk.calls_of(call).len(), 1, "{call}: {:?}", vddk.calls());
    }
}

#[test]
fn errors_of_the_library_have_their_number_and_a_hint() {
    if !ready() {
        return;
    }
    let scratch = Scratch::new();
    let vddk = Vddk::new(&scratch, 8);
    put(&vddk, &noise(1 << 20, 1));
    for (knobs, words) in [
        (
            &["thumbprint=11"][..],
            &[
                "VixDiskLib_Open",
                "error 1)",
                "thumbprint=",
                THUMBPRINT,
                "--fingerprint",
            ][..],
        ),
        (&["password=other"], &["error 3047", "user= and password="]),
        (&["vm=moref=vm-1"], &["error 4000", "vm=moref=ID"]),
        (&["fail=Open:1:1:13"], &["error 13", "snapshot="]),
        (&["fail=ConnectEx:1:1:6"], &["error 6", "vSphere 6 to 9"]),
        (&["fail=Open:1:9:14009"], &["error 14009", "port 902", "DNS"]),
        (&["fail=GetInfo:1:1:16000"], &["error 16000", "fake error text 16000"]),
        // The error is known before the library hangs.
        (&["fail=GetInfo:1:1:16000", "hang=Close:1:always"], &["error 16000"]),
        (
            &["fail=Open:1:1:13", "error-text=3000"],
            &["error 13", "snapshot=moref"],
        ),
        (&["fail=InitEx:1:1:7"], &["VixDiskLib_InitEx", "error 7"]),
    ] {
        vddk.set(knobs);
        let mut words = words.to_vec();
        words.push("[ds] dir/x.vmdk");
        remote(&vddk, &scratch).refused(1).one_error(1, &words);
    }
    expect(&vddk, &[]);
    let message = ["[ds] none.vmdk", "error 4)"];
    let mount = login().iter().fold(vddk.mount(&scratch), |mount, key| mount.arg(key));
    mount.arg("file=[ds] none.vmdk").refused(1).one_error(1, &message);
    let missing = vddk
        .mount(&scratch)
        .arg("server=h")
        .arg("vm=moref=1")
        .arg(DISK)
        .refused(2);
    missing.one_error(2, &["needs user=, password= too"]);
    assert!(
        !vddk.calls().iter().any(|line| line.contains("server=h ")),
        "the library was called"
    );
}

#[test]
fn access_that_was_prepared_is_ended_also_if_the_disk_is_not_opened() {
    if !ready() {
        return;
    }
    let scratch = Scratch::new();
    let vddk = Vddk::new(&scratch, 8);
    put(&vddk, &noise(1 << 20, 1));
    let mount = || remote(&vddk, &scratch).arg("prepare-for-access=true");
    let failures = [
        "PrepareForAccess:1:1:7",
        "ConnectEx:1:1:7",
        "Open:1:1:7",
        "GetInfo:1:1:7",
    ];
    for (count, failure) in failures.into_iter().enumerate() {
        expect(&vddk, &[&format!("fail={failure}")]);
        mount().refused(1).one_error(1, &["error 7)"]);
        for function in ["EndAccess", "Cleanup", "Exit"] {
            assert_eq!(
                vddk.calls_of(function).len(),
                count + 1,
                "{failure}: {:?}",
                vddk.calls()
            );
        }
    }
    // A host whose daemon dies while it waits for its next attempt.
    expect(&vddk, &[]);
    let mut mount = mount().arg("cache=none").start();
    let host = children(mount.pid())[0];
    expect(&vddk, &["fail=Open:1:9:14014"]);
    let calls = |function: &str| vddk.calls_of(function).len();
    let disconnected = calls("Disconnect");
    kill(Pid::from_raw(host), Signal::SIGKILL).unwrap();
    let shown = mount.file("x.raw");
    let reader = std::thread::spawn(move || fs::read(shown));
    assert!(
        poll_until(SOON, || calls("Disconnect") > disconnected),
        "{:?}",
        vddk.calls()
    );
    mount.signal(Signal::SIGKILL);
    mount.wait_end();
    assert!(poll_until(SOON, || calls("Exit") == 5), "{:?}", vddk.calls());
    assert_eq!((calls("EndAccess"), calls("Cleanup")), (5, 5), "{:?}", vddk.calls());
    assert!(reader.join().unwrap().is_err());
}

#[test]
fn a_refused_login_is_not_repeated_at_once() {
    if !ready() {
        return;
    }
    let scratch = Scratch::new();
    let vddk = Vddk::new(&scratch, 8);
    put(&vddk, &noise(1 << 20, 1));
    expect(&vddk, &[]);
    let mount = remote(&vddk, &scratch).arg("cache=none").arg("timeout=4").start();
    vddk.set(&["password=changed"]);
    let started = Instant::now();
    kill(Pid::from_raw(children(mount.pid())[0]), Signal::SIGKILL).unwrap();
    for _ in 0..2 {
        // Ends after the timeout, in which a login without a pause would be tried about ten times.
        assert!(fs::read(mount.file("x.raw")).is_err());
    }
    let logins = vddk.calls_of("ConnectEx").len() as u64;
    // One before, one at once, and one after each pause of half a minute.
    let most = 2 + started.elapsed().as_secs() / 30;
    assert!((2..=most).contains(&logins), "{logins} of {most}: {:?}", vddk.calls());
    mount.unmount();
}

#[test]
fn network_errors_at_the_start_are_tried_again() {
    if !ready() {
        return;
    }
    let scratch = Scratch::new();
    let vddk = Vddk::new(&scratch, 8);
    let disk = put(&vddk, &noise(1 << 20, 1));
    expect(&vddk, &["fail=Open:1:2:14010", "fail=ConnectEx:1:1:18000"]);
    let mount = remote(&vddk, &scratch).start();
    assert_same(&mount.file("x.raw"), &disk);
    mount.unmount();
    assert_eq!(vddk.calls_of("Open").len(), 3);
    let calls = vddk.calls();
    assert_eq!(
        calls.iter().filter(|line| *line == "Disconnect").count(),
        3,
        "{calls:?}"
    );
}

#[test]
fn info_and_map_describe_a_disk() {
    let scratch = Scratch::new();
    let vddk = Vddk::new(&scratch, 8);
    expect(&vddk, &[]);
    put(&vddk, &noise(1 << 20, 1));
    let command = |action: &str| -> Cmd { vddk.command(&scratch).args([action, "--json"]).arg(vddk.libdir()) };
    let json = command("--info").args(login()).arg(DISK).run().ok().json();
    assert_eq!(
        (&json[0]["format"], &json[0]["size"]),
        (&"vddk".into(), &(1 << 20).into())
    );
    command("--map").args(login()).arg(DISK).run().ok();
}

/// "A disk of a server has a cache and a read-ahead; what is written updates it."
#[test]
fn a_disk_of_a_server_is_cached_and_read_ahead() {
    if !ready() {
        return;
    }
    for writable in [false, true] {
        assert_cached(writable);
    }
}

fn assert_cached(writable: bool) {
    let scratch = Scratch::new();
    let vddk = Vddk::new(&scratch, 8);
    expect(&vddk, &["latency=500"]);
    let disk = put(&vddk, &noise((24 << 20) + 1536, 1));
    let mut mount = remote(&vddk, &scratch).arg("cache=none");
    if !writable {
        mount = mount.arg("-r");
    }
    let mount = mount.start();
    let shown = mount.file("x.raw");
    assert_same(&shown, &disk);
    let reads = || counted(&mount, "VixDiskLib_ReadAsync").0;
    let before = reads();
    assert!(before >= 24 * 16, "blocks of 64 KiB: {before} reads");
    for at in [0, 5 << 20, (24 << 20) + 1000] {
        assert_eq!(read_range(&shown, at, 500), read_range(&disk, at, 500));
    }
    assert_eq!(reads(), before, "what was read is in memory");
    if writable {
        let file = File::options().read(true).write(true).open(&shown).unwrap();
        for (at, len) in [
            (0u64, 3usize),
            (65_530, 12),
            ((5 << 20) + 511, 70_001),
            ((24 << 20) + 1530, 6),
        ] {
            let bytes = noise(len, at);
            file.write_all_at(&bytes, at).unwrap();
            assert!(read_range(&shown, at, len) == bytes, "{len} bytes at {at}");
        }
        file.sync_all().unwrap();
        drop(file);
        // The session has sampled blocks of the disk before the first change.
        let before = reads();
        assert_same(&shown, &disk);
        assert_eq!(reads(), before, "writes update what is in memory");
    }
    mount.unmount();
}
