//! Worker threads for requests that may block, away from the event loops. Shared by all disks of a mount.
//!
//! ```text
//!   read, write, flush            inline on a local disk; submitted to the queue of a disk behind a network
//!   everything else ─► DiskShare ─► WorkerPool ─► a thread, at most [`THREADS`] in the mount
//! ```
//! # Fairness
//!
//! Disks whose sources are dead must not take all threads. So one thread is reserved for each disk that runs no job, and a
//! further job of a disk starts only if fewer of its jobs are running than threads are free beyond those (a dynamic
//! threshold, as for the shared buffers of network switches): one disk alone gets half of the threads. Jobs that may not
//! start wait in the queue of their disk, and the disks take turns.
//!
//! The queues need no limit: each job is a request that a task waits for in a system call.
//!
//! States of a worker thread: started by a job → runs jobs → waits for a job → ends after [`IDLE`] without one. The mutex is
//! held only to push or pop a job, never while a job runs.

use std::collections::VecDeque;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::time::Duration;

use crate::mutex::{lock, wait_timeout_while};

/// Maximum number of jobs in flight, in a mount of up to that many disks; otherwise one for each disk. A reader of a disk on
/// a web server waits here for its block.
const THREADS: usize = 64;

/// Time for which a thread without a job waits for the next one. A program that reads block after block comes back within a
/// round trip; to start a thread for each block halves the rate of such reads from a near server.
const IDLE: Duration = Duration::from_secs(1);

/// A request that may block.
pub(crate) type Job = Box<dyn FnOnce() + Send>;

/// Worker threads of a mount, started on demand.
#[derive(Default)]
pub(crate) struct WorkerPool {
    state: Mutex<PoolState>,
    /// Notified for each job in `PoolState::handed`.
    handed: Condvar,
}

/// Share of one disk in a pool.
#[derive(Debug)]
pub(crate) struct DiskShare {
    pool: Arc<WorkerPool>,
    /// Index in `PoolState::disks`.
    disk: usize,
}

#[derive(Default)]
struct PoolState {
    disks: Vec<DiskJobs>,
    /// Indexes in `disks` whose disk is gone.
    unused: Vec<usize>,
    /// Disk whose turn is next.
    turn: usize,
    /// Jobs that are counted as running, or that a thread is being started for.
    running: usize,
    /// Jobs for threads that wait, each taken from their number.
    handed: VecDeque<(usize, Job)>,
    /// Threads that wait and have no job in `handed`.
    waiting: usize,
}

#[derive(Default)]
struct DiskJobs {
    waiting: VecDeque<Job>,
    running: usize,
}

impl std::fmt::Debug for WorkerPool {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let state = self.state();
        f.debug_struct("WorkerPool")
            .field("disks", &state.disks.len())
            .field("running", &state.running)
            .field("waiting", &state.waiting)
            .finish()
    }
}

impl DiskShare {
    /// Queues `job` for a worker thread. If no thread can be started, the caller runs the job itself.
    pub(crate) fn run(&self, job: Job) {
        let mut state = self.pool.state();
        if let Some(jobs) = state.disks.get_mut(self.disk) {
            jobs.waiting.push_back(job);
        }
        // Counted as running under the lock, so that concurrent callers do not start more than the maximum.
        let Some(next) = state.take_next() else { return };
        if state.waiting > 0 {
            state.waiting -= 1;
            state.handed.push_back(next);
            drop(state);
            self.pool.handed.notify_one();
            return;
        }
        drop(state);
        // Shared with the thread, so that the job is not lost if the thread cannot be started.
        let next = Arc::new(Mutex::new(Some(next)));
        let (pool, shared) = (Arc::clone(&self.pool), Arc::clone(&next));
        let started = std::thread::Builder::new()
            .name("worker".to_owned())
            .spawn(move || pool.work(&shared, true));
        if started.is_err() {
            // The caller has other work: it must not wait here for further jobs.
            self.pool.work(&next, false);
        }
    }
}

impl Drop for DiskShare {
    fn drop(&mut self) {
        // Jobs that still wait or run are those of the next disk from now on, which shares the place with them.
        self.pool.state().unused.push(self.disk);
    }
}

impl WorkerPool {
    /// Adds a disk. Its place is used again once its share is dropped.
    pub(crate) fn add_disk(self: &Arc<Self>) -> DiskShare {
        let mut state = self.state();
        let disk = state.unused.pop().unwrap_or_else(|| {
            state.disks.push(DiskJobs::default());
            state.disks.len() - 1
        });
        DiskShare {
            pool: Arc::clone(self),
            disk,
        }
    }

    /// Runs `first`, then every other job that may start. A thread of the pool (`waits`) goes on until none has come for
    /// [`IDLE`].
    fn work(&self, first: &Mutex<Option<(usize, Job)>>, waits: bool) {
        let mut next = lock(first).take();
        while let Some((disk, job)) = next {
            // A panic must not end the thread: the count would stay too high, and jobs in a queue would wait for ever.
            if catch_unwind(AssertUnwindSafe(job)).is_err() {
                tracing::error!("request handler panicked");
            }
            let mut state = self.state();
            state.ended(disk);
            // The count is lowered under the lock under which no job was found. A job that is pushed afterwards sees the
            // lower count and starts a thread.
            next = state.take_next();
            if waits && next.is_none() {
                next = self.wait_for_job(state);
            }
        }
    }

