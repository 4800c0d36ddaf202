//! Worker threads for requests of a network disk that may block, away from the event loops.
//!
//! ```text
//!   read, write, flush            submitted by the event loop, completed by a callback: no thread waits
//!   everything else ─► WorkerPool ─► a thread of this disk, at most [`THREADS`]
//! ```
//! Each disk has its own pool. So a disk that hangs blocks no event loop, and no request of another disk. The queue
//! needs no limit: each job is a request that a task waits for in a system call.
//!
//! States of a worker thread: started by a job → runs jobs → ends when the queue is empty. The mutex is held only to
//! push or pop a job, never while a job runs.

use std::collections::VecDeque;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// Maximum number of worker threads of a disk: the readers of a disk on a web server wait here, each for a connection.
const THREADS: usize = 16;

/// A request that may block.
pub(crate) type Job = Box<dyn FnOnce() + Send>;

/// Worker threads of one disk, started on demand.
#[derive(Default)]
pub(crate) struct WorkerPool(Mutex<JobQueue>);

#[derive(Default)]
struct JobQueue {
    jobs: VecDeque<Job>,
    /// Threads that run, including those that are being started.
    threads: usize,
}

impl std::fmt::Debug for WorkerPool {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let queue = self.queue();
        f.debug_struct("WorkerPool")
            .field("jobs", &queue.jobs.len())
            .field("threads", &queue.threads)
            .finish()
    }
}

impl WorkerPool {
    /// Queues `job` for a worker thread. If no thread can be started, the caller runs the queue itself.
    pub(crate) fn run(self: &Arc<Self>, job: Job) {
        let mut queue = self.queue();
        queue.jobs.push_back(job);
        if queue.threads >= THREADS {
            return;
        }
        // Counted under the lock, so that concurrent callers do not start more than the maximum.
        queue.threads += 1;
        drop(queue);
        let this = Arc::clone(self);
        let started = std::thread::Builder::new()
            .name("worker".to_owned())
            .spawn(move || this.work());
        if started.is_err() {
            // Takes the place of the thread: `work` lowers the count again.
            self.work();
        }
    }

    fn work(&self) {
        loop {
            let mut queue = self.queue();
            // The count is lowered under the lock under which the queue was found empty. A job that is pushed
            // afterwards sees the lower count and starts a thread.
            let Some(job) = queue.jobs.pop_front() else {
                queue.threads -= 1;
                return;
            };
            drop(queue);
            // A panic must not end the thread: the count would stay too high, and the jobs in the queue would wait for
            // ever.
            if catch_unwind(AssertUnwindSafe(job)).is_err() {
                tracing::error!("request handler panicked");
            }
        }
    }

    fn queue(&self) -> MutexGuard<'_, JobQueue> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;

    use super::*;

    #[test]
    fn jobs_that_hang_block_only_their_own_pool() {
        let (one, other) = (Arc::new(WorkerPool::default()), Arc::new(WorkerPool::default()));
        let (release, hang) = mpsc::channel::<()>();
        let hang = Arc::new(Mutex::new(hang));
        for _ in 0..2 * THREADS {
            let hang = Arc::clone(&hang);
            one.run(Box::new(move || {
                let _ = hang.lock().unwrap().recv();
            }));
        }
        let (sender, done) = mpsc::channel();
        other.run(Box::new(move || sender.send(()).unwrap()));
        done.recv().unwrap();
        assert!(one.queue().threads <= THREADS);
        drop(release);
    }

    #[test]
    fn a_job_that_panics_fails_only_that_job() {
        let pool = Arc::new(WorkerPool::default());
        pool.run(Box::new(|| panic!("this is meant")));
        let (sender, done) = mpsc::channel();
        pool.run(Box::new(move || sender.send(()).unwrap()));
        done.recv().unwrap();
    }
}
