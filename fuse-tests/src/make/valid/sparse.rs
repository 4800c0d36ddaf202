//! Hosted sparse extents without compression.

use std::fs;
use std::sync::Arc;

use anyhow::Result;

use super::Variant;
use crate::make::ctx::{BASE_CID, Ctx, Made};
use crate::make::model::SECTOR;
use crate::make::write::{self, Descriptor, F_NEWLINE, Header, Hosted};

pub(super) const VARIANTS: &[Variant] = &[
    Variant::new(
        "sparse_zero_gte",
        "version 2 child with zeroed-grain entries (value 1) that hide data of the parent",
        zero_gte,
    ),
    Variant::new(
        "sparse_zero_gte_alone",
        "zeroed-grain entries (value 1) in a disk without a parent",
        zero_gte_alone,
    ),
    Variant::new(
        "rgd_only_zero",
        "only the redundant directory is valid: every primary directory entry is 0 (flag bit 1 set)",
        |c| rgd_only(c, 0),
    ),
    Variant::new(
        "rgd_only_wild",
        "only the redundant directory is valid: the primary entries point past the end of the file",
        |c| rgd_only(c, 0x7fff_ff00),
    ),
    Variant::new(
        "rgd_unused",
        "flag bit 1 is clear, rgdOffset is garbage and must be ignored",
        rgd_unused,
    ),
    Variant::new(
        "partial_last_grain",
        "capacity is not a multiple of the grain and the file ends with the last used sector",
        |c| {
            let options = Hosted {
                cut_tail: true,
                ..Hosted::default()
            };
            Ok(c.simple_of(1001, 128, &[0, 7], &options)?.made())
        },
    ),
    Variant::new(
        "big_3tib",
        "3 TiB sparse extent with four grains; tables allocated on demand",
        big_3tib,
    ),
    Variant::new(
        "big_62tib",
        "62 TiB sparse extent with five grains; the directories (8 MiB each) are file holes except for five entries",
        big_62tib,
    ),
    Variant::new(
        "lazy_tables",
        "grain tables only where there are grains (directory entries 0 in both copies): a write must allocate new tables; qemu overwrites the header",
        |c| Ok(c.simple_of(400_000, 128, &[0, 1100, 3124], &Hosted::lazy())?.made()),
    ),
    Variant::new(
        "nominal_smaller",
        "header capacity is rounded up to the grain, the descriptor has the real size (VirtualBox)",
        |c| {
            let options = Hosted {
                capacity: Some(1024),
                ..Hosted::default()
            };
            Ok(c.simple_of(1000, 128, &[0, 7], &options)?.made())
        },
    ),
    Variant::new(
        "renamed_monolithic",
        "monolithicSparse file renamed: the embedded descriptor names a file that does not exist",
        renamed,
    ),
    Variant::new(
        "descriptor_comments",
        "embedded descriptor that starts with another comment and has comments between the keys (stream converters)",
        comments,
    ),
    Variant::new(
        "wrapped_descriptor",
        "KDMV header with capacity 0 that only wraps a descriptor with FLAT extents (old Workstation)",
        wrapped,
    ),
    Variant::new(
        "grain_8",
        "smallest common grain: 8 sectors (libvmdk refuses it, VirtualBox and qemu read it)",
        |c| Ok(c.simple_of(9000, 8, &[0, 511, 512, 1124], &Hosted::default())?.made()),
    ),
    Variant::new("grain_2048", "grain of 1 MiB", |c| {
        Ok(c.simple_of(20_480, 2048, &[0, 9], &Hosted::default())?.made())
    }),
    Variant::new(
        "gte_1024",
        "tables of 1024 entries (qemu refuses more than 512, open-vmdk allows them)",
        |c| {
            let options = Hosted {
                ngte: 1024,
                ..Hosted::default()
            };
            Ok(c.simple_of(200_000, 128, &[0, 1, 1100, 1562], &options)?.made())
        },
    ),
    Variant::new("unclean", "uncleanShutdown is set, the content is consistent", |c| {
        let options = Hosted {
            unclean: true,
            ..Hosted::default()
        };
        Ok(c.simple_of(8192, 128, &[0, 1, 5, 63], &options)?.made())
    }),
    Variant::new(
        "version3_cbt",
        "version 3 for changed block tracking: header 3 without compression, descriptor version=3, changeTrackPath",
        version3,
    ),
];

fn zero_gte(c: &Ctx) -> Result<Made> {
    let base = c.layer("base", 8192, 128).fill([0, 1, 2, 63]);
    c.sparse("base.vmdk", &base, &Hosted::default(), |text| text.cid(BASE_CID))?;
    let top = c
        .layer("top", 8192, 128)
        .over(Arc::new(base))
        .zero([1, 3, 63])
        .write(600, 2);
    let (open, _) = c.sparse("disk.vmdk", &top, &Hosted::zeroed(), |text| {
        text.child(2, BASE_CID, "base.vmdk")
    })?;
    Ok(Made::new(open, Arc::new(top)))
}

