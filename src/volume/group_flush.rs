//! Group flush: one flush at a time for a disk, shared by all requests that wait, and never on the last event loop. If one
//! of them wants the image completed (a close), the flush does that for all.
//!
//! ```text
//!   fsync, close, O_SYNC ─► one in flight? ─ yes ─► waits for the next one, with all others that do
//!                              │ no
//!                              ├─ the disk has a queue ─► submitted here, answered on completion: no thread blocks
//!                              ├─ a loop can be spared ─► runs here: no hop between threads
//!                              ├─ the caller may wait   ─► runs here: the writeback timer, the unmount
//!                              └─ else                 ─► runs in a thread of its own
//!                              ▼
//!                           flush ─► answers ─► requests waiting meanwhile? ─► flush again
//! ```
//! A flush may take seconds, and the requests of all disks need the event loops, so at least one loop is kept free of
//! flushes. A request that arrives while a flush is in flight cannot share it, because that flush may have started
//! before the write that the request covers. All such requests share the next flush. So there are never more flush
//! threads than disks.
//!
//! States of a [`FlushQueue`]: idle, or `running` with one flush in flight. `submitting` marks the part of `running` in
//! which [`GroupFlush::submit`] is on the stack: a flush that completes within it hands the waiting requests over in
//! `resubmit` instead of submitting from inside of the completion.
//!
//! The mutex is held only to change the queue, never across a flush or an answer.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::mpsc::channel;
use std::sync::{Arc, Mutex, MutexGuard};

use crate::block::{BlockQueue, Stay};
use crate::error::{Error, ErrorKind, Result};
use crate::mutex::lock;
use crate::volume::durability::Durability;
use crate::volume::loop_budget::LoopBudget;

/// Guarantee that a request asks of a flush. The greater includes the smaller.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Default)]
pub(crate) enum FlushKind {
    /// Everything that was written before is durable.
    #[default]
    Durable,
    /// And the image is complete and marked as properly closed, so that other programs can use it.
    Complete,
}

/// Called with the result of the flush that a request waits for.
pub(crate) type FlushAnswer = Box<dyn FnOnce(&Result<()>) + Send>;

/// Thread on which a flush that blocks may run.
#[derive(Debug, Clone, Copy)]
pub(super) enum FlushOn<'a> {
    /// The calling event loop, if it can be spared, or else a thread of its own.
    SpareLoop(&'a LoopBudget),
    /// A thread of its own.
    OwnThread,
    /// The calling thread, which has nothing else to do.
    Caller,
}

/// Group flush of one disk.
pub(super) struct GroupFlush {
    durability: Durability,
    queue: Mutex<FlushQueue>,
}

#[derive(Default)]
struct FlushQueue {
    /// A flush is in flight.
    running: bool,
    /// The flush is being submitted, so its completion may be called on the stack of `submit`.
    submitting: bool,
    /// Requests for the next flush, left by a flush that completed while it was submitted.
    resubmit: Vec<FlushAnswer>,
    /// Requests that arrived while the current flush was in flight.
    waiting: Vec<FlushAnswer>,
    /// Greatest guarantee that they ask for.
    waiting_kind: FlushKind,
}

impl std::fmt::Debug for GroupFlush {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let queue = self.queue();
        f.debug_struct("GroupFlush")
            .field("running", &queue.running)
            .field("waiting", &queue.waiting.len())
            .finish()
    }
}

impl GroupFlush {
    /// Creates the group flush of a disk.
    pub(super) fn new(durability: Durability) -> Self {
        Self {
            durability,
            queue: Mutex::default(),
        }
    }

    /// Returns the disk that is flushed.
    pub(super) fn durability(&self) -> &Durability {
        &self.durability
    }

    /// Flushes, and calls `answer` once everything that was written before is durable.
    ///
    /// Returns at once if the work is done by another thread or by the disk's queue. The caller has to poll that queue
    /// afterwards, if it can be polled.
    pub(super) fn flush(self: &Arc<Self>, on: FlushOn<'_>, kind: FlushKind, answer: FlushAnswer) {
        {
            let mut queue = self.queue();
            if queue.running {
                queue.waiting_kind = queue.waiting_kind.max(kind);
                return queue.waiting.push(answer);
            }
            queue.running = true;
        }
        if let Some(queue) = self.durability.disk.queue() {
            return self.submit(queue, vec![answer]);
        }
        let _spared = match on {
            FlushOn::Caller => return self.work(kind, answer),
            FlushOn::SpareLoop(loops) => match loops.spare() {
                Some(spared) => spared,
                None => return self.work_in_own_thread(kind, answer),
            },
            FlushOn::OwnThread => return self.work_in_own_thread(kind, answer),
        };
        self.work(kind, answer);
    }

