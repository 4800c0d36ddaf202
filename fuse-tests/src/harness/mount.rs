//! One run of the program that mounts, from its start to its clean end.
//!
//! ```text
//!   MountCmd ──start──▶ Mount ──unmount──▶ exit status 0 asserted
//!       │                  └──drop──▶ unmounted, by force if it must be; the process is ended and reaped
//!       └─refused─▶ Outcome: no mount, no new name and no pidfile are left
//! ```
//! The process is known by its pidfile: in the background the test sees only the launching command, and the daemon is a
//! grandchild that the test process reaps as a child subreaper.

use std::ffi::{OsStr, OsString};
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::mpsc::{RecvTimeoutError, Sender, channel};
use std::thread;
use std::time::Duration;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use super::cmd::{Cmd, Outcome, Running};
use super::folder::Folder;
use super::mounts::{MountEntry, detach, mounts_below, unmount};
use super::process::{Ended, is_running, peak_memory, poll_until, wait_end};

/// Deadline for a mount to appear or disappear, and for its process to end.
const DEADLINE: Duration = Duration::from_secs(60);

/// Longest lifetime of one mount in a test. Then its process is killed, which ends a read that hangs with an error. Longer
/// than all commands together that use one mount may take.
const WATCHDOG: Duration = Duration::from_secs(900);

/// A mount to create: the command line of the program, and assertions about its result.
#[derive(Debug)]
pub struct MountCmd<'s> {
    folder: &'s Folder,
    point: PathBuf,
    args: Vec<OsString>,
    through: Vec<OsString>,
    foreground: bool,
    pidfile: Option<PathBuf>,
    env: Vec<(String, String)>,
    memory: Option<u64>,
    deadline: Duration,
}

impl<'s> MountCmd<'s> {
    /// Creates a command that mounts at the folder `mnt`, which is created if it does not exist.
    pub(super) fn new(folder: &'s Folder) -> Self {
        let pidfile = Some(folder.path(format!("{}.pid", folder.next())));
        let (point, args) = (folder.path("mnt"), Vec::new());
        let (env, deadline) = (Vec::new(), Duration::from_secs(60));
        Self {
            folder,
            point,
            args,
            through: Vec::new(),
            foreground: false,
            pidfile,
            env,
            memory: None,
            deadline,
        }
    }

    /// Sets another mount point, below the test's folder. It is not created.
    #[must_use]
    pub fn at(mut self, name: impl AsRef<Path>) -> Self {
        self.point = self.folder.path(name);
        self
    }

    /// Adds an option or a `KEY=VALUE`.
    #[must_use]
    pub fn arg(mut self, arg: impl AsRef<OsStr>) -> Self {
        self.args.push(arg.as_ref().to_owned());
        self
    }

    /// Appends arguments.
    pub fn args(self, args: impl IntoIterator<Item = impl AsRef<OsStr>>) -> Self {
        args.into_iter().fold(self, Self::arg)
    }

    /// Runs the program by another one, which gets these words and then the program with its arguments.
    #[must_use]
    pub fn through(mut self, words: impl IntoIterator<Item = impl AsRef<OsStr>>) -> Self {
        self.through = words.into_iter().map(|word| word.as_ref().to_owned()).collect();
        self
    }

    /// Adds `file=PATH`; the path is absolute or relative to the test's folder.
    #[must_use]
    pub fn file(mut self, path: impl AsRef<Path>) -> Self {
        let mut argument = OsString::from("file=");
        argument.push(self.folder.path(path));
        self.args.push(argument);
        self
    }

    /// Keeps the program in the foreground (`-f`), which captures its output.
    #[must_use]
    pub fn foreground(mut self) -> Self {
        self.foreground = true;
        self
    }

    /// Sets another name for the pidfile, below the test's folder.
    #[must_use]
    pub fn pidfile(mut self, name: impl AsRef<Path>) -> Self {
        self.pidfile = Some(self.folder.path(name));
        self
    }

    /// Omits `--pidfile`. Only for mounts that are refused: without a pidfile the process is not known.
    #[must_use]
    pub fn without_pidfile(mut self) -> Self {
        self.pidfile = None;
        self
    }

    /// Sets an environment variable, as [`Cmd::env`] does.
    #[must_use]
    pub fn env(mut self, name: &str, value: &str) -> Self {
        self.env.push((name.to_owned(), value.to_owned()));
        self
    }

