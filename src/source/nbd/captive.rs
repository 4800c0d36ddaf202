//! A server that we run ourselves (`command=`), by socket activation.
//!
//! ```text
//!   listening Unix socket, its name removed at once ─► descriptor 3 of the server, LISTEN_FDS=1
//!   any number of connections: by /proc/self/fd, so nothing is left in the file system
//! ```
//! It ends with us, however we end: a regular end is a SIGTERM and a wait; where we are killed the kernel sends it the
//! SIGTERM. What it says on standard error goes to the log.

#![allow(unsafe_code)] // For the one call between fork and exec.

use std::ffi::OsString;
use std::fs;
use std::io::{BufRead, BufReader, Read};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::DirBuilderExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::{Child, ChildStderr, Command, Stdio};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use nix::fcntl::{OFlag, open};
use nix::sys::signal::{SigSet, Signal, kill};
use nix::sys::stat::Mode;
use nix::unistd::Pid;

use crate::error::{Error, ErrorKind, Result};

/// Moves the socket from standard input to where socket activation wants it, and tells the server that it is for it:
/// `LISTEN_PID` is its own process id, which the shell keeps at exec.
const ACTIVATE: &str = "exec 3<&0 </dev/null; export LISTEN_FDS=1 LISTEN_PID=$$; unset LISTEN_FDNAMES; exec \"$@\"";

/// How long a server may take to end after a SIGTERM: it may have to write out what it holds.
const GRACE: Duration = Duration::from_secs(10);

/// Bytes of a line of the server's that are logged.
const MAX_LINE: u64 = 1000;

/// Connections that may wait for the server to start.
const BACKLOG: i32 = 64;

/// A server of ours that runs.
#[derive(Debug)]
pub(super) struct Server {
    child: Mutex<Child>,
    /// The socket's place, open: its name is gone.
    place: OwnedFd,
    name: String,
    /// The last line that it said.
    said: Arc<Mutex<String>>,
}

impl Server {
    /// Starts the program `words[0]` with the other words as its arguments.
    ///
    /// To be called from a thread that lives as long as the server shall: its end is taken for ours.
    pub(super) fn start(words: &[OsString]) -> Result<Self> {
        let name = words
            .first()
            .map(|w| w.to_string_lossy().into_owned())
            .unwrap_or_default();
        let context = |e: std::io::Error| Error::io(format!("starting {name}"), e);
        let (listener, place) = listen().map_err(context)?;
        let mut command = Command::new("/bin/sh");
        command.args(["-c", ACTIVATE, "sh"]).args(words);
        command
            .stdin(OwnedFd::from(listener))
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .process_group(0);
        let parent = Pid::this();
        // SAFETY: sigprocmask, prctl and getppid are async-signal-safe, and nothing is allocated.
        unsafe {
            command.pre_exec(move || {
                // ours are blocked, and a server that never sees a SIGTERM would not end with us
                SigSet::empty().thread_set_mask()?;
                nix::sys::prctl::set_pdeathsig(Signal::SIGTERM)?;
                // it may have died before it could be told
                if Pid::parent() == parent {
                    Ok(())
                } else {
                    Err(std::io::Error::from_raw_os_error(libc::ESRCH))
                }
            })
        };
        let mut child = command.spawn().map_err(context)?;
        let said = Arc::new(Mutex::new(String::new()));
        if let Some(stderr) = child.stderr.take() {
            let (from, last) = (name.clone(), Arc::clone(&said));
            let reader = thread::Builder::new()
                .name("nbd-stderr".into())
                .spawn(move || log(&from, stderr, &last));
            reader.map_err(context)?;
        }
        Ok(Self {
            child: Mutex::new(child),
            place,
            name,
            said,
        })
    }

    /// A new connection to it. The system queues connections until it accepts them.
    pub(super) fn connect(&self) -> Result<UnixStream> {
        if let Some(how) = self.ended() {
            return Err(Error::new(ErrorKind::Os(libc::ECONNREFUSED), how));
        }
        let path = PathBuf::from(format!("/proc/self/fd/{}", self.place.as_raw_fd()));
        UnixStream::connect(path).map_err(|e| Error::io(format!("connecting to {}", self.name), e))
    }

    /// How it ended, if it does within a short time.
    pub(super) fn ending(&self, within: Duration) -> Option<String> {
        let until = Instant::now() + within;
        loop {
            match self.ended() {
                None if Instant::now() < until => thread::sleep(Duration::from_millis(2)),
                other => return other,
            }
        }
    }

