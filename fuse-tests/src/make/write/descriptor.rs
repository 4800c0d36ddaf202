//! Text of a descriptor.

use anyhow::{Result, ensure};
use encoding_rs::Encoding;

/// `parentCID` of a disk without a parent.
pub const NO_PARENT: u32 = 0xffff_ffff;

/// A descriptor: [`Descriptor::new`] creates a usual one; its fields modify it.
#[derive(Debug, Clone)]
pub struct Descriptor {
    /// `createType`; `None` leaves the line out.
    pub kind: Option<&'static str>,
    /// Complete extent lines.
    pub extents: Vec<String>,
    /// `CID`, the content ID.
    pub cid: u32,
    /// `parentCID`, the content ID of the parent.
    pub parent_cid: u32,
    /// `parentFileNameHint`.
    pub hint: Option<String>,
    /// `version`.
    pub version: u32,
    /// `encoding`, in which the text is encoded; `None` leaves the line out (UTF-8).
    pub encoding: Option<&'static str>,
    /// The first line.
    pub first: &'static str,
    /// Additional lines of the header.
    pub header: Vec<&'static str>,
    /// Lines between the extents and the disk database.
    pub middle: Vec<&'static str>,
    /// Additional lines of the disk database.
    pub ddb: Vec<&'static str>,
    /// Line end.
    pub eol: &'static str,
}

impl Descriptor {
    /// Creates a usual descriptor of a disk without a parent.
    pub fn new<L: Into<String>>(kind: &'static str, extents: impl IntoIterator<Item = L>) -> Self {
        Self {
            kind: Some(kind),
            extents: extents.into_iter().map(Into::into).collect(),
            cid: 0x1234_abcd,
            parent_cid: NO_PARENT,
            hint: None,
            version: 1,
            encoding: Some("UTF-8"),
            first: "# Disk DescriptorFile",
            header: Vec::new(),
            middle: Vec::new(),
            ddb: Vec::new(),
            eol: "\n",
        }
    }

    /// Sets the CID, and the CID and hint of a parent.
    #[must_use]
    pub fn child(self, cid: u32, parent_cid: u32, hint: impl Into<String>) -> Self {
        Self {
            cid,
            parent_cid,
            hint: Some(hint.into()),
            ..self
        }
    }

    /// Sets the CID.
    #[must_use]
    pub fn cid(self, cid: u32) -> Self {
        Self { cid, ..self }
    }

    /// Returns the text.
    pub fn text(&self) -> String {
        let mut lines = vec![self.first.to_owned(), format!("version={}", self.version)];
        lines.extend(self.encoding.map(|name| format!("encoding=\"{name}\"")));
        lines.push(format!("CID={:08x}", self.cid));
        lines.push(format!("parentCID={:08x}", self.parent_cid));
        lines.extend(self.kind.map(|kind| format!("createType=\"{kind}\"")));
        lines.extend(self.hint.as_ref().map(|hint| format!("parentFileNameHint=\"{hint}\"")));
        lines.extend(self.header.iter().map(|line| (*line).to_owned()));
        lines.extend(["".into(), "# Extent description".into()]);
        lines.extend(self.extents.iter().cloned());
        lines.push("".into());
        lines.extend(self.middle.iter().map(|line| (*line).to_owned()));
        lines.extend(["# The Disk Data Base".into(), "#DDB".into(), "".into()]);
        lines.push("ddb.adapterType = \"lsilogic\"".into());
        lines.push(format!("ddb.geometry.cylinders = \"{}\"", self.sectors() / (255 * 63)));
        lines.push("ddb.geometry.heads = \"255\"".into());
        lines.push("ddb.geometry.sectors = \"63\"".into());
        lines.extend(self.ddb.iter().map(|line| (*line).to_owned()));
        lines.extend(["ddb.virtualHWVersion = \"14\"".into(), "".into()]);
        lines.join(self.eol)
    }

    /// Returns the text in its encoding; fails if the encoding lacks a character of it.
    pub fn bytes(&self) -> Result<Vec<u8>> {
        let label = self.encoding.unwrap_or("UTF-8");
        let encoding = Encoding::for_label(label.as_bytes()).unwrap_or(encoding_rs::UTF_8);
        let text = self.text();
        let (bytes, _, lossy) = encoding.encode(&text);
        ensure!(!lossy, "{label} lacks a character of {text:?}");
        Ok(bytes.into_owned())
    }

    /// Returns the sum of the sector counts in the extent lines, for the geometry. Counts that are not numbers are
    /// skipped: the geometry is only informative.
    fn sectors(&self) -> u64 {
        let counts = self
            .extents
            .iter()
            .filter_map(|line| line.split_whitespace().nth(1)?.parse::<u64>().ok());
        counts.fold(0, u64::saturating_add)
    }
}
