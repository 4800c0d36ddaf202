//! Streams with wrong grains or a wrong end.

use std::collections::BTreeMap;
use std::io::Write as _;

use anyhow::Result;
use flate2::Compression;
use flate2::write::ZlibEncoder;

use super::{Bad, Hostile};
use crate::make::ctx::Ctx;
use crate::make::model::{Content, SECTOR};
use crate::make::write::{self, GD_AT_END, Stream, pack_grain, raw_grain};

/// Grain size in bytes.
const GRAIN: u64 = 128 * SECTOR;
/// First sector of grain 1, the damaged grain.
const LBA: u64 = 128;

pub(super) const FILES: &[Hostile] = &[
    grain(
        "grain_size_zero",
        "compressed size 0 (looks like a metadata marker)",
        |c| with_grain(c, raw_grain(LBA, 0, b"")),
    ),
    grain("grain_size_max", "compressed size 0xffffffff", |c| {
        with_grain(c, raw_grain(LBA, u32::MAX, &[b'x'; 300]))
    }),
    grain("grain_size_2gib", "compressed size 2^31 - 1", |c| {
        with_grain(c, raw_grain(LBA, 0x7fff_ffff, &[b'x'; 300]))
    }),
    grain("grain_bomb", "64 MiB of zeroes in one grain", |c| {
        let body = bomb()?;
        with_grain(c, raw_grain(LBA, u32::try_from(body.len())?, &body))
    }),
    grain("grain_garbage", "not zlib data", |c| {
        with_grain(c, raw_grain(LBA, 300, &[0x5a; 300]))
    }),
    grain("grain_cut", "truncated zlib stream", |c| {
        let packed = zlib(&c.layer("cut", 8, 8).fill([0]).read(0, 8))?;
        with_grain(c, raw_grain(LBA, 200, &packed[..200]))
    }),
    grain("grain_short", "inflates to 512 bytes in the middle of the disk", |c| {
        with_grain(c, pack_grain(LBA, &c.layer("short", 1, 1).fill([0]).read(0, 1), true)?)
    }),
    grain("grain_checksum", "wrong Adler-32", |c| {
        let mut packed = zlib(&vec![b'q'; GRAIN as usize])?;
        let sum = packed.len() - 4;
        packed[sum..].fill(0);
        with_grain(c, raw_grain(LBA, u32::try_from(packed.len())?, &packed))
    }),
    grain(
        "grain_lba_wrong",
        "the header of the grain has the LBA of another grain",
        |c| with_grain(c, pack_grain(999 * 128, &vec![b'w'; GRAIN as usize], true)?),
    ),
    grain("grain_one_more", "inflates to one byte more than a grain", |c| {
        with_grain(c, pack_grain(LBA, &vec![b'm'; GRAIN as usize + 1], true)?)
    }),
    Hostile::reject("footer_missing", "GD_AT_END, but the footer is truncated", |c| {
        let good = c.stream(&Stream::default())?;
        write::truncate(&good.path, write::length(&good.path)? - 3 * SECTOR)?;
        Ok(Bad::new(good.path))
    }),
    Hostile::reject("footer_recursive", "the footer says GD_AT_END again", |c| {
        let good = c.stream(&Stream::default())?;
        let footer = write::length(&good.path)? - 2 * SECTOR;
        write::poke(&good.path, footer + 56, &GD_AT_END.to_le_bytes())?;
        Ok(Bad::new(good.path))
    }),
    Hostile::reject(
        "footer_grain",
        "the footer has another grain size than the first header",
        |c| {
            let good = c.stream(&Stream::default())?;
            let footer = write::length(&good.path)? - 2 * SECTOR;
            write::poke(&good.path, footer + 20, &64_u64.to_le_bytes())?;
            Ok(Bad::new(good.path))
        },
    ),
    Hostile::warn(
        "footer_capacity",
        "the footer has a smaller capacity than the first header (the footer counts)",
        |c| {
            Ok(c.stream(&Stream {
                header_capacity: Some(1 << 32),
                ..Stream::default()
            })?
            .into())
        },
    ),
    Hostile::eio(
        "stream_gde_to_grain",
        "the directory of the stream points at a compressed grain",
        Some(0..8192 * SECTOR),
        |c| {
            let good = c.stream(&Stream::default())?;
            let grain = u32::try_from(good.at.grains[&0])?;
            write::poke(&good.path, good.at.gd * SECTOR, &grain.to_le_bytes())?;
            Ok(Bad::new(good.path))
        },
    ),
];

/// Returns a variant whose grain 1 must fail to read.
const fn grain(name: &'static str, note: &'static str, build: fn(&Ctx) -> Result<Bad>) -> Hostile {
    Hostile::eio(name, note, Some(GRAIN..2 * GRAIN), build)
}

/// Writes a stream with these bytes in place of grain 1.
fn with_grain(c: &Ctx, bytes: Vec<u8>) -> Result<Bad> {
    let options = Stream {
        replace: BTreeMap::from([(1, bytes)]),
        ..Stream::default()
    };
    Ok(c.stream(&options)?.into())
}

fn zlib(data: &[u8]) -> Result<Vec<u8>> {
    let mut encoder = ZlibEncoder::new(Vec::new(), Compression::default());
    encoder.write_all(data)?;
    Ok(encoder.finish()?)
}

/// Returns 64 MiB of zeroes, compressed.
fn bomb() -> Result<Vec<u8>> {
    let mut encoder = ZlibEncoder::new(Vec::new(), Compression::best());
    let zeroes = vec![0; 1 << 20];
    for _ in 0..64 {
        encoder.write_all(&zeroes)?;
    }
    Ok(encoder.finish()?)
}
