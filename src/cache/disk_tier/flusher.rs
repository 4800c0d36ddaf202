//! Thread that makes the blocks of a tier durable, so that no reader waits for a disk's write cache.
//!
//! ```text
//!   first unflushed block of a file ─► job, due in FLUSH_DELAY ─┐
//!   many unflushed blocks, or all blocks are there ─► due now ──┴─► sync, durable entries ─► completion record
//! ```
//! The queue holds the files weakly: a file that ends flushes what is left itself. The thread starts with the first job
//! and ends with the tier, which waits for it.
//!
//! Lock order: the queue is locked for a push or a pop only.

use std::sync::{Arc, Condvar, Mutex, MutexGuard, Weak};
use std::thread::JoinHandle;
use std::time::Instant;

use crate::mutex::{lock, wait, wait_timeout};

/// Blocks that the thread can flush.
pub(super) trait Flush: Send + Sync + 'static {
    /// Flushes in the thread of the tier.
    fn flush_in_background(&self);
}

/// Jobs of the thread.
pub(super) struct FlushQueue<F> {
    state: Mutex<QueueState<F>>,
    wake: Condvar,
}

struct QueueState<F> {
    jobs: Vec<(Instant, Weak<F>)>,
    thread: Option<JoinHandle<()>>,
    closed: bool,
}

impl<F> Default for FlushQueue<F> {
    fn default() -> Self {
        let state = QueueState {
            jobs: Vec::new(),
            thread: None,
            closed: false,
        };
        Self {
            state: Mutex::new(state),
            wake: Condvar::new(),
        }
    }
}

impl<F: Flush> FlushQueue<F> {
    /// Flushes a file at `due` or before. Returns false if there is no thread that could.
    pub(super) fn push(self: &Arc<Self>, file: &Weak<F>, due: Instant) -> bool {
        let mut state = self.state();
        if state.closed {
            return false;
        }
        if state.thread.is_none() {
            let queue = Arc::clone(self);
            let spawned = std::thread::Builder::new().name("cache-dir".to_owned());
            let Ok(thread) = spawned.spawn(move || queue.work()) else {
                return false;
            };
            state.thread = Some(thread);
        }
        match state.jobs.iter_mut().find(|(_, queued)| queued.ptr_eq(file)) {
            Some((at, _)) => *at = due.min(*at),
            None => state.jobs.push((due, Weak::clone(file))),
        }
        drop(state);
        self.wake.notify_one();
        true
    }

    /// Returns true if the thread has other work: a job is due, or the tier ends.
    pub(super) fn is_wanted(&self) -> bool {
        let state = self.state();
        let now = Instant::now();
        state.closed || state.jobs.iter().any(|(due, _)| *due <= now)
    }

    /// Ends the thread, and waits for the job in progress.
    pub(super) fn close(&self) {
        let thread = {
            let mut state = self.state();
            state.closed = true;
            state.thread.take()
        };
        self.wake.notify_one();
        if let Some(thread) = thread {
            // A panic of the thread has left entries of this boot, which are valid.
            let _ = thread.join();
        }
    }

    fn work(&self) {
        while let Some(file) = self.next() {
            if let Some(file) = file.upgrade() {
                file.flush_in_background();
            }
        }
    }

    /// Waits for the next job that is due. Returns `None` once the tier ends.
    fn next(&self) -> Option<Weak<F>> {
        let mut state = self.state();
        loop {
            if state.closed {
                return None;
            }
            let first = state.jobs.iter().enumerate().min_by_key(|(_, (due, _))| *due);
            let Some((number, due)) = first.map(|(number, (due, _))| (number, *due)) else {
                state = wait(&self.wake, state);
                continue;
            };
            let left = due.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Some(state.jobs.swap_remove(number).1);
            }
            state = wait_timeout(&self.wake, state, left).0;
        }
    }

    fn state(&self) -> MutexGuard<'_, QueueState<F>> {
        lock(&self.state)
    }
}
