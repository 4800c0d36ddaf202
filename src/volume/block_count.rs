//! Number of bytes of a disk that are data (`st_blocks`): counted by a background thread on the first query, and again
//! after changes.
//!
//! A count walks the whole disk, which may take seconds, and a query must not block. So a query returns a number only if
//! the disk has not changed since it was counted, and otherwise starts a count. One count runs at a time.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Duration, Instant};

use crate::block::{BlockRead, Content, Lba, SECTOR};
use crate::mutex::lock;

/// Maximum time of one count; a count that takes longer is abandoned.
const COUNT_TIME: Duration = Duration::from_secs(10);

/// Minimum pause between two counts.
const MIN_PAUSE: Duration = Duration::from_secs(1);

/// Minimum pause as a multiple of the time of the last count: counting takes at most a 20th of a processor.
const PAUSE_FACTOR: u32 = 20;

/// Number of bytes that are data.
#[derive(Debug, Default)]
pub(super) struct BlockCount(Arc<CountState>);

#[derive(Debug, Default)]
struct CountState {
    /// Number of changes of the disk.
    changes: AtomicU64,
    last: Mutex<LastCount>,
    /// Set on drop; the thread checks it at each step.
    stop: AtomicBool,
}

#[derive(Debug, Default)]
struct LastCount {
    running: bool,
    /// The last count.
    ended: Option<EndedCount>,
}

#[derive(Debug)]
struct EndedCount {
    /// `None`: the count failed or took too long.
    bytes: Option<u64>,
    /// Number of changes before the count.
    changes: u64,
    at: Instant,
    took: Duration,
}

impl BlockCount {
    /// Notes a change of the disk. Called after it has been made: a count that has begun before does not cover it.
    pub(super) fn changed(&self) {
        self.0.changes.fetch_add(1, Ordering::AcqRel);
    }

    /// Returns the number, or `None` if the disk has changed since the last count, or could not be counted. Starts a count
    /// in the background if one may help.
    pub(super) fn bytes(&self, disk: &Arc<dyn BlockRead>) -> Option<u64> {
        if self.start_due() {
            let (disk, state) = (Arc::clone(disk), Arc::clone(&self.0));
            let started = std::thread::Builder::new()
                .name("count".to_owned())
                .spawn(move || state.count(disk));
            if started.is_err() {
                // No thread: the next query tries again.
                self.0.last().running = false;
            }
        }
        let changes = self.0.changes.load(Ordering::Acquire);
        let last = self.0.last();
        last.ended.as_ref().filter(|last| last.changes == changes)?.bytes
    }

    /// Ends a count that is running at its next step. No other one must be started afterwards.
    pub(super) fn stop(&self) {
        self.0.stop.store(true, Ordering::Relaxed);
    }

    /// Returns true while the thread of a count holds the disk.
    pub(super) fn is_running(&self) -> bool {
        self.0.last().running
    }

    /// Returns true if the caller has to start a count now, and marks it as running.
    fn start_due(&self) -> bool {
        let mut last = self.0.last();
        let outdated = last.ended.as_ref().is_none_or(|last| {
            let changed = last.changes != self.0.changes.load(Ordering::Acquire);
            changed && last.at.elapsed() > MIN_PAUSE.max(last.took * PAUSE_FACTOR)
        });
        outdated && !std::mem::replace(&mut last.running, true)
    }
}

impl Drop for BlockCount {
    fn drop(&mut self) {
        self.stop();
    }
}

impl CountState {
    fn count(&self, disk: Arc<dyn BlockRead>) {
        // The number of changes before the count: a change during it makes the result outdated again.
        let (changes, started) = (self.changes.load(Ordering::Acquire), Instant::now());
        let bytes = self.counted(&*disk, started);
        // First: the daemon closes the disk once no count runs.
        drop(disk);
        *self.last() = LastCount {
            running: false,
            ended: Some(EndedCount {
                bytes,
                changes,
                at: Instant::now(),
                took: started.elapsed(),
            }),
        };
    }

    fn last(&self) -> MutexGuard<'_, LastCount> {
        lock(&self.last)
    }

    /// Counts the bytes that are data. Returns `None` on an error, on timeout, and if the volume is dropped.
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
