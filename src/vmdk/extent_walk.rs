//! Walk over all runs of a disk, from its first sector to its last.
//!
//! A read needs a few runs and uses the cache of tables. A walk reads every table of every link once, as fast as they
//! can be read (some 20 million grains a second), and leaves the cache to the readers.

use std::num::NonZeroU64;
use std::ops::ControlFlow;

use crate::block::{BlockRead, Lba, RunFile, RunPlace, Runs};
use crate::error::{Error, Result};
use crate::vmdk::chain::{ChainCursor, ChainMapping, Link, PlacedExtent};
use crate::vmdk::disk::VmdkDisk;
use crate::vmdk::extent::Mapping;

impl Runs for VmdkDisk {
    fn files(&self) -> Vec<RunFile<'_>> {
        let extents = self.links().iter().flat_map(|l| &l.extents);
        let files = extents.filter_map(|placed| placed.extent.file());
        // A device gets no descriptor: a change of it can't be detected.
        files
            .map(|file| RunFile {
                len: file.len(),
                fd: file.content_fd().filter(|_| file.detects_modification()),
            })
            .collect()
    }

    fn walk(&self, each: &mut dyn FnMut(NonZeroU64, RunPlace) -> ControlFlow<()>) -> Result<()> {
        // The base of an overlay has no runs here: `runs` offers none for such a disk.
        let end = self.geometry().sectors;
        let numbers = file_numbers(self.links());
        let mut cursor = ChainCursor::walk(self.links());
        let mut at = 0;
        while at < end {
            let found = cursor.map(Lba(at), end - at)?;
            let Some(run) = NonZeroU64::new(found.mapping.sectors().min(end - at)) else {
                return Err(Error::corrupt(format!("an empty run at sector {at}")));
            };
            if each(run, place(&found, &numbers)?).is_break() {
                break;
            }
            at += run.get();
        }
        Ok(())
    }
}

/// Returns for each extent of each link the number of its file in [`Runs::files`]. An extent without a file has the
/// number of the next file; it is not used.
fn file_numbers(links: &[Link]) -> Vec<Vec<usize>> {
    let mut next_file = 0;
    let mut number = |placed: &PlacedExtent| {
        let number = next_file;
        next_file += usize::from(placed.extent.file().is_some());
        number
    };
    links
        .iter()
        .map(|l| l.extents.iter().map(&mut number).collect())
        .collect()
}

/// Converts a mapping to the place that the kernel view uses.
///
/// Errors: `Unsupported` for a compressed grain.
fn place(found: &ChainMapping<'_>, numbers: &[Vec<usize>]) -> Result<RunPlace> {
    match &found.mapping {
        Mapping::Stored { sector, .. } => {
            let number = found
                .extent
                .and_then(|(link, extent)| numbers.get(link)?.get(extent).copied());
            Ok(RunPlace::Stored {
                // A number that no file has: the index refuses it.
                file: number.unwrap_or(usize::MAX),
                sector: *sector,
            })
        }
        Mapping::Zero { .. } | Mapping::Hole { .. } => Ok(RunPlace::Zero),
        Mapping::Compressed { grain, .. } => Err(Error::unsupported(format!(
            "{}: has compressed grains, which are not stored as they are read",
            grain.file.label()
        ))),
    }
}
