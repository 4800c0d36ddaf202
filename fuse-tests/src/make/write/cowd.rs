//! ESX sparse deltas ("COWD"): grain tables of 4096 entries, allocated only where there is a grain, not redundant.

use std::collections::BTreeMap;
use std::os::unix::fs::FileExt;
use std::path::Path;

use anyhow::{Context, Result};

use super::{FileLayout, create, entry_bytes, to_entry};
use crate::make::model::{Content, Layer, SECTOR};

/// Entries of a grain table.
const TABLE: u64 = 4096;
/// Sectors of a grain table.
const TABLE_SECTORS: u64 = TABLE * 4 / SECTOR;
/// Sectors of the header; the directory follows it.
const HEADER_SECTORS: u64 = 4;
/// Byte offset of the generation in the header.
const GENERATION: u64 = 1060;
/// Unused sectors at the end of the file, as ESX extends the file in larger steps.
const SPARE: u64 = 128;

/// Writes a COWD delta. The format has no zeroed grains.
pub fn cowd(path: &Path, layer: &Layer) -> Result<FileLayout> {
    let entries = layer.sectors().div_ceil(layer.grain() * TABLE);
    let mut free = HEADER_SECTORS + (entries * 4).div_ceil(SECTOR);
    let mut layout = FileLayout {
        gd: HEADER_SECTORS,
        entries,
        ..FileLayout::default()
    };
    let mut tables: BTreeMap<u64, (u64, Vec<u32>)> = BTreeMap::new();
    let file = create(path)?;
    for (number, data) in layer.grains() {
        let (_, table) = tables.entry(number / TABLE).or_insert_with(|| {
            let at = free;
            free += TABLE_SECTORS;
            (at, vec![0; TABLE as usize])
        });
        let data = data
            .as_ref()
            .with_context(|| format!("COWD has no zeroed grains (grain {number})"))?;
        table[(number % TABLE) as usize] = to_entry(free)?;
        file.write_all_at(data, free * SECTOR)?;
        layout.grains.insert(*number, free);
        free += layer.grain();
    }
    for (t, (at, table)) in &tables {
        file.write_all_at(&to_entry(*at)?.to_le_bytes(), HEADER_SECTORS * SECTOR + t * 4)?;
        file.write_all_at(&entry_bytes(table), at * SECTOR)?;
    }
    layout.tables = tables.iter().map(|(t, (at, _))| (*t, *at)).collect();
    layout.rtables = layout.tables.clone();
    file.set_len((free + SPARE) * SECTOR)?;
    let fields = [
        1,
        3,
        to_entry(layer.sectors())?,
        to_entry(layer.grain())?,
        4,
        to_entry(entries)?,
        to_entry(free)?,
    ];
    file.write_all_at(&[b"COWD", &entry_bytes(&fields)[..]].concat(), 0)?;
    file.write_all_at(&1u32.to_le_bytes(), GENERATION)?;
    Ok(layout)
}
