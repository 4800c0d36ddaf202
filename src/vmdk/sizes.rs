//! Sizes that contradict each other: of an extent in its line and in its header or file, and of the links of a chain.
//!
//! A wrong number must not show zeroes where a file has data. So each contradiction is either resolved towards the
//! number that the file itself proves, with a warning, or refused.

use crate::block::SECTOR;
use crate::error::{Error, Result};
use crate::vmdk::chain::{Link, PlacedExtent};
use crate::vmdk::descriptor::ExtentLine;
use crate::vmdk::extent::Extent;
use crate::vmdk::tables::{CHUNK, DirectoryEntry};

/// Compares the size of an extent in its line with its header or file. `sole` is true if the link has no other extent:
/// then a header with more sectors counts, as in other programs; with more extents a wrong size would shift those that
/// follow. Returns a warning.
///
/// A capacity that is larger by less than a grain is usual: some writers round it up.
///
/// Errors: `Corrupt` for a contradiction that cannot be resolved.
pub(super) fn agree(placed: &mut PlacedExtent, line: &ExtentLine, sole: bool) -> Result<Option<String>> {
    let given = line.sectors;
    let capacity = match &placed.extent {
        Extent::Zero | Extent::Lost(_) => return Ok(None),
        Extent::Flat { file, offset } => {
            let has = file.len() / SECTOR;
            // With an offset, or with further extents, what is left of the file may belong to another line. A device is
            // usually larger than its line says.
            let is_cut = sole && *offset == 0 && has > given && !file.is_device();
            return Ok(is_cut.then(|| {
                format!(
                    "line {}: the disk is the first {given} sectors of {}, which has {has}",
                    line.line,
                    file.label()
                )
            }));
        }
        Extent::Sparse(sparse) => {
            let geometry = sparse.geometry();
            if given <= geometry.capacity && geometry.capacity - given < geometry.grain {
                return Ok(None);
            }
            geometry.capacity
        }
    };
    let contradiction = format!(
        "line {} of the descriptor gives the extent {given} sectors, but its header has a capacity of {capacity}",
        line.line
    );
    if sole && given < capacity && has_sound_directory(&placed.extent)? {
        placed.sectors = capacity;
        return Ok(Some(format!("{contradiction}; the header counts")));
    }
    Err(Error::corrupt(format!(
        "{contradiction}; if the file is the right one, write {capacity} in that line"
    )))
}

/// Returns true if the directory of a sparse extent has no damaged entry for its whole capacity: then the capacity is
/// no damage of the header.
fn has_sound_directory(extent: &Extent) -> Result<bool> {
    let Extent::Sparse(sparse) = extent else {
        return Ok(true);
    };
    let tables = sparse.geometry().tables();
    for first in (0..tables).step_by(CHUNK as usize) {
        let entries = sparse.layout.load_directory(first..tables.min(first + CHUNK))?;
        if entries.iter().any(|entry| matches!(entry, DirectoryEntry::Bad)) {
            return Ok(false);
        }
    }
    Ok(true)
}

/// Compares the size of the oldest link with that of its child and, if it has one, of its parent. Adds a warning to the
/// child if it shows only a part of its parent, or zeroes after its end.
///
/// Errors: `Corrupt` if data of the parent lies where its descriptor ends, or if an older link has data there.
pub(super) fn compare(links: &mut [Link]) -> Result<()> {
    let [newer @ .., child, parent] = links else {
        return Ok(());
    };
    let refuse = |small: &Link, why: String| {
        Err(Error::corrupt(format!(
            "{}: has {} sectors, which is less than a snapshot of it has, but {why}: zeroes would hide data; correct the \
             number of sectors in its descriptor",
            small.file.label(),
            small.sectors
        )))
    };
    // The child may be smaller than a newer link: then its parent has data after its end, which that link would show.
    if parent.sectors > child.sectors && newer.iter().any(|link| link.sectors > child.sectors) {
        let why = format!("its parent {} has {}", parent.file.label(), parent.sectors);
        return refuse(child, why);
    }
    if parent.sectors < child.sectors
        && let [placed] = parent.extents.as_slice()
        && let Extent::Flat { file, offset } = &placed.extent
        && let has = (file.len() / SECTOR).saturating_sub(*offset)
        && has > parent.sectors
    {
        let why = format!("{} has {has}", file.label());
        return refuse(parent, why);
    }
    if parent.sectors != child.sectors {
        let (label, has, of) = (parent.file.label(), parent.sectors, child.sectors);
        child
            .warnings
            .push(format!("has {of} sectors, and its parent {label} {has}"));
    }
    Ok(())
}
