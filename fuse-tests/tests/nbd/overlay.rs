//! Overlays over exports: each belongs to one address, and to one state of what is there.

use std::fs;
use std::path::Path;

use fuse_tests::harness::{MountCmd, Scratch, assert_same, cached_bytes, need, read_range};

use crate::{Server, noise, put, ready, vmdkfuse_with_socket};

/// Arguments of a captive nbdkit that shows `image`.
fn command<'s>(scratch: &'s Scratch, image: &Path) -> MountCmd<'s> {
    scratch
        .mount()
        .arg("command=nbdkit")
        .arg("arg=file")
        .arg(format!("arg={}", image.display()))
        .arg("name=d")
        .arg(format!("cow={}", scratch.path("o.vmdk").display()))
}

#[test]
fn an_overlay_over_a_command_is_refused_over_another_disk_or_other_arguments() {
    if !ready() {
        return;
    }
    let scratch = Scratch::new();
    let (a, b) = (
        scratch.write("a.img", noise(4 << 20, 1)),
        scratch.write("b.img", noise(4 << 20, 2)),
    );
    let patch = scratch.write("patch", vec![b'o'; 4096]);
    let mount = command(&scratch, &a).start();
    put(&patch, &mount.file("d"));
    mount.unmount();
    let text = String::from_utf8_lossy(&fs::read(scratch.path("o.vmdk")).unwrap()).into_owned();
    assert!(
        !text.contains("a.img"),
        "an argument may be a password and is not stored"
    );
    command(&scratch, &b)
        .refused(1)
        .one_error(1, &["o.vmdk", "is an overlay over"]);
    // The same address with another disk behind it: the command is the same, what it shows is not.
    let kept = fs::read(&a).unwrap();
    fs::write(&a, fs::read(&b).unwrap()).unwrap();
    command(&scratch, &a)
        .refused(1)
        .one_error(1, &["o.vmdk", "another disk", "degraded=cid"]);
    let mount = command(&scratch, &a).arg("degraded=cid").start();
    assert_eq!(read_range(&mount.file("d"), 0, 4096), vec![b'o'; 4096]);
    mount.unmount();
    fs::write(&a, kept).unwrap();
    command(&scratch, &a).start().unmount();
}

#[test]
fn an_overlay_over_an_export_is_refused_over_another_content_or_another_export() {
    if !ready() || !need("qemu-nbd") {
        return;
    }
    let scratch = Scratch::new();
    let disk = scratch.write("disk", noise(4 << 20, 3));
    let file = format!("file={}", disk.display());
    let server = Server::nbdkit(&scratch, &["file", &file]);
    let cow = format!("cow={}", scratch.path("o.vmdk").display());
    scratch.mount().arg(server.uri()).arg(&cow).start().unmount();
    scratch.mount().arg(server.uri()).arg(&cow).start().unmount();
    let other = scratch.mount().arg(server.uri()).arg(&cow).arg("export=b");
    other.refused(1).one_error(1, &["o.vmdk", "export b"]);
    // One changed block at the place of a superblock is enough.
    let mut bytes = fs::read(&disk).unwrap();
    bytes[(1 << 20) + 1024] ^= 1;
    fs::write(&disk, bytes).unwrap();
    let changed = scratch.mount().arg(server.uri()).arg(&cow);
    changed.refused(1).one_error(1, &["o.vmdk", "was changed since"]);
    // `--info` opens the pair too.
    let info = scratch.vmdkfuse().arg("--info").arg(server.uri()).arg(&cow).run();
    info.one_error(1, &["o.vmdk", "was changed since"]);
}

#[test]
fn an_overlay_over_a_passed_socket_belongs_to_the_disk_behind_it() {
    if !ready() {
        return;
    }
    let scratch = Scratch::new();
    let (a, b) = (
        scratch.write("a.img", noise(1 << 20, 7)),
        scratch.write("b.img", noise(1 << 20, 5)),
    );
    let cow = scratch.path("o.vmdk");
    let info = |image: &Path| {
        let server = Server::nbdkit(&scratch, &["file", &format!("file={}", image.display())]);
        let command = vmdkfuse_with_socket(&server)
            .args(["--info", "socket-fd=9"])
            .key("cow", &cow);
        command.run()
    };
    let server = Server::nbdkit(&scratch, &["file", &format!("file={}", a.display())]);
    let mount = vmdkfuse_with_socket(&server)
        .arg(scratch.mkdir("m"))
        .args(["socket-fd=9", "name=d"])
        .key("cow", &cow);
    mount.run().ok();
    scratch.vmdkfuse().arg("--unmount").arg(scratch.path("m")).run().ok();
    drop(server);
    info(&a).ok();
    info(&b).one_error(1, &["o.vmdk", "another disk"]);
}

#[test]
fn each_open_of_an_export_sees_the_writes_of_other_clients_also_below_an_overlay() {
    if !ready() {
        return;
    }
    let scratch = Scratch::new();
    let image = scratch.write("disk", noise(4 << 20, 4));
    let file = format!("file={}", image.display());
    let server = Server::nbdkit(&scratch, &["file", &file]);
    for (seed, cow) in [
        (5, None),
        (6, Some(format!("cow={}", scratch.path("o.vmdk").display()))),
    ] {
        let mount = scratch.mount().arg(server.uri()).arg("name=d").args(cow).start();
        assert_same(&mount.file("d"), &image);
        assert_eq!(cached_bytes(&mount.file("d")), 0, "{seed}");
        // In place: the server has the file open.
        let other = scratch.write("other", noise(4 << 20, seed));
        put(&other, &image);
        assert_same(&mount.file("d"), &image);
        mount.unmount();
    }
}
