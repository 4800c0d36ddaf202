//! Refuses to write to a disk that has snapshots: a write to a parent destroys its children.
//!
//! A child names its parent, but not the other way round. So all images in the disk's folder and in `Snapshots` below it
//! are examined, whatever their names are, for each way in which a child names its parent: by the CID that it remembers,
//! by the file's name, or by a UUID (VirtualBox). Children in other folders are not found.

use crate::error::{Error, ErrorKind, Result};
use crate::store::{ExtentName, Neighbour, StoredFile};
use crate::vmdk::chain::Link;
use crate::vmdk::descriptor::Descriptor;
use crate::vmdk::neighbours::{self, Image};

/// CID of every new disk. Many disks have it, so a match means nothing unless the child also names this disk.
const NEW_DISK_CID: u32 = 0xffff_fffe;

/// Key in the disk data base of an overlay that holds the CID which the base had when a commit started.
pub(crate) const COMMIT_MARK: &str = "vmdkfuse.commit";

/// Refuses a disk that a child in the same folder, or in `Snapshots` below it, is based on. The file `except` does not
/// count as a child.
///
/// Errors: `Policy` for a child, and for a folder with too many files to search; those of listing the folder.
pub(in crate::vmdk) fn refuse_with_children(link: &Link, except: Option<&dyn StoredFile>) -> Result<()> {
    let own = link.file.siblings()?;
    let label = link.file.label();
    let snapshots = match own.neighbour(Neighbour::Snapshots) {
        Ok(store) => Some(store),
        // No such folder, or a file of that name: then no snapshots lie there.
        Err(e) if [ErrorKind::NotFound, ErrorKind::Os(libc::ENOTDIR)].contains(&e.kind()) => None,
        Err(e) => {
            return Err(e.within(format!(
                "{label}: its snapshots cannot be searched for; force=true writes anyway"
            )));
        }
    };
    for (store, folder) in [(Some(own), ""), (snapshots, "Snapshots/")] {
        let Some(store) = store else { continue };
        let found = neighbours::search(&*store, |image| {
            // By device and inode: the folder may hold other names of the same file, such as hard links.
            let is_own = [Some(&*link.file), except]
                .into_iter()
                .flatten()
                .any(|file| file.identity_at_open().file == image.file.identity_at_open().file);
            Ok(if is_own { None } else { way_of_naming(link, image) })
        });
        let found = found.map_err(|e| match e.kind() {
            ErrorKind::Policy => Error::new(e.kind(), format!("{label}: {e}; force=true writes without the search")),
            _ => e,
        });
        if let Some((name, way)) = found? {
            return Err(Error::new(
                ErrorKind::Policy,
                format!(
                    "{label}: {folder}{name} is a snapshot based on it ({way}): writing to a base destroys its snapshots; \
                     readonly=true reads it, cow=FILE writes to an overlay, force=true writes to the base anyway"
                ),
            ));
        }
    }
    Ok(())
}

/// Returns the name of an image that is a child of `link`, and how it names its parent. `None` if it is no child.
fn way_of_naming(link: &Link, image: &Image) -> Option<(ExtentName, String)> {
    let child = &image.descriptor;
    // First by UUID: a child that VirtualBox created has no parentCID, and would count as no child below.
    let uuid = neighbours::image_uuid(&link.descriptor);
    if let Some(uuid) = uuid.filter(|uuid| neighbours::names_parent(child, uuid)) {
        return Some((image.name.clone(), format!("ddb.uuid.parent {uuid}")));
    }
    let parent = child.parent.as_ref()?;
    let (Some(cid), Some(parent_cid)) = (link.descriptor.cid, parent.cid) else {
        // One of both has a CID that is no number: the name alone has to do.
        return names_disk(link, child).then(|| (image.name.clone(), "by its parentFileNameHint".to_owned()));
    };
    // After an interrupted commit the overlay's parentCID is the next CID already, and its mark has the old one. Both
    // make it a child of this disk.
    let before = child
        .ddb_value(COMMIT_MARK)
        .and_then(|mark| u32::from_str_radix(mark, 16).ok());
    if parent_cid != cid && before != Some(cid) {
        return None;
    }
    let is_child = cid != NEW_DISK_CID || names_disk(link, child);
    is_child.then(|| (image.name.clone(), format!("parentCID {cid:08x}")))
}

/// Returns true if the child's hint ends with a name of the disk's file: its own, or that by which the user named it (a
/// symbolic link may differ).
fn names_disk(link: &Link, child: &Descriptor) -> bool {
    let names = [link.file.own_name(), file_name(link.file.label()).to_owned()];
    let candidates = child.parent.iter().flat_map(|parent| parent.hint.candidates());
    candidates
        .map(|hint| hint.to_string())
        .any(|hint| names.iter().any(|name| name == file_name(&hint)))
}

/// Returns the last component of a label.
fn file_name(label: &str) -> &str {
    label.rsplit('/').next().unwrap_or(label)
}
