//! A byte range of a stored file as a stored file of its own, such as a disk in a package.
//!
//! ```text
//!   container   |header|  a.ovf  |header|  disk1.vmdk          |header| …
//!                                          └── MemberFile ────┘
//! ```
//! A member is only read. Its identity names the file of its container, which the other members share, and its start.

use std::fmt;
use std::sync::Arc;

use super::archive::{self, Member};
use super::{Access, ExtentName, Identity, Store, StoredFile, printable, shell_word};
use crate::cache::disk_tier::TierFile;
use crate::error::{Error, ErrorKind, Result};

/// The members of a container, in the order in which they lie there.
#[derive(Debug)]
pub(super) struct Members {
    pub(super) container: Arc<dyn StoredFile>,
    pub(super) list: Vec<Member>,
}

impl Members {
    /// Reads the list of members of a tar archive.
    ///
    /// Errors: `Corrupt` for a file that is no such archive or a damaged one, those of reading it.
    pub(super) fn read(container: Arc<dyn StoredFile>) -> Result<Arc<Self>> {
        let list = archive::members(&*container).map_err(|e| e.in_file(container.label()))?;
        Ok(Arc::new(Self { container, list }))
    }

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

    /// Returns the member `name` as a file that can be read as it is.
    ///
    /// Errors: `NotFound`, `Unsupported` for a compressed member.
    pub(super) fn open_unpacked(self: &Arc<Self>, name: &str) -> Result<MemberFile> {
        let file = self.open(name)?;
        let label = self.container.label();
        let mut magic = [0; 2];
        if file.len() >= 2 {
            file.read_exact_at(0, &mut magic)?;
        }
        if magic == [0x1f, 0x8b] {
            let plain = last_part(name).trim_end_matches(".gz");
            return Err(Error::unsupported(format!(
                "{}: is compressed by gzip, which has to be unpacked first: tar -xOf {} {} | gunzip > {}",
                file.label(),
                shell_word(label),
                shell_word(name),
                shell_word(plain)
            )));
        }
        Ok(file)
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
        printable(last_part(&self.member.name))
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
        let members = Members::read(self.members.container.reopen()?)?;
        Ok(Arc::new(members.open_unpacked(&self.member.name)?))
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

/// Returns the part of a member's name after the last slash.
pub(super) fn last_part(name: &str) -> &str {
    name.rsplit('/').next().unwrap_or(name)
}
