//! Extent lines: `RW 4192256 SPARSE "disk-s001.vmdk"`.

use std::fmt;

use encoding_rs::Encoding;

use super::lines::{self, shown};
use crate::block::MAX_SECTORS;
use crate::error::{Error, Result};
use crate::store::ExtentName;

/// Permitted access to an extent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ExtentAccess {
    /// The extent can be read and written.
    ReadWrite,
    /// The extent can only be read.
    ReadOnly,
    /// The extent has no readable data: it reads as zeroes.
    None,
}

/// Storage format of an extent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ExtentKind {
    /// Raw data, from a given sector of a file or device on.
    Flat,
    /// Raw data that fills a file of its own.
    Vmfs,
    /// Hosted sparse or streamOptimized (KDMV).
    Sparse,
    /// ESX sparse (COWD).
    VmfsSparse,
    /// Space-efficient sparse (seSparse).
    SeSparse,
    /// Zeroes without a file.
    Zero,
}

impl ExtentAccess {
    /// Returns the keyword of the access.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::ReadWrite => "RW",
            Self::ReadOnly => "RDONLY",
            Self::None => "NOACCESS",
        }
    }
}

impl ExtentKind {
    /// Returns the keyword of the format.
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

/// Parsed extent line. The extents of a disk are contiguous, in the order of their lines.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ExtentLine {
    /// Permitted access.
    pub access: ExtentAccess,
    /// Size on the disk in sectors, 1…[`MAX_SECTORS`].
    pub sectors: u64,
    /// Storage format.
    pub kind: ExtentKind,
    /// File that holds the extent; `None` only for `ZERO`.
    pub name: Option<ExtentName>,
    /// Sector of the file at which a `FLAT` extent starts; 0 for all others. `offset + sectors` ≤ [`MAX_SECTORS`].
    pub offset: u64,
    /// Number of the line in the descriptor, from 1.
    pub line: usize,
}

/// Parses one line. Returns `None` for a `ZERO` extent of 0 sectors, which some programs write as a placeholder.
pub(super) fn parse(line: usize, text: &[u8], encoding: &'static Encoding) -> Result<Option<ExtentLine>> {
    parse_words(line, Words(text), encoding).map_err(|e| e.within(format!("line {line}")))
}

/// Rest of a line, which is split into words and quoted names.
struct Words<'a>(&'a [u8]);

impl<'a> Words<'a> {
    /// Returns the next word; empty at the end of the line.
    fn word(&mut self) -> &'a [u8] {
        let rest = self.0.trim_ascii_start();
        let end = rest.iter().position(u8::is_ascii_whitespace).unwrap_or(rest.len());
        self.0 = &rest[end..];
        &rest[..end]
    }

    /// Returns the next name, which must be in quotes, without the quotes.
    fn quoted(&mut self) -> Result<&'a [u8]> {
        let rest = self.0.trim_ascii_start();
        let Some(inner) = rest.strip_prefix(b"\"") else {
            return Err(Error::corrupt(format!(
                "expected a file name in quotes, not `{}`",
                shown(rest)
            )));
        };
        let Some(end) = inner.iter().position(|&b| b == b'"') else {
            return Err(Error::corrupt("expected a closing `\"` after the file name"));
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
            "expected more than 0 sectors for a {kind} extent"
        )));
    }
    let name = lines::name(encoding, words.quoted()?)?;
    let offset = match words.word() {
        b"" => 0,
        word => number(word, "the first sector in the file")?,
    };
    if offset != 0 && kind != ExtentKind::Flat {
        return Err(Error::corrupt(format!(
            "expected no offset, or 0, for a {kind} extent, not {offset}"
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

/// Parses a number of at most [`MAX_SECTORS`]: decimal digits without a sign, which `parse` alone would accept.
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
