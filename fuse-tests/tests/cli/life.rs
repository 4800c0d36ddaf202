//! Life cycle of a mount: its start, every way in which it can end, and the absence of leftovers.

use std::fs::{self, File};
use std::io::{Read, Write};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::mpsc::channel;
use std::thread;
use std::time::Duration;

use fuse_tests::harness::{
    Cmd, Mount, Scratch, need_fuse, need_qemu, need_root, poll_until, qemu_img, raw_with_islands, read_range, unmount,
    wait_end,
};
use nix::sys::signal::Signal;

/// Deadline for an event. It only bounds a failure.
const DEADLINE: Duration = Duration::from_secs(60);

/// Creates a sparse image of 16 MiB and its raw original; returns both paths, the original first.
///
/// The daemon serves every read of a sparse image, whereas the kernel may read a flat one without it.
fn sparse(scratch: &Scratch) -> (PathBuf, PathBuf) {
    let (raw, vmdk) = (scratch.path("disk.orig"), scratch.path("disk.vmdk"));
    raw_with_islands(&raw, 16 << 20, 5);
    qemu_img([
        "convert",
        "-f",
        "raw",
        "-O",
        "vmdk",
        raw.to_str().unwrap(),
        vmdk.to_str().unwrap(),
    ]);
    (raw, vmdk)
}

/// Returns true if the machine can run these tests.
fn ready() -> bool {
    need_fuse() && need_qemu()
}

/// "returns once the file can be read, status 0"
#[test]
fn the_background_command_returns_when_the_file_can_be_read() {
    if !ready() {
        return;
    }
    let scratch = Scratch::new();
    let (raw, _) = sparse(&scratch);
    for _ in 0..5 {
        let mount = scratch.mount().file("disk.vmdk").start();
        assert_eq!(read_range(&mount.file("disk.raw"), 1, 4000), read_range(&raw, 1, 4000));
        mount.unmount();
    }
}

/// A shell's `$(vmdkfuse …)` ends when all write ends of its pipe are closed, so the daemon must close its own.
#[test]
fn the_daemon_closes_the_pipes_of_its_parent() {
    if !ready() {
        return;
    }
    let scratch = Scratch::new();
    sparse(&scratch);
    let mount_dir = scratch.mkdir("mnt");
    let pidfile = scratch.path("pid");
    let mut command = Command::new(fuse_tests::harness::program());
    command
        .current_dir(scratch.root())
        .arg("--pidfile")
        .arg(&pidfile)
        .args(["mnt", "file=disk.vmdk"]);
    command
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    let (sender, receiver) = channel();
    thread::spawn(move || sender.send(command.output()));
    let output = receiver
        .recv_timeout(DEADLINE)
        .expect("the daemon keeps the pipes of its parent open")
        .unwrap();
    assert!(
        output.status.success() && output.stdout.is_empty() && output.stderr.is_empty(),
        "{output:?}"
    );
    let pid: i32 = fs::read_to_string(&pidfile).unwrap().trim().parse().unwrap();
    let cwd = fs::read_link(format!("/proc/{pid}/cwd")).unwrap();
    let stdin = fs::read_link(format!("/proc/{pid}/fd/0")).unwrap();
    assert_eq!(
        (cwd.as_path(), stdin.as_path()),
        (Path::new("/"), Path::new("/dev/null"))
    );
    unmount(&mount_dir);
    assert!(wait_end(pid, DEADLINE).is_some(), "the daemon still runs");
}

/// "`fusermount3 -u` ends the process with status 0"
#[test]
fn fusermount_ends_the_daemon_with_status_0() {
    if !ready() {
        return;
    }
    let scratch = Scratch::new();
    sparse(&scratch);
    scratch.mount().file("disk.vmdk").start().unmount();
    scratch.mount().foreground().file("disk.vmdk").start().unmount();
    scratch.assert_no_mounts();
}

#[test]
fn umount_ends_the_daemon_with_status_0() {
    if !ready() || !need_root() {
        return;
    }
    let scratch = Scratch::new();
    sparse(&scratch);
    let mut mount = scratch.mount().file("disk.vmdk").start();
    Cmd::new("umount").arg(mount.point()).run().ok();
    assert_eq!(mount.wait_end().code, Some(0));
}

#[test]
fn the_pidfile_names_the_daemon_and_is_removed_at_its_end() {
    if !ready() {
        return;
    }
    let scratch = Scratch::new();
    sparse(&scratch);
    for foreground in [false, true] {
        let pidfile = scratch.path("my.pid");
        let command = scratch.mount().pidfile("my.pid").file("disk.vmdk");
        let mount = if foreground { command.foreground() } else { command }.start();
        assert_eq!(fs::read_to_string(&pidfile).unwrap(), format!("{}\n", mount.pid()));
        mount.unmount();
        assert!(
            !pidfile.exists(),
            "the pidfile is left behind (foreground: {foreground})"
        );
    }
}

