//! `--list cache-dir=DIR` and `--check cache-dir=DIR`: what a folder of cached blocks holds, and whether it is sound.

use std::path::Path;
use std::time::UNIX_EPOCH;

use serde::Serialize;

use super::check::CORRUPT;
use super::{line, print};
use crate::cache::disk_tier::{DiskTier, HeldFile};
use crate::error::{Error, ErrorKind, Result};

/// A file of the folder, for the output.
#[derive(Debug, Serialize)]
struct Held {
    file: String,
    /// Bytes of the file on the server.
    size: u64,
    /// Bytes that the folder has for it.
    allocated: u64,
    complete: bool,
    /// Seconds since 1970.
    used: u64,
    /// Blocks that were verified, and those that were damaged and are forgotten.
    #[serde(skip_serializing_if = "Option::is_none")]
    verified: Option<(u64, u64)>,
    /// True if it was removed, as the folder was too large.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    evicted: bool,
}

impl Held {
    fn of(held: &HeldFile, verified: Option<(u64, u64)>) -> Self {
        Self {
            file: held.key.label.clone(),
            size: held.key.len,
            allocated: held.allocated,
            complete: held.complete,
            // A time before 1970, which only a wrong clock sets, becomes 0.
            used: held.used.duration_since(UNIX_EPOCH).map_or(0, |time| time.as_secs()),
            verified,
            evicted: false,
        }
    }
}

/// Prints the files of the folder, the least recently used first.
///
/// Errors: it is not a folder of this user.
pub fn list_cache(dir: &Path, json: bool) -> Result<u8> {
    let held: Vec<Held> = DiskTier::open(dir, None, false)?
        .held()?
        .iter()
        .map(|file| Held::of(file, None))
        .collect();
    print(json, &held, |out| {
        for file in &held {
            let state = if file.complete { "complete" } else { "partial" };
            line!(out, "{}: {} of {} bytes, {state}", file.file, file.allocated, file.size);
        }
    })?;
    Ok(0)
}

/// Compares the blocks of the folder with their checksums. Damaged ones are forgotten. Then removes what is of no use (data
/// without a map, or the reverse), and the files that were not used for the longest time, until the folder is within `limit`.
/// Returns 4 if blocks were damaged.
///
/// Errors: it is not a folder of this user, or another process holds its lock.
pub fn check_cache(dir: &Path, limit: Option<u64>, json: bool) -> Result<u8> {
    let tier = DiskTier::open(dir, limit, false)?;
    // Files have the same label if their addresses differ in the query alone, or if they are versions of one file.
    let (mut checked, mut keys) = (Vec::new(), Vec::new());
    for held in tier.held()? {
        match tier.reopen(&held) {
            Ok(file) => {
                checked.push(Held::of(&held, Some(file.verify())));
                keys.push(held.key);
            }
            // Another process evicted it meanwhile.
            Err(e) if e.kind() == ErrorKind::NotFound => {}
            Err(e) => return Err(e),
        }
    }
    let removed = tier.evict()?;
    for (file, key) in checked.iter_mut().zip(&keys) {
        file.evicted = removed.files.contains(key);
    }
    print(json, &checked, |out| {
        for file in &checked {
            let (blocks, damaged) = file.verified.unwrap_or_default();
            let evicted = if file.evicted {
                ", removed (cache-dir-size=)"
            } else {
                ""
            };
            line!(out, "{}: {blocks} blocks, {damaged} damaged{evicted}", file.file);
        }
        if removed.leftovers > 0 {
            line!(out, "leftovers removed: {}", removed.leftovers);
        }
    })?;
    if let Some(e) = removed.failure {
        return Err(Error::io(format!("cache-dir={}", dir.display()), e));
    }
    // Not an error but a status: the damaged blocks are forgotten already, and the next mount fetches them again.
    let damaged = checked
        .iter()
        .any(|file| file.verified.is_some_and(|(_, damaged)| damaged > 0));
    Ok(if damaged { CORRUPT } else { 0 })
}
