//! Disks of several extents, and flat disks.

use std::sync::Arc;

use anyhow::Result;

use super::Variant;
use crate::make::ctx::{Ctx, Made};
use crate::make::model::{Joined, Layer};
use crate::make::write::{self, Descriptor, Hosted};

pub(super) const VARIANTS: &[Variant] = &[
    Variant::new(
        "split_zero",
        "custom: SPARSE, ZERO gap, FLAT with offset, ZERO, SPARSE; qemu drops the ZERO extents",
        zero,
    ),
    Variant::new(
        "split_unaligned",
        "twoGbMaxExtentSparse with extents that are not multiples of the grain: grain numbers restart in each extent",
        unaligned,
    ),
    Variant::new(
        "split_access",
        "extents with RDONLY and NOACCESS: RDONLY is readable, NOACCESS reads as zero (or fails); qemu drops both",
        access,
    ),
    Variant::new(
        "partitioned",
        "partitionedDevice over ordinary files: partition table file, part of a raw file, hidden rest",
        partitioned,
    ),
    Variant::new(
        "split_flat",
        "twoGbMaxExtentFlat with three extents, one of them with an offset",
        split_flat,
    ),
    Variant::new("vmfs_flat", "vmfs: one VMFS extent without an offset", |c| {
        let layer = c.base(8192)?;
        Ok(Made::new(c.at("base.vmdk"), layer))
    }),
    Variant::new("monolithic_flat", "monolithicFlat", |c| {
        let layer = c.flat_base("disk", 8192)?;
        Ok(Made::new(c.at("disk.vmdk"), layer))
    }),
    Variant::new(
        "custom_500",
        "custom with 500 small extents of four kinds in turn: sparse, flat, zero, flat at an offset in a shared file",
        custom_500,
    ),
    Variant::new("raw_image", "a raw image whose first bytes are not a VMDK", |c| {
        let layer = c.layer("raw", 5001, 8).fill([0, 17, 625]);
        write::flat(&c.at("disk.img"), &layer, 0)?;
        Ok(Made::new(c.at("disk.img"), Arc::new(layer)))
    }),
];

fn zero(c: &Ctx) -> Result<Made> {
    let a = c.layer("a", 4096, 128).fill([0, 31]);
    let b = c.layer("b", 1000, 8).fill([0, 124]);
    let d = c.layer("d", 2048, 128).fill([5]);
    bare_sparse(c, "disk-s001.vmdk", &a)?;
    write::flat(&c.at("disk-f002.vmdk"), &b, 77)?;
    bare_sparse(c, "disk-s003.vmdk", &d)?;
    let lines = [
        "RW 4096 SPARSE \"disk-s001.vmdk\"",
        "RW 3000 ZERO",
        "RW 1000 FLAT \"disk-f002.vmdk\" 77",
        "RW 63 ZERO",
        "RW 2048 SPARSE \"disk-s003.vmdk\"",
    ];
    let disk = Joined::new()
        .then(Arc::new(a))
        .then_zero(3000)
        .then(Arc::new(b))
        .then_zero(63)
        .then(Arc::new(d));
    Ok(Made::new(
        c.text("disk.vmdk", &Descriptor::new("custom", lines))?,
        Arc::new(disk),
    ))
}

fn unaligned(c: &Ctx) -> Result<Made> {
    let (mut disk, mut lines) = (Joined::new(), Vec::new());
    for (sectors, i) in [1000_u64, 63, 4193, 129].into_iter().zip(1..) {
        let layer = c.layer(&format!("p{i}"), sectors, 128).fill([0, (sectors - 1) / 128]);
        let name = format!("disk-s{i:03}.vmdk");
        bare_sparse(c, &name, &layer)?;
        disk = disk.then(Arc::new(layer));
        lines.push(format!("RW {sectors} SPARSE \"{name}\""));
    }
    Ok(Made::new(
        c.text("disk.vmdk", &Descriptor::new("twoGbMaxExtentSparse", lines))?,
        Arc::new(disk),
    ))
}