    /// How it ended, if it did.
    pub(super) fn ended(&self) -> Option<String> {
        let mut child = self.child.lock().unwrap_or_else(PoisonError::into_inner);
        match child.try_wait() {
            Ok(None) => None,
            Ok(Some(status)) => {
                let said = self.said.lock().unwrap_or_else(PoisonError::into_inner);
                let last = if said.is_empty() {
                    String::new()
                } else {
                    format!("; it said: {said}")
                };
                Some(format!("{} has ended: {status}{last}", self.name))
            }
            Err(e) => Some(format!("{}: {e}", self.name)),
        }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let child = self.child.get_mut().unwrap_or_else(PoisonError::into_inner);
        let Ok(None) = child.try_wait() else { return };
        // The whole group: a shell may have started the server.
        if let Ok(group) = i32::try_from(child.id()) {
            let _ = kill(Pid::from_raw(-group), Signal::SIGTERM);
        }
        let deadline = Instant::now() + GRACE;
        while let Ok(None) = child.try_wait() {
            if Instant::now() > deadline {
                tracing::warn!("{} did not end within {} s and is killed", self.name, GRACE.as_secs());
                let _ = child.kill();
                let _ = child.wait();
                return;
            }
            thread::sleep(Duration::from_millis(2));
        }
    }
}

/// A listening socket, and a descriptor of its place, which has no name any more.
fn listen() -> std::io::Result<(UnixListener, OwnedFd)> {
    let dir = private_dir()?;
    let path = dir.join("s");
    let made = (|| {
        let listener = UnixListener::bind(&path)?;
        nix::sys::socket::listen(&listener, nix::sys::socket::Backlog::new(BACKLOG)?)?;
        let place = open(&path, OFlag::O_PATH | OFlag::O_CLOEXEC, Mode::empty())?;
        Ok((listener, place))
    })();
    // What can't be removed is an empty folder with an unused name.
    let _ = fs::remove_file(&path);
    let _ = fs::remove_dir(&dir);
    made
}

/// A fresh folder that only we may look into.
fn private_dir() -> std::io::Result<PathBuf> {
    let base = std::env::temp_dir();
    let mut tries = 0u32;
    loop {
        let now = std::time::SystemTime::now()
            .duration_since(std::time::UNIX_EPOCH)
            .map_or(0, |d| d.subsec_nanos());
        let dir = base.join(format!("vmdkfuse-{}-{now}-{tries}", std::process::id()));
        match fs::DirBuilder::new().mode(0o700).create(&dir) {
            Err(e) if e.kind() == std::io::ErrorKind::AlreadyExists && tries < 100 => tries += 1,
            other => return other.map(|()| dir),
        }
    }
}

/// Logs what a server says, line by line, until it closes its end.
fn log(name: &str, stderr: ChildStderr, last: &Mutex<String>) {
    let mut lines = BufReader::new(stderr);
    let mut line = Vec::new();
    loop {
        line.clear();
        match (&mut lines).take(MAX_LINE).read_until(b'\n', &mut line) {
            Ok(0) | Err(_) => return,
            Ok(_) => {
                let text = String::from_utf8_lossy(&line).trim_end().to_owned();
                tracing::warn!("{name}: {text}");
                *last.lock().unwrap_or_else(PoisonError::into_inner) = text;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn words(words: &[&str]) -> Vec<OsString> {
        words.iter().map(OsString::from).collect()
    }

    #[test]
    fn a_server_gets_the_socket_as_its_third_descriptor_and_ends_with_us() {
        // It answers like an activated server would find things, then waits.
        let script =
            "test \"$LISTEN_FDS\" = 1 && test \"$LISTEN_PID\" = $$ && test -S /proc/self/fd/3 && exec sleep 1000";
        let server = Server::start(&words(&["sh", "-c", script])).unwrap();
        let stream = server.connect().unwrap();
        drop(stream);
        let pid = server.child.lock().unwrap().id();
        assert_eq!(server.ended(), None);
        drop(server);
        assert!(!PathBuf::from(format!("/proc/{pid}")).exists());
    }

    #[test]
    fn the_end_of_a_server_is_told() {
        let server = Server::start(&words(&["sh", "-c", "exit 7"])).unwrap();
        let deadline = Instant::now() + Duration::from_secs(20);
        while server.ended().is_none() && Instant::now() < deadline {
            thread::yield_now();
        }
        let said = server.connect().unwrap_err().to_string();
        assert!(said.contains("sh has ended: exit status: 7"), "{said}");
    }

    #[test]
    fn nothing_is_left_in_the_file_system() {
        let (listener, place) = listen().unwrap();
        let path = listener.local_addr().unwrap();
        assert!(!path.as_pathname().unwrap().exists());
        assert!(!path.as_pathname().unwrap().parent().unwrap().exists());
        let _client = UnixStream::connect(format!("/proc/self/fd/{}", place.as_raw_fd())).unwrap();
        listener.accept().unwrap();
    }
}
