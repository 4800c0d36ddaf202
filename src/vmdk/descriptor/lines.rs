//! Lines of a descriptor and the syntax of their fields.
//!
//! Lines and fields are split on the raw bytes, and fields are decoded afterwards. The result is the same as if the
//! whole text was decoded first: in every encoding that [`encoding`] accepts, a byte below 0x40 that is not a digit
//! (`"`, `=`, `#`, blanks, line ends) is never the second byte of a character. `\` and `|` may be, so search for them
//! only in decoded text.

use encoding_rs::{Encoding, UTF_8};

use crate::error::{Error, Result};
use crate::store::{ExtentName, printable};

/// Maximum length of the text up to its first NUL, in bytes.
pub(super) const TEXT_MAX: usize = 1 << 20;
/// Maximum number of lines.
pub(super) const LINES_MAX: usize = 64 << 10;
/// Maximum number of extents: a disk of 8 TiB in pieces of 2 GiB has 4096.
pub(super) const EXTENTS_MAX: usize = 64 << 10;

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
    /// Returns the value without its quotes.
    ///
    /// Errors: `Corrupt` if the closing quote is missing, or if anything but a comment follows it.
    pub(super) fn unquoted(&self) -> Result<&'a [u8]> {
        let Some(inner) = self.value.strip_prefix(b"\"") else {
            return Ok(self.value);
        };
        let Some(end) = inner.iter().position(|&b| b == b'"') else {
            return Err(self.error("expected a closing `\"` after the value"));
        };
        let rest = inner[end + 1..].trim_ascii_start();
        if !rest.is_empty() && rest[0] != b'#' {
            return Err(self.error(&format!(
                "expected nothing after the quoted value, not `{}`",
                shown(rest)
            )));
        }
        Ok(&inner[..end])
    }

    /// Returns the value without its quotes and without checks, for values that do not affect the data.
    pub(super) fn leniently_unquoted(&self) -> &'a [u8] {
        let inner = self.value.strip_prefix(b"\"").unwrap_or(self.value);
        inner.strip_suffix(b"\"").unwrap_or(inner)
    }

    /// Returns a `Corrupt` error that names the line and the key.
    pub(super) fn error(&self, expected: &str) -> Error {
        Error::corrupt(format!("line {}, {}: {expected}", self.line, shown(self.key)))
    }
}

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
    /// Errors: `Corrupt` for a line that is neither blank, comment, setting nor extent, and for a text beyond the
    /// limits.
    pub(super) fn of(bytes: &'a [u8]) -> Result<Self> {
        let text = text_of(bytes);
        if text.len() > TEXT_MAX {
            return Err(Error::corrupt(format!(
                "the text of the descriptor has {} bytes, more than {TEXT_MAX}",
                text.len()
            )));
        }
        let mut lines = Self::default();
        for (index, line) in text.split(|&b| b == b'\n').enumerate() {
            if index >= LINES_MAX {
                return Err(Error::corrupt(format!(
                    "the descriptor has more than {LINES_MAX} lines"
                )));
            }
            lines.add(index + 1, line.trim_ascii())?;
        }
        Ok(lines)
    }

    /// Adds one trimmed line to its group.
    fn add(&mut self, number: usize, line: &'a [u8]) -> Result<()> {
        if line.is_empty() || line[0] == b'#' {
            return Ok(());
        }
        if is_extent(line) {
            if self.extents.len() >= EXTENTS_MAX {
                return Err(Error::corrupt(format!(
                    "line {number}: more than {EXTENTS_MAX} extents"
                )));
            }
            self.extents.push((number, line));
            return Ok(());
        }
        let Some(setting) = setting(number, line) else {
            return Err(Error::corrupt(format!(
                "line {number}: expected a comment, a setting or an extent, not `{}`",
                shown(line)
            )));
        };
        match setting.key.split_at_checked(4) {
            Some((prefix, name)) if prefix.eq_ignore_ascii_case(b"ddb.") => {
                self.ddb.push(Setting { key: name, ..setting });
            }
            _ => self.settings.push(setting),
        }
        Ok(())
    }

    /// Returns the first setting with that key. Later ones may contradict it.
    pub(super) fn first(&self, key: &str) -> Option<&Setting<'a>> {
        self.settings
            .iter()
            .find(|s| s.key.eq_ignore_ascii_case(key.as_bytes()))
    }

    /// Returns all settings with that key.
    pub(super) fn all(&self, key: &str) -> impl Iterator<Item = &Setting<'a>> {
        self.settings
            .iter()
            .filter(move |s| s.key.eq_ignore_ascii_case(key.as_bytes()))
    }

    /// Returns the line and the parsed value of the setting with that key.
    ///
    /// Errors: those of `parse`, and `Corrupt` if two lines have different values. The same value twice is accepted.
    pub(super) fn get<T: PartialEq>(
        &self,
        key: &str,
        parse: impl Fn(&Setting<'a>) -> Result<T>,
    ) -> Result<Option<(usize, T)>> {
        let mut found: Option<(usize, T)> = None;
        for setting in self
            .settings
            .iter()
            .filter(|s| s.key.eq_ignore_ascii_case(key.as_bytes()))
        {
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
}

/// Returns the text in `bytes`: everything up to the first NUL, without a byte order mark.
pub(super) fn text_of(bytes: &[u8]) -> &[u8] {
    let end = bytes.iter().position(|&b| b == 0).unwrap_or(bytes.len());
    let text = &bytes[..end];
    text.strip_prefix(b"\xef\xbb\xbf").unwrap_or(text)
}

/// Parses `line` as a setting. Returns `None` unless it is a single word followed by `=`.
pub(super) fn setting(number: usize, line: &[u8]) -> Option<Setting<'_>> {
    let equals = line.iter().position(|&b| b == b'=')?;
    let key = line[..equals].trim_ascii();
    let is_word = !key.is_empty() && !key.iter().any(|b| b.is_ascii_whitespace() || *b == b'"');
    is_word.then(|| Setting {
        line: number,
        key,
        value: line[equals + 1..].trim_ascii(),
    })
}

/// Returns the encoding that a descriptor names; UTF-8 if it names none.
///
/// Errors: `Corrupt` for an unknown encoding, or one that is not a superset of ASCII.
pub(super) fn encoding(lines: &Lines<'_>) -> Result<&'static Encoding> {
    let found = lines.get("encoding", |setting| {
        let label = setting.unquoted()?;
        by_label(label).ok_or_else(|| {
            setting.error(&format!(
                "expected an encoding like UTF-8, windows-1252 or Shift_JIS, not `{}`",
                shown(label)
            ))
        })
    })?;
    Ok(found.map_or(UTF_8, |(_, encoding)| encoding))
}

/// Decodes text. Bytes that are invalid in the encoding become U+FFFD.
pub(super) fn decode(encoding: &'static Encoding, bytes: &[u8]) -> String {
    encoding.decode_without_bom_handling(bytes).0.into_owned()
}

/// Returns a file name that is written in `encoding`. Names in UTF-8 keep their bytes, valid or not. Other names are
/// decoded, and keep their raw bytes as a second spelling, as the file on this system may have either.
pub(super) fn name(encoding: &'static Encoding, bytes: &[u8]) -> Result<ExtentName> {
    if encoding == UTF_8 {
        return ExtentName::new(bytes);
    }
    ExtentName::new(decode(encoding, bytes))?.or_raw(bytes)
}

/// Returns a part of the text for a message: printable, and truncated after 60 characters.
pub(super) fn shown(bytes: &[u8]) -> String {
    const MAX_CHARS: usize = 60;
    let text = printable(std::ffi::OsString::from(String::from_utf8_lossy(bytes).into_owned()));
    match text.char_indices().nth(MAX_CHARS) {
        Some((cut, _)) => format!("{}…", &text[..cut]),
        None => text,
    }
}

/// Returns true if the line starts with an access keyword and is not a setting whose key is that keyword.
fn is_extent(line: &[u8]) -> bool {
    let word = line.split(u8::is_ascii_whitespace).next().unwrap_or(line);
    let access = [&b"RW"[..], b"RDONLY", b"NOACCESS"]
        .iter()
        .any(|a| a.eq_ignore_ascii_case(word));
    access && line[word.len()..].trim_ascii_start().first() != Some(&b'=')
}

/// Returns an encoding by the labels of VMware (Windows code pages) and of the WHATWG standard.
fn by_label(label: &[u8]) -> Option<&'static Encoding> {
    // Numbers of code pages that are missing in the WHATWG list.
    const CODE_PAGES: [(&str, &Encoding); 4] = [
        ("932", encoding_rs::SHIFT_JIS),
        ("936", encoding_rs::GBK),
        ("949", encoding_rs::EUC_KR),
        ("950", encoding_rs::BIG5),
    ];
    let lower = label.to_ascii_lowercase();
    let lower = std::str::from_utf8(&lower).ok()?;
    let number = ["windows-", "cp", "ms"]
        .iter()
        .find_map(|p| lower.strip_prefix(p))
        .unwrap_or(lower);
    let page = CODE_PAGES
        .iter()
        .find(|(page, _)| *page == number)
        .map(|(_, encoding)| *encoding);
    page.or_else(|| Encoding::for_label_no_replacement(label))
        .filter(|e| e.is_ascii_compatible())
}
