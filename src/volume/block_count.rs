//! Number of bytes of a disk that are data (`st_blocks`): counted by a background thread on the first query, and again
//! after changes.
//!
//! A count walks the whole disk, which may take seconds, and a query must not block. So a query returns the last known
//! number at once and starts a count if that number may be outdated. One count runs at a time.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use crate::block::{BlockRead, Content, Lba, SECTOR};

/// Maximum time of one count; a count that takes longer is abandoned.
const COUNT_TIME: Duration = Duration::from_secs(10);

/// Minimum pause between two counts.
const MIN_PAUSE: Duration = Duration::from_secs(1);

/// Minimum pause as a multiple of the time of the last count: counting takes at most a 20th of a processor.
const PAUSE_FACTOR: u32 = 20;

/// Last known number of bytes that are data.
#[derive(Debug)]
pub(super) struct BlockCount(Arc<CountState>);

#[derive(Debug)]
struct CountState {
    /// Result of queries.
    bytes: AtomicU64,
    /// Number of changes of the disk.
    changes: AtomicU64,
    last: Mutex<LastCount>,
    /// Set on drop; the thread checks it at each step.
    stop: AtomicBool,
}

#[derive(Debug, Default)]
struct LastCount {
    running: bool,
    /// Number of changes before the last count, its end, and its duration.
    ended: Option<(u64, Instant, Duration)>,
}

impl BlockCount {
    /// Creates a count that returns `estimate` until the first count is done.
    pub(super) fn new(estimate: u64) -> Self {
        let (changes, stop) = (AtomicU64::new(0), AtomicBool::new(false));
        Self(Arc::new(CountState {
            bytes: estimate.into(),
            changes,
            last: Mutex::default(),
            stop,
        }))
    }

    /// Notes a change of the disk.
    pub(super) fn changed(&self) {
        self.0.changes.fetch_add(1, Ordering::Relaxed);
    }

    /// Returns the last known number. Starts a count in the background if it may be outdated.
    pub(super) fn bytes(&self, disk: &Arc<dyn BlockRead>) -> u64 {
        if self.start_due() {
            let (disk, state) = (Arc::clone(disk), Arc::clone(&self.0));
            let started = std::thread::Builder::new()
                .name("count".to_owned())
                .spawn(move || state.count(&*disk));
            if started.is_err() {
                // No thread: the last number stays, and the next query tries again.
                self.0.last.lock().unwrap_or_else(PoisonError::into_inner).running = false;
            }
        }
        self.0.bytes.load(Ordering::Relaxed)
    }

    /// Returns true if the caller has to start a count now, and marks it as running.
    fn start_due(&self) -> bool {
        let mut last = self.0.last.lock().unwrap_or_else(PoisonError::into_inner);
        let outdated = last.ended.is_none_or(|(changes, ended, took)| {
            changes != self.0.changes.load(Ordering::Relaxed) && ended.elapsed() > MIN_PAUSE.max(took * PAUSE_FACTOR)
        });
        outdated && !std::mem::replace(&mut last.running, true)
    }
}

impl Drop for BlockCount {
    fn drop(&mut self) {
        self.0.stop.store(true, Ordering::Relaxed);
    }
}

impl CountState {
    fn count(&self, disk: &dyn BlockRead) {
        // The number of changes before the count: a change during it makes the result outdated again.
        let (changes, started) = (self.changes.load(Ordering::Relaxed), Instant::now());
        if let Some(bytes) = self.counted(disk, started) {
            self.bytes.store(bytes, Ordering::Relaxed);
        }
        let mut last = self.last.lock().unwrap_or_else(PoisonError::into_inner);
        *last = LastCount {
            running: false,
            ended: Some((changes, Instant::now(), started.elapsed())),
        };
    }

    /// Counts the bytes that are data. Returns `None` on an error, on timeout, and if the volume is dropped: the last
    /// number stays then.
    fn counted(&self, disk: &dyn BlockRead, started: Instant) -> Option<u64> {
        let end = disk.geometry().sectors;
        let (mut at, mut data) = (0, 0);
        while at < end {
            if started.elapsed() > COUNT_TIME || self.stop.load(Ordering::Relaxed) {
                return None;
            }
            let (content, sectors) = disk.content_at(Lba(at)).ok()?;
            if content == Content::Data {
                data += sectors;
            }
            at += sectors.max(1);
        }
        Some(data * SECTOR)
    }
}
