//! Brings to the files, some seconds after a write, what only the memory of this process holds.
//!
//! A write to a new grain is in the file at once, but the entry that names it waits for a flush. Nobody may ever ask for
//! one, and the process may be killed. So a thread flushes by itself, as the kernel does with the pages of any file; a
//! crash of the process costs no more of what was never flushed than a few seconds.
//!
//! ```text
//!   write ─► due ─► thread wakes ─ waits INTERVAL ─ still held back? ─► flush
//! ```
//! The thread is started by the first write that leaves something behind, and ends with the image.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use crate::block::{BlockRead, BlockWrite};

/// How long a write may be in memory only. What the kernel's file systems take between two commits.
const INTERVAL: Duration = Duration::from_secs(5);

/// Flushes some time after a write.
#[derive(Debug, Default)]
pub(super) struct WritebackTimer {
    state: Arc<State>,
    thread: Mutex<Option<JoinHandle<()>>>,
}

#[derive(Debug, Default)]
struct State {
    /// A flush will come; read without the lock by each write.
    due: AtomicBool,
    stop: Mutex<bool>,
    woken: Condvar,
}

impl WritebackTimer {
    /// Notes that `disk` was written to.
    pub(super) fn written(&self, disk: &Arc<dyn BlockRead>) {
        if self.state.due.load(Ordering::Relaxed) || !disk.writer().is_some_and(BlockWrite::has_unflushed_metadata) {
            return;
        }
        let mut thread = self.thread.lock().unwrap_or_else(PoisonError::into_inner);
        self.state.due.store(true, Ordering::Relaxed);
        match &*thread {
            Some(thread) => thread.thread().unpark(),
            None => {
                let (state, disk) = (Arc::clone(&self.state), Arc::clone(disk));
                // without a thread it waits for the next flush of somebody
                let begun = std::thread::Builder::new()
                    .name("settle".to_owned())
                    .spawn(move || state.run(&*disk));
                *thread = begun.ok();
            }
        }
    }
}

impl State {
    fn run(&self, disk: &dyn BlockRead) {
        while !*self.stop() {
            if !self.due.load(Ordering::Relaxed) {
                std::thread::park();
                continue;
            }
            let stop = self.woken.wait_timeout_while(self.stop(), INTERVAL, |stop| !*stop);
            if *stop.unwrap_or_else(PoisonError::into_inner).0 {
                return;
            }
            self.due.store(false, Ordering::Relaxed);
            let Some(writer) = disk.writer().filter(|writer| writer.has_unflushed_metadata()) else {
                continue;
            };
            if let Err(e) = writer.flush() {
                // it is held back still, or the disk says so to everybody from now on
                tracing::debug!("a flush in the background failed: {e}");
                self.due.store(writer.has_unflushed_metadata(), Ordering::Relaxed);
            }
        }
    }

    fn stop(&self) -> MutexGuard<'_, bool> {
        self.stop.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for WritebackTimer {
    fn drop(&mut self) {
        *self.state.stop() = true;
        self.state.woken.notify_all();
        let thread = self.thread.get_mut().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(thread) = thread {
            thread.thread().unpark();
            // it holds the disk, whose locks must be gone with the image
            let _ = thread.join();
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc::{Receiver, channel};

    use super::*;
    use crate::test_disk::TestDisk;

    /// A disk, and what hears of each flush of it.
    fn disk() -> (Arc<TestDisk>, Receiver<()>) {
        let (say, heard) = channel();
        let disk = TestDisk::new(8).flushing(move || {
            say.send(()).unwrap();
            Ok(())
        });
        (Arc::new(disk), heard)
    }

    #[test]
    fn what_is_held_back_is_flushed_by_itself_each_time() {
        let (disk, heard) = disk();
        let shared: Arc<dyn BlockRead> = Arc::clone(&disk) as _;
        let settler = WritebackTimer::default();
        for _ in 0..2 {
            disk.hold_back();
            settler.written(&shared);
            heard.recv_timeout(Duration::from_secs(60)).unwrap();
        }
        drop(settler);
        assert_eq!(Arc::strong_count(&disk), 2, "the thread has ended");
    }

    #[test]
    fn nothing_is_started_where_nothing_is_held_back_and_an_end_waits_for_no_interval() {
        let (disk, heard) = disk();
        let shared: Arc<dyn BlockRead> = Arc::clone(&disk) as _;
        let settler = WritebackTimer::default();
        settler.written(&shared);
        assert!(settler.thread.lock().unwrap().is_none());
        disk.hold_back();
        settler.written(&shared);
        drop(settler);
        assert_eq!(Arc::strong_count(&disk), 2);
        assert!(
            heard.try_recv().is_err(),
            "the end is no flush: who closes the disk does that"
        );
    }
}
