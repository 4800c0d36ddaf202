//! Error type of the whole program: a kind, a context that names file and position, and a cause.
//!
//! The kind is for code, the text is for the user. Each layer adds its context with [`Error::within`], so a message
//! reads from the outermost operation to the innermost cause, separated by `: `. An [`Error`] is cheap to clone (one
//! reference count), so that all waiters of a single-flight fetch receive the same error. Only `fuse/errno.rs`
//! converts a kind to an `errno`.

use std::fmt;
use std::io;
use std::sync::Arc;

/// A result whose error is [`Error`].
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Category of an error, which callers match on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum ErrorKind {
    /// The operating system refused a call; the number is its `errno`.
    Os(i32),
    /// A file does not exist.
    NotFound,
    /// The image breaks its format: a value out of bounds, a damaged table or grain.
    Corrupt,
    /// The image is well formed, but its format or a feature in it is not supported.
    Unsupported,
    /// A name inside an image leads to a folder that the user has not allowed.
    Policy,
    /// Another program uses the file in a way that conflicts with the request.
    Busy,
    /// The disk cannot be written to, because of its format, its extent or the mode in which it was opened.
    ReadOnly,
    /// The range lies outside of the disk or the file.
    OutOfRange,
    /// The request is invalid: a wrong option or value.
    Usage,
    /// The answer is not in memory, and the caller must not wait.
    WouldBlock,
}

/// Error with its kind, context and cause. Cloning it is cheap.
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
    /// Creates an error of `kind`. `context` is a full sentence that names the file and the position.
    pub fn new(kind: ErrorKind, context: impl Into<String>) -> Self {
        Self(Arc::new(Inner {
            kind,
            context: context.into(),
            source: None,
        }))
    }

    /// Creates an error of the kind [`ErrorKind::Corrupt`].
    pub fn corrupt(context: impl Into<String>) -> Self {
        Self::new(ErrorKind::Corrupt, context)
    }

    /// Creates an error of the kind [`ErrorKind::Unsupported`].
    pub fn unsupported(context: impl Into<String>) -> Self {
        Self::new(ErrorKind::Unsupported, context)
    }

    /// Creates an error from a failed I/O call. `context` names the operation.
    ///
    /// The kind is `NotFound` or `Os`. An error without an `errno` comes from the standard library, for example an
    /// unexpected end of file, and becomes `Corrupt`.
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

    /// Wraps the error in an outer context. The kind stays the same.
    #[must_use]
    pub fn within(self, context: impl Into<String>) -> Self {
        Self(Arc::new(Inner {
            kind: self.kind(),
            context: context.into(),
            source: Some(Source::Error(self)),
        }))
    }

    /// Returns the kind, which [`Self::within`] never changes.
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

// `source` returns `None`, because Display prints the causes already: code that prints the chain of sources would
// repeat them.
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