#[test]
fn messages_go_to_the_log_file() {
    if !ready() {
        return;
    }
    let scratch = Scratch::new();
    sparse(&scratch);
    scratch.mkdir("mnt");
    for (format, json) in [("text", false), ("json", true)] {
        let log = scratch.path(format);
        // A relative path is relative to the folder in which the command was run.
        let options = ["-v", "-v", "--log-file", format, "--log-format", format];
        let mount = options
            .iter()
            .fold(scratch.mount(), |mount, word| mount.arg(word))
            .file("disk.vmdk")
            .start();
        mount.unmount();
        let text = fs::read_to_string(&log).unwrap();
        assert!(text.lines().count() > 0, "the log is empty");
        for line in text.lines() {
            let parsed = serde_json::from_str::<serde_json::Value>(line);
            assert_eq!(parsed.is_ok_and(|value| value.is_object()), json, "{format}: {line}");
        }
    }
}

/// A failed write of a log message must neither end the daemon nor make it panic.
#[test]
fn regression_a_closed_standard_error_does_not_end_a_mount() {
    if !ready() {
        return;
    }
    let scratch = Scratch::new();
    sparse(&scratch);
    scratch.mkdir("mnt");
    // `true` exits at once, so the standard error of the program is a pipe without a reader.
    let script = "(\"$0\" -f -vvv mnt file=disk.vmdk; echo $? >status) 2>&1 | true";
    let run = Cmd::new("sh")
        .args(["-c", script])
        .arg(fuse_tests::harness::program())
        .dir(scratch.root());
    let run = thread::spawn(move || run.deadline(DEADLINE).run());
    let disk = scratch.path("mnt/disk.raw");
    assert!(poll_until(DEADLINE, || disk.exists() || run.is_finished()));
    let read = fs::read(&disk);
    // The file is there before the program's own first read through the mount has ended, and until then it is busy.
    let unmount = || {
        let outcome = Cmd::new("fusermount3").arg("-u").arg(scratch.path("mnt")).run();
        outcome.ended.code == Some(0)
    };
    assert!(poll_until(DEADLINE, unmount), "the mount stays busy");
    run.join().unwrap();
    assert!(read.is_ok(), "{read:?}");
    assert_eq!(fs::read_to_string(scratch.path("status")).unwrap().trim(), "0");
}

#[test]
fn a_log_file_that_cannot_be_written_is_an_error() {
    let scratch = Scratch::new();
    scratch.write("disk.img", vec![0; 512]);
    scratch
        .mount()
        .arg("--log-file=/proc/no/such/file")
        .file("disk.img")
        .refused(1)
        .error_names(&["/proc/no/such/file"]);
    scratch
        .mount()
        .without_pidfile()
        .arg("--pidfile=/proc/no/pid")
        .file("disk.img")
        .refused(1)
        .error_names(&["/proc/no/pid"]);
}

/// "SIGTERM/SIGINT/SIGHUP unmount cleanly"
#[test]
fn signals_unmount_and_end_the_daemon_with_status_0() {
    if !ready() {
        return;
    }
    let scratch = Scratch::new();
    sparse(&scratch);
    for signal in [Signal::SIGTERM, Signal::SIGINT, Signal::SIGHUP] {
        for foreground in [false, true] {
            let command = scratch.mount().file("disk.vmdk");
            let mut mount = if foreground { command.foreground() } else { command }.start();
            mount.signal(signal);
            let ended = mount.wait_end();
            assert_eq!(
                ended.code,
                Some(0),
                "{signal} (foreground: {foreground}): {ended:?} {:?}",
                mount.output()
            );
            assert!(
                !mount.is_mounted(),
                "{signal} (foreground: {foreground}) did not unmount"
            );
        }
    }
}

/// "a busy mount is detached lazily and the process ends when the last user is gone"
#[test]
fn a_busy_mount_is_detached_and_served_until_its_last_close() {
    if !ready() {
        return;
    }
    let scratch = Scratch::new();
    let (raw, _) = sparse(&scratch);
    let original = File::open(raw).unwrap();
    for foreground in [false, true] {
        let command = scratch.mount().file("disk.vmdk");
        let mut mount = if foreground { command.foreground() } else { command }.start();
        let user = File::open(mount.file("disk.raw")).unwrap();
        mount.signal(Signal::SIGTERM);
        mount.wait_unmounted();
        for offset in (0..16 << 20).step_by(1 << 20) {
            let (mut seen, mut expected) = (vec![0; 65536], vec![0; 65536]);
            if let Err(e) = user.read_exact_at(&mut seen, offset) {
                let (alive, output) = (mount.is_running(), mount.output());
                panic!("an open file is not served ({e} at {offset}); the daemon runs: {alive}; {output:?}");
            }
            original.read_exact_at(&mut expected, offset).unwrap();
            assert!(seen == expected, "wrong bytes at {offset} after the unmount");
        }
        assert!(mount.is_running(), "the daemon ended while a file was open");
        drop(user);
        assert_eq!(mount.wait_end().code, Some(0));
    }
}

