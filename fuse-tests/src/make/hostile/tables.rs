//! Hosted sparse files with wrong directories, tables or lengths.

use std::sync::Arc;

use anyhow::Result;

use super::{Bad, Hostile};
use crate::make::ctx::{Ctx, Good};
use crate::make::model::{Content, SECTOR};
use crate::make::write::{self, Hosted};

/// Grain size in bytes of the disks that are damaged here.
const GRAIN: u64 = 128 * SECTOR;
/// Size in bytes of those disks; one table covers the whole disk.
const DISK: u64 = 8192 * SECTOR;

pub(super) const FILES: &[Hostile] = &[
    Hostile::eio(
        "gde_past_end",
        "a directory entry points past the end of the file (both copies)",
        Some(0..DISK),
        |c| directory_entry(c, 0x00ff_ffff),
    ),
    Hostile::eio(
        "gde_to_header",
        "a directory entry points at the file header, which would be read as a table (both copies)",
        Some(0..DISK),
        |c| directory_entry(c, 1),
    ),
    Hostile::eio(
        "gte_past_end",
        "a grain entry points past the end of the file",
        Some(0..GRAIN),
        |c| {
            let good = grain_entry(c, 0, |_| 0x7fff_ff80)?;
            Ok(good.into())
        },
    ),
    Hostile::eio(
        "gte_into_metadata",
        "a grain entry points into the metadata (the table itself)",
        Some(0..GRAIN),
        |c| {
            let good = grain_entry(c, 0, |good| good.at.tables[&0])?;
            Ok(good.into())
        },
    ),
    Hostile::warn(
        "gte_shared",
        "two entries share one grain: a write to one would change the other",
        |c| {
            let good = grain_entry(c, 9, |good| good.at.grains[&0])?;
            let data = good.layer.read(0, 128);
            Ok(Bad::holding(good.path, Arc::new(good.layer.with_grain(9, data))))
        },
    ),
    Hostile::warn(
        "gte_overlap",
        "a grain entry is not aligned and overlaps its neighbour: never write in place",
        |c| {
            let good = grain_entry(c, 9, |good| good.at.grains[&0] + 1)?;
            // Grain 1 follows grain 0 in the file, as on the disk.
            let data = good.layer.read(1, 128);
            Ok(Bad::holding(good.path, Arc::new(good.layer.with_grain(9, data))))
        },
    ),
    Hostile::eio(
        "gte_one_without_flag",
        "grain entry 1 in a version 1 extent without flag bit 2",
        Some(0..GRAIN),
        |c| Ok(grain_entry(c, 0, |_| 1)?.into()),
    ),
    Hostile::warn(
        "gd_rgd_disagree",
        "directory and redundant directory are valid but disagree (the primary one counts)",
        |c| {
            let good = c.simple()?;
            let other = (good.at.grains[&5] as u32).to_le_bytes();
            write::poke(&good.path, good.at.rtables[&0] * SECTOR, &other)?;
            Ok(good.into())
        },
    ),
    Hostile::warn(
        "rgd_zero",
        "redundant directory entries are 0: a writer that trusts them overwrites the header",
        |c| {
            let good = c.simple()?;
            write::poke(&good.path, good.at.rgd * SECTOR, &[0; 4])?;
            Ok(good.into())
        },
    ),
    Hostile::reject(
        "cut_in_directory",
        "the file is truncated inside the grain directory",
        |c| {
            let good = c.simple_of(2_000_000, 128, &[0], &Hosted::default())?;
            write::truncate(&good.path, good.at.rgd * SECTOR + 10)?;
            Ok(Bad::new(good.path))
        },
    ),
    Hostile::eio(
        "cut_in_grain",
        "the file is truncated inside a grain, the last of the disk",
        Some(DISK - GRAIN..DISK),
        |c| {
            let good = in_order(c)?;
            write::truncate(&good.path, good.at.grains[&63] * SECTOR + 1000)?;
            Ok(good.into())
        },
    ),
    Hostile::reject("cut_header", "100 bytes of a valid header", |c| {
        let good = c.simple()?;
        write::truncate(&good.path, 100)?;
        Ok(Bad::new(good.path))
    }),
    Hostile::reject("empty", "an empty file", |c| {
        Ok(Bad::new(write::put(c.at("disk.vmdk"), b"")?))
    }),
];

/// Writes a valid file with its grains in order.
fn in_order(c: &Ctx) -> Result<Good> {
    c.simple_of(
        8192,
        128,
        &[0, 1, 5, 63],
        &Hosted {
            shuffle: false,
            ..Hosted::default()
        },
    )
}

/// Writes a valid file and replaces its directory entry in both copies.
fn directory_entry(c: &Ctx, entry: u32) -> Result<Bad> {
    let good = c.simple()?;
    for directory in [good.at.gd, good.at.rgd] {
        write::poke(&good.path, directory * SECTOR, &entry.to_le_bytes())?;
    }
    Ok(Bad::new(good.path))
}

/// Writes a valid file and replaces one grain entry in both tables.
fn grain_entry(c: &Ctx, number: u64, value: impl FnOnce(&Good) -> u64) -> Result<Good> {
    let good = in_order(c)?;
    let bytes = u32::try_from(value(&good))?.to_le_bytes();
    for tables in [&good.at.tables, &good.at.rtables] {
        write::poke(&good.path, tables[&0] * SECTOR + number * 4, &bytes)?;
    }
    Ok(good)
}
