//! Protection of a disk that others are based on: writing to a parent destroys its children.

use crate::block::SECTOR;
use crate::error::{Error, ErrorKind, Result};
use crate::store::{Access, ExtentName, StoredFile, printable};
use crate::vmdk::descriptor::Descriptor;
use crate::vmdk::header::{Hosted, Role};
use crate::vmdk::open::{FileKind, Link, file_kind, read_head};

/// The most files of a folder that are looked through for children.
const MAX_FILES: usize = 1 << 16;

/// The most bytes of a descriptor.
const MAX_TEXT: u64 = 1 << 20;

/// The CID of every fresh disk: it alone does not tell whose child a file is.
const FRESH: u32 = 0xffff_fffe;

/// The entry of an overlay's disk data base that holds the CID which its base had when a commit was begun.
pub(crate) const COMMIT_MARK: &str = "vmdkfuse.commit";

/// Refuses a disk whose CID a child in the same folder remembers; the file `except` is no reason.
pub(in crate::vmdk) fn refuse_with_children(link: &Link, except: Option<&dyn StoredFile>) -> Result<()> {
    let Some(cid) = link.descriptor.cid else { return Ok(()) };
    let store = link.file.siblings()?;
    let own = link.file.own_name();
    let names = store.names(MAX_FILES)?;
    if names.len() == MAX_FILES {
        let label = link.file.label();
        let context = format!("{label}: its folder has too many files to look for snapshots based on it");
        return Err(Error::new(
            ErrorKind::Policy,
            format!("{context}; force=true writes all the same"),
        ));
    }
    for name in names {
        let shown = name.to_string();
        if !shown.to_ascii_lowercase().ends_with(".vmdk") || shown == own {
            continue;
        }
        // what can't be read is no child that could be found
        let Ok(file) = store.open(&name, Access::Read) else {
            continue;
        };
        if except.is_some_and(|except| except.identity_at_open().file == file.identity_at_open().file) {
            continue;
        }
        let Some(child) = descriptor_of(&*file) else { continue };
        // a commit that was begun has told the overlay the next CID already, and its mark keeps the last one
        let before = child
            .ddb_value(COMMIT_MARK)
            .and_then(|mark| u32::from_str_radix(mark, 16).ok());
        let Some(parent) = child.parent.filter(|parent| parent.cid == cid || before == Some(cid)) else {
            continue;
        };
        let typed = file_name(link.file.label());
        let named = |hint: &ExtentName| [own.as_str(), typed].contains(&file_name(&hint.to_string()));
        let named = parent.hint.candidates().iter().any(named);
        if cid != FRESH || named {
            return Err(refusal(link, &name, cid));
        }
    }
    Ok(())
}

fn refusal(link: &Link, child: &ExtentName, cid: u32) -> Error {
    Error::new(
        ErrorKind::Policy,
        format!(
            "{}: {child} is a snapshot based on it (parentCID {cid:08x}), and writing to a base destroys its snapshots; \
             readonly=true reads it, cow=FILE writes to an overlay, force=true writes all the same",
            link.file.label()
        ),
    )
}

/// The last part of a path as messages show it.
fn file_name(shown: &str) -> &str {
    shown.rsplit('/').next().unwrap_or(shown)
}

/// The descriptor in a file, if it has one.
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