fn zero_gte_alone(c: &Ctx) -> Result<Made> {
    let layer = c.layer("disk", 100_000, 128).fill([0, 2, 513]).zero([1, 3, 512, 781]);
    let (open, _) = c.sparse("disk.vmdk", &layer, &Hosted::zeroed(), |text| text)?;
    Ok(Made::new(open, Arc::new(layer)))
}

fn rgd_only(c: &Ctx, entry: u32) -> Result<Made> {
    let good = c.simple_of(200_000, 128, &[0, 1, 600, 1562], &Hosted::default())?;
    let entries = entry.to_le_bytes().repeat(good.at.entries as usize);
    write::poke(&good.path, good.at.gd * SECTOR, &entries)?;
    Ok(good.made())
}

fn rgd_unused(c: &Ctx) -> Result<Made> {
    let options = Hosted {
        flags: F_NEWLINE,
        redundant: false,
        ..Hosted::default()
    };
    let good = c.simple_of(8192, 128, &[0, 1, 5, 63], &options)?;
    write::poke(&good.path, 48, &0x12_3456_789a_u64.to_le_bytes())?;
    Ok(good.made())
}

fn big_3tib(c: &Ctx) -> Result<Made> {
    let (tib, capacity) = (1 << 31, 3 << 31);
    let grains = [0, tib / 128, 2 * tib / 128 + 1, capacity / 128 - 1];
    let made = c.simple_of(capacity, 128, &grains, &Hosted::lazy())?.made();
    Ok(made.probing(&[0, tib - 128, tib, 2 * tib + 64, capacity - 256, 5 << 28]))
}

fn big_62tib(c: &Ctx) -> Result<Made> {
    let (tib, capacity) = (1 << 31, 62 << 31);
    let grains = [
        0,
        tib / 128 + 7,
        31 * tib / 128,
        61 * tib / 128 + 513,
        capacity / 128 - 1,
    ];
    let made = c.simple_of(capacity, 128, &grains, &Hosted::lazy())?.made();
    let first = |grain: u64| grain * 128 - 64;
    let probes = [
        0,
        first(grains[1]),
        first(grains[2]),
        first(grains[3]),
        capacity - 256,
        45 * tib,
    ];
    Ok(made.probing(&probes))
}

fn renamed(c: &Ctx) -> Result<Made> {
    let mut good = c.simple()?;
    let path = c.at("other name.vmdk");
    fs::rename(&good.path, &path)?;
    good.path = path;
    Ok(good.made())
}

fn comments(c: &Ctx) -> Result<Made> {
    let layer = c.layer("disk", 4096, 128).fill([0, 31]);
    let (open, _) = c.sparse("disk.vmdk", &layer, &Hosted::default(), |text| Descriptor {
        first: "# made by a converter",
        header: vec!["# nothing follows"],
        ..text
    })?;
    Ok(Made::new(open, Arc::new(layer)))
}

fn wrapped(c: &Ctx) -> Result<Made> {
    let layer = c.layer("data", 4096, 16).fill([0, 255]);
    write::flat(&c.at("disk-f001.vmdk"), &layer, 0)?;
    let text = Descriptor::new("monolithicFlat", ["RW 4096 FLAT \"disk-f001.vmdk\" 0"]);
    let open = write::put(c.at("disk.vmdk"), &envelope(&text, 0)?)?;
    Ok(Made::new(open, Arc::new(layer)))
}

fn version3(c: &Ctx) -> Result<Made> {
    let layer = c.layer("disk", 8192, 128).fill([0, 63]);
    let options = Hosted {
        version: 3,
        ..Hosted::default()
    };
    let (open, _) = c.sparse("disk.vmdk", &layer, &options, |text| Descriptor {
        version: 3,
        middle: vec!["# Change Tracking File", "changeTrackPath=\"disk-ctk.vmdk\"", ""],
        ..text
    })?;
    Ok(Made::new(open, Arc::new(layer)))
}

/// Returns a file that consists of a header of capacity 0 and the descriptor embedded in it.
pub(in crate::make) fn envelope(text: &Descriptor, ngte: u32) -> Result<Vec<u8>> {
    const DESC_LEN: u64 = 20;
    let header = Header {
        version: 1,
        flags: F_NEWLINE,
        capacity: 0,
        grain: 128,
        desc_at: 1,
        desc_len: DESC_LEN,
        ngte,
        rgd: 0,
        gd: 0,
        overhead: 1 + DESC_LEN,
        unclean: false,
        compression: 0,
    };
    let mut out = header.bytes().to_vec();
    out.extend_from_slice(&text.bytes()?);
    out.resize(((1 + DESC_LEN) * SECTOR) as usize, 0);
    Ok(out)
}
