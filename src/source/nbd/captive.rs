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

use std::ffi::{OsStr, OsString};
use std::io::{self, BufRead, BufReader, Read};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixListener;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, ChildStderr, Command, ExitStatus, Stdio};
use std::sync::{Arc, Mutex};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::fcntl::{OFlag, open};
use nix::sys::signal::{Signal, kill};
use nix::sys::socket::{AddressFamily, SockFlag, SockType, UnixAddr, socket};
use nix::sys::stat::Mode;
use nix::unistd::Pid;

use super::own_server::{Cancel, OwnServer};
use super::private_dir::PrivateDir;
use crate::error::{Error, ErrorKind, Result};
use crate::mutex::{lock, unlocked};
use crate::process::{self, inherited};

/// Shell script that moves the socket from standard input to descriptor 3, where socket activation expects it, and
/// executes the server. `LISTEN_PID` must be the process ID of the server: that of the shell, because exec keeps it.
const ACTIVATE: &str = "exec 3<&0 </dev/null; export LISTEN_FDS=1 LISTEN_PID=$$; unset LISTEN_FDNAMES; exec \"$@\"";

/// Time for a server to exit after SIGTERM: it may have to flush its caches.
const GRACE: Duration = Duration::from_secs(10);

/// Length in bytes at which a line of the server's standard error is split in the log. Bounds the memory for it.
pub(in crate::source) const MAX_LINE: usize = 1000;

/// Time to wait for the rest of the output of a server that has ended. A process that it started may keep the pipe open.
const LAST_LINE: Duration = Duration::from_millis(100);

/// The same at the end of the daemon, when nothing waits for it.
const LAST_OUTPUT: Duration = Duration::from_secs(1);

/// Connections that the kernel queues until the server accepts them.
const BACKLOG: i32 = 64;

/// Pause between two attempts to connect while the queue of connections is full.
const QUEUE_FULL_PAUSE: Duration = Duration::from_millis(20);

/// Logs a line of a server's standard error: `log(name, line, closing)`. Returns a text to report if the server ends, if this
/// is one. `closing`: connections to the server were closed a moment ago.
pub(in crate::source) type LogLine = fn(&str, &str, bool) -> Option<String>;

/// Time for which a server may complain of connections that this process has closed.
const CLOSING: Duration = Duration::from_secs(1);

/// A running captive server. Terminates it on drop.
#[derive(Debug)]
pub(in crate::source) struct CaptiveServer {
    child: Mutex<Child>,
    /// O_PATH descriptor of the listening socket, whose name is removed.
    socket_inode: OwnedFd,
    name: String,
    /// Last line of standard error, for the message about the server's exit.
    last_line: Arc<Mutex<String>>,
    /// Time of the last close of connections.
    closed: Arc<Mutex<Option<Instant>>>,
    /// Thread that reads standard error.
    reader: Option<JoinHandle<()>>,
}

impl CaptiveServer {
    /// Starts the program `words[0]` with the other words as its arguments, by socket activation.
    pub(super) fn start(words: &[OsString]) -> Result<Self> {
        let name = words
            .first()
            .map(|w| w.to_string_lossy().into_owned())
            .unwrap_or_default();
        check_program(words.first().map_or(OsStr::new(""), OsString::as_os_str))?;
        let mut command = Command::new("/bin/sh");
        // The server may be started again after this process has changed to `/`.
        command
            .args(["-c", ACTIVATE, "sh"])
            .args(words)
            .stdout(Stdio::null())
            .current_dir(process::start_dir());
        let log = |name: &str, line: &str, closing: bool| {
            // A connection that was still being made looks like a crash to the server when it is closed.
            if closing {
                tracing::debug!("{name}: {line}");
            } else {
                tracing::warn!("{name}: {line}");
            }
            Some(line.to_owned())
        };
        Self::spawn(name, command, log)
    }

