//! Lines of a descriptor and the syntax of their fields.
//!
//! Lines and fields are split on the raw bytes, and fields are decoded afterwards. The result is the same as if the
//! whole text was decoded first: in every encoding that [`TextEncoding`](super::encoding::TextEncoding) knows, a byte
//! below 0x40 that is not a digit (`"`, `=`, `#`, blanks, line ends) is never the second byte of a character. `\` and
//! `|` may be, so search for them only in decoded text.
//!
//! People and small tools write descriptors by hand. A line that is none of the format's is ignored with a warning,
//! unless it may have been meant to decide which bytes the disk has: an extent, a parent, encryption.

use crate::error::{Error, Result};
use crate::vmdk::descriptor::extent;
use crate::vmdk::descriptor::quotes::{self, Quoted};
use crate::vmdk::descriptor::setting::Setting;
use crate::vmdk::descriptor::warnings::{Warnings, shown};

/// Maximum length of the text up to its first NUL, in bytes.
pub(super) const TEXT_MAX: usize = 1 << 20;
/// Maximum number of lines.
pub(super) const LINES_MAX: usize = 64 << 10;
/// Maximum number of extents: a disk of 8 TiB in pieces of 2 GiB has 4096.
pub(super) const EXTENTS_MAX: usize = 64 << 10;
/// Keys that decide which bytes a disk has: a line that starts with one and is no setting is damage.
const DECIDING: [&str; 5] = [
    "parentCID",
    "parentFileNameHint",
    "encryptionKeys",
    "keyID",
    "isNativeSnapshot",
];
/// Names of the disk data base that are recognized without their prefix `ddb.`.
const DDB_NAMES: [&str; 9] = [
    "adapterType",
    "virtualHWVersion",
    "toolsVersion",
    "toolsInstallType",
    "longContentID",
    "deletable",
    "thinProvisioned",
    "iofilters",
    "uuid",
];
/// Starts of such names.
const DDB_GROUPS: [&str; 2] = ["geometry.", "uuid."];

/// Lines with a meaning, grouped by type and in the order of the text.
#[derive(Debug, Default)]
pub(super) struct Lines<'a> {
    settings: Vec<Setting<'a>>,
    /// Settings of the disk data base; their keys are without the `ddb.` prefix.
    pub(super) ddb: Vec<Setting<'a>>,
    /// Extent lines: line number and text.
    pub(super) extents: Vec<(usize, &'a [u8])>,
}

impl<'a> Lines<'a> {
    /// Groups the lines of the text, which ends at the first NUL.
    ///
    /// Errors: `Corrupt` for a line that is none of the format's and may be meant to decide what the disk is, and for a
    /// text beyond the limits.
    pub(super) fn of(bytes: &'a [u8], warnings: &mut Warnings) -> Result<Self> {
        let text = text_of(bytes);
        // Only the text counts: an embedded descriptor may reserve up to 10 MiB, most of it NULs.
        if text.len() > TEXT_MAX {
            return Err(Error::corrupt(format!(
                "the text of the descriptor has {} bytes, more than {TEXT_MAX}",
                text.len()
            )));
        }
        let mut lines = Self::default();
        for (index, line) in split(text).enumerate() {
            if index >= LINES_MAX {
                return Err(Error::corrupt(format!(
                    "the descriptor has more than {LINES_MAX} lines"
                )));
            }
            lines.add(index + 1, line, warnings)?;
        }
        Ok(lines)
    }

    /// Adds one trimmed line to its group.
    fn add(&mut self, number: usize, line: &'a [u8], warnings: &mut Warnings) -> Result<()> {
        if line.is_empty() || line[0] == b'#' {
            return Ok(());
        }
        if extent::is_extent(line) {
            if self.extents.len() >= EXTENTS_MAX {
                return Err(Error::corrupt(format!(
                    "line {number}: more than {EXTENTS_MAX} extents"
                )));
            }
            self.extents.push((number, line));
            return Ok(());
        }
        let Some(setting) = Setting::parse(number, line) else {
            return stray(number, line, warnings);
        };
        if let Quoted::Closed { odd: true, .. } = quotes::quoted(setting.value) {
            warnings.add(format!(
                "line {number}: the value of {} has other quotes than `\"`",
                shown(setting.key)
            ));
        }
        match setting.key.split_at_checked(4) {
            Some((prefix, name)) if prefix.eq_ignore_ascii_case(b"ddb.") => {
                self.ddb.push(Setting { key: name, ..setting });
            }
            _ if is_ddb_name(setting.key) => {
                let key = shown(setting.key);
                warnings.add(format!("line {number}: {key} is read as ddb.{key}"));
                self.ddb.push(setting);
            }
            _ => self.settings.push(setting),
        }
        Ok(())
    }

