//! One run of the program that mounts, from its start to its clean end.

use std::ffi::{OsStr, OsString};
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::mpsc::{RecvTimeoutError, Sender, channel};
use std::thread;
use std::time::Duration;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use super::cmd::{Cmd, Outcome, Running};
use super::mounts::{MountEntry, mounts_below};
use super::process::{Ended, is_running, peak_memory, poll_until, wait_end};
use super::scratch::{Scratch, detach};

/// How long a mount may take to appear or to go.
const DEADLINE: Duration = Duration::from_secs(20);

/// How long a process may take from its fork to the program that it executes.
const STARTING: Duration = Duration::from_secs(2);

/// How long a test may hold one mount: after it a read that hangs is ended by ending the process.
const WATCHDOG: Duration = Duration::from_secs(120);

/// A mount to make.
#[derive(Debug)]
pub struct MountCmd<'s> {
    scratch: &'s Scratch,
    point: PathBuf,
    args: Vec<OsString>,
    foreground: bool,
    pidfile: Option<PathBuf>,
    env: Vec<(String, String)>,
    memory: Option<u64>,
    deadline: Duration,
}

impl<'s> MountCmd<'s> {
    /// At the folder `mnt`, which is made when it is not there.
    pub(super) fn new(scratch: &'s Scratch) -> Self {
        let pidfile = Some(scratch.path(format!("{}.pid", scratch.next())));
        let (point, args) = (scratch.path("mnt"), Vec::new());
        let (env, deadline) = (Vec::new(), Duration::from_secs(60));
        Self {
            scratch,
            point,
            args,
            foreground: false,
            pidfile,
            env,
            memory: None,
            deadline,
        }
    }

    /// Another mount point, below the test's folder. Nothing is made there.
    #[must_use]
    pub fn at(mut self, name: impl AsRef<Path>) -> Self {
        self.point = self.scratch.path(name);
        self
    }

    /// An option or a `KEY=VALUE`.
    #[must_use]
    pub fn arg(mut self, arg: impl AsRef<OsStr>) -> Self {
        self.args.push(arg.as_ref().to_owned());
        self
    }

    /// `file=PATH`, a path below the test's folder or a full one.
    #[must_use]
    pub fn file(mut self, path: impl AsRef<Path>) -> Self {
        let mut word = OsString::from("file=");
        word.push(self.scratch.path(path));
        self.args.push(word);
        self
    }

    /// Stay in the foreground (`-f`).
    #[must_use]
    pub fn foreground(mut self) -> Self {
        self.foreground = true;
        self
    }

    /// Another name for the pidfile, below the test's folder.
    #[must_use]
    pub fn pidfile(mut self, name: impl AsRef<Path>) -> Self {
        self.pidfile = Some(self.scratch.path(name));
        self
    }

    /// No `--pidfile`: only for mounts that are refused, since the process is not known then.
    #[must_use]
    pub fn without_pidfile(mut self) -> Self {
        self.pidfile = None;
        self
    }

    /// See [`Cmd::env`].
    #[must_use]
    pub fn env(mut self, name: &str, value: &str) -> Self {
        self.env.push((name.to_owned(), value.to_owned()));
        self
    }

    /// How long the command may take.
    #[must_use]
    pub fn deadline(mut self, deadline: Duration) -> Self {
        self.deadline = deadline;
        self
    }

    /// See [`Cmd::memory`].
    #[must_use]
    pub fn memory(mut self, bytes: u64) -> Self {
        self.memory = Some(bytes);
        self
    }

    /// Mounts, or panics with what the program said.
    #[track_caller]
    pub fn start(self) -> Mount {
        match self.try_start() {
            Ok(mount) => mount,
            Err(outcome) => panic!("no mount: {outcome}"),
        }
    }

    /// Mounts; `Err` if the program ended with another status than 0.
    ///
    /// In the background the program must have mounted when it returns. In the foreground its pidfile is waited for,
    /// which it writes once the files can be read.
    #[track_caller]
    pub fn try_start(self) -> Result<Mount, Outcome> {
        let before = mounts_below(self.scratch.root());
        let (root, foreground) = (self.scratch.root().to_owned(), self.foreground);
        let (point, pidfile) = (self.point.clone(), self.pidfile.clone());
        let cmd = self.command();
        let (pid, running) = if foreground {
            let running = cmd.start();
            wait_for_pidfile(pidfile.as_deref(), &running);
            (running.pid, Some(running))
        } else {
            let outcome = cmd.run();
            if outcome.ended.code != Some(0) {
                return Err(outcome);
            }
            (read_pid(pidfile.as_deref(), &outcome), None)
        };
        let entry = mounts_below(&root)
            .into_iter()
            .find(|entry| !before.contains(entry) && serves(&point, entry));
        let Some(entry) = entry else {
            kill(Pid::from_raw(pid), Signal::SIGKILL).ok();
            panic!(
                "status 0, but nothing is mounted at {}: {:?}",
                point.display(),
                mounts_below(&root)
            );
        };
        Ok(Mount {
            point,
            root,
            pid,
            running,
            entry,
            ended: None,
            watchdog: Some(watch(pid)),
        })
    }

