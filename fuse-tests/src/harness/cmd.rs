//! Running a program to its end, with a deadline and its output kept.

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
use super::scratch::User;

/// Long enough for a slow machine, short enough to end a hung test run.
const DEADLINE: Duration = Duration::from_secs(60);

/// A program to run.
///
/// Its output goes to unnamed files, not pipes: a daemon that it leaves behind cannot keep the reader waiting.
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
    /// The program with this name or path, found as a shell finds it (and in the `sbin` folders).
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

    /// One more argument.
    #[must_use]
    pub fn arg(mut self, arg: impl AsRef<OsStr>) -> Self {
        self.args.push(arg.as_ref().to_owned());
        self
    }

    /// `KEY=PATH` as one argument, whatever bytes the path holds.
    #[must_use]
    pub fn key(self, key: &str, path: impl AsRef<OsStr>) -> Self {
        let mut word = OsString::from(format!("{key}="));
        word.push(path);
        self.arg(word)
    }

    /// More arguments.
    #[must_use]
    pub fn args(mut self, args: impl IntoIterator<Item = impl AsRef<OsStr>>) -> Self {
        self.args.extend(args.into_iter().map(|arg| arg.as_ref().to_owned()));
        self
    }

    /// The working directory.
    #[must_use]
    pub fn dir(mut self, dir: impl AsRef<Path>) -> Self {
        self.dir = Some(dir.as_ref().as_os_str().to_owned());
        self
    }

    /// A variable of the environment.
    #[must_use]
    pub fn env(mut self, name: &str, value: &str) -> Self {
        self.env.push((name.to_owned(), value.to_owned()));
        self
    }

    /// Runs as somebody else, without further groups. Needs root.
    #[must_use]
    pub fn user(mut self, user: Option<User>) -> Self {
        self.user = user;
        self
    }

    /// The whole thing under `prlimit`, with at most this much private writable memory (heap, stacks of threads).
    #[must_use]
    pub fn memory(mut self, bytes: u64) -> Self {
        let mut args = vec![OsString::from(format!("--data={bytes}")), self.program];
        args.append(&mut self.args);
        self.program = OsString::from("prlimit");
        self.args = args;
        self
    }

    /// Another deadline than one minute.
    #[must_use]
    pub fn deadline(mut self, deadline: Duration) -> Self {
        self.deadline = deadline;
        self
    }

    /// Runs it to its end. Panics if it cannot be started or its deadline passes; it is killed then.
    #[track_caller]
    pub fn run(self) -> Outcome {
        let shown = self.to_string();
        let deadline = self.deadline;
        let running = self.start();
        match wait_end(running.pid, deadline) {
            Some(ended) => running.outcome(ended),
            None => {
                running.kill();
                let (stdout, stderr) = running.output();
                panic!("`{shown}` did not end within {deadline:?}\nstdout: {stdout}\nstderr: {stderr}");
            }
        }
    }

    /// Starts it and leaves it running.
    #[allow(
        clippy::zombie_processes,
        reason = "`wait_end` reaps it: it can wait with a deadline, `Child` cannot"
    )]
    #[track_caller]
    pub(super) fn start(self) -> Running {
        reap_orphans();
        let shown = self.to_string();
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
            // The standard library drops all other groups when root changes the user.
            command.uid(user.uid).gid(user.gid).env("HOME", "/");
            if self.dir.is_none() {
                command.current_dir("/");
            }
        }
        let child = command
            .spawn()
            .unwrap_or_else(|e| panic!("`{shown}` cannot be started: {e}"));
        Running {
            pid: i32::try_from(child.id()).expect("a process id"),
            shown,
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

/// A program that was started.
#[derive(Debug)]
pub(super) struct Running {
    pub(super) pid: i32,
    shown: String,
    stdout: File,
    stderr: File,
}

impl Running {
    /// What it has printed up to now.
    pub(super) fn output(&self) -> (String, String) {
        (text(&self.stdout), text(&self.stderr))
    }

    /// Ends it for good.
    fn kill(&self) {
        kill(Pid::from_raw(self.pid), Signal::SIGKILL).ok();
        wait_end(self.pid, DEADLINE);
    }

    /// Its outcome, now that it has ended.
    fn outcome(self, ended: Ended) -> Outcome {
        let (stdout, stderr) = self.output();
        Outcome {
            shown: self.shown,
            ended,
            stdout,
            stderr,
        }
    }
}

/// What a program did.
#[derive(Debug)]
pub struct Outcome {
    shown: String,
    /// How it ended.
    pub ended: Ended,
    /// What it printed.
    pub stdout: String,
    /// What it complained about.
    pub stderr: String,
}

impl Outcome {
    /// Panics unless its exit status is `code`.
    #[track_caller]
    pub fn expect_code(self, code: i32) -> Self {
        assert_eq!(self.ended.code, Some(code), "{self}");
        self
    }

    /// Panics unless its exit status is 0.
    #[track_caller]
    pub fn ok(self) -> Self {
        self.expect_code(0)
    }

    /// Panics unless it failed with status `code` and one clear line: on stderr, not a panic's output, with each of `words`
    /// in it (in any case).
    #[track_caller]
    pub fn one_error(self, code: i32, words: &[&str]) -> Self {
        let outcome = self.expect_code(code);
        let lines = outcome.stderr.lines().filter(|line| !line.trim().is_empty()).count();
        assert_eq!(lines, 1, "not one line of error: {outcome}");
        outcome.error_names(words)
    }

    /// Panics unless stderr holds each of `words`, in any case, and shows no panic.
    #[track_caller]
    pub fn error_names(self, words: &[&str]) -> Self {
        let low = self.stderr.to_lowercase();
        assert!(!low.contains("panicked"), "{self}");
        for word in words {
            assert!(
                low.contains(&word.to_lowercase()),
                "the error does not say {word:?}: {self}"
            );
        }
        self
    }

    /// What it printed, as JSON.
    #[track_caller]
    pub fn json(&self) -> serde_json::Value {
        serde_json::from_str(&self.stdout).unwrap_or_else(|e| panic!("no JSON ({e}): {self}"))
    }
}

impl fmt::Display for Outcome {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Outcome {
            shown,
            ended,
            stdout,
            stderr,
        } = self;
        let stdout = if stdout.len() > 4000 {
            &format!("{} bytes", stdout.len())
        } else {
            stdout
        };
        write!(f, "`{shown}` ended with {ended:?}\nstdout: {stdout}\nstderr: {stderr}")
    }
}

