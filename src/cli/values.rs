//! Values of keys and options, and their parsers: text → type.
//!
//! An error holds the reason alone. The caller knows the key and puts it in front.

use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use crate::config::PageCache;

/// Longest file name of Linux in bytes (`NAME_MAX`).
const NAME_MAX: usize = 255;

/// Permission bits of a mode. Other bits in an umask have no effect, so they are refused as a mistake.
const MODE_BITS: u32 = 0o777;

/// Value of a key, and the folder that a relative path in it starts from.
#[derive(Clone, Copy)]
pub(super) struct Value<'a> {
    pub(super) text: &'a OsStr,
    /// Empty: the current directory.
    dir: &'a Path,
}

/// Name of a file as it was given, and as a path of this machine. The back end decides which of them counts: in a
/// datastore it is no path.
#[derive(Debug, Clone)]
pub(super) struct FileName {
    pub(super) text: OsString,
    pub(super) path: PathBuf,
}

impl<'a> Value<'a> {
    /// Creates a value whose paths start from the current directory.
    pub(super) fn here(text: &'a OsStr) -> Self {
        Self::below(Path::new(""), text)
    }

    /// Creates a value whose paths start from `dir`.
    pub(super) fn below(dir: &'a Path, text: &'a OsStr) -> Self {
        Self { text, dir }
    }

    /// Returns the value as an absolute path.
    pub(super) fn path(&self) -> Result<PathBuf, String> {
        self.path_of(self.text)
    }

    /// Returns a path that is a part of the value as an absolute one.
    pub(super) fn path_of(&self, part: &OsStr) -> Result<PathBuf, String> {
        let joined = self.dir.join(part);
        // Joining nothing to a folder gives the folder.
        path(if part.is_empty() { part } else { joined.as_os_str() })
    }
}

impl std::ops::Deref for Value<'_> {
    type Target = OsStr;

    fn deref(&self) -> &OsStr {
        self.text
    }
}

impl FileName {
    pub(super) fn of(value: &Value<'_>, path: PathBuf) -> Self {
        let text = value.text.to_owned();
        Self { text, path }
    }
}

/// Returns a displayable form of text that may not be UTF-8, for messages.
pub(super) fn display(text: &OsStr) -> std::path::Display<'_> {
    Path::new(text).display()
}

/// Parses a decimal number from `least` to `most`.
pub(super) fn number(value: &OsStr, least: u32, most: u32) -> Result<u32, String> {
    let number = decimal(text(value)?).filter(|n| (least..=most).contains(n));
    number.ok_or_else(|| format!("must be a number from {least} to {most}"))
}

/// Returns a value that is not a path as text. Fails if it is empty or not UTF-8.
pub(super) fn text(value: &OsStr) -> Result<&str, String> {
    match value.to_str() {
        Some("") => Err("a value is missing".into()),
        Some(text) if text.contains('\0') => Err("the value cannot contain a NUL byte".into()),
        Some(text) => Ok(text),
        None => Err("the value is not UTF-8".into()),
    }
}

/// Parses the name or address of a host. Fails if it is a whole address, or if a port follows.
pub(super) fn host(value: &OsStr) -> Result<String, String> {
    let text = text(value)?;
    if text.contains(|c: char| c.is_whitespace() || c.is_control() || "/@?#".contains(c)) {
        return Err("must be a host name or an address alone; uri= and url= take whole addresses".into());
    }
    // An IPv6 address has more than one colon.
    match text.matches(':').count() == 1 || text.contains("]:") {
        true => Err("give the port with port=".into()),
        false => Ok(text.to_owned()),
    }
}

/// Parses a boolean: `true`, `yes`, `on`, `1` or `false`, `no`, `off`, `0`, in any case.
pub(super) fn boolean(value: &OsStr) -> Result<bool, String> {
    match text(value)?.to_ascii_lowercase().as_str() {
        "true" | "yes" | "on" | "1" => Ok(true),
        "false" | "no" | "off" | "0" => Ok(false),
        _ => Err("must be true or false (also yes/no, on/off, 1/0)".into()),
    }
}

/// Parses a size in bytes: digits, then optionally `K`, `M`, `G` or `T` (powers of 1024), then optionally `B` or, after
/// such a letter, `iB`. Case is ignored.
pub(super) fn size(value: &OsStr) -> Result<u64, String> {
    let text = text(value)?.to_ascii_lowercase();
    let unit_at = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
    let (digits, unit) = text.split_at(unit_at);
    if digits.is_empty() {
        return Err("must be a size: digits with K, M, G or T, as in 64M".into());
    }
    let shift = match unit {
        "" | "b" => 0,
        "k" | "kb" | "kib" => 10,
        "m" | "mb" | "mib" => 20,
        "g" | "gb" | "gib" => 30,
        "t" | "tb" | "tib" => 40,
        _ => return Err("must be a size: only K, M, G or T may follow the digits, as in 64M".into()),
    };
    // All characters are digits, so parsing fails only if the number is too large.
    let bytes = digits.parse::<u64>().ok().and_then(|n| n.checked_mul(1 << shift));
    bytes.ok_or_else(|| "does not fit in 64 bits".into())
}

