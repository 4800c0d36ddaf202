//! Into the background, and the word to the parent that the mount can be read.
//!
//! ```text
//!   user's shell ── parent ── fork ── child: setsid, chdir /, stdin+stdout → /dev/null
//!                     │                 │  opens, mounts, reads
//!                     │ ◄─── pipe ──────┤  warning…  then one of: ready | failure
//!                     │                 │  stderr → /dev/null, serves
//!                returns 0 or 1, with the one message on standard error
//! ```
//! The fork comes before any thread. One is enough: the child leads a session without a terminal and never
//! opens one, so no second fork has to keep it from getting one. The umask stays as it is. A parent that went
//! away before it heard is a failure as well: nobody would know of the mount.

#![allow(unsafe_code)] // Only for fork, _exit, close_range and mallopt.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;

use nix::sys::wait::{WaitStatus, waitpid};
use nix::unistd::{ForkResult, Pid};

use crate::error::{Error, ErrorKind, Result};

/// The program's name in its messages.
const NAME: &str = "vmdkfuse";

/// The longest message that is passed on, bytes.
const MAX_MESSAGE: usize = 64 << 10;

/// Which process this is after [`start`].
#[derive(Debug)]
pub enum Started {
    /// The parent; the child has had its say, and it was this.
    Parent(Verdict),
    /// The process that goes on.
    Daemon(Status),
}

/// What became of the start, with its message printed already.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    /// The mount can be read.
    Ready,
    /// There is none.
    Failed,
}

/// The line to whoever waits for the start; in the foreground that is standard error.
#[derive(Debug)]
pub struct Status(Option<File>);

/// Forks unless `foreground`. In the parent it returns when the child is ready or has failed.
pub fn start(foreground: bool) -> Result<Started> {
    if foreground {
        return Ok(Started::Daemon(Status(None)));
    }
    let (from_child, to_parent) =
        nix::unistd::pipe2(nix::fcntl::OFlag::O_CLOEXEC).map_err(|e| Error::io("pipe", e.into()))?;
    match fork()? {
        ForkResult::Parent { child } => {
            drop(to_parent);
            Ok(Started::Parent(listen(
                File::from(from_child),
                child,
                &mut io::stderr(),
            )))
        }
        ForkResult::Child => {
            drop(from_child);
            let status = Status(Some(File::from(to_parent)));
            match detach() {
                Ok(()) => Ok(Started::Daemon(status)),
                Err(e) => {
                    status.failed(&e);
                    Ok(Started::Parent(Verdict::Failed))
                }
            }
        }
    }
}

/// Forks a process that does `work` with its end of a socket, and ends then. The other end, and the process. `socket`
/// says what it is for.
///
/// Errors: as of every fork, where more than one thread runs.
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

/// Forks, if that is safe: an error where more than one thread runs.
fn fork() -> Result<ForkResult> {
    let tasks = fs::read_dir("/proc/self/task")
        .map_err(|e| Error::io("/proc/self/task", e))?
        .count();
    if tasks != 1 {
        let text = format!("{tasks} threads run already, where a process has to be forked from one");
        return Err(Error::new(ErrorKind::Unsupported, text));
    }
    // SAFETY: this process has one thread (checked above), so the child is a whole copy: no lock can be held by
    // a thread that is not there.
    unsafe { nix::unistd::fork() }.map_err(|e| Error::io("fork", e.into()))
}

/// Closes what the caller left open beyond the standard descriptors. A daemon that kept a file of a mount would keep
/// that mount busy; a file of its own mount it could not even close without waiting for itself.
///
/// To be called once the words are read, before all else: nothing of this process may be open yet.
pub fn close_inherited(kept: &[u32]) {
    let mut kept: Vec<u32> = kept.iter().copied().filter(|fd| *fd >= 3).collect();
    kept.sort_unstable();
    kept.dedup();
    let mut first = 3;
    for fd in kept.into_iter().map(Some).chain([None]) {
        let last = fd.map_or(libc::c_uint::MAX, |fd| fd - 1);
        if first <= last {
            // SAFETY: no object of this program owns a descriptor yet, so none loses its own.
            unsafe { libc::close_range(first, last, 0) };
        }
        first = fd.map_or(first, |fd| fd.saturating_add(1));
    }
}

/// Has all threads share one heap. Blocks of the cache are made by one thread and given back by another, so heaps of
/// their own would each grow to the size of the whole cache.
///
/// To be called before any thread is started.
pub fn share_heap() {
    // SAFETY: it changes a setting of the allocator and touches no memory of ours. Where it has no such setting
    // (another C library), nothing happens.
    #[cfg(target_env = "gnu")]
    unsafe {
        libc::mallopt(libc::M_ARENA_MAX, 1)
    };
}

/// Lets this process have as many open files as it may: a split disk has one for each extent.
pub fn raise_file_limit() {
    use nix::sys::resource::{Resource, getrlimit, setrlimit};
    // where it can't be raised the usual limit has to do, and an open that exceeds it says so
    if let Ok((_, most)) = getrlimit(Resource::RLIMIT_NOFILE) {
        let _ = setrlimit(Resource::RLIMIT_NOFILE, most, most);
    }
}

/// Ends a forked child where it stands: what it copied belongs to its parent, and no destructor may run on it.
fn leave() -> ! {
    // SAFETY: _exit only ends the process; nothing of ours waits for an atexit handler.
    unsafe { libc::_exit(0) }
}

impl Status {
    /// Passes a warning on.
    pub fn warn(&mut self, text: &str) {
        let sent = match &mut self.0 {
            Some(pipe) => send(pipe, b'W', text),
            None => writeln!(io::stderr(), "{NAME}: warning: {text}"),
        };
        if let Err(e) = sent {
            tracing::warn!("{text} (nobody reads this warning: {e})");
        }
    }

