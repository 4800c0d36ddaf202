//! Settings of a descriptor: lines `key = value`.

use crate::error::{Error, Result};
use crate::vmdk::descriptor::cid::{self, CidText};
use crate::vmdk::descriptor::quotes::{self, Quoted};
use crate::vmdk::descriptor::warnings::shown;

/// Line `key = value`: both parts are raw bytes without surrounding blanks.
#[derive(Debug, Clone, Copy)]
pub(super) struct Setting<'a> {
    /// Number of the line, from 1.
    pub(super) line: usize,
    /// Key as written; comparisons must ignore case.
    pub(super) key: &'a [u8],
    /// Value, including its quotes.
    pub(super) value: &'a [u8],
}

impl<'a> Setting<'a> {
    /// Parses line `number`. Returns `None` unless it is a single word followed by `=`.
    pub(super) fn parse(number: usize, line: &'a [u8]) -> Option<Self> {
        let equals = line.iter().position(|&b| b == b'=')?;
        let key = quotes::trim(&line[..equals]);
        let is_word = !key.is_empty() && quotes::word(key).0.len() == key.len() && !key.contains(&b'"');
        // `;` and `//` start comments of other formats.
        let is_comment = key.starts_with(b";") || key.starts_with(b"//") || key.starts_with(b"/*");
        (is_word && !is_comment).then(|| Self {
            line: number,
            key,
            value: quotes::trim(&line[equals + 1..]),
        })
    }

    /// Returns the value without its quotes.
    ///
    /// Errors: `Corrupt` if the closing quote is missing, or if anything but a comment follows it.
    pub(super) fn unquoted(&self) -> Result<&'a [u8]> {
        match quotes::quoted(self.value) {
            Quoted::Bare => Ok(self.value),
            Quoted::Unclosed => Err(self.error("expected a closing `\"` after the value")),
            Quoted::Closed { inner, rest, .. } => {
                let rest = quotes::trim_start(rest);
                if !rest.is_empty() && rest[0] != b'#' {
                    return Err(self.error(&format!(
                        "expected nothing after the quoted value, not `{}`",
                        shown(rest)
                    )));
                }
                Ok(inner)
            }
        }
    }

    /// Returns the value without its quotes and without checks, for values that do not affect the data.
    pub(super) fn leniently_unquoted(&self) -> &'a [u8] {
        match quotes::quoted(self.value) {
            Quoted::Closed { inner, .. } => inner,
            Quoted::Bare => self.value,
            Quoted::Unclosed => self.value.strip_prefix(b"\"").unwrap_or(self.value),
        }
    }

    /// Returns the value as a content ID, or `None` for another text.
    pub(super) fn cid(&self) -> Option<CidText<'a>> {
        cid::parse(self.unquoted().ok()?)
    }

    /// Returns a `Corrupt` error that names the line and the key.
    pub(super) fn error(&self, expected: &str) -> Error {
        Error::corrupt(format!("line {}, {}: {expected}", self.line, shown(self.key)))
    }
}
