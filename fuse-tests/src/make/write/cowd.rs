//! ESX deltas ("COWD"): tables of 4096 entries, made only where there is a grain, no redundant copy.

use std::collections::BTreeMap;
use std::os::unix::fs::FileExt;
use std::path::Path;

use anyhow::{Context, Result};

use super::{Places, create, entry, words};
use crate::make::model::{Content, Layer, SECTOR};

/// Entries of a table.
const TABLE: u64 = 4096;
/// Sectors of a table.
const TABLE_SECTORS: u64 = TABLE * 4 / SECTOR;
/// Sectors of the header; the directory follows it.
const HEADER_SECTORS: u64 = 4;
/// Where the header keeps the generation of the disk.
const GENERATION: u64 = 1060;
/// Sectors by which the file is longer than what is used: ESX grows it in steps.
const SPARE: u64 = 128;

/// Writes a COWD delta. The format has no zeroed grains.
pub fn cowd(path: &Path, layer: &Layer) -> Result<Places> {
    let entries = layer.sectors().div_ceil(layer.grain() * TABLE);
    let mut free = HEADER_SECTORS + (entries * 4).div_ceil(SECTOR);
    let mut places = Places {
        gd: HEADER_SECTORS,
        entries,
        ..Places::default()
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
        table[(number % TABLE) as usize] = entry(free)?;
        file.write_all_at(data, free * SECTOR)?;
        places.grains.insert(*number, free);
        free += layer.grain();
    }
    for (t, (at, table)) in &tables {
        file.write_all_at(&entry(*at)?.to_le_bytes(), HEADER_SECTORS * SECTOR + t * 4)?;
        file.write_all_at(&words(table), at * SECTOR)?;
    }
    places.tables = tables.iter().map(|(t, (at, _))| (*t, *at)).collect();
    places.rtables = places.tables.clone();
    file.set_len((free + SPARE) * SECTOR)?;
    let fields = [
        1,
        3,
        entry(layer.sectors())?,
        entry(layer.grain())?,
        4,
        entry(entries)?,
        entry(free)?,
    ];
    file.write_all_at(&[b"COWD", &words(&fields)[..]].concat(), 0)?;
    file.write_all_at(&1u32.to_le_bytes(), GENERATION)?;
    Ok(places)
}
