//! Descriptor: the text that names the extents, the parent and the geometry of a disk.
//!
//! ```text
//!   bytes ──lines──▶ settings · extents · ddb   still raw
//!                        │ encoding
//!                        ▼
//!                    Descriptor                 typed and bounded; names are checked by `ExtentName`
//! ```
//! The order of lines is irrelevant, keys and keywords are case-insensitive, and unknown settings are ignored.
//!
//! An error is only what decides bytes: an extent line, the parent, encryption. Two different values of one of these
//! are an error too: other programs disagree about which of them counts, and the wrong choice would show a wrong disk.
//! Everything else (version, type, content ID, encoding of ASCII names, stray lines) is a label. An unknown label stays
//! as it is, with a warning, also in the file: only the digits of a content ID are ever changed there.

use std::ops::Range;

use crate::block::MAX_SECTORS;
use crate::error::{Error, Result};

mod candidates;
mod cid;
mod encoding;
mod extent;
mod lines;
mod parent;
mod quotes;
mod setting;
#[cfg(test)]
mod tests;
mod warnings;

pub(crate) use candidates::{candidates, in_folders};
use encoding::TextEncoding;
pub use extent::{ExtentAccess, ExtentKind, ExtentLine};
use lines::Lines;
pub use parent::{ParentHint, ParentLink};
use setting::Setting;
use warnings::{Warnings, shown};

/// CID that means "none".
const NO_CID: u32 = 0xffff_ffff;

/// Number of bytes that [`looks_like`] examines.
const PROBE: usize = 4096;

/// Parsed descriptor. Every value was checked.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Descriptor {
    /// Version of the descriptor format, 1 if the text has none. `None` for a text that is no number.
    pub version: Option<u32>,
    /// Declared type of the disk, in the usual spelling if it is known; empty if the text has none. A label: the extents
    /// determine how the data is stored.
    pub create_type: String,
    /// Content ID, which changes with the contents: a child records the one of its parent. `None` for a text that is no
    /// number.
    pub cid: Option<u32>,
    /// Parent, if the disk has one.
    pub parent: Option<ParentLink>,
    /// Extents in the order of the disk: at least one, with at most [`MAX_SECTORS`] sectors together.
    pub extents: Vec<ExtentLine>,
    /// Disk data base in the order of the text. Names are as written, without `ddb.`.
    pub ddb: Vec<(String, String)>,
    /// Path of the changed block tracking file.
    pub change_tracking: Option<String>,
    /// Defects that decide no byte and that other programs may refuse: complete sentences, at most a few.
    pub warnings: Vec<String>,
}

impl Descriptor {
    /// Parses a descriptor, which is a file of its own or embedded in an extent. The text ends at the first NUL.
    ///
    /// Errors: `Corrupt` or `Unsupported`, naming the line and the expected text; the caller adds the file.
    pub fn parse(bytes: &[u8]) -> Result<Self> {
        let mut warnings = Warnings::default();
        let text = encoding::to_utf8(bytes);
        if encoding::is_utf16(bytes) {
            warnings.add("the text is UTF-16; other programs expect UTF-8".to_owned());
        }
        let lines = Lines::of(&text, &mut warnings)?;
        let encoding = TextEncoding::of(lines.all("encoding"), &mut warnings);
        let ddb = ddb(&lines, encoding);
        // First of all, so that an encrypted disk is reported as such, no matter what else cannot be parsed.
        refuse_unreadable(&lines, &ddb)?;
        let extents = extents(&lines, encoding, &mut warnings)?;
        Ok(Self {
            version: version(&lines, &mut warnings),
            create_type: create_type(&lines, encoding, &mut warnings),
            cid: content_id(&lines, &mut warnings),
            parent: parent(&lines, encoding, &extents, &mut warnings)?,
            extents,
            ddb,
            change_tracking: lines
                .first("changeTrackPath")
                .map(|setting| encoding.decode(setting.leniently_unquoted())),
            warnings: warnings.finish(),
        })
    }

    /// Returns the first value of a name in the disk data base. The name is without `ddb.` and case-insensitive.
    pub(crate) fn ddb_value(&self, name: &str) -> Option<&str> {
        self.ddb
            .iter()
            .find(|(key, _)| key.eq_ignore_ascii_case(name))
            .map(|(_, value)| value.as_str())
    }
}