    /// Panics unless the program refuses with status `code` and leaves no mount, no new name and no pidfile.
    #[track_caller]
    pub fn refused(self, code: i32) -> Outcome {
        self.refused_with_any(&[code])
    }

    /// The same, where one of several statuses will do.
    #[track_caller]
    pub fn refused_with_any(self, codes: &[i32]) -> Outcome {
        let (scratch, point, pidfile) = (self.scratch, self.point.clone(), self.pidfile.clone());
        let before = mounts_below(scratch.root());
        let was_there = point == scratch.path("mnt") || point.exists();
        // Also in the foreground the program must end by itself here, so both are waited for alike.
        match self.in_background().try_start() {
            Ok(mount) => panic!("mounted at {} where it had to refuse", mount.point.display()),
            Err(outcome) => {
                assert_eq!(
                    mounts_below(scratch.root()),
                    before,
                    "a failed mount left a mount: {outcome}"
                );
                assert_eq!(
                    point.exists(),
                    was_there,
                    "a failed mount changed its mount point: {outcome}"
                );
                assert!(
                    !pidfile.is_some_and(|path| path.exists()),
                    "a failed mount left its pidfile: {outcome}"
                );
                assert!(
                    outcome.ended.code.is_some_and(|code| codes.contains(&code)),
                    "{outcome}"
                );
                outcome
            }
        }
    }

    /// Passes `-f` on and waits for the end of the process all the same.
    fn in_background(mut self) -> Self {
        if self.foreground {
            self.foreground = false;
            self.args.push("-f".into());
        }
        self
    }

    /// The command line.
    fn command(self) -> Cmd {
        if self.point == self.scratch.path("mnt") && !self.point.exists() {
            self.scratch.mkdir("mnt");
        }
        let mut cmd = self.scratch.vmdkfuse().deadline(self.deadline);
        if let Some(pidfile) = &self.pidfile {
            cmd = cmd.arg("--pidfile").arg(pidfile);
        }
        if self.foreground {
            cmd = cmd.arg("-f");
        }
        cmd = cmd.arg(&self.point).args(&self.args);
        cmd = self.env.iter().fold(cmd, |cmd, (name, value)| cmd.env(name, value));
        match self.memory {
            Some(bytes) => cmd.memory(bytes),
            None => cmd,
        }
    }
}

/// A mount that is there. Its Drop unmounts it, ends its process and waits for that.
#[derive(Debug)]
pub struct Mount {
    point: PathBuf,
    root: PathBuf,
    pid: i32,
    running: Option<Running>,
    entry: MountEntry,
    ended: Option<Ended>,
    watchdog: Option<Sender<()>>,
}

impl Mount {
    /// The mount point as it was given.
    pub fn point(&self) -> &Path {
        &self.point
    }

    /// The kernel's line about it.
    pub fn entry(&self) -> &MountEntry {
        &self.entry
    }

    /// A file in it.
    pub fn file(&self, name: impl AsRef<Path>) -> PathBuf {
        self.entry.point.join(name)
    }

    /// The names in it, in order.
    #[track_caller]
    pub fn names(&self) -> Vec<String> {
        let entries = fs::read_dir(&self.entry.point).expect("listing the mount");
        let mut names: Vec<_> = entries
            .map(|entry| entry.expect("a name").file_name().to_string_lossy().into_owned())
            .collect();
        names.sort();
        names
    }

    /// The process that serves it.
    pub fn pid(&self) -> i32 {
        self.pid
    }

    /// The most memory that the process has had, in bytes.
    pub fn peak_memory(&self) -> u64 {
        peak_memory(self.pid)
    }

    /// What the program has said, if it runs in the foreground.
    pub fn output(&self) -> (String, String) {
        self.running.as_ref().map(Running::output).unwrap_or_default()
    }

    /// Whether it is in the table of mounts.
    pub fn is_mounted(&self) -> bool {
        mounts_below(&self.root).contains(&self.entry)
    }

    /// Whether its process runs.
    pub fn is_running(&self) -> bool {
        self.ended.is_none() && is_running(self.pid)
    }

