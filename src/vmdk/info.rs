//! Description of an image for `--info`, as text and as JSON.

use serde::Serialize;

use crate::block::{BlockRead, SECTOR};
use crate::vmdk::chain::{Link, PlacedExtent};
use crate::vmdk::disk::VmdkDisk;
use crate::vmdk::extent::Extent;

/// Description of a VMDK. The names of the fields are those of the JSON output.
#[derive(Debug, Clone, Serialize)]
pub struct DiskInfo {
    /// The newest link's `createType`.
    pub create_type: String,
    /// The newest link's extents.
    pub extents: Vec<ExtentInfo>,
    /// The links, the newest first.
    pub chain: Vec<LinkInfo>,
    /// Bytes of a compressed grain, if any link has compressed grains.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub compressed_grain: Option<u64>,
    /// The entries of the newest link's disk data base (`ddb.…`).
    pub ddb: Vec<(String, String)>,
    /// Defects of the descriptors that decide no byte here and that other programs may refuse.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub warnings: Vec<String>,
}

/// Description of a link.
#[derive(Debug, Clone, Serialize)]
pub struct LinkInfo {
    /// File of the descriptor.
    pub file: String,
    /// `createType` of the descriptor.
    pub create_type: String,
    /// CID, eight hex digits.
    pub cid: Option<String>,
    /// CID that the parent had when this link was created.
    pub parent_cid: Option<String>,
    /// Bytes of the link's disk.
    pub size: u64,
    /// True if an extent was not closed after writing.
    pub unclean: bool,
}

/// Description of an extent.
#[derive(Debug, Clone, Serialize)]
pub struct ExtentInfo {
    /// Type: `FLAT`, `SPARSE`, …
    pub kind: String,
    /// File; `None` for `ZERO`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub file: Option<String>,
    /// Sectors of the disk that the extent holds.
    pub sectors: u64,
    /// `RW`, `RDONLY`, `NOACCESS`.
    pub access: String,
    /// Bytes of a grain, for sparse extents.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub grain: Option<u64>,
    /// Sector of the file at which the extent starts, for flat extents.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub offset: Option<u64>,
}

impl VmdkDisk {
    /// Describes the disk; does no I/O.
    pub fn info(&self) -> DiskInfo {
        let newest = self.links().first();
        let geometry = self.geometry();
        DiskInfo {
            create_type: newest.map(|l| l.descriptor.create_type.clone()).unwrap_or_default(),
            extents: newest
                .map(|l| l.extents.iter().map(extent_info).collect())
                .unwrap_or_default(),
            chain: self.links().iter().map(link_info).collect(),
            // Only compressed grains raise the preferred size above the granule; see `VmdkDisk::of`.
            compressed_grain: (geometry.preferred > geometry.granule).then_some(geometry.preferred * SECTOR),
            ddb: newest.map(|l| l.descriptor.ddb.clone()).unwrap_or_default(),
            warnings: self.warnings().collect(),
        }
    }
}

fn link_info(link: &Link) -> LinkInfo {
    let hex = |cid: u32| format!("{cid:08x}");
    LinkInfo {
        file: link.file.label().to_owned(),
        create_type: link.descriptor.create_type.clone(),
        cid: link.descriptor.cid.map(hex),
        parent_cid: link.descriptor.parent.as_ref().and_then(|p| p.cid).map(hex),
        size: link.sectors * SECTOR,
        unclean: link.extents.iter().any(|e| e.unclean),
    }
}

fn extent_info(placed: &PlacedExtent) -> ExtentInfo {
    let (file, grain, offset) = match &placed.extent {
        Extent::Flat { file, offset } => (Some(file.label().to_owned()), None, Some(*offset)),
        Extent::Zero | Extent::Lost(_) => (None, None, None),
        Extent::Sparse(s) => (Some(s.file.label().to_owned()), Some(s.geometry().grain * SECTOR), None),
    };
    ExtentInfo {
        kind: placed.kind.to_owned(),
        file,
        sectors: placed.sectors,
        access: placed.access.as_str().to_owned(),
        grain,
        offset,
    }
}