/// Returns the byte ranges of a descriptor's CID digits: those of each `CID=` that is a number, and the last ones of
/// `ddb.longContentID` if they are the same. Empty if the descriptor cannot be parsed, or not be changed in place.
pub(crate) fn cid_digits(bytes: &[u8]) -> Vec<Range<usize>> {
    let Some(lines) = lines_in_place(bytes) else {
        return Vec::new();
    };
    // The values borrow from `bytes`, so the distance of the pointers is the offset.
    let within = |part: &[u8]| {
        let start = part.as_ptr() as usize - bytes.as_ptr() as usize;
        start..start + part.len()
    };
    let cids = || lines.all("CID").filter_map(|setting| setting.cid());
    let Some(digits) = cids().next().map(|cid| cid.digits) else {
        return Vec::new();
    };
    let mut found: Vec<_> = cids().map(|cid| within(cid.digits)).collect();
    let long = lines.ddb.iter().find(|s| s.key.eq_ignore_ascii_case(b"longContentID"));
    if let Some(long) = long.and_then(|s| s.unquoted().ok())
        && let Some((_, tail)) = long.split_at_checked(long.len().saturating_sub(digits.len()))
        && tail.eq_ignore_ascii_case(digits)
    {
        found.push(within(tail));
    }
    found
}

/// Returns the number that digits from [`cid_digits`] stand for.
pub(crate) fn cid_number(digits: &[u8]) -> Option<u32> {
    cid::parse(digits).map(|cid| cid.number)
}

/// Returns the byte ranges of a setting's values, without their quotes, one for each line with that key. Keys of the
/// disk data base start with `ddb.`. Empty if the descriptor cannot be parsed.
pub(crate) fn value_spans(bytes: &[u8], key: &str) -> Vec<Range<usize>> {
    let Some(lines) = lines_in_place(bytes) else {
        return Vec::new();
    };
    let found: Vec<&[u8]> = match key.strip_prefix("ddb.") {
        Some(name) => {
            let named = lines.ddb.iter().filter(|s| s.key.eq_ignore_ascii_case(name.as_bytes()));
            named.filter_map(|s| s.unquoted().ok()).collect()
        }
        None => lines.all(key).filter_map(|s| s.unquoted().ok()).collect(),
    };
    let start = |part: &[u8]| part.as_ptr() as usize - bytes.as_ptr() as usize;
    found
        .into_iter()
        .map(|part| start(part)..start(part) + part.len())
        .collect()
}

/// Returns the lines as parts of `bytes`, or `None` if they are not: the text is UTF-16 or cannot be parsed.
fn lines_in_place(bytes: &[u8]) -> Option<Lines<'_>> {
    let in_place = !encoding::is_utf16(bytes);
    in_place.then(|| Lines::of(bytes, &mut Warnings::default()).ok())?
}

/// Returns true if a file that starts with `bytes` is a descriptor: after at most a few other lines of text there is a
/// comment with `Disk DescriptorFile`, a setting that only descriptors have, or an extent. `version` alone counts if it
/// is the first setting. Examines at most 4 KiB, up to the first NUL.
pub fn looks_like(bytes: &[u8]) -> bool {
    /// Lines without a meaning that may come first, such as `[disk]`.
    const STRAY_MAX: usize = 4;
    const MARK: &[u8] = b"disk descriptorfile";
    const KEYS: [&str; 3] = ["CID", "parentCID", "createType"];
    let head = encoding::to_utf8(&bytes[..bytes.len().min(PROBE)]);
    let (mut settings, mut stray) = (0, 0);
    for (index, line) in lines::split(lines::text_of(&head)).enumerate() {
        let is = |setting: &Setting<'_>, key: &str| setting.key.eq_ignore_ascii_case(key.as_bytes());
        match line.first() {
            Some(b'#') if line.to_ascii_lowercase().windows(MARK.len()).any(|w| w == MARK) => return true,
            None | Some(b'#') => {}
            // Binary data: a disk image may hold such words in its first sectors.
            Some(_) if line.iter().any(|&b| b < b' ' && b != b'\t') => return false,
            Some(_) if extent::is_extent(line) && extent::resembles_extent(line) => return true,
            Some(_) => match Setting::parse(index, line) {
                Some(setting) if settings == 0 && is(&setting, "version") => return true,
                Some(setting) if KEYS.iter().any(|key| is(&setting, key)) => return true,
                Some(_) => settings += 1,
                None => stray += 1,
            },
        }
        // Settings of another program: its file is not searched to the end for a line that looks like an extent.
        if settings + stray > STRAY_MAX {
            return false;
        }
    }
    false
}