    /// Sends a signal to its process.
    pub fn signal(&self, signal: Signal) {
        kill(Pid::from_raw(self.pid), signal).expect("sending a signal");
    }

    /// Waits for the mount to go from the table of mounts.
    #[track_caller]
    pub fn wait_unmounted(&self) {
        assert!(
            poll_until(DEADLINE, || !self.is_mounted()),
            "still mounted after {DEADLINE:?}: {:?}",
            self.entry
        );
    }

    /// Waits for the process to end by itself; panics if it does not.
    #[track_caller]
    pub fn wait_end(&mut self) -> Ended {
        if self.ended.is_none() {
            self.ended = wait_end(self.pid, DEADLINE);
            self.watchdog = None;
        }
        match self.ended {
            Some(ended) => ended,
            None => panic!(
                "process {} still runs after {DEADLINE:?}\n{:?}",
                self.pid,
                self.output()
            ),
        }
    }

    fn ask_to_unmount(&self) -> Outcome {
        Cmd::new("fusermount3").arg("-u").arg(&self.entry.point).run()
    }

    /// Unmounts as a user does, and waits for the process: it must end with status 0.
    #[track_caller]
    pub fn unmount(mut self) {
        // a process that another thread starts just now has our open files for an instant, until it executes its program
        let mut outcome = self.ask_to_unmount();
        poll_until(STARTING, || {
            let busy = outcome.stderr.contains("busy");
            if busy {
                outcome = self.ask_to_unmount();
            }
            !busy
        });
        outcome.ok();
        assert!(!self.is_mounted(), "still mounted: {:?}", self.entry);
        let ended = self.wait_end();
        assert_eq!(
            ended.code,
            Some(0),
            "after fusermount3 -u: {ended:?} {:?}",
            self.output()
        );
    }
}

impl Drop for Mount {
    fn drop(&mut self) {
        if self.is_mounted() {
            let polite = Cmd::new("fusermount3").arg("-uq").arg(&self.entry.point).run();
            if polite.ended.code != Some(0) {
                detach(&self.entry.point);
            }
        }
        let mut stuck = false;
        if self.ended.is_none() && wait_end(self.pid, DEADLINE).is_none() {
            stuck = true;
            kill(Pid::from_raw(self.pid), Signal::SIGKILL).ok();
            wait_end(self.pid, DEADLINE);
        }
        // A second panic while one is under way would hide the first.
        if stuck && !thread::panicking() {
            panic!("process {} did not end after its mount was gone", self.pid);
        }
    }
}

/// Whether this mount can be the one that was asked for: at the path itself, or at its folder for a new name in it.
fn serves(point: &Path, entry: &MountEntry) -> bool {
    let kind = entry.kind.starts_with("fuse");
    kind && (entry.point == point || Some(entry.point.as_path()) == point.parent())
}

/// Waits for the pidfile of a foreground process, or panics when the program ends or takes too long.
#[track_caller]
fn wait_for_pidfile(pidfile: Option<&Path>, running: &Running) {
    let pidfile = pidfile.expect("a foreground mount is waited for by its pidfile");
    let written = || fs::read_to_string(pidfile).is_ok_and(|text| text.ends_with('\n'));
    poll_until(DEADLINE, || written() || !is_running(running.pid));
    if !written() {
        kill(Pid::from_raw(running.pid), Signal::SIGKILL).ok();
        let ended = wait_end(running.pid, DEADLINE);
        panic!("no mount from the foreground process: {ended:?} {:?}", running.output());
    }
}

/// The process that the pidfile names.
#[track_caller]
fn read_pid(pidfile: Option<&Path>, outcome: &Outcome) -> i32 {
    let pidfile = pidfile.unwrap_or_else(|| panic!("a background mount without pidfile cannot be followed: {outcome}"));
    let text = fs::read_to_string(pidfile).unwrap_or_else(|e| panic!("status 0 without pidfile ({e}): {outcome}"));
    let pid = text
        .trim()
        .parse()
        .unwrap_or_else(|e| panic!("{text:?} in the pidfile ({e})"));
    assert!(
        is_running(pid),
        "the pidfile names process {pid}, which does not run: {outcome}"
    );
    pid
}

/// Kills the process after [`WATCHDOG`] unless the sender is dropped before.
fn watch(pid: i32) -> Sender<()> {
    let (sender, receiver) = channel::<()>();
    thread::spawn(move || {
        if receiver.recv_timeout(WATCHDOG) == Err(RecvTimeoutError::Timeout) {
            eprintln!("WATCHDOG: process {pid} served a mount for {WATCHDOG:?}; it is killed");
            kill(Pid::from_raw(pid), Signal::SIGKILL).ok();
        }
    });
    sender
}
