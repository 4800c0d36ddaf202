//! Descriptor: the text that names the extents, the parent and the geometry of a disk.
//!
//! ```text
//!   bytes ──lines──▶ settings · extents · ddb   still raw
//!                        │ encoding
//!                        ▼
//!                    Descriptor                 typed and bounded; names are checked by `ExtentName`
//! ```
//! The order of lines is irrelevant, keys and keywords are case-insensitive, and unknown settings are ignored. A line
//! that cannot be parsed is an error, and so are two different values for one setting: other programs disagree about
//! which of them counts, and the wrong choice would show a wrong disk.

use std::fmt;
use std::ops::Range;

use encoding_rs::Encoding;

use crate::block::MAX_SECTORS;
use crate::error::{Error, ErrorKind, Result};

mod extent;
mod lines;
mod parent;
#[cfg(test)]
mod tests;

pub use extent::{ExtentAccess, ExtentKind, ExtentLine};
use lines::{Lines, Setting, shown};
pub use parent::{ParentHint, ParentLink};

/// CID that means "none".
const NO_CID: u32 = 0xffff_ffff;

/// Number of bytes that [`looks_like`] examines.
const PROBE: usize = 4096;

/// Parsed descriptor. Every value was checked.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Descriptor {
    /// Version of the descriptor format: 1, 2 or 3.
    pub version: u32,
    /// Declared type of the disk; the extents determine how the data is stored.
    pub create_type: CreateType,
    /// Content ID, which changes with the contents: a child records the one of its parent.
    pub cid: Option<u32>,
    /// Parent, if the disk has one.
    pub parent: Option<ParentLink>,
    /// Extents in the order of the disk: at least one, with at most [`MAX_SECTORS`] sectors together.
    pub extents: Vec<ExtentLine>,
    /// Disk data base in the order of the text. Names are as written, without `ddb.`.
    pub ddb: Vec<(String, String)>,
    /// Path of the changed block tracking file.
    pub change_tracking: Option<String>,
}

impl Descriptor {
    /// Parses a descriptor, which is a file of its own or embedded in an extent. The text ends at the first NUL.
    ///
    /// Errors: `Corrupt` or `Unsupported`, naming the line and the expected text; the caller adds the file.
    pub fn parse(bytes: &[u8]) -> Result<Self> {
        let lines = Lines::of(bytes)?;
        let encoding = lines::encoding(&lines)?;
        let ddb = ddb(&lines, encoding);
        // First of all, so that an encrypted disk is reported as such, no matter what else cannot be parsed.
        refuse_unreadable(&lines, &ddb)?;
        let create_type = create_type(&lines)?;
        Ok(Self {
            version: version(&lines)?,
            create_type,
            cid: lines.get("CID", cid)?.map(|(_, cid)| cid),
            parent: parent(&lines, encoding)?,
            extents: extents(&lines, encoding)?,
            ddb,
            change_tracking: lines
                .get("changeTrackPath", |s| Ok(lines::decode(encoding, s.unquoted()?)))?
                .map(|(_, path)| path),
        })
    }

    /// Returns the first value of a name in the disk data base. The name is without `ddb.` and case-insensitive.
    pub fn ddb_value(&self, name: &str) -> Option<&str> {
        self.ddb
            .iter()
            .find(|(key, _)| key.eq_ignore_ascii_case(name))
            .map(|(_, value)| value.as_str())
    }
}

/// Returns the byte ranges of a descriptor's CID digits: those of each `CID=`, and the last ones of `ddb.longContentID`
/// if they are the same. Empty if the descriptor cannot be parsed.
pub(crate) fn cid_digits(bytes: &[u8]) -> Vec<Range<usize>> {
    let Ok(lines) = Lines::of(bytes) else { return Vec::new() };
    // The values borrow from `bytes`, so the distance of the pointers is the offset.
    let within = |part: &[u8]| {
        let start = part.as_ptr() as usize - bytes.as_ptr() as usize;
        start..start + part.len()
    };
    let Some(digits) = lines.first("CID").and_then(|setting| setting.unquoted().ok()) else {
        return Vec::new();
    };
    let mut found: Vec<_> = lines.all("CID").filter_map(|s| s.unquoted().ok()).map(within).collect();
    let long = lines.ddb.iter().find(|s| s.key.eq_ignore_ascii_case(b"longContentID"));
    if let Some(long) = long.and_then(|s| s.unquoted().ok())
        && let Some((_, tail)) = long.split_at_checked(long.len().saturating_sub(digits.len()))
        && tail.eq_ignore_ascii_case(digits)
    {
        found.push(within(tail));
    }
    found
}

