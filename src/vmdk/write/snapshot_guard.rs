//! Refuses to write to a disk that has snapshots: a write to a parent destroys its children.
//!
//! A child names its parent, but not the other way round. So all VMDKs in the disk's folder are opened, and the CID
//! that each remembers of its parent is compared with the disk's. Children in other folders are not found.

use crate::block::SECTOR;
use crate::error::{Error, ErrorKind, Result};
use crate::store::{Access, ExtentName, StoredFile, printable};
use crate::vmdk::descriptor::Descriptor;
use crate::vmdk::header::{Hosted, Role};
use crate::vmdk::open::{FileKind, Link, file_kind, read_head};

/// Maximum number of files of a folder that are searched for children.
const MAX_FILES: usize = 1 << 16;

/// Maximum bytes of a descriptor.
const MAX_TEXT: u64 = 1 << 20;

/// CID of every new disk. Many disks have it, so a match means nothing unless the child also names this disk.
const NEW_DISK_CID: u32 = 0xffff_fffe;

/// Key in the disk data base of an overlay that holds the CID which the base had when a commit started.
pub(crate) const COMMIT_MARK: &str = "vmdkfuse.commit";

/// Refuses a disk whose CID a child in the same folder remembers. The file `except` does not count as a child.
///
/// Errors: `Policy` for a child, and for a folder with too many files to search; those of listing the folder.
pub(in crate::vmdk) fn refuse_with_children(link: &Link, except: Option<&dyn StoredFile>) -> Result<()> {
    let Some(cid) = link.descriptor.cid else { return Ok(()) };
    let store = link.file.siblings()?;
    let own = link.file.own_name();
    let names = store.names(MAX_FILES)?;
    if names.len() == MAX_FILES {
        let label = link.file.label();
        let context = format!("{label}: its folder has {MAX_FILES} files or more, too many to search for snapshots");
        return Err(Error::new(
            ErrorKind::Policy,
            format!("{context}; force=true writes without the search"),
        ));
    }
    for name in names {
        let text = name.to_string();
        if !text.to_ascii_lowercase().ends_with(".vmdk") || text == own {
            continue;
        }
        // A file that can't be opened or read is skipped: one unreadable file in the folder is no reason to refuse.
        let Ok(file) = store.open(&name, Access::Peek) else {
            continue;
        };
        if except.is_some_and(|except| except.identity_at_open().file == file.identity_at_open().file) {
            continue;
        }
        let Some(child) = descriptor_of(&*file) else { continue };
        // After an interrupted commit the overlay's parentCID is the next CID already, and its mark has the old one.
        // Both make it a child of this disk.
        let before = child
            .ddb_value(COMMIT_MARK)
            .and_then(|mark| u32::from_str_radix(mark, 16).ok());
        let Some(parent) = child
            .parent
            .filter(|parent| parent.cid == Some(cid) || before == Some(cid))
        else {
            continue;
        };
        // Two names: that of the file, and that by which the user named it (a symbolic link may differ).
        let typed = file_name(link.file.label());
        let names_disk = |hint: &ExtentName| [own.as_str(), typed].contains(&file_name(&hint.to_string()));
        let names_disk = parent.hint.candidates().iter().any(names_disk);
        if cid != NEW_DISK_CID || names_disk {
            return Err(refusal(link, &name, cid));
        }
    }
    Ok(())
}

fn refusal(link: &Link, child: &ExtentName, cid: u32) -> Error {
    Error::new(
        ErrorKind::Policy,
        format!(
            "{}: {child} is a snapshot based on it (parentCID {cid:08x}): writing to a base destroys its snapshots; \
             readonly=true reads it, cow=FILE writes to an overlay, force=true writes to the base anyway",
            link.file.label()
        ),
    )
}

/// Returns the last component of a label.
fn file_name(label: &str) -> &str {
    label.rsplit('/').next().unwrap_or(label)
}

/// Reads the descriptor of a file: a descriptor file, or a hosted extent with an embedded one. Returns `None` for any
/// other file and for one that can't be read.
fn descriptor_of(file: &dyn StoredFile) -> Option<Descriptor> {
    let head = read_head(file).ok()?;
    let (at, len) = match file_kind(&head) {
        FileKind::Descriptor => (0, file.len()),
        FileKind::Hosted => {
            let (at, sectors) = Hosted::parse(&head, file.len(), Role::Header).ok()?.descriptor?;
            (
                at * SECTOR,
                (sectors * SECTOR).min(file.len().saturating_sub(at * SECTOR)),
            )
        }
        _ => return None,
    };
    if len > MAX_TEXT {
        return None;
    }
    let mut text = vec![0; len as usize];
    file.read_exact_at(at, &mut text).ok()?;
    Descriptor::parse(&text)
        .map_err(|e| tracing::debug!("{}: {e}", printable(file.label())))
        .ok()
}
