//! Room that writes would take: the bytes that files would newly occupy, compared with what their file systems have free.

use std::collections::HashMap;
use std::io;
use std::ops::Range;
use std::sync::Arc;

use nix::sys::stat::fstat;
use nix::sys::statvfs::fstatvfs;

use super::StoredFile;
use crate::error::{Error, Result};

/// Bytes that a file system may take for its own records of what is written.
const SLACK: u64 = 256 << 10;

/// Unit in which an image allocates. Each unit counts once, however many ranges lie in it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) enum AllocationUnit {
    /// A grain of a sparse extent.
    Grain,
    /// A grain table.
    Table,
}

/// Room that writes to some ranges of a disk would take, of ranges in rising order.
#[derive(Debug, Default)]
pub struct RoomNeeded {
    /// Bytes for each file, by device and inode.
    files: HashMap<(u64, u64), (Arc<dyn StoredFile>, u64)>,
    /// Number of the first unit that has not been counted.
    counted: HashMap<((u64, u64), AllocationUnit), u64>,
}

impl RoomNeeded {
    /// Adds bytes of `file`.
    pub(crate) fn add(&mut self, file: &Arc<dyn StoredFile>, bytes: u64) {
        let of_file = self.files.entry(file.identity_at_open().file);
        let (_, sum) = of_file.or_insert_with(|| (Arc::clone(file), 0));
        *sum = sum.saturating_add(bytes);
    }

    /// Adds whole units of `file`, each of `bytes`, that have not been counted yet.
    pub(crate) fn add_units(
        &mut self,
        file: &Arc<dyn StoredFile>,
        unit: AllocationUnit,
        numbers: Range<u64>,
        bytes: u64,
    ) {
        let counted = self.counted.entry((file.identity_at_open().file, unit)).or_default();
        // Ranges come in rising order, so one number tells what was counted: a unit that two ranges share counts once.
        let first = numbers.start.max(*counted);
        *counted = numbers.end.max(*counted);
        let new = numbers.end.saturating_sub(first);
        if new > 0 {
            self.add(file, new.saturating_mul(bytes));
        }
    }

    /// Adds the holes of a range of bytes of `file`.
    pub(crate) fn add_holes(&mut self, file: &Arc<dyn StoredFile>, range: Range<u64>) -> Result<()> {
        let mut at = range.start;
        while at < range.end {
            let (stored, bytes) = file.data_at(at)?;
            let bytes = bytes.clamp(1, range.end - at);
            if !stored {
                self.add(file, bytes);
            }
            at += bytes;
        }
        Ok(())
    }

    /// Checks that the file systems have the room.
    ///
    /// Errors: `Os(ENOSPC)` with both numbers.
    pub fn check(&self) -> Result<()> {
        let mut devices: HashMap<u64, (&Arc<dyn StoredFile>, u64)> = HashMap::new();
        for (file, bytes) in self.files.values() {
            // Files without a descriptor take no room on this machine.
            let Some(stat) = file.fd().and_then(|fd| fstat(fd).ok()) else {
                continue;
            };
            let (_, sum) = devices.entry(stat.st_dev).or_insert((file, 0));
            *sum = sum.saturating_add(*bytes);
        }
        for (file, bytes) in devices.into_values().filter(|(_, bytes)| *bytes > 0) {
            let Some(free) = file.fd().and_then(|fd| fstatvfs(fd).ok()) else {
                continue;
            };
            // A file system that tells no sizes, as many FUSE file systems.
            if free.blocks() == 0 {
                continue;
            }
            // Most file systems reserve a part for root.
            let blocks = if nix::unistd::geteuid().is_root() {
                free.blocks_free()
            } else {
                free.blocks_available()
            };
            let free = blocks.saturating_mul(free.fragment_size());
            if free < bytes.saturating_add(SLACK) {
                let context = format!(
                    "{}: needs {bytes} bytes more on its file system, which has {free} bytes free",
                    file.label()
                );
                return Err(Error::io(context, io::Error::from_raw_os_error(libc::ENOSPC)));
            }
        }
        Ok(())
    }
}
