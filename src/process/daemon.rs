//! Daemonization: forks into the background and reports to the parent when the mount can be read.
//!
//! ```text
//!   user's shell ── parent ── fork ── child: stdin+stdout → /dev/null
//!                     │                 │  opens, mounts, reads
//!                     │ ◄─── pipe ──────┤  warning…  then one of: ready | failure
//!                     │                 │  before "ready": setsid, chdir /, stderr → /dev/null; then it serves
//!                returns 0 or 1, with the one message on standard error
//! ```
//! Until the mount can be read the child stays in the caller's process group. automount(8) and systemd's automount units
//! let only processes of the group that they started through to the directory that is being mounted; any other process
//! that touches it, the first read through the mount included, would wait for a mount that waits for it.
//!
//! Invariants:
//! - The process forks before it starts any thread, see [`start`]. A forked child has only the thread that forked, so a
//!   lock that another thread held would stay locked forever.
//! - One fork is enough. The child leads a session without a terminal and never opens a terminal, so no second fork is
//!   needed to keep it from acquiring one. The umask is inherited unchanged.
//! - A parent that exits before it receives "ready" is a failed start: its caller does not know of the mount.
//!
//! A message on the pipe is one byte (`W` warning, `R` ready; `E`, `P`, `S` failures), the length of the text as 4 bytes in
//! little-endian order, and the text.

#![allow(unsafe_code)] // Only for fork, _exit, close_range and mallopt.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;

use nix::sys::wait::{WaitStatus, waitpid};
use nix::unistd::{ForkResult, Pid};

use crate::error::{Error, ErrorKind, Result};
use crate::process::output::message;

/// Longest text of one message, in bytes. A longer text is truncated.
const MAX_MESSAGE: usize = 64 << 10;

/// Role of the calling process after [`start`].
#[derive(Debug)]
pub enum Started {
    /// The parent, after the child has reported the result of the start.
    Parent(Verdict),
    /// The process that mounts and serves: the child, or the calling process in the foreground.
    Daemon(Status),
}

/// Result of the start. A failure has been printed already.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    /// The mount can be read.
    Ready,
    /// The start failed and there is no mount.
    Failed(Failure),
}

/// Reason of a failure, as far as exit statuses tell it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Failure {
    /// The caller may not do it.
    Permission,
    /// The system has no memory, processes or descriptors left.
    System,
    /// Anything else.
    Other,
}

impl Failure {
    /// Returns the reason of an error.
    pub fn of(error: &Error) -> Self {
        match error.kind() {
            ErrorKind::Os(libc::EPERM | libc::EACCES) => Self::Permission,
            ErrorKind::Os(libc::ENOMEM | libc::EAGAIN | libc::EMFILE | libc::ENFILE) => Self::System,
            _ => Self::Other,
        }
    }

    /// Returns the kind of the message that reports it.
    fn message(self) -> u8 {
        match self {
            Self::Permission => b'P',
            Self::System => b'S',
            Self::Other => b'E',
        }
    }

    fn of_message(kind: u8) -> Self {
        [Self::Permission, Self::System]
            .into_iter()
            .find(|failure| failure.message() == kind)
            .unwrap_or(Self::Other)
    }
}

/// Channel to the process that waits for the start: the pipe to the parent, or standard error in the foreground.
#[derive(Debug)]
pub struct Status(Option<File>);

/// Forks unless `foreground` is set. In the parent, blocks until the child is ready or has failed.
///
/// Fails with [`ErrorKind::Unsupported`] if the process has more than one thread.
pub fn start(foreground: bool) -> Result<Started> {
    if foreground {
        return Ok(Started::Daemon(Status(None)));
    }
    let (from_child, to_parent) =
        nix::unistd::pipe2(nix::fcntl::OFlag::O_CLOEXEC).map_err(|e| Error::io("pipe", e.into()))?;
    match fork()? {
        ForkResult::Parent { child } => {
            // With this copy open the pipe would not end when the child dies, and the parent would wait for ever.
            drop(to_parent);
            Ok(Started::Parent(listen(
                File::from(from_child),
                child,
                &mut io::stderr(),
            )))
        }
        ForkResult::Child => {
            // So that a write fails once the parent is gone: `ready` then gives the mount up.
            drop(from_child);
            let status = Status(Some(File::from(to_parent)));
            match release_standard_streams() {
                Ok(()) => Ok(Started::Daemon(status)),
                Err(e) => {
                    let failure = Failure::of(&e);
                    status.failed(&e);
                    Ok(Started::Parent(Verdict::Failed(failure)))
                }
            }
        }
    }
}

