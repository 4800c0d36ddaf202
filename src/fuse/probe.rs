//! A first read through the mount: the proof that it answers, before anybody is told so.
//!
//! ```text
//!   daemon ── fork ── prober             before any thread, so before the sources are opened
//!      │  "read these" ──► │             once the session runs
//!      │ ◄── warning…  then done | error │
//! ```
//! It is a process of its own, because no process may read what it serves: a read that is not answered cannot
//! be interrupted, not even by SIGKILL, and the connection is cut only when the server's process has ended.
//! Reader and server in one would wait for each other for ever. The prober holds nothing of the mount; when
//! the daemon ends, its read fails and it ends too.

use std::ffi::OsString;
use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};

use nix::fcntl::{PosixFadviseAdvice, posix_fadvise};
use nix::unistd::Pid;

use crate::error::{Error, ErrorKind, Result};
use crate::process::daemon::{helper, receive, send};

/// Bytes of the read: a page, what the smallest cached read takes.
const PROBE: u64 = 4096;

/// Kinds of messages: a file to read, the end of the list; a warning, an error, the end of the work.
const FILE: u8 = b'F';
const GO: u8 = b'G';
const WARNING: u8 = b'W';
const ERROR: u8 = b'E';
const DONE: u8 = b'D';

/// A process that waits to be told what to read.
#[derive(Debug)]
pub struct Prober {
    socket: UnixStream,
    process: Pid,
}

impl Prober {
    /// Forks it; an error where threads run already.
    pub fn fork() -> Result<Self> {
        let (socket, process) = helper("socket of the first read", |socket| {
            // An error means that the daemon is gone: nobody is left to be told.
            let _ = answer(socket);
        })?;
        Ok(Self { socket, process })
    }

    /// Lets it read every one of `files`.
    pub fn start(&mut self, files: &[PathBuf]) -> Result<()> {
        let mut tell = |kind, text: &[u8]| send(&mut self.socket, kind, text);
        let told = files.iter().try_for_each(|f| tell(FILE, f.as_os_str().as_bytes()));
        told.and_then(|()| tell(GO, b""))
            .map_err(|e| Error::io("process of the first read", e))
    }

    /// Readable as soon as it has something to say.
    pub fn answered(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }

    /// What it says next: a warning (a disk that is readable in part only), or `None` when all has been read.
    /// An error names the disk that cannot be read.
    pub fn hear(&mut self) -> Result<Option<String>> {
        let text = |t: Vec<u8>| String::from_utf8_lossy(&t).into_owned();
        match receive(&mut self.socket).map_err(|e| Error::io("process of the first read", e))? {
            Some((WARNING, t)) => Ok(Some(text(t))),
            Some((DONE, _)) => Ok(None),
            Some((_, t)) => Err(Error::new(ErrorKind::Os(libc::EIO), text(t))),
            None => Err(Error::new(
                ErrorKind::Os(libc::EIO),
                "the process of the first read died",
            )),
        }
    }

    /// Waits for its end, after it said that all has been read.
    pub fn finish(self) {
        let Self { socket, process } = self;
        drop(socket);
        if let Err(e) = nix::sys::wait::waitpid(process, None) {
            tracing::debug!("process of the first read: {e}");
        }
    }
}

/// The prober's whole work.
fn answer(mut socket: UnixStream) -> io::Result<()> {
    let mut files = Vec::new();
    loop {
        match receive(&mut socket)? {
            Some((FILE, path)) => files.push(PathBuf::from(OsString::from_vec(path))),
            Some((GO, _)) => break,
            _ => return Ok(()),
        }
    }
    for path in &files {
        match probe_file(path) {
            Ok(None) => {}
            Ok(Some(warning)) => send(&mut socket, WARNING, warning)?,
            Err(e) => return send(&mut socket, ERROR, e.to_string()),
        }
    }
    send(&mut socket, DONE, "")
}

/// Reads the first page; where that answers EIO, any other is good enough, with a warning.
pub(super) fn probe_file(path: &Path) -> Result<Option<String>> {
    let context = |what: &str| format!("{}: {what}", path.display());
    let open = OpenOptions::new().read(true).custom_flags(libc::O_CLOEXEC).open(path);
    let file = open.map_err(|e| Error::io(context("first open through the mount"), e))?;
    let size = file
        .metadata()
        .map_err(|e| Error::io(context("first look through the mount"), e))?
        .len();
    // Without it the kernel would read ahead for a reader that never comes back.
    posix_fadvise(&file, 0, 0, PosixFadviseAdvice::POSIX_FADV_RANDOM)
        .map_err(|e| Error::io(context("advice on reading"), e.into()))?;
    let error = match read_page(&file, 0, size) {
        Ok(()) => return Ok(None),
        Err(e) => e,
    };
    if error.raw_os_error() == Some(libc::EIO) {
        for at in [size / 2 / PROBE * PROBE, size.saturating_sub(1) / PROBE * PROBE] {
            if read_page(&file, at, size).is_ok() {
                return Ok(Some(format!(
                    "{}: the start of the disk cannot be read ({error})",
                    path.display()
                )));
            }
        }
    }
    Err(Error::io(context("first read through the mount"), error))
}

fn read_page(file: &File, at: u64, size: u64) -> io::Result<()> {
    let mut page = [0u8; PROBE as usize];
    let len = size.saturating_sub(at).min(PROBE) as usize;
    file.read_exact_at(&mut page[..len], at)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn whole_short_and_empty_files_are_readable_and_an_error_names_the_file() {
        let dir = tempfile::tempdir().unwrap();
        let (mut daemon, prober) = UnixStream::pair().unwrap();
        for len in [0usize, 1, 4096, 10_000] {
            let path = dir.path().join(len.to_string());
            std::fs::write(&path, vec![1; len]).unwrap();
            send(&mut daemon, FILE, path.as_os_str().as_bytes()).unwrap();
        }
        let (mut second, prober_2) = (daemon.try_clone().unwrap(), prober.try_clone().unwrap());
        send(&mut daemon, GO, "").unwrap();
        answer(prober).unwrap();
        assert_eq!(receive(&mut daemon).unwrap(), Some((DONE, Vec::new())));

        send(&mut second, FILE, "/no/such/disk.raw").unwrap();
        send(&mut second, GO, "").unwrap();
        answer(prober_2).unwrap();
        let (kind, text) = receive(&mut second).unwrap().unwrap();
        assert_eq!(kind, ERROR);
        assert!(text.starts_with(b"/no/such/disk.raw: first open"));
    }

    #[test]
    fn a_daemon_that_is_gone_ends_it() {
        let (daemon, prober) = UnixStream::pair().unwrap();
        drop(daemon);
        answer(prober).unwrap();
    }
}
