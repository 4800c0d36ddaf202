//! Work for a disk behind a network that may have to wait, away from the event loops.
//!
//! ```text
//!   read, write, flush      begun by the loop, answered when the answer comes: no thread waits
//!   everything else ─► Lane ─► a thread of this disk, at most [`THREADS`]
//! ```
//! So a disk that hangs holds no loop, and no other disk's work stands behind its own. Waiting work is bounded by those
//! who wait for its answers: each is a task in a system call.

use std::collections::VecDeque;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// Threads of a disk.
const THREADS: usize = 4;

/// Something to do.
pub(crate) type Job = Box<dyn FnOnce() + Send>;

/// The work of one disk.
#[derive(Default)]
pub(crate) struct WorkerPool(Mutex<Queue>);

#[derive(Default)]
struct Queue {
    jobs: VecDeque<Job>,
    threads: usize,
}

impl std::fmt::Debug for WorkerPool {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let queue = self.queue();
        f.debug_struct("Lane")
            .field("jobs", &queue.jobs.len())
            .field("threads", &queue.threads)
            .finish()
    }
}

impl WorkerPool {
    /// Has a thread do it, soon. Where there is no thread to be had, and none at work, it is done at once.
    pub(crate) fn run(self: &Arc<Self>, job: Job) {
        let mut queue = self.queue();
        queue.jobs.push_back(job);
        if queue.threads >= THREADS {
            return;
        }
        queue.threads += 1;
        drop(queue);
        let this = Arc::clone(self);
        let begun = std::thread::Builder::new()
            .name("lane".to_owned())
            .spawn(move || this.work());
        if begun.is_err() {
            self.work();
        }
    }

    fn work(&self) {
        loop {
            let mut queue = self.queue();
            let Some(job) = queue.jobs.pop_front() else {
                queue.threads -= 1;
                return;
            };
            drop(queue);
            if catch_unwind(AssertUnwindSafe(job)).is_err() {
                tracing::error!("a request was given up after a panic");
            }
        }
    }

    fn queue(&self) -> MutexGuard<'_, Queue> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;

    use super::*;

    #[test]
    fn jobs_that_hang_hold_nobody_up_but_their_own_lane() {
        let (one, other) = (Arc::new(WorkerPool::default()), Arc::new(WorkerPool::default()));
        let (release, hang) = mpsc::channel::<()>();
        let hang = Arc::new(Mutex::new(hang));
        for _ in 0..2 * THREADS {
            let hang = Arc::clone(&hang);
            one.run(Box::new(move || {
                let _ = hang.lock().unwrap().recv();
            }));
        }
        let (tell, told) = mpsc::channel();
        other.run(Box::new(move || tell.send(()).unwrap()));
        told.recv().unwrap();
        assert!(one.queue().threads <= THREADS);
        drop(release);
    }

    #[test]
    fn a_job_that_panics_is_the_end_of_that_job() {
        let pool = Arc::new(WorkerPool::default());
        pool.run(Box::new(|| panic!("this is meant")));
        let (tell, told) = mpsc::channel();
        pool.run(Box::new(move || tell.send(()).unwrap()));
        told.recv().unwrap();
    }
}
