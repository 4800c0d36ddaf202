//! Extent lines: `RW 4192256 SPARSE "disk-s001.vmdk"`.

use std::fmt;

use super::encoding::TextEncoding;
use super::quotes::{self, Quoted};
use super::warnings::{Warnings, shown};
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
    /// Device of an ESX host (virtual or physical RDM). A file that was copied off the host holds the device's data.
    VmfsRdm,
    /// Raw device of an ESX host.
    VmfsRaw,
    /// Zeroes without a file.
    Zero,
}

/// Access keywords of extent lines.
const ACCESSES: [ExtentAccess; 3] = [ExtentAccess::ReadWrite, ExtentAccess::ReadOnly, ExtentAccess::None];

/// Storage formats of extent lines.
const KINDS: [ExtentKind; 8] = [
    ExtentKind::Flat,
    ExtentKind::Vmfs,
    ExtentKind::Sparse,
    ExtentKind::VmfsSparse,
    ExtentKind::SeSparse,
    ExtentKind::VmfsRdm,
    ExtentKind::VmfsRaw,
    ExtentKind::Zero,
];

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
            Self::VmfsRdm => "VMFSRDM",
            Self::VmfsRaw => "VMFSRAW",
            Self::Zero => "ZERO",
        }
    }

    /// Returns true if the extent can lack a range, which its parent then has.
    pub(crate) fn is_sparse(self) -> bool {
        matches!(self, Self::Sparse | Self::VmfsSparse | Self::SeSparse)
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

/// Returns true if the line starts with an access keyword and is not a setting whose key is that keyword.
pub(super) fn is_extent(line: &[u8]) -> bool {
    let (word, rest) = quotes::word(line);
    access(word).is_ok() && quotes::trim_start(rest).first() != Some(&b'=')
}

/// Returns true if a line may be meant as an extent: a number of sectors stands before the word of a storage format.
pub(super) fn resembles_extent(line: &[u8]) -> bool {
    let (mut before, mut rest) = (&line[..0], line);
    // Access, sectors, and a few words of a typing error.
    for _ in 0..6 {
        let (word, after) = quotes::word(rest);
        if KINDS.iter().any(|k| k.as_str().as_bytes().eq_ignore_ascii_case(word))
            && before.iter().any(u8::is_ascii_digit)
        {
            return true;
        }
        (before, rest) = (word, after);
    }
    false
}

/// Parses one line. Returns `None` for an extent of 0 sectors: some programs write `ZERO` ones as a placeholder.
pub(super) fn parse(
    line: usize,
    text: &[u8],
    encoding: TextEncoding<'_>,
    warnings: &mut Warnings,
) -> Result<Option<ExtentLine>> {
    parse_words(line, Words(text), encoding, warnings).map_err(|e| e.within(format!("line {line}")))
}

/// Rest of a line, which is split into words and quoted names.
struct Words<'a>(&'a [u8]);

impl<'a> Words<'a> {
    /// Returns the next word; empty at the end of the line.
    fn word(&mut self) -> &'a [u8] {
        let (word, rest) = quotes::word(self.0);
        self.0 = rest;
        word
    }

    /// Returns the next name without its quotes, and true if it has quotes other than `"`, or none. A name without
    /// quotes is a single word.
    fn name(&mut self) -> Result<(&'a [u8], bool)> {
        let text = quotes::trim_start(self.0);
        match quotes::quoted(text) {
            Quoted::Closed { inner, rest, odd } => {
                self.0 = rest;
                Ok((inner, odd))
            }
            Quoted::Unclosed => Err(Error::corrupt("expected a closing `\"` after the file name")),
            Quoted::Bare if text.is_empty() => Err(Error::corrupt("expected a file name in quotes after the type")),
            Quoted::Bare => Ok((self.word(), true)),
        }
    }
}

fn parse_words(
    line: usize,
    mut words: Words<'_>,
    encoding: TextEncoding<'_>,
    warnings: &mut Warnings,
) -> Result<Option<ExtentLine>> {
    let access = access(words.word())?;
    let sectors = number(words.word(), "a number of sectors")?;
    let kind = kind(words.word())?;
    // Dropped before its name is read, as nothing of the file would show.
    if sectors == 0 {
        if kind != ExtentKind::Zero {
            warnings.add(format!("line {line}: a {kind} extent of 0 sectors is ignored"));
        }
        return Ok(None);
    }
    if kind == ExtentKind::Zero {
        return Ok(Some(ExtentLine {
            access,
            sectors,
            kind,
            name: None,
            offset: 0,
            line,
        }));
    }
    let (name, odd) = words.name()?;
    if odd {
        let name = shown(name);
        warnings.add(format!(
            "line {line}: the name {name} is not in quotes of the form `\"`"
        ));
    }
    let name = encoding.name(name)?;
    let offset = match words.word() {
        b"" => 0,
        // A comment.
        [b'#', ..] => 0,
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
    let found = ACCESSES
        .into_iter()
        .find(|access| access.as_str().as_bytes().eq_ignore_ascii_case(word));
    found.ok_or_else(|| Error::corrupt(format!("expected RW, RDONLY or NOACCESS, not `{}`", shown(word))))
}

fn kind(word: &[u8]) -> Result<ExtentKind> {
    let found = KINDS
        .into_iter()
        .find(|kind| kind.as_str().as_bytes().eq_ignore_ascii_case(word));
    found.ok_or_else(|| {
        Error::unsupported(format!(
            "expected the extent type FLAT, VMFS, SPARSE, VMFSSPARSE, SESPARSE or ZERO, not `{}`",
            shown(word)
        ))
    })
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
