//! Error type of the whole program: a kind, the file and the offset, the operation, and a cause.
//!
//! Kind, path and offset are for code, which never searches the text; the text is for the user. Each layer adds its
//! context with [`Error::within`], and the file with [`Error::in_file`], so a message reads from the outermost operation
//! to the innermost cause, separated by `: `. An [`Error`] is cheap to clone (one
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
    /// File that this layer is about, as messages show it: the first part of the text.
    path: Option<String>,
    /// Byte of the file that this layer is about. The text has it too.
    offset: Option<u64>,
    /// Operation that failed, or the value found and the one expected. Empty for a layer that only adds the file.
    context: String,
    source: Option<Source>,
}

#[derive(Debug)]
enum Source {
    Io(io::Error),
    Error(Error),
}

impl Error {
    /// Creates an error of `kind`. `context` is a full sentence that names the position; the file is added with
    /// [`Self::in_file`].
    pub fn new(kind: ErrorKind, context: impl Into<String>) -> Self {
        Self::layer(kind, context.into(), None)
    }

    fn layer(kind: ErrorKind, context: String, source: Option<Source>) -> Self {
        Self(Arc::new(Inner {
            kind,
            path: None,
            offset: None,
            context,
            source,
        }))
    }

    /// Creates an error of the kind [`ErrorKind::Corrupt`].
    pub fn corrupt(context: impl Into<String>) -> Self {
        Self::new(ErrorKind::Corrupt, context)
    }

    /// Creates an error of the kind [`ErrorKind::Unsupported`].
    pub(crate) fn unsupported(context: impl Into<String>) -> Self {
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
        Self::layer(kind, context.into(), Some(Source::Io(source)))
    }

    /// Wraps the error in an outer context. The kind stays the same.
    #[must_use]
    pub fn within(self, context: impl Into<String>) -> Self {
        Self::layer(self.kind(), context.into(), Some(Source::Error(self)))
    }

    /// Names the file that the error is about, in front of the text. An error that names it already stays as it is.
    #[must_use]
    pub fn in_file(self, path: &str) -> Self {
        // Several layers name the file, as each of them may be called without the others.
        if self.layers().any(|layer| layer.path.as_deref() == Some(path)) {
            return self;
        }
        self.edit(|layer| layer.path.is_none(), |layer| layer.path = Some(path.to_owned()))
    }

    /// Sets the byte of the file that the error is about.
    #[must_use]
    pub(crate) fn at_byte(self, offset: u64) -> Self {
        self.edit(|_| true, |layer| layer.offset = Some(offset))
    }

    /// Changes the outermost layer if `fits` allows it and no clone shares it, otherwise a new layer around it.
    fn edit(mut self, fits: impl Fn(&Inner) -> bool, change: impl FnOnce(&mut Inner)) -> Self {
        // A clone shares the layer: a change of it would change the errors of other waiters too.
        if !fits(&self.0) || Arc::get_mut(&mut self.0).is_none() {
            self = Self::layer(self.kind(), String::new(), Some(Source::Error(self)));
        }
        if let Some(layer) = Arc::get_mut(&mut self.0) {
            change(layer);
        }
        self
    }

    /// Returns the innermost file that a layer names: the one whose content or access failed.
    pub fn path(&self) -> Option<&str> {
        self.layers().filter_map(|layer| layer.path.as_deref()).last()
    }

    /// Returns the innermost offset that a layer names.
    pub fn offset(&self) -> Option<u64> {
        self.layers().filter_map(|layer| layer.offset).last()
    }

    /// Returns the layers, from the outermost to the innermost.
    fn layers(&self) -> impl Iterator<Item = &Inner> {
        std::iter::successors(Some(&*self.0), |layer| match &layer.source {
            Some(Source::Error(e)) => Some(&*e.0),
            _ => None,
        })
    }

    /// Returns the kind, which [`Self::within`] never changes.
    pub fn kind(&self) -> ErrorKind {
        self.0.kind
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut separator = "";
        for part in [self.0.path.as_deref(), Some(&*self.0.context)]
            .into_iter()
            .flatten()
            .filter(|part| !part.is_empty())
        {
            write!(f, "{separator}{part}")?;
            separator = ": ";
        }
        match &self.0.source {
            Some(Source::Io(e)) => write!(f, "{separator}{e}"),
            Some(Source::Error(e)) => write!(f, "{separator}{e}"),
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
    fn a_file_is_named_once_and_in_front() {
        let e = Error::corrupt("entry 3 is 7")
            .at_byte(1024)
            .in_file("a.vmdk")
            .in_file("a.vmdk");
        assert_eq!(e.to_string(), "a.vmdk: entry 3 is 7");
        assert_eq!((e.path(), e.offset()), (Some("a.vmdk"), Some(1024)));
        // A clone keeps its text when another holder adds a file.
        let shared = e.clone();
        let outer = e.within("line 2: extent").in_file("disk.vmdk").in_file("a.vmdk");
        assert_eq!(outer.to_string(), "disk.vmdk: line 2: extent: a.vmdk: entry 3 is 7");
        assert_eq!(
            (outer.path(), shared.to_string()),
            (Some("a.vmdk"), "a.vmdk: entry 3 is 7".to_owned())
        );
        let bare = Error::corrupt("x");
        let both = (bare.clone().in_file("f").to_string(), bare.to_string());
        assert_eq!(both, ("f: x".to_owned(), "x".to_owned()));
    }

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
