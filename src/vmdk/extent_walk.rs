//! Walk over all runs of a disk, from its first sector to its last.
//!
//! A read needs a few runs and uses the cache of tables. A walk reads every table of every link once, as fast as they
//! can be read (some 20 million grains a second), and leaves the cache to the readers.

use std::num::NonZeroU64;
use std::ops::ControlFlow;

use crate::block::{BlockRead, RunFile, RunPlace, Runs};
use crate::error::{Error, Result};
use crate::vmdk::disk::{VmdkDisk, file_of};
use crate::vmdk::extent::{Run, TableCursor};
use crate::vmdk::open::{Link, PlacedExtent};

/// Position of a walk in one link.
#[derive(Debug, Default)]
struct LinkCursor {
    /// For each extent of the link the number of its file in [`Runs::files`]. An extent without a file has the number
    /// of the next file; it is not used.
    files: Vec<usize>,
    /// Sector before which the link is known to hold nothing, so that it is not queried again for each run of a link
    /// below.
    nothing_before: u64,
    table: TableCursor,
}

impl Runs for VmdkDisk {
    fn files(&self) -> Vec<RunFile<'_>> {
        let extents = self.links().iter().flat_map(|l| &l.extents);
        let files = extents.filter_map(|placed| file_of(&placed.extent));
        // A device gets no descriptor: a change of it can't be detected.
        files
            .map(|file| RunFile {
                len: file.len(),
                fd: file.fd().filter(|_| file.detects_modification()),
            })
            .collect()
    }

    fn walk(&self, each: &mut dyn FnMut(NonZeroU64, RunPlace) -> ControlFlow<()>) -> Result<()> {
        let end = self.geometry().sectors;
        let mut next_file = 0;
        let mut number = |placed: &PlacedExtent| {
            let number = next_file;
            next_file += usize::from(file_of(&placed.extent).is_some());
            number
        };
        let cursor = |l: &Link| LinkCursor {
            files: l.extents.iter().map(&mut number).collect(),
            ..LinkCursor::default()
        };
        let mut cursors: Vec<LinkCursor> = self.links().iter().map(cursor).collect();
        let mut at = 0;
        while at < end {
            let (place, sectors) = next(self.links(), at, end - at, &mut cursors)?;
            let Some(run) = NonZeroU64::new(sectors.min(end - at)) else {
                return Err(Error::corrupt(format!("an empty run at sector {at}")));
            };
            if each(run, place).is_break() {
                break;
            }
            at += run.get();
        }
        Ok(())
    }
}

/// Returns the run at `at`, of at most `max` sectors, from the newest link that holds it.
fn next(links: &[Link], at: u64, max: u64, cursors: &mut [LinkCursor]) -> Result<(RunPlace, u64)> {
    let mut left = max;
    for (link, cursor) in links.iter().zip(cursors) {
        if at < cursor.nothing_before {
            left = left.min(cursor.nothing_before - at);
            continue;
        }
        let Some(number) = link.extents.partition_point(|p| p.start <= at).checked_sub(1) else {
            break;
        };
        let Some(placed) = link.extents.get(number) else { break };
        let within = at - placed.start;
        if within >= placed.sectors {
            break;
        }
        match placed
            .extent
            .run_at_cursor(within, left.min(placed.sectors - within), &mut cursor.table)?
        {
            Run::Parent { sectors } => {
                left = sectors;
                cursor.nothing_before = at + sectors;
            }
            Run::Stored { sector, sectors, .. } => {
                let file = cursor.files.get(number).copied().unwrap_or(usize::MAX);
                return Ok((RunPlace::Stored { file, sector }, sectors));
            }
            Run::Zero { sectors } => return Ok((RunPlace::Zero, sectors)),
            Run::Deflate { grain, .. } => {
                return Err(Error::unsupported(format!(
                    "{}: has compressed grains, which are not stored as they are read",
                    grain.file.label()
                )));
            }
        }
    }
    Ok((RunPlace::Zero, left))
}
