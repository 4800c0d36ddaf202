//! Passwords reach the library by no way that another process can look at.

use std::fs;
use std::path::Path;

use fuse_tests::harness::{Cmd, Mount, Scratch, assert_same, need};

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

/// Asserts that no process of a mount, and no line of its log, has the password. Unmounts it.
fn assert_hidden(mount: Mount, log: &Path) {
    let hosts = children(mount.pid());
    assert_eq!(hosts.len(), 1);
    for pid in [hosts[0], mount.pid()] {
        for file in ["cmdline", "environ"] {
            let text = fs::read(format!("/proc/{pid}/{file}")).unwrap();
            assert!(!text.windows(7).any(|part| part == b"hunter2"), "{file} of {pid}");
        }
    }
    let shown = Cmd::new("ps").args(["axww", "-o", "pid,args"]).run().ok();
    assert!(!shown.stdout.contains("hunter2"), "{shown}");
    mount.unmount();
    let log = fs::read_to_string(log).unwrap();
    assert!(!log.contains("hunter2") && log.contains("sectors"), "{log}");
}

/// Types the content of a file on a terminal of its own, after the question of the program, which runs there. Fails if the
/// terminal shows it.
const TYPIST: &str = "
import os, pty, sys
pid, terminal = pty.fork()
if pid == 0:
    os.execv(sys.argv[2], sys.argv[2:])
typed, shown = open(sys.argv[1], 'rb').read(), b''
while not shown.endswith(b'Password: '):
    shown += os.read(terminal, 1)
os.write(terminal, typed)
try:
    while more := os.read(terminal, 4096):
        shown += more
except OSError:
    pass
status = os.waitpid(pid, 0)[1]
sys.stdout.buffer.write(shown)
sys.exit(1 if typed.strip() in shown else os.waitstatus_to_exitcode(status))
";

/// "`password=` forms": the text itself, a file, a descriptor, the terminal.
#[test]
fn each_form_of_a_password_reaches_the_library_and_no_other_process() {
    if !ready() || !need("python3") || !need("ps") {
        return;
    }
    let scratch = Scratch::new();
    let vddk = Vddk::new(&scratch, 8);
    expect(&vddk, &[]);
    let disk = put(&vddk, &noise(1 << 20, 1));
    let file = scratch.write("pw", "hunter2\n").display().to_string();
    let thumbprint = format!("thumbprint={THUMBPRINT}");
    let keys = [
        "-vvv",
        "server=esx.example",
        "user=me",
        "vm=moref=vm-16",
        &thumbprint,
        DISK,
    ];
    let in_file = format!("password=+{file}");
    let descriptor = "exec 7<\"$0\"; exec \"$@\"";
    let forms: [(&str, &[&str]); 4] = [
        ("password=hunter2", &[]),
        (&in_file, &[]),
        ("password=-7", &["bash", "-c", descriptor, &file]),
        ("password=-", &["python3", "-c", TYPIST, &file]),
    ];
    for (number, (password, through)) in forms.into_iter().enumerate() {
        let log = scratch.path(format!("log{number}"));
        let mount = keys.iter().fold(vddk.mount(&scratch), |mount, key| mount.arg(key));
        let mount = mount.arg(password).arg(format!("--log-file={}", log.display()));
        let mount = mount.through(through).start();
        assert_same(&mount.file("x.raw"), &disk);
        assert_hidden(mount, &log);
    }
    let connects = vddk.calls_of("ConnectEx");
    assert!(
        connects.len() == 4 && connects.iter().all(|call| call.contains("cred=1:me:hunter2")),
        "{connects:?}"
    );
}