/// Types of disks in their usual spelling, with other spellings.
const CREATE_TYPES: [(&str, &[&str]); 18] = [
    ("monolithicSparse", &[]),
    ("streamOptimized", &[]),
    ("monolithicFlat", &[]),
    ("twoGbMaxExtentSparse", &["2GbMaxExtentSparse"]),
    ("twoGbMaxExtentFlat", &["2GbMaxExtentFlat"]),
    ("vmfs", &[]),
    ("vmfsPreallocated", &[]),
    ("vmfsEagerZeroedThick", &[]),
    ("vmfsThick", &[]),
    ("vmfsThin", &[]),
    ("vmfsSparse", &[]),
    ("seSparse", &["vmfsSeSparse"]),
    ("vmfsRawDeviceMap", &["vmfsRDM"]),
    ("vmfsPassthroughRawDeviceMap", &["vmfsRDMP"]),
    ("vmfsRaw", &[]),
    ("fullDevice", &[]),
    ("partitionedDevice", &[]),
    ("custom", &[]),
];

/// Refuses disks whose data is encrypted or not in files.
fn refuse_unreadable(lines: &Lines<'_>, ddb: &[(String, String)]) -> Result<()> {
    if let Some(setting) = ["encryptionKeys", "keyID"].iter().find_map(|key| lines.first(key)) {
        return Err(Error::unsupported(format!(
            "line {}: the disk is encrypted ({}): its data cannot be read without the key; decrypt it in VMware first",
            setting.line,
            shown(setting.key)
        )));
    }
    let encrypts = |(key, value): &(String, String)| {
        key.eq_ignore_ascii_case("iofilters") && value.to_ascii_lowercase().contains("vmwarevmcrypt")
    };
    if ddb.iter().any(encrypts) {
        return Err(Error::unsupported(
            "the disk is encrypted (ddb.iofilters names vmwarevmcrypt): its data cannot be read without the key; decrypt it in VMware first",
        ));
    }
    let native = lines
        .all("isNativeSnapshot")
        .find(|s| s.leniently_unquoted().trim_ascii().eq_ignore_ascii_case(b"yes"));
    match native.map(|setting| setting.line) {
        Some(line) => Err(Error::unsupported(format!(
            "line {line}: the disk is a native snapshot (isNativeSnapshot): a storage array holds its data, not a file"
        ))),
        None => Ok(()),
    }
}

/// Returns the version of the format: the digits that the value starts with, as VMware reads it.
fn version(lines: &Lines<'_>, warnings: &mut Warnings) -> Option<u32> {
    if lines.first("version").is_none() {
        warnings.add("no version; read as version 1".to_owned());
        return Some(1);
    }
    let version = lines.label("version", warnings, |setting| {
        let value = setting.leniently_unquoted();
        let end = value.iter().position(|b| !b.is_ascii_digit()).unwrap_or(value.len());
        std::str::from_utf8(&value[..end]).ok()?.parse::<u32>().ok()
    });
    if let Some(version) = version.filter(|version| !(1..=3).contains(version)) {
        warnings.add(format!(
            "version {version} of the descriptor is unknown, expected 1 to 3"
        ));
    }
    version
}

/// Returns the declared type of the disk, which is only a label.
fn create_type(lines: &Lines<'_>, encoding: TextEncoding<'_>, warnings: &mut Warnings) -> String {
    let Some(setting) = lines.first("createType") else {
        warnings.add("no createType; the extents alone tell how the disk is stored".to_owned());
        return String::new();
    };
    let found = lines.label("createType", warnings, |setting| {
        let value = setting.leniently_unquoted();
        let is = |name: &str| name.as_bytes().eq_ignore_ascii_case(value);
        let known = CREATE_TYPES
            .iter()
            .find(|(name, others)| is(name) || others.iter().any(|name| is(name)));
        known.map(|(name, _)| (*name).to_owned())
    });
    found.unwrap_or_else(|| shown(encoding.decode(setting.leniently_unquoted()).as_bytes()))
}

