//! Flushes: one at a time for a disk, shared by all who wait, and never on the last event loop.
//!
//! ```text
//!   fsync, close, O_SYNC ─► one under way? ─ yes ─► joins those that the next one is for
//!                              │ no
//!                              ├─ the disk has a queue ─► begun here, answered when the answer comes: no thread waits
//!                              ├─ a loop can be spared ─► here: no hop between threads
//!                              └─ else                 ─► a thread of its own
//!                              ▼
//!                           flush ─► answers ─► somebody joined meanwhile? ─► flush again
//! ```
//! A flush may take seconds, and requests of all disks wait for the loops, so at least one loop is kept free of
//! flushes. Whoever comes while a flush runs can't share it (it may have begun before his write), but all who do so
//! share the next one. So there are never more threads than disks.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::block::{BlockQueue, Stay};
use crate::error::{Error, ErrorKind, Result};
use crate::fuse::loop_budget::LoopBudget;
use crate::volume::Volume;

/// Gives somebody the result of the flush that he waits for.
pub(super) type Answer = Box<dyn FnOnce(&Result<()>) + Send>;

/// The flushes of a disk.
#[derive(Default)]
pub(super) struct Flushes(Mutex<Queue>);

#[derive(Default)]
struct Queue {
    running: bool,
    /// One is being begun just now.
    beginning: bool,
    /// It was over at once: who joined meanwhile.
    next: Vec<Answer>,
    /// Who came since the one that runs was begun.
    joined: Vec<Answer>,
}

impl std::fmt::Debug for Flushes {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let queue = self.queue();
        f.debug_struct("Flushes")
            .field("running", &queue.running)
            .field("joined", &queue.joined.len())
            .finish()
    }
}

impl Flushes {
    /// Flushes `volume`, and answers when everything that was written to it before is durable. Returns at once where
    /// somebody else does the work. Afterwards the disk's queue, if it has one, wants to be attended to.
    pub(super) fn flush(self: &Arc<Self>, volume: &Arc<Volume>, loops: &LoopBudget, answer: Answer) {
        {
            let mut queue = self.queue();
            if queue.running {
                return queue.joined.push(answer);
            }
            queue.running = true;
        }
        if let Some(queue) = volume.queue() {
            return self.begin(volume, queue, vec![answer]);
        }
        // a disk behind a network may take any time, so it is never given a loop
        let busy = if volume.is_remote() { None } else { loops.spare() };
        if let Some(_busy) = busy {
            return self.work(volume, answer);
        }
        // shared with the thread, so that it is not lost where there is none to be had
        let first = Arc::new(Mutex::new(Some(answer)));
        let (this, theirs, its_image) = (Arc::clone(self), Arc::clone(&first), Arc::clone(volume));
        let begun = std::thread::Builder::new().name("flush".to_owned()).spawn(move || {
            if let Some(answer) = take(&theirs) {
                this.work(&its_image, answer);
            }
        });
        if begun.is_err()
            && let Some(answer) = take(&first)
        {
            self.work(volume, answer);
        }
    }

    /// Begins a flush for those who wait for it, and when it is over the next one, for those who joined meanwhile.
    fn begin(self: &Arc<Self>, volume: &Arc<Volume>, queue: &dyn BlockQueue, mut answers: Vec<Answer>) {
        while !answers.is_empty() {
            self.queue().beginning = true;
            let mut turn = Turn {
                flushes: Arc::clone(self),
                volume: Arc::clone(volume),
                answers,
            };
            let begun = || queue.submit_flush(Box::new(move |result| turn.end(&result)));
            if catch_unwind(AssertUnwindSafe(begun)).is_err() {
                tracing::error!("a flush was given up after a panic");
            }
            let mut queue = self.queue();
            queue.beginning = false;
            // of one that is over already the next ones are begun here, not within each other
            answers = std::mem::take(&mut queue.next);
        }
    }

