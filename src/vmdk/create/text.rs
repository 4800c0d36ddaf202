//! Text of a new descriptor, with the lines in the order in which VMware writes them.

use std::collections::hash_map::RandomState;
use std::fmt::Write as _;
use std::hash::{BuildHasher, Hasher};

use super::{DeltaParent, NewDelta, NewDisk, usage};
use crate::config::{AdapterType, CreateType};
use crate::error::Result;
use crate::store::ExtentName;
use crate::vmdk::descriptor::{ExtentAccess, ExtentKind};

/// CID that means "none".
pub(super) const NO_CID: u32 = 0xffff_ffff;
/// CID that VMware gives to a disk that was never opened.
const FRESH_CID: u32 = 0xffff_fffe;

/// Minimum length of an extent line of a split disk, in bytes.
pub(super) const SHORTEST_EXTENT: usize = "RW 1 FLAT \"-f001.vmdk\" 0\n".len();

/// 1 GiB in sectors.
const GIB: u64 = 1 << 21;

/// Extent line of a new descriptor.
#[derive(Debug, Clone)]
pub(super) struct NewExtent {
    /// Permitted access.
    pub(super) access: ExtentAccess,
    /// Size in sectors.
    pub(super) sectors: u64,
    /// Storage format of the extent.
    pub(super) kind: ExtentKind,
    /// Name of the file that holds the extent.
    pub(super) name: String,
}

/// Values of a descriptor, from which [`to_text`](Self::to_text) makes the text.
#[derive(Debug)]
pub(super) struct NewText {
    create_type: String,
    cid: u32,
    parent: Option<DeltaParent>,
    extents: Vec<NewExtent>,
    /// Names without `ddb.`, in the order of the text.
    ddb: Vec<(String, String)>,
}

impl NewText {
    /// Builds the descriptor of a disk without a parent.
    pub(super) fn disk(create_type: &str, disk: &NewDisk, extents: Vec<NewExtent>) -> Self {
        let cid = random_cid();
        let (cylinders, heads, per_track) = geometry(disk.sectors, disk.adapter);
        let mut ddb = vec![
            ("adapterType", adapter(disk.adapter).to_owned()),
            ("geometry.cylinders", cylinders.to_string()),
            ("geometry.heads", heads.to_string()),
            ("geometry.sectors", per_track.to_string()),
            ("longContentID", long_content_id(cid)),
        ];
        if disk.kind == CreateType::VmfsThin {
            ddb.push(("thinProvisioned", "1".to_owned()));
        }
        // The largest number, as `qemu-img` writes it: no version of VMware's tools is known.
        ddb.push(("toolsVersion", "2147483647".to_owned()));
        ddb.push(("uuid", uuid()));
        ddb.push(("virtualHWVersion", disk.hardware_version.to_string()));
        let ddb = ddb.into_iter().map(|(name, value)| (name.to_owned(), value)).collect();
        Self {
            create_type: create_type.to_owned(),
            cid,
            parent: None,
            extents,
            ddb,
        }
    }

    /// Builds the descriptor of a stream. It fits one sector, which is all that some programs read of it.
    pub(super) fn stream(disk: &NewDisk, extent: NewExtent) -> Self {
        let mut text = Self::disk("streamOptimized", disk, vec![extent]);
        // Neither says anything about a disk that no virtual machine has used.
        text.ddb.retain(|(name, _)| name != "toolsVersion" && name != "uuid");
        text
    }

    /// Builds the descriptor of a delta in the file `name`. It has no geometry and no adapter: those are the parent's.
    ///
    /// Errors: `Usage` for a value with a quote or a control character, which would break its line.
    pub(super) fn delta(delta: &NewDelta, name: String) -> Result<Self> {
        let cid = random_cid();
        let hint = delta.parent.iter().map(|parent| parent.hint.as_str());
        let values = delta
            .ddb
            .iter()
            .flat_map(|(name, value)| [name.as_str(), value.as_str()]);
        for value in hint.chain(values) {
            check_value(value)?;
        }
        if delta.parent.as_ref().is_some_and(|parent| parent.cid == NO_CID) {
            return Err(usage(format!(
                "a delta cannot name a parent with the CID {NO_CID:08x}, which means \"no parent\""
            )));
        }
        let extent = NewExtent {
            access: ExtentAccess::ReadWrite,
            sectors: delta.sectors,
            kind: ExtentKind::Sparse,
            name,
        };
        let mut ddb = vec![("longContentID".to_owned(), long_content_id(cid))];
        ddb.extend(delta.ddb.iter().cloned());
        let parent = delta.parent.clone();
        Ok(Self {
            create_type: "monolithicSparse".to_owned(),
            cid,
            parent,
            extents: vec![extent],
            ddb,
        })
    }

