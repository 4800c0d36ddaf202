//! Parent of a snapshot: its recorded CID, and the paths at which it may be found.

use encoding_rs::{Encoding, UTF_8};

use crate::store::ExtentName;

/// Parent as its child records it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ParentLink {
    /// CID that the parent had when the child was created; never `ffffffff`. `None` for a text that is no number, and
    /// fits no parent.
    pub cid: Option<u32>,
    /// Path of the parent at that time.
    pub hint: ParentHint,
}

/// Path of a parent, which may have been written on another machine or operating system.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ParentHint {
    name: ExtentName,
    encoding: &'static Encoding,
}

impl ParentHint {
    /// Creates a hint from its text in a descriptor of that encoding.
    pub(super) fn new(name: ExtentName, encoding: &'static Encoding) -> Self {
        Self { name, encoding }
    }

    /// Returns the path as written, for messages.
    pub fn name(&self) -> &ExtentName {
        &self.name
    }

    /// Returns the names to try, relative to the child's folder: at least one, the most likely first.
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
        // Absolute paths of Windows and ESX do not exist here: usually parent and child were copied into one folder, or
        // into sibling folders that keep their names.
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

    /// Returns a part of the hint as a name, together with its bytes in the descriptor's encoding. `None` for an empty
    /// part.
    fn spelled(&self, part: &[u8]) -> Option<ExtentName> {
        let name = ExtentName::new(part).ok()?;
        let text = std::str::from_utf8(part).ok().filter(|_| self.encoding != UTF_8);
        match text.map(|text| self.encoding.encode(text)) {
            Some((raw, _, false)) => name.or_raw(&raw).ok(),
            _ => Some(name),
        }
    }
}

/// Returns true if the path starts at a drive, a share or the root of the current drive.
fn is_windows_absolute(path: &[u8]) -> bool {
    match path {
        [b'\\', ..] => true,
        [drive, b':', b'\\' | b'/', ..] => drive.is_ascii_alphabetic(),
        _ => false,
    }
}

/// Returns the part after the last `/`.
fn last(path: &[u8]) -> &[u8] {
    path.rsplit(|&b| b == b'/').next().unwrap_or(path)
}

/// Returns `FOLDER` of `/vmfs/volumes/ID/…/FOLDER/FILE`. `None` if the file is directly in the volume.
fn folder(path: &[u8]) -> Option<&[u8]> {
    let parts: Vec<_> = path.split(|&b| b == b'/').collect();
    // The parts are "", vmfs, volumes, the volume, at least one folder, and the file.
    (parts.len() >= 6)
        .then(|| parts[parts.len() - 2])
        .filter(|folder| !folder.is_empty())
}