/// Returns the content ID of the disk: the first one that is a number.
fn content_id(lines: &Lines<'_>, warnings: &mut Warnings) -> Option<u32> {
    for setting in lines.all("CID").filter(|s| s.cid().is_some_and(|cid| !cid.plain)) {
        let (line, value) = (setting.line, shown(setting.leniently_unquoted()));
        warnings.add(format!(
            "line {line}: expected a CID of 1 to 8 hexadecimal digits, not `{value}`"
        ));
    }
    lines.label("CID", warnings, |setting| setting.cid().map(|cid| cid.number))
}

/// Returns the parent of a child. A hint beside `parentCID=ffffffff` is ignored, as in other programs.
///
/// Errors: `Corrupt` if the disk may be a child and the text does not name its parent. A disk whose extents hide any
/// parent needs none.
fn parent(
    lines: &Lines<'_>,
    encoding: TextEncoding<'_>,
    extents: &[ExtentLine],
    warnings: &mut Warnings,
) -> Result<Option<ParentLink>> {
    let hint = lines.get("parentFileNameHint", |setting| {
        let text = setting.unquoted()?;
        let name = (!text.is_empty()).then(|| encoding.name(text)).transpose();
        name.map_err(|e| e.within(format!("line {}, parentFileNameHint", setting.line)))
    })?;
    let hint = hint.and_then(|(line, name)| Some((line, name?)));
    let cid = lines.get("parentCID", |setting| {
        let text = setting.unquoted()?;
        // Two spellings of one number are the same parent.
        Ok(setting.cid().map_or((None, text), |cid| (Some(cid.number), &text[..0])))
    })?;
    match (cid, hint) {
        // `ffffffff` is "no parent" even where a hint is left over from a snapshot that was merged.
        (Some((_, (Some(NO_CID), _))), _) | (None, None) => Ok(None),
        (Some((_, (cid, _))), Some((_, name))) => Ok(Some(ParentLink {
            cid,
            hint: ParentHint::new(name, encoding.encoding()),
        })),
        (Some((line, (cid, text))), None) => {
            let says_none = cid.is_none() && (text.is_empty() || text.eq_ignore_ascii_case(b"none"));
            let text = cid.map_or_else(|| shown(text), |cid| format!("{cid:08x}"));
            if says_none || extents.iter().all(|extent| !extent.kind.is_sparse()) {
                warnings.add(format!("line {line}: parentCID={text} names no parent and is ignored"));
                return Ok(None);
            }
            Err(Error::corrupt(format!(
                "line {line}: parentCID={text} names a parent, but there is no parentFileNameHint, expected both"
            )))
        }
        (None, Some((line, _))) => Err(Error::corrupt(format!(
            "line {line}: a parentFileNameHint without a parentCID, expected both"
        ))),
    }
}

fn extents(lines: &Lines<'_>, encoding: TextEncoding<'_>, warnings: &mut Warnings) -> Result<Vec<ExtentLine>> {
    let mut extents = Vec::new();
    let mut sum: u64 = 0;
    for &(line, text) in &lines.extents {
        let Some(extent) = extent::parse(line, text, encoding, warnings)? else {
            continue;
        };
        sum = sum
            .checked_add(extent.sectors)
            .filter(|sum| *sum <= MAX_SECTORS)
            .ok_or_else(|| {
                Error::corrupt(format!(
                    "line {line}: expected extents of at most {MAX_SECTORS} sectors together"
                ))
            })?;
        extents.push(extent);
    }
    if extents.is_empty() {
        return Err(Error::corrupt(
            "no extent, expected a line like `RW 8192 FLAT \"disk-flat.vmdk\" 0`",
        ));
    }
    Ok(extents)
}

fn ddb(lines: &Lines<'_>, encoding: TextEncoding<'_>) -> Vec<(String, String)> {
    lines
        .ddb
        .iter()
        .map(|setting| {
            (
                encoding.decode(setting.key),
                encoding.decode(setting.leniently_unquoted()),
            )
        })
        .collect()
}
