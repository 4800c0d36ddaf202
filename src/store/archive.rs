//! Headers of a tar archive: the names of its members and where they lie.
//!
//! The archive is untrusted. Its headers and long names may have [`MAX_HEADERS`] bytes in all, and [`MAX_MEMBERS`] members
//! are listed. A member that reaches past the end of the file is damage, and so is a name that occurs twice: the archive
//! does not say which of both counts.

use std::collections::HashSet;
use std::io::{self, Read, Seek, SeekFrom};
use std::ops::Range;

use super::{StoredFile, printable};
use crate::error::{Error, Result};

/// Maximum number of members.
const MAX_MEMBERS: usize = 4096;
/// Maximum bytes of all headers: 512 for each member, and as much for long names.
const MAX_HEADERS: u64 = 8 << 20;
/// Name of a member and the bytes of the container that hold its content.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Member {
    /// Name in the package, without a leading `./`.
    pub(super) name: String,
    /// Bytes of the container.
    pub(super) bytes: Range<u64>,
}

/// Reads the headers of an archive.
pub(super) fn members(file: &dyn StoredFile) -> Result<Vec<Member>> {
    let broken = |e: io::Error| Error::corrupt(format!("is no OVA package (a tar archive), or a damaged one: {e}"));
    let mut archive = tar::Archive::new(Headers {
        file,
        at: 0,
        left: MAX_HEADERS,
    });
    let mut members: Vec<Member> = Vec::new();
    let mut seen = HashSet::new();
    for entry in archive.entries_with_seek().map_err(broken)? {
        let entry = entry.map_err(broken)?;
        // Links and devices have no content here, and sparse members are not stored as they are read.
        let kind = entry.header().entry_type();
        if !kind.is_file() && !kind.is_contiguous() {
            continue;
        }
        let bytes = entry.path_bytes();
        let name = std::str::from_utf8(&bytes)
            .map_err(|e| Error::corrupt(format!("the name of a member is not UTF-8: {e}")))?;
        let name = name.strip_prefix("./").unwrap_or(name).to_owned();
        // Both are from the archive: the sum is checked, and the member must end inside of the file.
        let (start, len) = (entry.raw_file_position(), entry.size());
        let end = start.checked_add(len).filter(|&end| end <= file.len());
        let end = end.ok_or_else(|| {
            let text = format!(
                "member {} has {len} bytes at byte {start}, but the file ends at {}",
                printable(&name),
                file.len()
            );
            Error::corrupt(text).at_byte(start)
        })?;
        // Programs disagree about which of two members of one name counts.
        if !seen.insert(name.clone()) {
            return Err(Error::corrupt(format!("has two members {}", printable(&name))));
        }
        if members.len() == MAX_MEMBERS {
            return Err(Error::corrupt(format!("has more than {MAX_MEMBERS} members")));
        }
        members.push(Member {
            name,
            bytes: start..end,
        });
    }
    if members.is_empty() {
        return Err(Error::corrupt("is no OVA package (a tar archive): it has no members"));
    }
    Ok(members)
}

/// Reader of the headers of an archive. It skips the contents, and fails after [`MAX_HEADERS`] bytes.
struct Headers<'a> {
    file: &'a dyn StoredFile,
    at: u64,
    left: u64,
}

impl Read for Headers<'_> {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        // The parser may ask beyond the end: an archive that ends early is its error to report.
        let len = self.file.len().saturating_sub(self.at).min(buf.len() as u64) as usize;
        self.left = self
            .left
            .checked_sub(len as u64)
            .ok_or_else(|| io::Error::other(format!("more than {MAX_HEADERS} bytes of headers")))?;
        let part = buf.get_mut(..len).unwrap_or_default();
        self.file
            .read_exact_at(self.at, part)
            .map_err(|e| io::Error::other(e.to_string()))?;
        self.at += len as u64;
        Ok(len)
    }
}

impl Seek for Headers<'_> {
    fn seek(&mut self, to: SeekFrom) -> io::Result<u64> {
        let target = match to {
            SeekFrom::Start(at) => Some(at),
            SeekFrom::Current(by) => self.at.checked_add_signed(by),
            SeekFrom::End(by) => self.file.len().checked_add_signed(by),
        };
        self.at = target.ok_or_else(|| io::Error::other("a seek to before the start"))?;
        Ok(self.at)
    }
}
