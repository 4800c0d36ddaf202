//! The interface of the library, by code that is not of this project: a C program that knows only byte offsets, nbdkit's
//! stand-in library, and nbdkit's plugin.

use std::fs;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use fuse_tests::harness::{Cmd, Scratch, assert_same, data_ranges, need, poll_until};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::remote::{expect, put_sparse};
use crate::{SOON, Vddk, noise, ready, write_at};

fn source(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/vddk").join(name)
}

#[test]
fn structures_have_the_offsets_of_the_public_interface() {
    if !need("gcc") {
        return;
    }
    let scratch = Scratch::new();
    let vddk = Vddk::new(&scratch, 8);
    let program = scratch.path("layout");
    let warnings = ["-Wall", "-Wextra", "-Werror", "-O1"];
    Cmd::new("gcc")
        .args(warnings)
        .arg(source("layout.c"))
        .arg("-o")
        .arg(&program)
        .arg("-ldl")
        .run()
        .ok();
    let sectors: Vec<u8> = (0..2048u32).flat_map(|sector| [sector as u8; 512]).collect();
    let (disk, new) = (scratch.write("disk", sectors), scratch.path("new"));
    let command = Cmd::new(&program).arg(vddk.library(8)).arg(disk).arg(&new);
    command.env("FAKE_VDDK", vddk.folder.to_str().unwrap()).run().ok();
    let connects = vddk.calls_of("ConnectEx");
    let server = "ConnectEx server=server vm=";
    let login = "thumbprint=thumb cred=2:cookie:user:key port=443 nfc=902";
    let modes = "read_only=1 snapshot=snap transports=nbd";
    assert_eq!(
        connects[0],
        format!("{server}moref=vm-1 {login} spec=0:NULL:NULL {modes}")
    );
    assert!(
        connects[1].starts_with(&format!("{server}NULL {login} spec=2:store:folder ")),
        "{connects:?}"
    );
    let expected = format!(
        "Create path={} type=7 adapter=3 hwversion=13 sectors=4096",
        new.display()
    );
    assert_eq!(vddk.calls_of("Create"), [expected]);
}

#[test]
fn the_stand_in_of_nbdkit_is_served() {
    if !ready() || !need("gcc") {
        return;
    }
    let scratch = Scratch::new();
    let libdir = scratch.mkdir("libdir");
    let library = libdir.join("libvixDiskLib.so.6");
    let command = Cmd::new("gcc")
        .args(["-shared", "-fPIC", "-O1", "-pthread", "-I"])
        .arg(source("nbdkit/plugin/plugins/vddk"))
        .arg(source("nbdkit/dummy-vddk.c"));
    command.arg("-o").arg(&library).run().ok();
    let libdir = format!("libdir={}", libdir.display());
    let mount = scratch.mount().arg(&libdir).file("any.vmdk").start();
    let shown = mount.file("any.raw");
    assert_eq!(fs::metadata(&shown).unwrap().len(), 1024 * 512);
    let mut expected = vec![0; 1024 * 512];
    let bytes = crate::noise(100_000, 3);
    write_at(&shown, 777, &bytes);
    expected[777..777 + bytes.len()].copy_from_slice(&bytes);
    let copy = scratch.write("copy", expected);
    assert_same(&shown, &copy);
    mount.unmount();
    let dump = scratch.vmdkfuse().arg("--dump").arg(&libdir).run().ok();
    assert!(
        dump.stdout.contains("vddk_library_version=6") && dump.stdout.contains("VixDiskLib_Wait=1"),
        "{dump}"
    );
}

/// nbdkit with its plugin for VDDK. Killed on drop.
struct Nbdkit {
    child: Child,
    uri: String,
}

impl Nbdkit {
    /// Starts it on a socket in the folder of the test, and waits until it accepts connections.
    fn start(vddk: &Vddk, scratch: &Scratch, plugin: &Path, words: &[&str]) -> Self {
        let socket = scratch.path("s");
        let mut command = Command::new("nbdkit");
        command.args(["-f", "-U"]).arg(&socket).arg(plugin);
        command.arg(vddk.libdir()).args(words).env("FAKE_VDDK", &vddk.folder);
        let child = command.stdin(Stdio::null()).spawn().unwrap();
        let uri = format!("nbd+unix:///?socket={}", socket.display());
        let server = Self { child, uri };
        assert!(
            poll_until(SOON, || UnixStream::connect(&socket).is_ok()),
            "nbdkit did not come up"
        );
        server
    }

    /// Ends it after its last client: with a client left, nbdkit ends the library without closing the disk.
    fn end(mut self, vddk: &Vddk) {
        let count = |function| vddk.calls_of(function).len();
        assert!(
            poll_until(SOON, || count("Disconnect") == count("ConnectEx")),
            "{:?}",
            vddk.calls()
        );
        kill(Pid::from_raw(self.child.id().cast_signed()), Signal::SIGTERM).unwrap();
        assert!(self.child.wait().unwrap().success());
    }
}

impl Drop for Nbdkit {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Compiles the plugin.
fn plugin(scratch: &Scratch) -> PathBuf {
    let plugin = scratch.path("nbdkit-vddk-plugin.so");
    Cmd::new(source("nbdkit/build-plugin.sh")).arg(&plugin).run().ok();
    plugin
}

#[test]
fn the_plugin_of_nbdkit_is_served_by_our_stand_in() {
    let tools = ["gcc", "nbdkit", "/usr/include/nbdkit-plugin.h"];
    if !ready() || !tools.iter().all(|tool| need(tool)) {
        return;
    }
    let scratch = Scratch::new();
    let vddk = Vddk::new(&scratch, 8);
    let plugin = plugin(&scratch);
    let dump = Cmd::new("nbdkit").arg(&plugin).arg(vddk.libdir()).arg("--dump-plugin");
    let dump = dump.env("FAKE_VDDK", vddk.folder.to_str().unwrap()).run().ok();
    for line in ["vddk_library_version=8", "VixDiskLib_QueryAllocatedBlocks=1"] {
        assert!(dump.stdout.lines().any(|found| found == line), "{dump}");
    }
    // A server of which one chunk in the middle is allocated.
    expect(&vddk, &["order=reverse", "latency=100"]);
    let disk = put_sparse(&vddk, 8 << 20);
    write_at(&disk, 1 << 20, &noise(65536, 1));
    let login = crate::remote::login();
    let mut words: Vec<&str> = login.iter().map(String::as_str).collect();
    words.push(crate::remote::DISK);
    let server = Nbdkit::start(&vddk, &scratch, &plugin, &words);
    let new = scratch.write("new", noise(8 << 20, 2));
    let mount = scratch
        .mount()
        .arg(format!("uri={}", server.uri))
        .arg("name=x.raw")
        .start();
    let shown = mount.file("x.raw");
    let allocated = 1 << 20..(1 << 20) + 65536;
    assert_eq!(data_ranges(&shown), std::slice::from_ref(&allocated));
    assert_same(&shown, &disk);
    mount.unmount();
    Cmd::new("nbdcopy").arg("--flush").arg(&new).arg(&server.uri).run().ok();
    server.end(&vddk);
    assert_same(&disk, &new);
    let connects = vddk.calls_of("ConnectEx");
    assert!(
        connects.iter().all(|call| call.contains("cred=1:me:hunter2")),
        "{connects:?}"
    );
}
