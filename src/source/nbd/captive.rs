//! Captive server: an NBD server that the daemon starts itself (`command=`), by socket activation.
//!
//! ```text
//!   daemon  listening Unix socket, its name removed at once ─► descriptor 3 of the server, LISTEN_FDS=1
//!           O_PATH descriptor of the socket ─► connect by /proc/self/fd/N, any number of times
//! ```
//! The socket has no name in the file system while the server runs, so nothing is left behind if the daemon is killed,
//! and no other process can connect by a path.
//!
//! The server ends with the daemon. A daemon that exits sends SIGTERM to the process group of the server and waits. If
//! the daemon is killed, the kernel sends the SIGTERM (PR_SET_PDEATHSIG). Standard error of the server goes to the log.
//!
//! Each mutex guards one field and is held alone, except that `last_line` is acquired while `child` is held.

#![allow(unsafe_code)] // One call between fork and exec.

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
use crate::process;

/// Shell script that moves the socket from standard input to descriptor 3, where socket activation expects it, and
/// executes the server. `LISTEN_PID` must be the process ID of the server: that of the shell, because exec keeps it.
const ACTIVATE: &str = "exec 3<&0 </dev/null; export LISTEN_FDS=1 LISTEN_PID=$$; unset LISTEN_FDNAMES; exec \"$@\"";

/// Time for a server to exit after SIGTERM: it may have to flush its caches.
const GRACE: Duration = Duration::from_secs(10);

/// Length in bytes at which a line of the server's standard error is split in the log. Bounds the memory for it.
const MAX_LINE: u64 = 1000;

/// Connections that the kernel queues until the server accepts them.
const BACKLOG: i32 = 64;

/// A running captive server. Terminates it on drop.
#[derive(Debug)]
pub(super) struct CaptiveServer {
    child: Mutex<Child>,
    /// O_PATH descriptor of the listening socket, whose name is removed.
    socket_inode: OwnedFd,
    name: String,
    /// Last line of standard error, for the message about the server's exit.
    last_line: Arc<Mutex<String>>,
}

impl CaptiveServer {
    /// Starts the program `words[0]` with the other words as its arguments.
    ///
    /// Must be called from a thread that lives as long as the server should: the kernel sends the parent-death signal
    /// when that thread ends, not the process.
    pub(super) fn start(words: &[OsString]) -> Result<Self> {
        let name = words
            .first()
            .map(|w| w.to_string_lossy().into_owned())
            .unwrap_or_default();
        let context = |e: std::io::Error| Error::io(format!("starting {name}"), e);
        let (listener, socket_inode) = listen().map_err(context)?;
        let mut command = Command::new("/bin/sh");
        // The server may be started again after this process has changed to `/`.
        command
            .args(["-c", ACTIVATE, "sh"])
            .args(words)
            .current_dir(process::start_dir());
        command
            .stdin(OwnedFd::from(listener))
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .process_group(0);
        let parent = Pid::this();
        // SAFETY: sigprocmask, prctl and getppid are async-signal-safe, and nothing is allocated.
        unsafe {
            command.pre_exec(move || {
                // The daemon blocks its termination signals and exec keeps the signal mask. A server that never
                // receives SIGTERM would outlive the daemon.
                SigSet::empty().thread_set_mask()?;
                nix::sys::prctl::set_pdeathsig(Signal::SIGTERM)?;
                // The parent may have died before prctl took effect, and then no signal follows. A changed
                // parent process ID shows this.
                if Pid::parent() == parent {
                    Ok(())
                } else {
                    Err(std::io::Error::from_raw_os_error(libc::ESRCH))
                }
            })
        };
        let mut child = command.spawn().map_err(context)?;
        let last_line = Arc::new(Mutex::new(String::new()));
        if let Some(stderr) = child.stderr.take() {
            let (server_name, last) = (name.clone(), Arc::clone(&last_line));
            let reader = thread::Builder::new()
                .name("nbd-stderr".into())
                .spawn(move || log(&server_name, stderr, &last));
            reader.map_err(context)?;
        }
        Ok(Self {
            child: Mutex::new(child),
            name,
            socket_inode,
            last_line,
        })
    }

    /// Opens a connection to the server. Does not wait until the server accepts it: the kernel queues up to [`BACKLOG`]
    /// connections.
    pub(super) fn connect(&self) -> Result<UnixStream> {
        // A message with the last output of the server says more than "connection refused".
        if let Some(report) = self.exit_report() {
            return Err(Error::new(ErrorKind::Os(libc::ECONNREFUSED), report));
        }
        let path = PathBuf::from(format!("/proc/self/fd/{}", self.socket_inode.as_raw_fd()));
        UnixStream::connect(path).map_err(|e| Error::io(format!("connecting to {}", self.name), e))
    }

