//! A byte range of a stored file as a stored file of its own, such as a disk in a package.
//!
//! ```text
//!   container   |header|  a.ovf  |header|  disk1.vmdk          |header| …
//!                                          └── MemberFile ────┘
//! ```
//! A member is only read. Its identity names the file of its container, which the other members share, and its start.

use std::fmt;
use std::ops::Range;
use std::sync::Arc;

use super::{Access, ExtentName, Identity, Store, StoredFile, printable};
use crate::cache::disk_tier::TierFile;
use crate::error::{Error, ErrorKind, Result};

/// Name of a member and the bytes of the container that hold its content.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Member {
    /// Name in the package, without a leading `./`.
    pub(super) name: String,
    /// Bytes of the container.
    pub(super) bytes: Range<u64>,
}

/// The members of a container, in the order in which they lie there.
#[derive(Debug)]
pub(super) struct Members {
    pub(super) container: Arc<dyn StoredFile>,
    pub(super) list: Vec<Member>,
}

impl Members {
    /// Returns the member `name` as a file.
    ///
    /// Errors: `NotFound`.
    pub(super) fn open(self: &Arc<Self>, name: &str) -> Result<MemberFile> {
        let missing = || {
            let text = format!("{}: has no member {}", self.container.label(), printable(name));
            Error::new(ErrorKind::NotFound, text)
        };
        let member = self
            .list
            .iter()
            .find(|member| member.name == name)
            .ok_or_else(missing)?;
        Ok(MemberFile {
            label: format!("{}({})", self.container.label(), printable(name)),
            member: member.clone(),
            members: Arc::clone(self),
        })
    }
}

/// Member of a container, open for reading.
#[derive(Debug)]
pub(super) struct MemberFile {
    label: String,
    member: Member,
    members: Arc<Members>,
}

impl MemberFile {
    fn within(&self, identity: Identity) -> Identity {
        Identity {
            // Members share the file, so the start is what tells them from each other.
            start: identity.start + self.member.bytes.start,
            len: self.len(),
            ..identity
        }
    }
}

impl StoredFile for MemberFile {
    fn len(&self) -> u64 {
        self.member.bytes.end - self.member.bytes.start
    }

    fn read_exact_at(&self, offset: u64, buf: &mut [u8]) -> Result<()> {
        let end = offset.checked_add(buf.len() as u64);
        if end.is_none_or(|end| end > self.len()) {
            let text = format!(
                "read of {} bytes at byte {offset}: the member ends at byte {}",
                buf.len(),
                self.len()
            );
            return Err(Error::corrupt(text).at_byte(offset).in_file(&self.label));
        }
        let read = self
            .members
            .container
            .read_exact_at(self.member.bytes.start + offset, buf);
        read.map_err(|e| e.in_file(&self.label))
    }

    fn identity(&self) -> Result<Identity> {
        Ok(self.within(self.members.container.identity()?))
    }

    fn identity_at_open(&self) -> Identity {
        self.within(self.members.container.identity_at_open())
    }

    fn detects_modification(&self) -> bool {
        self.members.container.detects_modification()
    }

    fn allocated(&self) -> Result<u64> {
        // Writers of packages leave no holes.
        Ok(self.len())
    }

    fn data_at(&self, offset: u64) -> Result<(bool, u64)> {
        let (stored, bytes) = self
            .members
            .container
            .data_at(self.member.bytes.start.saturating_add(offset))?;
        // The answer of the container reaches into the members behind this one.
        Ok((stored, bytes.min(self.len().saturating_sub(offset)).max(1)))
    }

    fn label(&self) -> &str {
        &self.label
    }

    fn own_name(&self) -> String {
        printable(super::package::last_part(&self.member.name))
    }

    fn siblings(&self) -> Result<Arc<dyn Store>> {
        Ok(Arc::new(MemberStore(Arc::clone(&self.members))))
    }

    fn cached(&self) -> Option<Result<&TierFile>> {
        self.members.container.cached()
    }

    fn check_named(&self) -> Result<()> {
        self.members.container.check_named()
    }

    fn reopen(&self) -> Result<Arc<dyn StoredFile>> {
        // The archive is read anew: in another version of it the member may lie elsewhere.
        super::package::open(self.members.container.reopen()?)?.open(&self.member.name)
    }
}

/// The members of a package as the folder of each of them.
struct MemberStore(Arc<Members>);

impl fmt::Debug for MemberStore {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "MemberStore({})", self.0.container.label())
    }
}

impl MemberStore {
    fn only_read(&self) -> Error {
        let text = format!("{}: the files of a package are only read", self.0.container.label());
        Error::new(ErrorKind::ReadOnly, text)
    }
}

impl Store for MemberStore {
    fn open(&self, name: &ExtentName, access: Access) -> Result<Arc<dyn StoredFile>> {
        if access == Access::Write {
            return Err(self.only_read());
        }
        // Names of members are UTF-8; no member has the empty name.
        let text = std::str::from_utf8(name.as_bytes()).unwrap_or_default();
        Ok(Arc::new(self.0.open(text)?))
    }

    fn create(&self, _name: &ExtentName) -> Result<Arc<dyn StoredFile>> {
        Err(self.only_read())
    }

    fn remove(&self, _name: &ExtentName, _identity: &Identity) -> Result<()> {
        Err(self.only_read())
    }

    fn sync(&self) -> Result<()> {
        Ok(())
    }

    fn names(&self, most: usize) -> Result<Vec<ExtentName>> {
        let names = self
            .0
            .list
            .iter()
            .filter_map(|member| ExtentName::new(&member.name).ok());
        Ok(names.take(most).collect())
    }
}