    /// Returns the first setting with that key. Later ones may contradict it.
    pub(super) fn first(&self, key: &str) -> Option<&Setting<'a>> {
        self.all(key).next()
    }

    /// Returns all settings with that key.
    pub(super) fn all(&self, key: &str) -> impl Iterator<Item = &Setting<'a>> {
        self.settings
            .iter()
            .filter(move |s| s.key.eq_ignore_ascii_case(key.as_bytes()))
    }

    /// Returns the line and the parsed value of the setting with that key, for a value that decides what the disk is.
    ///
    /// Errors: those of `parse`, and `Corrupt` if two lines have different values. The same value twice is accepted.
    pub(super) fn get<T: PartialEq>(
        &self,
        key: &str,
        parse: impl Fn(&Setting<'a>) -> Result<T>,
    ) -> Result<Option<(usize, T)>> {
        let mut found: Option<(usize, T)> = None;
        for setting in self.all(key) {
            // Later lines are parsed as well: one that is damaged or different must not be missed.
            let value = parse(setting)?;
            match &found {
                None => found = Some((setting.line, value)),
                Some((_, before)) if *before == value => {}
                Some((line, _)) => {
                    return Err(setting.error(&format!("it contradicts line {line}, expected one value")));
                }
            }
        }
        Ok(found)
    }

    /// Returns the first value of that key that `parse` knows, for a value that decides no byte. Warns of a value that
    /// is unknown or another one.
    pub(super) fn label<T: PartialEq>(
        &self,
        key: &str,
        warnings: &mut Warnings,
        parse: impl Fn(&Setting<'a>) -> Option<T>,
    ) -> Option<T> {
        let mut found: Option<(usize, T)> = None;
        for setting in self.all(key) {
            let (line, shown) = (setting.line, shown(setting.leniently_unquoted()));
            match (parse(setting), &found) {
                (None, _) => warnings.add(format!("line {line}: {key} has the unknown value `{shown}`")),
                (Some(value), None) => found = Some((line, value)),
                (Some(value), Some((_, before))) if *before == value => {}
                (Some(_), Some((first, _))) => {
                    warnings.add(format!("line {line}: {key} contradicts line {first}, which counts"));
                }
            }
        }
        found.map(|(_, value)| value)
    }
}

/// Returns the text in `bytes`: everything up to the first NUL, without a byte order mark.
pub(super) fn text_of(bytes: &[u8]) -> &[u8] {
    // The space of an embedded descriptor is padded with NULs, and may hold the rest of an older text behind them.
    let end = bytes.iter().position(|&b| b == 0).unwrap_or(bytes.len());
    let text = &bytes[..end];
    text.strip_prefix(b"\xef\xbb\xbf").unwrap_or(text)
}

/// Returns the trimmed lines of a text. They end at LF, CR LF, or CR.
pub(super) fn split(text: &[u8]) -> impl Iterator<Item = &[u8]> {
    let mut rest = Some(text);
    std::iter::from_fn(move || {
        let text = rest?;
        let end = text.iter().position(|&b| b == b'\n' || b == b'\r');
        let (line, after) = end.map_or((text, None), |end| {
            let after = &text[end + 1..];
            let is_pair = text[end] == b'\r' && after.first() == Some(&b'\n');
            (&text[..end], Some(if is_pair { &after[1..] } else { after }))
        });
        rest = after;
        Some(quotes::trim(line))
    })
}

/// Ignores a line that is none of the format's, with a warning.
///
/// Errors: `Corrupt` if the line looks like an extent, or starts with a key that decides what the disk is.
fn stray(number: usize, line: &[u8], warnings: &mut Warnings) -> Result<()> {
    let is_comment = [&b";"[..], b"//", b"/*", b"["]
        .iter()
        .any(|mark| line.starts_with(mark));
    let end = line
        .iter()
        .position(|b| !b.is_ascii_alphanumeric())
        .unwrap_or(line.len());
    // `parentCID 1234abcd` without its `=`, taken for a stray line, would open a snapshot as a disk without a parent.
    let key = DECIDING
        .iter()
        .any(|key| key.as_bytes().eq_ignore_ascii_case(&line[..end]));
    if !is_comment && (key || extent::resembles_extent(line)) {
        return Err(Error::corrupt(format!(
            "line {number}: expected a comment, a setting or an extent, not `{}`",
            shown(line)
        )));
    }
    if !is_comment {
        warnings.add(format!("line {number}: `{}` is ignored", shown(line)));
    }
    Ok(())
}

/// Returns true for a name of the disk data base without its prefix.
fn is_ddb_name(key: &[u8]) -> bool {
    let starts = |group: &str| {
        key.get(..group.len())
            .is_some_and(|start| start.eq_ignore_ascii_case(group.as_bytes()))
    };
    // A `uuid.parent` that lacks its prefix still names a parent, so that ignoring it would lose the parent.
    DDB_NAMES.iter().any(|name| name.as_bytes().eq_ignore_ascii_case(key)) || DDB_GROUPS.iter().any(|g| starts(g))
}
