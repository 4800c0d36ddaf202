//! streamOptimized extents, written front to back.
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

use super::{F_COMPRESSED, F_MARKERS, F_NEWLINE, GD_AT_END, Header, Places, entry, padded, words};
use crate::make::model::{Content, Layer, SECTOR};

/// Marker: a grain table follows.
const MARK_TABLE: u32 = 1;
/// Marker: the directory follows.
const MARK_DIRECTORY: u32 = 2;
/// Marker: the footer follows.
const MARK_FOOTER: u32 = 3;
/// Marker "progress", which newer vSphere writers strew in before tables.
const MARK_PROGRESS: u32 = 4;
/// Marker: end of the stream.
const MARK_END: u32 = 0;

/// Options of [`stream`]; the default is what VMware writes.
#[derive(Debug, Clone)]
pub struct Stream {
    /// Sectors of the descriptor.
    pub desc_len: u64,
    /// Entries of a table.
    pub ngte: u32,
    /// The directory's place is in a footer, else in the first header.
    pub footer: bool,
    /// The last, partial grain is compressed at its real length, else padded to a whole grain.
    pub short_last: bool,
    /// Progress markers before tables.
    pub progress: bool,
    /// Format version.
    pub version: u32,
    /// Grains have their sector number in front, and there are markers (flag bit 17).
    pub lba_header: bool,
    /// Ready-made bytes instead of a good grain, by its number.
    pub replace: BTreeMap<u64, Vec<u8>>,
    /// Capacity in the first header, where it differs from the footer's.
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

/// Writes a streamOptimized extent. Zero grains are left out, as writers do.
pub fn stream(path: &Path, layer: &Layer, desc: &[u8], options: &Stream) -> Result<Places> {
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
    let mut places = Places {
        entries: layer.sectors().div_ceil(coverage),
        ..Places::default()
    };
    write_tables(&mut out, layer, options, &mut places)?;
    let last = Header {
        capacity: layer.sectors(),
        gd: places.gd,
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
    places.rtables = places.tables.clone();
    Ok(places)
}

/// Compresses a grain and puts its header in front; padded to sectors.
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

/// A grain with a header and a body of one's choice, padded to sectors.
pub fn raw_grain(lba: u64, size: u32, body: &[u8]) -> Vec<u8> {
    padded([&lba.to_le_bytes()[..], &size.to_le_bytes(), body].concat())
}

/// Appends grains, tables and the directory, and notes their places.
fn write_tables(out: &mut Vec<u8>, layer: &Layer, options: &Stream, places: &mut Places) -> Result<()> {
    let ngte = u64::from(options.ngte);
    let gt_len = (ngte * 4).div_ceil(SECTOR);
    let mut directory = vec![0; places.entries as usize];
    let mut tables: BTreeMap<u64, Vec<(u64, Vec<u8>)>> = BTreeMap::new();
    for (number, data) in layer.grains() {
        if let Some(data) = data.as_ref().filter(|data| data.iter().any(|b| *b != 0)) {
            let bytes = packed(layer, options, *number, data)?;
            tables.entry(number / ngte).or_default().push((*number, bytes));
        }
    }
    for (t, grains) in tables {
        let mut table = vec![0; options.ngte as usize];
        for (number, bytes) in grains {
            let at = out.len() as u64 / SECTOR;
            places.grains.insert(number, at);
            table[(number % ngte) as usize] = entry(at)?;
            out.extend_from_slice(&bytes);
        }
        if options.progress {
            out.extend_from_slice(&marker(0, MARK_PROGRESS));
        }
        out.extend_from_slice(&marker(gt_len, MARK_TABLE));
        let at = out.len() as u64 / SECTOR;
        places.tables.insert(t, at);
        directory[t as usize] = entry(at)?;
        out.extend_from_slice(&padded(words(&table)));
    }
    let directory = padded(words(&directory));
    out.extend_from_slice(&marker(directory.len() as u64 / SECTOR, MARK_DIRECTORY));
    places.gd = out.len() as u64 / SECTOR;
    out.extend_from_slice(&directory);
    Ok(())
}

/// The bytes of one grain in the file.
fn packed(layer: &Layer, options: &Stream, number: u64, data: &[u8]) -> Result<Vec<u8>> {
    if let Some(ready) = options.replace.get(&number) {
        return Ok(ready.clone());
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

/// A marker sector.
fn marker(value: u64, kind: u32) -> [u8; SECTOR as usize] {
    let mut out = [0; SECTOR as usize];
    out[..8].copy_from_slice(&value.to_le_bytes());
    out[12..16].copy_from_slice(&kind.to_le_bytes());
    out
}
