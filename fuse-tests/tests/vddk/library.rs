//! Which library is loaded, and what is said if none can be.

use std::fs;

use fuse_tests::harness::Scratch;

use crate::{Vddk, ready};

/// Changes the name of a symbol or of a dependency in a library, so that it cannot be found.
fn rename(path: &std::path::Path, name: &str) {
    let mut bytes = fs::read(path).unwrap();
    let text = format!("\0{name}\0").into_bytes();
    let found: Vec<usize> = (0..bytes.len() - text.len())
        .filter(|at| bytes[*at..at + text.len()] == text[..])
        .collect();
    assert!(!found.is_empty(), "{name} is not in the library");
    for at in found {
        bytes[at + text.len() - 2] ^= 1;
    }
    fs::write(path, bytes).unwrap();
}

#[test]
fn dump_describes_the_library_in_the_words_of_nbdkit() {
    let scratch = Scratch::new();
    let vddk = Vddk::new(&scratch, 9);
    fs::copy(vddk.library(9), vddk.library(10)).unwrap();
    let outcome = vddk.command(&scratch).arg("--dump").arg(vddk.libdir()).run().ok();
    let dll = format!("vddk_dll={}", fs::canonicalize(vddk.library(10)).unwrap().display());
    for line in [
        "vddk_default_libdir=/usr/lib/vmware-vix-disklib",
        "vddk_has_nfchostport=1",
        "vddk_library_version=10",
        &dll,
        "vddk_transport_modes=file:san:hotadd:nbdssl:nbd",
        "VixDiskLib_InitEx=1",
        "VixDiskLib_QueryAllocatedBlocks=1",
    ] {
        assert!(outcome.stdout.lines().any(|found| found == line), "{line}: {outcome}");
    }
    let json = vddk
        .command(&scratch)
        .args(["--dump", "--json"])
        .arg(vddk.libdir())
        .run()
        .ok()
        .json();
    assert_eq!(json["vddk"]["version"], 10);
    assert_eq!(json["vddk"]["functions"].as_array().unwrap().len(), 28);
    assert_eq!(vddk.calls_of("Exit").len(), 2, "{:?}", vddk.calls());
    let without = scratch.vmdkfuse().arg("--dump").run().ok();
    assert!(without.stdout.contains("vddk_has_nfchostport=1") && !without.stdout.contains("vddk_dll="));
}

#[test]
fn a_library_that_is_missing_or_incomplete_is_named() {
    if !ready() {
        return;
    }
    let scratch = Scratch::new();
    let vddk = Vddk::new(&scratch, 8);
    scratch.write("x.vmdk", vec![0; 1 << 20]);
    let refused = |words: &[&str]| {
        vddk.mount(&scratch).file("x.vmdk").refused(1).one_error(1, words);
    };
    rename(&vddk.library(8), "VixDiskLib_ReadAsync");
    refused(&["libvixDiskLib.so.8 has no function VixDiskLib_ReadAsync"]);
    fs::copy(fuse_tests::harness::fake_vddk_library(), vddk.library(8)).unwrap();
    rename(&vddk.library(8), "libc.so.6");
    refused(&["libc.so.7", "ldd", "libdir="]);
    fs::write(vddk.library(8), [b'x'; 4096]).unwrap();
    refused(&["libvixDiskLib.so.8", "invalid ELF header"]);
    fs::remove_file(vddk.library(8)).unwrap();
    refused(&["libdir=", "lib64 nor", "libvixDiskLib.so.N"]);
    let message = ["libvixDiskLib.so.10", "libvixDiskLib.so.6", "libdir="];
    scratch
        .mount()
        .arg("backend=vddk")
        .file("x.vmdk")
        .refused(1)
        .one_error(1, &message);
}

#[test]
fn optional_functions_may_be_missing() {
    if !ready() {
        return;
    }
    let scratch = Scratch::new();
    let vddk = Vddk::new(&scratch, 6);
    for name in [
        "VixDiskLib_QueryAllocatedBlocks",
        "VixDiskLib_AllocateConnectParams",
        "VixDiskLib_ListTransportModes",
    ] {
        rename(&vddk.library(6), name);
    }
    let disk = scratch.write("x.vmdk", crate::noise(1 << 20, 1));
    let mount = vddk.mount(&scratch).file("x.vmdk").start();
    assert_eq!(fs::read(mount.file("x.raw")).unwrap(), fs::read(disk).unwrap());
    mount.unmount();
    let outcome = vddk.command(&scratch).arg("--dump").arg(vddk.libdir()).run().ok();
    assert!(outcome.stdout.contains("vddk_library_version=6") && !outcome.stdout.contains("QueryAllocatedBlocks=1"));
}
