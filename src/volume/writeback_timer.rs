//! Periodic flush: completes an image some seconds after a write, although no program asks for it.
//!
//! The data of a new grain are in the file at once, but the entry that names it is a pending update until a flush, and a
//! stream has no tables at all. A loop device or a mapping may never flush, and the process may be killed. So a thread does
//! it on its own, as the kernel does with the dirty pages of any file: a crash of the process loses no more than a few
//! seconds of unflushed writes, and an image that is not written to any more is complete and marked clean.
//!
//! It asks for the group flush, as the requests of programs do, so that one flush at a time runs for a disk.
//!
//! ```text
//!   write ─► due ─► thread wakes ─ waits INTERVAL ─ written again meanwhile? ─ no ─► complete
//!                                    ▲                    └ yes ─► flush ─┐
//!                                    └────────────────────────────────────┘
//! ```
//! States: not started → idle (parked, `due` is false) ⇄ waiting (`due` is true) → stopped (dropped with the volume).
//! [`WritebackTimer::written`] starts the thread. Lock order: `thread`, then `stop`; the thread itself takes only `stop`,
//! and holds neither over a flush.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::thread::JoinHandle;
use std::time::Duration;

use super::FlushKind;
use super::group_flush::GroupFlush;
use crate::mutex::{lock, unlocked, wait_timeout_while};

/// Maximum time for which an update is only in memory: the commit interval of the kernel's file systems.
const INTERVAL: Duration = Duration::from_secs(5);

/// Timer that completes a disk some seconds after a write.
#[derive(Debug, Default)]
pub(super) struct WritebackTimer {
    state: Arc<TimerState>,
    /// The thread, once it was started.
    thread: Mutex<Option<JoinHandle<()>>>,
}

#[derive(Debug, Default)]
struct TimerState {
    /// True from a write until the image is complete. Every write reads it, without a lock.
    due: AtomicBool,
    /// True if the disk was written to again since the interval began.
    busy: AtomicBool,
    /// True when the thread has to end.
    stop: Mutex<bool>,
    /// Signalled when `stop` is set.
    stopped: Condvar,
}

impl WritebackTimer {
    /// Starts the interval after a write to the disk of `flushes`, if none is running. The first call starts the thread.
    pub(super) fn written(&self, flushes: &Arc<GroupFlush>) {
        // Sequentially consistent: a thread that has cleared `due` since then begins its flush after the write.
        if self.state.due.load(Ordering::SeqCst) {
            // Read first: a store by each write would move the cache line between the writers.
            if !self.state.busy.load(Ordering::Relaxed) {
                self.state.busy.store(true, Ordering::Release);
            }
            return;
        }
        let mut thread = lock(&self.thread);
        // Set before the unpark: the thread checks `due` before it parks, and an unpark before the park is not lost.
        self.state.due.store(true, Ordering::Release);
        match &*thread {
            Some(thread) => thread.thread().unpark(),
            None => {
                let (state, flushes) = (Arc::clone(&self.state), Arc::clone(flushes));
                // If no thread can be started, the updates stay pending until the next flush by the kernel.
                let started = std::thread::Builder::new()
                    .name("writeback".to_owned())
                    .spawn(move || state.run(&flushes));
                *thread = started.ok();
            }
        }
    }

    /// Returns true once the thread was started. It holds the disk until the timer is dropped.
    pub(super) fn is_started(&self) -> bool {
        lock(&self.thread).is_some()
    }
}

impl TimerState {
    fn run(&self, flushes: &Arc<GroupFlush>) {
        while !*self.stop() {
            if !self.due.load(Ordering::Acquire) {
                std::thread::park();
                continue;
            }
            // Waits for the whole interval, so that the writes of some seconds share one flush.
            let stop = wait_timeout_while(&self.stopped, self.stop(), INTERVAL, |stop| !*stop);
            if *stop {
                return;
            }
            // Cleared before the flush: a write during the flush makes the next one due.
            let busy = self.busy.swap(false, Ordering::AcqRel);
            self.due.store(busy, Ordering::SeqCst);
            let Some(writer) = flushes.durability().disk.writer() else {
                continue;
            };
            let done = match busy {
                // Another end of a stream every few seconds would only be taken off again.
                true if writer.sequential_write_only() => Ok(()),
                true => flushes.flush_here(FlushKind::Durable),
                false => flushes.flush_here(FlushKind::Complete),
            };
            if let Err(e) = done {
                // Retried after the interval. An error that may have lost data is in the write latch, and every program
                // that flushes gets it.
                tracing::debug!("periodic flush failed: {e}");
                self.due.store(true, Ordering::Release);
            }
        }
    }

    fn stop(&self) -> MutexGuard<'_, bool> {
        lock(&self.stop)
    }
}

impl Drop for WritebackTimer {
    fn drop(&mut self) {
        *self.state.stop() = true;
        self.state.stopped.notify_all();
        let thread = unlocked(&mut self.thread).take();
        if let Some(thread) = thread {
            thread.thread().unpark();
            // The thread holds the disk, and the disk holds locks on its files. They must be released when the volume
            // is gone.
            let _ = thread.join();
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc::{Receiver, channel};

    use super::super::durability::Durability;
    use super::super::group_flush::FlushOn;
    use super::*;
    use crate::error::Result;
    use crate::test_disk::TestDisk;

    /// A disk, its group flush, and a receiver that gets a message for each flush of it.
    fn disk() -> (Arc<TestDisk>, Arc<GroupFlush>, Receiver<()>) {
        let (sender, flushed) = channel();
        let disk = TestDisk::new(8).flushing(move || {
            sender.send(()).unwrap();
            Ok(())
        });
        let disk = Arc::new(disk);
        let flushes = GroupFlush::new(Durability::new(Arc::clone(&disk) as _, Vec::new()));
        (disk, Arc::new(flushes), flushed)
    }

    #[test]
    fn each_write_is_followed_by_a_flush() {
        let (_, flushes, flushed) = disk();
        let timer = WritebackTimer::default();
        for _ in 0..2 {
            flushes.durability().changed();
            timer.written(&flushes);
            flushed.recv_timeout(Duration::from_secs(60)).unwrap();
        }
        drop(timer);
        assert_eq!(Arc::strong_count(&flushes), 1, "the thread has ended");
        assert!(
            !flushes.durability().is_unfinished(),
            "it completes the image as a close does"
        );
    }

    #[test]
    fn a_drop_does_not_wait_for_the_interval() {
        let (disk, flushes, flushed) = disk();
        let timer = WritebackTimer::default();
        timer.written(&flushes);
        drop(timer);
        drop(flushes);
        assert_eq!(Arc::strong_count(&disk), 1);
        assert!(
            flushed.try_recv().is_err(),
            "a drop does not flush: the caller closes the disk"
        );
    }

    #[test]
    fn a_flush_that_is_due_waits_for_the_one_of_a_program() {
        let (starts, begun) = channel();
        let disk = TestDisk::new(8).queueing(Some(starts));
        let flushes = Arc::new(GroupFlush::new(Durability::new(Arc::new(disk), Vec::new())));
        let timer = WritebackTimer::default();
        let answer = Box::new(|result: &Result<()>| result.clone().unwrap());
        flushes.flush(FlushOn::OwnThread, FlushKind::Durable, answer);
        let of_program = begun.recv().unwrap();
        timer.written(&flushes);
        while flushes.waiting() == 0 {
            std::thread::yield_now();
        }
        assert!(begun.try_recv().is_err(), "two flushes of one disk at the same time");
        of_program(Ok(()));
        begun.recv_timeout(Duration::from_secs(60)).unwrap()(Ok(()));
    }
}
