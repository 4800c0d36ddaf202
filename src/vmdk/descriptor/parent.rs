//! Parent of a snapshot: its recorded CID, and the paths at which it may be found.

use encoding_rs::{Encoding, UTF_8};

use super::candidates::candidates;
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
    pub fn candidates(&self) -> Vec<ExtentName> {
        candidates(&self.name, |part| self.spelled(part))
    }

    /// Returns a part of the hint as a name, together with its bytes in the descriptor's encoding. `None` for an empty
    /// part.
    fn spelled(&self, part: &[u8]) -> Option<ExtentName> {
        let name = ExtentName::new(part).ok()?;
        // Encoded back, as the file on this system may have either spelling of the part too.
        let text = std::str::from_utf8(part).ok().filter(|_| self.encoding != UTF_8);
        match text.map(|text| self.encoding.encode(text)) {
            Some((raw, _, false)) => name.or_raw(&raw).ok(),
            _ => Some(name),
        }
    }
}
