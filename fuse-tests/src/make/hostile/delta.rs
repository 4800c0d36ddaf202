//! COWD and seSparse deltas with wrong headers or tables.

use std::sync::Arc;

use anyhow::Result;

use super::{Bad, Hostile};
use crate::make::ctx::{BASE_CID, Ctx};
use crate::make::model::{Layer, SECTOR};
use crate::make::valid::sesparse_disk;
use crate::make::write::{self, Descriptor, FileLayout, SeSparse, se_entry};

/// Bytes that one COWD table covers, with grains of one sector.
const COWD_TABLE: u64 = 4096 * SECTOR;
/// Bytes of the seSparse disk; one table covers all of it.
const SE_DISK: u64 = 16_384 * SECTOR;
/// Bytes of a seSparse grain.
const SE_GRAIN: u64 = 8 * SECTOR;

pub(super) const FILES: &[Hostile] = &[
    Hostile::reject("cowd_gd_huge", "COWD: numGDEntries 0xffffffff", |c| {
        cowd_field(c, 24, u32::MAX)
    }),
    Hostile::reject("cowd_gd_short", "COWD: numGDEntries is 1, the capacity needs 5", |c| {
        cowd_field(c, 24, 1)
    }),
    Hostile::reject("cowd_grain_zero", "COWD: grainSize 0", |c| cowd_field(c, 16, 0)),
    Hostile::reject("cowd_version", "COWD: version 2", |c| cowd_field(c, 4, 2)),
    Hostile::eio(
        "cowd_gde_past_end",
        "COWD: a directory entry points past the end of the file",
        Some(0..COWD_TABLE),
        |c| {
            let (bad, layer, at) = cowd(c)?;
            poke_cowd(c, at.gd * SECTOR, 0x00ff_ffff)?;
            Ok(Bad::holding(bad.open, Arc::new(layer)))
        },
    ),
    Hostile::eio(
        "cowd_gte_past_end",
        "COWD: a table entry points past the end of the file",
        Some(50 * SECTOR..51 * SECTOR),
        |c| {
            let (bad, layer, at) = cowd(c)?;
            poke_cowd(c, at.tables[&0] * SECTOR + 4 * 50, 0x7fff_ffff)?;
            Ok(Bad::holding(bad.open, Arc::new(layer)))
        },
    ),
    Hostile::warn(
        "cowd_gte_one",
        "COWD: table entry 1; inside the header, so it can only mean a zeroed grain (xen-orchestra, dissect); qemu reads header sector 1",
        |c| {
            let (bad, layer, at) = cowd(c)?;
            poke_cowd(c, at.tables[&0] * SECTOR + 4 * 50, 1)?;
            Ok(Bad::holding(bad.open, Arc::new(layer.zero([50]))))
        },
    ),
    Hostile::reject("se_version", "seSparse: version 3.0", |c| se_field(c, 8, 0x3_0000_0000)),
    Hostile::reject("se_dirty", "seSparse: the journal must be replayed", |c| {
        se_field(c, 512 + 24, 1)
    }),
    Hostile::reject(
        "se_volatile_magic",
        "seSparse: wrong magic in the volatile header",
        |c| se_field(c, 512, 0xcafe_babe),
    ),
    Hostile::reject("se_grain_size", "seSparse: grain size 0", |c| se_field(c, 24, 0)),
    Hostile::reject("se_table_size", "seSparse: grain table size 2^40", |c| {
        se_field(c, 32, 1 << 40)
    }),
    Hostile::reject("se_gd_size", "seSparse: grain directory size 2^60", |c| {
        se_field(c, 136, 1 << 60)
    }),
    Hostile::reject(
        "se_gd_short",
        "seSparse: capacity 2^40 sectors, directory for 64 GiB",
        |c| se_field(c, 16, 1 << 40),
    ),
    Hostile::eio(
        "se_gde_range",
        "seSparse: directory entry with a table index out of range",
        Some(0..SE_DISK),
        |c| se_damaged(c, |at| at.gd, 1 << 60 | 0xff_ffff),
    ),
    Hostile::eio(
        "se_gde_type",
        "seSparse: directory entry of type 5",
        Some(0..SE_DISK),
        |c| se_damaged(c, |at| at.gd, 5 << 60),
    ),
    Hostile::eio(
        "se_gte_type",
        "seSparse: grain entry of type 4",
        Some(0..SE_GRAIN),
        |c| se_damaged(c, |at| at.tables[&0], 4 << 60 | 1),
    ),
    Hostile::eio(
        "se_gte_range",
        "seSparse: grain index past the end of the file",
        Some(0..SE_GRAIN),
        |c| se_damaged(c, |at| at.tables[&0], se_entry(3, 1 << 40)),
    ),
    Hostile::eio(
        "se_gte_overflow",
        "seSparse: grain index with all bits set, the offset passes 2^64",
        Some(0..SE_GRAIN),
        |c| se_damaged(c, |at| at.tables[&0], se_entry(3, (1 << 60) - 1)),
    ),
];

/// Writes a valid COWD delta over a flat base; the caller damages "disk-delta.vmdk".
fn cowd(c: &Ctx) -> Result<(Bad, Layer, FileLayout)> {
    let layer = c
        .layer("delta", 20_000, 1)
        .over(c.base(20_000)?)
        .write(7, 3)
        .write(19_999, 1);
    let at = write::cowd(&c.at("disk-delta.vmdk"), &layer)?;
    let text = Descriptor::new("vmfsSparse", ["RW 20000 VMFSSPARSE \"disk-delta.vmdk\""]);
    let open = c.text("disk.vmdk", &text.child(2, BASE_CID, "base.vmdk"))?;
    Ok((Bad::new(open), layer, at))
}

fn poke_cowd(c: &Ctx, offset: u64, value: u32) -> Result<()> {
    write::poke(&c.at("disk-delta.vmdk"), offset, &value.to_le_bytes())
}

/// Writes a COWD delta with a field of its header replaced.
fn cowd_field(c: &Ctx, offset: u64, value: u32) -> Result<Bad> {
    let (bad, ..) = cowd(c)?;
    poke_cowd(c, offset, value)?;
    Ok(bad)
}

/// Writes a seSparse delta over a flat base with 64 bits of one of its headers replaced.
fn se_field(c: &Ctx, offset: u64, value: u64) -> Result<Bad> {
    let (open, _) = sesparse_disk(c, &se_layer(c)?, &SeSparse::default())?;
    poke_se(c, offset, value)?;
    Ok(Bad::new(open))
}

/// Writes a seSparse delta with the first entry of the directory or of a table replaced.
fn se_damaged(c: &Ctx, table: fn(&FileLayout) -> u64, value: u64) -> Result<Bad> {
    let layer = se_layer(c)?;
    let (open, at) = sesparse_disk(c, &layer, &SeSparse::default())?;
    poke_se(c, table(&at) * SECTOR, value)?;
    Ok(Bad::holding(open, Arc::new(layer)))
}

fn poke_se(c: &Ctx, offset: u64, value: u64) -> Result<()> {
    write::poke(&c.at("disk-000001-sesparse.vmdk"), offset, &value.to_le_bytes())
}

fn se_layer(c: &Ctx) -> Result<Layer> {
    Ok(c.layer("se", 16_384, 8).over(c.base(16_384)?).write(9, 2))
}
