//! Programs run by a test, with a deadline and captured output.
//!
//! A [`Cmd`] is built, then run to its end ([`Cmd::run`]), which yields an [`Outcome`] with assertions on the exit
//! status and the output. A foreground mount is started without waiting (`Cmd::start`).

use std::ffi::{OsStr, OsString};
use std::fmt;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use super::process::{Ended, reap_orphans, wait_end};
use super::user::User;

/// Default deadline: long enough for a slow machine, short enough to end a test run that hangs.
const DEADLINE: Duration = Duration::from_secs(60);

/// Deadline of a program that boots a guest without KVM: 15 s of computing, which a busy machine takes its time for.
pub const GUEST_DEADLINE: Duration = Duration::from_secs(300);

/// A program to run.
///
/// Its output goes to unnamed files, not pipes: a daemon that the program leaves behind would keep the write end of a
/// pipe open, and the reader would never see its end.
#[derive(Debug)]
pub struct Cmd {
    program: OsString,
    args: Vec<OsString>,
    dir: Option<OsString>,
    env: Vec<(String, String)>,
    user: Option<User>,
    deadline: Duration,
}

impl Cmd {
    /// Creates a command for this program name or path, looked up in `PATH`, `/usr/sbin` and `/sbin`.
    pub fn new(program: impl AsRef<OsStr>) -> Self {
        let program = program.as_ref().to_owned();
        Self {
            program,
            args: Vec::new(),
            dir: None,
            env: Vec::new(),
            user: None,
            deadline: DEADLINE,
        }
    }

    /// Creates a command that runs in a mount namespace of its own. Needs root.
    ///
    /// The namespace starts with a copy of every mount of the tests that run at the same time, and their daemons would not
    /// end before it does. So these are detached first. Without `-i` umount(8) could call a helper, which ends the daemon.
    #[must_use]
    pub fn in_namespace() -> Self {
        let detach = "umount -i -l -a -t fuse.vmdkfuse; exec \"$@\"";
        Self::new("unshare").args(["-m", "--propagation", "private", "sh", "-c", detach, "sh"])
    }

    /// Adds an argument.
    #[must_use]
    pub fn arg(mut self, arg: impl AsRef<OsStr>) -> Self {
        self.args.push(arg.as_ref().to_owned());
        self
    }

    /// Adds `KEY=PATH` as one argument; the path may hold any bytes.
    #[must_use]
    pub fn key(self, key: &str, path: impl AsRef<OsStr>) -> Self {
        let mut word = OsString::from(format!("{key}="));
        word.push(path);
        self.arg(word)
    }

    /// Adds several arguments.
    #[must_use]
    pub fn args(mut self, args: impl IntoIterator<Item = impl AsRef<OsStr>>) -> Self {
        self.args.extend(args.into_iter().map(|arg| arg.as_ref().to_owned()));
        self
    }

    /// Sets the working directory.
    #[must_use]
    pub fn dir(mut self, dir: impl AsRef<Path>) -> Self {
        self.dir = Some(dir.as_ref().as_os_str().to_owned());
        self
    }

    /// Sets an environment variable.
    #[must_use]
    pub fn env(mut self, name: &str, value: &str) -> Self {
        self.env.push((name.to_owned(), value.to_owned()));
        self
    }

    /// Runs the program as another user, without supplementary groups; `None` keeps the current user. Needs root.
    #[must_use]
    pub fn user(mut self, user: Option<User>) -> Self {
        self.user = user;
        self
    }

    /// Runs the command under `prlimit --data`, which limits its private writable memory (heap, stacks) to `bytes`.
    #[must_use]
    pub fn memory(mut self, bytes: u64) -> Self {
        let mut args = vec![OsString::from(format!("--data={bytes}")), self.program];
        args.append(&mut self.args);
        self.program = OsString::from("prlimit");
        self.args = args;
        self
    }

    /// Sets the deadline of [`run`](Self::run); the default is one minute.
    #[must_use]
    pub fn deadline(mut self, deadline: Duration) -> Self {
        self.deadline = deadline;
        self
    }

