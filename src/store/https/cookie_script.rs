//! Program that prints a session cookie (`cookie-script=`), for servers whose login this program does not know.
//!
//! The text goes to a shell, which gets it in its environment: on its command line every user could read it. Its output is
//! one line, the value of the `Cookie` header.

use std::io::Read;
use std::os::fd::AsFd;
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, ExitStatus, Stdio};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::{Signal, killpg};
use nix::unistd::Pid;
use reqwest::header::HeaderValue;

use super::failure::Failure;
use super::request::{Limits, TICK};
use crate::config::Secret;
use crate::error::{Error, ErrorKind};

/// Longest output in bytes.
const MAX_OUTPUT: u64 = 64 << 10;

/// Process group of a script. Killed on drop, with what the script has left running.
struct Running(Child);

impl Drop for Running {
    fn drop(&mut self) {
        if let Ok(pid) = i32::try_from(self.0.id()) {
            // Fails if nothing of the group is left.
            let _ = killpg(Pid::from_raw(pid), Signal::SIGKILL);
        }
        let _ = self.0.wait();
    }
}

/// Runs the script, and returns the cookie that it prints. `iteration` is the number of runs before.
pub(super) fn run(script: &Secret, url: &str, iteration: u64, limits: Limits<'_>) -> Result<HeaderValue, Failure> {
    let failed = |why: String| {
        Failure::from(Error::new(
            ErrorKind::Os(libc::EACCES),
            format!("cookie-script=: {why}"),
        ))
    };
    let child = Command::new("/bin/sh")
        .args(["-c", "script=$cookie_script; unset cookie_script; eval \"$script\""])
        .env("cookie_script", script.reveal())
        .env("url", url)
        .env("iteration", iteration.to_string())
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::inherit())
        .process_group(0)
        .spawn();
    let mut running = Running(child.map_err(|e| failed(format!("/bin/sh: {e}")))?);
    let output = read_output(&mut running.0, limits)?;
    let status = wait(&mut running.0, limits)?.map_err(|e| failed(e.to_string()))?;
    if !status.success() {
        return Err(failed(format!("the script failed ({status})")));
    }
    let line = output.split(|b| *b == b'\n').next().unwrap_or_default().trim_ascii();
    if line.is_empty() {
        return Err(failed(
            "the script printed nothing, expected a line NAME=VALUE".to_owned(),
        ));
    }
    let mut cookie = HeaderValue::from_bytes(line)
        .map_err(|_e| failed("the script printed characters that HTTP cannot send".to_owned()))?;
    cookie.set_sensitive(true);
    Ok(cookie)
}

/// Reads what the script prints, until it closes its output or has ended.
fn read_output(child: &mut Child, limits: Limits<'_>) -> Result<Vec<u8>, Failure> {
    let mut output = Vec::new();
    let Some(mut pipe) = child.stdout.take() else {
        return Ok(output);
    };
    loop {
        limits.check()?;
        let tick = PollTimeout::try_from(TICK).unwrap_or(PollTimeout::ZERO);
        let mut waiting = [PollFd::new(pipe.as_fd(), PollFlags::POLLIN)];
        if !matches!(poll(&mut waiting, tick), Ok(ready) if ready > 0) {
            // A process that the script has left running may hold the pipe open for long.
            if matches!(child.try_wait(), Ok(Some(_))) {
                return Ok(output);
            }
            continue;
        }
        let mut piece = [0; 4096];
        match pipe.read(&mut piece) {
            Ok(0) | Err(_) => return Ok(output),
            Ok(read) if output.len() as u64 <= MAX_OUTPUT => {
                output.extend_from_slice(piece.get(..read).unwrap_or_default());
            }
            Ok(_) => {}
        }
    }
}

/// Waits for the end of the script.
fn wait(child: &mut Child, limits: Limits<'_>) -> Result<std::io::Result<ExitStatus>, Failure> {
    let mut pause = std::time::Duration::from_millis(1);
    loop {
        match child.try_wait() {
            Ok(None) => {}
            Ok(Some(status)) => return Ok(Ok(status)),
            Err(e) => return Ok(Err(e)),
        }
        limits.check()?;
        std::thread::sleep(pause);
        pause = (pause * 2).min(TICK);
    }
}
