//! A first read through the mount: the proof that it answers, before anybody is told so.
//!
//! It runs on a thread of its own, because a mount that does not answer would hold its reader for ever. The
//! main thread polls for its end, for signals and for the session's end at the same time.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread::{self, JoinHandle};

use nix::fcntl::{PosixFadviseAdvice, posix_fadvise};
use nix::sys::eventfd::{EfdFlags, EventFd};

use crate::error::{Error, ErrorKind, Result};

/// Bytes of the read: a page, what the smallest cached read takes.
const PROBE: u64 = 4096;

/// A running probe.
#[derive(Debug)]
pub struct Probe {
    ended: Arc<EventFd>,
    thread: JoinHandle<Result<Vec<String>>>,
}

impl Probe {
    /// Starts to read every one of `files`.
    pub fn start(files: Vec<PathBuf>) -> Result<Self> {
        let ended = Arc::new(EventFd::from_flags(EfdFlags::EFD_CLOEXEC).map_err(|e| Error::io("eventfd", e.into()))?);
        let signal = Signal(Arc::clone(&ended));
        let thread = thread::Builder::new()
            .name("probe".into())
            .spawn(move || {
                let _signal = signal;
                probe_all(&files)
            })
            .map_err(|e| Error::io("thread of the first read", e))?;
        Ok(Self { ended, thread })
    }

    /// Readable as soon as [`Self::result`] would not wait.
    pub fn ended(&self) -> BorrowedFd<'_> {
        self.ended.as_fd()
    }

    /// One warning for each disk that is readable in part only; an error names the disk that cannot be read.
    pub fn result(self) -> Result<Vec<String>> {
        let panicked = |_| Error::new(ErrorKind::Os(libc::EIO), "the thread of the first read panicked");
        self.thread.join().unwrap_or_else(|p| Err(panicked(p)))
    }
}

/// Tells the end when it is dropped, also by a panic.
struct Signal(Arc<EventFd>);

impl Drop for Signal {
    fn drop(&mut self) {
        if let Err(e) = self.0.write(1) {
            tracing::error!("eventfd of the first read: {e}");
        }
    }
}

fn probe_all(files: &[PathBuf]) -> Result<Vec<String>> {
    let mut warnings = Vec::new();
    for path in files {
        warnings.extend(probe_file(path)?);
    }
    Ok(warnings)
}

/// Reads the first page; where that answers EIO, any other is good enough, with a warning.
fn probe_file(path: &Path) -> Result<Option<String>> {
    let context = |what: &str| format!("{}: {what}", path.display());
    let open = OpenOptions::new().read(true).custom_flags(libc::O_CLOEXEC).open(path);
    let file = open.map_err(|e| Error::io(context("first open through the mount"), e))?;
    let size = file.metadata().map_err(|e| Error::io(context("first look through the mount"), e))?.len();
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
                return Ok(Some(format!("{}: the start of the disk cannot be read ({error})", path.display())));
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
    fn whole_short_and_empty_files_are_readable() {
        let dir = tempfile::tempdir().unwrap();
        let paths: Vec<_> = [0usize, 1, 4096, 10_000]
            .into_iter()
            .map(|len| {
                let path = dir.path().join(len.to_string());
                std::fs::write(&path, vec![1; len]).unwrap();
                path
            })
            .collect();
        assert_eq!(Probe::start(paths).unwrap().result().unwrap(), Vec::<String>::new());
    }

    #[test]
    fn an_error_names_the_file() {
        let e = Probe::start(vec!["/no/such/disk.raw".into()]).unwrap().result().unwrap_err();
        assert!(e.to_string().starts_with("/no/such/disk.raw: first open"), "{e}");
    }
}
