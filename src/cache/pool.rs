//! Threads that fetch blocks for the readers of one disk: blocks that a reader needs first, then read-ahead.
//!
//! The queue holds the files weakly, so a file that is closed is not kept open by blocks that no caller reads any more. The
//! mutex is held to push or pop only, never while a thread fetches.

use std::collections::VecDeque;
use std::ops::Range;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, Weak};
use std::thread::JoinHandle;

use super::file_blocks::FileBlocks;
use crate::mutex::{lock, wait};

/// Maximum number of queued blocks of either kind: two reads of 1 MiB in the smallest blocks. The reader fetches the
/// excess itself. The bound is needed for damaged blocks: a failed read is not cached, so a reader that repeats it adds
/// blocks faster than the threads remove them.
pub(super) const MAX_QUEUED: usize = 4096;

/// Threads that fetch blocks. They end when the pool is dropped.
#[derive(Debug)]
pub struct FetchPool {
    queue: Arc<FetchQueue>,
    threads: Vec<JoinHandle<()>>,
}

#[derive(Debug, Default)]
struct FetchQueue {
    state: Mutex<QueueState>,
    wake: Condvar,
}

/// A block may be in both queues.
#[derive(Debug, Default)]
struct QueueState {
    /// Blocks that a reader waits for.
    requested: VecDeque<QueuedBlock>,
    /// Blocks that a reader will probably want.
    prefetch: VecDeque<QueuedBlock>,
    /// Set once on drop: the threads exit.
    closed: bool,
}

#[derive(Debug)]
struct QueuedBlock {
    file: Weak<FileBlocks>,
    number: u64,
    /// Largest number of blocks of the fetch that brings it.
    most: u64,
}

impl FetchPool {
    /// Starts `threads` threads. Errors: a thread can't be started.
    pub fn new(threads: usize) -> std::io::Result<Self> {
        let mut pool = Self {
            queue: Arc::default(),
            threads: Vec::new(),
        };
        for n in 0..threads {
            let queue = Arc::clone(&pool.queue);
            let thread = std::thread::Builder::new()
                .name(format!("fetch-{n}"))
                .spawn(move || queue.work())?;
            pool.threads.push(thread);
        }
        Ok(pool)
    }

    /// Returns true if the pool has no threads, so that readers fetch everything themselves.
    pub(super) fn is_empty(&self) -> bool {
        self.threads.is_empty()
    }

    /// Returns the number of threads.
    pub(super) fn threads(&self) -> u64 {
        self.threads.len() as u64
    }

    /// Queues blocks of a file. What does not fit is left out. `run_ahead`: largest number of blocks of one fetch of
    /// `prefetch`.
    pub(super) fn queue(&self, file: &Arc<FileBlocks>, requested: &[u64], prefetch: &[u64], run_ahead: u64) {
        let added = requested.len() + prefetch.len();
        if added == 0 {
            return;
        }
        let block = |number: &u64, most: u64| QueuedBlock {
            file: Arc::downgrade(file),
            number: *number,
            most,
        };
        let run = file.max_run();
        let mut state = self.queue.state();
        let space = |queued: usize| MAX_QUEUED.saturating_sub(queued);
        let (requested_space, prefetch_space) = (space(state.requested.len()), space(state.prefetch.len()));
        state
            .requested
            .extend(requested.iter().take(requested_space).map(|number| block(number, run)));
        let prefetch = prefetch.iter().take(prefetch_space);
        state.prefetch.extend(prefetch.map(|number| block(number, run_ahead)));
        // A thread that is woken while the lock is held would have to wait for it at once.
        drop(state);
        if added > 1 {
            self.queue.wake.notify_all();
        } else {
            self.queue.wake.notify_one();
        }
    }

    /// Takes the next blocks in place of a thread. Returns true with blocks that a reader waits for.
    #[cfg(test)]
    pub(super) fn next(&self) -> Option<(Range<u64>, bool)> {
        self.queue.next().map(|(_, blocks, requested)| (blocks, requested))
    }

    #[cfg(test)]
    pub(super) fn requested(&self) -> usize {
        self.queue.state().requested.len()
    }
}

impl Drop for FetchPool {
    fn drop(&mut self) {
        self.queue.state().closed = true;
        self.queue.wake.notify_all();
        for thread in self.threads.drain(..) {
            // The claim of a thread that panicked has failed its flight already, so no reader waits for it.
            let _ = thread.join();
        }
    }
}

impl FetchQueue {
    /// Fetches queued blocks until the pool is dropped.
    fn work(&self) {
        while let Some((file, blocks, requested)) = self.next() {
            // An error is not reported here: the readers fetch the block again and report theirs.
            if let Some(file) = file.upgrade() {
                file.fetch_unclaimed(blocks, requested);
            }
        }
    }

    /// Waits for the next blocks, and returns with them true if a reader waits for them. Returns `None` once the pool is
    /// dropped.
    fn next(&self) -> Option<(Weak<FileBlocks>, Range<u64>, bool)> {
        let mut state = self.state();
        loop {
            if state.closed {
                return None;
            }
            if let Some((file, run)) = pop_run(&mut state.requested) {
                return Some((file, run, true));
            }
            if let Some((file, run)) = pop_run(&mut state.prefetch) {
                return Some((file, run, false));
            }
            state = wait(&self.wake, state);
        }
    }

    fn state(&self) -> MutexGuard<'_, QueueState> {
        lock(&self.state)
    }
}

/// Takes the first block of a queue, and the blocks behind it that one fetch can bring as well.
fn pop_run(queue: &mut VecDeque<QueuedBlock>) -> Option<(Weak<FileBlocks>, Range<u64>)> {
    let QueuedBlock { file, number, most } = queue.pop_front()?;
    let mut end = number + 1;
    while end - number < most
        && queue
            .front()
            .is_some_and(|next| next.number == end && next.file.ptr_eq(&file))
    {
        queue.pop_front();
        end += 1;
    }
    Some((file, number..end))
}