/// Returns the byte ranges of a setting's values, without their quotes, one for each line with that key. Keys of the
/// disk data base start with `ddb.`. Empty if the descriptor cannot be parsed.
pub(crate) fn value_spans(bytes: &[u8], key: &str) -> Vec<Range<usize>> {
    let Ok(lines) = Lines::of(bytes) else { return Vec::new() };
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

/// Returns true if a file that starts with `bytes` is a descriptor: its first line contains `Disk DescriptorFile`, or
/// its first setting is `version`. Examines at most 4 KiB, up to the first NUL.
pub fn looks_like(bytes: &[u8]) -> bool {
    let text = lines::text_of(&bytes[..bytes.len().min(PROBE)]);
    let mut meant = text.split(|&b| b == b'\n').map(<[u8]>::trim_ascii).enumerate();
    meant
        .find_map(|(index, line)| match line.first() {
            Some(b'#')
                if index == 0
                    && line
                        .to_ascii_lowercase()
                        .windows(19)
                        .any(|w| w == b"disk descriptorfile") =>
            {
                Some(true)
            }
            None | Some(b'#') => None,
            Some(_) => Some(lines::setting(index, line).is_some_and(|s| s.key.eq_ignore_ascii_case(b"version"))),
        })
        .unwrap_or(false)
}

/// Type of a disk, as `createType` declares it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[allow(missing_docs, reason = "the variants are the keywords of the format")]
pub enum CreateType {
    MonolithicSparse,
    StreamOptimized,
    MonolithicFlat,
    TwoGbMaxExtentSparse,
    TwoGbMaxExtentFlat,
    Vmfs,
    VmfsPreallocated,
    VmfsEagerZeroedThick,
    VmfsThick,
    VmfsThin,
    VmfsSparse,
    SeSparse,
    FullDevice,
    PartitionedDevice,
    Custom,
}

/// Keywords of the types. If a type has several, the usual one is first.
const CREATE_TYPES: [(&str, CreateType); 18] = [
    ("monolithicSparse", CreateType::MonolithicSparse),
    ("streamOptimized", CreateType::StreamOptimized),
    ("monolithicFlat", CreateType::MonolithicFlat),
    ("twoGbMaxExtentSparse", CreateType::TwoGbMaxExtentSparse),
    ("2GbMaxExtentSparse", CreateType::TwoGbMaxExtentSparse),
    ("twoGbMaxExtentFlat", CreateType::TwoGbMaxExtentFlat),
    ("2GbMaxExtentFlat", CreateType::TwoGbMaxExtentFlat),
    ("vmfs", CreateType::Vmfs),
    ("vmfsPreallocated", CreateType::VmfsPreallocated),
    ("vmfsEagerZeroedThick", CreateType::VmfsEagerZeroedThick),
    ("vmfsThick", CreateType::VmfsThick),
    ("vmfsThin", CreateType::VmfsThin),
    ("vmfsSparse", CreateType::VmfsSparse),
    ("seSparse", CreateType::SeSparse),
    ("vmfsSeSparse", CreateType::SeSparse),
    ("fullDevice", CreateType::FullDevice),
    ("partitionedDevice", CreateType::PartitionedDevice),
    ("custom", CreateType::Custom),
];

/// Types that only point to a device of an ESX host.
const DEVICE_MAPS: [&str; 5] = [
    "vmfsRDM",
    "vmfsRawDeviceMap",
    "vmfsRDMP",
    "vmfsPassthroughRawDeviceMap",
    "vmfsRaw",
];

impl CreateType {
    /// Returns the usual keyword of the type.
    pub fn as_str(self) -> &'static str {
        CREATE_TYPES
            .iter()
            .find(|(_, kind)| *kind == self)
            .map_or("custom", |(name, _)| name)
    }
}

