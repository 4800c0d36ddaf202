//! One word of a command line: a `KEY=VALUE`, or a source without its key.

use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::OsStrExt;

use super::UsageError;
use super::keys::{self, Key};

/// A word, taken apart.
#[derive(Debug, PartialEq, Eq)]
enum Word<'a> {
    /// `KEY=VALUE`, whether the key is known or not.
    Key(&'a str, &'a OsStr),
    /// A source without its key.
    Bare(&'a OsStr),
}

/// The key of a word, and its value. Errors: a key that is not in the table.
pub(super) fn read(word: &OsStr) -> Result<(&'static Key, &OsStr), UsageError> {
    let (name, value) = match classify(word) {
        Word::Key(name, value) => (name, value),
        Word::Bare(value) => (key_of_bare(value), value),
    };
    match keys::find(name) {
        Some(key) => Ok((key, value)),
        None => Err(unknown_key(name)),
    }
}

/// A source that is bare whatever it looks like, with its key in front.
pub(super) fn with_key(source: &OsStr) -> OsString {
    let mut word = OsString::from(key_of_bare(source));
    word.push("=");
    word.push(source);
    word
}

/// The known key that a word starts with; then it is hardly a path.
pub(super) fn known_key(word: &OsStr) -> Option<&'static str> {
    split_key(word)
        .and_then(|(name, _)| keys::find(name))
        .map(|key| key.name)
}

/// The error for a key that is not in the table. The value is not repeated: it may be a secret.
pub(super) fn unknown_key(name: &str) -> UsageError {
    let hint = match keys::nearest(name) {
        Some(known) => format!("did you mean {known}=?"),
        None => "--help lists the keys.".into(),
    };
    UsageError::new(format!(
        "unknown key {name}=; {hint} A file whose name holds a = is written file={name}=..."
    ))
}

/// A word is `KEY=VALUE` only where what stands before the first `=` has the shape of a key.
fn classify(word: &OsStr) -> Word<'_> {
    split_key(word).map_or(Word::Bare(word), |(name, value)| Word::Key(name, value))
}

/// Splits at the first `=`, if the shape of a key, `[a-z][a-z0-9-]*`, stands before it.
pub(super) fn split_key(word: &OsStr) -> Option<(&str, &OsStr)> {
    let bytes = word.as_bytes();
    let (name, value) = bytes.split_at(bytes.iter().position(|b| *b == b'=')?);
    let shaped = name.first().is_some_and(u8::is_ascii_lowercase)
        && name.iter().all(|b| matches!(b, b'a'..=b'z' | b'0'..=b'9' | b'-'));
    let name = std::str::from_utf8(name).ok().filter(|_| shaped)?;
    Some((name, OsStr::from_bytes(value.strip_prefix(b"=")?)))
}

/// The key that a bare value goes without.
fn key_of_bare(value: &OsStr) -> &'static str {
    const SCHEMES: [(&str, &str); 7] = [
        ("nbd://", "uri"),
        ("nbds://", "uri"),
        ("nbd+unix://", "uri"),
        ("nbds+unix://", "uri"),
        ("nbd+vsock://", "uri"),
        ("https://", "url"),
        ("http://", "url"),
    ];
    let starts = |scheme: &str| {
        value
            .as_bytes()
            .get(..scheme.len())
            .is_some_and(|head| head.eq_ignore_ascii_case(scheme.as_bytes()))
    };
    SCHEMES
        .iter()
        .find(|(scheme, _)| starts(scheme))
        .map_or("file", |(_, key)| key)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_word_is_a_key_only_where_it_looks_like_one() {
        let key = |word, name, value| assert_eq!(classify(OsStr::new(word)), Word::Key(name, OsStr::new(value)));
        key("file=x", "file", "x");
        key("vm=moref=42", "vm", "moref=42");
        key("no-such-1=", "no-such-1", "");
        for bare in [
            "/a=b", "./a=b", "a/b=c", "A=b", "=a", "-a=b", "1a=b", "a_b=c", "a b=c", "x.vmdk", "",
        ] {
            assert_eq!(classify(OsStr::new(bare)), Word::Bare(OsStr::new(bare)));
        }
        let odd = OsStr::from_bytes(b"a\xff=b");
        assert_eq!(classify(odd), Word::Bare(odd));
    }
}
