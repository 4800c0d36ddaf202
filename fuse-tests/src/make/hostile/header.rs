//! Hosted sparse headers with wrong values; the rest of the file is valid.

use std::sync::Arc;

use anyhow::Result;

use super::{Bad, Hostile};
use crate::make::ctx::Ctx;
use crate::make::write::{self, Descriptor, GD_AT_END, Hosted};

pub(super) const FILES: &[Hostile] = &[
    Hostile::reject(
        "magic_lower_case",
        "magic \"kdmv\", which open-vmdk writes while a file is unfinished",
        |c| patched(c, &[(0, b"kdmv")]),
    ),
    Hostile::reject("grain_zero", "grainSize 0", |c| patched(c, &[(GRAIN, &long(0))])),
    Hostile::reject("grain_not_pow2", "grainSize 100", |c| {
        patched(c, &[(GRAIN, &long(100))])
    }),
    Hostile::reject("grain_2_63", "grainSize 2^63: shifts overflow", |c| {
        patched(c, &[(GRAIN, &long(1 << 63))])
    }),
    Hostile::reject("grain_2_30", "grainSize 2^30 sectors: a grain buffer of 512 GiB", |c| {
        patched(c, &[(GRAIN, &long(1 << 30))])
    }),
    Hostile::reject("gte_zero", "numGTEsPerGT 0: division by zero", |c| {
        patched(c, &[(NGTE, &word(0))])
    }),
    Hostile::reject("gte_max", "numGTEsPerGT 0xffffffff: a table of 16 GiB", |c| {
        patched(c, &[(NGTE, &word(u32::MAX))])
    }),
    Hostile::reject("gte_513", "numGTEsPerGT 513: neither 512 nor a power of two", |c| {
        patched(c, &[(NGTE, &word(513))])
    }),
    Hostile::reject(
        "cover_wraps",
        "grainSize * numGTEsPerGT is 2^32: 0 in 32-bit arithmetic",
        |c| patched(c, &[(GRAIN, &long(1 << 23)), (NGTE, &word(512))]),
    ),
    Hostile::reject("capacity_max", "capacity 2^64 - 1", |c| {
        patched(c, &[(CAPACITY, &long(u64::MAX))])
    }),
    Hostile::reject("capacity_2_55", "capacity 2^55: times 512 is 2^64", |c| {
        patched(c, &[(CAPACITY, &long(1 << 55))])
    }),
    Hostile::reject("directory_huge", "capacity 2^52: directory of 2^36 entries", |c| {
        patched(c, &[(CAPACITY, &long(1 << 52))])
    }),
    Hostile::eio(
        "capacity_grown",
        "capacity 2^32 with a directory for 4 MiB: entries would be read from other data (the descriptor still has 4 MiB)",
        None,
        |c| {
            let good = c.simple()?;
            write::poke(&good.path, CAPACITY, &long(1 << 32))?;
            Ok(good.into())
        },
    ),
    Hostile::reject("gd_past_end", "gdOffset and rgdOffset past the end of the file", |c| {
        patched(c, &[(RGD, &long(1 << 30)), (GD, &long(1 << 30))])
    }),
    Hostile::reject("gd_wraps", "gdOffset 2^55: times 512 is 0 in 64 bits", |c| {
        patched(c, &[(RGD, &long(1 << 55)), (GD, &long(1 << 55))])
    }),
    Hostile::reject(
        "gd_at_end_uncompressed",
        "gdOffset GD_AT_END but no footer, not compressed",
        |c| patched(c, &[(GD, &long(GD_AT_END))]),
    ),
    Hostile::reject("desc_past_end", "descriptorOffset past the end of the file", |c| {
        patched(c, &[(DESC_AT, &long(1 << 40))])
    }),
    Hostile::reject("desc_size_huge", "descriptorSize 2^40 sectors", |c| {
        patched(c, &[(DESC_LEN, &long(1 << 40))])
    }),
    Hostile::reject(
        "newline_mangled",
        "the four newline bytes show a text-mode transfer (flag bit 0 set)",
        |c| patched(c, &[(NEWLINE, b"\n \n\n")]),
    ),
    Hostile::reject("version_4", "header version 4", |c| patched(c, &[(VERSION, &word(4))])),
    Hostile::reject("flag_unknown_high", "unknown incompatible flag bit 18", |c| {
        patched(c, &[(FLAGS, &word(0x4_0003))])
    }),
    Hostile::reject("compression_2", "compressed flags with algorithm 2", |c| {
        patched(c, &[(FLAGS, &word(0x3_0003)), (COMPRESSION, &[2, 0])])
    }),
    Hostile::reject("markers_without_compression", "flag bit 17 without bit 16", |c| {
        patched(c, &[(FLAGS, &word(0x2_0003))])
    }),
    Hostile::reject(
        "nominal_larger",
        "the descriptor lists more sectors than the header has (1 TiB against 4 MiB)",
        |c| {
            let layer = c.layer("disk", 8192, 128).fill([0]);
            let text = Descriptor::new("monolithicSparse", ["RW 2147483648 SPARSE \"disk.vmdk\""]).bytes()?;
            write::hosted(&c.at("disk.vmdk"), &layer, Some(&text), &Hosted::default())?;
            Ok(Bad::new(c.at("disk.vmdk")))
        },
    ),
    Hostile::reject(
        "encrypted_iofilter",
        "vSphere VM encryption, recorded only in the disk database: the grains are ciphertext",
        |c| {
            let layer = c.layer("disk", 8192, 128).fill([0]);
            let (open, _) = c.sparse("disk.vmdk", &layer, &Hosted::default(), |text| Descriptor {
                ddb: vec!["ddb.iofilters = \"vmwarevmcrypt\""],
                ..text
            })?;
            Ok(Bad::new(open))
        },
    ),
    Hostile::warn("overhead_zero", "overHead is 0: the field is advisory", |c| {
        let good = c.simple()?;
        write::poke(&good.path, OVERHEAD, &long(0))?;
        Ok(Bad::holding(good.path, Arc::new(good.layer)))
    }),
];

const VERSION: u64 = 4;
const FLAGS: u64 = 8;
const CAPACITY: u64 = 12;
const GRAIN: u64 = 20;
const DESC_AT: u64 = 28;
const DESC_LEN: u64 = 36;
const NGTE: u64 = 44;
const RGD: u64 = 48;
const GD: u64 = 56;
const OVERHEAD: u64 = 64;
const NEWLINE: u64 = 73;
const COMPRESSION: u64 = 77;

/// Writes a valid sparse file and applies (offset, bytes) patches to its header.
fn patched(c: &Ctx, patches: &[(u64, &[u8])]) -> Result<Bad> {
    let good = c.simple()?;
    for (offset, bytes) in patches {
        write::poke(&good.path, *offset, bytes)?;
    }
    Ok(Bad::new(good.path))
}

fn long(value: u64) -> [u8; 8] {
    value.to_le_bytes()
}

fn word(value: u32) -> [u8; 4] {
    value.to_le_bytes()
}
