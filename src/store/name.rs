//! File names inside images, which are untrusted, and the escaping of untrusted text in messages.
//!
//! Names are checked in two stages. [`ExtentName`] checks the syntax: a name that is empty, too long or contains a NUL
//! byte is refused. The store then checks where the name leads.
//!
//! A name is never anything but a file name: `nbd:localhost:10809` or `json:{…}` mean a file of that name.

use std::ffi::OsString;
use std::fmt;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::Path;

use crate::error::{Error, Result};
use crate::escape::printable;

/// Longest name in bytes: Linux's PATH_MAX without the terminating NUL.
pub const NAME_MAX: usize = 4095;

/// File name from inside an image: not empty, no NUL byte, at most [`NAME_MAX`] bytes. It may lead anywhere.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct ExtentName {
    name: OsString,
    raw: Option<OsString>,
}

impl ExtentName {
    /// Creates a name from the bytes that it has on this machine: UTF-8, if the encoding of the image is known.
    ///
    /// Returns `Corrupt` if the syntax is invalid.
    pub fn new(name: impl AsRef<[u8]>) -> Result<Self> {
        Ok(Self {
            name: check_syntax(name.as_ref())?,
            raw: None,
        })
    }

    /// Adds the undecoded bytes of the name, as they are in an image with another encoding. A program that copied the
    /// file without knowing the encoding may have named it so. Returns `Corrupt` if their syntax is invalid.
    pub(crate) fn or_raw(mut self, raw: &[u8]) -> Result<Self> {
        let raw = check_syntax(raw)?;
        self.raw = (raw != self.name).then_some(raw);
        Ok(self)
    }

    /// Returns the decoded name as a path, which may be absolute and may contain `..`.
    pub fn as_path(&self) -> &Path {
        Path::new(&self.name)
    }

    /// Returns the bytes of the decoded name.
    pub fn as_bytes(&self) -> &[u8] {
        self.name.as_bytes()
    }

    /// Returns the undecoded name, to be tried if the decoded one does not exist. `None` if both are equal.
    pub(crate) fn raw_path(&self) -> Option<&Path> {
        self.raw.as_deref().map(Path::new)
    }
}

impl fmt::Display for ExtentName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&printable(&self.name))
    }
}

/// Checks the syntax of a name.
fn check_syntax(name: &[u8]) -> Result<OsString> {
    if name.is_empty() {
        return Err(Error::corrupt("the file name is empty"));
    }
    if name.len() > NAME_MAX {
        return Err(Error::corrupt(format!(
            "the file name has {} bytes, expected at most {NAME_MAX}",
            name.len()
        )));
    }
    // The system calls would end the name there and open another file than the one that was checked.
    if name.contains(&0) {
        return Err(Error::corrupt("the file name contains a NUL byte"));
    }
    Ok(OsString::from_vec(name.to_vec()))
}

/// Returns `text` as one word of a shell, for the commands in messages.
pub(crate) fn shell_word(text: &str) -> String {
    let plain = |c: char| c.is_alphanumeric() || "/._-+:@%".contains(c);
    if !text.is_empty() && text.chars().all(plain) {
        text.to_owned()
    } else {
        format!("'{}'", text.replace('\'', r"'\''"))
    }
}

#[cfg(test)]
mod tests {
    use std::path::Component;

    use super::*;
    use crate::error::ErrorKind;

    #[test]
    fn the_syntax_is_checked() {
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
    fn bytes_are_kept_and_raw_is_the_undecoded_name() {
        let name = ExtentName::new(b"caf\xe9.vmdk").unwrap();
        assert_eq!(name.as_bytes(), b"caf\xe9.vmdk");
        assert_eq!(name.raw_path(), None);
        let name = ExtentName::new("café.vmdk").unwrap().or_raw(b"caf\xe9.vmdk").unwrap();
        assert_eq!(name.raw_path().unwrap().as_os_str().as_bytes(), b"caf\xe9.vmdk");
        assert_eq!(ExtentName::new("x").unwrap().or_raw(b"x").unwrap().raw_path(), None);
    }

    #[test]
    fn the_path_keeps_its_root_and_parent_components() {
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
    fn messages_contain_no_control_characters() {
        let name = ExtentName::new(b"a\x1b[31m\n\xff\xe2\x80\xae.vmdk").unwrap();
        assert_eq!(name.to_string(), "a\\u{1b}[31m\\n\\xff\\u{202e}.vmdk");
    }
}
