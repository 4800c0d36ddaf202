//! The parent of a snapshot that was opened without it (`degraded=orphan`): every read fails.

use crate::block::{BlockRead, Content, Geometry, Lba};
use crate::error::{Error, Result};

/// Disk of a given size whose content is lost.
#[derive(Debug)]
pub(super) struct LostParent {
    /// Sectors of its child: what the parent had beyond them never shows.
    pub(super) sectors: u64,
    /// Reason why it could not be opened.
    pub(super) reason: Error,
}

impl BlockRead for LostParent {
    fn geometry(&self) -> Geometry {
        Geometry {
            sectors: self.sectors,
            granule: 1,
            preferred: 1,
        }
    }

    fn read_at(&self, at: Lba, buf: &mut [u8]) -> Result<()> {
        let context = format!("{at}, {} bytes: lie in the missing parent", buf.len());
        Err(self.reason.clone().within(context))
    }

    fn content_at(&self, at: Lba) -> Result<(Content, u64)> {
        // Data, so that no reader takes it for zeroes: the read fails then.
        Ok((Content::Data, self.sectors.saturating_sub(at.0).max(1)))
    }

    fn is_zero(&self, _at: Lba, _sectors: u64) -> bool {
        false
    }
}
