//! The interface of the library, by code that is not of this project: a C program that knows only byte offsets, and
//! nbdkit's stand-in library.

use std::fs;
use std::path::{Path, PathBuf};

use fuse_tests::harness::{Cmd, Scratch, assert_same, need};

use crate::{Vddk, ready, write_at};

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
        .args(["-shared", "-fPIC", "-O1", "-pthread"])
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
