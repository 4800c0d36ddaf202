//! A first read through the mount, which proves that the mount answers before it is reported as ready.
//!
//! ```text
//!   daemon ── fork ── prober             before any thread, so before the sources are opened
//!      │  FILE…, GO  ──► │               once the session serves
//!      │ ◄── WARNING…, then DONE | ERROR │
//! ```
//! The prober is a separate process, because no process may read from the mount that it serves. A read without an
//! answer cannot be interrupted, not even by SIGKILL, and the kernel aborts the connection only when the serving
//! process has exited. If the reader and the server were one process, they would wait for each other forever. The
//! prober holds nothing of the mount: when the daemon exits, its read fails and it exits too.

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

/// Bytes per read: one page, which the smallest cached read takes.
const PROBE: u64 = 4096;

/// Message types: a file to read, the end of the list; a warning, an error, the end of the work.
const FILE: u8 = b'F';
const GO: u8 = b'G';
const WARNING: u8 = b'W';
const ERROR: u8 = b'E';
const DONE: u8 = b'D';

/// The daemon's end of the process that does the first read.
#[derive(Debug)]
pub struct Prober {
    socket: UnixStream,
    process: Pid,
}

impl Prober {
    /// Forks the prober. Errors: a thread is running already, or the fork failed.
    pub fn fork() -> Result<Self> {
        let (socket, process) = helper("socket of the first read", |socket| {
            // An error means that the daemon is gone, so that there is no process to report it to.
            let _ = probe_files(socket);
        })?;
        Ok(Self { socket, process })
    }

    /// Sends the list of files, and lets the prober read each of them.
    pub fn start(&mut self, files: &[PathBuf]) -> Result<()> {
        let mut send_message = |kind, text: &[u8]| send(&mut self.socket, kind, text);
        let sent = files
            .iter()
            .try_for_each(|f| send_message(FILE, f.as_os_str().as_bytes()));
        sent.and_then(|()| send_message(GO, b""))
            .map_err(|e| Error::io("process of the first read", e))
    }

    /// Returns a descriptor that is readable once the prober has sent a message.
    pub fn answered(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }

    /// Receives the next message: a warning (a disk that is readable in part only), or `None` once all files were read.
    ///
    /// Errors: the disk that cannot be read, or the prober died.
    pub(crate) fn hear(&mut self) -> Result<Option<String>> {
        let text = |t: Vec<u8>| String::from_utf8_lossy(&t).into_owned();
        match receive(&mut self.socket).map_err(|e| Error::io("process of the first read", e))? {
            Some((WARNING, t)) => Ok(Some(text(t))),
            Some((DONE, _)) => Ok(None),
            Some((_, t)) => Err(Error::new(ErrorKind::Os(libc::EIO), text(t))),
            None => Err(Error::new(
                ErrorKind::Os(libc::EIO),
                "the process of the first read died before it had read every disk",
            )),
        }
    }

    /// Waits for the exit of the prober, after it has reported that all files were read.
    pub fn finish(self) {
        let Self { socket, process } = self;
        drop(socket);
        if let Err(e) = nix::sys::wait::waitpid(process, None) {
            tracing::debug!("process of the first read: {e}");
        }
    }
}

/// Main function of the prober.
fn probe_files(mut socket: UnixStream) -> io::Result<()> {
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

/// Reads the first page of a file. If that fails with EIO, a page in the middle or the last one suffices, with a
/// warning: a disk with a damaged start is worth mounting.
pub(super) fn probe_file(path: &Path) -> Result<Option<String>> {
    let context = |step: &str| format!("{}: {step}", path.display());
    let open = OpenOptions::new().read(true).custom_flags(libc::O_CLOEXEC).open(path);
    let file = open.map_err(|e| Error::io(context("first open through the mount"), e))?;
    let size = file
        .metadata()
        .map_err(|e| Error::io(context("first stat through the mount"), e))?
        .len();
    // Without this advice the kernel would read ahead for a reader that never comes back.
    posix_fadvise(&file, 0, 0, PosixFadviseAdvice::POSIX_FADV_RANDOM)
        .map_err(|e| Error::io(context("posix_fadvise through the mount"), e.into()))?;
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
        probe_files(prober).unwrap();
        assert_eq!(receive(&mut daemon).unwrap(), Some((DONE, Vec::new())));

        send(&mut second, FILE, "/no/such/disk.raw").unwrap();
        send(&mut second, GO, "").unwrap();
        probe_files(prober_2).unwrap();
        let (kind, text) = receive(&mut second).unwrap().unwrap();
        assert_eq!(kind, ERROR);
        assert!(text.starts_with(b"/no/such/disk.raw: first open"));
    }

    #[test]
    fn a_daemon_that_is_gone_ends_the_prober() {
        let (daemon, prober) = UnixStream::pair().unwrap();
        drop(daemon);
        probe_files(prober).unwrap();
    }
}
