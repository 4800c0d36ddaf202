//! The current opens of a disk inode, and how the kernel has it.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use fuser::BackingId;

use crate::fuse::open_plan::{Backing, OpenMode};
use crate::volume::Volume;
use crate::write_latch::ErrorCursor;

/// For how long after a change of the image no open may keep the kernel's pages: another open that saw the old pages
/// may still be about to drop them.
const DROP_PAGES_FOR: Duration = Duration::from_secs(1);

/// The current opens, and how they are served.
///
/// The kernel has an inode in one mode at a time: either with pages of its own, or with a backing file that is the same
/// for all opens. It answers EIO to an open that does not fit.
#[derive(Debug, Default)]
pub(super) struct OpenState {
    /// The file that the kernel reads itself, and the volume that it belongs to. Dropped with the last passthrough
    /// open.
    backing: Option<(BackingId, Arc<Volume>)>,
    /// Number of opens that use `backing`.
    passthrough_opens: u64,
    /// Number of opens with cached pages.
    cached_opens: u64,
    /// Time at which the volume was last replaced, or its cached pages became stale.
    replaced: Option<Instant>,
    /// The kernel may have written to the backing file, which does not update the cached pages of the inode.
    pages_are_stale: bool,
    /// For each open for writing, by its number, which errors of the volume it has reported.
    cursors: HashMap<u64, Arc<ErrorCursor>>,
    /// Number of the last open for writing.
    last_writer: u64,
}

impl OpenState {
    /// Records that the volume was replaced.
    pub(super) fn volume_replaced(&mut self) {
        self.replaced = Some(Instant::now());
    }

    /// Records an open for writing, and returns its number.
    pub(super) fn writer_opened(&mut self, cursor: ErrorCursor) -> u64 {
        self.last_writer += 1;
        self.cursors.insert(self.last_writer, Arc::new(cursor));
        self.last_writer
    }

    /// Records the end of an open for writing. Has no effect for the number 0, which others have.
    pub(super) fn writer_released(&mut self, number: u64) {
        self.cursors.remove(&number);
    }

    /// Returns which errors an open for writing has reported; `None` for another open.
    pub(super) fn error_cursor(&self, number: u64) -> Option<Arc<ErrorCursor>> {
        self.cursors.get(&number).map(Arc::clone)
    }

    /// Returns what is known of the backing file for an open of `volume`; [`Backing::Possible`] if the kernel has none.
    pub(super) fn backing(&self, volume: &Arc<Volume>) -> Backing {
        match &self.backing {
            Some((_, of)) => Backing::Held {
                // A cached file in which damage was found has none: the daemon compares its blocks with their checksums.
                current: volume.disk().backing_fd().is_some() && same_file(of, volume),
            },
            None => Backing::Possible,
        }
    }

    /// Returns the ID of the backing file.
    pub(super) fn backing_id(&self) -> Option<&BackingId> {
        self.backing.as_ref().map(|(id, _)| id)
    }

    /// Sets the backing file that the kernel has accepted.
    pub(super) fn set_backing(&mut self, id: BackingId, volume: Arc<Volume>) {
        self.backing = Some((id, volume));
    }

    /// Returns true if the kernel has a backing file of `volume`, which keeps it open.
    pub(super) fn keeps(&self, volume: &Arc<Volume>) -> bool {
        self.backing.as_ref().is_some_and(|(_, of)| Arc::ptr_eq(of, volume))
    }

    /// Returns true if the kernel has pages of the inode in use, which excludes a backing file.
    pub(super) fn has_cached_opens(&self) -> bool {
        self.cached_opens > 0
    }

    /// Returns true if an open may use the pages that the kernel has.
    pub(super) fn pages_are_current(&self) -> bool {
        !self.pages_are_stale && self.replaced.is_none_or(|at| at.elapsed() > DROP_PAGES_FOR)
    }

    /// Counts an open of a mode. `kernel_writes`: the kernel changes the backing file from now on, without a request that
    /// would tell the daemon.
    pub(super) fn opened(&mut self, mode: OpenMode, kernel_writes: bool) {
        match mode {
            OpenMode::Passthrough => {
                self.passthrough_opens += 1;
                self.pages_are_stale |= kernel_writes;
            }
            OpenMode::Cached => {
                self.cached_opens += 1;
                // This open drops the stale pages. Another one that is answered meanwhile must not keep them.
                if std::mem::take(&mut self.pages_are_stale) {
                    self.replaced = Some(Instant::now());
                }
            }
            OpenMode::Direct | OpenMode::DirectBesideView => {}
        }
    }

    /// Counts the end of an open.
    pub(super) fn released(&mut self, mode: OpenMode) {
        match mode {
            OpenMode::Passthrough => {
                self.passthrough_opens = self.passthrough_opens.saturating_sub(1);
                // Dropping the backing ID lets the next open start in the other mode.
                if self.passthrough_opens == 0 {
                    self.backing = None;
                }
            }
            OpenMode::Cached => self.cached_opens = self.cached_opens.saturating_sub(1),
            OpenMode::Direct | OpenMode::DirectBesideView => {}
        }
    }
}

/// Returns true if both volumes have the same backing file, by device and inode.
fn same_file(a: &Arc<Volume>, b: &Arc<Volume>) -> bool {
    let file = |volume: &Arc<Volume>| {
        let stat = nix::sys::stat::fstat(volume.disk().backing_fd()?).ok()?;
        Some((stat.st_dev, stat.st_ino))
    };
    Arc::ptr_eq(a, b) || (file(a).is_some() && file(a) == file(b))
}
