//! Images near an image: those that a chain is made of, and that only name each other by content or by ID.
//!
//! ```text
//!   machine/               base.vmdk      ddb.uuid.image = B
//!   machine/Snapshots/     {…}.vmdk       ddb.uuid.parent = B      VirtualBox: no parentCID, no parentFileNameHint
//! ```
//! - A child of VirtualBox names its parent by its UUID alone: [`find_by_uuid`] looks for it beside the child and in the
//!   folder above.
//! - A parent names no child, so all files beside an image and in its `Snapshots` are examined before it is written.
//!
//! Bounds: [`MAX_FILES`] of a folder, [`MAX_TEXT`] of a descriptor, [`MAX_TEXTS`] of all descriptors of a search. The
//! files are read without image locks: a child that another program uses is a child too, and a search must not keep
//! others from their files.

use std::sync::Arc;

use crate::block::SECTOR;
use crate::error::{Error, ErrorKind, Result};
use crate::store::{Access, ExtentName, Neighbour, Store, StoredFile, printable};
use crate::vmdk::chain::Link;
use crate::vmdk::descriptor::Descriptor;
use crate::vmdk::file_kind::{FileKind, file_kind, read_head};
use crate::vmdk::header::{Hosted, Role};
use crate::vmdk::open_options::Degraded;

/// Maximum number of files of a folder that are examined.
pub(super) const MAX_FILES: usize = 1 << 16;

/// Maximum bytes of a descriptor.
const MAX_TEXT: u64 = 1 << 20;

/// Maximum bytes of all descriptors of one search.
const MAX_TEXTS: u64 = 256 << 20;

/// Key of an image's UUID in the disk data base.
const IMAGE: &str = "uuid.image";
/// Key of its parent's UUID.
const PARENT: &str = "uuid.parent";
/// Key of the UUID that changes with the content.
const MODIFICATION: &str = "uuid.modification";
/// Key of the parent's UUID of that kind, when the child was created.
const PARENT_MODIFICATION: &str = "uuid.parentmodification";

/// A file of a folder, with its descriptor.
pub(super) struct Image {
    pub(super) name: ExtentName,
    pub(super) file: Arc<dyn StoredFile>,
    pub(super) descriptor: Descriptor,
}

/// Calls `examine` with each image in the folder of `store`, whatever its name, until it returns a value.
///
/// Errors: `Policy` if the folder has too many files or too long descriptors; those of listing it and of `examine`.
pub(super) fn search<T>(store: &dyn Store, mut examine: impl FnMut(&Image) -> Result<Option<T>>) -> Result<Option<T>> {
    let names = store.names(MAX_FILES)?;
    let too_many = |what: String| Err(Error::new(ErrorKind::Policy, what));
    // The store ends its list there, so further files may exist, and a search that leaves files out proves nothing.
    if names.len() == MAX_FILES {
        return too_many(format!(
            "its folder has {MAX_FILES} files or more, too many to search for snapshots"
        ));
    }
    let mut left = MAX_TEXTS;
    for name in names {
        // A file that can't be opened or read is skipped: one unreadable file in the folder is no reason to refuse.
        let Ok(file) = store.open(&name, Access::Peek) else {
            continue;
        };
        let Some((descriptor, bytes)) = descriptor_of(&*file) else {
            continue;
        };
        let Some(rest) = left.checked_sub(bytes) else {
            return too_many(format!(
                "its folder has more than {MAX_TEXTS} bytes of descriptors, too many to search"
            ));
        };
        left = rest;
        if let Some(found) = examine(&Image { name, file, descriptor })? {
            return Ok(Some(found));
        }
    }
    Ok(None)
}

/// Returns the UUID by which a child names its parent, if that is the only way in which it does.
pub(super) fn parent_uuid(child: &Link) -> Option<String> {
    let descriptor = &child.descriptor;
    // Flat and zero extents hide any parent.
    let is_sparse = descriptor.extents.iter().any(|extent| extent.kind.is_sparse());
    if descriptor.parent.is_some() || !is_sparse {
        return None;
    }
    uuid(descriptor, PARENT)
}

