//! Writers of single files: one module for each format.
//!
//! Each writer takes a [`Layer`] and options for unusual forms. It returns the positions of tables and grains in the
//! file, in sectors, so that the caller can damage the file at any of them. Parts are written in any order: bytes that
//! are never written stay holes and read as zeroes.

mod cowd;
mod descriptor;
mod hosted;
mod sesparse;
mod stream;

use std::collections::BTreeMap;
use std::fs::{File, OpenOptions};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

use super::model::{Content, Layer, SECTOR};

pub use cowd::cowd;
pub use descriptor::{Descriptor, NO_PARENT};
pub use hosted::{F_COMPRESSED, F_MARKERS, F_NEWLINE, F_REDUNDANT, F_ZEROED, GD_AT_END, Header, Hosted, hosted};
pub use sesparse::{SeSparse, se_entry, sesparse};
pub use stream::{Stream, pack_grain, raw_grain, stream};

/// Positions of tables and grains in a written file, in sectors.
#[derive(Debug, Clone, Default)]
pub struct FileLayout {
    /// The grain directory.
    pub gd: u64,
    /// The redundant grain directory; 0 if there is none.
    pub rgd: u64,
    /// Number of entries in the grain directory.
    pub entries: u64,
    /// The grain tables, by directory entry.
    pub tables: BTreeMap<u64, u64>,
    /// The redundant grain tables; equal to `tables` if there are none.
    pub rtables: BTreeMap<u64, u64>,
    /// The stored grains, by grain number.
    pub grains: BTreeMap<u64, u64>,
}

/// Creates a small file and returns its path.
pub fn put(path: PathBuf, data: &[u8]) -> Result<PathBuf> {
    std::fs::write(&path, data).with_context(|| format!("writing {}", path.display()))?;
    Ok(path)
}

/// Overwrites bytes of a file in place.
pub fn poke(path: &Path, offset: u64, data: &[u8]) -> Result<()> {
    let file = OpenOptions::new()
        .write(true)
        .open(path)
        .with_context(|| path.display().to_string())?;
    Ok(file.write_all_at(data, offset)?)
}

/// Truncates a file to `bytes`.
pub fn truncate(path: &Path, bytes: u64) -> Result<()> {
    Ok(OpenOptions::new().write(true).open(path)?.set_len(bytes)?)
}

/// Returns the length of a file in bytes.
pub fn length(path: &Path) -> Result<u64> {
    Ok(std::fs::metadata(path)?.len())
}

/// Writes a FLAT or VMFS extent: the layer's own grains as raw sectors from sector `offset` of the file on.
pub fn flat(path: &Path, layer: &Layer, offset: u64) -> Result<()> {
    let file = create(path)?;
    file.set_len((offset + layer.sectors()) * SECTOR)?;
    for (number, data) in layer.grains() {
        let start = number * layer.grain();
        let n = layer.grain().min(layer.sectors().saturating_sub(start));
        if let Some(data) = data {
            file.write_all_at(&data[..(n * SECTOR) as usize], (offset + start) * SECTOR)?;
        }
    }
    Ok(())
}

fn create(path: &Path) -> Result<File> {
    File::create(path).with_context(|| format!("creating {}", path.display()))
}

/// Returns the little-endian bytes of 32-bit entries.
fn entry_bytes(entries: &[u32]) -> Vec<u8> {
    entries.iter().flat_map(|entry| entry.to_le_bytes()).collect()
}

/// Converts a sector number into a 32-bit table entry.
fn to_entry(sector: u64) -> Result<u32> {
    u32::try_from(sector).with_context(|| format!("sector {sector} does not fit a table entry"))
}

/// Pads `data` with zeroes to whole sectors.
fn padded(mut data: Vec<u8>) -> Vec<u8> {
    data.resize(data.len().next_multiple_of(SECTOR as usize), 0);
    data
}
