//! The first half of the name gate: the shape of a name that somebody else wrote into an image.
//!
//! An [`ExtentName`] is nothing but a file name. `nbd:localhost:10809` or `json:{…}` mean a file of that name,
//! and where a name leads is the store's business (the gate's second half).

use std::ffi::{OsStr, OsString};
use std::fmt;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::Path;

use crate::error::{Error, Result};

/// The most bytes of a name: Linux's PATH_MAX without the closing NUL.
pub const NAME_MAX: usize = 4095;

/// A file name from inside of an image: not empty, no NUL, at most [`NAME_MAX`] bytes. Nothing more is promised.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct ExtentName {
    name: OsString,
    raw: Option<OsString>,
}

impl ExtentName {
    /// A name as it is called on this machine (UTF-8 where the image's encoding was known). Errors: `Corrupt`.
    pub fn new(name: impl AsRef<[u8]>) -> Result<Self> {
        Ok(Self {
            name: checked(name.as_ref())?,
            raw: None,
        })
    }

    /// The same name, and the bytes that stood for it in an image of another encoding: a file copied by a program
    /// that did not know the encoding may be called so. Errors: `Corrupt`.
    pub fn or_raw(mut self, raw: &[u8]) -> Result<Self> {
        let raw = checked(raw)?;
        self.raw = (raw != self.name).then_some(raw);
        Ok(self)
    }

    /// The name.
    pub fn as_path(&self) -> &Path {
        Path::new(&self.name)
    }

    /// Its bytes.
    pub fn as_bytes(&self) -> &[u8] {
        self.name.as_bytes()
    }

    /// How the file may be called besides, if the name itself does not exist.
    pub fn raw_path(&self) -> Option<&Path> {
        self.raw.as_deref().map(Path::new)
    }
}

impl fmt::Display for ExtentName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&printable(&self.name))
    }
}

/// Text that somebody else wrote, made safe for a terminal or a log: what is no UTF-8 is replaced, control
/// characters and those that turn the direction of writing are escaped.
pub(crate) fn printable(text: impl AsRef<OsStr>) -> String {
    let turns = |c: char| matches!(c, '\u{200e}' | '\u{200f}' | '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}');
    let mut out = String::new();
    for c in text.as_ref().to_string_lossy().chars() {
        if c.is_control() || turns(c) {
            out.extend(c.escape_default());
        } else {
            out.push(c);
        }
    }
    out
}

/// The rules of the shape.
fn checked(name: &[u8]) -> Result<OsString> {
    if name.is_empty() {
        return Err(Error::corrupt("the file name is empty"));
    }
    if name.len() > NAME_MAX {
        return Err(Error::corrupt(format!(
            "the file name has {} bytes, more than {NAME_MAX}",
            name.len()
        )));
    }
    if name.contains(&0) {
        return Err(Error::corrupt("the file name holds a NUL byte"));
    }
    Ok(OsString::from_vec(name.to_vec()))
}

#[cfg(test)]
mod tests {
    use std::path::Component;

    use super::*;
    use crate::error::ErrorKind;

    #[test]
    fn the_shape_is_checked() {
        for bad in [&b""[..], b"a\0b", &[b'x'; NAME_MAX + 1]] {
            assert_eq!(ExtentName::new(bad).unwrap_err().kind(), ErrorKind::Corrupt);
            assert_eq!(
                ExtentName::new("good").unwrap().or_raw(bad).unwrap_err().kind(),
                ErrorKind::Corrupt
            );
        }
        assert!(ExtentName::new([b'x'; NAME_MAX]).is_ok());
    }

    #[test]
    fn bytes_are_kept_and_raw_is_the_other_spelling() {
        let name = ExtentName::new(b"caf\xe9.vmdk").unwrap();
        assert_eq!(name.as_bytes(), b"caf\xe9.vmdk");
        assert_eq!(name.raw_path(), None);
        let name = ExtentName::new("café.vmdk").unwrap().or_raw(b"caf\xe9.vmdk").unwrap();
        assert_eq!(name.raw_path().unwrap().as_os_str().as_bytes(), b"caf\xe9.vmdk");
        assert_eq!(ExtentName::new("x").unwrap().or_raw(b"x").unwrap().raw_path(), None);
    }

    #[test]
    fn its_path_shows_where_it_starts_and_steps() {
        let flags = |s: &str| {
            let name = ExtentName::new(s).unwrap();
            let path = name.as_path();
            (path.is_absolute(), path.components().any(|c| c == Component::ParentDir))
        };
        assert_eq!(flags("a/b..c"), (false, false));
        assert_eq!(flags("/a"), (true, false));
        assert_eq!(flags("a/../b"), (false, true));
        assert_eq!(flags("nbd:localhost:10809"), (false, false));
    }

    #[test]
    fn messages_hold_no_control_characters() {
        let name = ExtentName::new(b"a\x1b[31m\n\xff\xe2\x80\xae.vmdk").unwrap();
        assert_eq!(name.to_string(), "a\\u{1b}[31m\\n\u{fffd}\\u{202e}.vmdk");
    }
}