/// Forks a process that runs `work` with its end of a socket pair and then exits. Returns the other end and the process
/// ID. `socket` names the purpose of the socket in errors.
///
/// Fails with [`ErrorKind::Unsupported`] if the process has more than one thread.
pub(crate) fn helper(socket: &str, work: impl FnOnce(UnixStream)) -> Result<(UnixStream, Pid)> {
    let (ours, theirs) = UnixStream::pair().map_err(|e| Error::io(socket, e))?;
    match fork()? {
        ForkResult::Parent { child } => Ok((ours, child)),
        ForkResult::Child => {
            drop(ours);
            work(theirs);
            leave();
        }
    }
}

/// Forks after checking that the process has only one thread.
fn fork() -> Result<ForkResult> {
    let tasks = fs::read_dir("/proc/self/task")
        .map_err(|e| Error::io("/proc/self/task", e))?
        .count();
    // Counted by the kernel: a library may have started a thread that this program does not know of.
    if tasks != 1 {
        let text = format!("fork: {tasks} threads run already, and only a process with one thread can fork safely");
        return Err(Error::new(ErrorKind::Unsupported, text));
    }
    // SAFETY: this process has one thread (checked above), so the child is a complete copy. No lock can be held by a
    // thread that does not exist in the child.
    unsafe { nix::unistd::fork() }.map_err(|e| Error::io("fork", e.into()))
}

/// Makes all threads share one heap arena.
///
/// Cache blocks are allocated by one thread and freed by another. With one arena per thread, each arena would grow to
/// the size of the whole cache.
///
/// Must be called before any thread is started.
pub fn share_heap() {
    // SAFETY: mallopt changes a setting of the allocator and touches no memory of this program. Other C libraries have
    // no such setting, so the call is compiled for glibc only.
    #[cfg(target_env = "gnu")]
    unsafe {
        libc::mallopt(libc::M_ARENA_MAX, 1)
    };
}

/// Makes the process not dumpable: no core file with the content of disks, and no other process of the same user may attach
/// to it or read its memory and descriptors through `/proc`.
///
/// This process itself still reaches `/proc/self/fd`. What it costs: `/proc/PID/fdinfo` is closed too, so an ordinary user
/// is not told which of their own mounts holds a lock; root is.
pub fn forbid_dumps() -> Result<()> {
    nix::sys::prctl::set_dumpable(false).map_err(|e| Error::io("making the process not dumpable", e.into()))
}

/// Raises the soft limit of open files to the hard limit, because a split disk needs one descriptor for each extent.
pub fn raise_file_limit() {
    use nix::sys::resource::{Resource, getrlimit, setrlimit};
    // A failure is ignored: the soft limit stays in force, and an open beyond it fails with its own error.
    if let Ok((_, most)) = getrlimit(Resource::RLIMIT_NOFILE) {
        let _ = setrlimit(Resource::RLIMIT_NOFILE, most, most);
    }
}

/// Exits a forked child immediately. Its objects are copies of the parent's, so no destructor may run on them.
fn leave() -> ! {
    // SAFETY: _exit only ends the process. This program registers no atexit handler.
    unsafe { libc::_exit(0) }
}

