//! How many bytes of a disk are data: counted by a thread of its own when somebody asks, and again after changes.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use crate::block::{BlockRead, Content, Lba, SECTOR};

/// The longest that data are counted.
const COUNT_TIME: Duration = Duration::from_secs(10);

/// The rest between two counts, at least.
const REST: Duration = Duration::from_secs(1);

/// The same in times that the last count took: counting shall take no more of a processor than that.
const REST_SHARE: u32 = 20;

/// The bytes of a disk that are data, as far as they are known.
#[derive(Debug)]
pub(super) struct BlockCount(Arc<State>);

#[derive(Debug)]
struct State {
    /// What is said.
    bytes: AtomicU64,
    /// Changes of the disk.
    changes: AtomicU64,
    last: Mutex<Last>,
    stop: AtomicBool,
}

#[derive(Debug, Default)]
struct Last {
    running: bool,
    /// Of the last count: the changes before it, when it ended, how long it took.
    ended: Option<(u64, Instant, Duration)>,
}

impl BlockCount {
    /// `estimate` is said until the first count is done.
    pub(super) fn new(estimate: u64) -> Self {
        let (changes, stop) = (AtomicU64::new(0), AtomicBool::new(false));
        Self(Arc::new(State {
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

    /// What is known. Begins to count in the background if that may have changed.
    pub(super) fn bytes(&self, disk: &Arc<dyn BlockRead>) -> u64 {
        if self.begins() {
            let (disk, state) = (Arc::clone(disk), Arc::clone(&self.0));
            let begun = std::thread::Builder::new()
                .name("count".to_owned())
                .spawn(move || state.count(&*disk));
            if begun.is_err() {
                // no thread is to be had: what is known stays
                self.0.last.lock().unwrap_or_else(PoisonError::into_inner).running = false;
            }
        }
        self.0.bytes.load(Ordering::Relaxed)
    }

    /// Whether a count has to be begun now, by the caller.
    fn begins(&self) -> bool {
        let mut last = self.0.last.lock().unwrap_or_else(PoisonError::into_inner);
        let old = last.ended.is_none_or(|(changes, ended, took)| {
            changes != self.0.changes.load(Ordering::Relaxed) && ended.elapsed() > REST.max(took * REST_SHARE)
        });
        old && !std::mem::replace(&mut last.running, true)
    }
}

impl Drop for BlockCount {
    fn drop(&mut self) {
        self.0.stop.store(true, Ordering::Relaxed);
    }
}

impl State {
    fn count(&self, disk: &dyn BlockRead) {
        let (changes, begun) = (self.changes.load(Ordering::Relaxed), Instant::now());
        if let Some(bytes) = self.counted(disk, begun) {
            self.bytes.store(bytes, Ordering::Relaxed);
        }
        let mut last = self.last.lock().unwrap_or_else(PoisonError::into_inner);
        *last = Last {
            running: false,
            ended: Some((changes, Instant::now(), begun.elapsed())),
        };
    }

    /// Counts what is data. Neither an error nor a disk that goes away or takes too long matters to anybody: what was
    /// said before stays.
    fn counted(&self, disk: &dyn BlockRead, begun: Instant) -> Option<u64> {
        let end = disk.geometry().sectors;
        let (mut at, mut data) = (0, 0);
        while at < end {
            if begun.elapsed() > COUNT_TIME || self.stop.load(Ordering::Relaxed) {
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
