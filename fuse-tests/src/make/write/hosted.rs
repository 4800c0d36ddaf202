//! Hosted sparse extents ("KDMV") without compression.
//!
//! ```text
//!   header · descriptor · redundant directory · its tables · directory · its tables · (grain boundary) · grains
//! ```

use std::collections::BTreeMap;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;

use anyhow::{Result, ensure};

use super::{FileLayout, create, entry_bytes, to_entry};
use crate::make::model::{Content, Layer, Random, SECTOR};

/// Value of `gdOffset` in the first header of a stream with a footer: the footer has the position.
pub const GD_AT_END: u64 = u64::MAX;
/// Flag: the newline bytes of the header are valid.
pub const F_NEWLINE: u32 = 1;
/// Flag: there is a redundant directory.
pub const F_REDUNDANT: u32 = 2;
/// Flag: the grain entry 1 is a zeroed grain.
pub const F_ZEROED: u32 = 4;
/// Flag: grains are compressed.
pub const F_COMPRESSED: u32 = 0x1_0000;
/// Flag: there are markers, and each grain is preceded by its sector number.
pub const F_MARKERS: u32 = 0x2_0000;

/// Header of a hosted sparse extent; also the footer of a stream. Positions and lengths are in sectors.
#[derive(Debug, Clone, Copy)]
pub struct Header {
    /// Format version.
    pub version: u32,
    /// The `F_` bits.
    pub flags: u32,
    /// Size of the extent.
    pub capacity: u64,
    /// Grain size.
    pub grain: u64,
    /// Position of the descriptor; 0: none.
    pub desc_at: u64,
    /// Length of the descriptor in sectors.
    pub desc_len: u64,
    /// Entries of a grain table.
    pub ngte: u32,
    /// Position of the redundant grain directory.
    pub rgd: u64,
    /// Position of the grain directory.
    pub gd: u64,
    /// Length of the metadata.
    pub overhead: u64,
    /// uncleanShutdown: true while the extent is in use or was not closed.
    pub unclean: bool,
    /// Compression algorithm.
    pub compression: u16,
}

impl Header {
    /// Returns the sector that holds the header.
    pub fn bytes(&self) -> [u8; SECTOR as usize] {
        let mut out = [0; SECTOR as usize];
        out[..4].copy_from_slice(b"KDMV");
        for (at, value) in [(4, self.version), (8, self.flags), (44, self.ngte)] {
            out[at..at + 4].copy_from_slice(&value.to_le_bytes());
        }
        let longs = [
            (12, self.capacity),
            (20, self.grain),
            (28, self.desc_at),
            (36, self.desc_len),
            (48, self.rgd),
            (56, self.gd),
            (64, self.overhead),
        ];
        for (at, value) in longs {
            out[at..at + 8].copy_from_slice(&value.to_le_bytes());
        }
        out[72] = u8::from(self.unclean);
        out[73..77].copy_from_slice(b"\n \r\n");
        out[77..79].copy_from_slice(&self.compression.to_le_bytes());
        out
    }
}

/// Options of [`hosted`]; the default is the form that VMware writes.
#[derive(Debug, Clone)]
pub struct Hosted {
    /// Capacity in the header if it differs from the layer's.
    pub capacity: Option<u64>,
    /// Format version.
    pub version: u32,
    /// The `F_` bits.
    pub flags: u32,
    /// Entries of a grain table.
    pub ngte: u32,
    /// Length of the descriptor in sectors.
    pub desc_len: u64,
    /// Allocates only tables that have a grain; the others have directory entry 0.
    pub lazy: bool,
    /// Writes a redundant directory with tables of its own.
    pub redundant: bool,
    /// Marks the extent as not closed.
    pub unclean: bool,
    /// Stores the grains in random order.
    pub shuffle: bool,
    /// Ends the file with the last used sector of a partial last grain (the grains are then in order).
    pub cut_tail: bool,
}

impl Default for Hosted {
    fn default() -> Self {
        Self {
            capacity: None,
            version: 1,
            flags: F_NEWLINE | F_REDUNDANT,
            ngte: 512,
            desc_len: 20,
            lazy: false,
            redundant: true,
            unclean: false,
            shuffle: true,
            cut_tail: false,
        }
    }
}

impl Hosted {
    /// Returns options with zeroed-grain entries, which need version 2.
    pub fn zeroed() -> Self {
        Self {
            version: 2,
            flags: F_NEWLINE | F_REDUNDANT | F_ZEROED,
            ..Self::default()
        }
    }

    /// Returns options with tables only where there are grains.
    pub fn lazy() -> Self {
        Self {
            lazy: true,
            ..Self::default()
        }
    }
}

