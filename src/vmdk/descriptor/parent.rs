//! A child's link to its parent, and where the parent may lie.

use encoding_rs::{Encoding, UTF_8};

use crate::store::ExtentName;

/// The parent that a child remembers.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ParentLink {
    /// The CID that it had when the child was made; never `ffffffff`.
    pub cid: u32,
    /// Its path as it was then.
    pub hint: ParentHint,
}

/// A parent's path, written on a machine that may have been another one.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ParentHint {
    name: ExtentName,
    encoding: &'static Encoding,
}

impl ParentHint {
    /// A hint as it stands in a descriptor of that encoding.
    pub(super) fn new(name: ExtentName, encoding: &'static Encoding) -> Self {
        Self { name, encoding }
    }

    /// The hint itself, for messages.
    pub fn name(&self) -> &ExtentName {
        &self.name
    }

    /// The names to try from the child's folder, best first; at least one.
    ///
    /// | hint | candidates |
    /// | --- | --- |
    /// | `x.vmdk`, `../d/x.vmdk` | as it is |
    /// | `/d/x.vmdk` | as it is, then `x.vmdk` |
    /// | `/vmfs/volumes/ID/d/x.vmdk` (ESX) | `x.vmdk`, then `../d/x.vmdk` |
    /// | `d\x.vmdk` | `d/x.vmdk`, then as it is |
    /// | `C:\d\x.vmdk`, `\\host\share\x.vmdk` | `x.vmdk` |
    pub fn candidates(&self) -> Vec<ExtentName> {
        let written = self.name.as_bytes();
        let slashed: Vec<u8> = written.iter().map(|&b| if b == b'\\' { b'/' } else { b }).collect();
        let mut found = Vec::new();
        if is_windows_absolute(written) {
            found.extend(self.spelled(last(&slashed)));
        } else if written.starts_with(b"/vmfs/volumes/") {
            found.extend(self.spelled(last(written)));
            found.extend(folder(written).and_then(|d| self.spelled(&[b"../", d, b"/", last(written)].concat())));
        } else if written.starts_with(b"/") {
            found.push(self.name.clone());
            found.extend(self.spelled(last(written)));
        } else {
            found.extend((slashed != written).then(|| self.spelled(&slashed)).flatten());
            found.push(self.name.clone());
        }
        if found.is_empty() {
            found.push(self.name.clone());
        }
        found
    }

    /// A part of the hint as a name, with its spelling in the descriptor's encoding; `None` for an empty part.
    fn spelled(&self, part: &[u8]) -> Option<ExtentName> {
        let name = ExtentName::new(part).ok()?;
        let text = std::str::from_utf8(part).ok().filter(|_| self.encoding != UTF_8);
        match text.map(|text| self.encoding.encode(text)) {
            Some((raw, _, false)) => name.or_raw(&raw).ok(),
            _ => Some(name),
        }
    }
}

/// Whether the path starts at a drive, a share or the root of the drive.
fn is_windows_absolute(path: &[u8]) -> bool {
    match path {
        [b'\\', ..] => true,
        [drive, b':', b'\\' | b'/', ..] => drive.is_ascii_alphabetic(),
        _ => false,
    }
}

/// What is behind the last `/`.
fn last(path: &[u8]) -> &[u8] {
    path.rsplit(|&b| b == b'/').next().unwrap_or(path)
}

/// The folder right above the file of `/vmfs/volumes/ID/…/FOLDER/FILE`.
fn folder(path: &[u8]) -> Option<&[u8]> {
    let parts: Vec<_> = path.split(|&b| b == b'/').collect();
    // "", vmfs, volumes, the volume, at least one folder, the file
    (parts.len() >= 6)
        .then(|| parts[parts.len() - 2])
        .filter(|folder| !folder.is_empty())
}