impl fmt::Display for CreateType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

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
    let native = lines.get("isNativeSnapshot", |s| Ok(s.unquoted()?.eq_ignore_ascii_case(b"yes")))?;
    match native {
        Some((line, true)) => Err(Error::unsupported(format!(
            "line {line}: the disk is a native snapshot (isNativeSnapshot): a storage array holds its data, not a file"
        ))),
        _ => Ok(()),
    }
}

fn version(lines: &Lines<'_>) -> Result<u32> {
    let found = lines.get("version", |setting| match setting.unquoted()? {
        b"1" => Ok(1),
        b"2" => Ok(2),
        b"3" => Ok(3),
        other => Err(Error::unsupported(format!(
            "line {}: expected version 1, 2 or 3 of the descriptor, not `{}`",
            setting.line,
            shown(other)
        ))),
    })?;
    found.map(|(_, version)| version).ok_or_else(|| missing("version"))
}

fn create_type(lines: &Lines<'_>) -> Result<CreateType> {
    let found = lines.get("createType", |setting| {
        let value = setting.unquoted()?;
        let is = |name: &str| name.as_bytes().eq_ignore_ascii_case(value);
        let refuse = |why| {
            let line = setting.line;
            Error::new(
                ErrorKind::Unsupported,
                format!("line {line}: createType `{}` {why}", shown(value)),
            )
        };
        if DEVICE_MAPS.into_iter().any(is) {
            return Err(refuse(
                "is an RDM pointer: it maps a device of an ESX host and holds no data",
            ));
        }
        let known = CREATE_TYPES.iter().find(|(name, _)| is(name));
        known
            .map(|(_, kind)| *kind)
            .ok_or_else(|| refuse("is unknown, expected one such as monolithicSparse"))
    })?;
    found.map(|(_, kind)| kind).ok_or_else(|| missing("createType"))
}

/// Parses a CID: one to eight hexadecimal digits.
fn cid(setting: &Setting<'_>) -> Result<u32> {
    let digits = setting.unquoted()?;
    let wrong = || setting.error(&format!("expected 1 to 8 hexadecimal digits, not `{}`", shown(digits)));
    if !(1..=8).contains(&digits.len()) || !digits.iter().all(u8::is_ascii_hexdigit) {
        return Err(wrong());
    }
    let number = std::str::from_utf8(digits)
        .ok()
        .and_then(|digits| u32::from_str_radix(digits, 16).ok());
    number.ok_or_else(wrong)
}

/// Returns the parent of a child. A hint beside `parentCID=ffffffff` is ignored, as in other programs.
fn parent(lines: &Lines<'_>, encoding: &'static Encoding) -> Result<Option<ParentLink>> {
    let hint_line = || lines.first("parentFileNameHint").map(|setting| setting.line);
    let (line, cid) = match (lines.get("parentCID", cid)?, hint_line()) {
        (Some((_, NO_CID)), _) | (None, None) => return Ok(None),
        (Some(found), _) => found,
        (None, Some(line)) => {
            return Err(Error::corrupt(format!(
                "line {line}: a parentFileNameHint without a parentCID, expected both"
            )));
        }
    };
    let hint = lines.get("parentFileNameHint", |setting| {
        let name = lines::name(encoding, setting.unquoted()?);
        name.map_err(|e| e.within(format!("line {}, parentFileNameHint", setting.line)))
    })?;
    match hint {
        Some((_, name)) => Ok(Some(ParentLink {
            cid,
            hint: ParentHint::new(name, encoding),
        })),
        None => Err(Error::corrupt(format!(
            "line {line}: parentCID={cid:08x} names a parent, but there is no parentFileNameHint, expected both"
        ))),
    }
}

fn extents(lines: &Lines<'_>, encoding: &'static Encoding) -> Result<Vec<ExtentLine>> {
    let mut extents = Vec::new();
    let mut sum: u64 = 0;
    for &(line, text) in &lines.extents {
        let Some(extent) = extent::parse(line, text, encoding)? else {
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

fn ddb(lines: &Lines<'_>, encoding: &'static Encoding) -> Vec<(String, String)> {
    let text = |bytes| lines::decode(encoding, bytes);
    lines
        .ddb
        .iter()
        .map(|setting| (text(setting.key), text(setting.leniently_unquoted())))
        .collect()
}

fn missing(key: &str) -> Error {
    Error::corrupt(format!("no {key}, expected a line `{key}=…`"))
}
