//! Writers of single files: one module for each kind.
//!
//! They take a [`Layer`] and options that make the oddities, and answer with the places inside of the
//! file, in sectors, so that a caller can damage it where it wants. Positions are written in the order that suits the
//! writer: holes of the file are zeroes.

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

/// Where things lie in a file that was written, in sectors.
#[derive(Debug, Clone, Default)]
pub struct Places {
    /// The grain directory.
    pub gd: u64,
    /// The redundant grain directory; 0 where there is none.
    pub rgd: u64,
    /// Entries of the directory.
    pub entries: u64,
    /// The tables, by directory entry.
    pub tables: BTreeMap<u64, u64>,
    /// The redundant tables; the same as `tables` where there are none.
    pub rtables: BTreeMap<u64, u64>,
    /// The stored grains.
    pub grains: BTreeMap<u64, u64>,
}

/// Creates a small file.
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

/// Makes a file shorter.
pub fn cut(path: &Path, bytes: u64) -> Result<()> {
    Ok(OpenOptions::new().write(true).open(path)?.set_len(bytes)?)
}

/// Length of a file in bytes.
pub fn length(path: &Path) -> Result<u64> {
    Ok(std::fs::metadata(path)?.len())
}

/// Writes a FLAT or VMFS extent: raw sectors from sector `offset` of the file on. The layer's own grains only.
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

/// The bytes of 32-bit entries.
fn words(entries: &[u32]) -> Vec<u8> {
    entries.iter().flat_map(|entry| entry.to_le_bytes()).collect()
}

/// A sector number as the 32-bit entry of a table.
fn entry(sector: u64) -> Result<u32> {
    u32::try_from(sector).with_context(|| format!("sector {sector} does not fit a table entry"))
}

/// `data` with zeroes up to whole sectors.
fn padded(mut data: Vec<u8>) -> Vec<u8> {
    data.resize(data.len().next_multiple_of(SECTOR as usize), 0);
    data
}