/// Writes a hosted sparse extent, with the embedded descriptor `desc` if given.
pub fn hosted(path: &Path, layer: &Layer, desc: Option<&[u8]>, options: &Hosted) -> Result<FileLayout> {
    let desc_len = if desc.is_some() { options.desc_len } else { 0 };
    let (mut layout, end) = lay_out_tables(layer, options, 1 + desc_len);
    let overhead = end.next_multiple_of(layer.grain());
    let order = file_order(layer, options);
    layout.grains = order
        .iter()
        .zip(0..)
        .map(|(n, i)| (*n, overhead + i * layer.grain()))
        .collect();
    let header = Header {
        version: options.version,
        flags: options.flags,
        capacity: options.capacity.unwrap_or(layer.sectors()),
        grain: layer.grain(),
        desc_at: u64::from(desc.is_some()),
        desc_len,
        ngte: options.ngte,
        rgd: layout.rgd,
        gd: layout.gd,
        overhead,
        unclean: options.unclean,
        compression: 0,
    };
    let file = create(path)?;
    file.set_len((overhead + order.len() as u64 * layer.grain()) * SECTOR)?;
    file.write_all_at(&header.bytes(), 0)?;
    if let Some(desc) = desc {
        ensure!(
            desc.len() as u64 <= desc_len * SECTOR,
            "a descriptor of {} bytes is too long",
            desc.len()
        );
        file.write_all_at(desc, SECTOR)?;
    }
    write_tables(&file, layer, options, &layout)?;
    for (number, at) in &layout.grains {
        if let Some(Some(data)) = layer.grains().get(number) {
            file.write_all_at(data, at * SECTOR)?;
        }
    }
    if let Some(last) = order
        .last()
        .filter(|last| options.cut_tail && (*last + 1) * layer.grain() > layer.sectors())
    {
        file.set_len((layout.grains[last] + layer.sectors() - last * layer.grain()) * SECTOR)?;
    }
    Ok(layout)
}

/// Lays out directories and tables from sector `at` on; also returns the sector after them.
fn lay_out_tables(layer: &Layer, options: &Hosted, at: u64) -> (FileLayout, u64) {
    let ngte = u64::from(options.ngte);
    let capacity = options.capacity.unwrap_or(layer.sectors());
    let entries = capacity.div_ceil(layer.grain() * ngte);
    let (gd_len, gt_len) = ((entries * 4).div_ceil(SECTOR), (ngte * 4).div_ceil(SECTOR));
    let mut used: Vec<u64> = layer.grains().keys().map(|n| n / ngte).collect();
    used.dedup();
    if !options.lazy {
        used = (0..entries).collect();
    }
    let copy = |at: u64| -> (u64, BTreeMap<u64, u64>, u64) {
        let tables = used
            .iter()
            .zip(0..)
            .map(|(t, i)| (*t, at + gd_len + i * gt_len))
            .collect();
        (at, tables, at + gd_len + used.len() as u64 * gt_len)
    };
    let (first, first_tables, end) = copy(at);
    let mut layout = FileLayout {
        gd: first,
        entries,
        rtables: first_tables.clone(),
        ..FileLayout::default()
    };
    if !options.redundant {
        layout.tables = first_tables;
        return (layout, end);
    }
    let (second, second_tables, end) = copy(end);
    (layout.rgd, layout.gd, layout.tables) = (first, second, second_tables);
    (layout, end)
}

/// Returns the stored grains in their order in the file.
fn file_order(layer: &Layer, options: &Hosted) -> Vec<u64> {
    let mut order: Vec<u64> = layer
        .grains()
        .iter()
        .filter(|(_, data)| data.is_some())
        .map(|(n, _)| *n)
        .collect();
    if options.shuffle && !options.cut_tail {
        Random::new(layer.key()).shuffle(&mut order);
    }
    order
}

/// Writes the directory entries and the tables, primary and redundant.
fn write_tables(file: &File, layer: &Layer, options: &Hosted, layout: &FileLayout) -> Result<()> {
    let ngte = u64::from(options.ngte);
    let mut tables: BTreeMap<u64, Vec<u32>> = BTreeMap::new();
    for (number, data) in layer.grains() {
        let table = tables
            .entry(number / ngte)
            .or_insert_with(|| vec![0; options.ngte as usize]);
        table[(number % ngte) as usize] = if data.is_none() {
            1
        } else {
            to_entry(layout.grains[number])?
        };
    }
    let mut copies = vec![(layout.gd, &layout.tables)];
    if layout.rgd != 0 {
        copies.push((layout.rgd, &layout.rtables));
    }
    for (directory, at) in copies {
        for (t, sector) in at {
            file.write_all_at(&to_entry(*sector)?.to_le_bytes(), directory * SECTOR + t * 4)?;
        }
        for (t, table) in &tables {
            file.write_all_at(&entry_bytes(table), at[t] * SECTOR)?;
        }
    }
    Ok(())
}
