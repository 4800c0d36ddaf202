//! `--prefetch`: completes the disk cache of disks on web servers.

use std::io::{IsTerminal, Write, stderr};
use std::time::{Duration, Instant};

use super::{line, print};
use crate::config::{DiskConfig, Query};
use crate::error::{Error, ErrorKind, Result};
use crate::store::StoredFile;
use crate::volume::open_source;

/// Bytes of one read: the read-ahead keeps the connections busy.
const STEP: usize = 1 << 20;
/// Interval at which the progress is shown.
const SHOWN_EVERY: Duration = Duration::from_millis(500);

/// Reads the files of each disk, with those of its parents, into its `cache-dir=`. What is there already is not fetched.
///
/// Errors: a disk without `cache-dir=`, and the first that cannot be read. What was fetched before stays.
pub fn prefetch(query: &Query) -> Result<u8> {
    let mut done = Vec::new();
    for disk in &query.disks {
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
    let files = source.files();
    let all: u64 = files.iter().map(|file| file.len()).sum();
    let mut progress = Progress {
        began: Instant::now(),
        shown: None,
        all,
        done: 0,
    };
    for file in files {
        read_file(&*file, &mut progress)?;
        done.push((file.label().to_owned(), file.len()));
    }
    progress.end();
    Ok(())
}

fn read_file(file: &dyn StoredFile, progress: &mut Progress) -> Result<()> {
    let mut buffer = vec![0; STEP];
    let mut at = 0;
    while at < file.len() {
        let part = buffer
            .get_mut(..(file.len() - at).min(STEP as u64) as usize)
            .unwrap_or_default();
        // The read itself fills the folder: the cache lies below the file, and what is in it already costs no request.
        file.read_exact_at(at, part)?;
        at += part.len() as u64;
        progress.add(part.len() as u64);
    }
    Ok(())
}

/// Progress on a terminal.
struct Progress {
    began: Instant,
    shown: Option<Instant>,
    all: u64,
    done: u64,
}

impl Progress {
    fn add(&mut self, bytes: u64) {
        self.done += bytes;
        if self.shown.is_none_or(|at| at.elapsed() >= SHOWN_EVERY) && stderr().is_terminal() {
            self.shown = Some(Instant::now());
            let seconds = self.began.elapsed().as_secs_f64().max(0.001);
            let rate = self.done as f64 / seconds;
            let left = self.all.saturating_sub(self.done) as f64 / rate.max(1.0);
            let percent = self.done * 100 / self.all.max(1);
            let rate = rate / f64::from(1 << 20);
            // Progress that cannot be shown does not matter.
            let _ = write!(stderr(), "\r{percent:3} %, {rate:.0} MiB/s, {left:.0} s left   ");
        }
    }

    fn end(&self) {
        if self.shown.is_some() {
            let _ = writeln!(stderr(), "\r100 %                          ");
        }
    }
}
