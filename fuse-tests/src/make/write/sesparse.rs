//! Deltas of ESXi 6.5 and later (seSparse 2.1): 4 KiB grains, tables of 4096 entries of 64 bits.
//!
//! ```text
//!   header · volatile header · journal · directory (4096) · tables · free bitmap · back map · grains
//! ```

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;

use anyhow::{Result, ensure};

use super::{FileLayout, create};
use crate::make::model::{Content, Layer, SECTOR};

/// Grain size in sectors.
const GRAIN: u64 = 8;
/// Entries of a grain table.
const TABLE: u64 = 4096;
/// Sectors of a grain table.
const TABLE_SECTORS: u64 = TABLE * 8 / SECTOR;
/// Alignment of the regions of the file: 1 MiB, as in files written by ESXi.
const REGION: u64 = 2048;
/// Position of the grain directory, in sectors.
const DIRECTORY: u64 = 4096;
/// Type bits of a directory entry that names a table.
const TABLE_PRESENT: u64 = 1 << 60;

/// Options of [`sesparse`].
#[derive(Debug, Clone, Default)]
pub struct SeSparse {
    /// Grains with an entry of type 1: discarded by the guest, the old index is kept.
    pub unmapped: Vec<u64>,
    /// Index of the first data grain; from 4096 on, the index uses both of its bit fields.
    pub first_index: u64,
    /// Table index by directory entry; if empty, tables are in directory order.
    pub table_order: BTreeMap<u64, u64>,
}

/// Encodes a grain entry: the type in the top four bits, then the low 12 bits of the index, then its other bits.
pub fn se_entry(entry_type: u64, index: u64) -> u64 {
    entry_type << 60 | (index & 0xfff) << 48 | index >> 12
}

/// Writes a seSparse delta.
pub fn sesparse(path: &Path, layer: &Layer, options: &SeSparse) -> Result<FileLayout> {
    ensure!(layer.grain() == GRAIN, "grains of seSparse have 8 sectors");
    let numbers: BTreeSet<u64> = layer.grains().keys().chain(&options.unmapped).copied().collect();
    let used: BTreeSet<u64> = numbers.iter().map(|n| n / TABLE).collect();
    let mut order = options.table_order.clone();
    if order.is_empty() {
        order = used.iter().zip(0..).map(|(t, i)| (*t, i)).collect();
    }
    let entries = layer.sectors().div_ceil(TABLE * GRAIN);
    let gd_len = (entries * 8).div_ceil(SECTOR).max(REGION);
    let highest = order.values().copied().max().unwrap_or(0);
    let regions = Regions {
        gd_len,
        gt_len: ((highest + 1) * TABLE_SECTORS).next_multiple_of(REGION),
    };
    let mut layout = FileLayout {
        gd: DIRECTORY,
        entries,
        ..FileLayout::default()
    };
    layout.tables = order
        .iter()
        .map(|(t, i)| (*t, regions.tables() + i * TABLE_SECTORS))
        .collect();
    layout.rtables = layout.tables.clone();
    let file = create(path)?;
    for t in &used {
        file.write_all_at(&(TABLE_PRESENT | order[t]).to_le_bytes(), DIRECTORY * SECTOR + t * 8)?;
    }
    let mut index = options.first_index;
    for number in numbers {
        let value = match layer.grains().get(&number) {
            _ if options.unmapped.contains(&number) => se_entry(1, index),
            Some(Some(data)) => {
                let at = regions.grains() + index * GRAIN;
                file.write_all_at(data, at * SECTOR)?;
                layout.grains.insert(number, at);
                index += 1;
                se_entry(3, index - 1)
            }
            Some(None) | None => se_entry(2, 0),
        };
        file.write_all_at(
            &value.to_le_bytes(),
            layout.tables[&(number / TABLE)] * SECTOR + number % TABLE * 8,
        )?;
    }
    file.set_len((regions.grains() + (index.max(1) * GRAIN).next_multiple_of(REGION)) * SECTOR)?;
    write_headers(&file, layer.sectors(), used.len() as u64, &regions)?;
    Ok(layout)
}

/// Lengths in sectors from which the positions of all regions follow.
struct Regions {
    gd_len: u64,
    gt_len: u64,
}

impl Regions {
    fn tables(&self) -> u64 {
        DIRECTORY + self.gd_len
    }

    fn bitmap(&self) -> u64 {
        self.tables() + self.gt_len
    }

    fn back_map(&self) -> u64 {
        self.bitmap() + REGION
    }

    fn grains(&self) -> u64 {
        self.back_map() + REGION
    }
}

/// Writes the constant header and the volatile header.
fn write_headers(file: &File, capacity: u64, used_tables: u64, regions: &Regions) -> Result<()> {
    let mut constant = vec![
        0xcafe_babe,
        0x2_0000_0001,
        capacity,
        GRAIN,
        TABLE_SECTORS,
        0,
        0,
        0,
        0,
        0,
    ];
    // Offset and size of each region: volatile header, journal header, journal, and so on.
    constant.extend([
        1,
        1,
        2,
        2,
        REGION,
        REGION,
        DIRECTORY,
        regions.gd_len,
        regions.tables(),
        regions.gt_len,
    ]);
    constant.extend([
        regions.bitmap(),
        REGION,
        regions.back_map(),
        REGION,
        regions.grains(),
        capacity,
    ]);
    let longs = |values: &[u64]| values.iter().flat_map(|value| value.to_le_bytes()).collect::<Vec<u8>>();
    file.write_all_at(&longs(&constant), 0)?;
    file.write_all_at(&longs(&[0xcafe_cafe, used_tables, 1, 0]), SECTOR)?;
    Ok(())
}
