//! File names for NBD exports.
//!
//! The name of an export is untrusted: it may contain slashes or control characters, be `..`, or be empty. A byte that
//! a file name can't contain, or that could control a terminal, is escaped as `%` and two hexadecimal digits. `%`
//! itself is escaped too, so that different exports have different file names.

use std::collections::HashSet;
use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::{OsStrExt, OsStringExt};

/// Maximum length of a file name in bytes (`NAME_MAX` of Linux).
const NAME_MAX: usize = 255;

/// Suffix of every file name.
const SUFFIX: &[u8] = b".raw";

/// File name of an export without a name.
const NAMELESS: &str = "disk.raw";

/// Space in bytes for `~` and a number that makes a name unique.
const NUMBER_SPACE: usize = 12;

/// Returns the file name for an export: its name, escaped, with the suffix `.raw` unless it has it. At most
/// 255 bytes.
pub fn export_file_name(export: &OsStr) -> OsString {
    if export.is_empty() {
        return NAMELESS.into();
    }
    let mut name = Vec::with_capacity(export.len() + SUFFIX.len());
    for byte in export.as_bytes() {
        match byte {
            // `.` and `..` need no escape, as every name gets a suffix.
            b'/' | b'%' | 0..=0x1f | 0x7f => name.extend(format!("%{byte:02X}").bytes()),
            _ => name.push(*byte),
        }
    }
    // A name that is nothing but the suffix keeps it, so that the file name does not consist of the suffix alone.
    let suffixed = name.len() > SUFFIX.len() && name.to_ascii_lowercase().ends_with(SUFFIX);
    if suffixed {
        name.truncate(name.len() - SUFFIX.len());
    }
    // Shorter than the limit, so that a number can be added to make the name unique.
    if name.len() > NAME_MAX - SUFFIX.len() - NUMBER_SPACE {
        truncate_name(&mut name, NAME_MAX - SUFFIX.len() - NUMBER_SPACE);
    }
    name.extend(SUFFIX);
    OsString::from_vec(name)
}

/// Returns the file names of `exports`, in their order. All are different, and none is in `taken`.
pub fn export_file_names<'e>(exports: impl Iterator<Item = &'e OsStr>, taken: &HashSet<OsString>) -> Vec<OsString> {
    let mut used = taken.clone();
    // Two exports can get the same name: `a` and `a.raw`, or two long names that were truncated.
    let unique = |export| {
        let first = export_file_name(export);
        let mut name = first.clone();
        let mut number = 2u32;
        while !used.insert(name.clone()) {
            let bytes = first.as_bytes();
            let stem = bytes.strip_suffix(SUFFIX).unwrap_or(bytes);
            name = OsString::from_vec([stem, format!("~{number}").as_bytes(), SUFFIX].concat());
            number += 1;
        }
        name
    };
    exports.map(unique).collect()
}

/// Truncates a name to at most `max_len` bytes, at a character boundary.
fn truncate_name(name: &mut Vec<u8>, max_len: usize) {
    let mut end = max_len;
    // A UTF-8 continuation byte must not be the first one that is removed.
    while end > 0 && name.get(end).is_some_and(|b| b & 0xc0 == 0x80) {
        end -= 1;
    }
    name.truncate(end);
}

#[cfg(test)]
mod tests {
    use super::*;

    fn name(export: &[u8]) -> OsString {
        export_file_name(OsStr::from_bytes(export))
    }

    #[test]
    fn a_file_name_is_the_export_name_with_the_suffix_raw() {
        assert_eq!(name(b"vm1"), "vm1.raw");
        assert_eq!(name(b"vm1.raw"), "vm1.raw");
        assert_eq!(name(b"vm1.qcow2"), "vm1.qcow2.raw");
        assert_eq!(name(b""), "disk.raw");
        assert_eq!(name(b".raw"), ".raw.raw");
    }

    #[test]
    fn bytes_that_a_file_name_cannot_contain_are_escaped() {
        assert_eq!(name(b"../../etc/passwd"), "..%2F..%2Fetc%2Fpasswd.raw");
        assert_eq!(name(b".."), "...raw");
        assert_eq!(name(b"a\n\x1b[2Jb"), "a%0A%1B[2Jb.raw");
        assert_eq!(name(b"a%2Fb"), "a%252Fb.raw");
        for export in [&b"/"[..], b".", b"..", b"%", b"\x01", &[0xff, b'/']] {
            let name = name(export);
            assert!(
                !name.as_bytes().contains(&b'/') && name != "." && name != "..",
                "{name:?}"
            );
        }
    }

    #[test]
    fn names_are_short_enough_and_unique() {
        let long: Vec<OsString> = (0..50).map(|i| format!("{}{i}", "ü".repeat(200)).into()).collect();
        let taken = HashSet::from([OsString::from("a.raw")]);
        let exports: Vec<&OsStr> = long
            .iter()
            .map(OsString::as_os_str)
            .chain([OsStr::new("a"), OsStr::new("a.raw")])
            .collect();
        let names = export_file_names(exports.iter().copied(), &taken);
        assert_eq!(names.iter().collect::<HashSet<_>>().len(), 52);
        assert!(names.iter().all(|n| n.len() <= NAME_MAX && !taken.contains(n)));
        assert!(names[0].to_str().is_some(), "truncated within a character");
        assert_eq!(&names[50..], ["a~2.raw", "a~3.raw"]);
    }
}