fn access(c: &Ctx) -> Result<Made> {
    let a = c.layer("a", 2048, 128).fill([0, 15]);
    let b = c.layer("b", 2048, 128).fill([3]);
    bare_sparse(c, "disk-s001.vmdk", &a)?;
    bare_sparse(c, "disk-s003.vmdk", &b)?;
    let lines = [
        "RW 2048 SPARSE \"disk-s001.vmdk\"",
        "NOACCESS 512 ZERO",
        "RDONLY 2048 SPARSE \"disk-s003.vmdk\"",
    ];
    let disk = Joined::new().then(Arc::new(a)).then_zero(512).then(Arc::new(b));
    Ok(Made::new(
        c.text("disk.vmdk", &Descriptor::new("twoGbMaxExtentSparse", lines))?,
        Arc::new(disk),
    ))
}

fn partitioned(c: &Ctx) -> Result<Made> {
    let table = c.layer("pt", 63, 1).fill([0, 62]);
    let raw = c.layer("raw", 5000, 8).fill([0, 624]);
    write::flat(&c.at("disk-pt.vmdk"), &table, 0)?;
    write::flat(&c.at("raw.img"), &raw, 63)?;
    let lines = [
        "RW 63 FLAT \"disk-pt.vmdk\" 0",
        "RW 5000 FLAT \"raw.img\" 63",
        "RW 2168 ZERO",
    ];
    let disk = Joined::new().then(Arc::new(table)).then(Arc::new(raw)).then_zero(2168);
    Ok(Made::new(
        c.text("disk.vmdk", &Descriptor::new("partitionedDevice", lines))?,
        Arc::new(disk),
    ))
}

fn split_flat(c: &Ctx) -> Result<Made> {
    let (mut disk, mut lines) = (Joined::new(), Vec::new());
    for ((sectors, offset), i) in [(4096_u64, 0), (4096, 0), (1001, 100)].into_iter().zip(1..) {
        let layer = c.layer(&format!("f{i}"), sectors, 8).fill([0, 40, (sectors - 1) / 8]);
        let name = format!("disk-f{i:03}.vmdk");
        write::flat(&c.at(&name), &layer, offset)?;
        disk = disk.then(Arc::new(layer));
        lines.push(format!("RW {sectors} FLAT \"{name}\" {offset}"));
    }
    Ok(Made::new(
        c.text("disk.vmdk", &Descriptor::new("twoGbMaxExtentFlat", lines))?,
        Arc::new(disk),
    ))
}

/// Writes extents of 40 to 60 sectors; every fourth one is a part of one shared file, in reverse order.
fn custom_500(c: &Ctx) -> Result<Made> {
    const EXTENTS: u64 = 500;
    let (mut disk, mut lines) = (Joined::new(), Vec::new());
    let shared = c.layer("shared", EXTENTS / 4 * 64, 64).fill(0..EXTENTS / 4);
    write::flat(&c.at("shared.img"), &shared, 0)?;
    for i in 0..EXTENTS {
        let sectors = 40 + i * 7 % 21;
        let name = format!("disk-{i:03}.vmdk");
        let own = c.layer(&name, sectors, 16).fill([0, (sectors - 1) / 16]);
        match i % 4 {
            0 => bare_sparse(c, &name, &own)?,
            1 => write::flat(&c.at(&name), &own, 0)?,
            _ => {}
        }
        let (line, part) = match i % 4 {
            0 => (format!("RW {sectors} SPARSE \"{name}\""), own),
            1 => (format!("RW {sectors} FLAT \"{name}\" 0"), own),
            2 => (format!("RW {sectors} ZERO"), c.layer("zero", sectors, 16)),
            _ => {
                let number = EXTENTS / 4 - 1 - i / 4;
                let data = shared.grains()[&number].clone().unwrap_or_default();
                let piece = c.layer("piece", sectors, 64).with_grain(0, data);
                (format!("RW {sectors} FLAT \"shared.img\" {}", number * 64), piece)
            }
        };
        lines.push(line);
        disk = disk.then(Arc::new(part));
    }
    Ok(Made::new(
        c.text("disk.vmdk", &Descriptor::new("custom", lines))?,
        Arc::new(disk),
    ))
}

/// Writes a sparse extent without a descriptor.
fn bare_sparse(c: &Ctx, name: &str, layer: &Layer) -> Result<()> {
    write::hosted(&c.at(name), layer, None, &Hosted::default())?;
    Ok(())
}
