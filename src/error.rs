//! The one error type: a kind, a sentence that names the place, and what caused it.
//!
//! It is cheap to clone, so that all who wait for one fetch can be given the same failure.
//! What number of `errno` a kind becomes is decided in `fuse/errno.rs` and nowhere else.

use std::fmt;
use std::io;
use std::sync::Arc;

/// A result whose error is [`Error`].
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// What went wrong, as far as a caller has to act on it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum ErrorKind {
    /// The operating system refused a call; the number is its `errno`.
    Os(i32),
    /// A file that was named does not exist.
    NotFound,
    /// The image breaks its format: a value out of bounds, a damaged table or grain.
    Corrupt,
    /// The image is well formed, but of a kind that is not supported.
    Unsupported,
    /// A name inside an image leads where the user did not allow it.
    Policy,
    /// Another program uses the file in a way that does not go together with what was asked.
    Busy,
    /// It can't be written to: its format, its extent or how it was opened don't allow it.
    ReadOnly,
    /// The range lies outside of the disk or the file.
    OutOfRange,
    /// What was asked for is not possible as it was asked (a wrong option or value).
    Usage,
}

/// An error with its context; see the module.
#[derive(Debug, Clone)]
pub struct Error(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    kind: ErrorKind,
    context: String,
    source: Option<Source>,
}

#[derive(Debug)]
enum Source {
    Io(io::Error),
    Error(Error),
}

impl Error {
    /// An error of `kind`; `context` is a whole sentence that names the file and the position.
    pub fn new(kind: ErrorKind, context: impl Into<String>) -> Self {
        Self(Arc::new(Inner {
            kind,
            context: context.into(),
            source: None,
        }))
    }

    /// A broken format; see [`ErrorKind::Corrupt`].
    pub fn corrupt(context: impl Into<String>) -> Self {
        Self::new(ErrorKind::Corrupt, context)
    }

    /// A format or feature that is not read; see [`ErrorKind::Unsupported`].
    pub fn unsupported(context: impl Into<String>) -> Self {
        Self::new(ErrorKind::Unsupported, context)
    }

    /// What an I/O call answered, with what was being done.
    pub fn io(context: impl Into<String>, source: io::Error) -> Self {
        let kind = match (source.kind(), source.raw_os_error()) {
            (io::ErrorKind::NotFound, _) => ErrorKind::NotFound,
            (_, Some(errno)) => ErrorKind::Os(errno),
            (_, None) => ErrorKind::Corrupt,
        };
        Self(Arc::new(Inner {
            kind,
            context: context.into(),
            source: Some(Source::Io(source)),
        }))
    }

    /// The same kind of error with a wider context in front.
    #[must_use]
    pub fn within(self, context: impl Into<String>) -> Self {
        Self(Arc::new(Inner {
            kind: self.kind(),
            context: context.into(),
            source: Some(Source::Error(self)),
        }))
    }

    /// Its kind.
    pub fn kind(&self) -> ErrorKind {
        self.0.kind
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0.context)?;
        match &self.0.source {
            Some(Source::Io(e)) => write!(f, ": {e}"),
            Some(Source::Error(e)) => write!(f, ": {e}"),
            None => Ok(()),
        }
    }
}

// Display prints the causes already, so `source` stays empty: a printer of chains would say them twice.
impl std::error::Error for Error {}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn display_names_every_cause_once() {
        let io = io::Error::from_raw_os_error(libc::EIO);
        let e = Error::io("disk.vmdk: read of 512 bytes at 1024", io).within("reading sector 2");
        assert_eq!(e.kind(), ErrorKind::Os(libc::EIO));
        let text = e.to_string();
        assert!(
            text.starts_with("reading sector 2: disk.vmdk: read of 512 bytes at 1024: "),
            "{text}"
        );
    }
}