    /// Flushes on the calling thread, or waits for the thread that does.
    pub(super) fn flush_here(self: &Arc<Self>, kind: FlushKind) -> Result<()> {
        let (sender, result) = channel();
        let answer = move |flushed: &Result<()>| {
            // The receiver waits below.
            let _ = sender.send(flushed.clone());
        };
        self.flush(FlushOn::Caller, kind, Box::new(answer));
        if let Some(poller) = self.durability.disk.queue().and_then(BlockQueue::poller) {
            poller.poll_completions(Stay::Patiently);
        }
        result.recv().unwrap_or_else(|_dropped| Err(dropped()))
    }

    fn work_in_own_thread(self: &Arc<Self>, kind: FlushKind, answer: FlushAnswer) {
        // Shared with the thread, so that the request is not lost if the thread cannot be started.
        let first = Arc::new(Mutex::new(Some(answer)));
        let (this, shared) = (Arc::clone(self), Arc::clone(&first));
        let spawned = std::thread::Builder::new().name("flush".to_owned()).spawn(move || {
            if let Some(answer) = take(&shared) {
                this.work(kind, answer);
            }
        });
        if spawned.is_err()
            && let Some(answer) = take(&first)
        {
            self.work(kind, answer);
        }
    }

    /// Submits a flush for `answers`. When it completes at once, submits the next one for the requests that waited.
    fn submit(self: &Arc<Self>, queue: &dyn BlockQueue, mut answers: Vec<FlushAnswer>) {
        while !answers.is_empty() {
            self.queue().submitting = true;
            let mut flush = SubmittedFlush {
                flushes: Arc::clone(self),
                answers,
            };
            self.durability.finishing();
            let submit = || queue.submit_flush(Box::new(move |result| flush.complete(&result)));
            if catch_unwind(AssertUnwindSafe(submit)).is_err() {
                tracing::error!("submitting a flush panicked; its requests are answered with EIO");
            }
            let mut queue = self.queue();
            queue.submitting = false;
            // A loop rather than a recursion: a queue that completes at once would otherwise nest one flush in another
            // until the stack overflows.
            answers = std::mem::take(&mut queue.resubmit);
        }
    }

    /// Takes the requests that wait for the next flush. If there are none, the queue becomes idle.
    fn take_waiting(&self) -> (FlushKind, Vec<FlushAnswer>) {
        let mut queue = self.queue();
        let (kind, waiting) = (queue.waiting_kind, std::mem::take(&mut queue.waiting));
        queue.waiting_kind = FlushKind::Durable;
        queue.running = !waiting.is_empty();
        // `running` changes under the same lock as `waiting` is emptied. Otherwise a request could join a queue that no
        // thread flushes any more.
        if queue.submitting {
            queue.resubmit = waiting;
            return (kind, Vec::new());
        }
        (kind, waiting)
    }

    /// Flushes for `first`, then for the requests that waited meanwhile, until none is left.
    fn work(&self, mut kind: FlushKind, first: FlushAnswer) {
        let mut answers = vec![first];
        while !answers.is_empty() {
            let flush = || self.durability.flush(kind);
            let result = catch_unwind(AssertUnwindSafe(flush)).unwrap_or_else(|_| {
                Err(Error::new(
                    ErrorKind::Os(libc::EIO),
                    "the flush panicked; what was written may not be durable",
                ))
            });
            answer_all(answers, &result);
            (kind, answers) = self.take_waiting();
        }
    }

    /// Returns the number of requests that wait for the next flush.
    #[cfg(test)]
    pub(super) fn waiting(&self) -> usize {
        self.queue().waiting.len()
    }

    fn queue(&self) -> MutexGuard<'_, FlushQueue> {
        lock(&self.queue)
    }
}

/// A submitted flush. Dropped without completion it answers with EIO, so that no request waits forever.
struct SubmittedFlush {
    flushes: Arc<GroupFlush>,
    answers: Vec<FlushAnswer>,
}

impl SubmittedFlush {
    fn complete(&mut self, result: &Result<()>) {
        answer_all(std::mem::take(&mut self.answers), result);
        // A disk with a queue is complete when its writes are durable.
        let (_, waiting) = self.flushes.take_waiting();
        if let Some(queue) = self.flushes.durability.disk.queue().filter(|_| !waiting.is_empty()) {
            self.flushes.submit(queue, waiting);
            if let Some(poller) = queue.poller() {
                poller.poll_completions(Stay::No);
            }
        }
    }
}

impl Drop for SubmittedFlush {
    fn drop(&mut self) {
        if !self.answers.is_empty() {
            self.complete(&Err(dropped()));
        }
    }
}