/// Returns the UUID of an image.
pub(super) fn image_uuid(descriptor: &Descriptor) -> Option<String> {
    uuid(descriptor, IMAGE)
}

/// Returns true if `descriptor` is that of a child of the image with this UUID.
pub(super) fn names_parent(descriptor: &Descriptor, image: &str) -> bool {
    uuid(descriptor, PARENT).is_some_and(|parent| parent == image)
}

/// Opens the parent of `child` whose UUID is `parent`: beside the child, or in the folder above.
///
/// Errors: `NotFound` if there is none, `Corrupt` if there are several or if it was changed after the snapshot.
pub(super) fn find_by_uuid(child: &Link, parent: &str, degraded: Degraded) -> Result<Arc<dyn StoredFile>> {
    let own = child.file.siblings()?;
    // Without a folder above, or rights to list it, only the child's own one is searched.
    let above = own.neighbour(Neighbour::Above).ok();
    for store in [Some(own), above].into_iter().flatten() {
        let mut found: Vec<(ExtentName, bool)> = Vec::new();
        search(&*store, |image| {
            let is_own = image.file.identity_at_open().file == child.file.identity_at_open().file;
            if !is_own && image_uuid(&image.descriptor).is_some_and(|uuid| uuid == parent) {
                found.push((image.name.clone(), is_unchanged(&child.descriptor, &image.descriptor)));
            }
            // The search does not end with the first match: a second image with this UUID makes the choice uncertain.
            Ok(None::<()>)
        })?;
        // Copies of an image have its UUID. Only one that is as it was when the child was created can be the parent.
        let unchanged = found.iter().filter(|(_, unchanged)| *unchanged).count();
        match found.iter().find(|(_, unchanged)| *unchanged).or(found.first()) {
            Some((name, _)) if unchanged > 1 => {
                let others: Vec<_> = found.iter().map(|(name, _)| name.to_string()).collect();
                return Err(Error::corrupt(format!(
                    "{name} and another image have the UUID that ddb.uuid.parent names ({}); move all but the parent away",
                    others.join(", ")
                )));
            }
            Some((name, _)) if unchanged == 0 && !degraded.cid => {
                return Err(Error::corrupt(format!(
                    "{name} (ddb.uuid.parent={parent}) was changed after the snapshot was created: its \
                     ddb.uuid.modification is another one (degraded=cid reads it anyway)"
                )));
            }
            Some((name, _)) => return store.open(name, Access::Read),
            None => {}
        }
    }
    Err(Error::new(
        ErrorKind::NotFound,
        format!(
            "no image beside it or in the folder above has the UUID that ddb.uuid.parent names ({parent}); copy the \
             parent there"
        ),
    ))
}

/// Returns true if the parent's content is that of when the child was created, as far as both say.
fn is_unchanged(child: &Descriptor, parent: &Descriptor) -> bool {
    match (uuid(child, PARENT_MODIFICATION), uuid(parent, MODIFICATION)) {
        (Some(expected), Some(now)) => expected == now,
        _ => true,
    }
}

/// Returns a UUID of the disk data base in lower case, without braces; `None` if it is missing or all zeroes.
fn uuid(descriptor: &Descriptor, key: &str) -> Option<String> {
    let text = descriptor
        .ddb_value(key)?
        .trim()
        .trim_matches(['{', '}'])
        .to_ascii_lowercase();
    text.bytes().any(|b| b != b'0' && b != b'-').then_some(text)
}

/// Reads the descriptor of a file: a descriptor file, or a hosted extent with an embedded one. Returns it with its
/// length, or `None` for any other file and for one that can't be read.
fn descriptor_of(file: &dyn StoredFile) -> Option<(Descriptor, u64)> {
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
    // An embedded descriptor may reserve more; one so long is none that a program has written.
    if len > MAX_TEXT {
        return None;
    }
    let mut text = vec![0; len as usize];
    file.read_exact_at(at, &mut text).ok()?;
    let parsed = Descriptor::parse(&text).map_err(|e| tracing::debug!("{}: {e}", printable(file.label())));
    Some((parsed.ok()?, len))
}
