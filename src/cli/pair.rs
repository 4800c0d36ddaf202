//! Pairs of a key and its value. A command line, an `-o` list and a config file all yield them, and everything that
//! follows works on pairs alone.

use std::ffi::{OsStr, OsString};
use std::fmt;
use std::path::{Path, PathBuf};
use std::rc::Rc;

use super::keys::Key;
use super::{UsageError, values};

/// A key with its value, as it was given. `K` is a row of the table of keys, or of the table of the options of a mount.
#[derive(Clone)]
pub(super) struct Pair<K: 'static = Key> {
    pub(super) key: &'static K,
    pub(super) value: OsString,
    pub(super) origin: Origin,
}

/// Place where a pair was given.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Origin {
    /// The command line. Messages repeat the key and, unless it is secret, the value.
    Argument,
    /// A key of a config file.
    File {
        /// File and line, for messages.
        line: String,
        /// Folder of the file.
        dir: Rc<Path>,
    },
}

/// Value of a key, and the folder that a relative path in it starts from.
#[derive(Clone, Copy)]
pub(super) struct Value<'a> {
    pub(super) text: &'a OsStr,
    /// Empty: the current directory.
    dir: &'a Path,
}

impl<K> Pair<K> {
    /// Returns the value with the folder of its paths.
    pub(super) fn value(&self) -> Value<'_> {
        let dir = match &self.origin {
            Origin::File { dir, .. } => dir,
            Origin::Argument => Path::new(""),
        };
        Value { text: &self.value, dir }
    }
}

/// The value may be a secret, so it is left out.
impl<K> fmt::Debug for Pair<K> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Pair")
            .field("origin", &self.origin)
            .finish_non_exhaustive()
    }
}

impl Origin {
    /// Returns an error that points here, unless it points to another place already.
    pub(super) fn blame(&self, e: UsageError) -> UsageError {
        match self {
            Self::Argument => e,
            Self::File { line, .. } => e.at(line),
        }
    }
}

impl<'a> Value<'a> {
    /// Creates a value whose paths start from the current directory.
    #[cfg(test)]
    pub(super) fn here(text: &'a OsStr) -> Self {
        Self {
            text,
            dir: Path::new(""),
        }
    }

    /// Returns the value as an absolute path.
    pub(super) fn path(&self) -> Result<PathBuf, String> {
        self.path_of(self.text)
    }

    /// Returns a path that is a part of the value as an absolute one.
    pub(super) fn path_of(&self, path: &OsStr) -> Result<PathBuf, String> {
        let joined = self.dir.join(path);
        // Joining nothing to a folder gives the folder.
        values::path(if path.is_empty() { path } else { joined.as_os_str() })
    }
}

impl std::ops::Deref for Value<'_> {
    type Target = OsStr;

    fn deref(&self) -> &OsStr {
        self.text
    }
}

#[cfg(test)]
mod tests;