impl Status {
    /// Sends a warning, or logs it if the parent cannot receive it.
    pub fn warn(&mut self, text: &str) {
        let sent = match &mut self.0 {
            Some(pipe) => send(pipe, b'W', text),
            None => {
                message(&mut io::stderr(), &format!("warning: {text}"));
                Ok(())
            }
        };
        if let Err(e) = sent {
            tracing::warn!("{text} (this warning was not delivered: {e})");
        }
    }

    /// Reports that the mount can be read. Leaves the caller's session, process group, working directory and standard
    /// error first, except in the foreground.
    ///
    /// An error means that the parent has exited, so the caller must give the mount up.
    pub fn ready(self) -> Result<()> {
        let Some(mut pipe) = self.0 else { return Ok(()) };
        leave_session()?;
        // Standard error is released before "ready" is sent. A caller that reads it to its end would otherwise wait
        // until the mount ends.
        silence()?;
        send(&mut pipe, b'R', "").map_err(|e| Error::io("the process that waited for the mount has exited", e))
    }

    /// Reports that the start failed, with its cause.
    pub fn failed(self, error: &Error) {
        let sent = match self.0 {
            Some(mut pipe) => send(&mut pipe, Failure::of(error).message(), error.to_string()),
            None => {
                message(&mut io::stderr(), &error.to_string());
                Ok(())
            }
        };
        if let Err(e) = sent {
            tracing::error!("{error} (this error was not delivered: {e})");
        }
    }
}

/// Detaches from the terminal, working directory, standard input and standard output of the caller.
pub(crate) fn detach() -> Result<()> {
    leave_session()?;
    release_standard_streams()
}

/// Leaves the session, process group and working directory of the caller.
fn leave_session() -> Result<()> {
    nix::unistd::setsid().map_err(|e| Error::io("setsid", e.into()))?;
    nix::unistd::chdir("/").map_err(|e| Error::io("chdir /", e.into()))
}

/// Redirects standard input and standard output to /dev/null.
pub(crate) fn release_standard_streams() -> Result<()> {
    let null = open_null()?;
    nix::unistd::dup2_stdin(&null).map_err(|e| Error::io("standard input", e.into()))?;
    nix::unistd::dup2_stdout(&null).map_err(|e| Error::io("standard output", e.into()))
}

/// Redirects standard error to /dev/null.
pub(crate) fn silence() -> Result<()> {
    nix::unistd::dup2_stderr(open_null()?).map_err(|e| Error::io("standard error", e.into()))
}

/// Opens /dev/null for reading and writing.
fn open_null() -> Result<OwnedFd> {
    let file = OpenOptions::new().read(true).write(true).open("/dev/null");
    file.map(OwnedFd::from).map_err(|e| Error::io("/dev/null", e))
}

/// Writes one message: its kind, its length as 4 bytes in little-endian order, its text.
pub(crate) fn send(pipe: &mut impl Write, kind: u8, text: impl AsRef<[u8]>) -> io::Result<()> {
    let text = text.as_ref();
    // May cut a character in two; the reader replaces invalid bytes.
    let text = &text[..text.len().min(MAX_MESSAGE)];
    let mut message = vec![kind];
    message.extend((text.len() as u32).to_le_bytes());
    message.extend(text);
    // In one call, so that a message is either whole or cut off by the end of the process.
    pipe.write_all(&message)
}

/// Reads the next message. Returns `None` at the end of the pipe, also if it ends within the header.
pub(crate) fn receive(pipe: &mut impl Read) -> io::Result<Option<(u8, Vec<u8>)>> {
    let mut head = [0u8; 5];
    match pipe.read_exact(&mut head) {
        Err(e) if e.kind() == io::ErrorKind::UnexpectedEof => return Ok(None),
        other => other?,
    }
    let [kind, len @ ..] = head;
    // Bounded, as the memory of a helper that has gone wrong may say anything.
    let mut text = vec![0; (u32::from_le_bytes(len) as usize).min(MAX_MESSAGE)];
    pipe.read_exact(&mut text)?;
    Ok(Some((kind, text)))
}