    /// Says that the mount can be read. From then on standard error is closed, except in the foreground.
    ///
    /// An error means that nobody waits any more: the mount is not wanted.
    pub fn ready(self) -> Result<()> {
        let Some(mut pipe) = self.0 else { return Ok(()) };
        // First, or a caller that waits for the end of our standard error would wait for the whole mount.
        silence()?;
        send(&mut pipe, b'R', "").map_err(|e| Error::io("the process that waited for the mount is gone", e))
    }

    /// Says that there will be no mount, and why.
    pub fn failed(self, error: &Error) {
        let sent = match self.0 {
            Some(mut pipe) => send(&mut pipe, b'E', error.to_string()),
            None => writeln!(io::stderr(), "{NAME}: {error}"),
        };
        if let Err(e) = sent {
            tracing::error!("{error} (nobody reads this: {e})");
        }
    }
}

/// Leaves the terminal, the folder, and standard input and output of whoever started us.
pub(crate) fn detach() -> Result<()> {
    let context = |what: &'static str| move |e: nix::errno::Errno| Error::io(what, e.into());
    nix::unistd::setsid().map_err(context("setsid"))?;
    nix::unistd::chdir("/").map_err(context("chdir /"))?;
    let null = null()?;
    nix::unistd::dup2_stdin(&null).map_err(context("standard input"))?;
    nix::unistd::dup2_stdout(&null).map_err(context("standard output"))
}

/// Leaves standard error as well.
pub(crate) fn silence() -> Result<()> {
    nix::unistd::dup2_stderr(null()?).map_err(|e| Error::io("standard error", e.into()))
}

fn null() -> Result<OwnedFd> {
    let file = OpenOptions::new().read(true).write(true).open("/dev/null");
    file.map(OwnedFd::from).map_err(|e| Error::io("/dev/null", e))
}

/// One message: its kind, its length as 4 bytes, its text.
pub(crate) fn send(pipe: &mut impl Write, kind: u8, text: impl AsRef<[u8]>) -> io::Result<()> {
    let text = text.as_ref();
    let text = &text[..text.len().min(MAX_MESSAGE)];
    let mut message = vec![kind];
    message.extend((text.len() as u32).to_le_bytes());
    message.extend(text);
    pipe.write_all(&message)
}

/// The next message; `None` at the end of the pipe.
pub(crate) fn receive(pipe: &mut impl Read) -> io::Result<Option<(u8, Vec<u8>)>> {
    let mut head = [0u8; 5];
    match pipe.read_exact(&mut head) {
        Err(e) if e.kind() == io::ErrorKind::UnexpectedEof => return Ok(None),
        other => other?,
    }
    let [kind, len @ ..] = head;
    let mut text = vec![0; (u32::from_le_bytes(len) as usize).min(MAX_MESSAGE)];
    pipe.read_exact(&mut text)?;
    Ok(Some((kind, text)))
}

/// The parent's part: prints what the child says until it is ready or has failed.
fn listen(mut pipe: impl Read, child: Pid, stderr: &mut impl Write) -> Verdict {
    let failure = loop {
        match receive(&mut pipe) {
            Ok(Some((b'R', _))) => return Verdict::Ready,
            Ok(Some((b'W', text))) => say(stderr, &format!("warning: {}", String::from_utf8_lossy(&text))),
            Ok(Some((_, text))) => {
                // The mount is gone only when the child is: whoever reads our status may look.
                ending(child);
                break String::from_utf8_lossy(&text).into_owned();
            }
            Ok(None) => break format!("the background process {}, without a word", ending(child)),
            Err(e) => break format!("the background process cannot be heard: {e}"),
        }
    };
    say(stderr, &failure);
    Verdict::Failed
}

/// Waits for the child's end and says how it was.
fn ending(child: Pid) -> String {
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

/// Prints a message; who closed standard error does not want it.
pub fn say(stderr: &mut impl Write, text: &str) {
    if let Err(e) = writeln!(stderr, "{NAME}: {text}") {
        tracing::debug!("standard error: {e}");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What a parent makes of `bytes` from a child that has gone (no such child is ours, so no status is known).
    fn hear(bytes: &[u8]) -> (Verdict, String) {
        let mut out = Vec::new();
        let verdict = listen(bytes, Pid::from_raw(i32::MAX), &mut out);
        (verdict, String::from_utf8(out).unwrap())
    }

    #[test]
    fn warnings_then_ready() {
        let mut bytes = Vec::new();
        send(&mut bytes, b'W', "half of it").unwrap();
        send(&mut bytes, b'R', "").unwrap();
        assert_eq!(hear(&bytes), (Verdict::Ready, "vmdkfuse: warning: half of it\n".into()));
    }

    #[test]
    fn a_failure_is_one_line_and_silence_is_a_failure() {
        let mut bytes = Vec::new();
        send(&mut bytes, b'E', "disk.vmdk: no such file").unwrap();
        assert_eq!(
            hear(&bytes),
            (Verdict::Failed, "vmdkfuse: disk.vmdk: no such file\n".into())
        );
        for end in 0..3 {
            let (verdict, text) = hear(&bytes[..end]);
            assert_eq!(verdict, Verdict::Failed);
            assert!(text.starts_with("vmdkfuse: the background process ended"), "{text}");
        }
        let (verdict, text) = hear(&bytes[..8]);
        assert_eq!(verdict, Verdict::Failed);
        assert!(
            text.starts_with("vmdkfuse: the background process cannot be heard"),
            "{text}"
        );
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
