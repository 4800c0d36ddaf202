//! Kind of a file by its first bytes.

use crate::error::Result;
use crate::store::StoredFile;
use crate::vmdk::descriptor;
use crate::vmdk::header::{COWD_MAGIC, KDMV_MAGIC, KDMV_UNFINISHED, SESPARSE_MAGIC};

/// Kind of a file, from its first bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FileKind {
    /// A hosted sparse extent, perhaps with its descriptor inside.
    Hosted,
    /// An ESX sparse extent.
    Cowd,
    /// A seSparse extent.
    SeSparse,
    /// A descriptor file.
    Descriptor,
    /// A hosted sparse extent that its writer did not finish (magic `kdmv`).
    Unfinished,
    /// Any other content: a flat extent, or no part of a VMDK.
    Other,
}

/// Determines the kind of a file from its first bytes.
pub fn file_kind(head: &[u8]) -> FileKind {
    if head.starts_with(KDMV_MAGIC) {
        FileKind::Hosted
    } else if head.starts_with(KDMV_UNFINISHED) {
        FileKind::Unfinished
    } else if head.starts_with(COWD_MAGIC) {
        FileKind::Cowd
    } else if head.starts_with(SESPARSE_MAGIC) {
        FileKind::SeSparse
    } else if descriptor::looks_like(head) {
        FileKind::Descriptor
    } else {
        FileKind::Other
    }
}

/// Reads the first bytes of a file, at most 4 KiB: enough for [`file_kind`] and every header.
pub fn read_head(file: &dyn StoredFile) -> Result<Vec<u8>> {
    const HEAD: u64 = 4096;
    let mut head = vec![0; file.len().min(HEAD) as usize];
    file.read_exact_at(0, &mut head)?;
    Ok(head)
}
