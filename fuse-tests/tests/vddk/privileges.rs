//! A host has the privileges that the library needs, and no others.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::MetadataExt;

use fuse_tests::harness::{Mount, NOBODY, Scratch, assert_same, need_root};

use crate::local::children;
use crate::remote::{expect, put, remote};
use crate::{Vddk, noise, ready};

const DAC_OVERRIDE: u64 = 1 << 1;
const DAC_READ_SEARCH: u64 = 1 << 2;
const FOWNER: u64 = 1 << 3;
const SYS_RAWIO: u64 = 1 << 17;
const SYS_ADMIN: u64 = 1 << 21;
const MKNOD: u64 = 1 << 27;

/// Asserts the capabilities of each thread of the only host of a mount, that it gains none, and that it is not dumpable.
#[track_caller]
fn assert_privileges(mount: &Mount, expected: u64) {
    let host = children(mount.pid())[0];
    for thread in fs::read_dir(format!("/proc/{host}/task")).unwrap().flatten() {
        let text = fs::read_to_string(thread.path().join("status")).unwrap();
        let lines: BTreeMap<&str, &str> = text.lines().filter_map(|line| line.split_once(":\t")).collect();
        let set = |name: &str| u64::from_str_radix(lines[name], 16).unwrap();
        for (name, expected) in [("CapEff", expected), ("CapPrm", expected), ("CapInh", 0), ("CapAmb", 0)] {
            assert_eq!(set(name), expected, "{name}: {text}");
        }
        // Only a process with privileges can limit those of programs that it executes; another one has none to give.
        if expected != 0 {
            assert_eq!(set("CapBnd") & !expected, 0, "{text}");
        }
        assert_eq!(lines["NoNewPrivs"], "1");
    }
    let memory = fs::metadata(format!("/proc/{host}/mem")).unwrap();
    assert_eq!(memory.uid(), 0, "the process is dumpable");
}

#[test]
fn a_host_of_root_keeps_what_its_transports_need() {
    if !ready() || !need_root() {
        return;
    }
    let scratch = Scratch::new();
    let vddk = Vddk::new(&scratch, 8);
    expect(&vddk, &[]);
    let disk = put(&vddk, &noise(1 << 20, 1));
    // Another user's, which only these capabilities permit root to write.
    let local = scratch.write("local.vmdk", noise(1 << 20, 2));
    std::os::unix::fs::chown(&local, Some(NOBODY.uid), Some(NOBODY.gid)).unwrap();
    let files = DAC_OVERRIDE | DAC_READ_SEARCH | FOWNER;
    let devices = files | SYS_RAWIO | SYS_ADMIN | MKNOD;
    for (transports, remote_set, local_set) in [
        ("", DAC_READ_SEARCH, files),
        ("transports=nbd", DAC_READ_SEARCH, files),
        ("transports=file:hotadd:nbd", devices, devices),
        ("transports=san", devices, devices),
    ] {
        for (mount, expected, name, image) in [
            (remote(&vddk, &scratch), remote_set, "x.raw", &disk),
            (vddk.mount(&scratch).file("local.vmdk"), local_set, "local.raw", &local),
        ] {
            let mount = if transports.is_empty() {
                mount
            } else {
                mount.arg(transports)
            };
            let mount = mount.start();
            assert_privileges(&mount, expected);
            assert_same(&mount.file(name), image);
            mount.unmount();
        }
    }
}

#[test]
fn the_host_of_an_ordinary_user_has_no_privileges() {
    if !ready() || !need_root() {
        return;
    }
    let scratch = Scratch::of(NOBODY);
    scratch.open_to_all();
    let vddk = Vddk::new(&scratch, 8);
    scratch.give("fake/knobs".as_ref());
    let disk = scratch.write("x.vmdk", noise(1 << 20, 1));
    let mount = vddk.mount(&scratch).file("x.vmdk").start();
    assert_privileges(&mount, 0);
    mount.unmount();
    assert!(fs::read(disk).unwrap() == noise(1 << 20, 1));
}
