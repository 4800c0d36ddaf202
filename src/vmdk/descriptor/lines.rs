//! The text of a descriptor as lines, and what its fields are made of.
//!
//! Lines and fields are cut on the raw bytes, and fields are decoded afterwards. That is the same as decoding the
//! whole text first: in every encoding that passes [`encoding`] a byte below 0x40 that is no digit (`"`, `=`, `#`,
//! blanks, line ends) is never the second byte of a character. `\` and `|` may be, so look for them after decoding.

use encoding_rs::{Encoding, UTF_8};

use crate::error::{Error, Result};
use crate::store::{ExtentName, printable};

/// The most bytes of the text up to its first NUL.
pub(super) const TEXT_MAX: usize = 1 << 20;
/// The most lines.
pub(super) const LINES_MAX: usize = 64 << 10;
/// The most extents: a disk of 8 TB in pieces of 2 GiB has 4 Ki.
pub(super) const EXTENTS_MAX: usize = 64 << 10;

/// `key = value`, both still raw and without blanks around them.
#[derive(Debug, Clone, Copy)]
pub(super) struct Setting<'a> {
    /// Number of its line, from 1.
    pub(super) line: usize,
    /// Compare it without case.
    pub(super) key: &'a [u8],
    /// Quotes are still on it.
    pub(super) value: &'a [u8],
}

impl<'a> Setting<'a> {
    /// The value without its quotes. Errors: no closing quote, or something behind it that is no comment.
    pub(super) fn unquoted(&self) -> Result<&'a [u8]> {
        let Some(inner) = self.value.strip_prefix(b"\"") else {
            return Ok(self.value);
        };
        let Some(end) = inner.iter().position(|&b| b == b'"') else {
            return Err(self.error("expected a closing `\"` behind the value"));
        };
        let rest = inner[end + 1..].trim_ascii_start();
        if !rest.is_empty() && rest[0] != b'#' {
            return Err(self.error(&format!(
                "expected nothing behind the quoted value, not `{}`",
                shown(rest)
            )));
        }
        Ok(&inner[..end])
    }

    /// The value without quotes, whatever else stands there: for values on which nothing depends.
    pub(super) fn leniently_unquoted(&self) -> &'a [u8] {
        let inner = self.value.strip_prefix(b"\"").unwrap_or(self.value);
        inner.strip_suffix(b"\"").unwrap_or(inner)
    }

    /// A `Corrupt` error that names line and key.
    pub(super) fn error(&self, expected: &str) -> Error {
        Error::corrupt(format!("line {}, {}: {expected}", self.line, shown(self.key)))
    }
}

/// The lines that mean something, sorted by kind and in the order of the text.
#[derive(Debug, Default)]
pub(super) struct Lines<'a> {
    settings: Vec<Setting<'a>>,
    /// Keys without the `ddb.` in front.
    pub(super) ddb: Vec<Setting<'a>>,
    /// Line number and text.
    pub(super) extents: Vec<(usize, &'a [u8])>,
}

impl<'a> Lines<'a> {
    /// Sorts the lines of the text, which ends at the first NUL.
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

    /// Sorts one line in.
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

    /// The first setting of that name, whatever its value.
    pub(super) fn first(&self, key: &str) -> Option<&Setting<'a>> {
        self.settings
            .iter()
            .find(|s| s.key.eq_ignore_ascii_case(key.as_bytes()))
    }

    /// All settings of that name.
    pub(super) fn all(&self, key: &str) -> impl Iterator<Item = &Setting<'a>> {
        self.settings
            .iter()
            .filter(move |s| s.key.eq_ignore_ascii_case(key.as_bytes()))
    }

    /// The setting of that name with its value read by `parse`. Two that say different things are an error.
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

/// What of `bytes` is text: all up to the first NUL, without a byte order mark.
pub(super) fn text_of(bytes: &[u8]) -> &[u8] {
    let end = bytes.iter().position(|&b| b == 0).unwrap_or(bytes.len());
    let text = &bytes[..end];
    text.strip_prefix(b"\xef\xbb\xbf").unwrap_or(text)
}

/// `line` as a setting, if there is an `=` behind a first word.
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

/// The encoding that a descriptor names; UTF-8 if none. Errors: an unknown one, or one in which ASCII is not ASCII.
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

/// Text in `encoding` as Unicode; what cannot be decoded becomes U+FFFD.
pub(super) fn decode(encoding: &'static Encoding, bytes: &[u8]) -> String {
    encoding.decode_without_bom_handling(bytes).0.into_owned()
}

/// A file name in `encoding`. Names in UTF-8 keep their bytes, valid or not; others keep them as a second spelling.
pub(super) fn name(encoding: &'static Encoding, bytes: &[u8]) -> Result<ExtentName> {
    if encoding == UTF_8 {
        return ExtentName::new(bytes);
    }
    ExtentName::new(decode(encoding, bytes))?.or_raw(bytes)
}

/// A piece of the text for a message: printable, and not too long.
pub(super) fn shown(bytes: &[u8]) -> String {
    const MOST: usize = 60;
    let text = printable(std::ffi::OsString::from(String::from_utf8_lossy(bytes).into_owned()));
    match text.char_indices().nth(MOST) {
        Some((cut, _)) => format!("{}…", &text[..cut]),
        None => text,
    }
}

/// Whether the line starts with a word of access and is no setting of that name.
fn is_extent(line: &[u8]) -> bool {
    let word = line.split(u8::is_ascii_whitespace).next().unwrap_or(line);
    let access = [&b"RW"[..], b"RDONLY", b"NOACCESS"]
        .iter()
        .any(|a| a.eq_ignore_ascii_case(word));
    access && line[word.len()..].trim_ascii_start().first() != Some(&b'=')
}

/// An encoding by the names that VMware (Windows code pages) and the Web use.
fn by_label(label: &[u8]) -> Option<&'static Encoding> {
    // Code pages by number that the Web's list does not have.
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
