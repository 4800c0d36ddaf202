//! Services and automounts of systemd: messages to the service manager, and the units.

use std::fs;
use std::path::Path;
use std::time::Duration;

use fuse_tests::harness::{Cmd, Mount, NotifySocket, Scratch, need, need_fuse, need_root};
use nix::sys::ptrace;
use nix::sys::signal::Signal;
use nix::sys::wait::{WaitPidFlag, waitpid};
use nix::unistd::Pid;

fn mount(scratch: &Scratch, manager: &NotifySocket) -> Mount {
    scratch.write("a.img", vec![1; 1 << 20]);
    scratch
        .mount()
        .file("a.img")
        .env("NOTIFY_SOCKET", manager.name())
        .env("WATCHDOG_USEC", "300000")
        .start()
}

/// "READY=1, STATUS=, WATCHDOG=1 … STOPPING=1"
#[test]
fn a_service_reports_that_it_is_ready_alive_and_stopping() {
    if !need_fuse() {
        return;
    }
    let scratch = Scratch::new();
    let manager = NotifySocket::new(&scratch);
    let mut mounted = mount(&scratch, &manager);
    let first = manager.receive(Duration::from_secs(60)).unwrap();
    let status = format!("STATUS={}: 1 disk", mounted.point().display());
    let pid = format!("MAINPID={}", mounted.pid());
    assert_eq!(first.lines().collect::<Vec<_>>(), ["READY=1", &pid, &status]);
    for _ in 0..3 {
        manager.wait_for("WATCHDOG=1");
    }
    mounted.signal(Signal::SIGTERM);
    assert!(manager.wait_for("STOPPING=1").contains("\nSTATUS=unmounting"));
    assert_eq!(mounted.wait_end().code, Some(0));

    let mounted = mount(&scratch, &manager);
    manager.wait_for("READY=1");
    mounted.unmount();
    assert!(manager.wait_for("STOPPING=1").contains("\nSTATUS=unmounted"));
}

/// "WATCHDOG=1 only while the FUSE loops answer"
#[test]
fn the_watchdog_stops_when_the_event_loops_hang() {
    if !need_fuse() || !need_root() {
        return;
    }
    let scratch = Scratch::new();
    let manager = NotifySocket::new(&scratch);
    let mounted = mount(&scratch, &manager);
    manager.wait_for("WATCHDOG=1");
    let loops = event_loops(mounted.pid());
    for thread in &loops {
        ptrace::seize(*thread, ptrace::Options::empty()).unwrap();
        ptrace::interrupt(*thread).unwrap();
        waitpid(*thread, Some(WaitPidFlag::__WALL)).unwrap();
    }
    // Those that wait here since a time before the loops were stopped.
    manager.drain();
    // Answers that were under way may still arrive. Ten more take three seconds if the loops answer.
    let silent = (0..10).any(|_| manager.receive(Duration::from_secs(2)).is_none());
    for thread in &loops {
        ptrace::detach(*thread, None).unwrap();
    }
    assert!(silent, "the service is said to be alive while its event loops hang");
    manager.wait_for("WATCHDOG=1");
    mounted.unmount();
}

/// Returns the threads of a daemon that answer the kernel's requests.
fn event_loops(pid: i32) -> Vec<Pid> {
    let tasks = fs::read_dir(format!("/proc/{pid}/task"))
        .unwrap()
        .map(|task| task.unwrap().path());
    let loops: Vec<Pid> = tasks
        .filter(|task| fs::read_to_string(task.join("comm")).unwrap().starts_with("fuser-"))
        .map(|task| Pid::from_raw(task.file_name().unwrap().to_str().unwrap().parse().unwrap()))
        .collect();
    assert!(!loops.is_empty(), "the event loops have other names now");
    loops
}

/// "`systemd-analyze verify`" of the service, and of the units that systemd-fstab-generator makes of contrib's fstab lines.
#[test]
fn units_pass_systemd_analyze_verify() {
    if !need("systemd-analyze") || !need_root() {
        return;
    }
    let scratch = Scratch::new();
    let contrib = Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("../contrib")
        .canonicalize()
        .unwrap();
    let unit = fs::read_to_string(contrib.join("systemd/vmdkfuse@.service.in")).unwrap();
    // A program that exists, as the verification wants.
    scratch.write("vmdkfuse@.service", unit.replace("@BINDIR@/vmdkfuse", "/bin/true"));
    let service = scratch.path("vmdkfuse@.service");
    fs::copy(&service, scratch.path("vmdkfuse@vms.service")).unwrap();
    verify(&[scratch.path("vmdkfuse@vms.service").as_path()]);

    let generator = Path::new("/usr/lib/systemd/system-generators/systemd-fstab-generator");
    for folder in ["normal", "early", "late"] {
        scratch.mkdir(folder);
    }
    let made = Cmd::new(generator)
        .env("SYSTEMD_FSTAB", contrib.join("examples/fstab").to_str().unwrap())
        .env("SYSTEMD_IN_INITRD", "0")
        .args(["normal", "early", "late"].map(|folder| scratch.path(folder)))
        .run()
        .ok();
    let units: Vec<_> = fs::read_dir(scratch.path("normal"))
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .filter(|path| {
            path.extension()
                .is_some_and(|kind| kind == "mount" || kind == "automount")
        })
        .collect();
    let names: Vec<_> = units
        .iter()
        .map(|unit| unit.file_name().unwrap().to_str().unwrap())
        .collect();
    for name in [
        "mnt-archive.automount",
        "mnt-archive.mount",
        "mnt-esx.mount",
        "mnt-fedora.mount",
        "mnt-vms.mount",
    ] {
        assert!(names.contains(&name), "{name} is not among {names:?}: {made}");
    }
    verify(&units.iter().map(|unit| unit.as_path()).collect::<Vec<_>>());
}

/// Verifies units. Only complaints about them count: those about units of this machine name other files.
#[track_caller]
fn verify(units: &[&Path]) {
    let verified = Cmd::new("systemd-analyze")
        .args(["verify", "--man=no", "--recursive-errors=no"])
        .args(units)
        .run()
        .ok();
    let of_units = verified
        .stderr
        .lines()
        .filter(|line| line.contains("vmdkfuse") || line.contains("mnt-"));
    assert_eq!(of_units.collect::<Vec<_>>(), Vec::<&str>::new(), "{verified}");
}
