//! Flat extents, and what is lost of them where their file is too short.

use std::sync::Arc;

use crate::block::SECTOR;
use crate::error::{Error, Result};
use crate::store::StoredFile;
use crate::vmdk::chain::PlacedExtent;
use crate::vmdk::descriptor::ExtentLine;
use crate::vmdk::extent::Extent;

/// Creates a flat extent. All its sectors must lie in the file; with `accept_short` the extent ends where the file does.
pub(super) fn flat_extent(
    file: Arc<dyn StoredFile>,
    line: &ExtentLine,
    kind: &'static str,
    accept_short: bool,
) -> Result<PlacedExtent> {
    let inside = sectors_inside(&*file, line).min(line.sectors);
    if inside < line.sectors && !accept_short {
        return Err(lost_error(&*file, line, "degraded=short reads the rest"));
    }
    let offset = line.offset;
    Ok(PlacedExtent {
        sectors: inside,
        ..PlacedExtent::new(Extent::Flat { file, offset }, line, kind)
    })
}

/// Returns the sectors that a file has from the start of its flat extent on.
fn sectors_inside(file: &dyn StoredFile, line: &ExtentLine) -> u64 {
    // Rounded down: the extent needs whole sectors.
    (file.len() / SECTOR).saturating_sub(line.offset)
}

/// Returns the extent for the sectors of a flat line that its file does not have, and that the user accepts to lose.
pub(super) fn lost_end(found: &PlacedExtent, line: &ExtentLine) -> Option<PlacedExtent> {
    let Extent::Flat { file, .. } = &found.extent else {
        return None;
    };
    let sectors = line.sectors.checked_sub(found.sectors).filter(|&lost| lost > 0)?;
    let error = lost_error(&**file, line, "the missing part cannot be read").in_file(file.label());
    Some(PlacedExtent {
        sectors,
        ..PlacedExtent::new(Extent::Lost(error), line, found.kind)
    })
}

/// Returns the error for a file that ends before its flat extent does.
fn lost_error(file: &dyn StoredFile, line: &ExtentLine, end: &str) -> Error {
    let inside = sectors_inside(file, line);
    let way_on = if inside == 0 {
        "copy the whole file again".to_owned()
    } else {
        format!(
            "copy the whole file again; if it is complete, write {inside} instead of {} in line {} of the descriptor, or \
             name the file itself with format=raw",
            line.sectors, line.line
        )
    };
    let text = format!(
        "has {} bytes, expected at least {} (the extent's {} sectors from sector {} on); {way_on}; {end}",
        file.len(),
        line.offset.saturating_add(line.sectors).saturating_mul(SECTOR),
        line.sectors,
        line.offset
    );
    Error::corrupt(text).in_file(file.label())
}

/// Creates the extent of a device of an ESX host. On the host its file is a pointer; a copy of the file has the device's
/// data, or its size and no data.
pub(super) fn device_copy(file: Arc<dyn StoredFile>, line: &ExtentLine) -> Result<PlacedExtent> {
    let bytes = line.sectors.saturating_mul(SECTOR);
    // A pointer that was copied with the size of its device has no data: one hole from start to end.
    let is_stored = || file.data_at(0).map(|(stored, bytes)| stored || bytes < file.len());
    if file.len() == bytes && is_stored()? {
        return flat_extent(file, line, line.kind.as_str(), false);
    }
    Err(Error::unsupported(format!(
        "{}: is an RDM pointer without data ({} bytes, of which {} are stored, expected {bytes}): it maps a device of an \
         ESX host; read the LUN itself, or copy it on the host with vmkfstools -i",
        file.label(),
        file.len(),
        file.allocated()?
    )))
}
