//! Passwords reach the library by no way that another process can look at.

use std::fs;

use fuse_tests::harness::{Scratch, assert_same, need};

use crate::local::children;
use crate::remote::{DISK, THUMBPRINT, expect, put, remote};
use crate::{Vddk, noise, ready};

#[test]
fn no_secret_is_visible_to_other_processes_or_in_the_log() {
    if !ready() || !need("nbdkit") {
        return;
    }
    let scratch = Scratch::new();
    let vddk = Vddk::new(&scratch, 8);
    expect(&vddk, &["cookie=secret-cookie"]);
    put(&vddk, &noise(1 << 20, 1));
    let log = scratch.path("log");
    let mount = remote(&vddk, &scratch)
        .arg("cookie=secret-cookie")
        .arg("-vvv")
        .arg(format!("--log-file={}", log.display()))
        .start();
    let nbd = scratch
        .mount()
        .at("nbd")
        .env("FAKE_VDDK", vddk.folder.to_str().unwrap());
    scratch.mkdir("nbd");
    let nbd = nbd.arg("command=nbdkit").arg("arg=memory").arg("arg=1M").start();
    let hosts = children(mount.pid());
    assert_eq!(hosts.len(), 1);
    let captive = children(nbd.pid());
    for pid in hosts.iter().chain(&captive).chain([&mount.pid(), &nbd.pid()]) {
        for file in ["cmdline", "environ"] {
            let text = String::from_utf8_lossy(&fs::read(format!("/proc/{pid}/{file}")).unwrap()).into_owned();
            assert!(
                !text.contains("hunter2") && !text.contains("secret-cookie"),
                "{file} of {pid}: {text}"
            );
            let has_path = text.contains(&format!("LD_LIBRARY_PATH={}/lib64", vddk.libdir.display()));
            assert_eq!(
                has_path,
                file == "environ" && hosts.contains(pid),
                "{file} of {pid}: {text}"
            );
        }
    }
    // Nor in what the host leaves in the memory that it shares with its parent.
    let memory = fs::read_dir(format!("/proc/{}/fd", mount.pid())).unwrap().flatten();
    let memory = memory
        .filter(|fd| fs::read_link(fd.path()).is_ok_and(|path| path.starts_with("/memfd:vmdkfuse-vddk (deleted)")));
    let contents: Vec<Vec<u8>> = memory.map(|fd| fs::read(fd.path()).unwrap()).collect();
    assert_eq!(contents.len(), 1, "the memory file of the host");
    assert!(!contents[0].windows(7).any(|part| part == b"hunter2"));
    nbd.unmount();
    mount.unmount();
    let log = fs::read_to_string(log).unwrap();
    assert!(!log.contains("hunter2") && !log.contains("secret-cookie"), "{log}");
    assert!(
        log.contains("fake-vddk: started 3 threads"),
        "messages of the library are in the log: {log}"
    );
    assert!(
        !log.lines()
            .any(|line| line.contains("PhoneHome") && line.contains("WARN")),
        "{log}"
    );
}

#[test]
fn a_password_comes_from_a_file_or_a_descriptor() {
    if !ready() {
        return;
    }
    let scratch = Scratch::new();
    let vddk = Vddk::new(&scratch, 8);
    expect(&vddk, &[]);
    let disk = put(&vddk, &noise(1 << 20, 1));
    let file = scratch.write("pw", "hunter2\n");
    let keys = ["server=esx.example", "user=me", "vm=moref=vm-16"];
    let thumbprint = format!("thumbprint={THUMBPRINT}");
    let password = format!("password=+{}", file.display());
    let mount = keys.iter().fold(vddk.mount(&scratch), |mount, key| mount.arg(key));
    let mount = mount.arg(&thumbprint).arg(&password).arg(DISK).start();
    assert_same(&mount.file("x.raw"), &disk);
    mount.unmount();
    let script = "exec 7<\"$1\"; shift; exec \"$@\" password=-7";
    let command = fuse_tests::harness::Cmd::new("bash")
        .args(["-c", script, "bash"])
        .arg(&file);
    let command = command
        .arg(fuse_tests::harness::program())
        .arg("--info")
        .arg(vddk.libdir());
    let command = command.env("FAKE_VDDK", vddk.folder.to_str().unwrap());
    command.args(keys).arg(&thumbprint).arg(DISK).run().ok();
    let connects = vddk.calls_of("ConnectEx");
    assert!(
        connects.len() == 2 && connects.iter().all(|call| call.contains("cred=1:me:hunter2")),
        "{connects:?}"
    );
}