    /// Starts `command` with the listening socket as its standard input. Each line that it writes to standard error goes
    /// to `log`, whose result is the text to report when the server ends.
    ///
    /// Must be called from a thread that lives as long as the server should: the kernel sends the parent-death signal
    /// when that thread ends, not the process.
    pub(in crate::source) fn spawn(name: String, mut command: Command, log: LogLine) -> Result<Self> {
        let context = |e: std::io::Error| Error::io(format!("starting {name}"), e);
        let (listener, socket_inode) = listen().map_err(context)?;
        command
            .stdin(OwnedFd::from(listener))
            .stderr(Stdio::piped())
            .process_group(0);
        inherited::reset_in_child(&mut command);
        let parent = Pid::this();
        // SAFETY: prctl and getppid are async-signal-safe, and nothing is allocated.
        unsafe {
            command.pre_exec(move || {
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
        let stderr = child.stderr.take();
        // From here on an error terminates the child, because this is dropped.
        let mut server = Self {
            child: Mutex::new(child),
            name,
            socket_inode,
            last_line: Arc::default(),
            closed: Arc::default(),
            reader: None,
        };
        if let Some(stderr) = stderr {
            let (server_name, last) = (server.name.clone(), Arc::clone(&server.last_line));
            let closed = Arc::clone(&server.closed);
            let reader = thread::Builder::new()
                .name("nbd-stderr".into())
                .spawn(move || read_log(&server_name, stderr, log, &last, &closed));
            server.reader = Some(reader.map_err(|e| Error::io(format!("starting {}", server.name), e))?);
        }
        Ok(server)
    }

    /// Opens a connection to the server. Does not wait until the server accepts it: the kernel queues up to [`BACKLOG`]
    /// connections. While its queue is full, waits until `deadline`, or until `cancel` returns true.
    pub(in crate::source) fn connect(&self, deadline: Instant, cancel: Cancel<'_>) -> Result<OwnedFd> {
        let context = || format!("connecting to {}", self.name);
        let path = format!("/proc/self/fd/{}", self.socket_inode.as_raw_fd());
        let address = UnixAddr::new(path.as_str()).map_err(|e| Error::io(context(), e.into()))?;
        // Not blocking: a blocking connect would wait for a full queue without end.
        let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
        let socket = socket(AddressFamily::Unix, SockType::Stream, flags, None);
        let socket = socket.map_err(|e| Error::io(context(), e.into()))?;
        loop {
            // A message with the last output of the server says more than "connection refused".
            if let Some(report) = self.exit_report() {
                return Err(Error::new(ErrorKind::Os(libc::ECONNREFUSED), report));
            }
            match nix::sys::socket::connect(socket.as_raw_fd(), &address) {
                Ok(()) => return Ok(socket),
                Err(Errno::EINTR) => {}
                Err(Errno::EAGAIN) if cancel() => return Err(Error::io(context(), Errno::ECANCELED.into())),
                // The kernel reports no event when the queue has space again.
                Err(Errno::EAGAIN) if Instant::now() < deadline => thread::sleep(QUEUE_FULL_PAUSE),
                Err(Errno::EAGAIN) => {
                    let text = format!("{}: it accepts no connection, and {BACKLOG} wait already", context());
                    return Err(Error::new(ErrorKind::Os(libc::ETIMEDOUT), text));
                }
                Err(e) => return Err(Error::io(context(), e.into())),
            }
        }
    }

    /// Waits up to `within` for the server to exit. Returns a message about its exit, or `None` if it still runs.
    pub(in crate::source) fn exit_within(&self, within: Duration) -> Option<String> {
        let until = Instant::now() + within;
        loop {
            match self.exit_report() {
                None if Instant::now() < until => thread::sleep(Duration::from_millis(2)),
                other => return other,
            }
        }
    }

    /// Returns a message about the exit of the server: its status and its last output. Returns `None` if it still runs.
    pub(in crate::source) fn exit_report(&self) -> Option<String> {
        let (status, last) = self.exit()?;
        let status = match status {
            Ok(status) => status.to_string(),
            Err(e) => e.to_string(),
        };
        let last = if last.is_empty() {
            last
        } else {
            format!("; its last output: {last}")
        };
        Some(format!("{} has ended: {status}{last}", self.name))
    }

    /// Returns how the server ended and the last line of its output, or `None` if it still runs.
    pub(in crate::source) fn exit(&self) -> Option<(io::Result<ExitStatus>, String)> {
        let status = self.try_wait().transpose()?;
        self.wait_for_output(LAST_LINE);
        let last_line = lock(&self.last_line);
        Some((status, last_line.clone()))
    }

    /// Waits until the output of a server that is gone has been read: its last line may still be in the pipe.
    fn wait_for_output(&self, within: Duration) {
        let until = Instant::now() + within;
        while self.reader.as_ref().is_some_and(|reader| !reader.is_finished()) && Instant::now() < until {
            thread::sleep(Duration::from_millis(1));
        }
    }

    /// Returns what a server that may still run has written for the report about its end.
    pub(in crate::source) fn reported(&self) -> Option<String> {
        let last_line = lock(&self.last_line);
        Some(last_line.clone()).filter(|line| !line.is_empty())
    }

    /// Ends the server: sends SIGTERM, and kills it if it has not ended within `grace`.
    pub(in crate::source) fn end(&mut self, grace: Duration) {
        let child = unlocked(&mut self.child);
        let Ok(None) = child.try_wait() else { return };
        // To the whole process group: `command=` may be a shell that has started the server.
        if let Ok(group) = i32::try_from(child.id()) {
            let _ = kill(Pid::from_raw(-group), Signal::SIGTERM);
        }
        let deadline = Instant::now() + grace;
        while let Ok(None) = child.try_wait() {
            if Instant::now() > deadline {
                tracing::warn!(
                    "{} did not exit within {} s after SIGTERM: killing it",
                    self.name,
                    grace.as_secs()
                );
                let _ = child.kill();
                let _ = child.wait();
                return;
            }
            thread::sleep(Duration::from_millis(2));
        }
    }

    fn try_wait(&self) -> io::Result<Option<ExitStatus>> {
        lock(&self.child).try_wait()
    }
}

impl OwnServer for CaptiveServer {
    fn connect(&self, _first: bool, deadline: Instant, cancel: Cancel<'_>) -> Result<OwnedFd> {
        self.connect(deadline, cancel)
    }

    fn exit_within(&self, within: Duration) -> Option<String> {
        self.exit_within(within)
    }

    fn closing(&self) {
        *lock(&self.closed) = Some(Instant::now());
    }
}

impl Drop for CaptiveServer {
    fn drop(&mut self) {
        self.end(GRACE);
        // The daemon may exit next, and its log would lack what the server said at its end.
        self.wait_for_output(LAST_OUTPUT);
    }
}

/// Creates a listening Unix socket, and an O_PATH descriptor by which it can be connected to. Removes its name.
fn listen() -> std::io::Result<(UnixListener, OwnedFd)> {
    // No other user can connect or replace the socket before its name is removed, with the folder.
    let dir = PrivateDir::new()?;
    let path = dir.path().join("s");
    let listener = UnixListener::bind(&path)?;
    nix::sys::socket::listen(&listener, nix::sys::socket::Backlog::new(BACKLOG)?)?;
    let socket_inode = open(&path, OFlag::O_PATH | OFlag::O_CLOEXEC, Mode::empty())?;
    Ok((listener, socket_inode))
}

/// Checks that the program exists, as the shell searches it. Otherwise only the log would tell, in the shell's words.
fn check_program(program: &OsStr) -> Result<()> {
    let is_path = program.as_bytes().contains(&b'/');
    let path = std::env::var_os("PATH").unwrap_or_default();
    let found = if is_path {
        is_program(Path::new(program))
    } else {
        std::env::split_paths(&path).any(|dir| is_program(&dir.join(program)))
    };
    if found && !program.is_empty() {
        return Ok(());
    }
    let place = if is_path { "" } else { " in PATH" };
    let advice = if program.as_bytes().contains(&b' ') {
        "give the program alone, and each of its arguments by arg="
    } else {
        "install it, or give its full path"
    };
    Err(Error::new(
        ErrorKind::NotFound,
        format!("command={}: no such program{place}; {advice}", program.display()),
    ))
}

/// Returns true if `path`, from the folder in which this program was started, is an executable file.
fn is_program(path: &Path) -> bool {
    let path = process::start_dir().join(path);
    path.metadata()
        .is_ok_and(|meta| meta.is_file() && meta.permissions().mode() & 0o111 != 0)
}

/// Logs standard error of the server line by line until the pipe is closed. Runs in a thread of its own.
fn read_log(name: &str, stderr: ChildStderr, log: LogLine, last: &Mutex<String>, closed: &Mutex<Option<Instant>>) {
    let mut lines = BufReader::new(stderr);
    let mut line = Vec::new();
    loop {
        line.clear();
        match (&mut lines).take(MAX_LINE as u64).read_until(b'\n', &mut line) {
            Ok(0) | Err(_) => return,
            Ok(_) => {
                let text = String::from_utf8_lossy(&line);
                let closing = lock(closed).is_some_and(|at| at.elapsed() < CLOSING);
                if let Some(text) = log(name, text.trim_end(), closing) {
                    *lock(last) = text;
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixStream;
    use std::path::PathBuf;

    use super::*;
    use crate::source::nbd::own_server::never;

    fn soon() -> Instant {
        Instant::now() + Duration::from_secs(60)
    }

    fn words(words: &[&str]) -> Vec<OsString> {
        words.iter().map(OsString::from).collect()
    }

    #[test]
    fn a_server_gets_the_socket_as_descriptor_3_and_ends_on_drop() {
        // Fails unless the environment is that of socket activation, then waits.
        let script = "test \"$LISTEN_FDS\" = 1 && test \"$LISTEN_PID\" = $$ && test -S /proc/self/fd/3 && echo so it is >&2 && exec sleep 1000";
        let server = CaptiveServer::start(&words(&["sh", "-c", script])).unwrap();
        let deadline = soon();
        while server.reported().is_none() && server.exit_report().is_none() && Instant::now() < deadline {
            thread::yield_now();
        }
        assert_eq!(server.reported().as_deref(), Some("so it is"));
        let stream = server.connect(soon(), &never).unwrap();
        drop(stream);
        let pid = server.child.lock().unwrap().id();
        assert_eq!(server.exit_report(), None);
        drop(server);
        assert!(!PathBuf::from(format!("/proc/{pid}")).exists());
    }

    #[test]
    fn a_program_that_does_not_exist_is_named_in_one_sentence() {
        for (program, expected) in [
            ("no-such-program", "no such program in PATH; install it"),
            ("sh -c true", "each of its arguments by arg="),
            ("/no/such", "no such program; install it"),
            ("/etc/passwd", "no such program"),
            ("", "no such program"),
        ] {
            let message = CaptiveServer::start(&words(&[program])).unwrap_err().to_string();
            assert!(message.starts_with(&format!("command={program}: ")), "{message}");
            assert!(message.contains(expected), "{message}");
        }
        check_program(OsStr::new("sh")).unwrap();
        check_program(OsStr::new("/bin/sh")).unwrap();
    }

    #[test]
    fn connecting_to_a_server_that_accepts_nothing_ends_at_the_deadline() {
        let server = CaptiveServer::start(&words(&["sleep", "1000"])).unwrap();
        let mut waiting = Vec::new();
        let refused = loop {
            match server.connect(Instant::now() + Duration::from_millis(100), &never) {
                Ok(socket) => waiting.push(socket),
                Err(e) => break e,
            }
            assert!(waiting.len() < 1000);
        };
        assert_eq!(refused.kind(), ErrorKind::Os(libc::ETIMEDOUT));
    }

    #[test]
    fn the_exit_status_of_a_server_is_reported() {
        let server = CaptiveServer::start(&words(&["sh", "-c", "exit 7"])).unwrap();
        let deadline = soon();
        while server.exit_report().is_none() && Instant::now() < deadline {
            thread::yield_now();
        }
        let message = server.connect(soon(), &never).unwrap_err().to_string();
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