    /// Sets the deadline of the command.
    #[must_use]
    pub fn deadline(mut self, deadline: Duration) -> Self {
        self.deadline = deadline;
        self
    }

    /// Limits the private writable memory, as [`Cmd::memory`] does.
    #[must_use]
    pub fn memory(mut self, bytes: u64) -> Self {
        self.memory = Some(bytes);
        self
    }

    /// Mounts; panics with the program's output if that fails.
    #[track_caller]
    pub fn start(self) -> Mount {
        match self.try_start() {
            Ok(mount) => mount,
            Err(outcome) => panic!("no mount: {outcome}"),
        }
    }

    /// Mounts, or returns the outcome of a program that exited with a status other than 0.
    ///
    /// In the background the mount must exist when the program returns. In the foreground this function waits for the
    /// pidfile, which the program writes once the files can be read.
    ///
    /// Panics if the program reports success without a mount, or if the foreground program ends.
    #[track_caller]
    pub fn try_start(self) -> Result<Mount, Outcome> {
        let before = mounts_below(self.folder.root());
        let (root, foreground) = (self.folder.root().to_owned(), self.foreground);
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
                "exit status 0, but nothing is mounted at {}; the mounts are {:?}",
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
            watchdog: Some(start_watchdog(pid)),
        })
    }

    /// Panics unless the program refuses with status `code` and leaves no mount, no new name and no pidfile.
    #[track_caller]
    pub fn refused(self, code: i32) -> Outcome {
        self.refused_with_any(&[code])
    }

    /// Panics like [`refused`](Self::refused), but accepts any of several exit statuses.
    #[track_caller]
    pub fn refused_with_any(self, codes: &[i32]) -> Outcome {
        let (folder, point, pidfile) = (self.folder, self.point.clone(), self.pidfile.clone());
        let before = mounts_below(folder.root());
        let existed = point == folder.path("mnt") || point.exists();
        // A refused program ends on its own in the foreground as well, so both cases wait for its end.
        match self.in_background().try_start() {
            Ok(mount) => panic!("mounted at {}, but a refusal was expected", mount.point.display()),
            Err(outcome) => {
                assert_eq!(
                    mounts_below(folder.root()),
                    before,
                    "a failed mount left a mount: {outcome}"
                );
                assert_eq!(
                    point.exists(),
                    existed,
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

    /// Replaces the foreground mode by a plain `-f` argument, so that the caller waits for the end of the process.
    fn in_background(mut self) -> Self {
        if self.foreground {
            self.foreground = false;
            self.args.push("-f".into());
        }
        self
    }

    /// Builds the command line; creates the folder `mnt` if it is the mount point.
    fn command(self) -> Cmd {
        if self.point == self.folder.path("mnt") && !self.point.exists() {
            self.folder.mkdir("mnt");
        }
        let mut cmd = self.folder.vmdkfuse_through(&self.through).deadline(self.deadline);
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

/// An existing mount. Its Drop unmounts it and waits until its process has ended, or kills the process.
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
    /// Returns the mount point as it was given on the command line.
    pub fn point(&self) -> &Path {
        &self.point
    }

    /// Returns the entry of the mount in the kernel's mount table.
    pub fn entry(&self) -> &MountEntry {
        &self.entry
    }

    /// Returns the path of a file in the mount.
    pub fn file(&self, name: impl AsRef<Path>) -> PathBuf {
        self.entry.point.join(name)
    }

    /// Lists the names in the mount, sorted.
    #[track_caller]
    pub fn names(&self) -> Vec<String> {
        let entries = fs::read_dir(&self.entry.point).expect("listing the mount");
        let mut names: Vec<_> = entries
            .map(|entry| entry.expect("a name").file_name().to_string_lossy().into_owned())
            .collect();
        names.sort();
        names
    }

    /// Returns the process ID of the daemon.
    pub fn pid(&self) -> i32 {
        self.pid
    }

    /// Returns the peak resident memory of the daemon in bytes.
    pub fn peak_memory(&self) -> u64 {
        peak_memory(self.pid)
    }

    /// Returns stdout and stderr printed so far if the program runs in the foreground, else two empty strings.
    pub fn output(&self) -> (String, String) {
        self.running.as_ref().map(Running::output).unwrap_or_default()
    }

    /// Returns true if the mount is in the kernel's mount table.
    pub fn is_mounted(&self) -> bool {
        mounts_below(&self.root).contains(&self.entry)
    }

    /// Returns true while the daemon runs.
    pub fn is_running(&self) -> bool {
        self.ended.is_none() && is_running(self.pid)
    }

    /// Sends a signal to the daemon.
    pub fn signal(&self, signal: Signal) {
        kill(Pid::from_raw(self.pid), signal).expect("sending a signal");
    }

    /// Waits until the mount has disappeared from the kernel's mount table; panics after the deadline.
    #[track_caller]
    pub fn wait_unmounted(&self) {
        assert!(
            poll_until(DEADLINE, || !self.is_mounted()),
            "still mounted after {DEADLINE:?}: {:?}",
            self.entry
        );
    }

    /// Waits until the daemon has ended on its own; panics after the deadline.
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

    /// Unmounts with `fusermount3 -u` as a user does; panics unless the daemon then exits with status 0.
    #[track_caller]
    pub fn unmount(mut self) {
        unmount(&self.entry.point);
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
            let unmounted = Cmd::new("fusermount3").arg("-uq").arg(&self.entry.point).run();
            if unmounted.ended.code != Some(0) {
                detach(&self.entry.point);
            }
        }
        let mut stuck = false;
        if self.ended.is_none() && wait_end(self.pid, DEADLINE).is_none() {
            stuck = true;
            kill(Pid::from_raw(self.pid), Signal::SIGKILL).ok();
            wait_end(self.pid, DEADLINE);
        }
        // A panic during a panic aborts the process, which would hide the first message.
        if stuck && !thread::panicking() {
            panic!(
                "process {} still ran {DEADLINE:?} after its mount had disappeared",
                self.pid
            );
        }
    }
}

/// Returns true if `entry` can be the requested mount: a FUSE mount at `point`, or at its folder for a new name in it.
fn serves(point: &Path, entry: &MountEntry) -> bool {
    let is_fuse = entry.fs_type.starts_with("fuse");
    is_fuse && (entry.point == point || Some(entry.point.as_path()) == point.parent())
}

/// Waits until a foreground process has written its pidfile; panics if the process ends or the deadline passes.
#[track_caller]
fn wait_for_pidfile(pidfile: Option<&Path>, running: &Running) {
    let pidfile = pidfile.expect("a foreground mount needs a pidfile");
    // The line feed is the last byte: without it the file is still being written.
    let written = || fs::read_to_string(pidfile).is_ok_and(|text| text.ends_with('\n'));
    poll_until(DEADLINE, || written() || !is_running(running.pid));
    if !written() {
        kill(Pid::from_raw(running.pid), Signal::SIGKILL).ok();
        let ended = wait_end(running.pid, DEADLINE);
        panic!("no mount from the foreground process: {ended:?} {:?}", running.output());
    }
}

/// Reads the process ID from the pidfile; panics if that process does not run.
#[track_caller]
fn read_pid(pidfile: Option<&Path>, outcome: &Outcome) -> i32 {
    let pidfile = pidfile.unwrap_or_else(|| panic!("a background mount needs a pidfile: {outcome}"));
    let text = fs::read_to_string(pidfile).unwrap_or_else(|e| panic!("status 0, but no pidfile ({e}): {outcome}"));
    let pid = text
        .trim()
        .parse()
        .unwrap_or_else(|e| panic!("the pidfile contains {text:?}, not a process ID ({e})"));
    assert!(
        is_running(pid),
        "the pidfile names process {pid}, which does not run: {outcome}"
    );
    pid
}

/// Starts a thread that kills the process after [`WATCHDOG`], unless the returned sender is dropped before.
fn start_watchdog(pid: i32) -> Sender<()> {
    let (sender, receiver) = channel::<()>();
    thread::spawn(move || {
        if receiver.recv_timeout(WATCHDOG) == Err(RecvTimeoutError::Timeout) {
            eprintln!("WATCHDOG: process {pid} served a mount for {WATCHDOG:?} and is killed");
            kill(Pid::from_raw(pid), Signal::SIGKILL).ok();
        }
    });
    sender
}