fn dropped() -> Error {
    Error::new(ErrorKind::Os(libc::EIO), "the flush was dropped before it completed")
}

/// Answers all requests. An answer that panics does not keep the others from being called.
fn answer_all(answers: Vec<FlushAnswer>, result: &Result<()>) {
    for answer in answers {
        if catch_unwind(AssertUnwindSafe(|| answer(result))).is_err() {
            tracing::error!("the answer to a flush panicked");
        }
    }
}

/// Takes the answer unless the other thread has taken it already.
fn take(answer: &Mutex<Option<FlushAnswer>>) -> Option<FlushAnswer> {
    lock(answer).take()
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc::{Receiver, Sender};
    use std::thread;

    use super::*;
    use crate::test_disk::TestDisk;

    fn flushes(disk: TestDisk) -> Arc<GroupFlush> {
        Arc::new(GroupFlush::new(Durability::new(Arc::new(disk), Vec::new())))
    }

    /// Returns the group flush of a disk whose flushes report the name of their thread and wait for a result, the receiver
    /// of the names, and the sender of the results.
    fn slow() -> (Arc<GroupFlush>, Receiver<String>, Sender<Result<()>>) {
        let ((starts, begun), (give, results)) = (channel(), channel());
        let results = Mutex::new(results);
        let disk = TestDisk::new(8).flushing(move || {
            starts
                .send(thread::current().name().unwrap_or_default().to_owned())
                .unwrap();
            results.lock().unwrap().recv().unwrap()
        });
        (flushes(disk), begun, give)
    }

    fn failure() -> Result<()> {
        Err(Error::new(ErrorKind::Os(libc::EIO), "broken"))
    }

    #[test]
    fn requests_during_a_flush_share_the_next_one_and_its_error() {
        let (flushes, begun, give) = slow();
        let loops = LoopBudget::new(2);
        let on = FlushOn::SpareLoop(&loops);
        let (answers, answered) = channel();
        let answer = |name: &'static str| -> FlushAnswer {
            let answers = answers.clone();
            Box::new(move |result| answers.send((name, result.is_ok())).unwrap())
        };
        thread::scope(|scope| {
            let first = answer("first");
            scope.spawn(|| flushes.flush(on, FlushKind::Durable, first));
            begun.recv().unwrap();
            // Both return at once, although nothing has been flushed yet.
            flushes.flush(on, FlushKind::Durable, answer("second"));
            flushes.flush(on, FlushKind::Durable, answer("third"));
            give.send(Ok(())).unwrap();
            assert_eq!(answered.recv().unwrap(), ("first", true));
            begun.recv().unwrap();
            assert!(answered.try_recv().is_err());
            give.send(failure()).unwrap();
        });
        assert_eq!(
            (answered.recv().unwrap(), answered.recv().unwrap()),
            (("second", false), ("third", false))
        );
        assert!(begun.try_recv().is_err(), "one flush more than necessary");
    }

    #[test]
    fn the_last_loop_is_never_used_for_a_flush() {
        let ((one, one_begun, one_give), (two, two_begun, two_give)) = (slow(), slow());
        let loops = LoopBudget::new(2);
        let (answers, answered) = channel();
        let answer = || -> FlushAnswer {
            let answers = answers.clone();
            Box::new(move |result| answers.send(result.is_ok()).unwrap())
        };
        thread::scope(|scope| {
            let first = answer();
            scope.spawn(|| one.flush(FlushOn::SpareLoop(&loops), FlushKind::Durable, first));
            one_begun.recv().unwrap();
            // This thread stands for the last loop, and must not block.
            two.flush(FlushOn::SpareLoop(&loops), FlushKind::Durable, answer());
            assert_eq!(two_begun.recv().unwrap(), "flush");
            two_give.send(Ok(())).unwrap();
            assert!(answered.recv().unwrap());
            one_give.send(Ok(())).unwrap();
            assert!(answered.recv().unwrap());
        });
        let busy = loops.spare();
        assert!(
            busy.is_some() && loops.spare().is_none(),
            "one loop, no more and no less, can be spared again"
        );
    }

    #[test]
    fn submitted_flushes_are_shared_and_a_dropped_one_is_an_error() {
        let (starts, begun) = channel();
        let flushes = flushes(TestDisk::new(8).queueing(Some(starts)));
        let on = FlushOn::OwnThread;
        let (answers, answered) = channel();
        let flush = |name: &'static str| {
            let answers = answers.clone();
            let answer = Box::new(move |result: &Result<()>| answers.send((name, result.is_ok())).unwrap());
            flushes.flush(on, FlushKind::Durable, answer);
        };
        ["first", "second", "third"].into_iter().for_each(flush);
        let done = begun.try_recv().unwrap();
        assert!(begun.try_recv().is_err(), "one at a time");
        done(Ok(()));
        assert_eq!(answered.try_recv(), Ok(("first", true)));
        let shared = begun.try_recv().unwrap();
        assert!(answered.try_recv().is_err());
        drop(shared);
        assert_eq!(
            (answered.try_recv(), answered.try_recv()),
            (Ok(("second", false)), Ok(("third", false)))
        );
        // The queue is idle again.
        flush("fourth");
        begun.try_recv().unwrap()(failure());
        assert_eq!(answered.try_recv(), Ok(("fourth", false)));
        assert!(begun.try_recv().is_err());
    }

    #[test]
    fn regression_an_answer_that_panics_does_not_affect_others_or_later_flushes() {
        let (starts, begun) = channel();
        let flushes = flushes(TestDisk::new(8).queueing(Some(starts)));
        let on = FlushOn::OwnThread;
        let (answers, answered) = channel();
        let flush = |panics: bool| {
            let answers = answers.clone();
            let answer = move |result: &Result<()>| {
                assert!(!panics, "panic on purpose");
                answers.send(result.is_ok()).unwrap();
            };
            flushes.flush(on, FlushKind::Durable, Box::new(answer));
        };
        flush(false);
        [true, false].into_iter().for_each(flush);
        for _ in 0..2 {
            begun.try_recv().unwrap()(Ok(()));
            assert_eq!(answered.try_recv(), Ok(true));
        }
        flush(false);
        begun.try_recv().unwrap()(Ok(()));
        assert_eq!(answered.try_recv(), Ok(true));
    }

    #[test]
    fn regression_flushes_that_complete_at_once_do_not_nest() {
        /// Flushes again from each answer, `left` times.
        fn again(flushes: &Arc<GroupFlush>, left: usize, end: Sender<()>) {
            let next = Arc::clone(flushes);
            let answer = move |_: &Result<()>| match left {
                0 => end.send(()).unwrap(),
                _ => again(&next, left - 1, end),
            };
            flushes.flush(FlushOn::OwnThread, FlushKind::Durable, Box::new(answer));
        }
        let flushes = flushes(TestDisk::new(8).queueing(None));
        let (end, ended) = channel();
        let work = move || again(&flushes, 50_000, end);
        thread::Builder::new()
            .stack_size(256 << 10)
            .spawn(work)
            .unwrap()
            .join()
            .unwrap();
        ended.try_recv().unwrap();
    }

    #[test]
    fn regression_a_panic_during_the_submission_is_an_error_of_that_flush_only() {
        let first = std::sync::atomic::AtomicBool::new(true);
        let flush = move || {
            assert!(
                !first.swap(false, std::sync::atomic::Ordering::Relaxed),
                "panic on purpose"
            );
            Ok(())
        };
        let flushes = flushes(TestDisk::new(8).queueing(None).flushing(flush));
        let (answers, answered) = channel();
        for expected in [false, true, true] {
            let answers = answers.clone();
            flushes.flush(
                FlushOn::OwnThread,
                FlushKind::Durable,
                Box::new(move |result| answers.send(result.is_ok()).unwrap()),
            );
            assert_eq!(answered.try_recv(), Ok(expected));
        }
    }

    #[test]
    fn a_thread_that_may_wait_gets_the_flush_of_another_one() {
        let (flushes, begun, give) = slow();
        let loops = LoopBudget::new(2);
        thread::scope(|scope| {
            let done = Box::new(|result: &Result<()>| assert!(result.is_ok()));
            scope.spawn(|| flushes.flush(FlushOn::SpareLoop(&loops), FlushKind::Durable, done));
            begun.recv().unwrap();
            let waits = scope.spawn(|| flushes.flush_here(FlushKind::Complete));
            while flushes.waiting() == 0 {
                thread::yield_now();
            }
            give.send(Ok(())).unwrap();
            begun.recv().unwrap();
            give.send(failure()).unwrap();
            assert_eq!(waits.join().unwrap().unwrap_err().kind(), ErrorKind::Os(libc::EIO));
        });
        assert!(begun.try_recv().is_err(), "one flush more than necessary");
    }

    #[test]
    fn a_thread_that_may_wait_gets_an_error_if_the_queue_drops_its_flush() {
        let (starts, begun) = channel();
        let flushes = flushes(TestDisk::new(8).queueing(Some(starts)));
        thread::scope(|scope| {
            let waits = scope.spawn(|| flushes.flush_here(FlushKind::Complete));
            drop(begun.recv().unwrap());
            assert!(waits.join().unwrap().is_err());
        });
    }
}
