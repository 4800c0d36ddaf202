//! Extent lines: `RW 4192256 SPARSE "disk-s001.vmdk"`.

use std::fmt;

use encoding_rs::Encoding;

use super::lines::{self, shown};
use crate::block::MAX_SECTORS;
use crate::error::{Error, Result};
use crate::store::ExtentName;

/// What may be done with an extent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ExtentAccess {
    /// Read and written.
    ReadWrite,
    /// Only read.
    ReadOnly,
    /// Neither: it reads as zeroes.
    None,
}

/// How the data of an extent are kept.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ExtentKind {
    /// Raw, from a sector of a file or device on.
    Flat,
    /// Raw, a file of its own.
    Vmfs,
    /// Hosted sparse or streamOptimized (KDMV).
    Sparse,
    /// ESX sparse (COWD).
    VmfsSparse,
    /// Space-efficient sparse.
    SeSparse,
    /// Zeroes without a file.
    Zero,
}

impl ExtentAccess {
    /// As it is written in the line.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::ReadWrite => "RW",
            Self::ReadOnly => "RDONLY",
            Self::None => "NOACCESS",
        }
    }
}

impl ExtentKind {
    /// As it is written in the line.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Flat => "FLAT",
            Self::Vmfs => "VMFS",
            Self::Sparse => "SPARSE",
            Self::VmfsSparse => "VMFSSPARSE",
            Self::SeSparse => "SESPARSE",
            Self::Zero => "ZERO",
        }
    }
}

impl fmt::Display for ExtentKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// One extent; the extents of a disk lie one after the other.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ExtentLine {
    /// What may be done with it.
    pub access: ExtentAccess,
    /// Its size on the disk, 1…[`MAX_SECTORS`].
    pub sectors: u64,
    /// How its data are kept.
    pub kind: ExtentKind,
    /// Its file; `None` exactly for `ZERO`.
    pub name: Option<ExtentName>,
    /// Sector of the file where a `FLAT` extent starts; `offset + sectors` ≤ [`MAX_SECTORS`]. 0 for all others.
    pub offset: u64,
    /// Number of its line, from 1.
    pub line: usize,
}

/// Reads one line; `None` for an extent of no sectors, which programs leave as a placeholder.
pub(super) fn parse(line: usize, text: &[u8], encoding: &'static Encoding) -> Result<Option<ExtentLine>> {
    parse_words(line, Words(text), encoding).map_err(|e| e.within(format!("line {line}")))
}

/// Cuts a line into words and quoted names.
struct Words<'a>(&'a [u8]);

impl<'a> Words<'a> {
    /// The next word; empty at the end of the line.
    fn word(&mut self) -> &'a [u8] {
        let rest = self.0.trim_ascii_start();
        let end = rest.iter().position(u8::is_ascii_whitespace).unwrap_or(rest.len());
        self.0 = &rest[end..];
        &rest[..end]
    }

    /// The name in quotes that comes next.
    fn quoted(&mut self) -> Result<&'a [u8]> {
        let rest = self.0.trim_ascii_start();
        let Some(inner) = rest.strip_prefix(b"\"") else {
            return Err(Error::corrupt(format!(
                "expected a file name in quotes, not `{}`",
                shown(rest)
            )));
        };
        let Some(end) = inner.iter().position(|&b| b == b'"') else {
            return Err(Error::corrupt("expected a closing `\"` behind the file name"));
        };
        self.0 = &inner[end + 1..];
        Ok(&inner[..end])
    }
}

fn parse_words(line: usize, mut words: Words<'_>, encoding: &'static Encoding) -> Result<Option<ExtentLine>> {
    let access = access(words.word())?;
    let sectors = number(words.word(), "a number of sectors")?;
    let kind = kind(words.word())?;
    if kind == ExtentKind::Zero {
        let extent = ExtentLine {
            access,
            sectors,
            kind,
            name: None,
            offset: 0,
            line,
        };
        return Ok((sectors > 0).then_some(extent));
    }
    if sectors == 0 {
        return Err(Error::corrupt(format!(
            "expected more than 0 sectors of a {kind} extent"
        )));
    }
    let name = lines::name(encoding, words.quoted()?)?;
    let offset = match words.word() {
        b"" => 0,
        word => number(word, "the first sector in the file")?,
    };
    if offset != 0 && kind != ExtentKind::Flat {
        return Err(Error::corrupt(format!(
            "expected no offset, or 0, of a {kind} extent, not {offset}"
        )));
    }
    if offset.checked_add(sectors).is_none_or(|end| end > MAX_SECTORS) {
        return Err(Error::corrupt(format!(
            "expected the extent to end before sector {MAX_SECTORS} of its file, not {sectors} sectors from {offset} on"
        )));
    }
    Ok(Some(ExtentLine {
        access,
        sectors,
        kind,
        name: Some(name),
        offset,
        line,
    }))
}

fn access(word: &[u8]) -> Result<ExtentAccess> {
    const WORDS: [(&str, ExtentAccess); 3] = [
        ("RW", ExtentAccess::ReadWrite),
        ("RDONLY", ExtentAccess::ReadOnly),
        ("NOACCESS", ExtentAccess::None),
    ];
    let found = WORDS
        .iter()
        .find(|(text, _)| text.as_bytes().eq_ignore_ascii_case(word));
    found
        .map(|(_, access)| *access)
        .ok_or_else(|| Error::corrupt(format!("expected RW, RDONLY or NOACCESS, not `{}`", shown(word))))
}

fn kind(word: &[u8]) -> Result<ExtentKind> {
    const KINDS: [ExtentKind; 6] = [
        ExtentKind::Flat,
        ExtentKind::Vmfs,
        ExtentKind::Sparse,
        ExtentKind::VmfsSparse,
        ExtentKind::SeSparse,
        ExtentKind::Zero,
    ];
    if let Some(kind) = KINDS
        .into_iter()
        .find(|k| k.as_str().as_bytes().eq_ignore_ascii_case(word))
    {
        return Ok(kind);
    }
    if [&b"VMFSRDM"[..], b"VMFSRAW"]
        .iter()
        .any(|raw| raw.eq_ignore_ascii_case(word))
    {
        return Err(Error::unsupported(format!(
            "a {} extent is an RDM pointer: it maps a device of an ESX host and holds no data",
            shown(word).to_ascii_uppercase()
        )));
    }
    Err(Error::unsupported(format!(
        "expected the extent type FLAT, VMFS, SPARSE, VMFSSPARSE, SESPARSE or ZERO, not `{}`",
        shown(word)
    )))
}

/// Decimal digits and nothing else, at most [`MAX_SECTORS`].
fn number(word: &[u8], what: &str) -> Result<u64> {
    let wrong = || {
        Error::corrupt(format!(
            "expected {what} from 0 to {MAX_SECTORS}, not `{}`",
            shown(word)
        ))
    };
    if word.is_empty() || !word.iter().all(u8::is_ascii_digit) {
        return Err(wrong());
    }
    let number = std::str::from_utf8(word).ok().and_then(|digits| digits.parse().ok());
    number.filter(|n| *n <= MAX_SECTORS).ok_or_else(wrong)
}