    /// Waits for a job, at most [`IDLE`].
    fn wait_for_job(&self, mut state: MutexGuard<'_, PoolState>) -> Option<(usize, Job)> {
        state.waiting += 1;
        let mut state = wait_timeout_while(&self.handed, state, IDLE, |state| state.handed.is_empty());
        // A job is there even after the time has passed if it was handed over at the same moment: it was taken from the
        // number of waiting threads, so one of them has to run it.
        let job = state.handed.pop_front();
        if job.is_none() {
            state.waiting -= 1;
        }
        job
    }

    fn state(&self) -> MutexGuard<'_, PoolState> {
        lock(&self.state)
    }
}

impl PoolState {
    /// Takes the next job that may start, and counts it as running.
    fn take_next(&mut self) -> Option<(usize, Job)> {
        let count = self.disks.len();
        let free = THREADS.max(count - self.unused.len()).saturating_sub(self.running);
        let idle = self.disks.iter().filter(|jobs| jobs.running == 0).count();
        let idle = idle.saturating_sub(self.unused.len());
        let disk = (0..count)
            .map(|i| (self.turn + i) % count)
            .find(|&disk| self.disks.get(disk).is_some_and(|jobs| jobs.may_start(free, idle)))?;
        let jobs = self.disks.get_mut(disk)?;
        let job = jobs.waiting.pop_front()?;
        jobs.running += 1;
        self.running += 1;
        self.turn = disk + 1;
        Some((disk, job))
    }

    fn ended(&mut self, disk: usize) {
        self.running -= 1;
        if let Some(jobs) = self.disks.get_mut(disk) {
            jobs.running -= 1;
        }
    }
}

impl DiskJobs {
    /// Returns true if a job waits that may start while `free` threads are free and `idle` disks run no job.
    fn may_start(&self, free: usize, idle: usize) -> bool {
        let reserved = if self.running == 0 { 0 } else { idle };
        !self.waiting.is_empty() && self.running < free.saturating_sub(reserved)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc::{self, Sender};

    use super::*;

    /// Gives `disk` jobs that hang until the sender is dropped.
    fn hang(disk: &DiskShare, jobs: usize) -> Sender<()> {
        let (release, hang) = mpsc::channel::<()>();
        let hang = Arc::new(Mutex::new(hang));
        for _ in 0..jobs {
            let hang = Arc::clone(&hang);
            disk.run(Box::new(move || {
                let _ = hang.lock().unwrap().recv();
            }));
        }
        release
    }

    #[test]
    fn disks_that_hang_never_take_all_threads() {
        let pool = Arc::new(WorkerPool::default());
        let disks: Vec<_> = (0..2 * THREADS).map(|_| pool.add_disk()).collect();
        let mut held = Vec::new();
        for dead in disks.iter().skip(1) {
            held.push(hang(dead, 2 * THREADS));
            let (sender, done) = mpsc::channel();
            for _ in 0..10 {
                let sender = sender.clone();
                disks[0].run(Box::new(move || sender.send(()).unwrap()));
            }
            (0..10).for_each(|_| done.recv().unwrap());
        }
        assert!(pool.state().running <= 2 * THREADS);
    }

    #[test]
    fn one_disk_has_many_jobs_in_flight_and_all_of_them_run() {
        let pool = Arc::new(WorkerPool::default());
        let disk = pool.add_disk();
        let held = hang(&disk, 3 * THREADS);
        assert_eq!(pool.state().running, THREADS / 2);
        let (sender, done) = mpsc::channel();
        disk.run(Box::new(move || sender.send(()).unwrap()));
        drop(held);
        done.recv().unwrap();
    }

    #[test]
    fn a_thread_that_waits_runs_the_next_job() {
        let pool = Arc::new(WorkerPool::default());
        let disk = pool.add_disk();
        let (sender, done) = mpsc::channel();
        let mut threads = std::collections::HashSet::new();
        for _ in 0..100 {
            let sender = sender.clone();
            disk.run(Box::new(move || sender.send(std::thread::current().id()).unwrap()));
            threads.insert(done.recv().unwrap());
            let is_running = || {
                let state = pool.state();
                state.waiting == 0 && state.running > 0
            };
            while is_running() {
                std::thread::yield_now();
            }
        }
        // A thread may end between two jobs on a machine that is stopped for long; never for each job.
        assert!(threads.len() < 50, "{} threads for 100 jobs", threads.len());
        let state = pool.state();
        assert_eq!((state.running, state.handed.len()), (0, 0));
    }

    #[test]
    fn the_place_of_a_disk_that_is_gone_is_used_again() {
        let pool = Arc::new(WorkerPool::default());
        let kept = pool.add_disk();
        for _ in 0..1000 {
            let disk = pool.add_disk();
            let (sender, done) = mpsc::channel();
            disk.run(Box::new(move || sender.send(()).unwrap()));
            done.recv().unwrap();
        }
        assert_eq!(pool.state().disks.len(), 2);
        drop(kept);
    }

    #[test]
    fn a_job_that_panics_fails_only_that_job() {
        let disk = Arc::new(WorkerPool::default()).add_disk();
        disk.run(Box::new(|| panic!("this is meant")));
        let (sender, done) = mpsc::channel();
        disk.run(Box::new(move || sender.send(()).unwrap()));
        done.recv().unwrap();
    }
}
