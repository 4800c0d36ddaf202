//! Encodings of a descriptor: that of the whole text (UTF-16), and that of the names in it (`encoding=`).

use std::borrow::Cow;

use encoding_rs::{BIG5, EUC_KR, Encoding, GBK, SHIFT_JIS, UTF_8, UTF_16BE, UTF_16LE};

use super::setting::Setting;
use super::warnings::{Warnings, shown};
use crate::error::{Error, Result};
use crate::store::ExtentName;

/// Encoding of the names of a descriptor.
#[derive(Debug, Clone, Copy)]
pub(super) struct TextEncoding<'a> {
    /// UTF-8 where the label is unknown.
    encoding: &'static Encoding,
    /// Label that is unknown: only names in ASCII are certain.
    unknown: Option<&'a [u8]>,
}

impl<'a> TextEncoding<'a> {
    /// Returns the encoding that the `encoding=` of a descriptor name; UTF-8 if there is none.
    pub(super) fn of<'s>(settings: impl Iterator<Item = &'s Setting<'a>>, warnings: &mut Warnings) -> Self
    where
        'a: 's,
    {
        let mut found: Option<Self> = None;
        for setting in settings {
            let label = setting.leniently_unquoted();
            let this = Self {
                encoding: by_label(label).unwrap_or(UTF_8),
                unknown: by_label(label).is_none().then_some(label),
            };
            if this.unknown.is_some() {
                let line = setting.line;
                warnings.add(format!(
                    "line {line}: the encoding `{}` is unknown; only names in ASCII can be read",
                    shown(label)
                ));
            }
            found = Some(match found {
                Some(first) if first.encoding == this.encoding && first.unknown.is_none() => this,
                // Two encodings: neither of them is certain.
                Some(_) => Self {
                    encoding: UTF_8,
                    unknown: Some(label),
                },
                None => this,
            });
        }
        found.unwrap_or(Self {
            encoding: UTF_8,
            unknown: None,
        })
    }

    /// Decodes text for messages and labels. Invalid bytes become U+FFFD.
    pub(super) fn decode(self, bytes: &[u8]) -> String {
        self.encoding.decode_without_bom_handling(bytes).0.into_owned()
    }

    /// Returns a file name. Names in UTF-8 keep their bytes, valid or not. Other names are decoded, and keep their raw
    /// bytes as a second spelling, as the file on this system may have either.
    ///
    /// Errors: `Unsupported` if the encoding is unknown and the name is not ASCII, `Corrupt` for an invalid name.
    pub(super) fn name(self, bytes: &[u8]) -> Result<ExtentName> {
        match self.unknown {
            Some(label) if !bytes.is_ascii() => Err(Error::unsupported(format!(
                "the name `{}` is not ASCII, and the encoding `{}` of the descriptor is unknown; save the descriptor in \
                 UTF-8 with encoding=\"UTF-8\"",
                shown(bytes),
                shown(label)
            ))),
            _ if self.encoding == UTF_8 => ExtentName::new(bytes),
            _ => ExtentName::new(self.decode(bytes))?.or_raw(bytes),
        }
    }

    /// Returns the encoding, for names that are made from a decoded one.
    pub(super) fn encoding(self) -> &'static Encoding {
        self.encoding
    }
}

/// Returns true if the text is UTF-16, which cannot be changed in place.
pub(super) fn is_utf16(bytes: &[u8]) -> bool {
    utf16(bytes).is_some()
}

/// Returns the text in UTF-8 or a superset of ASCII. Only UTF-16 is converted.
pub(super) fn to_utf8(bytes: &[u8]) -> Cow<'_, [u8]> {
    match utf16(bytes) {
        Some(encoding) => {
            let text = encoding.decode_with_bom_removal(bytes).0;
            Cow::Owned(text.into_owned().into_bytes())
        }
        None => Cow::Borrowed(bytes),
    }
}

/// Returns the kind of UTF-16 of a text, by its byte order mark or by the zero bytes of two ASCII characters.
fn utf16(bytes: &[u8]) -> Option<&'static Encoding> {
    let text = |b: u8| b.is_ascii_graphic() || b.is_ascii_whitespace();
    match *bytes {
        [0xff, 0xfe, ..] => Some(UTF_16LE),
        [0xfe, 0xff, ..] => Some(UTF_16BE),
        [a, 0, b, 0, ..] if text(a) && text(b) => Some(UTF_16LE),
        [0, a, 0, b, ..] if text(a) && text(b) => Some(UTF_16BE),
        _ => None,
    }
}

/// Returns an encoding by its label: those of VMware (Windows code pages), of the WHATWG standard, and of ICU, from
/// which VMware's own names come. UTF-16 as a label in a text that is none means nothing.
fn by_label(label: &[u8]) -> Option<&'static Encoding> {
    // Code pages of Windows and IBM that are missing in the WHATWG list.
    const CODE_PAGES: [(&str, &Encoding); 9] = [
        ("932", SHIFT_JIS),
        ("943", SHIFT_JIS),
        ("936", GBK),
        ("1386", GBK),
        ("949", EUC_KR),
        ("1363", EUC_KR),
        ("950", BIG5),
        ("65001", UTF_8),
        ("1208", UTF_8),
    ];
    // IBM's numbers of Windows code pages with the euro sign.
    const IBM_WINDOWS: [(&str, &str); 9] = [
        ("5346", "windows-1250"),
        ("5347", "windows-1251"),
        ("5348", "windows-1252"),
        ("5349", "windows-1253"),
        ("5350", "windows-1254"),
        ("9447", "windows-1255"),
        ("9448", "windows-1256"),
        ("9449", "windows-1257"),
        ("5354", "windows-1258"),
    ];
    let lower = label.trim_ascii().to_ascii_lowercase();
    let lower = std::str::from_utf8(&lower).ok()?;
    if lower.is_empty() || lower.starts_with("utf-16") || lower.starts_with("utf16") || lower.starts_with("ucs-2") {
        return Some(UTF_8);
    }
    if let Some(encoding) = Encoding::for_label_no_replacement(lower.as_bytes()) {
        return Some(encoding).filter(|e| e.is_ascii_compatible());
    }
    // ICU: `windows-949-2000`, `ibm-943_P15A-2003`, `ibm-5348_P100-1997`.
    let prefixes = ["windows-", "ibm-", "cp", "ms", ""];
    let number = prefixes.iter().find_map(|prefix| lower.strip_prefix(prefix))?;
    let page = number.split(['-', '_', ',']).next().unwrap_or(number);
    if let Some((_, encoding)) = CODE_PAGES.iter().find(|(known, _)| *known == page) {
        return Some(encoding);
    }
    let windows = IBM_WINDOWS.iter().find(|(ibm, _)| *ibm == page);
    let windows = windows.map_or_else(|| format!("windows-{page}"), |(_, name)| (*name).to_owned());
    Encoding::for_label_no_replacement(windows.as_bytes()).filter(|e| e.is_ascii_compatible())
}