    /// Runs the program to its end.
    ///
    /// Panics if the program cannot be started, or if its deadline passes; it is then killed.
    #[track_caller]
    pub fn run(self) -> Outcome {
        let command_line = self.to_string();
        let deadline = self.deadline;
        let running = self.start();
        match wait_end(running.pid, deadline) {
            Some(ended) => running.outcome(ended),
            None => {
                running.kill();
                let (stdout, stderr) = running.output();
                panic!("`{command_line}` did not end within {deadline:?}\nstdout: {stdout}\nstderr: {stderr}");
            }
        }
    }

    /// Starts the program and returns at once.
    #[allow(
        clippy::zombie_processes,
        reason = "`wait_end` reaps it: it can wait with a deadline, `Child` cannot"
    )]
    #[track_caller]
    pub(super) fn start(self) -> Running {
        reap_orphans();
        let command_line = self.to_string();
        let (stdout, stderr) = (unnamed(), unnamed());
        let mut command = Command::new(&self.program);
        let path = std::env::var("PATH").unwrap_or_default();
        command
            .args(&self.args)
            .env("PATH", format!("{path}:/usr/sbin:/sbin"))
            .stdin(Stdio::null());
        command
            .stdout(stdout.try_clone().expect("stdout"))
            .stderr(stderr.try_clone().expect("stderr"));
        command.env("LC_ALL", "C.UTF-8").envs(self.env);
        if let Some(dir) = &self.dir {
            command.current_dir(dir);
        }
        if let Some(user) = self.user {
            // The standard library also drops all supplementary groups if root sets another user.
            command.uid(user.uid).gid(user.gid).env("HOME", "/");
            if self.dir.is_none() {
                command.current_dir("/");
            }
        }
        let child = command
            .spawn()
            .unwrap_or_else(|e| panic!("`{command_line}` cannot be started: {e}"));
        Running {
            pid: i32::try_from(child.id()).expect("a process id"),
            command_line,
            stdout,
            stderr,
        }
    }
}

impl fmt::Display for Cmd {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.program.to_string_lossy())?;
        self.args
            .iter()
            .try_for_each(|arg| write!(f, " {}", arg.to_string_lossy()))
    }
}

/// A program that was started and not yet reaped.
#[derive(Debug)]
pub(super) struct Running {
    pub(super) pid: i32,
    command_line: String,
    stdout: File,
    stderr: File,
}

impl Running {
    /// Returns the standard output and the standard error printed so far.
    pub(super) fn output(&self) -> (String, String) {
        (text(&self.stdout), text(&self.stderr))
    }

    /// Kills the program and reaps it.
    fn kill(&self) {
        kill(Pid::from_raw(self.pid), Signal::SIGKILL).ok();
        wait_end(self.pid, DEADLINE);
    }

    /// Collects the output of the program, which has ended.
    fn outcome(self, ended: Ended) -> Outcome {
        let (stdout, stderr) = self.output();
        Outcome {
            command_line: self.command_line,
            ended,
            stdout,
            stderr,
        }
    }
}

/// Exit status and output of a program that has ended.
#[derive(Debug)]
pub struct Outcome {
    command_line: String,
    /// Exit status or signal.
    pub ended: Ended,
    /// Captured standard output.
    pub stdout: String,
    /// Captured standard error.
    pub stderr: String,
}

impl Outcome {
    /// Panics unless the exit status is `code`.
    #[track_caller]
    pub fn expect_code(self, code: i32) -> Self {
        assert_eq!(self.ended.code, Some(code), "{self}");
        self
    }

    /// Panics unless the exit status is 0.
    #[track_caller]
    pub fn ok(self) -> Self {
        self.expect_code(0)
    }