/// A file that nothing names.
fn unnamed() -> File {
    tempfile::tempfile().expect("an unnamed file")
}

/// Everything in it, read without moving the offset that the process shares.
fn text(file: &File) -> String {
    let len = file.metadata().expect("the size of the output").len();
    let mut bytes = vec![0; usize::try_from(len).expect("a size")];
    file.read_exact_at(&mut bytes, 0).expect("reading the output");
    String::from_utf8_lossy(&bytes).into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn output_and_status_are_kept() {
        let outcome = Cmd::new("sh")
            .args(["-c", "echo out; echo It failed >&2; exit 7"])
            .run();
        assert_eq!(outcome.stdout, "out\n");
        outcome.one_error(7, &["it failed"]);
    }

    #[test]
    fn a_daemon_does_not_keep_its_reader_waiting() {
        let outcome = Cmd::new("sh")
            .args(["-c", "sleep 30 & echo $!"])
            .deadline(Duration::from_secs(20))
            .run()
            .ok();
        let pid: i32 = outcome.stdout.trim().parse().unwrap();
        kill(Pid::from_raw(pid), Signal::SIGKILL).unwrap();
        assert_eq!(
            wait_end(pid, Duration::from_secs(20)).unwrap().signal,
            Some(9),
            "the orphan is reaped"
        );
    }

    #[test]
    #[should_panic(expected = "did not end within")]
    fn a_deadline_ends_it() {
        Cmd::new("sleep").arg("60").deadline(Duration::from_millis(50)).run();
    }

    #[test]
    #[should_panic(expected = "not one line of error")]
    fn two_lines_are_not_one() {
        Cmd::new("sh")
            .args(["-c", "echo a >&2; echo b >&2; exit 1"])
            .run()
            .one_error(1, &[]);
    }
}
