//! From the name of an export to the name of a file.
//!
//! A server may call an export anything: with slashes, control characters, `..`, nothing at all. What a file's name can't
//! hold, or a terminal should not be shown, is written as `%` and two hexadecimal digits, and so is `%` itself, so that
//! different exports stay different.

use std::collections::HashSet;
use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::{OsStrExt, OsStringExt};

/// The longest file name of Linux, bytes (`NAME_MAX`).
const NAME_MAX: usize = 255;

/// What every file is called after its export.
const SUFFIX: &[u8] = b".raw";

/// The file of an export without a name.
const NAMELESS: &str = "disk.raw";

/// Room for a number that makes a name unique.
const NUMBER: usize = 12;

/// The file name of an export.
pub fn export_file_name(export: &OsStr) -> OsString {
    if export.is_empty() {
        return NAMELESS.into();
    }
    let mut name = Vec::with_capacity(export.len() + SUFFIX.len());
    for byte in export.as_bytes() {
        match byte {
            b'/' | b'%' | 0..=0x1f | 0x7f => name.extend(format!("%{byte:02X}").bytes()),
            _ => name.push(*byte),
        }
    }
    let suffixed = name.len() > SUFFIX.len() && name.to_ascii_lowercase().ends_with(SUFFIX);
    if suffixed {
        name.truncate(name.len() - SUFFIX.len());
    }
    if name.len() > NAME_MAX - SUFFIX.len() - NUMBER {
        shorten(&mut name, NAME_MAX - SUFFIX.len() - NUMBER);
    }
    name.extend(SUFFIX);
    OsString::from_vec(name)
}

/// The file names of exports, in their order; none is twice, or one of `taken`.
pub fn export_file_names<'e>(exports: impl Iterator<Item = &'e OsStr>, taken: &HashSet<OsString>) -> Vec<OsString> {
    let mut used = taken.clone();
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

/// Cuts a name, not within a character.
fn shorten(name: &mut Vec<u8>, most: usize) {
    let mut end = most;
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
    fn an_exports_file_has_its_name_and_raw() {
        assert_eq!(name(b"vm1"), "vm1.raw");
        assert_eq!(name(b"vm1.raw"), "vm1.raw");
        assert_eq!(name(b"vm1.qcow2"), "vm1.qcow2.raw");
        assert_eq!(name(b""), "disk.raw");
        assert_eq!(name(b".raw"), ".raw.raw");
    }

    #[test]
    fn names_that_no_file_can_have_are_escaped() {
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
        assert!(names[0].to_str().is_some(), "cut within a character");
        assert_eq!(&names[50..], ["a~2.raw", "a~3.raw"]);
    }
}
