//! ESXi deltas: COWD and seSparse.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;

use anyhow::Result;

use super::Variant;
use crate::make::ctx::{BASE_CID, Ctx, Made};
use crate::make::model::{Content, Layer};
use crate::make::write::{self, Descriptor, FileLayout, SeSparse};

pub(super) const VARIANTS: &[Variant] = &[
    Variant::new(
        "cowd_delta",
        "COWD (vmfsSparse) delta over a VMFS flat base, one-sector grains, tables allocated on demand",
        cowd_delta,
    ),
    Variant::new(
        "cowd_two_deep",
        "COWD with 16-sector grains over a COWD with one-sector grains over a flat base",
        cowd_two_deep,
    ),
    Variant::new(
        "sesparse_delta",
        "seSparse delta over a VMFS flat base: unallocated, zero and data grains, tables out of order",
        sesparse_delta,
    ),
    Variant::new(
        "sesparse_high_index",
        "seSparse with data grain indices above 4096, which need both bit fields of the index",
        sesparse_high_index,
    ),
    Variant::new(
        "sesparse_unmapped",
        "seSparse with unmapped (type 1) grains over parent data: zeroes (qemu, xen-orchestra); dissect reads the parent",
        sesparse_unmapped,
    ),
    Variant::new(
        "sesparse_over_cowd",
        "seSparse delta over a COWD delta over a flat base",
        sesparse_over_cowd,
    ),
];

fn cowd_delta(c: &Ctx) -> Result<Made> {
    let base = c.base(20000)?;
    let layer = c
        .layer("delta", 20000, 1)
        .over(base)
        .write(7, 3)
        .write(4090, 20)
        .write(19999, 1);
    let open = cowd_disk(c, "disk-000001", &layer, |text| Descriptor {
        header: vec!["isNativeSnapshot=\"no\""],
        ..text.child(0xbbbb_0002, BASE_CID, "base.vmdk")
    })?;
    Ok(Made::new(open, Arc::new(layer)))
}

fn cowd_two_deep(c: &Ctx) -> Result<Made> {
    let base = c.base(140_000)?;
    let middle = Arc::new(c.layer("mid", 140_000, 1).over(base).write(1, 2).write(70_000, 40));
    cowd_disk(c, "disk-000001", &middle, |text| {
        text.child(0xb1, BASE_CID, "base.vmdk")
    })?;
    let top = c
        .layer("top", 140_000, 16)
        .over(middle)
        .write(70_010, 3)
        .write(139_999, 1);
    let open = cowd_disk(c, "disk-000002", &top, |text| {
        text.child(0xb2, 0xb1, "disk-000001.vmdk")
    })?;
    Ok(Made::new(open, Arc::new(top)))
}

fn sesparse_delta(c: &Ctx) -> Result<Made> {
    let layer = c.layer("se", 70_000, 8).over(c.base(70_000)?);
    let layer = layer.write(9, 2).write(40_000, 20).write(69_999, 1).zero([4, 7]);
    let options = SeSparse {
        table_order: BTreeMap::from([(0, 2), (1, 0), (2, 1)]),
        ..SeSparse::default()
    };
    let (open, _) = sesparse_disk(c, &layer, &options)?;
    Ok(Made::new(open, Arc::new(layer)))
}

fn sesparse_high_index(c: &Ctx) -> Result<Made> {
    let layer = c
        .layer("se", 40_000, 8)
        .over(c.base(40_000)?)
        .write(9, 2)
        .write(33_000, 20);
    let options = SeSparse {
        first_index: 4094,
        ..SeSparse::default()
    };
    let (open, _) = sesparse_disk(c, &layer, &options)?;
    Ok(Made::new(open, Arc::new(layer)))
}

fn sesparse_unmapped(c: &Ctx) -> Result<Made> {
    let layer = c.layer("se", 16_384, 8).over(c.base(16_384)?).write(9, 2);
    let options = SeSparse {
        unmapped: vec![0, 7, 200],
        ..SeSparse::default()
    };
    let (open, _) = sesparse_disk(c, &layer, &options)?;
    Ok(Made::new(open, Arc::new(layer.zero([0, 7, 200]))))
}

fn sesparse_over_cowd(c: &Ctx) -> Result<Made> {
    let base = c.base(70_000)?;
    let middle = c
        .layer("mid", 70_000, 1)
        .over(base)
        .write(20, 5)
        .write(50, 30)
        .write(40_000, 3);
    cowd_disk(c, "disk-000001", &middle, |text| {
        text.child(0xb1, BASE_CID, "base.vmdk")
    })?;
    let top = c
        .layer("top", 70_000, 8)
        .over(Arc::new(middle))
        .write(22, 1)
        .write(69_999, 1)
        .zero([8]);
    write::sesparse(&c.at("disk-000002-sesparse.vmdk"), &top, &SeSparse::default())?;
    let text = Descriptor::new("seSparse", ["RW 70000 SESPARSE \"disk-000002-sesparse.vmdk\""]);
    let open = c.text("disk-000002.vmdk", &text.child(0xb2, 0xb1, "disk-000001.vmdk"))?;
    Ok(Made::new(open, Arc::new(top)))
}

/// Writes a COWD delta and its descriptor; `edit` sets the parent.
fn cowd_disk(c: &Ctx, name: &str, layer: &Layer, edit: impl FnOnce(Descriptor) -> Descriptor) -> Result<PathBuf> {
    write::cowd(&c.at(&format!("{name}-delta.vmdk")), layer)?;
    let line = format!("RW {} VMFSSPARSE \"{name}-delta.vmdk\"", layer.sectors());
    c.text(&format!("{name}.vmdk"), &edit(Descriptor::new("vmfsSparse", [line])))
}

/// Writes a seSparse delta and its descriptor over the base that [`Ctx::base`] wrote.
pub(in crate::make) fn sesparse_disk(c: &Ctx, layer: &Layer, options: &SeSparse) -> Result<(PathBuf, FileLayout)> {
    let at = write::sesparse(&c.at("disk-000001-sesparse.vmdk"), layer, options)?;
    let line = format!("RW {} SESPARSE \"disk-000001-sesparse.vmdk\"", layer.sectors());
    let text = Descriptor::new("seSparse", [line]).child(0xcccc_0003, BASE_CID, "base.vmdk");
    let open = c.text(
        "disk-000001.vmdk",
        &Descriptor {
            middle: vec!["ddb.grain = \"8\"", ""],
            ..text
        },
    )?;
    Ok((open, at))
}
