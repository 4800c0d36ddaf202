//! Pairs of a key and its value. A command line, an `-o` list and a config file all yield them, and everything that
//! follows works on pairs alone.

use std::ffi::OsString;
use std::fmt;
use std::path::Path;
use std::rc::Rc;

use super::outcome::UsageError;
use super::values::Value;

/// A key with its value, as it was given. `K` is a row of the table of keys, or of the table of the options of a mount.
#[derive(Clone)]
pub(super) struct Pair<K: 'static> {
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

impl<K> Pair<K> {
    /// Returns the value with the folder of its paths.
    pub(super) fn value(&self) -> Value<'_> {
        match &self.origin {
            Origin::File { dir, .. } => Value::below(dir, &self.value),
            Origin::Argument => Value::here(&self.value),
        }
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

#[cfg(test)]
mod tests;