    /// Returns the text of the descriptor.
    pub(super) fn to_text(&self) -> String {
        let mut out = String::from("# Disk DescriptorFile\nversion=1\nencoding=\"UTF-8\"\n");
        let parent_cid = self.parent.as_ref().map_or(NO_CID, |parent| parent.cid);
        _ = writeln!(out, "CID={:08x}\nparentCID={parent_cid:08x}", self.cid);
        _ = writeln!(out, "isNativeSnapshot=\"no\"\ncreateType=\"{}\"", self.create_type);
        if let Some(parent) = &self.parent {
            _ = writeln!(out, "parentFileNameHint=\"{}\"", parent.hint);
        }
        out.push_str("\n# Extent description\n");
        for NewExtent {
            access,
            sectors,
            kind,
            name,
        } in &self.extents
        {
            _ = write!(out, "{} {sectors} {kind} \"{name}\"", access.as_str());
            // qemu requires the offset on a flat extent and accepts it on no other type.
            out.push_str(if *kind == ExtentKind::Flat { " 0\n" } else { "\n" });
        }
        out.push_str("\n# The Disk Data Base \n#DDB\n\n");
        for (name, value) in &self.ddb {
            _ = writeln!(out, "ddb.{name} = \"{value}\"");
        }
        out
    }
}

/// Returns the nominal cylinders, heads and sectors per track of a disk.
///
/// SCSI: heads and sectors depend on the size, as with VMware's adapters; the cylinders are rounded down and have no
/// upper bound, as ESXi writes them. IDE: 16 heads and 63 sectors, and at most 16383 cylinders, the limit of its
/// registers.
pub(super) fn geometry(sectors: u64, adapter: AdapterType) -> (u64, u64, u64) {
    let (heads, per_track, most) = match adapter {
        AdapterType::Ide => (16, 63, 16383),
        _ if sectors < GIB => (64, 32, u64::MAX),
        _ if sectors < 2 * GIB => (128, 32, u64::MAX),
        _ => (255, 63, u64::MAX),
    };
    // Even a disk of a few sectors has one cylinder.
    ((sectors / (heads * per_track)).clamp(1, most), heads, per_track)
}

/// Returns a file name as text for an extent line in that same file. Readers do not need the name to find the file, so
/// characters that a descriptor cannot hold are replaced.
pub(super) fn label(name: &ExtentName) -> String {
    let text = String::from_utf8_lossy(name.as_bytes()).into_owned();
    text.chars()
        .map(|c| if c.is_control() || c == '"' { '_' } else { c })
        .collect()
}

/// Returns the name of a file beside `name`, with `suffix` instead of its `.vmdk`.
///
/// Errors: `Usage` if a descriptor cannot hold the name.
pub(super) fn sibling(name: &ExtentName, suffix: &str) -> Result<ExtentName> {
    const EXTENSION: &str = ".vmdk";
    let text = std::str::from_utf8(name.as_bytes())
        .ok()
        .filter(|text| check_value(text).is_ok())
        .ok_or_else(|| {
            usage(format!(
                "{name}: a descriptor can only name files in UTF-8, without `\"` or control characters: choose another file name"
            ))
        })?;
    let (stem, extension) = text
        .split_at_checked(text.len().saturating_sub(EXTENSION.len()))
        .unwrap_or((text, ""));
    let stem = if extension.eq_ignore_ascii_case(EXTENSION) && !stem.is_empty() {
        stem
    } else {
        text
    };
    ExtentName::new(format!("{stem}{suffix}"))
}

/// Checks that a text can stand between quotes. The format has no escapes.
fn check_value(text: &str) -> Result<()> {
    if text.chars().any(|c| c.is_control() || c == '"') {
        return Err(usage(format!(
            "a descriptor cannot hold {text:?}: it has a `\"` or a control character"
        )));
    }
    Ok(())
}

fn adapter(adapter: AdapterType) -> &'static str {
    match adapter {
        AdapterType::Ide => "ide",
        AdapterType::BusLogic => "buslogic",
        AdapterType::LsiLogic => "lsilogic",
        AdapterType::LegacyEsx => "legacyESX",
        AdapterType::PvScsi => "pvscsi",
    }
}

/// Returns a random CID, which is none of the two reserved values.
pub(super) fn random_cid() -> u32 {
    loop {
        let cid = random() as u32;
        if cid < FRESH_CID {
            return cid;
        }
    }
}

/// Returns a random long content ID: 32 hexadecimal digits, of which the last 8 are the CID, as other writers do.
fn long_content_id(cid: u32) -> String {
    format!("{:016x}{:08x}{cid:08x}", random(), random() as u32)
}

/// Returns a random UUID in VMware's form: sixteen bytes, of which the first 28 bits are VMware's own prefix.
fn uuid() -> String {
    let [a, b, c, d, e, f, g, h] = random().to_le_bytes();
    let [i, j, k, l, m, ..] = random().to_le_bytes();
    // 60 00 C2 9x is VMware's prefix of worldwide names.
    let a = 0x90 | a & 0x0f;
    format!(
        "60 00 C2 {a:02x} {b:02x} {c:02x} {d:02x} {e:02x}-{f:02x} {g:02x} {h:02x} {i:02x} {j:02x} {k:02x} {l:02x} {m:02x}"
    )
}

/// Returns 64 bits that differ from call to call and from run to run: the first keys of a hasher in each thread come
/// from the system's random numbers.
fn random() -> u64 {
    RandomState::new().build_hasher().finish()
}