    /// Panics unless the exit status is `code` and stderr is a single error line that contains each of `words`, in
    /// upper or lower case, and is not the output of a panic.
    #[track_caller]
    pub fn one_error(self, code: i32, words: &[&str]) -> Self {
        let outcome = self.expect_code(code);
        let lines = outcome.stderr.lines().filter(|line| !line.trim().is_empty()).count();
        assert_eq!(lines, 1, "not one line of error: {outcome}");
        outcome.error_names(words)
    }

    /// Panics unless stderr contains each of `words`, in upper or lower case, and shows no panic.
    #[track_caller]
    pub fn error_names(self, words: &[&str]) -> Self {
        let low = self.stderr.to_lowercase();
        assert!(!low.contains("panicked"), "{self}");
        for word in words {
            assert!(
                low.contains(&word.to_lowercase()),
                "the error does not contain {word:?}: {self}"
            );
        }
        self
    }

    /// Parses the standard output as JSON; panics if it is not JSON.
    #[track_caller]
    pub fn json(&self) -> serde_json::Value {
        serde_json::from_str(&self.stdout).unwrap_or_else(|e| panic!("no JSON ({e}): {self}"))
    }
}

impl fmt::Display for Outcome {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Outcome {
            command_line,
            ended,
            stdout,
            stderr,
        } = self;
        let stdout = if stdout.len() > 4000 {
            &format!("{} bytes", stdout.len())
        } else {
            stdout
        };
        write!(
            f,
            "`{command_line}` ended with {ended:?}\nstdout: {stdout}\nstderr: {stderr}"
        )
    }
}

/// Creates a file without a name, which the kernel frees when its last descriptor is closed.
fn unnamed() -> File {
    tempfile::tempfile().expect("an unnamed file")
}

/// Reads a whole output file. Positioned reads leave the file offset alone, which the program shares and writes at.
fn text(file: &File) -> String {
    let len = file.metadata().expect("the size of the output").len();
    let mut bytes = vec![0; usize::try_from(len).expect("a size")];
    file.read_exact_at(&mut bytes, 0).expect("reading the output");
    String::from_utf8_lossy(&bytes).into_owned()
}

/// Runs guestfish; panics unless it succeeds. Its appliance runs without KVM, which is slow but works everywhere.
pub fn guestfish(arguments: &[&str]) -> Outcome {
    guestfs("guestfish", arguments)
}

/// Runs a program of libguestfs; panics unless it succeeds. See [`guestfish`].
pub fn guestfs(program: &str, arguments: &[&str]) -> Outcome {
    let command = Cmd::new(program)
        .env("LIBGUESTFS_BACKEND", "direct")
        .env("LIBGUESTFS_BACKEND_SETTINGS", "force_tcg");
    command.args(arguments).deadline(GUEST_DEADLINE).run().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn output_and_status_are_captured() {
        let outcome = Cmd::new("sh")
            .args(["-c", "echo out; echo It failed >&2; exit 7"])
            .run();
        assert_eq!(outcome.stdout, "out\n");
        outcome.one_error(7, &["it failed"]);
    }

    #[test]
    fn a_daemon_does_not_block_the_reader_of_its_output() {
        let outcome = Cmd::new("sh")
            .args(["-c", "sleep 300 & echo $!"])
            .deadline(Duration::from_secs(60))
            .run()
            .ok();
        let pid: i32 = outcome.stdout.trim().parse().unwrap();
        kill(Pid::from_raw(pid), Signal::SIGKILL).unwrap();
        assert_eq!(
            wait_end(pid, Duration::from_secs(60)).unwrap().signal,
            Some(9),
            "the orphan is reaped"
        );
    }

    #[test]
    #[should_panic(expected = "did not end within")]
    fn a_program_is_killed_at_its_deadline() {
        Cmd::new("sleep").arg("60").deadline(Duration::from_millis(50)).run();
    }

    #[test]
    #[should_panic(expected = "not one line of error")]
    fn two_lines_are_not_one_error() {
        Cmd::new("sh")
            .args(["-c", "echo a >&2; echo b >&2; exit 1"])
            .run()
            .one_error(1, &[]);
    }
}