    /// Waits up to `within` for the server to exit. Returns a message about its exit, or `None` if it still runs.
    pub(super) fn exit_within(&self, within: Duration) -> Option<String> {
        let until = Instant::now() + within;
        loop {
            match self.exit_report() {
                None if Instant::now() < until => thread::sleep(Duration::from_millis(2)),
                other => return other,
            }
        }
    }

    /// Returns a message about the exit of the server: its status and its last output. Returns `None` if it still runs.
    pub(super) fn exit_report(&self) -> Option<String> {
        let mut child = self.child.lock().unwrap_or_else(PoisonError::into_inner);
        match child.try_wait() {
            Ok(None) => None,
            Ok(Some(status)) => {
                let last_line = self.last_line.lock().unwrap_or_else(PoisonError::into_inner);
                let last = if last_line.is_empty() {
                    String::new()
                } else {
                    format!("; its last output: {last_line}")
                };
                Some(format!("{} has ended: {status}{last}", self.name))
            }
            Err(e) => Some(format!("{}: {e}", self.name)),
        }
    }
}

impl Drop for CaptiveServer {
    fn drop(&mut self) {
        let child = self.child.get_mut().unwrap_or_else(PoisonError::into_inner);
        let Ok(None) = child.try_wait() else { return };
        // To the whole process group: `command=` may be a shell that has started the server.
        if let Ok(group) = i32::try_from(child.id()) {
            let _ = kill(Pid::from_raw(-group), Signal::SIGTERM);
        }
        let deadline = Instant::now() + GRACE;
        while let Ok(None) = child.try_wait() {
            if Instant::now() > deadline {
                tracing::warn!(
                    "{} did not exit within {} s after SIGTERM: killing it",
                    self.name,
                    GRACE.as_secs()
                );
                let _ = child.kill();
                let _ = child.wait();
                return;
            }
            thread::sleep(Duration::from_millis(2));
        }
    }
}

/// Creates a listening Unix socket, and an O_PATH descriptor by which it can be connected to. Removes its name.
fn listen() -> std::io::Result<(UnixListener, OwnedFd)> {
    let dir = private_dir()?;
    let path = dir.join("s");
    let created = (|| {
        let listener = UnixListener::bind(&path)?;
        nix::sys::socket::listen(&listener, nix::sys::socket::Backlog::new(BACKLOG)?)?;
        let socket_inode = open(&path, OFlag::O_PATH | OFlag::O_CLOEXEC, Mode::empty())?;
        Ok((listener, socket_inode))
    })();
    // Errors are ignored: what may remain is an unused name in a private folder.
    let _ = fs::remove_file(&path);
    let _ = fs::remove_dir(&dir);
    created
}

/// Creates a new folder that only this user can access, so that no other user can connect or replace the socket before
/// its name is removed.
fn private_dir() -> std::io::Result<PathBuf> {
    let base = process::start_dir().join(std::env::temp_dir());
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

/// Logs standard error of the server line by line until the pipe is closed. Runs in a thread of its own.
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
    fn a_server_gets_the_socket_as_descriptor_3_and_ends_on_drop() {
        // Fails unless the environment is that of socket activation, then waits.
        let script =
            "test \"$LISTEN_FDS\" = 1 && test \"$LISTEN_PID\" = $$ && test -S /proc/self/fd/3 && exec sleep 1000";
        let server = CaptiveServer::start(&words(&["sh", "-c", script])).unwrap();
        let stream = server.connect().unwrap();
        drop(stream);
        let pid = server.child.lock().unwrap().id();
        assert_eq!(server.exit_report(), None);
        drop(server);
        assert!(!PathBuf::from(format!("/proc/{pid}")).exists());
    }

    #[test]
    fn the_exit_status_of_a_server_is_reported() {
        let server = CaptiveServer::start(&words(&["sh", "-c", "exit 7"])).unwrap();
        let deadline = Instant::now() + Duration::from_secs(20);
        while server.exit_report().is_none() && Instant::now() < deadline {
            thread::yield_now();
        }
        let message = server.connect().unwrap_err().to_string();
        assert!(message.contains("sh has ended: exit status: 7"), "{message}");
    }

    #[test]
    fn nothing_is_left_in_the_file_system() {
        let (listener, socket_inode) = listen().unwrap();
        let path = listener.local_addr().unwrap();
        assert!(!path.as_pathname().unwrap().exists());
        assert!(!path.as_pathname().unwrap().parent().unwrap().exists());
        let _client = UnixStream::connect(format!("/proc/self/fd/{}", socket_inode.as_raw_fd())).unwrap();
        listener.accept().unwrap();
    }
}