/// Prints the child's warnings until the child is ready or has failed. Runs in the parent.
fn listen(mut pipe: impl Read, child: Pid, stderr: &mut impl Write) -> Verdict {
    let mut failure = Failure::Other;
    let text = loop {
        match receive(&mut pipe) {
            Ok(Some((b'R', _))) => return Verdict::Ready,
            Ok(Some((b'W', text))) => message(stderr, &format!("warning: {}", String::from_utf8_lossy(&text))),
            Ok(Some((kind, text))) => {
                failure = Failure::of_message(kind);
                // The child unmounts on its way out. Waiting for its end guarantees that a caller that has received
                // the exit status finds no mount left.
                wait_for_exit(child);
                break String::from_utf8_lossy(&text).into_owned();
            }
            Ok(None) => break format!("the background process {} without a message", wait_for_exit(child)),
            Err(e) => break format!("reading from the background process failed: {e}"),
        }
    };
    message(stderr, &text);
    Verdict::Failed(failure)
}

/// Waits until the child exits and returns a description of how it ended.
fn wait_for_exit(child: Pid) -> String {
    loop {
        match waitpid(child, None) {
            Err(nix::errno::Errno::EINTR) => {}
            Ok(WaitStatus::Exited(_, status)) => return format!("ended with status {status}"),
            Ok(WaitStatus::Signaled(_, signal, _)) => return format!("was ended by {signal}"),
            Ok(other) => return format!("ended ({other:?})"),
            Err(e) => return format!("ended ({e})"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Runs [`listen`] on `bytes` from a child that has exited. The process ID is not a child of the test, so its exit
    /// status is unknown.
    fn listen_to(bytes: &[u8]) -> (Verdict, String) {
        let mut out = Vec::new();
        let verdict = listen(bytes, Pid::from_raw(i32::MAX), &mut out);
        (verdict, String::from_utf8(out).unwrap())
    }

    #[test]
    fn warnings_then_ready() {
        let mut bytes = Vec::new();
        send(&mut bytes, b'W', "half of it").unwrap();
        send(&mut bytes, b'R', "").unwrap();
        assert_eq!(
            listen_to(&bytes),
            (Verdict::Ready, "vmdkfuse: warning: half of it\n".into())
        );
    }

    #[test]
    fn a_failure_is_one_line_and_a_closed_pipe_is_a_failure() {
        let mut bytes = Vec::new();
        send(&mut bytes, b'E', "disk.vmdk: no such file").unwrap();
        assert_eq!(
            listen_to(&bytes),
            (
                Verdict::Failed(Failure::Other),
                "vmdkfuse: disk.vmdk: no such file\n".into()
            )
        );
        for end in 0..3 {
            let (verdict, text) = listen_to(&bytes[..end]);
            assert_eq!(verdict, Verdict::Failed(Failure::Other));
            assert!(text.starts_with("vmdkfuse: the background process ended"), "{text}");
        }
        let (verdict, text) = listen_to(&bytes[..8]);
        assert_eq!(verdict, Verdict::Failed(Failure::Other));
        assert!(
            text.starts_with("vmdkfuse: reading from the background process failed"),
            "{text}"
        );
    }

    #[test]
    fn the_reason_of_a_failure_reaches_the_parent() {
        for (errno, failure) in [
            (libc::EPERM, Failure::Permission),
            (libc::ENOMEM, Failure::System),
            (libc::EIO, Failure::Other),
        ] {
            let error = Error::new(ErrorKind::Os(errno), "no");
            let mut bytes = Vec::new();
            send(&mut bytes, Failure::of(&error).message(), error.to_string()).unwrap();
            assert_eq!(listen_to(&bytes).0, Verdict::Failed(failure));
        }
    }

    #[test]
    fn a_process_with_threads_is_not_forked() {
        std::thread::scope(|scope| {
            let (hold, held) = std::sync::mpsc::channel::<()>();
            scope.spawn(move || held.recv());
            assert!(start(false).unwrap_err().to_string().contains("threads run already"));
            drop(hold);
        });
    }
}
