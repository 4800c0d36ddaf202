//! One argument of a command line: a `KEY=VALUE`, or a bare source, which is written without its key.

use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::OsStrExt;

use super::outcome::UsageError;
use super::pair::{Origin, Pair};
use super::settings::DiskPair;
use super::{keys, scheme};

/// A classified argument.
#[derive(Debug, PartialEq, Eq)]
enum Argument<'a> {
    /// `KEY=VALUE`. The key may be unknown.
    Key(&'a str, &'a OsStr),
    /// A source without its key.
    Bare(&'a OsStr),
}

/// Returns the pair that an argument gives. Fails if the key is not in the table.
pub(super) fn read(argument: &OsStr) -> Result<DiskPair, UsageError> {
    let (name, value) = match classify(argument) {
        Argument::Key(name, value) => (name, value),
        Argument::Bare(value) => (key_of_bare(value), value),
    };
    let key = keys::find(name).ok_or_else(|| unknown_key(name))?;
    Ok(Pair {
        key,
        value: value.to_owned(),
        origin: Origin::Argument,
    })
}

/// Returns `source` with its key in front. The source is bare even if it looks like `KEY=VALUE`: mount(8) passes the
/// first field of an fstab line unchanged.
pub(super) fn with_key(source: &OsStr) -> OsString {
    let mut argument = OsString::from(key_of_bare(source));
    argument.push("=");
    argument.push(source);
    argument
}

/// Returns the known key or the scheme that an argument starts with, if any. Such an argument is unlikely to be a path.
pub(super) fn source_like(argument: &OsStr) -> Option<String> {
    let key = split_key(argument).and_then(|(name, _)| keys::find(name));
    let scheme = scheme::of(argument).filter(|_| argument.to_string_lossy().contains("://"));
    key.map(|key| format!("{}=", key.name))
        .or_else(|| scheme.map(|scheme| format!("{scheme}://")))
}

/// Creates the error for a key that is not in the table. The value is left out because it may be a secret.
pub(super) fn unknown_key(name: &str) -> UsageError {
    let hint = match keys::nearest(name) {
        Some(known) => format!("did you mean {known}=?"),
        None => "--help lists the keys.".into(),
    };
    UsageError::new(format!(
        "unknown key {name}=; {hint} For a file with a = in its name, write file={name}=..."
    ))
}

/// Classifies an argument. It is `KEY=VALUE` only if the text before the first `=` has the form of a key.
fn classify(argument: &OsStr) -> Argument<'_> {
    split_key(argument).map_or(Argument::Bare(argument), |(name, value)| Argument::Key(name, value))
}

/// Splits at the first `=`, if the text before it has the form of a key, `[a-z][a-z0-9-]*`.
pub(super) fn split_key(argument: &OsStr) -> Option<(&str, &OsStr)> {
    let bytes = argument.as_bytes();
    let (name, value) = bytes.split_at(bytes.iter().position(|b| *b == b'=')?);
    let is_key = name.first().is_some_and(u8::is_ascii_lowercase)
        && name.iter().all(|b| matches!(b, b'a'..=b'z' | b'0'..=b'9' | b'-'));
    let name = std::str::from_utf8(name).ok().filter(|_| is_key)?;
    Some((name, OsStr::from_bytes(value.strip_prefix(b"=")?)))
}

/// Returns the key that a bare value stands for: by its URI scheme, otherwise `file`.
fn key_of_bare(value: &OsStr) -> &'static str {
    if scheme::is_one_of(&scheme::NBD, value) {
        "uri"
    } else if scheme::is_one_of(&scheme::WEB, value) {
        "url"
    } else {
        "file"
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_argument_is_a_key_only_if_it_has_the_form_of_one() {
        let key =
            |argument, name, value| assert_eq!(classify(OsStr::new(argument)), Argument::Key(name, OsStr::new(value)));
        key("file=x", "file", "x");
        key("vm=moref=42", "vm", "moref=42");
        key("no-such-1=", "no-such-1", "");
        for bare in [
            "/a=b", "./a=b", "a/b=c", "A=b", "=a", "-a=b", "1a=b", "a_b=c", "a b=c", "x.vmdk", "",
        ] {
            assert_eq!(classify(OsStr::new(bare)), Argument::Bare(OsStr::new(bare)));
        }
        let odd = OsStr::from_bytes(b"a\xff=b");
        assert_eq!(classify(odd), Argument::Bare(odd));
    }
}
