//! streamOptimized extents, written from start to end.
//!
//! ```text
//!   header · descriptor · (grains of one table · marker · table)… · marker · directory · [marker · footer] · end
//! ```

use std::collections::BTreeMap;
use std::io::Write as _;
use std::path::Path;

use anyhow::{Context, Result, ensure};
use flate2::Compression;
use flate2::write::ZlibEncoder;

use super::{F_COMPRESSED, F_MARKERS, F_NEWLINE, FileLayout, GD_AT_END, Header, entry_bytes, padded, to_entry};
use crate::make::model::{Content, Layer, SECTOR};

/// Marker: a grain table follows.
const MARK_TABLE: u32 = 1;
/// Marker: the directory follows.
const MARK_DIRECTORY: u32 = 2;
/// Marker: the footer follows.
const MARK_FOOTER: u32 = 3;
/// Marker "progress", which newer vSphere writers insert before tables.
const MARK_PROGRESS: u32 = 4;
/// Marker: end of the stream.
const MARK_END: u32 = 0;

/// Options of [`stream`]; the default is the form that VMware writes.
#[derive(Debug, Clone)]
pub struct Stream {
    /// Length of the descriptor in sectors.
    pub desc_len: u64,
    /// Entries of a grain table.
    pub ngte: u32,
    /// Writes the directory's position into a footer, else into the first header.
    pub footer: bool,
    /// Compresses a partial last grain at its used length, else padded to a whole grain.
    pub short_last: bool,
    /// Writes progress markers before tables.
    pub progress: bool,
    /// Format version.
    pub version: u32,
    /// Writes markers, and the sector number before each grain (flag bit 17).
    pub lba_header: bool,
    /// Bytes to store in place of a grain, by grain number.
    pub replace: BTreeMap<u64, Vec<u8>>,
    /// Capacity in the first header if it differs from the footer's.
    pub header_capacity: Option<u64>,
}

impl Default for Stream {
    fn default() -> Self {
        Self {
            desc_len: 1,
            ngte: 512,
            footer: true,
            short_last: true,
            progress: false,
            version: 3,
            lba_header: true,
            replace: BTreeMap::new(),
            header_capacity: None,
        }
    }
}

/// Writes a streamOptimized extent. Zero grains are omitted, as real writers do.
pub fn stream(path: &Path, layer: &Layer, desc: &[u8], options: &Stream) -> Result<FileLayout> {
    ensure!(
        desc.len() as u64 <= options.desc_len * SECTOR,
        "a descriptor of {} bytes is too long",
        desc.len()
    );
    let overhead = (1 + options.desc_len).next_multiple_of(128);
    let first = Header {
        version: options.version,
        flags: F_NEWLINE | F_COMPRESSED | if options.lba_header { F_MARKERS } else { 0 },
        capacity: options.header_capacity.unwrap_or(layer.sectors()),
        grain: layer.grain(),
        desc_at: 1,
        desc_len: options.desc_len,
        ngte: options.ngte,
        rgd: 0,
        gd: GD_AT_END,
        overhead,
        unclean: false,
        compression: 1,
    };
    let mut out = first.bytes().to_vec();
    out.extend_from_slice(desc);
    out.resize((overhead * SECTOR) as usize, 0);
    let coverage = layer.grain() * u64::from(options.ngte);
    let mut layout = FileLayout {
        entries: layer.sectors().div_ceil(coverage),
        ..FileLayout::default()
    };
    write_tables(&mut out, layer, options, &mut layout)?;
    let last = Header {
        capacity: layer.sectors(),
        gd: layout.gd,
        ..first
    };
    if options.footer {
        out.extend_from_slice(&marker(1, MARK_FOOTER));
        out.extend_from_slice(&last.bytes());
    }
    out.extend_from_slice(&marker(0, MARK_END));
    if !options.footer {
        out[..SECTOR as usize].copy_from_slice(&last.bytes());
    }
    std::fs::write(path, out).with_context(|| format!("writing {}", path.display()))?;
    layout.rtables = layout.tables.clone();
    Ok(layout)
}

/// Compresses a grain, prepends its header, and pads it to whole sectors.
pub fn pack_grain(lba: u64, data: &[u8], lba_header: bool) -> Result<Vec<u8>> {
    let mut encoder = ZlibEncoder::new(Vec::new(), Compression::default());
    encoder.write_all(data)?;
    let body = encoder.finish()?;
    let size = u32::try_from(body.len())?;
    if lba_header {
        return Ok(raw_grain(lba, size, &body));
    }
    Ok(padded([&size.to_le_bytes()[..], &body].concat()))
}

/// Returns a grain with an arbitrary size field and body, padded to whole sectors.
pub fn raw_grain(lba: u64, size: u32, body: &[u8]) -> Vec<u8> {
    padded([&lba.to_le_bytes()[..], &size.to_le_bytes(), body].concat())
}

/// Appends grains, tables and the directory, and records their positions.
fn write_tables(out: &mut Vec<u8>, layer: &Layer, options: &Stream, layout: &mut FileLayout) -> Result<()> {
    let ngte = u64::from(options.ngte);
    let gt_len = (ngte * 4).div_ceil(SECTOR);
    let mut directory = vec![0; layout.entries as usize];
    let mut tables: BTreeMap<u64, Vec<(u64, Vec<u8>)>> = BTreeMap::new();
    for (number, data) in layer.grains() {
        if let Some(data) = data.as_ref().filter(|data| data.iter().any(|b| *b != 0)) {
            let bytes = grain_bytes(layer, options, *number, data)?;
            tables.entry(number / ngte).or_default().push((*number, bytes));
        }
    }
    for (t, grains) in tables {
        let mut table = vec![0; options.ngte as usize];
        for (number, bytes) in grains {
            let at = out.len() as u64 / SECTOR;
            layout.grains.insert(number, at);
            table[(number % ngte) as usize] = to_entry(at)?;
            out.extend_from_slice(&bytes);
        }
        if options.progress {
            out.extend_from_slice(&marker(0, MARK_PROGRESS));
        }
        out.extend_from_slice(&marker(gt_len, MARK_TABLE));
        let at = out.len() as u64 / SECTOR;
        layout.tables.insert(t, at);
        directory[t as usize] = to_entry(at)?;
        out.extend_from_slice(&padded(entry_bytes(&table)));
    }
    let directory = padded(entry_bytes(&directory));
    out.extend_from_slice(&marker(directory.len() as u64 / SECTOR, MARK_DIRECTORY));
    layout.gd = out.len() as u64 / SECTOR;
    out.extend_from_slice(&directory);
    Ok(())
}

/// Returns the bytes that store one grain.
fn grain_bytes(layer: &Layer, options: &Stream, number: u64, data: &[u8]) -> Result<Vec<u8>> {
    if let Some(replacement) = options.replace.get(&number) {
        return Ok(replacement.clone());
    }
    let start = number * layer.grain();
    let real = (layer.sectors() - start).min(layer.grain()) * SECTOR;
    let data = if options.short_last {
        &data[..real as usize]
    } else {
        data
    };
    pack_grain(start, data, options.lba_header)
}

/// Returns a marker sector.
fn marker(value: u64, marker_type: u32) -> [u8; SECTOR as usize] {
    let mut out = [0; SECTOR as usize];
    out[..8].copy_from_slice(&value.to_le_bytes());
    out[12..16].copy_from_slice(&marker_type.to_le_bytes());
    out
}