/// Mode of the page cache that `cache=` selects, and a warning about the word that was given.
pub(super) type PageCacheArg = (PageCache, Option<&'static str>);

/// Warning about `cache=writeback`.
const NO_WRITEBACK: &str = "cache=writeback means writethrough: with delayed writes the kernel would decide on the size \
     of the disk, and could lose data that it has accepted";

/// Parses the value of `cache=`. Returns `None` for other words; the table of keys refuses those before it calls this.
pub(super) fn page_cache(value: &OsStr) -> Option<PageCacheArg> {
    match value.to_str() {
        Some("none") => Some((PageCache::None, None)),
        Some("writethrough") => Some((PageCache::WriteThrough, None)),
        Some("writeback") => Some((PageCache::WriteThrough, Some(NO_WRITEBACK))),
        _ => None,
    }
}

/// Parses a user or group ID. The highest number is refused, because system calls take it as "no ID" (-1).
pub(super) fn id(value: &OsStr) -> Result<u32, String> {
    match decimal(text(value)?) {
        Some(id) if id != u32::MAX => Ok(id),
        _ => Err("must be a number from 0 to 4294967294".into()),
    }
}

/// Parses permission bits in octal, such as `022`.
pub(super) fn umask(value: &OsStr) -> Result<u32, String> {
    let text = text(value)?;
    let octal = text.bytes().all(|b| matches!(b, b'0'..=b'7'));
    match u32::from_str_radix(text, 8) {
        Ok(bits) if octal && bits <= MODE_BITS => Ok(bits),
        _ => Err("must be octal, from 0 to 777".into()),
    }
}

/// Makes a path absolute, relative to the current directory. Symbolic links and `..` are not resolved.
pub(super) fn path(value: &OsStr) -> Result<PathBuf, String> {
    if value.is_empty() {
        return Err("a path is missing".into());
    }
    if value.as_bytes().contains(&0) {
        return Err("a path cannot contain a NUL byte".into());
    }
    std::path::absolute(Path::new(value)).map_err(|e| format!("cannot determine the current directory: {e}"))
}

/// Checks that `value` is a possible name of a directory entry.
pub(super) fn file_name(value: &OsStr) -> Result<(), String> {
    let bytes = value.as_bytes();
    if bytes.is_empty() || bytes == b"." || bytes == b".." {
        return Err("not a valid file name".into());
    }
    if bytes.contains(&b'/') || bytes.contains(&0) {
        return Err("a file name cannot contain `/` or a NUL byte".into());
    }
    if bytes.len() > NAME_MAX {
        return Err(format!("a file name can have at most {NAME_MAX} bytes"));
    }
    Ok(())
}

/// Parses a number that consists of digits only; `str::parse` alone would also accept a leading `+`.
pub(super) fn decimal(text: &str) -> Option<u32> {
    text.bytes()
        .all(|b| b.is_ascii_digit())
        .then(|| text.parse().ok())
        .flatten()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn os(text: &str) -> &OsStr {
        OsStr::new(text)
    }

    #[test]
    fn size_takes_k_m_g_t() {
        for (text, bytes) in [
            ("0", 0),
            ("512", 512),
            ("512B", 512),
            ("4k", 4096),
            ("4K", 4096),
            ("64M", 64 << 20),
            ("64MiB", 64 << 20),
            ("64mb", 64 << 20),
            ("3G", 3 << 30),
            ("62T", 62 << 40),
            ("18446744073709551615", u64::MAX),
            ("16777215T", 16_777_215 << 40),
        ] {
            assert_eq!(size(os(text)), Ok(bytes), "{text}");
        }
    }

    #[test]
    fn size_refuses_everything_else() {
        for text in ["", "M", "-1", "+1", "1.5G", "1 M", "1P", "5iB", "1MM", "0x10", "１"] {
            assert!(size(os(text)).is_err(), "{text}");
        }
        for text in ["18446744073709551616", "16777216T", "99999999999999999999999K"] {
            assert!(size(os(text)).is_err_and(|e| e.contains("64 bits")), "{text}");
        }
        assert!(size(OsStr::from_bytes(b"1\xff")).is_err());
    }

    #[test]
    fn bool_takes_true_yes_on_1_in_any_case() {
        for text in ["true", "YES", "On", "1"] {
            assert_eq!(boolean(os(text)), Ok(true), "{text}");
        }
        for text in ["false", "No", "OFF", "0"] {
            assert_eq!(boolean(os(text)), Ok(false), "{text}");
        }
        for text in ["", "2", "ja", "true "] {
            assert!(boolean(os(text)).is_err(), "{text}");
        }
    }

    #[test]
    fn ids_and_umask() {
        assert_eq!(id(os("0")), Ok(0));
        assert_eq!(id(os("4294967294")), Ok(4_294_967_294));
        for text in ["", "-1", "+1", "root", "4294967295", "4294967296"] {
            assert!(id(os(text)).is_err(), "{text}");
        }
        assert_eq!(umask(os("022")), Ok(0o22));
        assert_eq!(umask(os("777")), Ok(0o777));
        for text in ["", "8", "1000", "-22", "+22", "0o22"] {
            assert!(umask(os(text)).is_err(), "{text}");
        }
    }

    #[test]
    fn paths_become_absolute_but_are_not_resolved() {
        let here = std::env::current_dir().unwrap();
        assert_eq!(path(os("a/../b")), Ok(here.join("a/../b")));
        assert_eq!(path(os("/a/b")), Ok("/a/b".into()));
        assert_eq!(
            path(OsStr::from_bytes(b"\xff")),
            Ok(here.join(OsStr::from_bytes(b"\xff")))
        );
        assert!(path(os("")).is_err());
        assert!(path(os("a\0b")).is_err());
    }

    #[test]
    fn file_names() {
        let longest = "x".repeat(255);
        for name in ["a", "...", "a b=c", longest.as_str()] {
            assert_eq!(file_name(os(name)), Ok(()), "{name}");
        }
        assert_eq!(file_name(OsStr::from_bytes(b"\xff.raw")), Ok(()));
        let too_long = "x".repeat(256);
        for name in ["", ".", "..", "a/b", "/", "a\0", too_long.as_str()] {
            assert!(file_name(os(name)).is_err(), "{name}");
        }
    }
}
