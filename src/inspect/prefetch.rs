//! `--prefetch`: completes the disk cache of disks on servers.
//!
//! ```text
//!   complete ─► done, not a byte is read
//!   else      ─► verify what is there ─► fetch what is missing ─► complete, or the reason why not
//! ```

use std::fmt;
use std::io::{IsTerminal, Write, stderr};
use std::ops::ControlFlow;
use std::time::{Duration, Instant};

use super::{line, print};
use crate::block::{BlockRead, Lba, SECTOR};
use crate::cache::disk_tier::TierFile;
use crate::config::{DiskConfig, Query};
use crate::error::{Error, ErrorKind, Result};
use crate::source::Source;
use crate::store::StoredFile;
use crate::volume::{cached_disk, open_source};

/// Bytes of one read: the read-ahead keeps the connections busy.
const STEP: u64 = 1 << 20;
/// Interval at which the progress is shown.
const SHOWN_EVERY: Duration = Duration::from_millis(500);

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
    progress.end();
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
    progress.end();
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
    cached.verify_rest(|bytes| {
        progress.found(bytes);
        ControlFlow::Continue(())
    });
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
            progress.fetched(now.saturating_sub(known));
            known = now;
        }
    }
    // A part of the read-ahead may have come after the last read.
    progress.fetched(cached.known_bytes().saturating_sub(known));
    Ok(())
}

/// Progress on a terminal.
struct Progress {
    began: Option<Instant>,
    shown: Option<Instant>,
    all: u64,
    found: u64,
    fetched: u64,
    is_terminal: bool,
}

impl Progress {
    fn new(all: u64) -> Self {
        Self {
            began: None,
            shown: None,
            all,
            found: 0,
            fetched: 0,
            is_terminal: stderr().is_terminal(),
        }
    }

    /// Adds bytes that were there already.
    fn found(&mut self, bytes: u64) {
        self.found += bytes;
        self.show();
    }

    /// Adds bytes from the server. Their rate is measured from the first of them on.
    fn fetched(&mut self, bytes: u64) {
        if bytes == 0 {
            return;
        }
        self.began.get_or_insert_with(Instant::now);
        self.fetched += bytes;
        self.show();
    }

    fn show(&mut self) {
        if self.is_terminal && self.shown.is_none_or(|at| at.elapsed() >= SHOWN_EVERY) {
            self.shown = Some(Instant::now());
            let time = self.began.map_or(Duration::ZERO, |began| began.elapsed());
            // Progress that cannot be shown does not matter.
            let _ = write!(stderr(), "\r{}\x1b[K", self.at(time));
        }
    }

    /// Returns the progress `time` after the first fetch.
    fn at(&self, time: Duration) -> ProgressLine {
        let rate = self.fetched as f64 / time.as_secs_f64().max(0.001);
        let left = self.all.saturating_sub(self.found + self.fetched);
        ProgressLine {
            percent: (self.found + self.fetched).saturating_mul(100) / self.all.max(1),
            rate: (self.fetched > 0).then_some(rate),
            left: left as f64 / rate.max(1.0),
            found: self.found,
        }
    }

    fn end(&self) {
        if self.shown.is_some() {
            let time = self.began.map_or(Duration::ZERO, |began| began.elapsed());
            let _ = writeln!(stderr(), "\r{}\x1b[K", self.at(time));
        }
    }
}

/// One line of progress: how much is there, how fast the rest comes, and when it will have come.
#[derive(Debug, PartialEq)]
struct ProgressLine {
    percent: u64,
    /// Bytes a second from the server; `None` before the first ones.
    rate: Option<f64>,
    /// Seconds.
    left: f64,
    /// Bytes that were there before.
    found: u64,
}

impl fmt::Display for ProgressLine {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        const MIB: f64 = (1 << 20) as f64;
        write!(f, "{:3} %", self.percent)?;
        if let Some(rate) = self.rate {
            let rate = rate / MIB;
            let digits = usize::from(rate < 10.0);
            write!(f, ", {rate:.digits$} MiB/s")?;
            let left = self.left.round() as u64;
            match (left / 3600, left / 60 % 60, left % 60) {
                (0, 0, seconds) => write!(f, ", {seconds} s left")?,
                (hours, minutes, seconds) => write!(f, ", {hours}:{minutes:02}:{seconds:02} left")?,
            }
        }
        match self.found {
            0 => Ok(()),
            found => write!(f, " ({:.0} MiB were there)", found as f64 / MIB),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_rate_is_that_of_the_server_and_not_of_what_was_there() {
        let mut progress = Progress::new(4 << 30);
        progress.is_terminal = false;
        progress.found(1 << 30);
        assert_eq!(progress.at(Duration::ZERO).to_string(), " 25 % (1024 MiB were there)");
        progress.fetched(1 << 30);
        let line = progress.at(Duration::from_secs(8)).to_string();
        assert_eq!(line, " 50 %, 128 MiB/s, 16 s left (1024 MiB were there)");
        progress.fetched(1 << 30);
        let slow = progress.at(Duration::from_secs(20_000)).to_string();
        assert_eq!(slow, " 75 %, 0.1 MiB/s, 2:46:40 left (1024 MiB were there)");
        progress.fetched(1 << 30);
        assert!(
            progress
                .at(Duration::from_secs(30))
                .to_string()
                .starts_with("100 %, 102 MiB/s, 0 s left")
        );
    }
}