    /// Who joined since the last flush was begun; with nobody none is running any more.
    fn next(&self) -> Vec<Answer> {
        let mut queue = self.queue();
        let joined = std::mem::take(&mut queue.joined);
        queue.running = !joined.is_empty();
        if queue.beginning {
            queue.next = joined;
            return Vec::new();
        }
        joined
    }

    /// Flushes for `first`, and for those who join until nobody does.
    fn work(&self, volume: &Volume, first: Answer) {
        let mut answers = vec![first];
        while !answers.is_empty() {
            let result = catch_unwind(AssertUnwindSafe(|| volume.flush())).unwrap_or_else(|_| {
                Err(Error::new(
                    ErrorKind::Os(libc::EIO),
                    "a flush was given up after a panic",
                ))
            });
            tell(answers, &result);
            answers = self.next();
        }
    }

    fn queue(&self) -> MutexGuard<'_, Queue> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A flush that was begun. One that is given up without an end is an error: nobody waits for ever.
struct Turn {
    flushes: Arc<Flushes>,
    volume: Arc<Volume>,
    answers: Vec<Answer>,
}

impl Turn {
    fn end(&mut self, result: &Result<()>) {
        tell(std::mem::take(&mut self.answers), result);
        let joined = self.flushes.next();
        if let Some(queue) = self.volume.queue().filter(|_| !joined.is_empty()) {
            self.flushes.begin(&self.volume, queue, joined);
            queue.poll_completions(Stay::No);
        }
    }
}

impl Drop for Turn {
    fn drop(&mut self) {
        if !self.answers.is_empty() {
            self.end(&Err(Error::new(ErrorKind::Os(libc::EIO), "a flush was given up")));
        }
    }
}

/// Answers all; one that panics is that one's affair alone.
fn tell(answers: Vec<Answer>, result: &Result<()>) {
    for answer in answers {
        if catch_unwind(AssertUnwindSafe(|| answer(result))).is_err() {
            tracing::error!("the answer to a flush was given up after a panic");
        }
    }
}

fn take(answer: &Mutex<Option<Answer>>) -> Option<Answer> {
    answer.lock().unwrap_or_else(PoisonError::into_inner).take()
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc::{Receiver, Sender, channel};
    use std::thread;

    use super::*;
    use crate::test_disk::TestDisk;

    /// An image of which each flush tells its thread and waits for its result: the image, the threads, and what gives
    /// the results.
    fn slow() -> (Arc<Volume>, Receiver<String>, Sender<Result<()>>) {
        let ((say, begun), (give, results)) = (channel(), channel());
        let results = Mutex::new(results);
        let disk = TestDisk::new(8).flushing(move || {
            say.send(thread::current().name().unwrap_or_default().to_owned())
                .unwrap();
            results.lock().unwrap().recv().unwrap()
        });
        (Arc::new(Volume::new(Arc::new(disk), Vec::new())), begun, give)
    }

    fn failure() -> Result<()> {
        Err(Error::new(ErrorKind::Os(libc::EIO), "broken"))
    }

    #[test]
    fn who_comes_during_a_flush_shares_the_next_one_and_its_error() {
        let (volume, begun, give) = slow();
        let (flushes, loops) = (Arc::new(Flushes::default()), LoopBudget::new(2));
        let (answers, answered) = channel();
        let answer = |name: &'static str| -> Answer {
            let answers = answers.clone();
            Box::new(move |result| answers.send((name, result.is_ok())).unwrap())
        };
        thread::scope(|scope| {
            let first = answer("first");
            scope.spawn(|| flushes.flush(&volume, &loops, first));
            begun.recv().unwrap();
            // both return at once, though nothing is flushed yet
            flushes.flush(&volume, &loops, answer("second"));
            flushes.flush(&volume, &loops, answer("third"));
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
        assert!(begun.try_recv().is_err(), "one more flush than was needed");
    }

    #[test]
    fn the_last_loop_is_never_busy_with_a_flush() {
        let ((one, one_begun, one_give), (two, two_begun, two_give)) = (slow(), slow());
        let loops = LoopBudget::new(2);
        let (answers, answered) = channel();
        let answer = || -> Answer {
            let answers = answers.clone();
            Box::new(move |result| answers.send(result.is_ok()).unwrap())
        };
        thread::scope(|scope| {
            let first = answer();
            scope.spawn(|| Arc::new(Flushes::default()).flush(&one, &loops, first));
            one_begun.recv().unwrap();
            // this thread is the last loop, and goes on
            Arc::new(Flushes::default()).flush(&two, &loops, answer());
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
    fn flushes_that_are_begun_are_shared_too_and_one_that_is_given_up_is_an_error() {
        let (say, begun) = channel();
        let volume = Arc::new(Volume::new(Arc::new(TestDisk::new(8).queueing(Some(say))), Vec::new()));
        let (flushes, loops) = (Arc::new(Flushes::default()), LoopBudget::new(1));
        let (answers, answered) = channel();
        let flush = |name: &'static str| {
            let answers = answers.clone();
            let answer = Box::new(move |result: &Result<()>| answers.send((name, result.is_ok())).unwrap());
            flushes.flush(&volume, &loops, answer);
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
        // and all is as before
        flush("fourth");
        begun.try_recv().unwrap()(failure());
        assert_eq!(answered.try_recv(), Ok(("fourth", false)));
        assert!(begun.try_recv().is_err());
    }

    #[test]
    fn regression_an_answer_that_panics_leaves_the_others_and_later_flushes_alone() {
        let (say, begun) = channel();
        let volume = Arc::new(Volume::new(Arc::new(TestDisk::new(8).queueing(Some(say))), Vec::new()));
        let (flushes, loops) = (Arc::new(Flushes::default()), LoopBudget::new(1));
        let (answers, answered) = channel();
        let flush = |panics: bool| {
            let answers = answers.clone();
            let answer = move |result: &Result<()>| {
                assert!(!panics, "this is meant");
                answers.send(result.is_ok()).unwrap();
            };
            flushes.flush(&volume, &loops, Box::new(answer));
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
    fn regression_flushes_that_are_over_at_once_do_not_lie_within_each_other() {
        /// Flushes once more, when it is answered, and so on.
        fn flush(flushes: &Arc<Flushes>, volume: &Arc<Volume>, left: usize, end: Sender<()>) {
            let (again, its_image) = (Arc::clone(flushes), Arc::clone(volume));
            let answer = move |_: &Result<()>| match left {
                0 => end.send(()).unwrap(),
                _ => flush(&again, &its_image, left - 1, end),
            };
            flushes.flush(volume, &LoopBudget::new(1), Box::new(answer));
        }
        let volume = Arc::new(Volume::new(Arc::new(TestDisk::new(8).queueing(None)), Vec::new()));
        let (end, ended) = channel();
        let work = move || flush(&Arc::new(Flushes::default()), &volume, 50_000, end);
        thread::Builder::new()
            .stack_size(256 << 10)
            .spawn(work)
            .unwrap()
            .join()
            .unwrap();
        ended.try_recv().unwrap();
    }

    #[test]
    fn regression_a_panic_while_a_flush_is_begun_is_an_error_of_that_one() {
        let first = std::sync::atomic::AtomicBool::new(true);
        let flush = move || {
            assert!(
                !first.swap(false, std::sync::atomic::Ordering::Relaxed),
                "this is meant"
            );
            Ok(())
        };
        let volume = Arc::new(Volume::new(
            Arc::new(TestDisk::new(8).queueing(None).flushing(flush)),
            Vec::new(),
        ));
        let (flushes, loops) = (Arc::new(Flushes::default()), LoopBudget::new(1));
        let (answers, answered) = channel();
        for wanted in [false, true, true] {
            let answers = answers.clone();
            flushes.flush(
                &volume,
                &loops,
                Box::new(move |result| answers.send(result.is_ok()).unwrap()),
            );
            assert_eq!(answered.try_recv(), Ok(wanted));
        }
    }
}
