//! Room of a VMDK: what a write would newly allocate in the newest link, and allocating it ahead of writes.

use std::ops::Range;

use crate::block::{BlockRead, BlockWrite, Lba, SECTOR};
use crate::error::Result;
use crate::store::{AllocationUnit, RoomNeeded, writer};
use crate::vmdk::chain::PlacedExtent;
use crate::vmdk::disk::VmdkDisk;
use crate::vmdk::disk_write::read_only_extent;
use crate::vmdk::extent::{Extent, MappingKind, SparseExtent};
use crate::vmdk::write::ExtentWriter;

/// Maximum number of sectors that are read and written back at once, to allocate their grains: 1 MiB.
const STEP: u64 = 2048;

impl VmdkDisk {
    /// Adds the room that a write of `range` would take in the newest link. See [`BlockWrite::add_room`].
    pub(super) fn add_room_of(&self, range: Range<Lba>, zero: bool, needed: &mut RoomNeeded) -> Result<()> {
        self.each_extent(range, |placed, extent, start, sectors| {
            let within = start - placed.start;
            match (extent, &placed.extent) {
                (ExtentWriter::Grains(_), Extent::Sparse(sparse)) => {
                    // Zeroes over nothing need no grain. Over a parent they may need one: not every extent can mark a
                    // grain as zeroed.
                    let below = self.has_backing();
                    add_grains(placed, sparse, within..within + sectors, needed, |kind| match kind {
                        MappingKind::Data => false,
                        MappingKind::Zero => !zero,
                        MappingKind::Hole => !zero || below,
                    })
                }
                (ExtentWriter::Flat(_), Extent::Flat { .. }) if zero => Ok(()),
                (ExtentWriter::Flat(_), Extent::Flat { file, offset }) => {
                    needed.add_holes(file, (offset + within) * SECTOR..(offset + within + sectors) * SECTOR)
                }
                (_, Extent::Zero) if zero => Ok(()),
                _ => Err(read_only_extent(placed, start)),
            }
        })
    }

    /// Allocates `range` in the newest link. See [`BlockWrite::allocate`].
    pub(super) fn allocate_range(&self, range: Range<Lba>) -> Result<()> {
        self.each_extent(range, |placed, extent, start, sectors| {
            let within = start - placed.start;
            match (extent, &placed.extent) {
                (ExtentWriter::Grains(_), Extent::Sparse(_)) => self.allocate_grains(placed, start..start + sectors),
                (ExtentWriter::Flat(_), Extent::Flat { file, offset }) => {
                    writer(&**file)?.allocate((offset + within) * SECTOR, sectors * SECTOR)
                }
                _ => Err(read_only_extent(placed, start)),
            }
        })
    }

    /// Allocates grains by writing back what they show now. The caller excludes other writes of the range.
    fn allocate_grains(&self, placed: &PlacedExtent, range: Range<u64>) -> Result<()> {
        let mut buf = Vec::new();
        let mut at = range.start;
        while at < range.end {
            let (kind, sectors) = placed.extent.mapping_kind_at(at - placed.start, range.end - at)?;
            let sectors = sectors.max(1);
            if kind != MappingKind::Data {
                let sectors = sectors.min(STEP);
                buf.resize((sectors * SECTOR) as usize, 0);
                self.read_at(Lba(at), &mut buf)?;
                self.write_at(Lba(at), &buf)?;
                at += sectors;
            } else {
                at += sectors;
            }
        }
        Ok(())
    }

    /// Calls `each` for each extent that `range` overlaps, with the extent, its writer, the first sector of the disk in
    /// the overlap, and the number of its sectors.
    fn each_extent(
        &self,
        range: Range<Lba>,
        mut each: impl FnMut(&PlacedExtent, &ExtentWriter, u64, u64) -> Result<()>,
    ) -> Result<()> {
        let (writer, link) = self.writer_and_link()?;
        let first = link.extents.partition_point(|p| p.start + p.sectors <= range.start.0);
        for (placed, extent) in link.extents.iter().zip(&writer.extents).skip(first) {
            let (from, to) = (
                placed.start.max(range.start.0),
                (placed.start + placed.sectors).min(range.end.0),
            );
            // The extents are contiguous, so the first one after the range ends the search.
            if from >= to {
                break;
            }
            each(placed, extent, from, to - from)?;
        }
        Ok(())
    }
}

/// Adds the grains of `range`, in sectors of the extent, that have a mapping which `counts`, and their tables.
fn add_grains(
    placed: &PlacedExtent,
    sparse: &SparseExtent,
    range: Range<u64>,
    needed: &mut RoomNeeded,
    counts: impl Fn(MappingKind) -> bool,
) -> Result<()> {
    let geometry = sparse.geometry();
    let mut at = range.start;
    while at < range.end {
        let (kind, sectors) = placed.extent.mapping_kind_at(at, range.end - at)?;
        let next = (at + sectors.max(1)).min(range.end);
        if counts(kind) {
            let grains = at / geometry.grain..next.div_ceil(geometry.grain);
            let tables = grains.start / geometry.entries_per_table..grains.end.div_ceil(geometry.entries_per_table);
            needed.add_units(&sparse.file, AllocationUnit::Grain, grains, geometry.grain * SECTOR);
            for table in tables {
                let absent = sparse
                    .writable
                    .as_ref()
                    .is_some_and(|known| known.absent(table, table + 1) > 0);
                if absent {
                    // Both copies, rounded up to whole grains as the allocator does at worst.
                    let bytes = 2 * geometry.grain * SECTOR;
                    needed.add_units(&sparse.file, AllocationUnit::Table, table..table + 1, bytes);
                }
            }
        }
        at = next;
    }
    Ok(())
}
