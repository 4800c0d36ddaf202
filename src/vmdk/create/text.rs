//! The text of a new descriptor, line by line as VMware writes it.

use std::collections::hash_map::RandomState;
use std::fmt::Write as _;
use std::hash::{BuildHasher, Hasher};

use super::{DeltaParent, NewDelta, NewDisk, usage};
use crate::config::{AdapterType, CreateType};
use crate::error::Result;
use crate::store::ExtentName;
use crate::vmdk::descriptor::{ExtentAccess, ExtentKind};

/// The CID that stands for "none".
pub(super) const NO_CID: u32 = 0xffff_ffff;
/// The CID of a disk that was never opened, in VMware's own.
const FRESH_CID: u32 = 0xffff_fffe;

/// No extent line of a split disk is shorter, bytes.
pub(super) const SHORTEST_EXTENT: usize = "RW 1 FLAT \"-f001.vmdk\" 0\n".len();

/// Sectors of a gibibyte.
const GIB: u64 = 1 << 21;

/// An extent line.
#[derive(Debug, Clone)]
pub(super) struct NewExtent {
    /// What may be done with it.
    pub(super) access: ExtentAccess,
    /// Its size.
    pub(super) sectors: u64,
    /// How it is stored.
    pub(super) kind: ExtentKind,
    /// Its file.
    pub(super) name: String,
}

/// A descriptor, before it is text.
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
    /// The descriptor of a disk without a parent.
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

    /// The descriptor of a delta in the file called `name`. Geometry and adapter are the parent's.
    ///
    /// Errors: `Usage` for text that would break a line or a value.
    pub(super) fn delta(delta: &NewDelta, name: String) -> Result<Self> {
        let cid = random_cid();
        let hint = delta.parent.iter().map(|parent| parent.hint.as_str());
        let words = delta
            .ddb
            .iter()
            .flat_map(|(name, value)| [name.as_str(), value.as_str()]);
        for word in hint.chain(words) {
            check_value(word)?;
        }
        if delta.parent.as_ref().is_some_and(|parent| parent.cid == NO_CID) {
            return Err(usage(format!(
                "a delta cannot name a parent of the CID {NO_CID:08x}, which means none"
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

    /// The text.
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
            // qemu wants the offset of a flat extent, and none of any other
            out.push_str(if *kind == ExtentKind::Flat { " 0\n" } else { "\n" });
        }
        out.push_str("\n# The Disk Data Base \n#DDB\n\n");
        for (name, value) in &self.ddb {
            _ = writeln!(out, "ddb.{name} = \"{value}\"");
        }
        out
    }
}

/// Cylinders, heads and sectors per track that a disk is said to have.
///
/// SCSI: heads and sectors as VMware's adapters choose them by size; cylinders are the whole ones, without a bound, as
/// ESXi writes them. IDE: 16 × 63, and no more cylinders than its registers can count.
pub(super) fn geometry(sectors: u64, adapter: AdapterType) -> (u64, u64, u64) {
    let (heads, per_track, most) = match adapter {
        AdapterType::Ide => (16, 63, 16383),
        _ if sectors < GIB => (64, 32, u64::MAX),
        _ if sectors < 2 * GIB => (128, 32, u64::MAX),
        _ => (255, 63, u64::MAX),
    };
    // a disk of a few sectors has a cylinder too
    ((sectors / (heads * per_track)).clamp(1, most), heads, per_track)
}

/// The name of a file as text in a descriptor that does not have to lead to it: the file that holds the descriptor.
pub(super) fn label(name: &ExtentName) -> String {
    let text = String::from_utf8_lossy(name.as_bytes()).into_owned();
    text.chars()
        .map(|c| if c.is_control() || c == '"' { '_' } else { c })
        .collect()
}

/// The name of a file beside `name`, which ends in `suffix` for its `.vmdk`.
///
/// Errors: `Usage` where the descriptor could not name it.
pub(super) fn sibling(name: &ExtentName, suffix: &str) -> Result<ExtentName> {
    const EXTENSION: &str = ".vmdk";
    let text = std::str::from_utf8(name.as_bytes())
        .ok()
        .filter(|text| check_value(text).is_ok())
        .ok_or_else(|| {
            usage(format!(
                "{name}: a descriptor can name files only in UTF-8, without `\"` or line ends"
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

/// Text that can stand between quotes. The format has no escapes.
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

/// A CID that says nothing but that it is another one.
pub(super) fn random_cid() -> u32 {
    loop {
        let cid = random() as u32;
        if cid < FRESH_CID {
            return cid;
        }
    }
}

/// 32 digits that end with the CID, as writers do that know both.
fn long_content_id(cid: u32) -> String {
    format!("{:016x}{:08x}{cid:08x}", random(), random() as u32)
}

/// A number in VMware's form and range: sixteen bytes, the first four VMware's own, as its products make them.
fn uuid() -> String {
    let [a, b, c, d, e, f, g, h] = random().to_le_bytes();
    let [i, j, k, l, m, ..] = random().to_le_bytes();
    // 60 00 C2 9x: VMware's part of the worldwide names
    let a = 0x90 | a & 0x0f;
    format!(
        "60 00 C2 {a:02x} {b:02x} {c:02x} {d:02x} {e:02x}-{f:02x} {g:02x} {h:02x} {i:02x} {j:02x} {k:02x} {l:02x} {m:02x}"
    )
}

/// Bits that differ from call to call and from run to run: the keys of a new hasher come from the system.
fn random() -> u64 {
    RandomState::new().build_hasher().finish()
}
