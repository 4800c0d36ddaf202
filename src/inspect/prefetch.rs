//! `--prefetch`: completes the disk cache of disks on servers.
//!
//! ```text
//!   complete ─► done, not a byte is read
//!   else      ─► verify what is there ─► fetch what is missing ─► complete, or the reason why not
//! ```

use super::{line, print};
use crate::block::{BlockRead, Lba, SECTOR};
use crate::cache::disk_tier::TierFile;
use crate::config::{DiskConfig, Query};
use crate::error::{Error, ErrorKind, Result};
use crate::process::progress::Progress;
use crate::source::Source;
use crate::store::StoredFile;
use crate::volume::{cached_disk, open_source};

/// Bytes of one read: the read-ahead keeps the connections busy.
const STEP: u64 = 1 << 20;

/// Fetches what the `cache-dir=` of each disk lacks of its files and those of its parents.
///
/// Errors: a disk without `cache-dir=`, and the first file that cannot be read or is not complete afterwards. What was
/// fetched before stays.
pub fn prefetch(query: &Query) -> Result<u8> {
    let mut done = Vec::new();
    for disk in &query.disks {
        // Checked for each disk before its first request: without a folder what is fetched would be thrown away.
        if disk.source.settings().cache_dir().is_none() {
            let text = format!(
                "{}: --prefetch needs cache-dir=, the folder to fill",
                disk.source.label()
            );
            return Err(Error::new(ErrorKind::Usage, text));
        }
        prefetch_disk(disk, &mut done)?;
    }
    print(query.json, &done, |out| {
        done.iter()
            .for_each(|(file, bytes)| line!(out, "{file}: {bytes} bytes"));
    })?;
    Ok(0)
}

fn prefetch_disk(disk: &DiskConfig, done: &mut Vec<(String, u64)>) -> Result<()> {
    let source = open_source(disk)?;
    if let Some(kept) = source.kept() {
        return prefetch_served(disk, &*source, &kept?.file, done);
    }
    let files = source.files();
    let mut progress = Progress::new(files.iter().map(|file| file.len()).sum());
    for file in files {
        let filled = fill(&*file, &mut progress);
        filled.map_err(|e| e.within(format!("{}: is not complete in the cache", file.label())))?;
        done.push((file.label().to_owned(), file.len()));
    }
    Ok(())
}

/// Completes the blocks of a disk without files, but for those that read as zeroes without a fetch.
fn prefetch_served(
    config: &DiskConfig,
    source: &dyn Source,
    kept: &TierFile,
    done: &mut Vec<(String, u64)>,
) -> Result<()> {
    let disk = cached_disk(config, source)?;
    let key = kept.key();
    let mut progress = Progress::new(key.len);
    verify(kept, &mut progress);
    let read = |offset: u64, buf: &mut [u8]| disk.read_at(Lba(offset / SECTOR), buf);
    let fetched = fetch_missing(&read, kept, &mut progress).and_then(|()| {
        kept.flush();
        check_only_zeroes_missing(&*disk, kept, &mut progress)
    });
    fetched.map_err(|e| e.within(format!("{}: is not complete in the cache", key.label)))?;
    done.push((key.label.clone(), key.len));
    Ok(())
}

/// Checks that each block that is not kept needs no fetch.
///
/// Errors: why a block is not kept.
fn check_only_zeroes_missing(disk: &dyn BlockRead, kept: &TierFile, progress: &mut Progress) -> Result<()> {
    let block = kept.key().block;
    let mut at = 0;
    while let Some(missing) = kept.missing_from(at) {
        at = missing.start;
        while at < missing.end {
            let len = block.min(missing.end - at);
            if !disk.is_zero(Lba(at / SECTOR), len / SECTOR) {
                let not_kept =
                    || Error::new(ErrorKind::Os(libc::EIO), "a block was fetched, but is not there").at_byte(at);
                return Err(kept.refusal().cloned().unwrap_or_else(not_kept));
            }
            progress.found(len);
            at += len;
        }
    }
    Ok(())
}

/// Completes one file in the cache.
///
/// Errors: why it is not kept, or cannot be read.
fn fill(file: &dyn StoredFile, progress: &mut Progress) -> Result<()> {
    if file.is_empty() {
        // A server's answer to a range of it need not tell a version, without which nothing is kept.
        return Ok(());
    }
    let cached = file
        .cached()
        .unwrap_or_else(|| Err(Error::unsupported("it has none")))?;
    if cached.complete().is_some() {
        progress.found(cached.key().len);
        return Ok(());
    }
    verify(cached, progress);
    fetch_missing(&|offset, buf| file.read_exact_at(offset, buf), cached, progress)?;
    cached.finish()
}

/// Verifies what is there, before a block of it is in memory: a damaged block must come from the server.
fn verify(cached: &TierFile, progress: &mut Progress) {
    cached.verify_rest(|bytes| progress.found(bytes));
}

/// Reads what the cache of a file lacks, which puts it there.
///
/// Errors: the file cannot be read, or no more is kept.
fn fetch_missing(
    read: &dyn Fn(u64, &mut [u8]) -> Result<()>,
    cached: &TierFile,
    progress: &mut Progress,
) -> Result<()> {
    let mut buffer = vec![0; STEP as usize];
    let (mut at, mut known) = (0, cached.known_bytes());
    while let Some(missing) = cached.missing_from(at) {
        at = missing.start;
        while at < missing.end {
            let len = (missing.end - at).min(STEP);
            let part = buffer.get_mut(..len as usize).unwrap_or_default();
            // The read itself fills the folder: the cache lies below what is read.
            read(at, part)?;
            if let Some(why) = cached.refusal() {
                return Err(why.clone());
            }
            at += len;
            // More than was read: the read-ahead is part of it.
            let now = cached.known_bytes();
            progress.did(now.saturating_sub(known));
            known = now;
        }
    }
    // A part of the read-ahead may have come after the last read.
    progress.did(cached.known_bytes().saturating_sub(known));
    Ok(())
}