#[test]
fn a_lazy_unmount_ends_the_daemon_after_the_last_close() {
    if !ready() {
        return;
    }
    let scratch = Scratch::new();
    let (raw, _) = sparse(&scratch);
    let mut mount = scratch.mount().file("disk.vmdk").start();
    let mut user = File::open(mount.file("disk.raw")).unwrap();
    let refused = Cmd::new("fusermount3").arg("-u").arg(mount.point()).run();
    assert_ne!(refused.ended.code, Some(0), "a busy mount was unmounted: {refused}");
    assert!(mount.is_mounted() && mount.is_running());
    Cmd::new("fusermount3").arg("-uz").arg(mount.point()).run().ok();
    assert!(!mount.is_mounted());
    let mut seen = Vec::new();
    user.read_to_end(&mut seen)
        .expect("reading a file that was open at the lazy unmount");
    assert!(seen == fs::read(raw).unwrap(), "wrong bytes after the lazy unmount");
    assert!(mount.is_running());
    drop(user);
    assert_eq!(mount.wait_end().code, Some(0));
}

/// A process whose working directory is in the mount keeps the mount busy, as an open file does.
#[test]
fn a_working_directory_inside_keeps_the_mount_busy() {
    if !ready() {
        return;
    }
    let scratch = Scratch::new();
    sparse(&scratch);
    let mut mount = scratch.mount().file("disk.vmdk").start();
    // cat waits for its standard input, so it stays in its working directory until the pipe is closed.
    let mut shell = Command::new("cat")
        .current_dir(mount.point())
        .stdin(Stdio::piped())
        .spawn()
        .unwrap();
    mount.signal(Signal::SIGTERM);
    mount.wait_unmounted();
    assert!(mount.is_running());
    shell.stdin.take().unwrap().flush().unwrap();
    shell.wait().unwrap();
    assert_eq!(mount.wait_end().code, Some(0));
}

#[test]
fn auto_unmount_clears_the_mount_of_a_killed_process() {
    if !ready() {
        return;
    }
    let scratch = Scratch::new();
    sparse(&scratch);
    let mut mount = scratch.mount().arg("-o").arg("auto_unmount").file("disk.vmdk").start();
    assert!(read_range(&mount.file("disk.raw"), 0, 512).len() == 512);
    mount.signal(Signal::SIGKILL);
    assert_eq!(mount.wait_end().signal, Some(Signal::SIGKILL as i32));
    mount.wait_unmounted();
    assert!(fs::read_dir(mount.point()).is_ok());
    // The option does not disturb an ordinary unmount.
    scratch
        .mount()
        .arg("-o")
        .arg("auto_unmount")
        .file("disk.vmdk")
        .start()
        .unmount();
}

/// "a mount over a stale mount point is refused with the command that clears it"
#[test]
fn a_stale_mount_point_is_refused_with_the_command_that_clears_it() {
    if !ready() {
        return;
    }
    let scratch = Scratch::new();
    sparse(&scratch);
    let kill = |mount: &mut Mount| {
        // The kernel caches the attributes of the root for a while, and the program must detect the stale mount
        // although a stat of it succeeds.
        fs::metadata(mount.point()).unwrap();
        mount.signal(Signal::SIGKILL);
        mount.wait_end();
        assert!(
            mount.is_mounted() && fs::read_dir(mount.point()).is_err(),
            "the killed daemon left no stale mount, so the test shows nothing"
        );
    };
    let mut stale = scratch.mount().file("disk.vmdk").start();
    kill(&mut stale);
    let outcome = scratch
        .vmdkfuse()
        .arg(stale.point())
        .arg("file=disk.vmdk")
        .run()
        .one_error(1, &["clear it with"]);
    // The command is at the end of the line. For root it is a different one.
    let command = outcome.stderr.trim().rsplit(": ").next().unwrap().to_owned();
    let words: Vec<_> = command.split_whitespace().collect();
    assert_eq!(words.last().map(Path::new), Some(stale.point()), "{outcome}");
    Cmd::new(words[0]).args(&words[1..]).run().ok();
    assert!(!stale.is_mounted(), "`{command}` did not clear it");
    drop(stale);
    scratch.mount().file("disk.vmdk").start().unmount();
}

#[test]
fn a_second_mount_at_the_same_mount_point_is_refused() {
    if !ready() {
        return;
    }
    let scratch = Scratch::new();
    let (raw, _) = sparse(&scratch);
    let mount = scratch.mount().file("disk.vmdk").start();
    scratch
        .mount()
        .file("disk.vmdk")
        .arg("name=other")
        .refused(1)
        .one_error(1, &["mnt"]);
    assert_eq!(mount.names(), ["disk.raw"]);
    assert_eq!(read_range(&mount.file("disk.raw"), 5, 99), read_range(&raw, 5, 99));
    mount.unmount();
}

/// Many mounts and unmounts in a row leave no mount, no process and no file.
#[test]
fn repeated_mounts_leave_nothing_behind() {
    if !ready() {
        return;
    }
    let scratch = Scratch::new();
    sparse(&scratch);
    scratch.mkdir("mnt");
    let count = || fs::read_dir(scratch.root()).unwrap().count();
    let before = count();
    for _ in 0..10 {
        scratch.mount().file("disk.vmdk").start().unmount();
    }
    assert_eq!(count(), before, "files were left behind");
    scratch.assert_no_mounts();
}
